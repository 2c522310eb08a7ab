"""Reads the quantisation section of a checkpoint: in which format each of its matrices is, and that of the KV cache.

Sections come from several tools, each with its own words for a format and for the modules that are in it. All end up
as rules in order: the first that names a module tells its format. A key that may change what is quantised and is not
understood is refused, never passed over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.checks import shown
from apex_opt.ir.compressed_tensors import read_groups
from apex_opt.ir.held import MX_GROUP, NVFP4_GROUP, Held, Rule, Rules, block_sides, weight_only
from apex_opt.ir.modules import EXPRESSION, ModuleNames, is_literal
from apex_opt.ir.patterns import Effort, PatternError
from apex_opt.ir.scheme import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from apex_opt.ir.fields import Fields

QUANTISATION_KEYS: Final = ("quantization_config", "compression_config")
"""Where a config.json tells of quantisation; the first that is there holds."""

_ALIASES: Final = {
    "compressed_tensors": "compressed-tensors",
    "gptq_marlin": "gptq",
    "awq_marlin": "awq",
    "auto_round": "auto-round",
    "intel/auto-round": "auto-round",
    "inc": "auto-round",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
}
"""Other spellings of methods."""

_LEFT_OUT_KEYS: Final = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers", "exclude")
_OF_EXPERTS: Final = ("ignore", "exclude_modules")
_KV_KEYS: Final = ("kv_cache_quant_algo", "kv_cache_scheme")
_KV_IN_FP8: Final = ("FP8", "FP8_E4M3", "STATIC")
_HALF_BITS: Final = 16
_BLOCK_KEYS: Final = ("block_name_to_quantize", "to_quant_block_names", "quant_block_list")
_MOST_EXPERTS: Final = 8
"""Experts of a layer that are looked at: files that name more name all."""

_SUSPECT: Final = re.compile(
    r"bits|group|modul|layer|block|ignore|exclude|include|skip|target|quant|dynamic|convert|scheme|config|spars|head|cache"
)
"""What is in the names of keys that change what is quantised, and how."""
_HARMLESS: Final = frozenset(
    (
        *(
            "quant_method",
            "activation_scheme",
            "quantization_status",
            "quantizer",
            "quant_mode",
            "is_checkpoint_fp8_serialized",
        ),
        *("module_name_preceding_first_block", "modules_to_fuse"),
        *("model_file_base_name", "cache_block_outputs", "cache_examples_on_gpu", "exllama_config", "static_groups"),
        *("transform_config", "global_compression_ratio", "enable_quanted_input", "algo_config", "dynamic_range"),
        *("is_marlin_format", "act_group_aware", "hyb_act_group_aware", "super_bits", "super_group_size"),
    )
)
"""Keys of such names that change nothing of what is counted here."""
_READ: Final[Mapping[str, tuple[str, ...]]] = {
    # The last ones only repeat what quantized_layers say.
    "fp8": ("weight_block_size", "moe_quant_algo", "quantized_layers", "quant_algo", "config_groups", "group_size"),
    "modelopt": ("quant_algo", "config_groups", "group_size", "quantized_layers"),
    "gptq": (
        *("bits", "group_size", "dynamic", "modules_in_block_to_quantize", "lm_head", "lm_head_quantized"),
        "block_name_to_quantize",
    ),
    "awq": ("bits", "w_bit", "group_size", "q_group_size"),
    "auto-round": (
        *("bits", "group_size", "act_bits", "extra_config", *_BLOCK_KEYS),
        # Of activations, which are in 16 bit wherever the rest is read; and of how the tool searched.
        *("act_dynamic", "act_group_size", "dynamic_max_gap"),
    ),
    "quark": ("global_quant_config", "layer_quant_config", "layer_type_quant_config"),
    "compressed-tensors": ("config_groups", "sparsity_config"),
}
"""Keys of such names that the reader of a method takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """What a checkpoint says of its number formats.

    Parameters
    ----------
    method : str                name as vLLM has it; empty where nothing is quantised
    rules : tuple of Rule       the first that names a module tells its format; none leaves it in 16 bit
    kv_format : str or None     None where the section leaves the cache 16 bit
    experts : tuple of int      those to look at, as all of a layer are held alike: the first, and some that rules name
    """

    method: str = ""
    rules: Rules = ()
    kv_format: str | None = None
    experts: tuple[int, ...] = (0,)

    def held(self, layer: int, modules: Iterable[str]) -> Held | None:
        """How a part of a layer is stored, None being 16 bit: as the widest of its modules, so that counting errs up.

        Raises
        ------
        PatternError    matching the modules takes more steps than a file may cost
        """
        if not self.rules:
            return None
        widest: Held | None = None
        for module in modules:
            rule = next((rule for rule in self.rules if rule.names is None or rule.names.hold(layer, module)), None)
            if rule is None or rule.held is None:
                return None
            if widest is None or rule.held.bits > widest.bits:
                widest = rule.held
        return widest

    def scheme(self, formats: Sequence[str], held: Iterable[Held]) -> Scheme | None:
        """The method, and for each of the formats of the checkpoint the widest extent of its scales."""
        if not formats:
            return None
        found = list(held)
        first, *further = (self._part([entry for entry in found if entry.format == name]) for name in formats)
        return replace(first, further=tuple(further))

    def _part(self, held: Sequence[Held]) -> Scheme:
        groups = [entry.group for entry in held if entry.group is not None]
        block = next((entry.block for entry in held if entry.block is not None), None)
        return Scheme(method=self.method, group=max(groups, default=None), block=block)


