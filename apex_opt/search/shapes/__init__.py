"""The shapes that a deployment can have, each with the branches of its tree."""

from apex_opt.search.shapes.mixed import Mixed
from apex_opt.search.shapes.pipeline import Pipelines, Splitter
from apex_opt.search.shapes.single import Single

__all__ = ["Mixed", "Pipelines", "Single", "Splitter"]
