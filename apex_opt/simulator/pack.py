"""The only door to the compiled kernel: lays out its memory, calls it, and reads the results."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from functools import lru_cache, partial
from math import lcm
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from apex_opt.engines.schedulers import CAPACITY_POLICIES, CHUNKING_POLICIES, SglangScheduling, TrtllmScheduling
from apex_opt.errors import UsageError
from apex_opt.figures.stops import METRICS, latencies_ns
from apex_opt.plans.kv_groups import sets_of
from apex_opt.simulator.content import BlockContent
from apex_opt.simulator.gaps import gaps_ns
from apex_opt.simulator.kernel import entries
from apex_opt.simulator.kernel import kv_state as kv
from apex_opt.simulator.kernel import state as kn
from apex_opt.simulator.kernel.kv_state import Groups
from apex_opt.simulator.kernel.sglang_state import SGLANG_REQUEST_SIZE, Tree
from apex_opt.simulator.law import OF_WINDOWS, RATE_BITS, TABLES, clock_overflow
from apex_opt.simulator.outcome import BatchCounts, Outcome, PoolOutcome
from apex_opt.simulator.pack_ranks import MESSAGES, GroupMemory
from apex_opt.simulator.pack_router import RULES, router_memory
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.stops import Stop
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.kv_groups import KvGroup
    from apex_opt.plans.routing import Routing
    from apex_opt.plans.speculation import Speculation
    from apex_opt.simulator.outcome import Drafted, Step
    from apex_opt.simulator.pools import EnginePool, Share
    from apex_opt.workload.trace import Trace

    I64 = NDArray[np.int64]

Room = tuple[int, ...]
"""Batches, rows and preempted requests that a log has room for."""

M = TypeVar("M", bound="Memory")

assert kn.RATE_BITS == RATE_BITS
assert [CAPACITY_POLICIES[number][:3] for number in (kn.NO_EVICT, kn.UTILISE, kn.ONE_BATCH)] == ["GUA", "MAX", "STA"]
assert [name[:5] for name in CHUNKING_POLICIES] == ["FIRST", "EQUAL", "FORCE"]
assert (kn.FIRST_COME, kn.EQUALLY, kn.FORCED) == (0, 1, 2)
_RULES: Final = {
    "vllm": kn.VLLM,
    "sglang": kn.VLLM,
    "trtllm": kn.VLLM,  # of which its own engine asks nothing
    "orca": kn.ORCA,
    "static": kn.STATIC,
}
"""Whose rules a scheduler goes by."""
_KINDS = {("full", "none"): kv.FULL, ("window", "none"): kv.WINDOW, ("state", "none"): kv.STATE}
_KINDS["state", "align"] = kv.KEPT
_OF_ALL = 9  # tables of a law that come before the copies of attention; those of drafts come after


def needs_compiling(
    settings: EngineSettings, stages: int, *, ranks: bool = False, halves: bool = False, handed: bool = False
) -> bool:
    """Whether a run of this kind will compile its engine first: nothing on disk is of the source as it is.

    Parameters
    ----------
    settings : EngineSettings
    stages : int                 of the pipeline
    ranks : bool                 whether replicas have ranks
    halves : bool                whether these split forwards
    handed : bool                whether they are prefill or decode instances
    """
    if handed:
        if isinstance(settings.scheduler, SglangScheduling):
            return not entries.PUSHING[settings.prefix_caching].ready()
        apart = engine_of(settings, stages) == "steady"
        return not (entries.APART if apart else entries.DISAGGREGATED[False, settings.prefix_caching]).ready()
    engines = entries.HALVES if halves else entries.RANKS if ranks else entries.SERVE
    return not engines[engine_of(settings, stages, halves=halves), settings.prefix_caching].ready()


def engine_of(settings: EngineSettings, stages: int, *, logged: bool = False, halves: bool = False) -> str:
    """The engine of the kernel that a run needs.

    Parameters
    ----------
    settings : EngineSettings
    stages : int      of the pipeline
    logged : bool     whether batches are told, with groups of layers the blocks of each
    halves : bool     whether ranks split forwards
    """
    if isinstance(settings.scheduler, SglangScheduling):
        return "sglang" if settings.speculation is None else "sglang drafts"
    if settings.kv_groups and settings.speculation is None:
        counted = not logged and not settings.prefix_caching
        steady = counted and stages == 1 and settings.scheduler.prompt_threshold == 0
        return "steady groups" if steady else "general groups"
    if isinstance(settings.scheduler, TrtllmScheduling):
        return "trtllm"
    if settings.speculation is not None:
        return "speculative groups" if settings.kv_groups else "speculative"
    walks = stages > 1 or settings.scheduler.prompt_threshold > 0 or settings.prefix_caching or halves
    return "general" if walks or _RULES[settings.scheduler.name] != kn.VLLM else "steady"


def routes(pools: Sequence[EnginePool], routings: Collection[Routing]) -> bool:
    """Whether the kernel has these routers before these replicas; the others are served by the reference.

    Where turns wait for requests, or are SGLang's, it is not known from the clock who takes one from a queue next.

    Parameters
    ----------
    pools
    routings : of `pack_router.RULES`
    """
    return all(
        pool.ranks is None
        and not (isinstance(its := pool.settings.scheduler, TrtllmScheduling) and its.fetch_wait_ns > 0)
        and not (isinstance(its, SglangScheduling) and "pull" in routings)
        and (engine_of(pool.settings, len(pool.laws)), pool.settings.prefix_caching) in entries.ROUTE
        for pool in pools
    )


def run(
    pools: Sequence[EnginePool],
    trace: Trace,
    shares: Sequence[Share],
    *,
    log: bool = False,
    gaps: bool = False,
    stops: Sequence[Stop] = (),
    floors: Outcome | None = None,
) -> Outcome:
    """Run a trace through the kernel; see `apex_opt.simulator.api.run_deployment` for the parameters.

    Parameters
    ----------
    pools, trace, shares
    log : bool                  whether every batch is told
    gaps : bool                 whether the times between tokens are told
    stops : sequence of Stop    limits at which a run ends early
    floors : Outcome or None    what no request can beat
    """
    messages = MESSAGES
    while True:
        build = partial(Memory, pools, trace, shares, stops, floors, messages=messages, published=log)
        memory = served(build, logged=log or gaps)
        if not memory.crowded:
            outcome: Outcome = memory.outcome(log=log, gaps=gaps)
            return outcome
        messages *= 4


def served(build: Callable[[Room | None], M], *, logged: bool) -> M:
    """The memory of a finished run; of one that is logged with room for all its batches.

    A first run, without room for any, counts them.
    """
    room: Room = (0,) * 6
    while True:
        memory = build(room if logged else None)
        memory.serve()
        used = memory.used
        if not logged or memory.stopped or memory.crowded or all(map(int.__le__, used, room)):
            return memory
        room = used


class Memory:
    """The arrays of one run, and what is read from them."""

    def __init__(
        self,
        pools: Sequence[EnginePool],
        trace: Trace,
        shares: Sequence[Share],
        stops: Sequence[Stop],
        floors: Outcome | None,
        room: Room | None,
        holding: Sequence[int] = (),
        messages: int = MESSAGES,
        published: bool = True,
    ) -> None:
        self._pools, self._trace, self._shares = pools, trace, shares
        each = [pool.replicas * pool.schedulers for pool in pools]
        lasts = np.cumsum(each).tolist()
        # Rows of the schedulers of each pool, and the first of each replica.
        self._places = [slice(last - mine, last) for mine, last in zip(each, lasts, strict=True)]
        self._first = np.concatenate(
            [
                np.arange(place.start, place.stop, pool.schedulers)
                for pool, place in zip(pools, self._places, strict=True)
            ]
        )
        self._engines = [
            "general"
            if holding
            else engine_of(pool.settings, len(pool.laws), logged=room is not None, halves=bool(pool.halves))
            for pool in pools
        ]
        if any(share.routed for share in shares) and len(shares) < len(pools):
            # Replicas of several pools advance together, by the engine that can run all of them.
            for name in ("general", "general groups", "speculative", "speculative groups"):
                if name in self._engines:
                    self._engines = [name] * len(pools)
        # Replicas that run one after the other share their scratch memory.
        ends = np.cumsum([pool.replicas for pool in pools]).tolist()
        together = [any(share.routed and share.first < end <= share.last for share in shares) for end in ends]
        self._lanes = [
            pool.schedulers * (pool.replicas if holding or side else 1)
            for pool, side in zip(pools, together, strict=True)
        ]
        self._requests = _requests(pools[0].settings.max_model_len, trace)
        if "trtllm" in self._engines:
            self._requests[kn.STATED] = trace.stated(pools[0].settings.max_model_len)
        self._replicas = np.zeros((lasts[-1], kn.REPLICA_SIZE), np.int64)
        for pool, place in zip(pools, self._places, strict=True):
            _set_up(self._replicas[place], pool)
        sizes = room or (0,) * 6
        control = np.zeros(kn.CONTROL_SIZE, np.int64)
        control[[kn.SIZE, kn.STOPS, kn.LOGGED]] = len(trace), len(stops), room is not None
        control[kn.PAUSE_NS] = trace.pause_ns
        control[kn.ORIGIN] = 0 if trace.concurrency is not None else trace.arrival_ns[0]
        control[[kn.MOST_STEPS, kn.MOST_ROWS, kn.MOST_LOST]] = sizes[:3]
        limits, least = _stops(stops, floors, self._requests)
        laws = self._laws()
        self.run = kn.Run(
            control=control,
            requests=self._requests.reshape(-1),
            replicas=self._replicas.reshape(-1),
            stages=self._stages.reshape(-1),
            laws=laws,
            counts=self._count(),
            scratch=self._scratch(),
            stops=limits,
            floors=least,
            steps=np.zeros(sizes[0] * kn.STEP_SIZE, np.int64),
            rows=np.zeros(sizes[1] * kn.ROW_SIZE, np.int64),
            lost=np.zeros(sizes[2], np.int64),
        )
        self._cache: kn.Cache | Tree | None = None
        every = range(len(pools))
        beside = [every] if len(shares) < len(pools) else [range(index, index + 1) for index in every]
        self._groups = [
            its
            for some in beside
            for its in [self._grouped(some, sizes[0]) if pools[some[0]].settings.kv_groups else None] * len(some)
        ]
        if not all(self._groups) and pools[0].settings.prefix_caching:
            self._cache = self._blocks(holding or [0] * len(pools))
        self._ranks = None
        if any(pool.ranks is not None for pool in pools):
            most = (*sizes[3:5], sizes[5] if published else kn.NONE)
            self._ranks = GroupMemory(pools, self._replicas, self._places, len(trace), messages, most)

    def _laws(self) -> I64:
        """The tables of all laws, each once; and which are whose."""
        tables: list[I64] = []
        at: dict[int, int] = {}
        end = 0
        stages: list[int] = []
        for pool, place in zip(self._pools, self._places, strict=True):
            laws = [*pool.laws, *(halves.law for halves in pool.halves)]
            for law in laws:
                if id(law) not in at:
                    at[id(law)] = end
                    its = [getattr(law, name) for name in TABLES]
                    its.insert(_OF_ALL, np.array([law.copies]))
                    its.append(np.array([window.stamp for window in law.windows], np.int64))
                    its += [getattr(law, name).reshape(-1) for name in OF_WINDOWS]
                    tables += its
                    end += sum(map(len, its))
            first = pool.laws[0]
            before = 1 + sum(len(getattr(first, name)) for name in TABLES)
            self._replicas[place, kn.WINDOWS : kn.WINDOWS_OF_LAW + 1] = len(first.windows), before
            self._replicas[place, kn.FIRST_STAGE] = len(stages) + len(laws) * np.arange(place.stop - place.start)
            stages += [at[id(law)] for law in laws] * (place.stop - place.start)
        self._stages = np.zeros((len(stages), kn.STAGE_SIZE), np.int64)
        self._stages[:, kn.STAGE_LAW] = stages
        return np.concatenate(tables, dtype=np.int64, casting="unsafe")

    def _count(self) -> I64:
        """Counts of nothing yet, of one pool after the other."""
        empty = [BatchCounts.empty(pool.settings, len(pool.laws[0].windows)) for pool in self._pools]
        names = [field.name for field in fields(BatchCounts)]
        flat = np.zeros(sum(getattr(counts, name).size for counts in empty for name in names), np.int64)
        self._counts: list[BatchCounts] = []
        end = 0
        for place, counts in zip(self._places, empty, strict=True):
            self._replicas[place, kn.COUNTS_AT] = first = end
            its = {}
            for name in names:
                if name == "seen_context":
                    self._replicas[place, kn.WINDOWS_OF_COUNTS] = end - first
                shape = getattr(counts, name).shape
                size = int(np.prod(shape))
                its[name] = flat[end : end + size].reshape(shape)
                end += size
            self._counts.append(BatchCounts(**its))
        return flat

    def _scratch(self) -> I64:
        """Memory of the engines: the parts of each lane of each pool."""
        ring = 1 << int(self._requests[kn.LIMIT].max()).bit_length()
        end = 0
        lists: list[tuple[int, I64]] = []
        for pool, place, lanes, engine in zip(self._pools, self._places, self._lanes, self._engines, strict=True):
            seats, rows = pool.settings.max_num_seqs, self._replicas[place]
            end = self._list_drafts(pool, rows, lists, end)
            if engine.startswith("speculative"):
                parts = {kn.RUNNING_AT: seats, kn.QUEUE_AT: 2 * (seats + 3)}
            elif engine == "trtllm":
                depth, active = int(rows[0, kn.DEPTH]), seats * len(pool.laws)
                parts = {kn.ENTERING_AT: seats, kn.RUNNING_AT: active, kn.QUEUE_AT: depth * (seats + 3)}
                parts |= {kn.CHOSEN_AT: active, kn.PROMPTS_AT: kn.ASKING_SIZE * active}
            elif engine.startswith("general"):
                depth = int(rows[0, kn.DEPTH])
                parts = {kn.ENTERING_AT: seats, kn.RUNNING_AT: seats, kn.QUEUE_AT: depth * (seats + 2)}
                # Over groups of layers blocks are also given back.
                phases = (1 + bool(pool.settings.kv_groups)) * pool.settings.block_size
                width = kn.MICRO_DUE + phases + kn.PACE_SIZE * len(pool.laws)
                parts[kn.MICRO_AT] = depth * width
                rows[:, kn.MICRO_WIDTH] = width
            else:
                due = pool.settings.block_size
                if pool.settings.kv_groups:
                    due = sum(kv.DUE + 2 * size + ring for size in _spans(pool.settings))
                parts = {kn.RING_AT: ring, kn.RESIDUE_AT: due, kn.ENTERING_AT: 2 * seats}
                rows[:, kn.RING_SIZE] = ring
            for column, size in parts.items():
                rows[:, column] = end + size * (np.arange(place.stop - place.start) % lanes)
                end += size * lanes
        scratch = np.zeros(end, np.int64)
        for rows in self._replicas[self._replicas[:, kn.RING_SIZE] > 0]:
            scratch[rows[kn.RING_AT] : rows[kn.RING_AT] + ring] = kn.NONE
        for start, counts in lists:
            scratch[start : start + len(counts)] = counts
        return scratch

    def _blocks(self, holding: Sequence[int]) -> kn.Cache | Tree:
        """Memory of prefix caching; in a replica of each pool so many can hold blocks beside those that run."""
        settings, n = self._pools[0].settings, len(self._trace)
        content = _content(self._trace, settings.block_size, settings.max_model_len)
        longest = int((self._requests[kn.PROMPT] + self._requests[kn.LIMIT]).max()) // settings.block_size + 1
        ends = dict.fromkeys((kn.MEMO_AT, kn.SLOTS_AT, kn.TABLE_AT, kn.BLOCK_AT, kn.HOLDER_AT), 0)
        for pool, place, lanes, more in zip(self._pools, self._places, self._lanes, holding, strict=True):
            if max(content.total, pool.blocks) >= 1 << 31:
                raise UsageError(
                    f"prefix caching: {max(content.total, pool.blocks):,} blocks of content are too many; "
                    "use a shorter trace"
                )
            slots, rows = pool.settings.seats(len(pool.laws)) + more, self._replicas[place]
            # Blocks are taken for drafts, too: of up to three rows beyond the last token.
            beyond = 3 * pool.settings.speculation.draft_tokens if pool.settings.speculation else 0
            width = min(longest + ceil_div(beyond, settings.block_size), pool.blocks)
            reused = isinstance(pool.settings.scheduler, TrtllmScheduling)
            # Content 0 is none.
            contents, row = content.total + 1, kn.REUSED_WIDTH if reused else kn.BLOCK_WIDTH + kn.LINE_WIDTH
            rows[:, [kn.SLOTS, kn.TABLE_WIDTH, kn.POOL_BLOCKS, kn.CONTENTS]] = slots, width, pool.blocks, contents
            for column, size in {
                kn.MEMO_AT: kn.MEMO_WIDTH,
                kn.SLOTS_AT: slots,
                kn.TABLE_AT: slots * width,
                kn.BLOCK_AT: (pool.blocks + 1) * row,
                kn.HOLDER_AT: contents * (1 + reused),
            }.items():
                rows[:, column] = ends[column] + size * (np.arange(place.stop - place.start) % lanes)
                ends[column] += size * lanes
        return kn.Cache(
            piece_blocks=content.piece_blocks,
            pieces=content.pieces,
            starts=np.array(content.starts),
            own=np.ascontiguousarray(content.own),
            shared=content.shared_blocks,
            registered=np.zeros(n, np.int64),
            slot=np.zeros(n, np.int64),
            slots=np.zeros(ends[kn.SLOTS_AT], np.int64),
            memo=np.zeros(ends[kn.MEMO_AT], np.int64),
            table=np.zeros(ends[kn.TABLE_AT], np.int32),
            block=np.zeros(ends[kn.BLOCK_AT], np.int32),
            holder=np.zeros(ends[kn.HOLDER_AT], np.int32),
        )

    def _grouped(self, some: range, steps: int) -> Groups:
        """Memory of the groups of layers of some pools, which have the same."""
        settings, n = self._pools[some[0]].settings, len(self._trace)
        counting = not settings.prefix_caching and settings.speculation is None and not self.run.control[kn.LOGGED]
        times = Counter(settings.kv_groups)
        groups = tuple(times) if counting else settings.kv_groups
        together = sets_of(groups)
        kinds = np.zeros((len(groups), kv.GROUP_SIZE), np.int64)
        most = settings.max_num_batched_tokens, settings.max_model_len
        keys, totals = (
            _group_keys(groups, self._trace, settings) if settings.prefix_caching else ([], [0] * len(groups))
        )
        for number, group in enumerate(groups):
            entries = group.seen_entries(*most) if group.kind == "window" else kn.NEVER
            kind = _KINDS[group.kind, group.mode]
            after = sum(totals[:number]), times[group] if counting else 1
            kinds[number] = kind, group.block_size, group.window, entries, kn.NONE, *after
        for its in together:
            kinds[list(its[:-1]), kv.TOGETHER] = its[1:]
        starts = np.concatenate(([0], np.cumsum([len(its) for its in keys])))[:-1]
        drafts = settings.speculation.draft_tokens if settings.speculation else 0
        longest = int((self._requests[kn.PROMPT] + self._requests[kn.LIMIT]).max()) + drafts
        width = kv.ENTRIES + longest // min(group.block_size for group in groups) + 3 + 2 * drafts
        ends = dict.fromkeys((kn.MEMO_AT, kn.SLOTS_AT, kn.TABLE_AT, kn.BLOCK_AT, kn.HOLDER_AT), 0)
        for index in () if counting else some:
            pool, place, lanes = self._pools[index], self._places[index], self._lanes[index]
            seats, rows = pool.settings.max_num_seqs, self._replicas[place]
            rows[:, [kn.TABLE_WIDTH, kn.POOL_BLOCKS, kn.CONTENTS]] = width, pool.blocks, sum(totals)
            for column, size in {
                kn.MEMO_AT: kv.REGISTERS + len(groups),
                kn.SLOTS_AT: seats,
                kn.TABLE_AT: (seats + 1) * len(groups) * width,
                kn.BLOCK_AT: (pool.blocks + 1) * kv.BLOCK_WIDTH,
                kn.HOLDER_AT: sum(totals) * kv.HOLDER_WIDTH,
            }.items():
                rows[:, column] = ends[column] + size * (np.arange(place.stop - place.start) % lanes)
                ends[column] += size * lanes
        spans = self._span_rows(settings) if counting else np.zeros(0, np.int64)
        return Groups(
            number=len(groups),
            sets=len(together),
            multiple=lcm(*(group.block_size for group in groups)),
            caching=int(settings.prefix_caching),
            splits=int(any(group.mode == "align" for group in groups)),
            requests=n,
            counting=int(counting),
            sizes=len(spans) // kv.SPAN_SIZE,
            rows=kinds.reshape(-1),
            spans=spans,
            order=np.array([its[0] for its in together], np.int64),
            keys_at=np.array(starts, np.int64),
            keys=np.concatenate([*keys, np.zeros(1)]).astype(np.int32),
            slot=np.zeros(n, np.int64),
            slots=np.zeros(ends[kn.SLOTS_AT], np.int64),
            registers=np.zeros(ends[kn.MEMO_AT], np.int64),
            used=np.zeros(steps * len(groups), np.int64),
            table=np.zeros(ends[kn.TABLE_AT], np.int32),
            block=np.zeros(ends[kn.BLOCK_AT], np.int32),
            holder=np.zeros(ends[kn.HOLDER_AT], np.int32),
        )

    def _span_rows(self, settings: EngineSettings) -> I64:
        """What is to know of the groups whose blocks have as many tokens."""
        sizes, ring = _spans(settings), int(self._replicas[:, kn.RING_SIZE].max())
        starts = np.cumsum([0, *(kv.DUE + 2 * size + ring for size in sizes)])[:-1]
        return np.array([(*its, at) for its, at in zip(sizes.items(), starts, strict=True)], np.int64).reshape(-1)

    def _list_drafts(self, pool: EnginePool, rows: I64, lists: list[tuple[int, I64]], end: int) -> int:
        """What comes of drafts, as lists in the scratch memory from a place on; where what comes after them begins.

        Parameters
        ----------
        pool : EnginePool
        rows : of the schedulers of the pool
        lists : that are added to, each with its place
        end : int
        """
        if (speculation := pool.settings.speculation) is None:
            return end
        accepted, proposed = _counts(speculation, len(self._trace), int(self._requests[kn.LIMIT].max()))
        rows[:, [kn.LISTS, kn.LIST_SIZE]] = accepted.shape
        for column, counts in {kn.ACCEPTED_AT: accepted, kn.PROPOSED_AT: proposed}.items():
            rows[:, column] = end
            lists.append((end, counts.reshape(-1)))
            end += counts.size
        return end

    def serve(self) -> None:
        """Run the kernel."""
        end = 0
        for share in self._shares:
            if not share.routed:
                self._deal(share)
            end = 0
            for index, pool in enumerate(self._pools):
                first, last = max(share.first, end), min(share.last, end + pool.replicas)
                end += pool.replicas
                if first >= last or (share.routed and first > share.first):
                    continue
                if share.routed and share.routing in RULES:
                    self._route(index, share)
                elif share.routed:
                    self._serve(index, first, share.last, share.rows)
                else:
                    self._serve(index, first, last, np.zeros(0, np.int64))

    def _deal(self, share: Share) -> None:
        """Chain the requests of each replica; with clients all but their first wait for answers."""
        active, rows = share.last - share.first, share.rows
        dealt = [share.dealt(place) for place in range(active)]
        for mine in dealt:
            self._requests[kn.FOLLOWING, mine[:-1]] = mine[1:]
        firsts = self._first[share.first : share.last]
        if share.clients is not None:
            self._requests[kn.ARRIVAL, rows] = np.where(np.arange(len(rows)) < share.clients, 0, kn.NEVER)
        places = {} if self._ranks is None else {first: place for place, (_, _, first) in enumerate(self._ranks.of)}
        for offset, first in enumerate(firsts.tolist()):
            if self._ranks is not None and first in places:
                self._ranks.deal(share, places[first], offset)
                continue
            self._replicas[first, kn.HEAD] = dealt[offset][0] if len(dealt[offset]) else kn.NONE
            if share.clients is not None:
                later = offset + -(-(share.clients - offset) // active) * active
                self._replicas[first, kn.BACKLOG] = rows[later] if later < len(rows) else kn.NONE

    def _route(self, index: int, share: Share) -> None:
        """Let the replicas of a share, the first of a pool, serve what a router sends them."""
        if self.stopped or self.crowded:
            return
        self._requests[[[kn.FIRST], [kn.FINISH]], share.rows] = kn.NEVER  # until they are known
        router = router_memory(share, self._pools[0].settings, self._trace, number_pieces)
        kind = self._engines[index], self._pools[0].settings.prefix_caching
        start = int(self._first[share.first])
        end = start + share.last - share.first
        entries.ROUTE[kind](self.run, self._beside(index), router, start, end, share.rows, len(share.rows))
        assert self.crowded or not self._replicas[:, kn.ERROR].any(), "a turn with work scheduled nothing"

    def _serve(self, index: int, first: int, last: int, routed: I64) -> None:
        """Let replicas of a pool, or from a pool on, serve their requests or those that are routed."""
        if self.stopped or self.crowded:
            return
        kind = self._engines[index], self._pools[0].settings.prefix_caching
        beside, start, count = self._beside(index), int(self._first[first]), last - first
        if self._ranks is not None and self._pools[index].ranks is not None:
            place = [its for _, _, its in self._ranks.of].index(start)
            group, halves = self._ranks.group, self._ranks.halves if self._pools[index].halves else None
            engines = entries.RANKS if halves is None else entries.HALVES
            engines[kind](self.run, beside, group, halves, place, place + count, routed, len(routed))
        else:
            entries.SERVE[kind](self.run, beside, start, start + count, routed, len(routed))
        assert self.crowded or not self._replicas[:, kn.ERROR].any(), "a turn with work scheduled nothing"

    def _beside(self, index: int) -> Any:
        """What the engine of a pool keeps beside the run."""
        return self._groups[index] or self._cache

    @property
    def used(self) -> tuple[int, ...]:
        """Rows of all logs."""
        groups = (0, 0, 0) if self._ranks is None else self._ranks.used
        return (*self.run.control[[kn.STEPS, kn.ROWS, kn.LOST]].tolist(), *groups)

    @property
    def crowded(self) -> bool:
        """Whether there was too little room for messages among ranks."""
        return self._ranks is not None and self._ranks.crowded

    @property
    def stopped(self) -> bool:
        """Whether a limit was passed."""
        return bool(self.run.control[kn.PASSED])

    def outcome(self, *, log: bool, gaps: bool) -> Outcome:
        """What came of the run, with what was asked for of a complete log."""
        requests, replicas = self._requests, self._replicas
        if not self.stopped and int(replicas[:, kn.ENDED].sum()) < len(self._trace):
            raise clock_overflow()
        drafts = self._pools[0].settings.speculation is not None
        grouped = self._pools[0].settings.kv_groups and all(len(pool.laws) == 1 for pool in self._pools)
        steps, taken_ns = _taken(self.run.steps.reshape(-1, kn.STEP_SIZE))
        rows = self.run.rows.reshape(-1, kn.ROW_SIZE)
        if self._ranks is not None:
            steps[:, kn.STEP_END] = self._ranks.ends(steps)
        replica = np.searchsorted(self._first, steps[:, kn.STEP_REPLICA], "right") - 1
        pools = tuple(map(self._pool, range(len(self._pools))))
        most = max(pool.busy_ns.shape[1] for pool in pools)
        return Outcome(
            arrival_ns=requests[kn.ARRIVAL],
            first_token_ns=requests[kn.FIRST],
            finish_ns=requests[kn.FINISH],
            preemptions=int(replicas[:, kn.PREEMPTIONS].sum()),
            cached_tokens=int(replicas[:, kn.CACHED].sum()),
            batches=int(replicas[:, kn.BATCHES].sum()),
            busy_ns=np.concatenate([np.pad(p.busy_ns, ((0, 0), (0, most - p.busy_ns.shape[1]))) for p in pools]),
            counts=pools[0].counts if len(pools) == 1 else BatchCounts.empty(self._pools[0].settings),
            gaps_ns=self._gaps(steps, taken_ns, rows) if (log or gaps) and not self.stopped else None,
            steps=_steps(steps, rows, self.run.lost) if log else None,
            drafted=_drafted(steps, rows) if log and self._ranks is None and (drafts or grouped) else None,
            used=self._used(steps) if log and self._pools[0].settings.kv_groups else None,
            steps_per_replica=np.bincount(replica, minlength=len(self._first)).tolist() if log else None,
            groups=self._ranks.logged() if log and self._ranks is not None else (),
            stopped=self.stopped,
            pools=pools,
        )

    def _gaps(self, steps: I64, taken_ns: I64, rows: I64) -> I64:
        """Times between tokens: one comes when the batch that yields it is taken in, several of a row at once."""
        return gaps_ns(*tokens_of(steps, taken_ns, rows), self._requests[kn.LIMIT])

    def _used(self, steps: I64) -> list[tuple[int, ...]]:
        """Blocks in use of each group after each batch, replica by replica."""
        order = np.argsort(steps[:, kn.STEP_REPLICA], kind="stable")
        pool = np.searchsorted([place.stop for place in self._places], steps[order, kn.STEP_REPLICA], "right")
        batches = self.run.steps.reshape(-1, kn.STEP_SIZE)[:, kn.STEP_ROWS] > 0
        used = [None if its is None else its.used.reshape(len(batches), -1)[batches] for its in self._groups]
        return [
            tuple(() if used[its] is None else used[its][step].tolist()) for its, step in zip(pool, order, strict=True)
        ]

    def _pool(self, index: int) -> PoolOutcome:
        """What came of one pool."""
        pool, replicas = self._pools[index], self._replicas[self._places[index]]
        stages = replicas[:, kn.FIRST_STAGE, None] + np.arange(len(pool.laws))
        busy_ns = self._stages[stages, kn.STAGE_BUSY].reshape(pool.replicas, pool.schedulers, len(pool.laws))
        return PoolOutcome(
            preemptions=int(replicas[:, kn.PREEMPTIONS].sum()),
            batches=int(replicas[:, kn.BATCHES].sum()),
            cached_tokens=int(replicas[:, kn.CACHED].sum()),
            counts=self._counts[index],
            busy_ns=busy_ns.max(axis=1),
            shared=None if self._ranks is None else self._ranks.shared(index),
        )


def _requests(max_model_len: int, trace: Trace) -> I64:
    """The columns of the requests."""
    columns = max(kn.STEADY_REQUEST_SIZE, kn.SPECULATIVE_REQUEST_SIZE, SGLANG_REQUEST_SIZE, kn.TRTLLM_REQUEST_SIZE)
    requests = np.zeros((columns, len(trace)), np.int64)
    requests[kn.ARRIVAL], requests[kn.PROMPT], requests[kn.OUTPUT] = trace.arrival_ns, trace.prompt, trace.output
    requests[kn.LIMIT], requests[kn.FOLLOWING] = trace.generated(max_model_len), kn.NONE
    return requests


def _set_up(replicas: I64, pool: EnginePool) -> None:
    """Settings of replicas, and their registers before anything came."""
    settings, stages = pool.settings, len(pool.laws)
    for column, value in {
        kn.MAX_SEQS: settings.max_num_seqs,
        kn.MAX_TOKENS: settings.max_num_batched_tokens,
        kn.MAX_LENGTH: settings.max_model_len,
        kn.CHUNKED: settings.chunked_prefill,
        kn.THRESHOLD: settings.scheduler.prompt_threshold,
        kn.BLOCK_SIZE: settings.block_size,
        kn.ASYNCHRONOUS: settings.async_scheduling,
        kn.POLICY: _RULES[settings.scheduler.name],
        kn.DEPTH: settings.depth(stages),
        kn.STAGES: stages,
        kn.SLEEP_NS: settings.scheduler.idle_sleep_ns,
        kn.FREE: pool.blocks,
    }.items():
        replicas[:, column] = value
    if (speculation := settings.speculation) is not None:
        drafting = speculation.draft_tokens, speculation.ahead, speculation.rules.recomputes
        replicas[:, [kn.DRAFTS, kn.LOOKAHEAD, kn.RECOMPUTES]] = drafting
    if settings.speculation is not None and isinstance(own := settings.scheduler, SglangScheduling):
        replicas[:, kn.LOOKAHEAD] = own.ahead(settings.speculation.draft_tokens)
    if isinstance(own := settings.scheduler, TrtllmScheduling):
        replicas[:, kn.LOOKAHEAD] = np.maximum(replicas[:, kn.LOOKAHEAD] - 1, 0)
        replicas[:, kn.CAPACITY] = CAPACITY_POLICIES.index(own.capacity_policy)
        replicas[:, kn.FETCH_WAIT_NS] = own.fetch_wait_ns
        replicas[:, kn.CHUNKING] = CHUNKING_POLICIES.index(own.context_chunking_policy)
        replicas[:, kn.SNAPSHOTS] = own.snapshot_interval if settings.prefix_caching else 0
        replicas[:, kn.WAIT_ITERS] = own.batch_wait_timeout_iters
        replicas[:, kn.WAIT_TOKENS] = own.wait_tokens(settings.max_num_batched_tokens)
    replicas[:, [kn.FIRST_RUN, kn.LAST_RUN, kn.PARTIAL, kn.STACK, kn.HEAD, kn.TAIL, kn.BACKLOG]] = kn.NONE


def _stops(stops: Sequence[Stop], floors: Outcome | None, requests: I64) -> tuple[I64, I64]:
    """Limits as rows, and floors as columns; what is left for sums once every request has its floor."""
    least = np.zeros((len(METRICS), requests.shape[1] if stops else 0), np.int64)
    if stops and floors is not None:
        times = floors.arrival_ns, floors.first_token_ns, floors.finish_ns
        least[:] = [latencies_ns(metric, *times, requests[kn.LIMIT]) for metric in METRICS]
    rows = np.zeros((len(stops), kn.STOP_SIZE), np.int64)
    for row, stop in zip(rows, stops, strict=True):
        metric = METRICS.index(stop.metric)
        adds = stop.kind == "sum"
        row[[kn.STOP_METRIC, kn.STOP_ADDS, kn.STOP_MOST]] = metric, adds, stop.most
        row[kn.STOP_LIMIT] = stop.limit_ns - (int(least[metric].sum()) if adds else 0)
        row[kn.STOP_USED] = 0 if adds else (least[metric] > stop.limit_ns).sum()
    return rows.reshape(-1), least.reshape(-1)


@lru_cache(maxsize=4)
def _content(trace: Trace, block_size: int, max_model_len: int) -> BlockContent:
    """What the blocks of a trace hold, the same for every plan; the kernel only reads it."""
    return BlockContent.of(trace, block_size, trace.generated(max_model_len), number_pieces)


def _spans(settings: EngineSettings) -> Counter[int]:
    """Tokens of the blocks that sequences take more of the longer they are, and how many groups have such."""
    return Counter(group.block_size for group in settings.kv_groups if group.kind != "state")


def _group_keys(groups: Sequence[KvGroup], trace: Trace, settings: EngineSettings) -> tuple[list[list[int]], list[int]]:
    """What the blocks of each request hold, group by group, and how many contents each group has."""
    contents = [_content(trace, group.block_size, settings.max_model_len) for group in groups]
    return [content.keys(i) for content in contents for i in range(len(trace))], [its.total for its in contents]


def number_pieces(starts: I64, content: I64) -> tuple[I64, int]:
    """`content.number_pieces`, compiled."""
    pieces, previous = np.zeros(len(content), np.int64), np.zeros(len(content), np.int64)
    slots, found = np.full(2 << len(content).bit_length(), kn.NONE, np.int64), np.zeros(1, np.int64)
    entries.NUMBER_PIECES(
        np.array(starts), len(starts) - 1, np.array(content), pieces, previous, slots, len(slots), found
    )
    return pieces, int(found[0])


def _taken(logged: I64) -> tuple[I64, I64]:
    """The batches of a log, and when each was taken in: at its end, unless a row without sequences tells otherwise.

    A replica takes its batches in in the order in which it formed them.
    """
    batches = logged[:, kn.STEP_ROWS] > 0
    steps, taken = logged[batches], logged[~batches]
    taken_ns = steps[:, kn.STEP_END].copy()
    formed, told = (np.argsort(rows[:, kn.STEP_REPLICA], kind="stable") for rows in (steps, taken))
    formed = formed[np.isin(steps[formed, kn.STEP_REPLICA], taken[:, kn.STEP_REPLICA])]
    taken_ns[formed] = taken[told, kn.STEP_END]
    return steps, taken_ns


def tokens_of(steps: I64, taken_ns: I64, rows: I64) -> tuple[I64, I64]:
    """Whose tokens batches yield, and when these are taken in.

    Parameters
    ----------
    steps, rows : of a log
    taken_ns : int64[steps]    when each batch is taken in
    """
    end_ns, got = np.repeat(taken_ns, steps[:, kn.STEP_ROWS]), rows[:, kn.ROW_REQUEST] & 15
    return np.repeat(rows[:, kn.ROW_REQUEST] >> 8, got), np.repeat(end_ns, got)


def _steps(steps: I64, rows: I64, lost: I64) -> list[Step]:
    """The log as lists, replica by replica."""
    shares, preempted = rows.tolist(), lost.tolist()
    found: list[tuple[int, Step]] = []
    row = gone = 0
    for replica, start, end, size, victims, _ in steps.tolist():
        chunk = [(i >> 8, tokens, computed) for i, tokens, computed in shares[row : row + size]]
        found.append((replica, (start, end, chunk, sorted(preempted[gone : gone + victims]))))
        row += size
        gone += victims
    return [step for _, step in sorted(found, key=lambda s: s[0])]


def _drafted(steps: I64, rows: I64) -> list[Drafted]:
    """What came of the drafts in a log, replica by replica."""
    drafts, got = (rows[:, kn.ROW_REQUEST] >> 4 & 15).tolist(), (rows[:, kn.ROW_REQUEST] & 15).tolist()
    found: list[tuple[int, Drafted]] = []
    row = 0
    for step in steps.tolist():
        last = row + step[kn.STEP_ROWS]
        found.append(
            (step[kn.STEP_REPLICA], (step[kn.STEP_FREE], list(zip(drafts[row:last], got[row:last], strict=True))))
        )
        row = last
    return [drafted for _, drafted in sorted(found, key=lambda s: s[0])]


def _counts(speculation: Speculation, requests: int, longest: int) -> tuple[I64, I64]:
    """Drafts that are accepted and proposed by tokens generated, in one list or in one for each request."""
    most = speculation.draft_tokens
    both = speculation.accepted, speculation.proposed or ((most,),)
    lists = 1 if all(len(counts) == 1 for counts in both) else requests
    accepted, proposed = (
        np.array([np.resize(counts[i % len(counts)], longest + 1) for i in range(lists)], np.int64) for counts in both
    )
    return accepted, np.minimum(proposed, most)
