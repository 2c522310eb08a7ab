"""Schedulers as facts, and the settings that only one of them has.

What a scheduler decides is in the class of the same name in `apex_opt.simulator.reference`. Settings that all engines
have, under one name or another, are those of `apex_opt.plans.engine.EngineSettings`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from apex_opt.engines.overlap import DUAL_BATCH, TWO_BATCH
from apex_opt.errors import UnknownNameError, UsageError, shown
from apex_opt.units import NS_PER_US

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from apex_opt.engines.overlap import Splitting

    Ints = NDArray[np.int64]

CAPACITY_POLICIES: Final = ("GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH")
MOST_WAIT_MS: Final = 60_000
CHUNKING_POLICIES: Final = ("FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS", "FORCE_CHUNK")

LARGEST: Final = 1 << 31
"""What no number among the settings of an engine reaches."""

SCHEDULE_POLICIES: Final = ("fcfs", "lpm")
"""Orders in which SGLang looks at waiting requests."""
LOAD_BALANCES: Final = ("round_robin", "total_requests")
"""Ways in which SGLang deals requests to attention ranks."""
MOST_CONSERVATIVE: Final = 100.0
"""Above this nothing changes any more: room is kept for all that requests may generate."""


class Lengths(NamedTuple):
    """Tokens of requests.

    Parameters
    ----------
    prompt, generated, stated : int64[n]    of their prompts, that they generate, and that they say they may generate
    """

    prompt: Ints
    generated: Ints
    stated: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """How batches are formed: facts of a scheduler, and as fields the settings that only it has.

    Facts
    -----
    name : str
    splits_prompts : bool     a prompt may be computed in several batches; else in one or not at all
    preempts : bool           running requests give way where KV blocks run out; else blocks are reserved beforehand; by
                              default, see `may_preempt`
    finds_prefixes : bool     goes with prefix caching
    forms_ahead : bool        a batch can be formed while others run
    whole_length : bool       where prompts are not split a batch must have room for max_model_len, as what gave way may
                              come back that long; else for the prompts that there are
    verifies_drafts : bool    what it does with drafts is modelled
    waits_for_host : bool     forms no batch ahead where drafts are made on the host, between two batches
    drafts_at_once : bool     a batch that brings a first token makes drafts as well; else only one that verifies some
    whole_rows : bool         a token is never scheduled without all of its drafts
    ranks_draft : bool        what its attention ranks do with drafts is modelled
    launches : bool           the loop that forms batches and takes them in launches them itself, kernel by kernel, and
                              takes one in after it has launched the next; else a process of its own launches them
    seats_per_stage : bool    max_num_seqs is of a batch, and a pipeline runs so many times as many as it has stages
    splitting : Splitting or None    when attention ranks split a forward into two halves, where they are asked to
    """

    name: ClassVar[str]
    splits_prompts: ClassVar[bool] = True
    preempts: ClassVar[bool] = True
    finds_prefixes: ClassVar[bool] = True
    forms_ahead: ClassVar[bool] = True
    whole_length: ClassVar[bool] = True
    verifies_drafts: ClassVar[bool] = False
    waits_for_host: ClassVar[bool] = True
    drafts_at_once: ClassVar[bool] = True
    whole_rows: ClassVar[bool] = False
    ranks_draft: ClassVar[bool] = False
    launches: ClassVar[bool] = False
    seats_per_stage: ClassVar[bool] = False
    splitting: ClassVar[Splitting | None] = None

    @property
    def may_preempt(self) -> bool:
        """Whether requests give way with these settings."""
        return self.preempts

    def seats_of(self, seats: int, *, drafting: bool) -> int:
        """Sequences running at once, where so many are without drafts.

        Parameters
        ----------
        seats : int
        drafting : bool    whether drafts are verified
        """
        return seats

    def told(self, *, chunked_prefill: bool, caches: bool, states: bool) -> tuple[str, ...]:
        """What has to be known of its own settings: those that do nothing beside the others, and what they cost.

        Parameters
        ----------
        chunked_prefill : bool
        caches : bool             whether prefixes are cached
        states : bool             whether the model has states, which may be kept
        """
        return ()

    def room(self, lengths: Lengths, page: int, *, caches: bool) -> Ints:
        """Tokens that the cache must have room for, for each of some requests to be served at all.

        Parameters
        ----------
        lengths : of the requests
        page : int       tokens in one KV block
        caches : bool    whether prefixes are cached
        """
        return lengths.prompt + lengths.generated - 1  # the last token is never computed

    @property
    def prompt_threshold(self) -> int:
        """Most tokens of one prompt in one batch, whatever there is room for; 0 = no such limit."""
        return 0

    @property
    def idle_sleep_ns(self) -> int:
        """How long the engine's loop sleeps after a turn that scheduled nothing while requests are unfinished."""
        return 0

    @property
    def balances_ranks(self) -> bool:
        """Whether a request goes to the attention rank with the least load; else to each in turn."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmScheduling(Scheduling):
    """Iteration by iteration, prompts in chunks, preemption where blocks run out (vLLM V1).

    Parameters
    ----------
    long_prefill_token_threshold : int    most tokens of one prompt in one batch; 0 = no such limit
    idle_sleep_us : int                   the engine's loop sleeps so long after a turn that scheduled nothing while
                                          requests are unfinished; plans take it from the engine's file
    """

    name = "vllm"
    splitting = DUAL_BATCH
    verifies_drafts = True
    ranks_draft = True
    long_prefill_token_threshold: int = 0
    idle_sleep_us: int = 0

    def __post_init__(self) -> None:
        for name in ("long_prefill_token_threshold", "idle_sleep_us"):
            whole(name, getattr(self, name), 0)

    @property
    def prompt_threshold(self) -> int:
        return self.long_prefill_token_threshold

    @property
    def idle_sleep_ns(self) -> int:
        return self.idle_sleep_us * NS_PER_US


RESERVED: Final = 512
"""Tokens to come that a decode instance of SGLang keeps room for, of every request that it has.

