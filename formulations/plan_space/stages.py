"""Stages that hold unequal numbers of layers: the layer program asked about cuts of the plan space."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from apex_opt.oracle.checks import IMBALANCE
from apex_opt.plans.memory import RUNTIME_BYTES

from ..layers import Pipeline, rows, split
from .blocks import Pools
from .sizes import (
    attention_side,
    attention_width,
    batch_limits,
    before_bytes,
    ffn_side,
    ffn_width,
    kind,
    kinds,
    limits_shared,
    shared_whole,
    vocab_bytes,
    vocab_on,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cluster.types import Gpu
    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.plan import Plan, Template


class Stages:
    """The splits of an instance's cuts; what cuts share is counted once."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._blocks = list(kinds(instance))
        self._order = tuple(
            self._blocks.index(kind(run.block)) for run in instance.model.runs for _ in range(run.count)
        )
        self._pools = Pools(instance)
        self._capacity = self._usable(instance.cluster.gpu)
        self._limits = batch_limits(instance)
        self._sizes = cache(self._count)
        self._rows = cache(self._count_rows)
        self._activations = cache(self._count_activations)

    def _usable(self, gpu: Gpu) -> int:
        """Bytes of a GPU that an engine's model and batches may take."""
        return int(gpu.memory_bytes * self.instance.settings.gpu_memory_utilization) - RUNTIME_BYTES

    def fit(self, plan: Plan) -> bool:
        """Whether the layers of a cut can be split such that every stage fits."""
        sums = self._rows(plan.attention.tp, *self._cut(plan))
        # The further a stage goes the better, but where layers differ: then a heavy one may stop the next stage.
        rooms, differ = self._room(plan, (self._capacity,) * plan.stages), len(self._blocks) > 1 or len(sums) > 1
        return self._reaches(sums, rooms, True) or (differ and self._reaches(sums, rooms, False))

    def _reaches(self, sums: list[list[int]], rooms: tuple[int, ...], furthest: bool) -> bool:
        """Whether stages filled in turn hold all layers, each filled as far as it goes or to any layer before."""
        layers, most, ends = len(self._order), self._most(len(rooms)), {0}
        for stage, room in enumerate(rooms, 1):
            last = layers - len(rooms) + stage  # each stage to come needs a layer
            reach = {
                done: min(*(bisect_right(row, row[done] + room) - 1 for row in sums), done + most, last)
                for done in ends
            }
            if furthest:
                ends = {max(reach.values())} - ends
            else:
                ends = {end for done, far in reach.items() for end in range(done + 1, far + 1)}
            if not ends:
                return False
        return layers in ends

    def moved(self, plan: Plan) -> tuple[int, ...] | None:
        """Layers of the stages of a cut with the lightest heaviest stage; None where nothing fits.

        A stage weighs the bytes that a full batch reads: its layers, and the LM head on the last. Activations differ
        from cut to cut, so they are brought in only where the split without them does not fit.
        """
        return self._split(plan, (self._capacity,) * plan.stages, (), self._most(plan.stages))

    def paced(self, plan: Plan, gpus: Sequence[Gpu], pace: tuple[int, ...]) -> tuple[int, ...] | None:
        """Layers of stages on several types of GPU such that the slowest stage is as fast as can be.

        Stages may be as unequal as their GPUs are.

        Parameters
        ----------
        gpus : of each stage
        pace : what a byte of weights takes each stage, in any unit
        """
        return self._split(plan, tuple(map(self._usable, gpus)), pace, self.instance.model.layers)

    def _split(self, plan: Plan, capacity: tuple[int, ...], pace: tuple[int, ...], most: int) -> tuple[int, ...] | None:
        pipeline, room = self._pipeline(plan, capacity, pace, most), self._room(plan, capacity)
        found = split(pipeline)
        if found is not None:
            sums, ends = self._rows(plan.attention.tp, *self._cut(plan)), list(pairwise([0, *accumulate(found)]))
            if any(row[j] - row[i] > free for row in sums for (i, j), free in zip(ends, room, strict=True)):
                found = split(replace(pipeline, room=room))
        return found

    def _pipeline(self, plan: Plan, capacity: tuple[int, ...], pace: tuple[int, ...], most: int) -> Pipeline:
        """What is to be split, with the bytes of each stage that are beside its weights outside the layers.

        Parameters
        ----------
        plan : Plan
        capacity : bytes of each stage
        pace : as of `Pipeline`
        most : int    layers of a stage
        """
        tp, stages = plan.attention.tp, plan.stages
        weight, held, shared, page = self._sizes(tp, *self._cut(plan))
        head = vocab_bytes(self.instance, tp) + 2 * self.instance.model.after_parameters
        return Pipeline(
            kinds=self._order,
            weight=weight,
            held=held,
            extra=(*(0,) * (stages - 1), head),
            room=tuple(usable - beside for usable, beside in zip(capacity, self._beside(tp, stages), strict=True)),
            most=most,
            pace=pace,
            shared=shared,
            page=page,
            together=self.instance.model.together,
        )

    def _count_rows(self, tp: int, *cut: Any) -> list[list[int]]:
        """Bytes of the first layers, for every number of them; by group, where groups share blocks."""
        _, held, shared, page = self._sizes(tp, *cut)
        return rows(self._order, held, shared, page)

    def _limits_of(self, plan: Plan) -> int:
        """Which of the limits of a batch to choose from a plan has."""
        return self.instance.batch_limits.index((plan.max_num_seqs, plan.max_num_batched_tokens))

    def _most(self, stages: int) -> int:
        """Layers that a balanced stage may hold."""
        return IMBALANCE[0] * self.instance.model.layers // (IMBALANCE[1] * stages)

    def _room(self, plan: Plan, capacity: tuple[int, ...]) -> tuple[int, ...]:
        """Bytes that each stage of a pipeline has for its layers, of those usable."""
        activations, logits = self._activations(self._limits_of(plan), plan.attention, plan.ffn)
        beside = self._beside(plan.attention.tp, plan.stages)
        *others, last = (usable - activations - own for usable, own in zip(capacity, beside, strict=True))
        return (*others, last - logits)

    def _beside(self, tp: int, stages: int) -> list[int]:
        """Bytes of the weights beside the layers of each of several stages."""
        vocab, table = vocab_bytes(self.instance, tp), self.instance.held.table_bytes
        ends = ((index == 0, index == stages - 1) for index in range(stages))
        beside = [vocab * vocab_on(self.instance, first=first, last=last) + table for first, last in ends]
        beside[0] += before_bytes(self.instance, tp)
        beside[-1] += 2 * self.instance.model.after_parameters
        return beside

    def _cut(self, plan: Plan) -> tuple[bool, Template, str, str, int, int, int]:
        """What of a plan, beside the shards of attention, decides what a layer takes."""
        whole = shared_whole(self.instance, plan.attention.dp, plan.ffn.ep)
        limits = self._limits_of(plan) if self._pools.windowed or self._pools.apart else 0
        stages, copies = (plan.stages, plan.attention.dp) if self._pools.apart else (1, 1)
        return whole, plan.ffn, plan.weight_format, plan.kv_format, limits, stages, copies

    def _count(
        self,
        tp: int,
        whole: bool,
        ffn: Template,
        weight_format: str,
        kv_format: str,
        limits: int,
        stages: int,
        copies: int,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...], int]:
        """By kind the weights of a layer, and all its bytes but blocks that groups share; the layers of these."""
        weight = tuple(
            attention_side(self.instance, block, tp, weight_format, whole=whole, touched=False)
            + 2 * block.own_parameters
            + ffn_side(self.instance, block, ffn.tp, ffn.ep, weight_format, touched=False)
            for block in self._blocks
        )
        seqs, batched = self._limits[limits]
        seats = self._pools.seats(seqs, copies, stages)
        held = tuple(
            read
            + self._pools.layer_bytes(block, None, batched, tp, kv_format)
            + seats * self._pools.states_bytes(block, None, tp)
            for read, block in zip(weight, self._blocks, strict=True)
        )
        pool = self._pools.of(None, tp, kv_format)
        if pool is None or len(pool.groups) < 2:
            return weight, held, (), 0
        return weight, held, pool.places, self._pools.room(pool, None, batched) * pool.page

    def _count_activations(self, choice: int, attention: Template, ffn: Template) -> tuple[int, int]:
        """Bytes of the largest batch on every stage, and of its logits on the last."""
        seqs, tokens = self._limits[choice]
        sharing = limits_shared(self.instance, attention.dp)
        own, others = -(-tokens // sharing), -(-tokens // ffn.dp)
        widest = max(
            max(own * attention_width(block, attention.tp), others * ffn_width(block, ffn.tp, ffn.ep))
            for block in self._blocks
        )
        hidden = self.instance.model.hidden
        return 4 * hidden * own + 2 * widest, 4 * self.instance.model.vocab * -(-seqs // sharing)
