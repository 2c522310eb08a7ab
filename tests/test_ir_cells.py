"""Kinds of cells: what they list of themselves, against sums done by hand and against each other."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from itertools import product
from math import gcd
from pathlib import Path
from typing import Any

import pytest
from cell_cases import CELLS
from plan_cases import OVERHEAD, SMALL, instance_at, make_cluster, make_gpu, make_model

from apex_opt.cost import CostModel
from apex_opt.errors import InputError
from apex_opt.ir import (
    Attention,
    AttentionCell,
    Block,
    Cell,
    DenseFfn,
    LatentAttention,
    MoeFfn,
    list_models,
    read_config,
)
from apex_opt.ir.cells import (
    WHOLE,
    CrossedAttention,
    Cut,
    GatedAttention,
    GatedDelta,
    GatedLatentAttention,
    Kept,
    KimiDelta,
    LatentMoeFfn,
    LightningAttention,
    Mamba1,
    Mamba2,
    Matrix,
    Op,
    Piece,
    Replaced,
    SharedAttention,
    ShortConvolution,
    Skipped,
    TwinMoeFfn,
    stored_bytes,
)
from apex_opt.ir.cells.operations import Elementwise, Experts, Product
from apex_opt.oracle.checks import violations
from apex_opt.oracle.space import space
from apex_opt.plans.memory import stage_memory
from apex_opt.plans.plan import parse_plan
from formulations.plan_space import PlanSpace

ATTENTION = Attention(hidden=10, query_heads=6, kv_heads=2, head_dim=4)
LATENT = LatentAttention(
    hidden=10, query_heads=6, q_lora_rank=5, kv_lora_rank=3, nope_head_dim=4, rope_head_dim=2, v_head_dim=7
)
DENSE = DenseFfn(hidden=10, intermediate=7)
MOE = MoeFfn(hidden=10, expert_intermediate=3, experts=5, experts_per_token=2)


def covered(cell: Cell) -> int:
    """Weights that a number format may quantise."""
    return sum(matrix.weights for matrix in cell.matrices() if matrix.quantised)


def test_attention_is_sized_by_its_heads_not_by_hidden() -> None:
    assert [(m.name, m.rows, m.columns, m.times) for m in ATTENTION.matrices()] == [
        ("queries", 24, 10, 1),
        ("keys", 8, 10, 2),
        ("output", 10, 24, 1),
    ]
    assert ATTENTION.parameters == 10 * 24 + 2 * 10 * 8 + 24 * 10
    assert ATTENTION.cache() == (Kept(16, None),)
    assert replace(ATTENTION, window=5).cache(Cut(heads=3)) == (Kept(8, 5),)


def test_attention_counts_each_optional_part() -> None:
    base = ATTENTION.parameters
    assert replace(ATTENTION, qkv_bias=True).parameters == base + 24 + 8 + 8
    assert replace(ATTENTION, output_bias=True).parameters == base + 10
    assert replace(ATTENTION, qk_norm=True).parameters == base + 2 * 4
    assert replace(ATTENTION, qk_norm=True, qk_norm_whole=True).parameters == base + 24 + 8
    assert replace(ATTENTION, sinks=True).parameters == base + 6
    assert covered(replace(ATTENTION, window=5, qkv_bias=True, qk_norm=True, sinks=True)) == base


def test_latent_attention_is_the_sum_of_its_checkpoint_tensors() -> None:
    q_a, q_b, kv_a, kv_b, output = 10 * 5, 5 * 6 * (4 + 2), 10 * (3 + 2), 3 * 6 * (4 + 7), 6 * 7 * 10
    norms = 5 + 3
    assert covered(LATENT) == q_a + q_b + kv_a + kv_b + output
    assert LATENT.parameters == LATENT.active_parameters == covered(LATENT) + norms
    direct = replace(LATENT, q_lora_rank=None)
    assert direct.parameters == 10 * 6 * (4 + 2) + kv_a + kv_b + output + 3


def test_latent_attention_caches_one_vector_that_all_heads_share() -> None:
    assert LATENT.cache() == LATENT.cache(Cut(heads=6)) == (Kept(3 + 2, None),)
    assert (LATENT.kv_heads, LATENT.qk_head_dim, LATENT.window) == (1, 6, None)


def test_what_a_checkpoint_leaves_out_is_counted_but_not_quantised() -> None:
    for cell in (ATTENTION, LATENT, DENSE, MOE):
        assert replace(cell, quantised=0).parameters == cell.parameters
        assert replace(cell, quantised=0).active_parameters == cell.active_parameters
    assert covered(replace(ATTENTION, quantised=0)) == 24 * 10
    assert covered(replace(ATTENTION, output_quantised=0)) == 10 * (24 + 8 + 8)
    assert covered(replace(DENSE, quantised=0)) == 70
    assert covered(replace(DENSE, down_quantised=0)) == 2 * 70
    output = 6 * 7 * 10
    assert covered(replace(LATENT, quantised=0)) == output
    assert covered(replace(LATENT, output_quantised=0)) == covered(LATENT) - output
    shared = replace(MOE, shared_intermediate=4)
    assert covered(replace(shared, quantised=0)) == 3 * 10 * 4
    assert covered(replace(shared, shared_quantised=0)) == covered(MOE) + 10 * 4
    assert covered(replace(shared, shared_down_quantised=0)) == covered(MOE) + 2 * 10 * 4


def test_dense_ffn_counts_gate_and_biases() -> None:
    assert DENSE.parameters == 3 * 70
    assert replace(DENSE, gated=False).parameters == 2 * 70
    assert replace(DENSE, bias=True).parameters == 3 * 70 + 7 + 7 + 10
    assert replace(DENSE, gated=False, bias=True).parameters == 2 * 70 + 7 + 10


def test_moe_ffn_counts_all_experts_but_activates_a_few() -> None:
    assert MOE.parameters == 5 * 90 + 50
    assert MOE.active_parameters == 2 * 90 + 50
    assert covered(MOE) == 5 * 90


def test_moe_counts_the_biases_of_experts_and_router() -> None:
    assert replace(MOE, bias=True).parameters == MOE.parameters + 5 * (3 + 3 + 10)
    assert replace(MOE, bias=True).active_parameters == MOE.active_parameters + 2 * (3 + 3 + 10)
    assert replace(MOE, router_bias=True).active_parameters == MOE.active_parameters + 5
    assert covered(replace(MOE, bias=True, router_bias=True)) == covered(MOE)


def test_moe_shared_expert_is_always_active() -> None:
    shared = replace(MOE, shared_intermediate=4, shared_gate=True)
    assert shared.parameters == MOE.parameters + 3 * 10 * 4 + 10
    assert shared.active_parameters == MOE.active_parameters + 3 * 10 * 4 + 10


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"hidden": 0}, "hidden must be a whole number from 1 to 2147483648, not 0"),
        ({"hidden": -3}, "not -3"),
        ({"query_heads": True}, "query_heads must be a whole number .* not true"),
        ({"head_dim": 4.0}, "head_dim must be a whole number .* not 4.0"),
        ({"head_dim": float("nan")}, "head_dim must be a whole number .* not nan"),
        ({"kv_heads": 4}, "query_heads 6 is not a multiple of kv_heads 4"),
        ({"window": 0}, "window must be a whole number from 1"),
        ({"hidden": 10**6000}, "not a number of thousands of digits"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false, not 1"),
        ({"hidden": 0, "head_dim": -1}, "hidden must .*; head_dim must"),
    ],
)
def test_attention_refuses(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        replace(ATTENTION, **bad)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"q_lora_rank": 0}, "latent attention: q_lora_rank must be a whole number from 1"),
        ({"kv_lora_rank": None}, "kv_lora_rank must be a whole number from 1 to 2147483648, not null"),
        ({"rope_head_dim": 0, "v_head_dim": -1}, "rope_head_dim must .*; v_head_dim must"),
        ({"output_quantised": -1}, "output_quantised must be a whole number from 0 to 13, not -1"),
    ],
)
def test_latent_attention_refuses(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        replace(LATENT, **bad)


def test_norms_over_all_heads_need_norms() -> None:
    with pytest.raises(InputError, match="qk_norm_whole and qk_norm_each need qk_norm"):
        replace(ATTENTION, qk_norm_whole=True)


def test_ffns_refuse_what_they_cannot_be() -> None:
    with pytest.raises(InputError, match="intermediate must be a whole number"):
        replace(DENSE, intermediate=2**31 + 1)
    with pytest.raises(InputError, match="gated must be true or false"):
        replace(DENSE, gated=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="experts_per_token 6 is above experts 5"):
        replace(MOE, experts_per_token=6)
    with pytest.raises(InputError, match="shared_intermediate must be a whole number from 0"):
        replace(MOE, shared_intermediate=-1)
    with pytest.raises(InputError, match="shared_gate needs a shared_intermediate"):
        replace(MOE, shared_gate=True)


def every_kind() -> list[Cell]:
    """Cells of all models that can be named, of hybrid ones, and small ones of other kinds, each once."""
    cases = Path(__file__).parent / "cases"
    hybrid = tomllib.loads((cases / "published" / "hybrid.toml").read_text())
    models = (*list_models(), *(read_config(cases / "models" / f"{name}.json") for name in hybrid))
    own = dict.fromkeys(cell for model in models for run in model.runs for cell in run.block.cells)
    return [*own, *CELLS]


def test_shards_that_divide_share_the_cut_matrices_and_hold_the_others_whole() -> None:
    for cell in every_kind():
        for heads, groups, columns in product((1, 2, 4, 8), (1, 2, 8), (1, 2, 4)):
            # More shards than KV heads hold copies.
            copied = (piece.size for piece in cell.pieces if piece.copied)
            whole_heads = gcd(heads, *copied) if isinstance(cell, AttentionCell) else gcd(heads, 8)
            cut = Cut(heads=whole_heads, columns=groups * columns, experts=groups, expert_columns=columns)
            for whole, mine in zip(cell.matrices(), cell.matrices(cut), strict=True):
                size, cut_size = (whole.columns, mine.columns) if whole.inputs else (whole.rows, mine.rows)
                shards = getattr(cut, whole.cut) if whole.cut else 1
                if size % shards == 0:
                    assert cut_size * shards == size, (cell, whole)
                    other = (whole.rows, mine.rows) if whole.inputs else (whole.columns, mine.columns)
                    assert other[0] == other[1]
                assert mine.times == whole.times // (groups if "expert" in whole.name else 1)


def test_products_multiply_with_the_matrices_that_a_shard_holds() -> None:
    for cell in every_kind():
        for cut in (WHOLE, Cut(heads=4, columns=4, experts=2, expert_columns=2)):
            # What lies in an earlier layer is multiplied with all the same.
            lying = replace(cell, again=False) if isinstance(cell, SharedAttention) else cell
            held = sum(m.weights for m in lying.matrices(cut) if m.quantised is not None or m.name == "router")
            multiplied = 0
            for op in cell.operations(cut, 2):
                if isinstance(op, Product):
                    multiplied += op.n * op.k
                elif isinstance(op, Experts):
                    multiplied += op.matrices * op.hidden * op.columns * -(-op.experts // op.groups)
            if isinstance(cell, CrossedAttention):  # keys and values are made once, by the encoder
                held -= sum(m.weights for m in cell.matrices(cut) if m.name == "cross keys")
            # What scales the shared expert goes with the router's product.
            gate = cell.hidden if isinstance(cell, MoeFfn) and cell.shared_gate else 0
            assert multiplied + gate == held, cell


def test_one_token_touches_a_share_of_its_experts_in_some_group_and_all_else() -> None:
    shared = replace(MOE, experts=8, experts_per_token=3, shared_intermediate=4, bias=True)
    for groups, touched in ((1, 3), (2, 2), (4, 1), (8, 1)):
        rows = shared.matrices(Cut(experts=groups))
        # Covered matrices only: neither router nor biases.
        assert stored_bytes("bf16", rows, used=True) == 2 * (touched * 90 + 3 * 10 * 4)
        assert stored_bytes("bf16", rows) == 2 * (8 // groups * (90 + 3 + 3 + 10) + 8 * 10 + 3 * 10 * 4)


def test_experts_are_rounded_up_in_what_is_stored_and_not_in_what_is_computed() -> None:
    cut = Cut(multiples=(4, 8))
    stored = {m.name: (m.rows, m.columns) for m in MOE.matrices(cut)}
    assert stored == {"expert up": (8, 12), "expert down": (12, 8), "router": (5, 10)}
    assert MOE.operations(cut, 2) == MOE.operations(WHOLE, 2)


def test_pieces_are_what_equal_shards_need() -> None:
    shared = replace(MOE, shared_intermediate=4)
    assert [(p.name, p.size, p.by, p.copied) for cell in (ATTENTION, LATENT, DENSE, shared) for p in cell.pieces] == [
        ("query heads", 6, ("tp",), False),
        ("KV heads", 2, ("tp",), True),
        ("query heads", 6, ("tp",), False),
        ("columns", 7, ("tp", "ep"), False),
        ("experts", 5, ("ep",), False),
        ("columns of an expert", 3, ("tp",), False),
        ("shared columns", 4, ("tp", "ep"), False),
    ]


# ---- a kind that is none of ours ---------------------------------------------------------------------------------


class TiedAttention(Attention):
    """Grouped-query attention whose keys are its values too: all that has to be told of it is its lists."""

    __slots__ = ()

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Keys once."""
        return tuple(m._replace(times=1) if m.name == "keys" else m for m in super().matrices(cut))

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept, ...]:
        """What is key and value at once."""
        return tuple(kept._replace(elements=kept.elements // 2) for kept in super().cache(cut))

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """A smaller first product, and half the cache to write."""
        key = self.matrices(cut)[1].rows
        return tuple(
            op._replace(n=op.n - key)
            if isinstance(op, Product) and op.name == "qkv"
            else op._replace(row_bytes=op.row_bytes / 2)
            if isinstance(op, Elementwise) and op.name == "kv write"
            else op
            for op in super().operations(cut, kv_bytes)
        )


class SplitFfn(DenseFfn):
    """A dense FFN whose columns come in pairs that no shard may part."""

    __slots__ = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Pairs of columns."""
        return (Piece("pairs of columns", self.intermediate // 2, ("tp", "ep")),)


def test_a_new_kind_of_cell_is_its_lists_for_the_oracle_the_program_and_the_costs() -> None:
    sizes: dict[str, Any] = {"hidden": 512, "query_heads": 8, "kv_heads": 4, "head_dim": 64}
    usual = Block(attention=Attention(**sizes), ffn=DenseFfn(hidden=512, intermediate=24))
    novel = Block(attention=TiedAttention(**sizes), ffn=SplitFfn(hidden=512, intermediate=24))
    models = [make_model((block, 4)) for block in (usual, novel)]
    key = 4 * 64
    assert models[0].parameters - models[1].parameters == 4 * 512 * key
    assert models[0].kv_bytes_per_token(2) == 2 * models[1].kv_bytes_per_token(2) == 4 * 2 * 2 * key
    plan = parse_plan("tp2", models[0])
    before, after = (stage_memory(model, make_gpu(), plan, SMALL)[0] for model in models)
    assert before.weights_bytes - after.weights_bytes == 2 * 4 * 512 * key // 2
    assert before.kv_block_bytes == 2 * after.kv_block_bytes
    # Eight shards part the pairs of columns. Program and oracle say so, and of the memory that both count they agree.
    for room in (None, 0, -1):
        instance = instance_at(models[1], None if room is None else plan, 8, memory=room)
        found = set(PlanSpace().enumerate(instance).plans)
        alone = (p for p in space(instance) if p.even and p.replicas == 1)
        assert found == {p for p in alone if not violations(instance, p)}
        assert (plan in found) == (room != -1)
    eight = parse_plan("tp8", models[0])
    texts = [[v.text for v in violations(instance_at(model, None, 8), eight)] for model in models]
    assert texts == [[], ["FFN tp8 does not divide 12 pairs of columns"]]
    costs = [CostModel(model, make_cluster(8), SMALL, OVERHEAD).plan_cost(plan) for model in models]
    written = [cost.parts[0]["kv write", "decode_ns"].moved[8] for cost in costs]
    assert written[0] == 2 * written[1]
    multiplied = [cost.parts[0]["qkv", "decode_ns"].flops[8] for cost in costs]
    assert multiplied[0] - multiplied[1] == 4 * 2 * 8 * 512 * key / 2


H = 512
FULL = Attention(hidden=H, query_heads=8, kv_heads=4, head_dim=64)
GONE = Skipped(hidden=H)
PLAIN_FFN = DenseFfn(hidden=H, intermediate=1024)
LATENT_MOE = LatentMoeFfn(
    hidden=H, latent=128, latent_norm=True, expert_intermediate=256, experts=8, experts_per_token=2
)
PAIRS: dict[str, tuple[Block, Block]] = {
    "gated delta net": (
        Block(
            attention=GatedDelta(hidden=H, key_heads=4, value_heads=8, key_dim=32, value_dim=32, kernel=4),
            ffn=PLAIN_FFN,
        ),
        Block(attention=GatedAttention(hidden=H, query_heads=8, kv_heads=4, head_dim=64), ffn=PLAIN_FFN),
    ),
    "KDA": (
        Block(attention=KimiDelta(hidden=H, heads=8, head_dim=32, kernel=4), ffn=LATENT_MOE, residuals=2),
        Block(
            attention=GatedLatentAttention(
                hidden=H,
                query_heads=8,
                q_lora_rank=64,
                kv_lora_rank=64,
                nope_head_dim=32,
                rope_head_dim=16,
                v_head_dim=32,
            ),
            ffn=LATENT_MOE,
            residuals=2,
        ),
    ),
    "layers of one cell": (
        Block(attention=GONE, ffn=LATENT_MOE),
        Block(attention=FULL, ffn=GONE),
    ),
    "Mamba2": (
        Block(attention=Mamba2(hidden=H, heads=16, head_dim=64, groups=2, state=16, kernel=4), ffn=PLAIN_FFN),
        Block(attention=FULL, ffn=PLAIN_FFN),
    ),
    "Mamba": (
        Block(
            attention=Mamba1(hidden=H, inner=1024, state=16, rank=32, kernel=4, norms=True, bias=True), ffn=PLAIN_FFN
        ),
        Block(attention=FULL, ffn=PLAIN_FFN),
    ),
    "lightning attention": (
        Block(attention=LightningAttention(hidden=H, heads=8, head_dim=64), ffn=PLAIN_FFN),
        Block(attention=FULL, ffn=PLAIN_FFN),
    ),
    "short convolution": (
        Block(attention=ShortConvolution(hidden=H, kernel=3, bias=True), ffn=PLAIN_FFN),
        Block(attention=FULL, ffn=PLAIN_FFN),
    ),
    "experts for images": (
        Block(
            attention=FULL,
            ffn=TwinMoeFfn(
                hidden=H,
                expert_intermediate=256,
                experts=8,
                experts_per_token=2,
                router_bias=True,
                twin_intermediate=128,
            ),
        ),
        Block(attention=FULL, ffn=PLAIN_FFN),
    ),
    "linear map": (
        Block(attention=Replaced(hidden=H), ffn=GONE),
        Block(attention=FULL, ffn=Replaced(hidden=H)),
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_program_oracle_and_costs_take_every_kind_of_layer(kind: str) -> None:
    other, full = PAIRS[kind]
    model = make_model((other, 1), (full, 1), (other, 1), (full, 1))
    instance = instance_at(model, None, 4)
    found = set(PlanSpace().enumerate(instance).plans)
    alone = [plan for plan in space(instance) if plan.even and plan.replicas == 1]
    assert found == {plan for plan in alone if not violations(instance, plan)}
    assert {"tp1", "tp2"} <= {str(plan.attention) for plan in found}
    costs = CostModel(model, make_cluster(4), SMALL, OVERHEAD)
    one, two = (costs.plan_cost(parse_plan(text, model)).parts[0] for text in ("tp1", "tp2"))
    spent = [
        sum(float(work.flops[8]) for (_, table), work in parts.items() if table == "decode_ns") for parts in (one, two)
    ]
    assert spent[1] > 0
    weights = [
        stage_memory(model, make_gpu(), parse_plan(text, model), SMALL)[0].weights_bytes for text in ("tp1", "tp2")
    ]
    assert weights[1] < weights[0] == 2 * model.parameters
