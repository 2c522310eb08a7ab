"""What a plan must satisfy, constraint family by constraint family, in plain Python."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apex_opt.engines.overlap import NANO
from apex_opt.engines.rules import PLAIN, Held
from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.ir.formats import get_format
from apex_opt.plans.allotment import allotted
from apex_opt.plans.drafts import draft_of
from apex_opt.plans.engine import drafts_in_copies, limited
from apex_opt.plans.memory import (
    attention_shard_bytes,
    ffn_cut,
    ffn_token_bytes,
    kv_blocks,
    stage_memory,
    state_seats,
)
from apex_opt.plans.refusals import refusals
from apex_opt.plans.shares import division_fault
from apex_opt.units import GB, ceil_div

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.ir.cells import Piece
    from apex_opt.ir.model import Model
    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.memory import StageMemory
    from apex_opt.plans.plan import Plan, Template

FAMILIES: Final = ("divisibility", "format", "engine", "balance", "memory", "bandwidth")
"""Constraint families in the order in which an infeasible plan is charged to one of them."""

OF_CUTS: Final = tuple(family for family in FAMILIES if family not in ("memory", "bandwidth"))
"""Those that depend on how a replica is cut alone, wherever its layers lie."""

IMBALANCE: Final = (3, 2)
"""The largest stage may hold at most 3/2 of the mean layers per stage: beyond, devices mostly wait."""


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


def cuttable(instance: Instance, plan: Plan) -> bool:
    """Whether shards are equal, the formats are computed in, and the engine runs the plan, wherever its layers lie."""
    return not any(next(check(instance, plan), None) for check in (_divisibility, _format, _engine))


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
    together = instance.model.together
    if odd := next((count for count in plan.layers if count % together), 0):
        yield f"a stage holds {odd} layers, of which {together} each are one that no engine cuts"


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
