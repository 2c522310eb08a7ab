"""What makes the drafts of a plan: the layers, matrices and KV cache that lie beside the model's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.cells import Attention, Cut
from apex_opt.ir.cells.dense import DenseFfn
from apex_opt.ir.model import Block, Run
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from apex_opt.ir.cells import AttentionCell, Ffn
    from apex_opt.ir.model import Model
    from apex_opt.plans.plan import Plan
    from apex_opt.plans.speculation import Drafter

EAGLE_VOCAB: Final = 32_000
"""Tokens that a head of EAGLE-3 drafts from, as published heads have it (draft_vocab_size of their config.json)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Layers that make drafts, cut over the GPUs of a stage as the model's own are.

    Parameters
    ----------
    hidden : int                    width of the residual stream
    runs : tuple of Run             the layers in order
    weight_format : str or None     their format; None is the plan's
    joined : int                    elements that a projection, whole on every GPU, turns into a hidden state; 0: none
    twice : bool                    queries, keys and values come from the embedding beside the hidden state
    vocab : int                     tokens that drafts are chosen from
    tables : int                    matrices of vocabulary by hidden of its own
    """

    hidden: int
    runs: tuple[Run, ...]
    weight_format: str | None
    joined: int
    twice: bool
    vocab: int
    tables: int

    def projection(self, attention: AttentionCell, tp: int) -> int:
        """Rows of queries, keys and values of one shard that read the embedding as well; 0 where none do.

        Parameters
        ----------
        attention : AttentionCell    of a layer
        tp : int                     shards
        """
        if not self.twice or not isinstance(attention, Attention):
            return 0
        return sum(m.rows * m.times for m in attention.matrices(Cut(heads=tp)) if m.name in ("queries", "keys"))

    def in_format(self, plan: Plan) -> str:
        """The format of its weights in a plan."""
        return self.weight_format or plan.weight_format

    def beside_bytes(self, tp: int) -> int:
        """Weights on one GPU beside the cells of the layers: norms and what is outside of these, all in 16 bit."""
        norms = sum(2 * run.count * run.block.own_parameters for run in self.runs)
        twice = sum(2 * run.count * self.projection(run.block.attention, tp) * self.hidden for run in self.runs)
        return norms + twice + 2 * self.hidden * (self.joined + self.tables * ceil_div(self.vocab, tp))


@lru_cache(maxsize=64)
def draft_of(model: Model, drafter: Drafter) -> Draft | None:
    """What makes the drafts of a model; None where nothing on the GPUs does.

    EAGLE is EAGLE-3: a dense layer of the model's width in 16 bit, fed by hidden states of three layers, with a head
    of its own over fewer tokens. Before a mixture of experts its FFN is as wide as what one token passes through,
    which is assumed. MTP is one more layer of the model like its last one, with the model's embedding and head; a
    draft model is all of another model.

    Source: `models/llama_eagle3.py`, `models/deepseek_mtp.py` and `v1/spec_decode/draft_model.py` of vLLM 0.20.2.

    Raises
    ------
    UnknownNameError, InputError    a draft model that cannot be found or read
    """
    if drafter.method == "ngram":
        return None
    if drafter.method == "draft":
        from apex_opt.ir.registry import load_model

        other = load_model(drafter.model)
        return Draft(
            hidden=other.hidden,
            runs=other.runs,
            weight_format=other.weight_format,
            joined=0,
            twice=False,
            vocab=other.vocab,
            tables=1 if other.tied_embeddings else 2,
        )
    last = model.runs[-1].block
    # Where that lacks a cell or keeps a state of a sequence, its like is taken from the last layer that has one.
    blocks = [run.block for run in reversed(model.runs)]
    kept = [block.attention for block in blocks if any(kept.token_bytes(1) for kept in block.attention.cache())]
    attention = next(iter(kept), last.attention).with_window(None)
    ffn = next((block.ffn for block in blocks if not block.ffn.skipped), last.ffn)
    if drafter.method == "mtp":
        block = replace(last, attention=attention, ffn=ffn)
        return Draft(
            hidden=model.hidden,
            runs=(Run(block=block, count=1),),
            weight_format=None,
            joined=2 * model.hidden,
            twice=False,
            vocab=model.vocab,
            tables=0,
        )
    unquantised: dict[str, Any] = dict.fromkeys(attention.FORMS, 0)
    plain = replace(attention, **unquantised)
    block = Block(attention=plain, ffn=_dense(ffn))
    return Draft(
        hidden=model.hidden,
        runs=(Run(block=block, count=1),),
        weight_format=model.dtype,
        joined=3 * model.hidden,
        twice=True,
        vocab=min(EAGLE_VOCAB, model.vocab),
        tables=1,
    )


def _dense(ffn: Ffn) -> DenseFfn:
    """The FFN of a layer in 16 bit, of experts as wide as what one token passes through."""
    return DenseFfn(hidden=ffn.hidden, intermediate=ffn.token_columns, quantised=0, down_quantised=0)
