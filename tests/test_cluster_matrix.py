"""The matrix of `nvidia-smi topo -m` as it comes out of terminals, chats, tickets and logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from matrix_cases import CUBE, DGX_H100, L40S, PAIRS

from apex_opt.cluster.matrix import Matrix, read_matrix
from apex_opt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

CASES = Path(__file__).parents[2] / "shared" / "cases" / "topo"
TEXTS = {"dgx-h100": DGX_H100, "l40s": L40S, "pairs": PAIRS, "cube": CUBE}


def read(text: str) -> Matrix:
    matrix = read_matrix(Path("topo.txt"), text)
    assert matrix is not None
    return matrix


def head(text: str, change: Callable[[str], str]) -> str:
    """A text with the line of its columns changed."""
    return "\n".join(change(line) if "CPU Affinity" in line else line for line in text.splitlines())


def lines(text: str, change: Callable[[str], str]) -> str:
    return "\n".join(map(change, text.splitlines())) + "\n"


def wrapped(text: str, width: int) -> str:
    """As a terminal of so many columns breaks it."""
    parts = []
    for line in text.replace("\x1b[4m", "").replace("\x1b[0m", "").expandtabs(8).splitlines():
        parts += [line[at : at + width].rstrip() for at in range(0, len(line), width)] or [""]
    return "\n".join(parts)


def styled(line: str) -> str:
    return "".join(f"\x1b[4m{cell}\x1b[24m\x1b[K\t" for cell in line.split("\t")) + "\x1b[0m"


MANGLED: dict[str, Callable[[str], str]] = {
    "a byte-order mark": lambda text: "\ufeff" + text,
    "Windows line ends": lambda text: text.replace("\n", "\r\n"),
    "indented": lambda text: lines(text, lambda line: "      " + line),
    "quoted": lambda text: lines(text, lambda line: "> " + line),
    "quoted twice": lambda text: lines(text, lambda line: ">> > " + line),
    "a comment": lambda text: lines(text, lambda line: "# " + line),
    "a code fence": lambda text: f"```text\n$ nvidia-smi topo -m\n{text}\n```\n",
    "a prompt": lambda text: f"(base) root@node7:/workspace# nvidia-smi topo -m\n{text}root@node7:/workspace# \n",
    "prose around it": lambda text: f"Hi, here is GPU0 and its friends:\n\n{text}\nWhat is wrong?\n",
    "nvidia-smi before it": lambda text: f"| NVIDIA-SMI 580.95 Driver Version: 580.95 |\n| 0 NVIDIA H100 |\n{text}",
    "styles": lambda text: lines(text, styled),
    "a cleared screen": lambda text: "\x1b[2J\x1b[H\x1b]0;topo\x07" + lines(text, styled),
    "escapes without their first character": lambda text: lines(text, styled).replace("\x1b", ""),
    "escapes as they are shown": lambda text: lines(text, styled).replace("\x1b", "^["),
    "spaces for tabs": lambda text: text.expandtabs(8),
    "tabs for spaces": lambda text: lines(text, lambda line: "\t".join(line.split())),
    "spaces that do not break": lambda text: text.replace(" ", "\u00a0"),
    "characters of no width": lambda text: text.replace("\t", "\t\u200b"),
    "an empty line after each": lambda text: text.replace("\n", "\n\n"),
    "glued columns": lambda text: head(text, lambda line: line.replace("\t", "").replace(" ", "")),
    "a glued affinity": lambda text: head(text, lambda line: " ".join(line.split()).replace(" CPU", "CPU")),
    "glued entries": lambda text: lines(
        text, lambda line: line.replace("\tNV", "NV").replace("\tSYS", "SYS").replace("\tNODE", "NODE")
    ),
    "a table of a page": lambda text: lines(text, lambda line: "| " + line.replace("\t", " | ") + " |"),
    "text of JSON": lambda text: json.dumps(text),
    "text of a page": lambda text: text.replace("\t", "&nbsp;&nbsp;"),
    "the node before each line": lambda text: lines(text, lambda line: f"node7: {line}"),
    "a log": lambda text: lines(text, lambda line: f"2026-11-28T10:00:00Z stdout F {line}"),
    "wrapped at 80": lambda text: wrapped(text, 80),
    "wrapped at 79": lambda text: wrapped(text, 79),
    "wrapped at 61": lambda text: wrapped(text, 61),
    "no legend": lambda text: text.partition("\nLegend")[0],
    "an old driver": lambda text: text.replace("SYS", "SOC").replace("  SOC  =", "  SOC ="),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("how", MANGLED)
def test_a_matrix_is_read_however_it_was_kept(how: str, name: str) -> None:
    text = TEXTS[name]
    plain, found = read(text), read(MANGLED[how](text))
    assert (found.gpus, found.nics, found.cells, found.unread) == (plain.gpus, plain.nics, plain.cells, plain.unread)
    same = {a: [plain.sides[a] == plain.sides[b] for b in plain.gpus] for a in plain.gpus}
    assert {a: [found.sides[a] == found.sides[b] for b in found.gpus] for a in found.gpus} == same


def test_missing_rows_of_nics_are_told_by_those_of_gpus() -> None:
    whole = read(DGX_H100)
    trimmed = read("\n".join(line for line in DGX_H100.splitlines() if not line.startswith("NIC")))
    assert trimmed.unread == whole.nics
    assert trimmed.cells == {cell: entry for cell, entry in whole.cells.items() if cell[0] in whole.gpus}


def test_columns_of_affinities_may_be_missing() -> None:
    plain = read(CUBE)
    bare = read(lines(CUBE, lambda line: "\t".join(line.split("\t")[:9])))
    assert bare.cells == plain.cells
    assert set(bare.sides.values()) == {""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CUBE.partition("\n")[2], "line 1: the line above it, with GPU0, GPU1 and so on, is missing: copy it too"),
        (CUBE + CUBE, "a second row of GPU0; the matrix of another node goes into a file of its own"),
        (CUBE.replace("GPU7\tCPU", "GPU9\tCPU"), "line 1: its columns are not GPU0, GPU1 and so on, then NICs"),
        ("\n".join(CUBE.splitlines()[:-1]), "no row of GPU7"),
        (CUBE.replace("NV1\tNV1\tNV2\tNV2\tSYS", "NV1\tNV1\tNV2\tNV2\tSIS"), "GPU0 to GPU5 is 'SIS', known: NV and"),
        (CUBE.replace("GPU7\tSYS\tSYS", "GPU7\tSYS"), "line 9: GPU7 to GPU6 is 'X', known: NV and a number"),
        ("GPU0\t" + "\t".join(f"NIC{i}" for i in range(2999)) + "\nGPU0\tX\n", "3000 columns, above the limit of 2048"),
    ],
)
def test_a_matrix_with_a_fault_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_matrix(Path("topo.txt"), text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "GPU0 GPU1 CPU\n" + "GPU0 X NV4\n" * 100_000,
        "GPU0 " + " ".join(f"N{i}" for i in range(2000)) + " CPU\nGPU0 X " + "\nS" * 300_000,
        "GPU0 GPU1 " + "a" * 3_000_000 + "\nGPU0 X NV1 \nGPU1 NV1 X\n",
        "GPU0" * 900_000 + "\nGPU0 X\n",
    ],
)
def test_what_is_made_to_take_long_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as caught:
        read_matrix(Path("topo.txt"), text)
    assert len(str(caught.value)) < 2000


def test_text_without_a_matrix_holds_none() -> None:
    for text in ("", "worker-1 8 dgx-h100\n", "GPU 0: NVIDIA H100\n", "GPU0 and GPU1 are near\n", "GPU0 Xid 79\n"):
        assert read_matrix(Path("topo.txt"), text) is None


@pytest.mark.data
@pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")
def test_matrices_that_people_posted_are_read() -> None:
    gpus = {
        path.stem: len(matrix.gpus)
        for path in sorted(CASES.glob("*.txt"))
        if (matrix := read_matrix(path, path.read_text(encoding="utf-8-sig"))) is not None
    }
    assert gpus == {
        "bom": 2,
        "dgx-h100-escape-K": 8,
        "dgx1v-cube": 8,
        "prompt-fence": 2,
        "trimmed-no-nic-rows": 8,
    }
