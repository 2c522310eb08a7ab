"""apex_opt.cost.attention: what grows with the context, counted by hand."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from apex_opt.cluster import load_cluster
from apex_opt.cost.attention import attention_parts, window_seen
from apex_opt.cost.tables import Tables, seen, window_of, windows_in
from apex_opt.ir.cells.operations import Attend, AttendCross, AttendEncoder, AttendLatent, Contextual, Score
from apex_opt.profiles import Profile, load_profile
from apex_opt.simulator.law import Window

GPU = load_cluster("1xh100-sxm").gpu
MOST = 1024
PLAIN = Attend(heads=32, kv_heads=8, width=128)
LATENT = AttendLatent(heads=16, rank=512, rope=64, key=192, value=128)
OPS: tuple[Contextual, ...] = (
    PLAIN,
    PLAIN._replace(window=4096),
    PLAIN._replace(window=8192, chunked=True),
    PLAIN._replace(topk=2048),
    LATENT,
    LATENT._replace(key=576, value=512, topk=2048, token_bytes=656.0),
    LATENT._replace(rank=512, rope=0, key=512, value=512, window=128, token_bytes=584.0),
    LATENT._replace(rank=512, rope=0, key=512, value=512, topk=512, ratio=4, token_bytes=584.0),
    Score(heads=64, width=128, topk=2048, token_bytes=132.0),
    Score(heads=64, width=128, topk=512, token_bytes=132.0, ratio=4),
)


@cache
def profile() -> Profile:
    return load_profile(GPU)


def tables(drafts: int = 0) -> Tables:
    entries = np.arange(MOST + 1, dtype=np.int64)
    return Tables(entries, entries[:129], entries[:129], drafts, entries if drafts else None)


def test_tables_of_windows_are_named_by_them() -> None:
    sliding, chunks = Window(4096), Window(8192, True)
    assert seen("context_rate", None) == "context_rate"
    assert [seen(name, sliding) for name in ("context_rate", "pair_rate")] == ["seen_rate/4096", "seen_pair_rate/4096"]
    assert window_of(seen("pair_rate", chunks)) == chunks
    assert window_of("context_rate") is None
    assert windows_in(["chunk_ns", "seen_rate/-8192", "seen_rate/4096", "seen_pair_rate/4096"]) == (sliding, chunks)


def test_what_limits_the_context_that_a_query_sees() -> None:
    assert window_seen(PLAIN) is None
    assert window_seen(PLAIN._replace(window=4096)) == Window(4096)
    assert window_seen(PLAIN._replace(window=8192, chunked=True)) == Window(8192, True)
    assert window_seen(LATENT._replace(topk=2048)) == Window(2048)
    assert window_seen(LATENT._replace(topk=512, ratio=4)) == Window(2048)  # 512 entries of four tokens each
    assert window_seen(Score(heads=64, width=128, topk=2048, token_bytes=132.0)) is None  # it looks at all


@pytest.mark.parametrize("op", OPS, ids=str)
def test_attention_over_a_context_is_no_faster_than_the_hardware_and_draws_no_less_than_nothing(op: Contextual) -> None:
    parts = attention_parts(profile(), tables(), op, 1, "bf16")
    window = window_seen(op)
    assert {table for _, table in parts} == {
        *(("decode_ns", "attend_ns") if isinstance(op, Score) else ("decode_ns", "attend_ns", "chunk_ns")),
        *(seen(name, window) for name in ("context_rate", "pair_rate")),
    }
    peak_of = GPU.peak_flops_per_s("fp8" if isinstance(op, Score) else "bf16")
    for (_, table), work in parts.items():
        assert (work.seconds >= 0).all()
        assert (work.joules >= 0).all()
        if "rate" in table:
            peak_s = np.maximum(work.flops / peak_of, work.moved / GPU.memory_bytes_per_s)
            assert (work.seconds[1:] >= 0.999 * peak_s[1:]).all(), table


def test_sparse_attention_over_latent_vectors_by_hand() -> None:
    sparse = {
        table: work
        for (_, table), work in attention_parts(
            profile(), tables(), LATENT._replace(key=576, value=512, topk=2048, token_bytes=656.0), 1, "fp8"
        ).items()
    }
    read, pair = sparse["seen_rate/2048"], sparse["seen_pair_rate/2048"]
    assert read.moved[1] == 656
    assert read.flops[1] == 2 * 16 * (576 + 512)
    assert pair.flops[1] == 2 * 16 * (576 + 512)  # nothing is expanded
    # The kernel computes with 64 heads at the least: on a shard of 16 it takes as long as on one of 64.
    assert (pair.seconds[1:] >= 2 * 64 * (576 + 512) / GPU.peak_flops_per_s("bf16")).all()
    many = attention_parts(profile(), tables(), LATENT._replace(heads=64, key=576, value=512, topk=2048), 1, "fp8")[
        "prefill attention", "seen_pair_rate/2048"
    ]
    assert np.array_equal(many.seconds, pair.seconds)
    # 234 ps on an H100, from the table of that very shape.
    assert many.seconds[MOST] == pytest.approx(234e-12, rel=0.1)


def test_entries_that_stand_for_several_tokens_are_read_once_for_them() -> None:
    each, four = (
        attention_parts(profile(), tables(), LATENT._replace(ratio=ratio), 1, "bf16")[
            "decode attention", "context_rate"
        ]
        for ratio in (1, 4)
    )
    assert np.allclose(4 * four.seconds, each.seconds)
    assert np.allclose(4 * four.moved, each.moved)


def test_an_indexer_scores_all_the_context_by_hand() -> None:
    parts = attention_parts(profile(), tables(), Score(64, 128, 2048, 132.0), 1, "fp8")
    read, pair = parts["indexer", "context_rate"], parts["indexer", "pair_rate"]
    assert read.flops[1] == pair.flops[1] == 2 * 64 * 128
    assert read.moved[1] == 132 + 2 * 4  # a score of 32 bits is written, and read by the choice
    assert pair.moved[1] == 2 * 4
    copies = attention_parts(profile(), tables(), Score(64, 128, 2048, 132.0), 4, "fp8")["indexer", "context_rate"]
    assert copies.moved[8] == read.moved[8] / 4


def test_values_narrower_than_keys_are_less_to_read_and_to_multiply() -> None:
    parts = attention_parts(profile(), tables(), PLAIN._replace(width=192, value_width=128), 1, "bf16")
    read, pair = parts["decode attention", "context_rate"], parts["prefill attention", "pair_rate"]
    assert read.moved[1] == 8 * (192 + 128) * 2
    assert read.flops[1] == pair.flops[1] == 2 * 32 * (192 + 128)


def test_cross_attention_reads_the_encoder_whatever_was_generated() -> None:
    parts = attention_parts(profile(), tables(), AttendCross(16, 16, 64, 1500), 1, "bf16")
    assert {table for _, table in parts} == {"decode_ns", "attend_ns", "chunk_ns"}
    step, chunk = parts["cross attention", "decode_ns"], parts["cross attention", "chunk_ns"]
    assert step.moved[10] == 10 * 1500 * 2 * 16 * 64 * 2
    assert step.flops[10] == 10 * 1500 * 4 * 16 * 64
    assert chunk.flops[100] == 100 * 1500 * 4 * 16 * 64
    assert (step.seconds[1:] >= 0.999 * step.moved[1:] / GPU.memory_bytes_per_s).all()


def test_encoders_see_all_of_an_input_or_their_window_of_it() -> None:
    parts = attention_parts(profile(), tables(), AttendEncoder(16, 16, 64), 1, "bf16")
    assert {table for _, table in parts} == {"chunk_ns"}
    work = parts["encoder attention", "chunk_ns"]
    assert work.flops[1000] == 4 * 16 * 64 * 1000**2
    assert work.moved[1000] == 2 * 2 * 1000 * 2 * 16 * 64
    assert (np.diff(work.seconds) >= -0.02 * work.seconds[1:]).all()
    within = attention_parts(profile(), tables(), AttendEncoder(16, 16, 64, window=64), 1, "bf16")
    assert within["encoder attention", "chunk_ns"].flops[1000] == 4 * 16 * 64 * 1000 * 64
