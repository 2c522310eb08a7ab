"""Measuring an accelerator: what to time, how to time it, on which kernels, and the profile folder it becomes."""

from apex_opt.profiles.collect.command import collect, recognised
from apex_opt.profiles.collect.points import OPS, asked_ops

__all__ = ["OPS", "asked_ops", "collect", "recognised"]
