"""Domain types of the hardware: an accelerator, a link, and a cluster of identical nodes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from apex_opt.cluster.toml_reader import shown
from apex_opt.errors import InputError, UsageError

DTYPES: Final = ("bf16", "fp16", "fp8", "fp4", "int8")
"""Number formats whose matrix throughput an accelerator may state."""

REFERENCE: Final = "h200-sxm"
"""Folder in `profiles/` whose efficiencies stand in where there are none of the accelerator or of a relative."""

_HUGE: Final = 1e30

_CAPABILITY_OF: Final = (("fp4", 10.0), ("fp8", 9.0), ("bf16", 8.0))
"""Compute capability that stands for an accelerator whose own is not stated, by the narrowest format it has."""
_LEAST_CAPABILITY: Final = 7.0
"""That of the first with tensor cores, which have fp16 alone."""

LINK_KINDS: Final = ("nvlink", "xgmi", "pcie", "infiniband", "ethernet")

MAX_GPUS: Final = 65536
"""Largest cluster described here; the same limit holds for nodes and for GPUs of one node."""


def _figure(faults: list[str], name: str, value: object, *, zero: bool = False) -> None:
    """Note a figure that is not a finite positive number (or zero, where that is meant)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _HUGE and (value > 0 or zero):
        return
    faults.append(f"{name} = {shown(value)} must be a finite number {'of at least' if zero else 'above'} 0")


