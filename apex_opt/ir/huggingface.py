"""Reads Hugging Face `config.json` files of decoder-only, llama-shaped models into the Transformer IR.

Which field means what, and which default a family has, follows the configuration classes of the `transformers` library.
What the text decoder does not serve is left out: vision towers beside a `text_config`, multi-token-prediction layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, Literal

from apex_opt.errors import InputError, join_faults
from apex_opt.ir.formats import GROUP_WEIGHTS
from apex_opt.ir.model import (
    MAX_COUNT,
    MAX_LAYERS,
    Attention,
    Block,
    DenseFfn,
    Ffn,
    Model,
    MoeFfn,
    Run,
    count_fault,
    shown,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_CONFIG_BYTES: Final = 16 << 20
"""A larger file is not read: real ones are kilobytes, a weight file given by mistake is gigabytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What a model_type implies beyond the fields of its file; None means that the file says."""

    architecture: str
    qkv_bias: bool | None = False
    output_bias: bool | None = False
    qk_norm: bool | None = False
    mlp_bias: bool | None = False
    window: Literal["never", "always", "opt-in"] = "never"
    experts_field: str = ""
    expert_width_field: str = "moe_intermediate_size"
    shared_width_field: str = ""
    shared_count_field: str = ""
    shared_gate: bool = False


_FAMILIES: Final[dict[str, _Family]] = {
    "llama": _Family(architecture="LlamaForCausalLM", qkv_bias=None, output_bias=None, mlp_bias=None),
    "granite": _Family(architecture="GraniteForCausalLM", qkv_bias=None, output_bias=None, mlp_bias=None),
    "mistral": _Family(architecture="MistralForCausalLM", window="always"),
    "phi3": _Family(architecture="Phi3ForCausalLM", window="always"),
    "mixtral": _Family(
        architecture="MixtralForCausalLM",
        window="always",
        experts_field="num_local_experts",
        expert_width_field="intermediate_size",
    ),
    "qwen2": _Family(architecture="Qwen2ForCausalLM", qkv_bias=True, window="opt-in"),
    "qwen2_moe": _Family(
        architecture="Qwen2MoeForCausalLM",
        qkv_bias=True,
        window="opt-in",
        experts_field="num_experts",
        shared_width_field="shared_expert_intermediate_size",
        shared_gate=True,
    ),
    "qwen3": _Family(architecture="Qwen3ForCausalLM", qkv_bias=None, output_bias=None, qk_norm=True, window="opt-in"),
    "qwen3_moe": _Family(
        architecture="Qwen3MoeForCausalLM",
        qkv_bias=None,
        output_bias=None,
        qk_norm=True,
        window="opt-in",
        experts_field="num_experts",
    ),
    "glm4_moe": _Family(
        architecture="Glm4MoeForCausalLM",
        qkv_bias=None,
        qk_norm=None,
        experts_field="n_routed_experts",
        shared_count_field="n_shared_experts",
    ),
}

SUPPORTED_MODEL_TYPES: Final = tuple(sorted(_FAMILIES))

_QWEN_FULL_LAYERS: Final = 28
"""Leading layers without a window where a Qwen file does not give max_window_layers (transformers)."""

_DTYPES: Final = {"bfloat16": "bf16", "float16": "fp16", "float32": "bf16"}

_QUANT_METHODS: Final = ("fp8", "fbgemm_fp8", "modelopt (FP8)", "gptq", "awq", "compressed-tensors")


@dataclass(slots=True)
class _Fields:
    """One JSON object and the faults found in it so far; a faulty number reads as 0 so that reading can go on."""

    values: Mapping[str, Any]
    prefix: str = ""
    faults: list[str] = field(default_factory=list)

    def fault(self, key: str, text: str) -> None:
        self.faults.append(f"{self.prefix}{key} {text}")

    def count(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_COUNT) -> int:
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.fault(key, "is missing")
                return 0
            return default
        if fault := count_fault(self.prefix + key, value, minimum, maximum):
            self.faults.append(fault)
            return 0
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fault(key, f"must be true or false, not {shown(value)}")
            return default
        return value

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            self.fault(key, f"must be text, not {shown(value)}")
            return ""
        return value or ""

    def section(self, key: str) -> _Fields | None:
        """An object inside this one, sharing its list of faults; None where absent or no object."""
        value = self.values.get(key)
        if isinstance(value, dict):
            return _Fields(value, f"{self.prefix}{key}.", self.faults)
        if value is not None:
            self.fault(key, f"must be an object, not {shown(value)}")
        return None

    def rows(self, key: str) -> list[Any] | None:
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            self.fault(key, f"must be a list, not {shown(value)}")
            return None
        return value


def read_config(path: Path, name: str | None = None) -> Model:
    """Model described by a Hugging Face `config.json`.

    Parameters
    ----------
    path : Path             the file, or the folder that holds it as `config.json`
    name : str or None      name of the model; None takes the folder's, or the file's where it is named otherwise

    Raises
    ------
    InputError              no such file, not JSON, or a description that `model_from_config` refuses
    """
    try:
        file = path / "config.json" if path.is_dir() else path
        if not file.exists():
            if file != path:
                raise InputError(f"{path}: the folder holds no config.json; give the model's folder or the file itself")
            raise InputError(f"{path}: no such file; give a config.json or the folder that holds it")
        config = read_json_object(file)
        if name is None:
            stem = file.name.removesuffix(".json").removesuffix(".config")
            name = stem if stem != "config" else file.resolve().parent.name
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return model_from_config(config, name, str(file))


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object a file holds.

    Raises
    ------
    InputError      not a regular file, empty, too large, not UTF-8, not JSON, or not an object; unreadable
    """
    try:
        if not file.is_file():
            raise InputError(f"{file}: not a regular file; give a config.json")
        size_bytes = file.stat().st_size
        if size_bytes > MAX_CONFIG_BYTES:
            raise InputError(f"{file}: {size_bytes} bytes is no config.json; the limit is {MAX_CONFIG_BYTES} bytes")
        text = file.read_bytes().decode("utf-8-sig")
        if not text.strip():
            raise InputError(f"{file}: the file is empty; download it again")
        value = json.loads(text)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text at byte {error.start}; give a config.json") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: not JSON at line {error.lineno} column {error.colno} ({error.msg})") from None
    except RecursionError:
        raise InputError(f"{file}: JSON nested too deeply to read") from None
    except InputError:
        raise
    except ValueError:
        # json refuses integers of thousands of digits with a plain ValueError.
        raise InputError(f"{file}: holds a number with too many digits to read") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds a JSON {type(value).__name__}, not an object; give a config.json")
    return value


