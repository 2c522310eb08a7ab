"""Layers that keep different things, put into groups that share one pool of KV blocks.

A block belongs to one group at a time and stands for one layer of each place in the group, so all layers' pages are
made equally large.

Source: `get_kv_cache_groups`, `unify_kv_cache_spec_page_size` and `get_kv_cache_config_from_groups` of vLLM 0.20.2, in
our own words; recorded lists of layers settle it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from apex_opt.errors import InputError
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

LayerKind = Literal["full", "window", "chunk", "state"]
StateMode = Literal["none", "align"]


class Limits(NamedTuple):
    """What of an engine's settings bounds what sequences take of a group.

    Parameters
    ----------
    max_num_batched_tokens, max_model_len : int    as of the settings
    drafts : int                                   that may follow a token
    """

    max_num_batched_tokens: int
    max_model_len: int
    drafts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGroup:
    """What the layers of one group keep, as the scheduler sees it.

    Parameters
    ----------
    kind : "full", "window", "chunk" or "state", as of `KvLayer`
    block_size : int          tokens of a block
    window : int              tokens that a query sees, itself included, or of a chunk; 0 where it sees all
    mode : "none" or "align"  of states: one for a sequence, whatever its length; or one for each end of a block, which
                              can be found again by its prefix
    """

    kind: LayerKind
    block_size: int
    window: int = 0
    mode: StateMode = "none"

    def seen_entries(self, max_num_batched_tokens: int, max_model_len: int) -> int:
        """Blocks that a sequence takes of a window or a chunk at most, as they are counted before it is admitted.

        Parameters
        ----------
        max_num_batched_tokens, max_model_len : int    as of the engine's settings
        """
        if self.kind == "chunk":
            return ceil_div(min(self.window + max_num_batched_tokens, max_model_len), self.block_size)
        return ceil_div(min(self.window - 1 + max_num_batched_tokens, max_model_len), self.block_size) + 1

    def passed(self, computed: Ints) -> Ints:
        """Blocks out of sight of the token after so many computed ones.

        Parameters
        ----------
        computed : int64[n]
        """
        if self.kind == "chunk":
            return computed // self.window * self.window // self.block_size
        return np.maximum(computed - self.window + 1, 0) // self.block_size

    def most(self, tokens: Ints, limits: Limits) -> Ints:
        """Blocks that sequences of so many tokens may come to hold, and without which some are never done.

        Parameters
        ----------
        tokens : int64[n]    that each holds in the end, with those of drafts to come
        limits : Limits
        """
        if self.kind == "state":  # a kept one is given back once the next has been computed
            kept = np.zeros_like(tokens) if self.mode == "none" else np.minimum(tokens - 1, self.block_size)
            return 1 + limits.drafts + kept // self.block_size
        blocks = -(-tokens // self.block_size)
        if self.window:
            seen = self.seen_entries(limits.max_num_batched_tokens, limits.max_model_len)
            return np.minimum(blocks, seen)
        return blocks

    def held(self, tokens: Ints, before: Ints, limits: Limits) -> Ints:
        """Blocks that sequences hold after a row, with those ahead of drafts left out.

        Parameters
        ----------
        tokens, before : int64[n]    computed of each after the row and before it
        limits : Limits
        """
        if self.kind == "state":
            return self.most(tokens, limits)
        return -(-tokens // self.block_size) - (self.passed(before) if self.window else 0)

    def least(self, tokens: Ints, limits: Limits) -> Ints:
        """Blocks that sequences hold at least while they compute a token after so many, or a later one.

        Parameters
        ----------
        tokens : int64[n]    before that one, of each
        limits : Limits
        """
        if self.kind == "chunk":  # a new one may have just begun
            return np.ones_like(tokens)
        if self.kind == "state":
            return np.full_like(tokens, 1 + limits.drafts)
        seen = np.minimum(tokens, self.window) if self.kind == "window" else tokens
        return -(-seen // self.block_size)


def sets_of(groups: Sequence[KvGroup]) -> list[tuple[int, ...]]:
    """Groups alike in all, whose blocks are found together: full attention first, then as they come."""
    alike: dict[KvGroup, list[int]] = {}
    for place, group in enumerate(groups):
        alike.setdefault(group, []).append(place)
    return [tuple(places) for _, places in sorted(alike.items(), key=lambda item: item[0].kind != "full")]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayer:
    """What one layer keeps.

    Parameters
    ----------
    kind : "full" (keys and values of all tokens), "window" (of the last ones), "chunk" (of those since a multiple of so
        many) or "state" (a state per sequence)
    block_size : int    tokens of a block
    page_bytes : int    a block of this layer
    window : int        tokens that a query sees, itself included, or of a chunk; 0 where it sees all
    """

    kind: LayerKind
    block_size: int
    page_bytes: int
    window: int = 0

    @property
    def keeps(self) -> tuple[LayerKind, int, int]:
        """What layers have in common that may differ in size and still lie in one group."""
        return self.kind, self.block_size, self.window


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGroups:
    """Layers in groups, and the pool that they share.

    Parameters
    ----------
    groups : tuple of tuples of int    layers of each, by their place in the model
    block_size : tuple of int          tokens of a block, by group
    blocks : int                       of the pool, the one that is never handed out included
    """

    groups: tuple[tuple[int, ...], ...]
    block_size: tuple[int, ...]
    blocks: int


def share_pool(layers: Sequence[KvLayer], available_bytes: int, *, hybrid: bool = True) -> KvGroups:
    """Put layers into groups and count the blocks of their pool.

    Parameters
    ----------
    layers : KvLayer of each layer, in the model's order
    available_bytes : int    memory of the pool
    hybrid : bool            windows and chunks may be kept apart; else they are kept as if every layer saw all tokens

    Returns
    -------
    KvGroups

    Raises
    ------
    InputError    layers that the engine cannot put into one pool
    """
    if not layers:
        raise InputError("a pool of KV blocks needs a layer that keeps something, got none")
    if not hybrid:
        layers = _all_full(layers)
    if len({layer.keeps for layer in layers}) == 1:
        page = sum(layer.page_bytes for layer in layers)
        return KvGroups(
            groups=(tuple(range(len(layers))),),
            block_size=(layers[0].block_size,),
            blocks=available_bytes // page,
        )
    kinds: dict[KvLayer, list[int]] = {}
    for place, layer in enumerate(_equal_pages(layers)):
        kinds.setdefault(layer, []).append(place)
    counts = [len(places) for places in kinds.values()]
    size = max(counts) if 2 * max(counts) < 3 * min(counts) else min(counts)
    groups, block_size = [], []
    for layer, places in kinds.items():
        number = ceil_div(len(places), size)
        groups += [tuple(places[first::number]) for first in range(number)]
        block_size += [layer.block_size] * number
    page = next(iter(kinds)).page_bytes
    return KvGroups(groups=tuple(groups), block_size=tuple(block_size), blocks=available_bytes // page // size)


def _all_full(layers: Sequence[KvLayer]) -> list[KvLayer]:
    """Windows and chunks kept as if they saw all tokens, beside layers that do; alone as they are."""
    windows = {layer.window for layer in layers if layer.window}
    if len(windows) <= 1 and not any(layer.kind == "full" for layer in layers):
        return list(layers)
    if len(windows) > 1:
        raise InputError(
            f"windows of {' and '.join(map(str, sorted(windows)))} tokens cannot be kept as full attention together; "
            "keep windows apart"
        )
    return [replace(layer, kind="full", window=0) if layer.window else layer for layer in layers]


def _equal_pages(layers: Sequence[KvLayer]) -> list[KvLayer]:
    """Layers with pages of the largest's size, by blocks of more tokens."""
    largest = max(layer.page_bytes for layer in layers)
    equal = []
    for layer in layers:
        times, rest = divmod(largest, layer.page_bytes)
        if times > 1 and layer.kind == "state":
            raise InputError(f"a state of {layer.page_bytes} bytes does not fill a page of {largest}; pad it to that")
        if rest:
            raise InputError(f"pages of {layer.page_bytes} bytes do not divide one of {largest}: no common size")
        equal.append(replace(layer, block_size=times * layer.block_size, page_bytes=largest))
    return equal
