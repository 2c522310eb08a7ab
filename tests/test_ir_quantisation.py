"""Quantisation sections of many tools, and the files that people have: what is in which format, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_cases import make_gpu
from test_ir_huggingface import DEEPSEEK, GPT_OSS, LLAMA, MIXTRAL, QWEN_MOE

from apex_opt.errors import InputError
from apex_opt.ir import DenseFfn, Model, MoeFfn, Scheme, get_format, model_from_config, read_config
from apex_opt.ir.patterns import MAX_STEPS
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.memory import stage_memory
from apex_opt.plans.plan import parse_plan

CASES = Path(__file__).parent / "cases" / "configs"
FLOAT8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "group_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def read(config: dict[str, Any], **section: Any) -> Model:
    return model_from_config(config | {"quantization_config": section}, "tiny", "tiny.json")


def case(name: str) -> Model:
    return read_config(CASES / f"{name}.json")


def formats(model: Model) -> list[tuple[str, ...]]:
    """Per layer the format of each of its matrices, in the order of its cells' `forms`; "16" where left out."""
    named = get_format(model.weight_format)
    rows = []
    for run in model.runs:
        cells = [(cell, part) for cell in run.block.cells for part in cell.forms.items()]
        forms = [getattr(cell, name) for cell, (name, part) in cells if not part.startswith("shared") or cell.dense]
        row = tuple(named.part(form).name if form else "16" for form in forms)
        rows += [row] * run.count
    return rows


@pytest.mark.parametrize(
    ("name", "weights", "gb", "kv"),
    [
        ("L8-FP8-compression_config", "fp8", 9.08, None),
        ("L8-FP8-underscore", "fp8", 9.08, None),
        ("L8-FP8-dynamic", "fp8", 9.08, None),
        ("L8-gptq-dynamic", "w4a16", 7.69, None),
        ("L8-gptq-dynamic8", "w4a16+w8a16g32", 6.43, None),
        ("L8-kv-static", "fp8", 9.08, "fp8"),
        ("L8-w8a8-int8", "w8a8", 9.08, None),
        ("L8-quark-fp8", "fp8", 9.08, None),
        ("L8-auto-round", "w4a16", 5.70, None),
        # One of the two matrices that are held as one is in 16 bit: so are both.
        ("L8-modelopt-mixed", "bf16", 16.06, None),
        ("Qwen2.5-72B-AWQ-29568", "w4a16", 41.19, None),
        ("Llama-3.1-405B-FP8-fbgemm-kv16", "fp8", 495.6, None),
    ],
)
def test_files_from_the_field_have_their_size(name: str, weights: str, gb: float, kv: str | None) -> None:
    model = case(name)
    assert (model.weight_format, model.kv_format) == (weights, kv)
    assert model.weight_bytes() / 1e9 == pytest.approx(gb, abs=0.006 if gb < 100 else 0.06)


@pytest.mark.parametrize(
    ("name", "billions", "positions"),
    [
        ("phi-4", 14.66, 16384),
        ("llava-1.5-7b", 6.74, 4096),
        ("pixtral-12b-hf", 12.25, 1024000),
        ("vicuna-7b-16k", 6.74, 16384),
        ("Qwen2.5-72B-yarn", 72.71, 131072),
    ],
)
def test_files_from_the_field_have_their_parameters_and_context(name: str, billions: float, positions: int) -> None:
    model = case(name)
    assert model.parameters / 1e9 == pytest.approx(billions, abs=0.006)
    assert model.max_position == positions


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("EAGLE3-LLaMA3.1-8B", "LlamaForCausalLMEagle3 is that of a draft head; give the model it drafts for"),
        ("L8-bnb4", "quant_method 'bitsandbytes' is not supported; .* and --weights=w4a16"),
        ("L8-sparse24-bf16", "format 'sparse-24-bitmask' .* is not supported; .* without quantization_config"),
    ],
)
def test_files_from_the_field_that_cannot_be_described_are_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        case(name)