def model_from_config(config: Mapping[str, Any], name: str, source: str) -> Model:
    """Model described by the contents of a Hugging Face `config.json`.

    A nested `text_config` is read in place of the whole. Without dtype, or with float32, a model is served in bf16.
    Biases, norms of query and key, windows and experts follow the model_type; layers that differ become several runs.

    Parameters
    ----------
    config : mapping    the parsed file
    name : str          name of the model
    source : str        where the file came from; opens every error message

    Raises
    ------
    InputError          an unsupported model_type; or all faults of the fields at once
    """
    fields, wrapped = _text_part(config, source)
    if wrapped:
        source += " (text_config)"
    family = _family(fields, wrapped, source)

    hidden = fields.count("hidden_size")
    layers = fields.count("num_hidden_layers", maximum=MAX_LAYERS)
    vocab = fields.count("vocab_size")
    max_position = fields.count("max_position_embeddings")
    tied = fields.flag("tie_word_embeddings")
    attention = _attention_fields(fields, family, hidden)
    windows = _windows(fields, family, layers)
    ffns = _ffns(fields, family, hidden, layers)
    dtype = _dtype(fields)
    weight_format, kv_format = _formats(fields)
    if fields.faults:
        raise join_faults(source, fields.faults)

    built = {
        pair: Block(attention=Attention(hidden=hidden, window=pair[0], **attention), ffn=pair[1])
        for pair in dict.fromkeys(zip(windows, ffns, strict=True))
    }
    runs = tuple(
        Run(block=built[pair], count=sum(1 for _ in group)) for pair, group in groupby(zip(windows, ffns, strict=True))
    )
    return Model(
        name=name,
        hidden=hidden,
        vocab=vocab,
        tied_embeddings=tied,
        max_position=max_position,
        runs=runs,
        dtype=dtype,
        weight_format=weight_format or dtype,
        kv_format=kv_format,
        source=source,
    )


