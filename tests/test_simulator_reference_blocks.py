"""apex_opt.simulator.reference.blocks: which blocks are handed out, found and forgotten, against lists kept by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from apex_opt.simulator.reference.blocks import BlockManager, PrefixCachingManager
from apex_opt.simulator.reference.sequence import Sequence
from apex_opt.units import ceil_div


def sequence(keys: str = "", *, prompt: int = 100, number: int = 0) -> Sequence:
    """A sequence with a letter for each of its blocks."""
    return Sequence(id=number, prompt=prompt, output=100, limit=100, keys=[ord(letter) for letter in keys])


def admit(pool: PrefixCachingManager, keys: str, *, fresh: bool = False) -> Sequence:
    """Admit a prompt of whole blocks (two tokens each) and one token more, all of it computed."""
    new = sequence(keys, prompt=2 * len(keys) + 1)
    found = [] if fresh else pool.found(new)
    pool.take(new, new.prompt, found)
    pool.register(new, new.prompt)
    return new


# Blocks that are only counted.


def test_counted_blocks_are_taken_as_tokens_fill_them_and_all_given_back() -> None:
    pool, first, second = BlockManager(5, 4), sequence(), sequence()
    assert pool.found(first) == []
    assert [pool.needed(first, tokens) for tokens in (0, 1, 4, 5, 20, 21)] == [0, 1, 1, 2, 5, 6]
    pool.take(first, 4)
    pool.take(second, 5)
    assert (pool.free, first.blocks, second.blocks) == (2, 1, 2)
    assert pool.needed(second, 8) == 0 and pool.needed(second, 9) == 1
    assert pool.needed(second, 1) == 0
    pool.take(second, 1)
    assert second.blocks == 2
    pool.release(second)
    assert (pool.free, second.blocks) == (4, 0)
    pool.release(first)
    assert pool.free == 5


# Blocks with content.


def test_blocks_are_handed_out_in_order_and_a_sequences_last_one_comes_back_first() -> None:
    pool = PrefixCachingManager(6, 2)
    one, two = admit(pool, "ab"), admit(pool, "cd")
    assert (one.table, two.table, pool.free) == ([0, 1, 2], [3, 4, 5], 0)
    pool.release(one)
    pool.release(two)
    assert (one.table, one.blocks, pool.free) == ([], 0, 6)
    assert admit(pool, "vwxyz").table == [2, 1, 0, 5, 4, 3]


def test_the_block_that_was_freed_longest_ago_is_overwritten_first() -> None:
    pool = PrefixCachingManager(6, 2)
    first, second = admit(pool, "a"), admit(pool, "b")
    pool.release(second)
    pool.release(first)
    # Two were never used, then come 3 and 2 of the second and 1 and 0 of the first.
    third = admit(pool, "xyz")
    assert third.table == [4, 5, 3, 2]
    assert pool.found(sequence("b")) == []
    assert pool.found(sequence("a")) == [0]


def test_a_found_block_is_shared_and_stays_until_its_last_user_is_gone() -> None:
    pool = PrefixCachingManager(7, 2)
    one, two = admit(pool, "ab"), admit(pool, "abc")
    assert one.table == [0, 1, 2] and two.table == [0, 1, 3, 4] and pool.free == 2
    pool.release(one)
    assert pool.free == 3
    assert admit(pool, "xy").table == [5, 6, 2]
    assert pool.found(sequence("abc")) == [0, 1, 3]
    pool.release(two)
    assert pool.free == 4


def test_a_free_block_that_is_found_leaves_the_queue_and_counts_as_needed() -> None:
    pool = PrefixCachingManager(3, 2)
    pool.release(admit(pool, "ab"))
    again = sequence("ab", prompt=5)
    found = pool.found(again)
    assert found == [0, 1]
    assert pool.needed(again, 5, found) == 3 == pool.free
    pool.take(again, 5, found)
    assert again.table == [0, 1, 2] and pool.free == 0
    other = sequence("ab", prompt=5)
    assert pool.needed(other, 5, pool.found(other)) == 1  # two in use are shared


def test_the_last_known_token_is_never_found() -> None:
    pool = PrefixCachingManager(9, 2)
    admit(pool, "abc")
    for prompt, blocks in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3)):
        assert len(pool.found(sequence("abc", prompt=prompt))) == blocks
    answered = sequence("abc", prompt=2)
    answered.generated = 3
    assert len(pool.found(answered)) == 2


def test_what_is_found_ends_at_the_first_gap() -> None:
    pool = PrefixCachingManager(20, 2)
    admit(pool, "ab")
    assert pool.found(sequence("axb")) == [0]
    assert pool.found(sequence("xb")) == []


def test_equal_content_may_sit_twice_and_the_one_registered_first_is_found() -> None:
    pool = PrefixCachingManager(6, 2)
    one, two = admit(pool, "a"), admit(pool, "a", fresh=True)
    assert one.table == [0, 1] and two.table == [2, 3]
    assert pool.found(sequence("a")) == [0]
    pool.release(one)
    # 4 and 5 were never used; 1 and 0 follow, so block 0 is overwritten and 2 is left.
    assert admit(pool, "xyz").table == [4, 5, 1, 0]
    assert pool.found(sequence("a")) == [2]


def test_content_registered_again_is_found_behind_what_was_there() -> None:
    """Block 0 is overwritten and gets the same content anew: 2 is older now."""
    pool = PrefixCachingManager(4, 2)
    one, two = admit(pool, "a"), admit(pool, "a", fresh=True)
    pool.release(one)
    three = sequence("za", prompt=3)
    pool.take(three, 4)
    assert three.table == [1, 0]
    assert pool.found(sequence("a")) == [2]
    pool.register(three, 4)
    assert pool.found(sequence("a")) == [2]
    pool.release(two)
    assert pool.free == 2


def test_only_full_blocks_are_registered_and_each_once() -> None:
    pool = PrefixCachingManager(4, 2)
    growing = sequence("ab", prompt=4)
    pool.take(growing, 3)
    pool.register(growing, 1)
    assert (pool.found(sequence("ab")), growing.registered) == ([], 0)
    pool.register(growing, 3)
    assert (pool.found(sequence("ab")), growing.registered) == ([0], 1)
    pool.take(growing, 4)
    pool.register(growing, 4)
    pool.register(growing, 2)
    assert (pool.found(sequence("ab")), growing.registered) == ([0, 1], 2)


def test_a_released_sequence_starts_over() -> None:
    pool = PrefixCachingManager(4, 2)
    one = admit(pool, "ab")
    pool.release(one)
    assert (one.registered, one.blocks, one.table) == (0, 0, [])
    found = pool.found(one)
    pool.take(one, 5, found)
    assert one.registered == 2 == len(found)


# Any order of events.


@dataclass
class Kept:
    """The same pool as plain lists: slow, and too simple to be wrong."""

    size: int
    queue: list[int]
    held: list[tuple[int, int]] = field(default_factory=list)  # (content, block), the oldest first
    tables: dict[int, list[int]] = field(default_factory=dict)

    def holder(self, key: int) -> int | None:
        return next((block for content, block in self.held if content == key), None)

    def users(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables.values())

    def beginning(self, keys: list[int], known: int) -> list[int]:
        blocks = []
        for key in keys[: (known - 1) // self.size]:
            block = self.holder(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def hand_out(self, number: int, found: list[int], fresh: int) -> None:
        for block in found:
            if block in self.queue:
                self.queue.remove(block)
        taken, self.queue = self.queue[:fresh], self.queue[fresh:]
        self.held = [(content, block) for content, block in self.held if block not in taken]
        self.tables[number] = self.tables.get(number, []) + found + taken

    def give_back(self, number: int) -> None:
        for block in reversed(self.tables.pop(number)):
            if self.users(block) == 0:
                self.queue.append(block)


class Pools(RuleBasedStateMachine):
    """Sequences come, grow and go in any order; block by block both pools must agree."""

    @initialize(blocks=st.integers(1, 12), size=st.integers(1, 3))
    def begin(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        self.pool = PrefixCachingManager(blocks, size)
        self.kept = Kept(size=size, queue=list(range(blocks)))
        self.live: list[Sequence] = []
        self.number = 0

    @rule(words=st.text("ab", min_size=1, max_size=8), rest=st.integers(0, 2), share=st.integers(1, 3))
    def admit(self, words: str, rest: int, share: int) -> None:
        # Keys stand for content with its prefix, as `content.BlockContent` numbers it.
        keys = [int(words[: j + 1].translate({97: "1", 98: "2"})) for j in range(len(words))]
        prompt = max(1, self.size * len(words) + rest % self.size - (rest == 2))
        new = Sequence(id=self.number, prompt=prompt, output=99, limit=99, keys=[*keys, *self.answer()])
        found = self.pool.found(new)
        assert found == self.kept.beginning(keys, prompt)
        unused = sum(block in self.kept.queue for block in found)
        tokens = max(len(found) * self.size + 1, prompt // share)
        fresh = ceil_div(tokens, self.size) - len(found)
        assert self.pool.needed(new, tokens, found) == fresh + unused
        if fresh + unused > self.pool.free:
            return
        self.number += 1
        self.pool.take(new, tokens, found)
        self.kept.hand_out(new.id, found, fresh)
        new.computed = tokens
        self.live.append(new)
        self.note(new)

    def answer(self) -> list[int]:
        """Content of blocks that nobody else has."""
        return [-10 * self.number - j for j in range(1, 7)]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.integers(1, 4))
    def grow(self, data: st.DataObject, more: int) -> None:
        grown = data.draw(st.sampled_from(self.live))
        tokens = min(grown.computed + more, self.size * len(grown.keys))
        fresh = max(0, ceil_div(tokens, self.size) - len(grown.table))
        assert self.pool.needed(grown, tokens) == ceil_div(tokens, self.size) - len(grown.table) == fresh
        if fresh > self.pool.free:
            return
        self.pool.take(grown, tokens)
        self.kept.hand_out(grown.id, [], fresh)
        grown.computed = tokens
        self.note(grown)

    def note(self, who: Sequence) -> None:
        """Register what is full now."""
        before = who.registered
        self.pool.register(who, who.computed)
        assert who.registered == max(before, who.computed // self.size)
        for index in range(before, who.registered):
            self.kept.held.append((who.keys[index], who.table[index]))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.live))
        self.live.remove(gone)
        self.pool.release(gone)
        self.kept.give_back(gone.id)
        assert gone.table == [] and gone.blocks == 0

    @invariant()
    def agree(self) -> None:
        assert self.pool.free == len(self.kept.queue)
        assert 0 <= self.pool.free <= self.blocks
        assert {who.id: who.table for who in self.live} == self.kept.tables
        assert all(who.blocks == len(who.table) for who in self.live)
        used = {block for who in self.live for block in who.table}
        assert self.pool.free + len(used) == self.blocks
        assert not used & set(self.kept.queue)

    def teardown(self) -> None:
        """Everything goes back; what was in the queue comes out in its order."""
        for who in getattr(self, "live", []):
            self.pool.release(who)
            self.kept.give_back(who.id)
        if hasattr(self, "pool"):
            everything = sequence()
            self.pool.take(everything, self.blocks * self.size)
            assert everything.table == self.kept.queue and self.pool.free == 0


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=150, stateful_step_count=40)


@pytest.mark.parametrize("kind", [BlockManager, PrefixCachingManager])
def test_a_pool_starts_with_all_its_blocks(kind: type[BlockManager]) -> None:
    assert kind(7, 4).free == 7
