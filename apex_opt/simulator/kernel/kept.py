"""Compiled code on disk: of the sources as they are, summed up when it is kept, compiled anew where it is damaged.

Numba's cache sees edits in the file of a function alone, so a helper or a constant in another would go stale: here its
stamp is the SHA-256 of all files of the function's folder. And numba takes what its cache holds as it is: a file cut
short is a traceback, one with other bytes is run. Here every file ends with the SHA-256 of what it holds. What cannot
be used is said in one line and replaced; a folder that nothing can be kept in costs the time to compile, not the
answer.
"""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
from numba import config
from numba.core.caching import FunctionCache, IndexDataCacheFile

from apex_opt.errors import InputError
from apex_opt.files import read_bytes, reason
from apex_opt.outputs import written

if TYPE_CHECKING:
    from collections.abc import Iterator

_LARGEST_BYTES = 64 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size
_said: set[str] = set()


class _SummedFile(IndexDataCacheFile):
    """Numba's pair of an index and its data, each with the sum of what it holds at its end."""

    def _load_index(self) -> Any:
        if not os.path.lexists(self._index_path):
            return {}
        stamp, overloads = pickle.loads(_checked(self._index_path))
        return pickle.loads(overloads) if stamp == self._source_stamp else {}

    def _save_index(self, overloads: Any) -> None:
        with self._open_for_write(self._index_path) as file:
            # Not read where the stamp is another: another version's may not be readable.
            file.write(pickle.dumps((self._source_stamp, self._dump(overloads))))

    def _load_data(self, name: str) -> Any:
        return pickle.loads(_checked(self._data_path(name)))

    def entries(self) -> Any:
        """The index: files by signature."""
        return self._load_index()

    def forget(self) -> None:
        """Remove the index: what it leads to is written anew."""
        with contextlib.suppress(OSError):
            os.unlink(self._index_path)

    @contextlib.contextmanager
    def _open_for_write(self, filepath: str) -> Iterator[io.BytesIO]:
        content = io.BytesIO()
        yield content
        data = content.getvalue()
        with contextlib.suppress(OSError):
            if os.path.islink(filepath):  # not where a link leads to
                os.unlink(filepath)
        with written(Path(filepath), "compiled code") as file:
            file.write(data + hashlib.sha256(data).digest())


class Kept(FunctionCache):
    """Numba's cache of one function, which never fails."""

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        stamp = _stamp(Path(py_func.__code__.co_filename).parent)
        self._cache_file: Any = _SummedFile(self._cache_path, self._impl.filename_base, stamp)

    def holds_any(self) -> bool:
        """Whether there is an index of the source as it is."""
        try:
            return bool(self._cache_file.entries())
        except Exception:
            return False

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # What garbage makes of a reader of pickles and of a linker is not to be foreseen.
        try:
            loaded = super().load_overload(sig, target_context)
            if loaded is not None and loaded.fndesc.qualname != self._py_func.__qualname__:
                raise InputError(f"that of {self._py_func.__qualname__} is of {loaded.fndesc.qualname}")
            return loaded
        except Exception as error:
            why = f"cannot be used ({_cause(error)}); compiling it anew, a few seconds"
            _say(f"compiled code in {self.cache_path} {why}")
        self._cache_file.forget()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            where = f"{self.cache_path} ({_cause(error)})"
            _say(f"compiled code cannot be kept in {where}; the next run compiles it again")


@cache
def _stamp(folder: Path) -> str:
    """What all files of a folder say, and how they are compiled."""
    said = [f"{numba.__version__} {config.BOUNDSCHECK}".encode()]  # type: ignore[attr-defined]
    for path in sorted(folder.glob("*.py")):
        said += [path.name.encode(), read_bytes(path, limit=_LARGEST_BYTES, where=path.name)]
    return hashlib.sha256(b"\0".join(said)).hexdigest()


def _checked(path: str) -> bytes:
    """What a file holds, if it is what was written to it, by whom we trust: it is code that will be run."""
    if hasattr(os, "geteuid") and os.stat(path).st_uid not in (os.geteuid(), 0, os.stat(__file__).st_uid):
        raise InputError(f"{os.path.basename(path)}: another user's")
    data = read_bytes(Path(path), limit=_LARGEST_BYTES, where=os.path.basename(path))
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise InputError(f"{os.path.basename(path)}: damaged")
    return content


def _cause(error: Exception) -> str:
    """Why, in a few words."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return " ".join(reason(cause).split())[:120]


def _say(text: str) -> None:
    """A line on stderr, once for all functions: one damaged file seldom comes alone."""
    kind = text.partition(" (")[0]
    if kind not in _said:
        _said.add(kind)
        print(f"note: {text}", file=sys.stderr, flush=True)