def _text_part(config: Mapping[str, Any], source: str) -> tuple[_Fields, bool]:
    """The decoder's fields, and whether they lay in a text_config, which inherits what concerns the whole model."""
    if config.get("text_config") is None:
        return _Fields(config), False
    inner = _Fields(config).section("text_config")
    if inner is None:
        raise InputError(f"{source}: text_config must be an object, not {shown(config['text_config'])}")
    shared = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")
    inherited = {key: config[key] for key in shared if key in config}
    own = {key: value for key, value in inner.values.items() if value is not None}
    return _Fields({**inherited, **own}), True


def _family(fields: _Fields, wrapped: bool, source: str) -> _Family:
    """The family of the model; an unsupported one ends the reading, as its other fields mean something else."""
    supported = f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
    model_type = fields.values.get("model_type")
    architectures = fields.values.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(entry, str) for entry in architectures)
    ):
        raise InputError(f"{source}: architectures must be a list of names, not {shown(architectures)}")
    if model_type is None:
        known = [key for key, family in _FAMILIES.items() if family.architecture in (architectures or ())]
        if not known:
            raise InputError(f"{source}: model_type is missing and architectures names no known one; {supported}")
        return _FAMILIES[known[0]]
    if not isinstance(model_type, str):
        raise InputError(f"{source}: model_type must be text, not {shown(model_type)}")
    if model_type not in _FAMILIES:
        raise InputError(f"{source}: model_type {model_type!r:.60} is not supported; {supported}")
    if architectures and not wrapped and not any("CausalLM" in entry for entry in architectures):
        raise InputError(
            f"{source}: architectures {', '.join(architectures)!r:.60} generates no text; "
            f"give a model whose architecture ends in ForCausalLM"
        )
    return _FAMILIES[model_type]


def _attention_fields(fields: _Fields, family: _Family, hidden: int) -> dict[str, Any]:
    """Arguments of `Attention` that all layers share."""
    heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", default=heads)
    if fields.values.get("head_dim") is None:
        head_dim = hidden // heads if heads else 0
        if heads and hidden % heads:
            fields.fault("hidden_size", f"{hidden} is not a multiple of num_attention_heads {heads}; give head_dim")
    else:
        head_dim = fields.count("head_dim")
    if heads and kv_heads and heads % kv_heads:
        fields.fault("num_attention_heads", f"{heads} is not a multiple of num_key_value_heads {kv_heads}")
    bias = fields.flag("attention_bias")
    qk_norm = fields.flag("use_qk_norm")
    return {
        "query_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "qkv_bias": bias if family.qkv_bias is None else family.qkv_bias,
        "output_bias": bias if family.output_bias is None else family.output_bias,
        "qk_norm": qk_norm if family.qk_norm is None else family.qk_norm,
    }


