"""The usual decoder: layers of attention and FFN whose fields have their usual names.

`Decoder` reads most families by a few facts; its functions read one kind of cell each, for readers of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from apex_opt.ir.cells import Attention, AttentionCell, DenseFfn, Ffn, LatentAttention, Matrix, MoeFfn
from apex_opt.ir.checks import MAX_COUNT, count_fault, shown
from apex_opt.ir.families.base import Layers
from apex_opt.ir.families.listed import published_kind
from apex_opt.ir.model import Block

if TYPE_CHECKING:
    from apex_opt.ir.families.base import Sizes
    from apex_opt.ir.fields import Fields

_QWEN_FULL_LAYERS: Final = 28
"""Leading layers without a window where a Qwen file does not give max_window_layers (transformers)."""


_FREQUENCIES: Final = ("decoder_sparse_step", "moe_layer_freq", "first_k_dense_replace", "mlp_only_layers")
"""Fields that tell which layers have experts where the file does not list them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A reader of layers by facts of a family; None means that the file says.

    Norms, their bias and `parallel` are those of `Block`. `positions` are rows of learned positions beyond the longest
    context, None where there are none; without them queries and keys are turned by position unless `rotary` is False.
    `ffn_ratio` is the width of the FFN by the residual stream's where the file
    gives none, 0 where it has to.
    """

    latent: bool = False
    qkv_bias: bool | None = False
    output_bias: bool | None = False
    qk_norm: bool | None = False
    qk_norm_whole: bool = False
    sinks: bool = False
    mlp_bias: bool | None = False
    gated: bool = True
    ffn_ratio: int = 0
    norms: int | None = None
    norm_bias: bool = False
    parallel: bool | None = False
    positions: int | None = None
    rotary: bool = True
    embedding_norm: bool = False
    head_bias: bool | None = False
    window: Literal["never", "always", "opt-in", "unused"] = "never"
    window_pattern: int = 0
    kv_heads: int | None = None
    experts_field: str = ""
    expert_width_field: str = "moe_intermediate_size"
    shared_width_field: str = ""
    shared_count_field: str = ""
    shared_gate: bool = False
    expert_bias: bool = False
    router_bias: bool = False

    def __call__(self, fields: Fields, size: Sizes) -> Layers:
        """Layers of attention behind windows, and of dense FFNs and mixtures of experts in turn."""
        attention = latent_fields(fields) if self.latent else self._attention_fields(fields, size.hidden)
        windows = window_of_layers(fields, size.layers, self.window, self.window_pattern)
        ffns = self.ffns(fields, size)
        parallel = fields.flag("use_parallel_residual") if self.parallel is None else self.parallel
        before, after = self._around(fields, size)
        if fields.faults:
            return Layers([])
        cell: AttentionCell = (LatentAttention if self.latent else Attention)(hidden=size.hidden, **attention)
        own: dict[str, Any] = {"norms": self.norms, "norm_bias": self.norm_bias, "parallel": parallel}
        blocks = [
            Block(attention=cell.with_window(window), ffn=ffn, **own) for window, ffn in zip(windows, ffns, strict=True)
        ]
        return Layers(blocks, before, after)

    def _around(self, fields: Fields, size: Sizes) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
        """What the model has beside its embedding, and beside its head."""
        before, after = [], []
        if self.positions is not None:
            rows = fields.count("max_position_embeddings") + self.positions
            before.append(Matrix("positions", rows, size.hidden))
        if self.embedding_norm:
            before.append(Matrix("embedding norm", size.hidden, 1 + self.norm_bias))
        if fields.flag("lm_head_bias") if self.head_bias is None else self.head_bias:
            after.append(Matrix("head bias", size.vocab, 1))
        return tuple(before), tuple(after)

    def _attention_fields(self, fields: Fields, hidden: int) -> dict[str, Any]:
        """Arguments of `Attention` that all layers share."""
        heads = head_fields(fields, hidden, self.kv_heads)
        bias = _fact(fields, "attention_bias", self.qkv_bias)
        output_bias = fields.flag("attention_out_bias", default=bias)
        return {
            **heads,
            "qk_norm_whole": self.qk_norm_whole,
            "sinks": self.sinks,
            "rotary": self.rotary and self.positions is None,
            "qkv_bias": bias,
            "output_bias": output_bias if self.output_bias is None else self.output_bias,
            "qk_norm": _fact(fields, "use_qk_norm", self.qk_norm),
        }

    def ffns(self, fields: Fields, size: Sizes, sparse: list[bool] | None = None) -> list[Ffn]:
        """FFN of every layer; empty where a fault forbids to build one.

        Parameters
        ----------
        fields, size
        sparse : list of bool or None    which layers are mixtures of experts; None leaves it to the usual fields
        """
        if sparse is not None:
            fields.idle(*(_FREQUENCIES if self.experts_field else ()))
        else:
            sparse = sparse_layers(fields, size.layers) if self.experts_field else [False] * size.layers
        dense_ffn = moe_ffn = None
        fields.idle("intermediate_size")  # where there is no dense FFN
        unsure = not size.layers and (not self.experts_field or fields.get("intermediate_size") is not None)
        if not all(sparse) or unsure:
            usual = self.ffn_ratio * size.hidden if self.ffn_ratio else None
            intermediate = fields.count("intermediate_size", default=usual)
            bias = _fact(fields, "mlp_bias", self.mlp_bias)
            if size.hidden and intermediate:
                dense_ffn = DenseFfn(hidden=size.hidden, intermediate=intermediate, gated=self.gated, bias=bias)
        if self.experts_field:
            moe_ffn = self.moe_ffn(fields, size.hidden)
        chosen = [moe_ffn if is_sparse else dense_ffn for is_sparse in sparse]
        return [ffn for ffn in chosen if ffn is not None]

    def moe_ffn(self, fields: Fields, hidden: int) -> MoeFfn | None:
        """The mixture of experts all sparse layers share; None where a field is at fault."""
        before = len(fields.faults)
        width = fields.count(self.expert_width_field)
        experts = fields.count(self.experts_field)
        per_token = fields.count("num_experts_per_tok")
        shared = 0
        if self.shared_width_field:
            shared = fields.count(self.shared_width_field, minimum=0)
        elif self.shared_count_field:
            shared = fields.count(self.shared_count_field, minimum=0)
            shared *= fields.count("moe_shared_expert_intermediate_size", default=width)
            if shared > MAX_COUNT:
                text = f"times {self.expert_width_field} is {shared}, above {MAX_COUNT}"
                fields.fault(self.shared_count_field, text)
        if experts and per_token > experts:
            fields.fault("num_experts_per_tok", f"{per_token} is above {fields.name(self.experts_field)} {experts}")
        if not hidden or len(fields.faults) > before:
            return None
        return MoeFfn(
            hidden=hidden,
            expert_intermediate=width,
            experts=experts,
            experts_per_token=per_token,
            shared_intermediate=shared,
            shared_gate=self.shared_gate and shared > 0,
            bias=self.expert_bias,
            router_bias=self.router_bias,
        )


def _fact(fields: Fields, key: str, fixed: bool | None) -> bool:
    """A switch that the file tells, or that is always so in a family, whose files may repeat it and not contradict."""
    told = fields.flag(key, default=bool(fixed))
    if fixed is not None and told != fixed:
        fields.fault(key, f"{shown(told)} is not supported in this family")
    return told


def head_fields(fields: Fields, hidden: int, kv_heads: int | None = None) -> dict[str, Any]:
    """Query heads, KV heads and their width.

    Parameters
    ----------
    fields
    hidden : int                width of the residual stream
    kv_heads : int or None      of files that leave the field out; None is one per query head
    """
    heads = fields.count("num_attention_heads")
    # Where the class has a default, it holds for files that leave the field out; null is one KV head per query head.
    default = heads if kv_heads is None or fields.states("num_key_value_heads") else kv_heads
    found = fields.count("num_key_value_heads", default)
    if fields.get("head_dim") is None:
        head_dim = hidden // heads if heads else 0
        if heads and hidden % heads:
            heads_name = fields.name("num_attention_heads")
            fields.fault("hidden_size", f"{hidden} is not a multiple of {heads_name} {heads}; give head_dim")
    else:
        head_dim = fields.count("head_dim")
    if heads and found and heads % found:
        fields.fault(
            "num_attention_heads", f"{heads} is not a multiple of {fields.name('num_key_value_heads')} {found}"
        )
    return {"query_heads": heads, "kv_heads": found, "head_dim": head_dim}


def latent_fields(fields: Fields) -> dict[str, Any]:
    """Arguments of `LatentAttention` that all layers share."""
    if fields.flag("attention_bias"):
        fields.fault("attention_bias", "true is not supported with latent attention")
    fields.idle("num_key_value_heads", "qk_head_dim")  # of the heads that a latent vector unfolds to
    fields.count("head_dim", default=0, minimum=0)
    return {
        "query_heads": fields.count("num_attention_heads"),
        "q_lora_rank": None if fields.get("q_lora_rank") is None else fields.count("q_lora_rank"),
        "kv_lora_rank": fields.count("kv_lora_rank"),
        "nope_head_dim": fields.count("qk_nope_head_dim"),
        "rope_head_dim": fields.count("qk_rope_head_dim"),
        "v_head_dim": fields.count("v_head_dim"),
    }


def layer_kinds(fields: Fields, layers: int, known: tuple[str, ...], field: str = "layer_types") -> list[str] | None:
    """`layer_types`, of which only some are known; None where the field is absent, empty at a fault.

    Parameters
    ----------
    fields
    layers : int        that the model has, 0 where unknown
    known : of str      entries that there may be
    field : str         another that lists kinds
    """
    kinds = fields.rows(field)
    if kinds is None:
        return None
    kinds = [published_kind(kind, known) for kind in kinds]
    odd = [kind for kind in kinds if not isinstance(kind, str) or kind not in known]
    if odd:
        fields.fault(field, f"may hold {' and '.join(known)}, not {shown(odd[0])}")
        return []
    if layers and len(kinds) != layers:
        fields.fault(field, f"has {len(kinds)} entries for {fields.name('num_hidden_layers')} {layers}")
    return kinds


def window_of_layers(
    fields: Fields, layers: int, used_by: Literal["never", "always", "opt-in", "unused"], every: int = 0
) -> list[int | None]:
    """Attention window of every layer, None for full attention.

    Parameters
    ----------
    fields
    layers : int        that the model has
    used_by : str       whether the family has windows where the file gives one: always, only if it says so, or never,
                        when a window is refused or, "unused", left out
    every : int         every so manieth layer sees all where the file does not say; 0: none
    """
    window = fields.count("sliding_window", default=0, minimum=0)
    kinds = layer_kinds(fields, layers, ("full_attention", "sliding_attention"))
    pattern = fields.count("sliding_window_pattern", default=every)
    spelled_out = kinds is not None or pattern > 0
    used = fields.flag("use_sliding_window", default=spelled_out or used_by == "always")
    full_layers = fields.count("max_window_layers", default=_QWEN_FULL_LAYERS if used_by == "opt-in" else 0, minimum=0)
    faulty = not window and bool(fields.get("sliding_window"))
    longest = fields.get("max_position_embeddings")
    within = not isinstance(longest, int) or window < longest
    if window and within and used_by == "never" and not used and fields.get("use_sliding_window") is None:
        text = "is not supported in this family: its class has no windows, and vLLM gives it one; give null"
        fields.fault("sliding_window", f"{window} {text}")
    if not used:
        window = 0
    if kinds is not None:
        slides = [kind == "sliding_attention" for kind in kinds]
        if any(slides) and not window and not faulty:
            fields.fault("layer_types", "has sliding_attention layers but sliding_window is missing or switched off")
    elif pattern:
        # Every pattern-th layer sees the whole context.
        slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
    else:
        slides = [used and layer >= full_layers for layer in range(layers)]
    return [window if slide and window else None for slide in slides]


def sparse_layers(fields: Fields, layers: int) -> list[bool]:
    """Whether each layer is a mixture of experts; empty at a fault."""
    kinds = layer_kinds(fields, layers, ("dense", "sparse"), "mlp_layer_types")
    if kinds is not None:
        fields.idle(*_FREQUENCIES)
        return [kind == "sparse" for kind in kinds]
    step = fields.count("decoder_sparse_step", default=1)
    every = fields.count("moe_layer_freq", default=1)
    dense_first = fields.count("first_k_dense_replace", default=0, minimum=0)
    dense_rows = fields.rows("mlp_only_layers") or []
    for row in dense_rows:
        if layers and (fault := count_fault("mlp_only_layers entry", row, 0, layers - 1)):
            fields.faults.append(fault)
            return []
    dense = set(dense_rows) if layers else set()
    return [
        layer >= dense_first
        and layer not in dense
        and (step > 0 and (layer + 1) % step == 0)
        and (every > 0 and layer % every == 0)
        for layer in range(layers)
    ]
