"""How functions of this folder are compiled: those that Python calls, and those that only compiled code calls."""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

import contextlib
from typing import Any

import numba
from numba import config, types
from numba.extending import intrinsic

try:
    from apex_opt.simulator.kernel.kept import Kept
except ImportError:  # it leans on classes inside numba; where these are elsewhere, every process compiles
    Kept = None  # type: ignore[assignment,misc]

_njit: Any = numba.njit  # the stubs know some of its options


def entry(function: Any) -> Any:
    """Compile a function that Python calls when it is first called, with what was kept of that where there is any."""
    dispatcher = _njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True)(function)
    # Where there is no folder for it, or where compiling is switched off, nothing is kept.
    if Kept is not None and hasattr(dispatcher, "_cache"):
        with contextlib.suppress(RuntimeError):
            dispatcher._cache = Kept(function)  # noqa: SLF001
    return dispatcher


def inner(function: Any) -> Any:
    """Compile a function that only compiled ones call: without the wrappers for others, and as a part of its caller."""
    return _njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def is_ready(dispatcher: Any) -> bool:
    """Whether a function that `entry` returned can be called without compiling it, as far as the index tells."""
    if not hasattr(dispatcher, "signatures") or dispatcher.signatures:
        return True  # compiling is switched off, or done
    kept = getattr(dispatcher, "_cache", None)
    return Kept is not None and isinstance(kept, Kept) and kept.holds_any()


if config.DISABLE_JIT or config.BOUNDSCHECK:  # type: ignore[attr-defined]

    @inner
    def at(memory: Any, place: int) -> Any:
        """The entries of an array from a place on."""
        return memory[place:]

else:

    @intrinsic
    def at(typing_context: Any, memory: Any, place: Any) -> Any:
        """The entries of an array from a place on, as an address: a tenth of what numba makes of an array of its own.

        With NUMBA_BOUNDSCHECK=1 it is an array, whose bounds are looked at.
        """
        address = memory if isinstance(memory, types.CPointer) else types.CPointer(memory.dtype)

        def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            base = values[0]
            if isinstance(signature.args[0], types.Array):
                base = context.make_array(signature.args[0])(context, builder, base).data
            return builder.gep(base, [values[1]])

        return address(memory, types.intp), build
