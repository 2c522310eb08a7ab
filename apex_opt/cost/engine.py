"""The engine's own time: what a serving step takes beside the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from apex_opt.cluster.toml_reader import read_toml
from apex_opt.errors import InputError, UnknownNameError
from apex_opt.profiles.schema import TABLE_ENGINES
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path


_LONGEST_S: Final = 10.0
"""What no engine takes beside the kernels, for a batch or a request."""
_MOST_CAPTURED: Final = 65_536
"""Sequences, or tokens, of the largest captured graph."""

FUSABLE: Final = ("rotary", "kv write", "qk norm", "norm", "activation", "quantise")
"""Operations that an engine may fuse with the kernel before or after."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOverhead:
    """Host and launch time of one engine kind, from `profiles/engines.toml`.

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
    captured_sizes : tuple     decode batches are padded up to the next of these numbers of sequences
    fused : tuple of str       operations of `FUSABLE` that ride on the kernel before or after: their traffic counts,
                               their launch does not; "quantise" where inputs of narrow products are written narrow
    kernels : str              engine whose kernel tables are preferred, of `TABLE_ENGINES`
    source : str
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
    captured_sizes: tuple[int, ...]
    fused: tuple[str, ...]
    kernels: str
    source: str

    def __post_init__(self) -> None:
        for field in ("step_s", "blocking_step_s", "sequence_s", "mixed_step_s", "gap_s", "launch_s", "request_s"):
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
        if unknown := [name for name in self.fused if name not in FUSABLE]:
            raise InputError(f"engine {self.name}: fused names {unknown[0]!r:.40}; known: {', '.join(FUSABLE)}")
        if self.kernels not in TABLE_ENGINES:
            raise InputError(
                f"engine {self.name}: kernels = {self.kernels!r:.40} must be one of {', '.join(TABLE_ENGINES)}"
            )


def load_engine(name: str, path: Path | None = None) -> EngineOverhead:
    """The overhead of an engine kind by name.

    Raises
    ------
    UnknownNameError    not in the table
    InputError          a table that cannot be read, or an entry with faults
    """
    file = path or DATA_ROOT / "profiles" / "engines.toml"
    engines = _read(file)
    if name not in engines:
        raise UnknownNameError("engine", name, engines)
    entry = engines[name]
    try:
        return EngineOverhead(
            name=name,
            step_s=entry["step_us"] * 1e-6,
            blocking_step_s=entry["blocking_step_us"] * 1e-6,
            sequence_s=entry["sequence_us"] * 1e-6,
            mixed_step_s=entry["mixed_step_us"] * 1e-6,
            request_s=entry["request_us"] * 1e-6,
            captured_sizes=_sizes(name, entry["captured"]),
            gap_s=entry["gap_us"] * 1e-6,
            launch_s=entry["launch_us"] * 1e-6,
            captured_tokens=entry["captured_tokens"],
            fused=tuple(str(name) for name in entry["fused"]),
            kernels=entry["kernels"],
            source=entry["source"],
        )
    except KeyError as error:
        raise InputError(f"engines table {file}: {name} lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise InputError(f"engines table {file}: {name} has a value of the wrong form ({error})") from None


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


@lru_cache(maxsize=4)
def _read(path: Path) -> dict[str, dict[str, Any]]:
    return read_toml(path, "engines table")
