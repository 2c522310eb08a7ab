"""From the cells of a stage to its batch law, on GPUs of one type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from math import inf
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from apex_opt.cost.attention import windows_of
from apex_opt.cost.cells import Operations
from apex_opt.cost.least import Least
from apex_opt.cost.nano import RESOURCES, of_resource
from apex_opt.cost.tables import Parts, Tables, seen, window_of
from apex_opt.cost.towers import encoder_parts
from apex_opt.cost.work import Work
from apex_opt.engines.overlap import NANO, NANO_SOURCE
from apex_opt.engines.rules import Held
from apex_opt.ir.formats import get_format
from apex_opt.ir.model import Run
from apex_opt.plans.engine import schedulers
from apex_opt.plans.memory import stage_runs
from apex_opt.profiles import SHIPPED, load_collectives, load_profile
from apex_opt.simulator.law import RATE_BITS, BatchLaw, Window
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Cluster, Gpu
    from apex_opt.cost.engine import EngineOverhead
    from apex_opt.cost.exchanges import Exchanged
    from apex_opt.cost.work import Floats
    from apex_opt.ir.model import Block, Model
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.layout import Layout
    from apex_opt.plans.plan import Plan

Found = TypeVar("Found")

_BY_SEQUENCES = ("decode_ns", "sequence_ns", "attend_ns", "context_rate")
_BY_TOKENS = ("mixed_ns", "chunk_ns", "pair_rate", "chunk_context_rate")
_OF_DRAFTS = {"verify_ns": "tokens", "draft_ns": "sequences", "draft_rate": "sequences"}
_KEPT = 64
_BLACKWELL = 10  # major number of the compute capability
_RATES = ("context_rate", "pair_rate", "chunk_context_rate", "draft_rate")


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Operations that are used together, and their seconds summed per table."""

    parts: Parts
    seconds: dict[str, Floats]

    @classmethod
    def of(cls, parts: Parts) -> Piece:
        """Sum the seconds of each table once: many plans use the same piece."""
        seconds: dict[str, Floats] = {}
        for (_, table), work in parts.items():
            seconds[table] = seconds[table] + work.seconds if table in seconds else work.seconds
        return cls(parts, seconds)

    @property
    def least(self) -> Least:
        """What it takes at least in any batch."""
        return Least.of(self.parts, self.seconds)


Pieces = tuple[tuple[int, Piece], ...]
"""Pieces of a stage, each so many times."""
Named = tuple[tuple[int, int], ...]
"""Layers of a model: which blocks they are, and how many of each follow one another."""


