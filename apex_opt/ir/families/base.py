"""What a `model_type` implies beyond the fields of its file, and how its layers are read.

A reader takes the fields and gives every layer as a `Block`, with faults noted in the fields rather than raised. Facts
of a family follow the configuration and model classes of the `transformers` library where nothing else is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from apex_opt.ir.cells import Matrix
    from apex_opt.ir.fields import Fields
    from apex_opt.ir.model import Block, Tower

PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")
"""Matrices of a gated FFN, by the names most checkpoints give them."""


class Sizes(NamedTuple):
    """What every file tells: width of the residual stream, number of layers, rows of the embedding; 0 at a fault."""

    hidden: int
    layers: int
    vocab: int


class Layers(NamedTuple):
    """The layers of a model in order, and what it has before and after them; no layers where a field is at fault.

    `longest` is the longest sequence where it is not the one that the file states; so many blocks as `together` are one
    layer of the checkpoint.
    """

    blocks: list[Block]
    before: tuple[Matrix, ...] = ()
    after: tuple[Matrix, ...] = ()
    tower: Tower | None = None
    longest: int | None = None
    together: int = 1


Reader = Callable[["Fields", Sizes], Layers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a model_type implies.

    Parameters
    ----------
    architecture : str      of files that leave the model_type out
    read : Reader           of its layers
    modules : mapping       by what cells call a part in their `FORMS`, the matrices of a layer by their names in a
                            checkpoint: see `module_names`
    defaults : mapping      of the configuration class: files leave these fields out where the model lies within
                            another one's file
    implied : mapping       what holds where a file leaves a field out, at the top as well
    spelled : mapping       what the family calls a field, by the usual name
    tied : bool             LM head and embedding are one where the file does not say
    pools : bool            it answers with a vector rather than with tokens
    layer_lists : tuple     fields with an entry for each layer, which tell their number where the file does not
    idle : tuple            fields that change nothing of what is counted in this family, besides those that
                            `apex_opt.ir.understood` lists for all
    """

    architecture: str
    read: Reader
    modules: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    spelled: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False
    pools: bool = False
    layer_lists: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()


def sizes(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    """Defaults that every class has, in the usual order.

    Parameters
    ----------
    vocab, hidden, intermediate, layers, heads, positions : int    under their usual names
    """
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
    }


def within(module: str, names: tuple[str, ...] = PROJECTIONS) -> tuple[str, ...]:
    """Matrices of one module."""
    return tuple(f"{module}.{name}" for name in names)


def module_names(
    qkv: tuple[str, ...] = within("self_attn", ("q_proj", "k_proj", "v_proj")),
    output: tuple[str, ...] = ("self_attn.o_proj",),
    dense: tuple[str, ...] = within("mlp"),
    experts: tuple[str, ...] = within("mlp.experts.0"),
    shared: tuple[str, ...] = within("mlp.shared_experts"),
    index: tuple[str, ...] = (),
    **others: tuple[str, ...],
) -> dict[str, tuple[str, ...]]:
    """Matrices of a layer in a checkpoint, by what cells call them.

    Parameters
    ----------
    qkv, output : of attention
    dense, shared : of a dense FFN, and of the one beside experts, the down projection last
    experts : of the first expert, as all are quantised alike
    index : of an indexer
    others : of other cells, by their `FORMS` with "_" for each space
    """
    return {
        "qkv": qkv,
        "output": output,
        "index": index,
        "up": dense[:-1],
        "down": dense[-1:],
        "experts": experts,
        "shared up": shared[:-1],
        "shared down": shared[-1:],
        **{part.replace("_", " "): names for part, names in others.items()},
    }
