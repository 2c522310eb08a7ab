"""The functions of the kernel that Python calls: as machine code from disk, where it is of the sources as they are.

Such a function takes addresses of arrays and integers alone, so its machine code needs nothing else, and running it
needs LLVM's linker but not numba, which is loaded only to compile: half a second less for a process that finds it on
disk. A file is kept for each, with a stamp over all sources of the function's folder, so that code and constants may
be shared between them, and a checksum of all of it, as it is code that will be run. What cannot be used is said in one
line and replaced; a folder that nothing can be kept in costs the time to compile, not the answer.

With NUMBA_DISABLE_JIT=1 or NUMBA_BOUNDSCHECK=1 functions are called with arrays, and nothing is kept; so they are where
numba should one day call functions in another way.
"""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import llvmlite.binding as llvm
import numpy as np

from apex_opt.errors import InputError
from apex_opt.files import read_bytes, reason
from apex_opt.outputs import written

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGEST_BYTES: Final = 64 << 20
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_said: set[str] = set()


class Entry:
    """A function of the kernel that Python calls.

    Parameters
    ----------
    module, name : str    where the function is
    kinds : for each parameter `int`, or the type of the entries of an array
    """

    def __init__(self, module: str, name: str, kinds: tuple[Any, ...]) -> None:
        self.module, self.name, self.kinds = module, name, kinds
        self._call: Callable[..., Any] | None = None
        self._engines: list[Any] = []  # machine code is there for as long as these are
        self._lock = Lock()

    def __call__(self, *given: Any) -> None:
        """Run the function, which compiles it where it has not been."""
        if not self.ready():
            with self._lock:
                self._call = self._call or self._compiled()
        assert self._call is not None
        self._call(*given)

    def ready(self) -> bool:
        """Whether it can be run without compiling it."""
        with self._lock:
            if self._call is None and not _with_arrays():
                self._call = self._kept()
        return self._call is not None

    def _compiled(self) -> Callable[..., Any]:
        """Compile the function, and keep it."""
        from apex_opt.simulator.kernel.jit import native, outer

        function = getattr(importlib.import_module(self.module), self.name)
        if _with_arrays():
            return outer(function)
        text = native(function, self.kinds)
        # Numba hands on where to put the result and the exception, then the arguments, and returns a status.
        defined = re.search(rf"^define .*?i32 @\"?([\w.$]*{self.name}[\w.$]*)\"?\((.*)", text, re.MULTILINE)
        if defined is None or defined[2].count("%") != 2 + len(self.kinds):
            return outer(function)
        machine = _machine().emit_object(llvm.parse_assembly(text))
        try:
            self._keep(defined[1], machine)
        except Exception as error:
            _say(f"compiled code cannot be kept in {_folder()} ({_cause(error)}); the next run compiles it again")
        return self._linked(defined[1], machine)

    def _linked(self, symbol: str, machine: bytes) -> Callable[..., Any]:
        """The function that machine code holds, as one that takes arrays and integers."""
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(machine))
        engine.finalize_object()
        address = engine.get_function_address(symbol)
        if not address:
            raise InputError(f"{symbol} is missing")
        self._engines.append(engine)
        passed = [ctypes.c_int64 if kind is int else ctypes.c_void_p for kind in self.kinds]
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *passed)(address)

        def call(*given: Any) -> None:
            nowhere = ctypes.c_void_p()
            addresses = [_address(kind, value) for kind, value in zip(self.kinds, given, strict=True)]
            status = function(ctypes.addressof(nowhere), ctypes.addressof(nowhere), *addresses)
            assert status == 0, f"{self.name} ended with {status}"

        return call

    @property
    def _path(self) -> Path:
        """The file it is kept in; processors differ in what they can run."""
        return _folder() / f"{self.name}-{_processor()}.machine"

    def _stamp(self) -> bytes:
        """What it is, and what it is made of."""
        spec = importlib.util.find_spec(self.module)
        assert spec is not None and spec.origin is not None
        what = f"{self.module}.{self.name} {self.kinds}".encode()
        return hashlib.sha256(what + _sources(Path(spec.origin).parent)).digest()

    def _keep(self, symbol: str, machine: bytes) -> None:
        """Write it to disk."""
        path = self._path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():  # not where a link leads to
            path.unlink()
        data = self._stamp() + symbol.encode() + b"\n" + machine
        with written(path, "compiled code") as file:
            file.write(data + hashlib.sha256(data).digest())

    def _kept(self) -> Callable[..., Any] | None:
        """What was kept of the sources as they are."""
        try:
            path = self._path
            if not os.path.lexists(path):
                return None
            data = _checked(path)
            if not data.startswith(stamp := self._stamp()):
                return None
            symbol, _, machine = data[len(stamp) :].partition(b"\n")
            return self._linked(symbol.decode(), machine)
        except Exception as error:
            # What garbage makes of a linker is not to be foreseen.
            _say(f"compiled code in {_folder()} cannot be used ({_cause(error)}); compiling it anew, a few seconds")
            return None


