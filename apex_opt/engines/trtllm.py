"""TensorRT-LLM 1.x with its PyTorch backend, as its documentation has it; nothing of it was run."""

from __future__ import annotations

from math import inf
from types import MappingProxyType
from typing import Final

from apex_opt.engines.rules import EngineRules

TRTLLM: Final = EngineRules(
    name="trtllm",
    release="TensorRT-LLM 1",
    cuda_only=True,
    one_gpu_copies=True,
    experts_by_both=True,
    dense_per_copy=True,
    formats=MappingProxyType(
        {
            "bf16": (8.0, inf),
            "fp16": (8.0, inf),
            "fp8": (8.9, inf),
            "w8a16": (8.0, inf),
            "w4a16": (8.0, inf),
            "w8a16g64": (8.0, inf),
            "w8a16g32": (8.0, inf),
            "w4a16g64": (8.0, inf),
            "w4a16g32": (8.0, inf),
            "mxfp4": (9.0, inf),
            "nvfp4": (10.0, inf),
        }
    ),
    attention=MappingProxyType({"fp8": (8.9, inf)}),
    block_powers=True,
    sources=MappingProxyType(
        {
            "cuda_only": "docs, legacy/reference/support-matrix: NVIDIA GPUs alone",
            "ffn_copies": "docs, features/parallel-strategy: the FFN is cut over all GPUs of a stage",
            "dense_attention_copies": "_torch/modules/gated_mlp.py: whole in each attention copy: a replica",
            "one_gpu_copies": "docs, features/parallel-strategy: attention has tp, or a copy on each GPU",
            "experts_by_both": "docs, features/parallel-strategy: moe_tensor_parallel_size x moe_expert_parallel_size",
            "dense_per_copy": "_torch/models/modeling_deepseekv3.py: dense and shared FFNs whole under attention_dp",
            "formats": "docs, features/quantization: hardware support matrix",
            "attention": "docs, features/quantization: hardware support matrix, FP8 KV cache",
            "made_on_load": "docs, features/quantization: checkpoints are quantised before",
            "whole_scales": "_torch/modules/linear.py, fused_moe: shards of scales are slices of whole blocks; assumed",
            "block_powers": "docs, features/kvcache: tokens_per_block is a power of two",
        }
    ),
)
