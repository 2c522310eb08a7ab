"""Facts about engines: every rule has its source, formats are known, and a model is held as the engine lays it out."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from plan_cases import SMALL, dense, make_gpu, make_model, sparse

from apex_opt.cluster import load_cluster
from apex_opt.engines import ANY, ENGINES, VLLM, EngineRules, Held, load_rules
from apex_opt.engines.sglang import SGLANG
from apex_opt.errors import UnknownNameError
from apex_opt.ir import load_model
from apex_opt.ir.formats import FORMATS
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.memory import stage_memory
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.refusals import refusals

MODELS = Path(__file__).parent / "cases" / "models"
BARE = EngineRules(name="bare", release="Bare 1", formats={}, sources={})


@pytest.mark.parametrize("rules", ENGINES.values(), ids=ENGINES)
def test_every_rule_that_an_engine_has_names_its_source(rules: EngineRules) -> None:
    ruled = {f.name for f in fields(rules)} - {"name", "release", "sources"}
    bites = {"ffn_copies", "dense_attention_copies", "experts_by_both", "whole_scales", "formats", "made_on_load"}
    bites |= {name for name in ruled if getattr(rules, name) != getattr(BARE, name)}
    bites -= {"moe_copies"}  # that whole copies are engines of their own is said with the copies of the FFN
    assert bites <= set(rules.sources)
    assert set(rules.sources) <= ruled
    assert all(rules.sources.values())


@pytest.mark.parametrize("rules", ENGINES.values(), ids=ENGINES)
def test_formats_are_known_ones_in_ranges_that_hold_something(rules: EngineRules) -> None:
    assert set(rules.formats) <= set(FORMATS)
    assert set(rules.padded_experts) <= set(FORMATS)
    for least, below in (*rules.formats.values(), *rules.attention.values(), *rules.methods.values()):
        assert least < below


@pytest.mark.parametrize(
    ("plan", "whole"),
    [
        ("attn(dp2,tp2) ffn(ep4)", True),
        ("attn(dp2,tp2) ffn(tp4)", False),
        ("attn(tp4) ffn(ep4)", False),
    ],
)
def test_shared_experts_are_whole_where_the_tokens_of_a_copy_are_spread(plan: str, whole: bool) -> None:
    shared = 512
    found = []
    for columns in (shared, 0):
        model = make_model((sparse(shared=columns), 3), family="deepseek_v3")
        cut = parse_plan(plan, model)
        found.append(stage_memory(model, make_gpu(), cut, replace(SMALL, runnable=VLLM))[0].weights_bytes)
    shards = 1 if whole else parse_plan(plan, model).attention.tp
    assert found[0] - found[1] == 3 * 2 * 3 * 512 * shared / shards
    others = make_model((sparse(shared=shared), 3), family="glm4_moe")
    assert not Held.of(VLLM, others, make_gpu()).whole_shared


@pytest.mark.parametrize(
    ("name", "positions", "widths"),
    [
        ("gemma-3-12b", (8 * 131_072, 131_072), (256, 256)),
        ("gemma-3-1b", (32_768, 32_768), (256, 256)),
        ("gemma-4-31b", (262_144, 262_144), (512, 256)),
        ("mimo-v2-flash", (262_144, 262_144), (192, 192)),
        ("llama-4-scout", None, (128, 128)),
    ],
)
def test_layers_behind_windows_turn_by_a_table_of_their_own(
    name: str, positions: tuple[int, int] | None, widths: tuple[int, int]
) -> None:
    model = load_model(str(MODELS / f"{name}.json"))
    assert model.angles == positions
    told = [length * width for length, width in zip(positions or (model.max_position, 0), widths, strict=True)]
    assert Held.of(VLLM, model, make_gpu()).table_bytes == 2 * sum(told)


def test_vocabularies_and_embeddings_of_layers_are_cut_as_vllm_cuts_them() -> None:
    def weights(name: str, tp: int) -> int:
        model = load_model(str(MODELS / f"{name}.json"))
        plan = parse_plan(f"attn(tp{tp}) ffn(tp{tp})", model)
        return stage_memory(model, make_gpu(), plan, replace(SMALL, runnable=VLLM))[0].weights_bytes

    whisper, held = load_model(str(MODELS / "whisper-large-v3.json")), replace(SMALL, runnable=VLLM)
    assert Held.of(VLLM, whisper, make_gpu()).whole_vocabulary
    evenly = stage_memory(whisper, make_gpu(), parse_plan("attn(tp2) ffn(tp2)", whisper), replace(held, runnable=None))
    half = whisper.vocab * whisper.hidden  # of 2 bytes each
    assert weights("whisper-large-v3", 2) - evenly[0].weights_bytes == half
    tables = 2 * 262_144 * 30 * 256  # an embedding of 256 for each of 30 layers
    gemma = load_model(str(MODELS / "gemma-3n-e2b.json"))
    assert gemma.before_bytes(1) - gemma.before_bytes(2) == tables // 2


@pytest.mark.parametrize(
    ("rules", "name", "runs", "tokens"),
    [
        (VLLM, "deepseek-v3", {(10.0, "bf16")}, 32),
        (VLLM, "deepseek-v3", {(9.0, "bf16")}, 16),
        (VLLM, "deepseek-v3", {(9.0, "fp8")}, 64),
        (VLLM, "deepseek-v3", {(9.0, "fp8"), (10.0, "bf16")}, 64),
        (VLLM, "deepseek-v3.2", {(10.0, "bf16")}, 64),
        (VLLM, "llama-3.1-8b", {(10.0, "bf16")}, 16),
        (SGLANG, "llama-3.1-8b", {(10.0, "bf16")}, 64),
        (SGLANG, "llama-3.1-8b", {(9.0, "bf16")}, 1),
    ],
)
def test_blocks_are_those_of_the_fastest_kernels(
    rules: EngineRules, name: str, runs: set[tuple[float | None, str]], tokens: int
) -> None:
    """Those of vLLM as it finds them by itself, on pretended GPUs."""
    assert rules.block_size(load_model(name), 1 if rules is SGLANG else 16, runs) == tokens


def test_attention_to_chosen_tokens_has_kernels_on_hopper_and_blackwell_alone() -> None:
    model = load_model("deepseek-v3.2")
    plan = parse_plan("tp8", model)
    for name, runs in {"l40s-48gb": False, "a100-sxm-80gb": False, "h200-sxm-141gb": True}.items():
        cluster = load_cluster(f"8x{name}")
        found = list(refusals(VLLM, model, cluster, plan, EngineSettings(block_size=64)))
        assert any("latent attention to chosen tokens" in text for text in found) == (not runs), (name, found)


@pytest.mark.parametrize(
    ("capability", "sizes"), [(8.0, (3072, 768)), (9.0, (2880, 768)), (10.0, (3072, 768)), (8.9, (3072, 768))]
)
def test_experts_are_stored_in_rounded_sizes(capability: float, sizes: tuple[int, int]) -> None:
    model = make_model((dense(), 1))
    held = Held.of(VLLM, model, make_gpu(capability=capability))
    assert tuple(-(-size // by) * by for size, by in zip((2880, 720), held.multiples("mxfp4"), strict=True)) == sizes
    assert held.multiples("bf16") == (1, 1)
    assert Held.of(None, model, make_gpu(capability=capability)) == Held()


def test_the_rules_of_no_engine_are_none_and_those_of_an_unknown_one_are_refused() -> None:
    assert load_rules(ANY) is None
    assert load_rules("vllm") is VLLM
    with pytest.raises(UnknownNameError):
        load_rules("vlm")


def test_cosines_and_sines_take_two_bytes_for_every_position_and_rotated_element() -> None:
    model = make_model((dense(width=64), 2), max_position=1000)
    assert Held.of(VLLM, model, make_gpu()).table_bytes == 2 * 1000 * 64
