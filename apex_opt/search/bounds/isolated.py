"""Lower bounds on what a plan can reach, without simulating it.

Why they are admissible. A batch that holds a sequence takes at least the least any batch takes, plus that sequence's
own attention at the lowest rate in the tables; other sequences only add. Of the prompts of a batch, time is the sum
over no more copies than there are prompts: at least their mean, hence the least of one, and at least the sequence's own
share. A stage runs one batch at a time and the next token of a sequence needs its last one, so a request cannot take
less than its own batches one after the other; where sequences may be preempted in a pipeline, `_overtaken` says what
is left of that. A preempted sequence computes tokens again, as a chunk over at least as
many pairs as it holds tokens. Of a prompt, only what another request says as well can be found in a cache. Waiting in
queues and routing only add. The slowest of the stages is no faster than their mean, and a batch is of one size on all:
so sums of the least over all layers bound every split of these into as many stages. Where tables are not monotone
their least entries are taken.
Where drafts are verified a request needs at least so many batches as it takes if every draft that can be right is
scheduled (`plans.speculation.least_steps`), each over no less context than after as many tokens. Each makes drafts,
but SGLang's batches of prompts, by which requests that were preempted get a token too.
A prompt may then come in chunks that count as decoding, whose context is read once for all of their tokens.
Percentiles and means over requests never fall when every request's value is replaced by a lower bound of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.engines.schedulers import Lengths, SglangScheduling
from apex_opt.plans.speculation import least_steps
from apex_opt.simulator.content import number_pieces
from apex_opt.simulator.law import RATE_BITS
from apex_opt.units import NS_PER_S, ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.cost.least import Least
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.law import BatchLaw, Window
    from apex_opt.simulator.ranks import Ranks, SharedLaw
    from apex_opt.workload.trace import Trace

    Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFloor:
    """Least times of one stage.

    `batch_ns` of any batch; `token_ns` of a prompt token and `decode_token_ns` of a later one within the batch that
    computes it; `pair_rate` of a query-key pair of a prompt and `context_rate` of a token held when a later one is
    computed, in 2**-20 ns. Where drafts are made, `draft_ns` of making them, within a batch that does, and
    `draft_rate`, in 2**-20 ns, of a token held by one of its sequences. `seen` holds for each window what a token of
    context and a pair within it take, in 2**-20 ns as well.
    """

    batch_ns: int
    token_ns: float
    decode_token_ns: float
    pair_rate: int
    context_rate: int
    draft_ns: int = 0
    draft_rate: int = 0
    seen: tuple[tuple[Window, int, int], ...] = ()

    @classmethod
    @lru_cache(maxsize=256)
    def of(cls, law: BatchLaw) -> StageFloor:
        """The floor of a batch law; laws are the same where they are the same object, and stages share them.

        Where resources work at one time, no batch takes less than what any of them is asked for, or one operation after
        the other.
        """
        if law.resources:
            busiest = max((cls.of(its) for its in law.resources), key=lambda floor: floor.batch_ns)
            return cls.of_any([cls.of(replace(law, resources=())), busiest])
        context = int(law.context_rate[1:].min())
        least = int(law.decode_ns[1:].min())
        # A batch of one-token chunks counts as decoding: n tokens in at least decode_ns[n].
        per_token = float((law.decode_ns[1:] / np.arange(1, len(law.decode_ns))).min())
        drafts, made, drafted = 1 + law.draft_tokens, 0, 0
        if law.draft_tokens:
            least += int(law.verify_ns[1:].min())
            per_token = float((law.verify_ns[1:] / np.arange(1, len(law.verify_ns))).min())
            made, drafted = int(law.draft_ns[1:].min()), int(law.draft_rate[1:].min())
        mixed, chunk = law.mixed_ns[2:], law.chunk_ns[2:]
        if not len(mixed):
            return cls(
                batch_ns=least,
                token_ns=per_token,
                decode_token_ns=per_token,
                pair_rate=context // drafts,
                context_rate=context,
                draft_ns=made,
                draft_rate=drafted,
                seen=_of_windows(law),
            )
        tokens = np.arange(2, len(law.mixed_ns))
        pair, again = int(law.pair_rate[2:].min()), int((law.pair_rate + law.chunk_context_rate)[2:].min())
        every = int(law.sequence_ns[1:].min()) + int(law.attend_ns.min())
        return cls(
            batch_ns=min(least, int(mixed.min()) + int(chunk.min()) + every),
            token_ns=min(per_token, float((mixed / tokens).min()) + float((chunk / tokens).min()) / law.copies),
            decode_token_ns=min(per_token, float((mixed / tokens).min())),
            pair_rate=min(context // drafts, pair // law.copies),
            context_rate=min(context, again // law.copies),
            draft_ns=made,
            draft_rate=drafted,
            seen=_of_windows(law),
        )

    @classmethod
    def of_ranks(cls, law: BatchLaw, shared: SharedLaw, count: int) -> StageFloor:
        """The floor of a forward of ranks that run in step: the mean of their own parts and what all share.

        The slowest rank is no faster than the mean of all. Where it may be split, a forward takes no less than what is
        computed of both halves.

        Parameters
        ----------
        law : BatchLaw       of a rank's own part
        shared : SharedLaw
        count : int          ranks
        """
        if shared.halves is not None:
            whole, halves = replace(shared, halves=None), shared.halves
            split = replace(
                whole,
                padded_ns=np.full_like(shared.padded_ns, int(halves.alone_ns[1:].min())),
                decode_ns=halves.decode_ns + halves.decode_host_ns,
                mixed_ns=halves.mixed_ns + halves.mixed_host_ns,
            )
            return cls.of_any([cls.of_ranks(law, whole, count), cls.of_ranks(halves.law, split, count)])
        own = cls.of(law)
        most = len(shared.decode_ns) - 1
        least = ceil_div(count, shared.per)  # a dummy batch has a token
        tables = shared.decode_ns[least:], shared.mixed_ns[least:]
        share = min(float((table / (shared.per * np.arange(least, most + 1))).min()) for table in tables)
        every = min(int(table.min()) for table in tables) + int(shared.padded_ns[1:].min()) + int(shared.graph_ns.min())
        return cls(
            batch_ns=own.batch_ns + every,
            token_ns=own.decode_token_ns / count + share,
            decode_token_ns=own.decode_token_ns / count + share,
            pair_rate=own.pair_rate // count,
            context_rate=own.context_rate // count,
            draft_ns=own.draft_ns + (int(shared.draft_ns[1:].min()) if len(shared.draft_ns) > 1 else 0),
            draft_rate=own.draft_rate // count,
            seen=tuple((window, context // count, pair // count) for window, context, pair in own.seen),
        )

    @classmethod
    def of_any(cls, floors: Sequence[StageFloor]) -> StageFloor:
        """The floor of a batch that takes what any of several ways takes, over the same windows."""
        numbers = [field.name for field in fields(cls) if field.name != "seen"]
        return cls(
            **{name: min(getattr(floor, name) for floor in floors) for name in numbers},
            seen=tuple(
                (rows[0][0], min(row[1] for row in rows), min(row[2] for row in rows))
                for rows in zip(*(floor.seen for floor in floors), strict=True)
            ),
        )

    @classmethod
    def of_pool(cls, laws: Sequence[BatchLaw], ranks: Ranks | None) -> list[StageFloor]:
        """The floors of all stages of a replica."""
        if ranks is None or not ranks.in_step:
            return [cls.of(law) for law in laws]
        return [cls.of_ranks(law, shared, ranks.count) for law, shared in zip(laws, ranks.shared, strict=True)]

    @classmethod
    def mean(cls, least: Least, stages: int, copies: int, drafts: int = 0) -> StageFloor:
        """The mean floor of the stages of a pipeline, however its layers are split.

        A table entry is rounded to the nearest nanosecond and a rate to the nearest 2**-20 ns, four entries a batch,
        and two more where drafts are made.

        Parameters
        ----------
        least : Least    what the stages take at least
        stages : int     of the pipeline
        copies : int     copies of attention
        drafts : int     drafts that may follow a token
        """
        scale, rates = NS_PER_S / stages, NS_PER_S * (1 << RATE_BITS) / stages
        alone = least.verify_share if drafts else least.decode_share
        batch = min(least.decode + least.verify, least.mixed + least.chunk + least.sequence + least.attend)
        token = min(alone, least.mixed_share + least.chunk_share / copies)
        pair, context = min(least.context / (1 + drafts), least.pair / copies), min(least.context, least.again / copies)
        seen = tuple((window, *_within(window, context, pair, copies, drafts)) for window, context, pair in least.seen)
        return cls(
            batch_ns=max(int(batch * scale) - _ROUNDED, 0),
            token_ns=max(token * scale - _ROUNDED, 0.0),
            decode_token_ns=max(min(alone, least.mixed_share) * scale - _ROUNDED, 0.0),
            pair_rate=max(int(pair * rates) - _ROUNDED, 0),
            context_rate=max(int(context * rates) - _ROUNDED, 0),
            draft_ns=max(int(least.draft * scale) - _ROUNDED, 0),
            draft_rate=max(int(least.draft_context * rates), 0),
            seen=tuple(
                (window, max(int(context * rates) - _ROUNDED, 0), max(int(pair * rates) - _ROUNDED, 0))
                for window, context, pair in seen
            ),
        )

    def later_rate(self, drafting: bool) -> int:
        """What a token held takes when a later one is computed, whose batch makes drafts for certain or not."""
        return self.context_rate + (self.draft_rate if drafting else 0)

    def context_ns(self, prompt: Ints, steps: Ints, *, drafting: bool) -> Ints:
        """Least that attention takes of so many later tokens: the j-th is computed over a context of prompt + j.

        Parameters
        ----------
        prompt, steps : int64[n]
        drafting : bool             whether each of their batches makes drafts for certain, where any are made
        """
        total = scaled(steps * prompt + steps * (steps + 1) // 2, self.later_rate(drafting))
        for window, rate, _ in self.seen:
            total = total + scaled(window.all_pairs(prompt + steps) - window.all_pairs(prompt), rate)
        return total

    def pairs_ns(self, prompt: Ints, found: Ints) -> Ints:
        """Least that attention takes of prompts of which so many tokens are found."""
        total = scaled(prompt * (prompt + 1) // 2 - found * (found + 1) // 2, self.pair_rate)
        for window, _, rate in self.seen:
            total = total + scaled(window.all_pairs(prompt) - window.all_pairs(found), rate)
        return total

    def held_ns(self, held: Ints) -> Ints:
        """Least that attention takes of a later token that holds so much."""
        total = scaled(held, self.context_rate)
        for window, rate, _ in self.seen:
            total = total + scaled(window.seen(held), rate)
        return total


def _within(window: Window, context: float, pair: float, copies: int, drafts: int) -> tuple[float, float]:
    """What a token of context within a window takes at least, and a pair, as `StageFloor.of` has those of all.

    In a chunked window a row with drafts may end where the chunk has just begun, so it takes nothing for certain.
    """
    later = 0 * context if drafts and window.chunked else min(context, pair / copies)
    return later, min(context / (1 + drafts), pair / copies)


def _of_windows(law: BatchLaw) -> tuple[tuple[Window, int, int], ...]:
    """The same of a law, per window."""
    found = []
    for window, contexts, pairs in zip(law.windows, law.seen_rate, law.seen_pair_rate, strict=True):
        context, pair = int(contexts[1:].min()), int(pairs[2:].min(initial=int(contexts.max())))
        later, each = _within(window, context, pair, law.copies, law.draft_tokens)
        found.append((window, int(later), int(each)))
    return tuple(found)


_ROUNDED: Final = 3
"""Most that rounding four table entries and cutting off what is lost to an integer takes away, in units of each."""


def isolated(
    settings: EngineSettings, floors: Sequence[StageFloor], trace: Trace, *, overtaking: bool = False
) -> tuple[Ints, Ints]:
    """Times that no request can beat: from its arrival to its first token, and from there to its last.

    Where only the mean floor of the stages is known, so many equal to it serve as well: the slowest stage is no faster
    than the mean one.

    Parameters
    ----------
    settings, trace : as for `apex_opt.simulator.simulate`; asynchronous scheduling only on one stage, where batches
        still run one after the other
    floors : StageFloor of each stage
    overtaking : bool     whether sequences may be preempted (`may_preempt`), where `minds_preemption`

    Returns
    -------
    int64[n], int64[n]    nanoseconds
    """
    alike = Counter(floors)
    prompt, generated = trace.prompt, trace.generated(settings.max_model_len)
    found = found_prompts(settings, trace)
    computed = prompt - found
    all_batches = sum(floor.batch_ns for floor in floors)
    first = np.zeros(len(trace), np.int64)
    for floor in alike:
        own = np.maximum(np.floor(computed * floor.token_ns).astype(np.int64) - 1, floor.batch_ns)
        own = own + floor.pairs_ns(prompt, found) - chunked(computed)
        # Its chunks pass this stage one after the other; before the first and after the last come the other stages.
        first = np.maximum(first, own + all_batches - floor.batch_ns)
    steps = later_batches(settings, generated)
    if overtaking and len(floors) > 1:
        return np.maximum(first, 0), _overtaken(floors, prompt, steps)
    drafts_ns = sum(floor.draft_ns for floor in floors)
    first = first + (drafts_ns if settings.scheduler.drafts_at_once else 0)
    drafting = settings.scheduler.drafts_at_once or not overtaking
    rest = steps * (all_batches + (drafts_ns if drafting else 0))
    terms = 1 if settings.speculation is None else 2
    for floor, stages in alike.items():
        # Each batch rounds down by less than a nanosecond, and once more for its drafts.
        rest = rest + stages * np.maximum(floor.context_ns(prompt, steps, drafting=drafting) - terms * steps, 0)
    return np.maximum(first, 0), rest


def later_batches(settings: EngineSettings, generated: Ints) -> Ints:
    """Batches after that of its first token that each request needs at least, for so many tokens in all."""
    if settings.speculation is None:
        return generated - 1
    return least_steps(settings.speculation, settings.async_scheduling, generated)


def minds_preemption(settings: EngineSettings, stages: int) -> bool:
    """Whether a request can take less where it is preempted.

    It may overtake its own batches on several stages, and where drafts are only made by batches that verify some its
    prompt, computed again, brings a token without.
    """
    return stages > 1 or (settings.speculation is not None and not settings.scheduler.drafts_at_once)


def may_preempt(settings: EngineSettings, blocks: int, trace: Trace, requests: int | None = None) -> bool:
    """Whether the sequences that can run at once may need more KV blocks than there are.

    Parameters
    ----------
    requests : int or None    most of the trace's requests that can be on the replica at all; None for all
    """
    if not settings.scheduler.may_preempt:
        return False
    seats = len(trace) if settings.scheduler.seats_per_stage else settings.max_num_seqs
    at_once = min(seats, len(trace), requests or len(trace), trace.concurrency or len(trace))
    return at_once >= fewest_to_fill(settings, blocks, trace)


def fewest_to_fill(settings: EngineSettings, blocks: int, trace: Trace) -> int:
    """Fewest requests of a trace that may need more KV blocks than there are: with less there nobody is preempted.

    Parameters
    ----------
    settings : EngineSettings
    blocks : int       of the KV cache
    trace : Trace
    """
    return bisect_right(_most_blocks(trace, settings), blocks) + 1


@lru_cache(maxsize=32)
def _most_blocks(trace: Trace, settings: EngineSettings) -> list[int]:
    """KV blocks of the largest request, of the two largest, and so on."""
    limit = settings.max_model_len
    lengths = Lengths(trace.prompt, trace.generated(limit), trace.stated(limit))
    held = settings.scheduler.room(lengths, settings.block_size, caches=False)
    if settings.speculation is not None:
        held = settings.with_drafts(held, settings.speculation)
    return [int(n) for n in np.cumsum(np.sort(settings.most_blocks(held))[::-1])]


def _overtaken(floors: Sequence[StageFloor], prompt: NDArray[np.int64], steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Least times from the first token to the last where a batch may begin before the one before it has ended.

    A sequence that gives way while a batch with it is on its way through the pipeline may come back before that batch
    ends. Still its batches pass every stage one after the other, all but those that are on their way with the first
    token at least after it, and lack no more tokens than can be on their way.
    """
    stages = len(floors)
    kept = np.maximum(steps - stages + 1, 0)
    held = np.maximum(prompt - stages, 0)
    total = np.zeros_like(kept)
    for floor, count in Counter(floors).items():
        own = scaled(kept * held, floor.context_rate)
        for window, rate, _ in floor.seen:
            within = np.zeros_like(held) if window.chunked else np.minimum(held, window.tokens)
            own += scaled(kept * within, rate)
        total += count * np.maximum(kept * floor.batch_ns + own - kept, 0)
    return np.asarray(total // stages)


def found_prompts(settings: EngineSettings, trace: Trace) -> NDArray[np.int64]:
    """Tokens of each prompt that a cache may find: the others are computed whatever it does.

    Of a prompt that is handed over only the last token is computed again, and by SGLang none.
    """
    if settings.role == "decode":
        return np.asarray(trace.prompt - (0 if isinstance(settings.scheduler, SglangScheduling) else 1))
    return _findable(trace) if settings.prefix_caching else np.zeros_like(trace.prompt)


@lru_cache(maxsize=8)
def _findable(trace: Trace) -> NDArray[np.int64]:
    """Most prompt tokens of each request that another one can have computed; the last token always is its own."""
    if trace.content is None or trace.content_starts is None:
        return np.zeros_like(trace.prompt)
    pieces, known = number_pieces(trace.content_starts, trace.content)
    said = np.bincount(pieces, minlength=known)[pieces] > 1
    shared = np.diff(np.concatenate(([0], np.cumsum(said)))[trace.content_starts])
    return np.asarray(np.minimum(shared * trace.content_tokens, trace.prompt - 1))


def scaled(amount: NDArray[np.int64], rate: int) -> NDArray[np.int64]:
    """amount x rate / 2**20, rounded down; in two halves, so that no product leaves 63 bits."""
    high, low = amount >> RATE_BITS, amount & ((1 << RATE_BITS) - 1)
    return high * rate + (low * rate >> RATE_BITS)


def chunked(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Most nanoseconds that rounding down once a chunk can lose over so many tokens, where chunks may be one token."""
    return np.asarray(tokens + 1)
