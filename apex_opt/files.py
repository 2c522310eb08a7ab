"""The one way in for files that users name: what they are and how large is settled before they are read.

A path may name anything: a device that never ends, a pipe that nobody writes to, a file of the kernel, an archive that
unpacks to a thousand times its size. Every reader of this package takes its bytes, its text or its JSON from here, with
the largest size that a file of its kind has, and says in one line why another one is refused.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn

from apex_opt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB: Final = 1 << 20

LARGEST_RATIO: Final = 200
"""Times its packed size that a file may unpack to. Logs of runs and traces reach some 5 to 30, constant ones 100; gzip
itself ends at 1,032."""

MOST_MEMBERS: Final = 10_000
"""Members of one gzip file: bgzip makes one for every 64 KiB; empty ones take time and give nothing."""

MOST_VALUES: Final = 8_000_000
"""Values of one JSON file: Python needs up to 72 bytes for each, and a file of `[{},{},` has one in three bytes."""

MOST_FILES: Final = 100_000
"""Entries of a folder that is searched, with those below."""

_ANY_RATIO_BYTES: Final = MIB
_CHUNK_BYTES: Final = MIB
_GZIP: Final = b"\x1f\x8b"
_KERNEL: Final = ("/proc/", "/sys/")
_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def expanded(path: str | Path) -> Path:
    """A path as typed, `~` and `~user` standing for home folders; a folder named `~` is reached as `./~`."""
    return Path(os.path.expanduser(path))


def there(path: Path) -> bool:
    """Whether there is something at a path, readable or not."""
    try:
        path.stat()
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def absence(path: Path, what: str = "no such file") -> str:
    """Why there is nothing at a path: a link that leads nowhere is told as what it is."""
    return f"a link to {os.readlink(path)}, which leads to no file" if os.path.islink(path) else what


def read_bytes(path: Path, *, limit: int, where: str = "", want: str = "") -> bytes:
    """A regular file whole, as it is.

    Parameters
    ----------
    limit : int     bytes of the largest file of this kind
    where : str     how messages name the file; by default its path
    want : str      what a message ends with: what to do or to give instead

    Raises
    ------
    InputError      missing, unreadable, not a regular file, one of the kernel, or larger
    """
    where = where or str(path)
    try:
        with _opened(path, where, want) as file:
            size = os.fstat(file.fileno()).st_size
            # A file may grow while it is read.
            data = file.read(limit + 1) if size <= limit else b""
    except InputError:
        raise
    except FileNotFoundError:
        raise _refused(where, absence(path), want) from None
    except (OSError, ValueError) as error:
        raise _refused(where, f"cannot be read ({reason(error)})", want) from None
    if size > limit or len(data) > limit:
        raise _refused(where, f"{max(size, len(data)):,} bytes, above the limit of {limit:,}", want)
    return data


def read_text(path: Path, *, limit: int, where: str = "", want: str = "") -> str:
    """A file of UTF-8 text whole, unpacked where it is gzip's, without a byte-order mark.

    Parameters
    ----------
    limit : int     bytes of the largest file of this kind, packed and unpacked
    where, want : str   as in `read_bytes`

    Raises
    ------
    InputError      as `read_bytes`; a damaged archive, one that unpacks to more than the limit or than `LARGEST_RATIO`
                    times its size; binary, or text in another encoding, with its line
    """
    where = where or str(path)
    data = read_bytes(path, limit=limit, where=where, want=want)
    if data.startswith(_GZIP):
        data = _unpacked(data, limit, where, want)
    if b"\0" in data[: 1 << 16]:
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise _refused(where, "UTF-16 text; save it as UTF-8" if utf16 else "is a binary file", want)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _refused(where, f"line {line} is not UTF-8 text", want) from None


def read_json(path: Path, *, limit: int, where: str = "", want: str = "", finite: bool = False) -> Any:
    """The JSON value a file holds.

    Parameters
    ----------
    limit, where, want      as in `read_text`
    finite : bool           whether NaN and infinities are refused, which JSON does not have but Python reads

    Raises
    ------
    InputError      as `read_text`; empty, not JSON, with line and column; more than `MOST_VALUES` values
    """
    where = where or str(path)
    text = read_text(path, limit=limit, where=where, want=want)
    if not text.strip():
        raise _refused(where, "the file is empty", want)
    return parse_json(text, where=where, want=want, finite=finite)


def json_kind(value: object) -> str:
    """What JSON calls a value that was read from it, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def parse_json(text: str, *, where: str, want: str = "", finite: bool = False) -> Any:
    """The JSON value a text holds, as `read_json` has it.

    Parameters
    ----------
    text : str       the file's
    where : str      opens every message
    want : str       what was expected, for messages
    finite : bool    whether NaN and infinities are refused
    """

    def infinite(number: str) -> NoReturn:
        raise _refused(where, f"holds {number}, which is no JSON number", want)

    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise _refused(where, f"more than {MOST_VALUES:,} values", want)
    try:
        return json.loads(text, parse_constant=infinite if finite else None)
    except json.JSONDecodeError as error:
        raise _refused(where, f"not JSON at line {error.lineno} column {error.colno} ({error.msg})", want) from None
    except RecursionError:
        raise _refused(where, "JSON nested too deeply to read", want) from None
    except InputError:
        raise
    except ValueError:
        # json refuses integers of thousands of digits with a plain ValueError.
        raise _refused(where, "holds a number with too many digits to read", want) from None