def test_a_sparse_checkpoint_is_its_dense_model_without_the_section_that_the_refusal_names() -> None:
    config = json.loads((CASES / "L8-sparse24-bf16.json").read_text())
    section = config.pop("quantization_config")
    assert model_from_config(config, "x", "x").weight_bytes() / 1e9 == pytest.approx(16.06, abs=0.006)
    section["config_groups"] = {"a": {"targets": ["Linear"], "weights": FLOAT8, "input_activations": FLOAT8}}
    with pytest.raises(InputError, match="without sparsity_config"):
        read(LLAMA, **section)
    del section["sparsity_config"]
    assert read(LLAMA, **section).weight_format == "fp8"


def test_a_gpu_holds_its_eighth_of_an_fp8_checkpoint_with_attention_in_16_bit() -> None:
    model = case("Llama-3.1-405B-FP8-fbgemm-kv16")
    (stage,) = stage_memory(model, make_gpu(), parse_plan("tp8", model), EngineSettings())
    assert stage.weights_bytes / 1e9 == pytest.approx(62.0, abs=0.05)


def test_the_second_format_of_a_mixed_checkpoint_is_that_of_the_matrices_it_names() -> None:
    model = case("L8-gptq-dynamic8")
    assert formats(model) == [("w8a16g32", "w8a16g32", "w4a16", "w4a16")] * 32
    assert model.scheme == Scheme(method="gptq", group=128, further=(Scheme(method="gptq", group=32),))
    assert [model.scheme.part(n).group for n in (1, 2, 3)] == [128, 32, 32]
    # Another checkpoint of the model, in one format, has no second one.
    assert model.weight_bytes("fp8") == case("L8-FP8-dynamic").weight_bytes()


@pytest.mark.parametrize(
    ("dynamic", "layer", "expected"),
    [
        ({"-:.*down.*": {}}, 0, ("w4a16", "w4a16", "w4a16", "16")),
        ({r"-:.*\.3\..*gate.*": {}}, 3, ("w4a16", "w4a16", "16", "w4a16")),
        ({r"-:.*\.3\..*gate.*": {}}, 4, ("w4a16",) * 4),
        ({r"+:.*\.2\..*gate.*": {"bits": 8}}, 2, ("w4a16", "w4a16", "w8a16", "w4a16")),
        # Without a sign a rule is positive; the first that matches holds.
        ({".*o_proj.*": {"bits": 8, "group_size": 64}, "-:.*attn.*": {}}, 0, ("16", "w8a16g64", "w4a16", "w4a16")),
        ({"-:.*attn.*": {}, ".*o_proj.*": {"bits": 8}}, 0, ("16", "16", "w4a16", "w4a16")),
        # Engines hold queries, keys and values as one: of several formats the widest, of 16 bit that.
        ({"-:.*k_proj.*": {}}, 0, ("16", "w4a16", "w4a16", "w4a16")),
        ({"+:.*k_proj.*": {"bits": 8}}, 0, ("w8a16", "w4a16", "w4a16", "w4a16")),
        ({"-:.*qkv_proj": {}, "-:.*gate_up_proj": {}}, 0, ("16", "w4a16", "16", "w4a16")),
        ({"-:.*visual.*": {}, "-:.*mtp.*": {}}, 0, ("w4a16",) * 4),
        ({}, 0, ("w4a16",) * 4),
        (None, 0, ("w4a16",) * 4),
    ],
)
def test_rules_of_gptq_leave_modules_out_or_give_them_their_own_bits(
    dynamic: object, layer: int, expected: tuple[str, ...]
) -> None:
    assert formats(read(LLAMA, **GPTQ, dynamic=dynamic))[layer] == expected


def test_modules_in_a_block_are_the_only_ones_that_gptq_quantises() -> None:
    listed = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.up_proj", "mlp.gate_proj"]]
    expected = [("w4a16", "16", "w4a16", "16")] * 6
    assert formats(read(LLAMA, **GPTQ, modules_in_block_to_quantize=listed)) == expected
    flat = [name for row in listed for name in row]
    assert formats(read(LLAMA, **GPTQ, modules_in_block_to_quantize=flat)) == expected
    assert formats(read(LLAMA, **GPTQ, modules_in_block_to_quantize=None)) == [("w4a16",) * 4] * 6
    # The gate is held with the up projection, and is in 16 bit.
    assert read(LLAMA, **GPTQ, modules_in_block_to_quantize=["mlp.up_proj"]).weight_format == "bf16"


