"""What each request saw, as a CSV file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.figures.measure import each
from apex_opt.figures.registry import per_item
from apex_opt.outputs import written
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.simulator.outcome import Outcome
    from apex_opt.workload.trace import Trace


def write_requests(path: Path, outcome: Outcome, trace: Trace, max_model_len: int, request_ns: int) -> None:
    """Write a row per request; the file appears whole or not at all.

    Columns: request (its place in the trace), arrival_s, prompt and output (tokens generated), ttft_s, tpot_s (empty
    for a single token), e2e_s. Times include a request's way in and out of the server, as the tables do.

    Parameters
    ----------
    path : Path            of the file
    outcome, trace
    max_model_len : int    tokens that a request may have
    request_ns : int       time of a request outside the engine

    Raises
    ------
    InputError    a path that cannot be written
    """
    import pandas as pd

    run = outcome.as_run(trace, max_model_len, outside_ns=request_ns)
    table = pd.DataFrame(
        {
            "request": np.arange(len(trace)),
            "arrival_s": outcome.arrival_ns / NS_PER_S,
            "prompt": trace.prompt,
            "output": run.tokens,
            **{figure.key: each(run, figure) for figure in per_item() if figure.of == "request"},
        }
    )
    with written(path, "requests") as file:
        table.to_csv(file, mode="wb", index=False, float_format="%.9f")
