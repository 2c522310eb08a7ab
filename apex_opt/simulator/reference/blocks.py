"""KV blocks: how many are free, and with prefix caching which of them hold what.

Source: `BlockPool`, `KVCacheManager` and `FullAttentionManager` of vLLM 0.20.2, in our own words; recorded batches
with prefix caching settle it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from apex_opt.simulator.reference.sequence import Sequence


class BlockManager:
    """Blocks that are only counted: without prefix caching it does not matter which ones a sequence gets."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.free = blocks
        self.block_size = block_size

    def found(self, sequence: Sequence) -> list[int]:
        """Blocks that already hold the beginning of what a waiting sequence knows."""
        return []

    def needed(self, sequence: Sequence, tokens: int, found: Seq[int] = ()) -> int:
        """Free blocks it takes for a sequence to hold so many tokens, with those found.

        Parameters
        ----------
        sequence : Sequence        the request
        tokens : int               that must be held
        found : sequence of int    blocks found in the cache
        """
        return max(0, ceil_div(tokens, self.block_size) - sequence.blocks)

    def take(self, sequence: Sequence, tokens: int, found: Seq[int] = ()) -> None:
        """Hand out the needed blocks.

        Parameters
        ----------
        sequence : Sequence        the request
        tokens : int               that must be held
        found : sequence of int    blocks found in the cache
        """
        needed = self.needed(sequence, tokens)
        self.free -= needed
        sequence.blocks += needed

    def register(self, sequence: Sequence, tokens: int) -> None:
        """Note that the sequence's first `tokens` tokens can be found by others from now on."""

    def release(self, sequence: Sequence) -> None:
        """Give all blocks of a sequence back."""
        self.free += sequence.blocks
        sequence.blocks = 0


class PrefixCachingManager(BlockManager):
    """Full blocks stay findable by their content, prefix included, until their memory is handed out again.

    Free blocks queue up in the order they were freed, a sequence's last block first; the front one is handed out next
    and forgotten. Content is known as soon as it is scheduled. Equal content may sit in several blocks, as two
    sequences can compute it side by side; the one registered first is found.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        super().__init__(blocks, block_size)
        self._queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._users = [0] * blocks
        self._content: list[int | None] = [None] * blocks
        self._holders: dict[int, OrderedDict[int, None]] = {}

    def found(self, sequence: Sequence) -> list[int]:
        # The last known token is always computed again: the next token comes from it.
        blocks: list[int] = []
        for key in sequence.keys[: (sequence.known - 1) // self.block_size]:
            holders = self._holders.get(key)
            if not holders:
                break
            blocks.append(next(iter(holders)))
        return blocks

    def needed(self, sequence: Sequence, tokens: int, found: Seq[int] = ()) -> int:
        unused = sum(self._users[block] == 0 for block in found)  # these leave the queue as well
        return ceil_div(tokens, self.block_size) - sequence.blocks - len(found) + unused

    def take(self, sequence: Sequence, tokens: int, found: Seq[int] = ()) -> None:
        for block in found:
            if self._users[block] == 0:
                del self._queue[block]
            self._users[block] += 1
        fresh = []
        for _ in range(ceil_div(tokens, self.block_size) - sequence.blocks - len(found)):
            block, _ = self._queue.popitem(last=False)
            self._forget(block)
            self._users[block] = 1
            fresh.append(block)
        if not sequence.blocks:
            sequence.registered = len(found)
        sequence.table += [*found, *fresh]
        sequence.blocks = len(sequence.table)
        self.free = len(self._queue)

    def register(self, sequence: Sequence, tokens: int) -> None:
        full = tokens // self.block_size
        for index in range(sequence.registered, full):
            block, key = sequence.table[index], sequence.keys[index]
            self._content[block] = key
            self._holders.setdefault(key, OrderedDict())[block] = None
        sequence.registered = max(sequence.registered, full)

    def release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.table):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._queue[block] = None
        sequence.table = []
        sequence.blocks = 0
        sequence.registered = 0
        self.free = len(self._queue)

    def _forget(self, block: int) -> None:
        key = self._content[block]
        if key is not None:
            holders = self._holders[key]
            del holders[block]
            if not holders:
                del self._holders[key]
            self._content[block] = None