def check_regular(path: Path, *, where: str = "", want: str = "") -> None:
    """Whether a path leads to a file that can be read.

    Parameters
    ----------
    path : Path    of the file
    where : str    opens every message
    want : str     what the file should be

    Raises
    ------
    InputError      as `read_bytes`, but for its size
    """
    where = where or str(path)
    try:
        _opened(path, where, want).close()
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _refused(where, f"cannot be read ({reason(error)})", want) from None


def files_below(folder: Path, suffixes: Sequence[str] = (), *, where: str = "", want: str = "") -> list[Path]:
    """Regular files of a folder and below, by name; links to folders are not followed, hidden files are left out.

    Parameters
    ----------
    suffixes : texts        how names must end, in lower case; any where empty
    where, want : str       as in `read_bytes`

    Raises
    ------
    InputError      a folder that cannot be read, one of the kernel, or one with more than `MOST_FILES` entries
    """
    where = where or str(folder)
    found: list[Path] = []
    open_folders, seen = [folder], 0
    try:
        if os.path.realpath(folder).startswith(_KERNEL) or f"{os.path.realpath(folder)}/" in _KERNEL:
            raise _refused(where, "a folder of the kernel", want)
        while open_folders:
            with os.scandir(open_folders.pop()) as entries:
                for entry in entries:
                    seen += 1
                    if seen > MOST_FILES:
                        raise _refused(where, f"more than {MOST_FILES:,} files and folders in it", want)
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        open_folders.append(Path(entry.path))
                    elif entry.is_file() and entry.name.lower().endswith(tuple(suffixes) or ("",)):
                        found.append(Path(entry.path))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _refused(where, f"cannot be read ({reason(error)})", want) from None
    return sorted(found)


def reason(error: Exception) -> str:
    """Why the system refused, in its words and without the path."""
    if "embedded null" in str(error):  # what Python says of it differs from release to release
        return "a name with a null character"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _opened(path: Path, where: str, want: str) -> BinaryIO:
    """A regular file, open; its kind is that of what was opened, whatever lies at the path by then."""
    # Some devices act when they are opened: looked at first, and opened without waiting for the other end of a pipe.
    _check_kind(os.stat(path).st_mode, where, want)
    number = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY")))
    try:
        _check_kind(os.fstat(number).st_mode, where, want)
        if _true_name(number, path).startswith(_KERNEL):
            raise _refused(where, "not a regular file but one of the kernel", want)
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def _check_kind(mode: int, where: str, want: str) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for known, name in _KINDS if known(mode)), "something else")
        raise _refused(where, f"not a regular file but {kind}", want)


def _true_name(number: int, path: Path) -> str:
    """Where an open file lies, links followed."""
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return os.path.realpath(path)


def _unpacked(data: bytes, limit: int, where: str, want: str) -> bytes:
    """What gzip packed, as far as a file of this kind may be."""
    most = min(limit, max(LARGEST_RATIO * len(data), _ANY_RATIO_BYTES))
    if data.count(_GZIP + b"\x08") > MOST_MEMBERS:
        raise _refused(where, f"more than {MOST_MEMBERS:,} gzip files in one", want)
    pieces, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while size <= most and (piece := file.read(_CHUNK_BYTES)):
                pieces.append(piece)
                size += len(piece)
    except (EOFError, OSError, zlib.error) as error:
        raise _refused(where, f"not a whole gzip file ({error}); fetch it again", "") from None
    if size > limit:
        raise _refused(where, f"unpacks to more than the limit of {limit:,} bytes", want)
    if size > most:
        raise _refused(where, f"unpacks to more than {LARGEST_RATIO} times its {len(data):,} bytes", want)
    return b"".join(pieces)


def _refused(where: str, fault: str, want: str) -> InputError:
    return InputError(f"{where}: {fault}{f'; {want}' if want else ''}")
