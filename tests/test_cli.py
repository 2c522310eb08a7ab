"""The command line from words to exit code: in this process, and in a few real ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cli_cases import CHEAP, ROOT, Once, both, run
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_cases import engine, recorded, write_runs
from measured_package import write_package
from rich.cells import cell_len

from apex_opt import cli, commands
from apex_opt.arguments import Ask, SimulateAsk
from apex_opt.cli import CONFIG_FILES
from apex_opt.cluster import load_cluster
from apex_opt.commands import Result
from apex_opt.cost import CostModel
from apex_opt.cost.engine import load_engine
from apex_opt.described import COMMANDS, GROUPS
from apex_opt.errors import InputError
from apex_opt.gate import Arguments, options_of
from apex_opt.ir import load_model
from apex_opt.ir.huggingface import QUANTISATION_FILES
from apex_opt.measured.silicon import NEEDED as SILICON_COLUMNS
from apex_opt.planned import resolve_plan
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import parse_plan
from apex_opt.report.listed import Models
from apex_opt.resolve import resolve
from apex_opt.search import Scorer
from apex_opt.workload import Trace, load_trace

if TYPE_CHECKING:
    from collections.abc import Callable

TRACES = Path(__file__).parent / "cases" / "traces"
ONE = {
    "plan": (),
    "energy": (),
    "pareto": (),
    "explain": (),
    "simulate": ("--plan=tp2",),
    "place": ("--plan=tp2",),
    "capacity": ("--slo=ttft_p95<=1s",),
    "study": ("--study=nowhere.toml",),
    "calibrate": ("--measured=runs",),
    "validate": ("--measured=runs",),
    "profile show": (),
    "profile distill": ("--source=nowhere",),
    "profile import": ("--kind=apex", "--source=nowhere", "--gpu=h100-sxm"),
    "profile collect": (),
    "profile fit": ("--measured=runs",),
    "cluster show": (),
    "cluster import": ("--source=nowhere",),
    "models": (),
    "clusters": (),
    "traces": (),
}


def refused(*words: str) -> str:
    """The one line on stderr of a run that is refused as bad input."""
    ran = run(*words)
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert ran.err.endswith("\n")
    return ran.err.removeprefix("error: ").rstrip("\n")


def answered_by(monkeypatch: pytest.MonkeyPatch, command: str, run: Callable[[Any], Any]) -> None:
    """A command is answered by this in place of what it does."""
    monkeypatch.setitem(commands.COMMANDS, command, commands.COMMANDS[command]._replace(run=run))


def noted_trace(monkeypatch: pytest.MonkeyPatch, note: str) -> None:
    """Every trace that is loaded has this to tell."""

    def noted(*given: Any, **more: Any) -> Trace:
        return replace(load_trace(*given, **more), notes=(note,))

    monkeypatch.setattr("apex_opt.resolve.load_trace", noted)


def two_types_in(folder: Path) -> str:
    """An option for two GPUs of one type beside one of another."""
    level = "gb_per_s = 32, latency_us = 1"
    nics = f'nics = {{ gpus = 1, {level}, kind = "infiniband" }}'
    nodes = [
        f'[[nodes]]\ngpu = "{gpu}"\ngpus = {gpus}\npcie = {{ {level} }}\n{nics}'
        for gpu, gpus in (("a100-sxm", 2), ("h100-sxm", 1))
    ]
    (folder / "mixed.toml").write_text("\n".join(nodes))
    return f"--cluster={folder}/mixed.toml"


@pytest.fixture
def two_types(tmp_path: Path) -> str:
    return two_types_in(tmp_path)


# ---- what comes out -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned() -> tuple[dict[str, Any], str]:
    """One problem answered twice: as a document and as tables."""
    words = ("plan", *CHEAP, "--slo=ttft_p95<=1s,tpot<=1s@90%,throughput>=0.001", "--top=3")
    document, table = both(*words)
    assert (document.code, table.code) == (0, 0)
    return json.loads(document.out), table.out


def test_json_is_one_document_with_everything(planned: tuple[dict[str, Any], str]) -> None:
    document, _ = planned
    assert {"status", "objective", "best", "candidates", "certificate", "provenance"} <= set(document)
    assert document["status"] == "optimal"
    assert document["best"]["plan"] == document["candidates"][0]["plan"]
    assert len(document["candidates"]) <= 3
    certificate = document["certificate"]
    assert {"space", "infeasible", "bounded", "simulated", "optimal", "gap"} <= set(certificate)
    assert {"divisibility", "format", "memory"} <= set(certificate["infeasible"])
    assert certificate["optimal"] is True
    known = certificate["bounded"] + certificate["repeated"] + certificate["simulated"]
    total = sum(certificate["infeasible"].values()) + known
    assert total == certificate["space"]


def test_tables_and_json_have_the_same_figures(planned: tuple[dict[str, Any], str]) -> None:
    document, table = planned
    best = document["best"]
    metrics = best["metrics"]
    rows = {line.split("  ")[0].strip(): line for line in reversed(table.splitlines())}  # latencies come first
    for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "E2E")):
        assert seconds_in(rows[name]) == [pytest.approx(value, rel=0.05) for value in metrics[key].values()]
    assert numbers_in(rows["throughput"]) == [
        pytest.approx(metrics[key], rel=0.01) for key in ("throughput_rps", "output_tokens_per_s", "total_tokens_per_s")
    ]
    assert numbers_in(rows["goodput"])[0] == pytest.approx(metrics["goodput_rps"], rel=0.01)
    assert numbers_in(rows["energy"]) == [
        pytest.approx(value, rel=0.05, abs=0.06)
        for value in (
            metrics["energy_j"] / 1e3,
            metrics["idle_energy_j"] / 1e3,
            metrics["energy_per_output_token_j"],
            metrics["mean_power_w"],
        )
    ]
    assert numbers_in(rows["utilisation"]) == [pytest.approx(100 * metrics[key], abs=0.06) for key in ("mfu", "mbu")]
    assert numbers_in(rows["batches"]) == [metrics["batches"], metrics["preemptions"]]
    assert seconds_in(rows["makespan"]) == [pytest.approx(metrics["makespan_s"], rel=0.05)]
    for operation in list(metrics["operations_s"])[:5]:
        if operation != "idle":
            assert seconds_in(rows[operation]) == [pytest.approx(metrics["operations_s"][operation], rel=0.05)]
    assert seconds_in(rows["idle"]) == [pytest.approx(metrics["operations_s"]["idle"], rel=0.05, abs=1e-7)]
    for text, slo in metrics["slo"].items():
        assert f"{text}: {'met' if slo['met'] else 'MISSED'}" in table
    for rank, candidate in enumerate(document["candidates"], 1):
        line = next(line for line in table.splitlines() if line.startswith(f"{rank}  {candidate['plan']}  "))
        values = [candidate["value"], *(candidate["metrics"][f"{name}_s"]["p95"] for name in ("ttft", "tpot", "e2e"))]
        assert seconds_in(line) == [pytest.approx(value, rel=0.05) for value in values]
    weights_gb = best["memory"][0]["weights_bytes"] / 1e9
    assert f"{weights_gb:.1f}" in next(line for line in table.splitlines() if re.match(r" +0 +32 ", line))
    assert f"{document['certificate']['space']:,} plans in the space" in table
    assert all(what in table for what in document["provenance"])


@pytest.mark.parametrize(
    "words",
    [
        ("plan", *CHEAP),
        ("energy", *CHEAP, "--clock=1980", "--max_num_seqs=64"),
        ("pareto", *CHEAP, "--clock=1980"),
        ("explain", *CHEAP),
        ("simulate", *CHEAP, "--plan=tp2"),
        ("place", *CHEAP[:2], "--plan=tp2"),
        ("capacity", *CHEAP[:2], "--plan=tp2", "--trace=poisson:rate=2,n=20", "--slo=e2e_p95<=9s", "--rate=2"),
    ],
    ids=lambda words: words[0],
)
def test_sources_are_told_in_groups_or_each_in_full_and_json_has_them_all(words: tuple[str, ...]) -> None:
    once = Once()
    short, full, document = once.run(*words), once.run(*words, "--sources"), once.run(*words, "--format=json")
    assert document.out == once.run(*words, "--sources", "--format=json").out
    sources = json.loads(document.out)["provenance"]
    told = [text.split("Where the figures come from\n")[1].split("\n\n")[0] for text in (short.out, full.out)]
    assert len(sources) >= 4
    for what, source in sources.items():
        assert what in told[0]
        assert what in told[1]
        assert "".join(source.split()) in "".join(told[1].split())
    assert told[0].splitlines()[-1].endswith("--sources tells of every figure in full")
    assert "--sources" not in told[1]
    assert len(told[0].splitlines()) <= 8


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--weights=bf16,fp8"),
        ("energy", "--slo=e2e_p95<=30s", "--clock=1200,1980", "--max_num_seqs=64"),
        ("simulate", "--plan=tp2"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_plan_is_started_by_the_commands_shown_below_it(words: tuple[str, ...], engine: str) -> None:
    command, *more = words
    asked = (command, *CHEAP, *more, f"--engine={engine}", "--emit")
    ran, table = both(*asked)
    assert (ran.code, table.code) == (0, 0)
    document = json.loads(ran.out)
    assert document["launch"]["engine"] == engine
    plan, servers = document["best"]["plan"], document["launch"]["commands"]
    assert (
        sum(len(one["env"]["CUDA_VISIBLE_DEVICES"].split(",")) for one in servers if one["env"])
        == (document["best"]["gpus"])
    )
    assert ("-lgc" in table.out) == ("clock=" in plan)
    lines = table.out.splitlines()
    for one in servers:
        assert one["text"] in lines
    assert any("meta-llama/Llama-3.1-8B" in one["argv"] for one in servers)


def test_no_commands_are_shown_where_none_are_asked_for_or_there_is_no_plan() -> None:
    assert "launch" not in json.loads(run("simulate", *CHEAP, "--plan=tp2", "--format=json").out)
    words = ("--model=llama-3.1-70b", "--cluster=1xh100-sxm", "--plan=tp1", "--emit")
    ran = run("simulate", *words, "--format=json")
    assert ran.code == 3
    assert "launch" not in json.loads(ran.out)


def test_commands_are_those_of_the_engine_and_how_it_forms_batches_is_no_option_of_its_own() -> None:
    said = "--emit: expected true or false, got 'sglang'; it takes the engine of --engine"
    assert refused("plan", *CHEAP, "--emit=sglang") == refused("plan", *CHEAP, "--emit", "sglang") == said
    others = "--engine=sglang, sglang-0.5.9, sglang-0.5.9-drafts, sglang-eager, trtllm, trtllm-1.0, trtllm-1.1, "
    others += "trtllm-1.2, vllm, vllm-0.12, vllm-0.6"
    said = f"--emit: no command starts static; of these there are some: {others}"
    assert refused("plan", *CHEAP, "--engine=static", "--emit") == said
    others = "--engine=orca or --engine=static"
    said = f"--policy: there is no such option; how batches are formed goes with the engine: {others}"
    assert refused("plan", *CHEAP, "--policy=orca") == said


def seconds_in(line: str) -> list[float]:
    """Durations of a line, in seconds."""
    scale = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
    return [float(value.replace(",", "")) * scale[unit] for value, unit in re.findall(r"([\d.,]+) (us|ms|s)\b", line)]


def numbers_in(line: str) -> list[float]:
    """Numbers of a line."""
    return [float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*(?:\.\d+)?", line)]


def test_commands_are_not_asked_for_as_rows() -> None:
    code, out, error = run("plan", "--emit", "--format=csv", *CHEAP)
    assert (code, out) == (2, "")
    assert error.startswith("error: --emit: commands are no rows, and --format=csv prints nothing else; leave")


def test_several_objectives_costs_and_goals_on_every_figure_are_answered_and_replayed() -> None:
    goals = (
        "ttft_p95<=1s,itl_p99.9<=1s,itl<=1s@99%,goodput>=0.001,makespan<=1000s,energy<=1MJ,energy_per_token<=1kJ,"
        "cost<=100$/h,cost_per_mtoken<=100000$"
    )
    words = (*CHEAP, f"--slo={goals}", "--price=2.5", "--objective=cost~150%,e2e_p99.9", "--check")
    ran = run("plan", *words, "--format=json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    best = document["best"]
    assert document["check"]["holds"]
    assert best["metrics"]["cost_usd_per_h"] == best["value"] == 2.5 * best["gpus"]
    assert len(document["certificate"]["before"]) == 1
    assert list(best["metrics"]["slo"]) == goals.split(",")
    assert all(slo["met"] for slo in best["metrics"]["slo"].values())
    alone = json.loads(run("plan", *CHEAP, "--objective=e2e_p99.9", "--format=json").out)["best"]
    assert best["then"] == [alone["value"]]
    cheapest = json.loads(run("plan", *CHEAP, "--objective=cost", "--format=json").out)["best"]
    assert cheapest["gpus"] < best["gpus"]
    table = run("plan", *words, "--sources")
    assert "given: --price" in table.out
    assert "the certificate holds" in " ".join(table.out.split())


@pytest.mark.parametrize(
    ("command", "cluster"),
    [(name, "2xh200-sxm") for name in ("plan", "energy", "pareto", "explain", "simulate", "place", "capacity")]
    + [("plan", "two types"), ("energy", "two types")],
)
def test_what_a_trace_has_to_tell_is_in_every_answer_in_json_and_once_below_the_head(
    command: str, cluster: str, two_types: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted_trace(monkeypatch, "2 rows were left out")
    shape = "poisson:n=6,rate=2,prompt=64,output=8" if command == "capacity" else "static:n=6,prompt=64,output=8"
    words = [command, "--model=llama-3.1-8b", *ONE[command]]
    words.append(two_types if cluster == "two types" else f"--cluster={cluster}")
    words += [] if command == "place" else [f"--trace={shape}"]
    words += ["--rate=2"] if command == "capacity" else []
    words += ["--clock=1410", "--max_num_seqs=64"] if command in ("energy", "pareto") else []
    document, table = both(*words)
    assert json.loads(document.out)["notes"] == ["2 rows were left out"]
    lines = table.out.splitlines()
    assert lines.index("note: 2 rows were left out") in (1, 2)
    assert lines.count("note: 2 rows were left out") == 1


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, runs: Path) -> Callable[[str, int], str]:
    """What a command prints at a width."""
    once = Once()
    folder = tmp_path_factory.mktemp("pages")
    goals = "--slo=ttft_p95<=9s,tpot_p95<=9s,itl<=1s@99%"
    tight = "--slo=ttft_p95<=60ms,tpot_p95<=20ms,itl<=1s@99%"  # few rates are then to be tried
    rated = (*CHEAP[:2], "--trace=poisson:rate=2,n=20,output=8", tight)
    words = {
        "plan": ("plan", *CHEAP, goals),
        "energy": ("energy", *CHEAP, goals, "--clock=1200,1980", "--max_num_seqs=64,256"),
        "pareto": ("pareto", *CHEAP, goals, "--clock=1980", "--objective=ttft_p95,tpot_p95,energy"),
        "explain": ("explain", *CHEAP, goals, "--plan=tp2"),
        "infeasible": ("explain", "--model=llama-3.1-70b", "--cluster=1xh100-sxm", "--trace=static:n=2"),
        "simulate": ("simulate", *CHEAP, "--plan=pp2"),
        "place": ("place", CHEAP[0], "--cluster=2xdgx-h100", "--plan=dp2 tp4", "--lose=node0:3"),
        "capacity": ("capacity", *rated, "--resolution=0.5", "--max_num_seqs=8"),
        "fewest GPUs": ("capacity", *rated, "--rate=2"),
        "fleets": ("plan", CHEAP[0], two_types_in(folder), CHEAP[2], goals, "--top=3"),
        "compared": ("plan", CHEAP[0], "--cluster=2xh200-sxm,1xl4,1xt4", CHEAP[2], goals),
        "validate": ("validate", f"--measured={runs}"),
        "clusters": ("clusters",),
        "models": ("models",),
        "traces": ("traces",),
        "cluster show": ("cluster", "show", "--cluster=2xdgx-h100"),
        "profile show": ("profile", "show", "--gpu=h200-sxm"),
    }

    @cache
    def printed(name: str, width: int) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", str(width))
            ran = once.run(*words[name])
        assert ran.code == (3 if name == "infeasible" else 0), ran.err
        return ran.out

    return printed


PAGES = (
    "plan",
    "energy",
    "pareto",
    "explain",
    "infeasible",
    "simulate",
    "place",
    "capacity",
    "fewest GPUs",
    "fleets",
    "compared",
    "validate",
)
LISTS = ("clusters", "models", "traces", "cluster show", "profile show")


@pytest.mark.parametrize("width", [40, 50, 80, 120, 200])
@pytest.mark.parametrize("name", [*PAGES, *LISTS])
def test_pages_fit_their_width_and_break_no_word(pages: Callable[[str, int], str], name: str, width: int) -> None:
    def words_of(text: str) -> set[str]:
        return {word.strip(",;:.") for line in text.splitlines() for word in line.split() if set(word) != {"─"}}

    page, whole = pages(name, width), pages(name, 1000)
    assert all(cell_len(line) <= width for line in page.splitlines())
    # A word of the page that is not one of the text is a piece of one; only long ones are broken, and bars are scaled.
    pieces = words_of(page) - words_of(whole) - {"left", "out", "for", "lack", "of", "width"}
    long = [word for word in words_of(whole) if len(word) > 24]
    assert not [piece for piece in pieces if not any(piece in word for word in long)]


@pytest.mark.parametrize("width", [40, 50, 80, 120, 200])
@pytest.mark.parametrize("name", ["plan", "energy", "fleets", "capacity", "fewest GPUs"])
def test_columns_with_a_goal_are_never_left_out(pages: Callable[[str, int], str], name: str, width: int) -> None:
    page = pages(name, width)
    titles = {"capacity": "Plans by rate", "fewest GPUs": "Plans on as few GPUs"}
    start = page.index(titles.get(name, "Candidates"))
    text = page[start : page.index("\n\n", start)]
    shown, _, left_out = text.partition("left out for lack of width:")
    for goal in ("TTFT p95", "TPOT p95", "itl<=1s"):
        assert goal not in " ".join(left_out.split())
        assert all(word in shown for word in goal.split())


def test_progress_is_on_stderr_only(planned: tuple[dict[str, Any], str]) -> None:
    ran = run("plan", *CHEAP, "--format=json")
    json.loads(ran.out)
    assert "simulating plans ..." in ran.err
    assert "enumerating plans ..." in ran.err
    assert "error" not in ran.err


def test_a_deployment_of_several_pools_is_simulated_and_shown_pool_by_pool() -> None:
    words = ("--model=llama-3.1-8b", "--cluster=1xh100-sxm+1xl40s", "--trace=poisson:rate=9,n=20,prompt=64,output=8")
    ran = run("simulate", *words, "--plan=h100-sxm-80gb: tp1 + l40s-48gb: tp1")
    assert ran.code == 0, ran.err
    assert "Parts of the fleet" in ran.out and "alone" not in ran.out


def test_a_simulated_plan_equals_the_same_plan_found(planned: tuple[dict[str, Any], str]) -> None:
    best = planned[0]["best"]
    ran = run(
        "simulate", f"--plan={best['plan']}", *CHEAP, "--slo=ttft_p95<=1s,tpot<=1s@90%,throughput>=0.001", "-f=json"
    )
    assert ran.code == 0
    document = json.loads(ran.out)
    assert document["best"]["plan"] == best["plan"]
    between = document["best"]["metrics"].pop("itl_s")
    assert between["p50"] <= between["p95"] <= between["max"]
    assert document["best"]["metrics"] == best["metrics"]
    assert document["best"]["memory"] == best["memory"]


def test_several_plans_stand_side_by_side_each_as_it_is_alone() -> None:
    plans = ("--plan=tp2", "--plan=dp2 fp8", "--plan=tp8")
    words = ("simulate", *CHEAP, "--slo=ttft_p95<=1s")
    ran, table = both(*words, *plans)
    assert (ran.code, table.code) == (0, 0)
    document = json.loads(ran.out)
    assert [plan["plan"] for plan in document["plans"]] == [
        "attn(tp2) ffn(tp2) bf16",
        "dp2 attn(tp1) ffn(tp1) fp8",
        "attn(tp8) ffn(tp8) bf16",
    ]
    for plan, shown in zip(plans, document["plans"], strict=True):
        alone = run(*words, plan, "--format=json")
        assert alone.code == (3 if plan == "--plan=tp8" else 0)
        assert json.loads(alone.out) == {key: value for key, value in shown.items() if key != "plan"}
    assert document["differences"]["plans"] == [1, 2]
    assert "infeasible: attn(tp8) ffn(tp8) bf16 cannot run: devices" in " ".join(table.out.split())
    lone = run(*words, "--plan=tp8", "--plan=tp4", "--format=json")
    assert (lone.code, json.loads(lone.out)["status"]) == (3, "infeasible")


def test_rows_of_no_plan_come_with_the_reason_beside() -> None:
    code, out, error = run("plan", "--cluster=1xh100-sxm", CHEAP[2], "--format=csv")
    assert (code, out) == (3, "")
    assert error.splitlines()[-1].startswith("infeasible: no plan is feasible: memory: ")
    code, out, error = run("simulate", *CHEAP, "--plan=tp8", "--format=csv")
    assert (code, out) == (3, "")
    assert "devices" in error.splitlines()[-1]


def test_several_plans_are_started_one_after_the_other_and_have_no_files_of_their_own(tmp_path: Path) -> None:
    words = ("simulate", *CHEAP, "--plan=tp2", "--plan=dp2")
    ran = run(*words, "--emit")
    assert ran.code == 0
    assert ran.out.count("Launch (vllm)") == 2
    assert ran.out.count("vllm serve") == 3
    for option, name in (("requests", "a.csv"), ("timeline", "a.json"), ("save", "new")):
        assert f"--{option}: is for one plan, and 2 are given" in refused(*words, f"--{option}={tmp_path}/{name}")
    assert not list(tmp_path.iterdir())
    assert "'tp2 bf16' is attn(tp2) ffn(tp2) bf16, which is given before" in refused(*words, "--plan=tp2 bf16")
    assert "--plan: given twice" in refused("place", CHEAP[0], "--plan=tp2", "--plan=dp2")


@pytest.mark.parametrize("command", ["models", "clusters", "traces"])
def test_lists_come_as_table_and_json(command: str) -> None:
    listed, table = both(command)
    document = json.loads(listed.out)
    assert document["status"] == "ok"
    assert table.code == 0
    for row in document[command]:
        assert row["gpu" if command == "clusters" else "name"] in table.out
        assert row["cluster" if command == "clusters" else "name"] in table.out


def test_listed_names_can_be_asked_for() -> None:
    names = {c: json.loads(run(c, "--format=json").out)[c] for c in ("models", "clusters", "traces")}
    given = {"trace": "static:n=1", "model": "llama-3.1-8b"}
    for kind, key in (("models", "name"), ("clusters", "cluster"), ("traces", "name")):
        for row in names[kind]:
            resolve(Ask(**given | {kind.removesuffix("s"): row[key]}))


@pytest.mark.parametrize(
    "trace", ["static:n=1,prompt=1,output=1", "static:n=1", "closed:concurrency=3,n=7,output=5", "static:n=9,output=1"]
)
@pytest.mark.parametrize("form", ["table", "json"])
def test_odd_traces_are_answered(trace: str, form: str) -> None:
    ran = run("plan", "--model=llama-3.1-8b", "--cluster=h200-sxm", f"--trace={trace}", f"--format={form}")
    assert ran.code == 0, ran.err
    assert "NaN" not in ran.out
    assert "nan" not in ran.out.split("simulating")[0].split()


@pytest.mark.parametrize("objective", ["tpot_mean", "tpot_p99", "itl_p95"])
def test_an_objective_nobody_has_is_refused(objective: str) -> None:
    words = ("plan", *CHEAP[:2], "--trace=static:n=2,output=1", f"--objective={objective}")
    assert refused(*words).startswith(
        f"--objective: {objective} has no value on static:n=2,output=1, where every answer"
    )


def test_a_rate_is_asked_of_a_trace_that_has_one_or_lengths_alone(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("num_prefill_tokens,num_decode_tokens\n" + "64,8\n" * 200)
    words = ("simulate", *CHEAP[:2], "--plan=tp2", "--rate=5")
    found = [json.loads(run(*words, f"--trace={lengths}", f"--seed={seed}", "--format=json").out) for seed in (1, 1, 2)]
    assert [one["question"]["trace"]["requests"] for one in found] == [20_000] * 3
    assert found[0]["question"]["trace"]["rate_per_s"] == pytest.approx(5)
    assert found[0]["question"]["trace"]["burstiness"] == pytest.approx(1, abs=0.05)
    assert found[0]["steady"] is True
    assert found[0]["best"] == found[1]["best"] != found[2]["best"]
    assert "is a closed loop, so there is no rate" in refused(*words, "--trace=closed:concurrency=2,n=9")
    assert "has all its requests arrive at once" in refused(*words, "--trace=static:n=9")


def test_a_plan_at_a_rate_is_simulated_for_so_long_as_it_takes_to_see_whether_that_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("simulate", *OPEN[:3], "--plan=tp2", "--rate=20", "--format=json")
    usual = json.loads(run(*words).out)
    assert (usual["question"]["trace"]["requests"], usual["steady"]) == (20_000, True)
    spans = usual["transient"]["arrivals_s"] / usual["best"]["metrics"]["e2e_s"]["mean"]
    for span, requests, steady in ((1.5 * spans, 40_000, True), (100 * spans, 160_000, False)):
        monkeypatch.setattr("apex_opt.simulator.transient.SPAN", span)
        found = json.loads(run(*words).out)
        assert (found["question"]["trace"]["requests"], found["steady"]) == (requests, steady)
        assert f"taken {requests // 200} times over" in found["notes"][0]


def test_an_old_gpu_gets_the_16_bit_format_it_has() -> None:
    ran = run("plan", "--model=llama-3.1-8b", "--cluster=2xv100-pcie", CHEAP[2], "--format=json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["best"]["plan"].endswith("fp16")


def test_the_options_of_batching_reach_the_answer() -> None:
    words = ("simulate", "--plan=tp2", *CHEAP, "--format=json")
    plain, narrow = (json.loads(run(*words, *more).out)["best"]["metrics"] for more in ((), ("--max_num_seqs=1",)))
    assert narrow["batches"] > plain["batches"]
    assert narrow["e2e_s"]["mean"] > plain["e2e_s"]["mean"]


# ---- capacity ------------------------------------------------------------------------------------------------------

OPEN = (*CHEAP[:2], "--trace=poisson:rate=2,n=200,prompt=512,output=8", "--slo=ttft_p95<=60ms")


def test_the_highest_rate_comes_as_table_and_json_and_the_fewest_gpus_agree_with_it() -> None:
    ran, table = both("capacity", *OPEN, "--resolution=0.1")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    best = document["best"]
    assert document["status"] == "optimal"
    assert best["next_rate_per_s"] == pytest.approx(1.1 * best["rate_per_s"], rel=1e-4)
    assert best["metrics"]["slo"]["ttft_p95<=60ms"]["met"]
    assert best["why_not_next"] in ("goals", "prediction")
    assert document["steady"] is best["steady"] is True
    assert "searching rates ..." in ran.err
    assert f"highest rate sustained: {best['rate_per_s']:.3f} requests/s with {best['plan']}" in table.out
    fewest = json.loads(run("capacity", *OPEN, f"--rate={best['rate_per_s']}", "-f=json").out)["best"]
    assert fewest["gpus"] == best["gpus"]
    assert run("capacity", *OPEN, f"--rate={best['next_rate_per_s']}").code == 3


def test_the_highest_rate_of_one_plan_is_asked_for_by_its_text() -> None:
    ran = run("capacity", *OPEN, "--plan=tp2", "--format=json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert (document["best"]["plan"], document["status"]) == ("attn(tp2) ffn(tp2) bf16", "feasible")
    too_large = run("capacity", *OPEN, "--plan=tp8")
    assert too_large.code == 3
    assert "the plan takes 8 GPUs, 2 are offered" in " ".join(too_large.out.split())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((*CHEAP, "--slo=ttft_p95<=1s"), "has all its requests arrive at once, so there is no rate"),
        (
            (*CHEAP[:2], "--trace=closed:concurrency=2,n=6", "--slo=ttft_p95<=1s"),
            "is a closed loop, so there is no rate",
        ),
        ((*OPEN[:3], "--slo=throughput>=3"), "throughput>=3 moves with the rate itself"),
        (OPEN[:3], "capacity: needs --slo"),
        ((*OPEN, "--rate=0"), "--rate: 0 is not between 1e-06 and 1000000"),
        ((*OPEN, "--resolution=2"), "--resolution: 2 is not between 0.001 and 1"),
    ],
)
def test_what_has_no_highest_rate_is_refused(words: tuple[str, ...], part: str) -> None:
    assert part in refused("capacity", *words)


# ---- measured tables -----------------------------------------------------------------------------------------------


def test_profiles_are_shown_as_table_and_json() -> None:
    listed, table = both("profile", "show")
    document = json.loads(listed.out)
    assert document["status"] == "ok"
    assert len(document["profiles"]) > 20
    assert document["bytes"] == sum(profile["bytes"] for profile in document["profiles"])
    for profile in document["profiles"]:
        assert {"accelerator", "source", "engine", "licence", "hardware", "software", "tables"} <= set(profile)
    assert table.code == 0
    for profile in document["profiles"]:
        row = next(line for line in table.out.splitlines() if f"{profile['accelerator']}/{profile['source']} " in line)
        assert f"{profile['rows']:,}" in row
    one = run("profile", "show", "--gpu=h200")
    assert "power limit 700 W" in one.out
    assert "l40s" not in one.out


def test_an_empty_folder_has_no_profiles_to_show(tmp_path: Path) -> None:
    assert "holds no profile folders" in refused("profile", "show", f"--profiles={tmp_path}")


def test_tables_that_were_imported_are_used_where_they_are_named(tmp_path: Path) -> None:
    source = tmp_path / "H200-SXM-141GB"
    source.mkdir()
    lines = ["gpu,dtype,m,k,n,time(us)", *(f"H200,half,6144,4096,{tokens},777" for tokens in (1, 64, 4096))]
    (source / "gemm_0.csv").write_text("\n".join(lines))
    words = ("profile", "import", "--kind=apex", f"--source={tmp_path}", "--gpu=h200-sxm", f"--target={tmp_path}/mine")
    document = json.loads(run(*words, "--format=json").out)
    assert document["tables"][0]["rows"] == 3
    assert "3 of 3 rows" in " ".join(run(*words).out.split())
    shown = json.loads(run("profile", "show", f"--profiles={tmp_path}/mine", "--format=json").out)
    assert [profile["licence"] for profile in shown["profiles"]] == ["MIT"]
    asked = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--cluster=h200-sxm", CHEAP[2], "--format=json")
    own, shipped = (json.loads(run(*asked, *more).out) for more in ((f"--profiles={tmp_path}/mine",), ()))
    assert str(tmp_path / "mine") in own["provenance"]["gemm bf16"]
    assert str(tmp_path) not in shipped["provenance"]["gemm bf16"]
    assert own["best"]["metrics"]["e2e_s"]["mean"] > 2 * shipped["best"]["metrics"]["e2e_s"]["mean"]


@pytest.mark.parametrize("command", ["plan", "simulate", "validate"])
def test_tables_that_are_not_there_are_named(command: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    words = (command, *(f"--measured={tmp_path}/runs" if "measured" in word else word for word in ONE[command]))
    message = refused(*words, f"--profiles={tmp_path}/runs")
    assert "is neither shipped nor silicon nor a folder of profile folders" in message
    if find_spec("aiconfigurator_core") is None:
        assert "pip install 'apex-opt[distill]'" in refused(*words, "--profiles=silicon")


def test_distilling_tells_what_was_kept_and_at_what_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install -e '.[distill]'")
    package = write_package(tmp_path / "package")
    words = ("profile", "distill", f"--source={package}", f"--target={tmp_path}/out", "--gpu=a100-sxm")
    listed, shown = both(*words)
    document = json.loads(listed.out)
    assert document["rows"] == sum(table["rows"] for table in document["tables"])
    assert shown.code == 0
    gemm = next(table for table in document["tables"] if table["table"] == "gemm")
    row = next(line for line in shown.out.splitlines() if line.startswith(f"{gemm['folder']} "))
    assert f" {gemm['rows']} " in row
    assert f"{gemm['lookup_error']['p95']:.1%}" in row
    assert "distilling a100-sxm/vllm-0.14.0 ..." in listed.err
    assert "did you mean" in refused(*words[:-1], "--gpu=a10-sxm")


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed here")
def test_measuring_without_torch_says_so_and_writes_nothing(tmp_path: Path) -> None:
    message = refused("profile", "collect", "--quick", f"--target={tmp_path}/out")
    assert "measuring needs torch, which is not installed" in message
    assert list(tmp_path.iterdir()) == []
    assert "unknown operation 'gem'; did you mean gemm" in refused("profile", "collect", "--ops=gem")


def test_a_fit_prints_sections_to_copy_and_writes_nothing(tmp_path: Path) -> None:
    settings = EngineSettings(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=1024)
    costs = CostModel(load_model("llama-3.1-8b"), load_cluster("h200-sxm"), settings, load_engine("vllm"))
    trace = load_trace("static:n=4,prompt=200,output=12")
    law = costs.plan_cost(parse_plan("tp1", load_model("llama-3.1-8b"))).laws[0]
    (tmp_path / "h200-vllm-1").mkdir()
    write_runs(tmp_path / "h200-vllm-1/x.json.gz", {"a": recorded(settings, law, trace)}, engine(settings))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    words = ("profile", "fit", f"--measured={tmp_path}")
    ran = run(*words, "--format=json")
    assert (ran.code, json.loads(ran.out)["runs"]) == (0, 1)
    assert "fitting step_s ..." in ran.err
    document = json.loads(ran.out)
    assert list(tomllib.loads(document["engine_toml"])) == ["own_time"]
    (board,) = document["boards"]
    assert set(tomllib.loads(board["power_toml"])["power"]) == {*board["coefficients"], "source"}
    table = run(*words).out
    assert document["engine_toml"] in table
    assert board["power_toml"] in table
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert refused(*words, "--engine=sglang") == "no run of engine sglang could be predicted: nothing to fit on"
    assert "unknown engine 'vlm'; did you mean vllm" in refused(*words, "--engine=vlm")
    assert "nowhere" in refused("profile", "fit", "--measured=nowhere")


# ---- what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ("--cluster=1xl40s", "--model=llama-3.1-70b"),
            ("a GPU needs 14", "weights 141.1", "may use 43.5", "--cluster=4xl40s"),
        ),
        (
            ("--cluster=1xh100-sxm", "--model=llama-3.1-70b"),
            ("needs 14", "may use 77.0", "--weights=fp8", "--cluster=2xh100-sxm-80gb", "attn(tp2) ffn(tp2) bf16"),
        ),
        (
            ("--cluster=2xv100-sxm", "--weights=w8a8", "--model=llama-3.1-8b"),
            ("v100-sxm-32gb does not compute in int8", "--weights=fp16"),
        ),
        (
            ("--slo=tpot_p95<=1us", "--model=llama-3.1-8b", "--cluster=2xh200-sxm"),
            ("GB of weights per GPU", "TPOT limit is 0.001 ms", "--slo=", "another weight format, up to 64 GPUs"),
        ),
        (
            ("--slo=ttft_p95<=1us", "--model=llama-3.1-8b", "--cluster=2xh200-sxm"),
            ("ttft_p95<=1us: of all plans", "comes closest and reaches", "its bound", "--slo="),
        ),
        (
            ("--slo=throughput>=1e9", "--model=llama-3.1-8b", "--cluster=2xh200-sxm"),
            ("throughput>=1000000000: of all plans", "comes closest and reaches", "requests/s", "--slo="),
        ),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_what_is_infeasible_exits_3_and_says_why_with_numbers(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    words = ("plan", "--trace=static:n=4,prompt=64,output=4", *words)
    document, table = both(*words)
    assert document.code == 3, document
    answer = json.loads(document.out)
    assert (answer["status"], answer["best"], answer["candidates"]) == ("infeasible", None, [])
    assert answer["clashes"]
    assert answer["relaxations"]
    facts = [fact for clash in answer["clashes"] for fact in clash["facts"]]
    assert answer["reason"] == f"no plan is feasible: {'; '.join(facts)}"
    assert table.code == 3
    assert "Traceback" not in table.err
    text = " ".join(table.out.split())
    assert all(fact in text for fact in facts)
    assert all(way["plan"] in text for way in answer["relaxations"])
    assert all(value in text for way in answer["relaxations"] for value in way["options"].values())
    for part in parts:
        assert part in text


def test_energy_shows_what_is_saved_beside_the_plan_of_the_best_latency() -> None:
    words = ("energy", *CHEAP)
    document, table = both(*words)
    assert (document.code, table.code) == (0, 0)
    answer = json.loads(document.out)
    best, beside = answer["best"], answer["beside"]
    limits = "--max_num_seqs=64,256,1024"
    fastest = json.loads(run("plan", *CHEAP, limits, "--format=json").out)["best"]
    assert beside["best"]["plan"] == fastest["plan"]
    assert beside["best"]["metrics"]["energy_j"] == fastest["metrics"]["energy_j"]
    saving = 1 - best["metrics"]["energy_j"] / fastest["metrics"]["energy_j"]
    assert beside["energy_saving"] == pytest.approx(saving)
    assert saving > 0
    assert f"{saving:.1%} less energy than the best {beside['objective']}" in table.out
    assert fastest["plan"] in table.out
    # The clock is chosen too: holding each plan at the GPU's own would cost more.
    assert "clock=" in best["plan"]
    held = json.loads(run("plan", *CHEAP, limits, "--objective=energy", "--format=json").out)["best"]
    assert best["metrics"]["energy_j"] < held["metrics"]["energy_j"]


@pytest.mark.parametrize("command", ["plan", "energy"])
def test_a_certificate_is_replayed_on_request(command: str) -> None:
    few = ("--clock=1980", "--max_num_seqs=64") if command == "energy" else ()
    document, table = both(command, *CHEAP, *few, "--check")
    assert (document.code, table.code) == (0, 0)
    answer = json.loads(document.out)
    replay, certificate = answer["check"], answer["certificate"]
    assert (replay["holds"], replay["disagreements"]) == (True, [])
    assert (replay["space"], replay["infeasible"]) == (certificate["space"], certificate["infeasible"])
    assert "the certificate holds." in " ".join(table.out.split())
    assert "within the goals" not in " ".join(table.out.split())
    assert "check" not in json.loads(run(command, *CHEAP, *few, "--format=json").out)


def test_a_certificate_that_does_not_hold_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Scorer.bounds
    monkeypatch.setattr(Scorer, "bounds", lambda self, one: (tuple(100 * cost for cost in true(self, one)[0]), True))
    ran = run("plan", *CHEAP, "--check")
    assert ran.code == 1
    text = " ".join(ran.out.split())
    assert "the certificate does not hold: " in text
    assert "less than its bound" in text


def test_pareto_answers_with_a_front_a_table_and_a_picture(tmp_path: Path) -> None:
    words = ("pareto", *CHEAP, "--objective=e2e_mean,energy")
    once = Once()
    document, table = once.run(*words, "--format=json", f"--plot={tmp_path / 'front.png'}"), once.run(*words)
    assert (document.code, table.code) == (0, 0)
    answer = json.loads(document.out)
    assert len(answer["candidates"]) > 1
    assert all(row["plan"] in table.out for row in answer["candidates"])
    fastest = json.loads(run("plan", *CHEAP, "--format=json").out)["best"]
    thriftiest = json.loads(run("energy", *CHEAP, "--format=json").out)["best"]
    assert answer["candidates"][0]["plan"] == fastest["plan"]
    assert answer["candidates"][-1]["values"]["energy"] == thriftiest["metrics"]["energy_j"]
    assert (tmp_path / "front.png").is_file()
    assert run(*words, "--slo=ttft_p95<=1us").code == 3
    assert "two or three objectives" in refused("pareto", *CHEAP, "--objective=energy")
    assert "unknown objective 'speed'" in refused("pareto", *CHEAP, "--objective=energy,speed")


def test_what_energy_cannot_reach_is_infeasible() -> None:
    ran = run("energy", *CHEAP, "--slo=ttft_p95<=1us", "--clock=1980", "--max_num_seqs=64", "--format=json")
    assert ran.code == 3
    answer = json.loads(ran.out)
    assert answer["status"] == "infeasible"
    assert [clash["of"] for clash in answer["clashes"]] == [["ttft_p95<=1us"]]
    assert all(way["options"]["slo"] for way in answer["relaxations"])


@pytest.mark.parametrize("command", ["plan", "energy", "explain"])
def test_what_the_time_does_not_suffice_for_is_named(command: str) -> None:
    words = (command, *CHEAP, "--slo=ttft_p95<=1us", "--time_limit=0.001")
    document, table = both(*words)
    assert (document.code, table.code) == (3, 3)
    answer = json.loads(document.out)
    assert (answer["relaxations"], answer["explain_time_limit_s"]) == ([], 0.001)
    assert "an fp8 KV cache" in answer["not_tried"]
    text = " ".join(table.out.split())
    assert f"Not tried, as the time limit of 0.001 s was reached: {', '.join(answer['not_tried'])}." in text


def test_a_request_that_the_cache_cannot_hold_is_infeasible_and_named() -> None:
    ran = run("plan", "--model=llama-3.1-70b", "--cluster=2xh100-sxm", "--trace=static:n=2,prompt=131000,output=60")
    assert ran.code == 3
    assert "KV cache of the longest request 21.5" in " ".join(ran.out.split())
    assert "--weights=w8a16" in ran.out


def test_an_explanation_offers_options_that_then_have_a_plan() -> None:
    asked = ("--model=llama-3.1-8b", "--cluster=2xh200-sxm", "--trace=static:n=4,prompt=64,output=4")
    late = "--slo=ttft_p95<=1us"
    document, table = both("explain", *asked, late)
    assert document.code == 3, document
    found = json.loads(document.out)
    assert [clash["of"] for clash in found["clashes"]] == [["ttft_p95<=1us"]]
    (eased,) = [way for way in found["relaxations"] if list(way["options"]) == ["slo"]]
    planned = run("plan", *asked, f"--slo={eased['options']['slo']}", "--format=json")
    assert planned.code == 0, planned
    assert json.loads(planned.out)["best"]["plan"] == eased["plan"]
    assert table.code == 3
    assert all(fact in " ".join(table.out.split()) for clash in found["clashes"] for fact in clash["facts"])


def test_an_explanation_compares_a_plan_with_the_best_of_several_formats() -> None:
    ran = run("explain", *CHEAP, "--weights=bf16,fp8", "--plan=dp2 fp8", "--format=json")
    assert ran.code == 0, ran
    found = json.loads(ran.out)
    assert found["comparison"]["plan"] == "dp2 attn(tp1) ffn(tp1) fp8"
    assert found["comparison"]["value"] >= found["objective"]["value"]
    assert found["comparison"]["terms"]
    assert "cannot read 'tp2?'" in refused("explain", *CHEAP, "--plan=tp2?")


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_a_prompt_that_the_model_cannot_hold_is_named(command: str) -> None:
    words = (command, *ONE[command], "--model=mistral-7b", "--cluster=2xh200-sxm", "--trace=static:n=2,prompt=32768")
    message = refused(*words)
    assert "request 0: a prompt of 32768 tokens leaves no room to answer within max_model_len 32768" in message


@pytest.mark.parametrize(
    ("plan", "part"),
    [
        ("tp8", "devices: the plan takes 8 GPUs, 2 are offered"),
        ("dp3", "devices: the plan takes 3 GPUs, 2 are offered"),
        ("attn(tp2) ffn(ep2)", "ep2 needs experts; the FFN is dense"),
        ("dp1048576 tp1048576", "1099511627776 GPUs"),
    ],
)
def test_a_plan_that_cannot_run_is_infeasible(plan: str, part: str) -> None:
    ran = run("simulate", f"--plan={plan}", *CHEAP, "--format=json")
    assert ran.code == 3, ran
    assert part in json.loads(ran.out)["reason"]


def test_a_plan_is_held_to_the_gpus_offered() -> None:
    ran = run("simulate", "--plan=tp2", *CHEAP, "--gpus=1")
    assert ran.code == 3
    assert "the plan takes 2 GPUs, 1 are offered" in ran.out


# ---- measured runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a measured run, and a table with one row that can be predicted and one that cannot."""
    folder = tmp_path_factory.mktemp("h200-vllm-0.20")
    rows = [[0.0, 0.03, 0.13, 200, 21], [0.5, 0.52, 0.9, 50, 61]]
    write_runs(
        folder / "x.json.gz", {"a": {"requests": rows, "summary": {"energy_J": 300.0}}}, engine(EngineSettings())
    )
    values = ["r", "vllm", "llama-3.1-8b", "h200_sxm", "512", "64", "", "", "4", "1", "1", "1", "1", "1", "40", "6"]
    lines = [",".join(SILICON_COLUMNS), ",".join(values), ",".join(["s", "tgi", *values[2:]])]
    (folder / "agg.csv").write_text("\n".join(lines))
    return folder


