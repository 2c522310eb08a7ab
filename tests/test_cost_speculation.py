"""What verifying and making drafts takes: against plain decoding, and in the accounts of a run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plan_cases import make_problem, random_trace

from apex_opt.cost import CostModel, account
from apex_opt.cost.engine import load_engine
from apex_opt.engines.kinds import load_kind
from apex_opt.ir import load_model
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.speculation import Speculation, parse_drafter
from apex_opt.search import Scorer
from apex_opt.simulator import simulate

if TYPE_CHECKING:
    from apex_opt.search import Problem
    from apex_opt.simulator import BatchLaw

MODEL = load_model("llama-3.1-8b")
WAYS = ("eagle:3", "mtp:3", "draft:llama-3.1-8b:3", "ngram:3")


@cache
def problem() -> Problem:
    """One model on H100, where any of these ways makes drafts."""
    known = tuple(
        Speculation(method=d.method, draft_tokens=d.draft_tokens, model=d.model, accepted=((2, 0, 3, 1),))
        for d in map(parse_drafter, (*WAYS, "eagle:1"))
    )
    settings = EngineSettings(max_num_seqs=512, max_num_batched_tokens=4096, max_model_len=4096, drafting=known)
    return make_problem(
        MODEL, "8xh100-sxm", random_trace(3, 40), settings=settings, overhead=load_engine("vllm"), max_devices=8
    )


@cache
def law(words: str) -> BatchLaw:
    """The law of a plan on two GPUs."""
    costs = CostModel(MODEL, problem().cluster, problem().settings, problem().overhead)
    (found,) = costs.plan_cost(parse_plan(f"tp2 {words}", MODEL)).laws
    return found


def batch_ns(words: str, sequences: int, held: int = 1000) -> int:
    """Time of a batch of decoding sequences alone, each with its drafts."""
    tokens = 1 + law(words).draft_tokens
    return law(words).batch_ns([(tokens, held)] * sequences)


def test_verifying_is_nearly_free_for_one_sequence_and_costs_as_its_tokens_in_large_batches() -> None:
    verifying = law("spec=ngram:3")
    alone, crowded = (verifying.batch_ns([(4, 1000)] * n) / verifying.batch_ns([(1, 1000)] * n) for n in (1, 500))
    assert alone < 1.1
    assert crowded > 1.5


def test_the_context_is_read_once_for_a_token_and_its_drafts() -> None:
    """On this GPU reading it takes longer than multiplying it with four queries."""
    assert np.array_equal(law("spec=ngram:3").context_rate, law("").context_rate)


def test_drafts_are_made_by_a_pass_over_all_tokens_and_one_over_each_sequence_for_every_further_one() -> None:
    """A layer beside 32 and its head: some percent of the model for each pass."""
    three, one = law("spec=eagle:3"), law("spec=eagle:1")
    verifying = law("spec=ngram:3")
    for sequences in (1, 16, 256):
        assert three.verify_ns[4 * sequences] > verifying.verify_ns[4 * sequences]
        assert three.draft_ns[sequences] > 2 * one.draft_ns[sequences] > 0
        assert 0.02 < three.draft_ns[sequences] / batch_ns("", sequences, 1) < 1
    assert not one.draft_rate.any()
    assert (three.draft_rate[1:] > 0).all()
    assert not verifying.draft_ns.any()


def test_a_draft_model_as_large_as_the_model_takes_as_long_for_each_pass() -> None:
    itself = law("spec=draft:llama-3.1-8b:3")
    assert itself.draft_ns[1] == pytest.approx(2 * batch_ns("", 1, 0), rel=0.5)


@pytest.mark.parametrize("words", WAYS)
def test_operations_of_a_run_are_the_time_it_was_busy_and_its_tokens_are_paid(words: str) -> None:
    plan = parse_plan(f"tp2 spec={words}", MODEL)
    scorer = Scorer(problem())
    cost = scorer.facts().plan_cost(plan)
    outcome = simulate(problem().settings_for(plan), 4000, cost.laws, problem().trace, log=True)
    usage = account(plan, cost, scorer.facts().costs, outcome.counts, outcome.makespan_ns)
    busy = outcome.busy_ns.sum() / 1e9
    assert sum(s for name, s in usage.operations_s.items() if name != "idle") == pytest.approx(busy, rel=1e-4)
    assert ("drafts" in usage.operations_s) is (not words.startswith("ngram"))
    assert outcome.counts.tokens == sum(tokens for _, _, rows, _ in outcome.steps or () for _, tokens, _ in rows)


def test_drafts_gain_less_the_more_sequences_there_are() -> None:
    """Tokens in a time, with 2.5 tokens a row: twice as many alone, fewer in a crowd."""
    gains = [2.5 * batch_ns("", n) / batch_ns("spec=eagle:3", n) for n in (1, 16, 64, 256, 500)]
    assert gains[0] > 1.5
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] < gains[0] / 1.5


def test_rows_without_drafts_read_the_same_tables_as_those_with_them() -> None:
    one = law("spec=eagle:3")
    changed = replace(one, verify_ns=one.verify_ns * 2)
    chunks = [(1, 50), (4, 70)]
    assert changed.batch_ns(chunks) - one.batch_ns(chunks) == one.verify_ns[5]


def test_loops_that_launch_batches_take_so_long_and_drafts_beside_a_prompt_are_launched_too() -> None:
    """All passes of the drafter on TensorRT-LLM, the first on SGLang; vLLM has a process of its own for them."""

    def launching(engine: str, words: str) -> BatchLaw:
        kind = load_kind(engine)
        settings = replace(problem().settings, scheduler=kind.scheduling(), max_num_seqs=64)
        drafter = parse_drafter(words.removeprefix("spec=")) if words else None
        settings = replace(settings, speculation=None, drafting=problem().settings.drafting if drafter else ())
        costs = CostModel(MODEL, problem().cluster, settings, load_engine(engine))
        return costs.plan_cost(parse_plan(f"tp2 {words}", MODEL)).laws[0]

    launch_ns = round(load_engine("trtllm").launch_s * 1e9)
    plain, three, one = (launching("trtllm", words).launch_ns for words in ("", "spec=mtp:3", "spec=eagle:1"))
    layer = plain // MODEL.layers // launch_ns
    assert plain == layer * MODEL.layers * launch_ns > 0
    assert three == plain + 3 * (layer + 4) * launch_ns  # its layer, norm, head, choice and what gathers logits
    assert one == plain + (three - plain) // 3
    sglang = [launching("sglang", words).launch_ns for words in ("", "spec=mtp:3", "spec=ngram:3")]
    assert sglang[0] == sglang[2] < sglang[1] < sglang[0] * (1 + 1.5 / MODEL.layers)
    assert launching("vllm", "spec=mtp:3").launch_ns == 0
