"""Reads the quantisation section of a checkpoint: number format, KV format, and which matrices it leaves in 16 bit.

Sections come from several tools: `transformers` (modules_to_not_convert), compressed-tensors (targets, ignore) and
ModelOpt (exclude_modules, or ignore, in config.json or in a hf_quant_config.json beside it). All name modules by their
place in the checkpoint: literally, with `*` for any text, or as a regular expression behind `re:`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from apex_opt.ir.formats import GROUP_WEIGHTS, SMALL_GROUPS
from apex_opt.ir.model import count_fault, shown
from apex_opt.ir.scheme import Scheme

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from apex_opt.ir.fields import Fields

METHODS: Final = ("fp8", "fbgemm_fp8", "modelopt (FP8, NVFP4)", "mxfp4", "gptq", "awq", "compressed-tensors")

_LEFT_OUT_KEYS: Final = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers")
NVFP4_GROUP: Final = 16
MXFP4_GROUP: Final = 32
_SIDES: Final = re.compile(r"\d{1,9}x\d{1,9}")
_EXPRESSION: Final = "re:"
_WRAPPERS: Final = re.compile(r"(?:(?:model|language_model)\.)+(?=layers\.)")
_ONE_LAYER: Final = re.compile(r"layers\.(\d{1,9})(?:\.|$)")
_ROOTS: Final = ("model.", "language_model.model.", "model.language_model.")
"""What may stand before `layers.0` in the name of a module: multimodal checkpoints wrap their decoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleNames:
    """A list of modules, each with all that it holds.

    Names of one layer are kept by layer, so that a checkpoint which lists every module of every layer is read in time
    proportional to its list.
    """

    by_layer: Mapping[int, tuple[re.Pattern[str], ...]] = field(default_factory=dict)
    anywhere: tuple[re.Pattern[str], ...] = ()
    expressions: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def parse(cls, entries: Iterable[str]) -> ModuleNames:
        """The modules that entries name.

        Raises
        ------
        re.error    an entry behind `re:` is no regular expression
        """
        by_layer: dict[int, list[re.Pattern[str]]] = {}
        anywhere: list[re.Pattern[str]] = []
        expressions: list[re.Pattern[str]] = []
        for entry in dict.fromkeys(entries):
            if entry.startswith(_EXPRESSION):
                expressions.append(re.compile(entry.removeprefix(_EXPRESSION)))
                continue
            name = _WRAPPERS.sub("", entry, count=1) if _WRAPPERS.match(entry) else entry
            literal = "".join({"*": ".*", "?": "."}.get(letter) or re.escape(letter) for letter in name)
            pattern = re.compile(rf"(?:.*\.)?{literal}(?:\..*)?")
            layer = _ONE_LAYER.match(name)
            (by_layer.setdefault(int(layer[1]), []) if layer else anywhere).append(pattern)
        return cls(
            by_layer={layer: tuple(patterns) for layer, patterns in by_layer.items()},
            anywhere=tuple(anywhere),
            expressions=tuple(expressions),
        )

    def hold(self, layer: int, module: str) -> bool:
        """Whether a module of a layer, such as `mlp.down_proj`, is among them."""
        name = f"layers.{layer}.{module}"
        return (
            any(pattern.fullmatch(name) for pattern in self.by_layer.get(layer, ()))
            or any(pattern.fullmatch(name) for pattern in self.anywhere)
            or any(pattern.match(root + name) for pattern in self.expressions for root in _ROOTS)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantisation:
    """What a checkpoint says of its number formats.

    Parameters
    ----------
    weight_format, kv_format : str or None    None where the section leaves them 16 bit
    scheme : Scheme or None                   None where no weight is quantised
    targets : ModuleNames or None             modules the weight format is for; None stands for all
    left_out : ModuleNames                    modules it leaves in 16 bit all the same
    """

    weight_format: str | None = None
    kv_format: str | None = None
    scheme: Scheme | None = None
    targets: ModuleNames | None = None
    left_out: ModuleNames = ModuleNames()

    def covers(self, layer: int, modules: Iterable[str]) -> bool:
        """Whether the format covers a part of a layer: all of its modules, so that a part counted as 16 bit errs up."""
        if self.weight_format is None:
            return True
        return all(
            (self.targets is None or self.targets.hold(layer, module)) and not self.left_out.hold(layer, module)
            for module in modules
        )


def read_quantisation(fields: Fields) -> Quantisation:
    """The `quantization_config` of a model; faults are noted in `fields`."""
    section = fields.section("quantization_config")
    if section is None:
        return Quantisation()
    # ModelOpt's own file holds the section within a section, beside who produced it.
    section = section.section("quantization") or section
    method = section.text("quant_method").lower()
    if not method and section.values.get("quant_algo") is not None:
        method = "modelopt"
    weight: str | None = None
    targets: ModuleNames | None = None
    group: int | None = None
    block: tuple[int, int] | None = None
    if method in ("fp8", "fbgemm_fp8"):
        weight, block = "fp8", _block(section, "weight_block_size")
    elif method == "modelopt":
        weight = _modelopt(section)
        if weight == "nvfp4":
            method, group = "modelopt_fp4", NVFP4_GROUP
    elif method == "mxfp4":
        # The engines quantise the routed experts alone, whatever the list of what to leave out.
        weight, targets, group = "mxfp4", ModuleNames.parse(("*.experts.*",)), MXFP4_GROUP
    elif method in ("gptq", "awq"):
        weight = _weight_only(section, "w_bit" if method == "awq" and "bits" not in section.values else "bits")
        group = _group(section)
    elif method == "compressed-tensors":
        weight, targets, group, block = _compressed_tensors(section)
    elif not section.faults:
        section.fault(
            "quant_method",
            f"{shown(method)} is not supported; supported: {', '.join(METHODS)}" if method else "is missing",
        )
    left_out = _module_names((section, key) for key in _LEFT_OUT_KEYS)
    return Quantisation(
        weight_format=weight,
        kv_format=_kv_format(section),
        scheme=None if weight is None else Scheme(method=method, group=group, block=block),
        targets=targets,
        left_out=left_out,
    )


def _group(section: Fields) -> int | None:
    """Weights that share one scale; None where a scale is for a whole channel."""
    group = section.values.get("group_size")
    return None if group is None or group == -1 else section.count("group_size") or None


def _block(section: Fields, key: str) -> tuple[int, int] | None:
    """Outputs and inputs that share one scale, given as [128, 128] or "128x128"; None where absent."""
    given = section.values.get(key)
    if given is None:
        return None
    sides = [int(side) for side in given.split("x")] if isinstance(given, str) and _SIDES.fullmatch(given) else given
    if not isinstance(sides, list) or len(sides) != 2 or any(count_fault(key, side) for side in sides):
        section.fault(key, f"must be two whole numbers above 0, as [128, 128], not {shown(given)}")
        return None
    return sides[0], sides[1]


def _module_names(lists: Iterable[tuple[Fields, str]]) -> ModuleNames:
    """Modules that some lists, each the section that holds it and its key, name together."""
    entries: list[str] = []
    for section, key in lists:
        names = section.names(key)
        try:
            ModuleNames.parse(name for name in names if name.startswith(_EXPRESSION))
        except (re.error, RecursionError, OverflowError) as error:
            section.fault(key, f"holds no regular expression behind {_EXPRESSION} ({error!s:.60})")
        else:
            entries += names
    return ModuleNames.parse(entries)


def _modelopt(section: Fields) -> str | None:
    """Format of a ModelOpt section."""
    algo = section.text("quant_algo").upper()
    if algo == "NVFP4" and section.count("group_size", default=16) not in (0, 16):
        section.fault("group_size", f"{section.values['group_size']} is not supported; supported: 16")
    if algo not in ("FP8", "NVFP4"):
        section.fault("quant_algo", f"must be FP8 or NVFP4, not {shown(section.values.get('quant_algo'))}")
    return {"FP8": "fp8", "NVFP4": "nvfp4"}.get(algo)


def _weight_only(section: Fields, bits_key: str) -> str | None:
    """Format of integer weights behind 16-bit activations."""
    bits = section.count(bits_key)
    if bits and bits not in (4, 8):
        section.fault(bits_key, f"{bits} is not supported; supported: 4 and 8")
        return None
    group = section.values.get("group_size")
    # -1 and null mean one scale per channel: a group longer than ours, so that counting ours errs upwards.
    length = GROUP_WEIGHTS if group is None or group == -1 else section.count("group_size")
    least = GROUP_WEIGHTS if bits == 8 else SMALL_GROUPS[-1]
    if bits and length in range(1, least):
        section.fault("group_size", f"{group} is not supported with {bits} bits; supported: {least} and above, or -1")
    if bits == 4:
        return "w4a16" if length >= GROUP_WEIGHTS else "w4a16g32"
    return "w8a16" if bits else None


def _compressed_tensors(
    section: Fields,
) -> tuple[str | None, ModuleNames | None, int | None, tuple[int, int] | None]:
    """Format, targets, group and block of a compressed-tensors section, whose groups must agree on the format."""
    groups = section.section("config_groups")
    if groups is None or not groups.values:
        # Without groups only the KV cache is quantised.
        if not section.values.get("config_groups") and not section.values.get("kv_cache_scheme"):
            section.fault("config_groups", "is missing")
        return None, None, None, None
    found: set[str | None] = set()
    members: list[Fields] = []
    scales: list[int | None] = []
    blocks: list[tuple[int, int] | None] = []
    for key in groups.values:
        group = groups.section(key)
        weights = group.section("weights") if group else None
        if group is None or weights is None:
            groups.fault(f"{key}.weights", "is missing")
            continue
        found.add(_group_format(groups, key, weights, group.section("input_activations")))
        members.append(group)
        scales.append(_group(weights))
        blocks.append(_block(weights, "block_structure") if weights.text("strategy") == "block" else None)
    found.discard(None)
    if len(found) > 1:
        section.fault("config_groups", "mix number formats; one format for all blocks is supported")
    # "Linear" is the class of all projections.
    everything = any("Linear" in (names := group.names("targets")) or not names for group in members)
    targets = None if everything else _module_names((group, "targets") for group in members)
    longest = max((scale for scale in scales if scale), default=None)
    block = next((sides for sides in blocks if sides), None)
    return (found.pop() if found else None), targets, longest, block


def _group_format(groups: Fields, key: str, weights: Fields, inputs: Fields | None) -> str | None:
    """Format of one group of a compressed-tensors section."""
    kind, bits, group = weights.text("type") or "int", weights.values.get("num_bits"), weights.values.get("group_size")
    if inputs is None:
        if kind == "float" and bits == 4 and group == SMALL_GROUPS[-1]:
            return "mxfp4"
        if kind == "float" and bits != 8:
            weights.fault("type", "'float' is supported with num_bits 8, or with num_bits 4 and group_size 32, only")
            return None
        return _weight_only(weights, "num_bits")
    if {kind, inputs.text("type")} == {"float"}:
        if weights.count("num_bits") == inputs.count("num_bits") == 8:
            return "fp8"
        if bits == inputs.values.get("num_bits") == 4 and group == 16:
            return "nvfp4"
    groups.fault(
        key,
        "must have 8-bit float weights and activations, 4-bit ones in groups of 16, or 4- or 8-bit weights alone",
    )
    return None


def _kv_format(section: Fields) -> str | None:
    """KV format a quantisation section asks for."""
    given = section.values.get("kv_cache_scheme")
    keys = ("kv_cache_quant_algo", *(("kv_cache_scheme",) if isinstance(given, str) else ()))
    algos = [(key, algo) for key in keys if (algo := section.text(key).upper())]
    for key, algo in algos:
        if algo != "FP8":
            section.fault(key, f"must be FP8, not {shown(algo)}")
    scheme = None if isinstance(given, str) else section.section("kv_cache_scheme")
    if scheme is None:
        return "fp8" if algos else None
    bits = scheme.count("num_bits")
    kind = scheme.text("type") or "float"
    if bits and (bits != 8 or kind != "float"):
        scheme.fault("num_bits", f"{bits} of type {kind!r:.20} is not supported; supported: 8 of type 'float'")
    return "fp8"
