"""What changes when one thing of a configuration does: it is read rightly, or refused in one line that names it."""

from __future__ import annotations

import pytest
from config_changes import NEWER, changes, fault_of, faults, published, read

from apex_opt.ir import model_from_config

EVERY = dict(published())
SOME = sorted(EVERY)[::9]


def test_all_families_of_the_cases_are_there() -> None:
    assert len(EVERY) > 250
    assert len({read(EVERY[name]).family for name in SOME}) >= 20


@pytest.mark.parametrize("name", SOME)
def test_a_change_is_read_rightly_or_refused_by_its_name(name: str) -> None:
    assert faults(EVERY[name], most=60, seed=len(name)) == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", EVERY)
def test_every_change_is_read_rightly_or_refused_by_its_name(name: str) -> None:
    assert faults(EVERY[name]) == []


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b", "gemma-4-26b-a4b", "kimi-k3", "nemotron-h-56b"])
def test_no_newer_field_is_read_past(name: str) -> None:
    plain = read(EVERY[name])
    newer = [one for one in changes(EVERY[name]) if one.kind == "newer"]
    assert len(newer) == len(NEWER)
    assert {one.leaf: fault for one in newer if (fault := fault_of(one, plain))} == {}


def test_the_finder_of_faults_finds_some() -> None:
    plain, (first, *_) = read(EVERY["gpt-j-6b"]), changes(EVERY["llama-3.1-8b"])
    assert fault_of(first._replace(config=EVERY["llama-3.1-8b"], kind="word", path=("hidden_size",)), plain)
    assert model_from_config(EVERY["llama-3.1-8b"], "changed", "changed.json") != plain