_I64, _I32 = np.int64, np.int32
_KERNEL: Final = "apex_opt.simulator.kernel."
_RUN: Final = (_I64,) * 12
_CACHE: Final = (int, *[_I64] * 8, _I32, _I32, _I32)
_SERVE: Final = (*_RUN, int, int, _I64, int)
SERVE_STEADY: Final = Entry(_KERNEL + "deployment", "serve_steady_nb", _SERVE)
SERVE_GENERAL: Final = Entry(_KERNEL + "deployment", "serve_general_nb", _SERVE)
_CACHING: Final = (*_SERVE, *_CACHE)
SERVE_CACHING: Final = Entry(_KERNEL + "deployment", "serve_caching_nb", _CACHING)
ROUTE_STEADY: Final = Entry(_KERNEL + "router", "route_steady_nb", (*_SERVE, _I64))
ROUTE_GENERAL: Final = Entry(_KERNEL + "router", "route_general_nb", (*_SERVE, _I64))
ROUTE_CACHING: Final = Entry(_KERNEL + "router", "route_caching_nb", (*_SERVE, _I64, *_CACHE))
ROUTE_TRTLLM: Final = Entry(_KERNEL + "router", "route_trtllm_nb", (*_SERVE, _I64))
ROUTE_SPECULATIVE: Final = Entry(_KERNEL + "router", "route_speculative_nb", (*_SERVE, _I64))
ROUTE_SPECULATIVE_CACHING: Final = Entry(_KERNEL + "router", "route_speculative_caching_nb", (*_SERVE, _I64, *_CACHE))
SERVE_TRTLLM: Final = Entry(_KERNEL + "deployment", "serve_trtllm_nb", _SERVE)
SERVE_SPECULATIVE: Final = Entry(_KERNEL + "deployment", "serve_speculative_nb", _SERVE)
SERVE_SPECULATIVE_CACHING: Final = Entry(_KERNEL + "deployment", "serve_speculative_caching_nb", _CACHING)
_GROUPS: Final = (*[int] * 8, *[_I64] * 4, _I32, *[_I64] * 4, _I32, _I32, _I32)
_GROUPED: Final = (*_SERVE, *_GROUPS)
SERVE_GROUPED: Final = Entry(_KERNEL + "deployment", "serve_grouped_nb", _GROUPED)
SERVE_STEADY_GROUPS: Final = Entry(_KERNEL + "deployment", "serve_steady_groups_nb", _GROUPED)
SERVE_GENERAL_GROUPS: Final = Entry(_KERNEL + "deployment", "serve_general_groups_nb", _GROUPED)
_INSTANCES: Final = (*_RUN, *[_I64] * 4)
SERVE_DISAGGREGATED: Final = Entry(_KERNEL + "disaggregated", "serve_disaggregated_nb", _INSTANCES)
SERVE_DISAGGREGATED_CACHING: Final = Entry(
    _KERNEL + "disaggregated", "serve_disaggregated_caching_nb", (*_INSTANCES, *_CACHE)
)
_RANKS: Final = (*_SERVE, *[_I64] * 11)
RANKS_STEADY: Final = Entry(_KERNEL + "ranks", "serve_ranks_steady_nb", _RANKS)
RANKS_GENERAL: Final = Entry(_KERNEL + "ranks", "serve_ranks_general_nb", _RANKS)
RANKS_CACHING: Final = Entry(_KERNEL + "ranks", "serve_ranks_caching_nb", (*_RANKS, int, *[_I64] * 8, _I32, _I32, _I32))
RANKS_TRTLLM: Final = Entry(_KERNEL + "trtllm_ranks", "serve_trtllm_ranks_nb", _RANKS)
RANKS_STEADY_GROUPS: Final = Entry(_KERNEL + "ranks", "serve_ranks_steady_groups_nb", (*_RANKS, *_GROUPS))
RANKS_GENERAL_GROUPS: Final = Entry(_KERNEL + "ranks", "serve_ranks_general_groups_nb", (*_RANKS, *_GROUPS))
_SGLANG: Final = (*_SERVE, _I64, np.float64)
SERVE_SGLANG: Final = Entry(_KERNEL + "sglang_serve", "serve_sglang_nb", _SGLANG)
SERVE_SGLANG_CACHING: Final = Entry(_KERNEL + "sglang_serve", "serve_sglang_caching_nb", (*_SGLANG, int, *[_I64] * 7))
_SGLANG_RANKS: Final = (*_RANKS, _I64, np.float64)
RANKS_SGLANG: Final = Entry(_KERNEL + "sglang_ranks", "serve_sglang_ranks_nb", _SGLANG_RANKS)
RANKS_SGLANG_CACHING: Final = Entry(
    _KERNEL + "sglang_ranks", "serve_sglang_ranks_caching_nb", (*_SGLANG_RANKS, int, *[_I64] * 7)
)
SERVE_PHASES: Final = Entry(_KERNEL + "phases", "serve_phases_nb", (_I64,) * 11)
NUMBER_PIECES: Final = Entry(_KERNEL + "content", "number_pieces_nb", (_I64, int, _I64, _I64, _I64, _I64, int, _I64))
ENTRIES: Final = (
    SERVE_STEADY,
    SERVE_GENERAL,
    SERVE_CACHING,
    ROUTE_STEADY,
    ROUTE_GENERAL,
    ROUTE_CACHING,
    ROUTE_TRTLLM,
    ROUTE_SPECULATIVE,
    ROUTE_SPECULATIVE_CACHING,
    SERVE_TRTLLM,
    SERVE_SPECULATIVE,
    SERVE_SPECULATIVE_CACHING,
    SERVE_GROUPED,
    SERVE_STEADY_GROUPS,
    SERVE_GENERAL_GROUPS,
    SERVE_DISAGGREGATED,
    SERVE_DISAGGREGATED_CACHING,
    RANKS_STEADY,
    RANKS_GENERAL,
    RANKS_CACHING,
    RANKS_TRTLLM,
    RANKS_STEADY_GROUPS,
    RANKS_GENERAL_GROUPS,
    SERVE_SGLANG,
    SERVE_SGLANG_CACHING,
    RANKS_SGLANG,
    RANKS_SGLANG_CACHING,
    SERVE_PHASES,
    NUMBER_PIECES,
)
"""All that is ever compiled, each for one list of types."""


