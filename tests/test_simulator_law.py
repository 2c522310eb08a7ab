"""apex_opt.simulator.law: the time of a batch, by hand and against counting pairs one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.errors import UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator.law import RATE_BITS, TABLES, BatchLaw, Window, check_laws, linear_law
from apex_opt.simulator.outcome import BatchCounts

SEATS, TOKENS = 4, 16
ENGINE = EngineSettings(max_num_seqs=SEATS, max_num_batched_tokens=TOKENS, max_model_len=64)
BY_TOKENS = {"mixed_ns", "chunk_ns", "pair_rate", "chunk_context_rate", "transfer_ns", "verify_ns"}
NS = 1 << RATE_BITS
"""A rate of one nanosecond."""


def law(*, copies: int = 1, draft_tokens: int = 0, **tables: Any) -> BatchLaw:
    """A law that is zero but for the tables given, each a number for all entries or a mapping of some."""
    arrays = {}
    for name in TABLES:
        array = np.zeros((TOKENS if name in BY_TOKENS else SEATS) + 1, np.int64)
        given_entries = tables.get(name, 0)
        if isinstance(given_entries, dict):
            for index, value in given_entries.items():
                array[index] = value
        else:
            array[:] = given_entries
        arrays[name] = array
    return BatchLaw(**arrays, copies=copies, draft_tokens=draft_tokens)


def test_pure_decoding_reads_the_decode_tables_at_the_number_of_sequences() -> None:
    decode = law(decode_ns={3: 100}, context_rate={3: 2 * NS}, mixed_ns=7000, sequence_ns=7000, attend_ns=7000)
    assert decode.batch_ns([(1, 5), (1, 6), (1, 10)]) == 100 + 2 * (5 + 6 + 10)


def test_rows_of_a_token_and_its_drafts_read_their_context_once_and_drafts_are_made_where_a_row_yields() -> None:
    drafting = law(
        draft_tokens=2,
        decode_ns={2: 100},
        verify_ns={5: 40},
        context_rate={2: 2 * NS, 1: 3 * NS},
        draft_ns={2: 7},
        draft_rate={2: NS},
        mixed_ns={7: 1000},
        pair_rate={4: NS},
    )
    assert drafting.batch_ns([(3, 5), (2, 6)], yields=False) == 100 + 40 + 2 * (5 + 6)
    assert drafting.batch_ns([(3, 5), (2, 6)]) == 100 + 40 + 2 * (5 + 6) + 7 + 5 + 6
    assert drafting.batch_ns([(3, 5), (4, 6)], yields=False) == 1000 + 3 * 5 + (3 + 4 + 5 + 6)
    assert drafting.batch_ns([(3, 5), (4, 6)]) == 1000 + 3 * 5 + (3 + 4 + 5 + 6) + 7 + 5 + 6


def test_a_prompt_of_one_token_counts_as_decoding() -> None:
    decode = law(decode_ns={1: 100, 2: 110}, context_rate=NS, mixed_ns=7000)
    assert decode.batch_ns([(1, 1)]) == 101
    assert decode.batch_ns([(1, 1), (1, 9)]) == 120


def test_a_mixed_batch_adds_tokens_sequences_decoders_their_context_and_each_chunk() -> None:
    mixed = law(
        decode_ns=7000,
        mixed_ns={9: 1000},
        sequence_ns={4: 200},
        attend_ns={2: 30},
        context_rate={2: 3 * NS},
        chunk_ns={3: 4, 4: 5},
        pair_rate={3: NS, 4: 2 * NS},
        chunk_context_rate={3: 10 * NS, 4: 100 * NS},
    )
    # Two decoders that hold 11 and 7; a whole prompt of 3 (1 + 2 + 3 pairs); 4 tokens up to 10 (7 + 8 + 9 + 10).
    expected = 1000 + 200 + 30 + 3 * (11 + 7) + (4 + 6 + 10 * 3) + (5 + 2 * 34 + 100 * 10)
    assert mixed.batch_ns([(1, 11), (3, 3), (4, 10), (1, 7)]) == expected


def test_a_batch_without_decoders_pays_attention_at_zero() -> None:
    assert law(attend_ns={0: 50}, mixed_ns={5: 1}, sequence_ns={1: 3}).batch_ns([(5, 5)]) == 54


@given(st.integers(2, TOKENS), st.integers(0, 40))
def test_pairs_of_a_chunk_are_those_of_causal_attention(c: int, before: int) -> None:
    held = before + c
    pairs = sum(1 for query in range(before, held) for key in range(held) if key <= query)
    assert law(pair_rate=NS).batch_ns([(c, held)]) == pairs
    counts = BatchCounts.empty(ENGINE)
    counts.add([(c, held)])
    assert counts.chunk_pairs[c] == pairs


def test_rates_round_down_once_for_all_decoders_and_once_per_chunk() -> None:
    third = law(context_rate=NS // 2, chunk_context_rate=NS // 2)
    assert third.batch_ns([(1, 3), (1, 4)]) == 3
    assert third.batch_ns([(1, 3), (1, 4), (2, 3), (2, 5)]) == 3 + 1 + 2


@pytest.mark.parametrize(
    ("copies", "prompts"), [(1, 10 + 11 + 11), (2, 16), (3, 10), (4, 10)], ids=["1", "2", "3", "more than chunks"]
)
def test_attention_copies_share_the_chunks_but_no_more_than_there_are(copies: int, prompts: int) -> None:
    shared = law(copies=copies, chunk_ns={2: 10, 3: 11}, mixed_ns=1000)
    assert shared.batch_ns([(2, 2), (3, 3), (3, 3), (1, 8)]) == 1000 + prompts


def test_copies_leave_decoding_alone() -> None:
    assert law(copies=4, decode_ns=40, context_rate=NS).batch_ns([(1, 4), (1, 6)]) == 50


@given(
    st.tuples(*[st.integers(0, 50)] * 3),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 30)), min_size=1, max_size=SEATS),
)
def test_linear_law_is_linear_in_tokens_and_context(terms: tuple[int, int, int], rows: list[tuple[int, int]]) -> None:
    base, token, context = terms
    linear = linear_law(
        base_ns=base, token_ns=token, context_ns=context, max_num_seqs=SEATS, max_num_batched_tokens=TOKENS
    )
    chunks = [(c, before + c) for c, before in rows]
    expected = base + token * sum(c for c, _ in chunks) + context * sum(held for _, held in chunks)
    assert linear.batch_ns(chunks) == expected
    sizes = {name: len(getattr(linear, name)) for name in TABLES[:9]}
    assert sizes == {name: (TOKENS if name in BY_TOKENS else SEATS) + 1 for name in sizes}
    assert linear.scaled(7).batch_ns(chunks) == 7 * expected


def test_scaling_multiplies_every_table_and_keeps_copies() -> None:
    tables = {name: i + 2 for i, name in enumerate(TABLES)}
    one = law(copies=3, **tables)
    three = one.scaled(3)
    assert three.copies == 3
    for name, value in tables.items():
        assert set(getattr(three, name).tolist()) == {3 * value}, name
        assert set(getattr(one, name).tolist()) == {value}, name


@given(st.lists(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 30)), min_size=1, max_size=SEATS), max_size=6))
def test_counts_times_tables_are_the_time_of_all_batches(plans: list[list[tuple[int, int]]]) -> None:
    """The promise of `BatchCounts`, for rates that do not round and one copy."""
    rng = np.random.default_rng(5)
    used = law()
    by_seats, by_tokens = rng.integers(0, 99, (4, SEATS + 1)), rng.integers(0, 99, (4, TOKENS + 1))
    used = replace(
        used,
        decode_ns=by_seats[0],
        sequence_ns=by_seats[1],
        attend_ns=by_seats[2],
        context_rate=by_seats[3] * NS,
        mixed_ns=by_tokens[0],
        chunk_ns=by_tokens[1],
        pair_rate=by_tokens[2] * NS,
        chunk_context_rate=by_tokens[3] * NS,
    )
    counts, total, tokens = BatchCounts.empty(ENGINE), 0, 0
    for plan in plans:
        chunks = [(c, before + c) for c, before in plan]
        counts.add(chunks)
        total += used.batch_ns(chunks)
        tokens += sum(c for c, _ in chunks)
    summed = (
        counts.decode @ used.decode_ns
        + (counts.decode_context + counts.attend_context) @ by_seats[3]
        + counts.sequences @ used.sequence_ns
        + counts.attend @ used.attend_ns
        + counts.mixed @ used.mixed_ns
        + counts.chunk @ used.chunk_ns
        + counts.chunk_pairs @ by_tokens[2]
        + counts.chunk_context @ by_tokens[3]
    )
    assert summed == total
    assert counts.tokens == tokens


def test_windows_charge_what_is_seen_of_the_context_by_hand() -> None:
    used = replace(
        law(decode_ns={2: 100}, context_rate={2: NS}, pair_rate={3: NS}),
        windows=(Window(4), Window(8)),
        seen_rate=np.array([[10 * NS] * (SEATS + 1), [100 * NS] * (SEATS + 1)]),
        seen_pair_rate=np.array([[10 * NS] * (TOKENS + 1), [100 * NS] * (TOKENS + 1)]),
    )
    # Two sequences hold 5 + 6 tokens: 2 x 4 of them are seen through the first window at most, all through the other.
    assert used.batch_ns([(1, 5), (1, 6)]) == 100 + 11 + 10 * 8 + 100 * 11
    # The charge goes by the sum: 2 + 9 are charged as 5 + 6 are, where each on its own would see 2 + 4.
    assert used.batch_ns([(1, 2), (1, 9)]) == used.batch_ns([(1, 5), (1, 6)])
    # A chunk of 3 after 6: queries 7, 8 and 9 see all; 4 each; 7, 8 and 8.
    assert used.batch_ns([(3, 9)]) == (7 + 8 + 9) + 10 * (4 + 4 + 4) + 100 * (7 + 8 + 8)


@pytest.mark.parametrize("chunked", [False, True])
@given(tokens=st.integers(1, 9), held=st.integers(1, 40), chunk=st.integers(1, 40))
def test_pairs_within_a_window_are_those_that_each_query_sees(
    *, chunked: bool, tokens: int, held: int, chunk: int
) -> None:
    window, c = Window(tokens, chunked), min(chunk, held)
    sees = [place % tokens + 1 if chunked else min(place + 1, tokens) for place in range(held)]
    assert window.pairs(c, held) == sum(sees[held - c :])
    assert window.seen(np.array([held]))[0] == sees[-1]
    assert Window.of(window.stamp) == window


def test_counts_of_windows_times_their_rates_are_the_time() -> None:
    rng = np.random.default_rng(3)
    windows = (Window(5), Window(7, True))
    used = replace(
        law(),
        windows=windows,
        seen_rate=rng.integers(0, 9, (2, SEATS + 1)) * NS,
        seen_pair_rate=rng.integers(0, 9, (2, TOKENS + 1)) * NS,
    )
    counts, total = BatchCounts.empty(ENGINE, 2), 0
    for chunks in ([(1, 4), (1, 20)], [(3, 9), (1, 30)], [(4, 4), (2, 11)], [(1, 3)]):
        counts.add(chunks, windows=windows)
        total += used.batch_ns(chunks)
    assert (counts.seen_context * used.seen_rate).sum() + (counts.seen_pairs * used.seen_pair_rate).sum() == total * NS


def test_stages_with_other_windows_and_tables_of_windows_too_short_are_refused() -> None:
    limits = {"max_num_seqs": SEATS, "max_num_batched_tokens": TOKENS, "longest": 9, "held": 9}
    rates = {"seen_rate": np.zeros((1, SEATS + 1), np.int64), "seen_pair_rate": np.zeros((1, TOKENS + 1), np.int64)}
    one = replace(law(), windows=(Window(4),), **rates)
    check_laws([one, one], **limits)
    with pytest.raises(UsageError, match="stage 1: the law has the windows"):
        check_laws([one, law()], **limits)
    with pytest.raises(UsageError, match="seen_pair_rate has 2 entries"):
        check_laws([replace(one, seen_pair_rate=np.zeros((1, 2), np.int64))], **limits)
    most = np.full((1, SEATS + 1), 1 << 60)
    with pytest.raises(UsageError, match="decode attention of this plan and trace would overflow"):
        check_laws([replace(one, seen_rate=most)], **limits)


def test_counts_add_up_and_differ_where_they_do() -> None:
    one, other, sum_of_both = (BatchCounts.empty(ENGINE) for _ in range(3))
    for counts, chunks in ((one, [(1, 4)]), (other, [(3, 9), (1, 2)])):
        counts.add(chunks)
        sum_of_both.add(chunks)
    assert (one + other).equals(sum_of_both)
    assert not one.equals(other)
