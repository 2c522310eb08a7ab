"""Plans as pools of a deployment: what dealing, bounding and simulating several of them needs to know of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apex_opt.cost import idle_w, limit_w
from apex_opt.plans.engine import of_all
from apex_opt.search.bounds import StageFloor, isolated, may_preempt, minds_preemption
from apex_opt.search.bounds.load import works_ns
from apex_opt.search.dealing import tokens_per_s

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from apex_opt.plans.deployment import Pool
    from apex_opt.search.facts import Facts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Option:
    """A pool beside others.

    Parameters
    ----------
    pool : Pool
    weight : int                       tokens per second at full batches, by which requests are dealt
    first_ns, rest_ns : int64[n]       least time of each request of the trace to its first token, and from there on
    work_ns : float64[n]               what each takes of one replica at least
    held_ns, step_ns : float           of all replicas, for a KV block held while a token is computed, of those that a
                                       prompt has by the settings of the problem, and for a token
    batch_ns : int                     least time between two tokens
    token_j : float                    least energy of a token above the idle draw
    idle_w, limit_w : float            least and most draw of all its GPUs
    cost_per_h : float                $ per hour of them; NaN where not known
    """

    pool: Pool
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

    @property
    def devices(self) -> int:
        return self.pool.plan.devices


def options_of(facts: Facts, pools: Sequence[Pool], tell: Callable[[str, int, int], None]) -> list[Option]:
    """Pools on one type of GPU as options; what does not depend on the number of replicas is worked out once.

    Parameters
    ----------
    facts
    pools : sequence of Pool    on GPUs of one type
    tell : callable             told (what, done, total) along the way
    """
    problem, costs = facts.problem, facts.costs
    trace, found = problem.trace, dict[tuple[Any, ...], dict[str, Any]]()
    options: dict[int, Option] = {}
    # Plans of the same cut share their tables while these are still there.
    for index in sorted(range(len(pools)), key=lambda index: (pools[index].plan.cut, pools[index].plan.stages)):
        tell("bounding plans", len(options), len(pools))
        plan = pools[index].plan
        settings = problem.settings_for(plan)
        key = plan.cut, plan.layers, costs.layouts_of(plan)
        if key not in found:
            blocks, cost = facts.blocks(plan), facts.plan_cost(plan)
            minds = minds_preemption(settings, plan.stages)
            overtaking = minds and may_preempt(settings, facts.own_blocks(plan), trace)
            floors = StageFloor.of_pool(cost.laws, cost.ranks)
            first_ns, rest_ns = isolated(settings, floors, trace, overtaking=overtaking)
            mean = facts.mean(plan)
            under_way_ns = mean.batch_ns * (1 if overtaking else plan.stages)
            # Where layers keep different things a request holds other blocks than if all kept all tokens.
            alike = -(-trace.prompt // problem.settings.block_size)
            share = float((settings.least_blocks(trace.prompt) / alike).min()) if settings.kv_groups else 1.0
            found[key] = {
                "weight": tokens_per_s(settings, facts.own_blocks(plan), cost.laws, trace, 1, ranks=cost.ranks),
                "first_ns": first_ns,
                "rest_ns": rest_ns,
                "work_ns": sum(works_ns(settings, mean, trace)),
                # Blocks that prompts share are held once.
                "held_ns": 0.0 if settings.prefix_caching else share * under_way_ns / max(blocks, 1),
                "step_ns": under_way_ns / of_all(settings, plan).seats(plan.stages),
                "batch_ns": 0 if overtaking and plan.stages > 1 else sum(floor.batch_ns for floor in floors),
                "token_j": facts.token_j(plan),
            }
        price = facts.cost_per_h(plan)
        one = found[key]
        shared = {name: one[name] / plan.replicas for name in ("held_ns", "step_ns")}
        options[index] = Option(
            **(one | shared | {"weight": one["weight"] * plan.replicas}),
            pool=pools[index],
            idle_w=idle_w(costs, plan),
            limit_w=limit_w(costs, plan),
            cost_per_h=float("nan") if price is None else price,
        )
    return [options[index] for index in range(len(pools))]
