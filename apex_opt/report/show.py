"""A document as the page that people read."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from apex_opt.report.layout import Page
from apex_opt.schema import to_plain

if TYPE_CHECKING:
    from apex_opt.report.types import Document


def page(document: Document, limit: int = 0, *, sources: bool = False) -> Page:
    """A document as tables, by the page that its type names.

    Parameters
    ----------
    document
    limit : int       rows of a table that may be long, where its page knows which to leave out
    sources : bool    whether it tells where every figure comes from, rather than in groups
    """
    plain = to_plain(document)
    if "provenance" in plain and not sources:
        from apex_opt.report.sources import in_groups

        plain["provenance"] = in_groups(plain["provenance"])
    module, _, name = document.PAGE.partition(":")
    draw = getattr(import_module(module), name)
    drawn = draw(plain, limit) if document.LIMITED else draw(plain)
    return drawn if isinstance(drawn, Page) else Page(drawn)
