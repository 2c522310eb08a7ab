"""The oracle: what a plan must satisfy, in plain Python.

Every plan that a program finds or a user gives is checked here. It shares no code with the formulations, so that a
mistake in one shows as a disagreement with the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate, pairwise, product
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.engines.overlap import NANO
from apex_opt.engines.rules import PLAIN, Held
from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import UsageError
from apex_opt.ir.formats import FORMATS, KV_BYTES, get_format, is_format
from apex_opt.plans.allotment import allotted
from apex_opt.plans.drafts import draft_of
from apex_opt.plans.engine import drafts_in_copies, limited
from apex_opt.plans.memory import (
    attention_shard_bytes,
    block_shard_bytes,
    ffn_cut,
    ffn_token_bytes,
    kv_blocks,
    settings_of,
    stage_memory,
    state_seats,
    vocab_copies,
)
from apex_opt.plans.plan import Plan, Template, even_split, repeated
from apex_opt.plans.refusals import refusals
from apex_opt.plans.routing import count_repeated
from apex_opt.plans.shares import division_fault
from apex_opt.units import GB, NS_PER_S, ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from apex_opt.cluster.types import Cluster
    from apex_opt.engines.overlap import Overlap
    from apex_opt.ir.cells import Piece
    from apex_opt.ir.model import Model
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.memory import StageMemory
    from apex_opt.plans.routing import Routing
    from apex_opt.plans.shares import Shares
    from apex_opt.plans.speculation import Drafter

FAMILIES: Final = ("divisibility", "format", "engine", "balance", "memory", "bandwidth")
"""Constraint families in the order in which an infeasible plan is charged to one of them."""

OF_CUTS: Final = tuple(family for family in FAMILIES if family not in ("memory", "bandwidth"))
"""Those that depend on how a replica is cut alone, wherever its layers lie."""

IMBALANCE: Final = (3, 2)
"""The largest stage may hold at most 3/2 of the mean layers per stage: beyond, devices mostly wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One planning problem, without its traffic.

    Parameters
    ----------
    model, cluster, settings
    longest_tokens : int          tokens the longest request holds in the KV cache, >= 1
    longest : str                 what that is, in words
    tpot_limit_ns : int or None   tightest limit any SLO sets on time per output token
    weight_formats, kv_formats : tuple of str
                                  formats to choose from, names of formats, each with its KV format
    max_devices : int             GPUs a plan may take, at most the cluster's
    batch_limits : tuple of (max_num_seqs, max_num_batched_tokens)
                                  limits of a batch to choose from; None leaves one to the settings
    drafters : tuple of Drafter or None    ways to make drafts to choose from; None makes none
    routings : tuple of str       routers to choose from in front of several replicas; none where there is no choice
    shares : Shares or None       what prompts and answers have of each GPU in all of the plans; None: batches hold both
    overlap : str or None         what one GPU does at a time in all of them; None: one thing after the other
    """

    model: Model
    cluster: Cluster
    settings: EngineSettings
    longest_tokens: int
    longest: str = "the longest request"
    tpot_limit_ns: int | None = None
    weight_formats: tuple[str, ...]
    kv_formats: tuple[str, ...]
    max_devices: int
    batch_limits: tuple[tuple[int | None, int | None], ...] = ((None, None),)
    drafters: tuple[Drafter | None, ...] = (None,)
    routings: tuple[Routing, ...] = ()
    shares: Shares | None = None
    overlap: Overlap | None = None
    held: Held = field(init=False, repr=False, compare=False)
    """How the engine holds the model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "held", Held.of(self.settings.runnable, self.model, self.cluster.gpu))
        if not self.batch_limits:
            raise UsageError("an instance needs limits of a batch, if only those of the settings")
        if not self.drafters:
            raise UsageError("an instance needs ways to make drafts, if only to make none")
        if not self.weight_formats or len(self.weight_formats) != len(self.kv_formats):
            raise UsageError("an instance needs weight formats, each with its KV format")
        for name in self.weight_formats:
            if not is_format(name):
                raise UsageError(f"unknown weight format {name!r}; known: {', '.join(FORMATS)}")
        for name in self.kv_formats:
            if name not in KV_BYTES:
                raise UsageError(f"unknown KV format {name!r}; known: {', '.join(KV_BYTES)}")
        if not 1 <= self.max_devices <= self.cluster.size:
            raise UsageError(
                f"gpus: {self.max_devices} is not between 1 and the {self.cluster.size} GPUs of {self.cluster.name}"
            )

    def blocks_needed(self, plan: Plan) -> int:
        """KV blocks that a plan must have for the longest request, with those for drafts to come."""
        settings, tokens = settings_of(self.model, self.settings, plan), self.longest_tokens
        if plan.speculation is not None:
            return int(settings.most_blocks(settings.with_drafts(np.array(tokens), plan.speculation)))
        return int(settings.most_blocks(np.array(tokens)))

    @property
    def decode_bytes_limit(self) -> int | None:
        """Bytes a GPU can read from its memory within the tightest TPOT limit; None without such a limit."""
        if self.tpot_limit_ns is None:
            return None
        return int(self.cluster.gpu.memory_bytes_per_s * self.tpot_limit_ns / NS_PER_S)

    def bytes_limit(self, plan: Plan) -> int | None:
        """The same for one pass of a plan, of which as many tokens may come as it has drafts, and one more."""
        limit = self.decode_bytes_limit
        return limit if limit is None or plan.speculation is None else limit * (1 + plan.speculation.draft_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One constraint family a plan breaks, with the numbers."""

    family: str
    text: str


def violations(instance: Instance, plan: Plan) -> tuple[Violation, ...]:
    """Every constraint family the plan breaks, in the order of `FAMILIES`; "devices" comes first where it applies."""
    checks = (_devices, _divisibility, _format, _engine, _balance, _memory, _bandwidth)
    found = []
    for check in checks:
        text = next(check(instance, plan), None)
        if text is not None:
            found.append(Violation(family=check.__name__.removeprefix("_"), text=text))
    return tuple(found)


def _devices(instance: Instance, plan: Plan) -> Iterator[str]:
    if plan.devices > instance.max_devices:
        yield f"the plan takes {plan.devices} GPUs, {instance.max_devices} are offered"


def _divisibility(instance: Instance, plan: Plan) -> Iterator[str]:
    if plan.ffn.ep > 1 and not instance.model.is_moe:
        yield f"ep{plan.ffn.ep} needs experts; the FFN is dense"
    for block in instance.model.blocks:
        yield from _undivided("attention ", block.attention.pieces, plan.attention)
        yield from _undivided("FFN ", block.ffn.pieces, plan.ffn)


def _undivided(cell: str, pieces: tuple[Piece, ...], template: Template) -> Iterator[str]:
    """Pieces of a cell that its shards do not share evenly."""
    for piece in pieces:
        degrees = {name: getattr(template, name) for name in piece.by}
        shards = math.prod(degrees.values())
        if piece.size % shards == 0 or (piece.copied and shards % piece.size == 0):
            continue
        cut = " ".join(f"{name}{degree}" for name, degree in degrees.items() if name == "tp" or degree > 1)
        verb = "neither divides nor is a multiple of" if piece.copied else "does not divide"
        yield f"{cell if 'tp' in degrees else ''}{cut} {verb} {piece.size} {piece.name}"


def _format(instance: Instance, plan: Plan) -> Iterator[str]:
    gpu = instance.cluster.gpu
    wanted = get_format(plan.weight_format)
    for form in wanted.mixed or (wanted,):
        needed = form.hardware_dtype
        if needed is not None and form.expanded is None and not gpu.supports(needed):
            reason = f", which {plan.weight_format} needs" if needed != plan.weight_format else ""
            yield f"{gpu.name} does not compute in {needed}{reason}"


def _engine(instance: Instance, plan: Plan) -> Iterator[str]:
    yield from _drafts(instance, plan)
    yield from _sharing(instance, plan)
    yield from overlap_faults(instance, plan)
    if fault := allotted(instance.model, plan, instance.settings).fault:
        yield fault
    if instance.settings.runnable is not None:
        yield from refusals(
            instance.settings.runnable, instance.model, instance.cluster, plan, limited(instance.settings, plan)
        )


def _drafts(instance: Instance, plan: Plan) -> Iterator[str]:
    """Why the plan cannot make drafts."""
    drafter = plan.speculation
    if drafter is None:
        return
    if plan.stages > 1:
        yield f"spec={drafter}: drafts are made on one pipeline stage, the plan has {plan.stages}"
    if not drafts_in_copies(instance.settings, plan):
        name = instance.settings.scheduler.name
        yield f"spec={drafter}: {name} is modelled with one attention copy that makes drafts, not {plan.attention.dp}"
    draft = draft_of(instance.model, drafter)
    for run in draft.runs if draft else ():
        for name, cell, template in (
            ("attention", run.block.attention, plan.attention),
            ("FFN", run.block.ffn, plan.ffn),
        ):
            for fault in _undivided(f"{name} ", cell.pieces, template):
                yield f"spec={drafter}: {fault}"


def _sharing(instance: Instance, plan: Plan) -> Iterator[str]:
    """Why the plan cannot compute prompts and answers side by side."""
    shares = plan.shares
    if shares is None:
        return
    if plan.stages > 1:
        yield f"share={shares}: phases share the GPUs of one pipeline stage, the plan has {plan.stages}"
    if plan.attention.dp > 1:
        yield f"share={shares}: phases share GPUs with one attention copy, the plan has {plan.attention.dp}"
    if plan.speculation is not None:
        yield f"share={shares}: phases share GPUs without drafts, the plan has spec={plan.speculation}"
    if plan.route not in (None, "round_robin"):
        yield f"share={shares}: requests go to replicas in turn, the plan has route={plan.route}"
    if shares.multiplexed and (fault := division_fault(shares, instance.cluster.gpu)):
        yield f"share={shares}: {fault}"


def overlap_faults(instance: Instance, plan: Plan) -> Iterator[str]:
    """Why the forwards of the plan cannot overlap as it says."""
    if plan.overlap is None:
        return
    what, name = f"overlap={plan.overlap}", instance.settings.scheduler.name
    if plan.overlap == NANO:
        if not isinstance(instance.settings.scheduler, VllmScheduling):
            yield f"{what}: it is modelled with the scheduler of vllm, not with {name}"
        if plan.attention.dp > 1:
            yield f"{what}: it is modelled with one attention copy, the plan has {plan.attention.dp}"
    else:
        if instance.settings.scheduler.splitting is None:
            yield f"{what}: {name} splits no forward"
        if plan.attention.dp == 1:
            yield f"{what}: forwards are split of several attention copies, the plan has one"
        if plan.ffn.ep != plan.stage_devices or plan.ffn.ep == 1:
            yield f"{what}: each GPU of a stage has experts of its own to send to, the plan has ffn({plan.ffn})"
    if plan.stages > 1:
        yield f"{what}: it is modelled on one pipeline stage, the plan has {plan.stages}"
    if plan.speculation is not None:
        yield f"{what}: it is modelled without drafts, the plan has spec={plan.speculation}"


def _memory(instance: Instance, plan: Plan) -> Iterator[str]:
    memory = stage_memory(instance.model, instance.cluster.gpu, plan, limited(instance.settings, plan))
    blocks = kv_blocks(memory)
    need = instance.blocks_needed(plan)
    if blocks < need:
        worst = max(memory, key=lambda stage: needed_bytes(need, stage))
        kv = (need + 1) * worst.kv_block_bytes
        states = ""
        if worst.states_bytes:
            seats = state_seats(plan, limited(instance.settings, plan))
            states = f", states of {seats:,} sequences at once {worst.states_bytes / GB:.1f}"
        yield (
            f"a GPU needs {needed_bytes(need, worst) / GB:.1f} GB (weights {worst.weights_bytes / GB:.1f}, "
            f"workspace {(worst.workspace_bytes + worst.runtime_bytes) / GB:.1f}, KV cache of {instance.longest} "
            f"{kv / GB:.1f}{states}) and may use {worst.usable_bytes / GB:.1f}"
        )


def needed_bytes(blocks: int, stage: StageMemory) -> int:
    """What a GPU of a stage must have room for: beside the engine and the weights the blocks of the longest request."""
    return stage.beside_bytes + (blocks + 1) * stage.kv_block_bytes


def _bandwidth(instance: Instance, plan: Plan) -> Iterator[str]:
    limit = instance.bytes_limit(plan)
    if limit is not None and (read := decode_bytes(instance.model, plan, instance.held)) > limit:
        rate = instance.cluster.gpu.memory_bytes_per_s
        least_ms, limit_ms = read / rate * 1e3, (instance.tpot_limit_ns or 0) / 1e6
        if plan.speculation is not None:
            least_ms /= 1 + plan.speculation.draft_tokens
        yield (
            f"a token passes through {read / GB:.2f} GB of weights per GPU, at least {least_ms:.4g} ms at "
            f"{rate / 1e12:.2f} TB/s; the tightest TPOT limit is {limit_ms:.4g} ms"
        )


def _balance(instance: Instance, plan: Plan) -> Iterator[str]:
    layers = instance.model.layers
    if plan.stages * max(plan.layers) * IMBALANCE[1] > IMBALANCE[0] * layers:
        yield (
            f"the largest of {plan.stages} stages holds {max(plan.layers)} of {layers} layers, "
            f"more than {IMBALANCE[0]}/{IMBALANCE[1]} of the mean"
        )


def decode_bytes(model: Model, plan: Plan, held: Held = PLAIN) -> int:
    """Least weights that one GPU of each stage together read for one token: what bounds time per output token.

    Parameters
    ----------
    model, plan
    held : Held    how the engine holds the model
    """
    total = 2 * ceil_div(model.vocab, plan.attention.tp) * model.hidden
    for run in model.runs:
        attention = attention_shard_bytes(run.block.attention, plan.attention.tp, plan.weight_format)
        cut = ffn_cut(run.block.ffn, plan.attention, plan.ffn, plan.weight_format, held)
        total += run.count * (attention + ffn_token_bytes(run.block.ffn, cut, plan.weight_format))
    return total


def space(instance: Instance) -> Iterator[Plan]:
    """Every plan there is, feasible or not, by counting: the brute force that programs are tested against.

    A plan takes at most `max_devices` GPUs and at most as many stages as the model has layers; a model without experts
    has no expert parallelism. Formats and limits of a batch are those of the instance. Copies that both cells of a
    stage have are replicas, so the copies of attention and of FFN have no common factor. Layers are split evenly;
    where that leaves the stages unequal and another split is better and fits (`moved`), that is a plan as well.
    """
    for cut in cuts(instance):
        layers = moved(instance, cut)
        for plan in (cut,) if layers in (None, cut.layers) else (cut, replace(cut, layers=layers)):
            for routed, counts in repeated(plan, instance.max_devices // cut.devices, instance.routings):
                yield from (routed.times(count) for count in counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The space of an instance, counted plan by plan.

    Parameters
    ----------
    space : int              plans there are; every cut into several stages is two, with layers even and moved
    infeasible : mapping     plans that break a constraint family, charged to the first in order
    repeated : int           feasible plans whose layers, moved, stay even, and which so are another plan
    plans : tuple of Plan    the other feasible ones
    """

    space: int
    infeasible: dict[str, int]
    repeated: int
    plans: tuple[Plan, ...]


def tally(instance: Instance) -> Tally:
    """Count the space and ask the oracle about each plan of it."""
    lost, size, same = dict.fromkeys(FAMILIES, 0), 0, 0
    plans: list[Plan] = []
    for cut in cuts(instance):
        most = instance.max_devices // cut.devices
        count = count_repeated(most, instance.routings)
        broken = [violation.family for violation in violations(instance, cut)]
        found = [(cut, broken)]
        if cut.stages > 1:
            # Where layers lie changes what a stage holds and nothing else.
            layers = moved(instance, cut)
            others = [family for family in broken if family != "memory"]
            if layers is None:
                found.append((cut, sorted({*others, "memory"}, key=FAMILIES.index)))
            elif others or layers != cut.layers:
                found.append((replace(cut, layers=layers), others))
            else:
                same += count
                size += count
        for plan, families in found:
            size += count
            if families:
                lost[families[0]] += count
            else:
                every = repeated(plan, most, instance.routings)
                plans += [routed.times(replicas) for routed, counts in every for replicas in counts]
    return Tally(space=size, infeasible=lost, repeated=same, plans=tuple(plans))


def cuts(instance: Instance) -> Iterator[Plan]:
    """Every way to cut one replica, with even stages."""
    model = instance.model
    for stages in range(1, min(instance.max_devices, model.layers) + 1):
        layers = even_split(model.layers, stages)
        for devices in range(1, instance.max_devices // stages + 1):
            for attention in _templates(devices, expert=False):
                for ffn in _templates(devices, expert=model.is_moe):
                    if math.gcd(attention.dp, ffn.dp) > 1:
                        continue
                    for weight_format, kv_format in zip(instance.weight_formats, instance.kv_formats, strict=True):
                        for (seqs, tokens), drafter in product(instance.batch_limits, instance.drafters):
                            yield Plan(
                                replicas=1,
                                layers=layers,
                                attention=attention,
                                ffn=ffn,
                                weight_format=weight_format,
                                kv_format=kv_format,
                                max_num_seqs=seqs,
                                max_num_batched_tokens=tokens,
                                speculation=drafter,
                                shares=instance.shares,
                                overlap=instance.overlap,
                            )


def _templates(devices: int, *, expert: bool) -> Iterator[Template]:
    """Every way to cut one cell over this many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for dp in divisors:
        for tp in divisors:
            if devices % (dp * tp) == 0 and (expert or dp * tp == devices):
                yield Template(dp=dp, tp=tp, ep=devices // (dp * tp))


def moved(instance: Instance, plan: Plan) -> tuple[int, ...] | None:
    """Layers of the stages such that the heaviest is as light as can be; None where nothing fits.

    A stage weighs the bytes that a full batch reads: its layers, and the LM head on the last. Of the lightest splits
    it is the one that leaves the most for the KV cache where the least is left, of these the one whose boundaries, in
    order, lie nearest those of the even split. Activations are looked at only where a split does not fit beside them.
    Stages are several and balanced, and shards equal, or there is none.
    """
    if plan.stages == 1 or any(next(check(instance, plan), None) for check in (_divisibility, _format, _engine)):
        return None
    model, tp, settings = instance.model, plan.attention.tp, limited(instance.settings, plan)
    vocab = 2 * ceil_div(model.vocab, 1 if instance.held.whole_vocabulary else tp) * model.hidden
    weights = [0]
    for run in model.runs:
        read = block_shard_bytes(run.block, plan, instance.held) + 2 * run.block.own_parameters
        weights += [weights[-1] + count * read for count in range(1, run.count + 1)]
    held = _held_before(instance, plan, weights)
    stages = stage_memory(model, instance.cluster.gpu, plan, settings)
    head = vocab + 2 * model.after_parameters
    last = plan.stages - 1
    copies = [vocab_copies(model, instance.held, index == 0, index == last) for index in range(plan.stages)]
    ends = {0: model.before_bytes(tp), last: 2 * model.after_parameters}
    beside = [vocab * n + ends.get(index, 0) + instance.held.table_bytes for index, n in enumerate(copies)]
    extra = (*(0,) * (plan.stages - 1), head)
    most = IMBALANCE[0] * model.layers // (IMBALANCE[1] * plan.stages)
    rooms = tuple(s.usable_bytes - s.runtime_bytes - other for s, other in zip(stages, beside, strict=True))
    active = tuple(room - stage.workspace_bytes for room, stage in zip(rooms, stages, strict=True))
    if sum(active) < max(row[-1] for row in held):
        return None
    found = _lightest(tuple(weights), held, extra, rooms, most)
    if found is not None and any(
        _taken(held, i, j) > room for (i, j), room in zip(pairwise([0, *accumulate(found)]), active, strict=True)
    ):
        found = _lightest(tuple(weights), held, extra, active, most)
    return found


def _held_before(instance: Instance, plan: Plan, weights: list[int]) -> tuple[tuple[int, ...], ...]:
    """By group of layers the bytes that the layers before each take: weights, blocks of the longest request, states.

    A stage has room for as many blocks as its layers of the group with the most there.
    """
    settings = limited(instance.settings, plan)
    allotment, seats = allotted(instance.model, plan, settings), state_seats(plan, settings)
    page = (instance.blocks_needed(plan) + 1) * allotment.page_bytes
    states = allotment.states_before or (0,) * len(weights)
    return tuple(
        tuple(read + page * places + seats * state for read, places, state in zip(weights, row, states, strict=True))
        for row in allotment.before
    )


def _taken(held: tuple[tuple[int, ...], ...], first: int, last: int) -> int:
    """Bytes that the layers from the `first` to before the `last` take on one stage."""
    return max(row[last] - row[first] for row in held)


@lru_cache(maxsize=1 << 12)
def _lightest(
    weight: tuple[int, ...],
    held: tuple[tuple[int, ...], ...],
    extra: tuple[int, ...],
    room: tuple[int, ...],
    most: int,
) -> tuple[int, ...] | None:
    """The split of `moved`: what a stage may weigh and must leave by bisection, the boundaries from the last stage."""
    layers, stages = len(weight) - 1, len(extra)
    spans = [(i, j) for i in range(layers) for j in range(i + 1, min(i + most, layers) + 1)]
    taken = {(i, j): _taken(held, i, j) for i, j in spans}
    even = [0, *accumulate(even_split(layers, stages))]

    def reach(top: int, least: int) -> tuple[int, ...] | None:
        """The boundaries nearest the even ones within a weight and with so much left."""
        tails: dict[int, tuple[tuple[int, int], ...] | None] = {layers: ()}
        for k in range(stages - 1, -1, -1):
            fresh: dict[int, tuple[tuple[int, int], ...] | None] = {}
            for i in range(layers):
                options = [
                    ((abs(j - even[k + 1]), j), *tail)
                    for j in range(i + 1, min(i + most, layers) + 1)
                    if (tail := tails.get(j)) is not None
                    and weight[j] - weight[i] + extra[k] <= top
                    and room[k] - taken[i, j] >= least
                ]
                if options:
                    fresh[i] = min(options)
            tails = fresh
        found = tails.get(0)
        return None if found is None else tuple(j for _, j in found)

    tops = sorted({weight[j] - weight[i] + e for i, j in spans for e in set(extra)})
    top = _first(tops, lambda value: reach(value, 0) is not None)
    if top is None:
        return None
    frees = sorted({r - size for size in set(taken.values()) for r in set(room)}, reverse=True)
    least = _first([free for free in frees if free >= 0], lambda value: reach(top, value) is not None)
    assert least is not None  # what is least left in the split just found is among them
    ends = reach(top, least)
    assert ends is not None
    return tuple(j - i for i, j in pairwise((0, *ends)))


def _first(values: list[int], holds: Callable[[int], bool]) -> int | None:
    """The first value from which on something holds, by bisection."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(values[middle]) else (middle + 1, high)
    return values[low] if low < len(values) else None
