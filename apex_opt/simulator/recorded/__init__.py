"""Cases recorded from the engines' own schedulers, served anew: what "exact" means is that all of it comes out again.

A kind of recording is a module of this package of the same name, whose `replay_case` returns what was recorded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final, get_args

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.simulator.api import Implementation
from apex_opt.simulator.recorded.case import check_forms

KINDS: Final = {
    "plain": ("config", "trace"),
    "dp": ("config", "trace"),
    "pd": ("config", "trace"),
    "pool_sizes": ("layers", "hybrid", "available_bytes"),
    "spec": ("config", "trace", "accept", "proposed"),
    "hybrid": ("config", "trace", "accept", "proposed"),
    "sglang": ("config", "trace"),
}
"""Kinds of recordings, and what a case of each must hold."""


def replay_case(kind: str, case: Mapping[str, Any], implementation: Implementation = "kernel") -> dict[str, Any]:
    """Serve a recorded case anew.

    Parameters
    ----------
    kind : str    of the recording: one of `KINDS`
    case : mapping with `config`, the engine's settings and its law of time, and `trace`, a row for each request, both
        as the recording has them; further entries are left aside
    implementation : "kernel" (compiled) or "reference" (plain Python); both return the same

    Returns
    -------
    dict    what was recorded, by the recording's own keys, as JSON holds it

    Raises
    ------
    UsageError, CapacityError, InputError    settings or requests that no engine accepts
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of recording", str(kind)[:60], KINDS)
    if implementation not in get_args(Implementation):
        raise UnknownNameError("implementation", str(implementation)[:60], get_args(Implementation))
    if not isinstance(case, Mapping):
        raise UsageError(f"a case is a mapping, got {str(case)[:60]!r}")
    if missing := [key for key in KINDS[kind] if key not in case]:
        raise UsageError(f"a case of kind {kind} holds {', '.join(KINDS[kind])}; missing: {', '.join(missing)}")
    check_forms(case)
    module = importlib.import_module(f"apex_opt.simulator.recorded.{kind}")
    replayed: dict[str, Any] = module.replay_case(case, implementation)
    return replayed
