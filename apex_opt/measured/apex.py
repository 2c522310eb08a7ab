"""Means of APEX's own validation runs: a CSV file with a row per serving instance, and what each served beside it.

The settings are not in the file. They are those of the scripts it names and of the engine versions it names, as the
README beside the data tells them; what neither tells is assumed, and said so with each run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import InputError
from apex_opt.measured.files import Row, read_json, read_rows
from apex_opt.measured.runs import MeasuredRun, UnusableRun
from apex_opt.plans.engine import EngineSettings
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.measured.runs import Run
    from apex_opt.workload.trace import Trace

KIND: Final = "apex"
NEEDED: Final = (
    "file",
    "engine",
    "model",
    "hf_model_in_script",
    "dtype",
    "kv_dtype",
    "plan",
    "gpus_in_this_instance",
    "valid",
    "note",
    "ttft_mean_s",
    "itl_mean_s",
    "e2e_mean_s",
)
CLUSTER: Final = "8xh100-sxm"

_TRAFFIC: Final = re.compile(r"_(lmsys|creation|summarization)_")
_PLAN: Final = re.compile(r"(?:\d+DP)?(?P<count>\d+)(?P<kind>TP|EP)")
_VALID: Final[dict[str, dict[str, str]]] = {
    "True": {"ttft_mean": "ttft_mean_s", "itl_mean": "itl_mean_s", "e2e_mean": "e2e_mean_s"},
    "e2e only": {"e2e_mean": "e2e_mean_s"},
}
"""Columns to be judged by, per metric, as the column `valid` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deployment:
    """How an engine was started."""

    engine: str
    settings: EngineSettings
    assumptions: tuple[str, ...] = ()


# vLLM 0.6.0 forms whole-prompt batches apart from decode ones; where prompts are cut, decoding goes first as it does
# today. Its defaults: 256 sequences, 512 tokens a batch with chunked prefill, no asynchronous scheduling.
_CHUNKED: Final = EngineSettings(
    max_num_seqs=256, max_num_batched_tokens=512, async_scheduling=False, gpu_memory_utilization=0.97
)


def _whole(length: int, utilisation: float) -> EngineSettings:
    return EngineSettings(
        max_num_seqs=256,
        max_num_batched_tokens=length,
        max_model_len=length,
        chunked_prefill=False,
        async_scheduling=False,
        gpu_memory_utilization=utilisation,
    )


_MIXED: Final = "whole prompts run in one batch with decoding, where vLLM 0.6 runs them on their own"
_LONG_LLAMA: Final = _Deployment(
    engine="vllm-0.6",
    settings=_CHUNKED,
    assumptions=("chunked prefill of 512 tokens, which vLLM 0.6 switches on above 32K positions",),
)
_LONG_MISTRAL: Final = replace(
    _LONG_LLAMA, assumptions=("chunked prefill of 512 tokens: the checkpoint has more than 32K positions",)
)
_VLLM: Final = {
    ("llama", 2): _Deployment(
        engine="vllm-0.6",
        settings=_whole(24272, 0.97),
        assumptions=(_MIXED, "all-reduce as the engine's own, which was switched off"),
    ),
    ("llama", 4): _LONG_LLAMA,
    ("llama", 8): _LONG_LLAMA,
    ("mistral", 2): _Deployment(engine="vllm-0.6", settings=_whole(20560, 0.85), assumptions=(_MIXED,)),
    ("mistral", 4): _LONG_MISTRAL,
    ("mistral", 8): _LONG_MISTRAL,
}
"""By model family and GPUs of the instance."""

_SGLANG: Final = _Deployment(
    engine="sglang-eager",
    settings=EngineSettings(max_num_seqs=1024, max_num_batched_tokens=8192, block_size=1, gpu_memory_utilization=0.88),
    assumptions=("chunked prefill of 8192 tokens and 0.88 of the memory, SGLang's defaults on such a GPU",),
)


