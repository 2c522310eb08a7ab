"""Routers in front of several replicas: their names, those to choose from, and how many plans there are with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, get_args

from apex_opt.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

Routing = Literal[
    "round_robin",
    "least_loaded",
    "vllm_dp",
    "power_of_two",
    "cache_aware",
    "dynamo",
    "llm_d",
    "llm_d_kv",
    "session",
    "pull",
]
"""How a replica is found for a request; `docs/routing.md` has the rules."""
SEES_PREFIXES: Final[tuple[Routing, ...]] = ("cache_aware", "dynamo", "llm_d", "llm_d_kv")
"""Those that deal by what a replica's cache may hold."""
ROUTINGS: Final[tuple[Routing, ...]] = get_args(Routing)


def check_routing(name: str) -> Routing:
    """A router by its name.

    Raises
    ------
    UnknownNameError    one that there is not; all are told, as names that look alike say nothing of what routers do
    """
    if name not in ROUTINGS:
        raise UnknownNameError("routing", str(name)[:60], ROUTINGS, alike=False)
    return name


def check_pushed(names: Sequence[str]) -> None:
    """Refuse routers that SGLang's pools do not go with.

    Raises
    ------
    UsageError    one that holds requests back until an instance has a seat
    """
    if "pull" in names:
        known = [name for name in ROUTINGS if name not in ("pull", "vllm_dp")]
        raise UsageError(
            "routing: sglang sends a request to a prefill and a decode instance at once, which pull does not; use one "
            f"of {', '.join(known)}"
        )


def parse_routings(text: str) -> tuple[Routing, ...]:
    """Routers to choose from: their names with commas between them.

    Raises
    ------
    UsageError    one that there is not, or that is named twice
    """
    names = tuple(check_routing(name.strip()) for name in text.split(","))
    if len(set(names)) < len(names):
        raise UsageError(f"--routing: {text!r:.60} names a router twice")
    return names


def parse_sides(text: str) -> tuple[tuple[Routing, ...], tuple[Routing, ...]]:
    """Routers to choose from before prefill and before decode instances: for both alike, or with a `/` between them.

    Raises
    ------
    UsageError    as `parse_routings`; other than two sides; one before decode that is of requests as they come
    """
    prefill, slash, decode = text.partition("/")
    if slash and not (prefill.strip() and decode.strip() and "/" not in decode):
        raise UsageError(
            f"routing {text!r:.60} is not of two sides; name routers before prefill and before decode instances, "
            "with one / between them, as in least_loaded/session"
        )
    found = parse_routings(prefill), parse_routings(decode if slash else prefill)
    if "vllm_dp" in found[1]:
        raise UsageError(
            "--routing: vllm_dp is of requests as they come, not of prompts that are computed; name another router for "
            "the decode instances, as in vllm_dp/round_robin"
        )
    return found


def count_repeated(most: int, routings: Sequence[Routing]) -> int:
    """How many plans there are of a cut, with up to so many replicas and each router where there are several."""
    return most if most < 2 else 1 + (most - 1) * max(len(routings), 1)
