"""The one way out for files that users name: written beside their place, and moved there whole or not at all.

A file that is there is replaced, by one with its permissions; one that is write-protected, or that is no file, is left
alone. A link is followed: what it leads to is replaced. An interrupted program leaves nothing half-written behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from apex_opt.errors import InputError
from apex_opt.files import files_below, reason, there
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_WAY_OUT: Final = "name a file in a folder that can"
_LONGEST_BEGINNING: Final = 100
_READ: Final = (".csv", ".json", ".gz", ".toml", ".npz")
_unfinished: set[Path] = set()
moving: Final = threading.Lock()


@contextlib.contextmanager
def written(path: Path, what: str) -> Iterator[BinaryIO]:
    """A file to write; it takes its place once the block has ended without an error.

    Parameters
    ----------
    what : str      option that names the file, with which messages begin

    Raises
    ------
    InputError    a path that cannot be written
    """
    try:
        target = _target(path)
        number, name = tempfile.mkstemp(".part", f".{target.name[:_LONGEST_BEGINNING]}.", target.parent)
        beside = Path(name)
        _unfinished.add(beside)
        try:
            with os.fdopen(number, "wb") as file:
                yield file
                file.flush()
                with contextlib.suppress(OSError, AttributeError):  # not every system has them
                    os.fchmod(number, _mode(target))
            beside.replace(target)
        finally:
            with contextlib.suppress(OSError):
                beside.unlink()
            _unfinished.discard(beside)
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be written ({reason(error)}); {_WAY_OUT}") from error


def write_whole(path: Path, content: bytes, what: str) -> None:
    """Write a file; it appears whole or not at all.

    Parameters
    ----------
    path : Path        of the file
    content : bytes    what it is to hold
    what : str         what it is, for messages

    Raises
    ------
    InputError    a path that cannot be written
    """
    with written(path, what) as file:
        file.write(content)


def placed(path: Path) -> Path:
    """Where a path leads: one through `..` without it, so that what is there is seen where a folder on the way is not.

    Raises
    ------
    OSError    a name that no system has, or a current folder that is gone
    """
    if "\0" in str(path):
        raise OSError(None, "a name with a null character")
    if ".." not in path.parts:
        return path
    if path.name == "..":
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)  # a link at its end stays one


@contextlib.contextmanager
def fresh_folder(path: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A folder to fill; it takes the place of the one at the path once the block has ended without an error.

    Parameters
    ----------
    path : Path         of the folder
    check : callable    raises where what is there may not be replaced; asked before the block and after it

    Raises
    ------
    OSError       a folder that cannot be made or replaced
    """
    path = placed(path)
    check()
    if path.is_symlink():
        raise OSError(None, "a link to a folder; name the folder itself")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(".part", f".{path.name[:_LONGEST_BEGINNING]}.", path.parent))
    _unfinished.add(beside)
    try:
        beside.chmod(0o777 & ~_umask())
        yield beside
        with moving:
            check()  # what has come meanwhile stays
            gone = Path(tempfile.mkdtemp(".gone", f".{path.name[:_LONGEST_BEGINNING]}.", path.parent))
            old = gone / path.name
            if path.exists():
                path.rename(old)
            try:
                beside.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
            finally:
                shutil.rmtree(gone, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        _unfinished.discard(beside)


def drop_unfinished() -> None:
    """Remove what is half-written, for a program that ends at once; what is being moved is let through first."""
    with contextlib.suppress(OSError):
        moving.acquire(timeout=1)
        for path in tuple(_unfinished):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def check_outputs(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """Whether files can be written, before the work for them is done, and none is one that the command reads.

    Parameters
    ----------
    outputs : mapping of option to the file it names
    inputs : mapping of option to the file or folder it names

    Raises
    ------
    InputError    a path that cannot be written, two that are the same file, one that is read, or a part of apex_opt
    """
    taken: dict[Path | tuple[int, int], str] = {}
    read = {key: name for name, path in inputs.items() for key in _read(path)} if outputs else {}
    for option, path in outputs.items():
        _check(option, path)
        for key in _keys(path):
            if key in taken and taken[key] != option:
                raise InputError(f"{option} {path}: is the file of --{taken[key]} too; name two files")
            if key in read:
                raise InputError(f"{option} {path}: is what --{read[key]} is read from; name another file")
            taken[key] = option


def check_folder(path: Path, what: str) -> None:
    """Whether a folder can be made or written into, before the work for it is done.

    Raises
    ------
    InputError    one that cannot
    """
    try:
        place = placed(path)
        nearest = next(folder for folder in (place, *place.absolute().parents) if there(folder))
        if not nearest.is_dir():
            raise OSError(None, f"{nearest} is not a folder")
        tempfile.TemporaryFile(dir=nearest).close()
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {path}: cannot be written ({reason(error)}); name another folder") from None


def taken_alone(path: Path, what: str) -> tuple[Path, int]:
    """A folder, made where there is none, for one program at a time: where it is, a number to close once done with it.

    Raises
    ------
    InputError    one that cannot be made, or that another program is at work in
    """
    try:
        place = placed(path)
        place.mkdir(parents=True, exist_ok=True)
        lock = os.open(place / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be written ({reason(error)}); name another folder") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise InputError(f"{what} {path}: another run is at work in it; wait, or name another folder") from None
    return place, lock


def check_replaced(folder: Path, read: Iterable[Path]) -> None:
    """Whether a folder that is to be replaced holds no file that is read.

    Raises
    ------
    InputError    it does
    """
    place = folder.resolve()
    for path in read:
        if path.resolve().is_relative_to(place):
            raise InputError(f"{folder}: would be replaced, and {path} is read; name another --target")


def _check(option: str, path: Path) -> None:
    """Whether a file can be written: by making one beside it."""
    try:
        target = _target(path)
        if there(target) and any(target.is_relative_to(folder) for folder in _shipped()):
            raise InputError(f"{option} {path}: is a part of apex_opt; name another file")
        tempfile.TemporaryFile(dir=target.parent).close()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {path}: cannot be written ({reason(error)}); {_WAY_OUT}") from None


def _shipped() -> tuple[Path, ...]:
    """Folders of what comes with the program."""
    return (Path(__file__).resolve().parent, DATA_ROOT / "profiles", DATA_ROOT / "traces")


def _target(path: Path) -> Path:
    """The file that a name or a link stands for, if it may be replaced."""
    if "\0" in str(path):
        raise OSError(None, "a name with a null character")
    target = Path(os.path.realpath(path))
    if there(target) or target.is_symlink():
        if not stat.S_ISREG(target.stat().st_mode):
            raise OSError(None, "not a regular file")  # a device or a pipe would be lost
        if not os.access(target, os.W_OK):
            raise OSError(None, "write-protected")
    return target


def _mode(target: Path) -> int:
    """Permissions of a file in this place: those of the one that is there, else what is usual."""
    with contextlib.suppress(OSError):
        return stat.S_IMODE(target.stat().st_mode) & 0o777
    return 0o666 & ~_umask()


def _umask() -> int:
    """What the user keeps from new files. It can be read only by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _read(path: Path) -> set[Path | tuple[int, int]]:
    """What tells the files of an input from others: their places, and where they lie on the disk."""
    try:
        found = files_below(path, _READ) if path.is_dir() else [path]
    except InputError:
        found = []  # whoever reads it says so
    return {key for file in found for key in _keys(file)}


def _keys(path: Path) -> tuple[Path | tuple[int, int], ...]:
    """What tells a file from others."""
    try:
        true = Path(os.path.realpath(path))
    except OSError:
        return ()  # the current folder is gone
    try:
        found = true.stat()
    except OSError:
        return (true,)
    return (true, (found.st_dev, found.st_ino))
