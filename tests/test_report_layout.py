"""What pages are printed with: lines that fit their console."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from apex_opt.report.document import noted
from apex_opt.report.layout import notes_lines


def drawn(draw: Any, *given: Any, width: int = 80, **named: Any) -> list[str]:
    """Lines of what is drawn on a console of this width."""
    text = StringIO()
    draw(
        Console(file=text, width=width, color_system=None, highlight=False, markup=False, emoji=False), *given, **named
    )
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_notes_are_told_once_and_in_their_order() -> None:
    document = noted(noted({"plan": "tp2"}, ()), ("b", "a", "b"))
    assert document == {"plan": "tp2", "notes": ["b", "a"]}
    assert noted(document, ("c", "a"))["notes"] == ["b", "a", "c"]
    assert document["notes"] == ["b", "a"]


@pytest.mark.parametrize("width", [40, 80])
def test_a_note_is_a_line_or_several_indented_ones_that_fit(width: int) -> None:
    note = "20 rows were left out as they have no prompt, of which [bold]none[/bold] were answered"
    lines = drawn(notes_lines, noted({}, ("short", note)), width=width)
    assert lines[0] == "note: short"
    assert " ".join(" ".join(lines[1:]).split()) == f"note: {note}"
    assert all(len(line) <= width for line in lines)
    assert all(line.startswith("  ") for line in lines[2:])


def test_a_document_without_notes_has_no_lines() -> None:
    assert drawn(notes_lines, {}) == drawn(notes_lines, noted({}, ())) == []
