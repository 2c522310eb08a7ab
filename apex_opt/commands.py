"""What a command is: the type of its arguments, what answers them, and the result."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, NamedTuple, ParamSpec, TypeVar, cast

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.files import expanded
from apex_opt.gate import GONE, REQUIRED, Arguments, Option, options_of
from apex_opt.schema import to_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import pandas as pd

    from apex_opt.gate import Progress
    from apex_opt.report import types
    from apex_opt.report.charts import Chart
    from apex_opt.report.charts.shown import Shown
    from apex_opt.report.detail import Detail
    from apex_opt.studies.check import Check

P = ParamSpec("P")
A = TypeVar("A", bound=Arguments)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Result:
    """What a command answers.

    Parameters
    ----------
    document : everything it tells, typed as its schema in `docs/schema`
    found : whether there is what was asked for: a plan, a rate, a run that can be predicted
    holds : whether a certificate that was replayed holds
    files : what can be written besides, by name, each as a function of the path
    traffic : files that go into a folder of `--save` beside what it makes of the document, by name, as their lines
    replay : the certificate replayed, where there is one, and a document held to what was answered
    details : the deployments that are answered, with their runs request by request, for charts
    drawn : charts that it has besides, each with the heading of its section in a report
    """

    document: types.Document
    found: bool = True
    holds: bool = True
    files: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    traffic: Mapping[str, Callable[[], Iterable[str]]] = field(default_factory=dict)
    replay: Callable[[Progress, types.Document], Check] | None = None
    details: Callable[[], Sequence[Detail]] = tuple
    drawn: Callable[[], Iterable[tuple[str, Chart]]] = tuple

    @property
    def status(self) -> str:
        """Whether there is what was asked for, and whether it is proved to be the best."""
        return self.document.status

    @property
    def best(self) -> Any:
        """The best that was found; its `text` is the plan as `simulate` takes it. None where there is none."""
        best = getattr(self.document, "best", None)
        if not isinstance(best, int):
            return best
        document: Any = self.document  # of several answers side by side, of which it is the place of one, from 1
        clusters = getattr(document, "clusters", None)
        return document.plans[best - 1].best if clusters is None else clusters[best - 1].answer.best

    def __repr__(self) -> str:
        """What was found, in a line; `page` has everything."""
        plan = getattr(self.best, "text", None)
        return f"<{self.to_dict()['schema']}: {self.status}{f', {plan}' if plan else ''}>"

    def to_dict(self) -> dict[str, Any]:
        """The document that `--format=json` prints."""
        plain: dict[str, Any] = to_plain(self.document)
        first, last = plain.pop("schema"), plain.pop("version")
        return {"schema": first, **plain, "version": last}

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def to_frame(self) -> pd.DataFrame:
        """A row for each candidate, run or listed thing, a column for each figure, such as `metrics.ttft_s.p95`."""
        import pandas as pd

        rows = self._rows()
        plain = rows and all(not isinstance(row, dict) for row in rows)
        return pd.DataFrame({self.document.ROWS: rows}) if plain else pd.json_normalize(rows)

    def _rows(self) -> list[Any]:
        """The rows of the document, of the first list of rows that has some; of each that is an answer its best."""
        document = self.to_dict()
        for name in (self.document.ROWS, *self.document.OTHERWISE):
            outer, _, inner = name.rpartition(".")
            if found := ((document.get(outer) or {}) if outer else document).get(inner):
                return [_with_best(row) for row in found]
        return []

    def to_csv(self) -> str:
        """The same as CSV, with units in the names of columns; what is a list in a cell is JSON there."""

        def cell(value: Any) -> Any:
            return json.dumps(value) if isinstance(value, list | dict | bool) else value

        # Whole numbers stay whole where some are undefined.
        frame = self.to_frame().convert_dtypes().astype(object)
        return frame.map(cell).to_csv(index=False) if len(frame.columns) else ""

    def _repr_html_(self) -> str:
        """The page as a notebook shows it."""
        from apex_opt.report.html import fragment
        from apex_opt.report.show import page

        return fragment(page(self.document, 30).blocks)

    def plot(self, *names: str) -> Shown:
        """Charts of the answer, as a notebook shows them; `save` writes them into a file.

        Parameters
        ----------
        names : of charts, such as "ttft" or "front"; by default all there are

        Raises
        ------
        UnknownNameError    a chart that this answer does not have
        UsageError          an answer without charts, or vl-convert is not installed
        """
        from apex_opt.report.charts.shown import Shown

        charts = [chart for _, chart in self.charts()]
        if not charts:
            raise UsageError("plot: this answer has no charts")
        for name in names:
            if name not in (known := list(dict.fromkeys(chart.name for chart in charts))):
                raise UnknownNameError("chart of this answer", name, known)
        return Shown(tuple(chart for chart in charts if not names or chart.name in names))

    def report(self, path: str | Path) -> None:
        """Write the answer as one HTML file with its charts, to be opened in a browser without any network.

        Raises
        ------
        UsageError    vl-convert is not installed
        InputError    a path that cannot be written
        """
        from apex_opt.outputs import write_whole
        from apex_opt.report.html import html_page
        from apex_opt.report.show import page

        blocks = page(self.document, 1000, sources=True).blocks
        text = html_page(self.to_dict(), blocks, list(self.charts()), self.details())
        write_whole(expanded(str(path)), text.encode(), "report")

    def charts(self) -> Iterator[tuple[str, Chart]]:
        """Charts by the headings of their sections."""
        from apex_opt.report.charts.chosen import charts_of

        yield from self.drawn()
        yield from charts_of(self.to_dict(), self.details())

    def page(self, *, sources: bool = False, limit: int = 30) -> str:
        """The text that the command line prints.

        Parameters
        ----------
        sources : bool    whether to tell of every figure where it comes from, rather than in groups
        limit : int       runs in the table of `validate`, those with the largest errors
        """
        from apex_opt.report.show import page

        return page(self.document, limit, sources=sources)

    def write(self, **files: str) -> None:
        """Write files that go with an answer, as `report="answer.html"`; each appears whole or not at all.

        Raises
        ------
        UnknownNameError    a file that this answer does not have
        InputError          a path that cannot be written
        """
        for name, path in files.items():
            if name not in self.written:
                raise UnknownNameError("file of this answer", name, self.written)
            self.written[name](expanded(path))

    @property
    def written(self) -> dict[str, Callable[[Path], None]]:
        """What can be written, by name: a report always."""
        return {**self.files, "report": self.report}


def _with_best(row: Any) -> Any:
    """A row as it is; of an answer, or what has one, first its name, and no candidates beside the best."""
    answer = row.get("answer", row) if isinstance(row, dict) else {}
    if "candidates" not in answer:
        return row
    named = {name: row[name] for name in ("plan", "cluster") if name in row}
    kept = {name: value for name, value in answer.items() if name != "candidates"}
    return {**named, **(kept if answer is row else {"answer": kept})}


class Command(NamedTuple):
    """The type of a command's arguments, and what answers them."""

    asks: type[Any]
    run: Callable[[Any], Result]