def read_quantisation(fields: Fields) -> Quantisation:
    """The `quantization_config` of a model, or the older `compression_config`; faults are noted in `fields`."""
    section = _section(fields)
    if section is None:
        return Quantisation()
    method = _method(section)
    if method not in _READERS:
        if method and not section.faults:
            _refuse_method(section, method)
        elif not section.faults:
            section.fault("quant_method", "is missing")
        return Quantisation()
    _refuse_unknown_keys(section, method)
    reader = _Reader(section, Effort())
    rules = (*_expert_rules(fields, reader), *_READERS[method](reader))
    # Beside experts in a format of their own, two of the lists tell what is not in that one.
    keys = [key for key in _LEFT_OUT_KEYS if key not in _OF_EXPERTS or not section.values.get("moe_quant_algo")]
    left_out = reader.names((key, section.names(key)) for key in keys)
    if left_out is not None:
        rules = (Rule(left_out, None), *rules)
    first = next((rule for rule in rules if rule.names is not None and rule.names.head), None)
    # ModelOpt's own checkpoints of 2026 have it in 4 bits: counting it in 16 errs upwards.
    if first is not None and first.held is not None and method != "modelopt":
        section.fault("lm_head", "is among what is quantised, which is not supported: it is counted in 16 bit")
    named = {number for rule in rules if rule.names is not None for number in rule.names.experts}
    return Quantisation(
        method=_named(section, method, rules),
        rules=rules,
        kv_format=_kv_format(section),
        experts=tuple(sorted({0, *named})[:_MOST_EXPERTS]),
    )


def _section(fields: Fields) -> Fields | None:
    """What tells of quantisation, under whichever key; None where nothing does."""
    for key in QUANTISATION_KEYS:
        section = fields.section(key)
        if section is not None:
            # Some files hold the section within a section: ModelOpt's own, and old ones of compressed-tensors.
            inner = section.section("quantization") or section.section("quantization_config")
            if inner is None:
                return section
            kept = {name: value for name, value in section.values.items() if name == "sparsity_config"}
            return type(inner)({**kept, **inner.values}, inner.prefix, inner.faults)
    for key in ("quantization", "quant_config", "quantize_config", "hf_quant_config", "sparsity_config"):
        if fields.values.get(key):
            fields.fault(key, "is not read; what is quantised belongs into quantization_config")
    return None


def _method(section: Fields) -> str:
    """Name of the method, as this package spells it; told by other keys where it is missing."""
    method = section.text("quant_method").lower()
    if not method:
        if section.values.get("quant_algo") is not None:
            return "modelopt"
        if section.values.get("load_in_4bit") or section.values.get("load_in_8bit"):
            return "bitsandbytes"
        if section.values.get("config_groups"):
            return "compressed-tensors"
    return _ALIASES.get(method, method)


