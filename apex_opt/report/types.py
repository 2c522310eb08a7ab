"""The documents of every command as types: what `--format=json` prints, field by field; see `docs/schema`.

Times are in seconds, sizes in bytes, energy in joules, costs in $, shares from 0 to 1, unless a name says otherwise.
Each type of document names its schema with a version, the page that shows it, and the field that holds its rows.
"""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, Literal

from apex_opt import __version__
from apex_opt.schema import Described

Number = float | None
"""None where a figure is undefined, as a time between tokens of one token."""
Statistics = dict[str, Number]
"""A latency by statistic: mean, p50, p90, p95, p99, max, and whatever else was asked for."""
Sources = dict[str, str]
"""Where every figure comes from."""
Status = Literal["optimal", "feasible", "infeasible", "unknown"]


class Document(Described):
    """What a command answers.

    Parameters
    ----------
    status : whether there is what was asked for, and whether it is proved to be the best
    version : release of apex_opt
    notes : what the reader has to know besides, a sentence each without the full stop
    """

    PAGE: ClassVar[str]
    ROWS: ClassVar[str] = "candidates"
    LIMITED: ClassVar[bool] = False

    version: str = __version__
    status: str


# ---- what was asked ----------------------------------------------------------------------------------------------


class Objective(Described):
    """A figure to make best, and what the best run reaches.

    Parameters
    ----------
    tolerance : share within which plans count as equal
    """

    name: str
    unit: str
    direction: Literal["minimise", "maximise"]
    tolerance: float
    value: Number


class ModelFacts(Described):
    """A model that was asked about."""

    name: str
    parameters: int
    active_parameters: int
    layers: int
    source: str


class ClusterFacts(Described):
    """GPUs of one type that were offered.

    Parameters
    ----------
    gpus : all of the cluster
    offered : most that a plan may take
    """

    name: str
    gpus: int
    offered: int
    gpu: str
    usd_per_gpu_h: float | None = None


class PoolFacts(Described):
    """GPUs of one of several types that were offered, and what may be chosen on them."""

    gpus: int
    offered: int
    gpu: str
    usd_per_gpu_h: float | None = None
    weights: tuple[str, ...]
    kv: tuple[str, ...]
    clocks_mhz: tuple[int | None, ...]


class MixedFacts(Described):
    """GPUs of several types."""

    name: str
    gpus: int
    pools: tuple[PoolFacts, ...]


class TraceFacts(Described):
    """Requests and their lengths in tokens.

    Parameters
    ----------
    concurrency : clients of a closed loop; null where arrivals are given
    burstiness : variance of the gaps between arrivals over the square of their mean
    """

    name: str
    source: str
    requests: int
    concurrency: int | None
    prompt_tokens: int
    output_tokens: int
    prompt_mean: float
    prompt_p50: int
    prompt_p95: int
    prompt_max: int
    output_mean: float
    output_p50: int
    output_p95: int
    output_max: int
    longest: int
    duration_s: float
    rate_per_s: Number
    burstiness: Number


class EngineFacts(Described):
    """The engine and its settings.

    Parameters
    ----------
    policy : name of its scheduler
    routing : router before several replicas, or several to choose from with commas between them
    long_prefill_token_threshold : of vLLM alone
    idle_sleep_us : of vLLM alone: microseconds, after a turn that scheduled nothing while requests are unfinished
    capacity_policy, batch_wait_timeout_iters, batch_wait_max_tokens_ratio : of TensorRT-LLM alone
    """

    name: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    chunked_prefill: bool
    long_prefill_token_threshold: int | None = None
    idle_sleep_us: int | None = None
    capacity_policy: str | None = None
    batch_wait_timeout_iters: int | None = None
    batch_wait_max_tokens_ratio: float | None = None
    block_size: int
    prefix_caching: bool
    async_scheduling: bool
    gpu_memory_utilization: float
    policy: str
    runnable: str
    routing: str
    expert_routing: str


class DraftFacts(Described):
    """A way to make drafts to choose from.

    Parameters
    ----------
    drafts : method and number, as plans name them; none where none are made
    tokens : that a row brings a request in the mean, where none of its drafts is cut off
    """

    drafts: str
    tokens: float


