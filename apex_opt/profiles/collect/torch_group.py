"""Collectives of NCCL, in a process per GPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from apex_opt.profiles.collect.timing import LEAST_CALLS, CallError, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.profiles.collect.points import Point
    from apex_opt.profiles.collect.timing import Effort

# Every rank must make as many calls as the others: their number follows from the size, not from a clock.
_CALL_S: Final = 20e-6
_BYTES_PER_S: Final = 50e9
_HALF_BYTES: Final = 2


def replays(size: int, sample_s: float) -> int:
    """Replays of a graph that make a sample about so long."""
    return max(round(sample_s / (LEAST_CALLS * (_CALL_S + size / _BYTES_PER_S))), 1)


def measure_group(ranks: int, points: Sequence[Point], effort: Effort) -> list[Result]:
    """The results of collectives on the first `ranks` GPUs.

    Parameters
    ----------
    ranks : int                   that take part
    points : sequence of Point    what is measured
    effort : Effort               how long is measured

    Raises
    ------
    CallError       a process that fails
    """
    from torch.multiprocessing.spawn import ProcessException, spawn

    asked = [(dict(point.key)["op"], dict(point.key)["bytes"]) for point in points]
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_worker, args=(ranks, asked, effort, folder), nprocs=ranks)
        except ProcessException as error:
            raise CallError(" ".join(str(error).split())[-80:]) from None
        times = json.loads((Path(folder) / "times.json").read_text(encoding="utf-8"))
    return [Result(time_s=time) for time in times]


def _worker(rank: int, ranks: int, asked: Sequence[tuple[str, int]], effort: Effort, folder: str) -> None:
    """One rank; the first writes down the times."""
    import torch
    from torch import distributed

    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    times = []
    for op, size in asked:
        elements = max(size // _HALF_BYTES // ranks, 1) * ranks
        times.append(_time_s(_call(op, elements, ranks), replays(size, effort.sample_s), effort.samples))
    if rank == 0:
        (Path(folder) / "times.json").write_text(json.dumps(times), encoding="utf-8")
    distributed.destroy_process_group()


def _call(op: str, elements: int, ranks: int) -> Callable[[], Any]:
    """A collective of a vector of so many elements."""
    import torch
    from torch import distributed

    whole = torch.ones(elements, device="cuda", dtype=torch.bfloat16)
    share, other = torch.ones_like(whole[: elements // ranks]), torch.empty_like(whole)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: distributed.all_reduce(whole),
        "all_gather": lambda: distributed.all_gather_into_tensor(whole, share),
        "reduce_scatter": lambda: distributed.reduce_scatter_tensor(share, whole),
        "all_to_all": lambda: distributed.all_to_all_single(other, whole),
    }
    return calls[op]


def _time_s(call: Callable[[], Any], times: int, samples: int) -> float:
    """Median time of a call, replayed from a graph at the same moment on all ranks."""
    import torch
    from torch import distributed

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LEAST_CALLS):
            call()
    spent = []
    for _ in range(samples + 1):
        distributed.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) * 1e-3 / (times * LEAST_CALLS))
    # The first sample warms up.
    return float(sorted(spent[1:])[samples // 2])
