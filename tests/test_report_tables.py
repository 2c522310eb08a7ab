"""Tables: the figures of the document, neat at any width, nothing of a name taken for markup."""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import pytest

from apex_opt.report.tables import rendered

LATENCY = {"mean": 0.0426, "p50": 0.0387, "p90": 0.057, "p95": 0.0688, "p99": 0.0945, "max": 0.1939}
OPERATIONS = {f"operation {n}": 20.0 / 2**n for n in range(14)}

CANDIDATE: dict[str, Any] = {
    "plan": "dp2 pp2[41,39] attn(tp2) ffn(tp2) bf16",
    "gpus": 8,
    "value": 2.51,
    "then": [],
    "bound": 2.0,
    "metrics": {
        "ttft_s": LATENCY,
        "tpot_s": dict.fromkeys(LATENCY, None),
        "e2e_s": {name: 100 * value for name, value in LATENCY.items()},
        "makespan_s": 258.96,
        "throughput_rps": 3.862,
        "output_tokens_per_s": 842.4,
        "total_tokens_per_s": 1690.2,
        "slo": {
            "ttft_p95<=50ms": {"met": False, "reached": 0.0688, "attainment": 0.81, "unit": "s"},
            "e2e<=9s@90%": {"met": True, "reached": 0.95, "attainment": 0.95, "unit": "share"},
            "throughput>=1": {"met": True, "reached": 3.862, "attainment": 1.0, "unit": "requests/s"},
        },
        "energy_j": 907_654.0,
        "idle_energy_j": 259_000.0,
        "energy_per_output_token_j": 4.157,
        "mean_power_w": 3505.3,
        "mfu": 0.035,
        "mbu": 0.476,
        "operations_s": {**OPERATIONS, "idle": 0.0},
        "preemptions": 1,
        "batches": 22_920,
    },
    "memory": [
        {
            "layers": layers,
            "weights_bytes": 17_600_000_000,
            "workspace_bytes": 1_000_000_000,
            "runtime_bytes": 1_342_177_280,
            "kv_blocks": 86_999,
            "kv_block_bytes": 655_360,
            "usable_bytes": 77_000_000_000,
        }
        for layers in (41, 39)
    ],
}

DOCUMENT: dict[str, Any] = {
    "command": "plan",
    "status": "optimal",
    "objective": {"name": "e2e_mean", "unit": "s", "direction": "minimise", "tolerance": 0.0, "value": 2.51},
    "then": [],
    "reason": None,
    "best": CANDIDATE,
    "candidates": [CANDIDATE, {**CANDIDATE, "plan": "dp2 attn(dp2,tp2) ffn(dp2,tp2) w4a16 kv=fp8"}],
    "certificate": {
        "space": 1131,
        "infeasible": {"divisibility": 26, "format": 0, "memory": 40},
        "bounded": 1049,
        "repeated": 0,
        "out_of_reach": 40,
        "least_bound": 8.1,
        "incumbent": 7.53,
        "simulated": 16,
        "left": 0,
        "cut_short": 3,
        "missed": 2,
        "optimal": True,
        "gap": 0.0,
        "before": [],
    },
    "question": {
        "model": {"name": "llama-3.1-70b", "parameters": 70_553_706_496},
        "cluster": {"name": "8xh100-sxm-80gb", "gpu": "h100-sxm-80gb"},
        "trace": {"name": "[bold]odd[/bold]", "requests": 1000, "concurrency": None, "rate_per_s": 3.92},
    },
    "provenance": {"gemm": "derived from a datasheet", "power": "measured " * 30},
    "version": "0",
}


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))


def answer(**changes: Any) -> str:
    """The document with some parts replaced, as text."""
    return rendered({**copy.deepcopy(DOCUMENT), **changes})


def block(text: str, title: str) -> list[str]:
    """Lines of the table with this title, up to the empty line after it."""
    lines = text.splitlines()
    start = lines.index(title)
    return lines[start + 1 : lines.index("", start)]


def test_the_head_says_what_was_asked_and_found() -> None:
    head = answer().splitlines()[:2]
    assert head[0] == (
        "llama-3.1-70b (70.6 B parameters) on 8xh100-sxm-80gb, trace [bold]odd[/bold] (1,000 requests, 3.92 requests/s)"
    )
    assert head[1] == "best plan: dp2 pp2[41,39] attn(tp2) ffn(tp2) bf16 on 8 GPUs, e2e_mean = 2.51 s"


