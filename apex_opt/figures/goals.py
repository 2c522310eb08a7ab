"""Goals as text, such as `ttft_p95<=500ms`, `itl<=50ms@99%`, `throughput>=10`, `energy<=200kJ`; and objectives."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UnknownNameError, UsageError, shown
from apex_opt.figures.registry import STATISTICS, Figure, figure, names, per_item, per_run, split
from apex_opt.figures.units import EXAMPLE, NUMBER, plain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from apex_opt.figures.metrics import Metrics
    from apex_opt.figures.run import Bools, Run

_PERCENTILE: Final = re.compile(r"p(\d{1,3}(?:\.\d{1,6})?)", re.ASCII)
_GOAL: Final = re.compile(r"(?P<name>[^<>=≤≥]*)(?P<sign>[<>=≤≥]+)(?P<limit>[^<>=≤≥@]*)(?:@(?P<share>.*))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A limit on a figure.

    Parameters
    ----------
    metric : str                   a figure by its name
    statistic : str                of a figure of requests or gaps: mean, max or a percentile such as p95 or p99.9 over
                                   them, or "attain": the share of them whose own value is within the limit; of a
                                   figure of the run "mean" only
    limit : float                  in the figure's unit
    fraction : float or None       share of the requests that must be within the limit, above 0 to 1; "attain" only
    text : str                     how it was said; canonical where not given, and `parse_goals(text)` gives it back

    Raises
    ------
    UsageError                     a limit that is not above 0 and finite, a statistic or fraction that does not apply
    UnknownNameError               figure or statistic not known
    """

    metric: str
    statistic: str
    limit: float
    fraction: float | None = None
    text: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not isinstance(self.statistic, str):
            raise UsageError(f"SLO: metric and statistic must be text, e.g. {EXAMPLE}")
        of_run = _known(self.metric).of == "run"
        if of_run and self.statistic != "mean":
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
    def figure(self) -> Figure:
        """What it limits."""
        return figure(self.metric)

    @property
    def threshold(self) -> float:
        """What the measured value is compared with: the fraction for "attain", else the limit."""
        return self.limit if self.fraction is None else self.fraction

    @property
    def at_most(self) -> bool:
        """True where less is better; of a share of the requests more is."""
        return not self.figure.maximise and self.fraction is None

    @property
    def unit(self) -> str:
        """Of the limit."""
        return self.figure.unit.name

    @property
    def name(self) -> str:
        """The figure and its statistic as one name, as objectives have it; of a share of the requests the mean."""
        if self.figure.of == "run":
            return self.metric
        return f"{self.metric}_{'mean' if self.fraction is not None else self.statistic}"

    @property
    def of_requests(self) -> bool:
        """Whether the limit means something for one request: it is on its own figure, by percentile or share."""
        return self.figure.of == "request" and self.statistic != "mean"

    def met(self, value: float) -> bool:
        """Whether the measured value (in the figure's unit, or a share of requests) meets the goal; NaN never."""
        return value <= self.threshold if self.at_most else value >= self.threshold

    def reached(self, metrics: Metrics) -> float:
        """The figure that the goal is compared with; NaN for a latency that nobody has."""
        if self.statistic == "attain":
            return metrics.attainment[self.text]
        return metrics.value(self.metric, self.statistic)

    def late(self, run: Run) -> Bools:
        """bool[k, n], which requests of each run are not within the limit; one that has no such figure is."""
        over = self.figure.value(run) > self.limit
        return run.spread(over) if self.figure.of_several else over

    def margin(self, value: float) -> float:
        """Distance to the goal as a share of it: positive inside, 0 on the edge, negative when missed."""
        return (self.threshold - value if self.at_most else value - self.threshold) / self.threshold

    def told(self, value: float) -> str:
        """A value of the figure with its unit, in a sentence, with as many digits as tell it from the limit."""
        return self.figure.unit.tell(value, self.limit)

    def _canonical(self) -> str:
        """Shortest text that is read as the same goal."""
        limit = f"{'>=' if self.figure.maximise else '<='}{self.figure.unit.write(float(self.limit))}"
        if self.fraction is not None:
            return f"{self.metric}{limit}@{plain(Decimal(repr(float(self.fraction))) * 100)}%"
        return f"{self.name}{limit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A figure to make small, or large where `maximise`.

    Where others come after it, plans within `tolerance` of the best by it, as a share, count as equal.
    """

    name: str
    unit: str
    maximise: bool = False
    tolerance: float = 0.0

    @property
    def metric(self) -> str:
        """The figure it is about, by its name."""
        return split(self.name)[0]

    @property
    def statistic(self) -> str:
        """Of a figure of requests or gaps; runs have their mean only."""
        return split(self.name)[1]

    @property
    def figure(self) -> Figure:
        """What it is about."""
        return figure(self.metric)

    def value(self, metrics: Metrics) -> float:
        """The figure as people read it."""
        return metrics.value(self.metric, self.statistic)

    def signed(self, value: float) -> float:
        """The figure with its sign such that less is better; one that no request has counts as nothing."""
        if value != value:
            return 0.0
        return -value if self.maximise else value

    def near(self, best: float) -> tuple[Goal, ...]:
        """What a plan must reach to count as equal to one of this value; nothing where every plan does."""
        limit = best * (1 - self.tolerance) if self.maximise else best * (1 + self.tolerance)
        if limit != limit or (self.maximise and limit <= 0):
            return ()
        return (Goal(metric=self.metric, statistic=self.statistic, limit=max(limit, sys.float_info.min)),)


TIES: Final = Objective(name="e2e_mean", unit="s")
"""What decides where energy and price alone do not."""


def parse_goals(text: str) -> tuple[Goal, ...]:
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
    UnknownNameError               figure or statistic not known, with suggestions
    """
    if not isinstance(text, str) or not text.strip(" ,\t\n"):
        raise UsageError(f"SLO: expected text such as {EXAMPLE}, got {shown(text)}")
    joined = re.sub(r"\s*([<>=≤≥@]+)\s*", r"\1", text)
    goals: list[Goal] = []
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


