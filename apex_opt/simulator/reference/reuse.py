"""KV blocks of TensorRT-LLM with block reuse: which of them hold what, as a tree.

Source: NVIDIA/TensorRT-LLM, `cpp/tensorrt_llm/batch_manager/kvCacheManager.cpp` and `evictionPolicy.cpp` of the 1.2
line and after, `tensorrt_llm/_torch/pyexecutor/resource_manager.py`, read and not run, in our own words. Whole blocks
are reused, as with `enable_partial_reuse: false`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from apex_opt.simulator.reference.blocks import BlockManager

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from apex_opt.simulator.reference.sequence import Sequence

_ROOT: Final = -1


class ReusedBlocks(BlockManager):
    """A block in the tree stands under the one that holds what comes before it, and is found from the root on.

    Free blocks queue up in the order in which they were given back, a sequence's last block first, and the front one is
    handed out next. With it all that stands under it leaves the tree, as it can be found no more. Of equal content the
    block that was stored first is in the tree; what another sequence stores next stands under that one.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        super().__init__(blocks, block_size)
        self._queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))
        self._users = [0] * blocks
        self._place: list[tuple[int, int] | None] = [None] * blocks  # the block above, and the content
        self._under: dict[int, dict[int, int]] = {block: {} for block in range(_ROOT, blocks)}

    def found(self, sequence: Sequence) -> list[int]:
        # The last known token is always computed again: the next token comes from it.
        return self._walk(sequence.keys[: (sequence.known - 1) // self.block_size])

    def new_content(self, sequence: Sequence) -> int | None:
        """The first whole block of a sequence that is not in the tree."""
        keys = sequence.keys[: sequence.known // self.block_size]
        there = len(self._walk(keys))
        return keys[there] if there < len(keys) else None

    def used(self, found: Seq[int]) -> int:
        """How many of these blocks somebody has, so that having them too takes no free ones."""
        return sum(self._users[block] > 0 for block in found)

    def claim(self, sequence: Sequence, found: Seq[int]) -> None:
        """Give a sequence that has none these blocks of the tree."""
        for block in found:
            self._queue.pop(block, None)
            self._users[block] += 1
        sequence.table = [*found]
        sequence.blocks = len(found)
        self.free = len(self._queue)

    def take(self, sequence: Sequence, tokens: int, found: Seq[int] = ()) -> None:
        assert not found
        for _ in range(self.needed(sequence, tokens)):
            block, _ = self._queue.popitem(last=False)
            self._leave(block)
            self._users[block] = 1
            sequence.table.append(block)
        sequence.blocks = len(sequence.table)
        self.free = len(self._queue)

    def register(self, sequence: Sequence, tokens: int) -> None:
        above, known = _ROOT, True
        for key, block in zip(sequence.keys[: tokens // self.block_size], sequence.table, strict=False):
            there = self._under[above].get(key) if known else None
            if there is None:
                known = False
                self._under[above][key] = there = block
                self._place[block] = above, key
            above = there

    def release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.table):
            self._users[block] -= 1
            if self._users[block] == 0:
                self._queue[block] = None
        sequence.table = []
        sequence.blocks = 0
        self.free = len(self._queue)

    def _walk(self, keys: Seq[int]) -> list[int]:
        """Blocks that hold this, as far as they are in the tree."""
        above, found = _ROOT, list[int]()
        for key in keys:
            if (block := self._under[above].get(key)) is None:
                break
            found.append(block)
            above = block
        return found

    def _leave(self, block: int) -> None:
        """A block leaves the tree, with all that stands under it."""
        if (place := self._place[block]) is not None:
            del self._under[place[0]][place[1]]
        leaving = [block]
        while leaving:
            block = leaving.pop()
            self._place[block] = None
            leaving += self._under[block].values()
            self._under[block] = {}
