"""Memory of data-parallel ranks for the kernel, and what is read from it: see `pack.memory`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.engines.schedulers import TrtllmScheduling
from apex_opt.simulator.kernel import group_state as gs
from apex_opt.simulator.kernel import state as kn
from apex_opt.simulator.outcome import GroupLog, SharedCounts
from apex_opt.simulator.ranks import VOTE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.simulator.pools import EnginePool, Share
    from apex_opt.simulator.ranks import Ranks

    I64 = NDArray[np.int64]

assert gs.VOTE == VOTE
MESSAGES = 64
"""Places for messages on their way, to begin with; a power of two."""


class GroupMemory:
    """The arrays of all replicas with ranks of a run.

    Parameters
    ----------
    pools : of the run
    replicas : int64[schedulers, kn.REPLICA_SIZE]    rows of the schedulers, set up
    places : rows of each pool
    requests : int
    messages : int                                   places for messages of a kind; a power of two
    capacity : rows of the logs of forwards, waves and loads; NONE: loads are not logged
    """

    def __init__(
        self,
        pools: Sequence[EnginePool],
        replicas: I64,
        places: Sequence[slice],
        requests: int,
        messages: int,
        capacity: tuple[int, ...],
    ) -> None:
        self._replicas = replicas
        # Of each group: the pool, the ranks, and the first of their rows.
        self.of: list[tuple[int, Ranks, int]] = [
            (index, pool.ranks, first)
            for index, (pool, place) in enumerate(zip(pools, places, strict=True))
            if pool.ranks is not None
            for first in range(place.start, place.stop, pool.ranks.count)
        ]
        most = max(ranks.count for _, ranks, _ in self.of)
        self._groups = np.zeros((len(self.of), gs.GROUP_SIZE), np.int64)
        self._members = np.zeros((len(replicas), gs.MEMBER_SIZE), np.int64)
        self._links = np.zeros((gs.LINKS_SIZE, requests), np.int64)
        self._links[gs.AFTER] = kn.NONE
        tables, together = self._tables(pools)
        self.halves = self._halves(pools)
        fronts, memory = self._parts(pools, messages)
        told = np.zeros(gs.TOLD_SIZE, np.int64)
        told[[gs.MOST_FORWARDS, gs.MOST_EVENTS, gs.MOST_LOADS]] = capacity
        told[gs.LOADS_WIDTH] = gs.LOAD_SIZE + 2 * most
        self.group = gs.Group(
            told=told,
            groups=self._groups.reshape(-1),
            members=self._members.reshape(-1),
            fronts=fronts,
            memory=memory,
            tables=tables,
            together=together,
            links=self._links.reshape(-1),
            forwards=np.zeros(capacity[0] * gs.FORWARD_SIZE, np.int64),
            events=np.zeros(capacity[1] * gs.EVENT_SIZE, np.int64),
            loads=np.zeros(max(capacity[2], 0) * int(told[gs.LOADS_WIDTH]), np.int64),
        )
        self._set_up(pools)

    def _tables(self, pools: Sequence[EnginePool]) -> tuple[I64, I64]:
        """Padding and shared laws of each pool, and counts of nothing yet."""
        tables: list[I64] = []
        self._together: dict[int, list[I64]] = {}
        end = counts_end = 0
        sizes: dict[int, tuple[int, int, int, int, int]] = {}
        for index, pool in enumerate(pools):
            if (ranks := pool.ranks) is None:
                continue
            wide, every = len(ranks.shared[0].padded_ns), len(ranks.shared[0].decode_ns)
            drafts = len(ranks.shared[0].draft_ns)
            sizes[index] = end, wide, every, counts_end, drafts
            padding = ranks.padding
            parts = [padding.decode_mode, padding.decode_rows, padding.mixed_mode, padding.mixed_rows]
            for law in ranks.shared:
                parts += [law.padded_ns, law.decode_ns, law.mixed_ns, law.eager_ns, law.graph_ns, law.draft_ns]
            tables += parts
            end += sum(map(len, parts))
            counts_end += 3 * every + drafts
        together = np.zeros(counts_end, np.int64)
        for index, (_, _, every, start, drafts) in sizes.items():
            mine = together[start : start + 3 * every + drafts]
            self._together[index] = np.split(mine, [every, 2 * every, 3 * every])
        for g, (index, _, _) in zip(self._groups, self.of, strict=True):
            g[[gs.TABLES_AT, gs.WIDE, gs.ALL, gs.TOGETHER_AT, gs.OF_DRAFTS]] = sizes[index]
        return np.concatenate(tables, dtype=np.int64, casting="unsafe"), together

    def _halves(self, pools: Sequence[EnginePool]) -> gs.Halves | None:
        """What forwards in two halves take, and counts of none yet; None where none are split."""
        tables: list[I64] = []
        end = counted = 0
        self._split: dict[int, slice] = {}
        for index, pool in enumerate(pools):
            wanted = None if pool.ranks is None else pool.ranks.splitting
            if wanted is None:
                continue
            mine = [g for g, (its, _, _) in zip(self._groups, self.of, strict=True) if its == index]
            for g in mine:
                g[[gs.HALVES_AT, gs.HALVES_COUNTED_AT]] = end, counted
                g[[gs.LEAST_DECODE, gs.LEAST_PROMPT]] = wanted.decode_tokens, wanted.prompt_tokens
            for its in pool.halves:
                parts = [np.array([its.layers]), its.decode_ns, its.mixed_ns, its.network_ns]
                parts += [its.decode_host_ns, its.mixed_host_ns, its.alone_ns]
                tables += parts
                end += sum(map(len, parts))
            self._split[index] = slice(counted, counted + 2 * len(pool.halves[0].network_ns))
            counted = self._split[index].stop
        if not tables:
            return None
        flat = np.concatenate(tables, dtype=np.int64, casting="unsafe")
        return gs.Halves(tables=flat, counts=np.zeros(counted, np.int64))

    def _parts(self, pools: Sequence[EnginePool], messages: int) -> tuple[I64, I64]:
        """Front ends, and the memory of each group."""
        fronts: list[I64] = []
        end = fronts_end = 0
        for g, (index, ranks, first) in zip(self._groups, self.of, strict=True):
            stages, depth = len(pools[index].laws), int(self._replicas[first, kn.DEPTH])
            slots = 1 << (2 * depth + 2).bit_length()
            lanes = 1 if ranks.in_step else ranks.count
            g[[gs.MASK, gs.SLOT_MASK, gs.FRONTS_AT]] = messages - 1, slots - 1, fronts_end
            for column, size in (
                (gs.FIRSTS_AT, messages * gs.FIRST_MESSAGE),
                (gs.HEARD_AT, messages * gs.HEARD_MESSAGE),
                (gs.NEWS_AT, messages * (gs.NEWS_MESSAGE + 2 * ranks.count)),
                (gs.STARTS_AT, messages * gs.START_MESSAGE),
                (gs.SLOTS_AT, lanes * slots * (gs.SLOT_SIZE + 3 * stages)),
                (gs.LIVE_AT, 4 * ranks.count),
            ):
                g[column] = end
                end += size
            members = self._members[first : first + ranks.count]
            each = np.arange(ranks.count)
            members[:, gs.LANE] = 0 if ranks.in_step else each
            own = 2 * stages * (2 if pools[index].halves else 1)  # of its batch and of a dummy, whole and in two halves
            members[:, gs.OWN_AT] = end + (own + depth) * each
            members[:, gs.FLYING_AT] = members[:, gs.OWN_AT] + own
            end += (own + depth) * ranks.count
            front = np.zeros((ranks.front_ends, gs.FRONT_SIZE + 2 * ranks.count), np.int64)
            front[:, [gs.FRONT_DUE, gs.FIRST_AT]] = kn.NEVER
            front[:, gs.SCANS_FROM] = ranks.count * np.arange(ranks.front_ends) // ranks.front_ends
            fronts.append(front.reshape(-1))
            fronts_end += front.size
        memory = np.zeros(end, np.int64)
        for index, ranks, first in self.of:
            # What a dummy takes of a rank's own time, one sequence of one token, is known beforehand.
            laws = (*pools[index].laws, *(halves.law for halves in pools[index].halves))
            alone = [law.batch_ns([(1, 0)], yields=False) for law in laws]
            for own in self._members[first : first + ranks.count, gs.OWN_AT]:
                memory[own + len(alone) : own + 2 * len(alone)] = alone
        return np.concatenate(fronts), memory

    def _set_up(self, pools: Sequence[EnginePool]) -> None:
        """Settings, and registers before anything came."""
        for g, (index, ranks, first) in zip(self._groups, self.of, strict=True):
            for column, value in {
                gs.FIRST_RANK: first,
                gs.COUNT: ranks.count,
                gs.IN_STEP: ranks.in_step,
                gs.FRONT_ENDS: ranks.front_ends,
                gs.BALANCED: ranks.balanced,
                gs.RETURNS_LATE: ranks.dummy_returns == "end",
                gs.SYNC_NS: ranks.sync_ns,
                gs.SEND_NS: ranks.send_ns,
                gs.CONTROL_NS: ranks.control_ns,
                gs.PER: ranks.shared[0].per,
                gs.TOLD_DUE: gs.LEAST_WAIT_MS * gs.NS_PER_MS,
            }.items():
                g[column] = value
            if isinstance(own := pools[index].settings.scheduler, TrtllmScheduling):
                g[[gs.ADP_BALANCE, gs.ADP_TIMEOUT]] = own.adp_balance, own.adp_timeout_iters
                g[gs.ADP_BATCHING] = own.adp_batching_wait_iters
            nothing = [gs.COMING, gs.LAST_COMING, gs.WAITING_CLIENT, gs.NEWEST_WAVE, gs.NEWEST_STEP, gs.PUBLISHED_MS]
            g[nothing] = kn.NONE
        self._members[:, [gs.DUE, gs.UNHEARD, gs.NUMBER]] = kn.NEVER, kn.NONE, kn.NONE

    def deal(self, share: Share, place: int, offset: int) -> None:
        """Chain the requests of a share that go to its replica of a number, served by a group.

        Parameters
        ----------
        share : Share
        place : int     the group
        offset : int    number of the replica within the share
        """
        active, g = share.last - share.first, self._groups[place]
        mine = share.dealt(offset)
        self._links[gs.AFTER, mine[:-1]] = mine[1:]
        g[gs.COMING] = mine[0] if len(mine) else kn.NONE
        g[gs.GIVEN] = len(mine)
        if share.clients is not None:
            g[gs.CLOSED] = 1
            clients = len(range(offset, share.clients, active))
            g[gs.GIVEN] = min(clients, len(mine))
            g[gs.WAITING_CLIENT] = mine[clients] if clients < len(mine) else kn.NONE

    @property
    def crowded(self) -> bool:
        """Whether messages found no room."""
        return bool(self.group.told[gs.CROWDED])

    @property
    def used(self) -> tuple[int, ...]:
        """Rows of the logs."""
        return tuple(self.group.told[[gs.FORWARDS, gs.EVENTS, gs.LOADS]].tolist())

    def shared(self, index: int) -> SharedCounts | None:
        """Counts of the forwards of a pool whose ranks run in step."""
        mine = [(ranks, first) for pool, ranks, first in self.of if pool == index]
        if not mine or not mine[0][0].in_step:
            return None
        decode, mixed, eager, draft = self._together[index]
        dummies = sum(int(self._members[first : first + ranks.count, gs.DUMMIES].sum()) for ranks, first in mine)
        split = np.zeros(0, np.int64) if self.halves is None else self.halves.counts[self._split[index]]
        halves = dict(zip(("split_decode", "split_mixed"), np.split(split, 2), strict=True))
        return SharedCounts(decode=decode, mixed=mixed, eager=eager, dummies=dummies, draft=draft, **halves)

    def ends(self, steps: I64) -> I64:
        """The ends of logged batches, of which those of ranks tell the number of their forward instead."""
        forwards = self.group.forwards.reshape(-1, gs.FORWARD_SIZE)
        lane_of = np.full(len(self._replicas), kn.NONE)
        for _, ranks, first in self.of:
            rows = np.arange(first, first + ranks.count)
            lane_of[rows] = first if ranks.in_step else rows
        lane = lane_of[steps[:, kn.STEP_REPLICA]]
        ends = steps[:, kn.STEP_END].copy()
        for one in np.unique(lane[lane != kn.NONE]):
            its = forwards[forwards[:, gs.FORWARD_LANE] == one, gs.FORWARD_END]
            ends[lane == one] = its[ends[lane == one]]
        return ends

    def logged(self) -> tuple[GroupLog, ...]:
        """What ranks did beside their batches."""
        forwards = self.group.forwards.reshape(-1, gs.FORWARD_SIZE)
        events = self.group.events.reshape(-1, gs.EVENT_SIZE)
        loads = self.group.loads.reshape(-1, int(self.group.told[gs.LOADS_WIDTH]))
        served = self._served()
        found = []
        for place, (_, ranks, first) in enumerate(self.of):
            rows = slice(first, first + ranks.count)
            waves = events[events[:, gs.EVENT_GROUP] == place].tolist()
            lanes = [first] if ranks.in_step else range(first, first + ranks.count)
            found.append(
                GroupLog(
                    rank=served[place],
                    preemptions=self._replicas[rows, kn.PREEMPTIONS].tolist(),
                    batches=self._replicas[rows, kn.BATCHES].tolist(),
                    dummies=self._members[rows, gs.DUMMIES].tolist(),
                    forwards=[
                        [
                            (start, end, mode, padded)
                            for _, start, end, mode, padded in forwards[forwards[:, gs.FORWARD_LANE] == lane].tolist()
                        ]
                        for lane in lanes
                    ],
                    publications=[
                        (at_ns, [pairs[2 * rank : 2 * rank + 2] for rank in range(ranks.count)])
                        for _, at_ns, *pairs in loads[loads[:, gs.LOAD_GROUP] == place].tolist()
                    ],
                    waves_started=[
                        (at_ns, wave, None if excluded == kn.NONE else excluded)
                        for _, at_ns, wave, excluded, ends in waves
                        if not ends
                    ],
                    waves_ended=[(at_ns, wave) for _, at_ns, wave, _, ends in waves if ends],
                )
            )
        return tuple(found)

    def _served(self) -> list[dict[int, int]]:
        """Of each group, the rank of each request that it served."""
        found: list[dict[int, int]] = [{} for _ in self.of]
        for request, (rank, place) in enumerate(self._links[[gs.SERVED_BY, gs.SERVED_IN]].T.tolist()):
            if place:
                found[place - 1][request] = rank
        return found
