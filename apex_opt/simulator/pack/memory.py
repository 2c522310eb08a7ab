"""The memory of a run: filled with requests, replicas and laws, handed to the kernel, and read."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.engines.schedulers import CAPACITY_POLICIES, CHUNKING_POLICIES, SglangScheduling, TrtllmScheduling
from apex_opt.figures.stops import METRICS, latencies_ns
from apex_opt.simulator.gaps import gaps_ns
from apex_opt.simulator.kernel import entries
from apex_opt.simulator.kernel import kv_state as kv
from apex_opt.simulator.kernel import state as kn
from apex_opt.simulator.kernel.sglang_state import SGLANG_REQUEST_SIZE, Tree
from apex_opt.simulator.law import OF_WINDOWS, RATE_BITS, TABLES, clock_overflow
from apex_opt.simulator.outcome import BatchCounts, Outcome, PoolOutcome
from apex_opt.simulator.pack.blocks import Layout, cache_of, groups_of, number_pieces, spans_of
from apex_opt.simulator.pack.engines import RULES, engine_of
from apex_opt.simulator.pack.log import drafted_of, steps_of, taken_of, tokens_of
from apex_opt.simulator.pack.ranks import MESSAGES, GroupMemory
from apex_opt.simulator.pack.router import ROUTERS, router_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.stops import Stop
    from apex_opt.plans.speculation import Speculation
    from apex_opt.simulator.pools import EnginePool, Share
    from apex_opt.workload.trace import Trace

    I64 = NDArray[np.int64]

Room = tuple[int, ...]
"""Batches, rows and preempted requests that a log has room for."""

assert kn.RATE_BITS == RATE_BITS
assert [CAPACITY_POLICIES[number][:3] for number in (kn.NO_EVICT, kn.UTILISE, kn.ONE_BATCH)] == ["GUA", "MAX", "STA"]
assert [name[:5] for name in CHUNKING_POLICIES] == ["FIRST", "EQUAL", "FORCE"]
assert (kn.FIRST_COME, kn.EQUALLY, kn.FORCED) == (0, 1, 2)
_OF_ALL: Final = 9  # tables of a law that come before the copies of attention; those of drafts come after


class Memory:
    """The arrays of one run, and what is read from them.

    Parameters
    ----------
    pools, trace, shares, stops, floors : as of `pack.run.run`
    room : Room or None           of a log
    holding : sequence of int     requests that can hold blocks beside those that run, in a replica of each pool
    published : bool              whether a log tells what ranks say of their load
    spare : int                   so many times the room that is usually enough for what cannot be counted beforehand
    """

    def __init__(
        self,
        pools: Sequence[EnginePool],
        trace: Trace,
        shares: Sequence[Share],
        stops: Sequence[Stop],
        floors: Outcome | None,
        room: Room | None,
        holding: Sequence[int] = (),
        *,
        published: bool = True,
        spare: int = 1,
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
            else engine_of(pool.settings, len(pool.laws), logged=room is not None, walked=pool.walked)
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
        self._layout = Layout(trace, self._requests, self._replicas, pools, self._places, self._lanes)
        self._cache: kn.Cache | Tree | None = None
        every = range(len(pools))
        beside = [every] if len(shares) < len(pools) else [range(index, index + 1) for index in every]
        self._groups = [
            its
            for some in beside
            for its in [
                groups_of(self._layout, some, sizes[0], logged=room is not None)
                if pools[some[0]].settings.kv_groups
                else None
            ]
            * len(some)
        ]
        if not all(self._groups) and pools[0].settings.prefix_caching:
            self._cache = self._blocks(holding or [0] * len(pools))
        self._ranks = None
        if any(pool.ranks is not None for pool in pools):
            most = (*sizes[3:5], sizes[5] if published else kn.NONE)
            self._ranks = GroupMemory(pools, self._replicas, self._places, len(trace), spare * MESSAGES, most)

    def _laws(self) -> I64:
        """The tables of all laws, each once; and which are whose."""
        tables: list[I64] = []
        at: dict[int, int] = {}
        end = 0
        stages: list[int] = []
        for pool, place in zip(self._pools, self._places, strict=True):
            laws = [*pool.laws, *(halves.law for halves in pool.halves), *pool.resources]
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
            self._replicas[place, kn.RESOURCES] = len(pool.resources)
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
                    due = sum(kv.DUE + 2 * size + ring for size in spans_of(pool.settings))
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
        return cache_of(self._layout, holding)

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
                if share.routed and share.routing in ROUTERS:
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
        router = router_memory(
            share, self._pools[0].settings, self._trace, number_pieces, blocks=self._pools[index].blocks
        )
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
        steps, taken_ns = taken_of(self.run.steps.reshape(-1, kn.STEP_SIZE))
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
            steps=steps_of(steps, rows, self.run.lost) if log else None,
            drafted=drafted_of(steps, rows) if log and self._ranks is None and (drafts or grouped) else None,
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
        kn.POLICY: RULES[settings.scheduler.name],
        kn.DEPTH: settings.depth(stages),
        kn.STAGES: stages,
        kn.SLEEP_NS: settings.scheduler.idle_sleep_ns,
        kn.LAUNCH_NS: pool.laws[0].launch_ns if settings.scheduler.launches else 0,
        kn.LAUNCHED_FREE: pool.laws[0].captured_tokens,
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


def _counts(speculation: Speculation, requests: int, longest: int) -> tuple[I64, I64]:
    """Drafts that are accepted and proposed by tokens generated, in one list or in one for each request."""
    most = speculation.draft_tokens
    both = speculation.accepted, speculation.proposed or ((most,),)
    lists = 1 if all(len(counts) == 1 for counts in both) else requests
    accepted, proposed = (
        np.array([np.resize(counts[i % len(counts)], longest + 1) for i in range(lists)], np.int64) for counts in both
    )
    return accepted, np.minimum(proposed, most)
