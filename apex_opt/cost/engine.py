"""The engine's own time: what a serving step takes beside the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any, Final

from apex_opt.engines.kinds import DATA, load_kind
from apex_opt.errors import InputError
from apex_opt.profiles.schema import TABLE_ENGINES
from apex_opt.units import TERA

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from apex_opt.workload.trace import Trace


_LONGEST_S: Final = 10.0
"""What no engine takes beside the kernels, for a batch or a request."""
TIMES: Final = (
    "step_s",
    "blocking_step_s",
    "sequence_s",
    "mixed_step_s",
    "gap_s",
    "launch_s",
    "request_s",
    "client_s",
    "client_token_s",
)
"""Times of an engine, in the order in which they are fitted and told."""
_MOST_CAPTURED: Final = 65_536
"""Sequences, or tokens, of the largest captured graph."""

FUSABLE: Final = ("rotary", "kv write", "qk norm", "norm", "activation", "quantise", "experts")
"""Operations that an engine may fuse with the kernel before or after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOverhead:
    """Host and launch time of one engine kind, from `own_time` in its file.

    Parameters
    ----------
    name : str
    step_s : float             of each batch where the next is formed while the last runs: what stays visible
    blocking_step_s : float    of each batch where it is formed, launched and its tokens collected one after another
    sequence_s : float         of each sequence of a batch: sampling and bookkeeping that grow with their number
    mixed_step_s : float       more of a batch with a prefill chunk, which does not run as one captured graph
    gap_s : float              from the end of a kernel to the start of the next that needs it
    launch_s : float           host time to launch one kernel outside captured graphs: a batch with a prefill chunk
                               takes at least that of all its kernels
    captured_tokens : int      batches with a prefill chunk of up to so many tokens run from captured pieces instead
    request_s : float          of each request on its way in and out of the server
    client_s : float           in a closed loop over HTTP, from the last token of an answer until the client's next
                               request can join a batch: the answer on its way out, a connection, the front end
    client_token_s : float     the same for each token of its prompt: on its way in and through the tokeniser
    captured_sizes : tuple     decode batches are padded up to the next of these numbers of sequences
    fused : tuple of str       operations of `FUSABLE` that ride on the kernel before or after: their traffic counts,
                               their launch does not; "quantise" where inputs of narrow products are written narrow,
                               "experts" where one call launches all of their kernels
    kernels : str              engine whose kernel tables are preferred, of `TABLE_ENGINES`
    experts_flops_per_s : float    arithmetic that experts in fp8 reach at most on Blackwell, with the kernels of a
                               release older than the tables; of others there is no such limit
    source : str
    expected : tuple or None   of an engine file: figure, runs, and measured over predicted, low, middle and high; None
                               of a shipped engine
    """

    name: str
    step_s: float
    blocking_step_s: float
    sequence_s: float
    mixed_step_s: float
    gap_s: float
    launch_s: float
    captured_tokens: int
    request_s: float
    client_s: float
    client_token_s: float
    captured_sizes: tuple[int, ...]
    fused: tuple[str, ...]
    kernels: str
    source: str
    experts_flops_per_s: float = inf
    expected: tuple[tuple[str, int, float, float, float], ...] | None = None

    def __post_init__(self) -> None:
        for field in TIMES:
            value = getattr(self, field)
            if not 0 <= value <= _LONGEST_S:
                raise InputError(f"engine {self.name}: {field} = {value!r} must be from 0 to {_LONGEST_S:g} s")
        if type(self.captured_tokens) is not int or not 0 <= self.captured_tokens <= _MOST_CAPTURED:
            raise InputError(
                f"engine {self.name}: captured_tokens = {self.captured_tokens!r} must be a whole number from 0 to "
                f"{_MOST_CAPTURED}"
            )
        if not all(type(size) is int and 1 <= size <= _MOST_CAPTURED for size in self.captured_sizes):
            raise InputError(f"engine {self.name}: captured sizes must be whole numbers from 1 to {_MOST_CAPTURED}")
        if not self.experts_flops_per_s > 0:
            raise InputError(f"engine {self.name}: experts_tflops must be above 0")
        if unknown := [name for name in self.fused if name not in FUSABLE]:
            raise InputError(f"engine {self.name}: fused names {unknown[0]!r:.40}; known: {', '.join(FUSABLE)}")
        if self.kernels not in TABLE_ENGINES:
            raise InputError(
                f"engine {self.name}: kernels = {self.kernels!r:.40} must be one of {', '.join(TABLE_ENGINES)}"
            )

    def way_s(self, trace: Trace) -> float:
        """What a client of a closed loop waits from an answer until its next request can join a batch; else nothing."""
        if trace.concurrency is None:
            return 0.0
        return self.client_s + self.client_token_s * float(trace.prompt.mean())

    @classmethod
    def of(cls, name: str, own_time: Mapping[str, Any]) -> EngineOverhead:
        """From `own_time` in the file of an engine.

        Raises
        ------
        InputError    an entry with faults
        """
        try:
            return cls(
                name=name,
                step_s=own_time["step_us"] * 1e-6,
                blocking_step_s=own_time["blocking_step_us"] * 1e-6,
                sequence_s=own_time["sequence_us"] * 1e-6,
                mixed_step_s=own_time["mixed_step_us"] * 1e-6,
                request_s=own_time["request_us"] * 1e-6,
                client_s=own_time["client_us"] * 1e-6,
                client_token_s=own_time["client_token_us"] * 1e-6,
                captured_sizes=_sizes(name, own_time["captured"]),
                gap_s=own_time["gap_us"] * 1e-6,
                launch_s=own_time["launch_us"] * 1e-6,
                captured_tokens=own_time["captured_tokens"],
                fused=tuple(str(name) for name in own_time["fused"]),
                kernels=own_time["kernels"],
                experts_flops_per_s=own_time.get("experts_tflops", inf) * TERA,
                source=own_time["source"],
            )
        except KeyError as error:
            raise InputError(f"engine {name}: own_time lacks {error}") from None
        except (TypeError, ValueError) as error:
            raise InputError(f"engine {name}: own_time has a value of the wrong form ({error})") from None


def load_engine(name: str, folder: Path = DATA) -> EngineOverhead:
    """The overhead of an engine kind by name.

    Parameters
    ----------
    name : str
    folder : Path    with the files of engines

    Raises
    ------
    UnknownNameError    no such engine
    InputError          a file that cannot be read, or an entry with faults
    """
    kind = load_kind(name, folder)
    return replace(EngineOverhead.of(name, kind.own_time), expected=kind.expected)


def _sizes(name: str, ranges: Any) -> tuple[int, ...]:
    """Sizes from ranges of first, last and step."""
    sizes: list[int] = []
    for first, last, step in ranges:
        if not 1 <= first <= last <= _MOST_CAPTURED or step < 1:
            raise InputError(
                f"engine {name}: captured has {[first, last, step]!r:.60}; first and last must be from 1 to "
                f"{_MOST_CAPTURED}, step at least 1"
            )
        sizes.extend(range(first, last + 1, step))
    return tuple(sizes)
