"""apex_opt.cost.states: recurrences and convolutions, counted by hand, and what they do not depend on."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from plan_cases import OVERHEAD, SMALL, make_cluster

from apex_opt.cluster import load_cluster
from apex_opt.cost.model import CostModel
from apex_opt.cost.states import state_parts
from apex_opt.cost.tables import Tables
from apex_opt.ir.cells.operations import Convolve, Recur, Stateful
from apex_opt.ir.registry import load_model
from apex_opt.plans.plan import parse_plan
from apex_opt.profiles import Profile, load_profile
from apex_opt.profiles.physics import convolution_work, recurrence_work

MODELS = Path(__file__).parent / "cases" / "models"
GPU = load_cluster("1xh100-sxm").gpu
MOST = 2048
DELTA = Recur("gated_delta", heads=32, key=128, value=128, key_heads=16)
"""Of a layer of Qwen3-Next."""
KINDS: tuple[Stateful, ...] = (
    DELTA,
    DELTA._replace(kind="kda"),
    Recur("mamba2", heads=128, key=128, value=64, key_heads=8, chunk=256),
    Recur("mamba1", heads=8192, key=16, value=1, key_heads=1),
    Recur("lightning", heads=64, key=128, value=128, key_heads=64, chunk=256),
    Convolve(8192, 4),
)


@cache
def profile() -> Profile:
    return load_profile(GPU)


def tables(drafts: int = 0) -> Tables:
    entries = np.arange(MOST + 1, dtype=np.int64)
    return Tables(entries, entries[:257], entries[:257], drafts, entries if drafts else None)


def test_a_step_of_a_delta_rule_reads_and_writes_its_state_by_hand() -> None:
    work = recurrence_work(*DELTA)
    size = 32 * 128 * 128
    assert work.state_bytes == 4 * size
    # Decay; what the key finds; its correction written; what the query reads.
    assert work.step_flops == (1 + 2 + 2 + 2) * size
    # Query and key of 16 heads, value and output of 32, a gate of 32 bits for each head.
    assert work.token_bytes == 2 * (2 * 16 * 128 + 2 * 32 * 128) + 4 * 32
    flops, moved = work.of_step(3)
    assert flops == 3 * work.step_flops
    assert moved == 3 * (2 * 4 * size + work.token_bytes)
    # A state is kept after each of two drafts: read once, written three times.
    assert work.of_step(1, 3)[1] == 4 * 4 * size + 3 * work.token_bytes


def test_prompts_of_a_delta_rule_multiply_within_chunks_and_hand_on_a_state_by_hand() -> None:
    work = recurrence_work(*DELTA)
    # Per token and head, within a chunk of 64: q k', k k', w (128 wide each), u and the output (128 wide each).
    within = 2 * 64 * (3 * 128 + 2 * 128)
    assert work.token_flops == 32 * (within + 3 * 2 * 128 * 128)
    flops, moved = work.of_prompt(1000)
    assert flops == 1000 * work.token_flops
    assert moved == 2 * work.state_bytes + 1000 * work.token_bytes


def test_the_other_kinds_by_hand() -> None:
    mamba2 = recurrence_work("mamba2", 128, 128, 64, 8, 4.0, 256)
    assert mamba2.step_flops == 5 * 128 * 128 * 64
    assert mamba2.token_flops == 128 * (2 * 256 * (128 + 64) + 2 * 2 * 128 * 64)
    assert mamba2.token_bytes == 2 * (2 * 8 * 128 + 2 * 128 * 64) + 4 * 128
    mamba1 = recurrence_work("mamba1", 8192, 16, 1, 1, 4.0)
    assert mamba1.token_flops == mamba1.step_flops == 5 * 8192 * 16
    kda = recurrence_work("kda", 32, 128, 128, 32, 4.0)
    assert kda.token_bytes == 2 * 4 * 32 * 128 + 4 * 32 * 128  # a gate for every element of the keys
    short = convolution_work(8192, 4)
    assert (short.step_flops, short.token_bytes, short.state_bytes) == (2 * 4 * 8192, 4 * 8192, 2 * 3 * 8192)


@pytest.mark.parametrize("op", KINDS, ids=lambda op: getattr(op, "kind", "convolution"))
def test_states_cost_the_same_whatever_the_context_and_never_less_for_more(op: Stateful) -> None:
    parts = state_parts(profile(), tables(), op, 1)
    assert {table for _, table in parts} == {"decode_ns", "attend_ns", "chunk_ns"}  # nothing by context or pairs
    for (_, table), work in parts.items():
        assert work.seconds[0] == 0 or table == "attend_ns"
        assert (np.diff(work.seconds[1:]) >= -0.02 * work.seconds[1:-1]).all(), table
        assert (work.joules >= 0).all()
        peak = np.maximum(work.flops / GPU.peak_flops_per_s("bf16"), work.moved / GPU.memory_bytes_per_s)
        assert table == "chunk_ns" or (work.seconds[1:] >= 0.999 * peak[1:]).all()
        assert (np.diff(work.flops) >= 0).all()


def test_batches_of_prompts_launch_once_and_chunks_together_do_the_work_of_the_prompt() -> None:
    parts = state_parts(profile(), tables(), DELTA, 1)
    step, beside, chunk = (parts["recurrence", table] for table in ("decode_ns", "attend_ns", "chunk_ns"))
    assert beside.seconds[0] > 0
    assert np.allclose(beside.seconds[1:] - step.seconds[1:], beside.seconds[0] - step.seconds[0])
    # Two halves take the tokens of the whole, and the state once more.
    halves, whole = 2 * chunk.moved[1024], chunk.moved[2048]
    assert halves - whole == 2 * 4 * 32 * 128 * 128
    assert 2 * chunk.flops[1024] == chunk.flops[2048]


def test_shards_and_copies_share_the_work() -> None:
    whole, half = (state_parts(profile(), tables(), op, 1) for op in (DELTA, DELTA._replace(heads=16, key_heads=8)))
    copies = state_parts(profile(), tables(), DELTA, 2)
    for table in ("decode_ns", "chunk_ns"):
        assert np.allclose(2 * half["recurrence", table].moved, whole["recurrence", table].moved)
    step, part = whole["recurrence", "decode_ns"].seconds, half["recurrence", "decode_ns"].seconds
    assert (part[64:] < 0.7 * step[64:]).all()
    assert np.allclose(2 * copies["recurrence", "decode_ns"].moved, whole["recurrence", "decode_ns"].moved)
    assert copies["recurrence", "decode_ns"].seconds[256] == whole["recurrence", "decode_ns"].seconds[128]


def test_drafts_keep_a_state_each() -> None:
    alone, drafted = (state_parts(profile(), tables(drafts), DELTA, 1)["recurrence", "decode_ns"] for drafts in (0, 2))
    assert drafted.moved[100] / alone.moved[100] == pytest.approx(2.0, rel=0.02)
    assert drafted.flops[100] == 3 * alone.flops[100]


def test_what_is_measured_says_so_and_what_stands_in_for_another_kind_too() -> None:
    fresh = load_profile(GPU)
    for op in KINDS:
        state_parts(fresh, tables(), op, 1)
    told = fresh.provenance
    assert told["gated_delta decode"].startswith("measured (profiles/h100-sxm/vllm")
    assert told["kda decode"].startswith("derived: between the measured shapes of profiles/h100-sxm") or told[
        "kda decode"
    ].startswith("derived: roofline")
    assert "gated_delta efficiencies" in told["lightning prefill"]


def test_a_model_of_states_alone_takes_the_same_after_ten_tokens_and_after_a_hundred_thousand() -> None:
    model = load_model(str(MODELS / "mamba-codestral-7b.json"))
    (law,) = CostModel(model, make_cluster(1), SMALL, OVERHEAD).plan_cost(parse_plan("tp1", model)).laws
    for batch in ([1], [1, 1], [8], [8, 1]):
        soon, late = (law.batch_ns([(tokens, held + tokens) for tokens in batch]) for held in (10, 100_000))
        assert soon == late > 0
    # A hybrid's attention grows with the context, in the layers that have it.
    mixed = load_model(str(MODELS / "qwen3-next-80b-a3b.json"))
    (law,) = CostModel(mixed, make_cluster(4), SMALL, OVERHEAD).plan_cost(parse_plan("tp4", mixed)).laws
    assert law.batch_ns([(1, 100_000)]) > law.batch_ns([(1, 10)])
