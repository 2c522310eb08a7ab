"""Random engines, laws and traces for the simulator's tests, and how two runs are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import pytest
from golden.condense import digest
from hypothesis import strategies as st

from apex_opt.engines.schedulers import SCHEDULINGS, VllmScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.speculation import METHODS, Speculation
from apex_opt.search.bounds import StageFloor, isolated, may_preempt
from apex_opt.simulator import BatchLaw, Outcome, Replay, simulate
from apex_opt.simulator.law import RATE_BITS, Window, linear_law
from apex_opt.simulator.outcome import BatchCounts
from apex_opt.units import ceil_div
from apex_opt.workload import Trace, make_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.plans.routing import Routing
    from apex_opt.simulator.api import Implementation
    from apex_opt.workload.columns import Ints

Loop = Literal[
    "synchronous",
    "asynchronous",
    "threshold",
    "pipeline",
    "asynchronous pipeline",
    "prefix caching",
    "orca",
    "static",
    "drafts",
    "drafts and prefix caching",
]
DRAFTING: Final[tuple[Loop, ...]] = get_args(Loop)[-2:]
LOOPS: Final[tuple[Loop, ...]] = get_args(Loop)[:-2]
Traffic = Literal["dealt", "routed", "closed"]
TRAFFIC: Final[tuple[Traffic, ...]] = get_args(Traffic)
IMPLEMENTATIONS: Final[tuple[Implementation, ...]] = ("reference", "kernel")
REPLAYED: Final = pytest.mark.parametrize(
    ("implementation", "every"),
    [("kernel", 1), ("reference", 20), pytest.param("reference", 1, marks=pytest.mark.nightly)],
)
"""Recorded cases are replayed by the kernel and, but for the night, every twentieth by the reference, which is slow."""
EXACT: Final = 12 << RATE_BITS
"""Rates that are multiples of this neither round nor, with up to 4 attention copies, leave a remainder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All arguments of a simulation."""

    settings: EngineSettings
    blocks: int
    laws: tuple[BatchLaw, ...]
    trace: Trace
    replicas: int = 1
    routing: Routing = "round_robin"

    def run(self, implementation: Implementation = "kernel", *, log: bool = True, **limits: Any) -> Outcome:
        """Simulate, with `stops` and `floors` where given."""
        return simulate(
            self.settings,
            self.blocks,
            self.laws,
            self.trace,
            replicas=self.replicas,
            routing=self.routing,
            log=log,
            implementation=implementation,
            **limits,
        )

    def having(self, **changes: Any) -> Case:
        """The case with some arguments exchanged."""
        return replace(self, **changes)


def alone(case: Case) -> Outcome:
    """Times that no request of a case can beat."""
    overtaking = may_preempt(case.settings, case.blocks, case.trace)
    return floors_run(case.settings, floors_of(case.laws), case.trace, overtaking=overtaking)


def floors_run(
    settings: EngineSettings, floors: Sequence[StageFloor], trace: Trace, *, overtaking: bool = False
) -> Outcome:
    """The times that no request can beat, in the form of a run."""
    first, rest = isolated(settings, floors, trace, overtaking=overtaking)
    return Outcome(
        arrival_ns=trace.arrival_ns,
        first_token_ns=trace.arrival_ns + first,
        finish_ns=trace.arrival_ns + first + rest,
        preemptions=0,
        batches=0,
        busy_ns=np.zeros((1, 1), np.int64),
        counts=BatchCounts.empty(settings),
    )


def floors_of(laws: Sequence[BatchLaw]) -> list[StageFloor]:
    """The floor of every stage."""
    return [StageFloor.of(law) for law in laws]


def requests(
    rows: Sequence[tuple[int, int, int]], concurrency: int | None = None, pause_ns: int = 0, **content: Any
) -> Trace:
    """A trace from rows of arrival (ns), prompt and output tokens; the rest as in `make_trace`.

    Parameters
    ----------
    rows, concurrency, pause_ns, content
    """
    arrival, prompt, output = zip(*rows, strict=True)
    given: dict[str, Any] = {"concurrency": concurrency, "pause_ns": pause_ns, **content}
    return make_trace(name="test", arrival_ns=arrival, prompt=prompt, output=output, **given)


def moved(trace: Trace, arrival_ns: Ints) -> Trace:
    """The same requests at other times, in the same order."""
    arrival_ns.flags.writeable = False
    return replace(trace, arrival_ns=arrival_ns)


def linear(settings: EngineSettings, base: int, token: int = 0, context: int = 0, **changes: Any) -> BatchLaw:
    """The law `base + token * tokens + context * context` for an engine, in ns."""
    law = linear_law(
        base_ns=base,
        token_ns=token,
        context_ns=context,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    return replace(law, **changes)


def blocks_of(settings: EngineSettings, prompt: int, output: int) -> int:
    """Blocks a request holds when it computes its last token; the token it yields then is never computed."""
    ahead = settings.speculation.ahead if settings.speculation else 0
    held = min(prompt + output, settings.max_model_len) - 1
    return ceil_div(min(held + ahead, settings.max_model_len), settings.block_size)


def of_windows(settings: EngineSettings, rates: Callable[[int], Any]) -> dict[str, Any]:
    """None to two windows and what is charged by them, `rates` of so many entries each.

    They hang on the settings alone, so that all stages of a pool have the same.
    """
    most, entries = settings.max_model_len, (settings.max_num_seqs + 1, settings.max_num_batched_tokens + 1)
    drawn = np.random.default_rng(64 * settings.max_num_seqs + most)
    lengths = sorted(drawn.choice(min(most, 1000), min(int(drawn.integers(0, 3)), most), replace=False))
    windows = tuple(Window(int(tokens) + 1, bool(drawn.integers(0, 2))) for tokens in lengths)
    names = dict(zip(("seen_rate", "seen_pair_rate"), entries, strict=True))
    tables = {name: np.array([rates(size) for _ in windows], np.int64) for name, size in names.items()}
    return {"windows": windows, **{name: tables[name].reshape(len(windows), size) for name, size in names.items()}}


def random_law(
    settings: EngineSettings, seed: int, *, zeros: float, copies: int, unit: int = 1, rate_unit: int = 1
) -> BatchLaw:
    """Tables without any order: times to 40 units and rates to 4 ns, a share of both zero."""
    rng = np.random.default_rng(seed)
    seats, tokens = settings.max_num_seqs + 1, settings.max_num_batched_tokens + 1

    def table(size: int, least: int, most: int, unit: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        values = rng.integers(least, most, size, np.int64) * unit
        values[rng.random(size) < zeros] = 0
        return values

    rate = (0, max(4 * (1 << RATE_BITS) // rate_unit, 4), rate_unit)
    drafting: dict[str, Any] = {}
    if settings.speculation is not None:
        drafting = {
            "draft_tokens": settings.speculation.draft_tokens,
            "verify_ns": table(tokens, 0, 20, unit),
            "draft_ns": table(seats, 0, 20, unit),
            "draft_rate": table(seats, *rate),
        }
    if settings.scheduler.launches:
        apart = np.random.default_rng(seed + 1)
        drafting |= {
            "launch_ns": int(apart.choice([0, 0, 3, 30, 90])) * unit,
            "captured_tokens": int(apart.choice([0, 8])),
        }
    return BatchLaw(
        **of_windows(settings, lambda entries: table(entries, *rate)),
        decode_ns=table(seats, 1, 40, unit),
        sequence_ns=table(seats, 0, 10, unit),
        attend_ns=table(seats, 0, 10, unit),
        context_rate=table(seats, *rate),
        mixed_ns=table(tokens, 1, 40, unit),
        chunk_ns=table(tokens, 0, 20, unit),
        pair_rate=table(tokens, *rate),
        chunk_context_rate=table(tokens, *rate),
        transfer_ns=table(tokens, 0, 15, unit),
        copies=copies,
        **drafting,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleepy(VllmScheduling):
    """Sleeps nanoseconds for microseconds, as batches here take nanoseconds."""

    @property
    def idle_sleep_ns(self) -> int:
        return self.idle_sleep_us


def sleeping(settings: EngineSettings, sleep_ns: int) -> EngineSettings:
    """Settings of an engine that sleeps so long after a turn that scheduled nothing, where it sleeps at all."""
    if not isinstance(settings.scheduler, Sleepy):
        return settings
    return replace(settings, scheduler=replace(settings.scheduler, idle_sleep_us=sleep_ns))


@st.composite
def engines(draw: st.DrawFn, loop: Loop) -> EngineSettings:
    """Small engines of one kind of loop: one seat or several, budgets below and above a prompt."""
    seats = draw(st.integers(1, 8))
    longest = draw(st.integers(2, 64))
    coin = st.booleans()
    chunked = draw(coin)
    policy = loop if loop in ("orca", "static") else "vllm"
    least = seats if chunked and policy == "vllm" else max(seats, longest)
    if loop == "threshold":
        threshold = draw(st.integers(1, 12))
    else:
        threshold = 0 if loop in ("synchronous", "asynchronous") else draw(st.sampled_from((0, 0, 1, 7)))
    return EngineSettings(
        max_num_seqs=seats,
        max_num_batched_tokens=least + draw(st.sampled_from((0, 1, 5, 24))),
        max_model_len=longest,
        chunked_prefill=chunked,
        block_size=draw(st.one_of(st.integers(1, 4), st.integers(1, 32))),
        async_scheduling=loop.startswith("asynchronous")
        or (loop in ("threshold", "prefix caching", "orca", "static", *DRAFTING) and draw(coin)),
        scheduler=Sleepy(long_prefill_token_threshold=threshold, idle_sleep_us=draw(st.sampled_from((0, 1, 20, 300))))
        if policy == "vllm"
        else SCHEDULINGS[policy](),
        prefix_caching=loop.endswith("prefix caching"),
        speculation=draw(speculations()) if loop in DRAFTING else None,
    )


@st.composite
def speculations(draw: st.DrawFn) -> Speculation:
    """Drafts of any kind, in lists for all requests or for each of some."""
    drafts = draw(st.integers(1, 8))

    def counts(most: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
        lists = st.lists(st.integers(0, most), min_size=1, max_size=7).map(tuple)
        return st.lists(lists, min_size=1, max_size=4).map(tuple)

    return Speculation(
        method=draw(st.sampled_from(tuple(METHODS))),
        draft_tokens=drafts,
        accepted=draw(counts(drafts + 2)),
        proposed=draw(st.one_of(st.just(()), counts(drafts + 2))),
    )


@st.composite
def cases(
    draw: st.DrawFn, loop: Loop, traffic: Traffic, *, busy: bool = False, exact: bool = False, most: int = 25
) -> Case:
    """Everything a simulation takes.

    Parameters
    ----------
    loop, traffic : which engine loop, and how requests reach the replicas
    busy : bool     every batch takes time, so that no two events of a replica coincide
    exact : bool    no term of the law rounds
    most : int      requests
    """
    settings = draw(engines(loop))
    seeds = st.integers(0, 2**32 - 1)
    zeros = 0.0 if busy else draw(st.sampled_from((0.0, 0.3, 0.8)))
    stages = draw(st.integers(2, 4)) if loop.endswith("pipeline") else 1
    if loop in ("prefix caching", "orca", "static"):
        stages = draw(st.sampled_from((1, 1, 2, 3)))
    laws = tuple(
        random_law(
            settings,
            draw(seeds),
            zeros=zeros,
            copies=draw(st.integers(1, 4)),
            unit=12 if exact else 1,
            rate_unit=EXACT if exact else 1,
        )
        for _ in range(stages)
    )
    room = settings.max_model_len - 1
    prompts = st.one_of(
        st.just(1), st.integers(1, min(room, 6)), st.integers(1, room), st.integers(max(1, room - 2), room)
    )
    outputs = st.one_of(st.just(1), st.integers(1, 40))
    gaps = st.sampled_from((0, 0, 0, 1, 7, 40, 300))
    count = draw(st.integers(1, most))  # as lists of free length are mostly short, and short traces mostly dull
    drawn = draw(st.lists(st.tuples(gaps, prompts, outputs), min_size=count, max_size=count))
    arrivals = np.cumsum([gap for gap, _, _ in drawn]).tolist()
    rows = [(arrival, p, o) for arrival, (_, p, o) in zip(arrivals, drawn, strict=True)]
    needs = [blocks_of(settings, p, o) for _, p, o in rows]
    spare = draw(st.sampled_from((0, 1, 2, max(needs), sum(needs))))
    content: dict[str, Any] = {}
    if settings.prefix_caching:
        # Few different ids, so that many prompts begin alike.
        piece = settings.block_size * draw(st.integers(1, 2))
        ids = np.random.default_rng(draw(seeds)).integers(0, draw(st.integers(1, 3)), (count, 64)).tolist()
        says = [ids[i][: ceil_div(p, piece)] for i, (_, p, _) in enumerate(rows)]
        content = {"content": says, "content_tokens": piece} if draw(st.sampled_from((True, True, False))) else {}
    return Case(
        settings=settings,
        blocks=max(needs) + draw(st.integers(0, spare)),
        laws=laws,
        trace=requests(rows, draw(st.integers(1, len(rows) + 2)), draw(st.sampled_from((0, 0, 1, 50))), **content)
        if traffic == "closed"
        else requests(rows, **content),
        replicas=draw(st.integers(2 if traffic == "routed" else 1, 4)),
        routing="least_loaded" if traffic == "routed" else "round_robin",
    )


def assert_same(one: Outcome, other: Outcome) -> None:
    """Every number of two runs, from the totals down to the batches."""
    assert one.steps == other.steps
    totals = ("preemptions", "batches", "stopped", "cached_tokens")
    assert [getattr(one, name) for name in totals] == [getattr(other, name) for name in totals]
    for name in ("arrival_ns", "first_token_ns", "finish_ns", "busy_ns"):
        ours, theirs = getattr(one, name), getattr(other, name)
        assert ours.dtype == theirs.dtype == np.int64 and np.array_equal(ours, theirs), (name, ours, theirs)
    assert one.counts.equals(other.counts)
    assert one.drafted == other.drafted
    if one.gaps_ns is not None and other.gaps_ns is not None:
        assert np.array_equal(one.gaps_ns, other.gaps_ns)  # type: ignore[arg-type]


def assert_recorded(result: Replay, recorded: dict[str, Any], name: object) -> None:
    """A recorded case of this name comes out again."""
    assert result.first_token_us == recorded["first_token_us"], name
    assert result.finish_us == recorded["finish_us"], name
    assert result.preemptions == recorded["preemptions"], name
    assert len(result.steps) == recorded["batches"], name
    assert digest(result.steps) == recorded["batches_sha256"], name
