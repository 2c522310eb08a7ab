"""The kinds of cells a block is made of: one file is all there is to know of each.

A new kind of attention or FFN is a file beside these, with a class that inherits from `AttentionCell` or `Ffn`, and
what reads it from a file: see `apex_opt.ir.families`.
"""

from apex_opt.ir.cells.attention import Attention
from apex_opt.ir.cells.base import WHOLE, AttentionCell, Cell, Cut, Ffn, Kept, Matrix, Piece, State, stored_bytes
from apex_opt.ir.cells.compressed import CompressedAttention
from apex_opt.ir.cells.convolution import ShortConvolution
from apex_opt.ir.cells.dense import DenseFfn
from apex_opt.ir.cells.encoder import CrossedAttention, EncoderAttention
from apex_opt.ir.cells.gated import GatedAttention, GatedLatentAttention
from apex_opt.ir.cells.gated_delta import GatedDelta, KimiDelta
from apex_opt.ir.cells.indexer import Indexer
from apex_opt.ir.cells.joined import JoinedAttention
from apex_opt.ir.cells.latent import LatentAttention
from apex_opt.ir.cells.latent_moe import LatentMoeFfn
from apex_opt.ir.cells.lightning import LightningAttention
from apex_opt.ir.cells.mamba import Mamba1, Mamba2
from apex_opt.ir.cells.moe import MoeFfn
from apex_opt.ir.cells.operations import Op
from apex_opt.ir.cells.replaced import Replaced
from apex_opt.ir.cells.shared import SharedAttention, SharedFfn
from apex_opt.ir.cells.skipped import Skipped
from apex_opt.ir.cells.twin_moe import TwinMoeFfn

__all__ = [
    "WHOLE",
    "Attention",
    "AttentionCell",
    "Cell",
    "CompressedAttention",
    "CrossedAttention",
    "Cut",
    "DenseFfn",
    "EncoderAttention",
    "Ffn",
    "GatedAttention",
    "GatedDelta",
    "GatedLatentAttention",
    "Indexer",
    "JoinedAttention",
    "Kept",
    "KimiDelta",
    "LatentAttention",
    "LatentMoeFfn",
    "LightningAttention",
    "Mamba1",
    "Mamba2",
    "Matrix",
    "MoeFfn",
    "Op",
    "Piece",
    "Replaced",
    "SharedAttention",
    "SharedFfn",
    "ShortConvolution",
    "Skipped",
    "State",
    "TwinMoeFfn",
    "stored_bytes",
]
