"""Which layers each stage of a pipeline holds."""

from .program import Pipeline, split

__all__ = ["Pipeline", "split"]