def test_groups_of_compressed_tensors_may_differ_in_format() -> None:
    section = {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {"targets": ["re:.*self_attn.*"], "weights": FLOAT8, "input_activations": FLOAT8},
            "group_1": {"targets": ["re:.*mlp\\.experts.*"], "weights": INT4, "input_activations": None},
        },
        "ignore": ["lm_head", "re:.*layers\\.0\\..*"],
    }
    model = read(QWEN_MOE, **section)
    assert model.weight_format == "w4a16+fp8"
    assert formats(model) == [("16", "16", "16")] + [("fp8", "fp8", "w4a16")] * 5
    # Modules by name come before the class of all projections, in whichever order the groups stand.
    section["config_groups"] = {
        "group_0": {"targets": ["Linear"], "weights": FLOAT8, "input_activations": FLOAT8},
        "group_1": {"targets": ["re:.*down_proj"], "weights": INT4, "input_activations": None},
    }
    assert formats(read(LLAMA, **section))[1] == ("fp8", "fp8", "fp8", "w4a16")


def test_both_names_of_compressed_tensors_and_its_older_key_are_read() -> None:
    groups = {"group_0": {"targets": ["Linear"], "weights": FLOAT8, "input_activations": FLOAT8}}
    section = {"quant_method": "compressed-tensors", "config_groups": groups}
    expected = read(LLAMA, **section)
    assert expected.weight_format == "fp8"
    assert read(LLAMA, **section | {"quant_method": "compressed_tensors"}) == expected
    assert read(LLAMA, config_groups=groups) == expected
    older = model_from_config(LLAMA | {"compression_config": section}, "tiny", "tiny.json")
    assert older == expected
    nested = model_from_config(LLAMA | {"compression_config": {"quantization_config": section}}, "tiny", "tiny.json")
    assert nested == expected
    inner = {"text_config": LLAMA | {"compression_config": section}, "model_type": "llava"}
    assert model_from_config(inner, "tiny", "tiny.json").weight_format == "fp8"
    outer = {"text_config": LLAMA, "model_type": "llava", "compression_config": section}
    assert model_from_config(outer, "tiny", "tiny.json").weight_format == "fp8"
    both = outer | {"text_config": LLAMA | {"compression_config": GPTQ}}
    assert model_from_config(both, "tiny", "tiny.json").weight_format == "fp8"


def test_modelopt_may_give_every_module_its_own_format() -> None:
    layers = {
        **{f"model.layers.{n}.mlp.{name}_proj": {"quant_algo": "NVFP4"} for n in range(6) for name in ("up", "gate")},
        **{f"model.layers.{n}.self_attn.{name}_proj": {"quant_algo": "FP8"} for n in range(5) for name in "qkvo"},
    }
    section = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    model = read(LLAMA, **section)
    assert formats(model) == [("fp8", "fp8", "nvfp4", "16")] * 5 + [("16", "16", "nvfp4", "16")]
    assert model.scheme is not None and model.scheme.method == "modelopt_mixed"
    alike = {name: {"quant_algo": "FP8"} for name in layers}
    model = read(LLAMA, **section | {"quantized_layers": alike})
    assert model.weight_format == "fp8"
    assert model.scheme is not None and model.scheme.method == "modelopt_mixed"
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.quant_algo must be FP8.* not 'W4A8_AWQ'"):
        read(LLAMA, **section | {"quantized_layers": {"model.layers.0.mlp": {"quant_algo": "W4A8_AWQ"}}})
    with pytest.raises(InputError, match="quantized_layers is missing"):
        read(LLAMA, quant_method="modelopt", quant_algo="MIXED_PRECISION")


