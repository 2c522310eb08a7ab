"""Where figures of operations are looked up: sources in order, how far they are believed, what is said of them.

Times are float64 seconds over arrays of sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.cluster.toml_reader import shown
from apex_opt.cluster.types import REFERENCE
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.ir.formats import SMALL_GROUPS
from apex_opt.profiles.clock import Clock
from apex_opt.profiles.physics import (
    Arithmetic,
)
from apex_opt.profiles.power import PowerModel, scale_power

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from apex_opt.cluster.types import Gpu
    from apex_opt.profiles.laws import Source
    from apex_opt.profiles.surface import Surface

    Floats = NDArray[np.float64]

# Table formats that are variants of a plan format. fp8 is scaled by tensor or channel (usual for dense models) or by
# block (published mixtures of experts), mxfp4 weights meet 16-bit or fp8 activations.
_SAME: Final = {
    "bf16": ("bf16", "fp16"),
    "fp16": ("fp16", "bf16"),
    "fp8": ("fp8", "fp8_block"),
    "mxfp4": ("mxfp4", "mxfp4_fp8"),
    **{f"w4a16g{group}": ("w4a16",) for group in SMALL_GROUPS},
}
# Formats whose efficiency stands in for one that was measured nowhere: of the same kind of kernel, then of 16 bit.
_STAND_INS: Final = {
    "nvfp4": ("fp8", "bf16"),
    "mxfp4": ("w4a16", "bf16"),
    "mxfp8": ("fp8", "bf16"),
    "w4a16": ("mxfp4", "bf16"),
    **{f"w4a16g{group}": ("mxfp4", "bf16") for group in SMALL_GROUPS},
    "w8a16": ("w4a16", "bf16"),
    **{f"w8a16g{group}": ("w4a16", "bf16") for group in SMALL_GROUPS},
    "w8a8": ("fp8", "bf16"),
    # Recurrences by the kernel that computes in chunks as they do.
    "kda": ("gated_delta",),
    "mamba2": ("gated_delta",),
    "mamba1": ("gated_delta",),
    "lightning": ("gated_delta",),
}

# Routings of tables for each way tokens may fall on experts: those of its kind, then its stand-ins, each in the order
# of preference.
ROUTINGS: Final = {
    "uniform": (("uniform", "balanced"),),
    "skewed": (("power_law_1.01", "power_law_1.2"), ("uniform", "balanced")),
}

_BEYOND: Final = "roofline at the efficiency of the nearest shapes, beyond the measured shapes of"
_EXPOSED: Final = 1.25
"""A time this many times another engine's for the same product is not believed, but where it is so at all sizes."""
_MAX_SIZE: Final = 2.0**53
_MAX_COUNT: Final = 2**31


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pick:
    """A surface that tells of a shape in one variant of a format; `own` where its kernels are this engine's."""

    surface: Surface
    origin: str
    dtype: str
    own: bool