def _named(section: Fields, method: str, rules: Rules) -> str:
    """The method as vLLM calls it, which for some depends on the formats, and on whether they are told by module."""
    if method == "modelopt":
        formats = {rule.held.format for rule in rules if rule.held is not None}
        if len(formats) > 1 or section.text("quant_algo").upper() == "MIXED_PRECISION":
            return "modelopt_mixed"
        return "modelopt" if formats <= {"fp8"} else "modelopt_fp4"
    return method


def _refuse_method(section: Fields, method: str) -> None:
    """Refuse a method by its name, with what comes nearest."""
    bits = next((section.values[key] for key in ("bits", "w_bit", "nbits", "weight_bits") if key in section.values), 4)
    wide = bits == 8 or section.values.get("load_in_8bit") is True or "8" in method
    section.fault(
        "quant_method",
        f"{shown(method)} is not supported; supported: {', '.join(SUPPORTED_METHODS)}; for its size, give the "
        f"config.json of the model it was made of and --weights={'w8a16' if wide else 'w4a16'}",
    )


def _refuse_unknown_keys(section: Fields, method: str) -> None:
    """Refuse keys that may change what is quantised and that the reader of the method does not take."""
    known = _HARMLESS.union(_LEFT_OUT_KEYS, _KV_KEYS, _READ.get(method, ()))
    for key, value in section.values.items():
        if value and key not in known and _SUSPECT.search(key.lower()):
            section.fault(key, "is not understood and may change what is quantised; remove it if it does not")
            return


@dataclass(frozen=True, slots=True)
class _Reader:
    """A section, and the steps that matching its names may still take."""

    section: Fields
    effort: Effort

    def names(self, lists: Iterable[tuple[str, Sequence[str]]]) -> ModuleNames | None:
        """Modules that some lists, each with its key, name together; None where they name none, or at a fault."""
        found = dict(lists)
        entries = [name for names in found.values() for name in names]
        try:
            return ModuleNames.parse(entries, self.effort) if entries else None
        except PatternError as error:
            key = next(key for key, names in found.items() if error.entry in names)
            self.section.fault(key, f"holds {shown(error.entry)}, which cannot be matched ({error})")
            return None

    def overrides(
        self, key: str, held_of: Callable[[str, Fields], Held | None], pattern: Callable[[str], str] = str
    ) -> Rules:
        """Rules of an object that maps names to what is held otherwise, in its order.

        Parameters
        ----------
        held_of : reads the format of one entry, by its name and what it says
        pattern : the name of an entry as `ModuleNames` takes it
        """
        section = self.section.section(key)
        rules: list[tuple[Held | None, list[str]]] = []
        literal: dict[Held | None, list[str]] = {}
        for name in section.values if section is not None else ():
            assert section is not None
            entry = section.section(name)
            if entry is None:
                if section.values[name] is None:
                    section.fault(name, "must be an object, not None")
                return ()
            held = held_of(name, entry)
            if section.faults:
                return ()
            wanted = pattern(name)
            if is_literal(wanted):
                # No two literal names are of the same module, and a file may list thousands.
                if held not in literal:
                    rules.append((held, literal.setdefault(held, [])))
                literal[held].append(wanted)
            else:
                rules.append((held, [wanted]))
        found: list[Rule] = []
        for held, names in rules:
            named = self.names([(key, names)])
            if named is None:
                break
            found.append(Rule(named, held))
        return tuple(found)


def _expert_rules(fields: Fields, reader: _Reader) -> Rules:
    """What DeepSeek-V4 says of its experts beside the section: 4 bits, or that they are as the rest."""
    if fields.text("expert_dtype") != "fp4" or reader.section.values.get("moe_quant_algo"):
        return ()
    return _mxfp4(reader)


