"""Steps of a measured run against the batch law: the schedule is the measured one, so only the law is judged.

vLLM's log tells of each step when its tokens were out and how many requests got one. Who they were follows from the
requests' own times, and with them the context that each step read; which prompts were cut follows from the token
budget, as vLLM fills it with whoever came first.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.measured.runs import Iterations
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.law import BatchLaw

_ENTRY_S: Final = 0.005
"""Within so many seconds after it was sent, a request may not have reached the scheduler yet."""

_FULL_CACHE: Final = 0.98
"""Share of the KV cache from which on it may be the cache that keeps a prompt waiting."""

Chunks = list[tuple[int, int]]
"""(tokens, tokens held once the step is done) of every sequence of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Steps of one kind and size: their number, and their time as measured and by the law.

    Parameters
    ----------
    kind : str                         "decode" (every sequence one token) or "mixed" (with a prompt)
    least, most : int                  sequences (decode) or tokens (mixed) of these steps
    steps : int
    measured_s, predicted_s : float    summed over the steps
    """

    kind: str
    least: int
    most: int
    steps: int
    measured_s: float
    predicted_s: float


def step_times(iterations: Iterations, settings: EngineSettings, law: BatchLaw) -> tuple[tuple[StepTimes, ...], int]:
    """Times of the steps that can be told, by kind and size, and the number of steps that cannot.

    Left out are steps that an idle engine began with, whose time holds the wait for them, and those of which it is
    open whether they hold a part of a prompt. A step takes from the end of the one before to its own end.

    Parameters
    ----------
    iterations : Iterations    of the log
    settings, law
    """
    steps = list(_Log(iterations, settings).told())
    spent = np.array([spent_s for _, _, spent_s in steps])
    law_s = np.array([law.batch_ns(chunks) / NS_PER_S for _, chunks, _ in steps])
    decode = np.array([all(count == 1 for count, _ in chunks) for _, chunks, _ in steps], bool)
    number = np.array([step for step, _, _ in steps])
    # The host launches a mixed step before it notes the end of the step before, so that this one seems to take longer
    # and the mixed one shorter. It is given what the run's other decode steps take.
    before = np.flatnonzero(decode[:-1] & ~decode[1:] & (np.diff(number) == 1))
    other = decode.copy()
    other[before] = False
    if other.any():
        usual = law_s[before] * spent[other].sum() / law_s[other].sum()
        spent[before + 1] += spent[before] - usual
        spent[before] = usual
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for (_, chunks, _), decodes, measured, predicted in zip(steps, decode, spent, law_s, strict=True):
        size = len(chunks) if decodes else sum(count for count, _ in chunks)
        key = ("decode" if decodes else "mixed", (size - 1).bit_length())
        found.setdefault(key, []).append((float(measured), float(predicted)))
    times = tuple(
        StepTimes(
            kind=kind,
            least=(1 << bits - 1) + 1 if bits else 1,
            most=1 << bits,
            steps=len(pairs),
            measured_s=sum(measured for measured, _ in pairs),
            predicted_s=sum(predicted for _, predicted in pairs),
        )
        for (kind, bits), pairs in sorted(found.items())
    )
    return times, len(iterations.log) - sum(part.steps for part in times)


class _Log:
    """The state of the engine while its log is read.

    `_decoding` maps those that have their first token and not yet their last to the tokens they hold, `_computed`
    those whose prompt was cut to the tokens computed of it; of `_doubtful` a part may have been computed unseen.
    """

    def __init__(self, iterations: Iterations, settings: EngineSettings) -> None:
        self._log, requests = iterations.log, iterations.requests
        self._settings = settings
        ends = self._log[:, 0]
        # A token reaches its client some tens of microseconds after the step that made it was logged.
        self._begun: list[int] = (np.searchsorted(ends, requests[:, 1], side="right") - 1).tolist()
        self._done: list[int] = (np.searchsorted(ends, requests[:, 2], side="right") - 1).tolist()
        self._came: list[float] = requests[:, 0].tolist()
        self._prompt: list[int] = requests[:, 3].astype(np.int64).tolist()
        # Those without a token, the next to get its first one last.
        self._waiting = sorted(range(len(requests)), key=lambda i: (self._begun[i], self._came[i]), reverse=True)
        # Tokens that steps up to each number leave to prompts, after one for every sequence that decodes in it.
        steps = np.arange(len(ends))
        decoding = np.searchsorted(np.sort(self._begun), steps) - np.searchsorted(np.sort(self._done), steps)
        self._room: list[int] = np.cumsum(settings.max_num_batched_tokens - decoding).tolist()
        self._decoding: dict[int, int] = {}
        self._computed: dict[int, int] = {}
        self._doubtful: int | None = None

    def told(self) -> Iterator[tuple[int, Chunks, float]]:
        """Number, chunks and seconds of every step that can be told."""
        log = self._log
        for step, generated in enumerate(log[:, 4].astype(np.int64).tolist()):
            idle = not self._decoding and not self._computed
            clear = self._doubtful is None and not log[step, 5] and log[step, 6] < _FULL_CACHE
            chunks = self._step(step)
            clear = clear and self._doubtful is None and generated == sum(self._completes(*chunk) for chunk in chunks)
            whole = [(count, held) for _, count, held in chunks]
            if clear and whole and not idle and sum(c for c, _ in whole) <= self._settings.max_num_batched_tokens:
                yield step, whole, float(log[step, 0] - log[step - 1, 0])

    def _step(self, step: int) -> list[tuple[int, int, int]]:
        """Request, tokens and tokens held of every sequence of a step; moves on to the next."""
        new: list[int] = []
        while self._waiting and self._begun[self._waiting[-1]] <= step:
            new.append(self._waiting.pop())
        chunks = [(i, 1, held + 1) for i, held in self._decoding.items()]
        chunks += [(i, self._prompt[i] - self._computed.pop(i, 0), self._prompt[i]) for i in new]
        self._decoding = {i: held for i, _, held in chunks if self._done[i] > step}
        if self._doubtful in new:
            self._doubtful = None
        if self._waiting:
            i = self._waiting[-1]
            part = self._part(i, step, sum(count for _, count, _ in chunks))
            if part is None:
                self._doubtful = i
            elif part:
                self._computed[i] = self._computed.get(i, 0) + part
                chunks.append((i, part, self._computed[i]))
        return chunks

    def _completes(self, i: int, _: int, held: int) -> bool:
        """Whether a chunk gives its request a token."""
        return held >= self._prompt[i]

    def _part(self, i: int, step: int, tokens: int) -> int | None:
        """Tokens of the next prompt computed in a step beside `tokens` others; None where that is open.

        Until it is done a prompt gets all that a step leaves. So it was begun where the steps to come cannot hold it,
        and not yet where they would have been done with it too soon.
        """
        left = self._settings.max_num_batched_tokens - tokens
        if left <= 0 or not self._settings.chunked_prefill:
            return 0
        rest = self._prompt[i] - self._computed.get(i, 0)
        last = self._begun[i]
        before = self._room[last - 1] - self._room[step]  # in the steps after this and before its last
        others = itertools.takewhile(lambda j: self._begun[j] == last, reversed(self._waiting))
        beside = sum(self._prompt[j] for j in others if j != i)
        if rest > self._room[last] - self._room[step] - beside:
            return left if left < rest else None
        if rest - left <= before:
            return None if i in self._computed else 0
        # Both would do. With asynchronous scheduling a batch is formed when the last but one is done.
        ahead = 2 if self._settings.async_scheduling else 1
        if i in self._computed or (step >= ahead and self._came[i] + _ENTRY_S < self._log[step - ahead, 0]):
            return left
        return 0 if step and self._came[i] > self._log[step - 1, 0] else None
