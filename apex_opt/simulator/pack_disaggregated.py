"""The door to the kernel for prefill and decode instances: lays out what they have beside replicas, and reads it."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.simulator.handover import prompts_only
from apex_opt.simulator.kernel import entries
from apex_opt.simulator.kernel import state as kn
from apex_opt.simulator.outcome import DisaggregatedOutcome, Outcome
from apex_opt.simulator.pack import Memory, number_pieces, served
from apex_opt.simulator.pack_router import router_memory
from apex_opt.simulator.pools import Share
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.stops import Stop
    from apex_opt.simulator.handover import Handover
    from apex_opt.simulator.pack import Room
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.workload.trace import Trace


def run(
    prefill: EnginePool,
    decode: EnginePool,
    handover: Handover,
    trace: Trace,
    sides: tuple[Share, Share],
    *,
    log: bool,
    gaps: bool,
    stops: Sequence[Stop] = (),
    floors: Outcome | None = None,
) -> DisaggregatedOutcome:
    """Run a trace through the kernel; see `apex_opt.simulator.api.run_disaggregated` for the parameters.

    Parameters
    ----------
    prefill, decode, handover, trace
    sides : how requests are dealt to the instances of either side
    log : bool     whether every batch is told
    gaps : bool    whether the times between tokens are told
    stops, floors : limits whose passing ends the run, and times that no request can beat
    """
    limits = stops, None if floors is None else _behind(floors)
    memory = served(lambda room: _Instances(prefill, decode, handover, trace, sides, limits, room), logged=log or gaps)
    return memory.outcome(log=log, gaps=gaps)


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


class _Instances(Memory):
    """The arrays of a run in which prompts are handed over."""

    def __init__(
        self,
        prefill: EnginePool,
        decode: EnginePool,
        handover: Handover,
        trace: Trace,
        sides: tuple[Share, Share],
        limits: tuple[Sequence[Stop], Outcome | None],
        room: Room | None,
    ) -> None:
        n = len(trace)
        closed = trace.concurrency is not None
        in_turn = not closed and all(share.places is None and not share.routed for share in sides)
        holding = [ceil_div(n, pool.replicas) if in_turn else n for pool in (prefill, decode)]
        super().__init__([prefill, decode], _twice(trace), (), *limits, room, holding)
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
        self._routers: kn.Routers | None = None
        if in_turn:
            self._deal(Share(0, min(prefill.replicas, n), np.arange(n), None, "round_robin", routed=False))
            self._passages[kn.PREFILL_OF] = np.arange(n) % prefill.replicas
        else:
            self._requests[[kn.FIRST, kn.FINISH]] = kn.NEVER  # until they are known
            self._routers = kn.Routers(*map(self._router, sides))
        ends = np.full(kn.END_SIZE * 2 * n, kn.NONE, np.int64)
        self._links = kn.Links(facts, instances.reshape(-1), ends, self._passages.reshape(-1))

    def _router(self, share: Share) -> NDArray[np.int64]:
        """The router before one side, which knows of the prompts and, behind them, of the answers."""
        twice = None if share.places is None else np.tile(share.places, 2)
        settings = self._pools[0].settings
        share = share._replace(places=twice)
        return router_memory(share, settings, self._trace, number_pieces, computes=not share.first)

    def serve(self) -> None:
        """Run the kernel."""
        entry = entries.DISAGGREGATED[self._routers is not None, self._cache is not None]
        entry(self.run, self._cache, self._links, self._routers)

    def outcome(self, *, log: bool, gaps: bool) -> DisaggregatedOutcome:
        """What came of the run."""
        found = super().outcome(log=log, gaps=gaps)
        n, passages, replicas = len(self._asked), self._passages, self._replicas
        base = {field.name: getattr(found, field.name) for field in fields(Outcome)}
        blocks = np.repeat([pool.blocks for pool in self._pools], [pool.replicas for pool in self._pools])
        base |= {
            "arrival_ns": self._asked.arrival_ns if self._routers is None else passages[kn.CAME],
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
