"""Time and energy of single operations on one accelerator.

Precedence: tables measured on this accelerator with this engine's kernels, else with another engine's, else the
efficiencies measured on the H200 applied to this accelerator's datasheet. `Profile.provenance` says which were used,
per operation. All times are float64 seconds over arrays of sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.cluster.toml_reader import shown
from apex_opt.cluster.types import REFERENCE
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.files import expanded
from apex_opt.ir.formats import KV_BYTES, SMALL_GROUPS
from apex_opt.profiles.clock import Clock
from apex_opt.profiles.laws import (
    GEMM_FLOOR_S,
    GEMM_FLOOR_S_PER_DEPTH,
    LATENT_PAIR,
    LATENT_RANK,
    LATENT_ROPE,
    MOE_FLOOR_S,
    DecodeLaw,
    PrefillLaw,
    Source,
    gemm_feature,
    load_source,
    moe_feature,
)
from apex_opt.profiles.physics import (
    Arithmetic,
    causal_pairs,
    context_work,
    experts_work,
    gemm_work,
    hyper_work,
    latent_work,
    pair_flops,
    score_work,
)
from apex_opt.profiles.power import PowerModel, scale_power
from apex_opt.profiles.schema import TABLE_ENGINES
from apex_opt.profiles.sources.aiconfigurator import data_folder
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from apex_opt.cluster.types import Gpu
    from apex_opt.profiles.physics import StateWork
    from apex_opt.profiles.surface import Surface

    Floats = NDArray[np.float64]

SHIPPED, SILICON = "shipped", "silicon"
"""In place of a folder of profiles: those that ship; all the rows that these are a part of."""

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
}

# Routings of tables for each way tokens may fall on experts: those of its kind, then its stand-ins, each in the order
# of preference.
_ROUTINGS: Final = {
    "uniform": (("uniform", "balanced"),),
    "skewed": (("power_law_1.01", "power_law_1.2"), ("uniform", "balanced")),
}

_BEYOND: Final = "roofline at the efficiency of the nearest shapes, beyond the measured shapes of"
_EXPOSED: Final = 1.25
"""A time this many times another engine's for the same product is not believed."""
_SPREAD: Final = 64
"""Decoding sequences at which the tables of other engines are compared."""

_ARITHMETIC_SHARE: Final = 0.5
"""Share of peak arithmetic that kernels reach which no table has. Assumed."""

_MAX_SIZE: Final = 2.0**53
_MAX_COUNT: Final = 2**31
_LONGEST_WINDOW: Final = 1024
"""Tokens of the longest attention window that is told from the whole context."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pick:
    """A surface that tells of a shape; `trusted` where it is the engine's own, or no other is."""

    surface: Surface
    origin: str
    trusted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Nearest:
    """Where the measured shape nearest to a shape of heads lies; a `window` of 0 is none."""

    source: Source
    kind: str
    dtype: str
    window: int
    index: int
    distance: float

    def decode(self) -> DecodeLaw:
        return self.source.decode(self.kind, self.dtype, self.window, self.index)

    def prefill(self) -> PrefillLaw:
        return self.source.prefill(self.kind, self.dtype, self.window, self.index)


