"""Help in groups, and words completed by the shell."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cli_cases import ROOT, run
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.described import COMMANDS
from apex_opt.engines import kind_names
from apex_opt.plans.speculation import METHODS
from apex_opt.usage import GROUPS, SHELLS, candidates, completion, grouped, values_of

if TYPE_CHECKING:
    from pathlib import Path

VLLM_RELEASES = [name for name in kind_names() if name.startswith("vllm-")]
OPTIONS = {name: command.options for name, command in COMMANDS.items()}


def complete(*words: str) -> list[str]:
    return candidates(words, OPTIONS, values_of)


def test_what_many_commands_have_stands_in_one_group() -> None:
    named = [name for names in GROUPS.values() for name in names]
    assert len(named) == len(set(named))
    counts = {
        o.name: sum(o in options for options in OPTIONS.values()) for options in OPTIONS.values() for o in options
    }
    assert {name for name, count in counts.items() if count > 6} <= set(named)
    assert set(named) <= set(counts)


def test_help_loses_no_flag_and_begins_with_the_most_used() -> None:
    flags = "".join(
        f"    {short}--{name}=VALUE\n        Type: Optional[str]\n        Default: None\n        About {name}.\n"
        for name, short in (("seed", "-s, "), ("odd", ""), ("model", "-h, "), ("top", ""))
    )
    text = grouped(f"NAME\n    x\n\nFLAGS\n{flags}")
    order = [text.index(part) for part in ("MOST USED", "--model=", "OF THIS COMMAND", "--odd=", "TRAFFIC", "--seed=")]
    assert order == sorted(order)
    assert "Optional" not in text
    assert text.count("About") == 4
    assert grouped("NAME\n    no flags") == "NAME\n    no flags"


def test_words_are_completed_to_commands_options_and_names() -> None:
    assert complete("pl") == ["plan", "place"]
    assert complete("") == list(dict.fromkeys(name.split()[0] for name in COMMANDS))
    assert complete("cluster", "") == ["show", "import"]
    assert complete("plan", "--ob") == ["--objective="]
    assert "--seed=" not in complete("plan", "--seed=1", "--")
    assert complete("plan", "--model=llama-3.1-4") == ["--model=llama-3.1-405b"]
    assert complete("plan", "--model", "llama-3.1-4") == ["llama-3.1-405b"]
    assert complete("plan", "--weights=bf16,fp8,n") == ["--weights=bf16,fp8,nvfp4"]
    assert complete("plan", "--check=") == ["--check=true", "--check=false"]
    assert complete("plan", "--cluster=dgx-h2") == ["--cluster=dgx-h200"]
    assert complete("cluster", "show", "--cl") == ["--cluster="]
    assert "--routing=round_robin,round_robin" not in complete("plan", "--routing=round_robin,")
    assert complete("plan", "--profiles=") == []  # a folder: the shell's own files
    assert complete("plan", "--objective=energy,e2e_p9") == [f"--objective=energy,e2e_p{p}" for p in (90, 95, 99)]
    assert complete("plan", "--serving=p") == ["--serving=pools"]
    assert complete("plan", "--kv=f") == ["--kv=fp16", "--kv=fp8"]
    assert complete("plan", "--engine=vllm") == ["--engine=vllm", *(f"--engine={n}" for n in VLLM_RELEASES)]
    assert complete("plan", "--speculation=") == ["--speculation=none", *(f"--speculation={m}:" for m in METHODS)]
    assert complete("plan", "--routing=pull/le") == ["--routing=pull/least_loaded"]
    assert "--routing=pull/pull" in complete("plan", "--routing=pull/")
    assert "--routing=pull/pull,pull" not in complete("plan", "--routing=pull/pull,")
    assert complete("plan", "--engine_settings=capa") == ["--engine_settings=capacity_policy="]
    begun = "--engine_settings=adp_balance=true,adp_"
    rest = [f"--engine_settings=adp_balance=true,adp_{name}_iters=" for name in ("timeout", "batching_wait")]
    assert complete("plan", begun) == rest
    assert complete("plan", "--unknown=") == []
    assert complete("nothing", "--model=") == []


@given(
    st.lists(st.sampled_from(["plan", "--model", "=", "--", "-x", "cluster", "show", "--slo=", "", "é"]), max_size=6)
)
def test_no_words_make_it_fail(words: list[str]) -> None:
    assert all(isinstance(text, str) for text in complete(*words))


def test_bash_takes_a_word_apart_at_its_equals_sign() -> None:
    assert complete("plan", "--model", "=", "llama-3.1-4") == ["llama-3.1-405b"]
    assert complete("plan", "--runnable", "=") == ["vllm", "sglang", "trtllm", "any"]


@pytest.mark.parametrize("option", ["completion", "complete"])
def test_another_shell_is_refused_by_name(option: str) -> None:
    ran = run(f"--{option}", "csh")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"error: --{option}: words are completed in bash, zsh, fish, not in 'csh'\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_can_read_their_script(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    script = tmp_path / "script"
    script.write_text(completion(shell))
    subprocess.run([shell, "-n", str(script)], check=True, timeout=60)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A path on which the program stands first."""
    program = tmp_path / "apex-opt"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "solve.py"} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "found"), [("pl", ["plan", "place"]), ("plan --model = llama-3.1-4", ["llama-3.1-405b"])]
)
def test_bash_completes(words: str, found: list[str], path: str) -> None:
    lines = (
        "source <(apex-opt --completion bash)\n"
        f"COMP_WORDS=(apex-opt {words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))\n"
        '_apex_opt; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "-c", lines], capture_output=True, text=True, check=True, timeout=120, env={**os.environ, "PATH": path}
    )
    assert done.stdout.split() == found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes(path: str) -> None:
    lines = [
        "apex-opt --completion fish | source",
        *(f'complete -C "apex-opt {words}"' for words in ("pla", "plan --ob", "plan --serving=pools,")),
    ]
    done = subprocess.run(
        ["fish", "--no-config", "-c", "; ".join(lines)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PATH": path},
    )
    whole = ["--serving=pools,aggregated", "--serving=pools,shared"]
    assert done.stdout.split() == ["place", "plan", "--objective=", *whole]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes(path: str) -> None:
    # What is added to the words on offer, told in place of being offered.
    lines = (
        "compdef() { : }; compadd() { print -r -- ${(P)@[-1]} }; _files() { print files }\n"
        "source <(apex-opt --completion zsh)\n"
        "for line in 'apex-opt pl' 'apex-opt plan --ob' 'apex-opt plan --model=llama-3.1-4'; do\n"
        "  words=(${=line}); CURRENT=$#words; _apex_opt\ndone\n"
    )
    done = subprocess.run(
        ["zsh", "-f", "-c", lines],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PATH": path},
    )
    assert done.stdout.split() == ["plan", "place", "--objective=", "--model=llama-3.1-405b"]
