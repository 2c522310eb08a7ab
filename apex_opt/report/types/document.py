"""What every document has."""

from __future__ import annotations

from typing import ClassVar, Literal

from apex_opt import __version__
from apex_opt.schema import Described

Number = float | None
"""None where a figure is undefined, as a time between tokens of one token."""
Statistics = dict[str, Number]
"""A latency by statistic: mean, p50, p90, p95, p99, max, and whatever else was asked for."""
Sources = dict[str, str]
"""Where every figure comes from."""
Status = Literal["optimal", "feasible", "infeasible", "unknown"]


class Document(Described):
    """What a command answers.

    Parameters
    ----------
    status : whether there is what was asked for, and whether it is proved to be the best
    version : release of apex_opt
    notes : what the reader has to know besides, a sentence each without the full stop
    """

    PAGE: ClassVar[str]
    ROWS: ClassVar[str] = "candidates"
    OTHERWISE: ClassVar[tuple[str, ...]] = ()
    LIMITED: ClassVar[bool] = False

    version: str = __version__
    status: str
