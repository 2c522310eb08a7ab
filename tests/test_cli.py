"""The command line from words to exit code: in this process, and in a few real ones."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numba
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import solve
from apex_opt.ask import Options, ask, ask_plan
from apex_opt.options import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
CHEAP = ("--model=llama-3.1-8b", "--cluster=2xh200-sxm", "--trace=static:n=6,prompt=64,output=8")
ONE = {"plan": (), "simulate": ("--plan=tp2",), "models": (), "clusters": (), "traces": ()}


class Ran(NamedTuple):
    """What a run left behind."""

    code: int
    out: str
    err: str


def run(*words: str) -> Ran:
    """Run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
        solve.main(list(words))
    return Ran(int(caught.value.code or 0), out.getvalue(), err.getvalue())


def refused(*words: str) -> str:
    """The one line on stderr of a run that is refused as bad input."""
    ran = run(*words)
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert ran.err.endswith("\n")
    return ran.err.removeprefix("error: ").rstrip("\n")


def shell(*words: str, **given: Any) -> subprocess.CompletedProcess[str]:
    """Run as its own process."""
    command = [sys.executable, str(ROOT / "solve.py"), *words]
    defaults: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "cwd": ROOT}
    return subprocess.run(command, check=False, **defaults | given)


# ---- what comes out -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned() -> tuple[dict[str, Any], str]:
    """One question answered twice: as a document and as tables."""
    words = ("plan", *CHEAP, "--slo=ttft_p95<=1s,tpot<=1s@90%,throughput>=0.001", "--top=3")
    document, table = run(*words, "--format=json"), run(*words)
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
    total = sum(certificate["infeasible"].values()) + certificate["bounded"] + certificate["simulated"]
    assert total == certificate["space"]


def test_tables_and_json_have_the_same_figures(planned: tuple[dict[str, Any], str]) -> None:
    document, table = planned
    best = document["best"]
    metrics = best["metrics"]
    rows = {line.split("  ")[0].strip(): line for line in table.splitlines()}
    for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "E2E")):
        assert seconds_in(rows[name]) == [pytest.approx(value, rel=0.05) for value in metrics[key].values()]
    assert numbers_in(rows["throughput"]) == [
        pytest.approx(metrics[key], rel=0.01) for key in ("throughput_rps", "output_tokens_per_s", "total_tokens_per_s")
    ]
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
    for what, source in document["provenance"].items():
        assert what in table
        assert source.split()[0] in table


def seconds_in(line: str) -> list[float]:
    """Durations of a line, in seconds."""
    scale = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
    return [float(value.replace(",", "")) * scale[unit] for value, unit in re.findall(r"([\d.,]+) (us|ms|s)\b", line)]


def numbers_in(line: str) -> list[float]:
    """Numbers of a line."""
    return [float(text.replace(",", "")) for text in re.findall(r"\d[\d,]*(?:\.\d+)?", line)]


def test_progress_is_on_stderr_only(planned: tuple[dict[str, Any], str]) -> None:
    ran = run("plan", *CHEAP, "--format=json")
    json.loads(ran.out)
    assert "simulating plans ..." in ran.err
    assert "enumerating plans ..." in ran.err
    assert "error" not in ran.err


def test_a_simulated_plan_equals_the_same_plan_found(planned: tuple[dict[str, Any], str]) -> None:
    best = planned[0]["best"]
    ran = run(
        "simulate", f"--plan={best['plan']}", *CHEAP, "--slo=ttft_p95<=1s,tpot<=1s@90%,throughput>=0.001", "-f=json"
    )
    assert ran.code == 0
    document = json.loads(ran.out)
    assert document["best"]["plan"] == best["plan"]
    assert document["best"]["metrics"] == best["metrics"]
    assert document["best"]["memory"] == best["memory"]


@pytest.mark.parametrize("command", ["models", "clusters", "traces"])
def test_lists_come_as_table_and_json(command: str) -> None:
    document = json.loads(run(command, "--format=json").out)
    assert document["status"] == "ok"
    table = run(command)
    assert table.code == 0
    for row in document[command]:
        assert row["gpu" if command == "clusters" else "name"] in table.out
        assert row["cluster" if command == "clusters" else "name"] in table.out


def test_listed_names_can_be_asked_for() -> None:
    names = {c: json.loads(run(c, "--format=json").out)[c] for c in ("models", "clusters", "traces")}
    given = {"trace": "static:n=1", "model": "llama-3.1-8b"}
    for kind, key in (("models", "name"), ("clusters", "cluster"), ("traces", "name")):
        for row in names[kind]:
            ask(_options(**given | {kind.removesuffix("s"): row[key]}))


def _options(**given: Any) -> Options:
    return Options.of(solve.Commands().plan(**given).options)


