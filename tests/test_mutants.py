"""tests.mutants: every fault can still be planted, and its command line teaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cli_cases import ROOT

from tests.golden import freeze
from tests.mutants.__main__ import Fault, faults, main

if TYPE_CHECKING:
    from collections.abc import Callable

FAULTS = faults()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.id for fault in FAULTS])
def test_the_text_that_a_fault_changes_is_found_once_and_its_tests_exist(fault: Fault) -> None:
    assert fault.stale(ROOT) is None
    assert fault.new != fault.old
    assert fault.tests


def test_each_fault_has_an_id_of_its_own_and_none_is_planted_twice() -> None:
    assert len({fault.id for fault in FAULTS}) == len(FAULTS) >= 60
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("program", [main, freeze.main])
def test_help_shows_how_each_is_used_and_a_word_it_does_not_know_is_refused(
    program: Callable[[list[str]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        program(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("python -m tests.") >= 4
    with pytest.raises(SystemExit) as ended:
        program(["nothing"])
    assert ended.value.code == 2
    assert "'nothing'" in capsys.readouterr().err


def test_faults_are_listed_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "bounds"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [fault.id for fault in FAULTS if fault.kind == "bounds"]
