"""Time and energy of single operations on one accelerator.

Precedence: tables measured on this accelerator, else efficiencies measured on the H200 applied to this accelerator's
datasheet. `Profile.provenance` says which, per operation. All times are float64 seconds over arrays of sizes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.cluster.toml_reader import shown
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.profiles.laws import (
    ELEMENT_BYTES,
    GEMM_FLOOR_S,
    GEMM_FLOOR_S_PER_DEPTH,
    MOE_FLOOR_S,
    Tables,
    gemm_feature,
    gemm_work,
    load_tables,
    moe_feature,
    moe_work,
)
from apex_opt.profiles.power import PowerModel, scale_power
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from apex_opt.cluster.types import Gpu
    from apex_opt.profiles.surface import Surface

    Floats = NDArray[np.float64]

REFERENCE: Final = "h200-sxm"
"""Folder whose efficiencies stand in where an accelerator has no tables of its own."""

# Asymptotic share of peak of a causal attention kernel, and the length at which half of it is reached: after the
# FlashAttention-3 paper's forward figures on H100 (2024, head width 128), about 0.3 of peak at 512 tokens and above
# 0.6 at 16k. Assumed for every accelerator.
_PREFILL_EFFICIENCY: Final = 0.66
_PREFILL_HALF_LENGTH: Final = 512
# Share of peak that decode attention reaches when its arithmetic and not its traffic limits it. Assumed.
_DECODE_COMPUTE_EFFICIENCY: Final = 0.5

_MAX_SIZE: Final = 2.0**53
_MAX_COUNT: Final = 2**31


class Profile:
    """Times of operations on one accelerator; make it with `load_profile`.

    Attributes
    ----------
    gpu : Gpu
    power : PowerModel
    provenance : dict of str to str     per operation (`gemm`, `gemm_fp8`, `moe`, `moe_fp8`, `memory`,
                                        `decode_attention`, `prefill_attention`, `power`; the fp8 ones where the
                                        hardware has it): measured, derived or assumed, and from what
    """

    def __init__(self, gpu: Gpu, own: Tables | None, reference: Tables) -> None:
        self.gpu = gpu
        self.provenance: dict[str, str] = {}
        self._gemm: dict[str, Surface] = {}
        self._moe: dict[str, Surface] = {}
        for dtype, _ in gpu.flops_per_s:
            self._gemm[dtype] = self._surface("gemm", dtype, own, reference)
            self._moe[dtype] = self._surface("moe", dtype, own, reference)
        memory = own.memory if own and own.memory else reference.memory
        attention = own.attention if own and own.attention else reference.attention
        if memory is None or attention is None:
            raise InputError(
                f"profiles/{reference.card.name} lacks the memory or attention_decode table all others need"
            )
        self._memory, self._attention = memory, attention
        self.provenance["memory"] = self._origin("memory", own if own and own.memory else None, reference)
        self.provenance["decode_attention"] = self._origin(
            "attention_decode", own if own and own.attention else None, reference
        )
        self.provenance["prefill_attention"] = (
            "assumed: efficiency after the FlashAttention-3 paper (2024), traffic at the bandwidth of decode attention"
        )
        source = own if own and own.power else reference
        if source.power is None:
            raise InputError(
                f"profiles/{reference.card.name} has no energies in its tables: the power model needs them"
            )
        origin = f"fitted on the energies of profiles/{source.card.name}"
        self.provenance["power"] = (
            f"measured ({origin})" if source is own else f"derived: {origin}, scaled by power limit"
        )
        card = source.card
        self.power: PowerModel = scale_power(
            source.power, (card.tdp_w, card.memory_bytes_per_s, dict(card.flops_per_s)), gpu, self.provenance["power"]
        )

    def _origin(self, table: str, own: Tables | None, reference: Tables) -> str:
        """Where one operation's figures come from: measured only if this is the accelerator the card describes."""
        tables = own or reference
        file = f"profiles/{tables.card.name}/{tables.files[table]}"
        card = (tables.card.memory_bytes_per_s, dict(tables.card.flops_per_s))
        if own is not None and card == (self.gpu.memory_bytes_per_s, dict(self.gpu.flops_per_s)):
            return f"measured ({file})"
        return f"derived from the efficiencies of {file} on the datasheet of {self.gpu.name}"

    def _surface(self, kind: str, dtype: str, own: Tables | None, reference: Tables) -> Surface:
        """The best surface for a format: own before reference, the same width before another."""
        half = ("bf16", "fp16")
        same = (dtype, *(name for name in half if name != dtype)) if dtype in half else (dtype,)
        key = kind if dtype in half else f"{kind}_{dtype}"
        for names in (same, half):
            for tables in (own, reference):
                if tables is None:
                    continue
                surfaces: dict[str, Surface] = getattr(tables, kind)
                for name in names:
                    if name in surfaces:
                        origin = self._origin(kind, tables if tables is own else None, reference)
                        if names is half and dtype not in half:
                            origin = f"derived: {name} efficiencies, {origin}"
                        self.provenance[key] = origin
                        return surfaces[name]
        raise InputError(f"profiles/{reference.card.name} lacks the {kind} table all others need")

    def _bound(self, dtype: str, flops: Floats, moved: Floats) -> Floats:
        """Roofline: no operation takes less than its arithmetic at peak, nor less than its traffic at peak."""
        return np.maximum(flops / self.gpu.peak_flops_per_s(dtype), moved / self.gpu.memory_bytes_per_s)

    def gemm_time_s(
        self, dtype: str, m: ArrayLike, n: int, k: int, weight_bytes_per_element: float | None = None
    ) -> Floats:
        """Time of out[m,n] = in[m,k] W[n,k]^T.

        Parameters
        ----------
        dtype : str                     bf16, fp16 or fp8: format of the arithmetic
        m : int64[...]                  rows, >= 0
        n, k : int                      shape of the weights
        weight_bytes_per_element : float, optional
            size of a stored weight where it is not that of `dtype` (1.0 for w8a16, 0.5 for w4a16): fewer bytes are
            read, arithmetic stays in `dtype`; unpacking is taken to hide behind the reads (derived)

        Returns
        -------
        float64[...]                    seconds; 0 where m == 0

        Raises
        ------
        UsageError                      a format the accelerator lacks, a size that is not a number in range

        Notes
        -----
        time = (floor + roofline) / ratio, with the floor fixed in seconds and the ratio interpolated in log m between
        measured sizes and over the six nearest shapes in (log n, log k). Leaving out each measured shape in turn, the
        error on h200-sxm is 3.3% (bf16) and 4.1% (fp8) in the median, 14% and 16% at the 95th percentile.
        """
        bound, rows = self._gemm_bound(dtype, m, n, k, weight_bytes_per_element)
        floor = GEMM_FLOOR_S + GEMM_FLOOR_S_PER_DEPTH * k
        ratio = self._gemm[dtype].ratio(gemm_feature(n, k), np.log(np.maximum(rows, 1.0)))
        return np.asarray(np.where(rows > 0, np.maximum((floor + bound) / ratio, bound), 0.0))

    def gemm_roofline_s(
        self, dtype: str, m: ArrayLike, n: int, k: int, weight_bytes_per_element: float | None = None
    ) -> Floats:
        """Least time the datasheet allows for `gemm_time_s` with the same arguments; same errors."""
        return self._gemm_bound(dtype, m, n, k, weight_bytes_per_element)[0]

    def _gemm_bound(self, dtype: str, m: ArrayLike, n: int, k: int, weight: float | None) -> tuple[Floats, Floats]:
        """Roofline and rows of a product."""
        self.gpu.peak_flops_per_s(dtype)
        rows = sizes("m", m)
        element = ELEMENT_BYTES[dtype]
        flops, moved = gemm_work(
            rows, _count("n", n), _count("k", k), element, element if weight is None else _weight_bytes(weight)
        )
        return np.asarray(np.where(rows > 0, self._bound(dtype, flops, moved), 0.0)), rows

    def moe_time_s(
        self,
        dtype: str,
        tokens: ArrayLike,
        hidden: int,
        expert_ffn: int,
        experts: int,
        topk: float,
        weight_bytes_per_element: float | None = None,
    ) -> Floats:
        """Time of the fused experts of one layer: gate-up, activation, down.

        Parameters
        ----------
        dtype : str                     bf16, fp16 or fp8
        tokens : int64[...]             tokens routed, >= 0
        hidden, expert_ffn : int        width of the model and of one expert
        experts : int                   experts held by this rank
        topk : float                    mean experts of this rank per token, 0 < topk <= experts; may be a fraction
                                        under expert parallelism
        weight_bytes_per_element : float, optional      as in `gemm_time_s`

        Returns
        -------
        float64[...]                    seconds, for routing uniform at random; 0 where tokens == 0

        Raises
        ------
        UsageError                      a format the accelerator lacks, a size that is not a number in range

        Notes
        -----
        As `gemm_time_s`, with the ratio interpolated in tokens per expert. Leaving out each of the eleven measured
        shapes in turn, the error on h200-sxm is 4.6% in the median, 17% at the 95th percentile.
        One measured row of 154 is 0.1% faster than the roofline, by the luck of its routing; it is held to it.
        """
        bound, routed = self._moe_bound(dtype, tokens, hidden, expert_ffn, experts, topk, weight_bytes_per_element)
        per_expert = np.log(np.maximum(routed, 1.0) * topk / experts)
        ratio = self._moe[dtype].ratio(moe_feature(hidden, expert_ffn, experts, topk), per_expert)
        return np.asarray(np.where(routed > 0, np.maximum((MOE_FLOOR_S + bound) / ratio, bound), 0.0))

    def moe_roofline_s(
        self,
        dtype: str,
        tokens: ArrayLike,
        hidden: int,
        expert_ffn: int,
        experts: int,
        topk: float,
        weight_bytes_per_element: float | None = None,
    ) -> Floats:
        """Least time the datasheet allows for `moe_time_s` with the same arguments; same errors."""
        return self._moe_bound(dtype, tokens, hidden, expert_ffn, experts, topk, weight_bytes_per_element)[0]

    def _moe_bound(
        self, dtype: str, tokens: ArrayLike, hidden: int, ffn: int, experts: int, topk: float, weight: float | None
    ) -> tuple[Floats, Floats]:
        """Roofline and tokens of the fused experts."""
        self.gpu.peak_flops_per_s(dtype)
        routed = sizes("tokens", tokens)
        _count("experts", experts)
        if not _is_number(topk) or not 0 < topk <= experts:
            raise UsageError(f"topk = {shown(topk)} must be a number above 0 and at most the {experts} experts held")
        weight_bytes = ELEMENT_BYTES[dtype] if weight is None else _weight_bytes(weight)
        flops, moved = moe_work(
            routed, _count("hidden", hidden), _count("expert_ffn", ffn), experts, float(topk), weight_bytes
        )
        return np.asarray(np.where(routed > 0, self._bound(dtype, flops, moved), 0.0)), routed

    def memory_time_s(self, moved_bytes: ArrayLike) -> Floats:
        """Time of one element-wise kernel (norm, activation, rotary, embedding).

        Parameters
        ----------
        moved_bytes : float64[...]      bytes read plus written, >= 0

        Returns
        -------
        float64[...]                    seconds: launch floor + bytes at the measured share of peak bandwidth; 0 where
                                        nothing is moved

        Notes
        -----
        Floor and share are medians over the small and large rows of memory.csv. Hits in the L2 cache are not counted
        on, so rows of 10 to 60 MB take less than this says.
        """
        moved = sizes("moved_bytes", moved_bytes)
        floor_s, efficiency = self._memory
        return np.asarray(np.where(moved > 0, floor_s + moved / (efficiency * self.gpu.memory_bytes_per_s), 0.0))

    def decode_attention(
        self, query_heads: int, kv_heads: int, head_dim: int, kv_bytes_per_element: float, sequences: ArrayLike
    ) -> tuple[Floats, Floats]:
        """Decode attention of one layer: time = base + per_token x (tokens of context summed over the batch).

        Parameters
        ----------
        query_heads, kv_heads, head_dim : int   heads on this rank and their width
        kv_bytes_per_element : float            2 for a 16-bit cache, 1 for fp8
        sequences : int64[...]                  sequences of the batch, >= 0

        Returns
        -------
        base_s, per_token_s : float64[...]      both 0 where there is no sequence

        Raises
        ------
        UsageError                              a size that is not a number in range

        Notes
        -----
        Fitted per measured batch, interpolated in the logarithm of sequences x KV heads, the pieces of work a kernel
        has to spread. Beyond the measured 64 x 8 the share of bandwidth holds and the base grows in proportion: each
        piece then waits its turn on the cores. (Held flat it would miss 0.3 us per layer and sequence that serving
        steps of 128 and 256 sequences with equal context show.)
        """
        count = sizes("sequences", sequences)
        token_bytes = self._token_bytes(kv_heads, head_dim, kv_bytes_per_element)
        units_log = np.log(np.maximum(count, 1.0) * kv_heads)
        law = self._attention
        base = np.interp(units_log, law.units_log, law.base_s) * np.exp(np.maximum(units_log - law.units_log[-1], 0.0))
        traffic = token_bytes / (np.interp(units_log, law.units_log, law.efficiency) * self.gpu.memory_bytes_per_s)
        peak = self.gpu.peak_flops_per_s(self.gpu.half_dtype) * _DECODE_COMPUTE_EFFICIENCY
        per_token = np.maximum(traffic, 4.0 * _count("query_heads", query_heads) * head_dim / peak)
        return np.asarray(np.where(count > 0, base, 0.0)), np.asarray(np.where(count > 0, per_token, 0.0))

    def prefill_attention(
        self, query_heads: int, head_dim: int, kv_heads: int, kv_bytes_per_element: float, chunk: ArrayLike
    ) -> tuple[Floats, Floats, Floats]:
        """Prefill attention of one layer and one sequence: base + per_pair x pairs + per_context x context.

        Parameters
        ----------
        query_heads, head_dim, kv_heads : int   heads on this rank and their width
        kv_bytes_per_element : float            2 for a 16-bit cache, 1 for fp8
        chunk : int64[...]                      new tokens of the sequence in this batch, >= 0

        Returns
        -------
        base_s, per_pair_s, per_context_s : float64[...]
            `pairs` are the query-key pairs under the causal mask, `context` the tokens cached including the chunk;
            all 0 where chunk == 0. The base holds one launch: sequences that share a launch share it.

        Raises
        ------
        UsageError                              a size that is not a number in range

        Notes
        -----
        A whole prompt of L tokens has L^2/2 pairs of 4 heads width FLOP each; at the share of peak
        0.66 L / (L + 512) that is the cost of L^2/2 + 256 L pairs at 0.66. The second term goes into the base, so
        that a short chunk against a long context is not charged the poor efficiency of a short prompt. Assumed.
        """
        count = sizes("chunk", chunk)
        token_bytes = self._token_bytes(kv_heads, head_dim, kv_bytes_per_element)
        peak = self.gpu.peak_flops_per_s(self.gpu.half_dtype) * _PREFILL_EFFICIENCY
        pair_s = 4.0 * _count("query_heads", query_heads) * head_dim / peak
        context_s = token_bytes / (float(self._attention.efficiency[-1]) * self.gpu.memory_bytes_per_s)
        base = float(self._attention.base_s[0]) + pair_s * _PREFILL_HALF_LENGTH / 2 * count
        some = count > 0
        return (
            np.asarray(np.where(some, base, 0.0)),
            np.asarray(np.where(some, pair_s, 0.0)),
            np.asarray(np.where(some, context_s, 0.0)),
        )

    def _token_bytes(self, kv_heads: int, head_dim: int, element: float) -> float:
        """Bytes of keys and values per token of context and layer."""
        return 2.0 * _count("kv_heads", kv_heads) * _count("head_dim", head_dim) * _weight_bytes(element)


