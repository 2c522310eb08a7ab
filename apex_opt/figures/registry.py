"""Every figure there is: one entry says what it is, how it bounds, how it is read and told, and when it is missed.

To add one, add its entry to `_ENTRIES`. It is then an objective and a goal everywhere, and in every document. Without
`rises_with` and `falls_with` no plan is ruled out by it before it is simulated, which is always right. With them its
value for what no run can beat is taken as a bound, and a test changes runs at random and fails where that is none.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.figures import units
from apex_opt.units import S_PER_H

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from apex_opt.figures.run import Facts, Floats, Quantity, Run, Time

STATISTICS: Final = ("mean", "p50", "p90", "p95", "p99", "max")
"""Of figures of requests and gaps, those always told; any other percentile can be asked for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Figure:
    """A figure that plans are judged by.

    Parameters
    ----------
    name : str                    as objectives and goals have it; of requests and gaps with a statistic after it
    help : str                    what it is, for `--help`
    unit : Unit                   how limits and values are read and told
    better : "less" or "more"
    of : "request", "gap" or "run"
        what there is one of: every request, every gap between two tokens, or the run
    value : callable              of a `Run`: float64[k, m] of requests and gaps, float64[k] of runs; NaN where unknown
    of_several : bool             of requests: only those with more than one token have it, so m counts these
    rises_with, falls_with : tuple of `Quantity`
        what the value never falls, or never rises, with, and all that it depends on; none: not known
    time : Time or None           the time of a run that it is, where it is one: runs are cut short by it, and the load
                                  that all requests are together raises its bounds
    stop : callable or None       of a limit and the `Facts` of a plan, the makespan in seconds beyond which a run is
                                  surely on the wrong side of the limit; None: no such sign is known
    of_goals : bool               whether it counts requests within their goals
    key : str                     its name in documents; empty: the same name
    title, head : str             its names in tables, in words and as the head of a column; empty: name and unit
    """

    name: str
    help: str
    unit: units.Unit
    better: Literal["less", "more"] = "less"
    of: Literal["request", "gap", "run"] = "run"
    value: Callable[[Run], Floats]
    of_several: bool = False
    rises_with: tuple[Quantity, ...] = ()
    falls_with: tuple[Quantity, ...] = ()
    time: Time | None = None
    stop: Callable[[float, Facts], float] | None = None
    of_goals: bool = False
    key: str = ""
    title: str = ""
    head: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.name)
        if not self.title:
            object.__setattr__(self, "title", self.name)
        if not self.head:
            object.__setattr__(self, "head", f"{self.title}, {self.unit.name}" if self.of == "run" else self.title)

    @property
    def maximise(self) -> bool:
        return self.better == "more"

    @property
    def depends_on(self) -> frozenset[Quantity]:
        """The quantities it depends on; empty where it does not say."""
        return frozenset((*self.rises_with, *self.falls_with))

    @property
    def bounded(self) -> bool:
        """Whether its value for what no run can beat is a bound of it."""
        good, bad = (self.falls_with, self.rises_with) if self.maximise else (self.rises_with, self.falls_with)
        return bool(good) and not bad

    @property
    def of_gpus(self) -> bool:
        """Whether it depends on how many GPUs there are besides how fast these are, or does not say."""
        return not self.depends_on or not self.depends_on <= {"latency", "makespan"}

    @property
    def priced(self) -> bool:
        """Whether it takes the price of the GPUs."""
        return "price" in self.depends_on

    @property
    def is_speed(self) -> bool:
        """Whether more of it, or less, is a faster run: it depends on times alone."""
        return bool(self.depends_on) and not self.of_gpus

    @property
    def by_arrivals(self) -> bool:
        """Whether a run has no more of it than arrives: more of it takes a shorter makespan."""
        return self.maximise and "makespan" in self.falls_with

    @property
    def exact(self) -> bool:
        """Whether it is known before any run, and so does not move with the rate of the requests."""
        return self.depends_on == {"price"}


def _served(limit: float, facts: Facts) -> float:
    """No more requests than there are, over a makespan that only grows."""
    return facts.requests / limit if limit > 0 else math.inf


def _spent(joules: float, facts: Facts) -> float:
    """No less than the idle draw over the makespan and what every token takes, or all that may be drawn."""
    free_j = joules - facts.least_j
    return max(free_j / facts.idle_w if facts.idle_w else math.inf, joules / facts.limit_w)


def _paid(limit: float, facts: Facts) -> float:
    """The price of the makespan, over tokens that are known beforehand."""
    return limit / 1e6 * facts.output_tokens * S_PER_H / facts.cost_per_h if facts.cost_per_h else math.inf