Source: `num_reserved_decode_tokens` of SGLang 0.5.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangScheduling(Scheduling):
    """Prompts before decoding, room by what requests say they may generate, retraction where that was too little.

    Parameters
    ----------
    max_prefill_tokens : int            prompt tokens after which no further prompt is added to a batch
    schedule_policy : str               "fcfs", in order of arrival, or "lpm": the longest cached prefix first
    schedule_conservativeness : float   times the share of what requests may generate that room is kept for at first
    mixed_chunk : bool                  running requests get their tokens in batches of prompts as well
    ignore_eos : bool                   clients ask for exactly as many tokens as they state, as benchmarks do
    load_balance_method : str           to which attention rank a request goes: "round_robin", or "total_requests": to
                                        the one that has the fewest
    drafting_seats : int                most sequences running at once where drafts are verified, if no number is asked
                                        for; 0: as many as without drafts
    scheduler_recv_interval : int       batches of decoding between two looks for new requests; at once after prompts
    """

    name = "sglang"
    splitting = TWO_BATCH
    verifies_drafts = True
    waits_for_host = False
    drafts_at_once = False
    whole_rows = True
    ranks_draft = True
    launches = True
    max_prefill_tokens: int = 16384
    schedule_policy: str = "fcfs"
    schedule_conservativeness: float = 1.0
    mixed_chunk: bool = False
    ignore_eos: bool = False
    load_balance_method: str = "round_robin"
    drafting_seats: int = 48
    scheduler_recv_interval: int = 1

    def __post_init__(self) -> None:
        whole("max_prefill_tokens", self.max_prefill_tokens, 1)
        whole("drafting_seats", self.drafting_seats, 0)
        whole("scheduler_recv_interval", self.scheduler_recv_interval, 1)
        if self.schedule_policy not in SCHEDULE_POLICIES:
            raise UnknownNameError("schedule_policy", str(self.schedule_policy)[:60], SCHEDULE_POLICIES)
        if self.load_balance_method not in LOAD_BALANCES:
            raise UnknownNameError("load_balance_method", str(self.load_balance_method)[:60], LOAD_BALANCES)
        share = self.schedule_conservativeness
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= MOST_CONSERVATIVE:
            raise UsageError(
                f"schedule_conservativeness: {shown(share)} is not a number above 0 and at most {MOST_CONSERVATIVE}"
            )

    def room(self, lengths: Lengths, page: int, *, caches: bool) -> Ints:
        """All that a request may generate beside its prompt, a page and a token: else it is never admitted.

        Where ends are foreseen (`ignore_eos` without a cache) what it has so far is rounded up to pages as well.
        """
        pages = 1 if caches or not self.ignore_eos else 2
        return lengths.prompt + lengths.stated + pages * page + 1

    def ahead(self, drafts: int) -> int:
        """Tokens beyond those computed whose pages a step with so many drafts takes.

        Those of two steps, as what comes of the last one may not be known.
        Source: `get_alloc_reserve_per_decode` of SGLang 0.5.23 for chains of drafts.
        """
        return 2 * (1 + drafts)

    def seats_of(self, seats: int, *, drafting: bool) -> int:
        return min(seats, self.drafting_seats) if drafting and self.drafting_seats else seats

    @property
    def balances_ranks(self) -> bool:
        return self.load_balance_method == "total_requests"

    @property
    def of_a_rank(self) -> SglangScheduling:
        """The settings of an attention rank, which keeps less room for what requests may generate.

        Source: `--enable-dp-attention` multiplies `schedule_conservativeness` by 0.3; SGLang 0.5.23, server_args.py.
        """
        return replace(self, schedule_conservativeness=self.schedule_conservativeness * 0.3)

    @property
    def ratios(self) -> tuple[float, float, float]:
        """Share of what requests may generate that room is kept for: at first, at least, and by how much it falls.

        It falls with every step of decoding in which nobody has to be retracted.
        """
        start = min(0.7 * self.schedule_conservativeness, 1.0)
        least = min(start * 0.14, 1.0)
        return start, least, (start - least) / 600


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtllmScheduling(Scheduling):
    """Prompts and decoding in one batch, whole prompts or chunks, room reserved to the end or step by step.

    Parameters
    ----------
    capacity_policy : str                  one of `CAPACITY_POLICIES`:
        "GUARANTEED_NO_EVICT"    a request is admitted once there are blocks for all that it says it may generate
        "MAX_UTILIZATION"        once there are blocks for its prompt; the last that started gives way if none is left
        "STATIC_BATCH"           as the first, but only when none decodes
    context_chunking_policy : str          one of `CHUNKING_POLICIES`, of prompts that are computed in chunks:
        "FIRST_COME_FIRST_SERVED"    each gets all that is left of its prompt, as far as the batch has tokens
        "EQUAL_PROGRESS"             each gets a block of tokens in turn, round and round, until none fits
        "FORCE_CHUNK"                as the first, but no further than where its states are kept for others to find
    snapshot_interval : int                tokens after which states are kept with "FORCE_CHUNK", whole blocks; 0: never
    batch_wait_timeout_ms : float          up to which every turn waits for as many new requests as a batch has seats
    batch_wait_timeout_iters : int         turns for which prompts may wait for others while requests decode
    batch_wait_max_tokens_ratio : float    share of the tokens of a batch with which they wait no longer
    adp_balance : bool                     prompts wait until every attention rank has some, so that none stands idle
    adp_timeout_iters : int                turns for which they wait for that
    adp_batching_wait_iters : int          turns for which they wait on, once every rank has some and decodes
    """

    name = "trtllm"
    preempts = False
    whole_length = False
    verifies_drafts = True
    ranks_draft = True
    whole_rows = True
    launches = True
    seats_per_stage = True
    capacity_policy: str = "GUARANTEED_NO_EVICT"
    context_chunking_policy: str = "FIRST_COME_FIRST_SERVED"
    snapshot_interval: int = 0
    batch_wait_timeout_ms: float = 0.0
    batch_wait_timeout_iters: int = 0
    batch_wait_max_tokens_ratio: float = 0.0
    adp_balance: bool = False
    adp_timeout_iters: int = 50
    adp_batching_wait_iters: int = 10

    def __post_init__(self) -> None:
        for name, policies in (("capacity_policy", CAPACITY_POLICIES), ("context_chunking_policy", CHUNKING_POLICIES)):
            if getattr(self, name) not in policies:
                raise UnknownNameError(name, str(getattr(self, name))[:60], policies)
        counts = "snapshot_interval", "batch_wait_timeout_iters", "adp_timeout_iters", "adp_batching_wait_iters"
        for name in counts:
            whole(name, getattr(self, name), 0)
        wait = self.batch_wait_timeout_ms
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait <= MOST_WAIT_MS:
            raise UsageError(f"batch_wait_timeout_ms: {shown(wait)} is not a number from 0 to {MOST_WAIT_MS:,}")
        share = self.batch_wait_max_tokens_ratio
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UsageError(f"batch_wait_max_tokens_ratio: {shown(share)} is not a number from 0 to 1")

    @property
    def may_preempt(self) -> bool:
        return self.capacity_policy == "MAX_UTILIZATION"

    def told(self, *, chunked_prefill: bool, caches: bool, states: bool) -> tuple[str, ...]:
        found, waits = [], (bool(self.batch_wait_timeout_iters), bool(self.batch_wait_max_tokens_ratio))
        if self.context_chunking_policy != CHUNKING_POLICIES[0] and not chunked_prefill:
            found.append(
                f"context_chunking_policy={self.context_chunking_policy} has no effect without chunked prefill"
            )
        forces, every = self.context_chunking_policy == CHUNKING_POLICIES[2], self.snapshot_interval
        if forces and not states:
            found.append(
                "context_chunking_policy=FORCE_CHUNK is of no use for a model without states, which it keeps: it is "
                "FIRST_COME_FIRST_SERVED there; leave it out"
            )
        elif forces and not every:
            found.append("context_chunking_policy=FORCE_CHUNK is FIRST_COME_FIRST_SERVED without snapshot_interval")
        elif forces and chunked_prefill and not caches:
            found.append(
                "context_chunking_policy=FORCE_CHUNK is FIRST_COME_FIRST_SERVED without --prefix_caching=true, as "
                "nobody finds the states that it keeps"
            )
        if every and not forces:
            found.append("snapshot_interval has no effect without context_chunking_policy=FORCE_CHUNK")
        if waits == (True, False):
            found.append("batch_wait_timeout_iters has no effect without batch_wait_max_tokens_ratio above 0")
        if waits == (False, True):
            found.append("batch_wait_max_tokens_ratio has no effect without batch_wait_timeout_iters above 0")
        usual = TrtllmScheduling()
        for name in ("adp_timeout_iters", "adp_batching_wait_iters"):
            if not self.adp_balance and getattr(self, name) != getattr(usual, name):
                found.append(f"{name} has no effect without adp_balance=true")
        if self.batch_wait_timeout_ms:
            found.append(
                f"batch_wait_timeout_ms={self.batch_wait_timeout_ms:g}: every turn waits up to so long for as many "
                "new requests as a batch has seats, and those that decode wait with it"
            )
        return tuple(f"--engine_settings: {note}" for note in found)

    @property
    def fetch_wait_ns(self) -> int:
        """The longest that a turn waits for new requests."""
        return round(self.batch_wait_timeout_ms * 1e6)

    def room(self, lengths: Lengths, page: int, *, caches: bool) -> Ints:
        """As blocks are kept for all that a request says it may generate."""
        return lengths.prompt + lengths.stated

    def wait_tokens(self, max_num_batched_tokens: int) -> int:
        """The fewest tokens of a batch with which prompts wait no longer."""
        return math.ceil(self.batch_wait_max_tokens_ratio * max_num_batched_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrcaScheduling(Scheduling):
    """Iteration by iteration, whole prompts, blocks of prompt and output reserved at admission: nobody is preempted.

    Source: Yu et al., "Orca", OSDI 2022, algorithm 1; what APEX assumes.
    """

    name = "orca"
    splits_prompts = False
    preempts = False
    finds_prefixes = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticScheduling(OrcaScheduling):
    """Whole requests: a batch is formed when none runs and answered when its longest request is done.

    Requests that are done before keep computing. Source: the baseline of the same paper, section 2.
    """

    name = "static"
    forms_ahead = False


_ALL: Final = (
    VllmScheduling,
    SglangScheduling,
    TrtllmScheduling,
    OrcaScheduling,
    StaticScheduling,
)
SCHEDULINGS: Final[Mapping[str, type[Scheduling]]] = MappingProxyType({kind.name: kind for kind in _ALL})
"""Every scheduler by its name."""


def whole(name: str, value: object, least: int) -> None:
    """Refuse a setting that is not a whole number in its range.

    Parameters
    ----------
    name : str        of the setting
    value : object    as it is given
    least : int       that it may be

    Raises
    ------
    UsageError
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
        raise UsageError(f"{name}: {shown(value)} is not a whole number from {least} to {LARGEST - 1}")
