"""What prompts say, as content ids: read from Mooncake traces, described by shared prefixes, carried along."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_opt.errors import ApexError, InputError, UsageError
from apex_opt.workload import Trace, describe_trace, load_trace, make_trace, trace_jsonl

if TYPE_CHECKING:
    from pathlib import Path

Says = list[list[int]]


def says(trace: Trace) -> Says:
    """The content ids of every request."""
    assert trace.content is not None and trace.content_starts is not None
    return [trace.content[start:end].tolist() for start, end in pairwise(trace.content_starts.tolist())]


def made(prompts: list[int], content: Any, tokens: Any = 4, arrival: list[int] | None = None, **more: Any) -> Trace:
    return make_trace(
        name="t",
        arrival_ns=arrival or [0] * len(prompts),
        prompt=prompts,
        output=[1] * len(prompts),
        content=content,
        content_tokens=tokens,
        **more,
    )


def line(error: ApexError) -> str:
    text = str(error)
    assert "\n" not in text
    return text


# Traces.


@st.composite
def spoken(draw: st.DrawFn) -> tuple[list[int], list[int], Says, int]:
    """Arrivals in any order, prompts, their pieces and the tokens of a piece."""
    tokens = draw(st.integers(1, 8))
    rows = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), min_size=1, max_size=12))
    ids = st.integers(-(1 << 63), (1 << 63) - 1)
    content = [draw(st.lists(ids, min_size=(n := -(-p // tokens)), max_size=n)) for _, p in rows]
    return [a for a, _ in rows], [p for _, p in rows], content, tokens


@settings(max_examples=100)
@given(spoken(), st.booleans())
def test_content_is_sorted_along_with_the_requests(
    spoken: tuple[list[int], list[int], Says, int], as_arrays: bool
) -> None:
    arrival, prompts, content, tokens = spoken
    given_ids: Any = [np.array(ids, np.int64) for ids in content] if as_arrays else content
    trace = made(prompts, given_ids, tokens, [1000 * a for a in arrival])
    order = sorted(range(len(prompts)), key=lambda i: arrival[i])
    assert trace.prompt.tolist() == [prompts[i] for i in order]
    assert says(trace) == [content[i] for i in order]
    assert trace.content_tokens == tokens


@settings(max_examples=60)
@given(spoken(), st.data())
def test_stretched_and_cut_traces_say_the_same(
    spoken: tuple[list[int], list[int], Says, int], data: st.DataObject
) -> None:
    arrival, prompts, content, tokens = spoken
    trace = made(prompts, content, tokens, [1000 * a for a in arrival])
    n = data.draw(st.integers(1, len(trace)))
    for other, count in ((trace.stretched(data.draw(st.floats(0.01, 100))), len(trace)), (trace.head(n), n)):
        assert says(other) == says(trace)[:count]
        assert other.content_tokens == tokens
        assert other.prompt.tolist() == trace.prompt.tolist()[:count]


def test_a_closed_loop_keeps_its_order_and_what_it_says() -> None:
    trace = made([5, 4], [[1, 2], [3]], 4, [9, 3], concurrency=2)
    assert says(trace) == says(trace.head(2)) == [[1, 2], [3]]
    assert says(trace.head(1)) == [[1, 2]]


def test_a_trace_without_content_stays_without() -> None:
    trace = make_trace(name="t", arrival_ns=[0, 1], prompt=[5, 5], output=[1, 1], content_tokens=7)
    for other in (trace, trace.head(1), trace.stretched(2)):
        assert (other.content, other.content_starts, other.content_tokens) == (None, None, 0)


def test_content_is_copied_and_read_only() -> None:
    ids = np.array([1, 2], np.int64)
    trace = made([8], [ids])
    ids[0] = 9
    assert says(trace) == [[1, 2]]
    for column in (trace.content, trace.content_starts):
        assert column is not None and not column.flags.writeable and column.dtype == np.int64


@pytest.mark.parametrize(
    ("content", "tokens", "message"),
    [
        ([[1, 2], [3]], 4, r"row 2: 1 content ids for a prompt of 5 tokens; give one per 4"),
        ([[1, 2, 3], []], 4, r"row 1: 3 content ids .* prompt of 8 .*; row 2: 0 content ids"),
        ([[1, 2]], 4, "content must be a list of ids for each of 2 requests"),
        ([[1, 2], [3, 4], [5]], 4, "content must be a list of ids for each of 2 requests"),
        (7, 4, "content must be a list of ids for each of 2 requests"),
        ([[1, 2], 3], 4, "content of row 2: id must be a list of whole numbers, got 3"),
        ([[1, 2], "ab"], 4, "content of row 2: id must be a list of whole numbers, got 'ab'"),
        ([[1, 2], [3, 1.5]], 4, "content of row 2: piece 2: id 1.5 is not a whole number"),
        ([[1, True], [3, 4]], 4, "content of row 1: piece 2: id True is not a whole number"),
        ([[1, 2], [3, 1 << 63]], 4, r"content of row 2: piece 2: id \d+ is not a whole number below 2\*\*63"),
        ([[1, 2], [3, float("nan")]], 4, "content of row 2: piece 2: id nan"),
        ([[1, 2], [3, 4]], 0, "content_tokens must be a whole number from 1 to 10,000,000, got 0"),
        ([[1, 2], [3, 4]], 4.0, "content_tokens must be a whole number"),
        ([[1, 2], [3, 4]], True, "content_tokens must be a whole number"),
    ],
)
def test_content_that_does_not_fit_is_refused_with_the_row_as_given(content: Any, tokens: Any, message: str) -> None:
    """The second row arrives first: rows count as they were given."""
    with pytest.raises(InputError, match=f"^trace t[:,].*{message}") as caught:
        made([8, 5], content, tokens, [9, 0])
    line(caught.value)


def frozen(values: list[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    column = np.array(values, np.int64)
    column.flags.writeable = False
    return column


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"content_tokens": 0}, "content_tokens must be a whole number from 1"),
        ({"content_tokens": 5}, "row 1: 3 content ids for a prompt of 9 tokens; give one per 5"),
        ({"content": None}, "content, content_starts and content_tokens go together"),
        ({"content_starts": None}, "content, content_starts and content_tokens go together"),
        ({"content": None, "content_starts": None}, "content, content_starts and content_tokens go together"),
        ({"content": np.array([1, 2, 3, 4])}, "content must be contiguous and read-only"),
        ({"content_starts": frozen([0, 3])}, "content_starts must lead from 0 to 4"),
        ({"content_starts": frozen([0, 3, 5])}, "content_starts must lead from 0 to 4"),
        ({"content_starts": frozen([1, 3, 4])}, "content_starts must lead from 0 to 4"),
        ({"content_starts": frozen([0, 2, 4])}, "row 1: 2 content ids for a prompt of 9 tokens"),
        ({"content_starts": frozen([0, 9, 4])}, "row 1: 9 content ids for a prompt of 9 tokens"),
        ({"prompt": frozen([13, 4])}, "row 1: 3 content ids for a prompt of 13 tokens"),
    ],
)
def test_a_trace_checks_its_own_content(changes: dict[str, Any], message: str) -> None:
    trace = made([9, 4], [[1, 2, 3], [4]])
    with pytest.raises(InputError, match=message) as caught:
        replace(trace, **changes)
    line(caught.value)


def test_content_may_be_dropped_from_a_trace() -> None:
    assert replace(made([4], [[1]]), content=None, content_starts=None, content_tokens=0).content is None


# Mooncake files.


def mooncake(folder: Path, rows: list[dict[str, Any]] | str) -> str:
    path = folder / "mooncake.jsonl"
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


def row(at: int, tokens: int, ids: Any = None) -> dict[str, Any]:
    entry = {"timestamp": at, "input_length": tokens, "output_length": 7}
    return entry if ids is None else entry | {"hash_ids": ids}


def test_hash_ids_become_content_of_512_tokens_each_in_order_of_arrival(tmp_path: Path) -> None:
    rows = [row(20, 1025, [3, 4, 5]), row(10, 512, [3]), row(10, 513, [3, 0]), row(0, 1, [1 << 61])]
    trace = load_trace(mooncake(tmp_path, rows))
    assert says(trace) == [[1 << 61], [3], [3, 0], [3, 4, 5]]
    assert trace.content_tokens == 512
    assert trace.prompt.tolist() == [1, 512, 513, 1025]
    assert trace.arrival_ns.tolist() == [0, 10_000_000, 10_000_000, 20_000_000]


@pytest.mark.parametrize("lacking", [row(5, 600), row(5, 600, []), row(5, 600) | {"hash_ids": None}])
def test_hash_ids_that_a_request_lacks_are_left_out_for_all(lacking: dict[str, Any], tmp_path: Path) -> None:
    trace = load_trace(mooncake(tmp_path, [row(0, 600, [1, 2]), lacking]))
    assert (trace.content, trace.content_tokens, len(trace)) == (None, 0, 2)
    assert "some requests have hash_ids and others have none; give them to all" in trace.content_fault
    trace = load_trace(mooncake(tmp_path, [lacking, lacking]))
    assert (trace.content, trace.content_fault) == (None, "")


def test_other_layouts_have_no_hash_ids(tmp_path: Path) -> None:
    entry = {"arrival_s": 0, "prompt": 600, "output": 1, "hash_ids": [1, 2]}
    assert load_trace(mooncake(tmp_path, [entry])).content is None
    text = "timestamp,input_length,output_length,hash_ids\n0,600,7,[1]\n"
    assert load_trace(mooncake(tmp_path, text)).content is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1], "hash_ids are 1 for a prompt of 600 tokens, at 512 an id 2 are due; give the tokens"),
        ([1, 2, 3], "hash_ids are 3 for a prompt of 600 tokens, at 512 an id 2 are due"),
        ("1, 2", "hash_ids must be a list"),
        ({"1": 2}, "hash_ids must be a list"),
        (7, "hash_ids must be a list"),
        (True, "hash_ids must be a list"),
        ([1, 1.5], r"hash_ids must be whole numbers from 0 to 2\*\*62, got 1.5"),
        ([1, True], "hash_ids must be whole numbers .*, got true"),
        ([1, None], "hash_ids must be whole numbers .*, got null"),
        ([1, [2]], "hash_ids must be whole numbers .*, got list"),
        ([1, "x"], "hash_ids must be whole numbers .*, got x"),
        ([1, float("nan")], "hash_ids must be whole numbers .*, got NaN"),
        ([1, -1], "hash_ids must be whole numbers .*, got -1"),
        ([1, 1 << 62], r"hash_ids must be whole numbers .*, got 4611686018427387904"),
        ([1, 10**300], r"hash_ids must be whole numbers .*, got 1000"),
    ],
)
def test_hash_ids_that_do_not_fit_leave_the_lengths_and_say_why(ids: Any, message: str, tmp_path: Path) -> None:
    rows = [row(9, 600, [1, 2]), row(0, 600, ids)]
    trace = load_trace(mooncake(tmp_path, rows))
    assert re.search(f"line 2: {message}", trace.content_fault) and "\n" not in trace.content_fault
    assert trace.prompt.tolist() == [600, 600] and trace.content is None
    assert trace.head(1).content_fault == trace.content_fault


@pytest.mark.parametrize(("name", "block"), [("t.jsonl", 256), ("t_blksz_256.jsonl", None), ("t_blksz_16.jsonl", 256)])
def test_the_tokens_of_a_hash_id_may_be_given_or_stand_in_the_name(
    tmp_path: Path, name: str, block: int | None
) -> None:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row(i, 655 + i, [0, 1, 2 + i])) + "\n" for i in range(3)))
    trace = load_trace(str(path), block=block)
    assert (says(trace), trace.content_tokens) == ([[0, 1, 2], [0, 1, 3], [0, 1, 4]], 256)


def test_bad_lengths_are_reported_before_hash_ids_that_depend_on_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: input_length 0 is outside") as caught:
        load_trace(mooncake(tmp_path, [row(0, 0, [1]), row(0, 600, [1])]))
    assert "hash_ids" not in line(caught.value)


def test_a_trace_with_content_is_written_without_it(tmp_path: Path) -> None:
    """The format that we write has no place for it."""
    trace = load_trace(mooncake(tmp_path, [row(0, 600, [1, 2]), row(1, 600, [1, 3])]))
    again = load_trace(mooncake(tmp_path, trace_jsonl(trace)))
    assert again.prompt.tolist() == [600, 600] and again.content is None


@pytest.mark.data
def test_the_public_conversation_trace_says_how_its_prompts_begin(shared: Path) -> None:
    path = shared / "traces" / "mooncake" / "conversation_trace.jsonl"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    trace = load_trace(str(path))
    said = says(trace)
    assert (len(trace), trace.content_tokens) == (12_031, 512)
    entries = [json.loads(text) for text in path.read_text().splitlines()]
    entries.sort(key=lambda entry: entry["timestamp"])
    assert said == [entry["hash_ids"] for entry in entries]
    assert all(len(ids) == -(-p // 512) for ids, p in zip(said, trace.prompt.tolist(), strict=True))
    # An id stands for all before it too, so that it has one place and one predecessor wherever it occurs.
    places = {piece: (at, ids[at - 1] if at else None) for ids in said for at, piece in enumerate(ids)}
    assert all(places[piece] == (at, ids[at - 1] if at else None) for ids in said for at, piece in enumerate(ids))
    # More than a third of all pieces have been said before.
    assert trace.content is not None
    assert len(places) < 2 / 3 * trace.content.size


# Described prefixes.


def described(text: str, seed: int = 0) -> Trace:
    return describe_trace(f"static:n=200,{text}", seed)


def shared_pieces(ids: list[int], owned: set[int]) -> int:
    """How many pieces at the beginning are not this request's alone; the others must all be."""
    count = next((at for at, piece in enumerate(ids) if piece in owned), len(ids))
    assert all(piece in owned for piece in ids[count:])
    return count


