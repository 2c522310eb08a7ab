"""Collectives between the cells of a layer, and what stages send each other."""

from __future__ import annotations

from copy import copy
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np

from apex_opt.cluster.tree import LEVELS
from apex_opt.cost.tables import evenly, merged, nowhere, owned, sharing
from apex_opt.cost.work import Work
from apex_opt.engines.rules import PLAIN, Held
from apex_opt.profiles.collectives import Collectives
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from apex_opt.cluster.types import Link
    from apex_opt.cost.tables import Parts, Place, Tables
    from apex_opt.cost.work import Floats
    from apex_opt.ir.cells import Ffn
    from apex_opt.ir.model import Block, Model, Run
    from apex_opt.plans.layout import Layout, Spread
    from apex_opt.plans.plan import Template
    from apex_opt.profiles import Profile


class Exchange(NamedTuple):
    """A collective: by which batches it grows, its time by size, bytes per token of a copy, ranks, and the devices
    between them.

    So many `copies` share the tokens of a batch.
    """

    place: Place
    time_s: Callable[..., Floats]
    token_bytes: float
    ranks: int
    stride: int
    copies: int


class Exchanged(NamedTuple):
    """What all collectives of a batch take, and what a rank sends across domains of each kind, the widest first."""

    seconds: float
    sent: tuple[float, ...]


KEPT = 64
_PLANS = 1 << 12
"""Results of each kind that are kept, up to a few MB each: a few dozen are alike among the plans of a model."""