def test_other_tools_are_described_where_their_kernels_are() -> None:
    extra = {"model.layers.0.self_attn.o_proj": {"bits": 16}, "*down_proj": {"bits": 8}}
    model = read(LLAMA, quant_method="auto-round", bits=4, group_size=128, extra_config=extra)
    assert formats(model)[0] == ("w4a16", "16", "w4a16", "w8a16")
    fp8 = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}, "input_tensors": {"dtype": "fp8_e4m3"}}
    int8 = {"weight": {"dtype": "int8"}, "input_tensors": {"dtype": "int8"}}
    export = {"kv_cache_group": ["*k_proj", "*v_proj"]}
    model = read(
        LLAMA,
        quant_method="quark",
        global_quant_config=fp8,
        layer_quant_config={"*down_proj": int8},
        exclude=["lm_head", "*.2.mlp*"],
        export=export,
    )
    assert model.kv_format == "fp8"
    assert formats(model)[0] == ("fp8", "fp8", "fp8", "w8a8")
    assert formats(model)[2] == ("fp8", "fp8", "16", "16")


@pytest.mark.parametrize(
    ("section", "text"),
    [
        *(
            ({"quant_method": name, "bits": 4}, f"quant_method '{name}' is not supported; supported: fp8, fbgemm_fp8")
            for name in ("hqq", "aqlm", "torchao", "eetq", "vptq", "quip", "spqr", "bitnet", "gguf", "exl2", "higgs")
        ),
        ({"quant_method": "eetq"}, "--weights=w4a16"),
        ({"load_in_8bit": True}, "'bitsandbytes' is not supported; .* --weights=w8a16"),
        ({**GPTQ, "lm_head": True}, "lm_head true is not supported: the LM head is counted in 16 bit"),
        ({**GPTQ, "checkpoint_format": "qqq"}, "checkpoint_format 'qqq' is not supported"),
        ({**GPTQ, "dynamic": ["-:.*"]}, "dynamic must be an object"),
        ({**GPTQ, "dynamic": {"+:.*": {"bits": 3}}}, r"dynamic.*bits 3 is not supported; supported: 4 and 8"),
        ({**GPTQ, "dynamic": {"+:(": {}}}, r"dynamic holds 're:\(', which cannot be matched \(missing \)\)"),
        ({**GPTQ, "modules_in_block_to_quantize": [[3]]}, "must hold names, or lists of names"),
        ({**GPTQ, "per_layer_bits": {"0": 8}}, "per_layer_bits is not understood and may change what is quantised"),
        ({"quant_method": "awq", "bits": 4, "dynamic": {"-:.*": {}}}, "dynamic is not understood"),
        ({"quant_method": "fp8", "layer_overrides": [1]}, "layer_overrides is not understood"),
        ({"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"}, "data_type 'mx_fp' is not supported"),
        ({"quant_method": "auto-round", "bits": 4, "act_bits": 8}, "act_bits 8 is not supported"),
        ({"quant_method": "quark"}, "global_quant_config is missing"),
        (
            {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}},
            "global_quant_config.weight.dtype must be fp8_e4m3 or int8",
        ),
        ({"quant_method": "modelopt", "quant_algo": "MXFP4"}, "quant_algo must be FP8, .* not 'MXFP4'"),
        ({"quant_method": "fp8", "kv_cache_scheme": "int4"}, "kv_cache_scheme must be FP8, not 'int4'"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"targets": ["LlamaMLP"], "weights": INT4}},
            },
            "targets hold the class 'LlamaMLP', which is not supported",
        ),
    ],
)
def test_what_cannot_be_described_is_refused_by_name(section: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        read(LLAMA, **section)


@pytest.mark.parametrize("key", ["quantization", "quant_config", "quantize_config", "sparsity_config"])
def test_quantisation_under_another_key_is_not_passed_over(key: str) -> None:
    with pytest.raises(InputError, match=f"{key} is not read; what is quantised belongs into quantization_config"):
        model_from_config(LLAMA | {key: {"bits": 4}}, "tiny", "tiny.json")


@pytest.mark.parametrize("value", ["static", "FP8", "fp8_e4m3", {"num_bits": 8, "type": "float"}])
def test_an_fp8_cache_may_be_asked_for_as_text_or_in_full(value: object) -> None:
    assert read(LLAMA, quant_method="fp8", kv_cache_scheme=value).kv_format == "fp8"
    assert read(LLAMA, quant_method="fp8", kv_cache_quant_algo="none", kv_cache_scheme=value).kv_format == "fp8"


@pytest.mark.parametrize("value", [None, "", "auto", "none"])
def test_a_cache_in_16_bit_may_be_asked_for_in_words(value: object) -> None:
    assert read(LLAMA, quant_method="fp8", kv_cache_scheme=value).kv_format is None


@pytest.mark.parametrize(
    ("file", "section", "weights"),
    [
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "nvfp4"),
        ("quantize_config.json", {"bits": 4, "group_size": 32}, "w4a16g32"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "zero_point": True}, "w4a16"),
    ],
)
def test_the_file_of_a_tool_beside_the_config_tells_where_that_does_not(
    tmp_path: Path, file: str, section: dict[str, Any], weights: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / file).write_text(json.dumps(section))
    assert read_config(tmp_path).weight_format == weights
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": {"quant_method": "fp8"}}))
    assert read_config(tmp_path).weight_format == "fp8"


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["EagleLlamaForCausalLM"]},
        {"architectures": ["DeepseekV3ForCausalLMNextN"]},
        {"architectures": ["MedusaModel"], "model_type": "medusa"},
        {"architectures": ["DeepSeekMTPModel"], "model_type": "deepseek_mtp"},
        {"architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator"},
        {"model_type": "eagle"},
        {"draft_vocab_size": 32000},
        {"num_hidden_layers": 1, "hidden_size": 4096, "vocab_size": 128256},
        {"speculators_model_type": "eagle3"},
        {"eagle_config": {"use_aux_hidden_state": True}},
        {"text_config": LLAMA | {"architectures": ["LlamaForCausalLMEagle3"]}},
    ],
)
def test_draft_heads_are_refused_as_models(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="is that of a draft head; give the model it drafts for"):
        model_from_config(LLAMA | config, "tiny", "tiny.json")


