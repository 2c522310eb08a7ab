"""apex_opt.simulator.handover: prefill and decode instances as recorded, kernel as reference, nothing lost."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from handover_cases import Pair, by_instance, compare, pairs
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st
from simulator_cases import IMPLEMENTATIONS, REPLAYED, assert_same, linear, moved, requests

from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import ApexError, CapacityError, UnknownNameError, UsageError
from apex_opt.figures.stops import METRICS, Stop, latencies_ns
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.routing import ROUTINGS
from apex_opt.search.facts import Facts
from apex_opt.simulator import (
    DisaggregatedOutcome,
    EnginePool,
    Handover,
    replay_case,
    run_deployment,
)
from apex_opt.simulator.handover import prompts_only
from apex_opt.simulator.reference import disaggregated, handover
from apex_opt.simulator.reference.handover import DecodeScheduler, Instance, PrefillScheduler
from apex_opt.simulator.reference.router import Dealt, Dynamo
from apex_opt.simulator.reference.sequence import Sequence
from apex_opt.simulator.routing import Prefixes
from apex_opt.units import DATA_ROOT, ceil_div
from benchmarks.problems import problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from apex_opt.plans.routing import Routing
    from apex_opt.simulator.api import Implementation
    from apex_opt.simulator.reference.sequence import Batch

SLEEPY = VllmScheduling(idle_sleep_us=1)
ROOMY = EngineSettings(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, block_size=4, scheduler=SLEEPY)
SMALLEST = replace(
    ROOMY,
    max_num_seqs=1,
    max_num_batched_tokens=5,
    max_model_len=5,
    block_size=1,
    chunked_prefill=False,
    async_scheduling=False,
)
POOL = EnginePool(settings=ROOMY, blocks=64, laws=(linear(ROOMY, 10),), replicas=2)
NAMED = ("pd_1p1d", "pd_1p2d_prefix_seats", "pd_2p1d_async_tight", "pd_2p1d_seats_long_reads")


@cache
def read(shared: Path, name: str) -> Any:
    return json.loads(gzip.decompress((shared / "scheduler-golden" / "pd" / f"{name}.json.gz").read_bytes()))


def comes_out(case: dict[str, Any], implementation: Implementation) -> bool:
    """Whether all that was recorded comes out again."""
    found = json.loads(json.dumps(replay_case("pd", case, implementation)))
    return bool(found == {key: value for key, value in case.items() if key not in ("config", "trace")})


@pytest.mark.data
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMED)
def test_recorded_runs_come_out_batch_for_batch(shared: Path, name: str, implementation: Implementation) -> None:
    assert comes_out(read(shared, name), implementation)


@pytest.mark.data
@REPLAYED
def test_recorded_random_runs_come_out_batch_for_batch(
    shared: Path, implementation: Implementation, every: int
) -> None:
    cases = read(shared, "random")
    assert len(cases) == 120
    assert [number for number in range(0, 120, every) if not comes_out(cases[number], implementation)] == []


REPLAY = """
import gzip, json, sys
from pathlib import Path
from apex_opt.simulator import replay_case
for case in json.loads(gzip.decompress(Path(sys.argv[1]).read_bytes())):
    assert replay_case("pd", case)["batches_sha256"] == case["batches_sha256"]
