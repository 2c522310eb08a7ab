"""Fits on measured runs as plain data, with the own time of engines and the sections of cards that they make."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.cost.engine import TIMES
from apex_opt.engines import ENGINES
from apex_opt.report import listed
from apex_opt.schema import of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apex_opt.cost.engine import EngineOverhead
    from apex_opt.measured.compare import Summary
    from apex_opt.measured.fit import BoardFit, EngineFit


def fit_document(fit: EngineFit, boards: Sequence[BoardFit]) -> listed.Fit:
    """What `profile fit` found: times and coefficients, their errors in percent of what was measured, and the text."""
    return listed.Fit(
        command="profile fit",
        status="ok",
        engine=fit.after.name,
        runs=fit.runs,
        judged_runs=fit.judged,
        times_us={
            _column(name): {"before": _us(getattr(fit.before, name)), "after": _us(getattr(fit.after, name))}
            for name in TIMES
        },
        errors={"before": errors_document(fit.errors_before), "after": errors_document(fit.errors_after)},
        engine_toml=engine_section(fit),
        boards=tuple(map(_board, boards)),
    )


def errors_document(errors: Mapping[str, Summary]) -> dict[str, listed.Errors]:
    """Errors by figure."""
    return {metric: of(listed.Errors, summary) for metric, summary in errors.items()}


def _board(board: BoardFit) -> listed.Board:
    sizes = np.abs(board.errors_pct)
    return listed.Board(
        gpu=board.gpu,
        runs=board.runs,
        judged_runs=board.judged,
        coefficients=_coefficients(board),
        mean_ape_pct=float(sizes.mean()),
        median_ape_pct=float(np.median(sizes)),
        largest_ape_pct=float(sizes.max()),
        power_toml=power_section(board),
    )


def _coefficients(board: BoardFit) -> dict[str, float]:
    """Coefficients by their names on a card."""
    fit = board.fit
    spin = {} if fit.spin_w is None else {"spin_w": float(f"{fit.spin_w:.4g}")}
    return spin | {
        "active_w": float(f"{fit.active_w:.4g}"),
        "pj_per_flop": float(f"{fit.joule_per_flop_half * 1e12:.4g}"),
        "pj_per_narrow_flop": float(f"{fit.joule_per_flop_narrow * 1e12:.4g}"),
        "pj_per_byte": float(f"{fit.joule_per_byte * 1e12:.4g}"),
    }


def power_section(board: BoardFit) -> str:
    """The `[power]` table of an accelerator's card."""
    lines = [f"{name} = {value!r}" for name, value in _coefficients(board).items()]
    return "\n".join(["[power]", *lines, f"source = {_quoted(board.fit.source)}"]) + "\n"


def engine_section(fit: EngineFit) -> str:
    """`own_time` of the engine after the fit, as its file in `apex_opt/engines/data` has it."""
    engine = fit.after
    release = "" if engine.name in ENGINES else f"releases.{_quoted(engine.name)}."
    lines = [
        f"[{release}own_time]",
        f"kernels = {_quoted(engine.kernels)}",
        *(f"{_column(name)} = {_us(getattr(engine, name))!r}" for name in TIMES),
        f"captured_tokens = {engine.captured_tokens}",
        f"fused = {json.dumps(engine.fused)}",
        f"captured = {json.dumps(_ranges(engine.captured_sizes))} # first, last, step",
        f"source = {_quoted(_source(fit.before, engine, fit.runs))}",
    ]
    return "\n".join(lines) + "\n"


def _source(before: EngineOverhead, after: EngineOverhead, runs: int) -> str:
    """Where the times come from: those that moved from the fit, the others from where they came before."""
    moved = [_column(name) for name in TIMES if getattr(after, name) != getattr(before, name)]
    if not moved:
        return before.source
    return f"{', '.join(moved)} fitted on {runs} measured runs; the rest as before: {before.source}"


def _column(name: str) -> str:
    return f"{name.removesuffix('_s')}_us"


def _us(seconds: float) -> float:
    return float(f"{seconds * 1e6:.6g}")


def _ranges(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Sizes as (first, last, step), as few as a walk from the smallest finds."""
    found: list[tuple[int, int, int]] = []
    start = 0
    while start < len(sizes):
        end = start
        step = sizes[start + 1] - sizes[start] if start + 1 < len(sizes) else 1
        while end + 1 < len(sizes) and sizes[end + 1] - sizes[end] == step:
            end += 1
        found.append((sizes[start], sizes[end], step))
        start = end + 1
    return found


def _quoted(text: str) -> str:
    """A TOML string; JSON's form of one is among TOML's."""
    return json.dumps(text)
