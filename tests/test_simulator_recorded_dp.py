"""apex_opt.simulator.recorded.dp: runs of ranks come out forward for forward, and bad cases are refused."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from golden.condense import digest, read_condensed, read_recorded
from simulator_cases import REPLAYED

from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.simulator import ranks, replay_case
from apex_opt.simulator.reference import coordinator, group, loop

if TYPE_CHECKING:
    from apex_opt.simulator.api import Implementation

RECORDED = read_condensed("dp")


def recorded(case: dict[str, Any]) -> dict[str, Any]:
    """What was recorded of a case."""
    return {key: value for key, value in case.items() if key not in ("config", "trace")}


def test_the_recording_has_all_that_ranks_can_be() -> None:
    configs = [case["config"] for case in RECORDED.values()]
    assert len(configs) == 129
    assert {(c["model"], c["dummy_returns"]) for c in configs} >= {("moe", "start"), ("moe", "end"), ("dense", "start")}
    assert {c["ranks"] for c in configs} == {1, 2, 3, 4, 8}
    assert {c["graphs"] for c in configs} == {"none", "piecewise", "full", "full_decode_only", "full_and_piecewise"}
    assert sum(sum(case["dummies"]) for case in RECORDED.values()) > 50_000
    assert sum(case["config"]["idle_sleep_us"] > 0 for case in RECORDED.values()) > 40


@REPLAYED
def test_recorded_ranks_come_out_forward_for_forward(implementation: Implementation, every: int) -> None:
    for name in list(RECORDED)[::every]:
        case = RECORDED[name]
        found = json.loads(json.dumps(replay_case("dp", case, implementation)))
        assert digest(found.pop("steps")) == case["batches_sha256"], name
        assert found == recorded(case), name


@pytest.mark.nightly
@pytest.mark.data
def test_condensed_file_is_the_recording_without_its_batches(shared: Path) -> None:
    full = read_recorded(shared / "scheduler-golden" / "dp")
    assert full.keys() == RECORDED.keys()
    for name, case in full.items():
        assert digest(case.pop("steps")) == case["batches_sha256"], name
        assert case == RECORDED[name], name


def test_a_case_that_no_engine_serves_is_refused() -> None:
    case = RECORDED["dp2_balanced"]
    with pytest.raises(UnknownNameError, match="unknown routing 'random'; did you mean round_robin or balanced"):
        replay_case("dp", case | {"config": case["config"] | {"routing": "random"}})
    with pytest.raises(UsageError, match="config: missing law_us"):
        replay_case("dp", case | {"config": {k: v for k, v in case["config"].items() if k != "law_us"}})
    with pytest.raises(UsageError, match="ranks: count 0 is below 1"):
        replay_case("dp", case | {"config": case["config"] | {"ranks": 0}})


# What the rules are noticed by.

MODULES = {"group": group, "coordinator": coordinator, "ranks": ranks}
RULES = {
    rule["rule"]: (MODULES[module], rule)
    for module, rules in tomllib.loads((Path(__file__).parent / "golden" / "ranks_rules.toml").read_text()).items()
    for rule in rules
}


class Slow(Exception):
    """A changed rule made a run that does not end."""


def changed(module: ModuleType, before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module with a part of its text changed in its place, for those who import it from now on."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text()
    assert text.count(before) == 1, f"{before!r} is there {text.count(before)} times"
    copy = ModuleType(module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, copy)
    exec(compile(text.replace(before, after), "changed", "exec"), copy.__dict__)


def notices(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether something else comes out of the ranks that are in place, or nothing at all."""
    changed_group = sys.modules[group.__name__].Group
    turns = iter(range(20 * (sum(case["batches"]) + sum(case["dummies"])) + 2000))

    class Limited(changed_group):  # type: ignore[misc]
        def _next(self) -> Any:
            if next(turns, None) is None:
                raise Slow
            return super()._next()

    monkeypatch.setattr(loop, "Group", Limited)
    try:
        found = json.loads(json.dumps(replay_case("dp", case, "reference")))
    except (Slow, ApexError, AssertionError, IndexError):
        return True
    return bool(digest(found.pop("steps")) != case["batches_sha256"] or found != recorded(case))


@pytest.mark.parametrize("name", RULES)
def test_a_change_of_any_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, rule = RULES[name]
    case = RECORDED[rule["case"]]
    for after in (rule["before"], rule["after"]):
        changed(module, rule["before"], after, monkeypatch)
        if module is not group:
            changed(group, "class Group:", "class Group:", monkeypatch)
        assert notices(case, monkeypatch) == (after == rule["after"])