class StageCosts:
    """Costs of stages for one model on GPUs of one type, at one clock and within one set of limits of a batch.

    Tables of cells that plans share are computed once. Parameters are those of `CostModel`.

    Raises
    ------
    InputError, UnknownNameError    profiles of the GPU that cannot be read
    UsageError                      a clock that the GPU does not have
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        settings: EngineSettings,
        overhead: EngineOverhead,
        routing: str = "uniform",
        profiles: str = SHIPPED,
        clock_mhz: int | None = None,
    ) -> None:
        self.model, self.cluster, self.settings, self.overhead = model, cluster, settings, overhead
        self.profile = load_profile(cluster.gpu, overhead.kernels, profiles, clock_mhz)
        self.collectives = load_collectives(cluster, profile=self.profile)
        tokens = np.arange(settings.max_num_batched_tokens + 1, dtype=np.int64)
        sequences = np.arange(settings.max_num_seqs + 1, dtype=np.int64)
        captured = overhead.captured_sizes
        self.drafts = settings.speculation.draft_tokens if settings.speculation else 0
        verified = _padded(tokens, captured, len(tokens) - 1) if self.drafts else None
        padded = _padded(sequences, captured, len(tokens) - 1)
        encoder = model.encoder
        apart = encoder is not None and encoder.reads == "text"
        self.tables = Tables(tokens, sequences, padded, self.drafts, verified, apart)
        held = Held.of(settings.runnable, model, cluster.gpu)
        self.windows = windows_of(run.block.attention for run in model.runs)
        gap_s = 0.0 if cluster.gpu.overlapped_launch else overhead.gap_s
        self.operations = Operations(
            self.tables,
            self.profile,
            self.collectives,
            routing,
            overhead.fused,
            held,
            gap_s,
            model.scaled_by_block,
            overhead.experts_flops_per_s if _is_blackwell(cluster.gpu) else inf,
        )

        self._blocks: dict[int, Block] = {}
        self._alike = alike(model.runs)
        # A piece takes up to a few MB of tables, a large cluster has thousands of plans: only recent ones are kept.
        self.piece = lru_cache(maxsize=_KEPT)(_piece)
        self._least_of = cache(lambda *what: self.piece(*what).least)
        self._least_asked = cache(lambda resource, rates, *what: self._asked(resource, rates, self.piece(*what)).least)
        # Without launches to wait for the engine's own time is the same for every stage.
        self._engine_least = cache(lambda over: Piece.of(self.engine(over, 0, 0, self.sum_of(()), 1)).least)
        self._stages = lru_cache(maxsize=_KEPT)(self._stage)

    @property
    def provenance(self) -> dict[str, str]:
        """Where the figures behind the costs asked for so far come from, per operation."""
        return {**self.profile.provenance, **self.operations.called}

    def stage(self, plan: Plan, index: int, layout: Layout) -> tuple[BatchLaw, Pieces]:
        """The law and the operations of one stage of a plan in a layout.

        Parameters
        ----------
        plan
        index : int    of the stage
        layout
        """
        runs, last = stage_runs(self.model, plan.layers)[index], plan.stages - 1
        # A pipeline overlaps the host with the batches of other stages, as asynchronous scheduling does on one.
        overlapped = self.settings.async_scheduling or plan.stages > 1
        return self._stages(cut_of(plan), layout, self.named(runs), index == 0, index == last, overlapped)

    def _stage(
        self, cut: Plan, layout: Layout, named: Named, first: bool, last: bool, overlapped: bool
    ) -> tuple[BatchLaw, Pieces]:
        """One stage: its blocks, what surrounds them on the first and last, and the engine's own time."""
        runs, copies = self.runs_of(named), cut.attention.dp
        pieces = list(self.looked_up(cut, layout.of_stage, runs, (first, last), self.piece))
        seconds = self.sum_of(pieces)
        captured, launched = self.kernels(cut, runs)
        launched += self.drafting(cut) if last else 0
        engine = Piece.of(self.engine(overlapped, captured, launched, seconds, copies))
        for table, values in engine.seconds.items():
            seconds[table] += values
        seconds["transfer_ns"] = np.zeros(len(self.tables.tokens))
        if not last:
            seconds["transfer_ns"] = self.operations.transfer(self.model, cut.attention, layout)
        law = self.launched(self.law_of(seconds, copies, self.drafts), launched)
        pieces = [*pieces, (1, engine)]
        if cut.overlap == NANO:
            law = replace(law, resources=tuple(self._resource(name, cut, pieces) for name in RESOURCES))
        return law, tuple(pieces)

    def _resource(self, name: str, cut: Plan, pieces: Sequence[tuple[int, Piece]]) -> BatchLaw:
        """What a stage asks of one resource where several work at one time."""
        rates = self.rates(cut.weight_format)
        seconds = self.sum_of([(count, self._asked(name, rates, piece)) for count, piece in pieces])
        self.operations.called["overlap"] = NANO_SOURCE
        return self.law_of(seconds | {"transfer_ns": np.zeros(len(self.tables.tokens))})

    @staticmethod
    def _asked(resource: str, rates: tuple[float, float], piece: Piece) -> Piece:
        """What a piece takes of a resource."""
        return Piece.of(of_resource(resource, piece.parts, rates))

    def rates(self, weight_format: str) -> tuple[float, float]:
        """Peak arithmetic of a GPU in a format, FLOP/s, and its peak memory bandwidth, bytes/s."""
        gpu, form = self.cluster.gpu, get_format(weight_format)
        dtype = (form.computed(gpu.supports) or form).hardware_dtype
        return gpu.peak_flops_per_s(dtype or gpu.half_dtype), gpu.memory_bytes_per_s

    def drafting(self, cut: Plan) -> int:
        """Kernels that make drafts beside a prompt and are launched one by one.

        TensorRT-LLM makes all drafts in the forward itself, which runs from a graph only where all decode. SGLang runs
        the first pass so, and the others with the next step (`eagle_worker.py` of 0.5). Those of vLLM are left out, as
        nothing of it was measured with drafts.
        """
        own = self.settings.scheduler
        if cut.speculation is None or not own.launches:
            return 0
        passes = cut.speculation.draft_tokens if own.drafts_at_once else 1
        return self.operations.drafting(self.model, cut.speculation, cut.attention, cut.ffn, passes=passes)

    def launched(self, law: BatchLaw, kernels: int) -> BatchLaw:
        """A law with what its engine's loop takes to launch so many kernels itself, where it does."""
        if not self.settings.scheduler.launches:
            return law
        overhead = self.overhead
        return replace(
            law, launch_ns=round(kernels * overhead.launch_s * NS_PER_S), captured_tokens=overhead.captured_tokens
        )

    def named(self, runs: Iterable[Run]) -> Named:
        """Runs by what their blocks are, as what is quick to look up."""
        found = []
        for run in runs:
            self._blocks.setdefault(id(run.block), run.block)  # while it is kept no other block has its number
            found.append((id(run.block), run.count))
        return tuple(found)

    def runs_of(self, named: Named) -> tuple[Run, ...]:
        """The runs that `named` has named."""
        return tuple(Run(block=self._blocks[block], count=count) for block, count in named)

    def law_of(self, seconds: dict[str, Floats], copies: int = 1, drafts: int = 0) -> BatchLaw:
        """The law of seconds per table.

        Parameters
        ----------
        seconds : as `sum_of` gives them, and `transfer_ns`
        copies : int    of attention
        drafts : int    that may follow a token
        """
        tables: dict[str, Any] = {
            name: self.integers(values, name) for name, values in seconds.items() if window_of(name) is None
        }
        for name in ("context_rate", "pair_rate"):
            rows = [self.integers(seconds[seen(name, window)], name) for window in self.windows]
            tables[seen(name, Window(0)).partition("/")[0]] = np.array(rows, np.int64).reshape(
                len(rows), len(seconds[name])
            )
        return BatchLaw(**tables, copies=copies, draft_tokens=drafts, windows=self.windows)

    def made_of(
        self,
        cut: Plan,
        layout: Layout,
        runs: Iterable[Run],
        first: bool,
        last: bool,
        operations: Operations | None = None,
    ) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Pieces of a stage: how often each, and what `piece` makes it of.

        Parameters
        ----------
        cut : Plan                     of the stage
        layout
        runs : layers of the stage
        first, last : bool             whether it is the first or last stage
        operations : Operations or None    by which they are counted; None: all that the stage does
        """
        operations = operations or self.operations
        for run in runs:
            block = run.block
            if operations.role in (None, "own"):
                yield (
                    run.count,
                    (operations.attention, block.attention, cut.attention, cut.weight_format, cut.kv_format),
                )
                if block.own_operations:
                    yield run.count, (operations.beside, block, cut.attention)
            yield (
                run.count,
                (operations.ffn, block.ffn, cut.attention, cut.ffn, cut.weight_format, block.shares_norm),
            )
            yield run.count, (operations.reshards, block, cut.attention, cut.ffn, layout)
        if first:
            yield 1, (operations.embedding, self.model, cut.attention, layout)
            if (tower := self.model.encoder) is not None and operations.role in (None, "own"):
                yield 1, (encoder_parts, operations, self.model, tower, cut.attention, cut.weight_format, layout)
        if last and not self.model.pools:
            yield 1, (operations.head, self.model, cut.attention, layout)
        if last and cut.speculation is not None:
            yield 1, self.made_by_drafts(cut, layout, operations)

    def made_by_drafts(self, cut: Plan, layout: Layout, operations: Operations) -> tuple[Any, ...]:
        """The piece of what makes the drafts of a plan.

        Parameters
        ----------
        cut : Plan
        layout
        operations : Operations    by which it is counted
        """
        formats = cut.weight_format, cut.kv_format
        return operations.drafts, self.model, cut.speculation, cut.attention, cut.ffn, formats, layout

    def least_parts(self, plan: Plan, layout: Layout, resource: str | None = None) -> Iterator[tuple[int, Least]]:
        """What a batch takes at least on any number of stages, piece by piece, each so many times.

        They come in the same order on every kind of GPU. What each stage adds is `stage_least`.

        Parameters
        ----------
        plan
        layout : Layout           of a stage
        resource : str or None    what is asked of it alone; None: of all
        """
        least: Callable[..., Least] = self._least_of
        if resource is not None:
            least = partial(self._least_asked, resource, self.rates(plan.weight_format))
        yield from self.least_of(plan, layout, least)
        kernels, _ = self.kernels(plan, self._alike)
        gaps = 0.0 if self.cluster.gpu.overlapped_launch else kernels * self.overhead.gap_s
        yield 1, Least.of_every(gaps, gaps)

    def stage_least(self, plan: Plan) -> Least:
        """What a batch takes at least on every stage of a plan beside its layers."""
        return self._engine_least(self.settings.async_scheduling or plan.stages > 1)

    def least_of(
        self,
        plan: Plan,
        layout: Layout,
        least: Callable[..., Least],
        operations: Operations | None = None,
        ends: bool = True,
    ) -> Iterator[tuple[int, Least]]:
        """What the pieces of all layers take at least, those of layers alike at once.

        Parameters
        ----------
        plan, layout
        least : what a piece takes at least, from what `piece` makes it of
        operations : Operations or None    by which they are counted; None: all that a stage does
        ends : bool    whether what surrounds the layers is among them
        """
        return self.looked_up(plan, layout, self._alike, (ends, ends), least, operations)

    def looked_up(
        self,
        cut: Plan,
        layout: Layout,
        runs: Iterable[Run],
        ends: tuple[bool, bool],
        look: Callable[..., Found],
        operations: Operations | None = None,
    ) -> Iterator[tuple[int, Found]]:
        """What is made of the pieces of some layers, in their order, of which each block's are looked up once.

        Parameters
        ----------
        cut : Plan
        layout
        runs : the layers
        ends : of bool                     whether what comes before the first layer and after the last is among them
        look : callable                    makes something of a piece, from what `piece` makes it of
        operations : Operations or None    by which they are counted; None: all that a stage does
        """
        of_block: dict[int, list[tuple[int, Found]]] = {}
        for run in runs:
            if (found := of_block.get(id(run.block))) is None:
                one = self.made_of(cut, layout, (Run(block=run.block, count=1),), False, False, operations)
                found = of_block[id(run.block)] = [(n, look(*what)) for n, what in one]
            for n, part in found:
                yield run.count * n, part
        for n, what in self.made_of(cut, layout, (), *ends, operations):
            yield n, look(*what)

    def kernels(self, cut: Plan, runs: Iterable[Run]) -> tuple[int, int]:
        """Kernels of a batch over some layers: from captured graphs, and launched one by one."""
        total = np.zeros(2, np.int64)
        for run in alike(runs):
            total += run.count * self.operations.kernels(run.block, cut.attention, cut.ffn)
        return int(total[0]), int(total[1])

    def exchanged(self, plan: Plan, layout: Layout) -> Exchanged:
        """What the collectives of a full batch of a plan take in a layout, and what they send how far."""
        count = schedulers(self.settings, plan)
        return self.operations.exchanged(self.model, plan.attention, plan.ffn, layout, count)

    def engine(self, overlapped: bool, captured: int, launched: int, busy: dict[str, Floats], copies: int) -> Parts:
        """The engine's own time in every batch, gaps between kernels, and the wait for those launched one by one.

        The host launches while the device computes, so only what the launches take longer is waited for. What a batch
        computes is counted as if its prompts were dealt evenly to the attention copies, and without what grows with
        contexts: where it is more the wait is too long, and the batch at most twice as long as it should be.

        Parameters
        ----------
        captured, launched : int        kernels of a batch, from captured graphs and one by one
        busy : dict of float64[n]       seconds of those of a batch, per table of the law
        copies : int                    attention copies
        """
        overhead, tables, power = self.overhead, self.tables, self.profile.power
        step_s = overhead.step_s if overlapped else overhead.blocking_step_s
        if not self.cluster.gpu.overlapped_launch:
            step_s += captured * overhead.gap_s
        sequences = overhead.sequence_s * tables.sequences.astype(np.float64)
        mixed = np.where(tables.tokens > 0, step_s + overhead.mixed_step_s, 0.0)
        computed = busy["mixed_ns"]
        if copies > 1:
            computed = computed + busy["chunk_ns"][-(-tables.tokens // copies)]
        waiting = np.maximum(launched * overhead.launch_s - computed - mixed, 0.0)
        mixed = mixed + np.where(tables.tokens > overhead.captured_tokens, waiting, 0.0)
        decode = np.where(tables.sequences > 0, step_s, 0.0) + sequences
        if not overhead.captured_sizes:
            computed = busy["decode_ns"] + (busy["verify_ns"][tables.sequences] if self.drafts else 0.0)
            bare = np.maximum(launched * overhead.launch_s - computed - decode, 0.0)
            decode = decode + np.where(tables.sequences > 0, bare, 0.0)
        return {
            ("engine", "decode_ns"): Work.waiting(power, decode),
            ("engine", "sequence_ns"): Work.waiting(power, sequences),
            ("engine", "mixed_ns"): Work.waiting(power, mixed),
        }

    @staticmethod
    def summed(parts: Parts) -> Piece:
        """Operations as a piece."""
        return Piece.of(parts)

    @staticmethod
    def integers(seconds: Floats, table: str = "") -> NDArray[np.int64]:
        """A table as a law has it."""
        return _integers(seconds, table in _RATES)

    def sum_of(self, pieces: Sequence[tuple[int, Piece]]) -> dict[str, Floats]:
        """Sum of pieces per table of the law."""
        sizes = dict.fromkeys(_BY_SEQUENCES, len(self.tables.sequences))
        sizes |= dict.fromkeys(_BY_TOKENS, len(self.tables.tokens))
        if self.drafts:
            sizes |= {name: len(getattr(self.tables, by)) for name, by in _OF_DRAFTS.items()}
        for name in ("context_rate", "pair_rate"):
            sizes |= {seen(name, window): sizes[name] for window in self.windows}
        seconds = {name: np.zeros(size) for name, size in sizes.items()}
        add_up_pieces(seconds, pieces)
        return seconds


def _is_blackwell(gpu: Gpu) -> bool:
    """Whether a GPU is of the generation of the B200, whose experts in fp8 have kernels of their own."""
    return gpu.capability is not None and int(gpu.capability) == _BLACKWELL


def alike(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Layers that are alike as one run, in the order in which they come first."""
    found: dict[int, Run] = {}
    for run in runs:
        before = found.get(id(run.block))
        found[id(run.block)] = run if before is None else replace(run, count=before.count + run.count)
    return tuple(found.values())


