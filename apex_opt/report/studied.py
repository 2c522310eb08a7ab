"""The documents of explain, pareto, simulate with several plans, capacity, several clusters and place as types."""

from __future__ import annotations

from typing import ClassVar, Literal

from apex_opt.report import types
from apex_opt.schema import Described


class ComparedTerm(Described):
    """A part of time, energy or memory of the plan that was asked about and of the best."""

    part: str
    name: str
    unit: str
    plan: float
    best: float
    difference: float
    share: float


class ComparedPlan(Described):
    """The plan that was asked about, beside the best.

    Parameters
    ----------
    reason : why it cannot run, or the goals that it misses
    """

    plan: str
    gpus: int
    value: types.Number
    meets_slos: bool | None
    reason: str | None
    preemptions: int | None
    batches: int | None
    makespan_s: types.Number
    terms: tuple[ComparedTerm, ...]
    lies: tuple[types.Lies, ...]


class HeadRoomFacts(Described):
    """What the mean batch of one kind takes on the mean stage, and what it asks of each resource, in seconds.

    Parameters
    ----------
    kind : "answers" alone, or "prompts", with or without answers
    batches : how many there were, of all replicas
    batch_s : what it takes, one operation after the other
    compute_s, memory_s, network_s : asked of arithmetic, of memory and of links
    host_s : the engine's own time, which stays
    least_s : what it would take if the busiest resource alone counted
    gain : share of its time that this saves
    source : derived: that of the figures
    """

    kind: str
    batches: int
    batch_s: float
    compute_s: float
    memory_s: float
    network_s: float
    host_s: float
    least_s: float
    gain: float
    source: str


class TwoBatchesFacts(Described):
    """The forwards of one kind, without overlap and with two batches in place of one.

    Parameters
    ----------
    kind : "answers" alone, or "prompts", with or without answers
    split : how many of the forwards ranks with even shares split
    whole_s, two_s : mean time of the forwards, without overlap and with it
    gain : share of their time that this saves; below zero where it takes longer
    source : derived: that of the figures
    """

    kind: str
    forwards: int
    split: int
    whole_s: float
    two_s: float
    gain: float
    source: str


class Explained(types.Searched, types.OnOneType, types.WhyNot):
    """Why there is no plan and what would give one, or why a plan loses to the best."""

    PAGE: ClassVar[str] = "apex_opt.report.explain:explanation_page"
    ROWS: ClassVar[str] = "relaxations"
    OTHERWISE: ClassVar[tuple[str, ...]] = ("comparison.terms", "candidates")

    schema: Literal["apex_opt.explanation/2"] = "apex_opt.explanation/2"
    comparison: ComparedPlan | None
    head_room: tuple[HeadRoomFacts, ...] = ()
    two_batches: tuple[TwoBatchesFacts, ...] | None = None


class MixedExplained(types.Searched, types.OnSeveralTypes, types.WhyNot):
    """The same on several types of GPU, of each by itself."""

    PAGE: ClassVar[str] = "apex_opt.report.explain:explanation_page"
    ROWS: ClassVar[str] = "relaxations"
    OTHERWISE: ClassVar[tuple[str, ...]] = ("comparison.terms", "candidates")

    schema: Literal["apex_opt.mixed_explanation/2"] = "apex_opt.mixed_explanation/2"
    comparison: ComparedPlan | None


class OfFront(Described):
    """What is told of a deployment of the front besides: its value by each objective, and what starts it."""

    values: types.Statistics
    launch: types.Launch | None = None


class FrontPlan(types.Candidate, OfFront):
    """A plan of the front."""


class FrontMixed(types.MixedRun, OfFront):
    """A deployment of the front, on several types of GPU."""


class BeatenPlan(Described):
    """A plan that another beats."""

    plan: str
    gpus: int
    values: types.Statistics


class Front(types.Document):
    """Every deployment that no other beats in all objectives, best by the first one first."""

    PAGE: ClassVar[str] = "apex_opt.report.pareto:pareto_page"

    command: str
    status: types.Status
    objectives: tuple[dict[str, str | bool | float], ...]
    reason: str | None
    beaten: tuple[BeatenPlan, ...]
    question: types.QuestionFacts
    steady: bool | None
    transient: types.Load | None
    limited_by_arrivals: bool | None
    notes: tuple[str, ...]
    robust: types.RobustFront | None = None


class FrontAnswer(Front):
    """Every plan that no other beats in all objectives, best by the first one first."""

    schema: Literal["apex_opt.front/2"] = "apex_opt.front/2"
    candidates: tuple[FrontPlan, ...]
    certificate: types.LedgerPart
    provenance: types.Sources