def _fp8(reader: _Reader) -> Rules:
    section = reader.section
    own = Rule(None, Held("fp8", block=block_sides(section, "weight_block_size")))
    if not section.values.get("moe_quant_algo"):
        for key in ("quantized_layers", "config_groups"):
            if section.values.get(key):
                section.fault(key, "is not understood without moe_quant_algo")
        return (own,)
    return (*reader.overrides("quantized_layers", lambda _, entry: _algorithm(entry)), own)


def _mxfp4(reader: _Reader) -> Rules:
    # The engines quantise the routed experts alone, whatever the list of what to leave out.
    return (Rule(ModuleNames.parse(("*.experts.*",), reader.effort), Held("mxfp4", group=MX_GROUP)),)


def _gptq(reader: _Reader) -> Rules:
    section = reader.section
    form = section.text("checkpoint_format") or section.text("format")
    if form and form not in ("gptq", "gptq_v2", "marlin", "bitblas"):
        section.fault("checkpoint_format", f"{form!r:.30} is not supported; supported: gptq, gptq_v2, marlin, bitblas")
    _refuse_quantised_head(section)
    own = weight_only(section, "bits", "group_size")

    def changed(name: str, entry: Fields) -> Held | None:
        if name.startswith("-:"):
            return None
        _refuse_unknown_keys(entry, "gptq")
        merged = {key: section.values.get(key) for key in ("bits", "group_size")} | dict(entry.values)
        return weight_only(type(entry)(merged, entry.prefix, entry.faults), "bits", "group_size")

    rules = reader.overrides("dynamic", changed, lambda name: EXPRESSION + name.removeprefix("-:").removeprefix("+:"))
    listed = section.rows("modules_in_block_to_quantize") or []
    flat = [name for row in listed for name in (row if isinstance(row, list) else [row])]
    if any(not isinstance(name, str) for name in flat):
        section.fault("modules_in_block_to_quantize", "must hold names, or lists of names")
        return rules
    targets = reader.names([("modules_in_block_to_quantize", flat)])
    return (*rules, Rule(targets, own))


def _awq(reader: _Reader) -> Rules:
    values = reader.section.values
    bits = "w_bit" if "bits" not in values and "w_bit" in values else "bits"
    group = "q_group_size" if "group_size" not in values and "q_group_size" in values else "group_size"
    return (Rule(None, weight_only(reader.section, bits, group)),)


def _auto_round(reader: _Reader) -> Rules:
    section = reader.section

    def held(name: str, entry: Fields) -> Held | None:
        if name:
            _refuse_unknown_keys(entry, "auto-round")
        merged = {key: section.values.get(key) for key in ("bits", "group_size", "data_type", "act_bits")}
        merged |= dict(entry.values)
        whole = type(entry)(merged, entry.prefix, entry.faults)
        if merged.get("bits") == _HALF_BITS:
            return None
        kind, activations = whole.text("data_type") or "int", merged.get("act_bits")
        if kind != "int":
            whole.fault("data_type", f"{kind!r:.30} is not supported; supported: 'int'")
        if activations is not None and (not isinstance(activations, int) or activations < _HALF_BITS):
            whole.fault("act_bits", f"{shown(activations)} is not supported; supported: 16")
        return weight_only(whole, "bits", "group_size")

    own = held("", section)
    if own is None and not section.faults:
        section.fault("bits", "16 quantises nothing")
    blocks = reader.names((key, _block_names(section, key)) for key in _BLOCK_KEYS)
    return (*reader.overrides("extra_config", held), Rule(blocks, own))


def _block_names(section: Fields, key: str) -> list[str]:
    """Blocks that auto-round quantises, given as text with commas, as a list, or as a list of lists; none means all."""
    given = section.values.get(key)
    rows = given.split(",") if isinstance(given, str) else section.rows(key) or []
    flat = [name for row in rows for name in (row if isinstance(row, list) else [row])]
    if any(not isinstance(name, str) for name in flat):
        section.fault(key, "must hold names, or lists of names")
        return []
    return [name.strip() for name in flat if name.strip()]


def _modelopt(reader: _Reader) -> Rules:
    section = reader.section
    algo = section.text("quant_algo").upper()
    if algo == "MIXED_PRECISION":
        if not section.values.get("quantized_layers"):
            section.fault("quantized_layers", "is missing")
        return reader.overrides("quantized_layers", lambda _, entry: _algorithm(entry))
    if not algo and section.values.get("config_groups"):
        return read_groups(section, reader.names)
    return (Rule(None, _algorithm(section)),)


