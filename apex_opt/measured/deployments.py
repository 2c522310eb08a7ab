"""How engines are deployed where a measurement does not say: limits, memory, KV format, nodes, names of formats.

All of it is assumed, and said so with every run it is used for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from apex_opt.units import ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """How an engine is started, per attention copy; pairs are for GPUs before Blackwell and from it on.

    Parameters
    ----------
    tokens : (int, int)       most tokens of a batch; 0 where it takes one prompt beside the sequences that decode
    utilisation : float       share of memory for weights, activations and cache together. SGLang's own share leaves
                              activations out, TensorRT-LLM's is of what the weights leave: both stand here as what
                              they come to.
    kv : (str, str)           KV format of a model in the format of its own checkpoint, where that has less than 16 bits
    requantised_kv : (str, str)    the same in another format of less than 16 bits; a model in 16 bit has a 16-bit cache
    """

    tokens: tuple[int, int]
    utilisation: float
    kv: tuple[str, str]
    requantised_kv: tuple[str, str]


DEFAULTS: Final = {
    # vLLM's for a server on GPUs of 70 GB and more, of 2025. The fp8 and nvfp4
    # checkpoints that TensorRT-LLM is given ask for an fp8 cache.
    "vllm": Deployment(tokens=(8192, 8192), utilisation=0.9, kv=("bf16", "bf16"), requantised_kv=("bf16", "bf16")),
    "sglang": Deployment(tokens=(0, 0), utilisation=0.95, kv=("bf16", "bf16"), requantised_kv=("bf16", "bf16")),
    "trtllm": Deployment(tokens=(0, 0), utilisation=0.97, kv=("fp8", "fp8"), requantised_kv=("fp8", "fp8")),
}
BESIDE_A_PROMPT: Final = 1024
"""Tokens of a batch beyond one prompt, for the sequences that decode, where a deployment takes one prompt at a time.

Runs of TensorRT-LLM and SGLang that are not InferenceMAX's are tuned to their one prompt length. With a budget of
several prompts their TPOT would be 5 to 25% lower than measured wherever prompts matter, and their TTFT twice as high
at 1,024 tokens; with one prompt both fit. An assumption chosen with these runs in view."""
INFERENCEMAX: Final = {
    # As its scripts of 2025 and 2026 start them: benchmarks/*.sh in github.com/SemiAnalysisAI/InferenceX. vLLM heeds
    # the fp8 cache that NVIDIA's own checkpoints ask for (its pull request 29980), or is told to.
    "vllm": Deployment(tokens=(8192, 8192), utilisation=0.9, kv=("bf16", "bf16"), requantised_kv=("fp8", "fp8")),
    "sglang": Deployment(tokens=(32768, 32768), utilisation=0.95, kv=("bf16", "fp8"), requantised_kv=("fp8", "fp8")),
    "trtllm": Deployment(tokens=(16384, 16384), utilisation=0.97, kv=("fp8", "fp8"), requantised_kv=("fp8", "fp8")),
}
INFERENCEMAX_FP8_KV: Final = ("gpt-oss-20b", "gpt-oss-120b")
"""Models that its vLLM scripts give an fp8 cache on Blackwell though the checkpoint does not ask for it."""

INFERENCEMAX_POLLS: Final = (10, 30)
"""Batches between two looks of SGLang for new requests on Blackwell (--scheduler-recv-interval): fewer than 16 clients,
and from 16 on. From its dsr1 scripts."""

INFERENCEMAX_NODE: Final = 8
"""GPUs of its largest deployment in one piece; on more, prefill and decode have pools of their own."""

SEQUENCES: Final = 1024
"""Sequences running at once on an attention copy: more than any client count leaves to one."""

_SYSTEMS: Final = {
    "a100_sxm": ("a100-sxm", 8),
    "h100_sxm": ("h100-sxm", 8),
    "h200_sxm": ("h200-sxm", 8),
    "b200_sxm": ("b200-sxm", 8),
    "b300_sxm": ("b300-sxm", 8),
    "gb200": ("gb200", 72),
    "gb300": ("gb300", 72),
    "l40s": ("l40s", 8),
}
_BLACKWELL: Final = ("b200", "b300", "gb200", "gb300")

_FORMATS: Final = {
    "": "bf16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "float16": "fp16",
    "fp8": "fp8",
    "fp8_block": "fp8",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
    "w4a16_mxfp4": "mxfp4",
    "int4_wo": "w4a16",
    "int8_wo": "w8a16",
}
_SAME_MODE: Final = {"nvfp4": ("mxfp4",), "w4a16": ("w4a16g32",)}


def is_blackwell(system: str) -> bool:
    """Whether a system's GPUs are of the Blackwell generation."""
    return system.startswith(_BLACKWELL)


def cluster_of(system: str, gpus: int) -> str | None:
    """Spec of the whole nodes that so many GPUs of a system take; None for a system without a name here.

    A node is what shares one switch: a server, or the NVLink domain of a rack. Whole ones, so that all plans of a
    system share their tables.
    """
    if system not in _SYSTEMS:
        return None
    gpu, per_node = _SYSTEMS[system]
    nodes = ceil_div(gpus, per_node)
    return f"{per_node}x{gpu}" if nodes == 1 else f"{nodes}x{per_node}x{gpu}"


def weight_format(mode: str, own: str) -> str | None:
    """Weight format of a quantisation mode, for a model whose checkpoint has the format `own`; None if not known.

    Scales per block or per channel cost the same here. There is one mode for all 4-bit floats and one for all 4-bit
    integers: a model that comes in such a format is served in its own.
    """
    found = _FORMATS.get(mode)
    return own if own in _SAME_MODE.get(found or "", ()) else found
