"""Reading traces."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.registry import ROOT, Benchmark, best_of

if TYPE_CHECKING:
    from apex_opt.workload import Trace

AZURE_CONVERSATION = ROOT.parent / "shared" / "traces" / "azure" / "AzureLLMInferenceTrace_conv.csv"
AZURE_ROWS = 19_366
MOONCAKE_CONVERSATION = ROOT.parent / "shared" / "traces" / "mooncake" / "conversation_trace.jsonl"
MOONCAKE_ROWS = 12_031


def benchmarks() -> tuple[Benchmark, ...]:
    """Figures of this module."""
    source = "the Azure conversation trace" if AZURE_CONVERSATION.is_file() else "a generated file of its layout"
    return (
        Benchmark(
            name="read_azure_csv_s",
            unit="s",
            about=f"{AZURE_ROWS:,} rows in Azure's layout ({source}), read and checked",
            measure=read_azure_csv,
        ),
    )


def read_azure_csv(quick: bool) -> float:
    """Best of three after a warm-up."""
    from apex_opt.workload import load_trace

    with tempfile.TemporaryDirectory() as folder:
        path = AZURE_CONVERSATION
        if quick or not path.is_file():
            path = Path(folder) / "azure.csv"
            path.write_text(azure_csv(conversation_lookalike(50 if quick else AZURE_ROWS)))
        load_trace(str(path))
        return best_of(1 if quick else 3, lambda: load_trace(str(path)))


def conversation(quick: bool) -> Trace:
    """The Azure conversation trace where it is at hand, else its look-alike."""
    from apex_opt.workload import load_trace

    if quick or not AZURE_CONVERSATION.is_file():
        return conversation_lookalike(50 if quick else AZURE_ROWS)
    return load_trace(str(AZURE_CONVERSATION))


@cache
def conversation_lookalike(requests: int) -> Trace:
    """Requests at the mean rate and with the mean and largest lengths of the Azure conversation trace of 2023."""
    from apex_opt.workload import load_trace

    lengths = "prompt=lognormal(mean=1155,sigma=1.1,max=14050),output=lognormal(mean=211,sigma=0.8,max=1000)"
    return load_trace(f"gamma:rate=5.5,cv=2,n={requests},{lengths}", seed=1)


def shared_beginnings(quick: bool) -> Trace:
    """Mooncake's conversation trace where it is at hand, else one of its rate and lengths with 50 shared beginnings."""
    from apex_opt.workload import load_trace

    if MOONCAKE_CONVERSATION.is_file():
        return load_trace(str(MOONCAKE_CONVERSATION)).head(50 if quick else MOONCAKE_ROWS)
    count = 50 if quick else MOONCAKE_ROWS
    lengths = "prompt=lognormal(mean=12035,sigma=1.2,max=120000),output=lognormal(mean=343,sigma=0.8,max=2000)"
    return load_trace(f"poisson:rate=3.4,n={count},{lengths},prefix=(512,50)")


def azure_csv(trace: Trace) -> str:
    """The trace in Azure's columns."""
    import numpy as np

    times = np.datetime64("2023-11-16T18:15:46", "ns") + trace.arrival_ns.astype("timedelta64[ns]")
    rows = zip(times.astype(str), trace.prompt.tolist(), trace.output.tolist(), strict=True)
    return "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
        f"{time.replace('T', ' ')[:27]},{prompt},{output}\n" for time, prompt, output in rows
    )
