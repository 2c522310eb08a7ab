"""Results of benchmarks as traces: what was sent, not what was measured. A new one is one more row of `_READERS`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import InputError, shown
from apex_opt.units import NS_PER_S
from apex_opt.workload.columns import MAX_ARRIVAL_NS, MAX_REQUESTS, Ints

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Document = dict[str, Any]

_ASSUMED_REQUESTS: Final = 100
_STARTS: Final = (
    ("request_start_time",),
    ("start_time",),
    ("info", "timings", "request_start"),
    ("scheduler_info", "started_at"),
)
_LISTS: Final = ("input_lens", "output_lens", "start_times", "ttfts", "itls")
_TEXTS: Final = ("model_id",)
_NUMBERS: Final = (
    "duration",
    "completed",
    "total_input_tokens",
    "total_output_tokens",
    "max_concurrency",
    "burstiness",
    "request_throughput",
)
_FIGURE: Final = re.compile(r"(?:mean|p95)_\w+_ms")
"""Fields of `vllm bench serve` and `sglang.bench_serving` that are read."""

_ROUNDS: Final = 10  # requests a client sends, at least, where the file does not say how many there were


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """Requests that a benchmark sent.

    Parameters
    ----------
    prompt, output : numbers of tokens; an output of 0 is a request that failed
    arrival_s : seconds, where the file has them
    rate_per_s, burstiness : float or None      requests per second, drawn as a gamma process (1: Poisson)
    concurrency : int or None                   clients that wait for answers
    at_once : bool                              all were sent at the beginning
    notes : what is assumed
    """

    prompt: Sequence[Any]
    output: Sequence[Any]
    arrival_s: Sequence[Any] | None = None
    rate_per_s: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    at_once: bool = False
    notes: tuple[str, ...] = ()


def result_reader(document: Mapping[str, Any]) -> Callable[[str, Mapping[str, Any]], Sent] | None:
    """What reads a benchmark's result; None where it is none."""
    return next((read for fits, read in _READERS if fits(document)), None)


def _vllm(label: str, run: Mapping[str, Any]) -> Sent:
    """`vllm bench serve` and SGLang's `bench_serving`, with lengths of all requests or their sums."""
    _check_fields(label, run)
    concurrency = _count(run.get("max_concurrency"))
    rate = _positive(run.get("request_rate"))
    burstiness = _positive(run.get("burstiness")) or 1.0
    at_once = str(run.get("request_rate", "inf")).lower() in ("inf", "infinity") and concurrency is None
    load: dict[str, Any] = {"rate_per_s": rate, "burstiness": burstiness, "at_once": at_once}
    notes = []
    if rate is None and concurrency is not None:
        load = {"concurrency": concurrency}
    elif rate is not None and concurrency is not None:
        notes.append(
            f"the run sent at most {concurrency} requests at a time (max_concurrency), which arrivals do not keep to"
        )
    prompt, output, starts = (run.get(name) for name in ("input_lens", "output_lens", "start_times"))
    if isinstance(prompt, list) and isinstance(output, list):
        if len(prompt) != len(output):
            raise InputError(
                f"{label}: {len(prompt)} input_lens and {len(output)} output_lens; give one of each a request"
            )
        # A trace that is replayed at its own times is said to be at no rate, as is one that is sent at once.
        if isinstance(starts, list) and len(starts) == len(prompt) and "concurrency" not in load:
            load = {"arrival_s": starts}
        return Sent(prompt=prompt, output=output, notes=tuple(notes), **load)
    done = _count(run.get("completed"))
    totals = [_positive(run.get(name)) for name in ("total_input_tokens", "total_output_tokens")]
    if done is None or totals[0] is None or totals[1] is None:
        raise InputError(
            f"{label}: a result of vllm bench serve without input_lens and output_lens, nor completed with "
            "total_input_tokens and total_output_tokens; run it with --save-detailed"
        )
    _check_requests(label, done)
    means = max(round(totals[0] / done), 1), max(round(totals[1] / done), 1)
    return Sent(
        prompt=[means[0]] * done,
        output=[means[1]] * done,
        notes=(*notes, _means(*means, "--save-detailed (SGLang: --output-details) has all")),
        **load,
    )


def _check_fields(label: str, run: Mapping[str, Any]) -> None:
    """Refuse fields of a benchmark that are there and of another type, as they would count for absent ones."""
    for name, value in run.items():
        if value is None:
            continue
        if name in _LISTS and not isinstance(value, list):
            raise InputError(f"{label}: {name} is {shown(value)}; it has to be a list, one entry a request")
        if name in _TEXTS and not isinstance(value, str):
            raise InputError(f"{label}: {name} is {shown(value)}; it has to be the name of a model")
        if name in _NUMBERS or _FIGURE.fullmatch(name):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf:
                raise InputError(f"{label}: {name} {shown(value)} is not a number from 0 up")
    if run.get("completed") == 0:
        raise InputError(f"{label}: completed is 0: no request was answered, so nothing was measured")


