"""Problems and plans for the tests of launch commands."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from plan_cases import make_cluster, make_problem, random_trace

from apex_opt.engines.schedulers import SCHEDULINGS
from apex_opt.ir import load_model
from apex_opt.launch import Command, Launch, launch
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import parse_plan
from apex_opt.search import Scorer
from apex_opt.units import GIB
from formulations.placement import place_plan

if TYPE_CHECKING:
    from apex_opt.ir import Model
    from apex_opt.placement import Assignment
    from apex_opt.plans.plan import Plan
    from apex_opt.search import Problem

DENSE, MOE = "llama-3.1-70b", "mixtral-8x7b"
CHECKPOINT = "org/weights"

PLANS = (
    (DENSE, "tp8", 1, 8),
    (DENSE, "dp2 pp2[41,39] tp2", 2, 4),
    (DENSE, "pp2[41,39] tp4 fp8 kv=fp8", 2, 4),
    (DENSE, "tp16", 2, 8),
    (DENSE, "dp3 tp2 clock=1200 seqs=64 tokens=2048", 2, 3),
    (DENSE, "dp2 tp4", 1, 8),
    (DENSE, "attn(dp2,tp4) ffn(tp8)", 1, 8),
    (DENSE, "tp4 w4a16", 1, 8),
    (MOE, "attn(dp8) ffn(ep8)", 1, 8),
    (MOE, "attn(dp2,tp4) ffn(tp8)", 2, 4),
    (MOE, "pp2 attn(dp2,tp2) ffn(ep4)", 1, 8),
    (MOE, "attn(tp8) ffn(tp2,ep4)", 1, 8),
    ("deepseek-v3", "attn(dp8) ffn(ep8)", 1, 8),
)
"""Model, plan, nodes, GPUs of each."""


def asked(model: str | Model, nodes: int, gpus: int, **changes: Any) -> Problem:
    """A problem on so many nodes, with the engine settings there are by default."""
    described = load_model(model) if isinstance(model, str) else model
    settings = EngineSettings(max_model_len=8192)
    if "settings" in changes:
        settings = replace(settings, **changes.pop("settings"))
    cluster = make_cluster(gpus, nodes, **{"memory_bytes": 160 * GIB, **changes.pop("gpu", {})})
    return make_problem(described, cluster, random_trace(1, 5), settings=settings, **changes)


def emitted(engine: str, model: str | Model, plan: str, nodes: int, gpus: int, **changes: Any) -> Launch:
    """What starts a plan given as text, served by the scheduler of that engine unless the settings name another."""
    changes["settings"] = {"scheduler": SCHEDULINGS[engine](), **changes.get("settings", {})}
    problem = asked(model, nodes, gpus, **changes)
    parsed = parse_plan(plan, problem.model)
    return launch(problem, parsed, engine, CHECKPOINT, placed(problem, parsed))


def placed(problem: Problem, plan: Plan) -> Assignment:
    """The best placement of a plan."""
    return place_plan(Scorer(problem).facts().layouts, plan).assignment


def servers(found: Launch) -> list[Command]:
    """The commands that start replicas."""
    return [command for command in found.commands if command.replica is not None]


def value(command: Command, flag: str) -> str | None:
    """What follows a flag; None where the flag is not given."""
    return command.argv[command.argv.index(flag) + 1] if flag in command.argv else None


def has(found: Launch, *words: str) -> bool:
    """Whether a note holds all of the words."""
    return any(all(word in note for word in words) for note in found.notes)
