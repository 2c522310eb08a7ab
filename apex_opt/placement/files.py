"""Placements as files: rank files, and the documents that `place` prints."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from apex_opt.cluster.tree import place_of
from apex_opt.errors import InputError
from apex_opt.files import parse_json, read_text
from apex_opt.placement.assignment import arranged

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from apex_opt.placement.assignment import Assignment
    from apex_opt.placement.shape import Shape

LARGEST_BYTES: Final = 64 << 20
"""Size of a file: a document of 65,536 GPUs takes some 20 MB."""

_WANT: Final = "expected what place printed with --format=json"
_RANK: Final = re.compile(r"rank (\d{1,7})=(node\d{1,6}) slot=(\d{1,6})", re.ASCII)


def rankfile(assignment: Assignment) -> str:
    """A rank file in the form of Open MPI: a line per rank with its node and, as the slot, its GPU there.

    Ranks are numbered through, replica by replica, stage by stage; a comment begins each replica.
    """
    lines, rank = [], 0
    for replica, stages in enumerate(assignment):
        lines.append(f"# replica {replica}")
        for gpu in (gpu for stage in stages for gpu in stage):
            node, local = place_of(gpu)
            lines.append(f"rank {rank}=node{node} slot={local}")
            rank += 1
    return "".join(f"{line}\n" for line in lines)


def read_assignment(path: Path, shape: Shape, free: Collection[str]) -> Assignment:
    """A placement from a rank file, or from the JSON document of `place`; of one after a loss the new placement.

    Parameters
    ----------
    shape : Shape      what is placed there
    free : GPUs that it may use

    Raises
    ------
    InputError    a file that cannot be read, of another form or shape, with a GPU twice or one that is not free
    """
    text = read_text(path, limit=LARGEST_BYTES, where=f"at {path}", want="name a rank file or what place printed")
    found = _of_document(path, text) if text.lstrip().startswith("{") else _of_lines(path, text)
    if len(found) != shape.size:
        raise InputError(
            f"at {path}: it has {len(found)} ranks, the plan has {shape.size}; give the plan that it is of"
        )
    seen: set[str] = set()
    for gpu in found:
        if gpu in seen:
            raise InputError(f"at {path}: {gpu} holds two ranks; a GPU holds one")
        if gpu not in free:
            raise InputError(f"at {path}: {gpu} is not free in the cluster; see --cluster, --busy and --down")
        seen.add(gpu)
    return arranged(found, shape)


def _of_lines(path: Path, text: str) -> list[str]:
    """GPUs of a rank file by rank."""
    found: dict[int, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = _RANK.fullmatch(words)
        if match is None:
            raise InputError(f"at {path}: line {number}: expected such as 'rank 0=node0 slot=3', got {words!r:.60}")
        rank = int(match[1])
        if rank in found:
            raise InputError(f"at {path}: line {number}: rank {rank} stands there twice")
        found[rank] = f"{match[2]}:{match[3]}"
    if missing := [rank for rank in range(len(found)) if rank not in found]:
        raise InputError(f"at {path}: rank {missing[0]} is missing; ranks are numbered from 0 without gaps")
    return [found[rank] for rank in range(len(found))]


def _of_document(path: Path, text: str) -> list[str]:
    """GPUs of a document of `place` by rank."""
    try:
        document: Any = parse_json(text, where=f"at {path}", want=_WANT)
        answer = document["loss"]["placement"] if document["loss"] else document["placement"]
        found = [gpu for replica in answer["replicas"] for stage in replica["stages"] for gpu in stage]
    except (KeyError, TypeError):
        found = [None]
    if not all(isinstance(gpu, str) for gpu in found):
        raise InputError(f"at {path}: no placement in it; {_WANT}")
    return found
