"""Service-level objectives as text: `ttft_p95<=500ms`, `tpot<=50ms@99%`, `throughput>=10`."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.workload.trace import shown

LATENCIES: Final = ("ttft", "tpot", "e2e")
STATISTICS: Final = ("mean", "p50", "p90", "p95", "p99", "max")
EXAMPLE: Final = "ttft_p95<=500ms,tpot_p95<=50ms,e2e<=10s@99%,throughput>=10"

# Seconds in each unit; "m" and "min" are minutes.
_UNITS: Final = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
}
_NUMBER: Final = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_GOAL: Final = re.compile(r"(?P<name>[^<>=≤≥]*)(?P<sign>[<>=≤≥]+)(?P<limit>[^<>=≤≥@]*)(?:@(?P<share>.*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """One goal.

    Parameters
    ----------
    metric : str                   ttft, tpot, e2e (seconds) or throughput (requests per second)
    statistic : str                mean, p50, p90, p95, p99 or max over the requests; "attain": the share of requests
                                   whose own value is within the limit; throughput has "mean" only
    limit : float                  seconds, or requests per second
    fraction : float or None       share of the requests that must be within the limit, above 0 to 1; "attain" only
    text : str                     how it was said; canonical where not given, and `parse_slos(text)` gives it back

    Raises
    ------
    UsageError                     a limit that is not above 0 and finite, a statistic or fraction that does not apply
    UnknownNameError               metric or statistic not known
    """

    metric: str
    statistic: str
    limit: float
    fraction: float | None = None
    text: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not isinstance(self.statistic, str):
            raise UsageError(f"SLO: metric and statistic must be text, e.g. {EXAMPLE}")
        if self.metric not in (*LATENCIES, "throughput"):
            raise UnknownNameError("SLO metric", self.metric, (*LATENCIES, "throughput"), f"e.g. {EXAMPLE}")
        allowed = ("mean",) if self.metric == "throughput" else (*STATISTICS, "attain")
        if self.statistic not in allowed:
            raise UnknownNameError(f"statistic of {self.metric}", self.statistic, allowed, f"e.g. {EXAMPLE}")
        if not _is_number(self.limit) or not 0 < self.limit <= sys.float_info.max:
            raise UsageError(f"SLO {self.metric}: the limit must be above 0 and finite, got {shown(self.limit)}")
        if (self.statistic == "attain") != (self.fraction is not None):
            raise UsageError(f"SLO {self.metric}: a fraction goes with the statistic 'attain', and only with it")
        if self.fraction is not None and (not _is_number(self.fraction) or not 0 < self.fraction <= 1):
            raise UsageError(
                f"SLO {self.metric}: the fraction must be above 0 and at most 1, got {shown(self.fraction)}"
            )
        if not self.text:
            object.__setattr__(self, "text", self._canonical())

    @property
    def threshold(self) -> float:
        """What the measured value is compared with: the fraction for "attain", else the limit."""
        return self.limit if self.fraction is None else self.fraction

    @property
    def at_most(self) -> bool:
        """True where less is better (a latency statistic), False for throughput and attainment."""
        return self.metric != "throughput" and self.fraction is None

    def met(self, value: float) -> bool:
        """Whether the measured value (seconds, requests per second, or share of requests) meets the goal; NaN never."""
        return value <= self.threshold if self.at_most else value >= self.threshold

    def margin(self, value: float) -> float:
        """Distance to the goal as a share of it: positive inside, 0 on the edge, negative when missed."""
        return (self.threshold - value if self.at_most else value - self.threshold) / self.threshold

    def _canonical(self) -> str:
        """Shortest text; shifting the decimal point of repr keeps it exact."""
        if self.metric == "throughput":
            return f"throughput>={_plain(Decimal(repr(float(self.limit))))}"
        limit = Decimal(repr(float(self.limit)))
        unit = next((unit for unit in ("s", "ms", "us") if limit >= _UNITS[unit]), "ns")
        bound = f"<={_plain(limit / _UNITS[unit])}{unit}"
        if self.fraction is not None:
            return f"{self.metric}{bound}@{_plain(Decimal(repr(float(self.fraction))) * 100)}%"
        return f"{self.metric}_{self.statistic}{bound}"


def parse_slos(text: str) -> tuple[Slo, ...]:
    """Goals from text such as `ttft_p95<=500ms,tpot_p95<=50ms`; commas or spaces between them.

    A latency takes `<=` and a unit (ns, us, ms, s, m or min) and either a statistic (`ttft_p95`, also mean, p50, p90,
    p99, max) or a share of the requests (`ttft<=500ms@99%`). `throughput>=10` is in requests per second. Strict signs
    are refused: on a limit that is met exactly they would only differ by rounding.

    Raises
    ------
    UsageError                     form, number, unit, sign; the same goal twice
    UnknownNameError               metric or statistic not known, with suggestions
    """
    if not isinstance(text, str) or not text.strip(" ,\t\n"):
        raise UsageError(f"SLO: expected text such as {EXAMPLE}, got {shown(text)}")
    joined = re.sub(r"\s*([<>=≤≥@]+)\s*", r"\1", text)
    goals: list[Slo] = []
    seen: set[tuple[str, str, float | None]] = set()
    for part in re.split(r"[,\s]+", joined.strip(", \t\n")):
        goal = _parse_goal(part)
        key = (goal.metric, goal.statistic, goal.fraction)
        if key in seen:
            raise UsageError(
                f"SLO {part!r:.60}: {goal.text.split('<')[0].split('>')[0]} is limited twice; keep one limit"
            )
        seen.add(key)
        goals.append(goal)
    return tuple(goals)


def _parse_goal(part: str) -> Slo:
    """One goal, without spaces."""
    where = f"SLO {part!r:.60}"
    match = _GOAL.fullmatch(part)
    if match is None or not match["name"]:
        raise UsageError(f"{where}: expected METRIC_STATISTIC<=LIMIT, e.g. {EXAMPLE}")
    metric, _, statistic = match["name"].lower().partition("_")
    if metric not in (*LATENCIES, "throughput"):
        raise UnknownNameError("SLO metric", metric[:40], (*LATENCIES, "throughput"), f"e.g. {EXAMPLE}")
    sign = ">=" if metric == "throughput" else "<="
    if match["sign"] != sign:
        raise UsageError(f"{where}: {metric} takes {sign}, got {match['sign']}; e.g. {EXAMPLE}")
    if metric == "throughput":
        if statistic or match["share"] is not None:
            raise UsageError(f"{where}: throughput has no statistic and no share; e.g. throughput>=10")
        return Slo(metric=metric, statistic="mean", limit=_amount(where, match["limit"], latency=False))
    limit = _amount(where, match["limit"], latency=True)
    if match["share"] is None:
        if not statistic:
            raise UsageError(f"{where}: of which requests? e.g. {metric}_p95<=500ms or {metric}<=500ms@99%")
        return Slo(metric=metric, statistic=statistic, limit=limit)
    if statistic:
        raise UsageError(f"{where}: a statistic and a share exclude each other; e.g. {metric}<=500ms@99%")
    share = match["share"]
    if not share.endswith("%") or _NUMBER.fullmatch(share[:-1]) is None or not 0 < Decimal(share[:-1]) <= 100:
        raise UsageError(f"{where}: the share must be above 0% and at most 100%, e.g. {metric}<=500ms@99%")
    return Slo(metric=metric, statistic="attain", limit=limit, fraction=float(Decimal(share[:-1]) / 100))


def _amount(where: str, text: str, *, latency: bool) -> float:
    """A limit in seconds, or in requests per second."""
    unit = ""
    if latency:
        unit = next((u for u in sorted(_UNITS, key=len, reverse=True) if text.lower().endswith(u)), "")
    number = text[: len(text) - len(unit)]
    form = f"a number and a unit ({', '.join(_UNITS)})" if latency else "a number, in requests per second"
    if _NUMBER.fullmatch(number) is None or (latency and not unit):
        raise UsageError(f"{where}: the limit must be {form}, got {text!r:.40}; e.g. {EXAMPLE}")
    value = float(Decimal(number) * _UNITS.get(unit, Decimal(1)))
    if not 0 < value < math.inf:
        raise UsageError(f"{where}: the limit must be above 0 and finite, got {text!r:.40}; e.g. {EXAMPLE}")
    return value


def _is_number(value: object) -> bool:
    """An int or a float; bool is neither here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Decimal) -> str:
    """Digits without trailing zeros; an exponent only where it is shorter."""
    fixed, short = f"{value.normalize():f}", f"{value.normalize():E}"
    return fixed if len(fixed) <= max(len(short), 12) else short
