"""Cells of kinds that no model of the registry has, small enough to be counted by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from apex_opt.ir.cells import (
    Attention,
    CompressedAttention,
    Indexer,
    JoinedAttention,
    LatentAttention,
    Mamba2,
    SharedAttention,
    SharedFfn,
)

if TYPE_CHECKING:
    from apex_opt.ir.cells import Cell

TOKENS: Final = Indexer(hidden=48, inputs=40, heads=8, width=16, topk=64, entry_bytes=20, small=32)
"""Of latent attention: scores of all heads are weighted and added up."""
BLOCKS: Final = Indexer(
    hidden=48, inputs=48, heads=4, width=16, topk=256, entry_bytes=32, small=32, weighted=False, by_heads=True
)
"""Of grouped-query attention: each KV head chooses for itself."""
ENTRIES: Final = Indexer(
    hidden=48,
    inputs=40,
    heads=8,
    width=16,
    topk=64,
    entry_bytes=20,
    key_rows=64,
    small=144,
    keys_covered=False,
    ratio=4,
)
"""Of compressed attention: keys are compressed as well."""

LATENT: Final = LatentAttention(
    hidden=48,
    query_heads=8,
    q_lora_rank=40,
    kv_lora_rank=256,
    nope_head_dim=24,
    rope_head_dim=8,
    v_head_dim=32,
    indexer=TOKENS,
    topk=64,
)
GROUPED: Final = Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=8, qk_norm=True, indexer=BLOCKS)
WINDOW: Final = CompressedAttention(
    hidden=48,
    query_heads=16,
    head_dim=192,
    rope_head_dim=64,
    q_lora_rank=40,
    output_groups=8,
    output_rank=24,
    local_window=128,
)
SHORT: Final = CompressedAttention(
    hidden=48,
    query_heads=16,
    head_dim=192,
    rope_head_dim=64,
    q_lora_rank=40,
    output_groups=8,
    output_rank=24,
    local_window=128,
    ratio=4,
    overlap=True,
    indexer=ENTRIES,
)
LONG: Final = CompressedAttention(
    hidden=48,
    query_heads=16,
    head_dim=192,
    rope_head_dim=64,
    q_lora_rank=40,
    output_groups=8,
    output_rank=24,
    local_window=128,
    ratio=128,
)
NARROW: Final = Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=12, value_dim=8, gated=True, sinks=True)
JOINT: Final = Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=8, qk_norm=True, keys_as_values=True)
BORROWED: Final = Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=8, qk_norm=True, borrowed=True)
CHUNKED: Final = Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=8, window=32, chunked=True)
TURNED: Final = Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=8, rotary=False)
SQUEEZED: Final = Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=8, query_rank=24)
MIXER: Final = Mamba2(hidden=48, heads=16, head_dim=8, groups=8, state=16, kernel=4, gated_norm=False)
BESIDE: Final = JoinedAttention(
    hidden=48, attention=Attention(hidden=48, query_heads=16, kv_heads=4, head_dim=8), mamba=MIXER
)

SHARED: Final = SharedAttention(hidden=48, heads=16, head_dim=8, mamba=MIXER, adapter=8, rotary=True)
AGAIN: Final = SharedAttention(hidden=48, heads=16, head_dim=8, mamba=MIXER, again=True)
FED: Final = SharedFfn(hidden=48, intermediate=64, adapter=8)

CELLS: Final[tuple[Cell, ...]] = (
    *(LATENT, GROUPED, WINDOW, SHORT, LONG),
    *(NARROW, JOINT, BORROWED, CHUNKED, TURNED),
    *(SQUEEZED, MIXER, BESIDE, SHARED, AGAIN),
)
