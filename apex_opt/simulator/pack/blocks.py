"""Lays out the memory of KV blocks: of prefix caching, and of groups of layers."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from math import lcm
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from apex_opt.engines.schedulers import TrtllmScheduling
from apex_opt.errors import UsageError
from apex_opt.plans.kv_groups import sets_of
from apex_opt.simulator.content import BlockContent
from apex_opt.simulator.kernel import entries
from apex_opt.simulator.kernel import kv_state as kv
from apex_opt.simulator.kernel import state as kn
from apex_opt.simulator.kernel.kv_state import Groups
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.kv_groups import KvGroup
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.workload.trace import Trace

    I64 = NDArray[np.int64]

_KINDS: Final = {
    ("full", "none"): kv.FULL,
    ("window", "none"): kv.WINDOW,
    ("chunk", "none"): kv.CHUNK,
    ("state", "none"): kv.STATE,
    ("state", "align"): kv.KEPT,
}


class Layout(NamedTuple):
    """Whose rows are which, and how many schedulers of each pool have memory of their own."""

    trace: Trace
    requests: I64
    """A row for each column of `kernel.state`, a column for each request."""
    replicas: I64
    """int64[schedulers, kn.REPLICA_SIZE]"""
    pools: Sequence[EnginePool]
    places: Sequence[slice]
    """The rows of each pool in `replicas`."""
    lanes: Sequence[int]


def allot(rows: I64, lanes: int, ends: dict[int, int], sizes: dict[int, int]) -> None:
    """Give each lane of a pool its part of several arrays.

    Parameters
    ----------
    rows : of the schedulers of the pool, in which columns tell where parts begin
    lanes : int    schedulers further on use the parts of those before again
    ends : where parts of an array begin next, by column; moved on
    sizes : of a part, by column
    """
    lane = np.arange(len(rows)) % lanes
    for column, size in sizes.items():
        rows[:, column] = ends[column] + size * lane
        ends[column] += size * lanes


def cache_of(layout: Layout, holding: Sequence[int]) -> kn.Cache:
    """Memory of prefix caching.

    Parameters
    ----------
    layout : Layout
    holding : sequence of int    requests of a replica of each pool that can hold blocks beside those that run

    Raises
    ------
    UsageError    for more blocks of content than 31 bits can number
    """
    settings, n = layout.pools[0].settings, len(layout.trace)
    content = content_of(layout.trace, settings.block_size, settings.max_model_len)
    longest = int((layout.requests[kn.PROMPT] + layout.requests[kn.LIMIT]).max()) // settings.block_size + 1
    ends = dict.fromkeys((kn.MEMO_AT, kn.SLOTS_AT, kn.TABLE_AT, kn.BLOCK_AT, kn.HOLDER_AT), 0)
    for pool, place, lanes, more in zip(layout.pools, layout.places, layout.lanes, holding, strict=True):
        if max(content.total, pool.blocks) >= 1 << 31:
            raise UsageError(
                f"prefix caching: {max(content.total, pool.blocks):,} blocks of content are too many; "
                "use a shorter trace"
            )
        slots, rows = pool.settings.seats(len(pool.laws)) + more, layout.replicas[place]
        # Blocks are taken for drafts, too: of up to three rows beyond the last token.
        beyond = 3 * pool.settings.speculation.draft_tokens if pool.settings.speculation else 0
        width = min(longest + ceil_div(beyond, settings.block_size), pool.blocks)
        reused = isinstance(pool.settings.scheduler, TrtllmScheduling)
        # Content 0 is none.
        contents, row = content.total + 1, kn.REUSED_WIDTH if reused else kn.BLOCK_WIDTH + kn.LINE_WIDTH
        rows[:, [kn.SLOTS, kn.TABLE_WIDTH, kn.POOL_BLOCKS, kn.CONTENTS]] = slots, width, pool.blocks, contents
        allot(
            rows,
            lanes,
            ends,
            {
                kn.MEMO_AT: kn.MEMO_WIDTH,
                kn.SLOTS_AT: slots,
                kn.TABLE_AT: slots * width,
                kn.BLOCK_AT: (pool.blocks + 1) * row,
                kn.HOLDER_AT: contents * (1 + reused),
            },
        )
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


def groups_of(layout: Layout, some: range, steps: int, *, logged: bool) -> Groups:
    """Memory of groups of layers.

    Parameters
    ----------
    layout : Layout
    some : range      places of pools that have the same groups
    steps : int       batches that the log has room for
    logged : bool     whether there is a log
    """
    settings, n = layout.pools[some[0]].settings, len(layout.trace)
    counting = not settings.prefix_caching and settings.speculation is None and not logged
    times = Counter(settings.kv_groups)
    groups = tuple(times) if counting else settings.kv_groups
    together = sets_of(groups)
    kinds = np.zeros((len(groups), kv.GROUP_SIZE), np.int64)
    most = settings.max_num_batched_tokens, settings.max_model_len
    keys, totals = _keys(groups, layout.trace, settings) if settings.prefix_caching else ([], [0] * len(groups))
    for number, group in enumerate(groups):
        seen = group.seen_entries(*most) if group.window else kn.NEVER
        kind = _KINDS[group.kind, group.mode]
        after = sum(totals[:number]), times[group] if counting else 1
        kinds[number] = kind, group.block_size, group.window, seen, kn.NONE, *after
    for its in together:
        kinds[list(its[:-1]), kv.TOGETHER] = its[1:]
    starts = np.concatenate(([0], np.cumsum([len(its) for its in keys])))[:-1]
    drafts = settings.speculation.draft_tokens if settings.speculation else 0
    longest = int((layout.requests[kn.PROMPT] + layout.requests[kn.LIMIT]).max()) + drafts
    width = kv.ENTRIES + longest // min(group.block_size for group in groups) + 3 + 2 * drafts
    ends = dict.fromkeys((kn.MEMO_AT, kn.SLOTS_AT, kn.TABLE_AT, kn.BLOCK_AT, kn.HOLDER_AT), 0)
    for index in () if counting else some:
        pool, place, lanes = layout.pools[index], layout.places[index], layout.lanes[index]
        seats, rows = pool.settings.max_num_seqs, layout.replicas[place]
        rows[:, [kn.TABLE_WIDTH, kn.POOL_BLOCKS, kn.CONTENTS]] = width, pool.blocks, sum(totals)
        allot(
            rows,
            lanes,
            ends,
            {
                kn.MEMO_AT: kv.REGISTERS + len(groups),
                kn.SLOTS_AT: seats,
                kn.TABLE_AT: (seats + 1) * len(groups) * width,
                kn.BLOCK_AT: (pool.blocks + 1) * kv.BLOCK_WIDTH,
                kn.HOLDER_AT: sum(totals) * kv.HOLDER_WIDTH,
            },
        )
    spans = _span_rows(layout, settings) if counting else np.zeros(0, np.int64)
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


def _span_rows(layout: Layout, settings: EngineSettings) -> I64:
    """What is to know of the groups whose blocks have as many tokens."""
    sizes, ring = spans_of(settings), int(layout.replicas[:, kn.RING_SIZE].max())
    starts = np.cumsum([0, *(kv.DUE + 2 * size + ring for size in sizes)])[:-1]
    return np.array([(*its, at) for its, at in zip(sizes.items(), starts, strict=True)], np.int64).reshape(-1)


@lru_cache(maxsize=4)
def content_of(trace: Trace, block_size: int, max_model_len: int) -> BlockContent:
    """What the blocks of a trace hold, the same for every plan; the kernel only reads it.

    Parameters
    ----------
    trace : Trace
    block_size, max_model_len : int    tokens
    """
    return BlockContent.of(trace, block_size, trace.generated(max_model_len), number_pieces)


def spans_of(settings: EngineSettings) -> Counter[int]:
    """Tokens of the blocks that sequences take more of the longer they are, and how many groups have such."""
    return Counter(group.block_size for group in settings.kv_groups if group.kind != "state")


def _keys(groups: Sequence[KvGroup], trace: Trace, settings: EngineSettings) -> tuple[list[list[int]], list[int]]:
    """What the blocks of each request hold, group by group, and how many contents each group has."""
    contents = [content_of(trace, group.block_size, settings.max_model_len) for group in groups]
    return [content.keys(i) for content in contents for i in range(len(trace))], [its.total for its in contents]


def number_pieces(starts: I64, content: I64) -> tuple[I64, int]:
    """`content.number_pieces`, compiled."""
    pieces, previous = np.zeros(len(content), np.int64), np.zeros(len(content), np.int64)
    slots, found = np.full(2 << len(content).bit_length(), kn.NONE, np.int64), np.zeros(1, np.int64)
    entries.NUMBER_PIECES(
        np.array(starts), len(starts) - 1, np.array(content), pieces, previous, slots, len(slots), found
    )
    return pieces, int(found[0])