def test_measured_runs_are_compared_and_counted(runs: Path) -> None:
    ran, table = both("validate", f"--measured={runs}")
    assert ran.code == 0, ran
    document = json.loads(ran.out)
    assert document["coverage"] == {
        "predicted": 2,
        "total": 3,
        "rows": 3,
        "aside": 0,
        "supported": 3,
        "reasons": {"engine not described": 1},
    }
    assert {row["name"] for row in document["rows"]} == {"x/a", "r", "s"}
    assert document["summary"]["ttft_mean"]["n"] == 2
    assert document["summary"]["energy"]["n"] == 1
    assert table.code == 0
    assert "2 of 3 measured runs predicted" in table.out
    assert "engine not described" in table.out


def test_measured_runs_of_which_none_can_be_predicted_are_no_success(runs: Path, tmp_path: Path) -> None:
    lines = (runs / "agg.csv").read_text().splitlines()
    (tmp_path / "agg.csv").write_text("\n".join([lines[0], lines[2]]))
    ran = run("validate", f"--measured={tmp_path}", "--format=json")
    assert ran.code == 3
    assert json.loads(ran.out)["status"] == "nothing predicted"


def test_an_engine_is_calibrated_to_a_file_that_is_never_overwritten(tmp_path: Path) -> None:
    guess = tmp_path / "guess.toml"
    guess.write_text('like = "vllm"\n[own_time]\nrequest_us = 30000.0\nsource = "a guess"\n')
    words = ("calibrate", f"--engine={guess}", "--hold=mixtral-8x7b/static_b1,mixtral-8x7b/static_b8", "--format=json")
    ran = run(*words, f"--out={tmp_path / 'my.toml'}")
    document = json.loads(ran.out)
    assert (ran.code, document["status"], document["like"]) == (0, "ok", "vllm")
    assert document["times_us"]["request_us"]["after"] < 5000
    assert (
        document["held"]["after"]["ttft_mean"]["mean_ape_pct"] < document["held"]["before"]["ttft_mean"]["mean_ape_pct"]
    )
    assert (tmp_path / "my.toml").read_text() == document["engine_toml"]
    assert "is there already and is left alone" in refused(*words[:1], f"--out={tmp_path / 'my.toml'}")
    again = run(
        "simulate",
        *CHEAP[:2],
        "--trace=static:n=2,prompt=16,output=2",
        "--plan=tp2",
        f"--engine={tmp_path / 'my.toml'}",
    )
    assert again.code == 0, again.err


