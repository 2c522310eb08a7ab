"""What was asked, as documents tell it."""

from __future__ import annotations

from typing import Literal

from apex_opt.report.types.document import Number
from apex_opt.schema import Described


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
    waiting : requests sent only once the one before them in their session is answered; `duration_s`, `rate_per_s` and
              `burstiness` are then as if answers came at once
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
    waiting: int | None = None


class EngineFacts(Described):
    """The engine and its settings.

    Parameters
    ----------
    policy : name of its scheduler
    routing : router before several replicas, or several to choose from with commas between them
    long_prefill_token_threshold : of vLLM alone
    idle_sleep_us : of vLLM alone: microseconds, after a turn that scheduled nothing while requests are unfinished
    capacity_policy, context_chunking_policy : of TensorRT-LLM alone
    batch_wait_timeout_ms, batch_wait_timeout_iters, batch_wait_max_tokens_ratio : of TensorRT-LLM alone
    """

    name: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    chunked_prefill: bool
    long_prefill_token_threshold: int | None = None
    idle_sleep_us: int | None = None
    capacity_policy: str | None = None
    context_chunking_policy: str | None = None
    batch_wait_timeout_ms: float | None = None
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
    overlap : what plans may overlap, where they may; null where they do one thing after the other
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
    overlap: tuple[str | None, ...] | None = None
    rescheduling: ReschedulingFacts | None = None
    handover: HandoverFacts | None = None
    arrivals: str | None = None