def test_a_model_that_lies_within_another_file_relies_on_the_defaults_of_its_class() -> None:
    for name, expected in (("mistral", 8), ("qwen3", 32), ("llama", 32), ("mixtral", 8), ("qwen3_moe", 4)):
        model = model_from_config({"model_type": "llava", "text_config": {"model_type": name}}, "x", "x")
        assert model.runs[0].block.attention.kv_heads == expected
    # At the top a file says all of it, but for the KV heads.
    with pytest.raises(InputError, match="hidden_size is missing; num_hidden_layers is missing"):
        model_from_config({"model_type": "llama"}, "x", "x")
    for name, expected in (("mistral", 8), ("qwen2", 32), ("llama", 64)):
        config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
        config |= {"model_type": name, "architectures": None, "num_attention_heads": 64}
        assert model_from_config(config, "x", "x").runs[0].block.attention.kv_heads == expected
        config["num_key_value_heads"] = None
        assert model_from_config(config, "x", "x").runs[0].block.attention.kv_heads == 64


@pytest.mark.parametrize("name", ["re:(a+)+$", "re:(.*)*(.*)*x", "*" * 2000 + "x", "re:" + "(a|b|ab)*" * 200 + "!"])
def test_names_that_backtracking_never_ends_on_are_read(name: str) -> None:
    assert read(LLAMA, quant_method="fp8", ignore=[name]).weight_format == "fp8"


@pytest.mark.parametrize(
    "names",
    [
        [f"re:.*layers.{n}.*" for n in range(20_000)],
        [f"*x{n}*y*z" for n in range(50_000)],
        ["re:" + ".*" * 20_000] * 2,
    ],
)
def test_more_patterns_than_can_be_matched_in_time_are_refused(names: list[str]) -> None:
    with pytest.raises(InputError, match="takes too long"):
        read(LLAMA | {"num_hidden_layers": 1000}, quant_method="fp8", ignore=names)


