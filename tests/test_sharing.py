"""Shares of a GPU as they are asked for: what is there to choose from, and what does not go with them."""

from __future__ import annotations

from typing import Any

import pytest
from cli_cases import run

from apex_opt.arguments import ExplainAsk, PlanAsk, Setup, SimulateAsk
from apex_opt.errors import UsageError
from apex_opt.planned import resolve_deployed, resolve_plan
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.shares import parse_shares
from apex_opt.resolve import resolve
from apex_opt.sharing import fitted

TRACE = "poisson:rate=4,n=20,prompt=512,output=16"


def asked(**given: Any) -> PlanAsk:
    known = {"model": "llama-3.1-8b", "cluster": "2xh100-sxm", "trace": TRACE, "serving": "aggregated,shared"}
    return PlanAsk(**known | given)


def names(**given: Any) -> list[str]:
    return [str(shares) for shares in resolve(asked(**given)).shares]


def test_the_choice_is_what_can_be_started_and_with_any_more() -> None:
    assert names(engine="sglang") == ["None", "pdmux"]
    assert names(engine="sglang", serving="shared", shares="pdmux:72/60,pdmux") == ["pdmux:72/60", "pdmux"]
    assert names(runnable="any") == ["None", "50/50", "60/60", "80/100", "100/100"]
    assert names(runnable="any", engine="sglang")[-2:] == ["100/100", "pdmux"]
    assert names(runnable="any", engine="sglang", cluster="2xb200")[-1] == "100/100"
    assert names(serving="aggregated") == ["None"]


def test_a_batch_takes_the_longest_prompt_whole_where_they_are_multiplexed() -> None:
    assert resolve(asked(engine="sglang")).settings.max_model_len == 528
    problem, deployment = resolve_plan("share=pdmux", simulated(engine="sglang"))
    settings = problem.settings_for(deployment.plan)
    assert not settings.chunked_prefill and settings.max_num_batched_tokens >= settings.max_model_len
    assert resolve(asked(runnable="any")).settings.max_model_len == 131_072


def test_requests_longer_than_any_batch_are_refused() -> None:
    ask, settings = asked(max_model_len=300_000), EngineSettings(max_model_len=300_000)
    trace, shares = resolve(asked(engine="sglang")).trace, (parse_shares("pdmux"),)
    with pytest.raises(UsageError, match="requests have up to 300000"):
        fitted(ask, settings, trace, shares)
    assert fitted(ask, settings, trace, (parse_shares("50/50"),)) == settings


def simulated(**given: Any) -> SimulateAsk:
    return SimulateAsk(
        **{"model": "llama-3.1-8b", "cluster": "1xh100-sxm", "trace": TRACE, "plan": "share=pdmux"} | given
    )


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "vLLM 0.20 does not compute prompts and answers side by side"),
        ({"engine": "trtllm", "runnable": "any"}, "by the rules of vllm or sglang"),
        ({"engine": "sglang", "shares": "50/50"}, "no shares but those of its multiplexing"),
        ({"engine": "sglang", "engine_settings": "scheduler_recv_interval=2"}, "scheduler_recv_interval is not"),
        ({"runnable": "any", "shares": "pdmux"}, "multiplexing is SGLang's"),
        ({"runnable": "any", "shares": "50/50,50/50"}, "names one twice"),
        ({"runnable": "any", "serving": "aggregated", "shares": "50/50"}, "--shares is of phases side by side"),
        ({"engine": "sglang", "shares": "pdmux:70/62"}, "a multiple of 8"),
        ({"engine": "sglang", "cluster": "2xb200"}, "compute capability 7 to 9"),
        ({"runnable": "any", "cluster": "1xh100-sxm+1xa100-sxm-80gb"}, "GPUs of one type"),
        ({"runnable": "any", "model": "gpt-oss-20b"}, "keep different things"),
        ({"runnable": "any", "routing": "least_loaded"}, "without --routing"),
        ({"runnable": "any", "prefix_caching": True}, "without --prefix_caching"),
        ({"runnable": "any", "speculation": "ngram:3"}, "without --speculation"),
        ({"runnable": "any", "trace": "closed:concurrency=2,n=8,prompt=64,output=8"}, "not with a closed loop"),
        ({"runnable": "any", "trace": f"{TRACE},turns=2,delay_ms=50"}, "leave delay_ms out"),
    ],
)
def test_what_does_not_go_with_them_is_told_in_a_line(given: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        resolve(asked(**given))


def test_requests_do_not_move_between_replicas_whose_phases_share_gpus() -> None:
    with pytest.raises(UsageError, match="rescheduling"):
        resolve_plan("dp2 share=pdmux", simulated(engine="sglang", cluster="2xh100-sxm", rescheduling="llumnix"))


def test_measured_runs_are_not_of_phases_side_by_side() -> None:
    with pytest.raises(UsageError, match="held against batches of both"):
        resolve_deployed(Setup(model="llama-3.1-8b", cluster="1xh100-sxm", engine="sglang"), "share=pdmux")


def test_a_plan_with_shares_that_no_search_chooses_from_is_told_so_with_the_way_out() -> None:
    told = [note for note in resolve(simulated(engine="sglang", plan="share=pdmux:72/60")).notes if "pdmux:" in note]
    (said,) = told
    assert "plan searches pdmux, and its best is the best of these; with --shares=pdmux,pdmux:72/60 it" in said
    for given in ({"plan": "share=pdmux"}, {"plan": "share=pdmux:72/60", "shares": "pdmux:72/60"}):
        assert not any("plan searches" in note for note in resolve(simulated(engine="sglang", **given)).notes)
    assert not any("plan searches" in note for note in resolve(asked(engine="sglang")).notes)


def test_an_explained_plan_is_compared_with_the_shares_of_a_search_and_its_own() -> None:
    setup = {"model": "llama-3.1-8b", "cluster": "1xh100-sxm", "trace": TRACE, "engine": "sglang"}
    problem = resolve(ExplainAsk(**setup, plan="share=pdmux:72/60"))  # type: ignore[arg-type]
    assert [str(one) for one in problem.shares] == ["None", "pdmux", "pdmux:72/60"]
    assert any("with --shares=pdmux,pdmux:72/60" in note for note in problem.notes)


def test_certificates_say_over_which_shares_they_are_and_explanations_how_to_ask_again() -> None:
    words = ("--model=llama-3.1-8b", "--cluster=1xh100-sxm", f"--trace={TRACE}", "--engine=sglang")
    printed = " ".join(run("plan", *words, "--serving=aggregated,shared").out.split())
    assert "every plan is accounted for, gap 0.0%; shares searched: pdmux." in printed
    assert "shares searched" not in run("plan", *words).out
    printed = " ".join(run("explain", *words, "--plan=share=pdmux:72/60").out.split())
    assert "the same options, --serving=aggregated,shared and --shares=pdmux,pdmux:72/60 has the figures" in printed