def test_a_plot_of_measured_runs_is_written(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    ran = run("validate", f"--measured={runs}", f"--plot={tmp_path / 'a.png'}", "--limit=1")
    assert ran.code == 0, ran
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "Runs (1 of 2, largest errors first: by" in ran.out


@pytest.mark.parametrize("content", [b"\x1f\x8b broken", b"", b"{}"])
def test_measured_runs_that_cannot_be_read_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json.gz").write_bytes(content)
    assert str(tmp_path / "x.json.gz") in refused("validate", f"--measured={tmp_path / 'x.json.gz'}")


def test_measured_runs_must_be_somewhere(tmp_path: Path) -> None:
    assert "no such file or folder; docs/validation.md names" in refused("validate", "--measured=~nobody/there")
    assert "no such file or folder" in refused("validate", f"--measured={tmp_path / 'a.csv'}")
    assert "holds no measured runs" in refused("validate", f"--measured={tmp_path}")
    assert "needs --measured" in refused("profile", "fit")


# ---- clusters ----------------------------------------------------------------------------------------------------


def test_a_cluster_is_shown_with_its_gpus_that_are_taken(tmp_path: Path) -> None:
    words = ("cluster", "show", "--cluster=2xdgx-h100", "--busy=node0:0-3,node1:1", "--down=node1:7")
    listed, table = both(*words)
    document = json.loads(listed.out)
    assert document["count"] == {"free": 10, "busy": 5, "down": 1}
    assert table.code == 0
    assert "2xdgx-h100: 16 GPUs, 10 free, 5 busy, 1 down" in table.out
    assert refused(*words[:3], "--busy=node2:0") == (
        "--busy: node2:0: no such node in 2xdgx-h100; it has node0:0-7, node1:0-7"
    )
    assert "--plot: expected a file name that ends in .png or .svg" in refused(*words, "--plot=a.pdf")
    assert "cannot be written" in refused(*words, f"--plot={tmp_path}/gone/a.svg")


def test_a_matrix_becomes_a_file_that_is_shown_and_planned_on(tmp_path: Path) -> None:
    matrix = "GPU0 GPU1 NIC0 CPU Affinity\nGPU0 X NV18 PIX 0-7\nGPU1 NV18 X PIX 0-7\nNIC0 PIX PIX X\n"
    (tmp_path / "topo.txt").write_text(matrix)
    words = ("cluster", "import", f"--source={tmp_path}/topo.txt")
    printed = run(*words, "--gpu=h100-sxm")
    assert tomllib.loads(printed.out)["nodes"][0]["gpus"] == 2
    path = tmp_path / "made.toml"
    written = run(*words, "--gpu=h100-sxm", f"--target={path}")
    assert "1 node with 2 GPUs written to" in written.out
    assert path.read_text() == printed.out
    assert json.loads(run(*words, "--gpu=h100-sxm", "--format=json").out)["toml"] == printed.out
    shown = json.loads(run("cluster", "show", f"--cluster={path}", "--format=json").out)
    assert shown["domains"]["nvlink"] == [["node0:0", "node0:1"]]
    planned = [
        json.loads(run("plan", CHEAP[0], f"--cluster={name}", CHEAP[2], "--format=json").out)["best"]
        for name in (path, "2xh100-sxm")
    ]
    assert planned[0]["metrics"] == planned[1]["metrics"]


@pytest.mark.parametrize("command", ["plan", "energy", "capacity"])
def test_several_clusters_are_compared_and_one_with_an_answer_is_enough(command: str) -> None:
    trace = "--trace=poisson:rate=2,n=12,prompt=64,output=8"
    words = (command, CHEAP[0], trace, *(("--slo=ttft_p95<=1s", "--resolution=0.5") if command == "capacity" else ()))
    ran, table = both(*words, "--cluster=1xt4,1xl4")
    assert ran.code == 0, ran
    document = json.loads(ran.out)
    assert (document["command"], document["cheapest"], document["fastest"]) == (command, 2, 2)
    none, one = (row["answer"] for row in document["clusters"])
    assert (none["best"], one["command"]) == (None, command)
    alone = json.loads(run(*words, "--cluster=1xl4", "--format=json").out)
    assert one["best"]["plan"] == alone["best"]["plan"]
    # Costs are told, as they are compared.
    assert one["best"]["metrics"].items() > alone["best"]["metrics"].items()
    assert "cheapest, fastest" in table.out
    assert "infeasible on 1xt4-16gb: " in table.out
    assert run(*words, "--cluster=1xt4,1xv100-pcie-16gb").code == 3


def test_clusters_that_cannot_be_compared_are_refused_before_any_search() -> None:
    assert refused("plan", CHEAP[0], "--cluster=1xl4,1xl41").startswith("unknown GPU 'l41'; did you mean l4")
    assert "--busy: is of one cluster, and 2 are given" in refused("plan", "--cluster=1xl4,1xa10", "--busy=node0")
    for command in ("pareto", "explain", "simulate", "place"):
        line = refused(command, CHEAP[0], "--cluster=1xl4,1xa10", *ONE[command])
        assert "plan, energy and capacity compare several clusters, this takes one" in line


def test_a_mixed_cluster_is_put_together_of_two_and_says_what_is_assumed() -> None:
    answer = json.loads(run("plan", CHEAP[0], "--cluster=1xh100+1xl40s", CHEAP[2], "--format=json").out)
    assert [pool["gpu"] for pool in answer["question"]["cluster"]["pools"]] == ["h100-sxm-80gb", "l40s-48gb"]
    assert any("is assumed: all on one leaf switch" in note for note in answer["notes"])


def test_gpus_of_two_types_serve_together_or_alone_whichever_is_better(two_types: str) -> None:
    words = (CHEAP[0], two_types, CHEAP[2])
    document, table = both("plan", *words, "--top=2")
    assert (document.code, table.code) == (0, 0)
    answer = json.loads(document.out)
    assert (answer["command"], answer["status"], answer["optimal"]) == ("plan", "optimal", True)
    assert len(answer["candidates"]) == 2
    assert f"best fleet: {answer['best']['plan']}" in " ".join(table.out.split())
    for alone, name in zip(answer["alone"], ("2xa100-sxm", "h100-sxm"), strict=True):
        assert answer["best"]["value"] <= alone["value"]
        one = json.loads(run("plan", CHEAP[0], f"--cluster={name}", CHEAP[2], "--format=json").out)["best"]
        assert alone["parts"][0]["plan"].split()[-1] == one["plan"].split()[-1]
    few = json.loads(run("plan", *words, "--gpus=1", "--format=json").out)
    assert few["best"]["gpus"] == 1
    assert [certificate["simulated"] for certificate in few["certificates"]][2] == 0
    energy = run("energy", *words, "--max_num_seqs=64", "--format=json")
    assert energy.code == 0
    found = json.loads(energy.out)
    assert found["objective"]["name"] == "energy"
    assert found["beside"]["energy_saving"] >= 0


def test_gpus_of_two_types_that_cannot_serve_say_why_type_by_type(two_types: str) -> None:
    ran = run("plan", "--model=llama-3.1-405b", two_types, CHEAP[2])
    assert ran.code == 3
    text = " ".join(ran.out.split())
    assert "infeasible: a100-sxm-80gb alone: no plan for llama-3.1-405b on 2 x a100-sxm-80gb is feasible" in text
    assert "; h100-sxm-80gb alone: no plan for llama-3.1-405b on 1 x h100-sxm-80gb is feasible" in text


def test_a_plan_on_gpus_told_apart_says_where_it_goes_and_starts_there() -> None:
    words = ("--model=llama-3.1-8b", "--cluster=2xserver-8xl40s", "--busy=node0:0,node1:2-3", CHEAP[2])
    for command in ("plan", "energy"):
        found = json.loads(run(command, *words, "--gpus=4", "--emit", "--format=json").out)
        placement = found["placement"]
        gpus = [gpu for replica in placement["replicas"] for stage in replica["stages"] for gpu in stage]
        assert len(set(gpus)) == len(gpus) == found["best"]["gpus"]
        assert not {"node0:0", "node1:2", "node1:3"} & set(gpus)
        assert placement["rank_order"]["collectives_s"] >= placement["collectives_s"]
        started = {
            f"node{command['node']}:{gpu}"
            for command in found["launch"]["commands"]
            for gpu in command["env"].get("CUDA_VISIBLE_DEVICES", "").split(",")
            if gpu
        }
        assert started == set(gpus)
    assert "Where it goes" in run("simulate", *words, "--plan=dp2 tp2").out
    assert "placement" not in json.loads(run("plan", *CHEAP, "--format=json").out)


def test_every_part_of_a_fleet_gets_its_commands_and_the_router_its_weights(two_types: str) -> None:
    trace = "--trace=static:n=60,prompt=64,output=64"
    found = json.loads(run("plan", CHEAP[0], two_types, trace, "--emit", "--format=json").out)
    parts, launch = found["best"]["parts"], found["launch"]
    assert len(parts) == 2
    replicas = {command["replica"] for command in launch["commands"]}
    assert replicas == set(range(len(replicas)))
    # Both types have the same plan or not: each has sources of its own.
    gemms = [any(name.startswith("gemm") for name in found["provenance"][part["gpu"]]) for part in parts]
    assert gemms == [True, True]
    placed = [gpu for part in parts for replica in part["replicas"] for stage in replica["stages"] for gpu in stage]
    assert len(set(placed)) == len(placed) == found["best"]["gpus"]
    gpus = [(command["node"], command["env"]["CUDA_VISIBLE_DEVICES"]) for command in launch["commands"]]
    assert sum(len(names.split(",")) for _, names in gpus) == sum(part["gpus"] for part in parts)
    assert {node for node, _ in gpus} == {0, 1}
    assert any("weights of the router" in note for note in launch["notes"])


def test_a_pipeline_over_two_types_is_found_where_neither_holds_the_model(tmp_path: Path) -> None:
    nodes = "".join(
        f'[[nodes]]\npreset = "{preset}"\ngpus = 1\nnvlink = {{ gpus = 1 }}\npcie = {{ gpus = 1 }}\n'
        for preset in ("dgx-a100", "dgx-h100")
    )
    (file := tmp_path / "mixed.toml").write_text(
        nodes.replace("pcie = { gpus = 1 }", "sockets = { gpus = 1 }\nnics = { gpus = 1 }")
    )
    words = ("--model=llama-3.1-70b", f"--cluster={file}", CHEAP[2], "--max_num_seqs=8", "--max_num_batched_tokens=256")
    ran = run("plan", *words, "--emit", "--format=json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    (part,) = found["best"]["parts"]
    assert "on=" in part["plan"]
    assert found["alone"] == [None, None]
    assert {command["node"] for command in found["launch"]["commands"]} == {0, 1}
    assert found["pipelines"][0]["optimal"]
    assert "in the space" in run("plan", *words).out


def test_a_plan_is_placed_on_the_type_of_gpu_that_takes_it_and_is_quickest(two_types: str) -> None:
    one = json.loads(run("place", "--model=llama-3.1-8b", two_types, "--plan=tp1", "--format=json").out)
    assert one["gpu"] == "h100-sxm-80gb"
    two = json.loads(run("place", "--model=llama-3.1-8b", two_types, "--plan=tp2", "--format=json").out)
    assert (two["gpu"], two["gpus"]["free"]) == ("a100-sxm-80gb", 2)
    assert {gpu for stages in two["placement"]["replicas"][0]["stages"] for gpu in stages} == {"node0:0", "node0:1"}


def test_what_is_of_gpus_of_one_type_refuses_two_in_one_line(two_types: str, tmp_path: Path) -> None:
    assert "say on which of a100-sxm-80gb, h100-sxm-80gb it runs" in refused("simulate", two_types, "--plan=tp1")
    assert refused("energy", two_types, "--price=2").startswith("--price: mixed has GPUs of several types")
    assert refused("plan", two_types, "--gpus=4") == "--gpus: 4 is not between 1 and the 3 GPUs of mixed"
    ran = run("simulate", two_types, CHEAP[0], CHEAP[2], "--plan=a100-sxm-80gb: tp1", f"--requests={tmp_path}/r.csv")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith(
        "error: --requests: is of one pool on GPUs of one type, and here there may be several; leave it out\n"
    )
    assert not (tmp_path / "r.csv").exists()


def test_what_cannot_be_imported_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "topo.txt").write_text("GPU0 GPU1\nGPU0 X NV18\n")
    words = ("cluster", "import", f"--source={tmp_path}/topo.txt", f"--target={tmp_path}/made.toml")
    assert "no row of GPU1" in refused(*words, "--gpu=h100-sxm")
    (tmp_path / "topo.txt").write_text("GPU0 GPU1\nGPU0 X NV18\nGPU1 NV18 X\n")
    assert "--gpu: nvidia-smi topo -m does not tell what its GPUs are" in refused(*words)
    assert "no such file" in refused(*words[:2], f"--source={tmp_path}/gone", words[3])
    assert [path.name for path in tmp_path.iterdir()] == ["topo.txt"]
    assert "--target: expected a file name that ends in .toml" in refused(*words[:3], "--target=made.txt")


# ---- placement ---------------------------------------------------------------------------------------------------

PLACE = ("place", "--plan=dp2 tp2", "--model=llama-3.1-8b", "--cluster=server-8xl40s")


def test_a_plan_is_placed_with_nothing_but_its_text() -> None:
    document, table = both("place", "--plan=tp4")
    assert (document.code, table.code) == (0, 0)
    found = json.loads(document.out)
    assert found["status"] == "optimal"
    assert found["placement"]["replicas"][0]["stages"] == [[f"node0:{gpu}" for gpu in range(4)]]
    (row,) = [line for line in table.out.splitlines() if line.startswith("best ") and "node" not in line]
    assert seconds_in(row) == [pytest.approx(found["placement"][key], rel=0.01) for key in ("collectives_s", "step_s")]
    # Nothing in it is about traffic.
    assert "trace" not in document.out + table.out


def test_what_was_placed_can_be_given_back(tmp_path: Path) -> None:
    ranks, printed = tmp_path / "ranks.txt", tmp_path / "placed.json"
    first = run(*PLACE, "--busy=node0:0", f"--rankfile={ranks}", "--format=json")
    printed.write_text(first.out)
    placed = json.loads(first.out)["placement"]
    assert len(re.findall(r"^rank \d+=node0 slot=\d$", ranks.read_text(), re.MULTILINE)) == 4
    for path in (ranks, printed):
        given = json.loads(run(*PLACE, "--busy=node0:0", f"--at={path}", "--format=json").out)["given"]
        assert given["replicas"] == placed["replicas"]
        assert given["collectives_loss"] == 0
    assert "it has 4 ranks, the plan has 2" in refused("place", "--plan=tp2", f"--at={ranks}")
    held = placed["replicas"][0]["stages"][0][0]
    assert f"{held} is not free in the cluster" in refused(*PLACE, f"--busy={held}", f"--at={ranks}")


def test_gpus_are_lost_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "placed.json"
    words, down, slower = [*PLACE, "--format=json"], [], []
    for gpu in ("node0:1", "node0:2", "node0:5", "node0:6"):
        ran = run(*words, *([f"--down={','.join(down)}", f"--at={path}"] if down else []), f"--lose={gpu}")
        assert ran.code == 0, ran
        path.write_text(ran.out)
        loss = json.loads(ran.out)["loss"]
        assert loss["gpus"] == [gpu]
        assert gpu not in str(loss["placement"]["replicas"])
        assert loss["moved"] == len(loss["moves"]) <= 4
        slower.append(loss["placement"]["collectives_loss"])
        down.append(gpu)
    # The third leaves one pair on a switch, the fourth none.
    assert slower == [0, 0, pytest.approx(slower[2]), 0]
    assert slower[2] > 0
    assert loss["placement"]["tiers"][0]["kind"] != "switch"
    assert json.loads(path.read_text())["left"]["gpus"] == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ("--within=switch", "--busy=node0:0,node0:2,node0:4,node0:6"),
            "needs 2 GPUs in one switch; the largest has 1",
        ),
        (("--lose=node0",), "needs 2 GPUs; 0 are free after the loss"),
        (("--busy=node0:0-4",), "the plan takes 4 GPUs, 3 are offered"),
        (("--model=llama-3.1-70b",), "cannot run: memory: "),
    ],
)
def test_what_has_no_place_exits_3_and_says_why_with_numbers(words: tuple[str, ...], reason: str) -> None:
    base = [word for word in PLACE if not any(word.startswith(f"{w.split('=')[0]}=") for w in words)]
    ran, table = both(*base, *words)
    document = json.loads(ran.out)
    assert (ran.code, document["status"]) == (3, "infeasible")
    assert reason in document["reason"]
    assert "placement" not in document
    assert table.code == 3
    assert reason in " ".join(table.out.split())


