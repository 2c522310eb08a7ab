"""How far predictions were from what was measured, and so what is to be expected of the next one.

The table `data/expected.csv` has measured over predicted, by engine, GPU, kind of model, load and figure: how many runs
of how many sweeps, the middle, the ends of an interval that held eight in ten of the runs of every sweep where it was
made of the other sweeps, and the share that it held so. `python -m apex_opt.measured.expected FOLDER` makes it anew
from a folder that has runs of every layout: made of some of them it would lose what the others tell. Runs count that
are judged by (`measured.runs.judged_by`), not those to fit on.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from apex_opt.errors import ApexError, UsageError
from apex_opt.files import read_text
from apex_opt.measured.names import find_model
from apex_opt.measured.runs import MeasuredRun

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from apex_opt.ir.model import Model
    from apex_opt.measured.compare import Comparison
    from apex_opt.measured.runs import Run

TABLE: Final = Path(__file__).parent / "data" / "expected.csv"
FIGURES: Final = {"ttft_mean": "TTFT", "tpot_mean": "TPOT", "e2e_mean": "E2E", "energy": "energy"}
LEAST_ROWS: Final = 8
"""Measurements that an interval takes at least."""
HELD: Final = 0.8
"""Share of the runs of sweeps that an interval was not made of which it has to hold."""
DOUBTFUL: Final = 1.4
"""Factor that the runs of a GPU were off by in the middle from which on its answers are a guess."""

_COLUMNS: Final = ("engine", "gpu", "model", "load", "figure", "rows", "sweeps", "low", "middle", "high", "held")
_WIDENED: Final = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
_STUDENT_90: Final = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372, 1.363, 1.356, 1.350, 1.345)
"""90th percentile of Student's distribution, from one degree of freedom on."""
_NORMAL_90: Final = 1.282
_ALIKE: Final = 0.01
"""Spread of runs repeated: none is predicted better."""
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
    """Measured over predicted of the nearest kind that enough was measured of.

    Parameters
    ----------
    of : str                  what was measured, in words
    nearest : bool            whether that is what was asked about
    rows : int                measured runs
    low, middle, high         ratios; between the ends lie eight of ten
    """

    of: str
    nearest: bool
    rows: int
    low: float
    middle: float
    high: float

    def interval(self, predicted: float) -> tuple[float, float]:
        """What would be measured in eight cases of ten, the prediction among it."""
        return predicted * min(self.low, 1.0), predicted * max(self.high, 1.0)

    @property
    def above(self) -> float:
        """By which share more may be measured than is predicted."""
        return max(self.high, 1.0) - 1

    @property
    def below(self) -> float:
        """By which share less may be measured than is predicted."""
        return 1 - min(self.low, 1.0)

    @property
    def share(self) -> float:
        """Half of the width of the interval, as a share of the figure."""
        return float((self.high / self.low) ** 0.5 - 1)


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
        found = table.get((wider, figure))
        if found is not None and found.rows >= LEAST_ROWS and found.held >= HELD:
            return Expected(str(wider), place == 0, found.rows, found.low, found.middle, found.high)
    return None


def doubtful(gpu: str, figure: str, path: Path = TABLE) -> tuple[int, float] | None:
    """Runs of a GPU, and measured over predicted in the middle, where they are far off or few; None where they are not.

    Parameters
    ----------
    gpu : str
    figure : key of `FIGURES`
    path : Path    of the table
    """
    found = _read(path).get((Kind(_ANY, gpu, _ANY, _ANY), figure))
    if found is None or 1 / DOUBTFUL < found.middle < DOUBTFUL:
        return None
    return found.rows, found.middle


class _Row(NamedTuple):
    """A line of the table without what it is of."""

    rows: int
    sweeps: int
    low: float
    middle: float
    high: float
    held: float


@lru_cache(maxsize=4)
def _read(path: Path) -> dict[tuple[Kind, str], _Row]:
    text = read_text(path, limit=_LARGEST_BYTES)
    return {
        (Kind(row["engine"], row["gpu"], row["model"], row["load"]), row["figure"]): _Row(
            int(row["rows"]), int(row["sweeps"]), *(float(row[name]) for name in ("low", "middle", "high", "held"))
        )
        for row in csv.DictReader(io.StringIO(text))
    }


def ends(ratios: Sequence[float]) -> tuple[float, float]:
    """What eight of ten further ratios lie between, if these and those are alike: the 10th and the 90th percentile.

    Of n ratios the next is below the k-th with a probability of k / (n + 1); of few the least and the largest count.
    """
    rising = sorted(ratios)
    tail = max(int((len(rising) + 1) * (1 - HELD) / 2), 1)
    return rising[tail - 1], rising[-tail]


