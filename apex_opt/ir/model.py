"""The Transformer intermediate representation: what a model is made of, as far as serving it costs anything.

Vocabulary of APEX (Lin et al., "APEX: An Extensible and Dynamism-Aware Simulator for Automated Parallel Execution in
LLM Serving", 2024): a Model is an embedding, runs of identical Blocks and an LM head; a Block is a chain of cells
(attention, then a dense or a mixture-of-experts FFN); a cell is a set of equal pieces, which a parallel template deals
out to devices (`apex_opt.ir.cells`). Layers that differ form several runs, never an average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from apex_opt.errors import InputError, join_faults
from apex_opt.ir.cells import AttentionCell, Cell, Cut, Ffn, Matrix, stored_bytes
from apex_opt.ir.cells.operations import Elementwise, HyperConnect, Product
from apex_opt.ir.checks import check_counts, check_flags
from apex_opt.ir.formats import FORMATS, KV_BYTES, is_format
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from apex_opt.ir.cells.operations import Linear
    from apex_opt.ir.scheme import Scheme

MAX_LAYERS: Final = 4_096
"""Largest depth taken for real: the deepest model published has hundreds, and what a plan needs grows with them."""

DTYPES: Final = ("bf16", "fp16")

_HYPER_SCALES: Final = 3  # learned factors of the three kinds of weights of a hyper connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One layer: attention, then an FFN of the same width, each behind a norm; what it has besides, it tells itself.

    Parameters
    ----------
    attention : AttentionCell           what mixes tokens
    ffn : Ffn                           what takes each token alone
    norms : int or None                 norms of the residual stream; None is one before each cell that is there
    norm_bias : bool                    they are LayerNorms with a bias
    parallel : bool                     both cells read the same hidden state
    one_sum : bool                      shards add up the outputs of both cells at once, which needs `parallel`
    residuals : int                     earlier sums of outputs that each cell's input is mixed from, as in Kimi-K3
    streams : int                       residual streams, mixed before and after each cell, as in DeepSeek-V4
    beside : tuple of Matrix            other weights, in 16 bit and whole on every shard; a token is multiplied with
                                        those of several columns
    """

    attention: AttentionCell
    ffn: Ffn
    norms: int | None = None
    norm_bias: bool = False
    parallel: bool = False
    one_sum: bool = False
    residuals: int = 0
    streams: int = 1
    beside: tuple[Matrix, ...] = ()

    def __post_init__(self) -> None:
        if self.attention.hidden != self.ffn.hidden:
            raise InputError(
                f"block: attention has hidden {self.attention.hidden} but the FFN {self.ffn.hidden}; make them equal"
            )
        check_flags("block", norm_bias=self.norm_bias, parallel=self.parallel, one_sum=self.one_sum)
        if self.one_sum and not self.parallel:
            raise InputError("block: one_sum needs parallel, as the FFN reads the sum of attention's outputs otherwise")
        check_counts("block", minimum=0, residuals=self.residuals)
        check_counts("block", streams=self.streams)
        if self.norms is not None:
            check_counts("block", minimum=0, norms=self.norms)

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
        return self.ffn.experts > 0

    @property
    def norm_count(self) -> int:
        """Norms of the residual stream."""
        return self._kept_cells if self.norms is None else self.norms

    @property
    def _kept_cells(self) -> int:
        return sum(not cell.skipped for cell in self.cells)

    @property
    def own(self) -> tuple[Matrix, ...]:
        """Weights of the layer outside its cells, which stay in 16 bit and whole on every shard."""
        norms = Matrix("norms", self.hidden, 1 + self.norm_bias, times=self.norm_count)
        if self.streams == 1:
            return norms, *self.beside
        # Of every stream a weight before the cell and one after it, and what it passes on to each of the others.
        mixed = (2 + self.streams) * self.streams
        return (
            norms,
            Matrix("hyper connections", mixed, self.streams * self.hidden, times=self._kept_cells),
            Matrix("hyper connection biases", mixed + _HYPER_SCALES, 1, times=self._kept_cells),
            *self.beside,
        )

    @property
    def own_parameters(self) -> int:
        """Weights of the layer outside its cells."""
        return sum(matrix.weights for matrix in self.own)

    @property
    def shares_norm(self) -> bool:
        """Whether the FFN reads what attention's norm gives."""
        return self.parallel and self.norm_count == 1

    @property
    def own_operations(self) -> tuple[Linear, ...]:
        """Kernels outside the cells, each of which begins with its norm: further norms, without an addition; mixing."""
        further = self.norm_count - self._kept_cells
        mixed = self._kept_cells if self.residuals else 0
        connections = self._kept_cells if self.streams > 1 else 0
        return (
            *(Elementwise("norm", 4.0 * self.hidden, "norm", self.hidden, "norm"),) * further,
            *(Elementwise("residuals", 2.0 * (self.residuals + 2) * self.hidden),) * mixed,
            *(HyperConnect(self.hidden, self.streams),) * connections,
            *(Product(matrix.name, matrix.rows, matrix.columns) for matrix in self.beside if matrix.columns > 1),
        )

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All weights of the layer."""
        return *self.attention.matrices(), *self.ffn.matrices(), *self.own

    @property
    def matrix_parameters(self) -> int:
        """Weights that a number format may quantise."""
        return sum(matrix.weights for matrix in self.matrices if matrix.quantised)

    @property
    def parameters(self) -> int:
        """All weights of the layer."""
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def active_parameters(self) -> int:
        """Weights one token passes through."""
        return self.attention.active_parameters + self.ffn.active_parameters + self.own_parameters

    def weight_bytes(self, weight_format: str) -> int:
        """Bytes of the layer's weights with its matrices in `weight_format` and the rest in 16 bit."""
        return stored_bytes(weight_format, self.matrices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`count` identical blocks that follow each other."""

    block: Block
    count: int

    def __post_init__(self) -> None:
        check_counts("run of blocks", maximum=MAX_LAYERS, count=self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """What turns an image, a recording or a text into vectors that a decoder reads: an encoder beside it.

    Parameters
    ----------
    reads : str                 what it reads
    runs : tuple of Run         its layers in order
    beside : tuple of Matrix    its weights outside the layers: patches, convolutions, positions, norms, projector
    heads : int                 of its attention, over which engines cut it
    tokens : int                that it computes of one input, 0 where that is as long as the input
    merged : int                tokens that it computes for each one that the decoder reads
    input_s : float             seconds of sound that it takes at once; 0 where it takes none
    """

    reads: Literal["images", "audio", "text"]
    runs: tuple[Run, ...]
    beside: tuple[Matrix, ...]
    heads: int
    tokens: int = 0
    merged: int = 1
    input_s: float = 0.0

    def __post_init__(self) -> None:
        check_counts(f"tower that reads {self.reads}", heads=self.heads, merged=self.merged)
        if not self.runs:
            raise InputError(f"tower that reads {self.reads}: has no layers")

    @property
    def layers(self) -> int:
        """Number of its layers."""
        return sum(run.count for run in self.runs)

    @property
    def matrices(self) -> tuple[tuple[int, Matrix], ...]:
        """All of its weights, each so many times."""
        inside = tuple((run.count, matrix) for run in self.runs for matrix in run.block.matrices)
        return *inside, *((1, matrix) for matrix in self.beside)

    @property
    def parameters(self) -> int:
        """All weights."""
        return sum(count * matrix.weights for count, matrix in self.matrices)

    def shard_bytes(self, shards: int) -> int:
        """Bytes on one device, in 16 bit: layers cut by heads and columns, the rest whole."""
        cut = Cut(heads=shards, columns=shards)
        inside = sum(
            run.count
            * (sum(m.weights for cell in run.block.cells for m in cell.matrices(cut)) + run.block.own_parameters)
            for run in self.runs
        )
        return 2 * (inside + sum(matrix.weights for matrix in self.beside))


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
    around : str            `model_type` of the file around a decoder that lies within another's; "" where it does not
    tower_heads : int or None    heads of the tower that reads images, 0 where they are not stated; None without one
    sound_heads : int       heads of the tower that reads sound; 0 where they are not stated, or there is none
    mtp_layers : int        layers of multi-token prediction that the checkpoint has for drafts, beside `runs`
    pools : bool            it answers with a vector of the prompt rather than with tokens, and has no LM head
    tower : Tower or None   what reads images or sound beside the decoder, where it is known
    unread : tuple of str   objects of the configuration with towers, or what speaks, of which nothing is counted
    images : (float, float) or None    of the traffic: tokens of an image that the decoder reads, and share that these
                            have of prompts; None where it has none, and the tower that reads images is left out
    angles : (int, int) or None    positions in the tables of angles of layers that see all and of those behind windows;
                            None where all turn by one table of `max_position`
    stated_head_dim : int   `head_dim` of the file, which latent attention has no use for; 0 where it states none
    together : int          so many layers, counted from the first, are one in the engine and lie on one stage
    before : tuple of Matrix    weights that the first stage has beside the embedding: learned positions, a norm
    after : tuple of Matrix     weights that the last stage has beside the LM head and the final norm
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
    around: str = ""
    tower_heads: int | None = None
    sound_heads: int = 0
    mtp_layers: int = 0
    pools: bool = False
    tower: Tower | None = None
    unread: tuple[str, ...] = ()
    images: tuple[float, float] | None = None
    angles: tuple[int, int] | None = None
    stated_head_dim: int = 0
    together: int = 1
    before: tuple[Matrix, ...] = ()
    after: tuple[Matrix, ...] = ()

    def __hash__(self) -> int:
        """Of what tells models apart at first sight: layers are many, and models are keys all over."""
        return hash((self.name, self.hidden, self.vocab, len(self.runs)))

    def __post_init__(self) -> None:
        owner = f"model {self.name}"
        check_counts(owner, hidden=self.hidden, vocab=self.vocab, max_position=self.max_position)
        check_flags(owner, tied_embeddings=self.tied_embeddings)
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
    def blocks(self) -> tuple[Block, ...]:
        """Blocks that differ, each once where runs share it: told apart by identity, which is quicker."""
        return tuple({id(run.block): run.block for run in self.runs}.values())

    @property
    def is_moe(self) -> bool:
        """Whether any block is a mixture of experts."""
        return any(block.is_moe for block in self.blocks)

    @property
    def scaled_by_block(self) -> bool:
        """Whether fp8 weights have a scale for each block: as the checkpoint says, else as most of its kind do."""
        if self.scheme is not None and self.weight_format == "fp8":
            return self.scheme.block is not None
        return self.is_moe

    @property
    def encoder(self) -> Tower | None:
        """The tower that requests pass through: that of an encoder-decoder, or of images where there are some."""
        served = self.tower is not None and (self.tower.reads != "images" or self.images is not None)
        return self.tower if served else None

    @property
    def sees_whole_prompts(self) -> bool:
        """Whether a prompt has to be computed at once: by an encoder, or because every token sees all others."""
        return self.pools or (self.encoder is not None and self.images is None)

    def before_bytes(self, shards: int) -> int:
        """Bytes on one device of what the first stage has beside the embedding, the encoder included."""
        weights = sum(ceil_div(matrix.weights, shards if matrix.cut else 1) for matrix in self.before)
        return 2 * weights + (self.encoder.shard_bytes(shards) if self.encoder else 0)

    @property
    def traits(self) -> frozenset[str]:
        """What rules of engines ask of the attention of any layer."""
        return frozenset(trait for block in self.blocks for trait in block.attention.traits)

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
    def before_parameters(self) -> int:
        """Weights that the first stage has beside the embedding, whole on every GPU and in 16 bit."""
        return sum(matrix.weights for matrix in self.before)

    @property
    def after_parameters(self) -> int:
        """Weights that the last stage has beside the LM head, whole on every GPU and in 16 bit: the final norm too."""
        norm = self.hidden * (1 + self.runs[-1].block.norm_bias)
        return norm + sum(matrix.weights for matrix in self.after)

    @property
    def _outside_parameters(self) -> int:
        """Weights outside the layers, of an encoder-decoder with those of its encoder."""
        vocab = self.embedding_parameters + self.lm_head_parameters
        encoder = 0 if self.tower is None or self.tower.reads == "images" else self.tower.parameters
        return vocab + self.before_parameters + self.after_parameters + encoder

    @property
    def matrix_parameters(self) -> int:
        """Weights that a number format may quantise."""
        return sum(run.count * run.block.matrix_parameters for run in self.runs)

    @property
    def parameters(self) -> int:
        """All weights, final norm included."""
        return self._outside_parameters + sum(run.count * run.block.parameters for run in self.runs)

    @property
    def active_parameters(self) -> int:
        """Weights of everything one token passes through, embedding and LM head counted whole as publishers do.

        Of other tables it is the rows of one token.
        """
        idle = sum(matrix.weights - matrix.used_weights for matrix in (*self.before, *self.after))
        blocks = sum(run.count * run.block.active_parameters for run in self.runs)
        return self._outside_parameters - idle + blocks

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
        return sum(run.count * run.block.weight_bytes(wanted) for run in self.runs) + 2 * self._outside_parameters

    def kv_bytes_per_token(self, kv_bytes: int) -> int:
        """Bytes one token adds to the KV cache over all layers, while it lies within every window.

        Parameters
        ----------
        kv_bytes : int      bytes per element, a value of `KV_BYTES`
        """
        kept = ((run.count, entry) for run in self.runs for entry in run.block.attention.cache())
        return sum(count * entry.token_bytes(kv_bytes) for count, entry in kept if not entry.fixed_tokens)

    @property
    def state_bytes_per_sequence(self) -> int:
        """Bytes that one sequence keeps over all layers whatever its length."""
        return sum(run.count * kept.sequence_bytes() for run in self.runs for kept in run.block.attention.cache())
