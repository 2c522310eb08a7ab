"""Overlap as it is asked for: what is there to choose from, and what does not go with it."""

from __future__ import annotations

from typing import Any

import pytest
from cli_cases import run

from apex_opt.arguments import ExplainAsk, PlanAsk, SimulateAsk
from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.planned import resolve_plan
from apex_opt.resolve import resolve

KNOWN = {"model": "qwen3-30b-a3b", "cluster": "2xh100-sxm", "trace": "poisson:rate=4,n=20,prompt=512,output=16"}
PLAN = "attn(dp2) ffn(ep2)"


def asked(**given: Any) -> PlanAsk:
    return PlanAsk(**KNOWN | {"overlap": "none,two_batches"} | given)


def test_the_choice_is_what_is_named_and_none_by_default() -> None:
    assert resolve(PlanAsk(**KNOWN)).overlaps == (None,)
    assert resolve(asked()).overlaps == (None, "two_batches")
    assert resolve(asked(overlap="two_batches", engine="sglang")).overlaps == ("two_batches",)
    assert any("no CUDA graph" in note for note in resolve(asked()).notes)
    assert not any("two batches" in note for note in resolve(PlanAsk(**KNOWN)).notes)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (
            {"overlap": "nano"},
            UnknownNameError,
            "unknown overlap 'nano'; known: nano_batches, none, two_batches",
        ),
        ({"overlap": "none,none"}, UsageError, "names one twice"),
        ({"model": "llama-3.1-8b"}, UsageError, "llama-3.1-8b has no experts that tokens are sent to"),
        ({"engine": "trtllm"}, UsageError, "does not split a forward into two batches; use --engine=vllm or"),
        ({"engine": "orca", "runnable": "any"}, UsageError, "orca does not split a forward"),
        ({"engine": "orca"}, UsageError, "orca does not split a forward"),
        ({"engine": "static"}, UsageError, "static does not split a forward"),
        ({"engine": "trtllm", "runnable": "vllm"}, UsageError, "trtllm does not split a forward"),
        ({"runnable": "trtllm"}, UsageError, "TensorRT-LLM .* does not split a forward"),
        (
            {"cluster": "4xa100-sxm-80gb"},
            UsageError,
            "capability 9.0, a100-sxm-80gb has 8.0, and vLLM 0.20",
        ),
        ({"cluster": "4xh100-pcie"}, UsageError, "need NVLink inside a node, h100-pcie-80gb has pcie"),
        ({"cluster": "4xmi300x"}, UsageError, "run on CUDA, and mi300x-192gb does not"),
        ({"model": "mixtral-8x7b", "engine": "sglang"}, UsageError, "deepseek_v3, qwen3_moe models, not of mixtral"),
        ({"serving": "pools"}, UsageError, "add --serving=aggregated"),
        ({"cluster": "1xh100-sxm+1xh200-sxm"}, UsageError, "give a cluster of one"),
        ({"model": "gpt-oss-20b"}, UsageError, "layers of gpt-oss-20b keep different things"),
        ({"overlap": "two_batches", "speculation": "ngram:2"}, UsageError, "without drafts, .*give --speculation=none"),
        (
            {"overlap": "nano_batches"},
            UsageError,
            "vLLM 0.20 does not run .* nor does any other .*; --runnable",
        ),
        ({"overlap": "nano_batches", "engine": "sglang"}, UsageError, "of vllm, not with sglang; use --engine=vllm"),
        (
            {"overlap": "none,nano_batches", "runnable": "any", "cluster": "1xh100-sxm+1xh200-sxm"},
            UsageError,
            "--overlap=nano_batches: .*give a cluster of one",
        ),
        (
            {"overlap": "none,nano_batches", "runnable": "any", "model": "gpt-oss-20b"},
            UsageError,
            "layers of gpt-oss-20b keep different things",
        ),
    ],
)
def test_what_cannot_be_overlapped_is_refused_in_a_line(
    given: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        resolve(asked(**given))


def test_a_plan_says_what_it_overlaps_or_takes_what_all_have() -> None:
    problem, deployment = resolve_plan(f"{PLAN} overlap=two_batches", SimulateAsk(**KNOWN, plan="overlap=two_batches"))
    assert deployment.plan.overlap == "two_batches" and any("two batches" in note for note in problem.notes)
    given = {**KNOWN, "overlap": "two_batches", "plan": PLAN}
    assert resolve_plan(PLAN, SimulateAsk(**given))[1].plan.overlap == "two_batches"
    assert resolve_plan(f"{PLAN} overlap=none", SimulateAsk(**given))[1].plan.overlap is None
    given["overlap"] = "none,two_batches"
    assert resolve_plan(PLAN, SimulateAsk(**given))[1].plan.overlap is None


def test_drafts_and_overlap_go_together_where_one_of_them_may_be_left_out() -> None:
    for overlap, speculation in (("none,two_batches", "ngram:2"), ("two_batches", "none,ngram:2")):
        assert "two_batches" in resolve(asked(overlap=overlap, speculation=speculation)).overlaps
    given = {**KNOWN, "overlap": "two_batches", "speculation": "ngram:2"}
    plan = f"{PLAN} spec=none"
    assert resolve_plan(plan, SimulateAsk(**given, plan=plan))[1].plan.overlap == "two_batches"
    with pytest.raises(UsageError, match="it is modelled without drafts"):
        resolve_plan(PLAN, SimulateAsk(**given, plan=PLAN))


def test_a_plan_whose_overlap_is_not_known_is_told_of_none_as_well() -> None:
    with pytest.raises(UnknownNameError, match="unknown overlap 'tbo'; known: nano_batches, none, two_batches"):
        resolve_plan(f"{PLAN} overlap=tbo", SimulateAsk(**KNOWN, plan=PLAN))


def test_what_a_plan_says_of_overlap_counts_whatever_the_option_says() -> None:
    given = {**KNOWN, "overlap": "none", "plan": f"{PLAN} overlap=two_batches"}
    assert resolve_plan(given["plan"], SimulateAsk(**given))[1].plan.overlap == "two_batches"


def test_pools_and_shares_split_no_forward_and_are_asked_for_beside_none_alone() -> None:
    for serving in ("aggregated,pools", "aggregated,shared"):
        with pytest.raises(UsageError, match="which do not; leave these out, or add none to --overlap"):
            resolve(asked(serving=serving, overlap="two_batches", runnable="any"))
        assert resolve(asked(serving=serving, runnable="any")).overlaps == (None, "two_batches")
    with pytest.raises(
        UsageError, match="overlap=two_batches is of replicas whose batches hold both phases, and pools"
    ):
        resolve_plan("", SimulateAsk(**KNOWN, plan="prefill{tp1} + decode{tp1 overlap=two_batches}"))
    pools = "prefill{tp1 bf16} + decode{tp1 bf16}"
    given = {**KNOWN, "overlap": "none,two_batches", "serving": "aggregated,pools", "plan": pools}
    problem, deployment = resolve_plan(pools, SimulateAsk(**given))
    assert problem.overlaps == (None,) and deployment.disaggregated
    assert resolve(ExplainAsk(**given)).overlaps == (None, "two_batches")


def test_a_plan_that_overlaps_is_explained_beside_those_that_do() -> None:
    ask = ExplainAsk(**KNOWN, plan=f"{PLAN} overlap=two_batches")
    assert resolve(ask).overlaps == (None, "two_batches")


def test_nano_batches_are_asked_for_where_no_engine_need_run_them() -> None:
    problem = resolve(asked(overlap="none,nano_batches", runnable="any", model="llama-3.1-8b"))
    assert problem.overlaps == (None, "nano_batches")
    assert any("published: NanoFlow" in note and "no engine here runs them" in note for note in problem.notes)
    ask = ExplainAsk(**KNOWN, runnable="any", plan="attn(tp2) ffn(tp2) overlap=nano_batches")
    assert resolve(ask).overlaps == (None, "nano_batches")
    words = [f"--{name}={value}" for name, value in (KNOWN | {"model": "llama-3.1-8b"}).items()]
    ran = run("simulate", *words, "--runnable=any", "--plan=tp2 overlap=nano_batches", "--emit", "--sources")
    assert ran.code == 0 and "68.5% of what arithmetic alone allows" in " ".join(ran.out.split())
    assert "no command: vLLM 0.20 cannot run this plan" in " ".join(ran.out.split())


def test_the_command_line_searches_it_and_says_why_a_plan_cannot() -> None:
    words = [f"--{name}={value}" for name, value in KNOWN.items()]
    ran = run("plan", *words, "--overlap=two_batches", "--top=1")
    assert ran.code == 0 and "overlap=two_batches on 2 GPUs" in ran.out
    ran = run("simulate", *words, "--plan=tp2 overlap=two_batches")
    assert ran.code == 3 and "copies, the plan has one" in ran.out
    ran = run("plan", *words, "--overlap=tow_batches")
    assert ran.code == 2 and ran.err.count("\n") == 1


def test_a_format_that_no_split_forward_sends_to_is_told_as_what_is_missing() -> None:
    words = [f"--{name}={value}" for name, value in KNOWN.items()]
    ran = run("plan", *words, "--overlap=two_batches", "--engine=sglang", "--weights=w4a16")
    assert ran.code == 3 and "experts in bf16, fp8 there, not in w4a16" in " ".join(ran.out.split())