def test_domains_with_room_are_listed_on_nodes_that_differ(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(
        'name = "lab"\n[[nodes]]\npreset = "server-8xl40s"\n'
        '[[nodes]]\npreset = "server-8xl40s"\ngpus = 4\npcie = { gpus = 4 }\n'
        "sockets = { gpus = 4 }\nnics = { gpus = 4 }\n"
    )
    words = ("place", "--plan=dp2 tp4", "--model=llama-3.1-8b", f"--cluster={path}", "--within=switch")
    document = json.loads(run(*words, "--format=json").out)
    assert document["within"]["domains"] == [
        {"name": "node1:switch0", "gpus": [f"node1:{gpu}" for gpu in range(4)], "replicas": 1}
    ]
    assert document["within"]["others"] == 4


def test_a_placement_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    path = tmp_path / "placed.svg"
    assert run(*PLACE, "--busy=node0:7", "--lose=node0:0", f"--plot={path}").code == 0
    assert "on GPUs: stage/rank" in path.read_text()


def test_time_that_does_not_suffice_to_find_gpus_is_named() -> None:
    nodes = 32
    taken = ",".join(f"node{gpu // 8}:{gpu % 8}" for gpu in range(0, 8 * nodes, 9))
    words = ("place", PLACE[2], "--plan=dp56 pp2 tp2", f"--cluster={nodes}xserver-8xl40s", f"--busy={taken}")
    ran = run(*words, "--lose=node0:3", "--time_limit=0.01")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith(": 0.01 s do not suffice to find GPUs; allow more time (--time_limit)\n")


def test_what_place_cannot_do_is_refused(tmp_path: Path) -> None:
    assert "--lose: node2:0: no such node in server-8xl40s" in refused(*PLACE, "--lose=node2:0")
    assert "--rankfile: expected a file name that ends in .txt" in refused(*PLACE, "--rankfile=ranks.csv")
    assert "cannot be written" in refused(*PLACE, f"--rankfile={tmp_path}/gone/ranks.txt")
    assert "no such file; name a rank file" in refused(*PLACE, f"--at={tmp_path}/gone.txt")
    assert "unknown --within 'rack'; did you mean socket?" in refused(*PLACE, "--within=rack")
    assert "no GPU is free" in refused(*PLACE, "--busy=node0")
    assert "on= puts stages on several types of GPU" in refused(*PLACE[:1], "--plan=pp2 on=h100-sxm-80gb:2")
    assert list(tmp_path.iterdir()) == []


# ---- bad input ---------------------------------------------------------------------------------------------------

NONSENSE = [
    "",
    " ",
    "nan",
    "inf",
    "-1",
    "0",
    "1e400",
    "9" * 30,
    "yes",
    "[1,2]",
    "'",
    '"',
    "a\nb",
    "é\u202e",
    "--",
    "None",
]
ACCEPTED = {
    ("seed", "0"),
    ("acceptance", "0"),  # a share of drafts, which has no effect without drafts
}
FIRST = {option.name: name for name, command in reversed(COMMANDS.items()) for option in command.options}
"""The first command that has an option."""


def others(command: str, name: str) -> tuple[str, ...]:
    """What a command needs beside one of its options."""
    return tuple(word for word in ONE[command] if not word.startswith(f"--{name}="))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("text", NONSENSE, ids=repr)
def test_nonsense_for_any_option_is_refused_in_one_line(command: str, text: str) -> None:
    for option in COMMANDS[command].options:
        # What several commands share is asked of the first in full, of the others in part.
        some = FIRST[option.name] == command or NONSENSE.index(text) % 4 == len(command) % 4
        # Any text may name a new folder; what is refused of folders is in test_launch_saved.py.
        if some and (option.name, text) not in ACCEPTED and option.name != "save":
            message = refused(*command.split(), *others(command, option.name), f"--{option.name}={text}")
            assert len(message) < 1100


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_needs_its_value_and_comes_once(command: str) -> None:
    for option in COMMANDS[command].options:
        rest = others(command, option.name)
        if option.kind is not bool:
            for words in ((f"--{option.name}",), (f"--{option.name}", "--debug=false")):
                assert f"--{option.name}: needs a value" in refused(*command.split(), *rest, *words)
        twice = (f"--{option.name}=false", f"--{option.name}=false")
        if option.again:
            continue
        assert f"--{option.name}: given twice" in refused(*command.split(), *rest, *twice)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "words",
    [("--bogus",), ("--bogus=1",), ("-x",), ("--",), ("--", "--interactive"), ("--", "--trace"), ("5",), ("x", "y")],
    ids=" ".join,
)
def test_words_that_belong_to_nothing_are_refused(command: str, words: tuple[str, ...]) -> None:
    message = refused(*command.split(), *ONE[command], *words)
    assert words[0].partition("=")[0] in message


