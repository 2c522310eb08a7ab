"""Results that benchmark clients save: latencies as clients saw them, of the lengths and the load that they sent.

`vllm bench serve` and `sglang.bench_serving` (JSON, or a JSON line for each load), GuideLLM and AIPerf or GenAI-Perf
(JSON). None of them says which plan ran, so that is told beside. What was sent is read as a trace is
(`apex_opt.workload`); here is what was measured. Layouts: docs/calibrate.md.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import ApexError, InputError
from apex_opt.files import parse_json
from apex_opt.measured.files import read_text
from apex_opt.measured.names import find_model
from apex_opt.measured.runs import MeasuredRun
from apex_opt.workload.layouts import result_reader
from apex_opt.workload.readers import result_trace
from apex_opt.workload.trace import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.workload.trace import Trace

    Content = dict[str, Any]

KIND: Final = "client"
MOST_LOADS: Final = 64
"""Results in one file, one a line."""

_LONGEST_S: Final = 1e6
_MS: Final = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """What ran while a client measured, which its result does not say.

    Parameters
    ----------
    model, cluster, plan, engine : str    as `load_model`, `load_cluster`, `parse_plan` and `load_engine` take them
    sweep : str                           the same by the names of what these are, wherever their files lie
    settings : callable                   those of the engine, for what a client sent
    """

    model: str
    cluster: str
    plan: str
    engine: str
    sweep: str
    settings: Callable[[Trace], EngineSettings]


def results_of(path: Path) -> list[Content]:
    """The results in a file; none where it is no client's.

    Raises
    ------
    InputError    a file that cannot be read
    """
    text = read_text(path)
    first = text.lstrip()[:1]
    if first != "{":
        return []
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        whole = None
    if whole is not None:
        found = [whole]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) > MOST_LOADS:
            return []
        found = [parse_json(line, where=f"{path}: line {place}") for place, line in enumerate(lines, 1)]
    if not found or not all(isinstance(one, dict) and result_reader(one) is not None for one in found):
        return []
    return found


def read_clients(path: Path, deployed: Deployed) -> list[MeasuredRun]:
    """A run for every load of a file.

    Raises
    ------
    InputError    no client's result, or figures in it that cannot be used, in one line
    """
    found = results_of(path)
    if not found:
        raise InputError(
            f"{path}: not the result of a benchmark; expected JSON as vllm bench serve --save-result, "
            "sglang.bench_serving --output-file, guidellm or aiperf write it"
        )
    stem = path.name.removesuffix(".gz").rpartition(".")[0] or path.name
    runs = []
    for place, document in enumerate(found, 1):
        label = f"{path}: result {place}" if len(found) > 1 else str(path)
        name = f"{stem}/{place}" if len(found) > 1 else stem
        _check_model(label, document, deployed)
        trace = result_trace(label, name, f"file {label}", document, 0)
        if trace.arrivals == UNKNOWN:
            raise InputError(
                f"{label}: does not say how requests were sent, so nothing can be compared; measure with a number of "
                "clients or a rate that the client writes into its result"
            )
        measured = _measured(label, document)
        if not measured:
            raise InputError(f"{label}: no latency in it that could be compared")
        runs.append(_run(name, label, trace, measured, deployed))
    return runs


def _check_model(label: str, document: Content, deployed: Deployed) -> None:
    """Refuse a result that names another model, where that is one that is known."""
    said = document.get("model_id") or document.get("model")
    if not isinstance(said, str):
        return
    try:
        measured, given = find_model(said).name, find_model(deployed.model).name
    except ApexError:
        return  # a path on the server, or a name that it was given there
    if measured != given:
        raise InputError(f"{label}: was measured on {said!r:.80}, and --model is {given}; give --model={measured}")


def _run(name: str, label: str, trace: Trace, measured: dict[str, float], deployed: Deployed) -> MeasuredRun:
    return MeasuredRun(
        name=name,
        origin=label,
        kind=KIND,
        model=deployed.model,
        cluster=deployed.cluster,
        plan=deployed.plan,
        engine=deployed.engine,
        settings=deployed.settings(trace),
        sweep=deployed.sweep,
        trace=trace,
        measured=measured,
        assumptions=("the plan, the engine and its settings as given beside the file", *trace.notes),
    )


def _measured(label: str, document: Content) -> dict[str, float]:
    """What was measured, as `METRICS` has it."""
    if "benchmarks" in document:
        found = _guidellm(label, document)
    elif "input_sequence_length" in document:
        found = _perf(label, document)
    else:
        found = _bench(label, document)
    return {metric: value for metric, value in found.items() if value > 0}


def _bench(label: str, run: Content) -> dict[str, float]:
    """vLLM's and SGLang's: of each request where all are there, else the summary."""
    ttfts, itls = run.get("ttfts"), run.get("itls")
    found: dict[str, float] = {}
    if isinstance(ttfts, list) and isinstance(itls, list) and ttfts:
        rows = _requests(label, run, ttfts, itls)
        found = _of_requests(rows)
    else:
        for metric, names in (
            ("ttft_mean", ("mean_ttft_ms",)),
            ("ttft_p95", ("p95_ttft_ms",)),
            ("tpot_mean", ("mean_tpot_ms",)),
            ("tpot_p95", ("p95_tpot_ms",)),
            ("itl_mean", ("mean_itl_ms",)),
            ("e2e_mean", ("mean_e2el_ms", "mean_e2e_latency_ms")),
        ):
            if value := next((run[name] for name in names if run.get(name) is not None), None):
                found[metric] = _number(label, names[0], value) * _MS
    if run.get("request_throughput") is not None:
        found["throughput"] = _number(label, "request_throughput", run["request_throughput"])
    return found


def _requests(label: str, run: Content, ttfts: Sequence[Any], itls: Sequence[Any]) -> list[tuple[float, float, int]]:
    """Seconds to the first token and from there to the last, and tokens, of every request that was answered."""
    outputs = run.get("output_lens")
    if not isinstance(outputs, list) or not len(outputs) == len(ttfts) == len(itls):
        raise InputError(f"{label}: ttfts, itls and output_lens must be lists of one length, one entry a request")
    rows = []
    for place, (ttft, gaps, tokens) in enumerate(zip(ttfts, itls, outputs, strict=True), 1):
        if not isinstance(gaps, list) or isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise InputError(f"{label}: request {place}: itls must be a list of seconds, output_lens a whole number")
        if tokens:
            rest = sum(_number(label, f"request {place}: itls", gap) for gap in gaps)
            rows.append((_number(label, f"request {place}: ttfts", ttft), rest, tokens))
    if not rows:
        raise InputError(f"{label}: no request has an answer")
    return rows


def _of_requests(rows: Sequence[tuple[float, float, int]]) -> dict[str, float]:
    """Means and tails over requests; a time between tokens where there are two."""
    ttft, rest, tokens = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    found = {
        "ttft_mean": float(ttft.mean()),
        "ttft_p95": float(np.percentile(ttft, 95)),
        "e2e_mean": float((ttft + rest).mean()),
    }
    several = tokens > 1
    if several.any():
        tpot = rest[several] / (tokens[several] - 1)
        found |= {
            "tpot_mean": float(tpot.mean()),
            "tpot_p95": float(np.percentile(tpot, 95)),
            "itl_mean": float(rest[several].sum() / (tokens[several] - 1).sum()),
        }
    return found


def _guidellm(label: str, report: Content) -> dict[str, float]:
    """GuideLLM's: of the requests that were answered; it writes latencies of a request in s, others in ms."""
    rows = []
    for place, row in enumerate(report["benchmarks"][0]["requests"]["successful"], 1):
        first, whole = row.get("time_to_first_token_ms"), row.get("request_latency")
        if first is None or whole is None:
            raise InputError(
                f"{label}: request {place} has no time_to_first_token_ms or no request_latency; run it with streaming"
            )
        metrics = row.get("output_metrics") or {}
        tokens = row.get("output_tokens") or metrics.get("text_tokens") or metrics.get("total_tokens")
        ttft = _number(label, f"request {place}: time_to_first_token_ms", first) * _MS
        rest = _number(label, f"request {place}: request_latency", whole) - ttft
        rows.append((ttft, max(rest, 0.0), int(_number(label, f"request {place}: output tokens", tokens))))
    return _of_requests(rows)


