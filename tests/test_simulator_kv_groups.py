"""Groups of layers over one pool of blocks: recorded batches come out, both implementations say the same of others."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ranks_cases
from golden.condense import digest, read_recorded
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from simulator_cases import (
    DRAFTING,
    IMPLEMENTATIONS,
    LOOPS,
    REPLAYED,
    TRAFFIC,
    Case,
    Loop,
    Traffic,
    assert_same,
    cases,
    linear,
    requests,
)

from apex_opt.engines.schedulers import TrtllmScheduling
from apex_opt.errors import CapacityError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.kv_groups import KvGroup
from apex_opt.simulator import EnginePool, Outcome, replay_case, run_deployment
from apex_opt.simulator.reference import kv_groups
from apex_opt.simulator.reference.hybrid import GroupedScheduler
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from apex_opt.plans.routing import Routing
    from apex_opt.simulator.api import Implementation

GIVEN = ("config", "trace", "accept", "proposed")
FULL = KvGroup(kind="full", block_size=16)
ENGINE = EngineSettings(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=256)


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict[str, dict[str, Any]]:
    """What vLLM did."""
    found = read_recorded(shared / "scheduler-golden" / "hybrid")
    return {name: case for name, case in found.items() if not name.startswith("pool_sizes")}


@pytest.mark.data
@REPLAYED
def test_all_that_was_recorded_comes_out_again(
    recorded: dict[str, dict[str, Any]], implementation: Implementation, every: int
) -> None:
    assert len(recorded) == 158
    for name, case in list(recorded.items())[::every]:
        given = {key: case[key] for key in GIVEN}
        found = json.loads(json.dumps(replay_case("hybrid", given, implementation)))
        assert found == {key: value for key, value in case.items() if key not in GIVEN}, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_where_the_last_block_found_is_dropped_a_window_begins_such_that_what_is_left_is_whole(
    implementation: Implementation,
) -> None:
    """A run of vLLM's scheduler: blocks of 4 and 8 tokens, two windows, drafts whose blocks are recomputed."""
    case = json.loads((Path(__file__).parent / "golden" / "hybrid_drafts_over_windows.json").read_text())
    found = json.loads(json.dumps(replay_case("hybrid", {key: case[key] for key in GIVEN}, implementation)))
    assert digest(found.pop("steps")) == case["batches_sha256"]
    assert found == {key: value for key, value in case.items() if key not in GIVEN}


CHUNKS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "golden" / "hybrid_chunks.json").read_text())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunks_are_given_back_and_found_as_the_engine_does(implementation: Implementation) -> None:
    """Runs of vLLM's scheduler over groups that keep the tokens since a multiple of so many, as Llama 4 has them."""
    assert len(CHUNKS) >= 12
    for case in CHUNKS:
        found = json.loads(json.dumps(replay_case("hybrid", {key: case[key] for key in GIVEN}, implementation)))
        assert digest(found.pop("steps")) == case["batches_sha256"]
        assert found == {key: value for key, value in case.items() if key not in GIVEN}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("shed", kv_groups.WindowKind.shed),
        ("search", kv_groups.WindowKind.search),
        ("search", kv_groups.FullKind.search),
    ],
)
def test_a_rule_of_chunks_that_is_changed_is_noticed(name: str, changed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_groups.ChunkKind, name, changed)
    given = ({key: case[key] for key in GIVEN} for case in CHUNKS)
    hashes = [replay_case("hybrid", case, "reference")["batches_sha256"] for case in given]
    assert hashes != [case["batches_sha256"] for case in CHUNKS]


RULES: dict[str, tuple[Any, str, Any]] = {
    "windows give nothing back": (kv_groups.WindowKind, "shed", lambda self, table, computed: []),
    "there is no limit of what a window counts at admission": (kv_groups.WindowKind, "most", lambda self: None),
    "states are not kept apart from where chunks end": (
        GroupedScheduler,
        "split",
        lambda self, sequence, computed, tokens: tokens,
    ),
    "states found in the same step are taken": (kv_groups.GroupedBlocks, "just_kept", lambda self, hit: False),
    "a kept state is never shed": (kv_groups.KeptStateKind, "shed", lambda self, table, computed: []),
    "a window is found from its beginning": (kv_groups.WindowKind, "search", kv_groups.FullKind.search),
}


