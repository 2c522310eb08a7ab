"""Measured serving runs: readers of their files, and their comparison with what is simulated."""

from apex_opt.measured.compare import Comparison, Coverage, Predictor, Summary, coverage, summarise
from apex_opt.measured.readers import SHIPPED, Measurements, read_measured
from apex_opt.measured.runs import METRICS, MeasuredRun, UnusableRun

__all__ = [
    "METRICS",
    "SHIPPED",
    "Comparison",
    "Coverage",
    "MeasuredRun",
    "Measurements",
    "Predictor",
    "Summary",
    "UnusableRun",
    "coverage",
    "read_measured",
    "summarise",
]