def load_profile(gpu: Gpu, root: Path | None = None) -> Profile:
    """The profile of an accelerator.

    Parameters
    ----------
    gpu : Gpu           its `profile` names a folder with tables measured on it, or is None
    root : Path         folder of profile folders, by default the one that ships with the package

    Raises
    ------
    UnknownNameError    `gpu.profile` names a folder that does not exist
    InputError          a card or table with faults
    """
    return _load_profile(gpu, DATA_ROOT / "profiles" if root is None else root)


@lru_cache(maxsize=64)
def _load_profile(gpu: Gpu, root: Path) -> Profile:
    """As `load_profile`; one object per accelerator."""
    own: Tables | None = None
    if gpu.profile is not None:
        folders = [path.parent.name for path in root.glob("*/card.toml")]
        if gpu.profile not in folders:
            raise UnknownNameError(
                f"profile of {gpu.name}",
                gpu.profile,
                folders,
                f"folders of {root}; leave it out to derive from the datasheet",
            )
        own = load_tables(root / gpu.profile)
    shipped = DATA_ROOT / "profiles"
    home = root if (root / REFERENCE / "card.toml").is_file() else shipped
    return Profile(gpu, own, load_tables(home / REFERENCE))


def _is_number(value: object) -> bool:
    """A finite number that is not a truth value."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < _MAX_SIZE
    return isinstance(value, float | np.floating | np.integer) and abs(float(value)) < _MAX_SIZE


def _count(name: str, value: int) -> int:
    """A whole number from 1 to 2^31."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= _MAX_COUNT:
        raise UsageError(f"{name} = {shown(value)} must be a whole number from 1 to {_MAX_COUNT}")
    return int(value)


def _weight_bytes(value: float) -> float:
    """Size of one stored element in bytes."""
    if not _is_number(value) or not 0 < value <= 16:
        raise UsageError(f"bytes per element = {shown(value)} must be a number above 0 and at most 16")
    return float(value)


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