@pytest.mark.parametrize(
    "trace", ["static:n=1,prompt=1,output=1", "static:n=1", "closed:concurrency=3,n=7,output=5", "static:n=9,output=1"]
)
@pytest.mark.parametrize("form", ["table", "json"])
def test_odd_traces_are_answered(trace: str, form: str) -> None:
    ran = run("plan", "--model=llama-3.1-8b", "--cluster=h200-sxm", f"--trace={trace}", f"--format={form}")
    assert ran.code == 0, ran.err
    assert "NaN" not in ran.out
    assert "nan" not in ran.out.split("simulating")[0].split()


@pytest.mark.parametrize("objective", ["tpot_mean", "tpot_p99"])
def test_an_objective_nobody_has_is_undefined_rather_than_a_number(objective: str) -> None:
    ran = run(*("plan", *CHEAP[:2], "--trace=static:n=2,output=1", f"--objective={objective}", "--format=json"))
    assert ran.code == 0
    assert json.loads(ran.out)["objective"]["value"] is None


def test_an_old_gpu_gets_the_16_bit_format_it_has() -> None:
    ran = run("plan", "--model=llama-3.1-8b", "--cluster=2xv100-pcie", CHEAP[2], "--format=json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["best"]["plan"].endswith("fp16")


def test_the_options_of_batching_reach_the_answer() -> None:
    words = ("simulate", "--plan=tp2", *CHEAP, "--format=json")
    plain, narrow = (json.loads(run(*words, *more).out)["best"]["metrics"] for more in ((), ("--max_num_seqs=1",)))
    assert narrow["batches"] > plain["batches"]
    assert narrow["e2e_s"]["mean"] > plain["e2e_s"]["mean"]


# ---- what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ("--cluster=1xl40s", "--model=llama-3.1-70b"),
            ("memory: a GPU needs 14", "weights 141.1", "may use 43.5", "--weights=w4a16", "4 such GPUs (attn(tp4)"),
        ),
        (
            ("--cluster=1xh100-sxm", "--model=llama-3.1-70b"),
            ("needs 14", "may use 77.0", "--weights=fp8", "2 such GPUs (attn(tp2) ffn(tp2) bf16)"),
        ),
        (
            ("--cluster=2xa100-sxm", "--weights=fp8", "--model=llama-3.1-8b"),
            ("format: a100-sxm-80gb does not compute in fp8", "Feasible would be: --weights=bf16"),
        ),
        (
            ("--slo=tpot_p95<=1us", "--model=llama-3.1-8b", "--cluster=2xh200-sxm"),
            ("GB of weights per GPU", "TPOT limit is 0.001 ms", "any number of GPUs up to 64: relax the SLO"),
        ),
        (
            ("--slo=ttft_p95<=1us", "--model=llama-3.1-8b", "--cluster=2xh200-sxm"),
            ("misses ttft_p95<=1us (it reaches", "relax"),
        ),
        (
            ("--slo=throughput>=1e9", "--model=llama-3.1-8b", "--cluster=2xh200-sxm"),
            ("misses throughput>=1000000000 (it reaches", "requests/s"),
        ),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_what_is_infeasible_exits_3_and_says_why_with_numbers(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    words = ("plan", "--trace=static:n=4,prompt=64,output=4", *words)
    document = run(*words, "--format=json")
    assert document.code == 3, document
    answer = json.loads(document.out)
    assert (answer["status"], answer["best"], answer["candidates"]) == ("infeasible", None, [])
    for part in parts:
        assert part in answer["reason"]
    table = run(*words)
    assert table.code == 3
    assert answer["reason"] in " ".join(table.out.split())
    assert "Traceback" not in table.err


def test_a_request_that_the_cache_cannot_hold_is_infeasible_and_named() -> None:
    ran = run("plan", "--model=llama-3.1-70b", "--cluster=2xh100-sxm", "--trace=static:n=2,prompt=131000,output=60")
    assert ran.code == 3
    assert "KV cache of the longest request 21.5" in " ".join(ran.out.split())
    assert "Feasible would be: --weights=fp8" in " ".join(ran.out.split())


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
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("text", NONSENSE, ids=repr)
def test_nonsense_for_any_option_is_refused_in_one_line(command: str, text: str) -> None:
    for option in COMMANDS[command].options:
        if (option.name, text) not in ACCEPTED:
            message = refused(command, *ONE[command][: option.name != "plan"], f"--{option.name}={text}")
            assert len(message) < 1100


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_needs_its_value_and_comes_once(command: str) -> None:
    for option in COMMANDS[command].options:
        rest = ONE[command][: option.name != "plan"]
        if option.kind is not bool:
            for words in ((f"--{option.name}",), (f"--{option.name}", "--debug=false")):
                assert f"--{option.name}: needs a value" in refused(command, *rest, *words)
        twice = (f"--{option.name}=false", f"--{option.name}=false")
        assert f"--{option.name}: given twice" in refused(command, *rest, *twice)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "words",
    [("--bogus",), ("--bogus=1",), ("-x",), ("--",), ("--", "--interactive"), ("--", "--trace"), ("5",), ("x", "y")],
    ids=" ".join,
)
def test_words_that_belong_to_nothing_are_refused(command: str, words: tuple[str, ...]) -> None:
    message = refused(command, *ONE[command], *words)
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
    def fail(_: dict[str, Any]) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(solve.RUNNERS, "models", fail)
    with pytest.raises(ZeroDivisionError):
        solve.main(["models"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [(KeyboardInterrupt, 130, "error: interrupted\n"), (MemoryError, 2, "error: out of memory; ")],
)
def test_interruption_and_lack_of_memory_end_in_a_line(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], code: int, line: str
) -> None:
    def fail(_: dict[str, Any]) -> int:
        raise error

    monkeypatch.setitem(solve.RUNNERS, "models", fail)
    ran = run("models")
    assert ran.code == code
    assert ran.err.startswith(line)


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


