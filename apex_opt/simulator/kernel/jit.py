"""How functions of this folder are compiled."""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import numba
from numba import config, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import intrinsic

_njit: Any = numba.njit  # the stubs know some of its options


class _Part(JITCodeLibrary):
    """LLVM's code of a function that is a part of its callers: optimised with all of it, and never run by itself.

    Numba would optimise each function with all that it calls, and make machine code of it, before that of its callers.
    """

    def _optimize_final_module(self) -> None:
        """Leave it to the whole."""

    def _finalize_final_module(self) -> None:
        """Make no machine code."""
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        """No address, as there is no machine code."""
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> Any:
        """What is asked to set constants in machine code: this itself."""
        return self

    def set_env(self, name: str, env: Any) -> None:
        """Set no constant."""


class _Whole(_Part):
    """That of a function with all that it calls, which is optimised; we make machine code of it ourselves."""

    def _optimize_final_module(self) -> None:
        # Nobody else calls its parts: what is called once is always inlined, which runs half as fast again.
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage.name == "linkonce_odr":
                function.linkage = "internal"
        super(_Part, self)._optimize_final_module()


class _AsPart(Compiler):
    """Numba's compiler, whose code goes into such a library."""

    _library = _Part

    def define_pipelines(self) -> Any:
        self.state.library = self._library(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        return super().define_pipelines()


class _AsWhole(_AsPart):
    _library = _Whole


def inner(function: Any, compiler: type[Compiler] = _AsPart) -> Any:
    """Compile a function that only compiled ones call: as a part of its caller, without wrappers for others.

    Numba would compile it again for each constant that it is called with, which a part of its caller gains nothing by.
    """
    options = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    compiled = _njit(**options, pipeline_class=compiler)(function)
    if hasattr(compiled, "get_call_template"):
        template = compiled.get_call_template
        compiled.get_call_template = lambda given, named: template(tuple(map(types.unliteral, given)), named)
    return compiled


def outer(function: Any) -> Any:
    """Compile a function for arrays, when it is called."""
    return _njit(nogil=True, error_model="numpy")(function)


def native(function: Any, kinds: tuple[Any, ...]) -> str:
    """What LLVM makes of a function that is given addresses of arrays, of these types, and integers.

    Parameters
    ----------
    function : that returns nothing
    kinds : `int`, or the type of an array's entries, for each parameter

    Returns
    -------
    str    LLVM's text of the function and of all it calls, optimised
    """
    types_of = tuple(types.int64 if kind is int else types.CPointer(numba.from_dtype(kind)) for kind in kinds)
    compiled = inner(function, _AsWhole)
    compiled.compile(types_of)
    return str(compiled.inspect_llvm(types_of))


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
