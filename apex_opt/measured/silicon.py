"""Mean TTFT and TPOT of closed loops, a CSV row per deployment and load: the layout of aiconfigurator's table.

A row names the model, the system, the engine, how the GPUs share the model and the number formats. It does not tell
the engine's limits, the format of the KV cache and the number of requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.engines.kinds import load_kind
from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import ApexError
from apex_opt.ir.formats import FORMATS
from apex_opt.measured.deployments import (
    BESIDE_A_PROMPT,
    DEFAULTS,
    INFERENCEMAX,
    INFERENCEMAX_FP8_KV,
    INFERENCEMAX_NODE,
    INFERENCEMAX_POLLS,
    SEQUENCES,
    Deployment,
    cluster_of,
    is_blackwell,
    weight_format,
)
from apex_opt.measured.files import read_rows
from apex_opt.measured.names import find_model
from apex_opt.measured.runs import MeasuredRun, UnusableRun
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import default_kv_format
from apex_opt.workload.trace import MAX_TOKENS, make_trace

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.ir.model import Model
    from apex_opt.measured.files import Row
    from apex_opt.measured.runs import Run
    from apex_opt.workload.trace import Trace

KIND: Final = "silicon"
NEEDED: Final = (
    "id",
    "backend",
    "model_path",
    "system",
    "isl",
    "osl",
    "gemm_quant_mode",
    "moe_quant_mode",
    "batch_size",
    "tp_size",
    "pp_size",
    "attention_dp_size",
    "moe_tp_size",
    "moe_ep_size",
    "silicon_ttft_ms",
    "silicon_tpot_ms",
)

REQUESTS_PER_CLIENT: Final = 10
"""Requests of a run per client, as InferenceMAX and others send them: the burst they begin with weighs a tenth."""

SHORTEST_SHARE: Final = 0.8
"""Lengths of InferenceMAX's requests, uniform from this share to all of the nominal one (--random-range-ratio)."""

_INFERENCEMAX: Final = re.compile(r"db-dump/|source_file=\d{4}-\d\d-\d\d\.csv")  # how dumps of it are named
_MANY_CLIENTS: Final = 16
_LARGEST: Final = 1 << 16  # degree or number of clients
_LARGEST_BATCH: Final = 1 << 17  # tokens over all attention copies; tables of more take minutes and gigabytes


