"""The door to the kernel for prefill and decode instances: lays out what they have beside replicas, and reads it."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from apex_opt.simulator.handover import prompts_only
from apex_opt.simulator.kernel import entries
from apex_opt.simulator.kernel import state as kn
from apex_opt.simulator.outcome import DisaggregatedOutcome, Outcome
from apex_opt.simulator.pack.blocks import number_pieces
from apex_opt.simulator.pack.engines import engine_of
from apex_opt.simulator.pack.memory import Memory
from apex_opt.simulator.pack.router import router_memory
from apex_opt.simulator.pack.run import served
from apex_opt.simulator.pools import Share
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.stops import Stop
    from apex_opt.simulator.handover import Handover
    from apex_opt.simulator.pack.memory import Room
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.workload.trace import Trace

    I64 = NDArray[np.int64]


class Asked(NamedTuple):
    """What a run in which prompts are handed over is made of.

    Parameters
    ----------
    prefill, decode, handover, trace : as of `apex_opt.simulator.api.run_disaggregated`
    sides : how requests are dealt to the instances of either side
    limits : limits whose passing ends the run, and times of prompts and answers that none can beat
    """

    prefill: EnginePool
    decode: EnginePool
    handover: Handover
    trace: Trace
    sides: tuple[Share, Share]
    limits: tuple[Sequence[Stop], Outcome | None] = ((), None)

    def ending(self, stops: Sequence[Stop], floors: Outcome | None) -> Asked:
        """The same, which ends once a limit is passed; `floors` are times that no request can beat."""
        return self._replace(limits=(stops, None if floors is None else _behind(floors)))


def run(asked: Asked, *, log: bool, gaps: bool) -> DisaggregatedOutcome:
    """Run a trace through the kernel.

    Parameters
    ----------
    asked : Asked
    log : bool     whether every batch is told
    gaps : bool    whether the times between tokens are told
    """
    if Apart.takes(asked):
        apart = served(partial(Apart, asked), logged=log or gaps)
        if apart.never_full():
            return apart.outcome(log=log, gaps=gaps)
    return served(partial(Together, asked), logged=log or gaps).outcome(log=log, gaps=gaps)


@lru_cache(maxsize=4)
def _twice(trace: Trace) -> Trace:
    """The prompts of a trace, and behind them their answers, which come when they are handed over."""
    prompts, n = prompts_only(trace), len(trace)
    content, starts = trace.content, trace.content_starts
    if content is not None and starts is not None:
        content, starts = np.tile(content, 2), np.append(starts, starts[1:] + len(content))
    arrival = np.append(trace.arrival_ns, np.full(n, trace.arrival_ns[-1]))
    prompt, output = np.tile(trace.prompt, 2), np.append(prompts.output, trace.output)
    for column in (arrival, prompt, output, content, starts):
        if column is not None:
            column.flags.writeable = False
    return replace(
        trace,
        arrival_ns=arrival,
        prompt=prompt,
        output=output,
        content=content,
        content_starts=starts,
        max_new_tokens=None,
        concurrency=None,
        pause_ns=0,
        session=None,
        priority=None,
        delay_ns=None,
    )


def _behind(floors: Outcome) -> Outcome:
    """Times that no answer can beat, behind those of prompts, which have no limits."""
    arrival = floors.arrival_ns
    return replace(
        floors,
        arrival_ns=np.tile(arrival, 2),
        first_token_ns=np.append(arrival, floors.first_token_ns),
        finish_ns=np.append(arrival, floors.finish_ns),
    )


class Instances(Memory):
    """The arrays of a run in which prompts are handed over.

    Parameters
    ----------
    asked : Asked
    room : Room or None                of a log
    shares, more : as of `Memory`
    """

    def __init__(self, asked: Asked, room: Room | None, shares: Sequence[Share] = (), **more: Any) -> None:
        prefill, decode, handover, trace, _, limits = asked
        n = len(trace)
        super().__init__([prefill, decode], _twice(trace), shares, *limits, room, **more)
        self.run.control[kn.HANDED] = n
        if limits[0]:
            self.run.floors[:n] = trace.arrival_ns  # of prompts, which have no limits
        self._asked = trace
        self._replicas[: prefill.replicas, kn.HOLDS] = 1
        facts = np.zeros(kn.FACTS_SIZE, np.int64)
        facts[[kn.REQUESTS, kn.PREFILLS, kn.DECODES]] = n, prefill.replicas, decode.replicas
        facts[[kn.PROXY_NS, kn.READ_NS, kn.BLOCK_NS]] = handover.proxy_ns, handover.read_ns, handover.block_ns
        facts[[kn.NOTICE_NS, kn.IN_TURN]] = handover.notice_ns, handover.in_turn
        facts[[kn.KNOWN_TO_COME, kn.CLIENT_NS]] = min(trace.concurrency or n, n), trace.pause_ns
        instances = np.zeros((len(self._replicas), kn.INSTANCE_SIZE), np.int64)
        instances[:, [kn.FIRST_END, kn.LAST_END]] = kn.NONE
        instances[:, kn.SOONEST] = kn.NEVER
        self._passages = np.full((kn.PASSAGE_SIZE, n), kn.NONE, np.int64)
        self._ends = np.full((kn.END_SIZE, 2 * n), kn.NONE, np.int64)
        self._links = kn.Links(facts, instances.reshape(-1), self._ends.reshape(-1), self._passages.reshape(-1))

    @property
    def _arrival_ns(self) -> I64:
        """When requests came."""
        return self._asked.arrival_ns

    def outcome(self, *, log: bool, gaps: bool) -> DisaggregatedOutcome:
        """What came of the run."""
        found = super().outcome(log=log, gaps=gaps)
        n, passages, replicas = len(self._asked), self._passages, self._replicas
        base = {field.name: getattr(found, field.name) for field in fields(Outcome)}
        blocks = np.repeat([pool.blocks for pool in self._pools], [pool.replicas for pool in self._pools])
        base |= {
            "arrival_ns": self._arrival_ns,
            "first_token_ns": found.first_token_ns[n:],
            "finish_ns": found.finish_ns[n:],
            "steps": found.steps
            and [
                (start, end, [(i % n, c, held) for i, c, held in rows], [i % n for i in lost])
                for start, end, rows, lost in found.steps
            ],
        }
        return DisaggregatedOutcome(
            **base,
            prefill=passages[kn.PREFILL_OF],
            decode=passages[kn.DECODE_OF],
            prefilled_ns=found.finish_ns[:n],
            forwarded_ns=found.arrival_ns[n:],
            read_ns=passages[[kn.READ_START, kn.READ_END]].T,
            read_blocks=passages[kn.READ_BLOCKS],
            held=blocks - replicas[:, kn.FREE],
            preemptions_of=replicas[:, kn.PREEMPTIONS],
        )


class Together(Instances):
    """Instances that act one after the other, as each is due."""

    def __init__(self, asked: Asked, room: Room | None, **more: Any) -> None:
        prefill, decode, _, trace, sides, _ = asked
        n = len(trace)
        closed = trace.concurrency is not None
        in_turn = not closed and all(share.places is None and not share.routed for share in sides)
        holding = [ceil_div(n, pool.replicas) if in_turn else n for pool in (prefill, decode)]
        super().__init__(asked, room, holding=holding, **more)
        self._routers: kn.Routers | None = None
        if in_turn:
            self._deal(Share(0, min(prefill.replicas, n), np.arange(n), None, "round_robin", routed=False))
            self._passages[kn.PREFILL_OF] = np.arange(n) % prefill.replicas
        else:
            self._requests[[kn.FIRST, kn.FINISH]] = kn.NEVER  # until they are known
            self._routers = kn.Routers(*map(self._router, sides))

    def _router(self, share: Share) -> I64:
        """The router before one side, which knows of the prompts and, behind them, of the answers."""
        twice = None if share.places is None else np.tile(share.places, 2)
        settings = self._pools[0].settings
        share = share._replace(places=twice)
        blocks = self._pools[1 if share.first else 0].blocks
        return router_memory(share, settings, self._trace, number_pieces, blocks=blocks, computes=not share.first)

    @property
    def _arrival_ns(self) -> I64:
        return super()._arrival_ns if self._routers is None else self._passages[kn.CAME]

    def serve(self) -> None:
        """Run the kernel."""
        entry = entries.DISAGGREGATED[self._routers is not None, self._cache is not None]
        entry(self.run, self._cache, self._links, self._routers)


class Apart(Instances):
    """Prefill instances, then decode instances that are handed what these have computed.

    So they run where a prompt never has to wait for blocks that are held until others are read, which is seen once all
    is done.
    """

    def __init__(self, asked: Asked, room: Room | None, **more: Any) -> None:
        self._sides = asked.sides
        beside = asked.sides[1]._replace(routed=True)  # as decode instances advance together
        super().__init__(asked, room, [asked.sides[0], beside], **more)

    @staticmethod
    def takes(asked: Asked) -> bool:
        """Whether it is known beforehand where requests go, and both sides run by the steady engine."""
        dealt = asked.trace.concurrency is None and not any(share.routed for share in asked.sides)
        pools = asked.prefill, asked.decode
        return dealt and all(engine_of(pool.settings, len(pool.laws)) == "steady" for pool in pools)

    def serve(self) -> None:
        """Run the kernel, which begins with the prompts."""
        (first, then), n = self._sides, len(self._asked)
        self._deal(first)
        self._passages[kn.PREFILL_OF] = places_of(first)
        self._serve(0, 0, first.last, np.zeros(0, np.int64))
        rows = np.concatenate([first.dealt(place) for place in range(first.last)])
        computed_ns = self._requests[kn.FINISH]
        order = rows[np.argsort(computed_ns[rows], kind="stable")]
        self._requests[kn.ARRIVAL, n:] = computed_ns[:n] + self._links.facts[kn.PROXY_NS]
        then = then._replace(rows=order + n, places=None if then.places is None else then.places[order])
        self._deal(then)
        self._passages[kn.DECODE_OF, order] = places_of(then)
        entries.APART(self.run, self._links)

    def never_full(self) -> bool:
        """Whether no prompt had to wait for blocks that are held until they are read."""
        (pool, _), n = self._pools, len(self._asked)
        needed = (self._asked.prompt + pool.settings.block_size - 1) // pool.settings.block_size
        told_ns = self._ends[kn.END_AT, :n]
        told_ns = np.where(told_ns < 0, kn.NEVER, told_ns)  # of a run that was ended
        until_ns = int(self._replicas[pool.replicas :, kn.NOW].max())
        for place in range(pool.replicas):
            mine = self._sides[0].dealt(place)
            if not len(mine):
                continue
            its, computed_ns = needed[mine], self._requests[kn.FINISH, mine]
            ahead = int(pool.settings.async_scheduling)
            if its.sum() > pool.blocks < most_held(its, computed_ns, told_ns[mine], until_ns, ahead):
                return False
            last_ns = computed_ns[-1]  # when an instance hears for the last time
            unheard = (told_ns[mine] > last_ns) | (self._passages[kn.ORDERED, mine] >= last_ns)
            self._replicas[place, kn.FREE] -= int(its[unheard].sum())
        return True


def most_held(needed: I64, computed_ns: I64, told_ns: I64, until_ns: int, ahead: int) -> int:
    """Blocks that a prefill instance needs at most so that none of its prompts waits for what is held.

    All that is known of its batches is when those ended that computed the last of a prompt. A notice is heard at the
    latest with the second of them that ends after it; a prompt is admitted at the earliest with the one that computes
    the prompt before it. With asynchronous scheduling one more batch lies between in either case, as a batch is formed
    before the one ahead of it is taken in.

    Parameters
    ----------
    needed, computed_ns, told_ns : int64[prompts]
        in the order in which they are computed, as if nothing were held: the blocks of each, when it was computed, and
        from when on its instance can hear that they were read
    until_ns : int    admissions after it do not count
    ahead : int       batches that are formed before the oldest is taken in

    Returns
    -------
    int    at least as many as are in use at any admission
    """
    firsts = np.flatnonzero(np.append(True, np.diff(computed_ns) > 0))  # of each batch
    ends_ns, admitted = computed_ns[firsts], np.append(firsts + 1, len(needed) + 1)  # with each batch or later
    heard = np.searchsorted(ends_ns, told_ns, "right") + 2 + 2 * ahead
    given_back = np.bincount(admitted[np.minimum(heard, len(firsts))], needed, len(needed) + 2)
    late = np.searchsorted(ends_ns, until_ns, "right") + 1 + ahead
    held = np.cumsum(needed - given_back[: len(needed)])
    return int(held[: int(admitted[min(int(late), len(firsts))])].max())


def places_of(share: Share) -> I64:
    """The replica of each request of a share, counted from its first."""
    if share.places is not None:
        return share.places
    count = share.last - share.first
    return np.arange(len(share.rows)) % count if count > 1 else np.zeros(len(share.rows), np.int64)
