"""Operations that read and write a state of every sequence, as work per table entry.

Their time does not grow with the context: a decoding sequence reads and writes its state once a step, a prompt once in
every chunk, and works through its tokens at the same rate wherever they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.cost.tables import rising, shares
from apex_opt.cost.work import Work
from apex_opt.ir.cells.operations import Convolve
from apex_opt.profiles.physics import convolution_work, recurrence_work

if TYPE_CHECKING:
    from apex_opt.cost.tables import Parts, Tables
    from apex_opt.ir.cells.operations import Stateful
    from apex_opt.profiles import Profile


def state_parts(profile: Profile, tables: Tables, op: Stateful, dp: int) -> Parts:
    """A recurrence or a convolution: decoding sequences by their number, prompts by the tokens of each chunk.

    A batch that verifies drafts keeps the state after each of them, so that a refused one can be taken back.

    Parameters
    ----------
    profile : Profile    times of the GPU
    tables : Tables      what the tables of the law are over
    op : Stateful        of one shard
    dp : int             attention copies that share the sequences of a batch
    """
    if isinstance(op, Convolve):
        work, kind, shape = convolution_work(*op), "convolution", (op.channels, op.kernel, 1, 1)
    else:
        work, kind, shape = recurrence_work(*op), op.kind, (op.heads, op.key, op.value, op.key_heads)
    power, half, queries = profile.power, profile.gpu.half_dtype, 1 + tables.drafts
    step_s = rising(profile.state_decode(kind, shape, work, shares(tables.sequences, dp), queries))
    launch_s, chunk_s = profile.state_prefill(kind, shape, work, tables.tokens)
    chunk_s = rising(chunk_s)
    done = work.of_step(tables.sequences / dp, queries)
    return {
        (op.name, "decode_ns"): Work.of(power, step_s, *done, half),
        (op.name, "attend_ns"): Work.of(power, step_s + launch_s, *done, half),
        (op.name, "chunk_ns"): Work.of(power, chunk_s, *work.of_prompt(tables.tokens), half),
    }
