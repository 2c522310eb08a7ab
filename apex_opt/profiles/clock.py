"""What another clock than the highest does to time and energy. Derived from published laws, not measured here.

Arithmetic, caches and launches go at the clock of the multiprocessors, device memory and links do not. Dynamic power is
proportional to the clock and to the square of the voltage, which falls with the clock in a straight line down to a
floor (J. Guerreiro et al., "GPGPU Power Modeling for Multi-Domain Voltage-Frequency Scaling", HPCA 2018, found both on
three generations of NVIDIA GPUs).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UsageError

if TYPE_CHECKING:
    from apex_opt.cluster.types import Gpu
    from apex_opt.profiles.power import PowerModel

# Voltage against its highest: flat up to a share of the highest clock, then straight to 1. Assumed, in the range of the
# curves in the paper.
_FLAT_UP_TO: Final = 0.6
_LOWEST_VOLTAGE: Final = 0.75

MEMORY_JOULE_PER_BYTE: Final = 31e-12
"""Energy of the memory itself, which has its own clock: 3.9 pJ per bit of HBM2 (M. O'Connor et al., "Fine-Grained
DRAM", MICRO 2017)."""

SLOWEST: Final = 0.25
"""Least share of the highest clock that can be asked for: below it no law here was checked by anyone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """A clock as a share of the highest."""

    share: float = 1.0

    @classmethod
    def of(cls, gpu: Gpu, clock_mhz: int | None) -> Clock:
        """The clock a plan holds an accelerator at.

        Raises
        ------
        UsageError      an accelerator whose clock is not known; a clock it does not have
        """
        if clock_mhz is None:
            return cls()
        if gpu.clock_mhz is None:
            raise UsageError(f"clock={clock_mhz}: the highest clock of {gpu.name} is not stated; give gpu.clock_mhz")
        if not SLOWEST * gpu.clock_mhz <= clock_mhz <= gpu.clock_mhz:
            low, high = SLOWEST * gpu.clock_mhz, gpu.clock_mhz
            raise UsageError(f"clock={clock_mhz}: {gpu.name} can be held at {low:.0f} to {high:.0f} MHz")
        return cls(share=clock_mhz / gpu.clock_mhz)

    @property
    def voltage(self) -> float:
        """Voltage against that at the highest clock."""
        slope = (1.0 - _LOWEST_VOLTAGE) / (1.0 - _FLAT_UP_TO)
        return max(_LOWEST_VOLTAGE, 1.0 - slope * (1.0 - self.share))

    def power(self, model: PowerModel) -> PowerModel:
        """A power model at this clock; the draw at rest is left as it is."""
        if self.share == 1.0:
            return model
        squared = self.voltage**2
        on_chip = max(model.joule_per_byte - MEMORY_JOULE_PER_BYTE, 0.0)
        return replace(
            model,
            active_w=model.active_w * self.share * squared,
            spin_w=model.spin_w * self.share * squared,
            joule_per_flop={dtype: joule * squared for dtype, joule in model.joule_per_flop.items()},
            joule_per_byte=model.joule_per_byte - on_chip + on_chip * squared,
            provenance=f"{model.provenance}; at {self.share:.0%} of the highest clock by published laws (derived)",
        )