def add_up_pieces(seconds: dict[str, Floats], pieces: Iterable[tuple[int, Piece]]) -> None:
    """Add what pieces take to sums per table."""
    for count, piece in pieces:
        for table, values in piece.seconds.items():
            seconds[table] += count * values


def cut_of(plan: Plan) -> Plan:
    """What a stage depends on of its plan beside its own layers, the clock and the limits."""
    return replace(
        plan,
        replicas=1,
        layers=(1,),
        on=(),
        route=None,
        clock_mhz=None,
        max_num_seqs=None,
        max_num_batched_tokens=None,
    )


def _piece(build: Callable[..., Parts], *arguments: Any) -> Piece:
    """The operations that a method of `Operations` gives, with their sums."""
    return Piece.of(build(*arguments))


def _integers(seconds: Floats, rate: bool) -> NDArray[np.int64]:
    scale = NS_PER_S * (1 << RATE_BITS) if rate else NS_PER_S
    return np.rint(seconds * scale).astype(np.int64)


def _padded(sequences: NDArray[np.int64], captured: tuple[int, ...], most: int) -> NDArray[np.int64]:
    """Sequences each decode batch is computed as: the next captured size, or itself beyond the largest."""
    if not captured:
        return sequences
    sizes = np.array([0, *captured], np.int64)
    place = np.searchsorted(sizes, sequences)
    return np.minimum(np.where(place < len(sizes), sizes[np.minimum(place, len(sizes) - 1)], sequences), most)
