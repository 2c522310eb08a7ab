"""Where plans go, what starts them, and how far their figures may be off."""

from __future__ import annotations

from typing import Literal

from apex_opt.report.types.document import Number
from apex_opt.report.types.runs import Replica
from apex_opt.schema import Described


class Tier(Described):
    """Links that collectives cross at one level.

    Parameters
    ----------
    sent_bytes : by a GPU for a full batch
    """

    kind: str
    ranks: int
    link: str
    bytes_per_s: float
    latency_s: float
    sent_bytes: float


class Lies(Described):
    """What holds the ranks of a group, and why nothing smaller."""

    group: str
    ranks: int
    inside: str
    beyond: str | None
    reason: str | None


class Placement(Described):
    """GPUs of every rank, and what the collectives of a full batch take there."""

    replicas: tuple[Replica, ...]
    collectives_s: float
    step_s: float
    tiers: tuple[Tier, ...]


class OtherPlacement(Placement):
    """A placement beside the best, and the shares by which it is slower."""

    collectives_loss: Number
    step_loss: Number


class BestPlacement(Placement):
    """The best placement."""

    lies: tuple[Lies, ...]


class MovedPlacement(OtherPlacement):
    """The placement once GPUs are lost, beside that before."""

    lies: tuple[Lies, ...]


class ShownPlacement(BestPlacement):
    """Where the best plan goes."""

    batch: dict[str, int]
    rank_order: OtherPlacement
    proof: dict[str, int | bool]


class Started(Described):
    """A command that starts a server."""

    node: int
    replica: int | None
    env: dict[str, str]
    argv: tuple[str, ...]
    text: str


class Bench(Described):
    """The command of a client that sends the traffic of the question to the servers, and measures them.

    Parameters
    ----------
    argv : its words; none where no client sends this traffic
    dataset : file that it reads, which `--save` writes; null where it makes the requests itself
    result : file that it writes, for `calibrate` and `validate`
    notes : what it sends otherwise than was asked
    """

    argv: tuple[str, ...]
    text: str
    dataset: str | None
    result: str | None
    notes: tuple[str, ...]


class Launch(Described):
    """Commands that start a plan, and what they cannot say.

    Parameters
    ----------
    bench : what measures it once it runs
    """

    engine: str
    commands: tuple[Started, ...]
    notes: tuple[str, ...]
    bench: Bench | None = None


class ExpectedFigure(Described):
    """A figure of the best run, and what would be measured in eight cases of ten.

    Parameters
    ----------
    figure : TTFT, TPOT and E2E are means
    low, high : null where nothing comparable was measured
    rows : measured runs that this is known from
    of : what these are of
    nearest : whether they are of the same engine, GPU, kind of model and load as what was asked; false where they are
        of the nearest to it that enough was measured of, and where nothing comparable was measured
    """

    figure: str
    unit: str
    predicted: Number
    low: Number
    high: Number
    rows: int
    of: str
    nearest: bool


class NearGoal(Described):
    """A goal that the best run meets by less than the error that is to be expected of its figure.

    Parameters
    ----------
    margin, error : shares of the limit, and of the figure
    """

    goal: str
    margin: float
    error: float
    of: str


class Turn(Described):
    """How far times may be off in one way before another plan wins that is no tie with the best.

    Parameters
    ----------
    times : whose are off: of all plans alike, of the best plan alone, or of any of the others alone
    slower : whether they are longer than computed
    holds : factor farthest from 1 at which the best plan wins, as at all that were asked before
    factor : the nearest that was found at which it does not; null where it wins at all that were asked
    plan : that wins then; null where none meets the goals
    value : what that one reaches by the first objective, its times being as they then are
    missed : goals that the best plan misses then, in words; empty where it is beaten
    """

    times: Literal["all", "best", "others"]
    slower: bool
    holds: float
    factor: Number
    plan: str | None
    value: Number
    missed: str


class FrontTurn(Described):
    """How far times may be off in one way before other plans are on a front.

    Parameters
    ----------
    times : whose are off: of all plans alike, of one on the front alone, or of any of the others alone
    plan : the one on the front; empty where it is all, or any other
    slower : whether they are longer than computed
    holds : factor farthest from 1 at which the front is the same, as at all that were asked before
    factor : the nearest that was found at which it is not; null where it is at all that were asked
    joins : plans that are on the front then and were not
    leaves : plans that were on the front and are not then
    missed : goals that the plan misses then, in words; empty where it is beaten
    """

    times: Literal["all", "best", "others"]
    plan: str
    slower: bool
    holds: float
    factor: Number
    joins: tuple[str, ...]
    leaves: tuple[str, ...]
    missed: str


class RobustFront(Described):
    """How far times may be off before other plans are on a front.

    Parameters
    ----------
    turns : whose times, and which way
    common : whether times that are off in common can matter; else they were not asked about
    searches, simulations : made for all this, the latter of plans on the front
    """

    turns: tuple[FrontTurn, ...]
    common: bool
    searches: int
    simulations: int


class Near(Described):
    """A plan beside the best one.

    Parameters
    ----------
    value : what it reaches by the first objective, times being as computed
    margin : how much worse that is, as a share
    """

    plan: str
    gpus: int
    value: Number
    margin: Number


class Robust(Described):
    """How far times may be off before another plan wins, and which plans are as good within the expected error.

    Parameters
    ----------
    turns : whose times, and which way
    common : whether times that are off in common can matter; else they were not asked about
    runner_up : the best of the others; null where no other meets the goals
    deciding : the objective that plans are held against each other by to be called a tie
    error : of this, as far as plans do not share it: half of the width of the interval, as a share; null where nothing
        comparable was measured
    rows : measured runs that this is known from
    of : what these are of
    tied : plans nearer to the best than that, best first; null where the error is not known
    searches, simulations : made for all this, the latter of the best plan alone
    """

    turns: tuple[Turn, ...]
    common: bool
    runner_up: Near | None
    deciding: str
    error: Number
    rows: int
    of: str
    tied: tuple[Near, ...] | None
    searches: int
    simulations: int