class HandoverFacts(Described):
    """What it takes to hand a prompt from one pool to another, as `--handover` has it."""

    proxy_us: float
    notice_us: float
    post_us: float
    descriptor_us: float
    rate_share: float


class ReschedulingFacts(Described):
    """How requests move between replicas, as `--rescheduling` has it."""

    rules: str
    period_ms: float
    out_below: float
    in_from: float
    headroom: int
    draining: tuple[int, ...]


class QuestionFacts(Described):
    """What was asked, in the names and numbers that were understood.

    Parameters
    ----------
    cluster : left out where the same is asked of several
    vacuous_slo : goals that hold whatever the plan
    weights : formats to choose from, as `kv` in pairs; with several types of GPU those of each stand with it
    clocks_mhz : clocks to choose from; null is the highest
    speculation : ways to make drafts to choose from; left out where none are made
    serving : what may be deployed, where that is not aggregated replicas alone
    shares : of a GPU that prompts and answers may have, where they may share it; null where batches hold both
    rescheduling : how requests move between replicas, where they do
    handover : of prompts between pools, and of requests that move
    arrivals : how requests come where rates are looked for
    """

    model: ModelFacts
    cluster: ClusterFacts | MixedFacts | None = None
    trace: TraceFacts
    slo: tuple[str, ...]
    vacuous_slo: tuple[str, ...]
    weights: tuple[str, ...] | None = None
    kv: tuple[str, ...] | None = None
    clocks_mhz: tuple[int | None, ...] | None = None
    batch_limits: tuple[dict[str, int | None], ...]
    speculation: tuple[DraftFacts, ...] | None = None
    engine: EngineFacts
    serving: tuple[str, ...] | None = None
    shares: tuple[str | None, ...] | None = None
    rescheduling: ReschedulingFacts | None = None
    handover: HandoverFacts | None = None
    arrivals: str | None = None


# ---- runs --------------------------------------------------------------------------------------------------------


class Goal(Described):
    """A goal and how a run stands to it.

    Parameters
    ----------
    reached : the figure that the limit is compared with
    attainment : share of requests, or of the gaps between tokens, within the limit
    """

    met: bool
    reached: Number
    attainment: Number
    unit: str


class Transient(Described):
    """How a run begins and ends; the backlog is that of the requests after the first fifth, by halves.

    Parameters
    ----------
    measured : whether its figures are those of a transient, not of a load that lasts
    drain_s : from the last arrival to the last token
    """

    measured: bool
    arrivals_s: float
    drain_s: float
    waiting_at_last_arrival: int
    unfinished_at_last_arrival: int
    backlog_first_half: Number
    backlog_second_half: Number
    backlog_growing: bool


class Load(Transient):
    """The same of the best run, with what it means in words."""

    said: tuple[str, ...]


class PriorityFigures(Described):
    """What the requests of one priority saw."""

    name: str
    requests: int
    ttft_s: Statistics
    tpot_s: Statistics
    e2e_s: Statistics
    preemptions: int | None


class Metrics(Described):
    """What the requests of a run saw, and what it took.

    Parameters
    ----------
    ttft_s : time to the first token
    tpot_s : time per output token after the first
    itl_s : time between two tokens, where it is asked about
    e2e_s : time to the last token
    goodput_rps : requests within all their latency goals
    slo : goals by their text
    idle_energy_j : what GPUs draw whatever they do
    mfu, mbu : share of the peak arithmetic and of the peak memory bandwidth that is used
    operations_s : mean per GPU, by operation, longest first, idle last
    moved : moves of requests between replicas, where they may move
    priorities : what requests of each priority saw, where there are several
    further : figures that were added to the registry since, by their keys
    """

    ttft_s: Statistics
    tpot_s: Statistics
    itl_s: Statistics | None = None
    e2e_s: Statistics
    makespan_s: float
    transient: Transient | None = None
    throughput_rps: float
    goodput_rps: float | None = None
    output_tokens_per_s: float
    total_tokens_per_s: float
    cached_tokens: int | None = None
    cache_hit_rate: float | None = None
    slo: dict[str, Goal]
    energy_j: float
    idle_energy_j: float
    energy_per_output_token_j: float
    cost_usd_per_h: float | None = None
    cost_usd_per_mtoken: float | None = None
    mean_power_w: float
    mfu: float | None = None
    mbu: float | None = None
    operations_s: dict[str, float] | None = None
    preemptions: int
    batches: int
    moved: int | None = None
    priorities: tuple[PriorityFigures, ...] | None = None
    further: dict[str, Number | Statistics] = field(default_factory=dict)


