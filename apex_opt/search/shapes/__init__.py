"""The shapes that a deployment can have, each with the branches of its tree."""

from apex_opt.search.shapes.disaggregated import Sides, disaggregated
from apex_opt.search.shapes.pipeline import Pipelines, Splitter
from apex_opt.search.shapes.single import Single
from apex_opt.search.shapes.together import Together, mixed

__all__ = ["Pipelines", "Sides", "Single", "Splitter", "Together", "disaggregated", "mixed"]
