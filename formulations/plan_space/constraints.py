"""One function per constraint family. Numbers (C1, ...) refer to the statement in `program.py`.

A function returns the constraints that bind; what else it adds only tabulates, and has a solution for every plan. So a
family is switched off by enforcing what it returned on a literal that is false.

Coefficients are those of `sizes.py`: whole bytes, nothing is rounded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from apex_opt.engines.overlap import NANO
from apex_opt.oracle.checks import IMBALANCE

from .blocks import Pools
from .engine import Runs
from .memory import shared_lies_whole, stage_fits_memory
from .sizes import (
    attention_side,
    draft_blocks,
    ffn_side,
    head_bytes,
    kinds,
    shards,
    stages_of,
)
from .tables import holds, tabulated

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.ir.cells import Piece
    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.speculation import Drafter

    from .variables import Variables

    Family = Callable[[cp_model.CpModel, Instance, Variables], list[cp_model.Constraint]]

_ARITHMETIC = {"bf16": "bf16", "fp16": "fp16", "w8a8": "int8"}
"""What the GPU must multiply in; others are expanded to whichever 16-bit type it has, where it has not their own."""


def cells_share_devices(model: cp_model.CpModel, instance: Instance, v: Variables) -> None:
    """C1, C2: both cells are cut over the devices of a stage, no copies are common, and all stages fit the cluster."""
    gpus = instance.max_devices
    model.add_allowed_assignments(
        [v.stages, v.devices],
        [(s, g) for s in range(1, min(gpus, instance.model.layers) + 1) for g in range(1, gpus // s + 1)],
    )
    pairs = [(dp, tp) for dp in range(1, gpus + 1) for tp in range(1, gpus // dp + 1)]
    model.add_allowed_assignments([v.attention_dp, v.attention_tp, v.devices], [(d, t, d * t) for d, t in pairs])
    experts = gpus if instance.model.is_moe else 1
    model.add_allowed_assignments(
        [v.ffn_dp, v.ffn_tp, v.ffn_ep, v.devices],
        [(d, t, e, d * t * e) for d, t in pairs for e in range(1, min(experts, gpus // (d * t)) + 1)],
    )
    # Without common factors both divide the devices together.
    model.add_allowed_assignments([v.attention_dp, v.ffn_dp], [(a, f) for a, f in pairs if math.gcd(a, f) == 1])


def tasks_divide(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C3: equal shards. Heads, columns and experts divide; KV heads divide or are copied a whole number of times."""
    degrees = range(1, instance.max_devices + 1)
    return [
        holds(model, "heads_divide", [v.attention_tp], ((t, heads_divide(instance, t)) for t in degrees)),
        holds(
            model,
            "columns_divide",
            [v.ffn_tp, v.ffn_ep],
            ((t, e, columns_divide(instance, t, e)) for t, e in shards(instance)),
        ),
    ]


def heads_divide(instance: Instance, tp: int) -> bool:
    """Whether attention shards are equal in every block."""
    return all(_divides(piece, tp) for block in kinds(instance) for piece in block.attention.pieces)


def copies_draft(instance: Instance, drafter: Drafter) -> bool:
    """Whether attention copies may make these drafts."""
    rules = instance.settings.runnable
    copied = None if rules is None else rules.copied_drafts
    known = copied is None or drafter.method in copied
    return known and instance.settings.scheduler.name in ("vllm", "sglang", "trtllm")


def draft_heads(instance: Instance, drafter: Drafter | None, tp: int) -> bool:
    """Whether attention of what makes drafts is cut into equal shards.

    Parameters
    ----------
    instance
    drafter : Drafter or None    how drafts are made
    tp : int                     shards
    """
    blocks = draft_blocks(instance, drafter)
    return all(_divides(piece, tp) for block in blocks for piece in block.attention.pieces)


