"""apex_opt.simulator.content: keys of blocks are equal exactly where everything up to the end of the block is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import requests

from apex_opt.errors import UsageError
from apex_opt.simulator.content import BlockContent, number_pieces
from apex_opt.simulator.pack.blocks import number_pieces as compiled
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.workload import Trace

Texts = list[list[int]]


def columns(texts: Texts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    starts = np.concatenate(([0], np.cumsum([len(text) for text in texts]))).astype(np.int64)
    return starts, np.array([piece for text in texts for piece in text], np.int64)


ids = st.one_of(st.integers(0, 2), st.integers(0, 2), st.integers(-(1 << 63), (1 << 63) - 1))
texts = st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=12)


@settings(max_examples=200)
@given(texts)
def test_pieces_have_one_number_exactly_where_all_before_them_are_equal_too(said: Texts) -> None:
    pieces, count = number_pieces(*columns(said))
    numbers = pieces.tolist()
    prefixes = [tuple(text[: end + 1]) for text in said for end in range(len(text))]
    assert count == len(set(prefixes))
    assert len(set(zip(numbers, prefixes, strict=True))) == count
    # In order of appearance, from 0.
    assert list(dict.fromkeys(numbers)) == list(range(count))


@settings(max_examples=200)
@given(texts)
def test_the_compiled_numbering_is_the_same(said: Texts) -> None:
    expected, count = number_pieces(*columns(said))
    pieces, counted = compiled(*columns(said))
    assert pieces.tolist() == expected.tolist() and counted == count


@pytest.mark.parametrize("seed", range(3))
def test_the_compiled_numbering_is_the_same_for_thousands_of_long_prompts(seed: int) -> None:
    """Shared beginnings, repeated and large ids: many of them meet in the hash table."""
    rng = np.random.default_rng(seed)
    said: Texts = []
    for _ in range(3000):
        before = said[rng.integers(len(said))] if said and rng.random() < 0.7 else []
        own = rng.integers(0, int(rng.choice([2, 1000, 1 << 62])), int(rng.integers(1, 12))).tolist()
        said.append((before[: rng.integers(len(before) + 1)] + own)[:40])
    expected, count = number_pieces(*columns(said))
    pieces, counted = compiled(*columns(said))
    assert np.array_equal(pieces, expected) and counted == count


@st.composite
def described(draw: st.DrawFn) -> tuple[Trace, int, list[int]]:
    """A trace, an engine's block size and how many tokens each request will generate."""
    size = draw(st.integers(1, 5))
    piece = size * draw(st.integers(1, 3))
    count = draw(st.integers(1, 6))
    prompts = draw(st.lists(st.integers(1, 24), min_size=count, max_size=count))
    limits = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    said = [draw(st.lists(st.integers(0, 2), min_size=(n := ceil_div(p, piece)), max_size=n)) for p in prompts]
    silent = draw(st.sampled_from((False, False, False, True)))
    content: dict[str, Any] = {} if silent else {"content": said, "content_tokens": piece}
    rows = [(0, p, o) for p, o in zip(prompts, limits, strict=True)]
    return requests(rows, **content), size, limits


def spoken(trace: Trace, limits: list[int]) -> list[list[tuple[int, int, int]]]:
    """Every request as the tokens it will hold: of pieces of its prompt, and of its own answer."""
    tokens: list[list[tuple[int, int, int]]] = []
    for i, (prompt, limit) in enumerate(zip(trace.prompt.tolist(), limits, strict=True)):
        if trace.content is None or trace.content_starts is None:
            mine = [(i, 1, j) for j in range(prompt)]
        else:
            said = trace.content[trace.content_starts[i] : trace.content_starts[i + 1]].tolist()
            mine = [(piece, 0, j) for piece in said for j in range(trace.content_tokens)][:prompt]
        tokens.append(mine + [(i, 2, j) for j in range(limit)])
    return tokens


@settings(max_examples=200)
@given(described())
def test_keys_are_equal_exactly_where_the_tokens_are_from_the_start_to_the_end_of_the_block(
    asked: tuple[Trace, int, list[int]],
) -> None:
    trace, size, limits = asked
    for content in (BlockContent.of(trace, size, limits), BlockContent.of(trace, size, np.array(limits), compiled)):
        meaning: dict[int, tuple[tuple[int, int, int], ...]] = {}
        keys: dict[tuple[tuple[int, int, int], ...], int] = {}
        for i, tokens in enumerate(spoken(trace, limits)):
            mine = content.keys(i)
            assert len(mine) == len(tokens) // size
            for j, key in enumerate(mine):
                block = tuple(tokens[: (j + 1) * size])
                assert 0 <= key < content.total
                assert meaning.setdefault(key, block) == block
                assert keys.setdefault(block, key) == key


@settings(max_examples=50)
@given(described())
def test_blocks_with_generated_tokens_belong_to_nobody_else(asked: tuple[Trace, int, list[int]]) -> None:
    trace, size, limits = asked
    content = BlockContent.of(trace, size, limits)
    own: list[int] = []
    for i, prompt in enumerate(trace.prompt.tolist()):
        own += content.keys(i)[(prompt // size if trace.content is not None else 0) :]
    assert len(set(own)) == len(own)
    shared = {
        key
        for i, prompt in enumerate(trace.prompt.tolist())
        for key in content.keys(i)[: prompt // size if trace.content is not None else 0]
    }
    assert not shared & set(own)


def test_keys_by_hand() -> None:
    """Pieces of four tokens, blocks of two: [7 7][8 8] and what follows; the last piece of request 1 is cut short."""
    trace = requests([(0, 8, 3), (0, 7, 4), (0, 4, 1)], content=[[7, 8], [7, 9], [8]], content_tokens=4)
    content = BlockContent.of(trace, 2, [3, 4, 1])
    assert content.pieces.tolist() == [0, 1, 0, 2, 3]
    assert content.shared_blocks.tolist() == [4, 3, 2]
    # Requests hold 11, 11 and 5 tokens: five full blocks, five and two.
    assert [content.keys(i) for i in range(3)] == [[0, 1, 2, 3, 8], [0, 1, 4, 9, 10], [6, 7]]
    assert content.total == 11


def test_a_trace_without_content_has_nothing_but_own_blocks() -> None:
    content = BlockContent.of(requests([(0, 8, 3), (0, 8, 3)]), 4, [3, 5])
    assert [content.keys(i) for i in range(2)] == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("size", [3, 5, 16, 64])
def test_a_block_size_that_does_not_divide_a_piece_is_refused_with_the_trace_and_the_way_out(size: int) -> None:
    trace = requests([(0, 40, 3)], content=[[7, 8]], content_tokens=32)
    if 32 % size == 0 or size % 32 == 0:
        assert len(BlockContent.of(trace, size, [3]).keys(0)) == 43 // size
        return
    with pytest.raises(
        UsageError, match=f"block_size {size} does not divide the 32 tokens of .* trace test, nor .*; choose"
    ):
        BlockContent.of(trace, size, [3])
