"""Runs and their figures."""

from __future__ import annotations

from dataclasses import field

from apex_opt.report.types.document import Number, Statistics
from apex_opt.schema import Described


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


class HandedFigures(Described):
    """What the first tokens of requests take whose prompts are handed from one pool to another.

    Parameters
    ----------
    prompt_s : from arrival until the prompt is computed
    wait_s : until it begins to be read: proxy, room and a turn of the decode instance
    read_s : of the prompt; where it is sent meanwhile, what is left when it is computed
    answer_s : until the first token is there
    outside_s : on the way between client and engine, in and out, which no part before counts
    """

    prompt_s: Statistics
    wait_s: Statistics
    read_s: Statistics
    answer_s: Statistics
    outside_s: Statistics


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
    handover : what first tokens take, where prompts are handed over
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
    handover: HandedFigures | None = None
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
