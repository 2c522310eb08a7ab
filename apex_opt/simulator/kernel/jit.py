"""How functions of this folder are compiled."""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

from typing import Any, Final

import numba
from numba import config, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import PassManager
from numba.extending import intrinsic

_njit: Any = numba.njit  # the stubs know some of its options

_NEEDLESS: Final = frozenset(
    {
        *("with_lifting", "inline_closure_likes", "generic_rewrites", "Rewrite dynamic raises"),
        *("make_function_op_code_to_jit_function", "inline_inlinables", "find_literally", "literal_unroll"),
        *("LiteralPropagation", "inline_overloads", "nopython_rewrites"),
    }
)
"""Passes of numba for what functions of this folder lack: closures, `with`, exceptions, expressions of whole arrays,
loops over tuples of several types. Each looks through a function and works out anew which variables live where."""


class _Part(JITCodeLibrary):
    """LLVM's code of a function that is a part of its callers: optimised with all of it, and never run by itself.

    Numba would copy all that a function calls into it, optimise it with that, and make machine code of it, before it
    comes to its callers.
    """

    def finalize(self) -> None:
        """Leave it to the whole, and make no machine code."""
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

    @property
    def code(self) -> Any:
        """LLVM's module of it alone."""
        return self._final_module

    def add_called(self, found: dict[JITCodeLibrary, None]) -> None:
        """Add all that it calls, and what that calls, each once and after a caller of it."""
        for library in self._linking_libraries:
            if library not in found:
                found[library] = None
                if isinstance(library, _Part):
                    library.add_called(found)

    def copy_called(self, module: Any) -> None:
        """Copy all that it calls into a module that holds it, each once."""
        called: dict[JITCodeLibrary, None] = {}
        self.add_called(called)
        # Of numba's own functions LLVM copies only what is called by then, so they come after our parts.
        for library in sorted(called, key=lambda one: not isinstance(one, _Part)):
            module.link_in(library.code if isinstance(library, _Part) else _shared(library), preserve=True)

    def _get_module_for_linking(self) -> Any:
        """With all that it calls, for a function that numba compiles by itself."""
        if self._shared_module is None:
            module = self._final_module.clone()
            self.copy_called(module)
            for function in module.functions:
                if not function.is_declaration and function.linkage.name == "external":
                    function.linkage = "linkonce_odr"
            self._shared_module = module
        return self._shared_module


def _shared(library: JITCodeLibrary) -> Any:
    """LLVM's module of a function of numba's own with all that it calls, which others may hold as well."""
    return library._get_module_for_linking()  # noqa: SLF001 - numba has no other way


class _Whole(_Part):
    """That of a function with all that it calls, which is optimised; we make machine code of it ourselves."""

    def finalize(self) -> None:
        """Copy each part once, and optimise all of it."""
        module = self._final_module
        mine = {function.name for function in module.functions if not function.is_declaration}
        self.copy_called(module)
        # Nobody else calls its parts: what is called once is always inlined, which runs half as fast again.
        for function in module.functions:
            if not function.is_declaration and function.name not in mine:
                function.linkage = "internal"
        self._optimize_final_module()
        module.verify()
        self._finalized = True


class _Scalar(_Whole):
    """The same without loops whose turns are computed side by side."""

    def _optimize_final_module(self) -> None:
        for options in ({"opt": 0, "cost": "cheap"}, {}):  # numba's own two rounds
            managers = self._codegen._module_pass_manager  # noqa: SLF001 - numba has no other way
            manager, builder = managers(loop_vectorize=False, **options)
            manager.run(self._final_module, builder)


class _AsPart(Compiler):
    """Numba's compiler without needless passes, whose code goes into such a library."""

    _library = _Part

    def define_pipelines(self) -> Any:
        self.state.library = self._library(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        [usual] = super().define_pipelines()
        lean = PassManager("lean")
        lean.passes = [one for one in usual.passes if one[0].name() not in _NEEDLESS]
        lean.finalize()
        return [lean]


class _AsWhole(_AsPart):
    _library = _Whole


class _AsScalar(_AsPart):
    _library = _Scalar


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


def native(function: Any, kinds: tuple[Any, ...], vectors: bool = True) -> str:
    """What LLVM makes of a function that is given addresses of arrays, of these types, and integers.

    Parameters
    ----------
    function : that returns nothing
    kinds : `int`, or the type of an array's entries, for each parameter
    vectors : bool    whether loops may compute several turns side by side

    Returns
    -------
    str    LLVM's text of the function and of all it calls, optimised
    """
    types_of = tuple(types.int64 if kind is int else types.CPointer(numba.from_dtype(kind)) for kind in kinds)
    compiled = inner(function, _AsWhole if vectors else _AsScalar)
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
