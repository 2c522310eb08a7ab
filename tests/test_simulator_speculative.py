"""Speculative decoding in reference and kernel: recorded batches come out, and both say the same of random engines."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from golden.condense import digest, read_condensed, read_recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import (
    DRAFTING,
    IMPLEMENTATIONS,
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

from apex_opt.engines.schedulers import OrcaScheduling
from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.speculation import Speculation
from apex_opt.simulator import replay_case
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.reference import engine
from apex_opt.simulator.reference.speculative import SpeculativeScheduler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from apex_opt.simulator.api import Implementation
    from apex_opt.simulator.reference.sequence import Batch, Row, Sequence

RECORDED = read_condensed("spec")
GIVEN = ("config", "trace", "accept", "proposed")


def served(case: dict[str, Any], implementation: Implementation) -> dict[str, Any]:
    """A recorded case served anew, as it comes out of JSON."""
    found: dict[str, Any] = json.loads(
        json.dumps(replay_case("spec", {name: case[name] for name in GIVEN}, implementation))
    )
    return found


@REPLAYED
def test_all_that_was_recorded_comes_out_again(implementation: Implementation, every: int) -> None:
    assert len(RECORDED) == 158
    for name, case in list(RECORDED.items())[::every]:
        found = served(case, implementation)
        assert digest(found.pop("steps")) == case["batches_sha256"], name
        assert found == {key: value for key, value in case.items() if key not in GIVEN}, name


@pytest.mark.nightly
@pytest.mark.data
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_batch_that_differs_from_the_full_recording(shared: Path, implementation: Implementation) -> None:
    for name, case in read_recorded(shared / "scheduler-golden" / "spec").items():
        ours = served(case, implementation)["steps"]
        for number, (got, recorded) in enumerate(zip(ours, case["steps"], strict=False)):
            assert got == recorded, f"{name}: batch {number}"
        assert len(ours) == len(case["steps"]), name


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", DRAFTING)
@settings(max_examples=60)
@given(data=st.data())
def test_kernel_equals_reference_on_random_engines(loop: Loop, traffic: Traffic, data: st.DataObject) -> None:
    case = data.draw(cases(loop, traffic))
    assert_same(case.run("kernel"), case.run("reference"))


@pytest.mark.nightly
@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", DRAFTING)
@settings(max_examples=1000)
@given(data=st.data())
def test_kernel_equals_reference_on_many_random_engines(loop: Loop, traffic: Traffic, data: st.DataObject) -> None:
    case = data.draw(cases(loop, traffic))
    assert_same(case.run("kernel"), case.run("reference"))


# Beside engines without drafts.


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_where_no_drafts_are_proposed_batches_are_those_of_a_plain_engine(
    implementation: Implementation, data: st.DataObject
) -> None:
    """Whose decoding rows, though, are all of up to four tokens: under a linear law that is the same."""
    case = data.draw(cases("synchronous", "dealt"))
    plain = case.having(laws=(linear(case.settings, 5, 2, 1),))
    speculation = Speculation(method="ngram", draft_tokens=3, accepted=((3,),), proposed=((0,),))
    drafting = case.having(
        settings=replace(case.settings, speculation=speculation),
        laws=(drafting_law(case.settings, 5, 2, 1, drafts=3),),
    )
    one, other = plain.run(implementation), drafting.run(implementation)
    assert one.steps == other.steps
    assert np.array_equal(one.finish_ns, other.finish_ns)


def drafting_law(settings: EngineSettings, base: int, token: int, context: int, *, drafts: int, draft: int = 0) -> Any:
    """`simulator_cases.linear` of an engine that makes drafts."""
    return linear_law(
        base_ns=base,
        token_ns=token,
        context_ns=context,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        draft_tokens=drafts,
        draft_ns=draft,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("method", ["eagle", "ngram"])
def test_where_no_draft_is_right_only_their_cost_is_added(method: str, implementation: Implementation) -> None:
    """Room enough for all: the same tokens at the same steps, each by the time of the drafts later."""
    engine = EngineSettings(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=512, async_scheduling=False)
    trace = requests([(0, 30, 9), (0, 70, 20), (0, 1, 1), (0, 200, 3)])
    plain = Case(settings=engine, blocks=500, laws=(linear(engine, 1000),), trace=trace)
    speculation = Speculation(method=method, draft_tokens=2, accepted=((0,),))
    wrong = plain.having(
        settings=replace(engine, speculation=speculation),
        laws=(drafting_law(engine, 1000, 0, 0, drafts=2, draft=50),),
    )
    one, other = plain.run(implementation), wrong.run(implementation)
    assert one.batches == other.batches
    assert np.array_equal(other.finish_ns * 1000, one.finish_ns * 1100)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_of_one_batch_come_together(implementation: Implementation) -> None:
    """Of 8 tokens the first comes with the prompt, then 4 and 3: gaps are 0 within a batch."""
    settings = EngineSettings(
        max_num_seqs=1,
        max_num_batched_tokens=64,
        max_model_len=64,
        async_scheduling=False,
        speculation=Speculation(method="eagle", draft_tokens=3, accepted=((3,),)),
    )
    case = Case(
        settings=settings, blocks=9, laws=(drafting_law(settings, 10, 0, 0, drafts=3),), trace=requests([(0, 5, 8)])
    )
    outcome = case.run(implementation)
    assert outcome.steps is not None and outcome.gaps_ns is not None
    assert [rows for _, _, rows, _ in outcome.steps] == [[(0, 5, 5)], [(0, 4, 9)], [(0, 4, 13)]]
    assert outcome.drafted == [(8, [(0, 1)]), (8, [(3, 4)]), (8, [(3, 3)])]
    assert outcome.gaps_ns.tolist() == [10, 0, 0, 0, 10, 0, 0]


# What the rules are noticed by.


class Changed(SpeculativeScheduler):
    """Gives up where a changed rule leaves somebody waiting forever."""

    turns = 0

    def schedule(self) -> Batch:
        self.turns += 1
        assert self.turns < 3000
        return super().schedule()


class NothingAhead(Changed):
    def ahead(self, held: int) -> int:
        return held


class NotCapped(Changed):
    def ahead(self, held: int) -> int:
        return held + self.speculation.ahead


class AheadAtAdmission(Changed):
    def reserved(self, sequence: Sequence) -> int:
        return self.ahead(sequence.known)


class NothingRecomputed(Changed):
    def found(self, sequence: Sequence) -> list[int]:
        return self.blocks.found(sequence)


class ProposalsKept(Changed):
    def preempt(self, sequence: Sequence) -> None:
        proposed = sequence.proposed
        super().preempt(sequence)
        sequence.proposed = proposed

    def launch(self, row: Row) -> None:
        proposed = row.sequence.proposed
        super().launch(row)
        if not row.yields:
            row.sequence.proposed = proposed


class RejectedStay(Changed):
    def receive(self, row: Row) -> int:
        computed = row.sequence.computed
        got = super().receive(row)
        row.sequence.computed = computed
        return got


class AlwaysProposed(Changed):
    def update(self, batch: Batch, now_ns: int) -> list[Sequence]:
        answered = super().update(batch, now_ns)
        for row in batch.rows:
            if row.yields and not row.sequence.finished:
                row.sequence.proposed = self.speculation.draft_tokens
        return answered


class DraftsCountedOn(Changed):
    def wanted(self, sequence: Sequence) -> int:
        known = sequence.computed + 1 >= sequence.prompt + sequence.output
        return 0 if sequence.in_flight and known else super().wanted(sequence)


class NotCutByTheThreshold(Changed):
    def wanted(self, sequence: Sequence) -> int:
        drafts, sequence.proposed = sequence.proposed, 0
        tokens = super().wanted(sequence)
        sequence.proposed = drafts
        return tokens + min(drafts, self.settings.max_model_len - 1 - sequence.computed - tokens) if tokens > 0 else 0


RULES: dict[str, type[SpeculativeScheduler]] = {
    "blocks are taken ahead": NothingAhead,
    "not beyond the model's length": NotCapped,
    "not at admission": AheadAtAdmission,
    "EAGLE computes the last block again": NothingRecomputed,
    "preemption takes proposals away": ProposalsKept,
    "rejected tokens are not computed": RejectedStay,
    "n-grams are not always found": AlwaysProposed,
    "drafts on their way are not counted on": DraftsCountedOn,
    "the threshold cuts drafts": NotCutByTheThreshold,
}


@pytest.mark.parametrize("rule", RULES)
def test_recorded_batches_notice_a_changed_rule(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SpeculativeScheduler", RULES[rule])
    assert any(notices(case) for case in RECORDED.values())


def notices(case: dict[str, Any]) -> bool:
    """Whether other batches come out, or none at all."""
    try:
        return bool(served(case, "reference")["batches_sha256"] != case["batches_sha256"])
    except (ApexError, AssertionError, IndexError):
        return True


# Errors.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda case: case["config"].pop("draft_tokens"), UsageError, "config: missing draft_tokens"),
        (lambda case: case["config"].update(draft_tokens=9), UsageError, "9 drafts; a whole number from 1 to 8"),
        (lambda case: case["config"].update(draft_kind="tree"), UnknownNameError, "kind of drafts 'tree'"),
        (lambda case: case["config"].update(law_us=[1, 2, 3]), UsageError, "law_us must be 4 whole"),
        (lambda case: case["accept"].pop(), UsageError, "accept: 39 lists for 40 requests|lists for"),
        (lambda case: case["accept"].__setitem__(0, [-1]), UsageError, "accept: row 0 must be a list"),
        (lambda case: case["trace"][0].pop(), ApexError, "a request has 5"),
    ],
)
def test_cases_no_engine_accepts_are_refused_in_one_line(
    change: Callable[[dict[str, Any]], object], error: type[ApexError], message: str
) -> None:
    case = json.loads(json.dumps({name: RECORDED["mtp1_async_tight"][name] for name in GIVEN}))
    change(case)
    with pytest.raises(error, match=message) as caught:
        replay_case("spec", case)
    assert "\n" not in str(caught.value)


def test_several_stages_and_other_policies_do_not_go_with_drafts() -> None:
    speculation = Speculation(method="eagle", draft_tokens=2, accepted=((1,),))
    engine = EngineSettings(max_num_seqs=2, max_num_batched_tokens=64, max_model_len=64, speculation=speculation)
    law = drafting_law(engine, 1, 0, 0, drafts=2)
    with pytest.raises(UsageError, match="drafts are made on one stage, the plan has 2; use pp1 or no"):
        Case(settings=engine, blocks=9, laws=(law, law), trace=requests([(0, 5, 8)])).run()
    with pytest.raises(UsageError, match="the law is of 2 drafts, the engine makes 1"):
        fewer = replace(engine, speculation=replace(speculation, draft_tokens=1))
        Case(settings=fewer, blocks=9, laws=(law,), trace=requests([(0, 5, 8)])).run()
    with pytest.raises(UsageError, match="speculation goes with the engines vllm, sglang, trtllm, not with orca"):
        replace(engine, scheduler=OrcaScheduling())