def draft_columns(instance: Instance, drafter: Drafter | None, tp: int, ep: int) -> bool:
    """Whether the FFN of what makes drafts is.

    Parameters
    ----------
    instance
    drafter : Drafter or None    how drafts are made
    tp : int                     shards
    ep : int                     groups of experts
    """
    by = {("tp",): tp, ("ep",): ep, ("tp", "ep"): tp * ep}
    blocks = draft_blocks(instance, drafter)
    return all(_divides(piece, by[piece.by]) for block in blocks for piece in block.ffn.pieces)


def columns_divide(instance: Instance, tp: int, ep: int) -> bool:
    """Whether FFN shards are equal in every block.

    Parameters
    ----------
    instance
    tp : int    shards
    ep : int    groups of experts
    """
    shards = {("tp",): tp, ("ep",): ep, ("tp", "ep"): tp * ep}
    return all(_divides(piece, shards[piece.by]) for block in kinds(instance) for piece in block.ffn.pieces)


def _divides(piece: Piece, shards: int) -> bool:
    return piece.size % shards == 0 or (piece.copied and shards % piece.size == 0)


def computes(instance: Instance, weight_format: str) -> bool:
    """Whether the GPU multiplies in the format, or in all of a mixed one, or expands it to one in which it does."""
    needed = (_ARITHMETIC[part] for part in weight_format.split("+") if part in _ARITHMETIC)
    return all(instance.cluster.gpu.supports(dtype) for dtype in needed)


