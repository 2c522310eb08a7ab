"""apex_opt: provably best parallel execution plans for serving large language models.

    import apex_opt
    answer = apex_opt.plan(model="llama-3.1-70b", cluster="8xh100-sxm", trace="chat", slo="ttft_p95<=500ms")
    print(answer.page())

The functions are those of `apex_opt.api`; they are loaded where they are first asked for.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apex_opt.api import (
        calibrate,
        capacity,
        check,
        cluster_import,
        cluster_show,
        clusters,
        energy,
        explain,
        models,
        pareto,
        place,
        plan,
        profile_collect,
        profile_distill,
        profile_fit,
        profile_import,
        profile_show,
        simulate,
        study,
        traces,
        validate,
    )
    from apex_opt.commands import Result
    from apex_opt.errors import ApexError

__version__ = "0.1.0"

__all__ = [
    "ApexError",
    "Result",
    "__version__",
    "calibrate",
    "capacity",
    "check",
    "cluster_import",
    "cluster_show",
    "clusters",
    "energy",
    "explain",
    "models",
    "pareto",
    "place",
    "plan",
    "profile_collect",
    "profile_distill",
    "profile_fit",
    "profile_import",
    "profile_show",
    "simulate",
    "study",
    "traces",
    "validate",
]

_BESIDE = {"ApexError": "errors", "Result": "commands"}
"""Public names that are of no command, and the modules that have them; loaded only when they are asked for."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'apex_opt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"apex_opt.{_BESIDE.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return __all__