@settings(max_examples=200)
@given(command=st.one_of(st.sampled_from(list(COMMANDS)), TEXT), words=st.lists(WORD, max_size=5))
def test_no_words_get_past_the_parser_unchecked(command: str, words: list[str]) -> None:
    seen: list[dict[str, Any]] = []

    def note(options: dict[str, Any]) -> int:
        seen.append(options)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solve, "RUNNERS", dict.fromkeys(COMMANDS, note))
        ran = run(command, *words)
    assert ran.code in (0, 2)
    if ran.code == 2:
        # With --debug a traceback stands before the line.
        assert re.fullmatch(r"(Traceback.*\n)?error: [^\n]+\n", ran.err, re.DOTALL)
        assert "--debug" in words or ran.err.count("\n") == 1
        assert (ran.out, seen) == ("", [])
    elif seen:
        for option in COMMANDS[command].options:
            assert seen[0][option.name] is None or type(seen[0][option.name]) in (option.kind, int)
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
def test_no_text_makes_a_question_fail_unnamed(given: dict[str, None], data: st.DataObject) -> None:
    words = [f"--{name}={data.draw(ASKED[name], label=name)}" for name in given]

    def asked(options: dict[str, Any]) -> int:
        ask_plan(options["plan"], Options.of(options))
        return 0

    base = [word for word in (*CHEAP, "--plan=tp1") if word.partition("=")[0].removeprefix("--") not in given]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(solve.RUNNERS, "simulate", asked)
        ran = run("simulate", *base, *words)
    assert ran.code in (0, 2)
    assert ran.err == "" if ran.code == 0 else re.fullmatch(r"error: [^\n]+\n", ran.err)