class _Odd(Exception):
    """A row that cannot be simulated: the sort of reason, and its figures."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def read_silicon(path: Path) -> list[Run]:
    """Every row of the file.

    Raises
    ------
    InputError    missing columns; figures that are no numbers or negative, with their line
    """
    return [_run(row) for row in read_rows(path, NEEDED)]


def _run(row: Row) -> Run:
    cell = {name: text.strip() for name, text in row.cells.items()}
    name, model = cell["id"] or f"line {row.line}", cell["model_path"]
    try:
        return _measured(row, cell, name)
    except _Odd as odd:
        return UnusableRun(name=name, origin=row.where, kind=KIND, model=model, reason=odd.reason, detail=odd.detail)


def _measured(row: Row, cell: dict[str, str], name: str) -> MeasuredRun:
    figures = {"ttft_mean": row.number("silicon_ttft_ms"), "tpot_mean": row.number("silicon_tpot_ms")}
    measured = {metric: value / 1e3 for metric, value in figures.items() if value}
    if not measured:
        raise _Odd("nothing measured", "TTFT and TPOT are blank or zero")
    prompt, output = _count(row, "isl", MAX_TOKENS), _count(row, "osl", MAX_TOKENS)
    degrees = _Degrees.of(row)
    clients = _count(row, "batch_size", _LARGEST) * degrees.copies  # the column counts those of one attention copy
    try:
        model = find_model(cell["model_path"])
    except ApexError as error:
        raise _Odd("model not described", str(error)) from None
    system, backend = cell["system"], cell["backend"]
    ours = _INFERENCEMAX.match(cell.get("silicon_data_source", "")) is not None
    if backend not in DEFAULTS:
        raise _Odd("engine not described", f"backend {backend!r:.40}")
    deployment = (INFERENCEMAX if ours else DEFAULTS)[backend]
    if ours:
        degrees = degrees.over_the_same_gpus()
        if degrees.gpus > INFERENCEMAX_NODE:
            raise _Odd("prefill and decode pools added up", f"{degrees.gpus} GPUs")
    cluster = cluster_of(system, degrees.gpus)
    if cluster is None:
        raise _Odd("GPU not in the catalogue", f"system {system!r:.40}")
    weights = _weights(cell, model)
    kv = _kv_format(cell, model, weights, deployment, ours)
    budget = deployment.tokens[is_blackwell(system)] or prompt + BESIDE_A_PROMPT
    sharing = 1 if backend == "vllm" else degrees.copies  # attention copies under one limit
    tokens = min(budget * sharing, _LARGEST_BATCH)
    polled = ours and backend == "sglang" and is_blackwell(system)
    poll_every = INFERENCEMAX_POLLS[clients >= _MANY_CLIENTS] if polled else 1
    lengths = f"drawn from {SHORTEST_SHARE:g} to 1 of those given" if ours else "as given"
    return MeasuredRun(
        name=name,
        origin=row.where,
        kind=KIND,
        model=cell["model_path"],
        cluster=cluster,
        plan=f"{degrees.plan(model.is_moe)} {weights} kv={kv}",
        engine=backend,
        settings=EngineSettings(
            max_num_seqs=min(SEQUENCES * sharing, tokens),
            max_num_batched_tokens=tokens,
            # Only the magnitude, so that loads much alike share their tables.
            max_model_len=1 << (prompt + output - 1).bit_length(),
            gpu_memory_utilization=deployment.utilisation,
            scheduler=load_kind("vllm").scheduling() if backend == "vllm" else VllmScheduling(),
        ),
        trace=_closed_loop(clients, prompt, output, ours),
        poll_every=poll_every,
        measured=measured,
        assumptions=(
            f"{REQUESTS_PER_CLIENT} requests per client, lengths {lengths}",
            f"KV cache in {kv}, batches of up to {tokens} tokens in which prompts join decoding, "
            f"{deployment.utilisation:g} of the memory",
            *((f"new requests are looked for every {poll_every} batches",) if poll_every > 1 else ()),
        ),
    )


def _count(row: Row, column: str, most: int) -> int:
    value = row.whole(column)
    if value is None or not 1 <= value <= most:
        raise _Odd("row is incomplete", f"{column} is {row.cells[column]!r:.20}, expected 1 to {most:,}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Degrees:
    """How GPUs share a model: copies and shards of attention, shards and groups of experts, pipeline stages.

    A row has a column for each; blank and 0 mean 1.
    """

    copies: int
    tp: int
    moe_tp: int
    moe_ep: int
    stages: int

    @classmethod
    def of(cls, row: Row) -> _Degrees:
        columns = ("attention_dp_size", "moe_tp_size", "moe_ep_size", "pp_size")
        copies, moe_tp, moe_ep, stages = (_count(row, c, _LARGEST) if row.whole(c) else 1 for c in columns)
        tp = _count(row, "tp_size", _LARGEST)
        return cls(copies=copies, tp=tp, moe_tp=moe_tp, moe_ep=moe_ep, stages=stages)

    @property
    def gpus(self) -> int:
        return self.copies * self.tp * self.stages

    def over_the_same_gpus(self) -> _Degrees:
        """The degrees of an InferenceMAX row.

        There TP and EP are degrees over the same GPUs, and so is data parallelism of attention. Some rows hold their
        product instead, as the same measurements show that stand in the table both ways: 8 GPUs with TP 8 and EP 8 as
        tp 64, moe 8 x 8 and as tp 8, moe 1 x 8; 4 GPUs with TP 4 and EP 4 as tp 4, dp 4, moe 1 x 16 with a fourth of
        the clients and as tp 4, moe 1 x 4.
        """
        if self.copies * self.tp != self.moe_tp * self.moe_ep:
            return self
        if self.moe_tp > 1 and self.moe_ep > 1 and self.moe_tp % self.moe_ep == 0:
            copies = self.moe_tp if self.copies > 1 else 1
            return replace(self, copies=copies, tp=self.moe_tp // copies, moe_tp=self.moe_tp // self.moe_ep)
        if self.copies > 1 and self.tp > 1 and self.moe_ep % self.copies == 0:
            return replace(self, copies=1, moe_ep=self.moe_ep // self.copies)
        return self

    def plan(self, moe: bool) -> str:
        """The text form.

        Raises
        ------
        _Odd    cells over different numbers of GPUs
        """
        stages = f"pp{self.stages} " if self.stages > 1 else ""
        if not moe:
            # A dense model leaves the columns of the experts at whatever they were.
            if self.copies > 1:
                raise _Odd("plan is contradictory", f"{self.copies} attention copies before a dense FFN")
            return f"{stages}attn(tp{self.tp}) ffn(tp{self.tp})"
        if self.moe_tp * self.moe_ep != self.copies * self.tp:
            detail = f"experts over {self.moe_tp} x {self.moe_ep} GPUs, attention over {self.copies} x {self.tp}"
            raise _Odd("plan is contradictory", detail)
        return f"{stages}attn(dp{self.copies},tp{self.tp}) ffn(tp{self.moe_tp},ep{self.moe_ep})"


def _weights(cell: dict[str, str], model: Model) -> str:
    """Weight format of the blocks: one for all of them."""
    modes = {cell["gemm_quant_mode"], *((cell["moe_quant_mode"],) if model.is_moe else ())}
    formats = {weight_format(mode, model.weight_format) for mode in modes}
    found = formats.pop()
    if formats or found not in FORMATS:
        raise _Odd("number formats not described", f"quantisation mode {' and '.join(sorted(modes))!r:.60}")
    assert found is not None  # None is no format
    return found


def _kv_format(cell: dict[str, str], model: Model, weights: str, deployment: Deployment, ours: bool) -> str:
    """KV format that goes with the weights; `ours` where the row is InferenceMAX's."""
    blackwell = is_blackwell(cell["system"])
    if FORMATS[weights].weight_bits >= 16:
        return default_kv_format(weights)
    if ours and cell["backend"] == "vllm" and blackwell and model.name in INFERENCEMAX_FP8_KV:
        return "fp8"
    return (deployment.kv if weights == model.weight_format else deployment.requantised_kv)[blackwell]


@lru_cache(maxsize=1024)
def _closed_loop(clients: int, prompt: int, output: int, drawn: bool) -> Trace:
    """As many requests as the driver sends; drawn lengths are the same for every row of the same load."""
    n = REQUESTS_PER_CLIENT * clients
    rng = np.random.default_rng(0)

    def lengths(most: int) -> NDArray[np.int64]:
        least = max(int(SHORTEST_SHARE * most), 1) if drawn else most
        return rng.integers(least, most, n, endpoint=True)

    return make_trace(
        name=f"{clients} clients, {prompt} + {output} tokens",
        arrival_ns=np.zeros(n, np.int64),
        prompt=lengths(prompt),
        output=lengths(output),
        concurrency=clients,
        source=f"closed loop, lengths {'drawn, seed 0' if drawn else 'fixed'}",
    )
