"""Two batches in place of one: how engines split a forward of ranks whose experts lie apart, as facts.

While one half of the tokens computes, the other half sends its tokens to their experts or back. vLLM calls it dual
batch overlap (DBO), SGLang two-batch overlap (TBO). No engine asks what is gained: each splits by a rule of its own.

Nano-batches are NanoFlow's, a research engine: operations that ask for arithmetic, for memory and for links run at one
time, which no engine here does.

Source: vLLM 0.20.2, `v1/worker/{ubatch_utils,dp_utils}.py`, `config/{parallel,compilation}.py`, `VLLM_DBO_COMM_SMS`;
SGLang 0.5.23, `srt/batch_overlap/{two_batch_overlap,operations_strategy}.py`; DeepEP's README, requirements. Read, not
recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

if TYPE_CHECKING:
    from apex_opt.cluster.types import Cluster

Overlap = Literal["two_batches", "nano_batches"]
OVERLAPS: Final[tuple[str, ...]] = get_args(Overlap)
"""What a plan may overlap inside a GPU."""
TWO: Final = "two_batches"
NANO: Final = "nano_batches"
NANO_EFFICIENCY: Final = 0.685
"""Share that nano-batches reach of what the busiest resource alone allows."""
NANO_SOURCE: Final = (
    "published: NanoFlow (arXiv 2408.12757) reaches 68.5% of what arithmetic alone allows, Llama-2-70B on 8 A100 "
    "(59% to 72% over its models); taken for any model, GPU and resource: assumed"
)
KERNELS: Final = "DeepEP"
"""Whose kernels both engines send with where they split forwards."""
KERNELS_FROM: Final = 9.0
"""Least compute capability that they are built for."""
KERNELS_LINK: Final = "nvlink"
"""What they send over inside a node."""


def without_kernels(cluster: Cluster) -> str | None:
    """What keeps DeepEP's kernels from GPUs; None where they run."""
    gpu, link = cluster.gpu, cluster.intra.kind
    if gpu.capability is None:
        return f"{KERNELS}'s kernels run on CUDA, and {gpu.name} does not"
    if gpu.capability < KERNELS_FROM:
        return f"{KERNELS}'s kernels need compute capability {KERNELS_FROM}, {gpu.name} has {gpu.capability}"
    if link != KERNELS_LINK:
        return f"{KERNELS}'s kernels need NVLink inside a node, {gpu.name} has {link} in {cluster.name}"
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitting:
    """When an engine splits a forward into two halves, and what that costs.

    Parameters
    ----------
    decode_tokens, prompt_tokens : int    least tokens of a rank that only decodes, and of another one: all ranks must
                                          have as many
    pads : bool          ranks are padded to the largest, whose second half must be empty on none; else a rank without a
                         batch is no obstacle, but all others must either decode or compute prompts
    decode_sms, prompt_sms : int          multiprocessors that send instead of computing where all ranks decode, and
                                          otherwise
    graphs : bool        whether what only decodes runs from captured graphs, be it split or not
    """

    decode_tokens: int
    prompt_tokens: int
    pads: bool
    decode_sms: int
    prompt_sms: int
    graphs: bool


DUAL_BATCH: Final = Splitting(
    decode_tokens=32, prompt_tokens=512, pads=True, decode_sms=20, prompt_sms=20, graphs=False
)
"""vLLM's, with DeepEP's kernels for high throughput, which send with 20 multiprocessors and run from no graph."""
TWO_BATCH: Final = Splitting(decode_tokens=1, prompt_tokens=1, pads=False, decode_sms=0, prompt_sms=20, graphs=True)
"""SGLang's, with DeepEP's kernels for high throughput where prompts are computed, else those of low latency."""