class Profile:
    """Times of operations on one accelerator with one engine's kernels; make it with `load_profile`.

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
    ) -> tuple[tuple[_Pick, ...], bool]:
        """Surfaces for a shape in a format: where the shape was measured, else whose shapes come nearest.

        The format itself comes before its stand-ins, tables of this accelerator before those of references, a routing
        before its stand-ins; then what we measured of the very shape before anything else.

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
                serving = any(self._serves(source) for _, source, _, _ in near)
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
                    picks.append(_Pick(surface=surface, origin=origin, trusted=self._serves(source) or not serving))
                return tuple(picks), all(source.card.engine is None for _, source, _, _ in near)
        raise InputError(f"profiles/{REFERENCE} lacks the {kind} table all others need")

    def _ratio(self, operation: str, picks: tuple[_Pick, ...], feature: tuple[float, ...], size_log: Floats) -> Floats:
        """Ratio of bound to time: of this engine's fastest variant, unless other engines' tables expose it.

        Variants of a format (fp8 scaled by tensor or by block) are the deployer's choice. Engines share kernel
        libraries, so a time far above what another engine's collection has for the same shape is a launch floor of the
        collection.
        """
        trusted = [pick for pick in picks if pick.trusted]
        others = [pick for pick in picks if not pick.trusted]
        for pick in trusted:
            beyond = size_log.size and float(size_log.max()) > pick.surface.last(feature) + 1e-9
            self._note(
                operation, f"{pick.origin}, roofline at the last efficiency beyond its sizes" if beyond else pick.origin
            )
        ratio = _largest(trusted, feature, size_log)
        if not others:
            return ratio
        other = _largest(others, feature, size_log)
        exposed = ratio * _EXPOSED < other
        if exposed.any():
            for pick in others:
                self._note(operation, f"{pick.origin}, where the engine's own table is {_EXPOSED:g} times slower")
        return np.asarray(np.where(exposed, other, ratio))

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
        time = (floor + roofline) / ratio, at least the roofline, with the floor fixed in seconds and the ratio
        interpolated in log m between measured sizes, and between measured shapes as `Surface` says. Beyond the measured
        sizes and shapes the ratio of the last holds: there the time is the roofline at the efficiency of the nearest.
        """
        kernel, rows = self.kernel(name), sizes("m", m)
        work = gemm_work(rows, _count("n", n), _count("k", k), kernel.input_bytes, kernel.weight_bytes)
        bound = self._bound(kernel, *work)
        feature = gemm_feature(n, k)
        picks, bare = self._best("gemm", name, feature, lambda source, dtype, _: source.gemm(dtype))
        ratio = self._ratio(f"gemm {name}", picks, feature, np.log(np.maximum(rows, 1.0)))
        floor = (GEMM_FLOOR_S + GEMM_FLOOR_S_PER_DEPTH * k) / self.clock.share
        seconds = np.where(rows > 0, np.maximum((floor + bound) / ratio, bound), 0.0)
        if kernel.input_bytes < 2 and bare and not fused:
            seconds = seconds + self.memory_time_s(rows * (k * (2.0 + kernel.input_bytes)))
        return np.asarray(seconds)

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
        matrices: int = 3,
    ) -> Floats:
        """Time of the fused experts of one layer on one rank: gate-up, activation, down.

        Parameters
        ----------
        name : str                      number format of the experts, a key of `FORMATS`
        tokens : float64[...]           tokens routed over all experts, >= 0
        hidden, expert_ffn : int        width of the model, and of one expert on this rank
        experts, held, topk : int       experts of the layer, those on this rank, experts per token
        routing : str                   "uniform" at random, or "skewed" as the power-law tables have it
        matrices : int                  of an expert: 3 with a gate, else 2

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
        kernel, routed = self.kernel(name), sizes("tokens", tokens)
        _count("experts", experts)
        for what, value in (("held", held), ("topk", topk)):
            if _count(what, value) > experts:
                raise UsageError(f"{what} = {value} must be at most the {experts} experts of the layer")
        if routing not in _ROUTINGS:
            raise UnknownNameError("routing", routing, _ROUTINGS)
        shape = (_count("hidden", hidden), _count("expert_ffn", expert_ffn), experts, held, topk)
        bound = self._bound(kernel, *experts_work(routed, *shape, weight_bytes=kernel.weight_bytes, matrices=matrices))
        feature = moe_feature(*shape)

        def find(source: Source, dtype: str, wanted: tuple[str, ...]) -> Surface | None:
            found = (source.moe(dtype, one) for one in wanted)
            return next((surface for surface in found if surface is not None), None)

        picks, _ = self._best("moe", name, feature, find, _ROUTINGS[routing])
        ratio = self._ratio(f"moe {name}", picks, feature, np.log(np.maximum(routed, 1.0) * topk / experts))
        floor = MOE_FLOOR_S / self.clock.share
        return np.asarray(np.where(routed > 0, np.maximum((floor + bound) / ratio, bound), 0.0))

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
        pieces of work a kernel has to spread. The context is worked through at the share of the roofline that shape
        reaches. Beyond the largest batch the share holds and the base grows in proportion. Within a short window (up
        to 1,024 tokens) every sequence is charged the whole window; a longer one is charged as if it had no end.
        """
        count = sizes("sequences", sequences)
        shape = (_count("query_heads", query_heads), _count("kv_heads", kv_heads), _count("head_dim", head_dim))
        short = _short(window)
        nearest = self._nearest("attention_decode", shape, kv_format, short)
        base, per_token = self._read_decode(nearest, count, kv_heads, context_work(*shape, KV_BYTES[kv_format]))
        if short:
            return base + per_token * count * short, np.zeros_like(per_token)
        return base, per_token

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
        A whole prompt takes what the nearest measured shape took, scaled by heads and width; several in one batch are
        charged one after another, though many short ones take less. Pairs with tokens of earlier chunks are charged at
        the rate of the longest prompts, but at least the time to read their keys.
        """
        count = sizes("chunk", chunk)
        shape = (_count("query_heads", query_heads), _count("kv_heads", kv_heads), _count("head_dim", head_dim))
        short = _short(window)
        nearest = self._nearest("attention_prefill", shape, kv_format, short)
        base, pair = self._read_prefill(
            nearest,
            count,
            pair_flops(query_heads, head_dim, head_dim),
            context_work(*shape, KV_BYTES[kv_format])[1],
        )
        if short:
            return base + pair * causal_pairs(count, np.minimum(count, short)), np.zeros_like(pair)
        return base, pair

    def latent_decode(
        self, heads: int, kv_lora_rank: int, rope_dim: int, kv_format: str, sequences: ArrayLike
    ) -> tuple[Floats, Floats]:
        """Decode over a latent cache, without projections: as `decode_attention`, `heads` on this rank.

        Parameters
        ----------
        heads : int           query heads
        kv_lora_rank : int    elements of the latent vector
        rope_dim : int        elements with positions
        kv_format : str       of the cache
        sequences : array     in the batch
        """
        count = sizes("sequences", sequences)
        parts = (_count("kv_lora_rank", kv_lora_rank), _count("rope_dim", rope_dim, least=0))
        nearest = self._nearest("mla_kernel_decode", (_count("heads", heads), 1, sum(parts)), kv_format, 0)
        return self._read_decode(nearest, count, 1, latent_work(heads, *parts, KV_BYTES[kv_format]))

    def latent_prefill(
        self, heads: int, key_dim: int, value_dim: int, kv_format: str, chunk: ArrayLike
    ) -> tuple[Floats, Floats]:
        """Prefill attention over keys and values expanded from the latent cache: as `prefill_attention`.

        Parameters
        ----------
        heads : int        query heads
        key_dim : int      elements of a key
        value_dim : int    elements of a value
        kv_format : str    of the cache
        chunk : array      tokens of a prompt
        """
        count = sizes("chunk", chunk)
        pair = _count("key_dim", key_dim) + _count("value_dim", value_dim)
        # Tables name the cached vector, which prompts do not read: another pair of widths is another shape.
        width = (LATENT_RANK + LATENT_ROPE) * pair // sum(LATENT_PAIR)
        nearest = self._nearest("mla_kernel_prefill", (_count("heads", heads), 1, width), kv_format, 0)
        return self._read_prefill(nearest, count, pair_flops(heads, key_dim, value_dim), heads * pair * 2.0)

    @property
    def indexer_dtype(self) -> str:
        """What indexers compute in: 8 bits where the accelerator has them."""
        return "fp8" if "fp8" in dict(self.gpu.flops_per_s) else self.gpu.half_dtype

    def _derived_s(self, operation: str, dtype: str, flops: Floats | float, moved: Floats | float) -> Floats:
        """Time of a kernel that no table has: the assumed share of arithmetic, the measured one of bandwidth."""
        self._note(operation, f"derived: roofline, {_ARITHMETIC_SHARE:g} of arithmetic assumed")
        peak = self.gpu.peak_flops_per_s(dtype) * self.clock.share * _ARITHMETIC_SHARE
        return np.asarray(np.maximum(flops / peak, self.memory_time_s(moved, launched=False)))

    def score_decode(
        self, heads: int, width: int, token_bytes: float, ratio: int, sequences: ArrayLike
    ) -> tuple[Floats, Floats]:
        """Decode of an indexer: base by sequences, and seconds per token of context.

        Parameters
        ----------
        heads, width : int       heads of the indexer and elements of each
        token_bytes : float      read per entry of its cache
        ratio : int              tokens of context per entry
        sequences : int64[...]   of the batch
        """
        count = sizes("sequences", sequences)
        decode, _ = score_work(_count("heads", heads), _count("width", width), token_bytes, _count("ratio", ratio))
        per_token = self._derived_s("indexer", self.indexer_dtype, *decode)
        launches = 2 * self._launch_s(count)
        return launches, np.where(count > 0, per_token, 0.0)

    def score_prefill(
        self, heads: int, width: int, token_bytes: float, ratio: int, chunk: ArrayLike
    ) -> tuple[Floats, Floats]:
        """Prompts of an indexer: base of a chunk, without launches, and seconds per query-key pair.

        Parameters
        ----------
        heads, width : int     heads of the indexer and elements of each
        token_bytes : float    read per entry of its cache
        ratio : int            tokens of context per entry
        chunk : int64[...]     tokens of a prompt
        """
        count = sizes("chunk", chunk)
        _, pair = score_work(_count("heads", heads), _count("width", width), token_bytes, _count("ratio", ratio))
        per_pair = self._derived_s("indexer", self.indexer_dtype, *pair)
        return np.zeros_like(count), np.where(count > 0, per_pair, 0.0)

    def state_decode(self, name: str, work: StateWork, sequences: ArrayLike, queries: int = 1) -> Floats:
        """Decode of an operation that keeps a state, by sequences; launches included.

        Parameters
        ----------
        name : str                what it is
        work : StateWork          of one shard
        sequences : int64[...]    of the batch
        queries : int             tokens of each: one, and its drafts, after each of which the state is kept
        """
        count = sizes("sequences", sequences)
        moved = count * (work.state_bytes * (1 + queries) + work.token_bytes * queries)
        seconds = self._derived_s(name, self.gpu.half_dtype, count * work.step_flops * queries, moved)
        return np.asarray(seconds + self._launch_s(count))

    def state_prefill(self, name: str, work: StateWork, chunk: ArrayLike) -> tuple[float, Floats]:
        """Prompts of an operation that keeps a state: launches that a batch shares, and seconds of each chunk.

        Parameters
        ----------
        name : str            what it is
        work : StateWork      of one shard
        chunk : int64[...]    tokens of a prompt
        """
        count = sizes("chunk", chunk)
        moved = np.where(count > 0, 2 * work.state_bytes + work.prompt_bytes * count, 0.0)
        seconds = self._derived_s(name, self.gpu.half_dtype, count * work.prompt_flops, moved)
        return float(self._launch_s(np.ones(1))[0]), seconds

    def _launch_s(self, count: Floats) -> Floats:
        """Launch of a kernel that only reads and writes memory, where there is anything to do."""
        return self.memory_time_s(np.minimum(count, 1.0))

    def hyper_time_s(self, hidden: int, streams: int, tokens: ArrayLike) -> Floats:
        """Time of mixing residual streams before and after a cell, in two kernels.

        Parameters
        ----------
        hidden : int           elements of a stream
        streams : int          how many
        tokens : int64[...]
        """
        count = sizes("tokens", tokens)
        work = hyper_work(count, _count("hidden", hidden), _count("streams", streams))
        return np.asarray(self._derived_s("hyper connections", self.gpu.half_dtype, *work) + 2 * self._launch_s(count))

    def _nearest(self, kind: str, shape: tuple[int, int, int], kv_format: str, window: int) -> _Nearest:
        """The measured shape nearest to a shape of heads.

        This accelerator before the reference, the KV format itself before another, the engine before others, the window
        itself before none. Of several other engines the one that is fastest: they choose among the same kernels.
        """
        if kv_format not in KV_BYTES:
            raise UnknownNameError("KV format", kv_format, KV_BYTES)
        half = ("bf16", "fp16") if kv_format in ("bf16", "fp16") else (kv_format,)
        for pool in self._pools:
            for names in (half, tuple(name for name in KV_BYTES if name not in half)):
                for tier in self._tiers(pool, kind):
                    for wanted in dict.fromkeys((window, 0)):
                        found = _nearest_of(tier, kind, names, wanted, shape)
                        if found:
                            serving = self._serves(tier[0])
                            best = found[0] if serving else max(found, key=_pace)
                            self._note_nearest(best, names is half, wanted == window)
                            return best
        raise InputError(f"profiles/{REFERENCE} lacks the {kind} table all others need")

    def _note_nearest(self, best: _Nearest, same_format: bool, same_window: bool) -> None:
        """Note which table an attention law is of, and what keeps it from being the table's own."""
        how = [] if same_format else [f"{best.dtype} cache,"]
        if not same_window:
            how.append("no window,")
        if best.distance > 0:
            how.append("the nearest shape of")
        elif how:
            how.append("from")
        law = best.decode() if best.kind.endswith("decode") else best.prefill()
        if not law.fitted:
            how = ["roofline above the launches of"]
        self._note(best.kind.replace("_", " "), self._origin(best.source, best.kind, " ".join(how)))

    def _read_decode(
        self, nearest: _Nearest, count: Floats, units: int, work: tuple[float, float]
    ) -> tuple[Floats, Floats]:
        """Base and time per token of context of batches; `work` is FLOP and bytes per token."""
        law = nearest.decode()
        units_log = np.log(np.maximum(count, 1.0) * units)
        beyond = np.exp(np.maximum(units_log - law.units_log[-1], 0.0))
        base = np.interp(units_log, law.units_log, law.base_s) * beyond / self.clock.share
        per_token = self._bound(self.kernel(self.gpu.half_dtype), *work) / np.interp(
            units_log, law.units_log, law.share
        )
        return np.asarray(np.where(count > 0, base, 0.0)), np.asarray(np.where(count > 0, per_token, 0.0))

    def _read_prefill(
        self, nearest: _Nearest, count: Floats, pair_flops: float, token_bytes: float
    ) -> tuple[Floats, Floats]:
        """Base and time per pair of chunks."""
        law = nearest.prefill()
        at_peak = pair_flops / (self.gpu.peak_flops_per_s(self.gpu.half_dtype) * self.clock.share)
        length_log = np.log(np.maximum(count, 1.0))
        beyond = np.exp(np.maximum(length_log - law.length_log[-1], 0.0))
        base = np.interp(length_log, law.length_log, law.extra) * at_peak * beyond
        reading = token_bytes / self.gpu.memory_bytes_per_s / np.maximum(count, 1.0)
        pair = np.maximum(at_peak / law.share, reading)
        return np.asarray(np.where(count > 0, base, 0.0)), np.asarray(np.where(count > 0, pair, 0.0))


