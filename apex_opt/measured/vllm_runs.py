"""Runs of vLLM with the engine's own log: `NAME.json.gz`, its model in `NAME.config.json` beside it."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.cluster import gpu_name
from apex_opt.engines.kinds import load_kind
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.measured.files import read_json
from apex_opt.measured.runs import Iterations, MeasuredRun, UnusableRun
from apex_opt.plans.engine import EngineSettings
from apex_opt.units import NS_PER_S
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.measured.runs import Run

KIND: Final = "vllm-runs"
DEFAULT_GPU: Final = "h200-sxm"
"""GPU of a file whose folder is not named after one, as in `h200-vllm-0.20.2`: files do not name theirs."""

_FOLDER: Final = re.compile(r"(?P<gpu>.+)-vllm-\d.*")
_WEIGHTS: Final = {None: "", "fp8": "fp8", "gptq": "w4a16", "awq": "w4a16", "gptq_marlin": "w4a16"}
_KV: Final = {"auto": "", "bfloat16": "bf16", "float16": "fp16", "fp8": "fp8", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8"}
_UTILISATION: Final = 0.9
_COLD: Final = 3.0
_AFFECTED_BY_COLD_START: Final = ("ttft_mean", "ttft_p95", "e2e_mean", "throughput", "energy")
_REQUEST: Final = ("submit", "first", "last", "prompt", "n_output")


def recognised(content: Any) -> bool:
    """Whether a JSON value is such a file."""
    return isinstance(content, dict) and isinstance(content.get("engine"), dict) and "runs" in content


def read_vllm_runs(path: Path) -> list[Run]:
    """Every run of a file.

    The engine's recorded limits and number of KV blocks are taken. A block fewer can be handed out, as vLLM keeps one.

    Raises
    ------
    InputError    what is missing or out of range, with run and request
    """
    content = read_json(path)
    if not recognised(content):
        raise InputError(f"{path}: expected an object with 'engine' and 'runs'")
    stem = path.name.removesuffix(".gz").removesuffix(".json")
    engine, runs = content["engine"], content["runs"]
    if not isinstance(runs, dict) or not runs:
        raise InputError(f"{path}: 'runs' must be an object with at least one run")
    requests = {name: _requests(path, name, run) for name, run in runs.items()}
    config = path.with_name(f"{stem}.config.json")
    model = str(config) if config.is_file() else str(engine.get("model") or stem)
    tp = _whole(path, engine, "tensor_parallel_size", 1)
    gpu, assumptions = _gpu(path)
    formats = _formats(engine)
    if formats is None:
        detail = f"quantization {engine.get('quantization')!r:.40}, KV cache {engine.get('kv_dtype')!r:.40}"
        return [
            UnusableRun(
                name=f"{stem}/{name}",
                origin=f"{path}: run {name}",
                kind=KIND,
                model=model,
                reason="number formats not described",
                detail=detail,
            )
            for name in runs
        ]
    first, cold = next(iter(runs)), _cold_start(requests)
    found: list[Run] = []
    for name, run in runs.items():
        rows = requests[name]
        measured = _latencies(rows)
        energy = _summary(path, name, run).get("energy_J")
        if energy is not None:
            measured["energy"] = _positive(path, name, "summary.energy_J", energy)
        aside = dict.fromkeys(_AFFECTED_BY_COLD_START, cold) if cold and name == first else {}
        found.append(
            MeasuredRun(
                name=f"{stem}/{name}",
                origin=f"{path}: run {name}",
                kind=KIND,
                model=model,
                cluster=gpu if tp == 1 else f"{tp}x{gpu}",
                plan=f"tp{tp}{formats}",
                engine="vllm",
                settings=_settings(path, engine),
                sweep=f"{stem} {gpu} vllm tp{tp}{formats} {name.rstrip('0123456789')}",
                trace=make_trace(
                    name=name,
                    arrival_ns=np.rint(rows[:, 0] * NS_PER_S).astype(np.int64),
                    prompt=rows[:, 3].astype(np.int64),
                    output=rows[:, 4].astype(np.int64),
                    source=f"file {path}: run {name}, as submitted",
                ),
                kv_blocks=_whole(path, engine, "num_gpu_blocks", None) - 1,
                measured=measured,
                set_aside={metric: text for metric, text in aside.items() if metric in measured},
                assumptions=assumptions,
                iterations=_iterations(path, name, run, rows),
            )
        )
    return found


def _gpu(path: Path) -> tuple[str, tuple[str, ...]]:
    """The GPU that the folder is named after, and what is assumed where it is not."""
    if match := _FOLDER.fullmatch(path.resolve().parent.name.lower()):
        with suppress(UnknownNameError, UsageError):
            gpu_name(match["gpu"])
            return match["gpu"], ()
    return DEFAULT_GPU, (f"measured on {DEFAULT_GPU}",)


def _formats(engine: dict[str, Any]) -> str | None:
    """Number formats as words of a plan, none where they are the model's own; None where they are not known."""
    quantization, kv = engine.get("quantization"), engine.get("kv_dtype") or "auto"
    if not isinstance(quantization, str | None) or quantization not in _WEIGHTS:
        return None
    if not isinstance(kv, str) or kv not in _KV:
        return None
    words = (_WEIGHTS[quantization], f"kv={_KV[kv]}" if _KV[kv] else "")
    return "".join(f" {word}" for word in words if word)


