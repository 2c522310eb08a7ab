"""Latency, rates, energy, cost and attainment of a simulated run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.units import NS_PER_S, S_PER_H
from apex_opt.workload.slo import FIGURES, OF_REQUESTS, STATISTICS, Slo, percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from apex_opt.simulator.outcome import Outcome
    from apex_opt.simulator.transient import Transient
    from apex_opt.workload.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What the requests saw, and what that took.

    Parameters
    ----------
    latency_s : mapping of "ttft", "tpot", "e2e" and where known "itl" to mapping of statistic to seconds
        TTFT from arrival to first token, queueing included; TPOT (last - first) / (n - 1) over requests with n > 1
        tokens (NaN where there is none); E2E from arrival to last token; ITL between consecutive tokens of a request,
        every gap weighing the same; percentiles interpolate linearly
    makespan_s : float                    from the first arrival to the last token, time outside the engine included
    requests_per_s, output_tokens_per_s, total_tokens_per_s : float    over the makespan
    goodput_per_s : float or None         of the requests that keep to what was asked of each; None where nothing was
    output_tokens : int                   tokens generated
    cached_tokens, cached_share : int, float    prompt tokens found in the cache (`Outcome`), also as a share of all
    energy_j, cost_per_h : float or None  energy of the run, and $ per hour of its GPUs, where known
    attainment : mapping of SLO text to share of requests (for ITL, of gaps) within its limit; 1 or 0 for a figure
    slo_met : mapping of SLO text to whether the goal holds
    transient : Transient or None         how the run begins and ends; None of bounds
    """

    latency_s: dict[str, dict[str, float]]
    makespan_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    output_tokens: int
    cached_tokens: int = 0
    cached_share: float = 0.0
    goodput_per_s: float | None = None
    energy_j: float | None = None
    cost_per_h: float | None = None
    attainment: dict[str, float]
    slo_met: dict[str, bool]
    transient: Transient | None = None

    def value(self, metric: str, statistic: str = "mean") -> float:
        """A statistic of a latency in seconds, or a figure in its unit (`FIGURES`); NaN where not known."""
        if metric not in FIGURES:
            return self.latency_s[metric][statistic]
        nan = float("nan")
        energy_j = nan if self.energy_j is None else self.energy_j
        cost_per_h = nan if self.cost_per_h is None else self.cost_per_h
        figures = {
            "makespan": self.makespan_s,
            "throughput": self.requests_per_s,
            "goodput": nan if self.goodput_per_s is None else self.goodput_per_s,
            "energy": energy_j,
            "energy_per_token": energy_j / self.output_tokens,
            "cost": cost_per_h,
            "cost_per_mtoken": cost_per_h * self.makespan_s / S_PER_H / self.output_tokens * 1e6,
        }
        return figures[metric]

    def judged(self, slo: Slo) -> float:
        """The figure that a goal is compared with; NaN for a latency that nobody has."""
        if slo.statistic == "attain":
            return self.attainment[slo.text]
        return self.value(slo.metric, slo.statistic)


def per_request_s(outcome: Outcome, generated: NDArray[np.int64], request_ns: int) -> dict[str, NDArray[np.float64]]:
    """TTFT, TPOT and E2E of every request in seconds, time outside the engine included; TPOT is NaN for one token."""
    first = outcome.first_token_ns - outcome.arrival_ns + request_ns
    whole = outcome.finish_ns - outcome.arrival_ns + request_ns
    gaps = np.where(generated > 1, generated - 1, 1)
    tpot = np.where(generated > 1, (outcome.finish_ns - outcome.first_token_ns) / gaps, np.nan)
    return {"ttft": first / NS_PER_S, "tpot": tpot / NS_PER_S, "e2e": whole / NS_PER_S}


def measure(
    outcome: Outcome,
    trace: Trace,
    *,
    max_model_len: int,
    request_ns: int = 0,
    slos: Sequence[Slo] = (),
    request_slos: Sequence[Slo] | None = None,
    percentiles: Sequence[str] = (),
    energy_j: float | None = None,
    cost_per_h: float | None = None,
    transient: Transient | None = None,
) -> Metrics:
    """Metrics of a run.

    Parameters
    ----------
    outcome, trace : the run and what was asked of it
    max_model_len : int     requests end there, so fewer tokens may have been generated than asked
    request_ns : int        time of a request outside the engine, added to TTFT, E2E and the makespan
    slos : goals to judge by
    request_slos : goals whose limits a request must keep to for goodput; by default those among `slos` that mean
                   something for one request
    percentiles : statistics to tell beyond `STATISTICS`
    energy_j, cost_per_h : energy of the run, and $ per hour of its GPUs
    transient : how the run begins and ends
    """
    generated = trace.generated(max_model_len)
    each = per_request_s(outcome, generated, request_ns)
    values = {name: each[name][~np.isnan(each[name])] for name in OF_REQUESTS}
    if outcome.gaps_ns is not None:
        values["itl"] = outcome.gaps_ns / NS_PER_S
    makespan_s = max(outcome.makespan_ns + request_ns, 1) / NS_PER_S
    if request_slos is None:
        request_slos = [slo for slo in slos if slo.of_requests]
    metrics = Metrics(
        latency_s={name: _statistics(seen, percentiles) for name, seen in values.items()},
        makespan_s=makespan_s,
        requests_per_s=len(trace) / makespan_s,
        output_tokens_per_s=int(generated.sum()) / makespan_s,
        total_tokens_per_s=int((generated + trace.prompt).sum()) / makespan_s,
        output_tokens=int(generated.sum()),
        cached_tokens=outcome.cached_tokens,
        cached_share=outcome.cached_tokens / trace.prompt_tokens,
        goodput_per_s=_good(each, request_slos) / makespan_s if request_slos else None,
        energy_j=energy_j,
        cost_per_h=cost_per_h,
        attainment={},
        slo_met={},
        transient=transient,
    )
    for slo in slos:
        if slo.metric in FIGURES:
            metrics.slo_met[slo.text] = slo.met(metrics.judged(slo))
            metrics.attainment[slo.text] = float(metrics.slo_met[slo.text])
            continue
        seen = values[slo.metric]
        metrics.attainment[slo.text] = float(np.mean(seen <= slo.limit)) if len(seen) else 1.0
        metrics.slo_met[slo.text] = slo.met(metrics.judged(slo)) or not len(seen)
    return metrics


def _good(each: Mapping[str, NDArray[np.float64]], slos: Sequence[Slo]) -> int:
    """Requests whose own latencies are all within the limits; a latency that a request does not have binds nothing."""
    beyond = [each[slo.metric] > slo.limit for slo in slos]
    return int((~np.any(beyond, axis=0)).sum())


def _statistics(values: NDArray[np.float64], percentiles: Sequence[str]) -> dict[str, float]:
    """The usual statistics and further percentiles, in rising order; NaN of no values."""
    names = sorted((*STATISTICS[1:-1], *percentiles), key=percent)
    if not len(values):
        return dict.fromkeys(("mean", *names, "max"), float("nan"))
    found = np.percentile(values, [percent(name) for name in names]).tolist()
    return {"mean": float(values.mean()), **dict(zip(names, found, strict=True)), "max": float(values.max())}
