"""Operations that grow with the context of a sequence, as work per table entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from apex_opt.cost.tables import rising, seen, shares
from apex_opt.cost.work import Work
from apex_opt.ir.cells import WHOLE
from apex_opt.ir.cells.operations import Attend, AttendCross, AttendEncoder, AttendLatent, Contextual
from apex_opt.ir.formats import KV_BYTES
from apex_opt.profiles.physics import context_work, encoder_work, latent_work, pair_flops, sparse_work
from apex_opt.simulator.law import Window

if TYPE_CHECKING:
    from collections.abc import Iterable

    from apex_opt.cost.tables import Parts, Tables
    from apex_opt.cost.work import Floats
    from apex_opt.ir.cells import AttentionCell
    from apex_opt.ir.cells.operations import Score
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
    window = window_seen(op)
    if isinstance(op, AttendLatent):
        context = latent_work(op.heads, op.rank, op.rope, element)
        entry_bytes = op.token_bytes or context[1]
        decode = profile.latent_decode(op.heads, op.rank, op.rope, kv_format, sequences, entry_bytes)
        if op.topk is None:
            prefill = profile.latent_prefill(op.heads, op.key, op.value, kv_format, tokens)
        else:
            prefill = np.zeros(len(tokens)), profile.sparse_prefill(op.heads, op.key, op.value, tokens)
        work = Attending(context[0], entry_bytes, pair_flops(op.heads, op.key, op.value))
        return _causal(profile, tables, decode, prefill, dp, work, window, op.ratio)
    length = None if window is None else window.tokens
    shape, values = (op.heads, op.kv_heads, op.width), op.value_width or op.width
    decode = profile.decode_attention(*shape, kv_format, sequences, length, values)
    prefill = profile.prefill_attention(*shape, kv_format, tokens, length, values)
    context = context_work(*shape, element, values)
    return _causal(
        profile, tables, decode, prefill, dp, Attending(*context, pair_flops(op.heads, op.width, values)), window
    )


def window_seen(op: Contextual) -> Window | None:
    """How much of the context the queries of an operation see, None where that is all of it."""
    if not isinstance(op, Attend | AttendLatent) or op.limit is None:
        return None
    return Window(op.limit, isinstance(op, Attend) and op.chunked)


def windows_of(cells: Iterable[AttentionCell]) -> tuple[Window, ...]:
    """Windows of cells, as a law lists them."""
    operations = (op for cell in cells for op in cell.operations(WHOLE, 1))
    found = {window_seen(op) for op in operations if isinstance(op, Contextual)}
    return tuple(sorted(window for window in found if window is not None))


class Attending(NamedTuple):
    """Work of causal attention: FLOP and bytes per entry of the cache, and FLOP per query-key pair."""

    entry_flops: float
    entry_bytes: float
    pair_flops: float


def _causal(
    profile: Profile,
    tables: Tables,
    decode: tuple[Floats, Floats],
    prefill: tuple[Floats, Floats],
    dp: int,
    work: Attending,
    window: Window | None,
    ratio: int = 1,
) -> Parts:
    """Causal attention times as work.

    Parameters
    ----------
    decode, prefill : base and rate each, as `Profile` gives them for one copy
    window : how much of the context a query sees
    ratio : tokens of context that one entry of the cache stands for
    """
    power, half = profile.power, profile.gpu.half_dtype
    (base, per_entry), flops = decode, work.entry_flops * (1 + tables.drafts)
    base[0] = base[1]  # a batch of prompts alone launches the kernel as well
    chunk, per_pair = prefill
    if tables.drafts:  # the context is read once for a token and its drafts, and multiplied with each
        least = flops / profile.gpu.peak_flops_per_s(half)
        per_entry = np.where(per_entry > 0, np.maximum(per_entry, least), 0.0)
    share = 1 / (dp * ratio)
    launch = Work.of(power, base, 0.0, 0.0, half)
    read = Work.of(power, per_entry * share, flops * share, work.entry_bytes * share, half)
    return {
        ("decode attention", "decode_ns"): launch,
        ("decode attention", "attend_ns"): launch,
        ("decode attention", seen("context_rate", window)): read,
        ("prefill attention", "chunk_ns"): Work.of(power, chunk, 0.0, 0.0, half),
        ("prefill attention", seen("pair_rate", window)): Work.of(
            power, per_pair / ratio, work.pair_flops / ratio, 0.0, half
        ),
    }


def _encoder(profile: Profile, tables: Tables, op: AttendEncoder) -> Parts:
    """Attention of inputs that see all of themselves: an input is computed whole, as a chunk of its length."""
    seconds = rising(profile.encoder_attention(op.heads, op.kv_heads, op.width, tables.tokens, op.window))
    work = encoder_work(op.heads, op.kv_heads, op.width, tables.tokens, op.window)
    return {("encoder attention", "chunk_ns"): Work.of(profile.power, seconds, *work, profile.gpu.half_dtype)}


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
    power, queries, dtype = profile.power, 1 + tables.drafts, profile.indexer_dtype
    share = 1 / (dp * op.ratio)
    base, per_entry = profile.score_decode(op.heads, op.width, op.token_bytes, shares(tables.sequences, dp), queries)
    base[0] = base[1]
    per_pair = profile.score_prefill(op.heads, op.width, tables.tokens) / op.ratio
    (flops, written), (_, read) = (sparse_work(kernel, op.heads * op.width) for kernel in ("scores", "choice"))
    passed = float(written + read)
    started = Work.of(power, base, 0.0, 0.0, dtype)
    entries = Work.of(
        power, per_entry * share, flops * queries * share, (op.token_bytes + queries * passed) * share, dtype
    )
    return {
        ("indexer", "decode_ns"): started,
        ("indexer", "attend_ns"): started,
        ("indexer", "context_rate"): entries,
        ("indexer", "pair_rate"): Work.of(power, per_pair, flops / op.ratio, passed / op.ratio, dtype),
    }