print("alike")
"""


@pytest.mark.nightly
@pytest.mark.data
def test_kernel_replays_recorded_runs_with_every_index_checked(shared: Path, tmp_path: Path) -> None:
    path = shared / "scheduler-golden" / "pd" / "random.json.gz"
    ran = subprocess.run(
        [sys.executable, "-c", REPLAY, str(path)],
        env=os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(DATA_ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "alike\n"), ran.stderr


# The kernel is the reference.


@settings(max_examples=80)
@given(pairs())
def test_kernel_equals_reference(pair: Pair) -> None:
    compare(pair)


@pytest.mark.nightly
@settings(max_examples=3000)
@given(pairs(most=60))
def test_kernel_equals_reference_on_many_deployments(pair: Pair) -> None:
    compare(pair)


ROUTED = st.tuples(st.sampled_from(ROUTINGS), st.sampled_from([name for name in ROUTINGS if name != "vllm_dp"]))


@settings(max_examples=120)
@given(pairs(), ROUTED)
def test_kernel_equals_reference_behind_routers(pair: Pair, routing: tuple[Routing, Routing]) -> None:
    compare(pair, routing=routing)


def test_what_is_pulled_once_a_turn_is_over_is_not_slept_for() -> None:
    """An instance that has answered its last pulls another one that very moment, having found nothing left to do."""
    engine = replace(SMALLEST, async_scheduling=True)
    # Laws under which that happened: most prompts take no time.
    prompts = replace(
        linear(engine, 0),
        mixed_ns=np.array([0, 238, 154, 0, 0, 0]),
        chunk_ns=np.array([0, 0, 0, 91, 70, 84]),
        pair_rate=np.array([3_524_521, 2_887_554, 0, 0, 3_670_670, 566_635]),
        chunk_context_rate=np.array([2_228_616, 0, 0, 2_397_169, 0, 1_350_018]),
        transfer_ns=np.array([0, 7, 0, 0, 0, 0]),
        decode_ns=np.array([0, 0]),
        attend_ns=np.array([35, 42]),
        context_rate=np.array([2_348_463, 0]),
    )
    answers = replace(
        prompts,
        decode_ns=np.array([238, 175]),
        context_rate=np.array([2_348_463, 3_921_978]),
        mixed_ns=np.array([112, 238, 154, 14, 210, 203]),
        chunk_ns=np.array([0, 14, 0, 91, 70, 84]),
        pair_rate=np.array([3_524_521, 2_887_554, 2_952_794, 1_631_254, 3_670_670, 566_635]),
        chunk_context_rate=np.array([2_228_616, 1_500_701, 2_821_673, 2_397_169, 1_067_895, 1_350_018]),
        transfer_ns=np.array([0, 7, 35, 84, 42, 77]),
    )
    pair = Pair(
        prefill=EnginePool(settings=engine, blocks=2, laws=(prompts,), replicas=2),
        decode=EnginePool(settings=SMALLEST, blocks=2, laws=(answers,)),
        handover=Handover(proxy_ns=0, read_ns=0, block_ns=0, notice_ns=0),
        trace=requests([(0, 1 + (place == 21), 1) for place in range(28)]),
    )
    compare(pair, routing=("pull", "round_robin"))


@pytest.mark.nightly
@settings(max_examples=3000)
@given(pairs(most=60), ROUTED)
def test_kernel_equals_reference_behind_routers_on_many_deployments(
    pair: Pair, routing: tuple[Routing, Routing]
) -> None:
    compare(pair, routing=routing)


@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name != "vllm_dp"])
@settings(max_examples=4)
@given(pairs(most=4))
def test_no_routers_beat_the_best_dealing_of_prompts_and_answers(routing: Routing, pair: Pair) -> None:
    two = replace(pair, prefill=replace(pair.prefill, replicas=2), decode=replace(pair.decode, replicas=2))
    chosen, rows = two.run("reference", routing=(routing, routing)), np.arange(len(two.trace))
    totals = set()
    for places in itertools.product(range(2), repeat=2 * len(rows)):
        dealt = Dealt(rows, np.array(places[: len(rows)])), Dealt(rows, np.array(places[len(rows) :]))
        outcome = disaggregated.run(two.prefill, two.decode, two.handover, two.trace, dealt, log=False, gaps=False)
        totals.add(int((outcome.finish_ns - outcome.arrival_ns).sum()))
    total = int((chosen.finish_ns - chosen.arrival_ns).sum())
    assert total >= min(totals)
    assert routing == "pull" or total in totals  # who pulls has not waited at an instance


def test_the_decode_side_is_routed_by_what_is_there_when_a_prompt_is_computed() -> None:
    slow = replace(POOL, laws=(linear(ROOMY, 1000),))
    # The first answer is still on its way when the third prompt is computed, the second is not.
    trace = requests([(0, 4, 50), (1, 4, 1), (20_000, 4, 1)])
    pair = Pair(prefill=slow, decode=slow, handover=Handover(), trace=trace)
    for implementation in IMPLEMENTATIONS:
        assert pair.run(implementation).decode.tolist() == [0, 1, 0]
        by_load = pair.run(implementation, routing=("round_robin", "least_loaded"))
        assert (by_load.prefill.tolist(), by_load.decode.tolist()) == ([0, 1, 0], [0, 1, 1])


def test_dynamo_weighs_no_prompts_where_others_compute_them() -> None:
    known = Prefixes.none(3, 4)
    computing, answering = (Dynamo(known, 4, caching=True, computes=computes) for computes in (True, False))
    engines = [Instance(POOL, kind, log=False) for kind in (PrefillScheduler, DecodeScheduler)]
    prompt = Sequence(id=0, prompt=9, output=4, limit=4)
    assert [router.cost(prompt, 0, engines[0]) for router in (computing, answering)] == [9 + 8, 8]


@pytest.mark.parametrize(
    ("routing", "said"),
    [(("round_robin", "vllm_dp"), "vllm_dp is of requests as they come"), (("best", "round_robin"), "routing 'best'")],
)
def test_routers_that_are_none_of_a_side_are_refused(routing: Any, said: str) -> None:
    pair = Pair(prefill=POOL, decode=POOL, handover=Handover(), trace=requests([(0, 4, 4)]))
    with pytest.raises(ApexError, match=said):
        pair.run("kernel", routing=routing)


def with_clients(pair: Pair, clients: int, pause_ns: int) -> Pair:
    """The same requests, sent by clients."""
    at_once = np.zeros_like(pair.trace.arrival_ns)
    at_once.flags.writeable = False
    return replace(pair, trace=replace(pair.trace, arrival_ns=at_once, concurrency=clients, pause_ns=pause_ns))


@settings(max_examples=120)
@given(pairs(), ROUTED, st.integers(1, 6), st.sampled_from((0, 0, 50, 4000)))
def test_clients_send_the_next_request_a_pause_after_an_answer(
    pair: Pair, routing: tuple[Routing, Routing], clients: int, pause_ns: int
) -> None:
    closed = with_clients(pair, clients, pause_ns)
    compare(closed, routing=routing)
    outcome = closed.run("kernel", routing=routing)
    arrivals, answers = outcome.arrival_ns, np.sort(outcome.finish_ns)
    first = min(clients, len(arrivals))
    assert arrivals.tolist() == [0] * first + (answers[: len(arrivals) - first] + pause_ns).tolist()
    limit = Stop(metric="whole", kind="count", limit_ns=int((outcome.finish_ns - arrivals).max()) - 1)
    assert all(closed.run(one, routing=routing, stops=[limit]).stopped for one in IMPLEMENTATIONS)


def passing(pair: Pair, seed: int) -> list[Stop]:
    """Limits about what a run reaches, some of which it passes."""
    rng, done = np.random.default_rng(seed), pair.run("reference")
    limits = pair.trace.generated(pair.decode.settings.max_model_len)
    stops = []
    for metric in rng.choice(METRICS, 2, replace=False).tolist():
        times = np.sort(latencies_ns(metric, done.arrival_ns, done.first_token_ns, done.finish_ns, limits))
        if metric == "makespan" or rng.random() < 0.5:
            limit = int(times[-1] * rng.choice([0.5, 1, 1.5]))
            most = 1 if metric == "makespan" else int(rng.integers(1, 3))
            stops.append(Stop(metric=metric, kind="count", limit_ns=limit, most=most))
        else:
            stops.append(Stop(metric=metric, kind="sum", limit_ns=int(times.sum() * rng.choice([0.5, 1, 1.5]))))
    return stops


@settings(max_examples=80)
@given(pairs(), ROUTED, st.integers(0, 1000))
def test_a_run_ends_early_where_the_whole_one_passes_a_limit_and_nowhere_else(
    pair: Pair, routing: tuple[Routing, Routing], seed: int
) -> None:
    stops = passing(pair, seed)
    whole, early = (pair.run(one, routing=routing, stops=stops) for one in ("reference", "kernel"))
    assert early.stopped is whole.stopped
    if not early.stopped:
        assert np.array_equal(early.finish_ns, whole.finish_ns)
    # Floors say it sooner, and nothing else.
    first = whole.arrival_ns + (whole.first_token_ns - whole.arrival_ns) // 2
    floors = replace(whole, first_token_ns=first, finish_ns=first + (whole.finish_ns - whole.first_token_ns) // 2)
    assert pair.run("kernel", routing=routing, stops=stops, floors=floors).stopped is whole.stopped


def test_requests_that_say_what_they_may_generate_are_handed_over_all_the_same() -> None:
    most = np.array([9, 9])
    most.flags.writeable = False
    said = replace(requests([(0, 8, 4), (0, 4, 2)]), max_new_tokens=most)
    pair = Pair(prefill=POOL, decode=POOL, handover=Handover(), trace=said)
    compare(pair)


REACHED: dict[str, Callable[[Pair, DisaggregatedOutcome], bool]] = {
    "a preemption of a prompt": lambda pair, outcome: outcome.preemptions_of[: pair.prefill.replicas].any(),
    "a preemption of an answer": lambda pair, outcome: outcome.preemptions_of[pair.prefill.replicas :].any(),
    "a prompt of which a part is found": lambda pair, outcome: bool(
        (outcome.read_blocks < -(-pair.trace.prompt // pair.decode.settings.block_size)).any()
    ),
    "answers that overtake others on their way": lambda pair, outcome: bool(
        (np.diff(outcome.read_ns[np.argsort(outcome.read_ns[:, 0], kind="stable"), 1]) < 0).any()
    ),
    "a prompt that ends while it waits, preempted in flight": lambda pair, outcome: bool(
        outcome.preemptions_of[: pair.prefill.replicas].any()
        and pair.prefill.settings.async_scheduling
        and ended_preempted(pair, outcome)
    ),
}


def ended_preempted(pair: Pair, outcome: DisaggregatedOutcome) -> bool:
    """Whether a prompt is computed by a batch after whose launch it is preempted, and by no later one."""
    for steps in by_instance(outcome)[: pair.prefill.replicas]:
        last = {i: (start, end) for start, end, rows, _ in steps for i, _, _ in rows}
        for start, _, _, lost in steps:
            if any(i in last and last[i][0] < start < last[i][1] for i in lost):
                return True
    return False


@pytest.mark.parametrize("event", REACHED)
def test_random_deployments_reach_the_events_that_matter(event: str) -> None:
    find(
        pairs(),
        lambda pair: REACHED[event](pair, pair.run("kernel", log=True)),
        settings=settings(max_examples=1500, derandomize=True, database=None, phases=[Phase.generate]),
    )


# Nothing is lost.


@settings(max_examples=60)
@given(pairs())
def test_every_request_gets_all_its_tokens_and_every_block_is_given_back(pair: Pair) -> None:
    outcome = pair.run("reference", log=True)
    trace, size = pair.trace, pair.decode.settings.block_size
    limits = trace.generated(pair.decode.settings.max_model_len)
    assert outcome.gaps_ns is not None and len(outcome.gaps_ns) == int((limits - 1).sum())
    assert np.array_equal(outcome.prefill, np.arange(len(trace)) % pair.prefill.replicas)
    assert np.ptp(np.bincount(outcome.decode, minlength=pair.decode.replicas)) <= 1
    # What happens to a request happens in order.
    reads = outcome.read_ns.T
    times = [trace.arrival_ns, outcome.prefilled_ns, outcome.forwarded_ns, *reads, outcome.first_token_ns]
    assert (np.diff([*times, outcome.finish_ns], axis=0) >= 0).all()
    assert np.array_equal(outcome.forwarded_ns - outcome.prefilled_ns, np.full(len(trace), pair.handover.proxy_ns))
    # All of a prompt travels but for what is found in the decode instance's cache.
    assert (outcome.read_blocks >= 1).all()
    missing = -(-trace.prompt // size) - outcome.read_blocks
    assert (missing * size < trace.prompt).all() and (missing >= 0).all()
    assert pair.decode.settings.prefix_caching or not missing.any()
    # A prompt is handed over once, and what a decode instance took it gives back.
    assert outcome.held[pair.prefill.replicas :].tolist() == [0] * pair.decode.replicas
    pools = [pair.prefill] * pair.prefill.replicas + [pair.decode] * pair.decode.replicas
    for pool, steps in zip(pools, by_instance(outcome), strict=True):
        for start, end, rows, _ in steps:
            assert end >= start and len(rows) <= pool.settings.max_num_seqs
            assert sum(tokens for _, tokens, _ in rows) <= pool.settings.max_num_batched_tokens


@settings(max_examples=40)
@given(pairs())
def test_a_prefill_instance_gives_back_what_was_read_once_it_has_something_to_do_again(pair: Pair) -> None:
    """Long after all others each instance gets a last request, whose blocks are all that is held in the end."""
    trace, count = pair.trace, len(pair.trace) // pair.prefill.replicas * pair.prefill.replicas
    if not count:
        return
    late = trace.picked(np.arange(count))
    arrival = late.arrival_ns.copy()
    arrival[-pair.prefill.replicas :] += 1 << 40
    late = moved(late, arrival)
    held = replace(pair, trace=late).run("reference").held[: pair.prefill.replicas]
    size = pair.prefill.settings.block_size
    assert held.tolist() == [ceil_div(p, size) for p in late.prompt[-pair.prefill.replicas :].tolist()]


# A rule that is changed is noticed.


def at_once(self: handover.Instance) -> Batch:
    """The scheduler learns at the launch of a batch what the workers see."""
    batch = LAUNCH(self)
    for sequence in self._seen[-1]:
        self.scheduler.hear(sequence)
    self._seen[-1] = []
    return batch


def waiting_first(self: handover.DecodeScheduler, batch: Batch) -> None:
    """Those that wait are admitted before those whose read has ended."""
    handover.VllmScheduler.schedule_waiting(self, batch)
    for sequence in list(self.remote):
        if sequence in self._read and self.seats(batch):
            self.start(batch, sequence)


def seated(self: handover.DecodeScheduler, batch: Batch, sequence: Sequence) -> bool:
    """A read takes a seat."""
    taken = len(self.running) + len(self.remote)
    return (sequence in self._handed or taken < self.settings.max_num_seqs) and ADMIT(self, batch, sequence)


def all_travels(self: handover.DecodeScheduler, batch: Batch, sequence: Sequence) -> bool:
    """What is found travels too."""
    admitted = ADMIT(self, batch, sequence)
    if self.ordered and self.ordered[-1][0] is sequence:
        self.ordered[-1] = sequence, sequence.blocks
    return admitted


def unfindable(self: handover.DecodeScheduler, batch: Batch, sequence: Sequence) -> None:
    """What was read can be found a batch after the first that its request is in."""
    register, self.blocks.register = self.blocks.register, lambda sequence, tokens: None  # type: ignore[method-assign]
    START(self, batch, sequence)
    self.blocks.register = register  # type: ignore[method-assign]


LAUNCH = handover.Instance.launch
ADMIT = handover.DecodeScheduler.admit
START = handover.DecodeScheduler.start
READ = handover.Deployment.read
MUTANTS: dict[str, tuple[type, str, Any]] = {
    "blocks of a prompt are free when it is computed": (
        handover.PrefillScheduler,
        "give_back",
        lambda self, sequence: self.blocks.release(sequence),
    ),
    "a read is known at the launch after it": (handover.Instance, "launch", at_once),
    "a read takes a seat": (handover.DecodeScheduler, "admit", seated),
    "those that wait come before those that were read": (handover.DecodeScheduler, "schedule_waiting", waiting_first),
    "what is found travels too": (handover.DecodeScheduler, "admit", all_travels),
    "what was read can be found a batch later": (handover.DecodeScheduler, "start", unfindable),
    "decode instances are chosen as prefill instances are": (
        handover.Side,
        "send",
        lambda self, sequence, now_ns, later_ns: self._add(
            sequence.id % len(self.instances), sequence, now_ns + later_ns
        ),
    ),
    "reads never wait for each other": (
        handover.Deployment,
        "read",
        lambda self, *given: (setattr(self, "_link_free", [0] * len(self.prefill)), READ(self, *given)),
    ),
}


@pytest.mark.data
@pytest.mark.parametrize("rule", MUTANTS)
def test_a_changed_rule_is_noticed_by_recorded_runs(shared: Path, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, changed = MUTANTS[rule]
    monkeypatch.setattr(owner, name, changed)
    last = [read(shared, "pd_2p1d_seats_long_reads")] if changed is seated else []
    assert not all(comes_out(case, "reference") for case in [*last, *read(shared, "random")[:60]])


@pytest.mark.data
@pytest.mark.parametrize("key", ["idle_poll_us", "notice_us", "proxy_us", "link"])
def test_a_changed_setting_is_noticed_by_recorded_runs(shared: Path, key: str) -> None:
    changed = {"idle_poll_us": 100, "notice_us": 400, "proxy_us": 20}
    cases = []
    for case in read(shared, "random")[:40]:
        other = {"none": "fifo", "fifo": "none"}[case["config"]["link"]] if key == "link" else changed[key]
        cases.append(case | {"config": case["config"] | {key: other}})
    assert not all(comes_out(case, "kernel") for case in cases)


# Costs of real plans.


@pytest.fixture(scope="module")
def costed() -> Pair:
    """Llama 3.1 8B on H100: two instances of one GPU for prompts, one of two GPUs for answers."""
    asked = problem("llama-3.1-8b", "4xh100-sxm", "chat")
    asked = replace(asked, settings=replace(asked.settings, scheduler=VllmScheduling(idle_sleep_us=1000)))
    facts, pools = Facts(asked), []
    for text, count in (("tp1", 2), ("tp2", 1)):
        plan = parse_plan(text, asked.model)
        settings, laws = asked.settings_for(plan), facts.plan_cost(plan).laws
        pools.append(EnginePool(settings=settings, blocks=facts.blocks(plan), laws=laws, replicas=count))
    handover = Handover(proxy_ns=500_000, read_ns=300_000, block_ns=40_000, notice_ns=50_000, in_turn=True)
    return Pair(prefill=pools[0], decode=pools[1], handover=handover, trace=asked.trace.head(40))


def test_priorities_of_a_trace_change_nothing_where_prompts_are_handed_over(costed: Pair) -> None:
    priority = np.arange(40) % 2
    priority.flags.writeable = False
    marked = replace(costed, trace=replace(costed.trace, priority=priority))
    assert_same(marked.run("kernel"), costed.run("kernel"))


def test_pools_with_the_costs_of_plans_are_served_alike_by_both_implementations(costed: Pair) -> None:
    compare(costed)


@pytest.mark.parametrize("blocks", [None, 200])
def test_blocks_that_are_held_are_all_that_slows_prompts_down(costed: Pair, blocks: int | None) -> None:
    """With blocks for all prompts they are computed as if there were no answers, and later with few."""
    prefill = costed.prefill if blocks is None else replace(costed.prefill, blocks=blocks)
    outcome = replace(costed, prefill=prefill, handover=replace(costed.handover, read_ns=3_000_000_000)).run("kernel")
    apart = run_deployment([prefill], prompts_only(costed.trace), implementation="reference")
    late = outcome.prefilled_ns - apart.finish_ns
    assert (late >= 0).all()
    assert late.any() == (blocks is not None)


@settings(max_examples=80)
@given(pairs())
def test_with_a_free_way_and_endless_memory_a_pair_is_its_two_runs_apart(pair: Pair) -> None:
    """The prompts alone on their pool; and the answers, where prompts come at those times to instances of no time."""
    n = len(pair.trace)
    prefill, decode = (replace(pool, blocks=65 * (n + 1)) for pool in (pair.prefill, pair.decode))
    both = Pair(prefill=prefill, decode=decode, handover=Handover(), trace=pair.trace).run("kernel")
    prompts = run_deployment([prefill], prompts_only(pair.trace), implementation="reference")
    assert np.array_equal(both.prefilled_ns, prompts.finish_ns)
    coming, order = pair.trace.arriving(prompts.finish_ns)
    assume((np.diff(coming.arrival_ns) > 0).all())  # else who is handed over first depends on the instances
    at_once = replace(prefill.settings, async_scheduling=False)
    feeding = replace(prefill, settings=at_once, laws=(linear(at_once, 0),), replicas=n)
    answers = Pair(prefill=feeding, decode=decode, handover=Handover(), trace=coming).run("reference")
    for name in ("first_token_ns", "finish_ns", "decode", "read_blocks"):
        assert np.array_equal(getattr(both, name)[order], getattr(answers, name)), name


# One request, by hand.


def alone(**changes: Any) -> Pair:
    """Instances of 100 ns and 10 ns for each token, and a request of 5 tokens that gets 3."""
    pools = []
    for _ in range(2):
        engine = EngineSettings(
            max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32, block_size=4, async_scheduling=False,
            scheduler=VllmScheduling(idle_sleep_us=1),
        )  # fmt: skip
        pools.append(EnginePool(settings=engine, blocks=20, laws=(linear(engine, 100, 10),)))
    pair = Pair(prefill=pools[0], decode=pools[1], handover=Handover(), trace=requests([(0, 5, 3)]))
    return replace(pair, **changes)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_read_is_known_at_the_end_of_the_batch_launched_after_it(implementation: Implementation) -> None:
    """Two blocks of 30 ns and 70 for the read: with 40 for the proxy they are there at 190 + 200. The decode instance
    looks after each sleep of 1,000 ns, and then computes the last token of the prompt again."""
    handover = Handover(proxy_ns=40, read_ns=140, block_ns=30, notice_ns=5)
    outcome = alone(handover=handover).run(implementation, log=True)
    assert outcome.prefilled_ns.tolist() == [150]
    assert outcome.forwarded_ns.tolist() == [190]
    assert outcome.read_ns.tolist() == [[190, 390]]
    assert outcome.read_blocks.tolist() == [2]
    assert outcome.steps == [
        (0, 150, [(0, 5, 5)], []),
        (2190, 2300, [(0, 1, 5)], []),
        (2300, 2410, [(0, 1, 6)], []),
        (2410, 2520, [(0, 1, 7)], []),
    ]
    assert outcome.steps_per_replica == [1, 3]
    assert outcome.first_token_ns.tolist() == [2300]
    assert outcome.finish_ns.tolist() == [2520]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_a_way_to_go_the_first_token_takes_a_prompt_a_sleep_and_a_batch(implementation: Implementation) -> None:
    """The read has ended when the workers look at its own launch, but the scheduler learns of it after that."""
    outcome = alone().run(implementation)
    assert outcome.first_token_ns.tolist() == [150 + 1000 + 110]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_reads_in_turn_wait_for_the_link_of_their_prefill_instance(implementation: Implementation) -> None:
    pair = alone(trace=requests([(0, 4, 1), (0, 4, 1)]))
    for in_turn, starts in ((False, [180, 180]), (True, [180, 680])):
        handover = Handover(read_ns=400, block_ns=100, in_turn=in_turn)
        outcome = replace(pair, handover=handover).run(implementation)
        assert outcome.read_ns[:, 0].tolist() == starts
        assert (outcome.read_ns[:, 1] - outcome.read_ns[:, 0] == 500).all()


# Errors.


SIDE: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "max_model_len": 32,
    "chunked_prefill": True,
    "long_prefill_token_threshold": 0,
    "block_size": 4,
    "num_gpu_blocks": 9,
    "prefix_caching": False,
    "async_scheduling": False,
    "law_us": [10, 1, 0],
}
SMALL: dict[str, Any] = {
    "prefill": SIDE,
    "decode": SIDE,
    "instances": [1, 1],
    "proxy_us": 5,
    "read_us": [3, 2],
    "notice_us": 1,
    "link": "none",
    "idle_poll_us": 1000,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"idle_poll_us": 0}, UsageError, "prefill instances need an idle_sleep_us of at least 1"),
        ({"link": "ring"}, UnknownNameError, "unknown config: link 'ring'"),
        ({"instances": [1, 0]}, UsageError, "replicas: 0 is below 1"),
        ({"instances": [1]}, UsageError, "instances must be 2 whole number"),
        ({"read_us": [1, 400_000_000]}, UsageError, "a read of 2 blocks would take longer than 480 s"),
        ({"notice_us": 1 << 30}, UsageError, "notice_ns must be from 0 to 480000000000 ns"),
        ({"decode": SIDE | {"num_gpu_blocks": 2}}, CapacityError, "need 2 KV blocks of 4, the cache has 1"),
        ({"decode": SIDE | {"block_size": 8}}, UsageError, "the same block_size, got 4, 8"),
        ({"decode": SIDE | {"max_model_len": 64}}, UsageError, "the same max_model_len, got 32, 64"),
        ({"decode": SIDE | {"prefix_caching": True}}, UsageError, "the same prefix_caching, got False, True"),
    ],
)
def test_instances_that_do_not_go_together_are_refused_in_one_line(
    changes: dict[str, Any], error: type[ApexError], message: str, implementation: Implementation
) -> None:
    with pytest.raises(error, match=message) as caught:
        replay_case("pd", {"config": SMALL | changes, "trace": [[0, 5, 3]]}, implementation)
    assert "\n" not in str(caught.value)


def test_missing_keys_are_named_with_the_kind_of_instance() -> None:
    config = {key: value for key, value in SMALL.items() if key != "link"}
    config["decode"] = {key: value for key, value in SIDE.items() if key != "law_us"}
    with pytest.raises(UsageError, match=r"config: missing link, decode\.law_us"):
        replay_case("pd", {"config": config, "trace": [[0, 5, 3]]})


def test_pipelines_and_other_policies_are_refused() -> None:
    pair = alone()
    with pytest.raises(UsageError, match="the decode instances must be of one stage, one scheduler of the engine vllm"):
        replace(pair, decode=replace(pair.decode, laws=[*pair.decode.laws] * 2)).run("reference")
    with pytest.raises(UsageError, match="handover: read_ns must be from 0"):
        Handover(read_ns=-1)
