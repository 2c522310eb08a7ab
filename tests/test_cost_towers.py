"""What encoders take: every prompt is charged for its input, and decoders for the tokens that they make."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plan_cases import feasible_plans, make_cluster, make_problem, random_trace, simulated

from apex_opt.cost.cells import Operations
from apex_opt.cost.tables import Tables
from apex_opt.cost.towers import encoder_parts
from apex_opt.ir import Model, load_model, model_from_config
from apex_opt.plans.layout import Layout, Tier
from apex_opt.plans.plan import Template
from apex_opt.profiles import load_collectives, load_profile
from apex_opt.search import Scorer, search
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.cost.work import Work

MODELS = Path(__file__).parent / "cases" / "models"
CLUSTER = make_cluster(4)
COUNTS = np.arange(600, dtype=np.int64)
WHISPER = {
    "model_type": "whisper",
    "d_model": 256,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 1024,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 1024,
    "encoder_layers": 4,
    "max_source_positions": 300,
    "max_target_positions": 1024,
    "num_mel_bins": 80,
    "vocab_size": 5000,
}
T5 = {
    "model_type": "t5",
    "d_ff": 1024,
    "d_kv": 64,
    "d_model": 256,
    "feed_forward_proj": "relu",
    "n_positions": 1024,
    "num_heads": 4,
    "num_layers": 4,
    "vocab_size": 5000,
}


@cache
def operations(apart: bool) -> Operations:
    tables = Tables(tokens=COUNTS, sequences=COUNTS, padded=COUNTS, apart=apart)
    return Operations(tables, load_profile(CLUSTER.gpu), load_collectives(CLUSTER))


def encoder_work(model: Model, tp: int = 1) -> Work:
    """Of the encoder, by tokens of a prompt's chunk."""
    assert model.encoder is not None
    tiers = (Tier("node", tp, CLUSTER.intra, False),) if tp > 1 else ()
    layout, cut = Layout(stage_devices=tp, tiers=tiers), Template(tp=tp)
    (work,) = encoder_parts(operations(False), model, model.encoder, cut, model.weight_format, layout).values()
    return work


def test_whisper_encodes_30_seconds_for_every_prompt_whatever_its_length() -> None:
    work = encoder_work(load_model(str(MODELS / "whisper-large-v3.json")))
    width, frames = 1280, 1500
    layer = 2 * frames * 12 * width**2 + 4 * frames**2 * width
    cross = 2 * frames * 2 * width**2
    assert work.flops[4] == pytest.approx(32 * (layer + cross), rel=1e-6)
    assert set(work.seconds[2:]) == {work.seconds[2]}
    assert 0.002 < work.seconds[2] < 0.03
    assert not work.seconds[:2].any()


def test_t5_encodes_its_prompt() -> None:
    work = encoder_work(load_model(str(MODELS / "t5-large.json")))
    width, inner, tokens = 1024, 4096, 500
    layer = 2 * tokens * (4 * width**2 + 2 * width * inner) + 4 * tokens**2 * width
    cross = 2 * tokens * 2 * width**2
    assert work.flops[tokens] == pytest.approx(24 * (layer + cross), rel=1e-6)
    assert (np.diff(work.flops[2:]) > 0).all()


def test_shards_of_an_encoder_do_their_part_and_add_up_sums() -> None:
    model = load_model(str(MODELS / "whisper-large-v3.json"))
    whole, half = encoder_work(model), encoder_work(model, tp=2)
    assert half.flops[4] == pytest.approx(whole.flops[4] / 2, rel=1e-6)
    assert whole.seconds[4] / 2 < half.seconds[4] < whole.seconds[4]


def test_a_decoder_beside_an_encoder_of_its_prompts_computes_a_token_of_each_sequence() -> None:
    block = load_model(str(MODELS / "t5-large.json")).runs[0].block
    one = Template()
    parts = operations(True).attention(block.attention, one, "bf16", "bf16")
    parts |= operations(True).ffn(block.ffn, one, one, "bf16")
    assert {table for _, table in parts} == {"decode_ns", "attend_ns", "context_rate", "sequence_ns"}


@pytest.mark.parametrize("config", [WHISPER, T5], ids=["whisper", "t5"])
def test_the_search_finds_what_simulating_every_plan_finds(config: dict[str, object]) -> None:
    model = model_from_config(config, "small", "small")
    trace = random_trace(3, 12)
    problem = make_problem(model, make_cluster(4), trace)
    settings = replace(problem.settings, chunked_prefill=False, max_num_batched_tokens=1024, max_model_len=1024)
    problem = replace(problem, settings=settings)
    scorer = Scorer(problem)
    plans = feasible_plans(problem)
    assert len(plans) > 5
    best = min(simulated(scorer, plan).value for plan in plans)
    answer = search(problem, PlanSpace())
    assert answer.best is not None
    assert answer.best.value == best


def test_images_are_charged_to_prompts_in_full_by_their_mean_share() -> None:
    model = load_model(str(MODELS / "qwen2.5-vl-7b.json"))
    assert model.encoder is None
    prompts, of_image = np.array([500, 100]), 400.0
    seen = replace(model, images=(of_image, of_image / prompts.sum()))
    work = encoder_work(seen)
    patches, width, inner = 1600, 1280, 3420
    layer = 2 * patches * (4 * width**2 + 3 * width * inner)
    pairs = 28 * patches * 64 + 4 * patches**2
    assert work.flops[prompts].sum() == pytest.approx(32 * layer + 4 * pairs * width, rel=0.01)


@pytest.mark.parametrize(("name", "tokens"), [("llava-1.5-7b-hf", 577)])
def test_towers_of_fixed_squares_compute_them_whole_for_every_image(name: str, tokens: int) -> None:
    model = replace(load_model(str(MODELS / f"{name}.json")), images=(576.0, 1.0))
    work = encoder_work(model)
    layer = 2 * tokens * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * tokens**2 * 1024
    assert work.flops[576] == pytest.approx(24 * layer, rel=1e-6)