@pytest.mark.data
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_is_changed_is_noticed(
    rule: str, recorded: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, name, changed = RULES[rule]
    monkeypatch.setattr(place, name, changed)
    for case in sorted(recorded.values(), key=lambda case: int(case["batches"])):
        try:
            if replay_case("hybrid", case, "reference")["batches_sha256"] != case["batches_sha256"]:
                return
        except (LookupError, AssertionError):  # blocks that there are not, or that nobody has
            return
    pytest.fail("no recorded case tells")


# Beside one pool of blocks that all layers share alike.


def served(
    case: Case,
    groups: tuple[KvGroup, ...],
    implementation: Implementation,
    blocks: int | None = None,
    *,
    log: bool = True,
) -> Outcome:
    """A run over groups of layers."""
    settings = replace(case.settings, kv_groups=groups)
    pool = EnginePool(settings=settings, blocks=blocks or case.blocks, laws=case.laws, replicas=case.replicas)
    return run_deployment([pool], case.trace, routing=case.routing, log=log, implementation=implementation)


@settings(max_examples=30)
@given(case=cases("prefix caching", "dealt"))
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_group_of_full_attention_is_a_plain_engine(implementation: Implementation, case: Case) -> None:
    case = case.having(laws=case.laws[:1])
    one = served(case, (KvGroup(kind="full", block_size=case.settings.block_size),), implementation)
    plain = case.run(implementation)
    assert one.steps == plain.steps
    assert one.cached_tokens == plain.cached_tokens


@st.composite
def grouped(draw: st.DrawFn, loop: Loop, traffic: Traffic) -> tuple[Case, tuple[KvGroup, ...], int]:
    """An engine over random groups of layers, and enough blocks for its longest request."""
    case = draw(cases(loop, traffic))
    if loop in DRAFTING:
        case = case.having(laws=case.laws[:1])
    limits = case.settings.max_num_batched_tokens, case.settings.scheduler.prompt_threshold
    assume(not case.settings.prefix_caching or min(filter(None, limits)) >= case.settings.block_size)
    caching, size = case.settings.prefix_caching, case.settings.block_size
    groups = draw(kinds_of_groups(case.settings.max_model_len, size, caching=caching))
    drafts = case.settings.speculation.draft_tokens if case.settings.speculation else 0
    longest = case.trace.longest + drafts
    least = sum(2 * drafts + 3 if its.kind == "state" else ceil_div(longest, its.block_size) + 2 for its in groups)
    return case, groups, least + draw(st.integers(0, 3 * least))


@st.composite
def kinds_of_groups(draw: st.DrawFn, longest: int, size: int, *, caching: bool) -> tuple[KvGroup, ...]:
    """Up to four groups of any kinds, over blocks of a size or of twice as many tokens."""
    window = st.builds(
        lambda seen, times: KvGroup(kind="window", block_size=size * times, window=seen),
        st.integers(1, 60),
        st.sampled_from([1, 2]),
    )
    chunk = st.builds(lambda blocks: KvGroup(kind="chunk", block_size=size, window=size * blocks), st.integers(1, 6))
    state = KvGroup(kind="state", block_size=longest)
    if caching:
        state = KvGroup(kind="state", block_size=size, mode="align")
    kinds = st.one_of(st.just(KvGroup(kind="full", block_size=size)), window, chunk, st.just(state))
    return tuple(draw(st.lists(kinds, min_size=1, max_size=4)))


def check_both(case: Case, groups: tuple[KvGroup, ...], blocks: int) -> None:
    """Both implementations say the same, with a log and without, where the kernel may only count."""
    runs = [served(case, groups, implementation, blocks) for implementation in IMPLEMENTATIONS]
    assert_same(*runs)
    counted = served(case, groups, "kernel", blocks, log=False)
    assert counted.finish_ns.tolist() == runs[0].finish_ns.tolist()
    assert counted.first_token_ns.tolist() == runs[0].first_token_ns.tolist()
    assert counted.preemptions == runs[0].preemptions
    assert counted.batches == runs[0].batches
    assert counted.busy_ns.tolist() == runs[0].busy_ns.tolist()
    assert runs[0].used == runs[1].used
    if runs[0].drafted is not None:
        for (free, _), used in zip(runs[0].drafted, runs[0].used or (), strict=True):
            assert free + sum(used) == blocks


GROUPED: tuple[Loop, ...] = (*(loop for loop in LOOPS if loop not in ("orca", "static")), *DRAFTING)


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", GROUPED)
@settings(max_examples=10)
@given(data=st.data())
def test_kernel_equals_reference_and_no_block_is_lost(loop: Loop, traffic: Traffic, data: st.DataObject) -> None:
    check_both(*data.draw(grouped(loop, traffic)))


@pytest.mark.parametrize("routing", ["power_of_two", "cache_aware", "dynamo", "llm_d", "pull"])
@settings(max_examples=12)
@given(data=st.data())
def test_kernel_equals_reference_behind_every_router(routing: Routing, data: st.DataObject) -> None:
    case, groups, blocks = data.draw(grouped(data.draw(st.sampled_from(GROUPED)), "routed"))
    check_both(case.having(routing=routing), groups, blocks)


@pytest.mark.nightly
@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", GROUPED)
@settings(max_examples=600)
@given(data=st.data())
def test_kernel_equals_reference_on_many_random_groups(loop: Loop, traffic: Traffic, data: st.DataObject) -> None:
    check_both(*data.draw(grouped(loop, traffic)))


def random_groups(draw: random.Random, settings: EngineSettings) -> tuple[KvGroup, ...]:
    """One to four groups."""
    size, groups = settings.block_size, []
    for _ in range(draw.randrange(1, 5)):
        kind = draw.choice(["full", "window", "chunk", "state"])
        if kind == "window":
            groups.append(
                KvGroup(kind="window", block_size=size * draw.choice([1, 1, 2]), window=draw.randrange(1, 50))
            )
        elif kind == "chunk":
            groups.append(KvGroup(kind="chunk", block_size=size, window=size * draw.randrange(1, 7)))
        elif kind == "full":
            groups.append(KvGroup(kind="full", block_size=size))
        elif not settings.prefix_caching:
            groups.append(KvGroup(kind="state", block_size=settings.max_model_len))
        elif (settings.scheduler.prompt_threshold or size) >= size <= settings.max_num_batched_tokens:
            groups.append(KvGroup(kind="state", block_size=size, mode="align"))
    return tuple(groups) or (KvGroup(kind="full", block_size=size),)


def long_answers(seed: int, stages: int) -> tuple[Case, tuple[KvGroup, ...], int]:
    """Few requests with long answers over few blocks: batches are counted in stretches, and somebody waits."""
    draw = random.Random(seed)
    own = replace(ENGINE, max_num_seqs=draw.randrange(2, 6), block_size=draw.choice([4, 16]))
    groups = random_groups(draw, own)
    number = draw.randrange(3, 10)
    rows = [(draw.randrange(2_000), draw.randrange(1, 60), draw.randrange(1, 150)) for _ in range(number)]
    trace = requests(rows)
    held = int(replace(own, kv_groups=groups).most_blocks(trace.prompt + trace.output).max())
    laws = tuple(linear(own, 100 + stage, 3, 1) for stage in range(stages))
    return Case(settings=own, blocks=held, laws=laws, trace=trace), groups, held + draw.randrange(held + 1)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 3000), marks=pytest.mark.nightly)])
