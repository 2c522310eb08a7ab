"""Plans as parts of fleets: what dealing, simulating and bounding a fleet need to know of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apex_opt.cost import idle_w, limit_w
from apex_opt.plan.memory import kv_blocks, stage_memory
from apex_opt.search.bounds import StageFloor, isolated, may_preempt
from apex_opt.search.dealing import tokens_per_s
from apex_opt.search.load import works_ns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from apex_opt.plan.memory import StageMemory
    from apex_opt.plan.plan import Plan
    from apex_opt.search.evaluator import Evaluator


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What bounds need to know of a plan as part of a fleet.

    Parameters
    ----------
    plan : Plan
    memory : StageMemory of each stage
    weight : int                       tokens per second at full batches, by which requests are dealt
    first_ns, rest_ns : int64[n]       least time of each request of the trace to its first token, and from there on
    work_ns : float64[n]               what each takes of one replica at least
    held_ns, step_ns : float           of all replicas, for a KV block held while a token is computed, and for a token
    batch_ns : int                     least time between two tokens
    token_j : float                    least energy of a token above the idle draw
    idle_w, limit_w : float            least and most draw of all its GPUs
    cost_per_h : float                 $ per hour of them; NaN where not known
    """

    plan: Plan
    memory: tuple[StageMemory, ...]
    weight: int
    first_ns: NDArray[np.int64]
    rest_ns: NDArray[np.int64]
    work_ns: NDArray[np.float64]
    held_ns: float
    step_ns: float
    batch_ns: int
    token_j: float
    idle_w: float
    limit_w: float
    cost_per_h: float


def parts_of(evaluator: Evaluator, plans: Sequence[Plan], tell: Callable[[str, int, int], None]) -> list[Part]:
    """The plans of a pool as parts of fleets; what does not depend on the number of replicas is worked out once."""
    question, costs = evaluator.question, evaluator.costs
    trace, found = question.trace, dict[tuple[Any, ...], dict[str, Any]]()
    parts: dict[int, Part] = {}
    # Plans of the same cut share their tables while these are still there.
    for index in sorted(range(len(plans)), key=lambda index: (plans[index].cut, plans[index].stages)):
        tell("bounding plans", len(parts), len(plans))
        plan = plans[index]
        layout, settings = costs.layouts.best(plan), question.settings_for(plan)
        key = plan.cut, plan.layers, layout
        if key not in found:
            memory = stage_memory(question.model, question.cluster.gpu, plan, settings)
            blocks = kv_blocks(memory) * plan.attention.dp
            laws = costs.plan_cost(plan).laws
            overtaking = plan.stages > 1 and may_preempt(settings, blocks, trace)
            floors = [StageFloor.of(law) for law in laws]
            alone = isolated(settings, floors, trace, overtaking=overtaking)
            least = costs.least(plan)
            mean = StageFloor.mean(least, plan.stages, plan.attention.dp)
            under_way_ns = mean.batch_ns * (1 if overtaking else plan.stages)
            found[key] = {
                "memory": memory,
                "weight": tokens_per_s(settings, blocks, laws, trace, 1),
                "first_ns": alone.first_token_ns - alone.arrival_ns,
                "rest_ns": alone.finish_ns - alone.first_token_ns,
                "work_ns": sum(works_ns(settings, mean, trace)),
                # Blocks that prompts share are held once.
                "held_ns": 0.0 if settings.prefix_caching else under_way_ns / max(blocks, 1),
                "step_ns": under_way_ns / settings.max_num_seqs,
                "batch_ns": 0 if overtaking else sum(floor.batch_ns for floor in floors),
                "token_j": min(least.decode_joules, least.mixed_joules) * plan.stage_devices,
            }
        cost_per_h = question.cost_per_h(plan)
        one = found[key]
        shared = {name: one[name] / plan.replicas for name in ("held_ns", "step_ns")}
        parts[index] = Part(
            **(one | shared | {"weight": one["weight"] * plan.replicas}),
            plan=plan,
            idle_w=idle_w(costs, plan),
            limit_w=limit_w(costs, plan),
            cost_per_h=float("nan") if cost_per_h is None else cost_per_h,
        )
    return [parts[index] for index in range(len(plans))]
