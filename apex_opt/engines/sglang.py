"""SGLang 0.5.23, as its sources have it; nothing of it was run."""

from __future__ import annotations

from math import inf
from types import MappingProxyType
from typing import Final

from apex_opt.engines.rules import EngineRules

SGLANG: Final = EngineRules(
    name="sglang",
    release="SGLang 0.5",
    dense_attention_copies=True,
    moe_copies=True,
    copied_attention=frozenset(
        {"qwen3", "qwen2_moe", "qwen3_moe", "gpt_oss", "minimax_m2", "deepseek_v2", "deepseek_v3", "glm4_moe"}
    ),
    copied_drafts=frozenset({"eagle", "mtp"}),
    experts_by_both=True,
    formats=MappingProxyType(
        {
            "bf16": (8.0, inf),
            "fp16": (7.5, inf),
            "fp8": (8.0, inf),
            "w8a8": (7.5, 10.0),
            "w8a16": (8.0, inf),
            "w4a16": (7.5, inf),
            "w8a16g64": (7.5, inf),
            "w8a16g32": (7.5, inf),
            "w4a16g64": (7.5, inf),
            "w4a16g32": (7.5, inf),
            "mxfp4": (8.0, inf),
            "mxfp8": (10.0, inf),
            "nvfp4": (8.0, inf),
        }
    ),
    methods=MappingProxyType({"modelopt": (8.9, inf)}),
    attention=MappingProxyType({"sparse": (9.0, inf), "compressed": (9.0, inf)}),
    made_on_load=frozenset({"fp8"}),
    least_group=32,
    vocab_multiple=64,
    block_multiples=MappingProxyType({"sparse": 64}),
    kernel_blocks=MappingProxyType({"": ((10.0, 11.0, "", 64),)}),
    multiplexes=True,
    overlaps=frozenset({"deepseek_v2", "deepseek_v3", "qwen3_moe"}),
    split_formats=frozenset({"bf16", "fp8"}),
    split_seqs=1024,
    whole_methods=frozenset({"compressed-tensors", "modelopt", "fbgemm_fp8"}),
    sources=MappingProxyType(
        {
            "ffn_copies": "srt/runtime_context.py: the FFN is cut over all GPUs of a stage",
            "dense_attention_copies": "srt/layers/dp_attention.py: tokens of all copies are gathered first",
            "experts_by_both": "srt/runtime_context.py: moe_tp_size = tp_size / ep_size",
            "dense_per_copy": "srt/arg_groups: moe_dense_tp_size is None: dense FFNs are cut over all GPUs of a stage",
            "copied_attention": "srt/models/*: those whose attention is cut by the attention-parallel size",
            "copied_drafts": "srt/arg_groups/speculative_hook.py: n-grams and draft models go without dp attention",
            "formats": "get_min_capability of srt/layers/quantization/*",
            "methods": "srt/layers/quantization/modelopt_quant.py: ModelOptFp8Config",
            "attention": "srt/layers/attention/dsa/dsa_indexer.py: DeepGEMM's scores, which are from 9.0 on",
            "made_on_load": "srt/layers/quantization/fp8.py: weights that are not serialised in fp8",
            "whole_scales": "srt/layers/quantization/{fp8,fp8_utils,marlin_utils}.py",
            "least_group": "srt/layers/quantization/moe_wna16.py",
            "vocab_multiple": "srt/layers/vocab_parallel_embedding.py",
            "block_multiples": "srt/layers/attention/dsa/dsa_indexer.py: pages of 64 tokens alone",
            "overlaps": "srt/batch_overlap/operations_strategy.py: layers of DeepSeek V2 and V3, Qwen3 MoE and MiMo V2",
            "split_formats": "srt/layers/moe/ep_moe/layer.py: DeepGEMM runs both; others end in an assertion, and fp4 "
            "computes prompts with the kernels for low latency, too (arg_groups/moe_hook.py), which is not modelled",
            "split_seqs": "srt/layers/moe/token_dispatcher/deepep.py: num_max_dispatch_tokens_per_rank <= 1024",
            "whole_methods": "srt/layers/moe/ep_moe/layer.py: of quantised experts those of Fp8Config alone",
            "kernel_blocks": "srt/arg_groups/overrides.py: pages of the default kernels of TensorRT-LLM",
            "multiplexes": "srt/multiplex: --enable-pdmux, without pipelines, chunks, overlap and hand-overs",
        }
    ),
)
