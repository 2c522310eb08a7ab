"""apex_opt: provably best parallel execution plans for serving large language models.

    import apex_opt
    answer = apex_opt.plan(model="llama-3.1-70b", cluster="8xh100-sxm", trace="chat", slo="ttft_p95<=500ms")
    print(answer.page())

The functions are those of `apex_opt.api`; they are loaded where they are first asked for.
"""

from __future__ import annotations

import sys
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apex_opt.api import (
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
        traces,
        validate,
    )
    from apex_opt.commands import Result

__version__ = "0.1.0"

__all__ = [
    "Result",
    "__version__",
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
    "traces",
    "validate",
]


class _Front(ModuleType):
    """The package, whose functions are loaded where they are first asked for."""

    def __getattr__(self, name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'apex_opt' has no attribute {name!r}")
        from apex_opt import api

        return getattr(api, name)

    def __dir__(self) -> list[str]:
        return __all__

    # A room of the package has this name too, and would take the function's place once it is loaded.
    plan = property(lambda self: self.__getattr__("plan"), lambda self, room: None)


sys.modules[__name__].__class__ = _Front
