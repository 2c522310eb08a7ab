"""apex_opt.workload.shipped: the files in traces/ are what their command writes and what their cards say."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from apex_opt import units
from apex_opt.errors import InputError, UnknownNameError
from apex_opt.workload import describe_trace, list_traces, load_trace
from apex_opt.workload.shipped import RECIPES, card, generate, write_all

FOLDER = units.DATA_ROOT / "traces"


def card_of(name: str) -> dict[str, object]:
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())


def test_every_shipped_trace_has_a_recipe() -> None:
    assert {name for name, _ in list_traces()} == set(RECIPES)


def test_seeds_differ_so_that_no_two_traces_share_arrivals() -> None:
    assert len({recipe.seed for recipe in RECIPES.values()}) == len(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_trace_is_its_law_drawn_again(name: str) -> None:
    drawn, shipped = generate(name), load_trace(name)
    assert drawn.name == shipped.name == name
    assert drawn.arrival_ns.tolist() == shipped.arrival_ns.tolist()
    assert drawn.prompt.tolist() == shipped.prompt.tolist()
    assert drawn.output.tolist() == shipped.output.tolist()


@pytest.mark.parametrize("name", RECIPES)
def test_the_card_holds_for_the_file(name: str) -> None:
    shipped, record = load_trace(name), card_of(name)
    assert record["sha256"] == hashlib.sha256((FOLDER / f"{name}.jsonl").read_bytes()).hexdigest()
    assert record["licence"] == "Apache-2.0" and record["file"] == f"{name}.jsonl" and record["n"] == len(shipped)
    measured = {key: value for key, value in shipped.summary().items() if isinstance(value, int | float)}
    assert record["statistics"] == pytest.approx(measured, abs=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_the_law_on_the_card_gives_the_trace_to_anyone(name: str) -> None:
    record = card_of(name)
    law, seed = record["law"], record["seed"]
    assert isinstance(law, str) and isinstance(seed, int)
    assert describe_trace(law, seed).prompt.tolist() == load_trace(name).prompt.tolist()


@pytest.mark.parametrize(
    ("name", "rate", "prompt", "output"),
    [("chat", 4, 220, 220), ("creation", 1, 300, 700), ("summarization", 1, 2800, 180), ("code", 3, 2000, 32)],
)
def test_realised_statistics_are_near_the_law(name: str, rate: float, prompt: float, output: float) -> None:
    trace = load_trace(name)
    # Within 4%: the seeds are chosen so; the longest prompts of `code` are cut, which takes 3% off its mean.
    assert trace.rate_per_s == pytest.approx(rate, rel=0.04)
    assert trace.prompt.mean() == pytest.approx(prompt, rel=0.04)
    assert trace.output.mean() == pytest.approx(output, rel=0.04)
    # Poisson: the coefficient of variation of 999 gaps lies within 10% of 1.
    assert trace.burstiness == pytest.approx(1, abs=0.1)


def test_the_command_writes_the_same_bytes(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "apex_opt.workload.shipped", str(tmp_path / "new")],
        capture_output=True,
        text=True,
        cwd=units.DATA_ROOT,
        check=True,
    )
    written = [Path(line) for line in run.stdout.splitlines()]
    assert sorted(path.name for path in written) == sorted(f"{n}{s}" for n in RECIPES for s in (".jsonl", ".toml"))
    for path in written:
        assert path.read_bytes() == (FOLDER / path.name).read_bytes()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*; name another folder"):
        write_all(tmp_path / "file" / "traces")


def test_an_unknown_name_is_suggested() -> None:
    with pytest.raises(UnknownNameError, match="unknown shipped trace 'chatt'; did you mean chat"):
        generate("chatt")
    with pytest.raises(UnknownNameError, match="unknown shipped trace"):
        card("chatt")
