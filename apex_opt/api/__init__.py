"""What apex_opt can be asked, as functions: the composition root, which alone knows both the search and `formulations`.

Every function takes keywords with the defaults of the command line, and names or what they stand for: a `Model`, a
`Cluster`, a `Trace`. It returns a `Result` and prints nothing; what cannot be asked raises an `ApexError`, and the
callback `progress` hears of what is being done.
"""

from apex_opt.api.given import check, place, simulate
from apex_opt.api.listed import cluster_import, cluster_show, clusters, models, traces
from apex_opt.api.measured import (
    calibrate,
    profile_collect,
    profile_distill,
    profile_fit,
    profile_import,
    profile_show,
    validate,
)
from apex_opt.api.searches import capacity, energy, explain, pareto, plan, study

__all__ = [
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
