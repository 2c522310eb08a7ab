"""Families whose layers differ in windows, positions, heads or experts, told by a few facts of each.

Source: `transformers` 5.24, whose files of kolibri1 and flint state a window with the token itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from apex_opt.ir.cells import Attention, GatedAttention
from apex_opt.ir.checks import count_fault, shown
from apex_opt.ir.families.base import Family, Layers, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder, head_fields, sparse_layers, window_of_layers
from apex_opt.ir.families.listed import kinds_of
from apex_opt.ir.families.states import refuse
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields

_MIXES: Final = {"dense": False, "sparse": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layered:
    """A reader of layers that differ, by facts of a family; `ffns` are those of the FFNs, and of projections' biases.

    Parameters
    ----------
    ffns : Decoder      reader of dense FFNs and mixtures of experts
    every, first : int  where the file lists no kinds, layer `first` and each `every` later see all; 0: all do
    still : str         layers without positions: those that see "all", where others have windows; or "never" any
    gate : str          what scales outputs of attention: nothing, an output per "head" or per "element"
    qkv_bias : bool     on the projections of query, key and value where `attention_bias` says so
    qk_norm : bool      one norm each on query and key heads
    sinks : bool        a learned logit per head
    norms : int or None as of `Block`
    parallel : bool     attention and FFN read one norm
    kv_heads : int or None      of files that leave the field out
    """

    ffns: Decoder
    every: int = 0
    first: int = 0
    still: Literal["all", "never"] = "never"
    gate: Literal["", "head", "element"] = ""
    qkv_bias: bool = True
    output_bias: bool = True
    qk_norm: bool = False
    sinks: bool = False
    norms: int | None = None
    parallel: bool = False
    kv_heads: int | None = None

    def __call__(self, fields: Fields, size: Sizes) -> Layers:
        """Layers of attention behind windows or without, and of dense FFNs and mixtures of experts in turn."""
        heads = head_fields(fields, size.hidden, self.kv_heads)
        queries = _queries(fields, size.layers, heads)
        windows = self._windows(fields, size.layers)
        mixtures = kinds_of(fields, "mlp_layer_types", size.layers, _MIXES)
        if mixtures is None:
            mixtures = sparse_layers(fields, size.layers) if self.ffns.experts_field else [False] * size.layers
        if any(mixtures) and not self.ffns.experts_field:
            fields.fault("mlp_layer_types", "has sparse layers, which this family does not have")
        ffns = self.ffns.ffns(fields, size, mixtures)
        bias = fields.flag("attention_bias")
        turned = self._turned(fields, windows)
        if fields.faults:
            return Layers([])
        common: dict[str, Any] = {
            "hidden": size.hidden,
            "qkv_bias": bias and self.qkv_bias,
            "output_bias": bias and self.output_bias,
            "qk_norm": self.qk_norm,
            "sinks": self.sinks,
            "gated": self.gate == "head",
        }
        kind = GatedAttention if self.gate == "element" else Attention
        cells = {
            key: kind(**common, **{**heads, "query_heads": key[0]}, window=key[1], rotary=key[2])
            for key in set(zip(queries, windows, turned, strict=True))
        }
        blocks = [
            Block(attention=cells[key], ffn=ffn, norms=self.norms, parallel=self.parallel)
            for key, ffn in zip(zip(queries, windows, turned, strict=True), ffns, strict=True)
        ]
        return Layers(blocks)

    def _windows(self, fields: Fields, layers: int) -> list[int | None]:
        """Window of every layer."""
        if fields.get("layer_types") is None and self.every:
            pattern = fields.count("global_attn_every_n_layers", default=self.every)
            seen = [(layer - self.first) % max(pattern, 1) == 0 for layer in range(layers)]
            fields = fields.replaced(
                {"layer_types": ["full_attention" if every else "sliding_attention" for every in seen]}
            )
        return window_of_layers(fields.replaced({"sliding_window_pattern": None}), layers, "always")

    def _turned(self, fields: Fields, windows: list[int | None]) -> list[bool]:
        """Whether queries and keys of each layer are turned by position; a base of 0 tells that they are not."""
        bases = fields.rows("layer_rope_theta")
        if bases is not None:
            if len(bases) != len(windows):
                fields.fault("layer_rope_theta", f"has {len(bases)} entries for num_hidden_layers {len(windows)}")
            return [base != 0 for base in bases]
        still = self.still == "all" and any(windows)
        return [not still or window is not None for window in windows]


def _queries(fields: Fields, layers: int, heads: dict[str, Any]) -> list[int]:
    """Query heads of every layer: those listed, else all the same."""
    listed = fields.rows("num_attention_heads_per_layer")
    if listed is None:
        return [heads["query_heads"]] * layers
    if layers and len(listed) != layers:
        fields.fault("num_attention_heads_per_layer", f"has {len(listed)} entries for num_hidden_layers {layers}")
    for entry in listed:
        if fault := count_fault("num_attention_heads_per_layer entry", entry):
            fields.faults.append(fault)
            return []
        if heads["kv_heads"] and entry % heads["kv_heads"]:
            name = fields.name("num_key_value_heads")
            fields.fault("num_attention_heads_per_layer", f"{entry} is not a multiple of {name} {heads['kv_heads']}")
            return []
    return listed


def _afmoe(fields: Fields, size: Sizes) -> Layers:
    """Trinity, whose leading layers are dense, and whose layers that see all have no positions."""
    first = fields.count("num_dense_layers", default=1, minimum=0)
    fields.idle("route_scale", "global_attn_every_n_layers")
    return _AFMOE(fields.filled({"first_k_dense_replace": first}), size)


def _exaone_moe(fields: Fields, size: Sizes) -> Layers:
    """K-EXAONE, whose published file lists by another name which layers have experts."""
    listed = fields.rows("is_moe_layer")
    if odd := [each for each in listed or () if not isinstance(each, bool)]:
        fields.fault("is_moe_layer", f"may hold true and false, not {shown(odd[0])}")
    elif listed is not None:
        fields = fields.filled({"mlp_layer_types": ["sparse" if each else "dense" for each in listed]})
    return _EXAONE_MOE(fields, size)


def _laguna(fields: Fields, size: Sizes) -> Layers:
    """Laguna, whose gates are one for each head."""
    refuse(fields, "gating", True, "per-head")
    return _LAGUNA(fields, size)


def _hyperclovax(fields: Fields, size: Sizes) -> Layers:
    """HyperCLOVA X, which may have norms after its cells as well as before them."""
    post = fields.flag("use_post_norm", default=True)
    return Decoder(qkv_bias=None, output_bias=None, mlp_bias=None, norms=4 if post else 2)(fields, size)


def _cohere_moe(fields: Fields, size: Sizes) -> Layers:
    """Cohere's mixtures of experts, of which leading layers may be dense ones of another width."""
    for key in ("first_k_dense_replace", "prefix_dense_intermediate_size"):
        if fields.get(key):
            fields.fault(key, "is not supported: leading dense layers")
    width = fields.get("intermediate_size")
    return _COHERE_MOE(fields.filled({"moe_intermediate_size": width}), size)