@pytest.mark.parametrize("command", ["plna", "_run_plan", "__class__", "__init__", "mro", "Plan", "0", "plan.x", ""])
def test_only_commands_are_commands(command: str) -> None:
    assert refused(command).startswith(f"unknown command {command!r}")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--max_num_batched_tokens=100",), "max_num_batched_tokens 100 is below max_num_seqs 1024"),
        (("--gpus=3",), "--gpus: 3 is not between 1 and the 2 GPUs of 2xh200-sxm"),
        (("--objective=latency",), "unknown objective 'latency'"),
        (("--slo=tpot_p95<1ms",), "tpot takes <=, got <"),
        (("--max_model_len=999999",), "beyond the 131072 positions"),
        (("--top=10001",), "--top: 10001 is not between 1 and 10000"),
    ],
)
def test_settings_that_contradict_name_both_sides(words: tuple[str, ...], part: str) -> None:
    assert part in refused("plan", *CHEAP, *words)


def test_a_bad_file_leaves_stdout_empty(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("nodes = -1\ngpus_per_node = 'x'\n")
    message = refused("plan", f"--cluster={tmp_path}/bad.toml", "--format=json")
    assert "nodes = -1 must be from 1" in message
    assert "gpus_per_node = 'x' must be a whole number" in message
    (tmp_path / "bad.csv").write_text("arrival_s,prompt,output\n0,-1,5\n0,5,nan\n")
    message = refused("plan", f"--trace={tmp_path}/bad.csv")
    assert "line 2" in message
    assert "line 3" in message


def test_debug_adds_the_traceback_and_keeps_the_exit_code() -> None:
    ran = run("plan", "--model=nothing", "--debug")
    assert ran.code == 2
    assert ran.err.startswith("Traceback")
    assert ran.err.splitlines()[-1].startswith("error: unknown model 'nothing'")


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise ZeroDivisionError

    answered_by(monkeypatch, "models", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["models"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(KeyboardInterrupt, 130, "error: interrupted\n"), (MemoryError, 2, "error: out of memory; ")],
)
def test_interruption_and_lack_of_memory_end_in_a_line(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], code: int, line: str
) -> None:
    def fail(_: object) -> None:
        raise error

    answered_by(monkeypatch, "models", fail)
    ran = run("models")
    assert ran.code == code
    assert ran.err.startswith(line)


