"""Finds a model by name: among the descriptions that come with the package, on disk, or in the local hub cache."""

from __future__ import annotations

import difflib
import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import InputError, UnknownNameError
from apex_opt.files import absence, expanded, read_text, there
from apex_opt.ir.huggingface import model_from_config, read_file, read_json_object

if TYPE_CHECKING:
    from apex_opt.ir.model import Model

CONFIG_FOLDER: Final = Path(__file__).parent / "configs"

_WAYS: Final = (
    "give a listed name, the path of a config.json or its folder, or a Hugging Face id in the local hub cache"
)
_LARGEST_REFERENCE: Final = 4096
_HUB_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,96}(/[A-Za-z0-9_.-]{1,96})?")


def load_model(name_or_path: str) -> Model:
    """Model by name or by path.

    Looked for in this order: registry name or alias (in any case); file or folder, with `~` for the home folder;
    Hugging Face id in the local hub cache. A file that bears a registered name is reached as `./name`.

    Raises
    ------
    UnknownNameError    found in none of these places
    InputError          found, but not usable
    """
    name = _names().get(name_or_path.strip().lower())
    return model_from_config(*find_config(name_or_path)) if name is None else _registered(name)


def find_config(name_or_path: str) -> tuple[dict[str, Any], str, str]:
    """The configuration that `load_model` reads, with the model's name and where it came from; errors are the same."""
    wanted = name_or_path.strip()
    entries = _entries()
    name = _names().get(wanted.lower())
    if name is not None:
        return _listed(name)
    if wanted:
        path = expanded(wanted)
        if there(path):
            return read_file(path)
        cached = _cached_config(wanted)
        if cached is not None:
            return read_file(cached, name=wanted)
    near = difflib.get_close_matches(wanted.lower(), _names(), n=3)
    # Lower case where something is near, as the error compares spellings letter by letter.
    shown = wanted.lower() if near else name_or_path[:200]
    if wanted.startswith((".", "/", "~")) or wanted.endswith(".json"):
        raise InputError(f"model {name_or_path[:200]!r}: {absence(expanded(wanted))}; {_WAYS}")
    raise UnknownNameError("model", shown, near or entries, hint=_WAYS)


def checkpoint_of(name_or_path: str) -> str:
    """Where an engine finds the weights of what `load_model` found: a folder, absolute, or a Hugging Face id.

    A registry name stands for the Hugging Face id nearest to it, or for itself where there is none. A file that is not
    called `config.json` does not lie among weights: its own name stands for them.
    """
    wanted = name_or_path.strip()
    name = _names().get(wanted.lower())
    if name is not None:
        ids = [alias for alias in _entries()[name]["aliases"] if "/" in alias]
        same = (hub_id for hub_id in ids if wanted.lower() in (hub_id.lower(), hub_id.lower().partition("/")[2]))
        return next(same, ids[0] if ids else name)
    path = expanded(wanted)
    if not there(path):
        return wanted
    if path.is_dir() or path.name == "config.json":
        return os.path.abspath(path if path.is_dir() else path.parent)
    return path.name.removesuffix(".json")


def model_names() -> tuple[str, ...]:
    """Name of every model of the registry, in the order of its index."""
    return tuple(_entries())


def list_models() -> tuple[Model, ...]:
    """Every model of the registry, in the order of its index."""
    return tuple(map(_registered, _entries()))


@functools.cache
def _entries() -> dict[str, dict[str, Any]]:
    """The index: per model its configuration file, aliases and note."""
    return read_json_object(CONFIG_FOLDER / "index.json")


@functools.cache
def _names() -> dict[str, str]:
    """Registry name by lower-case name or alias."""
    return {spelling.lower(): name for name, entry in _entries().items() for spelling in (name, *entry["aliases"])}


@functools.cache
def _registered(name: str) -> Model:
    """Model of one index entry, read once: studies ask many questions about the same few."""
    return model_from_config(*_listed(name))


def _listed(name: str) -> tuple[dict[str, Any], str, str]:
    """Configuration, name and source of one index entry."""
    entry = _entries()[name]
    return read_json_object(CONFIG_FOLDER / entry["config"]), name, f"registry {name}: {entry['note']}"


def _hub_cache() -> Path:
    """Folder of the hub cache, found as huggingface_hub finds it."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return expanded(cache)
    if home := os.environ.get("HF_HOME"):
        return expanded(home) / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(base) / "huggingface" / "hub"


def _cached_config(hub_id: str) -> Path | None:
    """config.json of a model in the hub cache: of the revision that `main` names, else of the newest snapshot."""
    if not _HUB_ID.fullmatch(hub_id):
        return None
    folder = _hub_cache() / f"models--{hub_id.replace('/', '--')}"
    if not there(folder):
        return None
    try:
        snapshots = sorted(
            (folder / "snapshots").glob("*/config.json"), key=lambda file: file.stat().st_mtime_ns, reverse=True
        )
        main = folder / "refs" / "main"
        revision = read_text(main, limit=_LARGEST_REFERENCE).strip() if there(main) else ""
    except OSError as error:
        raise InputError(f"hub cache {folder}: cannot be read ({error.strerror})") from None
    if not snapshots:
        raise InputError(f"hub cache {folder}: no snapshot holds a config.json; download the model's config.json again")
    return next((file for file in snapshots if file.parent.name == revision), snapshots[0])
