"""Time and energy of single operations on one accelerator.

Precedence: tables measured on this accelerator with this engine's kernels, else with another engine's, else the
efficiencies measured on the H200 applied to this accelerator's datasheet. `Profile.provenance` says which were used,
per operation. All times are float64 seconds over arrays of sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.cluster.types import REFERENCE
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.files import expanded
from apex_opt.ir.formats import KV_BYTES
from apex_opt.profiles.clock import Clock
from apex_opt.profiles.laws import (
    GEMM_FLOOR_S,
    GEMM_FLOOR_S_PER_DEPTH,
    MOE_FLOOR_S,
    DecodeLaw,
    PrefillLaw,
    Source,
    load_source,
)
from apex_opt.profiles.lookup import ROUTINGS, count_of, sizes
from apex_opt.profiles.physics import (
    context_work,
    experts_work,
    gemm_work,
    latent_work,
    pair_flops,
)
from apex_opt.profiles.schema import TABLE_ENGINES
from apex_opt.profiles.shapes import LATENT_PAIR, LATENT_RANK, LATENT_ROPE, gemm_feature, moe_feature
from apex_opt.profiles.sources.aiconfigurator import data_folder
from apex_opt.profiles.states import StateTimes
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from apex_opt.cluster.types import Gpu
    from apex_opt.profiles.surface import Surface

    Floats = NDArray[np.float64]

SHIPPED, SILICON = "shipped", "silicon"
"""In place of a folder of profiles: those that ship; all the rows that these are a part of."""

_SCALED: Final = ("fp8", "fp8_block")
"""Variants of fp8: weights scaled by row or matrix, which dense models mostly are, and by block."""
_SPREAD: Final = 64
"""Decoding sequences at which the tables of other engines are compared."""


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


class Profile(StateTimes):
    """Times of all operations on one accelerator with one engine's kernels; make it with `load_profile`."""

    def gemm_time_s(
        self, name: str, m: ArrayLike, n: int, k: int, *, fused: bool = False, by_block: bool = False
    ) -> Floats:
        """Time of out[m,n] = in[m,k] W[n,k]^T.

        Parameters
        ----------
        name : str                      number format of the weights, a key of `FORMATS`; weight-only formats read
                                        fewer bytes and compute in 16 bit, unpacking hides behind the reads (derived)
        m : int64[...]                  rows, >= 0
        n, k : int                      shape of the weights
        fused : bool                    the input arrives in the narrow format of the arithmetic; otherwise a kernel
                                        narrows it, which the tables of engines hold and our own do not
        by_block : bool                 fp8 weights have a scale for each block, and not for each row or matrix

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
        work = gemm_work(rows, count_of("n", n), count_of("k", k), kernel.input_bytes, kernel.weight_bytes)
        bound = self._bound(kernel, *work)
        feature = gemm_feature(n, k)
        scaled = _SCALED[::-1] if by_block else _SCALED
        prefer = scaled if name == "fp8" else ()
        picks, bare = self._best("gemm", name, feature, lambda source, dtype, _: source.gemm(dtype), prefer=prefer)
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
        As `gemm_time_s`, with the ratio interpolated in tokens per expert. Experts in fp8 have scales by block, as
        most published ones have.
        """
        kernel, routed = self.kernel(name), sizes("tokens", tokens)
        count_of("experts", experts)
        for what, value in (("held", held), ("topk", topk)):
            if count_of(what, value) > experts:
                raise UsageError(f"{what} = {value} must be at most the {experts} experts of the layer")
        if routing not in ROUTINGS:
            raise UnknownNameError("routing", routing, ROUTINGS)
        shape = (count_of("hidden", hidden), count_of("expert_ffn", expert_ffn), experts, held, topk)
        bound = self._bound(kernel, *experts_work(routed, *shape, weight_bytes=kernel.weight_bytes, matrices=matrices))
        feature = moe_feature(*shape)

        def find(source: Source, dtype: str, wanted: tuple[str, ...]) -> Surface | None:
            found = (source.moe(dtype, one) for one in wanted)
            return next((surface for surface in found if surface is not None), None)

        prefer = _SCALED[::-1] if name == "fp8" else ()
        picks, _ = self._best("moe", name, feature, find, ROUTINGS[routing], prefer)
        per_expert = np.log(np.maximum(routed, 1.0) * topk / experts)
        ratio = self._ratio(f"moe {name}", picks, feature, per_expert, whole=held == experts)
        floor = MOE_FLOOR_S / self.clock.share
        return np.asarray(np.where(routed > 0, np.maximum((floor + bound) / ratio, bound), 0.0))

    def decode_attention(
        self,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        kv_format: str,
        sequences: ArrayLike,
        window: int | None = None,
        value_dim: int | None = None,
    ) -> tuple[Floats, Floats]:
        """Decode attention of one layer: time = base + per_token x (tokens of context seen, summed over the batch).

        Parameters
        ----------
        query_heads, kv_heads, head_dim : int   heads on this rank and their width
        kv_format : str                         a key of `KV_BYTES`
        sequences : int64[...]                  sequences of the batch, >= 0
        window : int or None                    tokens a query sees at most; tables of such a window come first
        value_dim : int or None                 width of a value head; None is `head_dim`

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
        reaches. Beyond the largest batch the share holds and the base grows in proportion.
        """
        count = sizes("sequences", sequences)
        shape = (count_of("query_heads", query_heads), count_of("kv_heads", kv_heads), count_of("head_dim", head_dim))
        nearest = self._nearest("attention_decode", shape, kv_format, _window(window))
        return self._read_decode(nearest, count, kv_heads, context_work(*shape, KV_BYTES[kv_format], value_dim))

    def prefill_attention(
        self,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
        kv_format: str,
        chunk: ArrayLike,
        window: int | None = None,
        value_dim: int | None = None,
    ) -> tuple[Floats, Floats]:
        """Prefill attention of one layer and one sequence: base + per_pair x query-key pairs.

        Parameters
        ----------
        query_heads, kv_heads, head_dim : int   heads on this rank and their width
        kv_format : str                         a key of `KV_BYTES`
        chunk : int64[...]                      new tokens of the sequence in this batch, >= 0
        window : int or None                    tokens a query sees at most; tables of such a window come first
        value_dim : int or None                 width of a value head; None is `head_dim`

        Returns
        -------
        base_s, per_pair_s : float64[...]       pairs are those that are seen; 0 where chunk == 0. The launch
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
        shape = (count_of("query_heads", query_heads), count_of("kv_heads", kv_heads), count_of("head_dim", head_dim))
        nearest = self._nearest("attention_prefill", shape, kv_format, _window(window))
        flops = pair_flops(query_heads, head_dim, value_dim or head_dim)
        return self._read_prefill(nearest, count, flops, context_work(*shape, KV_BYTES[kv_format], value_dim)[1])

    def latent_decode(
        self,
        heads: int,
        kv_lora_rank: int,
        rope_dim: int,
        kv_format: str,
        sequences: ArrayLike,
        entry_bytes: float | None = None,
    ) -> tuple[Floats, Floats]:
        """Decode over a latent cache, without projections: as `decode_attention`, `heads` on this rank.

        Parameters
        ----------
        heads : int           query heads
        kv_lora_rank : int    elements of the latent vector
        rope_dim : int        elements with positions
        kv_format : str       of the cache
        sequences : array     in the batch
        entry_bytes : float   of a token in the cache; None: its elements in the format
        """
        count = sizes("sequences", sequences)
        rank = count_of("kv_lora_rank", kv_lora_rank)
        width = rank + count_of("rope_dim", rope_dim, least=0)
        nearest = self._nearest("mla_kernel_decode", (count_of("heads", heads), 1, width), kv_format, 0)
        flops, moved = latent_work(heads, rank, rope_dim, KV_BYTES[kv_format])
        return self._read_decode(nearest, count, 1, (flops, entry_bytes or moved))

    def latent_prefill(
        self,
        heads: int,
        key_dim: int,
        value_dim: int,
        kv_format: str,
        chunk: ArrayLike,
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
        pair = count_of("key_dim", key_dim) + count_of("value_dim", value_dim)
        # Tables name the cached vector, which prompts do not read: another pair of widths is another shape.
        width = (LATENT_RANK + LATENT_ROPE) * pair // sum(LATENT_PAIR)
        nearest = self._nearest("mla_kernel_prefill", (count_of("heads", heads), 1, width), kv_format, 0)
        flops = pair_flops(heads, key_dim, value_dim)
        return self._read_prefill(nearest, count, flops, heads * pair * 2.0)

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


def _window(window: int | None) -> int:
    """A window as tables have it: 0 is none."""
    return 0 if window is None else count_of("window", window)