def test_what_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise OSError(24, "Too many open files", "some/file")

    answered_by(monkeypatch, "models", fail)
    ran = run("models")
    assert ran.code == 1
    assert ran.err == "error: the system refuses some/file (Too many open files); --debug shows where\n"
    with pytest.raises(OSError, match="Too many open files"):
        cli.main(["models", "--debug"])


OPTION_NAMES = sorted({option.name for command in COMMANDS.values() for option in command.options})
TEXT = st.one_of(
    st.text(max_size=30),
    st.sampled_from([*NONSENSE, "true", "4", "fp8", "bf16", "tp2", "chat", "table", "json", "-h", "--top", "--", "-"]),
    st.integers().map(str),
    st.floats().map(str),
)
WORD = st.one_of(
    st.builds(
        lambda dash, name, value: f"{dash}{name}={value}",
        st.sampled_from(["--", "-", "---"]),
        st.sampled_from(OPTION_NAMES),
        TEXT,
    ),
    st.sampled_from([f"--{name}" for name in OPTION_NAMES]),
    TEXT,
)


@settings(max_examples=80)
@given(command=st.one_of(st.sampled_from(list(COMMANDS)), TEXT), words=st.lists(WORD, max_size=5))
def test_no_words_get_past_the_parser_unchecked(command: str, words: list[str]) -> None:
    seen: list[Arguments] = []

    def note(asked: Arguments) -> Result:
        seen.append(asked)
        return Result(document=Models(version="0", status="ok", models=()))

    with pytest.MonkeyPatch.context() as patch:
        for name in COMMANDS:
            answered_by(patch, name, note)
        ran = run(*(command.split() if command in COMMANDS else [command]), *words)
    assert ran.code in (0, 2)
    if ran.code == 2:
        # With --debug a traceback stands before the line.
        assert re.fullmatch(r"(Traceback.*\n)?error: [^\n]+\n", ran.err, re.DOTALL)
        assert "--debug" in words or ran.err.count("\n") == 1
        assert (ran.out, seen) == ("", [])
    elif seen:
        for option in options_of(COMMANDS[command].asks):
            value = getattr(seen[0], option.name)
            for one in value if isinstance(value, tuple) else (value,):
                assert one is None or type(one) in (option.kind, int)
    else:
        assert ran.out.startswith("NAME")