def test_a_closed_loop_and_a_single_request_are_told_as_such() -> None:
    trace = {"name": "t", "requests": 1, "concurrency": 8, "rate_per_s": None}
    assert "trace t (1 request, 8 clients)" in answer(question={**DOCUMENT["question"], "trace": trace})
    trace = {"name": "t", "requests": 2, "concurrency": None, "rate_per_s": None}
    assert "trace t (2 requests, all at once)" in answer(question={**DOCUMENT["question"], "trace": trace})


def test_latencies_are_a_row_each_with_every_statistic() -> None:
    table = block(answer(), "Latency")
    assert table[0].split() == ["mean", "p50", "p90", "p95", "p99", "max"]
    assert table[2].split() == [
        "TTFT",
        "42.6",
        "ms",
        "38.7",
        "ms",
        "57.0",
        "ms",
        "68.8",
        "ms",
        "94.5",
        "ms",
        "193.9",
        "ms",
    ]
    assert table[3].split() == ["TPOT", *["-"] * 6]
    assert " ".join(table[4].split()) == "E2E 4.26 s 3.87 s 5.70 s 6.88 s 9.45 s 19.39 s"


def test_goals_show_verdict_limit_and_what_was_reached() -> None:
    service = [" ".join(line.split()) for line in block(answer(), "Service")]
    assert service == [
        "SLO ttft_p95<=50ms: MISSED, 68.8 ms reached, 81.0% of requests within",
        "SLO e2e<=9s@90%: met, 95.0% of requests within",
        "SLO throughput>=1: met, 3.862 requests/s",
        "throughput 3.862 requests/s, 842 output tokens/s, 1,690 tokens/s in all",
        "makespan 258.96 s",
        "energy 907.7 kJ, of which 259.0 kJ idle draw; 4.16 J per output token; 3,505 W mean",
        "utilisation MFU 3.5%, MBU 47.6%",
        "batches 22,920, 1 preemption",
    ]


def test_memory_is_a_row_per_stage() -> None:
    table = block(answer(), "Memory per GPU, GB")
    assert table[2].split() == ["0", "41", "17.6", "1.0", "1.3", "57.0", "86,999", "77.0"]
    assert table[3].split() == ["1", "39", "17.6", "1.0", "1.3", "57.0", "86,999", "77.0"]


def test_operations_add_up_with_the_short_ones_together_and_idle_last() -> None:
    rows = [line.split("  ") for line in block(answer(), "Time by operation, mean per GPU")[2:]]
    names = [row[0] for row in rows]
    assert names == [*list(OPERATIONS)[:12], "other", "idle"]
    cells = [[cell for cell in row if cell.strip()] for row in rows]
    assert cells[12][1].strip() == f"{1e3 * sum(list(OPERATIONS.values())[12:]):.1f} ms"
    assert [cell.strip() for cell in cells[13][1:]] == ["0.0 us", "0.0%"]
    assert sum(float(cell[2].strip().rstrip("%")) for cell in cells) == pytest.approx(100, abs=1)


def test_idle_is_shown_when_it_is_the_longest() -> None:
    best = copy.deepcopy(CANDIDATE)
    best["metrics"]["operations_s"] = {"idle": 9.0, "qkv": 1.0}
    rows = block(answer(best=best), "Time by operation, mean per GPU")[2:]
    assert [row.split()[0] for row in rows] == ["qkv", "idle"]
    assert "90.0%" in rows[1]


def test_the_certificate_counts_every_plan() -> None:
    text = " ".join(answer().split())
    assert (
        "Certificate: 1,131 plans in the space; 66 infeasible (26 divisibility, 40 memory); 1,049 ruled out by a "
        "bound (40 miss an SLO, at best 8.10 s, those shown have 7.53 s or better); "
        "16 simulated (3 cut short, 2 missed an SLO): every plan is accounted for, gap 0.0%."
    ) in text
    one = {**DOCUMENT["certificate"], "space": 1, "optimal": False, "gap": None}
    text = " ".join(answer(certificate=one).split())
    assert "1 plan in the space" in text
    assert "the space was not exhausted." in text


def test_a_plan_that_was_given_claims_no_proof() -> None:
    text = answer(command="simulate", status="feasible", candidates=[CANDIDATE])
    assert "plan as given: dp2 pp2[41,39]" in text
    assert "Certificate" not in text
    assert "Candidates" not in text
    assert "scored as given" in text


def test_an_infeasible_answer_shows_its_reason() -> None:
    text = answer(
        status="infeasible", best=None, candidates=[], reason="70B needs 146 GB, pp2[41,39] offers [red]43[/]"
    )
    assert "infeasible: 70B needs 146 GB, pp2[41,39] offers [red]43[/]" in text
    assert "Latency" not in text
    assert "Certificate" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 132, 200])