def _address(kind: Any, value: Any) -> int:
    """An integer as it is, and where the entries of an array are."""
    if kind is int:
        return int(value)
    assert value.dtype == kind and value.flags.c_contiguous and value.flags.writeable
    return int(value.__array_interface__["data"][0])


@cache
def _with_arrays() -> bool:
    """Whether functions are to be called with arrays."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"))


@cache
def _machine() -> Any:
    """Code generation for this processor."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )


@cache
def _processor() -> str:
    """This processor, in a word."""
    can = f"{llvm.get_process_triple()} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    return hashlib.sha256(can.encode()).hexdigest()[:12]


@cache
def _sources(folder: Path) -> bytes:
    """What all files of a folder say, and who compiles them."""
    said = [f"{name} {importlib.metadata.version(name)}".encode() for name in ("numba", "llvmlite")]
    for path in sorted(folder.glob("*.py")):
        said += [path.name.encode(), read_bytes(path, limit=_LARGEST_BYTES, where=path.name)]
    return b"\0".join(said)


def _folder() -> Path:
    """Where compiled code is kept: in NUMBA_CACHE_DIR, beside the sources, or where a user's caches are."""
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(given)
    beside = Path(__file__).parent / "__pycache__"
    if os.access(beside if beside.is_dir() else beside.parent, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apex_opt"


def _checked(path: Path) -> bytes:
    """What a file holds, if it is what was written to it, by whom we trust: it is code that will be run."""
    if hasattr(os, "geteuid") and path.stat().st_uid not in (os.geteuid(), 0, os.stat(__file__).st_uid):
        raise InputError(f"{path.name}: another user's")
    data = read_bytes(path, limit=_LARGEST_BYTES, where=path.name)
    content, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise InputError(f"{path.name}: damaged")
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
