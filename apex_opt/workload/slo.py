"""Service-level objectives as text: `ttft_p95<=500ms`, `itl<=50ms@99%`, `throughput>=10`, `energy<=200kJ`."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.workload.trace import shown

OF_REQUESTS: Final = ("ttft", "tpot", "e2e")
"""Latencies that every request has one of."""

LATENCIES: Final = (*OF_REQUESTS, "itl")
"""With the time between consecutive tokens, of which a request has many."""

FIGURES: Final = {
    "makespan": "s",
    "throughput": "requests/s",
    "goodput": "requests/s",
    "energy": "J",
    "energy_per_token": "J/token",
    "cost": "$/h",
    "cost_per_mtoken": "$/Mtoken",
}
"""What a run has one of, with its unit; tokens are those generated."""

AT_LEAST: Final = ("throughput", "goodput")
"""Of which more is better."""

STATISTICS: Final = ("mean", "p50", "p90", "p95", "p99", "max")
"""Those always told; any other percentile can be asked for."""

EXAMPLE: Final = "ttft_p95<=500ms,tpot_p95<=50ms,e2e<=10s@99%,throughput>=10"

# Seconds in each unit; "m" and "min" are minutes.
_TIMES: Final = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
}
# Joules in each; m and M differ.
_ENERGIES: Final = {
    "mJ": Decimal("1e-3"),
    "J": Decimal(1),
    "kJ": Decimal(1000),
    "MJ": Decimal(10**6),
    "Wh": Decimal(3600),
    "kWh": Decimal(3_600_000),
}
_ONE: Final = Decimal(1)
# How a limit may end, for each unit, and what is said where it does not.
_ENDINGS: Final = {
    "s": (_TIMES, f"a number and a unit ({', '.join(_TIMES)})"),
    "J": (_ENERGIES, f"a number and a unit ({', '.join(_ENERGIES)})"),
    "J/token": (
        _ENERGIES | {f"{unit}/token": joules for unit, joules in _ENERGIES.items()},
        f"a number and a unit ({', '.join(_ENERGIES)}), per output token",
    ),
    "requests/s": ({"": _ONE}, "a number, in requests per second"),
    "$/h": (dict.fromkeys(("", "/h", "$", "$/h"), _ONE), "a number, in $ per hour such as 20$/h"),
    "$/Mtoken": (
        dict.fromkeys(("", "$", "$/mtoken", "$/Mtoken"), _ONE),
        "a number, in $ per million output tokens such as 3$",
    ),
}
_NUMBER: Final = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_PERCENTILE: Final = re.compile(r"p(\d{1,3}(?:\.\d{1,6})?)", re.ASCII)
_GOAL: Final = re.compile(r"(?P<name>[^<>=≤≥]*)(?P<sign>[<>=≤≥]+)(?P<limit>[^<>=≤≥@]*)(?:@(?P<share>.*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """One goal.

    Parameters
    ----------
    metric : str                   one of `LATENCIES`, in seconds, or of `FIGURES`
    statistic : str                mean, max or a percentile such as p95 or p99.9 over the requests (itl: over the gaps
                                   between tokens); "attain": the share of these whose own value is within the limit;
                                   figures have "mean" only
    limit : float                  in the metric's unit
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
        _check_metric(self.metric)
        if self.metric in FIGURES and self.statistic != "mean":
            raise UnknownNameError(f"statistic of {self.metric}", self.statistic, ("mean",), f"e.g. {EXAMPLE}")
        if self.statistic != "attain":
            object.__setattr__(self, "statistic", known_statistic(self.statistic, f"statistic of {self.metric}"))
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
        """True where less is better, False for throughput, goodput and attainment."""
        return self.metric not in AT_LEAST and self.fraction is None

    @property
    def unit(self) -> str:
        """Of the limit."""
        return FIGURES.get(self.metric, "s")

    @property
    def of_requests(self) -> bool:
        """Whether the limit means something for one request: it is on its own latency, by percentile or share."""
        return self.metric in OF_REQUESTS and self.statistic != "mean"

    def met(self, value: float) -> bool:
        """Whether the measured value (in the metric's unit, or a share of requests) meets the goal; NaN never."""
        return value <= self.threshold if self.at_most else value >= self.threshold

    def margin(self, value: float) -> float:
        """Distance to the goal as a share of it: positive inside, 0 on the edge, negative when missed."""
        return (self.threshold - value if self.at_most else value - self.threshold) / self.threshold

    def _canonical(self) -> str:
        """Shortest text; shifting the decimal point of repr keeps it exact."""
        limit = Decimal(repr(float(self.limit)))
        if self.metric in AT_LEAST:
            return f"{self.metric}>={_plain(limit)}"
        if self.unit in ("$/h", "$/Mtoken"):
            return f"{self.metric}<={_plain(limit)}{'$/h' if self.unit == '$/h' else '$'}"
        units, least = (("s", "ms", "us"), "ns") if self.unit == "s" else (("MJ", "kJ", "J"), "mJ")
        sizes = _ENDINGS[self.unit][0]
        unit = next((unit for unit in units if limit >= sizes[unit]), least)
        bound = f"<={_plain(limit / sizes[unit])}{unit}"
        if self.metric in FIGURES:
            return f"{self.metric}{bound}"
        if self.fraction is not None:
            return f"{self.metric}{bound}@{_plain(Decimal(repr(float(self.fraction))) * 100)}%"
        return f"{self.metric}_{self.statistic}{bound}"