class Exchanges:
    """Collectives within one cluster; work is per number of tokens, for all entries of `tables`."""

    def __init__(self, tables: Tables, profile: Profile, collectives: Collectives, held: Held = PLAIN) -> None:
        self.tables, self.profile, self.collectives, self.held = tables, profile, collectives, held
        self.power = profile.power
        # Of ranks that run in step: "own" counts what each does for itself, a number what is done with the tokens of
        # all ranks where they are dealt to so many copies; None counts all that a stage does.
        self.role: Literal["own"] | int | None = None
        self.hides = False  # whether what sends tokens to their experts and back is left out
        self.called: dict[str, str] = {}  # collectives asked for so far, and where their times come from
        # Templates share most of their operations. Per object: all of them live as long as a problem.
        self.link = lru_cache(maxsize=KEPT)(self._link)
        self.within = lru_cache(maxsize=_PLANS)(self._within)

    def _link(self, time_s: Callable[..., Floats], bytes_per_token: float, ranks: int, spread: Spread) -> Work:
        """A collective of so many bytes per token, over what its ranks spread over."""
        over = self.collectives.over(spread.near, spread.far)
        name = f"{time_s.__name__.removesuffix('_s')}/{'inter' if spread.nodes > 1 else 'intra'}"
        self.called[name] = over.provenance[name]
        sizes = self.tables.tokens * float(bytes_per_token)
        return Work.spinning(self.power, time_s(over, sizes, ranks=ranks, nodes=spread.nodes))

    def _of_attention(self, copies: int) -> Place:
        """How attention copies take the tokens of a batch."""
        if self.role is None:
            return partial(owned, self.tables, copies=copies, split=1)
        return partial(owned, self.tables, copies=1, split=1) if self.role == "own" else nowhere

    def _of_ffn(self, attention_dp: int, ffn_dp: int) -> Place:
        """How copies of the FFN take the tokens of the attention copies."""
        if self.role is None:
            return sharing(self.tables, attention_dp, ffn_dp)
        goes_along = ffn_dp % attention_dp == 0
        if self.role == "own":
            return partial(owned, self.tables, copies=1, split=ffn_dp // attention_dp) if goes_along else nowhere
        return evenly if not goes_along and ffn_dp == self.role else nowhere

    def as_own(self) -> Self:
        """What each rank does for itself; results are shared."""
        own = copy(self)
        own.role = "own"
        return own

    def hiding(self) -> Self:
        """The same without what sends tokens to their experts and back; results are shared."""
        own = copy(self)
        own.hides = True
        return own

    def sent(self, runs: Iterable[Run], attention: Template, ffn: Template, layout: Layout) -> Work:
        """What sends the tokens of a rank to their experts and back, by tokens.

        Parameters
        ----------
        runs : layers of a stage
        attention : Template    how attention is cut
        ffn : Template          how the FFN is cut
        layout
        """
        total = Work.spinning(self.power, np.zeros(len(self.tables.tokens)))
        for run in runs:
            for call in self.exchanges(run.block, attention, ffn):
                if call.time_s is Collectives.all_to_all_s:
                    work = self.link(call.time_s, call.token_bytes, call.ranks, layout.spread(call.ranks, call.stride))
                    total = total + work * run.count
        return total

    def _held_as(self, cell: Ffn, attention: Template, ffn: Template) -> Template:
        """How an FFN is cut: as experts are, or as the engine holds dense ones beside them."""
        return attention if not cell.experts and self.held.dense_per_copy else ffn

    def reshards(self, block: Block, attention: Template, ffn: Template, layout: Layout) -> Parts:
        """Collectives of a layer: those that turn the layout of each cell into the next one's.

        Parameters
        ----------
        block
        attention : Template    how attention is cut
        ffn : Template          how the FFN is cut
        layout
        """
        return merged(*(self._collective(*call[:-1], layout) for call in self.exchanges(block, attention, ffn)))

    def exchanges(self, block: Block, attention: Template, ffn: Template) -> tuple[Exchange, ...]:
        """Collectives of a layer in order.

        Partial sums are reduced within the shards of a copy. Where an attention copy feeds several FFN copies, each
        takes its slice for free and the results are gathered. Where an FFN copy serves several attention copies, their
        tokens are gathered, and the sums scattered back; experts in groups are reached by an all-to-all of the chosen
        tokens instead, gathered within a group whose experts are cut. Where the copies of one cell straddle those of
        the other, every device gets all tokens after each cell. Norms over the whole width of queries and keys sum
        up two squares per token over the shards. Cells that a layer does without exchange nothing.

        Parameters
        ----------
        block
        attention : Template    how attention is cut
        ffn : Template          how the FFN is cut
        """
        tables, calls, cell = self.tables, Collectives, block.ffn
        ffn = self._held_as(cell, attention, ffn)
        hidden = 2.0 * cell.hidden
        shards = ffn.tp * ffn.ep
        of_attention, of_ffn = self._of_attention(attention.dp), self._of_ffn(attention.dp, ffn.dp)
        of_all = self._of_ffn(attention.dp, 1) if self.role is not None else partial(owned, tables, copies=1, split=1)
        found: list[tuple[Any, ...]] = []
        if block.attention.reduced_bytes:
            found.append(
                (of_attention, calls.all_reduce_s, block.attention.reduced_bytes, attention.tp, 1, attention.dp)
            )
        if not (block.attention.skipped or (block.one_sum and ffn.dp == attention.dp)):
            found.append((of_attention, calls.all_reduce_s, hidden, attention.tp, 1, attention.dp))
        if cell.skipped:
            pass
        elif ffn.dp % attention.dp == 0:
            found += [
                (of_ffn, calls.all_reduce_s, hidden, shards, 1, ffn.dp),
                (of_attention, calls.all_gather_s, hidden, ffn.dp // attention.dp, shards, attention.dp),
            ]
        elif attention.dp % ffn.dp:
            found += [
                (of_all, calls.all_gather_s, hidden, attention.dp, attention.tp, 1),
                (of_ffn, calls.all_reduce_s, hidden, shards, 1, ffn.dp),
                (of_all, calls.all_gather_s, hidden, ffn.dp, shards, 1),
            ]
        else:
            if ffn.ep > 1 and cell.experts:
                # The devices of a copy hold the same tokens, so each sends its part of them.
                sent = 2.0 * cell.expert_hidden
                chosen, arrived = (sent * cell.experts_per_token / n for n in (attention.tp, ffn.ep))
                found += [
                    (of_attention, calls.all_to_all_s, chosen, ffn.ep, ffn.tp, attention.dp),
                    (of_ffn, calls.all_gather_s, arrived, ffn.tp, 1, ffn.dp),
                    (of_ffn, calls.reduce_scatter_s, arrived, ffn.tp, 1, ffn.dp),
                    (of_attention, calls.all_to_all_s, chosen, ffn.ep, ffn.tp, attention.dp),
                ]
            else:
                found += [
                    (of_ffn, calls.all_gather_s, hidden, attention.dp // ffn.dp, attention.tp, ffn.dp),
                    (of_ffn, calls.reduce_scatter_s, hidden, shards, 1, ffn.dp),
                ]
            found.append((of_attention, calls.all_gather_s, hidden, attention.tp, 1, attention.dp))
        calls_of = (Exchange(*call) for call in found if not (self.hides and call[1] is calls.all_to_all_s))
        return tuple(call for call in calls_of if call.ranks > 1)

    def _collective(
        self,
        place: Place,
        time_s: Callable[..., Floats],
        token_bytes: float,
        ranks: int,
        stride: int,
        layout: Layout,
    ) -> Parts:
        """A collective of so many bytes per token of a copy, over ranks that lie `stride` devices apart."""
        if ranks == 1:
            return {}
        work = self.link(time_s, token_bytes, ranks, layout.spread(ranks, stride))
        return place(operation="communication", work=work)

    def transfer(self, model: Model, attention: Template, layout: Layout) -> Floats:
        """Seconds for the activations of a batch to reach the next stage: hidden state and residual, a shard each.

        Parameters
        ----------
        model
        attention : Template    how attention is cut
        layout
        """
        name, over, link = self.between_stages(layout)
        self.called[name] = over.provenance[name]
        return over.point_to_point_s(self.tables.tokens * _transferred_bytes(model, attention), link)

    def between_stages(self, layout: Layout) -> tuple[str, Collectives, Link | None]:
        """What a transfer between stages is called in the provenance, and its link among the collectives over it."""
        link, far = layout.stage_link
        if far:
            return "point_to_point/inter", self.collectives.over(None, link), link
        return "point_to_point/intra", self.collectives.over(link, None), link

    def exchanged(
        self, model: Model, attention: Template, ffn: Template, layout: Layout, schedulers: int = 1
    ) -> Exchanged:
        """What the collectives of one full batch take on its way through all stages, and what they send how far.

        Parameters
        ----------
        model
        attention : Template    how attention is cut
        ffn : Template          how the FFN is cut
        layout
        """
        seconds, within = self.within(model, attention, ffn, layout.of_stage, schedulers)
        sent = dict(within)
        _, over, link = self.between_stages(layout)
        if link is not None:
            size = schedulers * int(self.tables.tokens[-1]) * _transferred_bytes(model, attention)
            between = layout.tiers[-1].chunk // attention.devices - 1
            seconds += between * float(over.point_to_point_s(size, link))
            sent[layout.tiers[-1].kind] += between * size
        return Exchanged(seconds, tuple(sent[kind] for kind in reversed(LEVELS)))

    def _within(
        self, model: Model, attention: Template, ffn: Template, layout: Layout, schedulers: int
    ) -> tuple[float, dict[str, float]]:
        """The same within the stages, whose layout is given, with what is sent by level."""
        tokens, sequences = (schedulers * int(table[-1]) for table in (self.tables.tokens, self.tables.sequences))
        seconds, sent = 0.0, dict.fromkeys(LEVELS, 0.0)
        of_block = {id(block): self.exchanges(block, attention, ffn) for block in model.blocks}
        calls = [
            (run.count, call.time_s, call.token_bytes * ceil_div(tokens, call.copies), call.ranks, call.stride)
            for run in model.runs
            for call in of_block[id(run.block)]
        ]
        own = ceil_div(tokens, attention.dp), ceil_div(sequences, attention.dp)
        calls.append((1, Collectives.all_reduce_s, 2.0 * model.hidden * own[0], attention.tp, 1))
        calls.append((1, Collectives.all_gather_s, 2.0 * model.vocab * own[1], attention.tp, 1))
        took: dict[tuple[Any, ...], float] = {}  # layers alike exchange the same
        for count, time_s, size, ranks, stride in calls:
            if crossed := layout.crossed(ranks, stride):
                key = time_s, size, ranks, stride
                if (one := took.get(key)) is None:
                    spread = layout.spread(ranks, stride)
                    over = self.collectives.over(spread.near, spread.far)
                    one = took[key] = float(time_s(over, size, ranks=ranks, nodes=spread.nodes))
                seconds += count * one
                sent[crossed[-1].kind] += count * size
        return seconds, sent


def _transferred_bytes(model: Model, attention: Template) -> float:
    """Bytes of a token that each device of a stage sends to the next one."""
    return 4.0 * model.hidden / attention.devices
