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
from apex_opt.simulator.kernel.group_state import Group, Halves
from apex_opt.simulator.kernel.kv_state import Groups
from apex_opt.simulator.kernel.multiplexing_state import Multiplexed
from apex_opt.simulator.kernel.phases_state import Replica
from apex_opt.simulator.kernel.records import kinds, leaves, names, spread
from apex_opt.simulator.kernel.sglang_state import Sglang, Tree
from apex_opt.simulator.kernel.state import Cache, Links, Routers, Run

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGEST_BYTES: Final = 64 << 20
_DIGEST_BYTES: Final = hashlib.sha256().digest_size
_said: set[str] = set()


class Entry:
    """A function of the kernel that Python calls.

    Parameters
    ----------
    module, function : str    where it is
    takes : for each parameter `int`, the type of the entries of an array, a named tuple or a tuple of these, or None
        where a part is not there
    """

    def __init__(self, module: str, function: str, *takes: Any) -> None:
        self.module, self.function, self.takes = module, function, takes
        self.name = "_".join([module.rpartition(".")[2], function.removesuffix("_nb"), *names(takes)])
        self._kinds = tuple(kinds(takes))
        self._call: Callable[..., Any] | None = None
        self._engines: list[Any] = []  # machine code is there for as long as these are
        self._lock = Lock()

    def __call__(self, *given: Any) -> None:
        """Run the function on what it takes, which compiles it where it has not been."""
        if not self.ready():
            with self._lock:
                self._call = self._call or self._compiled()
        assert self._call is not None
        self._call(*leaves(given))

    def ready(self) -> bool:
        """Whether it can be run without compiling it."""
        with self._lock:
            if self._call is None and not _with_arrays():
                self._call = self._kept()
        return self._call is not None

    def _compiled(self) -> Callable[..., Any]:
        """Compile the function, and keep it."""
        from apex_opt.simulator.kernel.jit import native, outer

        function = spread(getattr(importlib.import_module(self.module), self.function), self.name, self.takes)
        if _with_arrays():
            return outer(function)
        # Groups are few: side by side their loops are half as much machine code again, and no faster.
        text = native(function, self._kinds, vectors=Groups not in self.takes)
        # Numba hands on where to put the result and the exception, then the arguments, and returns a status.
        defined = re.search(rf"^define .*?i32 @\"?([\w.$]*{self.name}[\w.$]*)\"?\((.*)", text, re.MULTILINE)
        if defined is None or defined[2].count("%") != 2 + len(self._kinds):
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
        passed = [ctypes.c_int64 if kind is int else ctypes.c_void_p for kind in self._kinds]
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *passed)(address)

        def call(*given: Any) -> None:
            nowhere = ctypes.c_void_p()
            addresses = [_address(kind, value) for kind, value in zip(self._kinds, given, strict=True)]
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
        what = f"{self.module}.{self.function} {self.takes}".encode()
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


def _of(file: str, function: str, *takes: Any) -> Entry:
    """That of a file of this folder."""
    return Entry(f"{__package__}.{file}", function, *takes)


