"""What an encoder takes for the input of a request, as work per chunk of its prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.ir.cells import Cut
from apex_opt.profiles.collectives import Collectives

if TYPE_CHECKING:
    from apex_opt.cost.cells import Operations
    from apex_opt.cost.tables import Parts
    from apex_opt.cost.work import Work
    from apex_opt.ir.model import Model, Tower
    from apex_opt.plans.layout import Layout
    from apex_opt.plans.plan import Template


def encoder_parts(
    operations: Operations, model: Model, tower: Tower, attention: Template, weight_format: str, layout: Layout
) -> Parts:
    """The encoder's work for every prompt, which engines compute in the batch of its first tokens.

    It is cut as attention is, and the shards' sums are added up twice a layer. Of an input of a fixed length the work
    is the same for every prompt; of one that is the prompt itself it grows with it. Prompts of encoder-decoders are
    never split. A prompt of one token counts as a decoding sequence, and is taken to have no input.

    Images lie among the tokens of prompts that may be split: every token of a prompt is charged with the mean share of
    an image, as if all prompts had as many.

    Parameters
    ----------
    operations : Operations    on the GPUs of the stage
    model : Model              whose decoder reads what the encoder makes
    tower : Tower              the encoder
    attention : Template       how attention is cut
    weight_format : str        of the weights
    layout
    """
    tokens = operations.tables.tokens
    if model.images is not None:
        of_image, share = model.images
        inputs = np.array([0, tower.tokens or max(1, round(of_image * tower.merged))])
        work = _of_inputs(operations.over(inputs), model, tower, attention, weight_format, layout)
        spread = np.where(tokens > 1, tokens * (share / of_image), 0.0)
        return {("encoder", "chunk_ns"): work.at(np.ones_like(tokens)) * spread}
    inputs = np.array([0, tower.tokens]) if tower.tokens else tokens
    entries = (tokens > 1).astype(np.int64) if tower.tokens else np.where(tokens > 1, tokens, 0)
    work = _of_inputs(operations.over(inputs), model, tower, attention, weight_format, layout)
    return {("encoder", "chunk_ns"): work.at(entries)}


def _of_inputs(
    own: Operations, model: Model, tower: Tower, attention: Template, weight_format: str, layout: Layout
) -> Work:
    """What the encoder takes, by tokens of an input; the decoder's keys and values of these included."""
    cut = Cut(heads=attention.tp, columns=attention.tp)
    works: list[Work] = []
    for run in tower.runs:
        ops = [op for cell in run.block.cells for op in cell.operations(cut, 2)]
        works += [own.of_input(op, weight_format) * run.count for op in ops]
        sums = own.link(Collectives.all_reduce_s, 2.0 * run.block.hidden, attention.tp, layout.spread(attention.tp))
        works.append(sums * (2 * run.count))
    for run in model.runs:
        works += [own.of_input(op, weight_format) * run.count for op in run.block.attention.source_operations(cut)]
    return sum(works[1:], start=works[0])
