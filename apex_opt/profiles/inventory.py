"""What profile folders there are, and what is in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_opt.cluster import load_cluster
from apex_opt.errors import ApexError, InputError, UnknownNameError
from apex_opt.profiles.card import read_card
from apex_opt.profiles.schema import schema_of
from apex_opt.profiles.tables import read_table

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.profiles.card import Card


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """One profile folder.

    Attributes
    ----------
    accelerator, source : str           names of the folder and the one it lies in
    card : Card
    tables : tuple of (kind, rows, bytes)
    card_bytes : int
    """

    accelerator: str
    source: str
    card: Card
    tables: tuple[tuple[str, int, int], ...]
    card_bytes: int


def inventory(root: Path, gpu: str | None = None) -> tuple[Holding, ...]:
    """The profile folders below a folder, every table read and checked.

    Parameters
    ----------
    root : Path             folder of folders of profile folders
    gpu : str or None       one accelerator only: the name of its folder, or as the catalogue or a cluster file has it

    Raises
    ------
    InputError, UnknownNameError    no profiles there, none of the accelerator, a card or table with faults
    """
    cards = sorted(root.glob("*/*/card.toml"))
    if not cards:
        raise InputError(f"{root}: holds no profile folders (<accelerator>/<source>/card.toml)")
    if gpu is not None:
        names = {path.parent.parent.name for path in cards}
        wanted = gpu if gpu in names else _folder_of(gpu)
        if wanted not in names:
            raise UnknownNameError(f"accelerator with profiles in {root}", gpu[:60], names)
        cards = [path for path in cards if path.parent.parent.name == wanted]
    return tuple(_holding(path.parent) for path in cards)


def _folder_of(gpu: str) -> str:
    """The folder that an accelerator uses, empty where there is none of this name."""
    try:
        listed = load_cluster(gpu).gpu
    except ApexError:
        return ""
    return listed.profile or listed.name


def _holding(folder: Path) -> Holding:
    """One folder."""
    card = read_card(folder)
    tables = []
    for kind, file, _ in card.tables:
        path = folder / file
        tables.append((kind, len(read_table(path, schema_of(kind))["time_us"]), path.stat().st_size))
    return Holding(
        accelerator=folder.parent.name,
        source=folder.name,
        card=card,
        tables=tuple(tables),
        card_bytes=(folder / "card.toml").stat().st_size,
    )