def test_a_list_of_every_module_of_every_layer_is_looked_up() -> None:
    parts = [f"self_attn.{name}_proj" for name in "qkvo"]
    parts += [f"mlp.experts.{expert}.{name}_proj" for expert in range(256) for name in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{part}" for layer in range(90) for part in parts]
    model = read(QWEN_MOE | {"num_hidden_layers": 94}, quant_method="fp8", modules_to_not_convert=names)
    assert formats(model) == [("16", "16", "16")] * 90 + [("fp8", "fp8", "fp8")] * 4
    assert len(names) < MAX_STEPS


def test_parts_of_a_mixture_of_experts_are_told_apart() -> None:
    shared = ["re:.*shared_experts.down_proj"]
    assert formats(read(DEEPSEEK, quant_method="fp8", ignore=shared))[3] == ("fp8", "fp8", "fp8", "fp8", "16")
    assert formats(read(DEEPSEEK, **GPTQ, dynamic={"-:.*down.*": {}}))[3] == ("w4a16", "w4a16", "16", "w4a16", "16")
    assert formats(read(MIXTRAL, **GPTQ, dynamic={"-:.*w2.*": {}}))[3] == ("w4a16", "w4a16", "16")
    assert formats(read(GPT_OSS, quant_method="mxfp4"))[0] == ("16", "16", "mxfp4")


@pytest.mark.parametrize(
    "section",
    [
        GPTQ | {"dynamic": {r"-:.*layers\.2\..*experts\.5\..*": {}}},
        GPTQ | {"dynamic": {"-:.*layers.2.*experts.7.*": {}}},
        {"quant_method": "fp8", "ignored_layers": ["model.layers.2.mlp.experts.7.down_proj"]},
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["model.layers.2.mlp.experts.3*"]},
    ],
)
def test_one_expert_in_16_bit_keeps_all_of_its_layer_there(section: dict[str, Any]) -> None:
    rows = formats(read(QWEN_MOE, **section))
    assert [row[2] == "16" for row in rows] == [False, False, True, False, False, False]
    assert all("16" not in row[:2] for row in rows)


def test_a_section_that_covers_nothing_leaves_a_model_in_16_bit() -> None:
    model = read(LLAMA, quant_method="fp8", ignore=["self_attn", "mlp"])
    assert model == replace(read(LLAMA, quant_method="fp8"), weight_format="bf16", scheme=None)
    assert isinstance(model.runs[0].block.ffn, DenseFfn)
    assert not isinstance(model.runs[0].block.ffn, MoeFfn)


def test_a_message_is_one_line_whatever_the_file_calls_its_fields() -> None:
    groups = {"a\nb\x1b[31m": {"weights": {"num_bits": 3}}}
    with pytest.raises(InputError) as caught:
        read(LLAMA, quant_method="compressed-tensors", config_groups=groups)
    assert str(caught.value).isprintable()
    with pytest.raises(InputError) as caught:
        read(LLAMA, quant_method="fp8", **{"module" * 10_000: [1]})
    assert len(str(caught.value)) < 300


def test_thousands_of_modules_with_their_own_formats_are_read() -> None:
    algorithms = {"self_attn.q_proj": "FP8", "self_attn.k_proj": "FP8", "self_attn.v_proj": "FP8"}
    algorithms |= {f"mlp.experts.{n}.{name}_proj": "NVFP4" for n in range(128) for name in ("up", "gate", "down")}
    layers = {f"model.layers.{n}.{m}": {"quant_algo": algorithms[m]} for n in range(94) for m in algorithms}
    section = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    model = read(QWEN_MOE | {"num_hidden_layers": 94}, **section)
    assert formats(model) == [("fp8", "16", "nvfp4")] * 94


def test_the_sign_of_a_gptq_rule_is_read_however_long_it_is() -> None:
    layers = "|".join(map(str, range(32)))
    rule = rf"model\.layers\.({layers})\.mlp\..*"
    assert len(rule) > 100
    left_out = read(LLAMA, **GPTQ, dynamic={f"-:{rule}": {}})
    assert left_out.weight_bytes() == read(LLAMA, **GPTQ, dynamic={r"-:.*mlp\..*": {}}).weight_bytes()
    assert left_out.weight_bytes() > read(LLAMA, **GPTQ).weight_bytes()


