"""The line that an answer ends with: what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.engines import ENGINES
from apex_opt.launch.saved import measurable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from apex_opt.schema import Document


def onward(command: str, document: Document, *, found: bool, saved: Path | None = None) -> str:
    """What to do next in one line, as `Next: solve.py plan --model=NAME`; nothing after what is printed to be copied.

    Parameters
    ----------
    command : str
    document : of its answer, as JSON has it
    found : bool    whether there is what was asked for
    saved : Path or None    folder into which what starts it is written
    """
    if saved is not None and (launch := document.get("launch")) and launch["commands"]:
        return f"Next: written to {saved}; begin with {saved / 'README.md'}."
    said = (_FOUND if found else _MISSED).get(command, "")
    text = said if isinstance(said, str) else said(document)
    return f"Next: {text}." if text else ""


def _start(document: Document) -> str:
    """After a plan: its commands, then files of them."""
    if "clusters" in document:
        return "solve.py plan with --cluster of one of them tells of its plan in full"
    launch, engine = document.get("launch"), document.get("question", {}).get("engine", {})
    if launch and launch.get("commands"):
        return f"--save=DIR writes this as files{_MEASURED * measurable(document)}"
    if engine.get("policy", "vllm") not in ENGINES:
        return f"--engine={', '.join(ENGINES)}: plans of these can be started"
    if launch:
        return "without --runnable=any plans are those that can be started"
    more = "; explain --plan=... tests your own" if _explained(document) else ""
    return f"--emit prints the commands that start it, --save=DIR writes them{more}"


def _explained(document: Document) -> bool:
    """Whether `explain` takes the question: it knows replicas alone, which keep their requests."""
    question = document.get("question", {})
    own = question.get("serving", "aggregated") in ("aggregated", ["aggregated"])
    best: Any = document.get("best")
    plan = str(best.get("plan", "")) if isinstance(best, dict) else ""
    return own and not question.get("rescheduling") and "share=" not in plan and "{" not in plan


def _lasting(document: Document) -> str:
    """After a rate that lasts: the commands of its plan, then the same over other questions."""
    if document.get("launch"):
        return "--save=DIR writes this as files; solve.py study asks for rates over clusters, models and goals"
    return "--emit prints the commands of the best; solve.py study asks it over clusters, models and goals"


def _explained_best(document: Document) -> str:
    """After an explanation: what searches the same space again, also that of a plan which shares GPUs."""
    question = document.get("question", {})
    shares = [name for name in question.get("shares") or () if name is not None]
    added = f", --serving={','.join(question['serving'])} and --shares={','.join(shares)}" if shares else ""
    return f"solve.py plan with the same options{added} has the figures of the best plan"


def _missed(document: Document) -> str:
    """Where nothing fits: what would, if that was found."""
    if not _explained(document):
        return f"{_easing(document)}offer more GPUs"
    if "clusters" in document:
        return _unfit(document)
    if document.get("relaxations"):
        return "give one of the changes above as an option, or ask solve.py explain with the same options"
    return "solve.py explain --time_limit=60 with the same options looks longer for what would fit"


def _easing(document: Document) -> str:
    """The way out that there is only beside goals."""
    return "ease a goal, or " if document.get("question", {}).get("slo") else ""


def _simulated(document: Document) -> str:
    if not _explained(document):
        return "solve.py plan finds the best plan for the same traffic; --requests=r.csv has every request"
    best: Any = document.get("best")  # of several plans its place
    named = f'"{best["plan"]}"' if isinstance(best, dict) else "..."
    return f"solve.py explain --plan={named} with the same options says what the best plan has over it"


def _unserved(document: Document) -> str:
    if not _explained(document) or any(word in str(document.get("reason", "")) for word in ("share=", "{")):
        return f"{_easing(document)}simulate another plan"
    return _unfit(document)


def _unfit(document: Document) -> str:
    """Where nothing fits: who says what would; of several clusters of one alone."""
    if "clusters" in document:
        return "solve.py explain with --cluster of one of them says what would fit there"
    return "solve.py explain with the same options says what would fit"


def _calibrated(document: Document) -> str:
    written: Any = document.get("out")
    return (
        f"solve.py plan --engine={written} with the same --model and --cluster"
        if written
        else "--out=mine.toml writes it for --engine of every command"
    )


def _studied(document: Document) -> str:
    if document.get("status") == "open":
        return "the same command without --dry_run answers the points"
    again = "; --retry asks the failed ones again" if document.get("failed") else ""
    return f"--report=study.html draws it, --format=csv has its rows{again}"


def _unstudied(document: Document) -> str:
    if document.get("status") == "open":
        return "mend the values that are named; without --dry_run points that can be asked are answered all the same"
    return "the reasons are above; --retry asks the failed points again"


def _placeable(document: Document) -> str:
    """After a wiring: a plan that its GPUs suffice for."""
    free = sum(gpu.get("state") == "free" for gpu in document.get("gpus", ()))
    plan = next((plan for gpus, plan in ((8, '"dp2 tp4"'), (4, '"dp2 tp2"'), (2, "tp2")) if free >= gpus), "tp1")
    return f"solve.py place --plan={plan} with the same --cluster places a plan on these GPUs"


_MEASURED: Final = "; measured there, solve.py calibrate fits the engine's times"
_FOUND: Final[Mapping[str, str | Callable[[Document], str]]] = {
    "plan": _start,
    "energy": _start,
    "capacity": _lasting,
    "pareto": "solve.py plan with --slo at the figures of a row picks that row; --plot=front.png draws them all",
    "explain": _explained_best,
    "simulate": _simulated,
    "place": "--rankfile=ranks.txt writes the order for a launcher; --lose=node0:0 says what a loss costs",
    "study": _studied,
    "validate": "solve.py calibrate --measured=RESULT.json fits an engine's times to runs of your own",
    "calibrate": _calibrated,
    "profile show": "solve.py profile collect measures a GPU that is not listed",
    "cluster show": _placeable,
    "models": "solve.py plan --model=NAME, or with the path of a config.json",
    "clusters": "solve.py plan --cluster=8xNAME",
    "traces": "solve.py plan --trace=NAME",
}
_MISSED: Final[Mapping[str, str | Callable[[Document], str]]] = {
    "plan": _missed,
    "energy": _missed,
    "pareto": _missed,
    "capacity": _unfit,
    "explain": "give one of the changes above as an option of solve.py plan",
    "simulate": _unserved,
    "place": "free GPUs, or place a smaller plan; solve.py cluster show draws what is free",
    "study": _unstudied,
    "validate": "the reasons above say what a run lacks; layouts are in docs/validation.md",
    "calibrate": "measure further loads, such as few clients and many; docs/calibrate.md says which",
}
