"""SGLang's scheduler: recorded batches come out, reference and kernel agree, nothing is lost, every rule is noticed."""

from __future__ import annotations

import json
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from golden.condense import digest, read_condensed, read_recorded
from sglang_cases import random_run
from simulator_cases import IMPLEMENTATIONS, REPLAYED, assert_same, linear, requests

from apex_opt.engines.schedulers import SglangScheduling, TrtllmScheduling
from apex_opt.errors import CapacityError, UnknownNameError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import replay_case, simulate
from apex_opt.simulator.reference import loop, sglang, tree
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.simulator.api import Implementation

RECORDED = read_condensed("sglang")
SMALL = EngineSettings(
    max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, block_size=1, scheduler=SglangScheduling()
)


def test_the_recording_has_every_setting_and_retractions() -> None:
    configs = [case["config"] for case in RECORDED.values()]
    assert len(configs) == 88
    for name in ("overlap", "radix_cache", "mixed_chunk", "ignore_eos"):
        assert {config[name] for config in configs} == {True, False}
    assert {config["schedule_policy"] for config in configs} == {"fcfs", "lpm"}
    assert {config["page_size"] for config in configs} == {1, 16, 64}
    assert sum(case["preemptions"] for case in RECORDED.values()) > 200


@REPLAYED
def test_recorded_batches_come_out_batch_for_batch(implementation: Implementation, every: int) -> None:
    for name in list(RECORDED)[::every]:
        case = RECORDED[name]
        found = json.loads(json.dumps(replay_case("sglang", case, implementation)))
        assert digest(found.pop("steps")) == case["batches_sha256"], name
        assert found == {key: value for key, value in case.items() if key not in ("config", "trace")}, name


@pytest.mark.nightly
@pytest.mark.data
def test_condensed_file_is_the_recording_without_its_batches(shared: Path) -> None:
    full = read_recorded(shared / "scheduler-golden" / "sglang")
    assert full.keys() == RECORDED.keys()
    for name, case in full.items():
        assert {key: value for key, value in case.items() if key != "steps"} == RECORDED[name], name
        assert digest(case["steps"]) == case["batches_sha256"], name


@pytest.mark.parametrize("seeds", [range(80), pytest.param(range(80, 4000), marks=pytest.mark.nightly)])
def test_kernel_equals_reference_on_random_runs(seeds: range) -> None:
    for seed in seeds:
        run = random_run(seed)
        specified, logged, computed = run.by("reference"), run.by("kernel"), run.by("kernel", log=False)
        assert_same(specified, logged)
        assert_same(replace(specified, steps=None, gaps_ns=None), computed)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[sglang.SglangEngine]]:
    """Every engine that a run of the reference makes."""
    engines: list[sglang.SglangEngine] = []

    class Kept(sglang.SglangEngine):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            engines.append(self)

    monkeypatch.setattr(loop, "SglangEngine", Kept)
    yield engines


def test_all_is_given_back_and_every_request_gets_its_tokens(kept: list[sglang.SglangEngine]) -> None:
    retracted = 0
    for seed in range(1000, 1060):
        run = random_run(seed)
        outcome = run.by("reference")
        retracted += outcome.preemptions
        for engine in kept:
            scheduler = engine.scheduler
            assert scheduler.left() == run.blocks * run.settings.block_size
            assert scheduler.free_seats == run.settings.max_num_seqs
            for sequence in engine.sent:
                assert len(sequence.token_ns) == sequence.limit
                assert sequence.token_ns == sorted(sequence.token_ns)
                assert sequence.node is None and sequence.held == sequence.blocks == 0
        kept.clear()
        assert outcome.counts.tokens >= int((run.trace.prompt + run.trace.output - 1).sum()) - outcome.cached_tokens - 1
    assert retracted > 10


RULES = {
    rule["rule"]: (module, rule)
    for module, rules in tomllib.loads((Path(__file__).parent / "golden" / "sglang_rules.toml").read_text()).items()
    for rule in rules
}


class Slow(Exception):
    """A changed rule made a run that does not end."""


def changed(module: ModuleType, before: str, after: str) -> dict[str, Any]:
    """What a module is with a part of its text changed."""
    assert module.__file__ is not None
    text = Path(module.__file__).read_text()
    assert text.count(before) == 1, f"{before!r} is there {text.count(before)} times"
    copy = ModuleType("changed")
    sys.modules["changed"] = copy
    exec(compile(text.replace(before, after), "changed", "exec"), copy.__dict__)
    return copy.__dict__


