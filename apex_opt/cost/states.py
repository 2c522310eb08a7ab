"""Operations that read and write a state of every sequence, as work per table entry.

Their time does not grow with the context: a decoding sequence reads and writes its state once a step, a prompt once in
every chunk, and works through its tokens at the same rate wherever they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.cost.tables import shares
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
    power, half = profile.power, profile.gpu.half_dtype
    work = convolution_work(*op) if isinstance(op, Convolve) else recurrence_work(*op)
    rows, queries = shares(tables.sequences, dp), 1 + tables.drafts
    decode_s, launch_s, chunk_s = (
        profile.state_decode(op.name, work, rows, queries),
        *profile.state_prefill(op.name, work, tables.tokens),
    )
    each, tokens = tables.sequences / dp, tables.tokens.astype(np.float64)
    step_bytes = work.state_bytes * (1 + queries) + work.token_bytes * queries
    chunk_bytes = np.where(tokens > 0, 2 * work.state_bytes + work.prompt_bytes * tokens, 0.0)
    step = Work.of(power, decode_s, each * work.step_flops * queries, each * step_bytes, half)
    beside = Work.of(power, decode_s + launch_s, step.flops, step.moved, half)
    return {
        (op.name, "decode_ns"): step,
        (op.name, "attend_ns"): beside,
        (op.name, "chunk_ns"): Work.of(power, chunk_s, work.prompt_flops * tokens, chunk_bytes, half),
    }
