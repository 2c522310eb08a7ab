"""What a hand-over takes, worked out by hand, and which pools can read from which."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apex_opt.cluster.types import Link
from apex_opt.cost.handover import handover, hands_over, shared_heads
from apex_opt.engines import load_kind
from apex_opt.engines.handover import HandoverTimes
from apex_opt.ir import load_model
from apex_opt.plans.plan import parse_plan

TIMES = HandoverTimes(proxy_us=300, notice_us=20, post_us=50, descriptor_us=2, rate_share=0.5)
DENSE, LATENT = load_model("llama-3.1-8b"), load_model("deepseek-v3")  # 32 layers of 8 KV heads; 61 latent ones
LINK = Link(kind="infiniband", bytes_per_s=1e9, latency_s=3e-6)


@pytest.mark.parametrize(
    ("prefill", "decode", "block_ns"),
    [
        ("tp2", "tp2", 64 * 2_000 + 2_000),  # a descriptor of keys and one of values for each layer, and 1,000 B
        ("tp2", "tp8", 64 * 2_000 + 4 * 2_000),  # four readers share the link of a prefill rank
        ("tp8", "tp2", 4 * 64 * 2_000 + 2_000),  # read from four ranks, each with descriptors of its own
    ],
)
def test_a_block_takes_its_descriptors_and_its_bytes_at_the_share_of_the_link(
    prefill: str, decode: str, block_ns: int
) -> None:
    plans = (parse_plan(text, DENSE) for text in (prefill, decode))
    found = handover(TIMES, DENSE, *plans, 1000, LINK)
    assert (found.proxy_ns, found.read_ns, found.notice_ns) == (300_000, 53_000, 20_000)
    assert found.block_ns == block_ns
    assert found.in_turn


def test_blocks_that_lie_beside_each_other_are_one_piece_of_each_layer() -> None:
    plans = (parse_plan(text, DENSE) for text in ("tp2", "tp2"))
    found = handover(TIMES, DENSE, *plans, 1000, LINK, joined=True)
    assert (found.read_ns, found.block_ns) == (53_000 + 64 * 2_000, 2_000)


def test_a_latent_cache_is_one_piece_a_layer_read_from_one_rank() -> None:
    plans = (parse_plan(text, LATENT) for text in ("tp8", "tp4"))
    assert shared_heads(LATENT) is None
    assert handover(TIMES, LATENT, *plans, 1000, LINK).block_ns == 61 * 2_000 + 2_000


def test_published_times_give_the_read_that_was_published() -> None:
    kind = load_kind("vllm")
    times = kind.handing_over()
    # RFC 50913: 167 MB in 1,785 descriptors took 38.7 ms; a NIC of 50 GB/s is assumed.
    seconds = times.post_us * 1e-6 + 1785 * times.descriptor_us * 1e-6 + 167e6 / (50e9 * times.rate_share)
    assert seconds == pytest.approx(38.7e-3, rel=0.01)
    assert {name.split()[0].rstrip(",:") for name in (one.source for one in kind.handover.values())} == {
        "assumed",
        "published",
    }


@pytest.mark.parametrize(
    ("prefill", "decode", "able"),
    [("tp2", "tp4", True), ("tp8", "tp2", True), ("tp16", "tp8", False), ("tp16", "tp16", True), ("tp4", "tp6", False)],
)
def test_ranks_divide_each_other_and_copies_of_heads_are_read_by_no_fewer_ranks(
    prefill: str, decode: str, able: bool
) -> None:
    assert hands_over(DENSE, parse_plan(prefill, DENSE), parse_plan(decode, DENSE)) == able


def test_pools_keep_weights_and_cache_in_the_same_formats() -> None:
    plan = parse_plan("tp2", DENSE)
    for other in (replace(plan, weight_format="fp8"), replace(plan, kv_format="fp8")):
        assert hands_over(DENSE, plan, plan)
        assert not hands_over(DENSE, plan, other)
