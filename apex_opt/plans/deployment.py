"""What is deployed: pools of replicas, each with a plan of its own; and its text form.

``h100-sxm-80gb: dp2 attn(tp4) ffn(tp4) bf16 + a100-sxm-80gb: attn(tp8) ffn(tp8) bf16`` reads: the same model is served
by two pools side by side, one on each type of GPU, each by its plan. Where there is but one type of GPU a pool stands
without it, so that every plan is a deployment. A pool whose pipelines span types names them all, and its plan says
which stages are where.

``prefill{dp2 attn(tp2) ffn(tp2) bf16} + decode{tp4 bf16}`` reads: one pool computes all prompts and another one, to
which their keys and values are handed over, answers them. Each is a pool as above, with its type of GPU where there are
several. Behind the braces ``route=least_loaded`` says which router stands before either, where there are several
instances, and ``route=least_loaded/round_robin`` which before the one and which before the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.plans.plan import EXAMPLE, parse_plan
from apex_opt.plans.routing import parse_sides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.ir.model import Model
    from apex_opt.plans.plan import Plan
    from apex_opt.plans.routing import Routing

Role = Literal["prefill", "decode"]

ROLES: Final[tuple[Role, Role]] = ("prefill", "decode")
"""What the two pools do of which one hands its prompts over to the other, in their order."""

Serving = Literal["aggregated", "pools", "shared"]
"""What may be deployed, as `Problem` has it."""

_BETWEEN: Final = " + "
_PAIR: Final = re.compile(r"\s*prefill\s*\{([^{}]*)\}\s*\+\s*decode\s*\{([^{}]*)\}\s*(?:route=(\S+))?\s*")
_PAIR_EXAMPLE: Final = "prefill{dp2 tp2 bf16} + decode{tp4 bf16}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Replicas that are alike, on GPUs of one type, or of the types that the plan's stages name.

    Parameters
    ----------
    plan : Plan
    gpu : str or None     name of the type where there are several to choose from and the stages name none
    role : str or None    what it does where prompts are computed by one pool and answered by another; None: both
    """

    plan: Plan
    gpu: str | None = None
    role: Role | None = None

    @property
    def types(self) -> tuple[str, ...]:
        """Names of its types of GPU; none where there is but one to choose from."""
        return tuple(name for name, _ in self.plan.on) or (() if self.gpu is None else (self.gpu,))

    @property
    def route(self) -> Routing | None:
        """The router that its plan names, where there are several replicas to choose from."""
        return self.plan.route if self.plan.replicas > 1 else None

    def __str__(self) -> str:
        # Where prompts are handed over the routers of both pools stand behind these.
        plan = self.plan if self.role is None else replace(self.plan, route=None)
        text = ": ".join(filter(None, (_BETWEEN.join(self.types), str(plan))))
        return text if self.role is None else f"{self.role}{{{text}}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Pools side by side, which requests are dealt to, or one that computes prompts and one that answers them.

    Raises
    ------
    UsageError    no pool, two side by side on the same type of GPU, roles without the other one, or several pools of
                  which one has shares
    """

    pools: tuple[Pool, ...]

    def __post_init__(self) -> None:
        if not self.pools:
            raise UsageError("a deployment has at least one pool")
        if len(self.pools) > 1 and (shares := [pool.plan.shares for pool in self.pools if pool.plan.shares]):
            raise UsageError(f"plan: share={shares[0]} is of a pool that serves alone; leave it out, or the other pool")
        if any(pool.role for pool in self.pools):
            if tuple(pool.role for pool in self.pools) != ROLES:
                raise UsageError(f"plan: prompts take one prefill and one decode pool; an example: {_PAIR_EXAMPLE}")
            return
        names = [name for pool in self.pools for name in (pool.types or ("",))]
        if twice := [name for name in names if names.count(name) > 1]:
            which = twice[0] or "the only type of GPU"
            raise UsageError(f"plan: {which} has two pools; give each type of GPU one plan")

    @classmethod
    def of(cls, plan: Plan, gpu: str | None = None) -> Deployment:
        """One pool alone."""
        return cls(pools=(Pool(plan=plan, gpu=gpu),))

    @property
    def plan(self) -> Plan:
        """The plan of the only pool."""
        (pool,) = self.pools
        return pool.plan

    @property
    def disaggregated(self) -> bool:
        """Whether one pool computes prompts and another one answers them."""
        return self.pools[0].role is not None

    @property
    def devices(self) -> int:
        """GPUs it takes."""
        return sum(pool.plan.devices for pool in self.pools)

    def __str__(self) -> str:
        text = _BETWEEN.join(map(str, self.pools))
        routes = [route for pool in self.pools if (route := pool.route)] if self.disaggregated else []
        return f"{text} route={'/'.join(dict.fromkeys(routes))}" if routes else text


def parse_deployment(text: str, model: Model, types: Sequence[str]) -> Deployment:
    """Read the text form of a deployment.

    Parameters
    ----------
    text : str              pools between " + ", each `TYPE: PLAN`; the type is left out where there is but one, and of
                            its name what comes after a "-" where that leaves no doubt; or
                            `prefill{POOL} + decode{POOL}`
    model : Model           its layers are split over the stages
    types : names of the types of GPU that there are

    Raises
    ------
    UsageError          a pool without its type where there are several, one for the wrong types, an unreadable plan
    UnknownNameError    a type that there is not
    """
    if "{" in text or "}" in text:
        return _pair(text, model, types)
    pools, before, parts = [], list[str](), f" {text} ".split(_BETWEEN)
    example = EXAMPLE if len(types) == 1 else f"{types[0]}: dp2 attn(tp4) ffn(tp4) bf16 + {types[1]}: tp8"
    for part in parts:
        head, words = _apart(part, types)
        if not words:
            raise UsageError(f"plan {text!r:.100}: {head or 'a +'} has no plan beside it; an example: {example}")
        if head is None and _fitting(words, types):
            before.append(_type_of(words, types))  # a pipeline over types names all of them before its plan
            continue
        names = before if head is None else [*before, _type_of(head, types)]
        plan, before = parse_plan(words, model, example), []
        plan = replace(plan, on=tuple((_type_of(name, types), stages) for name, stages in plan.on))
        stages = [name for name, _ in plan.on]
        if plan.on and names and names != stages:
            raise UsageError(f"plan {text!r:.100}: on= puts stages on {', '.join(stages)}, not on {', '.join(names)}")
        if not plan.on and len(names) > 1:
            raise UsageError(f"plan {text!r:.100}: say with on= which stages are on {' and which on '.join(names)}")
        if not names and not plan.on and len(types) > 1:
            such = example if len(parts) > 1 else f"{types[0]}: {words:.60}"
            raise UsageError(f"plan {text!r:.100}: say on which of {', '.join(types)} it runs, as in {such}")
        pools.append(Pool(plan=plan, gpu=None if plan.on or len(types) == 1 else names[0]))
    if before:
        raise UsageError(f"plan {text!r:.100}: {before[-1]} is followed by no plan; an example: {example}")
    # In the order of the types, as a search has them: requests are dealt in that order.
    pools.sort(key=lambda pool: min((types.index(name) for name in pool.types), default=0))
    return Deployment(pools=tuple(pools))


def _pair(text: str, model: Model, types: Sequence[str]) -> Deployment:
    """A pool that computes prompts and one that answers them."""
    found = _PAIR.fullmatch(text)
    if (opening := text.count("{")) != (closing := text.count("}")):
        missing = "a closing brace }" if opening > closing else "an opening brace {"
        raise UsageError(f"plan {text!r:.100}: {missing} is missing; such as: {_PAIR_EXAMPLE}")
    if found is None:
        raise UsageError(f"plan {text!r:.100}: braces are for two pools that hand over; such as: {_PAIR_EXAMPLE}")
    *parts, routing = found.groups()
    pools = []
    for role, part in zip(ROLES, parts, strict=True):
        if not part.strip():
            raise UsageError(f"plan {text!r:.100}: the {role} pool has no plan; such as: {_PAIR_EXAMPLE}")
        (pool, *more) = parse_deployment(part, model, types).pools
        if more or pool.plan.on:
            raise UsageError(f"plan {text!r:.100}: the {role} pool is on one type of GPU; leave the others out")
        if pool.plan.route is not None:
            raise UsageError(
                f"plan {text!r:.100}: routers of pools stand behind these, those before prefill and decode instances "
                f"with a / between them; such as: {_PAIR_EXAMPLE} route=least_loaded/round_robin"
            )
        pools.append(replace(pool, role=role))
    if routing is None:
        return Deployment(pools=tuple(pools))
    several = [pool.plan.replicas > 1 for pool in pools]
    if not any(several):
        raise UsageError(f"plan {text!r:.100}: route= is of several instances, and either pool has one; leave it out")
    # One name before a decode pool of one instance is that of the prefill pool alone.
    routers = parse_sides(routing if several[1] or "/" in routing else f"{routing}/round_robin")
    if any(len(names) > 1 for names in routers):
        raise UsageError(f"plan {text!r:.100}: route={routing:.60} is a choice; one plan has one router for each pool")
    routed = zip(pools, several, routers, strict=True)
    return Deployment(
        pools=tuple(
            replace(pool, plan=replace(pool.plan, route=names[0] if many else None)) for pool, many, names in routed
        )
    )


def _apart(part: str, types: Sequence[str]) -> tuple[str | None, str]:
    """The type of GPU that a pool names, None where it names none, and its plan."""
    text = part.strip()
    for name in types:
        if text.startswith(f"{name}:"):  # a name may hold any sign
            return name, text.removeprefix(f"{name}:").strip()
    head, colon, words = text.partition(":")
    return (None, text) if not colon or "=" in head else (head.strip(), words.strip())


def _fitting(name: str, types: Sequence[str]) -> list[str]:
    """The types of GPU that a name fits, whole or up to a `-`."""
    asked = name.lower()
    whole = [one for one in types if one.lower() == asked]
    return whole or [one for one in types if one.lower().startswith(f"{asked}-")]


def _type_of(name: str, types: Sequence[str]) -> str:
    """The type of GPU that a name is of."""
    found = _fitting(name, types)
    if len(found) > 1:
        raise UsageError(f"type of GPU {name!r:.60} fits {' and '.join(found)}: write one of these")
    if not found:
        raise UnknownNameError("type of GPU", name[:60], types)
    return found[0]