def _perf(label: str, run: Content) -> dict[str, float]:
    """AIPerf's and GenAI-Perf's: figures by statistic, each with its unit."""
    scales = {"ms": _MS, "milliseconds": _MS, "s": 1.0, "sec": 1.0, "seconds": 1.0, "us": 1e-6, "ns": 1e-9}
    found: dict[str, float] = {}
    for name, statistics in _PERF.items():
        figure = run.get(name)
        if not isinstance(figure, dict):
            continue
        unit = str(figure.get("unit", "ms"))
        if unit not in scales:
            raise InputError(f"{label}: {name}: unit {unit!r:.40} is none of {', '.join(scales)}")
        for statistic, metric in statistics.items():
            if figure.get(statistic) is not None:
                found[metric] = _number(label, f"{name}.{statistic}", figure[statistic]) * scales[unit]
    rate = run.get("request_throughput")
    if isinstance(rate, dict) and rate.get("avg") is not None:
        found["throughput"] = _number(label, "request_throughput.avg", rate["avg"])
    return found


# Its inter-token latency is that of a request from its first token to its last over the tokens after the first.
_PERF: Final = {
    "time_to_first_token": {"avg": "ttft_mean", "p95": "ttft_p95"},
    "inter_token_latency": {"avg": "tpot_mean", "p95": "tpot_p95"},
    "request_latency": {"avg": "e2e_mean"},
}


def _number(label: str, what: str, value: Any) -> float:
    good = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not good or not 0 <= value < _LONGEST_S:
        raise InputError(f"{label}: {what} {value!r:.40} is not a number from 0 to {_LONGEST_S:g}")
    return float(value)