def _algorithm(section: Fields) -> Held | None:
    """Format that a ModelOpt section, or an entry of one for a single module, tells."""
    found = {
        "FP8": Held("fp8"),
        "FP8_PER_CHANNEL_PER_TOKEN": Held("fp8"),
        "FP8_PB_WO": Held("fp8", block=(128, 128)),
        "NVFP4": Held("nvfp4", group=NVFP4_GROUP),
        "MXFP8": Held("mxfp8", group=MX_GROUP),
        # Half a byte and a scale of one byte per 16 weights are what a scale of two bytes per 32 takes.
        "W4A16_NVFP4": Held("w4a16g32", group=NVFP4_GROUP),
    }
    algo = section.text("quant_algo").upper()
    if algo not in found:
        given = section.values.get("quant_algo")
        if given is None or isinstance(given, str):  # what is no text was told of when it was read
            section.fault("quant_algo", f"must be {', '.join(found)}, not {shown(given)}")
        return None
    held = found[algo]
    if held.group and section.count("group_size", default=held.group) not in (0, held.group):
        section.fault("group_size", f"{section.values['group_size']} is not supported; supported: {held.group}")
    return held


def _quark(reader: _Reader) -> Rules:
    section = reader.section
    own = section.section("global_quant_config")
    if own is None:
        section.fault("global_quant_config", "is missing")
        return ()
    if section.values.get("layer_type_quant_config"):
        section.fault("layer_type_quant_config", "is not supported; layer_quant_config is")
    return (
        *reader.overrides("layer_quant_config", lambda _, entry: _quark_format(entry)),
        Rule(None, _quark_format(own)),
    )


def _quark_format(section: Fields) -> Held | None:
    """Format of one of Quark's descriptions of a matrix."""
    weight, inputs = section.section("weight"), section.section("input_tensors")
    if weight is None:
        return None
    kinds = weight.text("dtype"), inputs.text("dtype") if inputs else ""
    scheme = weight.text("qscheme")
    if scheme not in ("", "per_tensor", "per_channel"):
        weight.fault("qscheme", f"{scheme!r:.30} is not supported; supported: per_tensor and per_channel")
    if kinds == ("fp8_e4m3", "fp8_e4m3"):
        return Held("fp8")
    if kinds == ("int8", "int8"):
        return Held("w8a8")
    section.fault("weight.dtype", f"must be fp8_e4m3 or int8, as that of input_tensors, not {shown(kinds[0])}")
    return None


def _compressed_tensors(reader: _Reader) -> Rules:
    return read_groups(reader.section, reader.names)


_READERS: Final[Mapping[str, Callable[[_Reader], Rules]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "quark": _quark,
    "compressed-tensors": _compressed_tensors,
}
SUPPORTED_METHODS: Final = tuple(_READERS)


def _refuse_quantised_head(section: Fields) -> None:
    for key in ("lm_head", "lm_head_quantized"):
        if section.values.get(key):
            section.fault(key, "true is not supported: the LM head is counted in 16 bit")


def _kv_format(section: Fields) -> str | None:
    """KV format a quantisation section asks for."""
    export = section.section("export")
    if export is not None and export.rows("kv_cache_group"):
        return "fp8"
    for key in _KV_KEYS:
        given: Any = section.values.get(key)
        if given is None or given == "":
            continue
        if isinstance(given, str):
            if given.upper() in ("NONE", "AUTO"):
                continue
            if given.upper() not in _KV_IN_FP8:
                section.fault(key, f"must be FP8, not {shown(given)}")
            return "fp8"
        scheme = section.section(key)
        if scheme is None:
            return None
        bits, kind = scheme.count("num_bits"), scheme.text("type") or "float"
        if bits and (bits != 8 or kind != "float"):
            scheme.fault("num_bits", f"{bits} of type {kind!r:.20} is not supported; supported: 8 of type 'float'")
        return "fp8"
    return None
