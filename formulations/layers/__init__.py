"""Which layers each stage of a pipeline holds."""

from formulations.layers.program import Pipeline, split

__all__ = ["Pipeline", "split"]
