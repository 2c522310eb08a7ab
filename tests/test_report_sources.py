"""Where figures come from: every figure told once in full, and in each group that its text puts it into."""

from __future__ import annotations

import pytest

from apex_opt.report.sources import in_full, in_groups

ENGINE = "fitted on 18 runs of one H200; launch_us on public closed-loop runs of it; blocking_step_us assumed"
PARTLY = "measured on 2, 4 ranks (profiles/h100-sxm/nccl/collective.npz), other numbers derived"


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("measured (profiles/h100-sxm/vllm/gemm.npz)", {"measured"}),
        ("measured: fitted on the energies of 18 runs; narrow arithmetic by the ratio of gemm.csv", {"measured"}),
        ("published medians of one DGX H100", {"measured"}),
        ("derived: between the measured shapes of gemm.npz", {"derived"}),
        ("derived: scaled by power limit from h200: fitted on the energies of 18 runs", {"derived"}),
        ("derived from published times of two nodes, scaled by ranks", {"derived"}),
        ("measured (a); at 81% of the highest clock by published laws (derived)", {"measured", "derived"}),
        ("assumed: latency and share of the pcie link's rate", {"assumed"}),
        (PARTLY, {"measured", "derived"}),
        (ENGINE, {"measured", "assumed"}),
        ("$1.1 per GPU and hour; assumed: the order of cloud prices", {"assumed"}),
        ("$3 per GPU and hour; given: --price", {"given"}),
        ("$3 per GPU and hour; our contract", {"given"}),
    ],
)
def test_a_text_puts_its_figure_into_the_groups_it_speaks_of(text: str, groups: set[str]) -> None:
    rows = in_groups({"figure": text})
    assert {group for group in rows if group != "each"} == groups
    for group in groups:
        assert rows[group] == ("figure" if len(groups) == 1 else "in part figure")
    assert "--sources" in rows["each"]


def test_groups_tell_what_is_so_in_whole_before_what_is_so_in_part() -> None:
    rows = in_groups({"engine (vllm)": ENGINE, "all_reduce": PARTLY, "gemm": "measured (a)", "memory": "derived: b"})
    assert rows["measured"] == "gemm; in part engine (vllm), all_reduce"
    assert rows["derived"] == "memory; in part all_reduce"
    assert rows["assumed"] == "in part engine (vllm)"
    assert list(rows) == ["measured", "derived", "assumed", "each"]


def test_types_of_gpu_share_a_row_where_they_share_a_source() -> None:
    provenance = {"h100": {"gemm": "measured (a)", "engine": ENGINE}, "a100": {"gemm": "derived: b", "engine": ENGINE}}
    assert in_full(provenance) == {"h100, gemm": "measured (a)", "a100, gemm": "derived: b", "engine": ENGINE}
    assert in_groups(provenance)["measured"] == "in part gemm, engine"


def test_a_figure_told_of_several_gpus_is_named_once() -> None:
    rows = in_groups({"h100, gemm": "measured (a)", "l40s, gemm": "measured (b)", "l40s, power": "derived: c"})
    assert rows["measured"] == "gemm"
    assert rows["derived"] == "power"


def test_a_price_is_told_with_its_group() -> None:
    rows = in_groups(
        {"h100, price": "$2.5 per GPU and hour; assumed: cloud prices", "l40s, price": "$1 per GPU and hour; bill"}
    )
    assert rows["assumed"] == "price of h100 ($2.5 per GPU and hour)"
    assert rows["given"] == "price of l40s ($1 per GPU and hour)"
    assert in_groups({"price": "$1 per GPU and hour; bill"})["given"] == "price ($1 per GPU and hour)"
