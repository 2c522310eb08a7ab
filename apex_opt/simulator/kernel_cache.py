"""Compiled code on disk: summed up when it is kept, and compiled anew where it is damaged, closed to us or of others.

Numba takes what its cache holds as it is: a file cut short is a traceback, one with other bytes is run. Here every file
ends with the SHA-256 of what it holds. What cannot be used is said in one line and replaced; a folder that nothing can
be kept in costs the time to compile, not the answer.
"""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

from apex_opt.errors import InputError
from apex_opt.files import read_bytes, reason
from apex_opt.outputs import written

if TYPE_CHECKING:
    from collections.abc import Iterator

_LARGEST_BYTES = 64 << 20
_DIGEST_BYTES = hashlib.sha256().digest_size
_said: set[str] = set()


def compiled(function: Any) -> Any:
    """Compile a function when it is first called, with what was kept of that, or without where no folder is there."""
    try:
        dispatcher = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
        if hasattr(dispatcher, "_cache"):  # not where compiling is switched off
            dispatcher._cache = _Cache(function)  # noqa: SLF001
    except RuntimeError:
        return numba.njit(nogil=True, error_model="numpy")(function)
    return dispatcher


def is_ready(dispatcher: Any) -> bool:
    """Whether a function that `compiled` returned can be called without compiling it, as far as the index tells."""
    if not hasattr(dispatcher, "signatures") or dispatcher.signatures:
        return True  # compiling is switched off, or done
    cache = getattr(dispatcher, "_cache", None)
    return isinstance(cache, _Cache) and cache.holds_any()


class _SummedFile(IndexDataCacheFile):
    """Numba's pair of an index and its data, each with the sum of what it holds at its end."""

    def _load_index(self) -> Any:
        if not os.path.lexists(self._index_path):
            return {}
        _check(self._index_path)
        return super()._load_index()

    def entries(self) -> Any:
        """The index: files by signature."""
        return self._load_index()

    def forget(self) -> None:
        """Remove the index: what it leads to is written anew."""
        with contextlib.suppress(OSError):
            os.unlink(self._index_path)

    def _load_data(self, name: str) -> Any:
        _check(self._data_path(name))
        return super()._load_data(name)

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


class _Cache(FunctionCache):
    """Numba's cache of one function, which never fails."""

    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        self._cache_file: Any = self._cache_file
        self._cache_file.__class__ = _SummedFile

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
            _say(f"compiled code in {self.cache_path} cannot be used ({_cause(error)}); compiling it anew, 10 to 30 s")
        self._cache_file.forget()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _say(f"compiled code cannot be kept in {self.cache_path} ({_cause(error)}); the next run compiles it again")


def _check(path: str) -> None:
    """Whether a file holds what was written to it, by whom we trust: it is code that will be run."""
    if hasattr(os, "geteuid") and os.stat(path).st_uid not in (os.geteuid(), 0, os.stat(__file__).st_uid):
        raise InputError(f"{os.path.basename(path)}: another user's")
    data = read_bytes(Path(path), limit=_LARGEST_BYTES, where=os.path.basename(path))
    if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        raise InputError(f"{os.path.basename(path)}: damaged")


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
