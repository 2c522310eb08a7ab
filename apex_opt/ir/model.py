"""The Transformer intermediate representation: what a model is made of, as far as serving it costs anything.

Vocabulary of APEX (Lin et al., "APEX: An Extensible and Dynamism-Aware Simulator for Automated Parallel Execution in
LLM Serving", 2024): a Model is an embedding, runs of identical Blocks and an LM head; a Block is a chain of cells
(attention, then a dense or a mixture-of-experts FFN); a cell is a set of equal tasks, the pieces a parallel template
deals out to devices. Layers that differ form several runs, never an average.

All counts are exact integers of weights. "Matrix parameters" are those that a number format may quantise; the others
(norms, biases, router, embedding, LM head, and matrices that the checkpoint leaves out) stay 16 bit. `quantised` of a
matrix tells which of the formats of the checkpoint it is in, counted from 1, or 0 where it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apex_opt.errors import InputError, join_faults
from apex_opt.ir.formats import FORMATS, KV_BYTES, get_format, is_format

if TYPE_CHECKING:
    from apex_opt.ir.scheme import Scheme

MAX_COUNT: Final = 2**31
"""Largest width, count or length taken for real; anything above is a fault of the input."""

MAX_LAYERS: Final = 100_000
"""Largest depth taken for real; layers are walked one by one when they are merged into runs."""

DTYPES: Final = ("bf16", "fp16")


def shown(value: object) -> str:
    """A faulty value as an error message quotes it: short, on one line."""
    try:
        return f"{value!r:.40}"
    except ValueError:
        # Python refuses to print integers of thousands of digits.
        return "a number of thousands of digits"


def count_fault(name: str, value: object, minimum: int = 1, maximum: int = MAX_COUNT) -> str | None:
    """Why `value` is no whole number within the limits, in words that name it; None where it is one."""
    if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum:
        return None
    return f"{name} must be a whole number from {minimum} to {maximum}, not {shown(value)}"


def _check_counts(owner: str, minimum: int = 1, maximum: int = MAX_COUNT, **values: object) -> None:
    """Refuse the dimensions of one cell, all at once."""
    faults = [fault for name, value in values.items() if (fault := count_fault(name, value, minimum, maximum))]
    if faults:
        raise join_faults(owner, faults)


def _check_flags(owner: str, **values: object) -> None:
    """Refuse switches that are not True or False."""
    faults = [
        f"{name} must be true or false, not {shown(value)}"
        for name, value in values.items()
        if not isinstance(value, bool)
    ]
    if faults:
        raise join_faults(owner, faults)


def _check_forms(owner: str, **values: object) -> None:
    """Refuse numbers of a format that are none."""
    _check_counts(
        owner,
        0,
        len(FORMATS),
        **{name: int(value) if value is True or value is False else value for name, value in values.items()},
    )


Matrices = tuple[tuple[int, int], ...]
"""Matrices, each as its `quantised` and its weights."""


def stored_bytes(weight_format: str, kept: int, matrices: Matrices) -> int:
    """Bytes of matrices in a format, beside `kept` weights that stay 16 bit."""
    wanted, weights_in = get_format(weight_format), dict[str, int]()
    for quantised, weights in matrices:
        if quantised:
            name = wanted.part(quantised).name
            weights_in[name] = weights_in.get(name, 0) + weights
        else:
            kept += weights
    return 2 * kept + sum(get_format(name).weight_bytes(weights) for name, weights in weights_in.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Grouped-query attention: QKV projection, attention over the context, output projection.

    Parameters
    ----------
    hidden : int            width of the residual stream
    query_heads : int       a multiple of `kv_heads`
    kv_heads : int          heads held in the KV cache
    head_dim : int          elements per head; query_heads * head_dim need not equal hidden
    qkv_bias, output_bias : bool    a bias on the projection
    qk_norm : bool          one RMS norm each on query and key heads, shared by all heads
    qk_norm_whole : bool    those norms span the whole width of all heads instead, as in MiniMax-M2
    sinks : bool            one learned logit per query head beside the context, as in gpt-oss
    window : int or None    tokens of context a query sees; None is the whole context
    quantised : int         number format of the projections of query, key and value
    output_quantised : int  that of the output projection
    """

    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    sinks: bool = False
    window: int | None = None
    quantised: int = 1
    output_quantised: int = 1

    def __post_init__(self) -> None:
        _check_counts(
            "attention",
            hidden=self.hidden,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            window=1 if self.window is None else self.window,
        )
        _check_flags(
            "attention",
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            qk_norm=self.qk_norm,
            qk_norm_whole=self.qk_norm_whole,
            sinks=self.sinks,
        )
        _check_forms("attention", quantised=self.quantised, output_quantised=self.output_quantised)
        if self.qk_norm_whole and not self.qk_norm:
            raise InputError("attention: qk_norm_whole needs qk_norm")
        if self.query_heads % self.kv_heads:
            raise InputError(f"attention: query_heads {self.query_heads} is not a multiple of kv_heads {self.kv_heads}")

    @property
    def query_dim(self) -> int:
        """Width of all query heads together."""
        return self.query_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together, which is that of all value heads."""
        return self.kv_heads * self.head_dim

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary embedding turns: all, at most."""
        return self.head_dim

    @property
    def tasks(self) -> int:
        """Pieces the cell can be cut into: a KV head with its group of query heads."""
        return self.kv_heads

    @property
    def projection_parameters(self) -> int:
        """Weights of the QKV and output projections."""
        return self.hidden * (self.query_dim + 2 * self.kv_dim) + self.query_dim * self.hidden

    @property
    def matrices(self) -> Matrices:
        """Weights of the matrices, each with its `quantised`."""
        qkv = self.hidden * (self.query_dim + 2 * self.kv_dim)
        return (self.quantised, qkv), (self.output_quantised, self.query_dim * self.hidden)

    @property
    def norm_parameters(self) -> int:
        """Weights of the query and key norms."""
        if self.qk_norm_whole:
            return self.query_dim + self.kv_dim
        return self.qk_norm * 2 * self.head_dim

    @property
    def parameters(self) -> int:
        """All weights of the cell: projections, biases, query and key norms, sinks."""
        return (
            self.projection_parameters
            + self.qkv_bias * (self.query_dim + 2 * self.kv_dim)
            + self.output_bias * self.hidden
            + self.norm_parameters
            + self.sinks * self.query_heads
        )

    @property
    def active_parameters(self) -> int:
        """Weights one token passes through: all of them."""
        return self.parameters

    @property
    def kv_elements_per_token(self) -> int:
        """Elements one token adds to the KV cache of this layer: its keys and values."""
        return 2 * self.kv_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention: keys and values of all heads are kept as one short vector per token.

    A token's latent vector (`kv_lora_rank`) and one rotary key (`rope_head_dim`) are all that the KV cache holds; every
    head expands them with its own matrix, or absorbs that matrix into its query and output. Heads can be cut over
    devices, the latent vector cannot: each device computes and keeps it whole.
    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1; tensor shapes as in `transformers`.

    Parameters
    ----------
    hidden : int                width of the residual stream
    query_heads : int           heads, each with its own keys and values expanded from the latent vector
    q_lora_rank : int or None   width to which queries are compressed first; None projects them directly
    kv_lora_rank : int          elements of the latent vector
    nope_head_dim : int         elements of a query or key head without position
    rope_head_dim : int         rotary elements of a query head, and of the one key that all heads share
    v_head_dim : int            elements of a value head
    quantised : int             number format of the projections of query, key and value
    output_quantised : int      that of the output projection
    """

    hidden: int
    query_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    quantised: int = 1
    output_quantised: int = 1

    def __post_init__(self) -> None:
        _check_counts(
            "latent attention",
            hidden=self.hidden,
            query_heads=self.query_heads,
            q_lora_rank=1 if self.q_lora_rank is None else self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank,
            nope_head_dim=self.nope_head_dim,
            rope_head_dim=self.rope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        _check_forms("latent attention", quantised=self.quantised, output_quantised=self.output_quantised)

    @property
    def qk_head_dim(self) -> int:
        """Elements of one query head, and of one expanded key head."""
        return self.nope_head_dim + self.rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements of one token in the KV cache: the latent vector and the rotary key."""
        return self.kv_lora_rank + self.rope_head_dim

    @property
    def kv_heads(self) -> int:
        """Heads held in the KV cache: the latent vector is one that all query heads share."""
        return 1

    @property
    def window(self) -> None:
        """Tokens of context a query sees: the whole context."""
        return None

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary embedding turns."""
        return self.rope_head_dim

    @property
    def tasks(self) -> int:
        """Pieces the cell can be cut into: the query heads."""
        return self.query_heads

    @property
    def down_parameters(self) -> int:
        """Weights of the projections from hidden to the latent vectors: whole on every device."""
        return self.hidden * ((self.q_lora_rank or 0) + self.latent_dim)

    @property
    def head_parameters(self) -> int:
        """Weights of one head's projections: its queries, and its keys and values out of the latent vector."""
        queries = (self.q_lora_rank or self.hidden) * self.qk_head_dim
        return queries + self.kv_lora_rank * (self.nope_head_dim + self.v_head_dim)

    @property
    def output_parameters(self) -> int:
        """Weights of the output projection of one head."""
        return self.v_head_dim * self.hidden

    @property
    def norm_parameters(self) -> int:
        """Weights of the norms of the latent vectors: whole on every device."""
        return (self.q_lora_rank or 0) + self.kv_lora_rank

    @property
    def matrices(self) -> Matrices:
        """Weights of the matrices, each with its `quantised`."""
        inner = self.down_parameters + self.query_heads * self.head_parameters
        return (self.quantised, inner), (self.output_quantised, self.query_heads * self.output_parameters)

    @property
    def parameters(self) -> int:
        """All weights of the cell: projections and norms."""
        heads = self.query_heads * (self.head_parameters + self.output_parameters)
        return self.down_parameters + heads + self.norm_parameters

    @property
    def active_parameters(self) -> int:
        """Weights one token passes through: all of them."""
        return self.parameters

    @property
    def kv_elements_per_token(self) -> int:
        """Elements one token adds to the KV cache of this layer."""
        return self.latent_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFfn:
    """Feed-forward network: up (and gate) projection, activation, down projection.

    Parameters
    ----------
    hidden : int            width of the residual stream
    intermediate : int      columns between the projections
    gated : bool            a gate projection beside the up projection, as in SwiGLU
    bias : bool             a bias on every projection
    quantised : int         number format of the up (and gate) projection
    down_quantised : int    that of the down projection
    """

    hidden: int
    intermediate: int
    gated: bool = True
    bias: bool = False
    quantised: int = 1
    down_quantised: int = 1

    def __post_init__(self) -> None:
        _check_counts("FFN", hidden=self.hidden, intermediate=self.intermediate)
        _check_flags("FFN", gated=self.gated, bias=self.bias)
        _check_forms("FFN", quantised=self.quantised, down_quantised=self.down_quantised)

    @property
    def tasks(self) -> int:
        """Pieces the cell can be cut into: the columns between the projections."""
        return self.intermediate

    @property
    def projection_parameters(self) -> int:
        """Weights of the projections."""
        return (2 + self.gated) * self.hidden * self.intermediate

    @property
    def matrices(self) -> Matrices:
        """Weights of the matrices, each with its `quantised`."""
        down = self.hidden * self.intermediate
        return (self.quantised, (1 + self.gated) * down), (self.down_quantised, down)

    @property
    def parameters(self) -> int:
        """All weights of the cell: projections and biases."""
        return self.projection_parameters + self.bias * ((1 + self.gated) * self.intermediate + self.hidden)

    @property
    def active_parameters(self) -> int:
        """Weights one token passes through: all of them."""
        return self.parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeFfn:
    """Mixture of experts: a router sends each token to a few gated FFNs, and perhaps to a shared one as well.

    Parameters
    ----------
    hidden : int                width of the residual stream
    expert_intermediate : int   columns between the projections of one expert
    experts : int               routed experts
    experts_per_token : int     routed experts that see one token, at most `experts`
    shared_intermediate : int   columns of the FFN every token passes through besides; 0 where there is none
    gated : bool                a gate projection beside the up projection of every expert
    shared_gate : bool          one output that scales the shared FFN per token, as in Qwen2-MoE
    bias : bool                 a bias on every projection of every routed expert, as in gpt-oss
    router_bias : bool          one more weight per routed expert that shifts its logit or its choice
    quantised : int             number format of the routed experts
    shared_quantised : int      that of the up (and gate) projection of the shared FFN
    shared_down_quantised : int     that of its down projection
    """

    hidden: int
    expert_intermediate: int
    experts: int
    experts_per_token: int
    shared_intermediate: int = 0
    gated: bool = True
    shared_gate: bool = False
    bias: bool = False
    router_bias: bool = False
    quantised: int = 1
    shared_quantised: int = 1
    shared_down_quantised: int = 1

    def __post_init__(self) -> None:
        _check_counts(
            "MoE",
            hidden=self.hidden,
            expert_intermediate=self.expert_intermediate,
            experts=self.experts,
            experts_per_token=self.experts_per_token,
        )
        _check_counts("MoE", minimum=0, shared_intermediate=self.shared_intermediate)
        _check_flags(
            "MoE",
            gated=self.gated,
            shared_gate=self.shared_gate,
            bias=self.bias,
            router_bias=self.router_bias,
        )
        _check_forms(
            "MoE",
            quantised=self.quantised,
            shared_quantised=self.shared_quantised,
            shared_down_quantised=self.shared_down_quantised,
        )
        if self.experts_per_token > self.experts:
            raise InputError(f"MoE: experts_per_token {self.experts_per_token} is above experts {self.experts}")
        if self.shared_gate and not self.shared_intermediate:
            raise InputError("MoE: shared_gate needs a shared_intermediate above 0")

    @property
    def tasks(self) -> int:
        """Pieces the cell can be cut into: the routed experts."""
        return self.experts

    @property
    def expert_parameters(self) -> int:
        """Weights of one routed expert's projections."""
        return (2 + self.gated) * self.hidden * self.expert_intermediate

    @property
    def expert_bias_parameters(self) -> int:
        """Weights of one routed expert's biases."""
        return self.bias * ((1 + self.gated) * self.expert_intermediate + self.hidden)

    @property
    def shared_parameters(self) -> int:
        """Weights of the shared FFN's projections."""
        return (2 + self.gated) * self.hidden * self.shared_intermediate

    @property
    def router_parameters(self) -> int:
        """Weights of the router and its bias, and of the shared FFN's scale where there is one."""
        return self.hidden * (self.experts + self.shared_gate) + self.router_bias * self.experts

    @property
    def matrices(self) -> Matrices:
        """Weights of the matrices, each with its `quantised`."""
        shared = self.hidden * self.shared_intermediate
        return (
            (self.quantised, self.experts * self.expert_parameters),
            (self.shared_quantised, (1 + self.gated) * shared),
            (self.shared_down_quantised, shared),
        )

    @property
    def parameters(self) -> int:
        """All weights of the cell."""
        expert = self.expert_parameters + self.expert_bias_parameters
        return self.experts * expert + self.shared_parameters + self.router_parameters

    @property
    def active_parameters(self) -> int:
        """Weights one token passes through."""
        expert = self.expert_parameters + self.expert_bias_parameters
        return self.experts_per_token * expert + self.shared_parameters + self.router_parameters