def read_apex(path: Path) -> list[Run]:
    """Every row of the file; `NAME-served.json.gz` beside it holds the requests.

    Raises
    ------
    InputError    missing columns, bad figures (with their line), requests that are missing or have faults
    """
    rows = read_rows(path, NEEDED)
    companion = path.with_name(f"{path.name.removesuffix('.csv')}-served.json.gz")
    served = read_json(companion)
    if not isinstance(served, dict):
        raise InputError(f"{companion}: expected an object of lists of [arrival_ns, prompt, output]")
    return [_run(row, companion, served) for row in rows]


def _run(row: Row, companion: Path, served: dict[str, Any]) -> Run:
    cell = {name: text.strip() for name, text in row.cells.items()}
    name = f"{cell['engine']}__" + re.sub(r"_validation|\.txt$", "", cell["file"].rpartition("/")[2])
    model = cell["hf_model_in_script"] or cell["model"]

    def unusable(reason: str, detail: str) -> UnusableRun:
        return UnusableRun(name=name, origin=row.where, kind=KIND, model=model, reason=reason, detail=detail)

    if cell["valid"] not in _VALID:
        return unusable("measurement not valid", cell["note"])
    deployment = _deployment(cell, row)
    gpus = row.whole("gpus_in_this_instance")
    match = _PLAN.fullmatch(cell["plan"])
    if deployment is None or gpus is None or match is None:
        return unusable("deployment not described", f"{cell['engine']}, {model}, plan {cell['plan']}, {gpus} GPUs")
    if int(match["count"]) != gpus:
        return unusable("plan and GPUs disagree", f"plan {cell['plan']} on {gpus} GPUs")
    metrics = {metric: row.number(column) for metric, column in _VALID[cell["valid"]].items()}
    if missing := [metric for metric, value in metrics.items() if not value]:
        return unusable("nothing measured", f"blank or zero: {', '.join(missing)}")
    if name not in served:
        raise InputError(f"{row.where}: {companion.name} has no requests under {name}")
    kv = "" if cell["kv_dtype"] == cell["dtype"] == "bf16" else f" kv={cell['kv_dtype']}"
    trace = _trace(companion, name, served[name])
    settings = deployment.settings
    if settings.chunked_prefill:
        settings = replace(settings, max_model_len=_power_of_two(trace.longest))
    notes = () if cell["valid"] == "True" else (f"only the mean E2E can be compared: {cell['note']}",)
    return MeasuredRun(
        name=name,
        origin=row.where,
        kind=KIND,
        model=model,
        cluster=CLUSTER,
        plan=f"{match['kind'].lower()}{gpus} {cell['dtype']}{kv}",
        engine=deployment.engine,
        settings=settings,
        sweep=f"{model} {CLUSTER} {deployment.engine} {cell['plan']} {_traffic(cell['file'])}",
        trace=trace,
        measured={metric: value for metric, value in metrics.items() if value},
        assumptions=(*deployment.assumptions, *notes),
    )


def _traffic(file: str) -> str:
    """The kind of requests that a file of results is named after."""
    match = _TRAFFIC.search(file)
    return match[1] if match else file


def _deployment(cell: dict[str, str], row: Row) -> _Deployment | None:
    if cell["engine"] == "sglang":
        return _SGLANG
    family = next((f for f in ("llama", "mistral") if f in cell["model"].lower()), "")
    return _VLLM.get((family, row.whole("gpus_in_this_instance") or 0))


def _power_of_two(tokens: int) -> int:
    """A limit that no request meets, the same for runs much alike."""
    return 1 << (tokens - 1).bit_length()


def _trace(path: Path, name: str, rows: Any) -> Trace:
    good = isinstance(rows, list) and rows and all(isinstance(r, list) and len(r) == 3 for r in rows)
    if not good or not all(type(x) is int for row in rows for x in row):
        raise InputError(f"{path}: {name}: expected a list of [arrival_ns, prompt, output] in whole numbers")
    arrival, prompt, output = np.array(rows, object).T
    try:
        return make_trace(
            name=name, arrival_ns=list(arrival), prompt=list(prompt), output=list(output), source=f"file {path}: {name}"
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