class Lookup:
    """Times of operations on one accelerator with one engine's kernels; see `Profile`.

    Attributes
    ----------
    gpu : Gpu
    engine : str
    clock : Clock
    power : PowerModel
    provenance : dict of str to str     per operation that was asked for: measured, derived or assumed, and from what
    """

    def __init__(
        self,
        gpu: Gpu,
        engine: str,
        own: tuple[Source, ...],
        references: tuple[tuple[Source, ...], ...],
        clock: Clock = Clock(),  # noqa: B008
    ) -> None:
        self.gpu = gpu
        self.engine = engine
        self.clock = clock
        self._own, self._pools = own, (own, *references)
        self._used: dict[str, dict[str, None]] = {}
        self.power: PowerModel = clock.power(self._power_model())
        self._note("power", self.power.provenance)
        if not gpu.cuda:
            self._note("engine kernels", f"assumed: those of CUDA stand in for {gpu.name}, which does not run it")

    @property
    def provenance(self) -> dict[str, str]:
        """Where the figures come from, per operation that was asked for."""
        return {name: "; ".join(texts) for name, texts in self._used.items()}

    def _note(self, operation: str, text: str) -> None:
        self._used.setdefault(operation, {})[text] = None

    def own(self, kind: str) -> tuple[Source, ...]:
        """Sources with a table of a kind measured on this accelerator, the engine's first."""
        return tuple(source for tier in self._tiers(self._own, kind) for source in tier)

    def _serves(self, source: Source) -> bool:
        """Whether a source holds this engine's kernels, or those of all."""
        return source.card.engine in (None, self.engine)

    def _tiers(self, pool: tuple[Source, ...], kind: str) -> tuple[tuple[Source, ...], ...]:
        """Sources of a pool that have a table of a kind: those of the engine, then the others."""
        having = [source for source in pool if source.has(kind)]
        serving = tuple(source for source in having if self._serves(source))
        return tuple(tier for tier in (serving, tuple(s for s in having if s not in serving)) if tier)

    def _is_ours(self, source: Source) -> bool:
        """Whether a source was measured on this accelerator: named by it, with its datasheet."""
        card, peaks = source.card, dict(self.gpu.flops_per_s)
        return (
            source in self._own
            and card.memory_bytes_per_s == self.gpu.memory_bytes_per_s
            and all(peaks.get(dtype, peak) == peak for dtype, peak in card.flops_per_s)
        )

    def _origin(self, source: Source, kind: str, how: str = "") -> str:
        """Where one operation's figures come from; `how` says what keeps them from being the table's own."""
        file = source.file(kind)
        if not self._is_ours(source):
            return f"derived: {how or 'from'} {file}, its efficiencies on the datasheet of {self.gpu.name}"
        return f"derived: {how} {file}" if how else f"measured ({file})"

    def _power_model(self) -> PowerModel:
        """The first power model among the sources, scaled where it is another accelerator's."""
        for source in (source for pool in self._pools for source in pool):
            card = source.card
            if card.power is not None:
                ours = self._is_ours(source) and card.tdp_w == self.gpu.tdp_w
                how = "measured" if ours else f"derived: scaled by power limit and peaks from {card.gpu}"
                text = f"{how}: {card.power.source} (profiles/{source.name}/card.toml)"
                figures = (card.tdp_w, card.memory_bytes_per_s, dict(card.flops_per_s))
                return scale_power(card.power, figures, self.gpu, text)
        raise InputError(f"no card of profiles/{REFERENCE} has the [power] table that all others need")

    def _best(
        self,
        kind: str,
        name: str,
        feature: tuple[float, ...],
        find: Callable[[Source, str, tuple[str, ...]], Surface | None],
        routings: Sequence[tuple[str, ...]] = ((),),
        prefer: tuple[str, ...] = (),
    ) -> tuple[tuple[Pick, ...], bool]:
        """Surfaces for a shape in a format: where the shape was measured, else whose shapes come nearest.

        The format itself comes before its stand-ins, tables of this accelerator before those of references, a routing
        before its stand-ins; then what we measured of the very shape before anything else. Of the variants in `prefer`
        the first that this engine has a table of is taken, else the first of any.

        Returns
        -------
        picks, bare     surfaces; whether they are ours, which time a product without the kernel that narrows its input
        """
        names = dict.fromkeys((name, *_STAND_INS.get(name, ()), "bf16"))
        formats = [_SAME.get(other, (other,)) for other in names]
        pools = [[source for source in pool if source.has(kind)] for pool in self._pools]
        for group in formats:
            for pool, wanted in product(pools, routings):
                found = [
                    (round(surface.distance(feature), 9), source, dtype, surface)
                    for source in pool
                    for dtype in group
                    if (surface := find(source, dtype, wanted)) is not None
                ]
                if not found:
                    continue
                distance = min(entry[0] for entry in found)
                near = [entry for entry in found if entry[0] == distance]
                if distance == 0 and near[0][1].card.engine is None:
                    near = near[:1]
                if prefer:
                    near = [entry for entry in near if entry[2] == self._variant(near, prefer)]
                picks = []
                for _, source, dtype, surface in near:
                    how = [] if group == formats[0] else [f"{dtype} efficiencies,"]
                    if wanted != routings[0]:
                        how.append("uniform routing,")
                    if distance > 0:
                        how.append("between the measured shapes of" if surface.encloses(feature) else _BEYOND)
                    elif how:
                        how.append("from")
                    origin = self._origin(source, kind, " ".join(how))
                    picks.append(Pick(surface=surface, origin=origin, dtype=dtype, own=self._serves(source)))
                return tuple(picks), all(source.card.engine is None for _, source, _, _ in near)
        raise InputError(f"profiles/{REFERENCE} lacks the {kind} table all others need")

    def _variant(self, near: Sequence[tuple[float, Source, str, Surface]], prefer: tuple[str, ...]) -> str:
        """The first variant of `prefer` among some tables, this engine's before others'; of other formats the first."""
        mine = [dtype for _, source, dtype, _ in near if self._serves(source)] or [dtype for _, _, dtype, _ in near]
        return next((dtype for dtype in prefer if dtype in mine), mine[0])

    def _ratio(
        self,
        operation: str,
        picks: tuple[Pick, ...],
        feature: tuple[float, ...],
        size_log: Floats,
        *,
        whole: bool = True,
    ) -> Floats:
        """Ratio of bound to time: of the fastest variant of the format, each by this engine's kernels where told.

        Activations of 16 bits or fewer are the deployer's choice. Engines share kernel libraries: a time far above what
        another engine's collection has for the same shape, which no third one bears out, is a launch floor of the
        collection. It is not where it is as far above that at the largest size that all have, which takes so long that
        no launch counts: then the kernel is slower.

        Parameters
        ----------
        operation, picks, feature : what is asked, the tables, and the shape
        size_log : float64[...]    logarithms of the sizes
        whole : bool               whether the operation is all on one rank; of experts in groups some collections seem
                                   to count what other ranks compute, so a slow one has to be borne out at every size
        """
        ratios = []
        for dtype in dict.fromkeys(pick.dtype for pick in picks):
            variant = [pick for pick in picks if pick.dtype == dtype]
            own = [pick for pick in variant if pick.own] or variant
            for pick in own:
                beyond = size_log.size and float(size_log.max()) > pick.surface.last(feature) + 1e-9
                how = ", roofline at the last efficiency beyond its sizes" if beyond else ""
                self._note(operation, f"{pick.origin}{how}")
            ratio = _largest(own, feature, size_log)
            if others := [pick for pick in variant if pick not in own]:
                theirs = np.array([pick.surface.ratio(feature, size_log) for pick in others])
                end = np.array([min(pick.surface.last(feature) for pick in variant)])
                slower = (_least(others, feature, end) >= _largest(own, feature, end) * _EXPOSED).all()
                alone = np.logical_and((theirs >= ratio * _EXPOSED).all(axis=0), not (whole and slower))
                if alone.any():
                    for pick in others:
                        self._note(
                            operation, f"{pick.origin}, where the engine's own table is {_EXPOSED:g} times slower"
                        )
                ratio = np.where(alone, theirs.max(axis=0), ratio)
            ratios.append(ratio)
        return np.asarray(np.maximum.reduce(ratios))

    def _bound(self, kernel: Arithmetic, flops: Floats | float, moved: Floats | float) -> Floats:
        """Roofline: no operation takes less than its arithmetic at peak, nor less than its traffic at peak."""
        peak = self.gpu.peak_flops_per_s(kernel.peak) * self.clock.share
        return np.asarray(np.maximum(flops / peak, moved / self.gpu.memory_bytes_per_s))

    def kernel(self, name: str) -> Arithmetic:
        """Arithmetic of a plan's number format on this accelerator: 16 bit in the type it has.

        Raises
        ------
        UsageError      a format the accelerator lacks
        """
        kernel = Arithmetic.of(name)
        if kernel.peak in ("bf16", "fp16"):
            kernel = Arithmetic(self.gpu.half_dtype, kernel.input_bytes, kernel.weight_bytes)
        self.gpu.peak_flops_per_s(kernel.peak)
        return kernel

    def memory_time_s(
        self, moved_bytes: ArrayLike, kind: str = "plain", width: int = 0, *, launched: bool = True
    ) -> Floats:
        """Time of one element-wise kernel (norm, activation, rotary, embedding).

        Parameters
        ----------
        moved_bytes : float64[...]      bytes read plus written, >= 0
        kind : str                      of `MEMORY_KERNELS`: plain, norm or activation
        width : int                     elements of a row
        launched : bool                 False where it rides on another kernel: no floor then

        Returns
        -------
        float64[...]                    seconds: floor + bytes at the measured share of peak bandwidth; 0 where
                                        nothing is moved

        Notes
        -----
        Floors are fitted on the small rows of the table, the share is the median of the large ones. Hits in the L2
        cache are not counted on, so rows of 10 to 60 MB take less than this says.
        """
        moved = sizes("moved_bytes", moved_bytes)
        tiers = [tier for pool in self._pools for tier in self._tiers(pool, "memory")]
        if not tiers:
            raise InputError(f"profiles/{REFERENCE} lacks the memory table all others need")
        source = tiers[0][0]
        self._note("memory", self._origin(source, "memory"))
        law = source.memory()
        if kind not in law.floors:
            raise UnknownNameError("kind of memory kernel", kind, law.floors)
        base_s, slope_s = law.floors[kind]
        floor_s = (base_s + slope_s * width) / self.clock.share if launched else 0.0
        return np.asarray(np.where(moved > 0, floor_s + moved / (law.efficiency * self.gpu.memory_bytes_per_s), 0.0))

    def _launch_s(self, count: Floats) -> Floats:
        """Launch of a kernel that only reads and writes memory, where there is anything to do."""
        return self.memory_time_s(np.minimum(count, 1.0))


