"""Latency, throughput and attainment of a simulated run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.units import NS_PER_S
from apex_opt.workload.slo import LATENCIES, Slo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.simulator.outcome import Outcome
    from apex_opt.workload.trace import Trace

STATISTICS: Final = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What the requests saw.

    Parameters
    ----------
    latency_s : mapping of "ttft", "tpot", "e2e" to mapping of statistic to seconds
        TTFT from arrival to first token, queueing included; TPOT (last - first) / (n - 1) over requests with n > 1
        tokens (NaN where there is none); E2E from arrival to last token; percentiles interpolate linearly
    makespan_s : float                    from the first arrival to the last token
    requests_per_s, output_tokens_per_s, total_tokens_per_s : float    over the makespan
    attainment : mapping of SLO text to share of requests within its limit (1 or 0 for a throughput goal)
    slo_met : mapping of SLO text to whether the goal holds
    """

    latency_s: dict[str, dict[str, float]]
    makespan_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    attainment: dict[str, float]
    slo_met: dict[str, bool]


def per_request_s(outcome: Outcome, generated: NDArray[np.int64], request_ns: int) -> dict[str, NDArray[np.float64]]:
    """TTFT, TPOT and E2E of every request in seconds, time outside the engine included; TPOT is NaN for one token."""
    first = outcome.first_token_ns - outcome.arrival_ns + request_ns
    whole = outcome.finish_ns - outcome.arrival_ns + request_ns
    gaps = np.where(generated > 1, generated - 1, 1)
    tpot = np.where(generated > 1, (outcome.finish_ns - outcome.first_token_ns) / gaps, np.nan)
    return {"ttft": first / NS_PER_S, "tpot": tpot / NS_PER_S, "e2e": whole / NS_PER_S}


def measure(
    outcome: Outcome, trace: Trace, *, max_model_len: int, request_ns: int = 0, slos: Sequence[Slo] = ()
) -> Metrics:
    """Metrics of a run.

    Parameters
    ----------
    outcome, trace : the run and what was asked of it
    max_model_len : int     requests end there, so fewer tokens may have been generated than asked
    request_ns : int        time of a request outside the engine, added to TTFT and E2E
    slos : goals to judge by
    """
    generated = trace.generated(max_model_len)
    values = per_request_s(outcome, generated, request_ns)
    latency = {name: _statistics(values[name]) for name in LATENCIES}
    makespan_s = max(outcome.makespan_ns / NS_PER_S, 1 / NS_PER_S)
    rate = len(trace) / makespan_s
    attainment, met = {}, {}
    for slo in slos:
        if slo.metric == "throughput":
            met[slo.text] = slo.met(rate)
            attainment[slo.text] = float(met[slo.text])
            continue
        seen = values[slo.metric][~np.isnan(values[slo.metric])]
        within = float(np.mean(seen <= slo.limit)) if len(seen) else 1.0
        attainment[slo.text] = within
        judged = within if slo.statistic == "attain" else latency[slo.metric][slo.statistic]
        met[slo.text] = slo.met(judged) or not len(seen)
    return Metrics(
        latency_s=latency,
        makespan_s=makespan_s,
        requests_per_s=rate,
        output_tokens_per_s=int(generated.sum()) / makespan_s,
        total_tokens_per_s=int((generated + trace.prompt).sum()) / makespan_s,
        attainment=attainment,
        slo_met=met,
    )


def _statistics(values: NDArray[np.float64]) -> dict[str, float]:
    seen = values[~np.isnan(values)]
    if not len(seen):
        return dict.fromkeys(STATISTICS, float("nan"))
    p50, p90, p95, p99 = np.percentile(seen, [50, 90, 95, 99]).tolist()
    return {
        "mean": float(seen.mean()),
        "p50": p50,
        "p90": p90,
        "p95": p95,
        "p99": p99,
        "max": float(seen.max()),
    }