LETTERS = st.text(st.sampled_from("tpdefn0189,.()[]=<>:@%xX_- kvbams\n\0é"), max_size=24)
ASKED = {
    "model": st.one_of(LETTERS, st.sampled_from(["llama-3.1-8b", "mixtral-8x7b"])),
    "cluster": st.one_of(LETTERS, st.builds("{}x{}xh100{}".format, st.integers(-1, 99), st.integers(-1, 99), LETTERS)),
    "trace": st.one_of(
        LETTERS, st.builds("static:n=3,{}".format, LETTERS), st.builds("poisson:rate={}".format, LETTERS)
    ),
    "slo": st.one_of(
        LETTERS, st.builds("tpot_p95<={}".format, LETTERS), st.builds("ttft<={}@{}%".format, LETTERS, LETTERS)
    ),
    "weights": LETTERS,
    "kv": LETTERS,
    "objective": LETTERS,
    "plan": st.one_of(
        LETTERS,
        st.builds("{} tp{}".format, LETTERS, st.integers(-1, 10**9)),
        st.builds("attn({}) ffn({})".format, LETTERS, LETTERS),
    ),
}


@settings(max_examples=200)
@given(given=st.dictionaries(st.sampled_from(list(ASKED)), st.just(None), min_size=1, max_size=2), data=st.data())
def test_no_text_makes_a_problem_fail_unnamed(given: dict[str, None], data: st.DataObject) -> None:
    words = [f"--{name}={data.draw(ASKED[name], label=name)}" for name in given]

    def asked(ask: SimulateAsk) -> Result:
        assert isinstance(ask.plan, str)
        resolve_plan(ask.plan, ask)
        return Result(document=Models(version="0", status="ok", models=()))

    base = [word for word in (*CHEAP, "--plan=tp1") if word.partition("=")[0].removeprefix("--") not in given]
    with pytest.MonkeyPatch.context() as patch:
        answered_by(patch, "simulate", asked)
        ran = run("simulate", *base, *words)
    assert ran.code in (0, 2)
    assert ran.err == "" if ran.code == 0 else re.fullmatch(r"error: [^\n]+\n", ran.err)


# ---- help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_nothing_else(command: str) -> None:
    ran = run(*command.split(), "--help")
    assert (ran.code, ran.err) == (0, "")
    text = " ".join(ran.out.split())
    for option in COMMANDS[command].options:
        assert f"--{option.name}=" in ran.out
        assert option.text in text
    assert "GROUP" not in ran.out
    assert "As for" not in ran.out
    examples = COMMANDS[command].text.splitlines()
    assert all(len(line) <= 80 or line.strip() in map(str.strip, examples) for line in ran.out.splitlines())


def test_help_lists_the_commands() -> None:
    ran = run("--help")
    assert (ran.code, ran.err) == (0, "")
    flat = " ".join(ran.out.split())
    for name, command in {**COMMANDS, **GROUPS}.items():
        if " " not in name:
            assert f" {name} {command.summary}" in flat
    for name in GROUPS:
        shown = " ".join(run(name, "--help").out.split())
        members = {key.split()[1]: command for key, command in COMMANDS.items() if key.startswith(f"{name} ")}
        assert all(f" {member} {command.summary}" in shown for member, command in members.items())
        assert run(name).out == run("help", name).out == run(name, "--help").out
    assert run().out == run("-h").out == run("help").out == ran.out


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--help"),
        ("--help", "plan"),
        ("plan", "--model", "-h"),
        ("plan", "--", "--help"),
        ("plan", "--top=x", "--help"),
    ],
)
def test_help_is_given_wherever_it_stands(words: tuple[str, ...]) -> None:
    ran = run(*words)
    assert ran.code == 0
    assert "solve.py plan - Find the plan" in ran.out


@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_short_names_in_the_help_work(command: str) -> None:
    found = re.findall(r"-(\w), --(\w+)=", run(command, "--help").out)
    assert found
    for letter, name in found:
        option = COMMANDS[command].option(name)
        assert f"--{name}: needs a value" in refused(command, f"-{letter}") or option.kind is bool


# ---- the release --------------------------------------------------------------------------------------------------


def test_the_release_is_told_in_a_line() -> None:
    ran = run("--version")
    assert ran == (0, f"apex-opt {version('apex-opt')}\n", "")
    assert "--version" in refused("plan", "--version")


# ---- files -------------------------------------------------------------------------------------------------------