@pytest.mark.parametrize(("tokens", "groups"), [(512, 10), (16, 1), (100, 3), (15, 2), (1, 1), (10_000, 4), (64, 5000)])
def test_prompts_of_a_group_begin_alike_and_go_on_by_themselves(tokens: int, groups: int) -> None:
    trace = described(f"prompt=uniform(1,900),prefix=({tokens},{groups})")
    said = says(trace)
    assert trace.content_tokens == 16
    prefixes: dict[int, list[int]] = {}
    own: list[int] = []
    for ids, prompt in zip(said, trace.prompt.tolist(), strict=True):
        assert len(ids) == -(-prompt // 16)
        shared = min(tokens, prompt - 1) // 16  # whole pieces, and not all of the prompt
        own += ids[shared:]
        if shared:
            # The first piece names the group; prefixes of one group are beginnings of each other.
            longest = prefixes.setdefault(ids[0], ids[:shared])
            both = min(len(longest), shared)
            assert longest[:both] == ids[:both]
            prefixes[ids[0]] = max(longest, ids[:shared], key=len)
    assert len(set(own)) == len(own)
    pieces = [piece for ids in prefixes.values() for piece in ids]
    assert len(set(pieces)) == len(pieces) and not set(pieces) & set(own)
    assert len(prefixes) <= groups
    if groups <= 10 and tokens >= 16:
        assert len(prefixes) == groups, "200 requests meet every group"


def test_a_prompt_that_the_prefix_would_fill_keeps_its_last_piece() -> None:
    said = says(described("prompt=32,prefix=(32,1)"))
    assert {ids[0] for ids in said} == {0}
    assert len({ids[1] for ids in said}) == 200
    assert {tuple(ids[:2]) for ids in says(described("prompt=33,prefix=(32,1)"))} == {(0, 1)}


def test_groups_are_drawn_evenly_and_by_the_seed() -> None:
    counts = np.bincount([ids[0] // 32 for ids in says(described("prompt=600,prefix=(512,4)"))])
    assert counts.sum() == 200 and counts.min() > 25
    first = says(described("prompt=600,prefix=(512,4)"))
    assert says(described("prompt=600,prefix=(512,4)")) == first
    assert says(described("prompt=600,prefix=(512,4)", 1)) != first
    assert says(described("prompt=600,prefix=(512,4),seed=1")) == says(described("prompt=600,prefix=(512,4)", 1))


@pytest.mark.parametrize(
    "spec",
    [
        "poisson:rate=2,n=50,prompt=lognormal(mean=512,sigma=1,max=8192),output=exponential(64)",
        "gamma:rate=2,cv=3,n=50,prompt=normal(512,100),output=128",
        "closed:concurrency=4,n=50,prompt=uniform(10,900),output=uniform(1,9)",
    ],
)
def test_a_prefix_changes_neither_arrivals_nor_lengths(spec: str) -> None:
    plain, prefixed = describe_trace(spec, 3), describe_trace(f"{spec},prefix=(256,5)", 3)
    assert plain.content is None and prefixed.content is not None
    for name in ("arrival_ns", "prompt", "output"):
        assert np.array_equal(getattr(plain, name), getattr(prefixed, name)), name
    assert plain.concurrency == prefixed.concurrency


def test_a_prefix_may_stand_anywhere_in_a_description() -> None:
    one, other = (
        describe_trace("static:prefix=(64,2),n=9,prompt=100"),
        describe_trace("static:n=9,prompt=100,prefix=(64,2)"),
    )
    assert says(one) == says(other)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("(512)", r"prefix=\(512\) must be prefix=\(TOKENS,GROUPS\), such as prefix=\(512,10\)"),
        ("512", "must be prefix="),
        ("(512,10,3)", "must be prefix="),
        ("(a,b)", "must be prefix="),
        ("(1.5,2)", "must be prefix="),
        ("(-16,2)", "must be prefix="),
        ("(512,)", "must be prefix="),
        ("()", "must be prefix="),
        ("(9999999999,1)", "must be prefix="),
        ("(٥١٢,10)", "prefix tokens must be a whole number from 1 to 10,000,000"),
        ("(0,10)", "prefix tokens must be a whole number from 1 to 10,000,000, got 0"),
        ("(10000001,10)", "prefix tokens must be a whole number from 1 to 10,000,000"),
        ("(512,0)", "prefix groups must be a whole number from 1 to 5,000,000, got 0"),
        ("(512,5000001)", "prefix groups must be a whole number from 1 to 5,000,000"),
        ("((512,10))", "must be prefix="),
        ("(512,10", "a parenthesis is not closed"),
        ("512,10)", "a parenthesis closes that was not opened"),
        ("", "prefix has no value"),
    ],
)
def test_a_malformed_prefix_is_refused_in_one_line(prefix: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        describe_trace(f"static:n=5,prefix={prefix}")
    line(caught.value)


def test_a_prefix_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="prefix is given twice"):
        describe_trace("static:n=5,prefix=(16,1),prefix=(16,1)")