def test_who_waits_gets_the_blocks_that_windows_and_chunks_give_back_as_soon_as_in_the_reference(
    seeds: range, stages: int
) -> None:
    for seed in seeds:
        check_both(*long_answers(seed, stages))


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 6000), marks=pytest.mark.nightly)])
def test_ranks_over_groups_are_the_same_in_both_implementations(seeds: range) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        pool = ranks_cases.random_pool(draw)
        settings = replace(pool.settings, kv_groups=random_groups(draw, pool.settings))
        trace = ranks_cases.random_trace(draw, settings.max_model_len)
        held = int(settings.most_blocks(trace.prompt + trace.generated(settings.max_model_len)).max())
        pool = replace(pool, settings=settings, blocks=held + draw.randrange(held + 1))
        reference = ranks_cases.served(pool, trace, "reference")
        ranks_cases.assert_same(reference, ranks_cases.served(pool, trace, "kernel"))
        counted = run_deployment([pool], trace)
        assert counted.finish_ns.tolist() == reference.finish_ns.tolist(), seed
        assert counted.preemptions == reference.preemptions, seed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_window_holds_no_more_than_a_query_sees_and_a_chunk(implementation: Implementation) -> None:
    """Of 200 tokens a window of 32 needs 2 blocks before a row of one token, and one for it."""
    window = KvGroup(kind="window", block_size=16, window=32)
    case = Case(settings=ENGINE, blocks=40, laws=(linear(ENGINE, 1000),), trace=requests([(0, 150, 50)]))
    run = served(case, (FULL, window), implementation)
    assert run.used is not None
    assert run.used[-1] == (13, 3)
    assert max(seen for _, seen in run.used) == ceil_div(31 + 64, 16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_state_takes_one_block_whatever_the_length(implementation: Implementation) -> None:
    state = KvGroup(kind="state", block_size=ENGINE.max_model_len)
    case = Case(settings=ENGINE, blocks=1, laws=(linear(ENGINE, 1000),), trace=requests([(0, 150, 50), (0, 10, 4)]))
    run = served(case, (state,), implementation)
    assert run.used is not None
    assert set(run.used) == {(1,)}


def test_what_never_fits_is_refused_with_the_blocks_it_needs() -> None:
    window = KvGroup(kind="window", block_size=16, window=32)
    case = Case(settings=ENGINE, blocks=19, laws=(linear(ENGINE, 1000),), trace=requests([(0, 150, 50)]))
    assert served(case, (FULL, window), "kernel", 20).preemptions == 0
    with pytest.raises(CapacityError, match="need 20 KV blocks of 16, the cache has 19"):
        served(case, (FULL, window), "kernel")


def test_chunks_that_never_reach_where_a_state_is_kept_are_refused() -> None:
    small = replace(ENGINE, max_num_batched_tokens=8, block_size=16, prefix_caching=True)
    kept = KvGroup(kind="state", block_size=16, mode="align")
    case = Case(settings=small, blocks=40, laws=(linear(small, 1000),), trace=requests([(0, 150, 50)]))
    with pytest.raises(CapacityError, match="every 16 tokens, and a batch has 8 of one prompt at most; raise"):
        served(case, (FULL, kept), "kernel")


def test_groups_are_refused_with_other_engines_beside_other_groups_and_where_they_cannot_be_read() -> None:
    law, trace = linear(ENGINE, 1000), requests([(0, 5, 5)])
    one = EnginePool(settings=replace(ENGINE, kv_groups=(FULL,)), blocks=40, laws=[law])
    with pytest.raises(UsageError, match="groups of layers go with vllm, not with trtllm"):
        run_deployment([replace(one, settings=replace(one.settings, scheduler=TrtllmScheduling()))], trace)
    with pytest.raises(UsageError, match="assigned to pools where these have different groups"):
        run_deployment([one, replace(one, settings=ENGINE)], trace)
    case: dict[str, Any] = {"config": {"groups": []}, "trace": [], "accept": None, "proposed": None}
    with pytest.raises(UsageError, match="groups must list"):
        replay_case("hybrid", case)
    for group, message in (
        ({"kind": "ful"}, "group 0: kind must be full, window, chunk, state and mode none, align, got ful and none"),
        ({"kind": "window", "block_size": 16}, "window from 1 for windows and chunks alone"),
        ({"kind": "full", "block_size": -1}, "group 0: block_size, window must be 2 whole"),
    ):
        with pytest.raises(UsageError, match=message):
            replay_case("hybrid", case | {"config": {"groups": [group]}})
