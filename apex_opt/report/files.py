"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from apex_opt.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, content: bytes, what: str) -> None:
    """Write a file; it appears whole or not at all.

    Parameters
    ----------
    what : str      option that names the file, with which the message begins

    Raises
    ------
    InputError    a path that cannot be written
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            beside.unlink()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{what} {path}: cannot be written ({reason}); name a file in a folder that can") from error
