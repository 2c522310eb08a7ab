"""Requests: traces read from files or generated from a law."""

from apex_opt.workload.generators import describe_trace
from apex_opt.workload.readers import frame_trace, list_traces, load_trace, trace_jsonl
from apex_opt.workload.trace import Trace, make_trace

__all__ = ["Trace", "describe_trace", "frame_trace", "list_traces", "load_trace", "make_trace", "trace_jsonl"]