def test_no_line_is_wider_than_the_terminal_nor_ends_in_blanks(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = answer().splitlines()
    assert all(len(line) <= width for line in lines)
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("width", [80, 100, 120, 140, 200])
def test_candidates_lose_columns_but_never_one_with_a_goal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    table = block(answer(), "Candidates")
    rule = next(place for place, line in enumerate(table) if set(line) == {"─"})
    goals = ("TTFT p95", "e2e<=9s", "req/s")
    full = ["GPUs", "TPOT p95", "E2E p95", "kJ", "MFU", "MBU"]
    text = "\n".join(table)
    _, _, left = text.partition("left out for lack of width: ")
    left_out = " ".join(left.split()).split(", ") if left else []
    assert left_out == full[len(full) - len(left_out) :]
    assert all(goal not in left_out for goal in goals)
    assert {word for goal in goals for word in goal.split()} <= {word for line in table[:rule] for word in line.split()}
    assert bool(left_out) == (width < 132)
    for rank, candidate in enumerate(DOCUMENT["candidates"], 1):
        if width >= 100:
            assert f"{rank}  {candidate['plan']} " in text


def test_plans_that_differ_in_limits_which_change_no_figure_are_told_once() -> None:
    metrics = {**CANDIDATE["metrics"], "makespan_s": 300.0}
    plans = ("tp8 seqs=1024 clock=990", "tp8 seqs=256 clock=990", "tp8 seqs=64 clock=990", "tp8 seqs=64", "tp4 seqs=64")
    slower = {2: {"metrics": metrics}}
    candidates = [{**CANDIDATE, "plan": plan, **slower.get(place, {})} for place, plan in enumerate(plans)]
    text = answer(candidates=candidates)
    _, _, *rows = block(text, "Candidates")
    assert [row.split()[:2] for row in rows if row[0].isdigit()] == [
        ["1", "tp8"],
        ["3", "tp8"],
        ["4", "tp8"],
        ["5", "tp4"],
    ]
    assert "all figures of 1 are the same with seqs=256\n" in text
    assert "all figures" not in answer()


@pytest.mark.parametrize("width", [40, 50])
def test_where_goals_have_no_room_candidates_are_told_one_below_the_other(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = block(answer(), "Candidates")
    text = " ".join(" ".join(lines).split())
    for rank, candidate in enumerate(DOCUMENT["candidates"], 1):
        assert f"{rank} {candidate['plan']} GPUs: 8; e2e_mean: 2.51 s; TTFT p95: 68.8 ms;" in text
    for told in ("TPOT p95: -", "E2E p95: 6.88 s", "e2e<=9s: 95.0%", "req/s: 3.86", "kJ: 907.7", "MBU: 47.6%"):
        assert text.count(told) == 2
        assert any(told in line for line in lines), "what belongs together stands in one line"
    assert "left out" not in text


def test_without_a_terminal_tables_are_plain() -> None:
    text = answer()
    assert "\x1b" not in text
    assert 100 < max(map(len, text.splitlines())) <= 120


def test_an_encoding_without_rules_gets_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert answer().isascii()


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.0, "s", "0.0 us"),
        (0.000_999_9, "s", "999.9 us"),
        (0.001, "s", "1.0 ms"),
        (1.0, "s", "1.00 s"),
        (12_345.6, "s", "12,346 s"),
        (None, "s", "-"),
        (907_654.0, "J", "907.7 kJ"),
        (3.862, "requests/s", "3.862 requests/s"),
        (1.2345, "J/token", "1.234 J/token"),
        (24.0, "$/h", "24.000 $/h"),
    ],
)
def test_figures_have_the_unit_that_suits_them(value: float | None, unit: str, expected: str) -> None:
    objective = {"name": "aim", "unit": unit, "direction": "minimise", "tolerance": 0.0, "value": value}
    assert f"aim = {expected}\n" in answer(objective=objective)


def test_several_objectives_are_told_with_their_tolerances_and_each_has_a_column_and_a_proof() -> None:
    energy = {"name": "energy", "unit": "J", "direction": "minimise", "tolerance": 0.02, "value": 907_654.0}
    then = {"name": "e2e_p99.9", "unit": "s", "direction": "minimise", "tolerance": 0.0, "value": 2.5}
    before = {**DOCUMENT["certificate"], "simulated": 7, "cut_short": 0, "missed": 0}
    candidates = [{**candidate, "value": 907_654.0, "then": [2.5]} for candidate in DOCUMENT["candidates"]]
    text = answer(
        objective=energy,
        then=[then],
        candidates=candidates,
        certificate={**DOCUMENT["certificate"], "before": [before]},
    )
    flat = " ".join(text.split())
    assert "energy = 907.7 kJ (at most 2% from the best), e2e_p99.9 = 2.50 s Candidates" in flat
    _, head, _, first, *_ = block(text, "Candidates")
    assert head.split()[3:5] == ["energy", "e2e_p99.9"]
    assert "907.7 kJ     2.50 s" in first
    assert "Certificate of the best energy: 1,131 plans in the space" in flat
    assert "7 simulated: every plan" in flat
    assert "16 simulated (3 cut short, 2 missed an SLO): every plan" in flat


