"""Engine settings: what a serving engine is told about batching."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.engines.schedulers import (
    RESERVED,
    SCHEDULINGS,
    Lengths,
    Scheduling,
    SglangScheduling,
    TrtllmScheduling,
    VllmScheduling,
    whole,
)
from apex_opt.errors import UsageError, shown
from apex_opt.plans.kv_groups import KvGroup, Limits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.engines.rules import EngineRules
    from apex_opt.ir import Model
    from apex_opt.plans.deployment import Role
    from apex_opt.plans.plan import Plan
    from apex_opt.plans.speculation import Drafter, Speculation
    from apex_opt.workload.trace import Trace

_VLLM: Final = VllmScheduling()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Batching limits of one engine, those that every engine has named as vLLM names them.

    Parameters
    ----------
    max_num_seqs : int                     sequences running at once, >= 1
    max_num_batched_tokens : int           tokens in one batch, >= max_num_seqs
    max_model_len : int                    prompt + output of one request, >= 2
    chunked_prefill : bool                 a prompt may be split over batches
    block_size : int                       tokens in one KV block
    prefix_caching : bool                  blocks whose content is known are found again by their prefix
    async_scheduling : bool                the next batch is formed while the last one runs
    gpu_memory_utilization : float         share of a GPU's memory the engine may fill, above 0 and at most 1
    scheduler : Scheduling                 how batches are formed, with the settings that only this engine has
    runnable : EngineRules or None         the engine that must be able to run plans, and how it holds a model;
                                           None: any
    role : "prefill", "decode" or None     what its instances do of requests whose prompts are handed over from one
                                           pool to another; None: both
    speculation : Speculation or None      drafts that are made and verified; None: none
    drafting : tuple of Speculation        what comes of the drafts that plans can ask for
    kv_groups : tuple of KvGroup           of layers that share the blocks; none: all layers keep all tokens

    The defaults are those of vLLM; every engine's own are in `apex_opt.engines.kinds`.

    Raises
    ------
    UsageError    a value out of its range, or limits that contradict each other
    """

    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 8192
    max_model_len: int = 131072
    chunked_prefill: bool = True
    block_size: int = 16
    prefix_caching: bool = False
    async_scheduling: bool = True
    gpu_memory_utilization: float = 0.9
    scheduler: Scheduling = _VLLM
    runnable: EngineRules | None = None
    role: Role | None = None
    speculation: Speculation | None = None
    drafting: tuple[Speculation, ...] = ()
    kv_groups: tuple[KvGroup, ...] = ()

    @property
    def groups(self) -> tuple[KvGroup, ...]:
        """Groups of layers that share the blocks: the one of all where none are named."""
        return self.kv_groups or (KvGroup(kind="full", block_size=self.block_size),)

    @property
    def _limits(self) -> Limits:
        drafts = self.speculation.draft_tokens if self.speculation else 0
        return Limits(self.max_num_batched_tokens, self.max_model_len, drafts)

    def most_blocks(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Blocks that sequences which end with so many tokens may come to hold, without which some are never done."""
        return sum((group.most(tokens, self._limits) for group in self.groups), np.zeros_like(tokens))

    def least_blocks(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Blocks that sequences hold at least while they compute a token after so many."""
        return sum((group.least(tokens, self._limits) for group in self.groups), np.zeros_like(tokens))

    def held_blocks(self, tokens: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.int64]:
        """Blocks that sequences hold after a row that took them from so many tokens `before` to so many."""
        return sum((group.held(tokens, before, self._limits) for group in self.groups), np.zeros_like(tokens))

    def longest(self, blocks: int) -> int:
        """Tokens, up to `max_model_len`, of the longest sequence that so many blocks are enough for."""
        return bisect_right(
            range(1, self.max_model_len + 1), blocks, key=lambda tokens: int(self.most_blocks(np.array(tokens)))
        )

    @property
    def whole_prompts(self) -> bool:
        """Whether a prompt is computed in one batch or not at all."""
        return not self.scheduler.splits_prompts or not self.chunked_prefill

    def room(self, trace: Trace) -> NDArray[np.int64]:
        """Tokens that the cache of a replica must have room for, for each request of a trace to be served at all."""
        lengths = Lengths(trace.prompt, trace.generated(self.max_model_len), trace.stated(self.max_model_len))
        found = self.scheduler.room(lengths, self.block_size, caches=self.prefix_caching)
        if self.role == "decode" and isinstance(self.scheduler, SglangScheduling):
            found = np.maximum(found, lengths.prompt + lengths.stated + RESERVED)
        return found

    def with_drafts(self, tokens: NDArray[np.int64], drafter: Drafter | Speculation) -> NDArray[np.int64]:
        """Tokens that the cache must have room for with drafts, where it must have room for so many without.

        The last step of SGLang but one leaves two tokens to come, and a page and a token of what is counted are free.

        Parameters
        ----------
        tokens : int64[n]
        drafter
        """
        if isinstance(self.scheduler, SglangScheduling):
            return tokens + max(0, self.scheduler.ahead(drafter.draft_tokens) - 3 - self.block_size)
        return np.maximum(tokens, np.minimum(tokens + drafter.ahead, self.max_model_len))

    @property
    def beyond_page(self) -> int:
        """Tokens after a page without which its content is not known, where prefixes are cached.

        SGLang knows a token by it and the next one where a drafter needs the hidden state of the one with the other.
        Source: keys of pairs (`is_bigram`) in `RadixKey` of SGLang 0.5.23.
        """
        pairs = self.speculation is not None and self.speculation.rules.recomputes
        return int(pairs and isinstance(self.scheduler, SglangScheduling))

    def seats(self, stages: int) -> int:
        """Sequences that run at once, over so many pipeline stages."""
        return self.max_num_seqs * (stages if self.scheduler.seats_per_stage else 1)

    def depth(self, stages: int) -> int:
        """Batches in flight at once, over so many pipeline stages.

        As many as stages; on one stage 2 where the next batch is scheduled while the last one runs, else 1.
        """
        if not self.scheduler.forms_ahead:
            return 1
        return stages if stages > 1 else 1 + self.async_scheduling

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 2),
            ("block_size", 1),
        ):
            whole(name, getattr(self, name), least)
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise UsageError(f"gpu_memory_utilization: {shown(share)} is not a number above 0 and at most 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "every running sequence may want a token in one batch; raise the one or lower the other"
            )
        if not isinstance(self.scheduler, Scheduling):
            raise UsageError(f"scheduler: {shown(self.scheduler)} is none of {', '.join(SCHEDULINGS)}")
        if self.prefix_caching and not self.scheduler.finds_prefixes:
            with_it = ", ".join(kind.name for kind in SCHEDULINGS.values() if kind.finds_prefixes)
            raise UsageError(
                f"prefix_caching goes with the engines {with_it}, not with {self.scheduler.name}; leave one of them out"
            )
        if isinstance(own := self.scheduler, TrtllmScheduling) and own.snapshot_interval % self.block_size:
            raise UsageError(
                f"snapshot_interval {own.snapshot_interval} is not a multiple of block_size {self.block_size}: states "
                "are kept where a block ends; use a multiple of it"
            )
        if self.speculation is not None:
            self._check_drafts(self.speculation)
        if self.whole_prompts and self.scheduler.whole_length and self.max_num_batched_tokens < self.max_model_len:
            raise UsageError(
                f"where prompts are not split max_num_batched_tokens {self.max_num_batched_tokens} must reach "
                f"max_model_len {self.max_model_len}: a longer prompt would never be scheduled"
            )

    def _check_drafts(self, speculation: Speculation) -> None:
        """Refuse limits that drafts do not go with.

        Raises
        ------
        UsageError
        """
        if not self.scheduler.verifies_drafts:
            with_it = ", ".join(kind.name for kind in SCHEDULINGS.values() if kind.verifies_drafts)
            raise UsageError(
                f"speculation goes with the engines {with_it}, not with {self.scheduler.name}; leave one of them out"
            )
        drafts, tokens = speculation.draft_tokens, self.max_num_batched_tokens
        if self.scheduler.whole_rows and tokens <= drafts:  # others verify as many drafts as there is room for
            raise UsageError(
                f"max_num_batched_tokens {tokens} has no room for a token with its {drafts} drafts; raise the one or "
                "lower the other"
            )
        if not isinstance(self.scheduler, SglangScheduling):
            return
        if self.max_num_seqs * (1 + drafts) > tokens:
            raise UsageError(
                f"max_num_seqs {self.max_num_seqs} with {drafts} drafts each are more than the max_num_batched_tokens "
                f"{tokens} that a batch is simulated to; sglang verifies all that run at once; lower the one or raise "
                "the other"
            )
        if self.scheduler.mixed_chunk:
            raise UsageError(
                "mixed_chunk: sglang switches it off where drafts are verified (sgl-project/sglang#6874); leave one of "
                "them out"
            )