class MixedFront(Front):
    """Every deployment over several types of GPU that no other beats."""

    schema: Literal["apex_opt.mixed_front/2"] = "apex_opt.mixed_front/2"
    candidates: tuple[FrontMixed, ...]
    optimal: bool
    gap: types.Number
    certificates: tuple[types.LedgerPart, ...]
    pipelines: tuple[types.LedgerPart, ...]
    pools: tuple[types.LedgerPart, ...] | None = None
    provenance: dict[str, types.Sources]


class ScoredPlan(types.Answer):
    """One of several plans with its whole answer."""

    plan: str


class ScoredMixed(types.MixedAnswer):
    """One of several deployments on several types of GPU with its whole answer."""

    plan: str


class Term(Described):
    """A part of time, energy or memory, of every plan that can run."""

    part: str
    name: str
    unit: str
    values: tuple[float, ...]
    share: float


class Differences(Described):
    """What differs between plans, which by their numbers from 1."""

    plans: tuple[int, ...]
    terms: tuple[Term, ...]


class PlansAnswer(types.Document):
    """Several given plans side by side.

    Parameters
    ----------
    best : number of the best of them, from 1
    """

    PAGE: ClassVar[str] = "apex_opt.report.side_by_side:compared_page"
    ROWS: ClassVar[str] = "plans"

    schema: Literal["apex_opt.plans/2"] = "apex_opt.plans/2"
    command: str
    status: types.Status
    best: int | None
    plans: tuple[ScoredPlan | ScoredMixed, ...]
    differences: Differences
    question: types.QuestionFacts
    provenance: types.Sources | dict[str, types.Sources]
    transient: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]


class Asked(Described):
    """What capacity was asked for."""

    for_: Literal["highest rate", "fewest GPUs"]
    rate_per_s: types.Number
    resolution: types.Number


class Evidence(Described):
    """What shows that a rate is sustained.

    Parameters
    ----------
    served_per_s : requests answered
    saturated_per_s : requests answered where they all wait
    """

    requests: int
    warm_up_requests: int
    backlog_first_half: types.Number
    backlog_second_half: types.Number
    backlog_growing: bool
    served_per_s: float
    goals_first_half: types.Statistics
    goals_whole: types.Statistics
    saturated_per_s: types.Number
    margin_below_saturated: types.Number
    further_runs: int
    requests_of_each: int
    goals_predicted_at_worst: types.Statistics


class Rated(Described):
    """The highest rate that a deployment sustains, and why not the next one."""

    rate_per_s: float
    rate_per_gpu_per_s: float
    times_own_rate: types.Number
    steady: bool
    next_rate_per_s: types.Number
    why_not_next: str | None
    missed_at_next_rate: types.Statistics
    arrivals_s: float
    after_last_arrival_s: float
    evidence: Evidence


class RatedPlan(types.Candidate, Rated):
    """A plan and the highest rate it sustains."""


class RatedMixed(types.MixedRun, Rated):
    """A deployment on several types of GPU and the highest rate it sustains."""


class RateCounts(Described):
    """How the deployments of a part were accounted for where rates are looked for.

    Parameters
    ----------
    larger : on more GPUs than are needed
    """

    space: int
    infeasible: dict[str, int]
    bounded: int
    ruled_out: int
    found: int
    larger: int
    complete: bool
    repeated: int


class RatePart(RateCounts):
    """The same of one part of several."""

    shape: str
    types: tuple[str, ...]
    left: int


class RateLedger(RateCounts):
    """How every plan was accounted for where rates are looked for."""

    simulations: int


class MixedRateLedger(Described):
    """The same on several types of GPU, part by part."""

    parts: tuple[RatePart, ...]
    simulations: int
    complete: bool
    gap: types.Number


class CapacityAnswer(types.Document):
    """The highest rate within the goals, or the fewest GPUs for a rate."""

    PAGE: ClassVar[str] = "apex_opt.report.capacity:capacity_page"

    schema: Literal["apex_opt.capacity/2"] = "apex_opt.capacity/2"
    command: str
    status: types.Status
    asked: Asked
    steady: bool
    reason: str | None
    best: RatedPlan | RatedMixed | None
    candidates: tuple[RatedPlan | RatedMixed, ...]
    certificate: RateLedger | MixedRateLedger
    assumption: str | None
    question: types.QuestionFacts
    provenance: types.Sources | dict[str, types.Sources]
    notes: tuple[str, ...]
    launch: types.Launch | None = None
    robust: types.Robust | None = None