def check_profiles(profiles: str) -> str:
    """What `load_profile` is to take its tables from, where there is something; `~` is the home folder.

    Raises
    ------
    InputError      no such folder of profile folders; no package to read all rows from
    """
    if profiles == SILICON:
        data_folder()
    if profiles in (SHIPPED, SILICON):
        return profiles
    folder = expanded(profiles)
    if not folder.is_dir() or not any(folder.glob("*/*/card.toml")):
        raise InputError(
            f"--profiles: {profiles[:60]!r} is neither {SHIPPED} nor {SILICON} nor a folder of profile folders "
            "(<accelerator>/<source>/card.toml)"
        )
    return str(folder)


def load_profile(
    gpu: Gpu, engine: str = "vllm", profiles: Path | str = SHIPPED, clock_mhz: int | None = None
) -> Profile:
    """The profile of an accelerator.

    Parameters
    ----------
    gpu : Gpu           its `profile` names a folder of folders with tables measured on it, or is None; its `like`
                        one of a relative, which comes before `REFERENCE`
    engine : str        engine whose kernels are preferred, of `TABLE_ENGINES`
    profiles : Path     folder of profile folders, which come before those that ship; `SHIPPED` for these alone,
                        `SILICON` for all the rows that they are a part of
    clock_mhz : int     clock it is held at, by the laws of `apex_opt.profiles.clock`; None is the highest

    Raises
    ------
    UnknownNameError    a folder that does not exist; an engine without tables
    InputError          a card or table with faults; no package to read all rows from
    UsageError          a clock it does not have
    """
    if engine not in TABLE_ENGINES:
        raise UnknownNameError("engine of kernel tables", engine, TABLE_ENGINES)
    shipped, whole = DATA_ROOT / "profiles", profiles == SILICON
    own = () if gpu.profile is None else _load_sources(shipped / gpu.profile, whole)
    folder = shipped if profiles in (SHIPPED, SILICON) else Path(profiles).resolve()
    name = gpu.profile if folder == shipped else gpu.profile or gpu.name
    if folder != shipped and name is not None:
        theirs = _load_sources(folder / name)
        own = (*theirs, *own) if theirs else ()
    if name is not None and not own:
        raise UnknownNameError(
            f"profile of {gpu.name}",
            name,
            sorted({path.parent.parent.name for path in folder.glob("*/*/card.toml")}),
            f"folders of {folder}; leave it out to derive from the datasheet",
        )
    references = tuple(_load_sources(shipped / name, whole) for name in dict.fromkeys((gpu.like, REFERENCE)))
    if not all(references):
        folders = sorted({path.parent.parent.name for path in shipped.glob("*/*/card.toml")})
        raise UnknownNameError(f"profile like that of {gpu.name}", gpu.like, folders)
    return Profile(gpu, engine, own, references, Clock.of(gpu, clock_mhz))


