"""Mean TTFT and TPOT of closed loops on prefill and decode instances, a CSV row per deployment and load.

A row names the model, the GPUs, the engine, how many instances of either side there are and how their GPUs share the
model, and whether drafts were made. How instances were started is told by a table that is shipped, `data/pools.csv`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apex_opt.cluster import load_cluster
from apex_opt.engines.kinds import load_kind
from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.errors import ApexError
from apex_opt.measured.deployments import cluster_of
from apex_opt.measured.facts import trained_on
from apex_opt.measured.files import read_rows
from apex_opt.measured.names import find_model
from apex_opt.measured.runs import Answering, MeasuredRun, UnusableRun
from apex_opt.measured.silicon import SHORTEST_SHARE, closed_loop, kind_of
from apex_opt.plans.engine import EngineSettings

if TYPE_CHECKING:
    from apex_opt.measured.files import Row
    from apex_opt.measured.runs import Run

KIND: Final = "pools"
DEPLOYMENTS: Final = Path(__file__).parent / "data" / "pools.csv"
SIDES: Final = ("prefill", "decode")
_DEGREES: Final = ("workers", "tp", "dp", "moe_tp", "moe_ep")
_OF_A_SIDE: Final = tuple(f"{side}_{degree}" for side in SIDES for degree in _DEGREES)
NEEDED: Final = (
    "id",
    "engine",
    "version",
    "model",
    "gpu",
    "precision",
    "isl",
    "osl",
    "clients",
    "speculative",
    *_OF_A_SIDE,
    "ttft_mean_ms",
    "tpot_mean_ms",
)
_TOLD_BY: Final = ("engine", "gpu", "precision", "isl", "osl")
_CUT_AS: Final = tuple(f"{side}_{degree}" for side in SIDES for degree in ("workers", "tp", "moe_ep"))
_WEIGHTS: Final = {"fp4": "nvfp4", "fp8": "fp8", "bf16": "bf16"}
_PER_CLIENT: Final = 10


def read_pools(path: Path) -> list[Run]:
    """Every row of the file.

    Raises
    ------
    InputError    missing columns; figures that are no numbers or negative, with their line
    """
    return [_run(row) for row in read_rows(path, NEEDED)]


def _run(row: Row) -> Run:
    cell = {name: text.strip() for name, text in row.cells.items()}

    def unusable(reason: str, detail: str = "", *, aside: bool = False) -> UnusableRun:
        return UnusableRun(
            name=cell["id"], origin=row.where, kind=KIND, model=cell["model"], reason=reason, detail=detail, aside=aside
        )

    if not cell["speculative"].startswith("none"):
        return unusable("set aside: whether drafts were made is not known", cell["speculative"], aside=True)
    degrees = {name: row.whole(name) or 1 for name in _OF_A_SIDE}
    try:
        kind = load_kind(cell["engine"])
        kind.handing_over()
    except ApexError as error:
        return unusable("hand-over that is not modelled", str(error))
    if (copies := [degrees[f"{side}_dp"] for side in SIDES]) != [1, 1]:
        return unusable("pools of attention copies", f"{copies[0]} before prompts, {copies[1]} before answers")
    key = tuple(cell[name] for name in _TOLD_BY), tuple(degrees[name] for name in _CUT_AS)
    if (known := _deployments().get(key)) is None:
        return unusable("pools whose deployment is not told", ", ".join((*key[0], *map(str, key[1]))))
    try:
        name = find_model(cell["model"]).name
    except ApexError as error:
        return unusable("model not described", str(error))
    gpus = sum(degrees[f"{side}_workers"] * degrees[f"{side}_tp"] for side in SIDES)
    if (cluster := cluster_of(cell["gpu"], gpus)) is None or cell["precision"] not in _WEIGHTS:
        return unusable("GPU or format not described", f"{cell['gpu']:.40}, {cell['precision']:.40}")
    clients, prompt, output = (row.whole(name) or 1 for name in ("clients", "isl", "osl"))
    weights = f"{_WEIGHTS[cell['precision']]} kv=fp8"
    plans = [_plan(side, degrees, weights) for side in SIDES]
    first, then = (_settings(kind, cluster, known, side, clients, prompt + output) for side in SIDES)
    figures = {"ttft_mean": row.number("ttft_mean_ms"), "tpot_mean": row.number("tpot_mean_ms")}
    total = known["prefill_total_tokens"]
    return MeasuredRun(
        name=cell["id"],
        origin=row.where,
        kind=KIND,
        model=cell["model"],
        cluster=cluster,
        plan=plans[0],
        answering=Answering(plan=plans[1], settings=then),
        engine=kind_of(cell["engine"], cell["version"]),
        settings=first,
        trace=closed_loop(clients, prompt, output, _PER_CLIENT, True),
        share_of="static",
        kv_blocks=int(total) // first.block_size if total else None,
        sweep=f"{trained_on(name)} {cell['gpu']} {cell['engine']} {' + '.join(plans)} {prompt}+{output}",
        measured={metric: value / 1e3 for metric, value in figures.items() if value},
        assumptions=(
            f"deployment: {known['name']}, {known['source']}",
            f"{_PER_CLIENT} requests per client, lengths drawn from {SHORTEST_SHARE:g} to 1 of those given",
            f"those who answer look for requests every {known['recv_interval']} batches",
        ),
    )


def _plan(side: str, degrees: dict[str, int], weights: str) -> str:
    count, tp, moe_tp, moe_ep = (degrees[f"{side}_{name}"] for name in ("workers", "tp", "moe_tp", "moe_ep"))
    return f"dp{count} attn(tp{tp}) ffn(tp{moe_tp},ep{moe_ep}) {weights}"


def _settings(kind: Any, cluster: str, known: dict[str, str], side: str, clients: int, longest: int) -> EngineSettings:
    """Settings of the instances of a side; what its line leaves open is the engine's own.

    Parameters
    ----------
    kind : EngineKind
    cluster : str      as `load_cluster` takes it
    known : dict       the line of the deployment
    side : str         of `SIDES`
    clients : int      more run at no time
    longest : int      tokens of a request
    """
    own = kind.common(load_cluster(cluster).gpu.memory_bytes)
    scheduling = replace(kind.scheduling(), ignore_eos=True)
    assert isinstance(scheduling, SglangScheduling)  # vLLM's pools have no line
    if side == "prefill":
        own["max_num_batched_tokens"] = int(known["prefill_chunk"])
        scheduling = replace(scheduling, max_prefill_tokens=int(known["prefill_prompts"] or 16384))
    else:
        scheduling = replace(scheduling, scheduler_recv_interval=int(known["recv_interval"]))
    seats = int(known[f"{side}_seats"] or own["max_num_seqs"])
    own |= {
        "scheduler": scheduling,
        "max_model_len": 1 << (longest - 1).bit_length(),
        "max_num_seqs": min(seats, clients),
        "gpu_memory_utilization": float(known["memory_fraction"]),
    }
    return EngineSettings(**own)


@lru_cache(maxsize=1)
def _deployments() -> dict[tuple[tuple[str, ...], tuple[int, ...]], dict[str, str]]:
    """Lines of the shipped table, by what they are of."""
    return {
        (tuple(row.cells[name] for name in _TOLD_BY), tuple(int(row.cells[name]) for name in _CUT_AS)): row.cells
        for row in read_rows(DEPLOYMENTS, ("name", *_TOLD_BY, *_CUT_AS))
    }
