"""apex_opt.simulator.recorded.dp: runs of ranks come out forward for forward, and bad cases are refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from golden.condense import digest, read_condensed, read_recorded

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.simulator import replay_case

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.simulator.api import Implementation

IMPLEMENTATIONS: tuple[Implementation, ...] = ("kernel", "reference")
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_ranks_come_out_forward_for_forward(name: str, implementation: Implementation) -> None:
    case = RECORDED[name]
    found = json.loads(json.dumps(replay_case("dp", case, implementation)))
    assert digest(found.pop("steps")) == case["batches_sha256"]
    assert found == recorded(case)


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
