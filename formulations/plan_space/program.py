"""The plan space as a constraint program.

Sets and parameters
    N       GPUs offered; L layers; u = 1..U kinds of blocks that differ in what they take, n_u layers each
    M       bytes of one GPU the engine may use, less the runtime
    T       bytes a GPU can read within the tightest limit on time per output token (absent without such a limit)
    W_u(t, f), F_u(t, e, f)   bytes of one attention shard and one FFN shard of a block of kind u
    K_u(t, f)                 bytes of the longest request's KV cache in one attention shard

Variables
    s       stages                1..min(N, L)
    g       devices of a stage    1..N
    ad, at  attention copies and shards; fd, ft, fe FFN copies, column shards and expert groups
    f       format                index into the formats to choose from
    l       limits of a batch     index into those to choose from
    d       drafts                index into the ways to make them to choose from, none among these

Constraints
    C1  s * g <= N
    C2  ad * at = g,  fd * ft * fe = g,  gcd(ad, fd) = 1,  fe = 1 for a dense model
    C3  equal shards (divisibility)
    C4  the GPU computes in f (format);  the engine runs the cells, the format and the shards, and drafts are made on
        one stage, with one attention copy and equal shards; forwards are split on one stage, with several attention
        copies, without drafts and with experts of its own on each GPU (engine)
    C5  s * ceil(L / s) <= 3/2 * L (balance)
    C6  for each stage: sum_u layers_u(s) * (W_u(at, f) + norms + K_u(at, f) + F_u(ft, fe, f))
        + embedding and LM head where they are + workspace(ad, at, fd, ft, fe, l, d)
        + layers, matrices and KV of what makes drafts <= M (memory)
    C7  head(at) + sum_u n_u * (W_u(at, f) + touched F_u(ft, fe, f)) <= T (bandwidth)

Symmetry is left out by construction: stages are ordered, replicas and copies are counted rather than named, and
identical blocks count once, so a deep model is no larger than a shallow one. Copies that attention and FFN have in
common are whole copies of the model, which is what replicas are: hence gcd(ad, fd) = 1. Replicas bind nothing but
r * s * g <= N, so the program finds how one replica is cut, and each of its plans stands for N // (s * g).
All solutions are enumerated. C1 to C5 bind few variables at a time, so how many plans satisfy a prefix of them is a
sum of products and is counted rather than enumerated. Layers are split evenly in the program; the program of
`formulations.layers` moves them (`stages.py`): every cut into several stages makes a second plan, whose split is found
when the search gets to it.
The workload's other constraints are not linear in these choices and belong to the simulation.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ortools.sat.python import cp_model

from apex_opt.errors import FormulationError
from apex_opt.oracle.checks import FAMILIES, OF_CUTS, violations

from ..solver import new_solver
from . import counting
from .constraints import FAMILIES as BUILDERS
from .constraints import cells_share_devices
from .stages import Stages
from .variables import Variables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cluster.types import Gpu
    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Enumeration:
    """Plans of one replica that satisfy the chosen families; `complete` unless a limit was hit.

    `movable` are plans of several stages, given with even ones, whose layers can be split such that they fit: each
    stands for the plan with the layers that `PlanSpace.moved` finds.
    """

    plans: tuple[Plan, ...]
    movable: tuple[Plan, ...]
    complete: bool
    wall_s: float


class _Collector(cp_model.CpSolverSolutionCallback):
    """Keeps every solution as a plan."""

    def __init__(self, variables: Variables, instance: Instance) -> None:
        super().__init__()
        self.plans: list[Plan] = []
        self._variables = variables
        self._instance = instance

    def on_solution_callback(self) -> None:
        self.plans.append(self._variables.extract(self, self._instance))


class PlanSpace:
    """Enumerates plans; satisfies `apex_opt.search.Formulation`."""

    def __init__(self) -> None:
        self._kept: Stages | None = None

    def build(self, instance: Instance, families: Sequence[str] = FAMILIES) -> tuple[Any, Variables]:
        """The model with C1, C2 and the chosen families, and its variables."""
        model = cp_model.CpModel()
        variables = Variables.create(model, instance)
        cells_share_devices(model, instance, variables)
        for name in families:
            BUILDERS[name](model, instance, variables)
        fault = model.validate()
        if fault:
            raise FormulationError(f"plan space: {fault}")
        return model, variables

    def diagnosis(
        self, instance: Instance, families: Sequence[str] = FAMILIES
    ) -> tuple[Any, dict[str, Any], Variables]:
        """The model with C1, C2 and each chosen family enforced on a literal, the literals by name, the variables."""
        model = cp_model.CpModel()
        variables = Variables.create(model, instance)
        cells_share_devices(model, instance, variables)
        literals = {}
        for name in families:
            literals[name] = model.new_bool_var(f"{name} holds")
            for constraint in BUILDERS[name](model, instance, variables):
                constraint.only_enforce_if(literals[name])
        fault = model.validate()
        if fault:
            raise FormulationError(f"plan space: {fault}")
        return model, literals, variables

    def clash(self, instance: Instance, families: Sequence[str] = FAMILIES) -> tuple[str, ...]:
        """The fewest of the families that no plan satisfies together; empty where a plan satisfies them all.

        Sets are tried by size, those of one size in the order of the families, so of several the first is returned. A
        set to which a plan keeps that was found for another one is passed over.

        Raises
        ------
        FormulationError    the solver does not decide
        """
        model, literals, variables = self.diagnosis(instance, families)
        if _keeping(model, list(literals.values()), variables, instance) is not None:
            return ()
        kept: list[set[str]] = []
        # Layers are moved outside the program, to where they fit: such plans keep to all but perhaps bandwidth.
        for fitting in (FAMILIES, tuple(name for name in FAMILIES if name != "bandwidth")):
            if "memory" in families and self._movable(instance, fitting)[0]:
                kept.append(set(fitting))
                break
        if any(held.issuperset(families) for held in kept):
            return ()
        smaller = (itertools.combinations(families, size) for size in range(1, len(families)))
        for names in itertools.chain.from_iterable(smaller):
            if any(held.issuperset(names) for held in kept):
                continue
            plan = _keeping(model, [literals[name] for name in names], variables, instance)
            if plan is None:
                return names
            kept.append(set(families) - {violation.family for violation in violations(instance, plan)})
        return tuple(families)

    def count(self, instance: Instance, families: Sequence[str]) -> int:
        """Number of plans that satisfy some of `counting.COUNTED`, those to be moved included."""
        return counting.count(instance, families)

    def enumerate(
        self, instance: Instance, families: Sequence[str] = FAMILIES, time_limit_s: float | None = None
    ) -> Enumeration:
        """All plans of one replica that satisfy the chosen families, in a fixed order.

        Of the movable ones only "bandwidth" is chosen.

        Parameters
        ----------
        instance
        families : sequence of str      those that plans must keep to
        time_limit_s : float or None    seconds after which those found so far are given, as not complete

        Raises
        ------
        FormulationError    the program and the oracle disagree on a plan
        """
        started = time.perf_counter()
        even, complete = self._solve(instance, families, time_limit_s)
        for plan in even:
            broken = [v for v in violations(instance, plan) if v.family in (*families, "devices")]
            if broken:
                raise FormulationError(f"plan space: {plan} breaks {broken[0].family}: {broken[0].text}")
        spent = time.perf_counter() - started
        left = None if time_limit_s is None else max(time_limit_s - spent, 0.01)
        movable, all_movable = self._movable(instance, families, left)
        return Enumeration(
            plans=tuple(sorted(even, key=_order)),
            movable=tuple(sorted(movable, key=_order)),
            complete=complete and all_movable,
            wall_s=time.perf_counter() - started,
        )

    def _movable(
        self, instance: Instance, families: Sequence[str], time_limit_s: float | None = None
    ) -> tuple[list[Plan], bool]:
        """How one replica can be cut into several stages that some split fits, and whether these are all ways."""
        if instance.max_devices == 1 or instance.model.layers == 1:
            return [], True
        chosen = [name for name in FAMILIES if name in OF_CUTS or (name == "bandwidth" and name in families)]
        cuts, complete = self._solve(instance, chosen, time_limit_s, several=True)
        return [plan for plan in cuts if self._stages(instance).fit(plan)], complete

    def paced(
        self, instance: Instance, plan: Plan, gpus: Sequence[Gpu], pace: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """Layers of stages on several types of GPU; None where nothing fits (`Stages.paced`)."""
        return self._stages(instance).paced(plan, gpus, pace)

    def moved(self, instance: Instance, plan: Plan) -> Plan | None:
        """A movable plan with its layers moved; None where the best split is the even one.

        Raises
        ------
        FormulationError    the program and the oracle disagree, or no split fits
        """
        layers = self._stages(instance).moved(plan)
        if layers is None:
            raise FormulationError(f"plan space: the layers of {plan} fit no stages")
        found = replace(plan, layers=layers)
        if broken := violations(instance, found):
            raise FormulationError(f"plan space: {found} breaks {broken[0].family}: {broken[0].text}")
        return None if found.even else found

    def _stages(self, instance: Instance) -> Stages:
        """The splits of an instance; those of the last one asked about are kept."""
        if self._kept is None or self._kept.instance != instance:
            self._kept = Stages(instance)
        return self._kept

    def _solve(
        self, instance: Instance, families: Sequence[str], time_limit_s: float | None, several: bool = False
    ) -> tuple[list[Plan], bool]:
        """How one replica can be cut, with even stages or only with `several`, and whether these are all ways."""
        model, variables = self.build(instance, families)
        if several:
            model.add(variables.stages > 1)
        solver = new_solver(time_limit_s)
        solver.parameters.enumerate_all_solutions = True
        collector = _Collector(variables, instance)
        status = solver.solve(model, collector)
        if status == cp_model.MODEL_INVALID:
            raise FormulationError("plan space: the solver calls the model invalid")
        return collector.plans, status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)


def _keeping(model: cp_model.CpModel, literals: Sequence[Any], variables: Variables, instance: Instance) -> Plan | None:
    """A plan with which these literals are true; None where there is none."""
    model.clear_assumptions()
    model.add_assumptions(literals)
    solver = new_solver()
    # One plan of a few choices is asked for: looking for structure first takes ten times as long as finding it.
    solver.parameters.cp_model_probing_level = 0
    solver.parameters.linearization_level = 0
    status = solver.solve(model)
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return variables.extract(solver, instance)
    if status != cp_model.INFEASIBLE:
        raise FormulationError(f"plan space: the diagnosis ends as {solver.status_name(status)}")
    return None


def _order(plan: Plan) -> tuple[Any, ...]:
    cells = plan.attention, plan.ffn, plan.weight_format, plan.kv_format
    limits = plan.max_num_seqs or 0, plan.max_num_batched_tokens or 0
    return (plan.devices, plan.stages, *cells, *limits, str(plan.speculation or ""))
