"""Tables of `place` for people, made from the document that programs get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from apex_opt.cluster.tree import place_of
from apex_opt.report.layout import count, lies_table, notes_lines, page, provenance_table, seconds, table
from apex_opt.units import GB

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from apex_opt.schema import Document

_ROWS: Final = {"placement": "best", "rank_order": "rank order", "given": "as given"}
_SHOWN: Final = 16
"""Rows of a table of replicas or domains; the document has all."""


def place_page(document: Document) -> str:
    """The document as text."""
    return page(lambda console: _shown(console, document))


def _shown(console: Console, document: Document) -> None:
    gpus = document["gpus"]
    head = f": {document['plan']} takes {count(gpus['plan'], 'GPU')}, {gpus['free']:,} {document['gpu']} are free"
    console.print(Text.assemble(f"{document['model']} on ", (document["cluster"], "bold"), head))
    notes_lines(console, document)
    if document["status"] == "infeasible":
        console.print(Text(f"infeasible: {document['reason']}"))
        return
    console.print()
    loss = document["loss"]
    if document["within"]:
        _within_table(console, document["within"])
    if loss:
        _loss_tables(console, document)
    else:
        _times_tables(console, document)
    answer = loss["placement"] if loss else document["placement"]
    if any(one["reason"] for one in answer["lies"]):
        lies_table(console, answer["lies"])
    where_table(console, answer["replicas"])
    _left_table(console, document["left"])
    rows = [
        (f"node{row['node']}", str(row["replica"]), f"CUDA_VISIBLE_DEVICES={row['env']['CUDA_VISIBLE_DEVICES']}")
        for row in document["devices"]
    ]
    _grid(console, "To start it with", ("node", "replica", ""), rows, left={0, 2})
    provenance_table(console, document["provenance"])
    console.print(Text(_proof(document), "bold"))


def placement_section(console: Console, placement: Document) -> None:
    """Where the plan of an answer goes, and what ranks in order would lose."""
    own, other = placement["collectives_s"], placement["rank_order"]
    if own and other["collectives_loss"]:
        text = f"collectives of a full batch take {seconds(own)}; with ranks in order {seconds(other['collectives_s'])}"
        console.print(f"Placed on the GPUs that are free, {text} ({other['collectives_loss']:+z.1%}).\n")
    where_table(console, placement["replicas"])
    if any(one["reason"] for one in placement["lies"]):
        lies_table(console, placement["lies"])


def _grid(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[tuple[str, ...]], *, left: set[int]
) -> None:
    """A table of the first rows, and how many more there are."""
    table(console, title, heads, rows[:_SHOWN], left=left)
    if len(rows) > _SHOWN:
        console.print(Text(f"and {len(rows) - _SHOWN:,} more; --format=json has all\n", "dim"))


def _within_table(console: Console, within: Document) -> None:
    rows = [(row["name"], ", ".join(_ranges(row["gpus"])), str(row["replicas"])) for row in within["domains"]]
    title = f"Room for replicas in one {within['kind']} each"
    _grid(console, title, (within["kind"], "free GPUs", "replicas"), rows, left={0, 1})
    if within["others"]:
        console.print(Text(f"{count(within['others'], 'other')} with free GPUs, but too few\n", "dim"))


def _times_tables(console: Console, document: Document) -> None:
    shown = [(name, document[key]) for key, name in _ROWS.items() if document[key]]
    rows = [
        (
            name,
            seconds(row["collectives_s"]),
            _share(row.get("collectives_loss")),
            seconds(row["step_s"]),
            _share(row.get("step_loss")),
        )
        for name, row in shown
    ]
    batch = document["batch"]
    title = f"A batch of {count(batch['tokens'], 'token')} in {count(batch['sequences'], 'sequence')}, derived"
    _grid(console, title, ("placement", "collectives", "loss", "whole step", "loss"), rows, left={0})
    _tiers(console, shown)


def _tiers(console: Console, shown: list[tuple[str, Document]]) -> None:
    """What the collectives of some placements cross."""
    rows = [
        (
            name,
            tier["kind"],
            str(tier["ranks"]),
            tier["link"],
            f"{tier['bytes_per_s'] / 1e9:,.4g} GB/s",
            seconds(tier["latency_s"]),
            f"{tier['sent_bytes'] / GB:,.3g} GB",
        )
        for name, row in shown
        for tier in row["tiers"]
    ]
    if rows:
        heads = ("placement", "in one", "ranks", "link", "each gets", "latency", "data of a rank")
        _grid(console, "What the collectives cross, from the innermost", heads, rows, left={0, 1, 3})


def _loss_tables(console: Console, document: Document) -> None:
    loss = document["loss"]
    lost, used = ", ".join(_ranges(loss["gpus"])), len(loss["used"])
    console.print(Text(f"Lost: {lost}; {'none' if not used else f'{used:,}'} of them held ranks of the plan"))
    if gone := loss["replicas_lost"]:
        named = "replica" if len(gone) == 1 else "replicas"
        console.print(Text(f"No room for {named} {', '.join(map(str, gone))} any more: what is left is {loss['plan']}"))
    console.print()
    before, after = loss["before"], loss["placement"]
    rows = [
        ("before", str(len(before["replicas"])), seconds(before["collectives_s"]), "-", seconds(before["step_s"]), "-"),
        (
            "after",
            str(len(after["replicas"])),
            seconds(after["collectives_s"]),
            _share(after["collectives_loss"]),
            seconds(after["step_s"]),
            _share(after["step_loss"]),
        ),
    ]
    batch = document["batch"]
    title = f"A batch of {count(batch['tokens'], 'token')} in {count(batch['sequences'], 'sequence')}, derived"
    _grid(console, title, ("", "replicas", "collectives", "loss", "whole step", "loss"), rows, left={0})
    _tiers(console, [("before", before), ("after", after)])
    moves: dict[tuple[int, int, int], list[Document]] = {}
    for move in loss["moves"]:
        moves.setdefault((move["before"], move["replica"], move["stage"]), []).append(move)
    lines = [
        (
            str(old) if old == new else f"{old}, now {new}",
            str(stage),
            ", ".join(_ranges(move["from"] for move in some)),
            ", ".join(_ranges(move["to"] for move in some)),
            f"{sum(move['weights_bytes'] for move in some) / GB:,.1f} GB",
        )
        for (old, new, stage), some in moves.items()
    ]
    if lines:
        title = f"{count(loss['moved'], 'rank')} with {loss['moved_bytes'] / GB:,.1f} GB of weights to move"
        _grid(console, title, ("replica", "stage", "from", "to", "weights"), lines, left={0, 2, 3})


def where_table(console: Console, replicas: list[Document], title: str = "Where it goes") -> None:
    """The GPUs of every stage of every replica.

    Parameters
    ----------
    console
    replicas : list of Document    with their GPUs
    title : str                    above the table
    """
    rows = [
        (str(row["replica"]), str(stage), "; ".join(_ranges(gpus)))
        for row in replicas
        for stage, gpus in enumerate(row["stages"])
    ]
    _grid(console, title, ("replica", "stage", "GPUs in the order of their ranks"), rows, left={2})


def _left_table(console: Console, left: Document) -> None:
    sizes = ", ".join(f"{number:,} of {size}" for size, number in left["groups"].items())
    title = f"Left free: {count(left['gpus'], 'GPU')}" + (f", in groups inside nodes: {sizes}" if sizes else "")
    rows = [
        (
            "anywhere" if row["kind"] == "cluster" else f"one {row['kind']}",
            f"{row['largest']:,}",
            f"{row['replicas']:,}",
        )
        for row in left["fits"]
    ]
    _grid(console, title, ("inside", "largest has free", "replicas that still fit"), rows, left={0})


def _ranges(gpus: Iterable[str]) -> list[str]:
    """GPUs in their order, neighbours of a node as one: `node0:0-3`."""
    runs: list[list[Any]] = []
    for node, local in map(place_of, gpus):
        if runs and runs[-1][0] == node and runs[-1][2] + 1 == local:
            runs[-1][2] = local
        else:
            runs.append([node, local, local])
    return [f"node{node}:{first}" + (f"-{last}" if last > first else "") for node, first, last in runs]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+z,.1f}%"


def _proof(document: Document) -> str:
    """What is shown to hold."""
    if loss := document["loss"]:
        less = "none as good moves less" if loss["fewest"] else "whether one as good moves less was not decided in time"
        return f"Proof: no placement after the loss is better; {less}."
    ways, together = document["proof"]["better_ways_without_gpus"], document["proof"]["most_kept_together"]
    none = f"{count(ways, 'better way')} to lay the plan out, none with GPUs for it"
    more = "no placement as good leaves more GPUs free together"
    if not together:
        more = "whether one as good leaves more GPUs free together was not decided in time"
    return f"Proof: {none if ways else 'no way to lay the plan out is better'}; {more}."
