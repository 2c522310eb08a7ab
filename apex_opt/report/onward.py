"""The line that an answer ends with: what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apex_opt.schema import Document


def onward(command: str, document: Document, *, found: bool) -> str:
    """What to do next in one line, as `Next: solve.py plan --model=NAME`; nothing after what is printed to be copied.

    Parameters
    ----------
    command : str
    document : of its answer, as JSON has it
    found : bool    whether there is what was asked for
    """
    said = (_FOUND if found else _MISSED).get(command, "")
    text = said if isinstance(said, str) else said(document)
    return f"Next: {text}." if text else ""


def _start(document: Document) -> str:
    """After a plan: its commands, then files of them."""
    if document.get("launch"):
        return "--save=DIR writes this as files; measured there, solve.py calibrate fits the engine's times"
    return "--emit prints the commands that start it, --save=DIR writes them; explain --plan=... tests your own"


def _lasting(document: Document) -> str:
    """After a rate that lasts: the commands of its plan, then the same over other questions."""
    if document.get("launch"):
        return "--save=DIR writes this as files; solve.py study asks for rates over clusters, models and goals"
    return "--emit prints the commands of the best; solve.py study asks it over clusters, models and goals"


def _missed(document: Document) -> str:
    """Where nothing fits: what would, if that was found."""
    if document.get("relaxations"):
        return "give one of the changes above as an option, or ask solve.py explain with the same options"
    return "solve.py explain --time_limit=60 with the same options looks longer for what would fit"


def _simulated(document: Document) -> str:
    best: Any = document.get("best")  # of several plans its place
    named = f'"{best["plan"]}"' if isinstance(best, dict) else "..."
    return f"solve.py explain --plan={named} with the same options says what the best plan has over it"


def _calibrated(document: Document) -> str:
    written: Any = document.get("out")
    return (
        f"solve.py plan --engine={written} with the same --model and --cluster"
        if written
        else "--out=mine.toml writes it for --engine of every command"
    )


_FOUND: Final[Mapping[str, str | Callable[[Document], str]]] = {
    "plan": _start,
    "energy": _start,
    "capacity": _lasting,
    "pareto": "solve.py plan with --slo at the figures of a row picks that row; --plot=front.png draws them all",
    "explain": "solve.py plan with the same options has the figures of the best plan",
    "simulate": _simulated,
    "place": "--rankfile=ranks.txt writes the order for a launcher; --lose=node0:0 says what a loss costs",
    "study": "--report=study.html draws it, --format=csv has its rows; the same command again answers what is open",
    "validate": "solve.py calibrate --measured=RESULT.json fits an engine's times to runs of your own",
    "calibrate": _calibrated,
    "profile show": "solve.py profile collect measures a GPU that is not listed",
    "cluster show": 'solve.py place --plan="dp2 tp4" with the same --cluster places a plan on these GPUs',
    "models": "solve.py plan --model=NAME, or with the path of a config.json",
    "clusters": "solve.py plan --cluster=8xNAME",
    "traces": "solve.py plan --trace=NAME",
}
_MISSED: Final[Mapping[str, str | Callable[[Document], str]]] = {
    "plan": _missed,
    "energy": _missed,
    "pareto": _missed,
    "capacity": "solve.py explain with the same options says what would fit",
    "explain": "give one of the changes above as an option of solve.py plan",
    "simulate": "solve.py explain with the same options says what would fit",
    "place": "free GPUs, or place a smaller plan; solve.py cluster show draws what is free",
    "validate": "the reasons above say what a run lacks; layouts are in docs/validation.md",
    "calibrate": "measure further loads, such as few clients and many; docs/calibrate.md says which",
}
