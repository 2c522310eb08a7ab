"""Launch commands: in a document, and as lines to copy."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from rich.text import Text

from apex_opt.report import types
from apex_opt.schema import of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from apex_opt.launch import Launch
    from apex_opt.launch.bench import Bench
    from apex_opt.schema import Document


def launch_document(launch: Launch, bench: Bench | None = None) -> types.Launch:
    """The commands that start a plan, and the one that measures it."""
    commands = tuple(of(types.Started, command, env=dict(command.env)) for command in launch.commands)
    return of(types.Launch, launch, commands=commands, bench=bench and of(types.Bench, bench))


def launch_section(console: Console, launch: Document, plan: str | None = None) -> None:
    """Commands one to a line however long, to be copied; the rest as a shell's comments; of several plans, which.

    Parameters
    ----------
    console
    launch : Document     commands and notes
    plan : str or None    told where there are several
    """
    console.print(Text(f"Launch ({launch['engine']})" + ("" if plan is None else f" {plan}"), "bold"))
    _remarks(console, launch["notes"])
    before = None
    for command in launch["commands"]:
        place = f"# node {command['node']}"
        if command["replica"] is not None:
            place += f", replica {command['replica']}"
        if place != before:
            _line(console, place)
        before = place
        _line(console, command["text"])
    if "bench" in launch:
        _line(console, "# once it runs: the traffic that was asked about")
        _remarks(console, launch["bench"]["notes"])
        if launch["bench"]["text"]:
            _line(console, launch["bench"]["text"])
    console.print()


def _remarks(console: Console, notes: Sequence[str]) -> None:
    """What there is to know, as a shell's comments; options are not broken at their hyphens."""
    for note in notes:
        width = console.width
        for line in textwrap.wrap(note, width, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False):
            _line(console, line)


def _line(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)
