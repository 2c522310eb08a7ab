"""Answers of searches."""

from __future__ import annotations

from typing import ClassVar, Literal

from apex_opt.report.types.asked import Objective, QuestionFacts
from apex_opt.report.types.document import Document, Number, Sources, Status
from apex_opt.report.types.placed import ExpectedFigure, Launch, NearGoal, Robust, ShownPlacement
from apex_opt.report.types.proofs import Clash, LedgerPart, Relaxation, Replay
from apex_opt.report.types.runs import AloneRun, Candidate, Load, MixedRun
from apex_opt.schema import Described


class Beside(Described):
    """The plan of the best latency, beside that of the least energy.

    Parameters
    ----------
    energy_saving : share of its energy
    """

    objective: str
    best: Candidate | MixedRun
    certificate: LedgerPart | None = None
    energy_saving: float


class Searched(Document):
    """An answer with its objectives and its load.

    Parameters
    ----------
    then : further objectives, in turn
    reason : why there is no plan
    steady : whether the load of the best run lasts
    limited_by_arrivals : whether a plan that keeps up has what comes, and no more
    expected : how far the figures of the best run are from what would be measured, by measured runs like it
    near_goals : goals that the best run meets by less than that
    doubts : why the figures of a type of GPU are a guess, and goals on ITL that are met narrowly, as no error of it is
        known
    robust : how far times may be off before another plan wins, where that was asked
    """

    command: str
    status: Status
    objective: Objective
    then: tuple[Objective, ...]
    reason: str | None
    question: QuestionFacts
    steady: bool | None
    transient: Load | None
    limited_by_arrivals: bool | None
    notes: tuple[str, ...]
    expected: tuple[ExpectedFigure, ...] | None = None
    near_goals: tuple[NearGoal, ...] = ()
    doubts: tuple[str, ...] = ()
    robust: Robust | None = None
    beside: Beside | None = None
    launch: Launch | None = None


class OnOneType(Described):
    """What is answered over plans on GPUs of one type."""

    best: Candidate | None
    candidates: tuple[Candidate, ...]
    certificate: LedgerPart
    provenance: Sources


class OnSeveralTypes(Described):
    """What is answered over deployments on several types of GPU.

    Parameters
    ----------
    alone : the best on each type by itself
    optimal : whether no other deployment of the space can be better than the best found; a space of one, that which
        `simulate` was given, has no other
    gap : share by which a deployment that was not simulated could be better
    certificates : by the types that a deployment is on
    pipelines : of pipelines whose stages are on several types
    pools : of pairs of a prefill and a decode pool, by the types of either; left out where there are none
    provenance : by type
    """

    best: MixedRun | None
    alone: tuple[AloneRun | None, ...]
    candidates: tuple[MixedRun, ...]
    optimal: bool
    gap: Number
    certificates: tuple[LedgerPart, ...]
    pipelines: tuple[LedgerPart, ...]
    pools: tuple[LedgerPart, ...] | None = None
    provenance: dict[str, Sources]


class WhyNot(Described):
    """Why there is no answer where that was asked.

    Parameters
    ----------
    clashes : constraints that clash where nothing fits
    relaxations : changes that were solved and give a plan, those on the fewest GPUs first
    """

    clashes: tuple[Clash, ...] | None = None
    relaxations: tuple[Relaxation, ...] | None = None
    tried_for_nothing: tuple[str, ...] | None = None
    not_tried: tuple[str, ...] | None = None
    explain_time_limit_s: float | None = None


class Answer(Searched, OnOneType, WhyNot):
    """The best plan and the runners-up, or why there is none."""

    PAGE: ClassVar[str] = "apex_opt.report.tables:rendered"

    schema: Literal["apex_opt.answer/2"] = "apex_opt.answer/2"
    placement: ShownPlacement | None = None
    check: Replay | None = None


class MixedAnswer(Searched, OnSeveralTypes):
    """The best deployment over several types of GPU, or why there is none."""

    PAGE: ClassVar[str] = "apex_opt.report.mixed:mixed_page"

    schema: Literal["apex_opt.mixed/2"] = "apex_opt.mixed/2"
    check: Replay | None = None
