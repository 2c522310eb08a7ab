"""The Python API: the same answers as the command line, from names or objects, without a word printed."""

from __future__ import annotations

import csv
import inspect
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import apex_opt
from apex_opt import cli, described
from apex_opt.cluster import load_cluster
from apex_opt.commands import COMMANDS
from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.gate import REQUIRED, options_of
from apex_opt.ir import load_model
from apex_opt.report.types import Answer
from apex_opt.workload import load_trace

if TYPE_CHECKING:
    from apex_opt.commands import Result

ROOT = Path(__file__).resolve().parents[1]
CHEAP: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "2xh200-sxm",
    "trace": "static:n=6,prompt=64,output=8",
}


@pytest.fixture(scope="module")
def planned() -> Result:
    return apex_opt.plan(**CHEAP, top=2)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        cli.main(list(words))
    return capsys.readouterr().out


def test_every_public_name_is_there() -> None:
    assert [name for name in apex_opt.__all__ if getattr(apex_opt, name, None) is None] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_function_with_the_options_and_defaults_of_the_command_line(name: str) -> None:
    function, asks = getattr(apex_opt, name.replace(" ", "_")), COMMANDS[name].asks
    taken = inspect.signature(function).parameters
    options = {option.name: option for option in options_of(asks)}
    assert set(taken) == {"progress", *options}
    for option in options.values():
        assert taken[option.name].default == (inspect.Parameter.empty if option.default is REQUIRED else option.default)
        assert described.COMMANDS[name].option(option.name) == option
    positional = [p.name for p in taken.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert positional in ([], ["plan"], ["measured"], ["study"])
    assert function.__doc__.startswith(described.COMMANDS[name].summary)
    for option in options.values():
        default = {REQUIRED: "", None: ", optional"}.get(option.default, f", default {option.default!r}")
        assert f"\n{option.name} : {option.kind.__name__}{default}\n    {option.text}\n" in function.__doc__


def test_an_answer_is_the_document_and_the_page_of_the_command_line_and_nothing_is_printed(
    planned: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    again = apex_opt.plan(**CHEAP, top=2)
    assert capsys.readouterr() == ("", "")
    words = ["plan", *(f"--{name}={value}" for name, value in CHEAP.items()), "--top=2"]
    assert json.loads(printed(capsys, *words, "--format=json")) == planned.to_dict() == again.to_dict()
    page, _, onward = printed(capsys, *words).partition("\nNext: ")
    assert page.rstrip() == planned.page().rstrip()
    assert onward.count("\n") == 1
    assert printed(capsys, *words, "--sources").startswith(planned.page(sources=True).rstrip())
    assert planned.page(sources=True) != planned.page()


def test_what_a_name_stands_for_is_taken_in_its_place(planned: Result) -> None:
    loaded = {
        "model": load_model(CHEAP["model"]),
        "cluster": load_cluster(CHEAP["cluster"]),
        "trace": load_trace(CHEAP["trace"]),
    }
    assert apex_opt.plan(**loaded, top=2).to_dict() == planned.to_dict()
    for name in loaded:
        for wrong in (object(), load_model, 3, None):
            with pytest.raises(UsageError, match=f"{name}: expected"):
                apex_opt.plan(**CHEAP | {name: wrong})


def test_the_plan_of_an_answer_is_simulated_by_its_text(planned: Result) -> None:
    scored = apex_opt.simulate(planned.best.text, **CHEAP)
    assert (scored.best.plan, scored.best.value) == (planned.best.plan, planned.best.value)
    assert scored.best.memory == planned.best.memory
    several = apex_opt.simulate(("tp2", "dp2"), **CHEAP)
    assert list(several.to_frame()["plan"]) == [
        "attn(tp2) ffn(tp2) bf16",
        "dp2 attn(tp1) ffn(tp1) bf16",
    ]


def test_candidates_come_as_a_table_with_the_figures_of_the_document(planned: Result) -> None:
    table = planned.to_frame()
    rows = planned.to_dict()["candidates"]
    assert list(table["plan"]) == [row["plan"] for row in rows]
    assert list(table["metrics.ttft_s.p95"]) == [row["metrics"]["ttft_s"]["p95"] for row in rows]
    columns = {name.partition(".")[0] for name in apex_opt.models().to_frame().columns}
    assert columns == set(apex_opt.models().to_dict()["models"][0])


def test_csv_has_the_rows_of_the_table_with_whole_numbers_whole(
    planned: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", *(f"--{name}={value}" for name, value in CHEAP.items()), "--top=2", "--format=csv"]
    assert printed(capsys, *words) == planned.to_csv()
    rows, told = list(csv.DictReader(io.StringIO(planned.to_csv()))), planned.to_dict()["candidates"]
    assert [row["plan"] for row in rows] == [row["plan"] for row in told]
    for row, run in zip(rows, told, strict=True):
        assert row["gpus"] == str(run["gpus"])
        assert float(row["metrics.ttft_s.p95"]) == run["metrics"]["ttft_s"]["p95"]
        assert json.loads(row["memory"]) == run["memory"]
    none = apex_opt.plan(**CHEAP | {"model": "llama-3.1-70b", "cluster": "1xl4"})
    assert none.to_csv() == ""


def test_csv_of_answers_side_by_side_has_the_best_of_each_and_of_a_comparison_its_terms() -> None:
    several = apex_opt.simulate(("tp2", "dp2"), **CHEAP)
    rows = list(csv.DictReader(io.StringIO(several.to_csv())))
    assert next(iter(rows[0])) == "plan" and "candidates" not in rows[0]
    assert [row["best.plan"] for row in rows] == [row["plan"] for row in rows] == list(several.to_frame()["plan"])
    loser = apex_opt.explain(plan="dp2 tp1", **CHEAP)
    told = loser.to_dict()["comparison"]["terms"]
    assert [row["name"] for row in csv.DictReader(io.StringIO(loser.to_csv()))] == [term["name"] for term in told]
    plain = list(csv.DictReader(io.StringIO(apex_opt.explain(**CHEAP).to_csv())))
    assert plain[0]["plan"] == apex_opt.plan(**CHEAP).best.plan


def test_the_best_of_several_answers_is_that_of_the_one_named_as_the_best() -> None:
    plans = apex_opt.simulate(plan=["tp1", "tp2"], **CHEAP)
    number = plans.to_dict()["best"]
    assert plans.best.plan == plans.to_dict()["plans"][number - 1]["best"]["plan"]
    clusters = apex_opt.plan(**CHEAP | {"cluster": "1xl40s,1xh100-sxm"})
    assert clusters.to_dict()["best"] == 2
    assert clusters.best.plan == clusters.to_dict()["clusters"][1]["answer"]["best"]["plan"]
    assert clusters.best.plan in repr(clusters)
    assert apex_opt.plan(**CHEAP | {"cluster": "1xl4,1xl40s", "slo": "ttft_p95<=1us"}).best is None


def test_progress_is_told_to_whoever_asks() -> None:
    told: list[tuple[str, int, int]] = []
    apex_opt.plan(**CHEAP, progress=lambda *step: told.append(step))
    assert {what for what, _, _ in told} >= {"enumerating plans", "simulating plans"}


@pytest.mark.parametrize("what", [3, "loud", lambda done: None])
def test_what_cannot_be_told_of_progress_is_refused_in_one_line(planned: Result, what: Any) -> None:
    for ask in (lambda: apex_opt.models(progress=what), lambda: apex_opt.check(planned, progress=what)):
        with pytest.raises(UsageError, match="progress: expected a function of what is done, steps done and steps in"):
            ask()
    assert apex_opt.models(progress=print).found


def test_the_certificate_of_an_answer_is_replayed(planned: Result) -> None:
    found = apex_opt.check(planned)
    assert found.holds
    assert found.to_dict()["check"]["holds"]
    assert "check" not in planned.to_dict()
    assert found.document == apex_opt.plan(**CHEAP, top=2, check=True).document
    with pytest.raises(UsageError, match="check: takes an answer of plan or energy"):
        apex_opt.check(apex_opt.models())


def test_a_falsified_answer_does_not_hold(planned: Result) -> None:
    told = planned.document
    assert isinstance(told, Answer) and told.best is not None
    halved = replace(told, best=replace(told.best, value=told.best.value / 2))
    found = apex_opt.check(replace(planned, document=halved))
    assert not found.holds
    assert [text.split(",")[0] for text in found.to_dict()["check"]["disagreements"]] == [
        f"best.value is {told.best.value / 2!r}"
    ]
    counts = replace(told.certificate, space=told.certificate.space + 5, simulated=99, gap=0.5)
    other = replace(told, certificate=counts, best=replace(told.best, plan="dp9 tp9"))
    said = apex_opt.check(replace(planned, document=other)).to_dict()["check"]["disagreements"]
    assert {text.split(" ")[0] for text in said} >= {
        "best.plan",
        "certificate.space",
        "certificate.simulated",
        "certificate.gap",
    }


def test_a_script_that_each_worker_runs_anew_is_told_of_the_line_it_lacks(tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(f"import apex_opt\napex_opt.plan(**{CHEAP!r}, workers=2)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert 'A Python script asks for workers below if __name__ == "__main__":' in done.stderr.splitlines()[-1]


def test_nothing_found_is_an_answer_and_what_cannot_be_asked_an_error() -> None:
    nothing = apex_opt.simulate("tp1", **CHEAP | {"model": "llama-3.1-70b", "cluster": "1xl4"})
    assert (nothing.found, nothing.status, nothing.best) == (False, "infeasible", None)
    with pytest.raises(UsageError, match=r"--policy: there is no such option; .*--engine=orca or --engine=static"):
        apex_opt.plan(policy="orca")  # type: ignore[call-arg]
    with pytest.raises(UnknownNameError, match="unknown option of plan 'modle'; did you mean model"):
        apex_opt.plan(modle="x")  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="simulate: needs --plan"):
        apex_opt.simulate(**CHEAP)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="simulate: takes 1 arguments without a name, got 2"):
        apex_opt.simulate("tp1", "tp2")  # type: ignore[call-arg, misc]
    with pytest.raises(ApexError, match="--top: 0 is not between 1 and 10000"):
        apex_opt.plan(top=0)


def test_files_that_go_with_an_answer_are_written_on_request(tmp_path: Path) -> None:
    scored = apex_opt.simulate("tp2", **CHEAP)
    scored.write(requests=str(tmp_path / "r.csv"), timeline=str(tmp_path / "t.json"))
    assert (tmp_path / "r.csv").read_text().startswith("request,arrival_s,prompt,output")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    with pytest.raises(UnknownNameError, match="unknown file of this answer 'plot'; did you mean report"):
        scored.write(plot=str(tmp_path / "p.png"))


def test_the_package_is_light_and_a_room_does_not_hide_the_function_of_its_name() -> None:
    code = (
        "import sys, apex_opt\n"
        "assert callable(apex_opt.plan) and 'plan' in dir(apex_opt)\n"
        "heavy = {'numpy', 'pandas', 'numba', 'ortools', 'rich', 'fire', 'networkx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import apex_opt.plans.engine\n"
        "assert apex_opt.plan.__name__ == 'plan' and callable(apex_opt.plan)\n"
        "assert not hasattr(apex_opt, 'nothing')"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
