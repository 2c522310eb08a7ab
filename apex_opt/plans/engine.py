"""Engine settings: what a serving engine is told about batching."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from apex_opt.engines.policies import POLICIES
from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.ir.checks import shown
from apex_opt.units import NS_PER_US

if TYPE_CHECKING:
    from apex_opt.engines.policies import Policy
    from apex_opt.engines.rules import EngineRules
    from apex_opt.plans.plan import Plan
    from apex_opt.plans.speculation import Speculation

_LARGEST = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Batching limits of one engine, named as vLLM names them.

    Parameters
    ----------
    max_num_seqs : int                     sequences running at once, >= 1
    max_num_batched_tokens : int           tokens in one batch, >= max_num_seqs
    max_model_len : int                    prompt + output of one request, >= 2
    chunked_prefill : bool                 a prompt may be split over batches
    long_prefill_token_threshold : int     most tokens of one prompt in one batch; 0 = no such limit
    block_size : int                       tokens in one KV block
    prefix_caching : bool                  blocks whose content is known are found again by their prefix
    async_scheduling : bool                the next batch is formed while the last one runs
    gpu_memory_utilization : float         share of a GPU's memory the engine may fill, above 0 and at most 1
    idle_sleep_us : int                    the engine's loop sleeps so long after a turn that scheduled nothing while
                                           requests are unfinished; vLLM 1,000

    policy : str                           how batches are formed:
        "vllm"     iteration by iteration, prompts in chunks, preemption where blocks run out (vLLM V1)
        "orca"     iteration by iteration, whole prompts, blocks of prompt and output reserved at admission: nobody is
                   preempted (Yu et al., "Orca", OSDI 2022, algorithm 1; what APEX assumes)
        "static"   whole requests: a batch is formed when none runs and answered when its longest request is done;
                   requests that are done before keep computing (the baseline of the same paper, section 2)
    runnable : EngineRules or None         the engine that must be able to run plans, and how it holds a model;
                                           None: any
    speculation : Speculation or None      drafts that are made and verified; None: none

    The defaults are those of vLLM 0.20 on a large GPU.

    Raises
    ------
    UsageError    a value out of its range, or limits that contradict each other
    """

    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    max_model_len: int = 131072
    chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    block_size: int = 16
    prefix_caching: bool = False
    async_scheduling: bool = True
    gpu_memory_utilization: float = 0.9
    idle_sleep_us: int = 0
    policy: str = "vllm"
    runnable: EngineRules | None = None
    speculation: Speculation | None = None

    @property
    def batching(self) -> Policy:
        """What there is to know of the policy."""
        return POLICIES[self.policy]

    @property
    def whole_prompts(self) -> bool:
        """Whether a prompt is computed in one batch or not at all."""
        return not self.batching.splits_prompts or not self.chunked_prefill

    @property
    def idle_sleep_ns(self) -> int:
        """`idle_sleep_us` in nanoseconds."""
        return self.idle_sleep_us * NS_PER_US

    def depth(self, stages: int) -> int:
        """Batches in flight at once, over so many pipeline stages.

        As many as stages; on one stage 2 where the next batch is scheduled while the last one runs, else 1.
        """
        if not self.batching.forms_ahead:
            return 1
        return stages if stages > 1 else 1 + self.async_scheduling

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 2),
            ("long_prefill_token_threshold", 0),
            ("block_size", 1),
            ("idle_sleep_us", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LARGEST:
                raise UsageError(f"{name}: {shown(value)} is not a whole number from {least} to {_LARGEST - 1}")
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise UsageError(f"gpu_memory_utilization: {shown(share)} is not a number above 0 and at most 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "every running sequence may want a token in one batch; raise the one or lower the other"
            )
        if self.policy not in tuple(POLICIES):
            raise UnknownNameError("batching policy", str(self.policy)[:60], POLICIES)
        if self.prefix_caching and not self.batching.finds_prefixes:
            with_it = ", ".join(policy.name for policy in POLICIES.values() if policy.finds_prefixes)
            raise UsageError(
                f"prefix_caching goes with the policy {with_it}, not with {self.policy}; leave one of them out"
            )
        if self.speculation is not None and self.policy != "vllm":
            raise UsageError(f"speculation goes with the policy vllm, not with {self.policy}; leave one of them out")
        if self.whole_prompts and self.max_num_batched_tokens < self.max_model_len:
            raise UsageError(
                f"where prompts are not split max_num_batched_tokens {self.max_num_batched_tokens} must reach "
                f"max_model_len {self.max_model_len}: a longer prompt would never be scheduled"
            )


def limited(settings: EngineSettings, plan: Plan) -> EngineSettings:
    """Settings with the limits of a batch that a plan sets.

    Raises
    ------
    UsageError    limits that do not go with the other settings
    """
    if plan.max_num_seqs is None and plan.max_num_batched_tokens is None:
        return settings
    return replace(
        settings,
        max_num_seqs=plan.max_num_seqs or settings.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens or settings.max_num_batched_tokens,
    )
