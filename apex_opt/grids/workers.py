"""Who works on the points of a study and on one large question: processes of this machine, or Ray's.

Both take functions and items, and give outcomes as they come. A worker that dies takes no other item with it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from apex_opt.errors import ApexError, InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    from apex_opt.search.spread import Kept

    _Put = tuple[int, Callable[[Any], Any], Any]

Item = TypeVar("Item")
Found = TypeVar("Found")

AHEAD: Final = 2
"""Items given out for each worker, so that none waits for the next one."""

RETRIES: Final = 3
"""How often Ray does an item again whose worker died."""

ANSWERS_WITHIN_S: Final = 2.0
HEALTHY_WITHIN_S: Final = 6.0
_DIED: Final = (
    "its process died, twice: killed, or out of memory; take fewer --workers. A Python script asks for workers below "
    'if __name__ == "__main__":'
)
_OBJECTS_BYTES: Final = 100 << 20


class Lost(Exception):
    """Why there is no outcome of an item: its worker died, and died again."""


class Workers(ABC):
    """Who works on items: takes them as they are put, and gives outcomes back as they come."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Items that are worked on at once."""

    @property
    @abstractmethod
    def in_hand(self) -> int:
        """Items put whose outcome was not taken yet."""

    @abstractmethod
    def put(self, function: Callable[[Any], Any], item: Any) -> int:
        """Have a function of the module work on an item; gives the number of its ticket."""

    @abstractmethod
    def take(self) -> tuple[int, Any]:
        """The ticket and the outcome, or a `Lost`, of an item that is done; waits for one."""

    @abstractmethod
    def keep(self, packed: bytes) -> Kept:
        """Bytes kept where every worker can load them, for items that have much in common."""

    @abstractmethod
    def close(self) -> None:
        """End the work."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def each(self, function: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[int, Found | Lost]]:
        """The place of each item and what a function of the module makes of it, in the order in which they are done."""
        todo, flying = deque(range(len(items))), dict[int, int]()
        while todo or flying:
            while todo and len(flying) < AHEAD * self.count:
                place = todo.popleft()
                flying[self.put(function, items[place])] = place
            ticket, found = self.take()
            if ticket in flying:  # what others had put before is of no use any more
                yield flying.pop(ticket), found


@dataclass(frozen=True, slots=True)
class _Sent:
    """Bytes that go with every item: no file is left behind, however the program ends."""

    whole: bytes

    def packed(self) -> bytes:
        return self.whole


class Processes(Workers):
    """Processes of this machine.

    Items that were in hand when a process died are done again one at a time: one whose process dies again is to blame.
    """

    def __init__(self, count: int) -> None:
        self._count, self._tickets = count, itertools.count()
        _clean_up_silently()
        self._pool = self._fresh()
        self._flying: dict[Future[Any], _Put] = {}
        self._waiting: deque[_Put] = deque()
        self._doubtful: deque[_Put] = deque()
        self._done: deque[tuple[int, Any]] = deque()
        self._alone = False

    def _fresh(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads that are in the middle of something
        return ProcessPoolExecutor(self._count, context, initializer=_attend)

    @property
    def count(self) -> int:
        return self._count

    @property
    def in_hand(self) -> int:
        return len(self._flying) + len(self._waiting) + len(self._doubtful) + len(self._done)

    def put(self, function: Callable[[Any], Any], item: Any) -> int:
        ticket = next(self._tickets)
        self._waiting.append((ticket, function, item))
        self._give_out()
        return ticket

    def take(self) -> tuple[int, Any]:
        while not self._done:
            self._give_out()
            done = wait(self._flying, return_when=FIRST_COMPLETED).done
            if any(isinstance(future.exception(), BrokenProcessPool) for future in done):
                self._mend()
            for future in done & self._flying.keys():
                (ticket, *_) = self._flying.pop(future)
                self._done.append((ticket, future.result()))
        return self._done.popleft()

    def keep(self, packed: bytes) -> Kept:
        return _Sent(packed)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _give_out(self) -> None:
        """Give waiting items to processes; while there are doubtful ones one of these, alone."""
        self._alone = bool(self._doubtful) if not self._flying else self._alone
        queue = self._doubtful if self._alone else self._waiting
        try:
            while queue and not (self._alone and self._flying):
                _, function, item = queue[0]
                self._flying[self._pool.submit(function, item)] = queue[0]
                queue.popleft()
        except BrokenProcessPool:
            self._mend()

    def _mend(self) -> None:
        """New processes in place of those of which one died; what was in hand is in doubt."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._fresh()
        for future, put in self._flying.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                self._done.append((put[0], future.result()))
            elif self._alone:
                self._done.append((put[0], Lost(_DIED)))
            else:
                self._doubtful.append(put)
        self._flying.clear()


