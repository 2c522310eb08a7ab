"""Attention that sees some of the context, compressed or in windows: what its cells list, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cell_cases import (
    BLOCKS,
    BORROWED,
    CELLS,
    CHUNKED,
    ENTRIES,
    GROUPED,
    JOINT,
    LATENT,
    LONG,
    NARROW,
    SHORT,
    TOKENS,
    WINDOW,
)
from plan_cases import OVERHEAD, SMALL, instance_at, make_cluster, make_model

from apex_opt.cost import CostModel
from apex_opt.errors import InputError
from apex_opt.ir import Attention, AttentionCell, Block, Cell, DenseFfn, LatentAttention
from apex_opt.ir.cells import CompressedAttention, Cut, Indexer, Kept, State
from apex_opt.ir.cells.operations import Attend, AttendLatent, Op, Product, Score
from apex_opt.oracle.checks import violations
from apex_opt.oracle.space import space
from apex_opt.plans.allotment import allotted
from apex_opt.plans.plan import parse_plan
from formulations.plan_space import PlanSpace


def sizes(cell: Cell) -> dict[str, int]:
    """Weights by name."""
    found: dict[str, int] = {}
    for matrix in cell.matrices():
        found[matrix.name] = found.get(matrix.name, 0) + matrix.weights
    return found


def ops(cell: Cell, kind: type[Any], cut: Cut | None = None) -> list[Any]:
    return [op for op in cell.operations(cut or Cut(), 2) if isinstance(op, kind)]


# ---- indexers -------------------------------------------------------------------------------------------------


def test_an_indexer_adds_its_queries_keys_weights_and_norm() -> None:
    plain = replace(LATENT, indexer=None)
    queries, keys, weights, norm = 40 * 8 * 16, 48 * 16, 48 * 8, 2 * 16
    assert LATENT.parameters - plain.parameters == queries + keys + weights + norm
    grouped = GROUPED.parameters - replace(GROUPED, indexer=None).parameters
    assert grouped == 48 * 4 * 16 + 48 * 16 + 2 * 16
    # Compressed keys: sums and gates of two entries each, positions of four tokens and a norm.
    assert sum(matrix.weights for matrix in ENTRIES.matrices(Cut(), 1)) == 5120 + 48 * 64 + 48 * 8 + 144


def test_an_indexer_is_whole_on_every_shard_unless_it_goes_with_the_kv_heads() -> None:
    assert TOKENS.matrices(Cut(heads=8), 1) == TOKENS.matrices(Cut(), 1)
    rows = {heads: BLOCKS.matrices(Cut(heads=heads), 1)[0].rows for heads in (1, 2, 4, 8)}
    assert rows == {1: 64, 2: 32, 4: 16, 8: 16}


def test_deepseek_v32_keeps_656_and_132_bytes_of_a_token_in_8_bits_and_1152_and_132_in_16() -> None:
    """vLLM: 512 elements in 8 bits, 4 scales in fp32 and 64 rotary ones in 16 bits; 128 index elements and a scale."""
    indexer = Indexer(hidden=7168, inputs=1536, heads=64, width=128, topk=2048, entry_bytes=132, small=256)
    cell = LatentAttention(
        hidden=7168,
        query_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        nope_head_dim=128,
        rope_head_dim=64,
        v_head_dim=128,
        indexer=indexer,
        topk=2048,
    )
    assert [kept.token_bytes(1) for kept in cell.cache(Cut(heads=8))] == [656, 132]
    assert [kept.token_bytes(2) for kept in cell.cache(Cut(heads=8))] == [1152, 132]
    # A layer that uses the choice of one before keeps no keys of its own; one that sees all has no scales.
    assert [kept.token_bytes(1) for kept in replace(cell, indexer=None).cache()] == [656]
    assert [kept.token_bytes(1) for kept in replace(cell, indexer=None, topk=None).cache()] == [576]
    (seen,) = ops(cell, AttendLatent, Cut(heads=8))
    assert seen == AttendLatent(16, 512, 64, 576, 512, topk=2048, token_bytes=1152.0)
    assert ops(cell, Score, Cut(heads=8)) == [Score(64, 128, 2048, 132)]


def test_latent_attention_that_sees_all_computes_prompts_with_expanded_keys() -> None:
    assert ops(replace(LATENT, indexer=None, topk=None), AttendLatent) == [AttendLatent(8, 256, 8, 32, 32)]


def test_blocks_are_chosen_by_each_kv_head_and_keys_in_16_bits_are_kept() -> None:
    assert GROUPED.cache(Cut(heads=2)) == (Kept(2 * 2 * 8, None), Kept(0, None, other_bytes=32))
    assert ops(GROUPED, Score, Cut(heads=2)) == [Score(2, 16, 256, 32)]
    assert ops(GROUPED, Attend, Cut(heads=2)) == [Attend(8, 2, 8, topk=256)]


# ---- compressed attention -------------------------------------------------------------------------------------


def test_compressed_attention_is_the_sum_of_its_checkpoint_tensors() -> None:
    heads = 16 * 192
    assert sizes(WINDOW) == {
        "compressions": 48 * (40 + 192),
        "queries": 40 * heads,
        "grouped output": 8 * 24 * (heads // 8),
        "output": 48 * 8 * 24,
        "norms": 40 + 192,
        "sinks": 16,
    }
    assert LONG.parameters - WINDOW.parameters == 48 * 2 * 192 + 128 * 192 + 192
    index = sum(matrix.weights for matrix in ENTRIES.matrices(Cut(), 1))
    assert SHORT.parameters - WINDOW.parameters == 48 * 4 * 192 + 4 * 2 * 192 + 192 + index


def test_deepseek_v4_keeps_584_bytes_of_each_entry_and_sums_in_fp32_between_two() -> None:
    """vLLM: 448 elements in 8 bits, 64 in 16, 7 scales and a byte; in blocks of 64 tokens, and of 4 and 8 of sums."""
    common: dict[str, Any] = {"hidden": 4096, "query_heads": 64, "head_dim": 512, "rope_head_dim": 64}
    common |= {"q_lora_rank": 1024, "output_groups": 8, "output_rank": 1024, "local_window": 128}
    indexer = Indexer(hidden=4096, inputs=1024, heads=64, width=128, topk=512, entry_bytes=132, key_rows=512, ratio=4)
    # Of the last 128 tokens three blocks of 64, of sums of 8 three of 4, of sums of 128 seventeen of 8; aligned to 576.
    window = 3 * 576 * 65
    assert CompressedAttention(**common).cache() == (State(window),)
    short = CompressedAttention(**common, ratio=4, overlap=True, indexer=indexer)
    assert short.cache(Cut(heads=8)) == (
        Kept(0, None, other_bytes=584, ratio=4),
        Kept(0, None, other_bytes=132, ratio=4),
        State(window + 3 * 576 * 57 + 3 * 576 * 15),
    )
    assert (4 * 2 * 2 * 512 * 4, 4 * 2 * 2 * 128 * 4) == (32768, 8192)
    assert CompressedAttention(**common, ratio=128).cache() == (
        Kept(0, None, other_bytes=584, ratio=128),
        State(window + 17 * 576 * 57),
    )
    # A token's share of an entry is rounded up, and the format of other caches makes no difference.
    assert [kept.token_bytes(bytes_) for kept in short.cache()[:2] for bytes_ in (1, 2)] == [146, 146, 33, 33]


def test_compressed_attention_sees_a_window_and_entries() -> None:
    shape = 8, 192, 0, 192, 192
    width = 128 + 2 * 64 + 2 + 1.0
    window = AttendLatent(*shape, window=128, token_bytes=width)
    cut = Cut(heads=2)
    assert ops(WINDOW, AttendLatent, cut) == [window]
    assert ops(LONG, AttendLatent, cut) == [window, AttendLatent(*shape, ratio=128, token_bytes=width)]
    assert ops(SHORT, AttendLatent, cut) == [window, AttendLatent(*shape, topk=64, ratio=4, token_bytes=width)]
    assert ops(SHORT, Score, cut) == [Score(8, 16, 64, 20, 4)]


def test_groups_of_heads_are_cut_along_with_them() -> None:
    whole, half = ({m.name: (m.rows, m.columns) for m in WINDOW.matrices(Cut(heads=n))} for n in (1, 2))
    assert (whole["grouped output"], half["grouped output"]) == ((192, 384), (96, 384))
    assert (whole["output"], half["output"]) == ((48, 192), (48, 96))
    assert [(piece.name, piece.size) for piece in WINDOW.pieces] == [("query heads", 16), ("output groups", 8)]


@pytest.mark.parametrize(
    ("cell", "bad", "text"),
    [
        (WINDOW, {"output_groups": 5}, "query_heads 16 is not a multiple of output_groups 5"),
        (WINDOW, {"rope_head_dim": 200}, "rope_head_dim 200 is above head_dim 192"),
        (WINDOW, {"overlap": True}, "overlap and indexer need a ratio above 0"),
        (SHORT, {"ratio": 8}, "ratio 8 is not that of the indexer, 4"),
        (LATENT, {"topk": None}, "topk None is not that of the indexer, 64"),
        (NARROW, {"keys_as_values": True}, "keys_as_values needs value_dim 12, not 8"),
        (CHUNKED, {"window": None}, "chunked needs a window"),
    ],
)
def test_cells_refuse_what_they_cannot_be(cell: Any, bad: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        replace(cell, **bad)


def test_heads_that_are_weighted_against_each_other_cannot_be_cut() -> None:
    with pytest.raises(InputError, match="heads that are weighted against each other cannot be cut"):
        replace(TOKENS, by_heads=True)


# ---- grouped-query attention with heads of other kinds ---------------------------------------------------------


def test_values_may_be_narrower_than_keys() -> None:
    assert sizes(NARROW) == {
        "queries": 48 * 16 * 12,
        "keys": 48 * 4 * 12,
        "values": 48 * 4 * 8,
        "output": 48 * 16 * 8,
        "gate": 48 * 16,
        "sinks": 16,
    }
    assert NARROW.cache(Cut(heads=2)) == (Kept(2 * (12 + 8), None),)
    assert ops(NARROW, Attend, Cut(heads=2)) == [Attend(8, 2, 12, None, 8)]


def test_values_that_are_keys_are_not_projected_but_kept() -> None:
    plain = replace(JOINT, keys_as_values=False)
    assert plain.parameters - JOINT.parameters == 48 * 4 * 8
    assert JOINT.cache() == plain.cache() == (Kept(2 * 4 * 8, None),)


def test_borrowed_keys_and_values_are_neither_projected_nor_kept_but_read() -> None:
    plain = replace(BORROWED, borrowed=False)
    assert plain.parameters - BORROWED.parameters == 2 * 48 * 4 * 8 + 8  # and the norm of keys
    assert BORROWED.cache() == ()
    assert ops(BORROWED, Attend) == ops(plain, Attend)
    names = [[getattr(op, "name", "") for op in cell.operations(Cut(), 2)] for cell in (plain, BORROWED)]
    assert "kv write" in names[0] and "kv write" not in names[1]


def test_a_chunk_is_told_from_a_window() -> None:
    assert CHUNKED.cache() == (Kept(2 * 4 * 8, 32, chunked=True),)
    assert ops(CHUNKED, Attend) == [Attend(16, 4, 8, 32, chunked=True)]


def test_a_norm_for_each_head_has_weights_for_each_and_needs_no_sum_over_shards() -> None:
    base = Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=8)
    each = replace(base, qk_norm=True, qk_norm_each=True)
    assert each.parameters - base.parameters == (16 + 4) * 8
    assert each.reduced_bytes == 0


def test_layers_without_positions_turn_nothing() -> None:
    def turned(cell: Cell) -> list[Op]:
        return [op for op in cell.operations(Cut(), 2) if getattr(op, "name", "") == "rotary"]

    base = Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=8)
    still = replace(base, rotary=False)
    assert (len(turned(base)), turned(still)) == (1, [])
    assert (base.rotary_dim, still.rotary_dim) == (8, 0)
    assert base.launches[0] - still.launches[0] == 1


def test_an_indexer_is_multiplied_in_the_format_of_its_own() -> None:
    forms = {op.quantised for op in ops(replace(LATENT, index_quantised=2), Product) if op.name == "indexer"}
    assert forms == {0, 2}


# ---- all of them ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.kind)
def test_program_and_oracle_agree_on_every_kind_and_its_time_is_counted(cell: AttentionCell) -> None:
    block = Block(attention=cell, ffn=DenseFfn(hidden=cell.hidden, intermediate=24), streams=1 + (cell is SHORT))
    plain = replace(block, attention=Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=16), streams=1)
    model = make_model((block, 2), (plain, 1))
    plan = parse_plan("tp2", model)
    for room in (None, 0, -1):
        instance = instance_at(model, None if room is None else plan, 4, memory=room)
        found = set(PlanSpace().enumerate(instance).plans)
        alone = (p for p in space(instance) if p.even and p.replicas == 1)
        assert found == {p for p in alone if not violations(instance, p)}
        assert (plan in found) == (room != -1)
    cost = CostModel(model, make_cluster(4), SMALL, OVERHEAD).plan_cost(plan)
    names = {name for name, _ in cost.parts[0]}
    assert ("indexer" in names) == any(isinstance(op, Score) for op in cell.operations(Cut(), 2))
    assert ("hyper connections" in names) == (cell is SHORT)


def test_compressed_layers_have_a_pool_of_their_own_whose_states_lie_apart() -> None:
    ffn = DenseFfn(hidden=48, intermediate=24)
    model = make_model(*((Block(attention=cell, ffn=ffn), 1) for cell in (WINDOW, SHORT, LONG)))
    found = allotted(model, parse_plan("tp1", model), SMALL)
    assert (found.groups, found.block_size, found.fault) == ((), SMALL.block_size, "")
    assert found.states_before[-1] == sum(
        kept.sequence_bytes(0) for run in model.runs for kept in run.block.attention.cache()
    )
