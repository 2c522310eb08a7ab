"""Which layers each stage of a pipeline holds."""

from .program import Pipeline, rows, split

__all__ = ["Pipeline", "rows", "split"]
