"""Layouts of trace files. A row layout is an entry of `LAYOUTS`; a result of a benchmark is a reader in `results`."""

from apex_opt.workload.layouts.nested import Nesting, nesting_of
from apex_opt.workload.layouts.results import result_reader
from apex_opt.workload.layouts.rows import ACCEPTED, LAYOUTS, Layout, layout_of

__all__ = ["ACCEPTED", "LAYOUTS", "Layout", "Nesting", "layout_of", "nesting_of", "result_reader"]
