"""How functions of the kernel are compiled: all that one calls is optimised with it, once."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite.binding import ModuleRef
from numba.core.codegen import JITCodeLibrary

from apex_opt.simulator.kernel.jit import inner, native

if TYPE_CHECKING:
    import pytest


@inner
def below_nb(values: Any, limit: int) -> int:
    count = 0
    for place in range(limit):
        if values[place] < limit:
            count += 1
    return count


@inner
def twice_nb(values: Any, limit: int) -> int:
    return 2 * below_nb(values, limit) + values[0]


@inner
def never_nb(values: Any, limit: int) -> int:
    return twice_nb(values, limit) if limit * 0 > 0 else 0


def summed_nb(values: Any, limit: int) -> None:
    total = 0
    for place in range(limit):
        total += values[place]
    values[0] = total


def first_never_nb(values: Any) -> None:
    values[1] = never_nb(values, 8)
    values[2] = twice_nb(values, values[3])


def nothing_nb(values: Any) -> None:
    values[0] = 0


def doubled_nb(values: Any) -> None:
    values[1] = twice_nb(values, 8)


def test_a_function_is_optimised_once_with_all_that_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    native(nothing_nb, (np.int64,))  # numba's own runtime is there from now on
    done: dict[str, list[str]] = {"_optimize_final_module": [], "_finalize_specific": []}
    for name, libraries in done.items():
        itself = getattr(JITCodeLibrary, name)

        def noted(library: Any, libraries: list[str] = libraries, plain: Any = itself) -> None:
            libraries.append(library.name)
            plain(library)

        monkeypatch.setattr(JITCodeLibrary, name, noted)
    text = native(doubled_nb, (np.int64,))
    assert done["_optimize_final_module"] == ["doubled_nb"]
    assert done["_finalize_specific"] == []  # the caller makes machine code of the text
    assert len(re.findall(r"^define ", text, re.MULTILINE)) == 1


def test_each_part_is_copied_once_though_it_is_called_in_vain_first(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    plain = ModuleRef.link_in

    def noted(module: Any, other: Any, preserve: bool = False) -> None:
        if preserve:
            copied.append(other.name)
        plain(module, other, preserve)

    monkeypatch.setattr(ModuleRef, "link_in", noted)
    text = native(first_never_nb, (np.int64,))
    assert sorted(name for name in copied if name.endswith("_nb")) == ["below_nb", "never_nb", "twice_nb"]
    assert not re.search(r"^declare .*_nb", text, re.MULTILINE)


def test_loops_without_vectors_have_none() -> None:
    sums, alone = (native(summed_nb, (np.int64, int), vectors=vectors) for vectors in (True, False))
    assert " x i64>" in sums
    assert " x i64>" not in alone
    assert "add i64" in alone