def _windows(fields: _Fields, family: _Family, layers: int) -> list[int | None]:
    """Attention window of every layer, None for full attention."""
    window = fields.count("sliding_window", default=0)
    kinds = fields.rows("layer_types")
    pattern = fields.count("sliding_window_pattern", default=0)
    spelled_out = kinds is not None or pattern > 0
    used = fields.flag("use_sliding_window", default=spelled_out or family.window == "always")
    full_layers = fields.count(
        "max_window_layers", default=_QWEN_FULL_LAYERS if family.window == "opt-in" else 0, minimum=0
    )
    if not used:
        window = 0
    if kinds is not None:
        known = {"full_attention": False, "sliding_attention": True}
        odd = [kind for kind in kinds if not isinstance(kind, str) or kind not in known]
        if odd:
            fields.fault("layer_types", f"may hold {' and '.join(known)}, not {shown(odd[0])}")
            return []
        slides = [known[kind] for kind in kinds]
        if layers and len(kinds) != layers:
            fields.fault("layer_types", f"has {len(kinds)} entries for num_hidden_layers {layers}")
        if any(slides) and not window:
            fields.fault("layer_types", "has sliding_attention layers but sliding_window is missing or switched off")
    elif pattern:
        # Every pattern-th layer sees the whole context.
        slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        slides = [used and layer >= full_layers for layer in range(layers)]
    return [window if slide and window else None for slide in slides]


def _ffns(fields: _Fields, family: _Family, hidden: int, layers: int) -> list[Ffn]:
    """FFN of every layer; empty where a fault forbids to build one."""
    if not family.experts_field:
        sparse = [False] * layers
    else:
        step = fields.count("decoder_sparse_step", default=1)
        dense_first = fields.count("first_k_dense_replace", default=0, minimum=0)
        dense_rows = fields.rows("mlp_only_layers") or []
        for row in dense_rows:
            if layers and (fault := count_fault("mlp_only_layers entry", row, 0, layers - 1)):
                fields.faults.append(fault)
                return []
        dense = set(dense_rows) if layers else set()
        sparse = [
            layer >= dense_first and layer not in dense and step > 0 and (layer + 1) % step == 0
            for layer in range(layers)
        ]
    dense_ffn = moe_ffn = None
    if not all(sparse) or not layers:
        intermediate = fields.count("intermediate_size")
        bias = fields.flag("mlp_bias") if family.mlp_bias is None else family.mlp_bias
        if hidden and intermediate:
            dense_ffn = DenseFfn(hidden=hidden, intermediate=intermediate, bias=bias)
    if family.experts_field:
        moe_ffn = _moe_ffn(fields, family, hidden)
    chosen = [moe_ffn if is_sparse else dense_ffn for is_sparse in sparse]
    return [ffn for ffn in chosen if ffn is not None]


def _moe_ffn(fields: _Fields, family: _Family, hidden: int) -> MoeFfn | None:
    """The mixture of experts all sparse layers share; None where a field is at fault."""
    before = len(fields.faults)
    width = fields.count(family.expert_width_field)
    experts = fields.count(family.experts_field)
    per_token = fields.count("num_experts_per_tok")
    shared = 0
    if family.shared_width_field:
        shared = fields.count(family.shared_width_field, minimum=0)
    elif family.shared_count_field:
        shared = fields.count(family.shared_count_field, minimum=0) * width
        if shared > MAX_COUNT:
            fields.fault(family.shared_count_field, f"times {family.expert_width_field} is {shared}, above {MAX_COUNT}")
    if experts and per_token > experts:
        fields.fault("num_experts_per_tok", f"{per_token} is above {family.experts_field} {experts}")
    if not hidden or len(fields.faults) > before:
        return None
    return MoeFfn(
        hidden=hidden,
        expert_intermediate=width,
        experts=experts,
        experts_per_token=per_token,
        shared_intermediate=shared,
        shared_gate=family.shared_gate and shared > 0,
    )


def _dtype(fields: _Fields) -> str:
    """16-bit type the model is served in."""
    key = "dtype" if fields.values.get("dtype") is not None else "torch_dtype"
    given = fields.text(key).removeprefix("torch.")
    if given and given not in _DTYPES:
        fields.fault(key, f"must be one of {', '.join(_DTYPES)}, not {shown(given)}")
    return _DTYPES.get(given, "bf16")


