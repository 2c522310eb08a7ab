"""Reads the groups of a compressed-tensors section: a number format each, and the modules that are in it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from apex_opt.ir.checks import shown
from apex_opt.ir.held import MX_GROUP, NVFP4_GROUP, Held, Rule, Rules, block_sides, weight_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from apex_opt.ir.fields import Fields
    from apex_opt.ir.modules import ModuleNames

    Names = Callable[[Iterable[tuple[str, Sequence[str]]]], ModuleNames | None]

_MOST_GROUPS: Final = 1000
_KINDS: Final = ("int", "float")
_STRATEGIES: Final = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_EVERYTHING: Final = "Linear"
"""The class of all projections."""
_CLASS_NAME: Final = re.compile(r"[A-Z]\w*")


def read_groups(section: Fields, names: Names) -> Rules:
    """Rules of all groups: those for modules by name in order, then those for all projections.

    Parameters
    ----------
    names : modules of some lists, each with its key
    """
    _refuse_sparse_weights(section)
    _refuse_sparse_format(section)
    groups = section.section("config_groups")
    if groups is None or not groups.values:
        # Without groups only the KV cache is quantised.
        if not any(section.values.get(key) for key in ("config_groups", "kv_cache_scheme", "sparsity_config")):
            section.fault("config_groups", "is missing")
        return ()
    if len(groups.values) > _MOST_GROUPS:
        section.fault("config_groups", f"has {len(groups.values)} entries; at most {_MOST_GROUPS} are read")
        return ()
    by_name: list[Rule] = []
    for_all: list[Rule] = []
    for key in groups.values:
        group = groups.section(key)
        weights = group.section("weights") if group else None
        if group is None or weights is None:
            groups.fault(key, "has no weights")
            break
        _refuse_sparse_format(group)
        held = _group_format(groups, key, weights, group.section("input_activations"))
        targets = group.names("targets")
        for target in targets:
            if _CLASS_NAME.fullmatch(target) and target != _EVERYTHING:
                group.fault("targets", f"hold the class {target!r:.40}, which is not supported; {_EVERYTHING!r} is")
        named = names([("config_groups", [target for target in targets if not _CLASS_NAME.fullmatch(target)])])
        if named is not None:
            by_name.append(Rule(named, held))
        if not targets or _EVERYTHING in targets:
            for_all.append(Rule(None, held))
    return (*by_name, *for_all)


def _refuse_sparse_weights(section: Fields) -> None:
    """Refuse weights that are stored without their zeros: engines expand them, or have kernels not described here."""
    sparsity = section.section("sparsity_config")
    if sparsity is None or not sparsity.values:
        return
    form = sparsity.text("format")
    if form not in ("", "dense"):
        without = "sparsity_config" if section.values.get("config_groups") else "quantization_config"
        sparsity.fault(
            "format",
            f"{form!r:.40} (sparse weights) is not supported; for the dense model, give a config.json without "
            f"{without}",
        )


def _refuse_sparse_format(section: Fields) -> None:
    """Refuse packings that leave out every other weight: they are smaller than the dense ones of the same bits."""
    form = section.text("format")
    if "sparse" in form or form.endswith("-24"):
        section.fault(
            "format", f"{form!r:.40} (sparse weights) is not supported; give the config.json of a dense model"
        )


def _group_format(groups: Fields, key: str, weights: Fields, inputs: Fields | None) -> Held | None:
    """Format of one group."""
    kind, bits, group = weights.text("type") or "int", weights.values.get("num_bits"), weights.values.get("group_size")
    strategy = weights.text("strategy")
    for name, given, known in (("type", kind, _KINDS), ("strategy", strategy, _STRATEGIES)):
        if given and given not in known:
            weights.fault(name, f"must be {', '.join(known)}, not {shown(given)}")
            return None
    block = block_sides(weights, "block_structure") if strategy == "block" else None
    if inputs is None:
        if kind == "float" and bits == 4 and group in (MX_GROUP, NVFP4_GROUP):
            # A scale of one byte per 16 weights takes what one of two bytes per 32 does.
            return Held("mxfp4" if group == MX_GROUP else "w4a16g32", group=int(group))
        if kind == "float" and bits != 8:
            weights.fault(
                "type", "'float' is supported with num_bits 8, or with num_bits 4 and group_size 32 or 16, only"
            )
            return None
        return weight_only(weights, "num_bits", "group_size")
    taken = inputs.values.get("num_bits")
    if {kind, inputs.text("type")} == {"float"}:
        if weights.count("num_bits") == inputs.count("num_bits") == 8 and strategy != "group" and group != MX_GROUP:
            return Held("fp8", block=block)
        if bits == taken == 8 and group == inputs.values.get("group_size") == MX_GROUP:
            return Held("mxfp8", group=MX_GROUP)
        if bits == taken == 4 and group == NVFP4_GROUP:
            return Held("nvfp4", group=NVFP4_GROUP)
    if kind == (inputs.text("type") or "int") == "int" and bits == taken == 8 and strategy != "group":
        return Held("w8a8")
    groups.fault(
        key,
        "must have 8-bit weights, in no groups, and activations, both float or both int, float ones of 8 bits in "
        "groups of 32 or of 4 bits in groups of 16, or 4- or 8-bit weights alone",
    )
    return None