def test_a_gptq_rule_says_nothing_that_is_not_understood() -> None:
    with pytest.raises(InputError, match=r"dynamic\.\+:a\.group_shape is not understood"):
        read(LLAMA, **GPTQ, dynamic={"+:a": {"bits": 8, "group_shape": 7}})


@pytest.mark.parametrize("form", ["marlin-24", "sparse-24-bitmask", "sparse-bitmask"])
@pytest.mark.parametrize("inside", [True, False])
def test_packings_without_zeros_are_refused_by_name(form: str, inside: bool) -> None:
    group = {"targets": ["Linear"], "weights": INT4, **({"format": form} if inside else {})}
    with pytest.raises(InputError, match=f"'{form}' .sparse weights. is not supported"):
        read(
            LLAMA,
            quant_method="compressed-tensors",
            config_groups={"a": group},
            format="mixed-precision" if inside else form,
        )


@pytest.mark.parametrize(
    ("field", "value"), [("type", "uint"), ("strategy", "rows"), ("strategy", ["group"]), ("type", 4)]
)
def test_a_kind_of_weights_that_nobody_knows_is_refused(field: str, value: object) -> None:
    group = {"targets": ["Linear"], "weights": INT4 | {field: value}}
    with pytest.raises(InputError, match=rf"weights\.{field} must be"):
        read(LLAMA, quant_method="compressed-tensors", config_groups={"a": group})


def test_8_bit_weights_in_groups_are_no_format_of_engines() -> None:
    grouped = FLOAT8 | {"group_size": 128, "strategy": "group"}
    with pytest.raises(InputError, match="8-bit weights, in no groups"):
        read(
            LLAMA,
            quant_method="compressed-tensors",
            config_groups={"a": {"targets": ["Linear"], "weights": grouped, "input_activations": FLOAT8}},
        )


@pytest.mark.parametrize(
    "section",
    [
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {"targets": ["Linear"], "weights": INT4},
                "b": {"targets": ["lm_head"], "weights": INT4 | {"num_bits": 8}},
            },
        },
        GPTQ | {"dynamic": {"+:lm_head": {"bits": 8}}},
        GPTQ | {"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": 8}}},
    ],
)
def test_a_quantised_head_is_refused_whatever_names_it(section: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="lm_head is among what is quantised"):
        read(LLAMA, **section)
    # Named to be left as it is, it is what is counted.
    read(LLAMA, **GPTQ, dynamic={"-:lm_head": {}})
    read(LLAMA, **GPTQ | {"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": 16}}})


def test_auto_round_quantises_the_blocks_it_names() -> None:
    own = GPTQ | {"quant_method": "auto-round"}
    everything, nothing = read(LLAMA, **own).weight_bytes(), model_from_config(LLAMA, "a", "a").weight_bytes()
    first = read(LLAMA, **own, quant_block_list=[["model.layers.0"]]).weight_bytes()
    assert everything < first < nothing
    assert read(LLAMA, **own, block_name_to_quantize="model.layers.0,model.vision.blocks").weight_bytes() == first
    assert read(LLAMA, **own, block_name_to_quantize="model.visual.blocks").weight_bytes() == nothing
    for whole in ("model.layers", "model.language_model.layers", None, ""):
        assert read(LLAMA, **own, block_name_to_quantize=whole).weight_bytes() == everything
    with pytest.raises(InputError, match="to_quant_block_names must"):
        read(LLAMA, **own, to_quant_block_names=[3])


def test_what_auto_round_tells_of_16_bit_activations_changes_nothing() -> None:
    own = GPTQ | {"quant_method": "auto-round"}
    told = {"act_bits": 16, "act_dynamic": True, "act_group_size": 128, "act_sym": True, "dynamic_max_gap": -1}
    assert read(LLAMA, **own, **told).weight_bytes() == read(LLAMA, **own).weight_bytes()