AttentionCell = Attention | LatentAttention
Ffn = DenseFfn | MoeFfn
Cell = AttentionCell | Ffn


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One layer: attention, then an FFN of the same width, each behind an RMS norm."""

    attention: AttentionCell
    ffn: Ffn

    def __post_init__(self) -> None:
        if self.attention.hidden != self.ffn.hidden:
            raise InputError(
                f"block: attention has hidden {self.attention.hidden} but the FFN {self.ffn.hidden}; make them equal"
            )

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.attention.hidden

    @property
    def cells(self) -> tuple[Cell, Cell]:
        """Cells in the order a token passes through them."""
        return (self.attention, self.ffn)

    @property
    def is_moe(self) -> bool:
        """Whether the FFN is a mixture of experts."""
        return isinstance(self.ffn, MoeFfn)

    @property
    def norm_parameters(self) -> int:
        """Weights of the two norms."""
        return 2 * self.hidden

    @property
    def matrices(self) -> Matrices:
        """Weights of the matrices, each with its `quantised`."""
        return *self.attention.matrices, *self.ffn.matrices

    @property
    def matrix_parameters(self) -> int:
        """Weights that a number format may quantise."""
        return sum(weights for quantised, weights in self.matrices if quantised)

    @property
    def parameters(self) -> int:
        """All weights of the layer."""
        return self.attention.parameters + self.ffn.parameters + self.norm_parameters

    @property
    def active_parameters(self) -> int:
        """Weights one token passes through."""
        return self.attention.active_parameters + self.ffn.active_parameters + self.norm_parameters

    def weight_bytes(self, weight_format: str) -> int:
        """Bytes of the layer's weights with its matrices in `weight_format` and the rest in 16 bit."""
        return stored_bytes(
            weight_format, self.parameters - sum(weights for _, weights in self.matrices), self.matrices
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`count` identical blocks that follow each other."""

    block: Block
    count: int

    def __post_init__(self) -> None:
        _check_counts("run of blocks", maximum=MAX_LAYERS, count=self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder-only Transformer.

    Parameters
    ----------
    name : str              for people
    hidden : int            width of the residual stream
    vocab : int             rows of the embedding and of the LM head
    tied_embeddings : bool  LM head and embedding are one matrix
    max_position : int      longest sequence in tokens the model is made for
    runs : tuple of Run     the layers in order; neighbouring runs differ
    dtype : str             "bf16" or "fp16": what is not quantised
    weight_format : str     name of a format: the block matrices as published
    kv_format : str or None key of `KV_BYTES` where the checkpoint asks for one
    scheme : Scheme or None how the checkpoint was quantised; None where it was not
    family : str            its `model_type`, of whose layout engines know; "" where unknown
    tower_heads : int or None    heads of the tower that reads images, 0 where they are not stated; None without one
    source : str            where the description comes from
    """

    name: str
    hidden: int
    vocab: int
    tied_embeddings: bool
    max_position: int
    runs: tuple[Run, ...]
    dtype: str
    weight_format: str
    kv_format: str | None
    source: str
    scheme: Scheme | None = None
    family: str = ""
    tower_heads: int | None = None

    def __post_init__(self) -> None:
        owner = f"model {self.name}"
        _check_counts(owner, hidden=self.hidden, vocab=self.vocab, max_position=self.max_position)
        _check_flags(owner, tied_embeddings=self.tied_embeddings)
        faults = []
        if not self.runs:
            faults.append("runs is empty; a model has at least one block")
        for position, run in enumerate(self.runs):
            if run.block.hidden != self.hidden:
                faults.append(f"runs[{position}] has hidden {run.block.hidden}, not the model's {self.hidden}")
            if position and run.block == self.runs[position - 1].block:
                faults.append(f"runs[{position}] repeats the block before it; add up their counts")
        if self.dtype not in DTYPES:
            faults.append(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if not is_format(self.weight_format):
            faults.append(f"weight_format must be one of {', '.join(FORMATS)}, not {self.weight_format!r}")
        if self.kv_format is not None and self.kv_format not in KV_BYTES:
            faults.append(f"kv_format must be one of {', '.join(KV_BYTES)} or absent, not {self.kv_format!r}")
        if faults:
            raise join_faults(owner, faults)

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return sum(run.count for run in self.runs)

    @property
    def is_moe(self) -> bool:
        """Whether any block is a mixture of experts."""
        return any(run.block.is_moe for run in self.runs)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding."""
        return self.vocab * self.hidden

    @property
    def lm_head_matrix_parameters(self) -> int:
        """Weights the LM head multiplies with, whether its own or the embedding's."""
        return self.vocab * self.hidden

    @property
    def lm_head_parameters(self) -> int:
        """Weights the LM head adds to the model: none where it is tied to the embedding."""
        return 0 if self.tied_embeddings else self.lm_head_matrix_parameters

    @property
    def matrix_parameters(self) -> int:
        """Weights that a number format may quantise."""
        return sum(run.count * run.block.matrix_parameters for run in self.runs)

    @property
    def parameters(self) -> int:
        """All weights, final norm included."""
        blocks = sum(run.count * run.block.parameters for run in self.runs)
        return self.embedding_parameters + blocks + self.hidden + self.lm_head_parameters

    @property
    def active_parameters(self) -> int:
        """Weights of everything one token passes through, embedding and LM head counted whole as publishers do."""
        blocks = sum(run.count * run.block.active_parameters for run in self.runs)
        return self.embedding_parameters + blocks + self.hidden + self.lm_head_parameters

    def weight_bytes(self, weight_format: str | None = None) -> int:
        """Bytes of one whole copy of the weights.

        Parameters
        ----------
        weight_format : str or None     format of the block matrices; None is the published one

        Raises
        ------
        UnknownNameError                no name of a format
        """
        wanted = self.weight_format if weight_format is None else weight_format
        outside = self.embedding_parameters + self.hidden + self.lm_head_parameters
        return sum(run.count * run.block.weight_bytes(wanted) for run in self.runs) + 2 * outside

    def kv_bytes_per_token(self, kv_bytes: int) -> int:
        """Bytes one token adds to the KV cache over all layers, while it lies within every window.

        Parameters
        ----------
        kv_bytes : int      bytes per element, a value of `KV_BYTES`
        """
        return kv_bytes * sum(run.count * run.block.attention.kv_elements_per_token for run in self.runs)