def _parse_goal(part: str) -> Goal:
    """One goal, without spaces."""
    where = f"SLO {part!r:.60}"
    match = _GOAL.fullmatch(part)
    if match is None or not match["name"]:
        raise UsageError(f"{where}: expected METRIC_STATISTIC<=LIMIT, e.g. {EXAMPLE}")
    metric, statistic = split(match["name"].lower())
    about = _known(metric)
    sign = ">=" if about.maximise else "<="
    if match["sign"] != sign:
        raise UsageError(f"{where}: {metric} takes {sign}, got {match['sign']}; e.g. {EXAMPLE}")
    if about.of == "run" and match["share"] is not None:
        raise UsageError(f"{where}: a run has one {metric}, so no share of it can be asked for; e.g. ttft<=1s@99%")
    limit = about.unit.read(where, match["limit"])
    if match["share"] is None:
        if not statistic:
            which = "tokens" if about.of == "gap" else "requests"
            raise UsageError(f"{where}: of which {which}? e.g. {metric}_p95<=500ms or {metric}<=500ms@99%")
        return Goal(metric=metric, statistic=statistic, limit=limit)
    if statistic:
        raise UsageError(f"{where}: a statistic and a share exclude each other; e.g. {metric}<=500ms@99%")
    share = match["share"]
    if not share.endswith("%") or NUMBER.fullmatch(share[:-1]) is None or not 0 < Decimal(share[:-1]) <= 100:
        raise UsageError(f"{where}: the share must be above 0% and at most 100%, e.g. {metric}<=500ms@99%")
    return Goal(metric=metric, statistic="attain", limit=limit, fraction=float(Decimal(share[:-1]) / 100))


