"""Shares of a GPU as text, in plans and in deployments."""

from __future__ import annotations

import pytest

from apex_opt.errors import UsageError
from apex_opt.ir import load_model
from apex_opt.plans.deployment import parse_deployment
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.shares import Shares, parse_shares

MODEL = load_model("llama-3.1-8b")


@pytest.mark.parametrize("text", ["80/100", "1/1", "pdmux", "pdmux:72/60"])
def test_a_text_and_its_shares_are_the_same(text: str) -> None:
    shares = parse_shares(text)
    assert str(shares) == text and shares.multiplexed == text.startswith("pdmux")
    plan = parse_plan(f"dp2 tp2 share={text}", MODEL)
    assert plan.shares == shares and parse_plan(str(plan), MODEL) == plan
    assert plan.cut != parse_plan("dp2 tp2", MODEL).cut


@pytest.mark.parametrize(
    "text", ["", "80", "80/", "80:100", ":80/100", "pdmux72/60", "pdmux:", "pdmux:0/0", "0/0", "a/b"]
)
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="share"):
        parse_shares(text)


@pytest.mark.parametrize(("prefill", "decode"), [(0, 50), (50, 101), (True, 50), (2.5, 50)])
def test_a_share_out_of_range_is_refused(prefill: int, decode: int) -> None:
    with pytest.raises(UsageError, match="is not a whole number from 1 to 100"):
        Shares(prefill=prefill, decode=decode)


def test_they_are_of_one_pool_alone() -> None:
    with pytest.raises(UsageError, match="of a pool that serves alone"):
        parse_deployment("prefill{tp1 share=50/50} + decode{tp1}", MODEL, ("h100-sxm-80gb",))
    with pytest.raises(UsageError, match="share is given twice"):
        parse_plan("tp1 share=50/50 share=60/60", MODEL)


def test_shares_of_too_many_digits_are_refused_with_the_limits() -> None:
    with pytest.raises(UsageError, match="per cent from 1 to 100, or multiprocessors from 1 to 999 behind pdmux"):
        parse_shares("pdmux:9999/1")
