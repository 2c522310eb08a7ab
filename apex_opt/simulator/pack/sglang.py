"""The memory of a run of SGLang's engine."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.simulator.kernel import sglang_state as sg
from apex_opt.simulator.kernel import state as kn
from apex_opt.simulator.law import never_admitted
from apex_opt.simulator.pack.blocks import allot, number_pieces
from apex_opt.simulator.pack.memory import Memory
from apex_opt.simulator.reference import sglang as rules
from apex_opt.simulator.tokens import TokenContent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.simulator.outcome import Outcome
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.workload.trace import Trace

    I64 = NDArray[np.int64]

assert (sg.CLIP, sg.AHEAD, sg.ALIKE) == (rules.CLIP, rules.AHEAD, rules.ALIKE)
assert (sg.SORTED_UP_TO, sg.REFRESHED_EVERY) == (rules.SORTED_UP_TO, rules.REFRESHED_EVERY)


_USUAL_NODES = 1 << 18


@lru_cache(maxsize=4)
def _content(trace: Trace, max_model_len: int) -> TokenContent:
    """What the tokens of a trace are, the same for every plan; the kernel only reads it."""
    return TokenContent.of(trace, trace.generated(max_model_len), number_pieces)


class SglangMemory(Memory):
    """The arrays of one run.

    Parameters
    ----------
    content : TokenContent or None    what tokens are, where that is not what the trace says
    nodes : int                       by how much more nodes there are room for than is usually enough
    others : as of `Memory`
    """

    def __init__(self, *given: Any, content: TokenContent | None, spare: int = 1, **more: Any) -> None:
        self._told, self._spare = content, spare
        super().__init__(*given, **more, spare=spare)

    def _scratch(self) -> I64:
        self._requests[sg.STATED] = self._trace.stated(self._pools[0].settings.max_model_len)
        waiting = 1 << (len(self._trace) + 1).bit_length()
        slots = [len(pool.laws) for pool in self._pools for _ in range(pool.replicas * pool.schedulers)]
        self._registers = np.zeros(len(slots) * sg.G_SIZE + sum(slots) * sg.S_SIZE, np.int64)
        self._own = self._registers[: len(slots) * sg.G_SIZE].reshape(-1, sg.G_SIZE)
        of_slots = self._registers[len(slots) * sg.G_SIZE :].reshape(-1, sg.S_SIZE)
        self._ratio = np.zeros((len(slots), sg.R_SIZE), np.float64)
        end, first = 0, 0
        told: list[tuple[int, I64]] = []
        for pool, place, lanes in zip(self._pools, self._places, self._lanes, strict=True):
            settings, stages, own = pool.settings, len(pool.laws), self._own[place]
            self._set_up(place, pool)
            end = self._list_drafts(pool, self._replicas[place], told, end)
            seats, page, depth = settings.max_num_seqs, settings.block_size, settings.depth(stages)
            own[:, sg.G_WAIT_MASK], own[:, sg.G_FLIGHT_SIZE] = waiting - 1, sg.F_SIZE + 2 * seats
            count = place.stop - place.start
            lane = np.arange(count) % lanes
            for rows, column, size in (
                (own, sg.G_WAIT_AT, waiting),
                (own, sg.G_FLIGHT_AT, depth * (sg.F_SIZE + 2 * seats)),
                (own, sg.G_SORT_AT, 4 * seats + 3 * sg.SORTED_UP_TO),
                (self._replicas[place], kn.ENTERING_AT, seats),
            ):
                rows[:, column] = end + size * lane
                end += size * lanes
            last = first + count * stages
            own[:, sg.G_SLOT_AT] = self._own.size + (first + stages * np.arange(count)) * sg.S_SIZE
            lists = np.repeat(lane, stages) * stages + np.tile(np.arange(stages), count)
            of_slots[first:last, sg.S_RUNNING_AT] = end + lists * (seats + page)
            of_slots[first:last, sg.S_RESIDUE_AT] = end + lists * (seats + page) + seats
            end += lanes * stages * (seats + page)
            first = last
        scratch = np.zeros(end, np.int64)
        for start, counts in told:
            scratch[start : start + len(counts)] = counts
        return scratch

    def _set_up(self, place: slice, pool: EnginePool) -> None:
        """Settings that only this engine has."""
        settings, stages, own = pool.settings, len(pool.laws), pool.settings.scheduler
        assert isinstance(own, SglangScheduling)
        most = own.max_prefill_tokens
        if not settings.chunked_prefill:  # the one limit of a batch
            most = min(most, settings.max_num_batched_tokens)
        for column, value in {
            sg.G_SLOTS: stages,
            sg.G_MOST_RUNNING: max(1, settings.max_num_seqs // stages),
            sg.G_SEATS: settings.max_num_seqs,
            sg.G_MAX_PREFILL: most,
            sg.G_LPM: own.schedule_policy == "lpm",
            sg.G_MIXES: own.mixed_chunk and settings.chunked_prefill,
            sg.G_IGNORE_EOS: own.ignore_eos,
            sg.G_BEYOND: settings.beyond_page,
            sg.G_EVERY: own.scheduler_recv_interval,
        }.items():
            self._own[place, column] = value
        ranked = pool.ranks is not None and pool.ranks.in_step
        start, least, decay = (own.of_a_rank if ranked else own).ratios
        self._ratio[place, [sg.R_RATIO, sg.R_START, sg.R_LEAST, sg.R_DECAY]] = start, start, least, decay

    def _blocks(self, holding: Sequence[int]) -> sg.Tree:
        """Memory of the tree."""
        found = self._told or _content(self._trace, self._pools[0].settings.max_model_len)
        ends = dict.fromkeys((sg.G_NODE_AT, sg.G_HASH_AT, sg.G_HEAP_AT), 0)
        for pool, place, lanes in zip(self._pools, self._places, self._lanes, strict=True):
            turn = 2 * sg.SORTED_UP_TO + 4 * min(pool.settings.max_num_seqs, len(self._trace))
            nodes = turn + self._spare * min(pool.blocks, 4 * len(self._trace), _USUAL_NODES) + 1
            table = 1 << (2 * nodes).bit_length()
            own = self._own[place]
            own[:, [sg.G_NODES_A_TURN, sg.G_MOST_NODES, sg.G_HASH_MASK]] = turn, nodes, table - 1
            allot(own, lanes, ends, {sg.G_NODE_AT: nodes, sg.G_HASH_AT: table, sg.G_HEAP_AT: 2 * nodes})
        return sg.Tree(
            piece_tokens=found.piece_tokens,
            pieces=np.ascontiguousarray(found.pieces, np.int64).copy(),
            starts=np.array(found.starts, np.int64),
            own=np.array(found.own, np.int64),
            last=np.array(found.last, np.int64),
            nodes=np.zeros(ends[sg.G_NODE_AT] * sg.N_SIZE, np.int64),
            slots=np.zeros(ends[sg.G_HASH_AT], np.int64),
            heap=np.zeros(ends[sg.G_HEAP_AT], np.int64),
        )

    def _beside(self, index: int) -> Any:
        return sg.Sglang(self._registers, self._ratio.reshape(-1)), self._cache

    @property
    def crowded(self) -> bool:
        """Whether there were too few nodes for a tree."""
        return bool(self._replicas[:, kn.ERROR].any()) or super().crowded

    def outcome(self, *, log: bool, gaps: bool) -> Outcome:
        ended = self.stopped or int(self._replicas[:, kn.ENDED].sum()) == len(self._trace)
        if not ended and int(self._replicas[:, kn.NOW].max()) < kn.NEVER:
            raise never_admitted()
        return super().outcome(log=log, gaps=gaps)
