"""How the engines of measured rows were started: tables that lie beside the rows, or are shipped.

`deployments.csv` has a line for each family of rows; `families*.csv` says of which family a row is, `relabel*.csv`
which rows name other degrees than what ran, `set_aside*.csv` which rows, or figures of them, are not to be judged by.
"""

from __future__ import annotations

import ast
import operator
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from apex_opt.errors import ApexError, InputError
from apex_opt.measured.files import read_rows
from apex_opt.measured.names import find_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apex_opt.measured.files import Row

SHIPPED: Final = Path(__file__).parent / "data" / "deployments.csv"
PIECEWISE: Final = SHIPPED.with_name("piecewise.csv")
NEEDED: Final = ("family", "engine", "model", "gpu", "precision", "date_from", "date_to", "isl", "osl", "tp")


_TRAINED_ON: Final = {"deepseek-r1": "deepseek-v3"}
"""Models by the one that they are made of: lists call one by the name of the other."""
_METRICS: Final = ("ttft", "tpot", "both")
_OF_ITSELF: Final = ("family", "date_from", "date_to", "image", "warmups_per_client", "certainty", "source", "note")
"""Columns that say nothing of how an engine was started."""


class Load(NamedTuple):
    """What values of a family go by.

    Clients, nominal lengths, shards and copies of attention, drafts after a token, groups of experts.
    """

    clients: int
    prompt: int
    output: int
    tp: int
    copies: int
    drafts: int = 0
    groups: int = 1


class Labels(NamedTuple):
    """What a row says of itself; a blank text says nothing.

    `scripted` tells a run of InferenceX, whose scripts are public.
    """

    engine: str
    model: str
    gpu: str
    precision: str
    measured: str
    image: str
    scripted: bool


class Degrees(NamedTuple):
    """Clients, and how the GPUs share a model: shards and copies of attention, shards and groups of experts."""

    clients: int
    tp: int
    copies: int
    moe_tp: int
    moe_ep: int


class Aside(NamedTuple):
    """Why a figure of a row is not to be judged by; `metric` is "ttft", "tpot" or "both"."""

    reason: str
    metric: str
    detail: str


