"""Placements in files: what is written is read, anything else is refused in words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.errors import InputError
from apex_opt.placement import Shape, rankfile, read_assignment
from apex_opt.placement.assignment import arranged

if TYPE_CHECKING:
    from pathlib import Path

GPUS = tuple(f"node{node}:{local}" for node in range(3) for local in range(4))
SHAPE = Shape(2, 2, 1)
TEXT = "# replica 0\nrank 0=node0 slot=2\nrank 1=node0 slot=3\n# replica 1\nrank 2=node2 slot=0\nrank 3=node1 slot=1\n"
ASSIGNMENT = ((("node0:2",), ("node0:3",)), (("node2:0",), ("node1:1",)))


def test_a_rank_file_has_a_line_per_rank_and_a_comment_per_replica() -> None:
    assert rankfile(ASSIGNMENT) == TEXT


@given(order=st.permutations(GPUS), shape=st.sampled_from([Shape(2, 2, 1), Shape(1, 3, 4), Shape(3, 1, 4)]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, order: list[str], shape: Shape) -> None:
    path = tmp_path_factory.mktemp("ranks") / "ranks.txt"
    written = arranged(order[: shape.size], shape)
    path.write_text(rankfile(written))
    assert read_assignment(path, shape, GPUS) == written
    replicas = {"replicas": [{"stages": stages} for stages in written]}
    for document in ({"placement": replicas, "loss": None}, {"placement": {}, "loss": {"placement": replicas}}):
        path.write_text(json.dumps(document))
        assert read_assignment(path, shape, GPUS) == written


def test_lines_may_stand_in_any_order_with_comments_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "ranks.txt"
    path.write_text("\n".join(reversed(TEXT.splitlines())) + "\n\n  rank 4=node2 slot=3  # a spare\n")
    assert read_assignment(path, Shape(1, 1, 5), GPUS)[0][0][-1] == "node2:3"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rank 0=node0\n", "line 1: expected such as 'rank 0=node0 slot=3', got 'rank 0=node0'"),
        (TEXT + "rank 3=node1 slot=2\n", "line 7: rank 3 stands there twice"),
        (TEXT.replace("rank 3", "rank 5"), "rank 3 is missing; ranks are numbered from 0 without gaps"),
        (TEXT.replace("node2 slot=0", "node0 slot=2"), "node0:2 holds two ranks; a GPU holds one"),
        (TEXT.replace("node2", "node7"), "node7:0 is not free in the cluster; see --cluster, --busy and --down"),
        (TEXT + "rank 4=node1 slot=2\n", "it has 5 ranks, the plan has 4; give the plan that it is of"),
        ("", "it has 0 ranks, the plan has 4"),
        ("{", "not JSON at line 1 column 2"),
        ("{}", "no placement in it; expected what place printed with --format=json"),
        ('{"loss": null, "placement": null}', "no placement in it"),
        ('{"loss": null, "placement": {"replicas": [{"stages": [[1]]}]}}', "no placement in it"),
        ("[" * 9 + "{", "line 1: expected"),
        ('{"a":' + "[" * 100_000, "JSON nested too deeply to read; expected what place printed with --format=json"),
    ],
)
def test_what_is_no_placement_of_the_plan_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "ranks.txt"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_assignment(path, SHAPE, GPUS)
    assert str(caught.value).startswith(f"at {path}: ")
    assert part in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"\xff\xfe")
    for name in ("gone", "raw", "."):
        with pytest.raises(InputError, match=r"(no such file|UTF-8 text|a folder); name a rank file or what"):
            read_assignment(tmp_path / name, SHAPE, GPUS)