def step_limit_s(goals: Iterable[Goal]) -> float | None:
    """The tightest limit on the time from one token to the next; None without one."""
    return min((goal.limit for goal in goals if goal.figure.time == "step"), default=None)


def load_objective(name: str) -> Objective:
    """An objective by name: a figure of runs, or one of requests or gaps with a statistic, such as `e2e_p99.9`.

    Raises
    ------
    UnknownNameError    not a name of one
    """
    metric, statistic = split(name)
    if name not in (entry.name for entry in per_run()):
        if not statistic or metric not in (entry.name for entry in per_item()):
            raise UnknownNameError("objective", name[:60], names())
        name = f"{metric}_{known_statistic(statistic, f'objective: statistic of {metric}')}"
    about = figure(metric)
    return Objective(name=name, unit=about.unit.name, maximise=about.maximise)


def load_objectives(text: str) -> tuple[Objective, ...]:
    """Objectives by name, the most important first: `energy,e2e_p95`.

    Of plans equal by the first, the best by the second is the best, and so on. `energy~2%,e2e_p95` takes for equal all
    that are within 2% of the best. Many plans cost the same: where none but costs and energies are named, `e2e_mean`
    comes after them.

    Raises
    ------
    UnknownNameError    a name that is none
    UsageError          one named twice, a tolerance that is no share or has nothing after it
    """
    found = []
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        name, tilde, share = part.partition("~")
        objective = load_objective(name.strip())
        if tilde:
            objective = replace(objective, tolerance=_share(part, share.strip()))
        found.append(objective)
    given = [objective.name for objective in found]
    if twice := [name for name in given if given.count(name) > 1]:
        raise UsageError(f"--objective: {text!r:.60} names {twice[0]} twice; name each once")
    if found[-1].tolerance:
        raise UsageError(
            f"--objective: {parts[-1]!r:.60} has a tolerance and nothing after it to choose by; e.g. energy~2%,e2e_p95"
        )
    if all(objective.figure.depends_on & {"energy", "price"} for objective in found):
        found.append(TIES)
    return tuple(found)


def load_latency(name: str) -> Objective:
    """A latency by name, such as `e2e_mean` or `ttft_p99.9`.

    Raises
    ------
    UsageError          a figure that is no latency
    UnknownNameError    not a name of one
    """
    found = load_objective(name)
    if found.figure.of == "run":
        known = ", ".join(entry.name for entry in per_item())
        raise UsageError(f"--latency: {name} is no latency; give one of {known} with _mean, _max or such as _p95")
    return found


def known_statistic(text: str, kind: str) -> str:
    """A statistic over requests, or over gaps between tokens, in its one spelling: mean, max, p95, p99.9.

    Raises
    ------
    UnknownNameError    naming what kind of text it is
    """
    match = _PERCENTILE.fullmatch(text)
    if match is not None and 0 < Decimal(match[1]) <= 100:
        return f"p{plain(Decimal(match[1]))}"
    if text not in ("mean", "max"):
        raise UnknownNameError(
            kind, text[:40], STATISTICS, f"or any percentile above 0 to 100, as p99.9; e.g. {EXAMPLE}"
        )
    return text


def _known(name: str) -> Figure:
    return figure(name, "SLO metric", f"e.g. {EXAMPLE}")


def _share(part: str, text: str) -> float:
    """A share in percent, above 0 and at most 1000."""
    digits = text.removesuffix("%")
    if text.endswith("%") and digits.replace(".", "", 1).isdecimal() and digits.isascii() and 0 < float(digits) <= 1000:
        return float(Decimal(digits) / 100)
    raise UsageError(
        f"--objective: {part!r:.60}: a tolerance is a share above 0% and at most 1000%, e.g. energy~2%,e2e_p95"
    )


def _is_number(value: object) -> bool:
    """An int or a float; bool is neither here."""
    return isinstance(value, int | float) and not isinstance(value, bool)