_SHARE: Final = (int, int, np.int64, int)  # the first and the last + 1 that serve; requests to deal, and their number
SERVE: Final = {
    ("steady", False): _of("deployment", "by_steady_nb", Run, None, *_SHARE),
    ("general", False): _of("deployment", "by_general_nb", Run, None, *_SHARE),
    ("general", True): _of("deployment", "by_general_nb", Run, Cache, *_SHARE),
    ("speculative", False): _of("deployment", "by_speculative_nb", Run, None, *_SHARE),
    ("speculative", True): _of("deployment", "by_speculative_nb", Run, Cache, *_SHARE),
    ("trtllm", False): _of("deployment", "by_trtllm_nb", Run, None, *_SHARE),
    ("trtllm", True): _of("deployment", "by_trtllm_nb", Run, Cache, *_SHARE),
    ("sglang", False): _of("sglang_serve", "by_sglang_nb", Run, (Sglang, None), *_SHARE),
    ("sglang", True): _of("sglang_serve", "by_sglang_nb", Run, (Sglang, Tree), *_SHARE),
    ("sglang drafts", False): _of("sglang_serve", "by_drafts_nb", Run, (Sglang, None), *_SHARE),
    ("sglang drafts", True): _of("sglang_serve", "by_drafts_nb", Run, (Sglang, Tree), *_SHARE),
    ("steady groups", False): _of("deployment", "by_steady_groups_nb", Run, Groups, *_SHARE),
    ("general groups", False): (_counted := _of("deployment", "by_general_groups_nb", Run, Groups, *_SHARE)),
    ("general groups", True): _counted,
    ("speculative groups", False): (_drafted := _of("deployment", "by_grouped_nb", Run, Groups, *_SHARE)),
    ("speculative groups", True): _drafted,
}
"""Replicas that serve what is theirs, or what the least loaded gets; by engine and whether it caches prefixes."""
ROUTE: Final = {
    ("steady", False): _of("router", "by_steady_nb", Run, None, np.int64, *_SHARE),
    ("general", False): _of("router", "by_general_nb", Run, None, np.int64, *_SHARE),
    ("general", True): _of("router", "by_general_nb", Run, Cache, np.int64, *_SHARE),
    ("speculative", False): _of("router", "by_speculative_nb", Run, None, np.int64, *_SHARE),
    ("speculative", True): _of("router", "by_speculative_nb", Run, Cache, np.int64, *_SHARE),
    ("trtllm", False): _of("router", "by_trtllm_nb", Run, None, np.int64, *_SHARE),
    ("trtllm", True): _of("router", "by_trtllm_nb", Run, Cache, np.int64, *_SHARE),
    ("sglang", False): _of("sglang_serve", "routed_sglang_nb", Run, (Sglang, None), np.int64, *_SHARE),
    ("sglang", True): _of("sglang_serve", "routed_sglang_nb", Run, (Sglang, Tree), np.int64, *_SHARE),
    ("sglang drafts", False): _of("sglang_serve", "routed_drafts_nb", Run, (Sglang, None), np.int64, *_SHARE),
    ("sglang drafts", True): _of("sglang_serve", "routed_drafts_nb", Run, (Sglang, Tree), np.int64, *_SHARE),
    ("steady groups", False): _of("router", "by_steady_groups_nb", Run, Groups, np.int64, *_SHARE),
    ("general groups", False): (_counted := _of("router", "by_general_groups_nb", Run, Groups, np.int64, *_SHARE)),
    ("general groups", True): _counted,
    ("speculative groups", False): (_drafted := _of("router", "by_grouped_nb", Run, Groups, np.int64, *_SHARE)),
    ("speculative groups", True): _drafted,
}
"""Those before which a router stands that knows more than how many requests are unanswered."""
RANKS: Final = {
    ("steady", False): _of("group", "by_steady_nb", Run, None, Group, None, *_SHARE),
    ("general", False): _of("group", "by_general_nb", Run, None, Group, None, *_SHARE),
    ("general", True): _of("group", "by_general_nb", Run, Cache, Group, None, *_SHARE),
    ("speculative", False): _of("group", "by_speculative_nb", Run, None, Group, None, *_SHARE),
    ("speculative", True): _of("group", "by_speculative_nb", Run, Cache, Group, None, *_SHARE),
    ("trtllm", False): _of("trtllm_ranks", "by_trtllm_nb", Run, None, Group, None, *_SHARE),
    ("trtllm", True): _of("trtllm_ranks", "by_trtllm_nb", Run, Cache, Group, None, *_SHARE),
    ("sglang", False): _of("sglang_ranks", "by_sglang_nb", Run, (Sglang, None), Group, None, *_SHARE),
    ("sglang", True): _of("sglang_ranks", "by_sglang_nb", Run, (Sglang, Tree), Group, None, *_SHARE),
    ("sglang drafts", False): _of("sglang_ranks", "by_drafts_nb", Run, (Sglang, None), Group, None, *_SHARE),
    ("sglang drafts", True): _of("sglang_ranks", "by_drafts_nb", Run, (Sglang, Tree), Group, None, *_SHARE),
    ("steady groups", False): _of("group", "by_steady_groups_nb", Run, Groups, Group, None, *_SHARE),
    ("general groups", False): (_counted := _of("group", "by_general_groups_nb", Run, Groups, Group, None, *_SHARE)),
    ("general groups", True): _counted,
    ("speculative groups", False): (
        _drafted := _of("group", "by_speculative_groups_nb", Run, Groups, Group, None, *_SHARE)
    ),
    ("speculative groups", True): _drafted,
}
"""Those of replicas with ranks."""
HALVES: Final = {
    ("general", False): _of("group", "by_halves_nb", Run, None, Group, Halves, *_SHARE),
    ("general", True): _of("group", "by_halves_nb", Run, Cache, Group, Halves, *_SHARE),
    ("sglang", False): _of("sglang_ranks", "by_sglang_nb", Run, (Sglang, None), Group, Halves, *_SHARE),
    ("sglang", True): _of("sglang_ranks", "by_sglang_nb", Run, (Sglang, Tree), Group, Halves, *_SHARE),
}
"""Those of replicas whose ranks split forwards into two halves."""
DISAGGREGATED: Final = {
    (False, False): _of("disaggregated", "disaggregated_nb", Run, None, Links, None),
    (False, True): _of("disaggregated", "disaggregated_nb", Run, Cache, Links, None),
    (True, False): _of("disaggregated", "disaggregated_nb", Run, None, Links, Routers),
    (True, True): _of("disaggregated", "disaggregated_nb", Run, Cache, Links, Routers),
}
"""Prefill and decode instances, by whether routers stand before them and whether they cache prefixes."""
APART: Final = _of("apart", "apart_nb", Run, Links)
"""Decode instances on their own, where those that compute prompts have been run before."""
PUSHING: Final = {
    False: _of("pushing", "pushing_nb", Run, (Sglang, None), Links),
    True: _of("pushing", "pushing_nb", Run, (Sglang, Tree), Links),
}
"""Prefill and decode instances of SGLang, by whether they cache prefixes."""
PHASES: Final = _of("phases", "serve_phases_nb", Replica)
MULTIPLEXING: Final = _of("multiplexing", "multiplexing_nb", Run, (Sglang, None), Multiplexed, int)
NUMBER_PIECES: Final = _of(
    "content", "number_pieces_nb", np.int64, int, np.int64, np.int64, np.int64, np.int64, int, np.int64
)
ENTRIES: Final = tuple(
    dict.fromkeys(
        [
            *SERVE.values(),
            *ROUTE.values(),
            *RANKS.values(),
            *HALVES.values(),
            *DISAGGREGATED.values(),
            APART,
            *PUSHING.values(),
            PHASES,
            MULTIPLEXING,
            NUMBER_PIECES,
        ]
    )
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
