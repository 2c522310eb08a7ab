"""Time of collectives: measured where a profile has them, else published medians, else laws laid over them.

Sizes are those of the tensor that a rank holds whole: the input and output of an all-reduce, the output of an
all-gather, the input of a reduce-scatter, what one rank sends in all (its own part included) in an all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.cluster.catalogue import is_catalogued
from apex_opt.cluster.toml_reader import TomlTable, read_toml, shown
from apex_opt.cluster.types import LINK_KINDS, MAX_GPUS
from apex_opt.errors import UsageError, join_faults
from apex_opt.profiles.lookup import sizes
from apex_opt.units import DATA_ROOT, GB, ceil_div

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    from apex_opt.cluster.types import Cluster, Link
    from apex_opt.profiles.operations import Profile

    Floats = NDArray[np.float64]

_US: Final = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Published:
    """One published series: times of an all-reduce over sizes, on so many ranks and such links."""

    gpu: str
    ranks: int
    nodes: int
    link_bytes_per_s: float
    link_latency_s: float
    sizes_bytes: tuple[float, ...]
    times_s: tuple[float, ...]

    @property
    def tail_s_per_byte(self) -> float:
        """Cost of one more byte between the last two sizes."""
        return (self.times_s[-1] - self.times_s[-2]) / (self.sizes_bytes[-1] - self.sizes_bytes[-2])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """`collectives.toml`."""

    within: tuple[_Published, ...]
    across: _Published
    custom_ranks: int
    custom_link_bytes_per_s: float
    custom_max_bytes: float
    custom_floor_s: float
    custom_s_per_byte: float
    efficiency: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Measured:
    """Collectives measured inside a node of this accelerator.

    `curves` maps (op, ranks) to logarithms of sizes and of times, both rising; `files` an op to its table.
    """

    curves: dict[tuple[str, int], tuple[Floats, Floats]]
    files: dict[str, str]

    def has(self, op: str) -> bool:
        """Whether a collective was measured on any number of ranks."""
        return op in self.files

    def origin(self, op: str) -> str:
        """Where the times of a collective come from."""
        ranks = ", ".join(str(count) for name, count in sorted(self.curves) if name == op)
        return f"measured on {ranks} ranks ({self.files[op]}), other numbers derived"

    def largest(self, op: str) -> float:
        """Largest size measured on every number of ranks, in bytes."""
        return float(np.exp(min(sizes_log[-1] for (name, _), (sizes_log, _) in self.curves.items() if name == op)))

    def time_s(self, op: str, size: Floats, ranks: int) -> Floats:
        """Time by size; beyond the largest the last rate holds.

        Between two measured numbers of ranks times are interpolated in logarithms. Beyond them the floor grows with the
        depth of a tree, the rest with what each rank sends (derived).
        """
        known = sorted(count for name, count in self.curves if name == op)
        below = max((count for count in known if count <= ranks), default=known[0])
        above = min((count for count in known if count >= ranks), default=known[-1])
        if below < above:
            share = np.log(ranks / below) / np.log(above / below)
            return np.asarray(self._read(op, size, below) ** (1 - share) * self._read(op, size, above) ** share)
        time = self._read(op, size, below)
        if below == ranks:
            return time
        floor = float(np.exp(self.curves[op, below][1][0]))
        return np.asarray(floor * _steps(ranks, below) + (time - floor) * _ring(ranks) / _ring(below))

    def _read(self, op: str, size: Floats, ranks: int) -> Floats:
        """Time by size on a measured number of ranks."""
        sizes_log, times_log = self.curves[op, ranks]
        size_log = np.log(np.maximum(size, 1.0))
        beyond = np.exp(np.maximum(size_log - sizes_log[-1], 0.0))
        return np.asarray(np.exp(np.interp(size_log, sizes_log, times_log)) * beyond)


def _ring(ranks: int) -> float:
    """Share of the tensor that a bandwidth-optimal all-reduce sends from each rank."""
    return 2 * (ranks - 1) / ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Collectives:
    """Times of collectives in one cluster; make it with `load_collectives`.

    Every method takes sizes in bytes, the number of ranks and optionally that of nodes they span; left out, ranks fill
    nodes one after another. It returns float64[...] seconds that never fall as sizes grow, 0 for one rank and for no
    bytes, and raises UsageError for more ranks than the cluster has, or several nodes without a link between them.

    Measured times need not rise with the number of ranks: switches that add up serve eight faster than four.

    `custom_all_reduce` says whether the engine has its own all-reduce for small messages inside a node, taken where it
    is faster. `provenance` tells, per method name and level (`all_reduce/intra`, `all_reduce/inter` ...), where figures
    come from.
    """

    gpu: str
    intra: Link
    inter: Link | None
    nodes: int
    gpus_per_node: int
    custom_all_reduce: bool
    table: _Table
    measured: _Measured | None = None

    def over(self, near: Link | None, far: Link | None) -> Collectives:
        """The same collectives over other links inside a node and between nodes; None leaves one as it is.

        What was measured holds on links as fast as those it was measured on.
        """
        if near in (None, self.intra) and far in (None, self.inter):
            return self
        near = near or self.intra
        same = (near.kind, near.bytes_per_s) == (self.intra.kind, self.intra.bytes_per_s)
        return replace(self, intra=near, inter=far or self.inter, measured=self.measured if same else None)

    @property
    def provenance(self) -> dict[str, str]:
        """Origin of the figures per collective and level."""
        levels = self._published_provenance()
        if self.measured is not None:
            own = "custom_all_reduce"
            levels |= {f"{op}/intra": self.measured.origin(op) for op in self.measured.files if op != own}
            if self.custom_all_reduce and self.measured.has(own) and self.measured.has("all_reduce"):
                levels["all_reduce/intra"] += f"; an engine's own where it is faster, {self.measured.origin(own)}"
        return levels

    def _published_provenance(self) -> dict[str, str]:
        """Origin of what is not measured."""
        series = self._series()
        if self.intra.kind == "nvlink":
            whose = "published medians" if series.gpu == self.gpu else "derived from the published medians"
            reduce = f"{whose} of {series.gpu} (profiles/collectives.toml), scaled by ranks and link"
            if self.custom_all_reduce:
                reduce += "; small messages by the engines' own all-reduce, a law assumed through one published point"
            half = f"derived: half the traffic of an all-reduce, {series.gpu} medians"
        else:
            reduce = half = f"assumed: latency and share of the {self.intra.kind} link's rate"
        stream = f"assumed: latency and share of the {self.intra.kind} link's rate"
        levels = {
            "all_reduce/intra": reduce,
            "all_gather/intra": half,
            "reduce_scatter/intra": half,
            "all_to_all/intra": f"{stream}, floor of an all-reduce",
            "point_to_point/intra": stream,
        }
        if self.inter is not None:
            far = f"assumed: latency and share of the {self.inter.kind} link's rate"
            two = f"derived from published times of two {self.table.across.gpu} nodes, scaled by ranks, nodes and links"
            levels |= {
                "all_reduce/inter": two,
                "all_gather/inter": two,
                "reduce_scatter/inter": two,
                "all_to_all/inter": f"{far}, start-up of an all-reduce",
                "point_to_point/inter": far,
            }
        return levels

    def all_reduce_s(self, tensor_bytes: ArrayLike, ranks: int, nodes: int | None = None) -> Floats:
        """Every rank ends with the sum of all ranks' tensors.

        Parameters
        ----------
        tensor_bytes : array    of the whole tensor, on one rank
        ranks : int             that take part
        nodes : int or None     that the ranks are on; None where that follows
        """
        size, spanned = sizes("tensor_bytes", tensor_bytes), self._spanned(ranks, nodes)
        if ranks == 1:
            return np.zeros_like(size)
        if spanned > 1:
            time = self._start_s(ranks, spanned) + size * self._across_s_per_byte(ranks, spanned)
        elif self.measured is not None and self.measured.has("all_reduce"):
            time = self.measured.time_s("all_reduce", size, ranks)
            own = "custom_all_reduce"
            if self.custom_all_reduce and self.measured.has(own) and ranks <= self.table.custom_ranks:
                faster = np.minimum(time, self.measured.time_s(own, size, ranks))
                time = np.where(size <= self.measured.largest(own) * (1 + 1e-9), faster, time)
        else:
            time = self._floor_s(ranks) + self._within(size, ranks)
            if self.custom_all_reduce and self.intra.kind == "nvlink" and ranks <= self.table.custom_ranks:
                time = np.where(size <= self.table.custom_max_bytes, np.minimum(time, self._custom(size, ranks)), time)
        return _none_for_nothing(size, time)

    def all_gather_s(self, tensor_bytes: ArrayLike, ranks: int, nodes: int | None = None) -> Floats:
        """Every rank ends with the whole tensor of which it held one part.

        Parameters
        ----------
        tensor_bytes : array    of the whole tensor, on one rank
        ranks : int             that take part
        nodes : int or None     that the ranks are on; None where that follows
        """
        return self._half_s("all_gather", tensor_bytes, ranks, nodes)

    def reduce_scatter_s(self, tensor_bytes: ArrayLike, ranks: int, nodes: int | None = None) -> Floats:
        """Every rank ends with one part of the sum of all ranks' tensors; the mirror image of an all-gather.

        Parameters
        ----------
        tensor_bytes : array    of the whole tensor, on one rank
        ranks : int             that take part
        nodes : int or None     that the ranks are on; None where that follows
        """
        return self._half_s("reduce_scatter", tensor_bytes, ranks, nodes)

    def _half_s(self, op: str, tensor_bytes: ArrayLike, ranks: int, nodes: int | None) -> Floats:
        """One of the two halves of an all-reduce."""
        size, spanned = sizes("tensor_bytes", tensor_bytes), self._spanned(ranks, nodes)
        if ranks == 1:
            return np.zeros_like(size)
        if spanned == 1 and self.measured is not None and self.measured.has(op):
            return _none_for_nothing(size, self.measured.time_s(op, size, ranks))
        if spanned > 1:
            stream = size * self._across_s_per_byte(ranks, spanned)
            start = self._start_s(ranks, spanned)
        else:
            stream = self._within(size, ranks)
            start = self._floor_s(ranks)
        return _none_for_nothing(size, start + stream / 2)

    def all_to_all_s(self, tensor_bytes: ArrayLike, ranks: int, nodes: int | None = None) -> Floats:
        """Every rank sends another part of its tensor to each rank.

        Parameters
        ----------
        tensor_bytes : array    of the whole tensor, on one rank
        ranks : int             that take part
        nodes : int or None     that the ranks are on; None where that follows
        """
        size, spanned = sizes("tensor_bytes", tensor_bytes), self._spanned(ranks, nodes)
        if ranks == 1:
            return np.zeros_like(size)
        if spanned == 1 and self.measured is not None and self.measured.has("all_to_all"):
            return _none_for_nothing(size, self.measured.time_s("all_to_all", size, ranks))
        inside = ceil_div(ranks, spanned)
        near = (inside - 1) / ranks * self._near_s_per_byte(inside)
        if spanned == 1:
            return _none_for_nothing(size, self._floor_s(ranks) + size * near)
        assert self.inter is not None  # _spanned refuses several nodes without a link
        far = (ranks - inside) / ranks * self._stream_s_per_byte(self.inter)
        return _none_for_nothing(size, self._start_s(ranks, spanned) + size * self._levels(near, far))

    def point_to_point_s(self, tensor_bytes: ArrayLike, link: Link | None = None) -> Floats:
        """One rank sends its tensor to another, over `link` (by default the one inside a node)."""
        size, over = sizes("tensor_bytes", tensor_bytes), link or self.intra
        return _none_for_nothing(size, over.latency_s + size * self._stream_s_per_byte(over))

    def _spanned(self, ranks: int, nodes: int | None) -> int:
        """Number of nodes a group spans."""
        total = self.nodes * self.gpus_per_node
        if isinstance(ranks, bool) or not isinstance(ranks, int | np.integer) or not 1 <= ranks <= total:
            raise UsageError(f"ranks = {shown(ranks)} must be a whole number from 1 to the cluster's {total} GPUs")
        if nodes is None:
            nodes = ceil_div(int(ranks), self.gpus_per_node)
        elif isinstance(nodes, bool) or not isinstance(nodes, int | np.integer) or not 1 <= nodes <= ranks:
            raise UsageError(f"nodes = {shown(nodes)} must be a whole number from 1 to the {ranks} ranks")
        if nodes > 1 and self.inter is None:
            raise UsageError(f"a group over {nodes} nodes needs a link between nodes; describe [inter] of the cluster")
        return int(nodes)

    def _series(self) -> _Published:
        """The published series of this accelerator, else the first."""
        return next((series for series in self.table.within if series.gpu == self.gpu), self.table.within[0])

    def _floor_s(self, ranks: int) -> float:
        """Time of the smallest all-reduce inside a node."""
        if self.intra.kind != "nvlink":
            return self.intra.latency_s * 2 * float(np.log2(ranks))
        series = self._series()
        return series.times_s[0] * _steps(ranks, series.ranks)

    def _within(self, size: Floats, ranks: int) -> Floats:
        """What an all-reduce inside a node takes above its floor, as the library does it."""
        if self.intra.kind != "nvlink":
            return size * (_ring(ranks) * self._near_s_per_byte(ranks))
        series = self._series()
        known = np.log(np.array(series.sizes_bytes))
        inside = np.clip(size, series.sizes_bytes[0], series.sizes_bytes[-1])
        time = np.exp(np.interp(np.log(inside), known, np.log(np.array(series.times_s))))
        stream = time - series.times_s[0] + np.maximum(size - series.sizes_bytes[-1], 0.0) * series.tail_s_per_byte
        scale = _ring(ranks) / _ring(series.ranks) * series.link_bytes_per_s / self.intra.bytes_per_s
        return np.asarray(stream * scale)

    def _custom(self, size: Floats, ranks: int) -> Floats:
        """All-reduce by the engine's own kernel."""
        table = self.table
        scale = _ring(ranks) / _ring(table.custom_ranks) * table.custom_link_bytes_per_s / self.intra.bytes_per_s
        return table.custom_floor_s * _steps(ranks, table.custom_ranks) + size * table.custom_s_per_byte * scale

    def _start_s(self, ranks: int, nodes: int) -> float:
        """Time of the smallest all-reduce over several nodes: grows with the depth of a tree over the ranks.

        What it was fitted on has NVLink in its nodes; slower links there come on top.
        """
        assert self.inter is not None
        inside = ceil_div(ranks, nodes)
        near = 0.0 if self.intra.kind == "nvlink" else self.intra.latency_s * 2 * float(np.log2(inside))
        across = self.table.across
        fitted = across.times_s[0] - across.sizes_bytes[0] * across.tail_s_per_byte
        trips = 2 * np.log2(across.nodes) * across.link_latency_s
        return float(
            near + (fitted - trips) * np.log2(ranks) / np.log2(across.ranks) + 2 * np.log2(nodes) * self.inter.latency_s
        )

    def _across_s_per_byte(self, ranks: int, nodes: int) -> float:
        """Cost of a byte of an all-reduce over several nodes.

        Two levels: inside a node as fitted on two full nodes, between nodes each of a node's ranks reduces its own part
        over its own port.
        """
        assert self.inter is not None
        across, inside = self.table.across, ceil_div(ranks, nodes)
        near = 0.0
        if inside > 1:
            if self.intra.kind == "nvlink":
                near = across.tail_s_per_byte * _ring(inside) / _ring(across.ranks // across.nodes)
                near *= self.table.within[0].link_bytes_per_s / self.intra.bytes_per_s
            else:
                near = _ring(inside) * self._near_s_per_byte(inside)
        return self._levels(near, _ring(nodes) / inside * self._stream_s_per_byte(self.inter))

    def _levels(self, near: float, far: float) -> float:
        """Cost of a byte on two levels: on PCIe one after the other on the same link, else at once."""
        return near + far if self.intra.kind == "pcie" else max(near, far)

    def _near_s_per_byte(self, ranks: int) -> float:
        """Cost of a byte of a long message inside a node, where a mesh carries it over as many links as there are."""
        links = max(ranks - 1, 1) if self.intra.kind == "xgmi" else 1
        return self._stream_s_per_byte(self.intra) / links

    def _stream_s_per_byte(self, link: Link) -> float:
        """Cost of a byte of a long message over a link."""
        return 1 / (dict(self.table.efficiency)[link.kind] * link.bytes_per_s)


def _steps(ranks: int, measured: int) -> float:
    """Floor on other numbers of ranks: one launch plus the depth of a tree, against the measured one. Assumed."""
    return float((1 + np.log2(ranks)) / (1 + np.log2(measured)))


def _none_for_nothing(size: Floats, time: Floats) -> Floats:
    """No bytes, no call."""
    return np.asarray(np.where(size > 0, time, 0.0))


def load_collectives(
    cluster: Cluster, *, profile: Profile | None = None, custom_all_reduce: bool = True, path: Path | None = None
) -> Collectives:
    """The collectives of a cluster.

    Parameters
    ----------
    cluster : Cluster
    profile : Profile           whose measured collectives hold where the cluster's nodes are wired as the catalogue's
    custom_all_reduce : bool    whether the engine has its own all-reduce for small messages inside an NVLink node
    path : Path                 table of published times, by default the one that ships with the package

    Raises
    ------
    InputError                  a table with faults, all of them in one line
    """
    return Collectives(
        gpu=cluster.gpu.name,
        intra=cluster.intra,
        inter=cluster.inter,
        nodes=cluster.nodes,
        gpus_per_node=cluster.gpus_per_node,
        custom_all_reduce=custom_all_reduce,
        table=_load_table(path or DATA_ROOT / "profiles" / "collectives.toml"),
        measured=_measured(profile) if profile is not None and is_catalogued(cluster) else None,
    )


def _measured(profile: Profile) -> _Measured | None:
    """Curves of the first source that has each collective."""
    curves: dict[tuple[str, int], tuple[Floats, Floats]] = {}
    files: dict[str, str] = {}
    for source in profile.own("collective"):
        table = source.table("collective")
        for op in sorted(set(table["op"]) - set(files)):
            files[op] = source.file("collective")
            for ranks in np.unique(table["ranks"][table["op"] == op]):
                rows = np.flatnonzero((table["op"] == op) & (table["ranks"] == ranks))
                rows = rows[np.argsort(table["bytes"][rows])]
                # A running maximum: more bytes never take less time.
                times = np.log(np.maximum.accumulate(table["time_us"][rows]) * _US)
                curves[op, int(ranks)] = np.log(table["bytes"][rows]), times
    return _Measured(curves=curves, files=files) if curves else None


@lru_cache(maxsize=8)
def _load_table(path: Path) -> _Table:
    """`collectives.toml`, checked."""
    root = TomlTable(read_toml(path, "collectives table"), "", [])
    faults = root.faults
    within = [_read_series(entry) for entry in root.tables("all_reduce")]
    across = custom = efficiency = None
    if (entry := root.table("inter_node")) is not None:
        across = _read_series(entry, several_nodes=True)
    if (entry := root.table("custom_all_reduce")) is not None:
        custom = _read_custom(entry)
    if (entry := root.table("link_efficiency")) is not None:
        efficiency = [(kind, entry.number(kind, high=1.0)) for kind in LINK_KINDS]
        entry.text("source")
        entry.close()
    root.close()
    shares = tuple((kind, share) for kind, share in efficiency or [] if share is not None)
    good = tuple(series for series in within if series is not None)
    if faults or not good or across is None or custom is None:
        raise join_faults(f"collectives table {path}", faults)
    ranks, link, largest, floor, per_byte = custom
    return _Table(
        within=good,
        across=across,
        custom_ranks=int(ranks),
        custom_link_bytes_per_s=link,
        custom_max_bytes=largest,
        custom_floor_s=floor,
        custom_s_per_byte=per_byte,
        efficiency=shares,
    )


def _read_series(entry: TomlTable, *, several_nodes: bool = False) -> _Published | None:
    """One published series, or None after noting its faults."""
    before = len(entry.faults)
    gpu = entry.text("gpu")
    ranks = entry.integer("ranks", low=2, high=MAX_GPUS)
    nodes = entry.integer("nodes", low=2, high=MAX_GPUS) if several_nodes else 1
    latency_us = entry.number("link_latency_us", high=1e6) if several_nodes else 0.0
    link = entry.number("link_gb_per_s", high=1e6)
    known, times = entry.numbers("bytes", high=1e12), entry.numbers("time_us", high=1e9)
    entry.text("source")
    entry.close()
    if len(entry.faults) == before and len(known) != len(times):
        entry.faults.append(f"{gpu}: {len(known)} sizes and {len(times)} times must be as many")
    if nodes and ranks and ranks % nodes:
        entry.faults.append(f"{gpu}: {ranks} ranks do not fill {nodes} nodes evenly")
    if (
        len(entry.faults) > before
        or gpu is None
        or ranks is None
        or nodes is None
        or link is None
        or latency_us is None
    ):
        return None
    return _Published(
        gpu=gpu,
        ranks=ranks,
        nodes=nodes,
        link_bytes_per_s=link * GB,
        link_latency_s=latency_us * _US,
        sizes_bytes=tuple(known),
        times_s=tuple(time * _US for time in times),
    )


def _read_custom(entry: TomlTable) -> tuple[int, float, float, float, float] | None:
    """Ranks, link rate, largest message, floor and cost of a byte of the engines' own all-reduce."""
    ranks = entry.integer("ranks", low=2, high=MAX_GPUS)
    link = entry.number("link_gb_per_s", high=1e6)
    largest = entry.number("max_bytes", high=1e12)
    floor_us, anchor_us = entry.number("floor_us", high=1e6), entry.number("anchor_us", high=1e6)
    anchor = entry.number("anchor_bytes", high=1e12)
    entry.text("source")
    entry.close()
    if ranks is None or link is None or largest is None or floor_us is None or anchor_us is None or anchor is None:
        return None
    if anchor_us <= floor_us:
        entry.faults.append(f"custom_all_reduce.anchor_us = {anchor_us:g} must be above floor_us = {floor_us:g}")
        return None
    return ranks, link * GB, largest, floor_us * _US, (anchor_us - floor_us) * _US / anchor
