"""What layers keep of tokens and sequences, and the blocks that stages must have room for.

The rules are those of `apex_opt.plans.allotment` and `apex_opt.plans.kv_groups`, counted anew, so that the oracle can
find fault with either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from apex_opt.ir.cells import Cut
from apex_opt.ir.formats import KV_BYTES

from .sizes import draft_blocks, limits_shared

if TYPE_CHECKING:
    from apex_opt.ir.model import Block
    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.speculation import Drafter

_ENLARGED = 16
"""Tokens that blocks hold a multiple of, and of those asked for, where they are enlarged to the size of a state."""


class Entry(NamedTuple):
    """What a layer keeps of each token, of those a query sees (0: all) or in chunks, or whatever there are."""

    bytes_each: int
    seen: int
    chunked: bool
    state: bool


class Pool(NamedTuple):
    """Layers over one pool.

    Parameters
    ----------
    groups : (tokens of a block, tokens a query sees, whether in chunks, whether it is a state) of each
    places : layers in each group
    page : bytes of a block for one layer; where there is one group 0, as layers may differ
    tokens : of a block of attention
    """

    groups: tuple[tuple[int, int, bool, bool], ...]
    places: tuple[tuple[int, ...], ...]
    page: int
    tokens: int


class Pools:
    """The pools of an instance's plans; what plans share is counted once."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        own = any("own pool" in block.attention.traits for block in instance.model.blocks)
        self.grouped, size = instance.settings.scheduler.name == "vllm" and not own, instance.settings.block_size
        kept = [entry for block in instance.model.blocks for entry in _entries(block, 1, 2, 0, size)]
        for drafter in instance.drafters:
            kept += [entry for block in draft_blocks(instance, drafter) for entry in _entries(block, 1, 2, 0, size)]
        self.windowed = self.grouped and any(entry.seen for entry in kept)
        """Whether how much is kept may depend on the tokens of a batch."""
        self.varied = self.grouped and len({entry[1:] for entry in kept}) > 1
        """Whether layers may make several groups."""
        self.apart = not self.grouped and any(entry.state for entry in kept)
        """Whether states lie apart from the blocks."""
        self._found: dict[tuple[object, ...], Pool | None] = {}

    def of(self, drafter: Drafter | None, tp: int, kv: str) -> Pool | None:
        """How the layers share a pool; None where they cannot.

        Parameters
        ----------
        drafter : Drafter or None    how drafts are made, of which the layers come last
        tp : int                     shards of attention
        kv : str                     format of the cache
        """
        drafts = drafter.draft_tokens if drafter else 0
        extra = draft_blocks(self.instance, drafter)
        blocks = {id(block): block for block in (*self.instance.model.blocks, *extra)}
        entries = {
            name: _entries(block, tp, KV_BYTES[kv], drafts, self.instance.settings.block_size)
            for name, block in blocks.items()
        }
        key = drafter, *entries.values()
        if key not in self._found:
            runs = self.instance.model.runs
            order = [id(run.block) for run in runs for _ in range(run.count)] + [id(block) for block in extra]
            redone = drafter is not None and drafter.rules.recomputes
            self._found[key] = self._share([entries[name] for name in order], redone=redone)
        return self._found[key]

    def _share(self, layers: list[tuple[Entry, ...]], *, redone: bool) -> Pool | None:
        """Layers put into groups: each kind into as many as it takes, dealt out in turn.

        Parameters
        ----------
        layers : what each keeps
        redone : bool    whether drafts compute the last block anew, beside which chunks are kept whole
        """
        settings = self.instance.settings
        flat = [(layer, entry) for layer, its in enumerate(layers) for entry in its if self.grouped or not entry.state]
        tokens = [entry.bytes_each for _, entry in flat if not entry.state]
        states = [entry.bytes_each for _, entry in flat if entry.state]
        size = settings.block_size
        if states and tokens:
            unit = max(_ENLARGED, size)
            size = max(size, -(-max(states) // (max(tokens) * unit)) * unit)
        whole = redone and any(entry.chunked for _, entry in flat)
        whole |= self.grouped and settings.role is not None  # a connector keeps all layers as if they saw all tokens
        if whole and len({entry.seen for _, entry in flat if entry.seen and not entry.chunked}) > 1:
            return None
        of_state = size if settings.prefix_caching else settings.max_model_len
        kinds: dict[tuple[int, int, bool, bool], list[tuple[int, int]]] = {}
        for layer, entry in flat:
            seen = 0 if whole or not self.grouped else entry.seen
            kind = (of_state, 0, False, True) if entry.state else (size, seen, seen > 0 and entry.chunked, False)
            kinds.setdefault(kind, []).append((layer, entry.bytes_each))
        if len(kinds) <= 1:
            return Pool(tuple(kinds), (tuple(layer for layer, _ in flat),), 0, size)
        page = size * max(tokens)
        equal: dict[tuple[int, int, bool, bool], list[int]] = {}
        for (span, seen, chunked, state), its in kinds.items():
            for layer, one in its:
                if not state and page % (size * one):
                    return None
                equal.setdefault((span if state else page // one, seen, chunked, state), []).append(layer)
        numbers = [len(its) for its in equal.values()]
        share = max(numbers) if 2 * max(numbers) < 3 * min(numbers) else min(numbers)
        groups, places = [], []
        for kind, mine in equal.items():
            ways = -(-len(mine) // share)
            groups += [kind] * ways
            places += [tuple(mine[way::ways]) for way in range(ways)]
        return Pool(tuple(groups), tuple(places), page, size)

    def room(self, pool: Pool, drafter: Drafter | None, batched: int) -> int:
        """Blocks that the pool must have: those of the longest request and one never handed out.

        Parameters
        ----------
        pool : Pool
        drafter : Drafter or None    how drafts are made
        batched : int                tokens of a batch
        """
        tokens, length = self.instance.longest_tokens, self.instance.settings.max_model_len
        drafts = drafter.draft_tokens if drafter else 0
        if drafter is not None and self.instance.settings.scheduler.name == "sglang":
            # Two steps of right drafts, of which two tokens, the next one and a page have been counted.
            tokens += max(0, 2 * (1 + drafts) - 3 - pool.tokens)
        elif drafter is not None and drafter.method != "ngram":
            tokens = max(tokens, min(tokens + drafts, length))
        blocks = 1
        for size, seen, chunked, state in pool.groups or ((pool.tokens, 0, False, False),):
            if state:
                blocks += 1 + drafts + int(self.instance.settings.prefix_caching and tokens > size)
            else:
                most = -(-min(seen + batched, length) // size) if chunked else tokens
                if seen and not chunked:
                    most = -(-min(seen - 1 + batched, length) // size) + 1
                blocks += min(-(-tokens // size), most)
        return blocks

    def layer_bytes(self, block: Block, drafter: Drafter | None, batched: int, tp: int, kv: str) -> int:
        """Bytes that a stage must have room for, for each layer of a kind; 0 where several groups share the blocks.

        Parameters
        ----------
        block : Block                of such a layer
        drafter : Drafter or None    how drafts are made
        batched : int                tokens of a batch
        tp : int                     shards of attention
        kv : str                     format of the cache
        """
        pool = self.of(drafter, tp, kv)
        if pool is None or len(pool.groups) > 1:
            return 0
        drafts = drafter.draft_tokens if drafter else 0
        mine = _entries(block, tp, KV_BYTES[kv], drafts, self.instance.settings.block_size)
        tokens = sum(entry.bytes_each for entry in mine if not entry.state)
        states = sum(entry.bytes_each for entry in mine if entry.state) if self.grouped else 0
        return self.room(pool, drafter, batched) * (pool.tokens * tokens + states)

    def shared_bytes(
        self, drafter: Drafter | None, batched: int, tp: int, kv: str, places: tuple[tuple[int, ...], ...]
    ) -> int:
        """Bytes that a stage must have room for, for each layer of the group that has the most there.

        Parameters
        ----------
        drafter : Drafter or None    how drafts are made
        batched : int                tokens of a batch
        tp : int                     shards of attention
        kv : str                     format of the cache
        places : layers of each group; 0 where they are put into others
        """
        pool = self.of(drafter, tp, kv)
        if pool is None or len(pool.groups) < 2 or pool.places != places:
            return 0
        return self.room(pool, drafter, batched) * pool.page

    def states_bytes(self, block: Block, drafter: Drafter | None, tp: int) -> int:
        """Bytes of the states of a sequence in a layer, where they lie apart.

        Parameters
        ----------
        block : Block                of the layer
        drafter : Drafter or None    how drafts are made
        tp : int                     shards of attention
        """
        drafts = drafter.draft_tokens if drafter else 0
        return (
            sum(
                entry.bytes_each
                for entry in _entries(block, tp, 1, drafts, self.instance.settings.block_size)
                if entry.state
            )
            if self.apart
            else 0
        )

    def seats(self, seqs: int, copies: int, stages: int) -> int:
        """Sequences of which each device has states, where these lie apart from the blocks.

        Parameters
        ----------
        seqs : int      of a batch
        copies : int    of attention
        stages : int    of the pipeline
        """
        times = stages if self.instance.settings.scheduler.seats_per_stage else 1
        return -(-seqs * times // limits_shared(self.instance, copies))


def _entries(block: Block, tp: int, kv_bytes: int, drafts: int, size: int) -> tuple[Entry, ...]:
    """What a layer keeps on one device, with so many bytes per element of the cache.

    Parameters
    ----------
    block : Block
    tp : int          shards of attention
    kv_bytes : int
    drafts : int      tokens that are drafted at once
    size : int        tokens of a block
    """
    found = []
    for kept in block.attention.cache(Cut(heads=tp)):
        state, token = kept.sequence_bytes(drafts), kept.token_bytes(kv_bytes)
        if kept.fixed_tokens:  # a block after the other of what an encoder left
            found += [Entry(size * token, 0, chunked=False, state=True)] * -(-kept.fixed_tokens // size)
        elif state:
            found.append(Entry(state, 0, chunked=False, state=True))
        else:
            found.append(Entry(token, getattr(kept, "window", None) or 0, getattr(kept, "chunked", False), state=False))
    return tuple(found)