# ---- help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option_and_nothing_else(command: str) -> None:
    ran = run(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    text = " ".join(ran.out.split())
    for option in COMMANDS[command].options:
        assert f"--{option.name}=" in ran.out
        assert option.text in text
    assert "GROUP" not in ran.out
    assert "As for" not in ran.out
    assert all(len(line) <= 80 for line in ran.out.splitlines())


def test_help_lists_the_commands() -> None:
    ran = run("--help")
    assert (ran.code, ran.err) == (0, "")
    for name, command in COMMANDS.items():
        assert re.search(rf"\n +{name}\n +{re.escape(command.summary)}", ran.out)
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


def test_short_names_in_the_help_work() -> None:
    for letter, name in re.findall(r"-(\w), --(\w+)=", run("simulate", "--help").out):
        option = COMMANDS["simulate"].option(name)
        assert f"--{name}: needs a value" in refused("simulate", f"-{letter}") or option.kind is bool


# ---- real processes ----------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import solve\n"
        "for words in (['--help'], ['plan', '--help'], ['plan', '--bogus']):\n"
        "    try: solve.main(words)\n"
        "    except SystemExit: pass\n"
        "heavy = {'numba', 'ortools', 'pandas', 'rich', 'numpy', 'networkx'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
        "print(time.perf_counter() - start, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *_, modules, elapsed = ran.stderr.splitlines()
    assert modules == "[]"
    assert float(elapsed) < 0.5


def test_a_process_answers_with_its_exit_code() -> None:
    ran = shell("plan", *CHEAP, "--format=json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["status"] == "optimal"
    ran = shell("plan", *CHEAP, "--cluster=nowhere")
    assert (ran.returncode, ran.stdout) == (2, "")
    ran = shell("plan", "--model=llama-3.1-70b", "--cluster=1xl40s", "--trace=static:n=1")
    assert ran.returncode == 3


@pytest.mark.parametrize(
    "words", [("models",), ("plan", "--help"), ("simulate", "--plan=tp1", *CHEAP, "--format=json")]
)
def test_a_reader_that_leaves_early_is_no_error(words: tuple[str, ...]) -> None:
    script = f"set -o pipefail; {sys.executable} solve.py {' '.join(repr(word) for word in words)} | head -1"
    ran = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0
    assert ran.stdout.count("\n") == 1
    assert "Traceback" not in ran.stderr
    assert "Broken" not in ran.stderr
    reader, writer = os.pipe()
    os.close(reader)
    ran = shell(*words, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert ran.returncode == 0
    assert "Traceback" not in ran.stderr
    assert "Broken" not in ran.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        ran = shell("models", "--format=json", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 2
    assert ran.stderr == "error: standard output cannot be written (No space left on device); write to another place\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams_do_no_harm(closed: str) -> None:
    script = f"{sys.executable} solve.py models {closed}"
    ran = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0
    assert ran.stderr == ""
    assert ("llama" in ran.stdout) == (closed == "2>&-")


def test_a_name_of_any_bytes_can_be_printed(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff [bold]\n.jsonl"
    with open(path, "w") as file:
        file.write('{"arrival_s": 0, "prompt": 10, "output": 5}\n')
    for form in ("table", "json"):
        ran = shell("simulate", "--plan=tp1", *CHEAP[:2], "--trace=" + os.fsdecode(path), f"--format={form}")
        assert ran.returncode == 0, ran.stderr
        assert "[bold]" in ran.stdout


def test_a_terminal_gets_colours_help_without_a_pager_and_tables_of_its_width() -> None:
    pty = pytest.importorskip("pty")
    fcntl, struct, termios = (__import__(name) for name in ("fcntl", "struct", "termios"))
    for words in (("plan", "--help"), ("simulate", "--plan=tp1", *CHEAP)):
        parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "PAGER": "sleep 100"}
        environment.pop("COLUMNS", None)
        process = subprocess.Popen(
            [sys.executable, "solve.py", *words], cwd=ROOT, stdin=child, stdout=child, stderr=child, env=environment
        )
        os.close(child)
        output = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
            while chunk := os.read(parent, 65536):
                output += chunk
        assert process.wait(timeout=60) == 0
        os.close(parent)
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
        assert "\x1b[1m" in output.decode()
        page = text[text.index("Latency") if "Latency" in text else 0 :]
        assert all(len(line) <= 90 for line in page.splitlines())


def test_the_console_script_is_the_same_program(tmp_path: Path) -> None:
    script = tmp_path / "apex-opt"
    script.write_text(f"#!{sys.executable}\nfrom solve import main\nmain()\n")
    script.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([script, "--help"], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.startswith("NAME\n    apex-opt - ")


# ---- compiling ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(numba.config, "CACHE_LOCATOR_CLASSES"), reason="this numba always finds a folder")
def test_an_install_that_cannot_be_written_still_works_and_says_it_compiles() -> None:
    environment = {
        **os.environ,
        "NUMBA_DISABLE_JIT": "0",
        "NUMBA_CACHE_DIR": "/proc/nowhere",
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
    }
    ran = shell("simulate", "--plan=tp1", *CHEAP, "--format=json", env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "compiling the simulator, once on this machine: " in ran.stderr
    assert json.loads(ran.stdout)["status"] == "feasible"


def test_compiling_is_announced_until_a_cache_younger_than_the_source_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from apex_opt.plan.engine import EngineSettings
    from apex_opt.simulator import pack

    source = Path(pack.kn.__file__)
    dispatcher = SimpleNamespace(stats=SimpleNamespace(cache_path=str(tmp_path)), signatures=[])
    monkeypatch.setattr(pack.kn, "advance_single_nb", dispatcher)
    settings = EngineSettings()
    assert pack.needs_compiling(settings, 1)
    index = tmp_path / f"{source.stem}.advance_single_nb-732.py311.nbi"
    index.touch()
    assert not pack.needs_compiling(settings, 1)
    os.utime(index, (0, 0))
    assert pack.needs_compiling(settings, 1)
    dispatcher.stats.cache_path = None
    assert pack.needs_compiling(settings, 1)
    dispatcher.signatures = ["compiled in this process"]
    assert not pack.needs_compiling(settings, 1)
    monkeypatch.setattr(pack.kn, "advance_single_nb", lambda: None)  # compiling is switched off
    assert not pack.needs_compiling(settings, 1)


def test_compiling_is_not_announced_for_a_kernel_in_use() -> None:
    assert run("simulate", "--plan=tp1", *CHEAP).code == 0
    assert "compiling" not in run("simulate", "--plan=tp1", *CHEAP).err