def check_snapshots(scheduler: Scheduling, model: Model) -> None:
    """Refuse an interval at which TensorRT-LLM keeps states of a model that has none, whatever the interval.

    Raises
    ------
    UsageError
    """
    if isinstance(scheduler, TrtllmScheduling) and scheduler.snapshot_interval and not model.state_bytes_per_sequence:
        raise UsageError(
            f"--engine_settings: snapshot_interval is of models with states, which {model.name} has none of; leave it "
            "out"
        )


def check_states(settings: EngineSettings, model: Model) -> None:
    """Refuse blocks that TensorRT-LLM would reuse without the states behind them.

    Raises
    ------
    UsageError
    """
    if not isinstance(own := settings.scheduler, TrtllmScheduling):
        return
    has_states = model.state_bytes_per_sequence > 0
    if settings.prefix_caching and has_states and model.kv_bytes_per_token(1) == 0:
        raise UsageError(
            f"--prefix_caching: {model.name} has states alone; those that trtllm keeps are simulated as kept as long "
            "as the KV block that ends with them, and where there are no such blocks nothing bounds them; leave it out"
        )
    keeps = own.context_chunking_policy == "FORCE_CHUNK" and own.snapshot_interval and settings.chunked_prefill
    if settings.prefix_caching and has_states and not keeps:
        raise UsageError(
            f"--prefix_caching: {model.name} has states, without which trtllm reuses no blocks, and they are not kept; "
            "give --chunked_prefill=true --engine_settings=context_chunking_policy=FORCE_CHUNK,snapshot_interval=256, "
            "or leave it out"
        )


