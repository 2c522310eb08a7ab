"""How far times may be off before another plan wins: as a document, and as a table with a few sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.text import Text

from apex_opt.report import types
from apex_opt.report.document import loss_to
from apex_opt.report.expected import NOTHING
from apex_opt.report.layout import amount, count, table
from apex_opt.studies.robust import STEP, STEPS
from apex_opt.studies.robust_rates import HIGHEST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from apex_opt.measured.expected import Expected
    from apex_opt.schema import Document
    from apex_opt.search import Problem, Scored
    from apex_opt.studies.capacity_answer import PlanRate
    from apex_opt.studies.robust import Robustness, Turn
    from apex_opt.studies.robust_front import FrontRobustness
    from apex_opt.studies.robust_rates import RateRobustness

_WHOSE: Final = {
    ("all", True): "all plans, longer",
    ("all", False): "all plans, shorter",
    ("best", True): "the best, longer",
    ("others", False): "another, shorter",
}
GPUS: Final = "GPUs"
"""Unit of what is best where a rate is given."""
_SHOWN: Final = 5
_NO_MATTER: Final = (
    "make no difference: there are no goals but on the price, and clients do not send by the clock, so that all "
    "figures of all plans change alike"
)
_ALONE: Final = "nothing to compare: no other plan can run, and there are no goals to miss"
_RANGE: Final = (
    f"with times from {STEP**-STEPS:.2f} to {STEP**STEPS:.2f} of those computed; a factor is found to 1%, and between "
    "two that were asked another plan may win"
)


def robust_document(problem: Problem, best: Scored, found: Robustness, error: Expected | None) -> types.Robust:
    """How far times may be off; values in the unit of the first objective.

    Parameters
    ----------
    problem : Problem
    best : Scored               that was answered
    found : Robustness
    error : Expected or None    of the objective that plans are held against each other by
    """

    def near(scored: Scored) -> types.Near:
        return types.Near(
            plan=scored.text, gpus=scored.devices, value=scored.value, margin=loss_to(problem, scored, best)
        )

    return _document(found, error, near)


def robust_rate_document(best: PlanRate, found: RateRobustness, error: Expected | None) -> types.Robust:
    """How far times may be off before another plan is answered; values are rates, or GPUs where a rate was given.

    Parameters
    ----------
    best : PlanRate             that was answered
    found : RateRobustness
    error : Expected or None    of the objective that plans are held against each other by
    """
    highest = found.deciding == HIGHEST
    mine = best.rate_per_s if highest else float(best.deployment.devices)

    def near(scored: Scored) -> types.Near:
        value = found.values[scored.deployment]
        margin = 1 - value / mine if highest else value / mine - 1
        return types.Near(plan=scored.text, gpus=scored.devices, value=value, margin=margin)

    return _document(found, error, near)


def robust_front_document(found: FrontRobustness) -> types.RobustFront:
    """How far times may be off before other plans are on a front."""
    turns = []
    for turn in found.turns:
        change = turn.change
        turns.append(
            types.FrontTurn(
                times=turn.times,
                plan="" if turn.of is None else turn.of.text,
                slower=turn.slower,
                holds=turn.holds,
                factor=turn.factor,
                joins=() if change is None else tuple(one.text for one in change.joins),
                leaves=() if change is None else tuple(one.text for one in change.leaves),
                missed="" if change is None else change.missed,
            )
        )
    return types.RobustFront(
        turns=tuple(turns), common=found.common, searches=found.searches, simulations=found.simulations
    )


def _document(found: Robustness, error: Expected | None, near: Callable[[Scored], types.Near]) -> types.Robust:
    """What was found, with the error that plans are held against each other by, and plans as `near` tells them."""
    return types.Robust(
        turns=tuple(map(_turn, found.turns)),
        common=found.common,
        runner_up=None if found.runner_up is None else near(found.runner_up),
        deciding=found.deciding,
        error=None if error is None else error.share,
        rows=0 if error is None else error.rows,
        of=NOTHING if error is None else error.of,
        tied=None if found.tied is None else tuple(map(near, found.tied)),
        searches=found.searches,
        simulations=found.simulations,
    )


def _turn(turn: Turn) -> types.Turn:
    loss = turn.loss
    return types.Turn(
        times=turn.times,
        slower=turn.slower,
        holds=turn.holds,
        factor=turn.factor,
        plan=None if loss is None or loss.winner is None else loss.winner.text,
        value=None if loss is None else loss.value,
        missed="" if loss is None else loss.missed,
    )


def robust_section(console: Console, document: Document, aim: Document | None = None) -> None:
    """What was found of an answer, where it was asked.

    Parameters
    ----------
    console, document
    aim : Document or None    name, unit and tolerance of what is best; None: of the objective
    """
    if (found := document.get("robust")) is None:
        return
    objective = aim or document["objective"]
    unit = objective["unit"]
    rows = [
        (
            _WHOSE[turn["times"], turn["slower"]],
            f"{turn['holds']:.3f}",
            "-" if turn["factor"] is None else f"{turn['factor']:.3f}",
            _then(turn, unit),
            f"the best misses {turn['missed']}" if turn["missed"] else "-" if turn["factor"] is None else "beaten",
        )
        for turn in found["turns"]
    ]
    if rows:
        heads = ("times of", "best at", "not at", "then best", "because")
        table(console, "How far times may be off, as factors", heads, rows, left={0, 3, 4})
    if text := _verdict(found["turns"]):
        console.print(Text.assemble(("In short", "bold"), f": {text}.\n"))
    for title, text in _sentences(objective, document.get("then", ()), found):
        console.print(Text.assemble((title, "bold"), f": {text}.\n"))


def robust_front_section(console: Console, document: Document) -> None:
    """What was found of a front, where it was asked."""
    if (found := document.get("robust")) is None:
        return
    if not found["turns"]:
        console.print(Text.assemble(("How far times may be off", "bold"), f": {_ALONE}.\n"))
        return
    rows = [
        (
            f"{turn['plan']}, longer" if turn["plan"] else _WHOSE[turn["times"], turn["slower"]],
            f"{turn['holds']:.3f}",
            "-" if turn["factor"] is None else f"{turn['factor']:.3f}",
            _some(turn["joins"]),
            "itself" if turn["plan"] and turn["leaves"] else _some(turn["leaves"]),
            _because(turn),
        )
        for turn in found["turns"]
    ]
    heads = ("times of", "same at", "not at", "then joins", "then leaves", "because")
    table(console, "How far times may be off, as factors", heads, rows, left={0, 3, 4, 5})
    if all(turn["times"] != "others" for turn in found["turns"]):
        console.print(Text.assemble(("Another", "bold"), ": none, all plans that can run are on the front.\n"))
    if not found["common"]:
        console.print(Text.assemble(("Times of all plans", "bold"), f" {_NO_MATTER}.\n"))
    asked = f"{found['searches']:,} searches and {count(found['simulations'], 'run')} of plans of the front"
    console.print(Text.assemble(("Asked", "bold"), f": {asked}, {_RANGE}.\n"))


def _because(turn: Document) -> str:
    """Why a front is another one."""
    if turn["missed"]:
        return f"it misses {turn['missed']}"
    if turn["factor"] is None:
        return "-"
    return "beaten" if turn["leaves"] else "no longer beaten"


def _some(plans: Sequence[str]) -> str:
    """The first of some plans, and how many more there are."""
    more = f" and {len(plans) - 1} more" if len(plans) > 1 else ""
    return f"{plans[0]}{more}" if plans else "-"


def _verdict(turns: Sequence[Document]) -> str:
    """What the table says, in a sentence."""
    holds = {(turn["times"], turn["slower"]): turn["holds"] for turn in turns}
    said = []
    if ("all", True) in holds and ("all", False) in holds:
        said.append(f"while all times are {holds['all', False]:.2f} to {holds['all', True]:.2f} times those computed")
    if ("best", True) in holds:
        said.append(f"while its own alone are at most {holds['best', True]:.2f} times as long")
    return f"the best plan stays the best {', and '.join(said)}" if said else ""


def _then(turn: Document, unit: str) -> str:
    """What wins where the best plan does not."""
    if turn["factor"] is None:
        return "the same at all that were asked"
    if turn["plan"] is None:
        return "none meets the goals"
    return f"{turn['plan']}, {_told(turn['value'], unit)}"


def _sentences(objective: Document, then: Sequence[Document], found: Document) -> Iterator[tuple[str, str]]:
    """What the table does not tell, with its title.

    Parameters
    ----------
    objective : what is best
    then : objectives after it
    found : what was found
    """
    next_ = found["runner_up"]
    tolerant = any(one["tolerance"] for one in (objective, *then))
    if not found["turns"] and next_ is None and not tolerant:
        yield "How far times may be off", _ALONE
        return
    if not found["common"]:
        yield (
            "Times of all plans",
            _NO_MATTER,
        )
    if tolerant:
        yield (
            "Times of one plan",
            "not asked about: what counts as equal to the best depends on which is, and so on whose times are off",
        )
    none = f"none, no other plan {'is within the tolerance' if tolerant else 'meets the goals'}"
    yield "Runner-up", none if next_ is None else f"{_near(next_, objective)}, times as computed"
    yield "Ties", _ties(found, objective)
    alone = f" and {count(found['simulations'], 'run')} of the best plan" if found["simulations"] else ""
    yield "Asked", f"{found['searches']:,} searches{alone}, {_RANGE}"


def _ties(found: Document, objective: Document) -> str:
    """Which plans are as good within the error."""
    if found["tied"] is None:
        return f"not known, {found['of']} of {found['deciding']}"
    error = f"the error of {found['deciding']} that plans do not share, {found['error']:.1%} ({found['of']}; "
    error += f"{count(found['rows'], 'run')})"
    if not found["tied"]:
        return f"none; no other plan is within {error}"
    told = [_near(one, objective) for one in found["tied"][:_SHOWN]]
    more = [f"{len(found['tied']) - _SHOWN:,} more"] if len(found["tied"]) > _SHOWN else []
    return f"within {error}: {'; '.join([*told, *more])}; that these win is not counted as another plan winning"


def _near(plan: Document, objective: Document) -> str:
    """A plan, and how much worse it is than the best."""
    margin = "" if plan["margin"] is None else f" ({_percent(plan['margin'])})"
    where = f"{plan['plan']} on {count(plan['gpus'], 'GPU')}"
    if objective["unit"] == GPUS:
        return f"{where}{margin}"
    return f"{where}, {objective['name']} = {amount(plan['value'], objective['unit'])}{margin}"


def _told(value: float, unit: str) -> str:
    """A value that is best, with its unit."""
    return count(round(value), "GPU") if unit == GPUS else amount(value, unit)


def _percent(margin: float) -> str:
    return f"{margin:.1%} worse" if margin >= 0 else f"{-margin:.1%} better"