class ClusterAnswer(Described):
    """The answer on one of several clusters."""

    cluster: str
    answer: types.Answer | types.MixedAnswer | CapacityAnswer


class ClustersAnswer(types.Document):
    """The same problem on several clusters, side by side; clusters by their numbers from 1."""

    PAGE: ClassVar[str] = "apex_opt.report.clusters:clusters_page"
    ROWS: ClassVar[str] = "clusters"

    schema: Literal["apex_opt.clusters/2"] = "apex_opt.clusters/2"
    command: str
    status: types.Status
    cheapest: int | None
    fastest: int | None
    fastest_by: str
    best: int | None
    clusters: tuple[ClusterAnswer, ...]
    question: types.QuestionFacts
    transient: dict[str, tuple[str, ...]]
    provenance: types.Sources
    notes: tuple[str, ...]


class StudyRow(Described):
    """A deployment at a point of a study, or that there is none.

    Parameters
    ----------
    point : its number in the grid, from 0
    row : place among the deployments of the point, of which a front has several
    same_as : the point that is the same question once its options are resolved, and was answered for both
    options : along the axes
    status : of the answer, or failed, or open where it is yet to be answered
    exit_code : that the command would have ended with
    error : why there is no plan
    seconds : that the answer took
    figures : of the deployment, by their names in its own document
    """

    point: int
    row: int
    same_as: int | None
    options: dict[str, str]
    status: str
    exit_code: int | None
    error: str | None
    seconds: float | None
    plan: str | None
    gpus: int | None
    figures: dict[str, types.Number]


class StudyAnswer(types.Document):
    """The points of a study.

    Parameters
    ----------
    command : study
    asked : the command that is asked at every point
    fixed : options of every point
    size : points of the grid
    answered : questions that this run answered
    found, infeasible, failed : points with a plan, without a feasible one, and without an answer
    """

    PAGE: ClassVar[str] = "apex_opt.report.study:study_page"
    ROWS: ClassVar[str] = "points"

    schema: Literal["apex_opt.study/1"] = "apex_opt.study/1"
    command: str = "study"
    status: Literal["complete", "open"]
    asked: str
    fixed: dict[str, str]
    folder: str
    size: int
    answered: int
    found: int
    infeasible: int
    failed: int
    points: tuple[StudyRow, ...]


class Site(types.Document):
    """A plan to be placed, and why it cannot be where it cannot."""

    PAGE: ClassVar[str] = "apex_opt.report.placement_tables:place_page"
    ROWS: ClassVar[str] = "devices"

    command: str
    plan: str
    model: str
    cluster: str
    gpu: str
    gpus: dict[str, int]
    notes: tuple[str, ...]
    status: types.Status
    reason: str | None


class Unplaced(Site):
    """A plan that cannot be placed, and why."""

    schema: Literal["apex_opt.unplaced/2"] = "apex_opt.unplaced/2"


class Domain(Described):
    """A switch, socket, node or leaf with room."""

    name: str
    gpus: tuple[str, ...]
    replicas: int


class Within(Described):
    """Domains with room for a replica, and how many have none."""

    kind: str
    domains: tuple[Domain, ...]
    others: int


class Move(Described):
    """A rank that goes elsewhere."""

    replica: int
    before: int
    stage: int
    rank: int
    from_: str
    to: str
    weights_bytes: int


class Lost(Described):
    """GPUs that go, and where the plan goes then."""

    gpus: tuple[str, ...]
    used: tuple[str, ...]
    plan: str
    replicas_kept: tuple[int, ...]
    replicas_lost: tuple[int, ...]
    before: types.Placement
    placement: types.MovedPlacement
    moved: int
    moved_bytes: int
    fewest: bool
    moves: tuple[Move, ...]


class Left(Described):
    """What stays free: nodes by their free GPUs, and what fits."""

    gpus: int
    groups: dict[str, int]
    fits: tuple[dict[str, str | int], ...]


class PlaceAnswer(Site):
    """Where a plan goes and what its collectives take there, beside ranks in order."""

    schema: Literal["apex_opt.placement/2"] = "apex_opt.placement/2"
    batch: dict[str, int]
    placement: types.BestPlacement
    given: types.OtherPlacement | None
    rank_order: types.OtherPlacement
    proof: dict[str, int | bool]
    within: Within | None
    loss: Lost | None
    left: Left
    devices: tuple[dict[str, int | dict[str, str] | None], ...]
    provenance: types.Sources
