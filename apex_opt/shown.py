"""How the command line shows an answer, as dataclasses whose fields are options, like those of `apex_opt.arguments`."""

# The gate reads annotations as they are evaluated here: no `from __future__ import annotations`.

from dataclasses import dataclass
from typing import Annotated, Literal

from apex_opt.gate import Arguments, Param


@dataclass(frozen=True, slots=True, kw_only=True)
class General(Arguments):
    """How any answer is shown.

    Parameters
    ----------
    format : Form of the answer: table; json; or csv, a line for each row of the answer: candidate, run or listed thing.
    report : HTML file to write the answer to, with charts, to be opened in a browser; needs apex-opt[report].
    debug : Show the traceback of an error.
    """

    format: Literal["table", "json", "csv"] = "table"
    report: Annotated[str | None, Param(suffix=".html")] = None
    debug: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sourced(General):
    """An answer that tells where its figures come from.

    Parameters
    ----------
    sources : Tell of every figure where it comes from, not only which are measured, derived or assumed; json always
        does.
    """

    sources: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Sourced):
    """An answer with a plan that can be started.

    Parameters
    ----------
    save : Folder to write what starts the plan into, new or empty: scripts, docker compose, Kubernetes, a router.
    """

    save: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored(Started):
    """An answer of `simulate`.

    Parameters
    ----------
    requests : CSV file to write the latencies of every request to.
    timeline : JSON file to write every batch to, as a timeline for ui.perfetto.dev or chrome://tracing.
    """

    requests: Annotated[str | None, Param(suffix=".csv")] = None
    timeline: Annotated[str | None, Param(suffix=".json")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Front(Sourced):
    """An answer of `pareto`.

    Parameters
    ----------
    plot : PNG or SVG file to draw the front into; needs apex-opt[report].
    """

    plot: Annotated[str | None, Param(suffix=".png or .svg")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed(Sourced):
    """An answer of `place`.

    Parameters
    ----------
    rankfile : Text file to write a line per rank to, such as rank 0=node0 slot=3: Open MPI's form, the slot being the
        GPU; replica by replica, ranks numbered through.
    plot : PNG or SVG file to draw it into; needs apex-opt[report].
    """

    rankfile: Annotated[str | None, Param(suffix=".txt")] = None
    plot: Annotated[str | None, Param(suffix=".png or .svg")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged(Sourced):
    """An answer of `validate`.

    Parameters
    ----------
    plot : PNG or SVG file to draw predicted against measured into; needs apex-opt[report].
    limit : Runs to show in the table, of more those with the largest errors; json has all.
    """

    plot: Annotated[str | None, Param(suffix=".png or .svg")] = None
    limit: Annotated[int, Param(1, 100_000)] = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn(General):
    """An answer of `cluster show`.

    Parameters
    ----------
    plot : PNG or SVG file to draw it into; needs apex-opt[report].
    """

    plot: Annotated[str | None, Param(suffix=".png or .svg")] = None