COMMANDS: Final[dict[str, Command]] = {}
"""Every command by its name on the command line."""


def command(asks: Callable[P, A]) -> Callable[[Callable[[A], Result]], Callable[P, Result]]:
    """Make a function of a dataclass of arguments one of these arguments themselves, with their defaults and texts."""
    of = cast("type[A]", asks)

    def made(run: Callable[[A], Result]) -> Callable[P, Result]:
        name = run.__name__.replace("_", " ")
        COMMANDS[name] = Command(of, run)

        @wraps(run)
        def call(*args: P.args, **given: P.kwargs) -> Result:
            asked = read(of, name, args, given)
            return _with_bar(run, asked) if asked.progress is True else run(asked)

        options = options_of(of)
        shown = inspect.signature(of)
        call.__signature__ = shown.replace(return_annotation=Result)  # type: ignore[attr-defined]
        told = "\n".join([*map(_told, options), *_PROGRESS])
        call.__doc__ = f"{run.__doc__}\n\nParameters\n----------\n{told}\n"
        return call

    return made


_PROGRESS: Final = (
    "progress : callable or bool, optional",
    "    Told what is being done, how many steps of it are done, and of how many; True shows a bar.",
)


def _told(option: Option) -> str:
    """An argument as the docstring of its function describes it."""
    default = "optional" if option.default is None else f"default {option.default!r}"
    kind = option.kind.__name__ if option.default is REQUIRED else f"{option.kind.__name__}, {default}"
    return f"{option.name} : {kind}\n    {option.text}"


def _with_bar(run: Callable[[A], Result], asked: A) -> Result:
    """An answer while a bar tells of it, which comes back while charts are made."""
    from apex_opt.report.progress import Progress

    with Progress() as bar:
        found = run(replace(asked, progress=bar))

    def details() -> Sequence[Detail]:
        with bar:
            return found.details()

    return replace(found, details=details)


def read(of: type[A], name: str, args: Sequence[Any], given: Mapping[str, Any]) -> A:
    """Arguments of a command, checked.

    Parameters
    ----------
    of : type                 dataclass of the arguments
    name : str                of the command
    args : sequence of Any    those without a name, in order
    given : mapping           those by name

    Raises
    ------
    UnknownNameError    an argument that there is not
    UsageError          one that is left out or is no more, and whatever its option refuses
    """
    options = options_of(of)
    places = [each.name for each in fields(of) if each.init and not each.kw_only]
    if len(args) > len(places):
        raise UsageError(f"{name}: takes {len(places)} arguments without a name, got {len(args)}")
    given = dict(zip(places, args, strict=False)) | dict(given)
    if unknown := [key for key in given if key not in {"progress", *(option.name for option in options)}]:
        if unknown[0] in GONE:
            raise UsageError(f"--{unknown[0]}: there is no such option; {GONE[unknown[0]]}")
        raise UnknownNameError(f"option of {name}", unknown[0], [option.name for option in options])
    if missing := [o.name for o in options if o.default is REQUIRED and given.get(o.name, REQUIRED) is REQUIRED]:
        raise UsageError(f"{name}: needs --{missing[0]}; see solve.py {name} --help")
    return of(**given)
