"""Time and energy of single operations on one accelerator.

Precedence: tables measured on this accelerator with this engine's kernels, else with another engine's, else the efficiencies measured on the H200 applied to this
accelerator's datasheet. `Profile.provenance` says which were used, per operation. All times are float64 seconds over
arrays of sizes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.cluster.toml_reader import shown
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.ir.formats import KV_BYTES, get_format
from apex_opt.profiles.laws import (
    GEMM_FLOOR_S,
    GEMM_FLOOR_S_PER_DEPTH,
    LATENT,
    MOE_FLOOR_S,
    Arithmetic,
    DecodeLaw,
    PrefillLaw,
    Source,
    gemm_feature,
    gemm_work,
    load_source,
    moe_feature,
    moe_work,
)
from apex_opt.profiles.power import PowerModel, scale_power
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from apex_opt.cluster.types import Gpu
    from apex_opt.profiles.surface import Surface

    Floats = NDArray[np.float64]

REFERENCE: Final = "h200-sxm"
"""Folder whose efficiencies stand in where an accelerator has no tables of its own."""

# Table formats that are variants of a plan format. fp8 is scaled by tensor or channel (usual for dense models) or by
# block (published mixtures of experts), mxfp4 weights meet 16-bit or fp8 activations.
_SAME: Final = {
    "bf16": ("bf16", "fp16"),
    "fp16": ("fp16", "bf16"),
    "fp8": ("fp8", "fp8_block"),
    "mxfp4": ("mxfp4", "mxfp4_fp8"),
}
# Formats whose efficiency stands in for one that was measured nowhere: of the same kind of kernel, then of 16 bit.
_STAND_INS: Final = {"nvfp4": ("fp8", "bf16"), "mxfp4": ("w4a16", "bf16"), "w4a16": ("mxfp4", "bf16")}

# Routings in the order of preference for each way tokens may fall on experts.
_ROUTINGS: Final = {
    "uniform": ("uniform", "balanced"),
    "skewed": ("power_law_1.01", "power_law_1.2", "uniform", "balanced"),
}

# A time this many times another engine's for the same product is not believed.
_EXPOSED: Final = 1.25
# Share of peak that decode attention reaches when its arithmetic and not its traffic limits it. Assumed.
_DECODE_COMPUTE_EFFICIENCY: Final = 0.5
# Time of the shortest attention kernel, below which what is left of a measured module is not believed. Assumed.
_LEAST_KERNEL_S: Final = 4e-6

_MAX_SIZE: Final = 2.0**53
_MAX_COUNT: Final = 2**31
_LATENT: Final = tuple(int(size[0]) for size in LATENT.values())
_LATENT_PAIR: Final = 192 + 128
"""Width of key and value of one head that MLA prefill kernels are measured with (DeepSeek-V3)."""
_LONGEST_WINDOW: Final = 1024
"""Tokens of the longest attention window that is told from the whole context."""


class Profile:
    """Times of operations on one accelerator with one engine's kernels; make it with `load_profile`.

    Attributes
    ----------
    gpu : Gpu
    power : PowerModel
    provenance : dict of str to str     per operation that was asked for: measured, derived or assumed, and from what
    """

    def __init__(self, gpu: Gpu, engine: str, own: tuple[Source, ...], reference: tuple[Source, ...]) -> None:
        self.gpu = gpu
        self.engine = engine
        self._own, self._reference = own, reference
        matching = tuple(source for source in own if source.card.engine in (None, engine))
        others = tuple(source for source in own if source not in matching)
        usual = tuple(source for source in reference if source.card.engine in (None, engine))
        rest = tuple(source for source in reference if source not in usual)
        self._tiers = tuple(tier for tier in (matching, others, usual, rest) if tier)
        self._used: dict[str, dict[str, None]] = {}
        self.power: PowerModel = self._power_model()
        self._note("power", self.power.provenance)

    @property
    def provenance(self) -> dict[str, str]:
        """Where the figures come from, per operation that was asked for."""
        return {name: "; ".join(texts) for name, texts in self._used.items()}

    def _note(self, operation: str, text: str) -> None:
        self._used.setdefault(operation, {})[text] = None

    def own(self, kind: str) -> tuple[Source, ...]:
        """Sources with a table of a kind measured on this accelerator, the engine's first."""
        return tuple(source for tier in self._tiers for source in tier if source in self._own and source.has(kind))

    def _sources(self, kind: str) -> Iterator[tuple[Source, ...]]:
        """Sources with a table of a kind, tier by tier."""
        for tier in self._tiers:
            if having := tuple(source for source in tier if source.has(kind)):
                yield having

    def _origin(self, source: Source, kind: str, exact: bool = True) -> str:
        """Where one operation's figures come from: measured only if this is the accelerator the card describes."""
        file = source.file(kind)
        card = source.card
        peaks = dict(self.gpu.flops_per_s)
        same = card.memory_bytes_per_s == self.gpu.memory_bytes_per_s and all(
            peaks.get(dtype, peak) == peak for dtype, peak in card.flops_per_s
        )
        if source in self._own and same:
            return f"measured ({file})" if exact else f"derived: between the measured shapes of {file}"
        return f"derived from the efficiencies of {file} on the datasheet of {self.gpu.name}"

    def _power_model(self) -> PowerModel:
        """The first power model among the sources, scaled where it is another accelerator's."""
        for source in (*self._own, *self._reference):
            card = source.card
            if card.power is not None:
                text = f"{card.power.source} (profiles/{source.name}/card.toml)"
                if source not in self._own:
                    text = f"derived: scaled by power limit and peaks from {card.gpu}: {text}"
                figures = (card.tdp_w, card.memory_bytes_per_s, dict(card.flops_per_s))
                return scale_power(card.power, figures, self.gpu, text)
        raise InputError(f"no card of profiles/{REFERENCE} has the [power] table that all others need")

    def _best(
        self, kind: str, name: str, feature: tuple[float, ...], find: Callable[[Source, str], Surface | None]
    ) -> tuple[tuple[Surface, ...], tuple[Surface, ...], bool]:
        """Surfaces for a shape in a format: where the shape was measured, else whose shapes come nearest.

        Tables of this accelerator come before the reference's, the format itself before its stand-ins, what we
        measured of the very shape before anything else.

        Returns
        -------
        trusted, every, bare    of this engine (or of any, where it has none), and all: see `_fastest`; whether they are
                                ours, which time a product without the kernel that narrows its input
        """
        names = dict.fromkeys((name, *_STAND_INS.get(name, ()), "bf16"))
        formats = [_SAME.get(other, (other,)) for other in names]
        pools = [tuple(s for s in sources if s.has(kind)) for sources in (self._own, self._reference)]
        for group in formats:
            for pool in pools:
                found = [
                    (round(surface.distance(feature), 9), source, dtype, surface)
                    for source in pool
                    for dtype in group
                    if (surface := find(source, dtype)) is not None
                ]
                if not found:
                    continue
                distance = min(entry[0] for entry in found)
                near = [entry for entry in found if entry[0] == distance]
                if distance == 0 and near[0][1].card.engine is None:
                    near = near[:1]
                mine = [entry for entry in near if entry[1].card.engine in (None, self.engine)] or near
                for _, source, dtype, _ in mine:
                    origin = self._origin(source, kind, distance == 0)
                    standing_in = "" if group == formats[0] else f"{dtype} efficiencies, "
                    self._note(f"{kind} {name}", f"derived: {standing_in}{origin}" if standing_in else origin)
                bare = all(source.card.engine is None for _, source, _, _ in mine)
                return tuple(entry[3] for entry in mine), tuple(entry[3] for entry in near), bare
        raise InputError(f"profiles/{REFERENCE} lacks the {kind} table all others need")

    def _bound(self, kernel: Arithmetic, flops: Floats, moved: Floats) -> Floats:
        """Roofline: no operation takes less than its arithmetic at peak, nor less than its traffic at peak."""
        return np.maximum(flops / self.gpu.peak_flops_per_s(kernel.peak), moved / self.gpu.memory_bytes_per_s)

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

    def gemm_time_s(self, name: str, m: ArrayLike, n: int, k: int, *, fused: bool = False) -> Floats:
        """Time of out[m,n] = in[m,k] W[n,k]^T.

        Parameters
        ----------
        name : str                      number format of the weights, a key of `FORMATS`; weight-only formats read
                                        fewer bytes and compute in 16 bit, unpacking hides behind the reads (derived)
        m : int64[...]                  rows, >= 0
        n, k : int                      shape of the weights
        fused : bool                    the input arrives in the narrow format of the arithmetic; otherwise a kernel
                                        narrows it, which the tables of engines hold and our own do not

        Returns
        -------
        float64[...]                    seconds; 0 where m == 0

        Raises
        ------
        UsageError                      a format the accelerator lacks, a size that is not a number in range

        Notes
        -----
        time = (floor + roofline) / ratio, with the floor fixed in seconds and the ratio interpolated in log m between
        measured sizes, and between measured shapes as `Surface` says.
        """
        bound, rows = self._gemm_bound(name, m, n, k)
        feature = gemm_feature(n, k)
        trusted, every, bare = self._best("gemm", name, feature, lambda source, dtype: source.gemm(dtype))
        floor = GEMM_FLOOR_S + GEMM_FLOOR_S_PER_DEPTH * k
        ratio = _fastest(trusted, every, feature, np.log(np.maximum(rows, 1.0)))
        seconds = np.where(rows > 0, np.maximum((floor + bound) / ratio, bound), 0.0)
        kernel = self.kernel(name)
        if kernel.input_bytes < 2 and bare and not fused:
            seconds = seconds + self.memory_time_s(rows * (k * (2.0 + kernel.input_bytes)))
        return np.asarray(seconds)

    def gemm_roofline_s(self, name: str, m: ArrayLike, n: int, k: int) -> Floats:
        """Least time the datasheet allows for `gemm_time_s` with the same arguments; same errors."""
        return self._gemm_bound(name, m, n, k)[0]

    def _gemm_bound(self, name: str, m: ArrayLike, n: int, k: int) -> tuple[Floats, Floats]:
        """Roofline and rows of a product."""
        kernel, rows = self.kernel(name), sizes("m", m)
        flops, moved = gemm_work(rows, _count("n", n), _count("k", k), kernel.input_bytes, kernel.weight_bytes)
        return np.asarray(np.where(rows > 0, self._bound(kernel, flops, moved), 0.0)), rows

    def moe_time_s(
        self,
        name: str,
        tokens: ArrayLike,
        hidden: int,
        expert_ffn: int,
        experts: int,
        held: int,
        topk: int,
        routing: str = "uniform",
    ) -> Floats:
        """Time of the fused experts of one layer on one rank: gate-up, activation, down.

        Parameters
        ----------
        name : str                      number format of the experts, a key of `FORMATS`
        tokens : float64[...]           tokens routed over all experts, >= 0
        hidden, expert_ffn : int        width of the model, and of one expert on this rank
        experts, held, topk : int       experts of the layer, those on this rank, experts per token
        routing : str                   "uniform" at random, or "skewed" as the power-law tables have it

        Returns
        -------
        float64[...]                    seconds; 0 where tokens == 0

        Raises
        ------
        UsageError                      a format the accelerator lacks, a size that is not a number in range

        Notes
        -----
        As `gemm_time_s`, with the ratio interpolated in tokens per expert.
        """
        bound, routed = self._moe_bound(name, tokens, hidden, expert_ffn, experts, held, topk)
        feature = moe_feature(hidden, expert_ffn, experts, held, topk)

        def find(source: Source, dtype: str) -> Surface | None:
            found = (source.moe(dtype, wanted) for wanted in _ROUTINGS[routing])
            return next((surface for surface in found if surface is not None), None)

        trusted, every, _ = self._best("moe", name, feature, find)
        ratio = _fastest(trusted, every, feature, np.log(np.maximum(routed, 1.0) * topk / experts))
        return np.asarray(np.where(routed > 0, np.maximum((MOE_FLOOR_S + bound) / ratio, bound), 0.0))

    def moe_roofline_s(
        self, name: str, tokens: ArrayLike, hidden: int, expert_ffn: int, experts: int, held: int, topk: int
    ) -> Floats:
        """Least time the datasheet allows for `moe_time_s` with the same arguments; same errors."""
        return self._moe_bound(name, tokens, hidden, expert_ffn, experts, held, topk)[0]

    def _moe_bound(
        self, name: str, tokens: ArrayLike, hidden: int, ffn: int, experts: int, held: int, topk: int
    ) -> tuple[Floats, Floats]:
        """Roofline and tokens of the fused experts."""
        kernel, routed = self.kernel(name), sizes("tokens", tokens)
        _count("experts", experts)
        for what, value in (("held", held), ("topk", topk)):
            if _count(what, value) > experts:
                raise UsageError(f"{what} = {value} must be at most the {experts} experts of the layer")
        shape = (_count("hidden", hidden), _count("expert_ffn", ffn), experts, held, topk)
        flops, moved = moe_work(routed, *shape, kernel.weight_bytes)
        return np.asarray(np.where(routed > 0, self._bound(kernel, flops, moved), 0.0)), routed

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
        source = next(self._sources("memory"), (None,))[0]
        if source is None:
            raise InputError(f"profiles/{REFERENCE} lacks the memory table all others need")
        self._note("memory", self._origin(source, "memory"))
        law = source.memory()
        base_s, slope_s = law.floors[kind]
        floor_s = base_s + slope_s * width if launched else 0.0
        return np.asarray(np.where(moved > 0, floor_s + moved / (law.efficiency * self.gpu.memory_bytes_per_s), 0.0))

    def decode_attention(
        self,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        kv_format: str,
        sequences: ArrayLike,
        window: int | None = None,
    ) -> tuple[Floats, Floats]:
        """Decode attention of one layer: time = base + per_token x (tokens of context summed over the batch).

        Parameters
        ----------
        query_heads, kv_heads, head_dim : int   heads on this rank and their width
        kv_format : str                         a key of `KV_BYTES`
        sequences : int64[...]                  sequences of the batch, >= 0
        window : int or None                    tokens a query sees at most

        Returns
        -------
        base_s, per_token_s : float64[...]      both 0 where there is no sequence

        Raises
        ------
        UsageError                              a size that is not a number in range

        Notes
        -----
        Fitted per measured batch of the nearest shape, interpolated in the logarithm of sequences x KV heads, the
        pieces of work a kernel has to spread. Beyond the largest the share of bandwidth holds and the base grows in
        proportion. Within a short window (up to 1,024 tokens) every sequence is charged the whole window; a longer
        one is charged as if it had no end.
        """
        count = sizes("sequences", sequences)
        for what, value in (("query_heads", query_heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            _count(what, value)
        short = window if window is not None and window <= _LONGEST_WINDOW else 0
        token_bytes = 2.0 * kv_heads * head_dim * _kv_bytes(kv_format)
        law, measured_window = self._decode_law(
            "attention_decode", (query_heads, kv_heads, head_dim), kv_format, short
        )
        base, traffic = self._read_decode(law, count, kv_heads, token_bytes)
        compute = 4.0 * query_heads * head_dim / (self._half_peak() * _DECODE_COMPUTE_EFFICIENCY)
        per_token = np.maximum(traffic, compute)
        if short:
            base = base if measured_window else base + per_token * count * short
            per_token = np.zeros_like(per_token)
        return np.asarray(np.where(count > 0, base, 0.0)), np.asarray(np.where(count > 0, per_token, 0.0))

    def prefill_attention(
        self,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        kv_format: str,
        chunk: ArrayLike,
        window: int | None = None,
    ) -> tuple[Floats, Floats]:
        """Prefill attention of one layer and one sequence: base + per_pair x query-key pairs.

        Parameters
        ----------
        query_heads, kv_heads, head_dim : int   heads on this rank and their width
        kv_format : str                         a key of `KV_BYTES`
        chunk : int64[...]                      new tokens of the sequence in this batch, >= 0
        window : int or None                    tokens a query sees at most

        Returns
        -------
        base_s, per_pair_s : float64[...]       pairs are those under the causal mask; 0 where chunk == 0. The launch
                                                is not in the base: sequences of a batch share it.

        Raises
        ------
        UsageError                              a size that is not a number in range

        Notes
        -----
        A whole prompt takes what the nearest measured shape took, scaled by heads and width. Pairs with tokens of
        earlier chunks are charged at the rate of the longest prompts, but at least the time to read their keys.
        """
        count = sizes("chunk", chunk)
        for what, value in (("query_heads", query_heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            _count(what, value)
        short = window if window is not None and window <= _LONGEST_WINDOW else 0
        law, measured_window = self._prefill_law(
            "attention_prefill", (query_heads, kv_heads, head_dim), kv_format, short
        )
        token_bytes = 2.0 * kv_heads * head_dim * _kv_bytes(kv_format)
        base, pair = self._read_prefill(law, count, 4.0 * query_heads * head_dim, token_bytes)
        if short:
            seen = np.minimum(count, short)
            pairs = count * seen - seen * (seen - 1) / 2
            base = base if measured_window else base + pair * pairs
            pair = np.zeros_like(pair)
        return base, pair

    def latent_decode(
        self, heads: int, kv_lora_rank: int, rope_dim: int, kv_format: str, sequences: ArrayLike
    ) -> tuple[Floats, Floats]:
        """Decode over a latent cache, without projections: as `decode_attention`, `heads` on this rank."""
        count = sizes("sequences", sequences)
        width = _count("kv_lora_rank", kv_lora_rank) + _count("rope_dim", rope_dim)
        law, _ = self._decode_law("mla_kernel_decode", (_count("heads", heads), *_LATENT), kv_format, 0)
        base, traffic = self._read_decode(law, count, 1, width * float(_kv_bytes(kv_format)))
        compute = 2.0 * heads * (2 * kv_lora_rank + rope_dim) / (self._half_peak() * _DECODE_COMPUTE_EFFICIENCY)
        # What is read once serves all heads: with many of them the arithmetic decides, and the fitted share holds it.
        per_token = np.where(law.efficiency[-1] < 1.0, traffic, np.maximum(traffic, compute))
        return np.asarray(np.where(count > 0, base, 0.0)), np.asarray(np.where(count > 0, per_token, 0.0))

    def latent_prefill(
        self, heads: int, key_dim: int, value_dim: int, kv_format: str, chunk: ArrayLike
    ) -> tuple[Floats, Floats]:
        """Prefill attention over keys and values expanded from the latent cache: as `prefill_attention`."""
        count = sizes("chunk", chunk)
        law, _ = self._prefill_law("mla_kernel_prefill", (_count("heads", heads), *_LATENT), kv_format, 0)
        flops = 2.0 * heads * (_count("key_dim", key_dim) + _count("value_dim", value_dim))
        return self._read_prefill(law, count, flops, heads * (key_dim + value_dim) * 2.0)

    def _decode_law(
        self, kind: str, shape: tuple[int, int, int], kv_format: str, window: int
    ) -> tuple[DecodeLaw, bool]:
        """Law of the nearest measured shape, and whether it was measured with the window."""
        source, dtype, index, found = self._nearest(kind, shape, kv_format, window)
        shapes = source.shapes(kind, dtype, found)
        assert shapes is not None
        _, kv_heads, head_dim = (int(size) for size in shapes.shapes[index])
        width = head_dim if kind.startswith("mla") else 2 * kv_heads * head_dim
        return source.decode(kind, dtype, found, index, float(width * KV_BYTES[dtype])), found == window > 0

    def _prefill_law(
        self, kind: str, shape: tuple[int, int, int], kv_format: str, window: int
    ) -> tuple[PrefillLaw, bool]:
        """Law of the nearest measured shape, and whether it was measured with the window."""
        source, dtype, index, found = self._nearest(kind, shape, kv_format, window)
        shapes = source.shapes(kind, dtype, found)
        assert shapes is not None
        heads, _, head_dim = (int(size) for size in shapes.shapes[index])
        width = 2 * _LATENT_PAIR if kind.startswith("mla") else 4 * head_dim
        return source.prefill(kind, dtype, found, index, float(heads * width)), found == window > 0

    def _nearest(
        self, kind: str, shape: tuple[int, int, int], kv_format: str, window: int
    ) -> tuple[Source, str, int, int]:
        """Source, KV format, index and window of the measured shape nearest to a shape of heads.

        The window itself before none, the KV format itself before another.
        """
        half = ("bf16", "fp16") if kv_format in ("bf16", "fp16") else (kv_format,)
        for names in (half, tuple(KV_BYTES)):
            for tier in self._sources(kind):
                for wanted in dict.fromkeys((window, 0)):
                    found = [
                        (*reversed(shapes.nearest(*shape)), source, dtype)
                        for source in tier
                        for dtype in names
                        if (shapes := source.shapes(kind, dtype, wanted)) is not None
                    ]
                    if found:
                        distance, index, source, dtype = min(found, key=lambda entry: round(float(entry[0]), 9))
                        self._note(kind.replace("_", " "), self._origin(source, kind, float(distance) < 1e-9))
                        return source, dtype, int(index), wanted
        raise InputError(f"profiles/{REFERENCE} lacks the {kind} table all others need")

    def _read_decode(self, law: DecodeLaw, count: Floats, units: int, token_bytes: float) -> tuple[Floats, Floats]:
        """Base and time per token of context of batches."""
        units_log = np.log(np.maximum(count, 1.0) * units)
        beyond = np.exp(np.maximum(units_log - law.units_log[-1], 0.0))
        base = np.interp(units_log, law.units_log, law.base_s) * beyond
        share = np.interp(units_log, law.units_log, law.efficiency)
        return base, token_bytes / (share * self.gpu.memory_bytes_per_s)

    def _read_prefill(
        self, law: PrefillLaw, count: Floats, pair_flops: float, token_bytes: float
    ) -> tuple[Floats, Floats]:
        """Base and time per pair of chunks."""
        length_log = np.log(np.maximum(count, 1.0))
        extra = np.interp(length_log, law.length_log, law.extra_s) * pair_flops
        beyond = np.exp(np.maximum(length_log - law.length_log[-1], 0.0))
        reading = token_bytes / self.gpu.memory_bytes_per_s / np.maximum(count, 1.0)
        pair = np.maximum(law.pair_s * pair_flops, reading)
        some = count > 0
        return np.asarray(np.where(some, extra * beyond, 0.0)), np.asarray(np.where(some, pair, 0.0))

    def _half_peak(self) -> float:
        return self.gpu.peak_flops_per_s(self.gpu.half_dtype)


def load_profile(gpu: Gpu, engine: str = "vllm", root: Path | None = None) -> Profile:
    """The profile of an accelerator.

    Parameters
    ----------
    gpu : Gpu           its `profile` names a folder of folders with tables measured on it, or is None
    engine : str        engine whose kernels are preferred
    root : Path         folder of all profiles, by default the one that ships with the package

    Raises
    ------
    UnknownNameError    `gpu.profile` names a folder that does not exist
    InputError          a card or table with faults
    """
    folder = DATA_ROOT / "profiles" if root is None else root
    own: tuple[Source, ...] = ()
    if gpu.profile is not None:
        own = _load_sources(folder / gpu.profile)
        if not own:
            raise UnknownNameError(
                f"profile of {gpu.name}",
                gpu.profile,
                sorted({path.parent.parent.name for path in folder.glob("*/*/card.toml")}),
                f"folders of {folder}; leave it out to derive from the datasheet",
            )
    return Profile(gpu, engine, own, _load_sources(DATA_ROOT / "profiles" / REFERENCE))


@lru_cache(maxsize=64)
def _load_sources(folder: Path) -> tuple[Source, ...]:
    """Folders with cards below a folder: our own measurements first, then the newest of each engine."""
    found = [load_source(path.parent) for path in sorted(folder.glob("*/card.toml"))]
    return tuple(sorted(found, key=lambda source: source.card.engine is not None))


def _fastest(
    trusted: tuple[Surface, ...], every: tuple[Surface, ...], feature: tuple[float, ...], size_log: Floats
) -> Floats:
    """Ratio of bound to time: of this engine's fastest variant, unless other engines' tables expose it.

    Variants of a format (fp8 scaled by tensor or by block) are the deployer's choice. Engines share kernel libraries, so
    a time far above what another engine's collection has for the same shape is a launch floor of the collection.
    """
    ratio = _largest(trusted, feature, size_log)
    if len(every) == len(trusted):
        return ratio
    best = _largest(every, feature, size_log)
    return np.where(ratio * _EXPOSED < best, best, ratio)


def _largest(surfaces: tuple[Surface, ...], feature: tuple[float, ...], size_log: Floats) -> Floats:
    ratios = [surface.ratio(feature, size_log) for surface in surfaces]
    return ratios[0] if len(ratios) == 1 else np.asarray(np.maximum.reduce(ratios))


def _kv_bytes(name: str) -> int:
    """Bytes of an element of the KV cache."""
    if name not in KV_BYTES:
        raise UnknownNameError("KV format", name, KV_BYTES)
    return KV_BYTES[name]


def _count(name: str, value: int) -> int:
    """A whole number from 1 to 2^31."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= _MAX_COUNT:
        raise UsageError(f"{name} = {shown(value)} must be a whole number from 1 to {_MAX_COUNT}")
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
