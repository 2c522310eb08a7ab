"""Families whose layers keep states, lack cells or differ one by one: what is read, and states as vLLM has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_cases import make_gpu

from apex_opt.engines import VLLM
from apex_opt.engines.rules import Held
from apex_opt.errors import InputError
from apex_opt.ir import Model, load_model, model_from_config
from apex_opt.ir.cells import Attention, Cut, GatedAttention, LatentMoeFfn, Replaced, Skipped
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.memory import stage_memory, vocab_copies
from apex_opt.plans.plan import parse_plan

MODELS = Path(__file__).parent / "cases" / "models"


def case(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())
    return config


QWEN_NEXT = case("qwen3-next-80b-a3b")
QWEN_35 = case("qwen3.5-397b-a17b")
KIMI_LINEAR = case("kimi-linear-48b-a3b")
KIMI_K3 = case("kimi-k3")
NANO = case("nemotron-3-nano-30b-a3b")
SUPER = case("nemotron-3-super-120b-a12b")
MAMBA2 = case("mamba-codestral-7b")
GRANITE = case("granite-4.0-h-small")
JAMBA = case("jamba-1.5-mini")
MINIMAX = case("minimax-text-01")
LFM2 = case("lfm2-1.2b")
LFM2_MOE = case("lfm2-8b-a1b")


def read(config: dict[str, Any], **changes: Any) -> Model:
    return model_from_config(config | changes, "tiny", "tiny.json")


@pytest.mark.parametrize(
    ("config", "tp", "state", "draft"),
    [
        # Bytes per layer of `MambaStateShapeCalculator` of vLLM 0.20.2, as the specification counts them
        (QWEN_NEXT, 1, 3 * 8192 * 2 + 32 * 128 * 128 * 2, 8192 * 2),
        (QWEN_NEXT, 4, 3 * 2048 * 2 + 8 * 128 * 128 * 2, 2048 * 2),
        (QWEN_35, 8, 3 * 1536 * 2 + 8 * 128 * 128 * 4, 1536 * 2),  # "mamba_ssm_dtype": "float32"
        (KIMI_K3, 8, 3 * 3 * 1536 * 2 + 12 * 128 * 128 * 4, 3 * 1536 * 2),
        (NANO, 2, 3 * (2048 + 2 * 4 * 128) * 2 + 32 * 64 * 128 * 4, (2048 + 2 * 4 * 128) * 2),
        (GRANITE, 4, 3 * (2048 + 2 * 128) * 2 + 32 * 64 * 128 * 2, (2048 + 2 * 128) * 2),  # the only group is copied
        (JAMBA, 2, 4096 * (3 * 2 + 16 * 2), 0),
        (MINIMAX, 8, 8 * 128 * 128 * 2, 0),
        (LFM2, 2, 2 * 1024 * 2, 0),
    ],
)
def test_states_are_cut_and_kept_as_vllm_does(config: dict[str, Any], tp: int, state: int, draft: int) -> None:
    kept = [kept for run in read(config).runs for kept in run.block.attention.cache(Cut(heads=tp))]
    (found,) = {entry for entry in kept if entry.sequence_bytes()}
    assert (found.sequence_bytes(), found.sequence_bytes(2) - found.sequence_bytes()) == (state, 2 * draft)
    assert found.token_bytes(2) == 0


def kinds(model: Model) -> str:
    """Layers in short: what mixes tokens, "." where nothing does, each as often as it comes."""
    letters = {"GatedDelta": "d", "KimiDelta": "d", "Mamba2": "m", "Mamba1": "m", "LightningAttention": "l"}
    letters |= {"ShortConvolution": "c", "Skipped": ".", "Replaced": "r"}
    return "".join(letters.get(type(run.block.attention).__name__, "A") * run.count for run in model.runs)


SAVED = {"mamba": "linear_attention", "attention": "full_attention"}


def test_kinds_of_layers_are_known_by_the_names_that_they_are_saved_with() -> None:
    """`transformers` 5 calls every layer with a state by one name, and has no letters for them."""
    layers = [SAVED[kind] for kind in GRANITE["layer_types"]]
    assert read(GRANITE, layer_types=layers).runs == read(GRANITE).runs
    letters = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    for config in (NANO, case("nemotron-h-56b")):
        config = dict(config)
        listed = config.pop("layers_block_type", None) or config.pop("hybrid_override_pattern")
        layers = [SAVED.get(kind, letters.get(kind, kind)) for kind in listed]
        for key in ("layers_block_type", "layer_types"):
            assert read(config, **{key: layers}).runs == read(config, layers_block_type=layers).runs
            assert kinds(read(config, **{key: layers})).count("m") == list(layers).count("linear_attention")


def test_kimi_linear_is_read_as_it_is_saved() -> None:
    """With its linear attention among the other fields, kinds of layers in lists, and experts as elsewhere."""
    config = dict(KIMI_LINEAR)
    linear = config.pop("linear_attn_config")
    full = set(linear["full_attn_layers"])
    config |= {
        "layer_types": [
            "full_attention" if layer + 1 in full else "linear_attention"
            for layer in range(config["num_hidden_layers"])
        ],
        "mlp_layer_types": ["dense"] + ["sparse"] * (config["num_hidden_layers"] - 1),
        "linear_num_heads": linear["num_heads"],
        "linear_head_dim": linear["head_dim"],
        "linear_conv_kernel_dim": linear["short_conv_kernel_size"],
        "num_local_experts": config.pop("num_experts"),
        "num_experts_per_tok": config.pop("num_experts_per_token"),
        "n_shared_experts": config.pop("num_shared_experts"),
        "model_max_length": config.pop("max_position_embeddings"),
    }
    for unused in ("first_k_dense_replace", "moe_layer_freq"):
        config.pop(unused, None)
    assert (read(config).runs, read(config).max_position) == (read(KIMI_LINEAR).runs, read(KIMI_LINEAR).max_position)
    with pytest.raises(InputError, match="linear_num_heads must be a whole number from 1"):
        read(config, linear_num_heads=0)


def test_layers_are_in_the_order_of_the_file() -> None:
    assert kinds(read(QWEN_NEXT)) == kinds(read(QWEN_35))[:48] == "dddA" * 12
    assert kinds(read(QWEN_NEXT, full_attention_interval=3)) == "ddA" * 16
    assert kinds(read(KIMI_LINEAR)) == "dddA" * 6 + "ddA"
    assert kinds(read(NANO))[:9] == "m.m.mA.m."
    assert kinds(read(GRANITE)) == "mmmmmAmmmm" * 4
    assert kinds(read(JAMBA)) == "mmmmAmmm" * 4
    assert kinds(read(MINIMAX)) == "lllllllA" * 10
    assert kinds(read(LFM2)) == "ccAccAccAcAcAcAc"
    assert [run.block.is_moe for run in read(JAMBA).runs][:2] == [False, True]
    assert [run.block.is_moe for run in read(LFM2_MOE).runs][:2] == [False, True]


def test_layers_of_one_cell_have_one_norm_and_nothing_in_the_place_of_the_other() -> None:
    model = read(NANO)
    assert model.layers == 52
    assert {run.block.norm_count for run in model.runs} == {1}
    assert all(isinstance(run.block.attention, Skipped) != isinstance(run.block.ffn, Skipped) for run in model.runs)


def test_the_number_of_layers_is_that_of_the_list_where_a_file_tells_no_other() -> None:
    listed = {key: value for key, value in SUPER.items() if key != "hybrid_override_pattern"}
    kinds = {"M": "mamba", "E": "moe", "*": "attention"}
    letters = SUPER["hybrid_override_pattern"]
    assert read(listed, layers_block_type=[kinds[letter] for letter in letters]).runs == read(SUPER).runs


@pytest.mark.parametrize(
    ("config", "turned"),
    [(QWEN_NEXT, True), (NANO, False), (GRANITE, False), (JAMBA, False), (MINIMAX, True), (LFM2, True)],
)
def test_attention_between_states_is_turned_by_position_or_not(config: dict[str, Any], turned: bool) -> None:
    model = read(config)
    assert max(run.block.attention.rotary_dim for run in model.runs) == (model_head(model) if turned else 0)
    assert read(GRANITE, position_embedding_type="rope").runs[1].block.attention.rotary_dim == 128


def model_head(model: Model) -> int:
    """Elements of a head of attention."""
    cells = [run.block.attention for run in model.runs if isinstance(run.block.attention, Attention)]
    return cells[0].head_dim


def test_gates_and_latent_experts_are_read() -> None:
    assert isinstance(read(QWEN_NEXT).runs[1].block.attention, GatedAttention)
    assert not isinstance(read(QWEN_NEXT, attn_output_gate=False).runs[1].block.attention, GatedAttention)
    moe = next(run.block.ffn for run in read(SUPER).runs if run.block.is_moe)
    assert isinstance(moe, LatentMoeFfn)
    assert (moe.latent, moe.latent_norm, moe.gated) == (1024, False, False)
    low_rank = KIMI_K3["linear_attn_config"] | {"use_full_rank_gate": False}
    saved = 7168 * 12288 - 128 * (7168 + 12288)
    assert read(KIMI_K3).parameters - read(KIMI_K3, linear_attn_config=low_rank).parameters == 69 * saved
    residuals = read(KIMI_K3).parameters - read(KIMI_K3, attn_res_block_size=None).parameters
    assert residuals == (93 * 4 + 2) * 7168


PRUNED: dict[str, Any] = {
    "model_type": "nemotron-nas",
    "hidden_size": 8192,
    "num_hidden_layers": 3,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "block_configs": [
        {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 2.625}},
        {"attention": {"no_op": True}, "ffn": {"ffn_mult": 5.25}},
        {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
    ],
}


def test_pruned_layers_have_fewer_heads_narrower_ffns_a_matrix_or_nothing() -> None:
    model = read(PRUNED)
    first, second, third = (run.block for run in model.runs)
    assert (first.attention.kv_heads, first.ffn.token_columns) == (8, 14336)
    assert (second.attention.skipped, second.ffn.token_columns, second.norm_count) == (True, 28672, 1)
    assert (third.attention, third.ffn) == (Replaced(hidden=8192), Skipped(hidden=8192))
    assert third.parameters == 8192 * 8192 + 8192


@pytest.mark.parametrize(
    ("config", "changes", "text"),
    [
        (QWEN_NEXT, {"layer_types": ["mamba"] * 48}, "layer_types may hold full_attention and linear_attention"),
        (
            QWEN_NEXT,
            {"linear_num_value_heads": 40},
            "linear_num_value_heads 40 is not a multiple of linear_num_key_heads",
        ),
        (QWEN_NEXT, {"linear_key_head_dim": None}, "linear_key_head_dim is missing"),
        (QWEN_35, {"mamba_ssm_dtype": "fp8"}, "mamba_ssm_dtype must be one of auto, bfloat16, float16, float32"),
        (KIMI_LINEAR, {"mla_use_nope": False}, "mla_use_nope false is not supported; supported: true"),
        (KIMI_LINEAR, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        (KIMI_LINEAR, {"linear_attn_config": None}, "linear_attn_config is missing"),
        (
            KIMI_LINEAR,
            {"linear_attn_config": KIMI_LINEAR["linear_attn_config"] | {"kda_layers": [1]}},
            "linear_attn_config.kda_layers and full_attn_layers leave out layer 2",
        ),
        (KIMI_LINEAR, {"num_experts_per_token": 500}, "num_experts_per_token 500 is above num_experts 256"),
        (NANO, {"hybrid_override_pattern": "MX" * 26}, "hybrid_override_pattern may hold M and .*, not 'X'"),
        (
            NANO,
            {"num_hidden_layers": None, "hybrid_override_pattern": "M" * 5000},
            "num_hidden_layers must be a whole number from 1 to 4096, not 5000$",
        ),
        (NANO, {"num_hidden_layers": 50}, "hybrid_override_pattern has 52 entries for num_hidden_layers 50"),
        (NANO, {"mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu' is not supported; supported: relu2"),
        (NANO, {"mamba_num_heads": 60}, "mamba_num_heads 60 is not a multiple of n_groups 8"),
        (MAMBA2, {"num_heads": 64}, "num_heads 64 times head_dim 64 is 4096, but expand times hidden_size is 8192"),
        *(
            (config, {key: factor}, f"{key} must be a number above 0 and below 100, not ")
            for config, key in ((MAMBA2, "expand"), (GRANITE, "mamba_expand"), (LFM2, "block_ffn_dim_multiplier"))
            for factor in (float("nan"), float("inf"), 0, 10**400)
        ),
        (GRANITE, {"position_embedding_type": ["rope"]}, r"position_embedding_type must be text, not \['rope'\]"),
        (GRANITE, {"layer_types": None}, "layer_types is missing"),
        (GRANITE, {"layer_types": 7}, "layer_types must be a list, not 7$"),
        (GRANITE, {"num_experts_per_tok": 80}, "num_experts_per_tok must be a whole number from 1 to 72"),
        (JAMBA, {"mamba_d_conv": 0}, "mamba_d_conv must be a whole number"),
        (MINIMAX, {"attn_type_list": [2] * 80}, "attn_type_list may hold 0"),
        (MINIMAX, {"attn_type_list": None}, "attn_type_list is missing"),
        (QWEN_NEXT, {"linear_decay_rank": 8}, "linear_decay_rank is not understood and may change what is counted"),
        (KIMI_K3, {"mla_window": 8}, "mla_window is not understood"),
        (
            KIMI_K3,
            {"linear_attn_config": KIMI_K3["linear_attn_config"] | {"state_rank": 8}},
            "linear_attn_config.state_rank is not understood",
        ),
        (SUPER, {"moe_null_experts": 2}, "moe_null_experts is not understood"),
        (JAMBA, {"mamba_variant": "3"}, "mamba_variant is not understood"),
        (LFM2, {"conv_dim": 1024}, "conv_dim 1024 is not supported; supported: 2048"),
        (LFM2, {"full_attn_idxs": [2, -12]}, "full_attn_idxs may list layers 0 to 15, not -12"),
        (LFM2, {"full_attn_idxs": ["2"]}, "full_attn_idxs may list layers 0 to 15, not '2'"),
        (LFM2, {"full_attn_idxs": None}, "layer_types is missing, and so is full_attn_idxs"),
        (PRUNED, {"block_configs": None}, "block_configs is missing"),
        (
            PRUNED,
            {"block_configs": [{"attention": {"no_op": True, "window_length": 128}, "ffn": {"no_op": True}}] * 3},
            r"block_configs\[0\].attention.window_length is not understood",
        ),
        (
            PRUNED,
            {"block_configs": [{"attention": {"no_op": True}, "ffn": {"ffn_mult": "x"}}] * 3},
            r"block_configs\[0\].ffn.ffn_mult must be a number above 0",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_its_name(
    config: dict[str, Any], changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        read(config, **changes)


def forms(model: Model, part: str) -> list[str]:
    """The format of a part of every layer that has it, "bf16" where it is left out."""
    found = []
    for run in model.runs:
        for cell in run.block.cells:
            for field, name in cell.forms.items():
                if name == part:
                    number = getattr(cell, field)
                    found += [model.weight_format.split("+")[number - 1] if number else "bf16"] * run.count
    return found


def test_kimi_k3_has_the_size_of_its_checkpoint() -> None:
    """1,560,860,324,864 bytes in all (its index), of which those of the tower are 2 x 447,361,184."""
    model = read(
        KIMI_K3,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "mxfp4-pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"},
                }
            },
            "ignore": [
                "re:.*self_attn.*",
                "re:.*shared_experts.*",
                "re:.*mlp\\.(gate|up|down)_proj.*",
                "re:.*lm_head.*",
            ],
        },
    )
    assert model.weight_format == "mxfp4"
    assert set(forms(model, "experts")) == {"mxfp4"}
    assert set(forms(model, "latent") + forms(model, "state in") + forms(model, "shared up")) == {"bf16"}
    assert model.weight_bytes() + 2 * 447_361_184 == pytest.approx(1_560_860_324_864, rel=1e-4)


def test_modules_of_layers_with_states_are_found_by_their_names() -> None:
    fp8 = {"quant_method": "modelopt", "quant_algo": "FP8"}
    model = read(
        NANO,
        quantization_config=fp8
        | {
            "exclude_modules": [
                "backbone.layers.0.mixer.in_proj",
                "backbone.layers.5.mixer.o_proj",
                "*.shared_experts*",
            ]
        },
    )
    assert forms(model, "state in") == ["bf16"] + ["fp8"] * 22
    assert forms(model, "output") == ["bf16"] + ["fp8"] * 5
    assert set(forms(model, "experts")) == {"fp8"}
    assert set(forms(model, "shared up")) == {"bf16"}
    listed = {f"model.layers.{layer}.linear_attn.in_proj_{name}": fp8 for layer in range(60) for name in ("qkv", "z")}
    mixed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": listed}
    found = read(QWEN_35, quantization_config=mixed)
    assert set(forms(found, "state in")) == {"fp8"}
    assert set(forms(found, "state gates") + forms(found, "state out") + forms(found, "experts")) == {"bf16"}


def test_a_head_in_four_bits_is_read_of_modelopt_and_counted_in_16_bit() -> None:
    rows = {
        "lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "model.layers.0.mlp.experts": {"quant_algo": "FP8"},
    }
    section = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": rows}
    model = read(QWEN_35, quantization_config=section)
    outside = 2 * (model.embedding_parameters + model.lm_head_parameters + model.hidden)
    assert model.weight_bytes() == outside + sum(
        r.count * r.block.weight_bytes(model.weight_format) for r in model.runs
    )


@pytest.mark.parametrize(
    ("name", "text", "gib"),
    [
        # Weights of the heaviest stage, as vLLM 0.20.2 holds them on one GPU (`../shared/startable`), and by its rules
        ("nemotron-3-nano-30b-a3b", "tp8", 7.371),
        ("nemotron-3-super-120b-a12b", "tp4", 56.786),
        ("nemotron-h-56b", "tp8", 13.117),
    ],
)
def test_a_gpu_holds_the_weights_that_vllm_puts_there(name: str, text: str, gib: float) -> None:
    model = load_model(str(MODELS / f"{name}.json"))
    settings = replace(EngineSettings(), max_model_len=4096, runnable=VLLM)
    (stage,) = stage_memory(model, make_gpu(), parse_plan(text, model), settings)
    assert stage.weights_bytes / 2**30 == pytest.approx(gib, abs=0.0015)


def test_stages_of_hybrid_models_hold_embedding_and_head_as_vllm_builds_them() -> None:
    settings = replace(EngineSettings(), max_model_len=4096, runnable=VLLM)
    for config, copies in ((NANO, (2, 2)), (QWEN_NEXT, (2, 2)), (QWEN_35, (1, 2)), (JAMBA, (1, 1))):
        model = read(config)
        held = Held.of(settings.runnable, model, make_gpu())
        assert (vocab_copies(model, held, True, False), vocab_copies(model, held, False, True)) == copies
        assert vocab_copies(model, held, False, False) == copies[0] - (config is JAMBA)
