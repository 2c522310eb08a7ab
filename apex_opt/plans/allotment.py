"""How an engine allots memory to what the layers of a plan keep: in groups, in pages, in blocks of so many tokens.

vLLM puts layers that keep different things into groups over one pool of blocks. Before that it enlarges the blocks of
attention until one is no smaller than a state, to which states are padded. Windows and chunks of the context are kept
as if their layers saw all of it where its manager of several kinds is switched off: where a connector hands blocks
over, and with chunks where what makes drafts computes the last block anew. Other
engines keep all tokens of every layer that sees any, and have a state of each layer for every sequence that can run;
so is it with layers for which vLLM has a pool of their own kind, cells with the trait "own pool".

Source: `HybridAttentionMambaModelConfig` and `get_kv_cache_configs` of vLLM 0.20.2, in our own words; block sizes that
it logs settle it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import InputError
from apex_opt.ir.cells import Cut, State
from apex_opt.ir.formats import KV_BYTES
from apex_opt.plans.drafts import draft_of
from apex_opt.plans.kv_groups import KvGroup, KvLayer, share_pool
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.ir.cells import AttentionCell
    from apex_opt.ir.model import Model
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.kv_groups import LayerKind, StateMode
    from apex_opt.plans.plan import Plan
    from apex_opt.plans.speculation import Drafter

KERNEL_TOKENS: Final = 16
"""Blocks that are enlarged hold a multiple of so many tokens, and of those that were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allotment:
    """What blocks are on each device, and what sequences take of them.

    Parameters
    ----------
    groups : tuple of KvGroup    that share the blocks; none: all layers keep all tokens
    block_size : int             tokens of a block of attention
    page_bytes : int             of a block, by place in a group
    before : tuple of tuple of int         by group, places taken by the layers before each layer of the model, and in
                                           all; with one group their bytes, as those may differ
    states_before : tuple of int           bytes of the states of a sequence, likewise, where they lie apart from the
                                           blocks
    fault : str                            why the engine cannot put the layers into one pool; "" where it can
    """

    groups: tuple[KvGroup, ...]
    block_size: int
    page_bytes: int
    before: tuple[tuple[int, ...], ...]
    states_before: tuple[int, ...] = ()
    fault: str = ""
    _blocks: tuple[int, int] = field(init=False, repr=False, compare=False)
    """Places of the largest group, and most of one layer."""
    _states: tuple[int, int] = field(init=False, repr=False, compare=False)
    """Bytes of all states of a sequence, and most of one layer."""

    _places: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    """`before`, and `states_before` in the last row."""

    def __post_init__(self) -> None:
        rows = (*self.before, self.states_before or (0,) * len(self.before[0]))
        object.__setattr__(self, "_places", np.array(rows, np.int64))
        for name, rows in (("_blocks", self.before), ("_states", (self.states_before or (0,),))):
            steps = (later - now for row in rows for now, later in pairwise(row))
            object.__setattr__(self, name, (max(row[-1] for row in rows), max(steps, default=0)))

    def stages_bytes(self, ends: Sequence[int]) -> tuple[list[int], list[int]]:
        """Bytes of a block and of the states of a sequence, as below, between each of these layers and the next.

        Parameters
        ----------
        ends : sequence of int    rising
        """
        places = np.diff(self._places[:, ends], axis=1)
        blocks: list[int] = (places[:-1].max(axis=0) * self.page_bytes).tolist()
        states: list[int] = places[-1].tolist()
        return blocks, states

    def block_bytes(self, first: int, last: int) -> int:
        """Bytes of a block on a device that holds the layers from the `first` to before the `last`."""
        return self.page_bytes * max(row[last] - row[first] for row in self.before)

    @property
    def layers(self) -> int:
        """All of them, those of what makes drafts included."""
        return len(self.before[0]) - 1

    def most_bytes(self, layers: int) -> tuple[int, int]:
        """Most bytes of a block, and of the states of a sequence beside it, on so many layers in a row."""
        blocks, states = (min(whole, layers * one) for whole, one in (self._blocks, self._states))
        return self.page_bytes * blocks, states

    def state_bytes(self, first: int, last: int) -> int:
        """Bytes of the states of a sequence that lie apart from the blocks there."""
        return self.states_before[last] - self.states_before[first] if self.states_before else 0


class Terms(NamedTuple):
    """What of an engine's settings decides how it allots memory."""

    grouped: bool
    block_size: int
    max_model_len: int
    caches: bool
    hands_over: bool = False


def allotted(model: Model, plan: Plan, settings: EngineSettings) -> Allotment:
    """How memory is allotted to the layers of a plan, and after them to those that make its drafts.

    Parameters
    ----------
    model, plan
    settings : EngineSettings    of the plan or of all
    """
    grouped = isinstance(settings.scheduler, VllmScheduling) and not _of_own_pool(model)
    terms = Terms(
        grouped, settings.block_size, settings.max_model_len, settings.prefix_caching, settings.role is not None
    )
    drafter = plan.speculation if plan.stages == 1 else None  # nothing makes drafts for a pipeline
    return _allotted(model, drafter, plan.attention.tp, plan.kv_format, terms)


@lru_cache(maxsize=32)
def _of_own_pool(model: Model) -> bool:
    """Whether some layers have a pool of their own kind."""
    return any("own pool" in block.attention.traits for block in model.blocks)


