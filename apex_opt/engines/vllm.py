"""vLLM 0.20.2, as its sources have it and as its own code decides.

Every rule was held against that code, run on a CPU over pairs of a model and arguments; see docs/engines.md.
"""

from __future__ import annotations

from math import inf
from types import MappingProxyType
from typing import Final

from apex_opt.engines.rules import EngineRules

VLLM: Final = EngineRules(
    name="vllm",
    release="vLLM 0.20",
    dense_per_copy=True,
    whole_shared=frozenset(
        (
            *("deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "axk1", "llama4_text"),
            *("nemotron_h", "qwen3_next", "qwen3_5_moe_text"),
        )
    ),
    formats=MappingProxyType(
        {
            "bf16": (8.0, inf),
            "fp16": (7.0, inf),
            "fp8": (7.5, inf),
            "w8a8": (7.5, 10.0),
            "w8a16": (7.0, inf),
            "w4a16": (7.0, inf),
            "w8a16g64": (7.0, inf),
            "w8a16g32": (7.0, inf),
            "w4a16g64": (7.0, inf),
            "w4a16g32": (7.0, inf),
            "mxfp4": (8.0, inf),
            "mxfp8": (8.0, inf),
            "nvfp4": (7.5, inf),
        }
    ),
    methods=MappingProxyType(
        {"modelopt": (8.9, inf), "modelopt_mixed": (8.9, inf), "fbgemm_fp8": (8.0, inf), "awq": (7.5, inf)}
    ),
    attention=MappingProxyType({"sparse": (9.0, 11.0), "compressed": (9.0, 11.0)}),
    no_half=frozenset({"gemma2", "gemma3", "gemma3_text", "plamo2", "glm4"}),
    made_on_load=frozenset({"fp8"}),
    gate_room=True,
    least_group=32,
    padded_experts=MappingProxyType({"mxfp4": ((8.0, 9.0, 256, 128), (9.0, 10.0, 1, 64), (10.0, inf, 256, 256))}),
    vocab_multiple=64,
    vocab_on_every_stage=frozenset(
        (
            *("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "qwen3_next", "nemotron_h", "bamba", "chatglm"),
            *("falcon", "falcon_mamba", "flex_olmo", "gptj", "gpt_neox", "olmo", "olmo2", "olmo3", "olmoe", "phi"),
            *("stablelm", "starcoder2", "dbrx"),
        )
    ),
    embedding_on_every_stage=frozenset({"qwen3_5_text", "qwen3_5_moe_text"}),
    whole_models=frozenset(
        (
            *(
                "gemma3n_text",
                "mamba2",
                "minimax_text_01",
                "minimax_m1",
                "minimax",
                "whisper",
                "zamba2",
                "deepseek_v4",
                "deepseek_ref",
            ),
            *("aria_text", "paddleocr_vl_text", "phi4mm"),
            *("bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "gte", "clip", "distilbert"),
        )
    ),
    whole_when_tied=frozenset({"ernie4_5_moe"}),
    whole_experts=frozenset({"dbrx"}),
    without_class=frozenset(
        (
            *("t5", "mt5", "umt5", "bart", "mbart", "m2m_100", "distilbert", "camembert", "eurobert"),
            *("jina_embeddings_v3", "codegen", "helium", "nanochat", "phi3small", "phi4_multimodal", "ministral"),
            *("vaultgemma", "solar_open", "lfm3", "mistral4", "apertus1p5_text", "gemma4_unified_text", "laguna"),
            *("mellum", "kolibri1", "flint", "muse_glimmer_text", "cohere2_moe", "granite_swa", "granitemoe_swa"),
            *("granite_docling_text", "minimax_m3", "minimax_m3_vl_text", "mimo_v2", "youtu", "step3p7"),
        )
    ),
    misread_heads=frozenset({"glm_moe_dsa"}),
    brought_code=frozenset(
        (
            *("Keye", "KeyeVL1_5", "axk1", "baichuan", "bailing_moe", "bailing_moe_v2", "deepseek", "dots_ocr"),
            *("ernie4_5_moe_vl", "exaone", "gte", "hyperclovax", "internlm2", "internlm3", "iquestcoder", "mimo"),
            *("internlm", "xverse"),
            *("mimo_v2_flash", "minicpm", "minimax_m1", "minimax_text_01", "nemotron-nas", "orion", "phi3_v", "phi4mm"),
            *("qwen", "sarvam_mla", "sarvam_moe", "solar", "step3p7"),
            *("internvl_chat", "skywork_chat", "h2ovl_chat", "NVLM_D"),  # around decoders of other families
        )
    ),
    whole_kv_heads=frozenset({"gpt_oss"}),
    tower_shards=True,
    whole_towers=frozenset({"kimi_linear"}),
    block_multiples=MappingProxyType({"latent": 16, "sparse": 64, "compressed": 256, "sinks": 16, "fp8": 16}),
    kernel_blocks=MappingProxyType({"latent": ((9.0, 10.0, "fp8", 64), (10.0, 11.0, "", 32))}),
    overlaps=None,
    split_formats=frozenset(
        {"bf16", "fp16", "fp8", "w8a8", "w4a16", "w4a16g64", "w4a16g32", "mxfp4", "mxfp8", "nvfp4"}
    ),
    whole_methods=frozenset({"awq"}),
    sound_shards=frozenset({"qwen3_omni_moe_text"}),
    whole_vocabulary=frozenset({"whisper"}),
    rotary_table=True,
    sources=MappingProxyType(
        {
            "ffn_copies": "model_executor/layers/fused_moe/config.py: experts are cut over all copies of an engine",
            "dense_attention_copies": "config/parallel.py: copies of a dense model are engines of their own",
            "experts_by_both": "model_executor/layers/fused_moe/config.py: either --enable-expert-parallel or shards",
            "dense_per_copy": "model_executor/layers/linear.py: cut over the tensor-parallel group of one copy",
            "whole_shared": "models/{deepseek_v2,AXK1,llama4,nemotron_h,qwen3_next}.py: use_sequence_parallel_moe",
            "formats": "get_min_capability of layers/quantization/*, csrc/quantization/w8a8 (no int8 from 10.0 on)",
            "methods": "get_min_capability of layers/quantization/{modelopt,fbgemm_fp8,awq}.py",
            "attention": "v1/attention/backends/mla/*_sparse.py: supports_compute_capability; recorded verdicts",
            "no_half": "config/model.py: _FLOAT16_NOT_SUPPORTED_MODELS",
            "made_on_load": "layers/quantization/fp8.py: Fp8OnlineLinearMethod",
            "gate_room": "layers/quantization/online/moe_base.py: w13_weight, whatever is_act_and_mul says",
            "whole_scales": "layers/quantization/utils/fp8_utils.py: validate_fp8_block_shape; fp8.py, awq.py, gptq.py",
            "least_group": "layers/quantization/moe_wna16.py: groups are halved while they do not divide, down to 32",
            "padded_experts": "layers/fused_moe/oracle/mxfp4.py: mxfp4_round_up_hidden_size_and_intermediate_size",
            "vocab_multiple": "layers/vocab_parallel_embedding.py: pad_vocab_size, then divide",
            "vocab_on_every_stage": "models/*: both are built on every stage; weights of stages as its code has them",
            "embedding_on_every_stage": "models/qwen3_5.py: Qwen3_5Model; recorded weights of stages",
            "whole_models": "config/model.py: verify_with_parallel_config; models without SupportsPP",
            "whole_when_tied": "models/ernie45_moe.py: an LM head that is the embedding of another stage",
            "whole_experts": "transformers_utils/model_arch_config_convertor.py: get_num_experts finds none",
            "without_class": "models/registry.py: the architectures listed",
            "misread_heads": "transformers 5.8.1, GlmMoeDsaConfig.attribute_map; v1/attention/backends/mla/*_sparse.py",
            "brought_code": "transformers 5.8.1, CONFIG_MAPPING_NAMES; transformers_utils/config.py: types in neither",
            "whole_kv_heads": "models/gpt_oss.py: KV heads // tensor-parallel size",
            "tower_shards": "models/*: heads of the vision tower are divided by the tensor-parallel size",
            "whole_towers": "vLLM 0.33, which has Kimi-K3: models/vision.py: is_vit_use_data_parallel",
            "block_multiples": "v1/attention/backends/*: get_supported_kernel_block_sizes; recorded verdicts",
            "kernel_blocks": "platforms/cuda.py: _get_backend_priorities; recorded sizes of blocks",
            "overlaps": "config/vllm.py: use_ubatching takes an all2all backend of DeepEP, whatever the model",
            "split_formats": "layers/fused_moe: _supports_parallel_config; WNA16 experts are split with 4 bits alone",
            "whole_methods": "layers/quantization/awq_marlin.py: select_gemm_impl raises without LoRA",
            "sound_shards": "models/qwen3_omni_moe_thinker.py: Qwen3OmniMoeAudioAttention",
            "whole_vocabulary": "models/whisper.py: WhisperDecoder has an embedding of torch, which its head shares",
            "rotary_table": "layers/rotary_embedding/base.py: cos_sin_cache",
        }
    ),
)
