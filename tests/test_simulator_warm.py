"""apex_opt.simulator.warm: all of the closed list of what is compiled can be compiled beforehand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from apex_opt.simulator import warm
from apex_opt.simulator.kernel import entries
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path


def test_every_entry_of_the_kernel_is_compiled_beforehand() -> None:
    listed = [entry for variant in warm.VARIANTS.values() for entry in variant.entries]
    assert sorted(map(id, listed)) == sorted(map(id, entries.ENTRIES))


def test_what_is_missing_is_dealt_to_processes_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    lent: list[list[str]] = []

    class Other:
        def __init__(self, words: list[str], **_: Any) -> None:
            lent.append(re.findall(r"'([\w ]+)'", words[-1]))

        def wait(self) -> None: ...

    missing = list(warm.VARIANTS)[1:]
    monkeypatch.setattr(entries.Entry, "ready", lambda one: one is entries.SERVE["steady", False])
    monkeypatch.setattr(warm, "run", lambda *names: ran.extend(names))
    monkeypatch.setattr(subprocess, "Popen", Other)
    assert warm.warm_up(3) == missing
    assert sorted([*ran, *(name for names in lent for name in names)]) == sorted(missing)
    assert max(map(len, [ran, *lent])) - min(map(len, [ran, *lent])) <= 1
    # Engines that share functions come to one process: each has those of a stretch of the families.
    places = [[warm.family(name) for name in names] for names in [ran, *lent]]
    assert [place for its in places for place in its] == sorted(place for its in places for place in its)
    ran.clear()
    assert warm.warm_up(1) == missing
    assert sorted(ran) == sorted(missing)


@pytest.mark.nightly
def test_what_is_missing_is_compiled_by_several_processes_and_then_taken_from_disk(tmp_path: Path) -> None:
    # Two of them, in two processes: each takes seconds to compile, and they differ in nothing that is asked here.
    some = "for name in list(warm.VARIANTS)[2:]: warm.VARIANTS.pop(name)"
    words = [sys.executable, "-c", f"from apex_opt.simulator import warm\n{some}\nprint(warm.warm_up(2))"]
    environment = {**os.environ, "PYTHONPATH": str(DATA_ROOT), "NUMBA_CACHE_DIR": str(tmp_path)}
    environment["NUMBA_DISABLE_JIT"] = "0"
    for said in (f"{list(warm.VARIANTS)[:2]}\n", "[]\n"):
        ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, said, "")