class Memory(Described):
    """Memory of a GPU of one stage."""

    layers: int
    weights_bytes: int
    workspace_bytes: int
    runtime_bytes: int
    usable_bytes: int
    kv_block_bytes: int
    kv_blocks: int


class Run(Described):
    """A simulated deployment.

    Parameters
    ----------
    plan : its text, as `simulate` takes it
    value : what it reaches by the first objective
    then : what it reaches by the further ones
    bound : what the search knew beforehand that `value` can at best be
    """

    plan: str
    gpus: int
    value: Number
    then: tuple[Number, ...]
    bound: Number
    metrics: Metrics

    @property
    def text(self) -> str:
        """The plan as `simulate` takes it."""
        return self.plan


class Candidate(Run):
    """A simulated plan on GPUs of one type."""

    memory: tuple[Memory, ...]


class Replica(Described):
    """GPUs of a replica, by stage and rank."""

    replica: int
    stages: tuple[tuple[str, ...], ...]


class Part(Described):
    """A pool of a deployment: a plan on one type of GPU, or over several.

    Parameters
    ----------
    role : prefill or decode, where prompts are handed over; left out of pools that do both
    share : of the requests
    """

    gpu: str
    role: str | None = None
    plan: str
    gpus: int
    requests: int
    share: float
    energy_j: float
    idle_energy_j: float
    mfu: float
    mbu: float
    operations_s: dict[str, float]
    preemptions: int
    batches: int
    memory: tuple[Memory, ...]
    replicas: tuple[Replica, ...] | None = None


class MixedRun(Run):
    """A simulated deployment over several types of GPU."""

    parts: tuple[Part, ...]


class AloneRun(MixedRun):
    """The best on one type of GPU by itself.

    Parameters
    ----------
    loss : how much worse than the best, as a share
    """

    loss: Number


# ---- proofs ------------------------------------------------------------------------------------------------------


class LedgerPart(Described):
    """How every plan of the space was accounted for.

    Parameters
    ----------
    infeasible : plans that break a constraint family, charged to the first in order
    bounded : ruled out by a bound
    cut_short : simulated until they could no longer win
    missed : simulated and not within the goals
    gap : share by which a plan that was not simulated could be better
    left : not looked at when the time was up
    repeated : others with their layers moved
    out_of_reach : of those bounded, those whose bound misses a goal
    least_bound, incumbent : the best bound among the others, and what it was held against
    before : those of objectives with a tolerance, in turn
    types : the types of GPU that it is of
    """

    types: tuple[str, ...] | None = None
    space: int
    infeasible: dict[str, int]
    bounded: int
    simulated: int
    cut_short: int
    missed: int
    optimal: bool
    gap: Number
    left: int
    repeated: int
    out_of_reach: int
    least_bound: Number
    incumbent: Number
    before: tuple[LedgerPart, ...]


class ReplayedPart(Described):
    """What the replay counts of a part."""

    shape: str
    types: tuple[str, ...]
    space: int
    infeasible: dict[str, int]
    repeated: int
    simulated: int


class Replay(Described):
    """The certificate replayed by other means.

    Parameters
    ----------
    meeting : plans within the goals
    disagreements : what the certificate claims and the replay does not bear out
    parts : part by part, where there are several types of GPU
    chosen : how the deployments were chosen that were simulated
    """

    space: int
    infeasible: dict[str, int]
    repeated: int
    simulated: int
    meeting: int
    disagreements: tuple[str, ...]
    holds: bool
    parts: tuple[ReplayedPart, ...] | None = None
    chosen: str | None = None