def test_costs_goodput_and_times_between_tokens_have_their_place_where_they_are_known() -> None:
    metrics = {
        **CANDIDATE["metrics"],
        "itl_s": LATENCY,
        "goodput_rps": 3.5,
        "cost_usd_per_h": 24.0,
        "cost_usd_per_mtoken": 2.0216,
        "slo": {
            "goodput>=3": {"met": True, "reached": 3.5, "attainment": 1.0, "unit": "requests/s"},
            "energy_per_token<=2J": {"met": False, "reached": 4.157, "attainment": 0.0, "unit": "J/token"},
            "itl<=50ms@99%": {"met": True, "reached": 0.995, "attainment": 0.995, "unit": "share"},
            "itl_p99<=80ms": {"met": True, "reached": 0.0431, "attainment": 0.997, "unit": "s"},
        },
    }
    text = answer(best={**CANDIDATE, "metrics": metrics})
    assert [line.split()[0] for line in block(text, "Latency")[2:]] == ["TTFT", "TPOT", "ITL", "E2E"]
    service = [" ".join(line.split()) for line in block(text, "Service")]
    assert service[:4] == [
        "SLO goodput>=3: met, 3.500 requests/s",
        "SLO energy_per_token<=2J: MISSED, 4.157 J/token",
        "SLO itl<=50ms@99%: met, 99.5% of gaps within",
        "SLO itl_p99<=80ms: met, 43.1 ms reached, 99.7% of gaps within",
    ]
    assert "goodput 3.500 requests/s whose own latencies are within the goals, 90.6% of all" in service
    assert "cost 24.00 $/h; 2.022 $ per million output tokens" in service


def test_lists_have_a_row_for_each_thing_named() -> None:
    cluster = {
        "cluster": "8xv",
        "gpu": "v[1]",
        "memory_bytes": 16 * 2**30,
        "memory_bytes_per_s": 9e11,
        "bf16_flops_per_s": None,
        "fp16_flops_per_s": 1.12e14,
        "fp8_flops_per_s": None,
        "fp4_flops_per_s": None,
        "tdp_w": 1000,
        "link": "pcie",
        "link_bytes_per_s": 16e9,
        "profile": "derived from the datasheet",
    }
    text = rendered({"status": "ok", "clusters": [cluster], "version": "0"})
    row = " ".join(text.splitlines()[2].split())
    assert text.split("\n")[0].split() == (
        ["GPU", "one", "node", "memory", "TB/s", "16-bit", "TFLOPS", "fp8", "fp4", "limit", "link", "figures"]
    )
    assert row == "v[1] 8xv 16 GiB 0.90 112 - - 1,000 W pcie 16 GB/s derived"


def test_titles_of_traces_wrap_rather_than_vanish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    trace = {
        "name": "chat",
        "requests": 1000,
        "rate_per_s": 3.92,
        "prompt_mean": 220.4,
        "output_mean": 218.2,
        "longest": 4147,
        "title": "Chat: short prompts with a long tail, answers as long, 4 requests/s",
    }
    lines = rendered({"status": "ok", "traces": [trace], "version": "0"}).splitlines()
    assert lines[3].split()[:6] == ["chat", "1,000", "3.92", "220", "218", "4,147"]
    assert "requests/s" in " ".join(lines[3:])
    assert all(len(line) <= 80 for line in lines)


def test_a_stage_that_keeps_nothing_has_no_count_of_blocks() -> None:
    stage = CANDIDATE["memory"][0] | {"kv_block_bytes": 0, "kv_blocks": 1 << 40}
    table = block(answer(best={**CANDIDATE, "memory": [stage]}), "Memory per GPU, GB")
    assert table[2].split()[-3:-1] == ["0.0", "-"]


def test_a_rate_of_turns_that_wait_for_answers_says_so() -> None:
    trace = DOCUMENT["question"]["trace"] | {"waiting": 32}
    page = " ".join(answer(question={**DOCUMENT["question"], "trace": trace}).split())
    assert "(1,000 requests, 3.92 requests/s if answers came at once)" in page
