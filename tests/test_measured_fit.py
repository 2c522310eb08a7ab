"""Fits: what was planted is found again, what does not matter stays, and what was not measured is kept."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from apex_opt.cluster import load_cluster
from apex_opt.cost.engine import TIMES, EngineOverhead, load_engine
from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.measured.compare import Predictor
from apex_opt.measured.fit import FITTED_ON, BoardFit, EngineFit, fit_board, fit_engine
from apex_opt.measured.runs import MeasuredRun, UnusableRun
from apex_opt.plans.engine import EngineSettings
from apex_opt.profiles import load_profile
from apex_opt.profiles.power import PowerFit
from apex_opt.report.fitting import engine_section, fit_document, power_section
from apex_opt.report.profile_tables import profile_page
from apex_opt.schema import to_plain
from apex_opt.workload import load_trace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apex_opt.measured.compare import Prediction

SETTINGS = EngineSettings(max_num_seqs=32, max_num_batched_tokens=512, max_model_len=4096)
BEFORE = load_engine("vllm")
LOADS = (
    "static:n=1,prompt=64,output=48",
    "closed:concurrency=4,n=12,prompt=300,output=32",
    "closed:concurrency=32,n=64,prompt=16,output=64",
    "static:n=12,prompt=3000,output=2",
    "poisson:rate=20,n=20,prompt=700,output=20",
    "poisson:rate=1,n=4,prompt=200,output=20",
)


def quiet(*_: object) -> None:
    """No progress."""


def a_run(load: str, plan: str = "tp1", cluster: str = "h200-sxm") -> MeasuredRun:
    return MeasuredRun(
        name=f"{load} {plan} {cluster}",
        origin="a test",
        kind="test",
        model="llama-3.1-8b",
        cluster=cluster,
        plan=plan,
        engine="vllm",
        settings=SETTINGS,
        sweep="a",
        trace=load_trace(load, seed=1),
        measured={},
    )


RUNS = tuple(map(a_run, LOADS))


def predictions(runs: Sequence[MeasuredRun], overhead: EngineOverhead = BEFORE) -> list[Prediction]:
    found = [comparison.prediction for comparison in Predictor({overhead.name: overhead}).compare(runs, quiet)]
    return [prediction for prediction in found if prediction is not None]


def measured_with(overhead: EngineOverhead, runs: Sequence[MeasuredRun] = RUNS) -> list[MeasuredRun]:
    """Runs as an engine with other times would have been measured."""
    return [
        replace(run, measured={metric: found.values[metric] for metric in FITTED_ON})
        for run, found in zip(runs, predictions(runs, overhead), strict=True)
    ]


@pytest.mark.parametrize("planted", [{"step_s": 2 * BEFORE.step_s}, {"request_s": 2 * BEFORE.request_s}])
def test_a_planted_time_is_found_again_and_the_rest_stays(planted: Mapping[str, float]) -> None:
    fit = fit_engine(measured_with(replace(BEFORE, **planted)), "vllm", quiet)
    assert (fit.before, fit.runs) == (BEFORE, len(RUNS))
    for name in TIMES:
        wanted = planted.get(name, getattr(BEFORE, name))
        assert getattr(fit.after, name) == pytest.approx(wanted, rel=0.3 if name in planted else 1e-3), name
    before = sum(errors.mean_ape_pct for errors in fit.errors_before.values())
    after = sum(errors.mean_ape_pct for errors in fit.errors_after.values())
    assert set(fit.errors_after) == set(FITTED_ON)
    assert after < 0.3 * before


def test_an_engine_that_fits_is_left_as_it_is() -> None:
    fit = fit_engine(measured_with(BEFORE), "vllm", quiet)
    assert fit.after == BEFORE
    assert tomllib.loads(engine_section(fit))["own_time"]["source"] == BEFORE.source


def test_runs_of_other_engines_do_not_pull() -> None:
    mine = measured_with(BEFORE, RUNS[:2])
    other = [replace(run, engine="sglang", measured={"tpot_mean": 1.0}) for run in mine]
    fit = fit_engine([*mine, *other], "vllm", quiet)
    assert (fit.after, fit.runs) == (BEFORE, 2)


def test_times_are_fitted_on_one_half_and_judged_by_the_other() -> None:
    planted = measured_with(replace(BEFORE, step_s=2 * BEFORE.step_s))
    wrong = [replace(run, sweep="e", measured={"tpot_mean": 1.0}) for run in planted[:2]]
    assert wrong[0].judged
    assert not planted[0].judged
    fit = fit_engine([*planted, *wrong], "vllm", quiet)
    assert fit.after == fit_engine(planted, "vllm", quiet).after
    assert (fit.runs, fit.judged) == (len(planted), 2)
    assert set(fit.errors_after) == {"tpot_mean"}
    alone = fit_engine([replace(run, sweep="e") for run in planted], "vllm", quiet)
    assert (alone.after, alone.runs, alone.judged) == (fit.after, len(planted), 0)


def test_progress_says_what_is_being_fitted() -> None:
    said: set[str] = set()
    fit_engine(measured_with(BEFORE, RUNS[:1]), "vllm", lambda what, done, total: said.add(what))
    assert said == {"simulating measured runs", *(f"fitting {name}" for name in TIMES)}


def test_without_runs_that_can_be_predicted_there_is_nothing_to_fit_on() -> None:
    unusable = UnusableRun(name="u", origin="f", kind="k", model="llama-3.1-8b", reason="odd")
    for runs in ([], [unusable], [replace(RUNS[0], engine="sglang")], [replace(RUNS[0], plan="tp64")]):
        with pytest.raises(UsageError, match="no run of engine vllm could be predicted: nothing to fit on"):
            fit_engine(runs, "vllm", quiet)
    with pytest.raises(UnknownNameError, match="unknown engine 'vlm'; did you mean vllm"):
        fit_engine(RUNS, "vlm", quiet)


# ---- boards -------------------------------------------------------------------------------------------------------

PLANTED = (30.0, 0.5e-12, 0.3e-12, 0.7e-10)


def with_energies(runs: Sequence[MeasuredRun], planted: tuple[float, ...] = PLANTED) -> list[MeasuredRun]:
    """Runs with the energies that planted coefficients give the work predicted for them."""
    made = []
    for run, found in zip(runs, predictions(runs), strict=True):
        gpu = load_cluster(run.cluster).gpu
        joules = gpu.idle_w * found.sample[0] + float(np.dot(planted, found.sample))
        assert joules < 0.95 * gpu.tdp_w * found.sample[0], "the limit would hide the coefficients"
        made.append(replace(run, measured={"energy": joules * found.plan.devices}))
    return made


def figures(fit: PowerFit) -> tuple[float, float, float, float]:
    return fit.active_w, fit.joule_per_flop_half, fit.joule_per_flop_narrow, fit.joule_per_byte


def test_planted_coefficients_are_found_again() -> None:
    runs = with_energies([a_run(load, plan) for load in LOADS for plan in ("tp1", "tp1 fp8")])
    (board,) = fit_board(runs, quiet)
    assert (board.gpu, len(board.errors_pct)) == ("h200-sxm-141gb", len(runs))
    assert figures(board.fit) == pytest.approx(PLANTED, rel=1e-6)
    assert np.abs(board.errors_pct).max() < 1e-6
    assert board.fit.source == f"fitted on the energies of {len(runs)} measured serving runs of this accelerator"


def test_arithmetic_that_no_run_has_keeps_its_coefficient() -> None:
    before = load_profile(load_cluster("h200-sxm").gpu).power.joule_per_flop
    (half,) = fit_board(with_energies(RUNS), quiet)
    assert half.fit.joule_per_flop_narrow == before["fp8"] > 0
    assert half.fit.joule_per_flop_half == pytest.approx(PLANTED[1])
    assert half.fit.source.endswith("; narrow arithmetic as it was: no run has any")
    (narrow,) = fit_board(with_energies([a_run(load, "tp1 fp8") for load in LOADS]), quiet)
    assert narrow.fit.joule_per_flop_half == before["bf16"]
    assert narrow.fit.joule_per_flop_narrow == pytest.approx(PLANTED[2])
    assert narrow.fit.source.endswith("; 16-bit arithmetic as it was: no run has any")


def test_each_accelerator_has_its_own_fit_whatever_the_node_it_stands_in() -> None:
    runs = [a_run(load, "tp1", cluster) for load in LOADS for cluster in ("h200-sxm", "2xh200-sxm", "h100-sxm")]
    boards = {board.gpu: board for board in fit_board(with_energies(runs), quiet)}
    assert {name: len(board.errors_pct) for name, board in boards.items()} == {
        "h200-sxm-141gb": 2 * len(LOADS),
        "h100-sxm-80gb": len(LOADS),
    }
    for board in boards.values():
        assert board.fit.joule_per_byte == pytest.approx(PLANTED[3])


def test_energy_per_gpu_is_fitted_where_several_share_a_model() -> None:
    (board,) = fit_board(with_energies([a_run(load, "tp2", "2xh200-sxm") for load in LOADS]), quiet)
    assert board.fit.joule_per_byte == pytest.approx(PLANTED[3])


def test_runs_without_energies_or_with_energies_set_aside_have_no_board() -> None:
    (run, *_) = with_energies(RUNS[:1])
    aside = replace(run, set_aside={"energy": "counter too coarse"})
    unusable = UnusableRun(name="u", origin="f", kind="k", model="llama-3.1-8b", reason="odd")
    assert fit_board([RUNS[0], aside, unusable, replace(run, plan="tp64")], quiet) == ()


def test_time_before_the_first_arrival_is_time_of_the_sample() -> None:
    run = RUNS[0]
    arrival_ns = run.trace.arrival_ns + 10_000_000_000
    arrival_ns.flags.writeable = False
    (early, late) = predictions([run, replace(run, trace=replace(run.trace, arrival_ns=arrival_ns))])
    assert late.sample[0] - early.sample[0] == pytest.approx(10.0)
    assert late.sample[1:] == pytest.approx(early.sample[1:])


# ---- what is printed ----------------------------------------------------------------------------------------------

BOARD = BoardFit(
    gpu="h200-sxm-141gb",
    fit=PowerFit(
        active_w=12.5,
        joule_per_flop_half=0.874e-12,
        joule_per_flop_narrow=0.4661e-12,
        joule_per_byte=127.34e-12,
        source='told "here"',
    ),
    runs=5,
    judged=3,
    errors_pct=(-4.0, 1.0, 2.0),
)


@pytest.mark.parametrize("name", ["vllm", "trtllm", "vllm-0.6", "sglang-eager"])
def test_the_section_of_an_engine_is_read_back_as_the_engine_fitted(name: str) -> None:
    before = load_engine(name)
    after = replace(before, launch_s=21.7e-6, step_s=0.0)
    fit = EngineFit(before=before, after=after, runs=18, judged=0, errors_before={}, errors_after={})
    table = tomllib.loads(engine_section(fit))
    own_time = table["releases"][name]["own_time"] if "-" in name else table["own_time"]
    source = f"step_us, launch_us fitted on 18 measured runs; the rest as before: {before.source}"
    assert EngineOverhead.of(name, own_time) == replace(after, source=source)


def test_the_power_table_of_a_board_holds_its_coefficients() -> None:
    assert tomllib.loads(power_section(BOARD))["power"] == {
        "active_w": 12.5,
        "pj_per_flop": 0.874,
        "pj_per_narrow_flop": 0.4661,
        "pj_per_byte": 127.3,
        "source": 'told "here"',
    }


def test_the_page_has_the_figures_of_the_document_and_sections_to_copy_unbroken() -> None:
    fit = fit_engine(measured_with(replace(BEFORE, step_s=2 * BEFORE.step_s), RUNS[:2]), "vllm", quiet)
    document = to_plain(fit_document(fit, [BOARD]))
    assert document["times_us"]["step_us"] == {"before": 250.0, "after": 500.0}
    assert document["boards"][0]["mean_ape_pct"] == pytest.approx(7 / 3)
    text = profile_page(document)
    assert document["engine_toml"] in text
    assert document["boards"][0]["power_toml"] in text
    assert max(map(len, document["engine_toml"].splitlines())) > 120
    for metric, found in document["errors"]["before"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"{metric} "))
        assert f"{found['mean_ape_pct']:.1f}%" in line
        assert f"{document['errors']['after'][metric]['bias_pct']:+.1f}%" in line
    assert "For the card of h200-sxm-141gb (5 runs with energies, of 3 others mean |error| 2.3%, largest 4.0%):" in text
