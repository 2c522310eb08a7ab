"""What an operation takes, as a function of a small integer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from apex_opt.profiles.power import PowerModel

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """One operation on one device, for every entry of a table.

    Parameters
    ----------
    seconds : float64[n]     time
    flops : float64[n]       arithmetic
    moved : float64[n]       bytes read from and written to the device's memory
    joules : float64[n]      energy above the idle draw
    """

    seconds: Floats
    flops: Floats
    moved: Floats
    joules: Floats

    @classmethod
    def of(cls, power: PowerModel, seconds: Floats, flops: ArrayLike, moved: ArrayLike, dtype: str) -> Work:
        """Work with the energy that the power model gives it.

        Parameters
        ----------
        power : PowerModel    of the GPU
        seconds : Floats      it takes
        flops : array         FLOP
        moved : array         bytes moved
        dtype : str           arithmetic that is used
        """
        flops = np.broadcast_to(np.asarray(flops, np.float64), seconds.shape)
        moved = np.broadcast_to(np.asarray(moved, np.float64), seconds.shape)
        joules = power.energy_j(seconds, flops, moved, dtype) - power.idle_w * seconds
        return cls(seconds=seconds, flops=flops, moved=moved, joules=np.maximum(joules, 0.0))

    @classmethod
    def waiting(cls, power: PowerModel, seconds: Floats) -> Work:
        """Time in which the device waits for the host or for launches."""
        return cls._at_rest(seconds, power.active_w)

    @classmethod
    def spinning(cls, power: PowerModel, seconds: Floats) -> Work:
        """Time in which a kernel waits for other devices."""
        return cls._at_rest(seconds, power.spin_w)

    @classmethod
    def _at_rest(cls, seconds: Floats, watts: float) -> Work:
        zero = np.zeros_like(seconds)
        return cls(seconds=seconds, flops=zero, moved=zero, joules=watts * seconds)

    def at(self, index: NDArray[np.int64]) -> Work:
        """The table read at other entries."""
        return Work(
            seconds=self.seconds[index], flops=self.flops[index], moved=self.moved[index], joules=self.joules[index]
        )

    def __add__(self, other: Work) -> Work:
        return Work(
            seconds=self.seconds + other.seconds,
            flops=self.flops + other.flops,
            moved=self.moved + other.moved,
            joules=self.joules + other.joules,
        )

    def __mul__(self, count: float | Floats) -> Work:
        return Work(
            seconds=self.seconds * count,
            flops=self.flops * count,
            moved=self.moved * count,
            joules=self.joules * count,
        )
