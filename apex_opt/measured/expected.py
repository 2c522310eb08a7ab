"""How far predictions were from what was measured, and so what is to be expected of the next one.

The table `data/expected.csv` has predicted over measured, by engine, GPU, kind of model, load and figure: how
many runs, and their 10th, 50th and 90th percentile. `python -m apex_opt.measured.expected PATH ...` makes it anew from
measured runs. Runs count that are judged by (`measured.runs.judged_by`), not those to fit on.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.files import read_text
from apex_opt.measured.names import find_model
from apex_opt.measured.runs import MeasuredRun

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from apex_opt.ir.model import Model
    from apex_opt.measured.compare import Comparison

TABLE: Final = Path(__file__).parent / "data" / "expected.csv"
FIGURES: Final = {"ttft_mean": "TTFT", "tpot_mean": "TPOT", "e2e_mean": "E2E", "energy": "energy"}
LEAST_ROWS: Final = 8
"""Measurements that an interval from the 10th to the 90th percentile takes at least."""

_COLUMNS: Final = ("engine", "gpu", "model", "load", "figure", "rows", "p10", "p50", "p90")
_LOADS: Final = ((4.0, "light"), (32.0, "medium"))
_LARGEST_BYTES: Final = 1 << 20
_ANY: Final = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a prediction is of; an empty text stands for any."""

    engine: str
    gpu: str
    model: str
    load: str

    @classmethod
    def of(cls, engine: str, gpu: str, model: Model, in_flight: float) -> Kind:
        """What a run is of.

        Parameters
        ----------
        engine, gpu : names
        model : Model
        in_flight : float    requests at once for each GPU, in the mean
        """
        return cls(engine=engine, gpu=gpu, model=model_kind(model), load=load_kind_of(in_flight))

    @property
    def wider(self) -> tuple[Kind, ...]:
        """Itself and what it is a part of, the nearest first: any load, any GPU at this load, any GPU, any model."""
        engine, gpu, model, load = self.engine, self.gpu, self.model, self.load
        return (
            self,
            Kind(engine, gpu, model, _ANY),
            Kind(engine, _ANY, model, load),
            Kind(engine, _ANY, model, _ANY),
            Kind(engine, _ANY, _ANY, _ANY),
        )

    def __str__(self) -> str:
        return ", ".join(
            (
                self.engine,
                f"on {self.gpu}" if self.gpu else "on any GPU",
                f"{self.model} models" if self.model else "any model",
                f"{self.load} load" if self.load else "any load",
            )
        )


@dataclass(frozen=True, slots=True)
class Expected:
    """Predicted over measured of the nearest kind that enough was measured of."""

    kind: Kind
    nearest: bool
    rows: int
    p10: float
    p50: float
    p90: float

    def interval(self, predicted: float) -> tuple[float, float]:
        """What would be measured in eight cases of ten."""
        return predicted / self.p90, predicted / self.p10

    @property
    def share(self) -> float:
        """Half of the width of the interval, as a share of the figure."""
        return float((self.p90 / self.p10) ** 0.5 - 1)


def model_kind(model: Model) -> str:
    """Dense, of experts, or hybrid: with layers that keep a state of each sequence."""
    from apex_opt.ir.cells import State

    if any(isinstance(kept, State) for block in model.blocks for kept in block.attention.cache()):
        return "hybrid"
    return "MoE" if model.is_moe else "dense"


def load_kind_of(in_flight: float) -> str:
    """How many requests are in flight for each GPU: up to 4, up to 32, or more."""
    return next((name for most, name in _LOADS if in_flight <= most), "heavy")


def expected(kind: Kind, figure: str, path: Path = TABLE) -> Expected | None:
    """What is to be expected of a figure; None where nothing comparable was measured.

    Parameters
    ----------
    kind : Kind
    figure : key of `FIGURES`
    path : Path    of the table
    """
    table = _read(path)
    for place, wider in enumerate(kind.wider):
        if (found := table.get((wider, figure))) is not None and found[0] >= LEAST_ROWS:
            rows, p10, p50, p90 = found
            return Expected(kind=wider, nearest=place == 0, rows=rows, p10=p10, p50=p50, p90=p90)
    return None


@lru_cache(maxsize=4)
def _read(path: Path) -> dict[tuple[Kind, str], tuple[int, float, float, float]]:
    text = read_text(path, limit=_LARGEST_BYTES)
    return {
        (Kind(row["engine"], row["gpu"], row["model"], row["load"]), row["figure"]): (
            int(row["rows"]),
            *(float(row[name]) for name in ("p10", "p50", "p90")),
        )  # type: ignore[misc]
        for row in csv.DictReader(io.StringIO(text))
    }


def made(comparisons: Iterable[Comparison]) -> str:
    """The table as CSV, of the runs without drafts that were predicted and are judged by."""
    from apex_opt.cluster import load_cluster
    from apex_opt.engines import load_kind

    found: dict[tuple[Kind, str], list[float]] = {}
    for one in comparisons:
        run, prediction = one.run, one.prediction
        if prediction is None or not isinstance(run, MeasuredRun) or not run.judged or run.drafts:
            continue
        values = prediction.values
        busy = values["throughput"] * values["e2e_mean"] / prediction.plan.devices
        gpu = load_cluster(run.cluster).gpu.name
        kind = Kind.of(load_kind(run.engine).rules.name, gpu, find_model(run.model), busy)
        errors = one.errors_pct(all_of_them=False)
        for figure in FIGURES:
            if figure in errors:
                for wider in kind.wider:
                    found.setdefault((wider, figure), []).append(1 + errors[figure] / 100)
    lines = [",".join(_COLUMNS)]
    for (kind, figure), ratios in sorted(found.items(), key=str):
        tails = (f"{value:.4f}" for value in np.percentile(ratios, (10, 50, 90)))
        lines.append(",".join((kind.engine, kind.gpu, kind.model, kind.load, figure, str(len(ratios)), *tails)))
    return "\n".join(lines) + "\n"


def main(paths: Sequence[str]) -> None:
    """Make the table anew from files or folders of measured runs."""
    from apex_opt.measured.compare import Predictor
    from apex_opt.measured.readers import read_measured
    from apex_opt.outputs import write_whole

    runs = [run for path in paths for run in read_measured(Path(path)).runs]
    comparisons = Predictor().compare(runs, lambda what, done, total: None)
    write_whole(TABLE, made(comparisons).encode(), "table")


if __name__ == "__main__":
    main(sys.argv[1:])