def parse_slos(text: str) -> tuple[Slo, ...]:
    """Goals from text such as `ttft_p95<=500ms,tpot_p95<=50ms`; commas or spaces between them.

    A latency takes `<=` and a unit (ns, us, ms, s, m or min) and either a statistic (`ttft_p95`, also mean, max and any
    percentile such as p99.9) or a share of the requests (`ttft<=500ms@99%`; of `itl`, the time between consecutive
    tokens, a share of these). `throughput>=10` and `goodput>=5` are in requests per second, the latter counting those
    that keep to every percentile and share on ttft, tpot and e2e. Further: `makespan<=60s`, `energy<=200kJ`,
    `energy_per_token<=2J`, `cost<=20$/h`, `cost_per_mtoken<=3$`. Strict signs are refused: on a limit that is met
    exactly they would only differ by rounding.

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
    name = match["name"].lower()
    metric, _, statistic = (name, "", "") if name in FIGURES else name.partition("_")
    _check_metric(name if metric in FIGURES else metric)
    sign = ">=" if metric in AT_LEAST else "<="
    if match["sign"] != sign:
        raise UsageError(f"{where}: {metric} takes {sign}, got {match['sign']}; e.g. {EXAMPLE}")
    if metric in FIGURES:
        if match["share"] is not None:
            raise UsageError(f"{where}: a run has one {metric}, so no share of it can be asked for; e.g. ttft<=1s@99%")
        return Slo(metric=metric, statistic="mean", limit=_amount(where, match["limit"], FIGURES[metric]))
    limit = _amount(where, match["limit"], "s")
    if match["share"] is None:
        if not statistic:
            which = "tokens" if metric == "itl" else "requests"
            raise UsageError(f"{where}: of which {which}? e.g. {metric}_p95<=500ms or {metric}<=500ms@99%")
        return Slo(metric=metric, statistic=statistic, limit=limit)
    if statistic:
        raise UsageError(f"{where}: a statistic and a share exclude each other; e.g. {metric}<=500ms@99%")
    share = match["share"]
    if not share.endswith("%") or _NUMBER.fullmatch(share[:-1]) is None or not 0 < Decimal(share[:-1]) <= 100:
        raise UsageError(f"{where}: the share must be above 0% and at most 100%, e.g. {metric}<=500ms@99%")
    return Slo(metric=metric, statistic="attain", limit=limit, fraction=float(Decimal(share[:-1]) / 100))


def known_statistic(text: str, kind: str) -> str:
    """A statistic over requests, or over gaps between tokens, in its one spelling: mean, max, p95, p99.9.

    Raises
    ------
    UnknownNameError    naming what kind of text it is
    """
    match = _PERCENTILE.fullmatch(text)
    if match is not None and 0 < Decimal(match[1]) <= 100:
        return f"p{_plain(Decimal(match[1]))}"
    if text not in ("mean", "max"):
        raise UnknownNameError(
            kind, text[:40], STATISTICS, f"or any percentile above 0 to 100, as p99.9; e.g. {EXAMPLE}"
        )
    return text


def percent(statistic: str) -> float:
    """The percentile that a statistic other than the mean is."""
    return 100.0 if statistic == "max" else float(statistic[1:])


def _check_metric(name: str) -> None:
    if name not in (*LATENCIES, *FIGURES):
        raise UnknownNameError("SLO metric", name[:40], (*LATENCIES, *FIGURES), f"e.g. {EXAMPLE}")


def _amount(where: str, text: str, unit: str) -> float:
    """A limit in the unit, from a number in this or one like it."""
    endings, form = _ENDINGS[unit]
    example = f"; e.g. {EXAMPLE}" if unit in ("s", "requests/s") else ""
    folded = text.lower() if unit == "s" else text.removeprefix("$") if unit.startswith("$") else text
    ending = next((end for end in sorted(endings, key=len, reverse=True) if folded.endswith(end)), None)
    number = folded if ending is None else folded[: len(folded) - len(ending)]
    if ending is None or _NUMBER.fullmatch(number) is None:
        raise UsageError(f"{where}: the limit must be {form}, got {text!r:.40}{example}")
    value = float(Decimal(number) * endings[ending])
    if not 0 < value < math.inf:
        raise UsageError(f"{where}: the limit must be above 0 and finite, got {text!r:.40}{example}")
    return value


def _is_number(value: object) -> bool:
    """An int or a float; bool is neither here."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Decimal) -> str:
    """Digits without trailing zeros; an exponent only where it is shorter."""
    fixed, short = f"{value.normalize():f}", f"{value.normalize():E}"
    return fixed if len(fixed) <= max(len(short), 12) else short