@lru_cache(maxsize=64)
def _load_sources(folder: Path, whole: bool = False) -> tuple[Source, ...]:
    """Folders with cards below a folder: those that serve every engine first, our own measurements among them."""
    found = [load_source(path.parent, whole) for path in sorted(folder.glob("*/card.toml"))]
    return tuple(sorted(found, key=lambda source: source.card.engine is not None))


def _largest(picks: Sequence[_Pick], feature: tuple[float, ...], size_log: Floats) -> Floats:
    """The largest ratio of several surfaces."""
    ratios = [pick.surface.ratio(feature, size_log) for pick in picks]
    return ratios[0] if len(ratios) == 1 else np.asarray(np.maximum.reduce(ratios))


def _nearest_of(
    sources: tuple[Source, ...], kind: str, names: tuple[str, ...], window: int, shape: tuple[int, int, int]
) -> list[_Nearest]:
    """The measured shapes nearest to a shape of heads, all equally near."""
    found = []
    for source in sources:
        for dtype in names:
            if (shapes := source.shapes(kind, dtype, window)) is not None:
                index, distance = shapes.nearest(*shape)
                found.append(
                    _Nearest(
                        source=source, kind=kind, dtype=dtype, window=window, index=index, distance=round(distance, 9)
                    )
                )
    least = min((entry.distance for entry in found), default=0.0)
    return [entry for entry in found if entry.distance == least]


def _pace(nearest: _Nearest) -> float:
    """Share of the roofline that a law reaches."""
    if nearest.kind.endswith("prefill"):
        return nearest.prefill().share
    law = nearest.decode()
    return float(np.interp(np.log(_SPREAD), law.units_log, law.share))


def _short(window: int | None) -> int:
    """The window if it is short, else 0."""
    return window if window is not None and _count("window", window) <= _LONGEST_WINDOW else 0


def _count(name: str, value: int, least: int = 1) -> int:
    """A whole number from `least` to 2^31."""
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
