"""What an engine can run, as facts: the plan space turns them into constraints, `launch` into words.

Nothing here decides about a plan. The oracle (`apex_opt.plans.refusals`) and the program (`formulations.plan_space`)
each read the facts in their own way, so that a mistake in one shows as a disagreement with the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from math import lcm
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.formats import get_format

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from apex_opt.cluster.types import Gpu
    from apex_opt.ir.model import Model

_HALF_BYTES: Final = 2
ANY: Final = "any"
"""In place of an engine's name: plans that no engine need be able to run."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineRules:
    """What one engine can run.

    Parameters
    ----------
    name, release : str
    cuda_only : bool                GPUs that do not run CUDA are refused; else what they run is not known here
    ffn_copies : bool               copies of the FFN inside a replica, where attention has fewer
    dense_attention_copies : bool   attention copies before a dense FFN that is cut over all GPUs of a stage
    moe_copies : bool               whole copies of a mixture of experts in one engine
    copied_attention : set or None  families that can have attention copies; None: all
    copied_drafts : set or None     ways to make drafts that attention copies before one FFN can have; None: all
    one_gpu_copies : bool           an attention copy has one GPU of a stage
    experts_by_both : bool          experts cut by ep and by tp at once; else by one of them
    dense_per_copy : bool           dense FFNs beside experts, and shared experts, lie in each attention copy, cut over
                                    its GPUs; else they are cut over all GPUs of a stage
    whole_shared : set              families whose shared experts are whole on every GPU where experts are cut by ep and
                                    attention has copies: each GPU then takes a part of the tokens of its copy; of
                                    engines whose copies hold dense FFNs
    formats : mapping               formats of weights, each with the compute capabilities it runs on: from, below
    attention : mapping             the same by a trait of attention ("latent", "sparse", "compressed", "sinks") and for
                                    a cache in "fp8"; those that are not listed run on all
    methods : mapping               methods of quantisation of a checkpoint that need another range than their format
    no_half : set                   families that are not computed in fp16
    made_on_load : set              weight formats that the engine makes of 16-bit weights while it loads them
    gate_room : bool                experts without a gate whose format is made on load are held with room for one
    whole_scales : bool             a shard of a quantised matrix holds whole groups and blocks of scales
    least_group : int               groups of experts may be halved down to so many weights to fit a shard
    padded_experts : mapping        weight formats whose experts are stored with their sizes rounded up: (from, below,
                                    multiple of hidden, multiple of the columns of a shard) by capability
    vocab_multiple : int            the vocabulary is padded to a multiple of it, which attention shards must divide
    vocab_on_every_stage : set      families whose stages all hold the embedding and the LM head
    embedding_on_every_stage : set  families whose stages all hold the embedding, and only the last one the LM head
    whole_models : set              families that are not cut into stages
    whole_when_tied : set           those that are not where the LM head is the embedding
    whole_experts : set             families whose experts are cut by tp alone, whatever is asked
    without_class : set             families that the release has no class of its own for: it refuses them, or runs a
                                    class of Transformers, whose times are others
    misread_heads : set             families with latent attention of which the engine takes a file's `head_dim` for the
                                    width of the rotary key, and has kernels for no other one
    brought_code : set              families, and types of files around decoders, whose configuration Transformers does
                                    not know: its class comes with the checkpoint, which the engine runs where it is
                                    told to trust it
    whole_kv_heads : set            families whose KV heads cannot be copied: no more shards than KV heads
    tower_shards : bool             an image tower is cut as attention is, by its heads
    whole_towers : set              families whose tower is whole on every GPU instead where its heads do not divide
    block_multiples : mapping       tokens that a KV block must be a multiple of, by a trait of attention ("latent",
                                    "sparse", "compressed", "sinks") and for a cache in "fp8"
    kernel_blocks : mapping         tokens of a KV block that the fastest kernels take, by a trait of attention ("" is
                                    any): from and below which compute capability, for which format of the cache ("" is
                                    any), how many; with others the engine takes slower kernels
    block_powers : bool             tokens of a KV block are a power of two
    multiplexes : bool              prompts and answers are computed side by side on divisions of a GPU, which it
                                    chooses or is given
    overlaps : set or None          families of which it splits forwards of attention ranks into two halves, one of
                                    which computes while the other sends; None: all
    split_formats : set             weight formats whose experts run with the kernels that such forwards are sent by
    whole_methods : set             methods of quantisation of a checkpoint whose experts do not, in whatever format
    split_seqs : int                sequences of a rank that such forwards can answer; 0: any number
    sound_shards : set              families whose sound tower is cut over the shards of attention
    whole_vocabulary : set          families whose embedding, and LM head with it, is whole on every GPU
    rotary_table : bool             cosines and sines of all positions are kept on every GPU, in 16 bit
    sources : mapping               rule, by the name of its field, to where it was read or found
    """

    name: str
    release: str
    cuda_only: bool = False
    ffn_copies: bool = False
    dense_attention_copies: bool = False
    moe_copies: bool = False
    copied_attention: frozenset[str] | None = None
    copied_drafts: frozenset[str] | None = None
    one_gpu_copies: bool = False
    experts_by_both: bool = False
    dense_per_copy: bool = False
    whole_shared: frozenset[str] = frozenset()
    formats: Mapping[str, tuple[float, float]]
    attention: Mapping[str, tuple[float, float]] = field(default_factory=lambda: MappingProxyType({}))
    methods: Mapping[str, tuple[float, float]] = field(default_factory=lambda: MappingProxyType({}))
    no_half: frozenset[str] = frozenset()
    made_on_load: frozenset[str] = frozenset()
    gate_room: bool = False
    whole_scales: bool = True
    least_group: int = 0
    padded_experts: Mapping[str, tuple[tuple[float, float, int, int], ...]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    vocab_multiple: int = 1
    vocab_on_every_stage: frozenset[str] = frozenset()
    embedding_on_every_stage: frozenset[str] = frozenset()
    whole_models: frozenset[str] = frozenset()
    whole_when_tied: frozenset[str] = frozenset()
    whole_experts: frozenset[str] = frozenset()
    without_class: frozenset[str] = frozenset()
    misread_heads: frozenset[str] = frozenset()
    brought_code: frozenset[str] = frozenset()
    whole_kv_heads: frozenset[str] = frozenset()
    tower_shards: bool = False
    whole_towers: frozenset[str] = frozenset()
    block_multiples: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    kernel_blocks: Mapping[str, tuple[tuple[float, float, str, int], ...]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    block_powers: bool = False
    multiplexes: bool = False
    overlaps: frozenset[str] | None = frozenset()
    split_formats: frozenset[str] = frozenset()
    whole_methods: frozenset[str] = frozenset()
    split_seqs: int = 0
    sound_shards: frozenset[str] = frozenset()
    whole_vocabulary: frozenset[str] = frozenset()
    rotary_table: bool = False
    sources: Mapping[str, str]

    def block_size(self, model: Model, usual: int, runs: Collection[tuple[float | None, str]]) -> int:
        """Tokens of a KV block that the engine takes where none are asked for.

        Parameters
        ----------
        model
        usual : int    where nothing speaks against it
        runs : collection of (float or None, str)
            what it may run on: the compute capability of a GPU and the format of its cache
        """
        multiples = (multiple for trait, multiple in self.block_multiples.items() if trait in model.traits)
        return lcm(usual, self.kernel_block(model, runs), *multiples)

    def kernel_block(self, model: Model, runs: Collection[tuple[float | None, str]]) -> int:
        """Tokens that the blocks of the fastest kernels hold a multiple of, one where these take any.

        Parameters
        ----------
        model, runs : as of `block_size`
        """
        kinds = (kind for trait, kinds in self.kernel_blocks.items() if trait in {"", *model.traits} for kind in kinds)
        return lcm(
            *(
                tokens
                for least, below, cache, tokens in kinds
                if any(has is not None and least <= has < below and cache in ("", kv) for has, kv in runs)
            )
        )

    def lacking(self, family: str) -> str:
        """That the engine has no class of its own for models of a family; empty where it has, or that is not known."""
        if family not in self.without_class:
            return ""
        return (
            f"as of {self.release} there is no class of its own for {family} models: it refuses them or runs a class "
            "of Transformers, whose times are others; see whether your release has one"
        )

    def misreads(self, model: Model) -> bool:
        """Whether the engine takes the width of heads that a file states for another one."""
        widths = {0, *(run.block.attention.rotary_dim for run in model.runs)}
        return model.family in self.misread_heads and model.stated_head_dim not in widths

    def __reduce__(self) -> tuple[Callable[[], EngineRules], tuple[()]]:
        # Views of mappings do not travel to other processes.
        told: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self)}
        told |= {name: dict(value) for name, value in told.items() if isinstance(value, MappingProxyType)}
        return partial(EngineRules, **told), ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """How an engine holds a model in the memory of a kind of GPU.

    Parameters
    ----------
    dense_per_copy : bool       as `EngineRules` has it
    whole_shared : bool         shared experts are whole where experts are cut by ep and attention has copies
    padded : tuple of (format, hidden, columns)    what the sizes of experts in a format are rounded up to multiples of
    gate_room : set of str      formats in which experts without a gate are stored with room for one
    vocab_everywhere : bool     every stage holds the embedding and the LM head
    embedding_everywhere : bool every stage holds the embedding
    whole_vocabulary : bool     neither is cut
    table_bytes : int           cosines and sines of positions, on every GPU
    """

    dense_per_copy: bool = False
    whole_shared: bool = False
    padded: tuple[tuple[str, int, int], ...] = ()
    gate_room: frozenset[str] = frozenset()
    vocab_everywhere: bool = False
    embedding_everywhere: bool = False
    whole_vocabulary: bool = False
    table_bytes: int = 0

    @classmethod
    def of(cls, rules: EngineRules | None, model: Model, gpu: Gpu) -> Held:
        """How the engine holds a model; evenly and once where none is asked.

        Parameters
        ----------
        rules : EngineRules or None    of the engine; None where any may run it
        model
        gpu : Gpu                      that it runs on
        """
        if rules is None:
            return PLAIN
        has = gpu.capability or 0.0
        return cls(
            dense_per_copy=rules.dense_per_copy,
            whole_shared=rules.dense_per_copy and model.family in rules.whole_shared,
            padded=tuple(
                (name, hidden, columns)
                for name, kinds in rules.padded_experts.items()
                for least, below, hidden, columns in kinds
                if least <= has < below
            ),
            gate_room=rules.made_on_load if rules.gate_room and _in_half(model) else frozenset(),
            vocab_everywhere=model.family in rules.vocab_on_every_stage,
            embedding_everywhere=model.family in rules.embedding_on_every_stage,
            whole_vocabulary=model.family in rules.whole_vocabulary,
            table_bytes=_HALF_BYTES * rules.rotary_table * _angles(model),
        )

    def dense_shards(self, attention: int, ffn: int) -> int:
        """Shards of dense FFNs beside experts, by those of attention and of the experts."""
        return attention if self.dense_per_copy else ffn

    def spreads_tokens(self, copies: int, groups: int) -> bool:
        """Whether shared experts are whole on every GPU, by attention copies and groups of experts.

        Each GPU then takes a part of the tokens of its copy.
        """
        return self.whole_shared and copies > 1 and groups > 1

    def multiples(self, name: str) -> tuple[int, int]:
        """What width and columns of an expert in a format are rounded up to multiples of, as they are stored."""
        return next(((hidden, columns) for padded, hidden, columns in self.padded if padded == name), (1, 1))


def _in_half(model: Model) -> bool:
    """Whether the checkpoint is in 16 bit, so that other formats of it are made while it is loaded."""
    return get_format(model.weight_format).weight_bits == 16


def _angles(model: Model) -> int:
    """Cosines and sines that layers turn by: in one table, or in one each for layers that see all and for windows."""
    cells = [block.attention for block in model.blocks]
    if model.angles is None:
        return model.max_position * max(cell.rotary_dim for cell in cells)
    full, local = model.angles
    widths = [[cell.rotary_dim for cell in cells if bool(cell.window) is behind] for behind in (False, True)]
    return full * max(widths[0], default=0) + local * max(widths[1], default=0)


PLAIN: Final = Held()
"""Every matrix as it is, once."""
