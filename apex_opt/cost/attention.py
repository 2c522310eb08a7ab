"""Operations that grow with the context of a sequence, as work per table entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.cost.tables import shares
from apex_opt.cost.work import Work
from apex_opt.ir.cells.operations import Attend, AttendCross, AttendEncoder, AttendLatent
from apex_opt.ir.formats import KV_BYTES
from apex_opt.profiles.physics import causal_pairs, context_work, latent_work, pair_flops, score_work

if TYPE_CHECKING:
    from apex_opt.cost.tables import Parts, Tables
    from apex_opt.cost.work import Floats
    from apex_opt.ir.cells.operations import Contextual, Score
    from apex_opt.profiles import Profile


def attention_parts(profile: Profile, tables: Tables, op: Contextual, dp: int, kv_format: str) -> Parts:
    """The attention kernel itself: decoding sequences by context, prompts by query-key pairs.

    Parameters
    ----------
    profile : Profile    times of the GPU
    tables : Tables      what the tables of the law are over
    op : Contextual      of one shard
    dp : int             attention copies that share the sequences of a batch
    kv_format : str      of the cache
    """
    sequences, tokens, element = shares(tables.sequences, dp), tables.tokens, KV_BYTES[kv_format]
    if isinstance(op, AttendEncoder):
        return _encoder(profile, tables, op)
    if isinstance(op, AttendCross):
        return _cross(profile, tables, op, dp, kv_format)
    if not isinstance(op, Attend | AttendLatent):
        return _scores(profile, tables, op, dp)
    if isinstance(op, AttendLatent):
        decode = profile.latent_decode(op.heads, op.rank, op.rope, kv_format, sequences)
        prefill = profile.latent_prefill(op.heads, op.key, op.value, kv_format, tokens)
        context = latent_work(op.heads, op.rank, op.rope, element)
        pair = pair_flops(op.heads, op.key, op.value)
        return _causal(profile, tables, decode, prefill, dp, context, pair)
    shape = op.heads, op.kv_heads, op.width
    decode = profile.decode_attention(*shape, kv_format, sequences, op.window)
    prefill = profile.prefill_attention(*shape, kv_format, tokens, op.window)
    context, pair = context_work(*shape, element), pair_flops(op.heads, op.width, op.width)
    # Within a short window time does not grow with the context: then all of it is charged to the window.
    window = op.window if op.window is not None and not decode[1].any() else None
    return _causal(profile, tables, decode, prefill, dp, context, pair, window)


def _causal(
    profile: Profile,
    tables: Tables,
    decode: tuple[Floats, Floats],
    prefill: tuple[Floats, Floats],
    dp: int,
    context: tuple[float, float],
    pair: float,
    window: int | None = None,
) -> Parts:
    """Causal attention times as work.

    Parameters
    ----------
    decode, prefill : base and rate each, as `Profile` gives them for one copy
    context : FLOP and bytes per token of context
    pair : FLOP per query-key pair
    window : tokens that every sequence is charged with in the base; None charges by context and pair
    """
    power, half, tokens = profile.power, profile.gpu.half_dtype, tables.tokens
    (base, per_token), (decode_flops, token_bytes) = decode, context
    base[0] = base[1]  # a batch of prompts alone launches the kernel as well
    chunk, per_pair = prefill
    by_context = float(window is None)
    if tables.drafts:  # the context is read once for a token and its drafts, and multiplied with each
        decode_flops *= 1 + tables.drafts
        least = decode_flops / profile.gpu.peak_flops_per_s(half)
        per_token = np.where(per_token > 0, np.maximum(per_token, least), 0.0)
    held, seen = tables.sequences * ((window or 0) / dp), np.minimum(tokens, window or 0)
    pairs = causal_pairs(tokens, seen)
    launch = Work.of(power, base, held * decode_flops, held * token_bytes, half)
    read = Work.of(power, per_token / dp, by_context * decode_flops / dp, by_context * token_bytes / dp, half)
    return {
        ("decode attention", "decode_ns"): launch,
        ("decode attention", "attend_ns"): launch,
        ("decode attention", "context_rate"): read,
        ("prefill attention", "chunk_ns"): Work.of(power, chunk, pairs * pair, 0.0, half),
        ("prefill attention", "pair_rate"): Work.of(power, per_pair, by_context * pair, 0.0, half),
    }


def _encoder(profile: Profile, tables: Tables, op: AttendEncoder) -> Parts:
    """Attention of inputs that see all of themselves: an input is computed whole, as a chunk of its length."""
    tokens = tables.tokens.astype(np.float64)
    shape = op.heads, op.kv_heads, op.width
    pairs = tokens * (tokens if op.window is None else np.minimum(tokens, op.window))
    flops = pairs * pair_flops(op.heads, op.width, op.width)
    base, per_pair = profile.prefill_attention(*shape, "bf16", tokens)
    seconds = base + per_pair * pairs
    return {("encoder attention", "chunk_ns"): Work.of(profile.power, seconds, flops, 0.0, profile.gpu.half_dtype)}


def _cross(profile: Profile, tables: Tables, op: AttendCross, dp: int, kv_format: str) -> Parts:
    """Attention over an encoder's tokens: every query reads as many, however much has been generated."""
    power, half, shape = profile.power, profile.gpu.half_dtype, (op.heads, op.kv_heads, op.width)
    rows, tokens = tables.sequences / dp, tables.tokens.astype(np.float64)
    base, per_token = profile.decode_attention(*shape, kv_format, shares(tables.sequences, dp))
    seconds = base + per_token * shares(tables.sequences, dp) * op.tokens
    seconds[0] = base[1]
    flops, moved = (rows * op.tokens * work for work in context_work(*shape, KV_BYTES[kv_format]))
    decode = Work.of(power, seconds, flops * (1 + tables.drafts), moved, half)
    launch, per_pair = profile.prefill_attention(*shape, kv_format, tokens)
    pairs = tokens * op.tokens
    prompts = Work.of(power, launch + per_pair * pairs, pairs * pair_flops(op.heads, op.width, op.width), 0.0, half)
    return {
        ("cross attention", "decode_ns"): decode,
        ("cross attention", "attend_ns"): decode,
        ("cross attention", "chunk_ns"): prompts,
    }


def _scores(profile: Profile, tables: Tables, op: Score, dp: int) -> Parts:
    """An indexer: scores of all the context, written and read again by the choice of the highest."""
    power, queries = profile.power, 1 + tables.drafts
    (flops, token_bytes), (pair, pair_bytes) = score_work(op.heads, op.width, op.token_bytes, op.ratio)
    dtype = profile.indexer_dtype
    base, per_token = profile.score_decode(op.heads, op.width, op.token_bytes, op.ratio, shares(tables.sequences, dp))
    base[0] = base[1]
    launch, per_pair = profile.score_prefill(op.heads, op.width, op.token_bytes, op.ratio, tables.tokens)
    started = Work.of(power, base, 0.0, 0.0, dtype)
    return {
        ("indexer", "decode_ns"): started,
        ("indexer", "attend_ns"): started,
        ("indexer", "context_rate"): Work.of(
            power, per_token * (queries / dp), flops * queries / dp, token_bytes / dp, dtype
        ),
        ("indexer", "chunk_ns"): Work.of(power, launch, 0.0, 0.0, dtype),
        ("indexer", "pair_rate"): Work.of(power, per_pair, pair, pair_bytes, dtype),
    }