def _formats(fields: _Fields) -> tuple[str | None, str | None]:
    """Weight format and KV format the quantisation section asks for; None where it leaves them 16 bit."""
    section = fields.section("quantization_config")
    if section is None:
        return None, None
    method = section.text("quant_method").lower()
    weight: str | None = None
    if method in ("fp8", "fbgemm_fp8"):
        weight = "fp8"
    elif method == "modelopt":
        if section.text("quant_algo").upper() == "FP8":
            weight = "fp8"
        else:
            section.fault("quant_algo", f"must be FP8, not {shown(section.values.get('quant_algo'))}")
    elif method in ("gptq", "awq"):
        key = "w_bit" if method == "awq" and "bits" not in section.values else "bits"
        weight = _weight_only(section, key)
    elif method == "compressed-tensors":
        weight = _compressed_tensors(section)
    elif not section.faults:
        section.fault(
            "quant_method",
            f"{shown(method)} is not supported; supported: {', '.join(_QUANT_METHODS)}" if method else "is missing",
        )
    return weight, _kv_format(section)


def _weight_only(section: _Fields, bits_key: str) -> str | None:
    """Format of integer weights behind 16-bit activations."""
    bits = section.count(bits_key)
    group = section.values.get("group_size")
    # -1 and null mean one scale per channel: a group longer than ours, so that counting ours errs upwards.
    if group is not None and group != -1 and section.count("group_size") in range(1, GROUP_WEIGHTS):
        section.fault("group_size", f"{group} is not supported; supported: {GROUP_WEIGHTS} and above, or -1")
    if bits and bits not in (4, 8):
        section.fault(bits_key, f"{bits} is not supported; supported: 4 and 8")
    return {4: "w4a16", 8: "w8a16"}.get(bits)


def _compressed_tensors(section: _Fields) -> str | None:
    """Format of a compressed-tensors section, whose groups must agree."""
    groups = section.section("config_groups")
    if groups is None or not groups.values:
        # Without groups only the KV cache is quantised.
        if not section.values.get("config_groups") and not section.values.get("kv_cache_scheme"):
            section.fault("config_groups", "is missing")
        return None
    found = set()
    for key in groups.values:
        group = groups.section(key)
        weights = group.section("weights") if group else None
        if group is None or weights is None:
            groups.fault(f"{key}.weights", "is missing")
            continue
        inputs = group.section("input_activations")
        kind = weights.text("type") or "int"
        if inputs is None:
            if kind == "float" and weights.values.get("num_bits") != 8:
                weights.fault("type", "'float' is supported with num_bits 8 only")
                continue
            found.add(_weight_only(weights, "num_bits"))
        elif {kind, inputs.text("type")} == {"float"} and (weights.count("num_bits") == inputs.count("num_bits") == 8):
            found.add("fp8")
        else:
            groups.fault(key, "must have 8-bit float weights and activations, or 4- or 8-bit weights alone")
    found.discard(None)
    if len(found) > 1:
        section.fault("config_groups", "mix number formats; one format for all blocks is supported")
    return found.pop() if found else None


def _kv_format(section: _Fields) -> str | None:
    """KV format a quantisation section asks for."""
    algo = section.text("kv_cache_quant_algo").upper()
    if algo and algo != "FP8":
        section.fault("kv_cache_quant_algo", f"must be FP8, not {shown(algo)}")
    scheme = section.section("kv_cache_scheme")
    if scheme is None:
        return "fp8" if algo else None
    bits = scheme.count("num_bits")
    kind = scheme.text("type") or "float"
    if bits and (bits != 8 or kind != "float"):
        scheme.fault("num_bits", f"{bits} of type {kind!r:.20} is not supported; supported: 8 of type 'float'")
    return "fp8"