SCORED = ("simulate", "--plan=tp1", *CHEAP[:2])


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a cluster and a trace under several names, which is the current one and the home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ROOT / "apex_opt/ir/configs/llama-3.1-8b.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    (tmp_path / "c.toml").write_text('nodes = 1\ngpus_per_node = 2\ngpu = "h100-sxm"\n')
    (tmp_path / "t.csv").write_text("arrival_s,prompt,output\n0,10,5\n1,12,6\n")
    (tmp_path / "hard.csv").hardlink_to("t.csv")
    (tmp_path / "soft.csv").symlink_to("t.csv")
    (tmp_path / "folder").mkdir()
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--trace=t.csv --requests=t.csv", "requests t.csv: is what --trace t.csv is read from"),
        ("--trace=~/t.csv --requests=hard.csv", "requests hard.csv: is what --trace "),
        ("--trace=soft.csv --requests=./t.csv", "requests t.csv: is what --trace soft.csv is read from"),
        ("--trace=t.csv --requests=~/soft.csv", "is what --trace t.csv is read from"),
        ("--trace=t.csv --model=. --timeline=config.json", "is what --model config.json is read from"),
        ("--trace=t.csv --model=~/config.json --timeline=folder/../config.json", "is what --model "),
        ("--trace=t.csv --requests=folder/gone/a.csv", "cannot be written (No such file or directory)"),
        ("--trace=t.csv --requests=a.csv --timeline=folder/a/b.json", "cannot be written (No such file or directory)"),
    ],
)
def test_a_file_that_may_not_be_written_is_said_before_the_work(
    own: Path, monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    answered_by(monkeypatch, "simulate", lambda _: pytest.fail("the work was begun"))
    before = contents(own)
    asked = [word for word in SCORED if not (word.startswith("--model") and "--model" in words)]
    assert said in refused(*asked, *words.split())
    assert contents(own) == before


@pytest.mark.parametrize("beside", CONFIG_FILES[1:])
@pytest.mark.parametrize("model", [".", "config.json", "~/config.json"])
def test_what_is_read_beside_a_model_is_not_overwritten(own: Path, beside: str, model: str) -> None:
    (own / beside).write_text('{"quantization": {"quant_algo": "FP8"}}')
    before = contents(own)
    asked = [word for word in SCORED if not word.startswith("--model")]
    said = refused(*asked, f"--model={model}", "--trace=t.csv", f"--timeline={beside}")
    assert f"timeline {beside}: is what --model " in said
    assert contents(own) == before


def test_all_files_that_a_model_is_read_from_are_known() -> None:
    assert ("config.json", *(name for name, _ in QUANTISATION_FILES)) == CONFIG_FILES


def test_a_cluster_file_is_not_overwritten_by_what_is_made_of_it(own: Path) -> None:
    before = contents(own)
    words = ("cluster", "import", "--target=c.toml")
    assert "is what --source c.toml is read from" in refused(*words, "--source=c.toml")
    assert "is what --gpu c.toml is read from" in refused(*words, "--source=t.csv", "--gpu=c.toml")
    assert contents(own) == before


def test_what_draws_is_looked_for_before_the_work(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    for command in ("pareto", "validate", "place"):
        answered_by(monkeypatch, command, lambda _: pytest.fail("the work was begun"))
    assert "--plot: needs vl-convert-python" in refused("pareto", *CHEAP, "--plot=a.png")
    assert "--plot: needs vl-convert-python" in refused("validate", "--measured=t.csv", "--plot=a.png")
    assert "--plot: needs vl-convert-python" in refused("place", "--plan=tp1", "--plot=a.png")
    assert "--report: needs vl-convert-python" in refused("pareto", *CHEAP, "--report=a.html")
    assert not (own / "a.png").exists()


def test_a_report_is_written_beside_the_answer_and_refused_before_the_work(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    plain = run("plan", *CHEAP)
    ran = run("plan", *CHEAP, "--report=a.html")
    assert (ran.code, ran.out) == (0, plain.out)
    assert "report written to a.html\n" in ran.err
    assert (own / "a.html").read_text().startswith("<!DOCTYPE html>")
    infeasible = run("plan", "--cluster=1xt4", CHEAP[2], "--report=why.html")
    assert infeasible.code == 3
    assert "There is no answer (infeasible)" in (own / "why.html").read_text()
    assert run("clusters", "--report=list.html").code == 0
    assert "h100-sxm" in (own / "list.html").read_text()
    answered_by(monkeypatch, "plan", lambda _: pytest.fail("the work was begun"))
    (own / "there.html").mkdir()
    assert "--report: expected a file name that ends in .html" in refused("plan", *CHEAP, "--report=a.htm")
    assert "report there.html: cannot be written (not a regular file)" in refused("plan", *CHEAP, "--report=there.html")
    assert "report gone/a.html: cannot be written" in refused("plan", *CHEAP, "--report=gone/a.html")


def test_files_are_written_below_the_home_folder_and_through_links(own: Path) -> None:
    (own / "link.json").symlink_to("folder/timeline.json")
    ran = run(*SCORED, "--trace=~/t.csv", "--requests=~/folder/requests.csv", "--timeline=link.json")
    assert ran.code == 0, ran.err
    assert (own / "folder/requests.csv").read_text().startswith("request,arrival_s,prompt,output")
    assert json.loads((own / "folder/timeline.json").read_text())["traceEvents"]
    assert (own / "link.json").is_symlink()
    assert sorted(os.listdir(own / "folder")) == ["requests.csv", "timeline.json"]


def test_an_answer_is_shown_though_its_file_cannot_be_written(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        raise InputError(f"requests {path}: cannot be written (No space left on device)")

    monkeypatch.setattr("apex_opt.report.requests.write_requests", full)
    ran = run(*SCORED, "--trace=t.csv", "--requests=a.csv", "--format=json")
    assert ran.code == 2
    assert json.loads(ran.out)["status"] == "feasible"
    assert ran.err.endswith("error: requests a.csv: cannot be written (No space left on device)\n")


def test_a_disk_that_fills_up_leaves_what_was_there(own: Path) -> None:
    (own / "big.json").write_text("before")
    words = [*SCORED, "--trace=static:n=200,prompt=64,output=64", "--timeline=big.json"]
    # The system's own limit on the size of files stands for a disk that is full.
    script = 'ulimit -f 8; trap "" XFSZ; exec "$0" "$@"'
    command = ["bash", "-c", script, sys.executable, str(ROOT / "solve.py"), *words]
    ran = subprocess.run(command, cwd=own, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.endswith("cannot be written (File too large); name a file in a folder that can\n")
    assert "Traceback" not in ran.stderr
    assert "tp1" in ran.stdout
    assert (own / "big.json").read_text() == "before"
    assert not [name for name in os.listdir(own) if name.endswith(".part")]


def test_what_is_no_file_is_refused_by_every_reader_in_one_line(own: Path) -> None:
    os.mkfifo(own / "pipe")
    os.mkfifo(own / "pipe.toml")
    os.mkfifo(own / "folder/config.json")
    for words in (
        (*SCORED, "--trace=pipe"),
        (*SCORED[:3], "--trace=t.csv", "--cluster=pipe.toml"),
        ("simulate", "--plan=tp1", "--model=folder"),
        ("simulate", "--plan=tp1", "--model=pipe"),
        ("place", "--plan=tp1", "--model=llama-3.1-8b", "--at=pipe"),
        ("cluster", "import", "--source=pipe", "--gpu=h100-sxm"),
        ("validate", "--measured=pipe"),
        ("profile", "import", "--kind=apex", "--source=pipe", "--gpu=h100-sxm"),
    ):
        assert "not a regular file but a pipe" in refused(*words), words
        if not words[-1].endswith((".toml", "folder")):
            zero = [word.replace("=pipe", "=/dev/zero") for word in words]
            assert "not a regular file but a device" in refused(*zero), zero


# ---- compiling ---------------------------------------------------------------------------------------------------


def test_compiling_is_not_announced_for_a_kernel_in_use() -> None:
    assert run("simulate", "--plan=tp1", *CHEAP).code == 0
    assert "compiling" not in run("simulate", "--plan=tp1", *CHEAP).err


# ---- traces of the field ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("aiperf-doc-bailian.jsonl", ["1 of 2 requests are later turns", "1 of 1 later turns have prompts shorter"]),
        ("aiperf-doc-mooncake.jsonl", []),
        (
            "aiperf-session.jsonl",
            ["1 of 3 requests wait for the answer before", "1 of 1 later turns have prompts shorter"],
        ),
        ("bailian.jsonl", ["1 of 3 requests are later turns", "1 of 1 later turns have prompts shorter"]),
        ("burstgpt.csv", ["1 of 4 requests have no answer"]),
        ("genai-perf.json", ["the file has mean lengths only", "the file does not say how many requests"]),
        ("json-array.json", []),
        ("llmservingsim.jsonl", []),
        ("splitwise.csv", []),
        ("vllm-bench.json", ["the file has no arrivals: they are drawn"]),
    ],
)
def test_traces_of_the_field_are_served_and_what_they_leave_open_is_told(name: str, notes: list[str]) -> None:
    words = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--cluster=1xh200-sxm", f"--trace={TRACES / name}")
    ran, table = both(*words)
    document = json.loads(ran.out)
    assert len(document["notes"]) == len(notes)
    assert all(note.startswith(start) for note, start in zip(document["notes"], notes, strict=True))
    assert all(f"note: {start}" in table.out for start in notes)
    assert "cache_hit_rate" not in document["best"]["metrics"] and "prompt tokens found" not in table.out


def test_what_the_cache_finds_is_told_where_prefix_caching_is_on() -> None:
    words = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--cluster=1xh200-sxm", "--prefix_caching=true")
    spoken = (*words, f"--trace={TRACES / 'bailian.jsonl'}")
    metrics = json.loads(run(*spoken, "--format=json").out)["best"]["metrics"]
    assert (metrics["cached_tokens"], metrics["cache_hit_rate"]) == (48, 48 / 126)
    assert "48 prompt tokens found, 38.1% of all" in run(*spoken).out
    silent = (*words, f"--trace={TRACES / 'json-array.json'}")
    document = json.loads(run(*silent, "--format=json").out)
    assert [note.split(" says ")[0] for note in document["notes"]] == ["--prefix_caching: trace json-array"]
    assert document["best"]["metrics"]["cached_tokens"] == 0
    assert "note: --prefix_caching: trace json-array says nothing of what its prompts contain" in run(*silent).out


def test_what_the_cache_finds_is_told_of_a_fleet_too(two_types: str) -> None:
    shape = "--trace=poisson:rate=60,n=60,prompt=512,output=8,prefix=(256,1)"
    words = ("plan", "--model=llama-3.1-8b", two_types, shape, "--prefix_caching=true")
    ran, table = both(*words)
    metrics = json.loads(ran.out)["best"]["metrics"]
    assert 0 < metrics["cached_tokens"] <= 59 * 256 and metrics["cached_tokens"] % 16 == 0
    assert metrics["cache_hit_rate"] == metrics["cached_tokens"] / (60 * 512)
    assert f"{metrics['cached_tokens']:,} prompt tokens found" in table.out


def test_lengths_alone_are_served_at_the_rate_that_is_given() -> None:
    words = ("simulate", "--plan=tp1", "--model=llama-3.1-8b", "--cluster=1xh200-sxm")
    vidur = f"--trace={TRACES / 'vidur-len.csv'}"
    assert "has lengths but no arrivals; give the requests per second as --rate" in refused(*words, vidur)
    assert "or call the column that has them timestamp (not read: pd_ratio)" in refused(*words, vidur)
    document = json.loads(run(*words, vidur, "--rate=1", "--format=json").out)
    assert document["question"]["trace"]["rate_per_s"] == pytest.approx(1, rel=0.01)
    assert "Poisson arrivals at 1 requests/s, as the trace tells none" in document["notes"][0]