def _guidellm(label: str, report: Mapping[str, Any]) -> Sent:
    """GuideLLM's report of one benchmark: the requests that were answered, with their starts."""
    runs = [run for run in report["benchmarks"] if isinstance(run, dict)]
    if len(runs) != 1:
        raise InputError(
            f"{label}: a report of {len(runs)} benchmarks; keep one, such as with jq '.benchmarks |= [.[0]]'"
        )
    requests = runs[0].get("requests")
    requests = requests if isinstance(requests, dict) else {}
    answered = requests.get("successful")
    if not isinstance(answered, list) or not answered:
        raise InputError(f"{label}: a report of GuideLLM without its answered requests; save it with all of them")
    lost = sum(len(requests[kind]) for kind in ("errored", "incomplete") if isinstance(requests.get(kind), list))
    notes = [f"{lost:,} requests that failed or were not answered in time are dropped"] if lost else []
    rows = [row if isinstance(row, dict) else {} for row in answered]
    prompt, output = (
        [
            _first(row, (f"{old}_tokens",), (f"{new}_metrics", "text_tokens"), (f"{new}_metrics", "total_tokens"))
            for row in rows
        ]
        for old, new in (("prompt", "input"), ("output", "output"))
    )
    strategy = _strategy(runs[0])
    clients = _count(strategy.get("streams", strategy.get("max_concurrency")))
    kind = strategy.get("type_", strategy.get("type"))
    if kind == "synchronous":
        clients = 1
    if kind in ("synchronous", "concurrent") and clients is not None:
        return Sent(prompt=prompt, output=output, concurrency=clients, notes=tuple(notes))
    starts = [_first(row, *_STARTS) for row in rows]
    if None in starts:
        raise InputError(f"{label}: {starts.count(None)} requests of a GuideLLM report have no start; leave them out")
    return Sent(prompt=prompt, output=output, arrival_s=starts, notes=tuple(notes))


def _genai_perf(label: str, run: Mapping[str, Any]) -> Sent:
    """GenAI-Perf's and AIPerf's summary of one load: means, and how many clients there were, or the rate."""
    means = [_positive(run[name].get("avg")) for name in ("input_sequence_length", "output_sequence_length")]
    if means[0] is None or means[1] is None:
        raise InputError(f"{label}: a summary of GenAI-Perf or AIPerf without the mean lengths of prompts and answers")
    config = run.get("input_config")
    clients, rate = _count(_within(config, "concurrency")), _positive(_within(config, "request_rate"))
    measured = run.get("request_count")
    given = _count(measured.get("avg") if isinstance(measured, dict) else _within(config, "request_count"))
    requests = given or max(_ASSUMED_REQUESTS, _ROUNDS * (clients or 1))
    _check_requests(label, requests)
    prompt, output = (max(round(mean), 1) for mean in means if mean is not None)
    notes = [_means(prompt, output, "profile_export.jsonl has all")]
    if given is None:
        notes.append(f"the file does not say how many requests there were: {requests:,} are assumed")
    return Sent(
        prompt=[prompt] * requests,
        output=[output] * requests,
        rate_per_s=None if clients else rate,
        concurrency=clients,
        notes=tuple(notes),
    )


def _inputs(label: str, _: Mapping[str, Any]) -> Sent:
    raise InputError(
        f"{label}: texts that were sent, which take a tokenizer to count; give profile_export_genai_perf.json, "
        "profile_export_aiperf.json or profile_export.jsonl instead"
    )


def _means(prompt: int, output: int, way_out: str) -> str:
    return (
        f"the file has mean lengths only: every request has {prompt:,} prompt and {output:,} output tokens; {way_out}"
    )


def _strategy(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """How GuideLLM sent its requests."""
    for path in (("args", "strategy"), ("config", "strategy"), ("scheduler", "strategy"), ("strategy",)):
        found = _at(run, path)
        if isinstance(found, dict):
            return found
    return {}


def _first(row: Mapping[str, Any], *paths: tuple[str, ...]) -> Any:
    """The first of several places that has something."""
    return next((value for path in paths if (value := _at(row, path)) is not None), None)


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _within(config: Any, name: str, depth: int = 4) -> Any:
    """A setting wherever it stands."""
    if not isinstance(config, dict) or not depth:
        return None
    if config.get(name) is not None and not isinstance(config[name], dict | list):
        return config[name]
    return next((found for value in config.values() if (found := _within(value, name, depth - 1)) is not None), None)


def _positive(value: Any) -> float | None:
    """A finite number above 0, as a number or text."""
    try:
        number = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def _count(value: Any) -> int | None:
    number = _positive(value)
    return None if number is None or number != int(number) else int(number)


def _check_requests(label: str, requests: int) -> None:
    if requests > MAX_REQUESTS:
        raise InputError(f"{label}: {requests:,} requests, at most {MAX_REQUESTS:,} can be used; give a shorter run")


def drawn_ns(label: str, sent: Sent, requests: int, seed: int) -> Ints:
    """Arrivals at the rate of a benchmark, as it drew its own: in order, in nanoseconds.

    Parameters
    ----------
    label : str       opens every message
    sent : Sent       when each was sent
    requests : int    how many there are
    seed : int        of what is drawn
    """
    assert sent.rate_per_s is not None
    rng = np.random.Generator(np.random.PCG64(seed))
    gaps = rng.standard_gamma(sent.burstiness, requests) / sent.burstiness / sent.rate_per_s
    times = np.rint(np.cumsum(gaps) * NS_PER_S)
    if times[-1] > MAX_ARRIVAL_NS:
        raise InputError(f"{label}: at {sent.rate_per_s:g} requests/s the last of {requests:,} comes after 73 years")
    return times.astype(np.int64)


_READERS: Final[tuple[tuple[Callable[[Mapping[str, Any]], bool], Callable[[str, Mapping[str, Any]], Sent]], ...]] = (
    (lambda x: "input_lens" in x or ("total_input_tokens" in x and "completed" in x), _vllm),
    (lambda x: isinstance(x.get("benchmarks"), list), _guidellm),
    (
        lambda x: all(isinstance(x.get(f"{side}_sequence_length"), dict) for side in ("input", "output")),
        _genai_perf,
    ),
    (lambda x: isinstance(x.get("experiments"), list) or (set(x) == {"data"} and "payloads" in str(x)[:2000]), _inputs),
)
