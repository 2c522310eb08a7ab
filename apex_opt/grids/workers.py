"""Who works on the points of a study: processes of this machine, or Ray's.

Both take a function and items, and give outcomes as they come. A worker that dies takes no other item with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, Final, Protocol, Self, TypeVar

from apex_opt.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

Item = TypeVar("Item")
Found = TypeVar("Found")

AHEAD: Final = 2
"""Items given out for each worker, so that none waits for the next one."""

RETRIES: Final = 3
"""How often Ray does an item again whose worker died."""

ANSWERS_WITHIN_S: Final = 2.0
HEALTHY_WITHIN_S: Final = 7.0
_OBJECTS_BYTES: Final = 100 << 20


class Lost(Exception):
    """Why there is no outcome of an item: its worker died, and died again."""


class Workers(Protocol):
    """Who works on items."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def each(self, function: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[int, Found | Lost]]:
        """The place of each item and what a function of the module makes of it, in the order in which they are done."""
        ...


class Processes:
    """Processes of this machine.

    Items that were in hand when a process died are done again one at a time: one whose process dies again is to blame.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool = self._fresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _fresh(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a fork would copy threads that are in the middle of something
        return ProcessPoolExecutor(self._count, context, initializer=_attend)

    def each(self, function: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[int, Found | Lost]]:
        todo, doubtful = deque(range(len(items))), deque[int]()
        while todo or doubtful:
            alone = bool(doubtful)
            queue, most = (doubtful, 1) if alone else (todo, AHEAD * self._count)
            flying: dict[Future[Found], int] = {}
            try:
                while queue or flying:
                    while queue and len(flying) < most:
                        flying[self._pool.submit(function, items[queue[0]])] = queue[0]
                        queue.popleft()
                    for future in wait(flying, return_when=FIRST_COMPLETED).done:
                        found = future.result()
                        yield flying.pop(future), found
            except BrokenProcessPool:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = self._fresh()
                for future, place in flying.items():
                    if future.done() and not future.cancelled() and future.exception() is None:
                        yield place, future.result()
                    elif alone:
                        yield place, Lost("its process died, twice: killed, or out of memory; take fewer --workers")
                    else:
                        doubtful.append(place)


def _attend() -> None:
    """In a worker: leave Ctrl-C to the program that gives out the work, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


class RayTasks:
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

    def __enter__(self) -> Self:
        self._aside.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()
        self._aside.__exit__(None, None, None)

    def each(self, function: Callable[[Item], Found], items: Sequence[Item]) -> Iterator[tuple[int, Found | Lost]]:
        ray = self._ray
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        todo: deque[int] = deque(range(len(items)))
        flying: dict[Any, int] = {}
        while todo or flying:
            most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))  # nodes come and go
            while todo and len(flying) < most:
                place = todo.popleft()
                flying[task.remote(items[place])] = place
            done, _ = ray.wait(list(flying), num_returns=1)
            for reference in done:
                place = flying.pop(reference)
                try:
                    yield place, ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    cause = " ".join(str(error.cause or error).split())
                    raise InputError(
                        f"--ray: a worker cannot do its task ({cause:.300}); every node needs apex_opt of this release"
                    ) from None
                except ray.exceptions.RayError as error:
                    text = " ".join(str(error).split())
                    yield place, Lost(f"its worker on Ray died, {RETRIES} times done again: {text:.200}")


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