def balanced(instance: Instance, stages: int) -> bool:
    """Whether the largest of so many stages holds at most 3/2 of the mean layers, and all hold whole ones."""
    layers, together = instance.model.layers, instance.model.together
    if together > 1 and layers % (together * stages):
        return False
    return stages * -(-layers // stages) * IMBALANCE[1] <= IMBALANCE[0] * layers


def hardware_computes_format(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C4: the GPU multiplies in the format, or expands it to one in which it does."""
    names = instance.weight_formats
    return [holds(model, "computes", [v.formats], ((i, computes(instance, name)) for i, name in enumerate(names)))]


def engine_runs(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C4: the engine that is to run the plan can, and drafts can be made."""
    runs, degrees, formats = Runs(instance), range(1, instance.max_devices + 1), range(len(instance.weight_formats))
    pairs = [(d, t) for d in degrees for t in range(1, instance.max_devices // d + 1)]
    cut = shards(instance)
    drafted, pools = [(i, drafter) for i, drafter in enumerate(instance.drafters)], Pools(instance)
    drafts = (
        [
            holds(
                model,
                "one_stage_drafts",
                [v.drafts, v.stages],
                ((i, s, d is None or s == 1) for i, d in drafted for s in stages_of(instance)),
            ),
            holds(
                model,
                "one_copy_drafts",
                [v.drafts, v.attention_dp],
                ((i, n, d is None or n == 1 or copies_draft(instance, d)) for i, d in drafted for n in degrees),
            ),
            holds(
                model,
                "draft_heads",
                [v.drafts, v.attention_tp],
                ((i, t, draft_heads(instance, d, t)) for i, d in drafted for t in degrees),
            ),
            holds(
                model,
                "draft_columns",
                [v.drafts, v.ffn_tp, v.ffn_ep],
                ((i, t, e, draft_columns(instance, d, t, e)) for i, d in drafted for t, e in cut),
            ),
        ]
        if any(instance.drafters)
        else []
    )
    if pools.varied:
        drafts.append(
            holds(
                model,
                "one_pool",
                [v.drafts, v.attention_tp, v.formats],
                (
                    (i, t, f, pools.of(d, t, kv) is not None)
                    for i, d in drafted
                    for t in degrees
                    for f, kv in enumerate(instance.kv_formats)
                ),
            )
        )
    if instance.shares is not None:
        side_by_side = [
            holds(model, "one_stage_shared", [v.stages], ((s, runs.shares and s == 1) for s in stages_of(instance))),
            holds(model, "one_copy_shared", [v.attention_dp], ((n, runs.shares and n == 1) for n in degrees)),
        ]
        drafts += side_by_side
    if instance.overlap is not None:
        drafts += [
            holds(model, "one_stage_split", [v.stages], ((s, runs.overlap and s == 1) for s in stages_of(instance))),
            holds(model, "no_drafts_split", [v.drafts], ((i, d is None) for i, d in drafted)),
            holds(
                model, "copies_split", [v.attention_dp], ((n, (n == 1) == (instance.overlap == NANO)) for n in degrees)
            ),
        ]
    if instance.overlap is not None and instance.overlap != NANO:
        groups = [(d, t, e) for t, e in cut for d in range(1, instance.max_devices // (t * e) + 1)]
        drafts += [
            holds(model, "formats_split", [v.formats], ((f, runs.splits(f)) for f in formats)),
            holds(
                model,
                "seats_split",
                [v.limits, v.attention_dp],
                ((i, n, runs.answers(n, i)) for i in range(len(instance.batch_limits)) for n in degrees),
            ),
            holds(
                model,
                "experts_split",
                [v.ffn_dp, v.ffn_tp, v.ffn_ep],
                ((d, t, e, d == t == 1 and e > 1) for d, t, e in groups),
            ),
        ]
    if instance.settings.runnable is None:
        return drafts
    return [
        *drafts,
        holds(model, "engine_stages", [v.stages], ((s, runs.stages(s)) for s in stages_of(instance))),
        holds(model, "engine_copies", [v.ffn_dp], ((d, runs.ffn_copies(d)) for d in degrees)),
        holds(
            model,
            "engine_attention",
            [v.attention_dp, v.attention_tp, v.formats],
            ((d, t, f, runs.attention(d, t, f)) for d, t in pairs for f in formats),
        ),
        holds(
            model,
            "engine_ffn",
            [v.ffn_tp, v.ffn_ep, v.formats],
            ((t, e, f, runs.ffn(t, e, f)) for t, e in cut for f in formats),
        ),
    ]


def stages_balance(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C5: the largest stage holds at most 3/2 of the mean layers, and none a part of those that are one."""
    counts = range(1, min(instance.max_devices, instance.model.layers) + 1)
    return [holds(model, "balanced", [v.stages], ((s, balanced(instance, s)) for s in counts))]


def weights_read_within_tpot(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C7: the weights one token passes through can be read within the tightest limit on time per output token."""
    limit = instance.decode_bytes_limit
    if limit is None:
        return []
    degrees = range(1, instance.max_devices + 1)
    head = tabulated(model, "head", [v.attention_tp], ((t, head_bytes(instance, t)) for t in degrees))
    total: list[cp_model.LinearExpr] = [head]
    whole = shared_lies_whole(model, instance, v)
    for u, (block, count) in enumerate(kinds(instance).items()):
        attention = tabulated(
            model,
            f"attention_read_{u}",
            [whole, v.attention_tp, v.formats],
            (
                (w, t, f, attention_side(instance, block, t, name, whole=bool(w), touched=True))
                for w in (0, 1)
                for t in degrees
                for f, name in enumerate(instance.weight_formats)
            ),
        )
        ffn = tabulated(
            model,
            f"ffn_read_{u}",
            [v.ffn_tp, v.ffn_ep, v.formats],
            (
                (t, e, f, ffn_side(instance, block, t, e, name, touched=True))
                for t, e in shards(instance)
                for f, name in enumerate(instance.weight_formats)
            ),
        )
        total += [count * attention, count * ffn]
    # As many tokens may come of one pass as there are drafts, and one more.
    passes = tabulated(
        model,
        "tokens_of_a_pass",
        [v.drafts],
        ((i, 1 + (d.draft_tokens if d else 0)) for i, d in enumerate(instance.drafters)),
    )
    return [model.add(cp_model.LinearExpr.sum(total) <= limit * passes)]


FAMILIES: dict[str, Family] = {
    "divisibility": tasks_divide,
    "format": hardware_computes_format,
    "engine": engine_runs,
    "memory": stage_fits_memory,
    "bandwidth": weights_read_within_tpot,
    "balance": stages_balance,
}
"""By the names of `apex_opt.oracle.checks.FAMILIES`; each can be built alone."""
