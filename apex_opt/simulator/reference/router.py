"""Which replica serves a request when it arrives.

Where a published rule draws among equals, the lowest replica is taken. What a router knows of prefixes it has from what
it sent: a prefix counts as known for ever, as nobody tells it what was evicted.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

from apex_opt.simulator.routing import FREE_WEIGHT, PREFIX_WEIGHT, QUEUE_WEIGHT, RouterSettings, pairs, prefixes

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from apex_opt.simulator.pools import EnginePool, Share
    from apex_opt.simulator.reference.engine import Engine
    from apex_opt.simulator.reference.group import Group
    from apex_opt.simulator.reference.sequence import Sequence
    from apex_opt.simulator.routing import I64, Prefixes
    from apex_opt.workload.trace import Trace

    Replica = Engine | Group


class Router(Protocol):
    """Chooses a replica for each request; all of them have taken every turn before it came, and none at that time."""

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        """The replica that serves a request.

        Parameters
        ----------
        sequence : Sequence             the request
        at_ns : int                     when it comes
        engines : sequence of Replica   to choose from
        """
        ...


class Dealt:
    """The replica at a place known beforehand of each request, or one after the other.

    Parameters
    ----------
    rows : int64[m]              the requests
    places : int64[m] or None    their places; None: in turn, in the order in which they come
    """

    def __init__(self, rows: I64, places: I64 | None) -> None:
        self._places = None if places is None else dict(zip(rows.tolist(), places.tolist(), strict=True))
        self._sent = 0

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        place: int = self._sent if self._places is None else self._places[sequence.id]
        self._sent += 1
        return engines[place % len(engines)]


class LeastLoaded:
    """The replica with the fewest unanswered requests, of equals the first."""

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        return min(engines, key=lambda engine: engine.outstanding(at_ns))


class PowerOfTwo:
    """Of two replicas drawn for each request that with the fewer unanswered ones, of equals the lower."""

    def __init__(self, drawn: I64) -> None:
        self._drawn, self._sent = drawn, 0

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        first, other = self._drawn[self._sent].tolist()
        self._sent += 1
        return engines[min((first, other), key=lambda place: engines[place].outstanding(at_ns))]


class CacheAware:
    """Where loads are even the replica that was first sent a long part of the prompt, else the least loaded.

    Source: `sgl-model-gateway/src/policies/cache_aware.rs` of SGLang 0.5, as the package sglang-router 0.3.2 runs it.
    """

    def __init__(self, known: Prefixes, settings: RouterSettings) -> None:
        self._known, self._settings = known, settings
        self._sent_to: dict[int, Replica] = {}

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        loads = [engine.outstanding(at_ns) for engine in engines]
        pieces = self._known.of(sequence.id, sequence.prompt, whole=False)
        seen = next((place for place, piece in enumerate(pieces) if piece not in self._sent_to), len(pieces))
        matched = min(seen * self._known.tokens, sequence.prompt)
        (over, under), (part, whole) = self._settings.ratio, self._settings.known_share
        uneven = max(loads) - min(loads) > self._settings.imbalance and under * max(loads) > over * min(loads)
        if not uneven and matched * whole > sequence.prompt * part:
            chosen = self._sent_to[pieces[seen - 1]]
        else:
            chosen = engines[loads.index(min(loads))]
        for piece in pieces[seen:]:
            self._sent_to[piece] = chosen
        return chosen


class Dynamo:
    """The replica where the prompts to compute and the blocks to read, both in tokens, are fewest with this request.

    A prefix is cached once the first token of a request that has it came, where the engine caches prefixes.

    Source: `lib/kv-router/src/scheduling/selector/default.rs` of Dynamo 1.6, with its default weights.
    """

    def __init__(self, known: Prefixes, block_size: int, *, caching: bool, computes: bool = True) -> None:
        self._known, self._block_size, self._caching, self._computes = known, block_size, caching, computes
        self._active: dict[Replica, list[tuple[Sequence, int]]] = {}
        self._cached: dict[Replica, set[int]] = {}

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        for engine in engines:
            self._forget(engine, at_ns)
        costs = [self.cost(sequence, at_ns, engine) for engine in engines]
        chosen = engines[costs.index(min(costs))]
        self.send(sequence, chosen)
        return chosen

    def send(self, sequence: Sequence, engine: Replica) -> None:
        """Send a request, with what it has to compute of its prompt."""
        self._active.setdefault(engine, []).append((sequence, self._to_compute(sequence, engine)))

    def cost(self, sequence: Sequence, at_ns: int, engine: Replica) -> int:
        """Tokens of prompts to compute and of blocks to read with a request.

        Parameters
        ----------
        sequence : Sequence    the request
        at_ns : int            when it comes
        engine : Replica       that would serve it
        """
        self._forget(engine, at_ns)
        active = self._active.get(engine, [])
        prefill = sum(tokens for its, tokens in active if not _began(its, at_ns))
        blocks, distinct = 0, set[int]()
        for its in [sequence, *(its for its, _ in active)]:
            pieces = self._pieces(its)
            blocks += its.prompt // self._block_size - len(pieces) * self._known.tokens // self._block_size
            distinct.update(pieces)
        blocks += len(distinct) * self._known.tokens // self._block_size
        owed = max(0, prefill + self._to_compute(sequence, engine))
        return owed + self._block_size * blocks

    def _forget(self, engine: Replica, at_ns: int) -> None:
        """What has its first token is cached; what is answered is not active."""
        active = self._active.get(engine, [])
        if self._caching:
            cached = self._cached.setdefault(engine, set())
            for its, _ in active:
                if _began(its, at_ns):
                    cached.update(self._pieces(its))
        self._active[engine] = [(its, tokens) for its, tokens in active if not _ended(its, at_ns)]

    def _to_compute(self, sequence: Sequence, engine: Replica) -> int:
        """Tokens of a prompt that an engine has to compute: those it has not cached, unless others compute prompts."""
        if not self._computes:
            return 0
        return sequence.prompt - _leading(self._pieces(sequence), self._cached.get(engine, set())) * self._known.tokens

    def _pieces(self, sequence: Sequence) -> list[int]:
        return self._known.of(sequence.id, sequence.prompt, whole=True)


class LlmD:
    """The replica with the best sum of scores: for what it was sent of the prompt before, and for its short queue.

    Where it weighs that as well, also for the share of its KV blocks that nobody holds. It sees queues and blocks as
    they are, though the router asks for them every 50 ms.

    Source: `pkg/epp/framework/plugins/scheduling` of llm-d-router, with the weights of its guide.
    """

    def __init__(self, known: Prefixes, block_size: int, free_weight: int = 0) -> None:
        self._known, self._block_size, self._free_weight = known, block_size, free_weight
        self._sent: dict[Replica, set[int]] = {}

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        waiting = [engine.waiting for engine in engines]
        pieces = self._known.of(sequence.id, sequence.prompt, whole=True)
        matched = [_leading(pieces, self._sent.get(e, set())) * self._known.tokens // self._block_size for e in engines]
        scores = [
            QUEUE_WEIGHT * queue
            + PREFIX_WEIGHT * prefix
            + (self._free_weight * engine.free if self._free_weight else 0)
            for queue, prefix, engine in zip(
                queue_scores(waiting), prefix_scores(matched, sequence.prompt // self._block_size), engines, strict=True
            )
        ]
        chosen = engines[scores.index(max(scores))]
        self._sent.setdefault(chosen, set()).update(pieces)
        return chosen


class Pull:
    """Requests wait in one queue until a replica has fewer unanswered ones than seats, and takes the oldest."""

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        raise NotImplementedError("replicas take requests, which nobody sends them")

    @staticmethod
    def taker(sequence: Sequence, engines: Seq[Replica]) -> tuple[int, Replica] | None:
        """Who takes the oldest request, and when; of those with room at once the least loaded, of equals the first."""
        found = []
        for place, engine in enumerate(engines):
            at_once = engine.outstanding(sequence.arrival_ns)
            if at_once < engine.seats:
                found.append((sequence.arrival_ns, at_once, place))
            elif engine.unanswered < engine.seats:
                found.append((engine.now, engine.unanswered, place))
        if not found:
            return None
        at_ns, _, place = min(found)
        return at_ns, engines[place]


def router_of(share: Share, pools: Seq[EnginePool], trace: Trace, *, computes: bool = True) -> Router:
    """The router of a share.

    Parameters
    ----------
    share, pools, trace
    computes : bool    whether the replicas compute prompts, rather than get them from others
    """
    if not share.routed:
        return Dealt(share.rows, share.places)
    if share.routing == "pull":
        return Pull()
    settings = pools[0].settings
    known = prefixes(share.routing, trace, settings.block_size, settings.max_model_len)
    if share.routing == "power_of_two":
        return PowerOfTwo(pairs(len(share.rows), share.last - share.first))
    if share.routing == "cache_aware":
        return CacheAware(known, RouterSettings())
    if share.routing == "dynamo":
        return Dynamo(known, settings.block_size, caching=settings.prefix_caching, computes=computes)
    if share.routing == "llm_d":
        return LlmD(known, settings.block_size)
    if share.routing == "llm_d_kv":
        return LlmD(known, settings.block_size, FREE_WEIGHT)
    return LeastLoaded()


def queue_scores(waiting: Seq[int]) -> list[Fraction]:
    """How short queues are, from 0 for the longest to 1 for the shortest; 1 for all where they are equal."""
    least, most = min(waiting), max(waiting)
    return [Fraction(most - its, most - least) if most > least else Fraction(1) for its in waiting]


def prefix_scores(matched: Seq[int], blocks: int) -> list[Fraction]:
    """The shares of a prompt's blocks that were sent before; 0 for a prompt without blocks."""
    return [Fraction(its, blocks) if blocks else Fraction(0) for its in matched]


def _leading(pieces: Seq[int], among: set[int]) -> int:
    """How many of the first pieces are among others."""
    return next((place for place, piece in enumerate(pieces) if piece not in among), len(pieces))


def _began(sequence: Sequence, at_ns: int) -> bool:
    return bool(sequence.token_ns) and sequence.token_ns[0] <= at_ns


def _ended(sequence: Sequence, at_ns: int) -> bool:
    return sequence.answered_ns is not None and sequence.answered_ns <= at_ns