def _clean_up_silently() -> None:
    """Start what cleans up after processes such that it does so without a word: after a signal it has some to do."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _attend() -> None:
    """In a worker: leave Ctrl-C to the program that gives out the work, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@dataclass(frozen=True, slots=True)
class _Object:
    """Bytes kept in Ray's store."""

    reference: Any

    def packed(self) -> bytes:
        import ray

        return bytes(ray.get(self.reference))


class RayTasks(Workers):
    """Tasks of Ray, on this machine ("local") or on a cluster; Ray itself does those again whose worker died.

    Raises
    ------
    UsageError    without the package
    InputError    an address that does not answer
    """

    def __init__(self, address: str, count: int | None) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--ray needs the package ray: pip install 'apex-opt[ray]'") from None
        self._ray: Any = ray
        self._tasks: dict[Callable[[Any], Any], Any] = {}
        self._flying: dict[Any, int] = {}
        self._tickets = itertools.count()
        # Ray prints what its nodes have to say to standard output, which is for the answer.
        self._aside = redirect_stdout(sys.stderr)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            ray.init(
                num_cpus=count or os.cpu_count(),
                include_dashboard=False,
                object_store_memory=_OBJECTS_BYTES,
                **quiet,
            )
        else:
            _check_answers(address)
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                text = " ".join(str(error).split())
                raise InputError(f"--ray: {address!r:.100} takes no connection ({text:.200})") from None

    @property
    def count(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))  # nodes come and go

    @property
    def in_hand(self) -> int:
        return len(self._flying)

    def put(self, function: Callable[[Any], Any], item: Any) -> int:
        if function not in self._tasks:
            self._tasks[function] = self._ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        ticket = next(self._tickets)
        self._flying[self._tasks[function].remote(item)] = ticket
        return ticket

    def take(self) -> tuple[int, Any]:
        errors = self._ray.exceptions
        (done, *_), _ = self._ray.wait(list(self._flying), num_returns=1)
        ticket = self._flying.pop(done)
        try:
            return ticket, self._ray.get(done)
        except errors.RayTaskError as error:
            if isinstance(error.cause, ApexError):
                raise error.cause from None
            cause = " ".join(str(error.cause or error).split())
            raise InputError(
                f"--ray: a worker cannot do its task ({cause:.300}); every node needs apex_opt of this release"
            ) from None
        except errors.RayError as error:
            text = " ".join(str(error).split())
            return ticket, Lost(f"its worker on Ray died, {RETRIES} times done again: {text:.200}")

    def keep(self, packed: bytes) -> Kept:
        return _Object(self._ray.put(packed))

    def __enter__(self) -> Self:
        self._aside.__enter__()
        return self

    def close(self) -> None:
        self._ray.shutdown()
        self._aside.__exit__(None, None, None)


def _check_answers(address: str) -> None:
    """Refuse an address at which no head of a Ray cluster answers within some seconds."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise UsageError(f"--ray: expected local or the HOST:PORT of the head of a cluster, got {address!r:.100}")
    hint = "; start one with: ray start --head --port=6379"
    try:
        socket.create_connection((host, int(port)), timeout=ANSWERS_WITHIN_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray: {address:.100} does not answer ({error}){hint}") from None
    # ray.init itself would wait for minutes where something else answers.
    words = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(words, capture_output=True, timeout=HEALTHY_WITHIN_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise InputError(f"--ray: what answers at {address:.100} is no head of a Ray cluster of this release{hint}")


def opened(address: str | None, count: int | None) -> Workers:
    """The workers that are asked for: Ray's where there is an address, else processes of this machine."""
    return Processes(count or os.cpu_count() or 1) if address is None else RayTasks(address, count)