_ENTRIES: Final = (
    Figure(
        name="ttft",
        help="to the first token",
        unit=units.DURATION,
        of="request",
        value=lambda run: run.first_s,
        rises_with=("latency",),
        time="first",
        key="ttft_s",
        title="TTFT",
    ),
    Figure(
        name="tpot",
        help="per later token, in the mean of a request",
        unit=units.DURATION,
        of="request",
        value=lambda run: run.step_s,
        of_several=True,
        rises_with=("latency",),
        time="step",
        key="tpot_s",
        title="TPOT",
    ),
    Figure(
        name="e2e",
        help="to the last token",
        unit=units.DURATION,
        of="request",
        value=lambda run: run.whole_s,
        rises_with=("latency",),
        time="whole",
        key="e2e_s",
        title="E2E",
    ),
    Figure(
        name="itl",
        help="between tokens",
        unit=units.DURATION,
        of="gap",
        value=lambda run: run.gap_s,
        of_several=True,
        rises_with=("latency",),
        time="gap",
        key="itl_s",
        title="ITL",
    ),
    Figure(
        name="makespan",
        help="from the first arrival to the last token",
        unit=units.LONG_DURATION,
        value=lambda run: run.makespan_s,
        rises_with=("makespan",),
        stop=lambda limit, facts: limit,
        key="makespan_s",
    ),
    Figure(
        name="throughput",
        help="requests/s",
        unit=units.RATE,
        better="more",
        value=lambda run: run.requests / run.makespan_s,
        falls_with=("makespan",),
        stop=_served,
        key="throughput_rps",
        head="req/s",
    ),
    Figure(
        name="goodput",
        help="requests/s within the latency goals",
        unit=units.RATE,
        better="more",
        value=lambda run: run.good / run.makespan_s,
        falls_with=("latency", "makespan"),
        stop=_served,
        of_goals=True,
        key="goodput_rps",
    ),
    Figure(
        name="energy",
        help="J",
        unit=units.ENERGY,
        value=lambda run: run.energy_j,
        rises_with=("energy",),
        stop=_spent,
        key="energy_j",
        head="kJ",
    ),
    Figure(
        name="energy_per_token",
        help="J",
        unit=units.ENERGY_PER_TOKEN,
        value=lambda run: run.energy_j / run.output_tokens,
        rises_with=("energy",),
        stop=lambda limit, facts: _spent(limit * facts.output_tokens, facts),
        key="energy_per_output_token_j",
    ),
    Figure(
        name="cost",
        help="$/h",
        unit=units.PRICE,
        value=lambda run: run.price,
        rises_with=("price",),
        key="cost_usd_per_h",
    ),
    Figure(
        name="cost_per_mtoken",
        help="$ per million output tokens",
        unit=units.PRICE_PER_MTOKEN,
        value=lambda run: run.price * run.makespan_s / S_PER_H / run.output_tokens * 1e6,
        rises_with=("price", "makespan"),
        stop=_paid,
        key="cost_usd_per_mtoken",
    ),
)

_FIGURES: Final = {entry.name: entry for entry in _ENTRIES}


@contextmanager
def registered(entry: Figure) -> Iterator[Figure]:
    """A further figure for as long as the block lasts: how a test or another package tries one.

    Raises
    ------
    UsageError    its name is taken, or cannot be told from a statistic of another
    """
    if entry.name in _FIGURES or split(entry.name)[0] in _FIGURES:
        raise UsageError(f"figure {entry.name!r:.60}: the name is taken; give it another")
    _FIGURES[entry.name] = entry
    try:
        yield entry
    finally:
        del _FIGURES[entry.name]


def figures() -> tuple[Figure, ...]:
    """Every figure."""
    return tuple(_FIGURES.values())


def per_item() -> tuple[Figure, ...]:
    """Those of requests and of gaps, which have statistics."""
    return tuple(entry for entry in figures() if entry.of != "run")


def per_run() -> tuple[Figure, ...]:
    """Those that a run has one of."""
    return tuple(entry for entry in figures() if entry.of == "run")


def figure(name: str, kind: str = "figure", hint: str = "") -> Figure:
    """A figure by its name.

    Parameters
    ----------
    name : str
    kind, hint : what the name is of, and what helps, for the message

    Raises
    ------
    UnknownNameError
    """
    if name not in _FIGURES:
        raise UnknownNameError(kind, name[:40], _FIGURES, hint)
    return _FIGURES[name]


def split(name: str) -> tuple[str, str]:
    """The figure that a name is about, and its statistic: ttft and p95 of ttft_p95; of a run the mean."""
    if name in _FIGURES:
        return name, "mean" if _FIGURES[name].of == "run" else ""
    metric = next((entry.name for entry in per_item() if name.startswith(f"{entry.name}_")), name.partition("_")[0])
    # A name that only begins like a figure of runs is none of them.
    return (name, "") if metric in (entry.name for entry in per_run()) else (metric, name[len(metric) + 1 :])


def timed(time: Time) -> Figure:
    """The figure that is a time of runs."""
    return next(entry for entry in figures() if entry.time == time)


def names() -> tuple[str, ...]:
    """What can be made best; of figures of requests and gaps any other percentile, too."""
    several = (f"{entry.name}_{statistic}" for entry in per_item() for statistic in STATISTICS)
    return *several, *(entry.name for entry in per_run())


def objectives_help() -> str:
    """What can be made best, for `--help`."""
    several = _either([f"{entry.name} ({entry.help})" for entry in per_item()])
    of_runs = "; ".join(f"{entry.name} ({entry.help})" for entry in per_run())
    return f"{several} with _mean, _max or a percentile such as _p95 or _p99.9; {of_runs}"


def goals_help() -> str:
    """Goals that can be given, for `--help`."""
    of_runs = (f'"{entry.name}{">=" if entry.maximise else "<="}{entry.unit.sample}"' for entry in per_run())
    shares = '"ttft<=1s@99%" (of the requests), "itl<=50ms@99%" (of the gaps between tokens)'
    return f'"ttft_p95<=500ms,tpot_p95<=50ms", {shares}, {", ".join(of_runs)}; rates are in requests/s'


def latencies_help() -> str:
    """Latencies that can be given with a statistic, for `--help`."""
    return f"{_either([entry.name for entry in per_item()])} with _mean, _max or a percentile such as _p95"


def _either(texts: Sequence[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} or {last}"
