"""Deployments and their text: what is printed is read back as it was, and what cannot be meant is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import ROWS, deployments, problem_of

from apex_opt.errors import ApexError, UnknownNameError, UsageError
from apex_opt.ir import load_model
from apex_opt.plans.deployment import Deployment, Pool, parse_deployment
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.routing import ROUTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = load_model("llama-3.1-8b")
TYPES = ("h100", "a100", "l40s")
LONG = ("h100-sxm-80gb", "h100-pcie-80gb", "a100-sxm-80gb")
WORDS = (
    "tp1",
    "dp3 tp2 fp8",
    "pp2[20,12] attn(dp2,tp2) ffn(tp4) bf16",
    "tp8 w4a16 kv=fp8 clock=1200 seqs=64 tokens=4096",
)


@pytest.mark.parametrize("place", range(len(ROWS)))
def test_the_text_of_every_deployment_of_a_problem_is_read_back_as_it_was(place: int) -> None:
    problem = problem_of(place)
    texts = set()
    for deployment in deployments(problem):
        text = str(deployment)
        found = parse_deployment(text, problem.model, problem.types)
        assert found == deployment
        assert str(found) == text
        assert text not in texts
        texts.add(text)


@settings(max_examples=25)
@given(st.permutations(TYPES), st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
def test_pools_on_any_types_are_read_back_in_the_order_of_the_types(types: list[str], words: list[str]) -> None:
    pools = tuple(Pool(plan=parse_plan(text, MODEL), gpu=name) for name, text in zip(types, words, strict=False))
    found = parse_deployment(str(Deployment(pools=pools)), MODEL, TYPES)
    # Requests are dealt in that order, so it is the same however they are given.
    assert found == Deployment(pools=tuple(sorted(pools, key=lambda pool: TYPES.index(pool.gpu or ""))))
    assert parse_deployment(str(found), MODEL, TYPES) == found
    assert found.devices == sum(pool.plan.devices for pool in pools)


@pytest.mark.parametrize("words", WORDS)
def test_the_text_of_a_plan_is_a_deployment_where_there_is_one_type(words: str) -> None:
    plan = parse_plan(words, MODEL)
    for text in (words, f"h100: {words}"):
        found = parse_deployment(text, MODEL, ("h100",))
        assert found == Deployment.of(plan)
        assert (found.plan, str(found), found.devices) == (plan, str(plan), plan.devices)


def test_a_pipeline_over_types_names_them_before_its_plan_or_in_it() -> None:
    words = "pp2 tp2 bf16 on=h100:1+a100:1"
    found = parse_deployment(f"h100 + a100: {words}", MODEL, TYPES)
    assert found == parse_deployment(words, MODEL, TYPES) == Deployment.of(parse_plan(words, MODEL))
    assert (found.pools[0].types, found.pools[0].gpu) == (("h100", "a100"), None)
    beside = parse_deployment(f"h100 + a100: {words} + l40s: tp1", MODEL, TYPES)
    assert [pool.types for pool in beside.pools] == [("h100", "a100"), ("l40s",)]
    assert parse_deployment(str(beside), MODEL, TYPES) == beside


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ("a100: tp2", "a100-sxm-80gb: tp2"),
        ("A100-SXM:tp2", "a100-sxm-80gb: tp2"),
        ("h100-pcie: tp1 + h100-sxm: tp2", "h100-pcie-80gb: tp1 + h100-sxm-80gb: tp2"),
        (
            "a100 + h100-sxm: pp2 on=a100:1+h100-sxm:1",
            "a100-sxm-80gb + h100-sxm-80gb: pp2 on=a100-sxm-80gb:1+h100-sxm-80gb:1",
        ),
        ("pp2 on=A100:1+h100-sxm:1", "pp2 on=a100-sxm-80gb:1+h100-sxm-80gb:1"),
    ],
)
def test_types_go_by_short_names_that_leave_no_doubt(short: str, whole: str) -> None:
    assert parse_deployment(short, MODEL, LONG) == parse_deployment(whole, MODEL, LONG)


def test_the_name_of_a_type_may_hold_any_sign() -> None:
    types = ("my GPU: 80 GB", "h100")
    found = parse_deployment("my GPU: 80 GB: tp1 + h100: tp2", MODEL, types)
    assert [pool.gpu for pool in found.pools] == list(types)
    assert parse_deployment(str(found), MODEL, types) == found


@pytest.mark.parametrize(
    ("text", "types", "error", "message"),
    [
        ("b200: tp1", TYPES, UnknownNameError, "type of GPU"),
        ("tp1", TYPES, UsageError, "say on which of h100, a100, l40s it runs, as in h100: tp1"),
        ("h100: tp1 + h100: tp2", TYPES, UsageError, "h100 has two pools"),
        ("h100: tp1 + h100 + a100: pp2 on=h100:1+a100:1", TYPES, UsageError, "h100 has two pools"),
        ("h100 + a100: pp2", TYPES, UsageError, "say with on= which stages are on h100 and which on a100"),
        ("a100: pp2 on=h100:1+a100:1", TYPES, UsageError, "on= puts stages on h100, a100, not on a100"),
        ("h100: tp1 + a100", TYPES, UsageError, "a100 is followed by no plan"),
        ("pp2 on=h100:1+b200:1", TYPES, UnknownNameError, "type of GPU"),
        ("pp2 on=h100:1+a100:1", ("h100",), UnknownNameError, "type of GPU"),
        ("h100: tpx", TYPES, UsageError, "tpx"),
        ("tp1 + tp2", ("h100",), UsageError, "two pools"),
        ("h100: tp1 +", TYPES, UsageError, "a + has no plan beside it; an example: h100: dp2 .* + a100: "),
        ("h100: + a100: tp1", TYPES, UsageError, "h100 has no plan beside it; an example: h100: dp2 .* + a100: "),
        ("prefill{h100: tp1} + decode{ }", TYPES, UsageError, "the decode pool has no plan; such as: prefill{"),
        ("h100 tp1 + a100 tp1", TYPES, UsageError, "weight format 'h100'; .* an example: h100: dp2 .* + a100: "),
        ("h100: tp1+a100: tp1", TYPES, UsageError, "cannot read 'tp1+a100:'; an example: h100: dp2 .* + a100: "),
        ("h100: attn(tp2)", TYPES, UsageError, "give both .* an example: h100: dp2 .* + a100: "),
        ("h100: attn(x) ffn(tp2)", TYPES, UsageError, "cannot read 'x' .* an example: h100: dp2 .* + a100: "),
        ("tp1 + tp1", TYPES, UsageError, "say on which of h100, a100, l40s it runs, as in h100: dp2 .* + a100: "),
        ("h100: tp1", LONG, UsageError, "'h100' fits h100-sxm-80gb and h100-pcie-80gb: write one of these"),
        ("a10: tp1", LONG, UnknownNameError, "type of GPU 'a10'"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    text: str, types: Sequence[str], error: type[ApexError], message: str
) -> None:
    with pytest.raises(error, match=message.replace("+", r"\+")) as refused:
        parse_deployment(text, MODEL, types)
    assert "\n" not in str(refused.value)


def test_a_deployment_without_a_pool_is_none() -> None:
    with pytest.raises(UsageError, match="at least one pool"):
        Deployment(pools=())
    two = Deployment(pools=tuple(Pool(plan=parse_plan("tp1", MODEL), gpu=name) for name in TYPES[:2]))
    with pytest.raises(ValueError, match="too many values"):
        _ = two.plan


PAIRS = (
    "prefill{attn(tp2) ffn(tp2) bf16} + decode{dp3 attn(tp1) ffn(tp1) bf16}",
    "prefill{attn(tp2) ffn(tp2) bf16} + decode{dp3 attn(tp1) ffn(tp1) bf16} route=pull",
    "prefill{dp2 attn(tp2) ffn(tp2) bf16} + decode{dp3 attn(tp1) ffn(tp1) bf16} route=pull",
    "prefill{dp2 attn(tp2) ffn(tp2) bf16} + decode{dp3 attn(tp1) ffn(tp1) bf16} route=pull/session",
    "prefill{dp2 attn(tp2) ffn(tp2) bf16} + decode{attn(tp1) ffn(tp1) bf16} route=vllm_dp",
)


@pytest.mark.parametrize("text", PAIRS)
def test_prefill_and_decode_pools_are_read_back_as_they_were(text: str) -> None:
    found = parse_deployment(text, MODEL, ("h100",))
    assert str(found) == text
    assert found.disaggregated
    assert [pool.role for pool in found.pools] == ["prefill", "decode"]
    over = parse_deployment(" prefill{ a100: tp2 }+decode{h100-sxm:tp1}", MODEL, LONG)
    assert [pool.gpu for pool in over.pools] == ["a100-sxm-80gb", "h100-sxm-80gb"]
    assert parse_deployment(str(over), MODEL, LONG) == over


@pytest.mark.parametrize(
    "text",
    [
        *("prefill{tp2}", "prefill{tp2} decode{tp2}", "decode{tp2} + prefill{tp2}", "prefill{tp2 + decode{tp2}"),
        *("prefill{tp2} + prefill{tp2}", "a{tp2} + decode{tp2}", "prefill{} + decode{tp2}", "{tp2} + {tp2}"),
        "prefill{tp2} + decode{tp2} + decode{tp2}",
    ],
)
def test_what_is_no_pair_of_pools_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_deployment(text, MODEL, ("h100",))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prefill{dp2 tp1} + decode{dp2 tp1} route=pull/pull/pull", "is not of two sides"),
        ("prefill{dp2 tp1} + decode{dp2 tp1} route=pull/", "is not of two sides"),
        ("prefill{dp2 tp1} + decode{dp2 tp1} route=pull,session", "one plan has one router for each pool"),
        ("prefill{dp2 tp1} + decode{dp2 tp1} route=vllm_dp", "name another router for the decode instances"),
        ("prefill{dp2 tp1 + decode{dp2 tp1}", "a closing brace } is missing"),
        ("prefill{dp2 tp1} + decode dp2 tp1}", "an opening brace { is missing"),
        ("dp2 tp1 route=pull/session", "is of prefill and decode instances"),
        ("tp1 route=pull/session", "is of prefill and decode instances"),
    ],
)
def test_what_does_not_go_with_a_deployment_is_refused_by_what_it_is(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_deployment(text, MODEL, ("h100",))


@pytest.mark.parametrize(("prefill", "decode"), [(2, 2), (2, 1), (1, 2), (1, 1)])
def test_every_router_of_either_side_is_read_back_from_the_text(prefill: int, decode: int) -> None:
    for one, other in itertools.product(ROUTINGS, ROUTINGS):
        if other == "vllm_dp":
            continue
        routes = (("prefill", prefill, one), ("decode", decode, other))
        pools = [
            Pool(plan=replace(parse_plan(f"dp{count} tp1", MODEL), route=name if count > 1 else None), role=role)
            for role, count, name in routes
        ]
        pair = Deployment(pools=tuple(pools))
        assert parse_deployment(str(pair), MODEL, ("h100",)) == pair
