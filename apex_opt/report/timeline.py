"""A simulated run as a timeline in the Chrome trace format, for Perfetto (ui.perfetto.dev) or chrome://tracing.

Source of the format: "Trace Event Format", Google, 2016: complete events "X", counters "C", names "M"; times in µs.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from apex_opt.outputs import written
from apex_opt.units import NS_PER_US

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.law import BatchLaw
    from apex_opt.simulator.outcome import Outcome, Step

Event = dict[str, Any]


def timeline_events(outcome: Outcome, laws: Sequence[BatchLaw], settings: EngineSettings) -> Iterator[Event]:
    """Events of a run that kept its batches.

    Parameters
    ----------
    outcome : Outcome        from `simulate(..., log=True)`
    laws : BatchLaw of each stage, by which the run was made
    settings : EngineSettings    of its engines

    Yields
    ------
    One process per replica, or per rank where it has such, one thread per stage with its batches, named by their share
    of prompt tokens so that viewers colour them by it, and two counters: sequences that wait, and KV blocks that the
    computed tokens of running ones fill (a block that several share counts for each).
    """
    assert outcome.steps is not None and outcome.steps_per_replica is not None
    if outcome.groups:
        yield from _of_ranks(outcome, settings)
        return
    position = 0
    for replica, count in enumerate(outcome.steps_per_replica):
        steps = outcome.steps[position : position + count]
        position += count
        yield {"ph": "M", "name": "process_name", "pid": replica, "args": {"name": f"replica {replica}"}}
        for stage in range(len(laws)):
            yield {"ph": "M", "name": "thread_name", "pid": replica, "tid": stage, "args": {"name": f"stage {stage}"}}
        yield from _batches(replica, steps, laws)
        yield from _counters(replica, steps, outcome, settings)


def _of_ranks(outcome: Outcome, settings: EngineSettings) -> Iterator[Event]:
    """Events of replicas with ranks: a batch lasts as long as the forward it is a part of, on all stages together."""
    position = process = 0
    for replica, group in enumerate(outcome.groups):
        for rank, count in enumerate(group.batches):
            steps = (outcome.steps or [])[position : position + count]
            position += count
            name = f"replica {replica} rank {rank}"
            yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
            yield {"ph": "M", "name": "thread_name", "pid": process, "tid": 0, "args": {"name": "forwards"}}
            began = {end: start for start, end, *_ in group.forwards[rank if len(group.forwards) > 1 else 0]}
            for number, (_, end, rows, preempted) in enumerate(steps):
                yield _batch(process, 0, number, began[end], end, [c for _, c, _ in rows], preempted)
            yield from _counters(process, steps, outcome, settings)
            process += 1


def _batch(
    process: int, stage: int, number: int, begin: int, end: int, tokens: Sequence[int], preempted: Sequence[int]
) -> Event:
    """A complete event for a batch on a stage."""
    prompt = sum(c for c in tokens if c > 1)
    share = 25 * round(4 * prompt / sum(tokens))
    facts: Event = {
        "batch": number,
        "sequences": len(tokens),
        "tokens": sum(tokens),
        "prompt tokens": prompt,
    }
    return {
        "ph": "X",
        "name": "decode" if prompt == 0 else f"{max(share, 25)}% prefill",
        "pid": process,
        "tid": stage,
        "ts": begin / NS_PER_US,
        "dur": (end - begin) / NS_PER_US,
        "args": facts | ({"preempted": preempted} if preempted else {}),
    }


def _batches(replica: int, steps: Sequence[Step], laws: Sequence[BatchLaw]) -> Iterator[Event]:
    """A complete event for every batch on every stage."""
    stage_free = [0] * len(laws)
    for number, (start, _, rows, preempted) in enumerate(steps):
        chunks = [(tokens, computed) for _, tokens, computed in rows]
        tokens = [c for c, _ in chunks]
        end = start
        for stage, law in enumerate(laws):
            begin = max(end, stage_free[stage])
            end = stage_free[stage] = begin + law.batch_ns(chunks)
            yield _batch(replica, stage, number, begin, end, tokens, preempted)
            end += int(law.transfer_ns[sum(tokens)])


def _counters(replica: int, steps: Sequence[Step], outcome: Outcome, settings: EngineSettings) -> Iterator[Event]:
    """Waiting sequences and held blocks whenever a batch is formed; none once all is done."""
    for time_ns, waiting, _, held in load(steps, outcome.arrival_ns, outcome.finish_ns, settings):
        time = time_ns / NS_PER_US
        yield {"ph": "C", "name": "waiting", "pid": replica, "ts": time, "args": {"sequences": waiting}}
        yield {"ph": "C", "name": "KV blocks", "pid": replica, "ts": time, "args": {"held": held}}


def load(
    steps: Sequence[Step], arrival_ns: NDArray[np.int64], end_ns: NDArray[np.int64], settings: EngineSettings
) -> Iterator[tuple[int, int, int, int]]:
    """What a scheduler has to do, whenever it forms a batch and once all is done.

    Parameters
    ----------
    steps : of this scheduler
    arrival_ns, end_ns : int64[requests]    when a request comes to it and when it lets it go
    settings : EngineSettings

    Yields
    ------
    Time in ns, sequences that wait, sequences in the batch, and KV blocks that the computed tokens of running ones fill
    """
    mine = sorted({i for _, _, rows, _ in steps for i, _, _ in rows})
    arrivals = sorted((int(arrival_ns[i]), i) for i in mine)
    endings = sorted((int(end_ns[i]), i) for i in mine)
    waiting: set[int] = set()
    held: dict[int, int] = {}
    arrived = ended = 0
    for start, _, rows, preempted in steps:
        while arrived < len(arrivals) and arrivals[arrived][0] <= start:
            waiting.add(arrivals[arrived][1])
            arrived += 1
        while ended < len(endings) and endings[ended][0] <= start:
            waiting.discard(endings[ended][1])
            held.pop(endings[ended][1], None)
            ended += 1
        for i in preempted:
            held.pop(i, None)
            waiting.add(i)
        for i, _, _ in rows:
            waiting.discard(i)
        _, tokens, computed = np.array(rows, np.int64).reshape(-1, 3).T
        blocks = settings.held_blocks(computed, computed - tokens)
        held |= zip((i for i, _, _ in rows), blocks.tolist(), strict=True)
        yield start, len(waiting), len(rows), sum(held.values())
    if steps:
        yield steps[-1][1], 0, 0, 0


def write_timeline(path: Path, outcome: Outcome, laws: Sequence[BatchLaw], settings: EngineSettings) -> None:
    """Write a run's timeline; the file appears whole or not at all.

    Parameters
    ----------
    path : Path         of the file
    outcome, laws
    settings : EngineSettings    of the engines

    Raises
    ------
    InputError    a path that cannot be written
    """
    with written(path, "timeline") as file:
        file.write(b'{"displayTimeUnit": "ms", "traceEvents": [')
        for number, event in enumerate(timeline_events(outcome, laws, settings)):
            file.write(b",\n" if number else b"\n")
            file.write(json.dumps(event, separators=(",", ":")).encode())
        file.write(b"\n]}\n")
