"""Dense decoders with RMS norms and gated FFNs that differ from Llama in a norm, a bias or the names of their fields.

Of types that `transformers` no longer carries (baichuan, chatglm, internlm, internlm2, internlm3, phi3small, qwen,
xverse) the fields are those of the classes that come with the checkpoints, as vLLM reads them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from apex_opt.ir.families.base import Family, Layers, Sizes, module_names, sizes, within
from apex_opt.ir.families.decoder import Decoder
from apex_opt.ir.families.states import refuse

if TYPE_CHECKING:
    from apex_opt.ir.fields import Fields

_TOLD: Final = Decoder(qkv_bias=None, output_bias=None, mlp_bias=None)
_FUSED: Final = ("mlp.gate_up_proj", "mlp.down_proj")
_PACKED: Final = ("self_attn.W_pack",)
_MOSS: Final = {"attention_bias": "use_bias", "mlp_bias": "use_bias"}


def _chatglm(fields: Fields, size: Sizes) -> Layers:
    """ChatGLM2 to GLM-4, whose query heads may share a few keys and values."""
    linear = fields.flag("add_bias_linear")
    refuse(fields, "post_layer_norm", True)
    fields.idle("multi_query_group_num", "original_rope", "apply_residual_connection_post_layernorm")
    groups = fields.count("multi_query_group_num") if fields.flag("multi_query_attention") else None
    reader = Decoder(
        qkv_bias=linear or fields.flag("add_qkv_bias"),
        output_bias=linear,
        mlp_bias=linear,
        norm_bias=not fields.flag("rmsnorm", default=True),
    )
    return reader(fields.filled({"num_key_value_heads": groups}), size)


def _qwen(fields: Fields, size: Sizes) -> Layers:
    """Qwen 1, whose intermediate_size is that of gate and up projection together."""
    width = fields.count("intermediate_size", minimum=2)
    bias = not fields.flag("no_bias", default=True)
    reader = Decoder(qkv_bias=True, output_bias=bias, mlp_bias=bias)
    return reader(fields.replaced({"intermediate_size": width // 2}) if width else fields, size)


def _apertus(fields: Fields, size: Sizes) -> Layers:
    """Apertus 1.5, whose head may have fewer rows than its embedding."""
    refuse(fields, "output_vocab_size", size.vocab)
    return Decoder(qkv_bias=None, output_bias=None, qk_norm=True, gated=False)(fields, size)


FAMILIES: Final[dict[str, Family]] = {
    "gemma": Family(
        architecture="GemmaForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, kv_heads=16),
        modules=module_names(),
        implied={"head_dim": 256},
        defaults=sizes(256000, 3072, 24576, 28, 16, 8192) | {"num_key_value_heads": 16},
        tied=True,
        idle=("num_image_tokens", "use_bidirectional_attention"),  # of PaliGemma, whose prompts see all of themselves
    ),
    "olmo": Family(
        architecture="OlmoForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, norms=0),  # LayerNorms without weights
        modules=module_names(),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, qk_norm=True, qk_norm_whole=True),
        modules=module_names(),
    ),
    "arcee": Family(
        architecture="ArceeForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, mlp_bias=None, gated=False),
        modules=module_names(dense=("mlp.up_proj", "mlp.down_proj")),
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, mlp_bias=None, window="opt-in", kv_heads=4),
        modules=module_names(),
        idle=("no_rope_layers", "no_rope_layer_interval"),
        tied=True,
    ),
    "apertus": Family(
        architecture="ApertusForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, qk_norm=None, gated=False),
        modules=module_names(dense=("mlp.up_proj", "mlp.down_proj")),
        implied={"use_qk_norm": True},
        spelled={"use_qk_norm": "qk_norm"},
    ),
    "apertus1p5_text": Family(
        architecture="Apertus1p5TextForCausalLM",
        read=_apertus,
        modules=module_names(dense=("mlp.up_proj", "mlp.down_proj")),
    ),
    "persimmon": Family(
        architecture="PersimmonForCausalLM",
        read=Decoder(qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm=None, norm_bias=True, gated=False),
        modules=module_names(
            qkv=("self_attn.query_key_value",),
            output=("self_attn.dense",),
            dense=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
        implied={"qk_layernorm": True},
        spelled={"use_qk_norm": "qk_layernorm"},
    ),
    "orion": Family(architecture="OrionForCausalLM", read=Decoder(norm_bias=True), modules=module_names()),
    "solar": Family(
        architecture="SolarForCausalLM",
        read=replace(_TOLD, window="unused"),
        modules=module_names(),
        idle=("bskcn_1", "bskcn_2", "bskcn_3", "bskcn_4", "bskcn_tv"),  # layers whose outputs are added once more
    ),
    "helium": Family(
        architecture="HeliumForCausalLM",
        read=Decoder(qkv_bias=None, mlp_bias=None, kv_heads=20),
        modules=module_names(),
    ),
    "iquestcoder": Family(architecture="IQuestCoderForCausalLM", read=_TOLD, modules=module_names()),
    "jais2": Family(
        architecture="Jais2ForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, mlp_bias=None, gated=False, norm_bias=True),
        modules=module_names(dense=("mlp.up_proj", "mlp.down_proj")),
        implied={"attention_bias": True, "mlp_bias": True},
    ),
    "nanochat": Family(
        architecture="NanoChatForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, gated=False, norms=0),
        modules=module_names(dense=("mlp.fc1", "mlp.fc2")),
    ),
    "seed_oss": Family(architecture="SeedOssForCausalLM", read=_TOLD, modules=module_names()),
    "ministral3": Family(
        architecture="Ministral3ForCausalLM",
        read=Decoder(window="always", kv_heads=8),
        modules=module_names(),
        defaults=sizes(131072, 4096, 14336, 34, 32, 262144) | {"num_key_value_heads": 8, "head_dim": 128},
    ),
    "glm": Family(
        architecture="GlmForCausalLM",
        read=Decoder(qkv_bias=None, kv_heads=2),
        modules=module_names(dense=_FUSED),
    ),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        read=Decoder(qkv_bias=None, kv_heads=2, norms=4),
        modules=module_names(dense=_FUSED),
    ),
    "ernie4_5": Family(
        architecture="Ernie4_5ForCausalLM", read=_TOLD, modules=module_names(), spelled=_MOSS, tied=True
    ),
    "hunyuan_v1_dense": Family(
        architecture="HunYuanDenseV1ForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None, mlp_bias=None, qk_norm=None),
        modules=module_names(),
        implied={"use_qk_norm": True},
    ),
    "minicpm": Family(
        architecture="MiniCPMForCausalLM",
        read=Decoder(),
        modules=module_names(),
        tied=True,
        idle=("mup_denominator",),
    ),
    "exaone": Family(
        architecture="ExaoneForCausalLM",
        read=Decoder(),
        modules=module_names(
            qkv=within("attn.attention", ("q_proj", "k_proj", "v_proj")),
            output=("attn.attention.out_proj",),
            dense=within("mlp", ("c_fc_0", "c_fc_1", "c_proj")),
        ),
        spelled={"num_hidden_layers": "num_layers"},
    ),
    "baichuan": Family(
        architecture="BaichuanForCausalLM",
        read=Decoder(),
        modules=module_names(qkv=_PACKED),
        spelled={"max_position_embeddings": "model_max_length"},
    ),
    "chatglm": Family(
        architecture="ChatGLMModel",
        read=_chatglm,
        modules=module_names(
            qkv=("self_attention.query_key_value",),
            output=("self_attention.dense",),
            dense=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
        spelled={
            "num_hidden_layers": "num_layers",
            "intermediate_size": "ffn_hidden_size",
            "vocab_size": "padded_vocab_size",
            "max_position_embeddings": "seq_length",
            "head_dim": "kv_channels",
        },
    ),
    "internlm": Family(
        architecture="InternLMForCausalLM", read=_TOLD, modules=module_names(), spelled={"attention_bias": "bias"}
    ),
    "xverse": Family(architecture="XverseForCausalLM", read=Decoder(), modules=module_names()),
    "internlm2": Family(
        architecture="InternLM2ForCausalLM",
        read=Decoder(qkv_bias=None, output_bias=None),
        modules=module_names(
            qkv=("attention.wqkv",), output=("attention.wo",), dense=within("feed_forward", ("w1", "w3", "w2"))
        ),
        spelled={"attention_bias": "bias"},
    ),
    "internlm3": Family(
        architecture="InternLM3ForCausalLM",
        read=_TOLD,
        modules=module_names(),
        spelled={"attention_bias": "qkv_bias", "attention_out_bias": "bias", "mlp_bias": "bias"},
    ),
    "phi3small": Family(
        architecture="Phi3SmallForCausalLM",
        read=Decoder(qkv_bias=True, output_bias=True, mlp_bias=True, norm_bias=True),
        modules=module_names(
            qkv=("self_attn.query_key_value",), output=("self_attn.dense",), dense=("mlp.up_proj", "mlp.down_proj")
        ),
        spelled={"intermediate_size": "ff_intermediate_size"},
        tied=True,
        # Some layers see blocks of the context: all are counted as if they saw all of it.
        idle=(
            *("blocksparse_block_size", "blocksparse_num_local_blocks", "blocksparse_vert_stride"),
            *("blocksparse_homo_head_pattern", "blocksparse_triton_kernel_block_size"),
            *("dense_attention_every_n_layers", "gegelu_limit", "gegelu_pad_to_256", "mup_use_scaling"),
            "dummy_token_indices",
        ),
    ),
    "qwen": Family(
        architecture="QWenLMHeadModel",
        read=_qwen,
        modules=module_names(
            qkv=("attn.c_attn",), output=("attn.c_proj",), dense=within("mlp", ("w1", "w2", "c_proj"))
        ),
        spelled={"head_dim": "kv_channels", "max_position_embeddings": "seq_length"},
        idle=("use_dynamic_ntk", "use_logn_attn"),
    ),
}
