"""Tables of the commands of `profile` for people, made from the documents that programs get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.text import Text

from apex_opt.report.layout import count, page, table

if TYPE_CHECKING:
    from rich.console import Console

    from apex_opt.schema import Document

_TEXTS: Final = ("hardware", "software", "method", "origin", "derived", "not_measured", "dropped", "power")


def profile_page(document: Document) -> str:
    """The document as text."""
    draw = {"profile show": _shown, "profile fit": _fitted}.get(document["command"], _made)
    return page(lambda console: draw(console, document))


def _shown(console: Console, document: Document) -> None:
    profiles = document["profiles"]
    rows = [
        (
            f"{profile['accelerator']}/{profile['source']}",
            profile["engine"] or "any",
            str(len(profile["tables"])),
            f"{profile['rows']:,}",
            _size(profile["bytes"]),
            "measured" if "derived" not in profile else "measured, screened",
            profile["use"],
            profile["licence"],
            profile["date"] or "-",
        )
        for profile in profiles
    ]
    heads = ("folder", "engine", "tables", "rows", "size", "figures", "for", "licence", "date")
    table(console, "", heads, rows, left={0, 1, 5, 6, 7, 8}, kept=range(5))
    if len({profile["accelerator"] for profile in profiles}) == 1:
        for profile in profiles:
            _whole(console, profile)
    console.print(
        f"{count(len(profiles), 'folder')} of {document['root']}, {count(document['tables'], 'table')}, "
        f"{count(document['rows'], 'row')}, {_size(document['bytes'])}\n"
    )


def _whole(console: Console, profile: Document) -> None:
    """The card and the tables of one folder."""
    facts = [(key.replace("_", " "), profile[key]) for key in _TEXTS if profile.get(key)]
    facts += [
        (entry["table"], f"{count(entry['rows'], 'row')}, {_size(entry['bytes'])}") for entry in profile["tables"]
    ]
    table(console, f"{profile['accelerator']}/{profile['source']}", ("", ""), facts, left={0, 1})


def _made(console: Console, document: Document) -> None:
    tables = document["tables"]
    judged = any(entry["lookup_error"] for entry in tables)
    rows = []
    for entry in tables:
        error = entry["lookup_error"]
        errors = ("-", "-") if error is None else (f"{error['median']:.1%}", f"{error['p95']:.1%}")
        dropped = "; ".join(f"{reason}: {lost:,}" for reason, lost in entry["dropped"].items())
        figures = (
            f"{entry['source_rows']:,}",
            f"{entry['rows']:,}",
            *(errors if judged else ()),
            _size(entry["bytes"]),
        )
        rows.append((entry["folder"], entry["table"], *figures, dropped))
    heads = ("folder", "table", "rows there", "kept", *(("error, median", "P95") if judged else ()), "size", "dropped")
    table(console, "", heads, rows, left={0, 1, len(heads) - 1})
    for entry in document["passed_over"]:
        console.print(Text(f"passed over: {entry['what']}: {entry['reason']}"))
    if document["passed_over"]:
        console.print()
    console.print(
        f"{count(len(tables), 'table')} written to {document['target']}: {document['rows']:,} of "
        f"{count(document['source_rows'], 'row')}, {_size(document['bytes'])}\n"
    )


def _fitted(console: Console, document: Document) -> None:
    before, after = document["errors"]["before"], document["errors"]["after"]
    runs, judged = count(document["runs"], "run"), document["judged_runs"]
    judging = f"errors of {count(judged, 'other')}" if judged else "errors of these"
    rows = [
        (
            metric,
            str(found["n"]),
            *(f"{errors[metric]['mean_ape_pct']:.1f}%" for errors in (before, after)),
            *(f"{errors[metric]['bias_pct']:+z.1f}%" for errors in (before, after)),
        )
        for metric, found in after.items()
    ]
    heads = ("", "runs", "mean |error| before", "after", "bias before", "after")
    table(console, f"Engine {document['engine']}, fitted on {runs}, {judging}", heads, rows, left={0})
    times = [(name, f"{values['before']:g}", f"{values['after']:g}") for name, values in document["times_us"].items()]
    table(console, "", ("time (us)", "before", "after"), times, left={0})
    _section(console, "For the file of the engine in apex_opt/engines/data:", document["engine_toml"])
    for board in document["boards"]:
        errors = f"mean |error| {board['mean_ape_pct']:.1f}%, largest {board['largest_ape_pct']:.1f}%"
        judging = f"of {count(board['judged_runs'], 'other')} " if board["judged_runs"] else ""
        title = f"For the card of {board['gpu']} ({count(board['runs'], 'run')} with energies, {judging}{errors}):"
        _section(console, title, board["power_toml"])


def _section(console: Console, title: str, text: str) -> None:
    """Text to be copied: its lines are not broken."""
    console.print(Text(title, "bold"))
    console.print()
    console.print(Text(text), soft_wrap=True)


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