def has_ranks(settings: EngineSettings, plan: Plan) -> bool:
    """Whether the attention copies of a plan have a scheduler, a pool and limits each.

    Those of vLLM have, and those of SGLang and TensorRT-LLM where they share an FFN: whole copies behind one address of
    other engines than vLLM share one scheduler, as do copies whose drafts are not modelled.
    """
    attention, scheduler = plan.attention, settings.scheduler
    if attention.dp == 1 or (plan.speculation is not None and not scheduler.ranks_draft):
        return False
    together = isinstance(scheduler, SglangScheduling | TrtllmScheduling) and attention.dp != plan.ffn.dp
    return together or isinstance(scheduler, VllmScheduling)


def schedulers(settings: EngineSettings, plan: Plan) -> int:
    """Schedulers of a replica."""
    return plan.attention.dp if has_ranks(settings, plan) else 1


def limits_shared(settings: EngineSettings, plan: Plan) -> int:
    """Attention copies that the limits of a batch are of together: vLLM and TensorRT-LLM take them for each."""
    return 1 if isinstance(settings.scheduler, VllmScheduling | TrtllmScheduling) else plan.attention.dp


def drafts_in_copies(settings: EngineSettings, plan: Plan) -> bool:
    """Whether what the attention copies of a plan do with drafts is modelled."""
    return plan.attention.dp == 1 or has_ranks(settings, plan)


def of_all(settings: EngineSettings, plan: Plan) -> EngineSettings:
    """Settings with the limits of all schedulers of a replica together.

    Parameters
    ----------
    settings : EngineSettings    of each, as `of_each` has them
    plan
    """
    count = schedulers(settings, plan)
    if count == 1:
        return settings
    seqs, tokens = settings.max_num_seqs * count, settings.max_num_batched_tokens
    if not settings.whole_prompts or limits_shared(settings, plan) == 1:
        tokens *= count
    return replace(settings, max_num_seqs=seqs, max_num_batched_tokens=max(tokens, seqs))