@lru_cache(maxsize=1 << 12)
def _allotted(model: Model, drafter: Drafter | None, tp: int, kv_format: str, terms: Terms) -> Allotment:
    draft = draft_of(model, drafter) if drafter else None
    runs = (*model.runs, *(draft.runs if draft else ()))
    drafts = drafter.draft_tokens if drafter else 0
    cells = [run.block.attention for run in runs for _ in range(run.count)]
    chunked = any(entry.chunked for cell in cells for entry in cell.cache() if not isinstance(entry, State))
    whole = terms.hands_over or (chunked and drafter is not None and drafter.rules.recomputes)
    kept = [_entries(cell, tp, KV_BYTES[kv_format], drafts, terms, whole=whole) for cell in cells]
    if not terms.grouped:
        pages = [sum(entry.page_bytes for entry in its if entry.kind != "state") for its in kept]
        states = [sum(entry.page_bytes for entry in its if entry.kind == "state") for its in kept]
        return Allotment(
            groups=(),
            block_size=terms.block_size,
            page_bytes=1,
            before=((0, *accumulate(pages)),),
            states_before=(0, *accumulate(states)) if any(states) else (),
        )
    return _in_groups(kept, terms, as_full=whole)


def _entries(cell: AttentionCell, tp: int, kv_bytes: int, drafts: int, terms: Terms, *, whole: bool) -> list[KvLayer]:
    """What a layer keeps on one device.

    Parameters
    ----------
    cell : AttentionCell
    tp, kv_bytes, drafts : int    shards, bytes of an element, tokens drafted at once
    terms : Terms
    whole : bool                  chunks are kept as if the layer saw all tokens
    """
    found = []
    for kept in cell.cache(Cut(heads=tp)):
        if isinstance(kept, State):
            page, size = kept.sequence_bytes(drafts), terms.max_model_len
            found.append(KvLayer(kind="state", block_size=size, page_bytes=page))
            continue
        if kept.fixed_tokens:
            # Keys and values of an encoder: as many blocks as they take, each a state of its own to the pool.
            page, size = terms.block_size * kept.token_bytes(kv_bytes), terms.max_model_len
            blocks = ceil_div(kept.fixed_tokens, terms.block_size)
            found += [KvLayer(kind="state", block_size=size, page_bytes=page)] * blocks
            continue
        window = kept.window or 0 if terms.grouped and not (kept.chunked and whole) else 0
        found.append(
            KvLayer(
                kind="full" if not window else "chunk" if kept.chunked else "window",
                block_size=terms.block_size,
                page_bytes=terms.block_size * kept.token_bytes(kv_bytes),
                window=window,
            )
        )
    return found


def _in_groups(kept: Sequence[Sequence[KvLayer]], terms: Terms, *, as_full: bool) -> Allotment:
    """What the layers keep, put into groups over one pool.

    Parameters
    ----------
    kept : of each layer in turn
    terms : Terms
    as_full : bool    whether windows and chunks are kept as if every layer saw all tokens
    """
    block_size = _enlarged([entry for its in kept for entry in its], terms.block_size)
    entries = [_resized(entry, block_size, terms) for its in kept for entry in its]
    nothing = Allotment(groups=(), block_size=block_size, page_bytes=0, before=((0,) * (len(kept) + 1),))
    if not entries:
        return nothing
    largest = max(entry.page_bytes for entry in entries)
    if any(entry.kind != "state" for entry in entries):
        entries = [replace(entry, page_bytes=largest) if entry.kind == "state" else entry for entry in entries]
    try:
        shared = share_pool(entries, 0, hybrid=not as_full)
    except InputError as error:
        return replace(nothing, fault=str(error))
    mode: StateMode = "align" if terms.caches else "none"
    groups = []
    for places, size in zip(shared.groups, shared.block_size, strict=True):
        first = entries[places[0]]
        kind: LayerKind = "full" if as_full and first.window else first.kind
        groups.append(
            KvGroup(
                kind=kind,
                block_size=size,
                window=0 if kind == "full" else first.window,
                mode=mode if kind == "state" else "none",
            )
        )
    layer_of = [layer for layer, its in enumerate(kept) for _ in its]
    several = len(groups) > 1
    before = []
    for places in shared.groups:
        taken = [0] * len(kept)
        for place in places:
            taken[layer_of[place]] += 1 if several else entries[place].page_bytes
        before.append((0, *accumulate(taken)))
    return Allotment(
        groups=() if [group.kind for group in groups] == ["full"] else tuple(groups),
        block_size=block_size,
        page_bytes=largest if several else 1,
        before=tuple(before),
    )


def _enlarged(entries: Sequence[KvLayer], block_size: int) -> int:
    """Tokens of a block of attention: of as many bytes as the largest state at least.

    Parameters
    ----------
    entries : sequence of KvLayer
    block_size : int    tokens that are asked for
    """
    states = [entry.page_bytes for entry in entries if entry.kind == "state"]
    tokens = [entry.page_bytes // entry.block_size for entry in entries if entry.kind != "state"]
    if not states or not tokens:
        return block_size
    multiple = max(KERNEL_TOKENS, block_size)
    return max(block_size, multiple * ceil_div(max(states), multiple * max(tokens)))


def _resized(entry: KvLayer, block_size: int, terms: Terms) -> KvLayer:
    """An entry with blocks of so many tokens; of states with one for a sequence, or for each block of attention.

    Parameters
    ----------
    entry : KvLayer
    block_size : int    tokens of a block of attention
    terms : Terms
    """
    if entry.kind == "state":
        return replace(entry, block_size=block_size if terms.caches else terms.max_model_len)
    return replace(entry, block_size=block_size, page_bytes=entry.page_bytes // entry.block_size * block_size)