_SHARED_EXPERTS: Final = Decoder(experts_field="num_experts", shared_count_field="num_shared_experts", router_bias=True)
_SHARED_WIDTH: Final = Decoder(experts_field="num_experts", shared_width_field="shared_expert_intermediate_size")
_AFMOE: Final = Layered(ffns=_SHARED_EXPERTS, every=4, first=3, still="all", gate="element", qk_norm=True, norms=4)
_EXAONE_MOE: Final = Layered(ffns=_SHARED_EXPERTS, every=4, first=3, still="all", qk_norm=True, kv_heads=32)
_LAGUNA: Final = Layered(
    ffns=replace(_SHARED_WIDTH, router_bias=True), gate="head", qk_norm=True, kv_heads=8, qkv_bias=False
)
_COHERE_MOE: Final = Layered(
    ffns=Decoder(experts_field="num_experts", shared_count_field="num_shared_experts"),
    every=4,
    first=3,
    still="all",
    norms=1,
    parallel=True,
)
_GRANITE: Final = {"sliding_window": 128}

FAMILIES: Final[dict[str, Family]] = {
    "afmoe": Family(
        architecture="AfmoeForCausalLM",
        read=_afmoe,
        modules=module_names(),
        implied={"num_shared_experts": 0},
        defaults=sizes(200192, 2048, 6144, 32, 16, 16384)
        | {"head_dim": 128, "sliding_window": 1024, "num_experts": 64, "num_experts_per_tok": 6}
        | {"moe_intermediate_size": 1408, "num_shared_experts": 2},
    ),
    "exaone_moe": Family(
        architecture="ExaoneMoeForCausalLM",
        read=_exaone_moe,
        modules=module_names(),
        implied={"first_k_dense_replace": 1, "num_shared_experts": 1},
        defaults=sizes(102400, 4096, 16384, 32, 32, 2048)
        | {"num_key_value_heads": 32, "sliding_window": 4096, "num_experts": 64, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 1024},
    ),
    "hy_v3": Family(
        architecture="HYV3ForCausalLM",
        idle=("enable_moe_fp32_combine",),
        read=Layered(ffns=replace(_SHARED_EXPERTS, mlp_bias=None), qk_norm=True, kv_heads=8),
        modules=module_names(),
        implied={"first_k_dense_replace": 1, "num_shared_experts": 1},
    ),
    "laguna": Family(
        architecture="LagunaForCausalLM",
        read=_laguna,
        idle=("moe_apply_router_weight_on_input",),
        modules=module_names(),
        implied={"first_k_dense_replace": 1},
    ),
    "mellum": Family(
        architecture="MellumForCausalLM",
        read=Layered(ffns=Decoder(experts_field="num_experts"), qk_norm=True, kv_heads=4),
        modules=module_names(),
    ),
    "kolibri1": Family(
        architecture="Kolibri1ForCausalLM",
        read=Layered(ffns=_SHARED_WIDTH, every=5, first=4, qk_norm=True, norms=4, kv_heads=4),
        modules=module_names(shared=within("mlp.shared_experts")),
    ),
    "flint": Family(
        architecture="FlintForCausalLM",
        read=Layered(ffns=_SHARED_WIDTH, qk_norm=True, sinks=True, kv_heads=4),
        modules=module_names(shared=within("mlp.shared_expert")),
    ),
    "muse_glimmer_text": Family(
        architecture="MuseGlimmerForCausalLM",
        idle=("qk_scale_factor",),
        read=Layered(ffns=Decoder(), every=4, first=3, still="all", gate="element", norms=4),
        modules=module_names(),
    ),
    "cohere2_moe": Family(
        architecture="Cohere2MoeForCausalLM",
        idle=("prefix_dense_sliding_window_pattern", "shared_expert_combination_strategy"),
        read=_cohere_moe,
        modules=module_names(),
        implied={"num_shared_experts": 0},
        tied=True,
    ),
    "cwm": Family(
        architecture="CwmForCausalLM",
        read=Layered(ffns=Decoder(mlp_bias=None), every=4, kv_heads=8),
        modules=module_names(),
    ),
    "ministral": Family(
        architecture="MinistralForCausalLM",
        read=Layered(ffns=Decoder(), kv_heads=8),
        modules=module_names(),
    ),
    "granite_swa": Family(
        architecture="GraniteSWAForCausalLM",
        read=Layered(ffns=Decoder(mlp_bias=None), every=4, sinks=True, kv_heads=4),
        modules=module_names(),
        implied=_GRANITE,
        tied=True,
    ),
    "granitemoe_swa": Family(
        architecture="GraniteMoeSWAForCausalLM",
        read=Layered(
            ffns=Decoder(
                experts_field="num_local_experts",
                expert_width_field="intermediate_size",
                shared_width_field="shared_intermediate_size",
            ),
            every=4,
            sinks=True,
        ),
        modules=module_names(
            experts=within("block_sparse_moe.experts.0", ("w1", "w2", "w3")), shared=within("shared_mlp")
        ),
        implied=_GRANITE | {"shared_intermediate_size": 0},
    ),
    "hyperclovax": Family(architecture="HyperCLOVAXForCausalLM", read=_hyperclovax, modules=module_names()),
}