class Clash(Described):
    """Constraints that no plan satisfies together.

    Parameters
    ----------
    smallest : whether some plan satisfies any fewer of them
    """

    of: tuple[str, ...]
    proof: Literal["constraints", "bound", "simulation"]
    facts: tuple[str, ...]
    smallest: bool
    gpu: str | None = None
    serving: str | None = None


class Relaxation(Described):
    """A change that gives a plan.

    Parameters
    ----------
    best : whether the plan is shown to be the best with it
    """

    options: dict[str, str]
    text: str
    more_gpus: int
    plan: str
    gpus: int
    value: Number
    best: bool
    gpu: str | None = None
    serving: str | None = None


# ---- where plans go ----------------------------------------------------------------------------------------------


class Tier(Described):
    """Links that collectives cross at one level.

    Parameters
    ----------
    sent_bytes : by a GPU for a full batch
    """

    kind: str
    ranks: int
    link: str
    bytes_per_s: float
    latency_s: float
    sent_bytes: float


class Lies(Described):
    """What holds the ranks of a group, and why nothing smaller."""

    group: str
    ranks: int
    inside: str
    beyond: str | None
    reason: str | None


class Placement(Described):
    """GPUs of every rank, and what the collectives of a full batch take there."""

    replicas: tuple[Replica, ...]
    collectives_s: float
    step_s: float
    tiers: tuple[Tier, ...]


class OtherPlacement(Placement):
    """A placement beside the best, and the shares by which it is slower."""

    collectives_loss: Number
    step_loss: Number


class BestPlacement(Placement):
    """The best placement."""

    lies: tuple[Lies, ...]


class MovedPlacement(OtherPlacement):
    """The placement once GPUs are lost, beside that before."""

    lies: tuple[Lies, ...]


class ShownPlacement(BestPlacement):
    """Where the best plan goes."""

    batch: dict[str, int]
    rank_order: OtherPlacement
    proof: dict[str, int | bool]


class Started(Described):
    """A command that starts a server."""

    node: int
    replica: int | None
    env: dict[str, str]
    argv: tuple[str, ...]
    text: str


class Bench(Described):
    """The command of a client that sends the traffic of the question to the servers, and measures them.

    Parameters
    ----------
    argv : its words; none where no client sends this traffic
    dataset : file that it reads, which `--save` writes; null where it makes the requests itself
    result : file that it writes, for `calibrate` and `validate`
    notes : what it sends otherwise than was asked
    """

    argv: tuple[str, ...]
    text: str
    dataset: str | None
    result: str | None
    notes: tuple[str, ...]


class Launch(Described):
    """Commands that start a plan, and what they cannot say.

    Parameters
    ----------
    bench : what measures it once it runs
    """

    engine: str
    commands: tuple[Started, ...]
    notes: tuple[str, ...]
    bench: Bench | None = None


class ExpectedFigure(Described):
    """A figure of the best run, and what would be measured in eight cases of ten.

    Parameters
    ----------
    figure : TTFT, TPOT and E2E are means
    low, high : null where nothing comparable was measured
    rows : measured runs that this is known from
    of : what these are of
    nearest : whether they are of the same engine, GPU, kind of model and load
    """

    figure: str
    unit: str
    predicted: Number
    low: Number
    high: Number
    rows: int
    of: str
    nearest: bool


class Turn(Described):
    """How far times may be off in one way before another plan wins that is no tie with the best.

    Parameters
    ----------
    times : whose are off: of all plans alike, of the best plan alone, or of any of the others alone
    slower : whether they are longer than computed
    holds : factor farthest from 1 at which the best plan wins, as at all that were asked before
    factor : the nearest that was found at which it does not; null where it wins at all that were asked
    plan : that wins then; null where none meets the goals
    value : what that one reaches by the first objective, its times being as they then are
    missed : goals that the best plan misses then, in words; empty where it is beaten
    """

    times: Literal["all", "best", "others"]
    slower: bool
    holds: float
    factor: Number
    plan: str | None
    value: Number
    missed: str


class Near(Described):
    """A plan beside the best one.

    Parameters
    ----------
    value : what it reaches by the first objective, times being as computed
    margin : how much worse that is, as a share
    """

    plan: str
    gpus: int
    value: Number
    margin: Number


