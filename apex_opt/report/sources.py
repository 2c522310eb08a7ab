"""Where the figures of an answer come from: each by itself, or in groups by how they were had."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Provenance = Mapping[str, str | Mapping[str, str]]

_GROUPS: Final = ("measured", "derived", "assumed", "given")


def in_full(provenance: Provenance) -> dict[str, str]:
    """A text for each figure; where it differs between types of GPU one for each type.

    Parameters
    ----------
    provenance : the text by figure, or that by type of GPU
    """
    own = {gpu: texts for gpu, texts in provenance.items() if not isinstance(texts, str)}
    found = {figure: text for figure, text in provenance.items() if isinstance(text, str)}
    for figure in dict.fromkeys(figure for texts in own.values() for figure in texts):
        by_type = {gpu: texts[figure] for gpu, texts in own.items() if figure in texts}
        if len(set(by_type.values())) == 1 and len(by_type) == len(own):
            found[figure] = next(iter(by_type.values()))
        else:
            found |= {f"{gpu}, {figure}": text for gpu, text in by_type.items()}
    return found


def in_groups(provenance: Provenance) -> dict[str, str]:
    """Figures that are measured, derived, assumed or given; those that are so in part come last in each group."""
    kinds: dict[str, set[str]] = {}
    for figure, text in in_full(provenance).items():
        gpu, _, name = figure.rpartition(", ")
        if name == "price":
            name = f"price{f' of {gpu}' if gpu else ''} ({text.partition(';')[0]})"
        kinds.setdefault(name, set()).update(_kinds(text))
    rows = {}
    for group in _GROUPS:
        whole = [figure for figure, found in kinds.items() if found == {group}]
        partly = [figure for figure, found in kinds.items() if group in found and len(found) > 1]
        told = [", ".join(whole), f"in part {', '.join(partly)}" if partly else ""]
        if any(told):
            rows[group] = "; ".join(filter(None, told))
    return rows | {"each": "--sources tells of every figure in full"}


def _kinds(text: str) -> set[str]:
    """What a text says of how a figure was had; one that names no way is what somebody gave."""
    return {kind for clause in text.split(";") for kind in _of(clause.strip())} or {"given"}


def _of(clause: str) -> Iterator[str]:
    if clause.startswith("derived"):
        yield "derived"  # from what was measured elsewhere, which it may go on to tell
        return
    says = set(re.findall(r"measured|fitted|published|derived|assumed", clause))
    if "derived" in says:
        yield "derived"
    if "assumed" in says:
        yield "assumed"
    if says & {"measured", "fitted"} or says == {"published"}:
        yield "measured"
