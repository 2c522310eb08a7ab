"""Launch commands: in a document, and as lines to copy."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from rich.text import Text

from apex_opt.report import types
from apex_opt.schema import of

if TYPE_CHECKING:
    from rich.console import Console

    from apex_opt.launch import Launch
    from apex_opt.schema import Document


def launch_document(launch: Launch) -> types.Launch:
    """The commands that start a plan."""
    commands = tuple(of(types.Started, command, env=dict(command.env)) for command in launch.commands)
    return of(types.Launch, launch, commands=commands)


def launch_section(console: Console, launch: Document, plan: str | None = None) -> None:
    """Commands one to a line however long, to be copied; the rest as a shell's comments; of several plans, which.

    Parameters
    ----------
    console
    launch : Document     commands and notes
    plan : str or None    told where there are several
    """
    console.print(Text(f"Launch ({launch['engine']})" + ("" if plan is None else f" {plan}"), "bold"))
    for note in launch["notes"]:
        # Options are not to be broken at their hyphens.
        lines = textwrap.wrap(
            note, console.width, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False
        )
        for line in lines:
            _line(console, line)
    before = None
    for command in launch["commands"]:
        place = f"# node {command['node']}"
        if command["replica"] is not None:
            place += f", replica {command['replica']}"
        if place != before:
            _line(console, place)
        before = place
        _line(console, command["text"])
    console.print()


def _line(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)