def _largest(picks: Sequence[Pick], feature: tuple[float, ...], size_log: Floats) -> Floats:
    """The largest ratio of several surfaces."""
    ratios = [pick.surface.ratio(feature, size_log) for pick in picks]
    return ratios[0] if len(ratios) == 1 else np.asarray(np.maximum.reduce(ratios))


def _least(picks: Sequence[Pick], feature: tuple[float, ...], size_log: Floats) -> Floats:
    """The least ratio of several surfaces."""
    return np.asarray(np.minimum.reduce([pick.surface.ratio(feature, size_log) for pick in picks]))


def count_of(name: str, value: int, least: int = 1) -> int:
    """A whole number from `least` to 2^31.

    Parameters
    ----------
    name : str     as a message has it
    value : int
    least : int
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= _MAX_COUNT:
        raise UsageError(f"{name} = {shown(value)} must be a whole number from {least} to {_MAX_COUNT}")
    return int(value)


def sizes(name: str, values: ArrayLike) -> Floats:
    """Sizes as float64, checked: numbers from 0 to 2^53."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise UsageError(f"{name} must be an array of numbers of one shape") from None
    if array.dtype.kind not in "iuf":
        raise UsageError(f"{name} must hold numbers, got {array.dtype}")
    sizes = array.astype(np.float64)
    if sizes.size and not (sizes.min() >= 0 and sizes.max() <= _MAX_SIZE):
        raise UsageError(f"{name} must lie between 0 and 2^53, got {sizes.min():g} to {sizes.max():g}")
    return sizes
