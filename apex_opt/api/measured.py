"""Measurements: predicted, fitted on, and tables of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt import arguments
from apex_opt.commands import Result, command
from apex_opt.errors import UsageError
from apex_opt.files import expanded
from apex_opt.schema import to_plain
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.measured.readers import Measurements


@command(arguments.ValidateAsk)
def validate(ask: arguments.ValidateAsk) -> Result:
    """Compare measured serving runs with their simulation."""
    from apex_opt.measured.compare import Predictor
    from apex_opt.profiles import check_profiles
    from apex_opt.report.validation import validation_document

    predictor = Predictor(profiles=check_profiles(ask.profiles))
    (measurements,) = _measurements(ask, (ask.measured,))
    comparisons = predictor.compare(measurements.runs, ask.tell)
    document = validation_document(measurements, comparisons, predictor.provenance)

    def draw(path: Path) -> None:
        from apex_opt.report.charts.front import errors_charts
        from apex_opt.report.picture import write_picture

        write_picture(path, *errors_charts(to_plain(document)))

    return Result(document=document, found=document.coverage.predicted > 0, files={"plot": draw})


def _measurements(
    ask: arguments.ValidateAsk | arguments.CalibrateAsk, paths: tuple[str | None, ...]
) -> list[Measurements]:
    """The runs of some files or folders; those that ship where none is named."""
    from apex_opt.measured.readers import SHIPPED, read_measured
    from apex_opt.planned import resolve_deployed

    deployed = None if ask.plan is None else resolve_deployed(ask, ask.plan)
    return [read_measured(SHIPPED if path is None else expanded(path), deployed) for path in paths]


@command(arguments.CalibrateAsk)
def calibrate(ask: arguments.CalibrateAsk) -> Result:
    """Fit the times of an engine on runs of your own, and write it as a file that every command takes."""
    from apex_opt.files import there
    from apex_opt.measured.calibrate import calibrate as fit
    from apex_opt.measured.calibrate import divided
    from apex_opt.outputs import write_whole
    from apex_opt.report.calibration import calibration_document

    out = None if ask.out is None else expanded(ask.out)
    if out is not None and there(out):
        raise UsageError(f"--out: {ask.out} is there already and is left alone; name a file that is not")
    paths = ask.measured if isinstance(ask.measured, tuple) else (ask.measured,)
    runs = [run for found in _measurements(ask, paths) for run in found.runs]
    fitted, held = divided(runs, ask.engine, ask.hold)
    found = fit(fitted, ask.engine, ask.tell, held)
    document = calibration_document(found, ask.engine, ask.out if found.better else None)
    if out is not None and found.better:
        write_whole(out, document.engine_toml.encode(), "out")
    return Result(document=document, found=document.status == "ok")


@command(arguments.ProfileShowAsk)
def profile_show(ask: arguments.ProfileShowAsk) -> Result:
    """List the measured tables there are, and where they come from."""
    from apex_opt.profiles.inventory import inventory
    from apex_opt.report.profiles import inventory_document

    root = DATA_ROOT / "profiles" if ask.profiles is None else expanded(ask.profiles)
    return Result(document=inventory_document(root, inventory(root, ask.gpu)))


@command(arguments.ProfileDistillAsk)
def profile_distill(ask: arguments.ProfileDistillAsk) -> Result:
    """Make the shipped tables anew from the package aiconfigurator-core."""
    from apex_opt.outputs import check_folder
    from apex_opt.profiles.distill.command import default_target, distill
    from apex_opt.report.profiles import tables_document

    source = None if ask.source is None else expanded(ask.source)
    target = default_target() if ask.target is None else expanded(ask.target)
    check_folder(target, "target")
    reports = distill(source, target, ask.tell, () if ask.gpu is None else (ask.gpu,))
    return Result(document=tables_document("profile distill", target, reports))


@command(arguments.ProfileImportAsk)
def profile_import(ask: arguments.ProfileImportAsk) -> Result:
    """Read the profile CSV files of APEX+ or Vidur."""
    from apex_opt.cluster import load_cluster
    from apex_opt.outputs import check_folder
    from apex_opt.profiles.importers import import_profile
    from apex_opt.report.profiles import tables_document

    gpu, target = load_cluster(ask.gpu).gpu, expanded(ask.target)
    check_folder(target, "target")
    found = import_profile(ask.kind, expanded(ask.source), gpu, target)
    return Result(document=tables_document("profile import", found.folder, found.reports, found.passed_over))


@command(arguments.ProfileCollectAsk)
def profile_collect(ask: arguments.ProfileCollectAsk) -> Result:
    """Measure the GPU of this machine."""
    from datetime import date

    from apex_opt.cluster import load_cluster
    from apex_opt.outputs import check_folder
    from apex_opt.profiles.collect import asked_ops, collect, recognised
    from apex_opt.profiles.collect.torch_machine import open_machine
    from apex_opt.report.profiles import tables_document

    ops, target = asked_ops(ask.ops), expanded(ask.target)
    check_folder(target, "target")
    described = None if ask.gpu is None else load_cluster(ask.gpu).gpu
    machine = open_machine()
    gpu = described or recognised(machine.name, machine.memory_bytes)
    found = collect(machine, gpu, target, ops, date.today().isoformat(), quick=ask.quick, progress=ask.tell)
    return Result(document=tables_document("profile collect", found.folder, found.reports, found.passed_over))


@command(arguments.ProfileFitAsk)
def profile_fit(ask: arguments.ProfileFitAsk) -> Result:
    """Fit an engine's own time and the power of GPUs on measured runs."""
    from apex_opt.measured.fit import fit_board, fit_engine
    from apex_opt.measured.readers import read_measured
    from apex_opt.report.fitting import fit_document

    runs = read_measured(expanded(ask.measured)).runs
    fit = fit_engine(runs, ask.engine, ask.tell)
    return Result(document=fit_document(fit, fit_board(runs, ask.tell, {fit.after.name: fit.after})))
