"""A study is read strictly: a command, options that are fixed, lists of the others along axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from apex_opt.errors import ApexError
from apex_opt.grids.study import read_study

if TYPE_CHECKING:
    from pathlib import Path

HEAD = 'command = "plan"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_grid_has_every_combination_and_the_last_axis_varies_first(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, HEAD + '[fixed]\ntop = 2\n[axes]\nkv = ["bf16", "fp8"]\nseed = [3, 1]\n'))
    points = [{"kv": "bf16", "seed": 3}, {"kv": "bf16", "seed": 1}, {"kv": "fp8", "seed": 3}, {"kv": "fp8", "seed": 1}]
    assert list(study.points()) == points
    assert len(study) == 4
    ask = study.ask(points[2])
    assert (ask.top, ask.kv, ask.seed) == (2, "fp8", 3)  # type: ignore[attr-defined]


def test_studies_differ_by_whatever_is_asked(tmp_path: Path) -> None:
    texts = [
        HEAD + "[axes]\nseed = [1, 2]\n",
        HEAD + "[axes]\nseed = [2, 1]\n",
        HEAD + "[fixed]\ntop = 1\n[axes]\nseed = [1, 2]\n",
        'command = "energy"\n[axes]\nseed = [1, 2]\n',
    ]
    digests = [read_study(write(tmp_path, text)).digest for text in texts]
    assert len({*digests}) == 4
    assert read_study(write(tmp_path, texts[0])).digest == digests[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", 'needs command = "NAME", one of plan, energy, capacity, pareto'),
        ('command = "plann"\n', "unknown command of study .*'plann'; did you mean plan"),
        ('command = "validate"\n', "unknown command of study .*'validate'"),
        (HEAD + "[axis]\nseed = [1]\n", "unknown key of study .*'axis'; did you mean axes"),
        (HEAD + "fixed = 3\n", r"fixed is 3; write it as a table, \[fixed\]"),
        (HEAD + '[fixed]\nmodl = "x"\n', r"option of plan in \[fixed\] of study .*'modl'; did you mean model"),
        (
            HEAD + "[axes]\nworkers = [1, 2]\n",
            r"\[axes\] workers is for the whole study; leave it out and give --workers",
        ),
        (HEAD + '[axes]\nplan = ["tp8"]\n', r"option of plan in \[axes\] of study .*'plan'"),
        (HEAD + "[axes]\nseed = 3\n", r"\[axes\] seed is 3; give a list of values"),
        (HEAD + "[axes]\nseed = []\n", r"\[axes\] seed is \[\]; give a list"),
        (HEAD + "[axes]\nseed = [1, 1]\n", r"\[axes\] seed has 1 twice"),
        (HEAD + "[axes]\nseed = [1, -1]\n", r"\[axes\] --seed: -1 is not between 0 and"),
        (HEAD + "[fixed]\nseed = 1\n[axes]\nseed = [2]\n", r"seed is both in \[fixed\] and in \[axes\]"),
        (HEAD + '[fixed]\ncluster = "8xh100-sxm,8xl40s"\n', r"cluster '8xh100-sxm,8xl40s' is several"),
        (HEAD + f"[axes]\nseed = {[*range(1001)]}\ntop = {[*range(1, 1001)]}\n", "1,001,000 points are more than the"),
        ('command = "capacity"\n[axes]\nseed = [1]\n', "capacity needs slo"),
        (HEAD, r"has no \[axes\]; give a list of values"),
        (HEAD + '[fixed]\nmodel = "llama-3.1-8b"\n', r"has no \[axes\]"),
        ("command =", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ApexError, match=told) as caught:
        read_study(write(tmp_path, text))
    assert "study.toml" in str(caught.value)
    assert "\n" not in str(caught.value)
