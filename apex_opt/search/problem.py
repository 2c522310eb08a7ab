"""What is asked: everything an answer depends on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from apex_opt.errors import UsageError
from apex_opt.figures.goals import load_objective, step_limit_s
from apex_opt.figures.measure import percent
from apex_opt.figures.registry import STATISTICS
from apex_opt.oracle.instance import Instance
from apex_opt.plans.deployment import ROLES
from apex_opt.plans.memory import settings_of
from apex_opt.profiles import SHIPPED
from apex_opt.simulator.handover import prompts_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from apex_opt.cluster.tree import Tree
    from apex_opt.cluster.types import Cluster, Link
    from apex_opt.cost.engine import EngineOverhead
    from apex_opt.engines.handover import HandoverTimes
    from apex_opt.engines.overlap import Overlap
    from apex_opt.figures import Figure, Goal, Objective
    from apex_opt.figures.metrics import Metrics
    from apex_opt.ir.model import Model
    from apex_opt.plans.deployment import Role, Serving
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.plan import Plan
    from apex_opt.plans.routing import Routing
    from apex_opt.plans.shares import Shares
    from apex_opt.plans.speculation import Drafter
    from apex_opt.simulator.rescheduling import Rescheduling
    from apex_opt.workload.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The GPUs of one type that there are, and what may run on them.

    Parameters
    ----------
    cluster : Cluster
    tree : Tree or None              the GPUs that plans are placed on; None: all of the cluster, as it is
    weight_formats, kv_formats       formats to choose from, paired
    clocks : tuple of int or None    GPU clocks in MHz to choose from; None is the highest
    notes : tuple of str             what the reader has to know of them, a sentence each without the full stop
    """

    cluster: Cluster
    tree: Tree | None = None
    weight_formats: tuple[str, ...]
    kv_formats: tuple[str, ...]
    clocks: tuple[int | None, ...] = (None,)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The type of GPU."""
        return self.cluster.gpu.name

    @property
    def free(self) -> int:
        """GPUs that there are."""
        return self.cluster.size if self.tree is None else self.tree.size

    @property
    def foreign(self) -> Iterator[str]:
        """That no engine's kernels are known for these GPUs, where that is so."""
        if not self.cluster.gpu.cuda:
            yield (
                f"{self.name} does not run CUDA and no engine's kernels are known for it: those of CUDA stand in, at "
                "their efficiencies on its datasheet"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Everything an answer depends on.

    Parameters
    ----------
    model, trace, settings, overhead
    offers : tuple of Offer          the types of GPU there are, at least one
    between : Link or None           from a node of one type to one of another, at worst; without it no pipeline spans
                                     types
    max_devices : int                GPUs that a deployment may take in all
    objective : Objective
    then : tuple of Objective        what decides between plans that are equal by those before, in this order
    slos : tuple of Goal              all must hold
    near : tuple of Goal              what else a plan must reach to be as good as one found before
    request_slos : tuple of Goal or None    goals whose limits a request must keep to for goodput; None: those of `slos`
                                           that mean something for one request
    routing : Routing                how requests are dealt to the replicas of plans that do not say
    routings : tuple of Routing      routers to choose from; none where there is no choice
    sides : two tuples of Routing    routers before the instances that compute prompts and before those that answer, to
                                     choose from, the first for plans that do not say
    serving : tuple of str           what may be deployed: "aggregated", pools that do both phases of a request,
                                     "pools", one that computes prompts and one that answers them, and "shared", pools
                                     that do both phases side by side on the same GPUs
    rescheduling : Rescheduling or None    how requests are dealt and move between the replicas of a plan that is given,
                                     in place of a router
    handover : HandoverTimes or None    of prompts, where there may be such pools, and of requests that move
    handover_sources : tuple of (name, source)    where its times are from
    batch_limits : tuple of (max_num_seqs, max_num_batched_tokens)
                                     limits of a batch to choose from; None leaves one to the settings
    drafters : tuple of Drafter or None    ways to make drafts to choose from, of which `settings.drafting` knows what
                                     comes of them; None makes none
    shares : tuple of Shares or None    what prompts and answers may have of each GPU, to choose from; None: batches
                                     hold both
    overlaps : tuple of str or None  what one GPU does at a time where batches hold both, to choose from; None: one
                                     thing after the other
    expert_routing : str             how tokens fall on experts: "uniform" or "skewed"
    profiles : str                   measured tables, as `load_profile` takes them
    holds_longest : bool             a request of max_model_len must fit into the KV cache, not only those of the trace
    notes : tuple of str             what the reader of an answer has to know besides, a sentence each without the full
                                     stop: what was left out of account, or asked for and has no effect
    priced : bool                    costs are told wherever there is a price

    Raises
    ------
    UsageError    goodput without such a goal, a cost without the price of a GPU
    """

    model: Model
    trace: Trace
    settings: EngineSettings
    overhead: EngineOverhead
    offers: tuple[Offer, ...]
    between: Link | None = None
    max_devices: int
    objective: Objective
    then: tuple[Objective, ...] = ()
    slos: tuple[Goal, ...]
    near: tuple[Goal, ...] = ()
    request_slos: tuple[Goal, ...] | None = None
    routing: Routing = "round_robin"
    routings: tuple[Routing, ...] = ()
    sides: tuple[tuple[Routing, ...], tuple[Routing, ...]] = (("round_robin",), ("round_robin",))
    serving: tuple[Serving, ...] = ("aggregated",)
    rescheduling: Rescheduling | None = None
    handover: HandoverTimes | None = None
    handover_sources: tuple[tuple[str, str], ...] = ()
    batch_limits: tuple[tuple[int | None, int | None], ...] = ((None, None),)
    drafters: tuple[Drafter | None, ...] = (None,)
    shares: tuple[Shares | None, ...] = (None,)
    overlaps: tuple[Overlap | None, ...] = (None,)
    expert_routing: str = "uniform"
    profiles: str = SHIPPED
    holds_longest: bool = False
    notes: tuple[str, ...] = ()
    priced: bool = False

    def __post_init__(self) -> None:
        if (counting := self._asked(lambda figure: figure.of_goals)) and not self.per_request:
            raise UsageError(
                f"{counting[0].name} counts requests within their latency goals, and there are none: give percentiles "
                "or shares of ttft, tpot or e2e as --slo, such as ttft_p95<=500ms,tpot_p95<=50ms"
            )
        for part in self.objectives:
            if part.figure.of_several and not self.decodes:
                raise UsageError(
                    f"--objective: {part.name} has no value on {self.trace.name}, where every answer is one token; ask "
                    "for ttft or e2e, or give a trace with longer answers"
                )
        for offer in self.offers if self._asked(lambda figure: figure.priced) else ():
            if offer.cluster.gpu.price_per_h is None:
                raise UsageError(
                    f"no price is stated for {offer.name}, so there is no cost: give $ per GPU and hour as --price, or "
                    "gpu.price_per_h in the cluster's file"
                )

    @property
    def offer(self) -> Offer:
        """The GPUs of a problem with one type of them; of one with several those of the first."""
        return self.offers[0]

    @property
    def cluster(self) -> Cluster:
        """The cluster of the only type of GPU."""
        return self.offer.cluster

    @property
    def tree(self) -> Tree | None:
        """The free GPUs of the only type; None where all of the cluster are."""
        return self.offer.tree

    @property
    def mixed(self) -> bool:
        """Whether there are several types of GPU."""
        return len(self.offers) > 1

    @property
    def types(self) -> tuple[str, ...]:
        """Names of the types of GPU."""
        return tuple(offer.name for offer in self.offers)

    @property
    def several(self) -> bool:
        """Whether a deployment may have several pools, so that answers are told pool by pool."""
        return self.mixed or "pools" in self.serving

    def side(self, role: Role, place: int) -> Problem:
        """The problem of the pool on one type of GPU that computes prompts, or of the one that answers them.

        The prefill pool is asked for one token of each prompt, and goals are not its own.
        """
        own = replace(self.alone(place), serving=("aggregated",), shares=(None,), overlaps=(None,))
        own = replace(own, settings=replace(own.settings, role=role), drafters=(None,))
        own = replace(own, routing=self.sides[ROLES.index(role)][0], routings=self.routers(role))
        if role == "decode":
            return own
        asked: dict[str, Any] = {"objective": load_objective("e2e_mean"), "then": (), "slos": (), "near": ()}
        return replace(own, trace=prompts_only(own.trace), request_slos=None, **asked)

    def alone(self, place: int) -> Problem:
        """The same with one type of GPU only."""
        offer = self.offers[place]
        return replace(self, offers=(offer,), between=None, max_devices=min(self.max_devices, offer.free))

    def offering(self, **changes: Any) -> Problem:
        """The same with other figures of the only offer."""
        (offer,) = self.offers
        return replace(self, offers=(replace(offer, **changes),))

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """All of them, the most important first."""
        return self.objective, *self.then

    @property
    def remarks(self) -> tuple[str, ...]:
        """What every answer has to tell besides: of the trace, of the problem itself, then of the GPUs."""
        every = (
            *self.trace.notes,
            *self.notes,
            *(note for offer in self.offers for note in offer.notes),
            *self._empty,
            *(note for offer in self.offers for note in offer.foreign),
        )
        return tuple(dict.fromkeys(every))

    @property
    def decodes(self) -> bool:
        """Whether any answer has more than one token, so that there are times between tokens."""
        return bool((self.trace.generated(self.settings.max_model_len) > 1).any())

    @property
    def vacuous(self) -> tuple[Goal, ...]:
        """Goals on what no request of the trace has: they hold whatever the plan."""
        return tuple(slo for slo in self.slos if slo.figure.of_several and not self.decodes)

    @property
    def _empty(self) -> Iterator[str]:
        if self.vacuous:
            goals = ", ".join(slo.text for slo in self.vacuous)
            yield f"{goals}: holds whatever the plan, as every answer is one token and has no time between tokens"

    @property
    def asked(self) -> tuple[Objective | Goal, ...]:
        """Everything that plans are judged by."""
        return *self.objectives, *self.goals

    @property
    def goals(self) -> tuple[Goal, ...]:
        """All that a run is judged by."""
        return *self.slos, *self.near

    @property
    def per_request(self) -> tuple[Goal, ...]:
        """Goals whose limits a request must keep to for goodput."""
        if self.request_slos is not None:
            return self.request_slos
        return tuple(slo for slo in self.slos if slo.of_requests)

    @property
    def percentiles(self) -> tuple[str, ...]:
        """Percentiles that are asked for beyond those always told."""
        asked = {part.statistic for part in self.asked} - {*STATISTICS, "attain"}
        return tuple(sorted(asked, key=percent))

    @property
    def statistics(self) -> tuple[str, ...]:
        """Statistics over requests that are asked for at all."""
        return tuple(dict.fromkeys(part.statistic for part in self.asked if part.statistic != "attain"))

    @property
    def asks_gaps(self) -> bool:
        """Whether an objective or a goal is on the gaps between tokens, which take a log."""
        return bool(self._asked(lambda figure: figure.of == "gap"))

    @property
    def asks_gpus(self) -> bool:
        """Whether an objective or a goal depends on how many GPUs there are besides how fast these are."""
        return bool(self._asked(lambda figure: figure.of_gpus))

    def _asked(self, which: Callable[[Figure], bool]) -> list[Figure]:
        """Figures of some kind that an objective or a goal is on."""
        return [part.figure for part in self.asked if which(part.figure)]

    @property
    def tells_cost(self) -> bool:
        """Whether costs are shown: where asked for, and where there is a price that is not an assumed one."""
        gpus = [offer.cluster.gpu for offer in self.offers]
        given = all(not dict(gpu.sources).get("price_per_h", "").startswith("assumed") for gpu in gpus)
        priced = all(gpu.price_per_h is not None for gpu in gpus)
        return bool(self._asked(lambda figure: figure.priced)) or (priced and (given or self.priced))

    def costs(self, metrics: Metrics) -> tuple[float, ...]:
        """The figures of a run by each objective, signed such that less is better."""
        return tuple(objective.signed(objective.value(metrics)) for objective in self.objectives)

    def routers(self, role: Role | None) -> tuple[Routing, ...]:
        """Routers that plans of a pool name; none where there is no choice.

        Where one side of prefill and decode pools has a choice, plans of both name theirs: a text that names one router
        alone says that both have it.
        """
        if role is None:
            return self.routings
        return self.sides[ROLES.index(role)] if any(len(names) > 1 for names in self.sides) else ()

    def routing_of(self, plan: Plan) -> Routing:
        """How requests are dealt to the replicas of a plan."""
        return plan.route or self.routing

    def settings_for(self, plan: Plan) -> EngineSettings:
        """Engine settings of each scheduler of a plan, with its limits.

        On several stages sequences fill the pipeline, not batches formed ahead.

        Raises
        ------
        UsageError    limits that do not go with the other settings
        """
        settings = settings_of(self.model, self.settings, plan)
        return settings if plan.stages == 1 else replace(settings, async_scheduling=False)

    def instances(self) -> Iterator[tuple[Instance, tuple[Shares | None, ...]]]:
        """The constraints' view of plans that share and overlap alike, and the shares which that goes for."""
        kinds: dict[bool | None, list[Shares | None]] = {}
        for shares in self.shares:
            kinds.setdefault(None if shares is None else shares.multiplexed, []).append(shares)
        for alike in kinds.values():
            for overlap in self.overlaps if alike == [None] else (None,):
                yield replace(self.instance(), shares=alike[0], overlap=overlap), tuple(alike)

    def instance(self) -> Instance:
        """The constraints' view of a problem with one type of GPU."""
        held = int(self.settings.room(self.trace).max())
        limit_s = step_limit_s(self.slos)
        return Instance(
            model=self.model,
            cluster=self.cluster,
            settings=self.settings,
            longest_tokens=max(held, self.settings.max_model_len if self.holds_longest else 1),
            longest="a request of max_model_len" if self.holds_longest else "the longest request",
            tpot_limit_ns=round(limit_s * 1e9) if limit_s is not None and self.decodes else None,
            weight_formats=self.offer.weight_formats,
            kv_formats=self.offer.kv_formats,
            max_devices=min(self.max_devices, self.offer.free),
            batch_limits=self.batch_limits,
            drafters=self.drafters,
            routings=self.routings,
            shares=self.shares[0],
            overlap=self.overlaps[0] if self.shares[0] is None else None,
        )
