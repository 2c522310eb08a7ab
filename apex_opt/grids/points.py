"""One point of a study: what tells it from others once its options are resolved, and its answer as rows of a table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from itertools import product
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

import numpy as np

from apex_opt.arguments import Ask, CapacityAsk
from apex_opt.errors import ApexError, UnknownNameError
from apex_opt.figures.registry import STATISTICS
from apex_opt.gate import REQUIRED, options_of
from apex_opt.report import types
from apex_opt.resolve import resolve
from apex_opt.schema import to_plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.commands import Result
    from apex_opt.gate import Progress
    from apex_opt.grids.study import Options, Study
    from apex_opt.search.problem import Problem

FAULT: Final = 1
INFEASIBLE: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a point.

    Parameters
    ----------
    status : str           of the answer; "failed" where there is none
    exit_code : int        that the command would have ended with
    error : str or None    why there is no plan
    seconds : float        that it took
    rows : tuple           of each deployment of the answer its plan, its GPUs and its figures; one without a plan where
                           there is none
    document : str         the answer as JSON; empty where there is none
    """

    status: str
    exit_code: int
    error: str | None
    seconds: float = 0.0
    rows: tuple[Options, ...] = ({},)
    document: str = ""

    @classmethod
    def failed(cls, error: str, exit_code: int = FAULT, seconds: float = 0.0) -> Outcome:
        """A point without an answer, and why.

        Parameters
        ----------
        error : str        in a line
        exit_code : int    that the command would have ended with
        seconds : float    that it took
        """
        return cls(status="failed", exit_code=exit_code, error=" ".join(error.split()), seconds=seconds)


@cache
def figures() -> tuple[str, ...]:
    """Names of the figures in a table of points: all that every run may have, and the rate of `capacity`."""
    found = ["rate_per_s"]
    for name, hint in get_type_hints(types.Metrics).items():
        parts = get_args(hint) or (hint,)
        if types.Statistics in parts or hint == types.Statistics:
            found += [f"{name}.{statistic}" for statistic in STATISTICS]
        elif {int, float} & {*parts}:
            found.append(name)
    return tuple(found)


def answered(question: tuple[Callable[..., Result], Options]) -> Outcome:
    """The answer of a command, whatever comes of it."""
    command, options = question
    begun = perf_counter()
    try:
        result = command(**options)
    except ApexError as error:
        return Outcome.failed(str(error), error.exit_code, perf_counter() - begun)
    except MemoryError:
        return Outcome.failed("out of memory; take fewer --workers", 2, perf_counter() - begun)
    except Exception as error:  # one point that fails is no reason to lose the others
        return Outcome.failed(f"a fault of ours: {type(error).__name__}: {error}", FAULT, perf_counter() - begun)
    document: Any = result.document
    runs = [document.best] if getattr(document, "best", None) else document.candidates
    return Outcome(
        status=result.status,
        exit_code=0 if result.found else INFEASIBLE,
        error=getattr(document, "reason", None),
        seconds=perf_counter() - begun,
        rows=tuple(map(_row, runs)) or ({},),
        document=result.to_json(),
    )


def _row(run: Any) -> Options:
    """Plan, GPUs and figures of a deployment."""
    metrics = {"rate_per_s": getattr(run, "rate_per_s", None), **to_plain(run.metrics)}
    told = {}
    for name in figures():
        value = metrics.get(name.partition(".")[0])
        told[name] = value.get(name.partition(".")[2]) if isinstance(value, dict) else value
    return {"plan": run.text, "gpus": run.gpus, "figures": told}


def identified(question: tuple[Study, Options]) -> str | Outcome:
    """What two points have in common if they are the same question; what became of one that cannot be asked."""
    study, point = question
    try:
        ask, problem = _posed(study, point)
    except ApexError as error:
        return Outcome.failed(str(error), error.exit_code)
    # What a problem does not tell: options of the command alone, and names that --emit prints.
    resolved = set() if ask.emit else {option.name for option in options_of(Ask)} - {"rate"}
    beside = {o.name: getattr(ask, o.name) for o in options_of(type(ask)) if o.name not in resolved}
    if not isinstance(ask, CapacityAsk):
        beside.pop("rate", None)
    hashed = hashlib.sha256()
    _fold((study.command, beside, problem), hashed.update)
    return hashed.hexdigest()


def _posed(study: Study, point: Options) -> tuple[Ask, Problem]:
    """The arguments of the command at a point, and the problem that they pose."""
    ask = study.ask(point)
    assert isinstance(ask, Ask)
    # `capacity` asks for a rate, and takes no trace at one.
    unrated = replace(ask, rate=None) if isinstance(ask, CapacityAsk) else ask
    return ask, resolve(unrated, rated=isinstance(ask, CapacityAsk))


def faults(study: Study, tell: Progress) -> dict[int, str]:
    """Why points cannot be asked, by their numbers: every name at them that nothing has, else the first fault.

    Parameters
    ----------
    study : Study
    tell : Progress    told (what, done, total) along the way
    """
    needed = {option.name for option in options_of(study.asks) if option.default is REQUIRED}
    beside = {name: values[0] for name, values in study.axes.items() if name in needed}

    @cache
    def unknown(name: str, place: int) -> str | None:
        """What is said of a value where options along the other axes are left out."""
        try:
            _posed(study, {**beside, name: study.axes[name][place]})
        except UnknownNameError as error:
            return str(error)
        except ApexError:  # it may be the others that it goes with
            return None
        return None

    found: dict[int, str] = {}
    for number, places in enumerate(product(*(range(len(values)) for values in study.axes.values()))):
        chosen = dict(zip(study.axes, places, strict=True))
        outcome = identified((study, {name: study.axes[name][place] for name, place in chosen.items()}))
        if isinstance(outcome, Outcome):
            names = filter(None, (unknown(name, place) for name, place in chosen.items()))
            found[number] = "; ".join(dict.fromkeys((str(outcome.error), *names)))
        tell("checking points", number + 1, len(study))
    return found


def _fold(value: Any, put: Callable[[bytes], Any]) -> None:
    """Tell all that a value holds, the same for values that are equal."""
    put(f"<{type(value).__qualname__}>".encode())
    if is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            put(each.name.encode())
            _fold(getattr(value, each.name), put)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _fold((key, item), put)
    elif isinstance(value, tuple | list):
        for item in value:
            _fold(item, put)
    elif isinstance(value, set | frozenset):
        _fold(sorted(value, key=repr), put)
    elif isinstance(value, np.ndarray):
        put(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif callable(value):
        put(f"{value.__module__}.{value.__qualname__}".encode())
    elif getattr(type(value), "__repr__", None) is object.__repr__:
        _fold(vars(value), put)
    else:
        put(repr(value).encode())
    put(b";")