def honest(ratios: Mapping[str, Sequence[float]]) -> tuple[float, float, float]:
    """Ends of the interval of the ratios of some sweeps, and the share of each that one of the others would hold.

    The interval is widened, in logarithms about its middle, until it would have held eight of ten of the runs of
    sweeps that it was not made of.
    """
    everything = [ratio for some in ratios.values() for ratio in some]
    held = 0.0
    for width in _WIDENED:
        inside = 0
        for sweep, some in ratios.items():
            low, high = _widened([ratio for name, more in ratios.items() if name != sweep for ratio in more], width)
            inside += sum(low <= ratio <= high for ratio in some)
        held = inside / len(everything)
        if held >= HELD:
            break
    low, high = _widened(everything, width)
    return low, high, held


def _widened(ratios: Sequence[float], width: float) -> tuple[float, float]:
    """The ends, so many times as far from their middle; of no ratio nothing."""
    if not ratios:
        return np.inf, -np.inf
    low, high = np.log(ends(ratios))
    middle, half = (low + high) / 2, (high - low) / 2 * width
    return float(np.exp(middle - half)), float(np.exp(middle + half))


def of_few(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Ends and middle of an interval that holds eight of ten further ratios, by Student's distribution.

    For the few runs of a calibration, each predicted with times that were fitted on the others.
    """
    logs = np.log(ratios)
    mean, count = float(logs.mean()), len(logs)
    factor = _STUDENT_90[count - 2] if count - 2 < len(_STUDENT_90) else _NORMAL_90
    reach = factor * max(float(logs.std(ddof=1)), _ALIKE) * (1 + 1 / count) ** 0.5
    return float(np.exp(mean - reach)), float(np.exp(mean)), float(np.exp(mean + reach))


def made(comparisons: Iterable[Comparison]) -> str:
    """The table as CSV, of the runs without drafts and hand-overs that were predicted and are judged by."""
    from apex_opt.cluster import load_cluster
    from apex_opt.engines import load_kind

    found: dict[tuple[Kind, str], dict[str, list[float]]] = {}
    for one in comparisons:
        run, prediction = one.run, one.prediction
        if prediction is None or not isinstance(run, MeasuredRun) or not run.judged or run.drafts or run.answering:
            continue
        values = prediction.values
        busy = values["throughput"] * values["e2e_mean"] / prediction.plan.devices
        gpu = load_cluster(run.cluster).gpu.name
        kind = Kind.of(load_kind(run.engine).rules.name, gpu, find_model(run.model), busy)
        errors = one.errors_pct(all_of_them=False)
        for figure in FIGURES:
            if figure in errors:
                for wider in (*kind.wider, Kind(_ANY, gpu, _ANY, _ANY)):
                    sweeps = found.setdefault((wider, figure), {})
                    sweeps.setdefault(run.sweep, []).append(1 / (1 + errors[figure] / 100))
    lines = [",".join(_COLUMNS)]
    for (kind, figure), sweeps in sorted(found.items(), key=str):
        ratios = [ratio for some in sweeps.values() for ratio in some]
        low, high, held = honest(sweeps)
        if len(sweeps) == 1:
            low, high = ends(ratios)
        told = (f"{value:.4g}" for value in (low, float(np.median(ratios)), high, held))
        counts = str(len(ratios)), str(len(sweeps))
        lines.append(",".join((kind.engine, kind.gpu, kind.model, kind.load, figure, *counts, *told)))
    return "\n".join(lines) + "\n"


def all_runs(folder: Path) -> tuple[Run, ...]:
    """The runs of a folder that has some of every layout that runs are kept in.

    Raises
    ------
    InputError    as `read_measured`
    UsageError    a layout of which there is none
    """
    from apex_opt.measured.readers import READERS, read_measured

    runs = read_measured(folder).runs
    there = {run.kind for run in runs}
    if missing := [kind for kind in READERS if kind not in there]:
        raise UsageError(
            f"{folder}: holds no runs of the layout {', '.join(missing)}, and the table would lose what they tell; "
            "name the folder that holds those of every layout"
        )
    return runs


def main(words: Sequence[str]) -> None:
    """Make the table anew from the folder of all measured runs.

    Raises
    ------
    UsageError    other than one folder; as `all_runs`
    """
    from apex_opt.measured.compare import Predictor
    from apex_opt.outputs import write_whole

    if len(words) != 1:
        raise UsageError("expected one folder, that of all measured runs: python -m apex_opt.measured.expected FOLDER")
    comparisons = Predictor().compare(all_runs(Path(words[0])), lambda what, done, total: None)
    write_whole(TABLE, made(comparisons).encode(), "table")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ApexError as error:
        sys.exit(f"error: {error}")