def _settings(path: Path, engine: dict[str, Any]) -> EngineSettings:
    try:
        return EngineSettings(
            max_num_seqs=_whole(path, engine, "max_num_seqs", None),
            max_num_batched_tokens=_whole(path, engine, "max_num_batched_tokens", None),
            max_model_len=_whole(path, engine, "max_model_len", None),
            block_size=_whole(path, engine, "block_size", 16),
            chunked_prefill=bool(engine.get("chunked", True)),
            async_scheduling=bool(engine.get("async_scheduling", True)),
            gpu_memory_utilization=engine.get("gpu_memory_utilization", _UTILISATION),
            scheduler=load_kind("vllm").scheduling(),
        )
    except UsageError as error:
        raise InputError(f"{path}: engine: {error}") from None


def _whole(path: Path, engine: dict[str, Any], key: str, default: int | None) -> int:
    value = engine.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{path}: engine.{key} {value!r:.40} is not a whole number above 0")
    return value


def _summary(path: Path, name: str, run: Any) -> dict[str, Any]:
    summary = run.get("summary", {})
    if not isinstance(summary, dict):
        raise InputError(f"{path}: run {name}: 'summary' must be an object")
    return summary


def _positive(path: Path, name: str, what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputError(f"{path}: run {name}: {what} {value!r:.40} is not a finite number above 0")
    return float(value)


def _table(path: Path, name: str, what: str, rows: Any, width: int) -> NDArray[np.float64]:
    """A list of rows of so many finite numbers of at least 0."""
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: run {name}: '{what}s' must be a list with at least one row")
    for number, row in enumerate(rows, 1):
        good = isinstance(row, list) and len(row) == width
        if not good or not all(type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in row):
            raise InputError(
                f"{path}: run {name}: {what} {number}: expected {width} finite numbers of at least 0, got {row!s:.60}"
            )
    return np.array(rows, np.float64)


def _requests(path: Path, name: str, run: Any) -> NDArray[np.float64]:
    """Requests in order of submission."""
    if not isinstance(run, dict):
        raise InputError(f"{path}: run {name}: expected an object with 'requests'")
    rows = _table(path, name, "request", run.get("requests"), len(_REQUEST))
    counts = rows[:, 3:]
    bad = np.flatnonzero(
        (rows[:, 1] < rows[:, 0])
        | (rows[:, 2] < rows[:, 1])
        | (counts < 1).any(axis=1)
        | (counts != np.rint(counts)).any(axis=1)
    )
    if bad.size:
        row = run["requests"][int(bad[0])]
        raise InputError(
            f"{path}: run {name}: request {bad[0] + 1}: [{', '.join(_REQUEST)}] must be three times in this order "
            f"and two whole numbers above 0, got {row!s:.80}"
        )
    return rows[np.argsort(rows[:, 0], kind="stable")]


def _iterations(path: Path, name: str, run: Any, requests: NDArray[np.float64]) -> Iterations | None:
    if run.get("iterations") is None:
        return None
    log = _table(path, name, "iteration", run["iterations"], 7)
    if (np.diff(log[:, 0]) < 0).any():
        raise InputError(f"{path}: run {name}: iterations are not in order of time")
    return Iterations(log=log, requests=requests)


def _latencies(rows: NDArray[np.float64]) -> dict[str, float]:
    """Metrics of the requests, defined as for simulated ones."""
    submit, first, last, _, output = rows.T
    found = {
        "ttft_mean": float((first - submit).mean()),
        "ttft_p95": float(np.percentile(first - submit, 95)),
        "e2e_mean": float((last - submit).mean()),
        "throughput": len(rows) / float(last.max() - submit.min()),
    }
    several = output > 1
    if several.any():
        gaps = (output - 1)[several]
        spent = (last - first)[several]
        found |= {
            "tpot_mean": float((spent / gaps).mean()),
            "tpot_p95": float(np.percentile(spent / gaps, 95)),
            "itl_mean": float(spent.sum() / gaps.sum()),
        }
    return {metric: value for metric, value in found.items() if value > 0}


def _cold_start(requests: dict[str, NDArray[np.float64]]) -> str:
    """Why the first run of an engine start is no steady state, or nothing.

    A warm engine answers a prompt no slower than it answers a longer one that had to share the engine. So where the
    very first request waits `_COLD` times as long for its first token as the quickest request of a later run with at
    least as long a prompt, the engine was not warm.
    """
    runs = list(requests.values())
    submit, first, _, prompt, _ = runs[0][0]
    later = [rows[rows[:, 3] >= prompt] for rows in runs[1:]]
    waits = np.concatenate([rows[:, 1] - rows[:, 0] for rows in later]) if later else np.array([])
    if not waits.size or first - submit <= _COLD * waits.min():
        return ""
    return (
        f"cold start: the first request after the engine's start saw its first token after "
        f"{(first - submit) * 1e3:.0f} ms, a later one with as long a prompt after {waits.min() * 1e3:.0f} ms"
    )
