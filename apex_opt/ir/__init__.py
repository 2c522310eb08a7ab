"""Transformer IR: what a model is made of, how its numbers are stored, and where descriptions come from.

`load_model` finds a model by registry name, path or Hugging Face id; `model` holds the types, `cells` the kinds of
attention and FFN, `formats` the number formats, `huggingface` the reader of `config.json` files, with what a family
implies in `families` and what is quantised in `quantisation`.
"""

from apex_opt.ir.cells import Attention, AttentionCell, Cell, DenseFfn, Ffn, LatentAttention, MoeFfn, Skipped
from apex_opt.ir.families import SUPPORTED_MODEL_TYPES
from apex_opt.ir.formats import FORMATS, KV_BYTES, NumberFormat, get_format
from apex_opt.ir.huggingface import model_from_config, read_config
from apex_opt.ir.model import Block, Model, Run
from apex_opt.ir.registry import checkpoint_of, list_models, load_model
from apex_opt.ir.scheme import Scheme

__all__ = [
    "FORMATS",
    "KV_BYTES",
    "SUPPORTED_MODEL_TYPES",
    "Attention",
    "AttentionCell",
    "Block",
    "Cell",
    "DenseFfn",
    "Ffn",
    "LatentAttention",
    "Model",
    "MoeFfn",
    "NumberFormat",
    "Run",
    "Scheme",
    "Skipped",
    "checkpoint_of",
    "get_format",
    "list_models",
    "load_model",
    "model_from_config",
    "read_config",
]