@pytest.mark.parametrize("name", RULES)
def test_a_change_of_any_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, rule = RULES[name]
    if module == "sglang":
        engine = changed(sglang, rule["before"], rule["after"])["SglangEngine"]
    else:
        monkeypatch.setattr(sglang, "PrefixTree", changed(tree, rule["before"], rule["after"])["PrefixTree"])
        engine = sglang.SglangEngine
    case = RECORDED[rule["case"]]
    turns = iter(range(4 * case["batches"] + 1000))

    class Limited(engine):  # type: ignore[valid-type, misc]
        def turn(self, now_ns: int) -> Any:
            if next(turns, None) is None:
                raise Slow
            return super().turn(now_ns)

    monkeypatch.setattr(loop, "SglangEngine", Limited)
    try:
        found = replay_case("sglang", case, "reference")
    except (Slow, CapacityError, AssertionError, IndexError):
        return
    assert found["batches_sha256"] != case["batches_sha256"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_prompt_is_computed_before_those_who_run_go_on(implementation: Implementation) -> None:
    trace = requests([(0, 3, 4), (150, 5, 2)])
    settings = replace(SMALL, async_scheduling=False)
    found = simulate(settings, 99, [linear(settings, 100)], trace, log=True, implementation=implementation)
    assert found.steps is not None
    assert [rows for _, _, rows, _ in found.steps] == [
        [(0, 3, 3)],
        [(0, 1, 4)],
        [(1, 5, 5)],
        [(0, 1, 5), (1, 1, 6)],
        [(0, 1, 6)],
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_new_requests_are_looked_for_after_prompts_and_every_so_many_steps(implementation: Implementation) -> None:
    trace, own = requests([(0, 3, 12), (150, 5, 2)]), SglangScheduling(scheduler_recv_interval=4)
    settings = replace(SMALL, async_scheduling=False, scheduler=own)
    found = simulate(settings, 99, [linear(settings, 100)], trace, log=True, implementation=implementation)
    # It looked at 100, after the prompt, and does so again after four steps, at 500.
    assert [(start, rows[0]) for start, _, rows, _ in found.steps or ()][:7] == [
        (0, (0, 3, 3)),
        *((100 * step, (0, 1, 3 + step)) for step in range(1, 5)),
        (500, (1, 5, 5)),
        (600, (0, 1, 8)),
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("own", [SglangScheduling(), TrtllmScheduling()], ids=["sglang", "trtllm"])
def test_a_batch_is_taken_in_after_the_next_one_is_launched(
    implementation: Implementation, own: SglangScheduling | TrtllmScheduling
) -> None:
    settings = replace(SMALL, scheduler=own, chunked_prefill=False, max_num_batched_tokens=64)
    trace = requests([(0, 60, 3), (0, 60, 2)])

    def firsts(**launching: int) -> list[int]:
        law = replace(linear(settings, 100), **launching)
        found = simulate(settings, 200, [law], trace, log=True, implementation=implementation)
        assert found.gaps_ns is not None
        assert found.gaps_ns.sum() == (found.finish_ns - found.first_token_ns).sum()
        return list(found.first_token_ns)

    # The first prompt is launched until 70 and done at 100; the second is launched from 70 on, until 140.
    assert firsts(launch_ns=70) == [140, 200]
    assert firsts(launch_ns=70, captured_tokens=60) == firsts() == [100, 200]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_cannot_be_admitted_is_refused_at_once(implementation: Implementation) -> None:
    trace = make_trace(name="t", arrival_ns=[0], prompt=[10], output=[2], max_new_tokens=[20])
    law = [linear(SMALL, 100)]
    with pytest.raises(CapacityError, match=r"10 prompt \+ 20 output tokens need 32 KV blocks of 1, the cache has 31"):
        simulate(SMALL, 31, law, trace, implementation=implementation)
    assert simulate(SMALL, 32, law, trace, implementation=implementation).batches == 3  # one more in flight at its end
    exact = replace(SMALL, scheduler=SglangScheduling(ignore_eos=True))
    with pytest.raises(CapacityError, match="request 0: ends after 2 of 20 max_new_tokens"):
        simulate(exact, 99, law, trace, implementation=implementation)


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_prefill_tokens", 0), ("schedule_policy", "sjf"), ("schedule_conservativeness", 0), ("shared_groups", -1)],
)
def test_settings_that_no_engine_has_are_named(key: str, value: Any) -> None:
    case = RECORDED["retract"]
    with pytest.raises((UsageError, UnknownNameError), match=key.partition("_")[0]):
        replay_case("sglang", {**case, "config": case["config"] | {key: value}}, "reference")
    config = {name: entry for name, entry in case["config"].items() if name != key}
    with pytest.raises(UsageError, match=f"config: missing {key}"):
        replay_case("sglang", {**case, "config": config}, "reference")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_where_all_ends_are_foreseen_a_whole_prompt_is_added_as_long_as_any_of_the_limit_is_left(
    implementation: Implementation,
) -> None:
    own = {"max_prefill_tokens": 128, "max_model_len": 110, "chunked_prefill_size": -1, "max_running_requests": 8}
    exact = {"ignore_eos": True, "radix_cache": False, "mixed_chunk": False, "page_size": 1, "num_pages": 999}
    case = {"config": RECORDED["retract"]["config"] | own | exact, "trace": [[0, 100, 2, 2]] * 3}
    found = replay_case("sglang", case, implementation)
    # Of 128 tokens 28 are left after the first prompt, none after the second.
    assert [[row[:2] for row in rows] for _, _, rows, _ in found["steps"][:2]] == [[[0, 100], [1, 100]], [[2, 100]]]