@dataclass(frozen=True, slots=True)
class Family:
    """A line of `deployments.csv`: cells by column, and where it stands."""

    cells: Mapping[str, str]
    where: str = "deployments.csv"

    @property
    def name(self) -> str:
        return self.cells["family"]

    @property
    def speculative(self) -> str:
        """The drafts that were made; "" for none."""
        return self.cells.get("speculative", "")

    @property
    def settings(self) -> tuple[str, ...]:
        """All that says how the engine was started."""
        return tuple(text for column, text in self.cells.items() if column not in _OF_ITSELF)

    def text(self, column: str) -> str:
        """A cell, "" where there is none."""
        return self.cells.get(column, "")

    def number(self, column: str, load: Load) -> float | None:
        """What a cell comes to under a load, or None where it is blank or says nothing of this load.

        Raises
        ------
        InputError    a text that is none of the forms of these tables
        """
        try:
            return valued(self.text(column), load)
        except InputError as error:
            raise InputError(f"{self.where}: {column}: {error}") from None

    def holds(self, labels: Labels, load: Load) -> bool:
        """Whether a row with these labels and this load can be of the family."""
        cells = self.cells
        scripted = not cells.get("certainty", "").startswith(("generator", "unknown"))
        if scripted != labels.scripted:
            return False
        same = all(
            not mine or mine in cells[column].split("|")
            for column, mine in (
                ("engine", labels.engine),
                ("gpu", labels.gpu),
                ("precision", labels.precision),
            )
        )
        return (
            same
            and any(_alike(labels.model, known) for known in cells["model"].split("|"))
            and (not labels.measured or _within(labels.measured, cells["date_from"], cells["date_to"]))
            and (not labels.image or any(tag in labels.image for tag in cells.get("image", "").split("|")))
            and all(
                not cells[column] or str(mine) in cells[column].split("|")
                for column, mine in (("isl", load.prompt), ("osl", load.output), ("tp", load.tp * load.copies))
            )
            and load.clients >= int(cells.get("conc_min") or 0)
            and load.clients <= int(cells.get("conc_max") or 1 << 40)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All tables there are, by the ids of rows."""

    families: Mapping[str, Family]
    family_of: Mapping[str, str]
    relabelled: Mapping[str, Degrees]
    aside: Mapping[str, Aside]
    source: str

    def family(self, name: str, labels: Labels, load: Load) -> Family | None:
        """The family of a row: the one that the tables name, else the only one, or the narrowest, that it can be of.

        Parameters
        ----------
        name : str    the row's id
        labels, load : of the row
        """
        if name in self.family_of:
            return self.families.get(self.family_of[name])
        found = [family for family in self.families.values() if family.holds(labels, load)]
        places = ("isl", "osl", "tp") if labels.scripted else ("image",)
        narrow = [f for f in found if any(f.text(c) for c in places) and not f.speculative]
        found = narrow or found
        return found[-1] if len({f.settings for f in found}) == 1 else None


def read_facts(rows: Path) -> Facts:
    """The tables beside a file of rows, and the shipped deployments where there are none.

    Raises
    ------
    InputError    a table with faults
    """
    folder = rows.parent
    own = folder / "deployments.csv"
    path = own if own.is_file() else SHIPPED
    families = _families(path)
    return Facts(
        families=families,
        family_of=_named(folder, families, path),
        relabelled=dict(
            _degrees(row)
            for path in sorted(folder.glob("relabel*.csv"))
            for row in read_rows(path, ("id", "clients", "tp", "dp", "moe_tp", "moe_ep"))
        ),
        aside=_set_aside(folder),
        source=str(path) if path is own else "shipped",
    )


def _named(folder: Path, families: Mapping[str, Family], path: Path) -> dict[str, str]:
    """The families that rows are said to be of, each of which there is."""
    found = {}
    for where, row in _beside(folder, "families*.csv", ("id", "family")):
        if row["family"] not in families:
            raise InputError(
                f"{where}: family {row['family']!r:.60} is none of {path}; add its line there or take it out"
            )
        found[row["id"]] = row["family"]
    return found


def _set_aside(folder: Path) -> dict[str, Aside]:
    """Rows that are not to be judged by."""
    found = {}
    for where, row in _beside(folder, "set_aside*.csv", ("id", "reason", "metric")):
        if row["metric"] not in _METRICS:
            raise InputError(f"{where}: metric {row['metric']!r:.40} must be one of {', '.join(_METRICS)}")
        found[row["id"]] = Aside(row["reason"], row["metric"], row.get("detail", ""))
    return found


def _degrees(row: Row) -> tuple[str, Degrees]:
    """The id of a row, and the degrees that ran; blank is 1."""
    found = []
    for column in ("clients", "tp", "dp", "moe_tp", "moe_ep"):
        value = row.whole(column)
        if not 1 <= (value := 1 if value is None else value) <= LARGEST:
            raise InputError(f"{row.where}: {column} {value} is outside 1 to {LARGEST:,}")
        found.append(value)
    return row.cells["id"].strip(), Degrees(*found)


@lru_cache(maxsize=1)
def pieces() -> tuple[Row, ...]:
    """Loads at which TensorRT-LLM was started with captured pieces of batches with prompts, of every size.

    Scripts choose by the load, which a text of `deployments.csv` tells in words and this shipped table in numbers.
    """
    return tuple(read_rows(PIECEWISE, ("family", "isl", "osl", "clients_min", "clients_max", "attention_dp")))


@lru_cache(maxsize=8)
def _families(path: Path) -> dict[str, Family]:
    found = {}
    for row in read_rows(path, NEEDED):
        cells = {name: text.strip() for name, text in row.cells.items()}
        found[cells["family"]] = Family(cells, row.where)
    return found


def _beside(folder: Path, pattern: str, needed: tuple[str, ...]) -> list[tuple[str, dict[str, str]]]:
    """Rows of every table of a name beside the measurements, each with its place."""
    rows = [row for path in sorted(folder.glob(pattern)) for row in read_rows(path, needed)]
    return [(row.where, {name: text.strip() for name, text in row.cells.items()}) for row in rows]


@lru_cache(maxsize=1024)
def _alike(one: str, other: str) -> bool:
    """Whether two names are of one architecture: lists name trained versions of it for each other."""
    try:
        return one == other or len({trained_on(find_model(name).name) for name in (one, other)}) == 1
    except ApexError:
        return False


def trained_on(name: str) -> str:
    """The model that one is a trained version of, by name; itself where it is none."""
    return _TRAINED_ON.get(name, name)


def _within(measured: str, first: str, last: str) -> bool:
    """Whether a day, `YYYY-MM-DD`, lies between two others, of which the day may be left out."""
    return (not first or measured >= first) and (not last or measured[: len(last)] <= last)


# ---- values that go by the load -----------------------------------------------------------------------------------

_INFERENCEX: Final = re.compile(r"db-dump/|source_file=([\d-]+|[\w.-]+-gap-analysis)\.csv")  # names of its dumps
_IMAGE: Final = re.compile(r"[\w./-]+/[\w.-]+:[\w.-]+")
LARGEST: Final = 1 << 16
"""Degree, or number of clients."""
_DAY: Final = re.compile(r"measured=(\d{4}-\d\d-\d\d)")

_COMMENT: Final = re.compile(
    r",\s*(per attention copy|[BK] .*|K drafts.*|if by the generator)$|\s+\((chunk and|auto|default|every |\d).*$"
    r"|\s*prompt tokens of a batch.*$"
)
_DEFAULT: Final = re.compile(r"^default \(?(\d+)\)?$|^default$")
_CHUNK: Final = re.compile(r"^chunk (?P<chunk>\d+), prompt tokens of a batch (?P<prompts>\d+)")
_COPIES: Final = re.compile(r"^(?P<else>[^()]+) \((?P<then>[^()]+) with attention DP\)$")
_FROM: Final = re.compile(r"^(?P<then>\S+) from (?P<least>\d+) clients on(, else (?P<else>\S+))?$")
_AT: Final = re.compile(
    r"^(?P<then>\S+) at (?P<isl>\d+) \+ (?P<osl>\d+)( on TP (?P<tp>\d+))?( from (?P<least>\d+) clients on)?$"
)
_SAID: Final = {"C": "clients", "B": "clients", "K": "drafts", "ISL": "prompt", "OSL": "output"}
_OPERATORS: Final[Mapping[type, Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
}


def valued(text: str, load: Load) -> float | None:
    """What a text of `deployments.csv` comes to under a load, None where it is blank or says nothing of this load.

    Texts are numbers and sums, products and whole quotients of C (clients), K (drafts), ISL and OSL, with the load for
    which each of several holds: `16384`, `2*ISL`, `30 from 16 clients on, else 10`, `0.8; 0.75 at 8192 + 1024 on TP 4`.

    Raises
    ------
    InputError    none of these
    """
    found: float | None = None
    for clause in text.split(";"):
        value = _clause(clause.strip(), load, text)
        found = found if value is None else value
    return found


def _clause(text: str, load: Load, whole: str) -> float | None:
    if not text:
        return None
    if match := _AT.match(text):
        holds = (load.prompt, load.output) == (int(match["isl"]), int(match["osl"]))
        holds = holds and load.tp * load.copies == int(match["tp"] or load.tp * load.copies)
        holds = holds and load.clients >= int(match["least"] or 0)
        return _sum(match["then"], load, whole) if holds else None
    if match := _FROM.match(text):
        if load.clients >= int(match["least"]):
            return _sum(match["then"], load, whole)
        return None if match["else"] is None else _sum(match["else"], load, whole)
    if match := _COPIES.match(text):
        return _sum(match["then" if load.copies > 1 else "else"], load, whole)
    if match := _DEFAULT.match(text):
        return float(match[1]) if match[1] else None
    if match := _CHUNK.match(text):
        return float(match["prompts"])
    return _sum(_COMMENT.sub("", text), load, whole)


def _sum(text: str, load: Load, whole: str) -> float:
    named = text.replace("batch_size column", "C").replace("max_batch", "C").replace("clients, probably", "C")
    try:
        return float(_node(ast.parse(named.strip(), mode="eval").body, load))
    except (SyntaxError, ValueError, ZeroDivisionError, KeyError):
        raise InputError(f"{whole!r:.80} is no number and no sum of C, K, ISL and OSL") from None


def _node(node: ast.AST, load: Load) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        return load.copies * load.tp if node.id == "TP" else int(getattr(load, _SAID[node.id]))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return float(_OPERATORS[type(node.op)](_node(node.left, load), _node(node.right, load)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("max", "floor"):
        values = [_node(argument, load) for argument in node.args]
        return max(values) if node.func.id == "max" else float(int(values[0]))
    raise ValueError


def labelled(cell: Mapping[str, str]) -> Labels:
    """What a row says of itself, in the columns of the layout of `silicon`."""
    source = cell.get("silicon_data_source", "")
    image, scripted = _IMAGE.search(source), _INFERENCEX.match(source) is not None
    measured = _DAY.search(source)
    return Labels(
        engine=cell["backend"],
        model=cell["model_path"],
        gpu=cell["system"],
        precision=cell.get("precision", ""),
        measured=measured[1] if measured else "",
        image=image[0] if image else "" if scripted else source,
        scripted=scripted,
    )
