"""What it takes to move a request between replicas, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apex_opt.cluster.types import Link
from apex_opt.cost.moving import moving
from apex_opt.engines.handover import HandoverTimes
from apex_opt.ir import load_model
from apex_opt.plans.memory import StageMemory
from apex_opt.plans.plan import parse_plan
from apex_opt.simulator.rescheduling import Rescheduling

TIMES = HandoverTimes(proxy_us=300, notice_us=20, post_us=50, descriptor_us=2, rate_share=0.5)
MODEL = load_model("llama-3.1-8b")  # 32 layers, keys and values apart
LINK = Link(kind="infiniband", bytes_per_s=1e9, latency_s=3e-6)
STAGE = StageMemory(
    weights_bytes=0, workspace_bytes=0, runtime_bytes=0, usable_bytes=0, kv_block_bytes=1000, kv_blocks=10
)


@pytest.mark.parametrize(
    ("plan", "blocks", "block_ns"),
    [
        ("dp2 tp4", [1000], 64 * 2_000 + 2_000),  # a descriptor of keys and one of values for each layer, and 1,000 B
        ("dp2 pp2 tp1", [1000, 1000], 32 * 2_000 + 2_000),  # each stage moves its own layers, at the same time
        ("dp2 pp2[20,12] tp1", [1250, 750], 40 * 2_000 + 2_500),  # the larger stage takes longest
    ],
)
def test_a_block_takes_the_pieces_and_bytes_of_a_rank_of_the_largest_stage(
    plan: str, blocks: list[int], block_ns: int
) -> None:
    memory = [replace(STAGE, kv_block_bytes=size) for size in blocks]
    found = moving(Rescheduling(headroom=7), TIMES, MODEL, parse_plan(plan, MODEL), memory, LINK)
    assert found == Rescheduling(headroom=7, block_ns=block_ns, stop_ns=53_000)
