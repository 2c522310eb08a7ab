"""What stands before data-parallel ranks: front ends that choose a rank, and the coordinator that tells them of loads.

Source: `DPCoordinatorProc.process_input_socket` and `DPLBAsyncMPClient` of vLLM 0.20.2, in our own words; settled by
recorded runs.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from apex_opt.simulator.ranks import Ranks
    from apex_opt.simulator.reference.sequence import Sequence

NS_PER_MS: Final = 1_000_000
LEAST_WAIT_MS: Final = 50  # of the coordinator for counts of the same step from other ranks
CHANGED_MS, UNCHANGED_MS = 100, 5000  # between publications, where counts changed and where not


class Inbox:
    """Messages in the order of their delivery, of equals as they were sent."""

    def __init__(self) -> None:
        self._coming: list[tuple[int, int, Any]] = []
        self._sent = 0

    def put(self, at_ns: int, message: Any) -> None:
        """A message that is delivered then."""
        heapq.heappush(self._coming, (at_ns, self._sent, message))
        self._sent += 1

    def due(self) -> int | None:
        """When the next message is delivered."""
        return self._coming[0][0] if self._coming else None

    def ready(self, now_ns: int) -> bool:
        """Whether a message has been delivered."""
        return bool(self._coming) and self._coming[0][0] <= now_ns

    def take(self) -> Any:
        """The first message."""
        return heapq.heappop(self._coming)[2]


class Process:
    """Code that runs until it has to wait, and then tells from when on it can go on: None where that is not known."""

    def __init__(self) -> None:
        self._wait: Callable[[], int | None] = lambda: 0
        self._run = self.run()

    def run(self) -> Iterator[Callable[[], int | None]]:
        """All that it does; it yields what it waits for."""
        raise NotImplementedError

    def due(self) -> int | None:
        """When it can go on."""
        return self._wait()

    def act(self) -> None:
        """Go on until the next wait."""
        self._wait = next(self._run)


class Request(NamedTuple):
    """A request on its way to a rank, stamped with the wave that its front end knows."""

    sequence: Sequence
    wave: int


class Start(NamedTuple):
    """A wave starts; the excluded rank has a request and starts by itself."""

    wave: int
    excluded: int | None


class Counts(NamedTuple):
    """Requests waiting and running on a rank, as of a step of a wave."""

    rank: int
    wave: int
    step: int
    waiting: int
    running: int


class Ended(NamedTuple):
    """A wave ended."""

    wave: int


class Wanted(NamedTuple):
    """A rank has a request of a wave that has ended, and so started the next one."""

    rank: int
    wave: int


class Known(NamedTuple):
    """What the coordinator publishes: loads of all ranks or None, the wave, and whether ranks run."""

    counts: list[list[int]] | None
    wave: int
    running: bool


class Around(Protocol):
    """The group that coordinator and front ends belong to."""

    now: int
    ranks: Ranks
    publications: list[tuple[int, list[list[int]]]]
    waves_started: list[tuple[int, int, int | None]]

    def publish(self, known: Known) -> None:
        """Send to all front ends."""
        ...

    def start(self, start: Start) -> None:
        """Send to all ranks."""
        ...

    def send(self, sequence: Sequence, rank: int, wave: int) -> None:
        """Send a request to a rank.

        Parameters
        ----------
        sequence : Sequence    the request
        rank : int
        wave : int             that its front end knows
        """
        ...

    def first_request(self, rank: int, wave: int) -> None:
        """Tell the coordinator that a request was sent to ranks that do not run."""
        ...


class Coordinator(Process):
    """Gathers the ranks' loads, publishes them from time to time, and starts and ends waves."""

    def __init__(self, group: Around) -> None:
        self._group = group
        self.from_front, self.from_ranks = Inbox(), Inbox()
        self._live = [[0, 0] for _ in range(group.ranks.count)]
        self._aside: list[list[int]] | None = None
        self._changed = self._running = False
        self._wave = 0
        self._newest = (-1, -1)
        super().__init__()

    def run(self) -> Iterator[Callable[[], int | None]]:
        group, published_ms = self._group, None
        while True:
            floor = 0 if self._aside is not None else LEAST_WAIT_MS
            wait = floor
            if published_ms is not None:
                interval = CHANGED_MS if self._changed else UNCHANGED_MS
                wait = max(floor, interval - (group.now // NS_PER_MS - published_ms))
            deadline = group.now + wait * NS_PER_MS
            if not self._ready():
                yield lambda until=deadline: min(until, *self._coming(until))  # type: ignore[misc]
            if not self._ready():
                self._publish()
                published_ms = group.now // NS_PER_MS
            elif self._hear():
                group.publish(Known(None, self._wave, self._running))

    def _ready(self) -> bool:
        return self.from_front.ready(self._group.now) or self.from_ranks.ready(self._group.now)

    def _coming(self, until: int) -> tuple[int, int]:
        front, ranks = self.from_front.due(), self.from_ranks.due()
        return until if front is None else front, until if ranks is None else ranks

    def _publish(self) -> None:
        """Publish the loads set aside, or else the live ones."""
        counts = self._aside
        if counts is None:
            counts = [list(pair) for pair in self._live]
            self._changed = False
        self._aside = None
        self._group.publications.append((self._group.now, counts))
        self._group.publish(Known(counts, self._wave, self._running))

    def _hear(self) -> bool:
        """Take in one message from the front ends and one from the ranks; whether wave or running changed."""
        changed = False
        if self.from_front.ready(self._group.now):
            rank, wave = self.from_front.take()
            if self._group.ranks.in_step and not self._running:
                # A request stamped with an earlier wave does not start its rank by itself.
                self._start(self._wave, None if wave < self._wave else rank)
                changed = True
        if self.from_ranks.ready(self._group.now):
            message = self.from_ranks.take()
            if isinstance(message, Counts):
                self._store(message)
            elif isinstance(message, Ended):
                if self._wave <= message.wave:
                    self._wave, self._running, changed = message.wave + 1, False, True
            elif message.wave > self._wave or (message.wave == self._wave and not self._running):
                self._start(message.wave, message.rank)
                changed = True
        return changed

    def _start(self, wave: int, excluded: int | None) -> None:
        self._wave, self._running = wave, True
        self._group.waves_started.append((self._group.now, wave, excluded))
        self._group.start(Start(wave, excluded))

    def _store(self, counts: Counts) -> None:
        """Loads of a rank; those of the step before are set aside when the first of a later step come."""
        if (counts.wave, counts.step) > self._newest:
            if self._changed:
                self._aside = [list(pair) for pair in self._live]
            self._newest = counts.wave, counts.step
        self._live[counts.rank] = [counts.waiting, counts.running]
        self._changed = True


class FrontEnd:
    """Takes in requests and sends each to a rank, by the loads it knows of."""

    def __init__(self, group: Around, index: int) -> None:
        self._group = group
        self.news = Inbox()
        self._first: tuple[int, int] | None = None  # when, and the rank, of a request sent to ranks that do not run
        ranks = group.ranks
        self.loads = [[0, 0] for _ in range(ranks.count)]
        self._from = ranks.count * index // ranks.front_ends
        self._wave, self._running = 0, False

    def arrive(self, sequence: Sequence, place: int | None) -> None:
        """Send a request to a rank: to that at its place, or to the one with the least load."""
        rank = self._least_loaded() if place is None else place
        self._group.send(sequence, rank, self._wave)
        if not self._running:
            self._first = self._group.now, rank

    def _least_loaded(self) -> int:
        """The rank with the least load; those sent since the last publication count as those of all front ends."""
        count = len(self.loads)
        order = [(self._from + step) % count for step in range(count)]
        rank = min(order, key=lambda r: 4 * self.loads[r][0] + self.loads[r][1])
        self.loads[rank][0] += self._group.ranks.front_ends
        return rank

    def due(self) -> int | None:
        """When it has something to handle."""
        times = [t for t in (self.news.due(), self._first and self._first[0]) if t is not None]
        return min(times, default=None)

    def act(self) -> None:
        """Handle what has been delivered: of publications the last."""
        while (news := self.news.ready(self._group.now)) or self._first is not None:
            if self._first is not None and (not self._running or not news):
                rank, self._first = self._first[1], None
                self._running = True
                self._group.first_request(rank, self._wave)
            known: Known | None = None
            while self.news.ready(self._group.now):
                known = self.news.take()
            if known is not None:
                self._wave, self._running = known.wave, known.running
                if known.counts is not None:
                    self.loads = [list(pair) for pair in known.counts]
