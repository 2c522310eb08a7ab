"""The kinds of cells a block is made of: one file is all there is to know of each.

A new kind of attention or FFN is a file beside these, one word in the unions below, and what reads it from a file.
"""

from apex_opt.ir.cells.attention import Attention
from apex_opt.ir.cells.base import WHOLE, Cut, Kept, Matrix, Piece, stored_bytes
from apex_opt.ir.cells.dense import DenseFfn
from apex_opt.ir.cells.latent import LatentAttention
from apex_opt.ir.cells.moe import MoeFfn
from apex_opt.ir.cells.operations import Op

AttentionCell = Attention | LatentAttention
Ffn = DenseFfn | MoeFfn
Cell = AttentionCell | Ffn

__all__ = [
    "WHOLE",
    "Attention",
    "AttentionCell",
    "Cell",
    "Cut",
    "DenseFfn",
    "Ffn",
    "Kept",
    "LatentAttention",
    "Matrix",
    "MoeFfn",
    "Op",
    "Piece",
    "stored_bytes",
]
