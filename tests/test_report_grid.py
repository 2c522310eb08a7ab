"""Tables at any width: no line is too long, no figure is broken, and nothing vanishes without a word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from apex_opt.report.grid import RULE, broken, grid

HEADS = ("#", "plan", "GPUs", "TTFT p95", "kJ", "MFU")
ROWS = [
    ("1", "dp2 attn(tp4) ffn(tp4) bf16", "8", "85.8 ms", "1,130.1", "3.4%"),
    ("2", "attn(tp8) ffn(dp2,tp4) bf16 kv=fp8", "8", "1,046.3 ms", "900.1", "13.4%"),
]


def test_what_fits_is_a_line_each_with_text_on_the_left_and_figures_on_the_right() -> None:
    found = grid(HEADS, ROWS, 80, {1})
    assert found.heads == ["#  plan                                GPUs    TTFT p95       kJ    MFU", RULE * 71]
    assert found.rows == [
        "1  dp2 attn(tp4) ffn(tp4) bf16            8     85.8 ms  1,130.1   3.4%",
        "2  attn(tp8) ffn(dp2,tp4) bf16 kv=fp8     8  1,046.3 ms    900.1  13.4%",
    ]
    assert found.left_out == []


def test_heads_stand_over_each_other_before_a_column_is_left_out() -> None:
    heads, rows = ("name", "mean prompt", "mean output"), [("chat", "220", "218")]
    found = grid(heads, rows, 20, {0}, {0})
    assert found.heads == ["        mean    mean", "name  prompt  output", RULE * 20]
    assert grid(heads, rows, 19, {0}, {0}).left_out == ["mean output"]


def test_columns_that_may_go_go_from_the_right_and_are_named() -> None:
    shown = {width: grid(HEADS, ROWS, width, {1}, {0, 1, 3}) for width in (72, 66, 58, 50)}
    assert [found.left_out for found in shown.values()] == [[], ["MFU"], ["kJ", "MFU"], ["GPUs", "kJ", "MFU"]]
    for found in shown.values():
        assert [line.split()[0] for line in found.rows] == ["1", "2"], "a line each"


def test_text_is_broken_between_words_once_nothing_more_may_go() -> None:
    found = grid(HEADS, ROWS, 36, {1}, {0, 1, 3})
    assert found.heads == ["#  plan                     TTFT p95", RULE * 36]
    assert found.rows == [
        "1  dp2 attn(tp4)             85.8 ms",
        "   ffn(tp4) bf16",
        "2  attn(tp8)              1,046.3 ms",
        "   ffn(dp2,tp4) bf16",
        "   kv=fp8",
    ]


def test_rows_stand_one_below_the_other_where_figures_have_no_room() -> None:
    found = grid(HEADS, ROWS, 28, {1}, {0, 1, 2, 3})
    assert found.heads == found.left_out == []
    assert found.rows == [
        "1 dp2 attn(tp4) ffn(tp4)",
        "  bf16",
        "  GPUs: 8;",
        "  TTFT p95: 85.8 ms;",
        "  kJ: 1,130.1; MFU: 3.4%",
        "2 attn(tp8) ffn(dp2,tp4)",
        "  bf16 kv=fp8",
        "  GPUs: 8;",
        "  TTFT p95: 1,046.3 ms;",
        "  kJ: 900.1; MFU: 13.4%",
    ]


def test_a_few_rows_of_figures_become_columns() -> None:
    heads, rows = ("", "mean", "p50", "p95"), [("TTFT", "1.0 ms", "2.0 ms", "3.0 ms"), ("TPOT", "4 s", "5 s", "6 s")]
    found = grid(heads, rows, 20, {0}, turned=True)
    assert found.heads == ["        TTFT  TPOT", RULE * 18]
    assert found.rows == ["mean  1.0 ms   4 s", "p50   2.0 ms   5 s", "p95   3.0 ms   6 s"]
    assert grid(heads, rows, 40, {0}, turned=True).heads[0].split() == ["mean", "p50", "p95"]


def test_a_word_too_long_for_its_line_is_broken_after_a_sign() -> None:
    assert broken("measured (profiles/h100-sxm/nccl-2.29.2/collective.npz)", 24) == [
        "measured",
        "(profiles/h100-sxm/",
        "nccl-2.29.2/",
        "collective.npz)",
    ]
    assert broken('--slo="ttft_p95<=82ms,tpot_p95<=19.2ms"', 28) == ['--slo="ttft_p95<=82ms,', 'tpot_p95<=19.2ms"']
    assert broken("seqs_and_tokens_of_batches", 12) == ["seqs_and_", "tokens_of_", "batches"]
    assert broken("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]
    assert broken("  indented words here", 12) == ["  indented", "  words here"]
    assert broken("", 5) == [""]


def test_wide_characters_are_counted_as_they_are_shown() -> None:
    found = grid(("name", "n"), [("中文名字", "1"), ("short", "22")], 40, {0})
    assert [cell_len(line) for line in found.rows] == [12, 12]
    assert all(cell_len(line) <= 6 for line in broken("中文名字中文名字", 6))


@given(
    st.lists(
        st.tuples(*[st.text(st.characters(codec="ascii", categories=("L", "N", "P", "Zs")), max_size=30)] * 4),
        min_size=1,
        max_size=4,
    ),
    st.integers(40, 120),
    st.sampled_from([None, frozenset({0}), frozenset({0, 2})]),
    st.booleans(),
)
def test_no_line_is_longer_than_the_width_and_no_cell_is_lost(
    rows: list[tuple[str, ...]], width: int, kept: frozenset[int] | None, turned: bool
) -> None:
    heads = ("first", "second one", "third", "fourth")
    found = grid(heads, rows, width, {0, 1}, kept, turned=turned)
    assert all(cell_len(line) <= width for line in (*found.heads, *found.rows))
    assert kept is not None or found.left_out == []
    told = [place for place, head in enumerate(heads) if head not in found.left_out]
    joined = "".join("".join((*found.heads, *found.rows)).split())
    for row in rows:
        for place in told:
            assert set("".join(row[place].split())) <= set(joined)


@pytest.mark.parametrize("width", [40, 50, 80, 120, 200])
def test_figures_are_never_broken(width: int) -> None:
    for kept in (None, {0, 1}, {0, 1, 3}):
        found = grid(HEADS, ROWS, width, {1}, kept)
        text = "\n".join(found.rows)
        for row in ROWS:
            for place in (2, 3, 4, 5):
                assert row[place] in text or HEADS[place] in found.left_out
