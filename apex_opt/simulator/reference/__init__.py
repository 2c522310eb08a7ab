"""The engine's batching, in plain Python: the specification that the compiled kernel must equal.

The rules are those of vLLM V1 (`Scheduler`, `AsyncScheduler` and the engine core's batch queue, read in the PyPI
package vllm 0.20.2) and are settled by batches recorded from that scheduler. All times are integer nanoseconds.

A `Scheduler` (`schedulers`) decides what is in a batch, over a `BlockManager` (`blocks`) of KV blocks; an `Engine`
(`engine`) decides when batches are formed and when they finish; a `Router` (`router`) decides which engine serves a
request; and `run_deployment` (`loop`) lets whoever is next in time act.
"""

from apex_opt.simulator.reference.loop import run_deployment

__all__ = ["run_deployment"]