def of_each(settings: EngineSettings, plan: Plan) -> EngineSettings:
    """Settings of each scheduler of a replica: with the limits that a plan sets, SGLang's shared out among its ranks.

    Source: `max_running_requests` and `chunked_prefill_size` are divided by the ranks; SGLang 0.5.23.

    Raises
    ------
    UsageError    as for `limited`
    """
    settings = limited(settings, plan)
    count = schedulers(settings, plan)
    if count == 1 or limits_shared(settings, plan) == 1:
        return settings
    seqs, tokens = max(1, settings.max_num_seqs // count), settings.max_num_batched_tokens
    if not settings.whole_prompts:  # else there is no limit to share
        tokens = max(1, tokens // count)
    row = 1 + (settings.speculation.draft_tokens if settings.speculation else 0)
    return replace(settings, max_num_seqs=seqs, max_num_batched_tokens=max(tokens, seqs * row))


def limited(settings: EngineSettings, plan: Plan) -> EngineSettings:
    """Settings with the limits of a batch and the drafts that a plan sets.

    Where SGLang multiplexes, prompts are computed whole and no batch is formed ahead.

    Raises
    ------
    UsageError    limits that do not go with the other settings, or drafts of which nothing is known
    """
    limits = plan.max_num_seqs, plan.max_num_batched_tokens
    multiplexed = plan.shares is not None and plan.shares.multiplexed
    if limits == (None, None) and plan.speculation is None and not multiplexed:
        return settings
    speculation = _of_drafts(settings, plan.speculation) if plan.speculation else None
    seats = settings.scheduler.seats_of(settings.max_num_seqs, drafting=speculation is not None)
    seqs, tokens = plan.max_num_seqs or seats, plan.max_num_batched_tokens or settings.max_num_batched_tokens
    tokens = max(tokens, settings.max_model_len) if multiplexed else tokens
    _check_named(settings, plan, seqs, tokens)
    return replace(
        settings,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        chunked_prefill=settings.chunked_prefill and not multiplexed,
        speculation=speculation,
        async_scheduling=settings.async_scheduling
        and not multiplexed
        and (speculation is None or speculation.rules.forms_ahead or not settings.scheduler.waits_for_host),
    )


def _check_named(settings: EngineSettings, plan: Plan, seqs: int, tokens: int) -> None:
    """Refuse limits that a plan names and that do not go with the others, in the words of its text.

    Parameters
    ----------
    settings, plan
    seqs, tokens : int    limits with those of the plan

    Raises
    ------
    UsageError
    """
    named_seqs, named_tokens = plan.max_num_seqs is not None, plan.max_num_batched_tokens is not None
    if tokens < seqs and (named_seqs or named_tokens):
        less = f"tokens={tokens}" if named_tokens else f"max_num_batched_tokens {tokens}"
        more = f"seqs={seqs}" if named_seqs else f"max_num_seqs {seqs}"
        what = f"{less} is below {more}" if named_tokens else f"{more} is above {less}"
        raise UsageError(
            f"plan: {what}: every running sequence may want a token in one batch; name tokens={seqs} or more, or "
            f"seqs={tokens} or less"
        )
    if named_tokens and settings.whole_prompts and settings.scheduler.whole_length and tokens < settings.max_model_len:
        raise UsageError(
            f"plan: tokens={tokens} has no room for a prompt of up to {settings.max_model_len} tokens (max_model_len), "
            f"as prompts are not split; name tokens={settings.max_model_len} or more"
        )


def _of_drafts(settings: EngineSettings, drafter: Drafter) -> Speculation:
    """What comes of the drafts of a plan."""
    for speculation in settings.drafting:
        if speculation.drafter == drafter:
            return speculation
    raise UsageError(f"spec={drafter}: nothing is known of how many drafts are accepted; give --speculation={drafter}")