class Robust(Described):
    """How far times may be off before another plan wins, and which plans are as good within the expected error.

    Parameters
    ----------
    turns : whose times, and which way
    common : whether times that are off in common can matter; else they were not asked about
    runner_up : the best of the others; null where no other meets the goals
    deciding : the objective that plans are held against each other by to be called a tie
    error : of this, as far as plans do not share it: half of the width of the interval, as a share; null where nothing
        comparable was measured
    rows : measured runs that this is known from
    of : what these are of
    tied : plans nearer to the best than that, best first; null where the error is not known
    searches, simulations : made for all this, the latter of the best plan alone
    """

    turns: tuple[Turn, ...]
    common: bool
    runner_up: Near | None
    deciding: str
    error: Number
    rows: int
    of: str
    tied: tuple[Near, ...] | None
    searches: int
    simulations: int


# ---- answers -----------------------------------------------------------------------------------------------------


class Beside(Described):
    """The plan of the best latency, beside that of the least energy.

    Parameters
    ----------
    energy_saving : share of its energy
    """

    objective: str
    best: Candidate | MixedRun
    certificate: LedgerPart | None = None
    energy_saving: float


class Searched(Document):
    """An answer with its objectives and its load.

    Parameters
    ----------
    then : further objectives, in turn
    reason : why there is no plan
    steady : whether the load of the best run lasts
    limited_by_arrivals : whether a plan that keeps up has what comes, and no more
    expected : how far the figures of the best run are from what would be measured, by measured runs like it
    robust : how far times may be off before another plan wins, where that was asked
    """

    command: str
    status: Status
    objective: Objective
    then: tuple[Objective, ...]
    reason: str | None
    question: QuestionFacts
    steady: bool | None
    transient: Load | None
    limited_by_arrivals: bool | None
    notes: tuple[str, ...]
    expected: tuple[ExpectedFigure, ...] | None = None
    robust: Robust | None = None
    beside: Beside | None = None
    launch: Launch | None = None


class OnOneType(Described):
    """What is answered over plans on GPUs of one type."""

    best: Candidate | None
    candidates: tuple[Candidate, ...]
    certificate: LedgerPart
    provenance: Sources


class OnSeveralTypes(Described):
    """What is answered over deployments on several types of GPU.

    Parameters
    ----------
    alone : the best on each type by itself
    certificates : by the types that a deployment is on
    pipelines : of pipelines whose stages are on several types
    pools : of pairs of a prefill and a decode pool, by the types of either; left out where there are none
    provenance : by type
    """

    best: MixedRun | None
    alone: tuple[AloneRun | None, ...]
    candidates: tuple[MixedRun, ...]
    optimal: bool
    gap: Number
    certificates: tuple[LedgerPart, ...]
    pipelines: tuple[LedgerPart, ...]
    pools: tuple[LedgerPart, ...] | None = None
    provenance: dict[str, Sources]


class WhyNot(Described):
    """Why there is no answer where that was asked.

    Parameters
    ----------
    clashes : constraints that clash where nothing fits
    relaxations : changes that were solved and give a plan, the cheapest first
    """

    clashes: tuple[Clash, ...] | None = None
    relaxations: tuple[Relaxation, ...] | None = None
    tried_for_nothing: tuple[str, ...] | None = None
    not_tried: tuple[str, ...] | None = None
    explain_time_limit_s: float | None = None


class Answer(Searched, OnOneType, WhyNot):
    """The best plan and the runners-up, or why there is none."""

    PAGE: ClassVar[str] = "apex_opt.report.tables:rendered"

    schema: Literal["apex_opt.answer/2"] = "apex_opt.answer/2"
    placement: ShownPlacement | None = None
    check: Replay | None = None


class MixedAnswer(Searched, OnSeveralTypes):
    """The best deployment over several types of GPU, or why there is none."""

    PAGE: ClassVar[str] = "apex_opt.report.mixed:mixed_page"

    schema: Literal["apex_opt.mixed/2"] = "apex_opt.mixed/2"
    check: Replay | None = None