def _refuse(what: str, faults: list[str]) -> None:
    """Raise all faults of one object as one line."""
    if faults:
        raise InputError(f"{what}: {'; '.join(faults)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator, as its datasheet and its driver describe it.

    Attributes
    ----------
    memory_bytes : int                  what the driver reports, before any software has taken a share
    memory_bytes_per_s : float          peak bandwidth of the device memory
    flops_per_s : tuple of (dtype, float)
        dense matrix peak per format of `DTYPES`; a format left out is not supported in hardware
    tdp_w, idle_w : float               board power limit; draw with a context open and nothing running
    cuda : bool                         whether it runs CUDA kernels, which all engine rules and tables here are of
    capability : float or None          CUDA compute capability, 9.0 for an H100: which formats an engine has kernels
                                        for. Where none is given, that of the formats it multiplies in; None where it
                                        does not run CUDA
    multiprocessors : int or None       those that kernels run on; None where not stated, and then not shared out
    clock_mhz : float or None           highest clock of the multiprocessors; None where not stated, and then not set
    overlapped_launch : bool            engines start a kernel before the one it depends on ends (programmatic dependent
                                        launch), so that no gap is left between them
    price_per_h : float or None         $ for an hour of it; None where not stated, and then no cost is told
    profile : str or None               folder in `profiles/` with tables measured on this accelerator
    like : str                          folder in `profiles/` measured on a relative, whose efficiencies stand in where
                                        it has no tables of its own
    sources : tuple of (field, text)    where each figure comes from
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: tuple[tuple[str, float], ...]
    tdp_w: float
    idle_w: float
    cuda: bool = True
    capability: float | None = None
    multiprocessors: int | None = None
    clock_mhz: float | None = None
    overlapped_launch: bool = False
    price_per_h: float | None = None
    profile: str | None = None
    like: str = REFERENCE
    sources: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        faults: list[str] = []
        _figure(faults, "memory_bytes", self.memory_bytes)
        _figure(faults, "memory_bytes_per_s", self.memory_bytes_per_s)
        _figure(faults, "tdp_w", self.tdp_w)
        _figure(faults, "idle_w", self.idle_w, zero=True)
        if self.clock_mhz is not None:
            _figure(faults, "clock_mhz", self.clock_mhz)
        if self.multiprocessors is not None:
            _figure(faults, "multiprocessors", self.multiprocessors)
        if self.price_per_h is not None:
            _figure(faults, "price_per_h", self.price_per_h)
        for dtype, flops_per_s in self.flops_per_s:
            _figure(faults, f"flops_per_s[{dtype}]", flops_per_s)
        named = [dtype for dtype, _ in self.flops_per_s]
        if unknown := sorted(set(named) - set(DTYPES)):
            faults.append(f"flops_per_s names {', '.join(unknown)}; allowed: {', '.join(DTYPES)}")
        if len(set(named)) < len(named):
            faults.append("flops_per_s names a format twice")
        if not {"bf16", "fp16"} & set(named):
            faults.append("flops_per_s needs bf16 or fp16, in which attention is computed")
        if not faults and self.idle_w >= self.tdp_w:
            faults.append(f"idle_w = {self.idle_w} must be below tdp_w = {self.tdp_w}")
        if self.capability is None and self.cuda:
            has = (capability for dtype, capability in _CAPABILITY_OF if dtype in named)
            object.__setattr__(self, "capability", next(has, _LEAST_CAPABILITY))
        elif self.capability is not None and not self.cuda:
            faults.append(f"capability = {self.capability} is one of CUDA, and cuda is false")
        elif self.capability is not None:
            _figure(faults, "capability", self.capability)
        _refuse(f"gpu {self.name!r}", faults)

    def priced(self, price_per_h: float, source: str) -> Gpu:
        """The same accelerator at another price, with where that comes from."""
        sources = dict(self.sources) | {"price_per_h": source}
        return replace(self, price_per_h=price_per_h, sources=tuple(sources.items()))

    def supports(self, dtype: str) -> bool:
        """Whether the hardware multiplies matrices in this format."""
        return any(name == dtype for name, _ in self.flops_per_s)

    def peak_flops_per_s(self, dtype: str) -> float:
        """Dense matrix peak in this format, FLOP/s.

        Raises
        ------
        UsageError      the accelerator has no hardware for the format
        """
        for name, flops_per_s in self.flops_per_s:
            if name == dtype:
                return flops_per_s
        has = ", ".join(name for name, _ in self.flops_per_s)
        raise UsageError(f"{self.name} does not compute in {dtype}: it has {has}; choose one of these or another GPU")

    @property
    def half_dtype(self) -> str:
        """The 16-bit format in which attention is computed: bf16 where there is one, else fp16."""
        return "bf16" if self.supports("bf16") else "fp16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What one GPU can send (and at once receive) over one level of the wiring.

    `bytes_per_s` is per direction and per GPU; `latency_s` is from one GPU to another. Of `xgmi`, AMD's Infinity
    Fabric, it is that of the link to one other GPU: each has one to every other, and all carry at once.
    """

    bytes_per_s: float
    latency_s: float
    kind: str
    source: str = ""

    def __post_init__(self) -> None:
        faults: list[str] = []
        _figure(faults, "bytes_per_s", self.bytes_per_s)
        _figure(faults, "latency_s", self.latency_s, zero=True)
        if self.kind not in LINK_KINDS:
            faults.append(f"kind = {shown(self.kind)} must be one of {', '.join(LINK_KINDS)}")
        _refuse("link", faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Identical nodes of identical GPUs; GPU `i` sits in node `i // gpus_per_node`."""

    name: str
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    intra: Link
    inter: Link | None = None

    def __post_init__(self) -> None:
        faults: list[str] = []
        for field, value in (("nodes", self.nodes), ("gpus_per_node", self.gpus_per_node)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_GPUS:
                faults.append(f"{field} = {shown(value)} must be a whole number from 1 to {MAX_GPUS}")
        if not faults and self.size > MAX_GPUS:
            faults.append(
                f"{self.nodes} nodes x {self.gpus_per_node} GPUs = {self.size}, above the limit of {MAX_GPUS}"
            )
        if not faults and self.nodes > 1 and self.inter is None:
            faults.append(f"{self.nodes} nodes need an inter link between them")
        _refuse(f"cluster {self.name!r}", faults)

    @property
    def size(self) -> int:
        """Number of GPUs."""
        return self.nodes * self.gpus_per_node
