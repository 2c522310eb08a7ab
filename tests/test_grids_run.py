"""A study goes on where it was, answers nothing twice and keeps what failed; a killed worker or node loses nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from cli_cases import ROOT, run

import apex_opt.api
from apex_opt.errors import InputError
from apex_opt.grids.points import Outcome
from apex_opt.grids.run import run_study
from apex_opt.grids.store import Store
from apex_opt.grids.study import read_study
from apex_opt.grids.workers import Lost, Processes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TEXT = """command = "plan"
[fixed]
trace = "static:n=6,prompt=64,output=8"
[axes]
model = ["llama-3.1-8b", "lama"]
cluster = ["2xh200-sxm", "2xh200-sxm-141gb", "1xt4"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "study.toml"
    file.write_text(TEXT, encoding="utf-8")
    return file


class Here:
    """Works in this process, and stops after so many items; knows what it did."""

    def __init__(self, most: int = 1000) -> None:
        self.most, self.done = most, list[Any]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def each(self, function: Any, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for place, item in enumerate(items):
            if function.__name__ == "answered":
                if len(self.done) == self.most:
                    raise KeyboardInterrupt
                self.done.append(item)
            yield place, function(item)


def go(path: Path, folder: Path, workers: Here, **given: Any) -> list[dict[str, Any]]:
    study = read_study(path)
    with Store(folder, study) as store:
        run_study(study, store, lambda: workers, apex_opt.plan, lambda *_: None, **given)  # type: ignore[arg-type, return-value]
        return store.rows()


def test_an_interrupted_study_goes_on_and_equal_points_are_answered_once(path: Path, tmp_path: Path) -> None:
    folder, first, second = tmp_path / "out", Here(1), Here()
    with pytest.raises(KeyboardInterrupt):
        go(path, folder, first)
    rows = go(path, folder, second)
    assert len(first.done) == len(second.done) == 1
    assert [row["point"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["same_as"] for row in rows] == [None, 0, None, None, None, None]
    assert [row["exit_code"] for row in rows] == [0, 0, 3, 2, 2, 2]
    assert rows[0]["plan"] == rows[1]["plan"] == "attn(tp2) ffn(tp2) bf16"
    assert rows[3]["error"].startswith("unknown model 'lama'")
    assert len([*folder.glob("*.parquet")]) == 1
    third = Here()
    assert go(path, folder, third) == rows
    assert third.done == []


def test_a_point_that_equals_one_of_the_last_run_takes_its_answer(path: Path, tmp_path: Path) -> None:
    study, folder = read_study(path), tmp_path / "out"
    rows = go(path, folder, Here())
    whole = tmp_path / "half"
    with Store(whole, study) as store:
        outcome = Outcome(status="optimal", exit_code=0, error=None, rows=({"plan": "kept", "gpus": 2},))
        store.add([(0, None, next(study.points()), rows[0]["key"], outcome)])
    left = Here()
    found = go(path, whole, left)
    assert (found[1]["plan"], found[1]["same_as"]) == ("kept", 0)
    assert len(left.done) == 1


def test_failed_points_are_answered_anew_where_asked(path: Path, tmp_path: Path) -> None:
    study, folder = read_study(path), tmp_path / "out"
    with Store(folder, study) as store:
        store.add([(2, None, list(study.points())[2], "", Outcome.failed("its process died"))])
    assert go(path, folder, Here())[2]["error"] == "its process died"
    assert go(path, folder, Here(), again=True)[2]["status"] == "infeasible"


def test_a_folder_of_another_study_in_use_or_damaged_is_refused(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    go(path, folder, Here())
    with Store(folder, read_study(path)), pytest.raises(InputError, match="another run is at work in it"):
        go(path, folder, Here())
    path.write_text(TEXT.replace("output=8", "output=9"), encoding="utf-8")
    with pytest.raises(InputError, match=r"is of another study or of another release of apex_opt; name another"):
        go(path, folder, Here())
    (part,) = folder.glob("*.parquet")
    part.write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match=r"cannot be read as Parquet"):
        go(path, folder, Here())


def die_of(item: tuple[int, str]) -> int:
    """What kills its process on one item, always or the first time."""
    number, mark = item
    if number == 1 or (number == 4 and not Path(mark).exists()):
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_process_that_dies_takes_no_other_item_with_it(tmp_path: Path) -> None:
    with Processes(2) as workers:
        found = dict(workers.each(die_of, [(number, str(tmp_path / "mark")) for number in range(6)]))
    assert isinstance(found.pop(1), Lost)
    assert found == {0: 0, 2: 4, 3: 9, 4: 16, 5: 25}


def test_the_command_lists_answers_and_refuses(path: Path, tmp_path: Path) -> None:
    listed = run("study", str(path), "--dry_run")
    assert listed.code == 3 and listed.out.count("failed") == 3  # those whose model nothing has
    assert "unknown model 'lama'" in listed.out and "3 points cannot be asked" in listed.out
    assert not (tmp_path / "study").exists()
    ran = run("study", str(path), "--workers=1", "--format=json")
    document = json.loads(ran.out)
    assert (ran.code, document["status"], document["answered"]) == (0, "complete", 2)
    assert [document[name] for name in ("found", "infeasible", "failed")] == [2, 1, 3]
    table = run("study", str(path))
    assert "2 with a plan, 1 infeasible, 3 failed; 0 questions answered" in table.out
    lines = run("study", str(path), "--format=csv").out.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("point,row,same_as,status,exit_code,error,seconds,plan,gpus,options.model")
    assert lines[2].startswith("1,0,0,optimal,0,")
    (tmp_path / "file").touch()
    assert run("study", str(path), f"--target={tmp_path / 'file'}").code == 2
    assert run("study", str(tmp_path / "none.toml")).code == 2


def test_a_dry_run_names_every_value_that_nothing_has_and_then_says_to_run(tmp_path: Path) -> None:
    bad = {"weights": "bogus", "cluster": "9xnogpu", "routing": "foo", "engine": "sglangg", "model": "nope"}
    path = tmp_path / "study.toml"
    path.write_text(
        'command = "plan"\n[axes]\n' + "".join(f'{name} = ["{value}"]\n' for name, value in bad.items()),
        encoding="utf-8",
    )
    wrong = run("study", str(path), "--dry_run", "--format=json")
    document = json.loads(wrong.out)
    assert (wrong.code, document["status"], document["failed"]) == (3, "open", 1)
    (row,) = document["points"]
    for value in bad.values():
        assert value.removeprefix("9x") in row["error"]
    path.write_text(TEXT.replace(', "lama"', ""), encoding="utf-8")
    right = run("study", str(path), "--dry_run")
    assert right.code == 0 and "cannot be asked" not in right.out
    assert "Next: the same command without --dry_run answers the points." in right.out
    path.write_text('command = "capacity"\n[axes]\nslo = ["ttft_p95<=1s"]\nmodel = ["nope"]\n', encoding="utf-8")
    needed = json.loads(run("study", str(path), "--dry_run", "--format=json").out)["points"]
    assert [row["error"].startswith("unknown model 'nope'") for row in needed] == [True]


def test_no_write_access_is_told_before_any_work(path: Path) -> None:
    ran = run("study", str(path), "--target=/proc/none")
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("error: target /proc/none: cannot be written")


def test_an_address_at_which_no_ray_answers_is_told_in_a_line(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs ray")
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        port = mute.getsockname()[1]
        ran = run("study", str(path), f"--ray=127.0.0.1:{port}", f"--target={tmp_path / 'out'}")
    assert ran.code == 2
    assert f"--ray: 127.0.0.1:{port} does not answer" in ran.err.splitlines()[-1]
    wrong = run("study", str(path), "--ray=nowhere", f"--target={tmp_path / 'out'}")
    assert "--ray: expected local or the HOST:PORT" in wrong.err


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of Ray with a head that does no work and two nodes, on the loopback."""
    from ray.cluster_utils import Cluster

    small: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        yield cluster, [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    finally:
        cluster.shutdown()


@pytest.mark.nightly  # 18 s on an idle machine of two cores; beside other tests its nodes may not start in time
def test_a_node_of_ray_that_is_killed_loses_no_point(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs ray")
    seeds = f"seed = {[*range(12)]}\n"
    text = TEXT.replace('"lama"', '"mixtral-8x7b"').replace("static:n=6", "poisson:rate=9,n=6")
    path.write_text(text + seeds, encoding="utf-8")
    folder = tmp_path / "out"
    with two_nodes() as (cluster, nodes):
        words = [sys.executable, str(ROOT / "solve.py"), "study", str(path), f"--target={folder}", "--format=json"]
        with subprocess.Popen([*words, f"--ray={cluster.address}"], stdout=subprocess.PIPE, text=True) as program:
            ends = time.monotonic() + 60
            while len([*folder.glob("*.parquet")]) < 5 and time.monotonic() < ends:
                time.sleep(0.05)
            assert program.poll() is None, "it ended before a node could be killed"
            cluster.remove_node(nodes[0], allow_graceful=False)
            out, _ = program.communicate(timeout=120)
    document = json.loads(out)
    assert (program.returncode, document["status"], document["size"]) == (0, "complete", 72)
    assert [row["point"] for row in document["points"]] == [*range(72)]
    assert document["failed"] == 0
