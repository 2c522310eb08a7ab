"""Two batches in place of one: what a forward takes in two halves, one of which computes while the other sends.

Layer by layer it takes as long as the busier of computing and sending both halves; the first half has nothing to hide
behind. A half costs what the tables say of half the tokens, so that weights are read twice and kernels are launched
twice, and some multiprocessors send instead of computing. What follows the layers, and the host, is not hidden.

Derived from the tables of a plan; when engines split is in `engines.overlap`. Assumed: that all layers are split, that
a GPU computes as much slower as it has fewer multiprocessors, that attention over contexts and over the chunks of
prompts takes in two halves what it takes in one, and that halves are launched one after the other.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from apex_opt.cost.tables import HIDDEN, Parts, merged, times
from apex_opt.cost.work import Work
from apex_opt.simulator.ranks import Halves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cost.stage import Piece, StageCosts
    from apex_opt.cost.tables import Ints
    from apex_opt.cost.work import Floats

_USUAL_MULTIPROCESSORS: Final = 132
_KINDS: Final = (("decode", "decode_ns"), ("mixed", "mixed_ns"))
"""Kinds of forwards, and the table of a rank's own part that goes by its sequences or its tokens."""


class Layers(NamedTuple):
    """What the layers of a stage do, and what surrounds them.

    Parameters
    ----------
    own, head : pieces            what a rank does by itself but for sending tokens to their experts; the LM head apart
    together : pieces             what all ranks do together
    sent : Work                   what sends tokens to their experts and back, by the tokens of a rank
    number : int                  of layers
    captured, launched : int      kernels of a forward, from captured graphs and one by one
    step_s : float                the engine's own time in a forward
    engine : Parts                the same with all that goes with it, of a forward that is not split
    """

    own: Sequence[tuple[int, Piece]]
    head: Sequence[tuple[int, Piece]]
    together: Sequence[tuple[int, Piece]]
    sent: Work
    number: int
    captured: int
    launched: int
    step_s: float
    engine: Parts

    def took_s(self, computes: Floats, sends: Floats) -> Floats:
        """Seconds of two halves that compute and send for so long together."""
        return np.maximum(computes, sends) + np.minimum(computes, sends) / (2 * self.number)


def halves_of(costs: StageCosts, layers: Layers) -> tuple[Halves, Parts]:
    """What forwards of a stage take in two halves, and the work that is more than that of forwards which are not split.

    Where the time went is told by the largest rank's tokens, as if all had as many; what of it is hidden, apart.
    No half saves energy or traffic.

    Parameters
    ----------
    costs : StageCosts    of a rank
    layers : Layers
    """
    splitting, overhead, tables = costs.settings.scheduler.splitting, costs.overhead, costs.tables
    assert splitting is not None  # the oracle refuses others
    total = costs.cluster.gpu.multiprocessors or _USUAL_MULTIPROCESSORS
    slower = {
        "decode": total / (total - splitting.decode_sms),
        "mixed": total / (total - splitting.prompt_sms),
    }
    own = costs.sum_of(layers.own)
    of_decoding = {name for name in own if name.startswith(("decode", "context", "seen_rate"))}
    seconds = {name: slower["decode" if name in of_decoding else "mixed"] * values for name, values in own.items()}
    for _, name in _KINDS:
        seconds[name] = slower[name.removesuffix("_ns")] * _two(own[name])
    seconds["context_rate"] = seconds["context_rate"][_larger(len(tables.sequences))]
    seconds["transfer_ns"] = np.zeros(len(tables.tokens))
    shared = {kind: np.zeros(len(tables.tokens)) for kind, _ in _KINDS}
    for count, piece in layers.together:
        for kind in shared:
            shared[kind] += count * piece.seconds.get(f"together {kind}", 0.0)
    together = {kind: slower[kind] * _two(values) for kind, values in shared.items()}
    alone = costs.sum_of(layers.head)["decode_ns"] + overhead.sequence_s * tables.sequences
    sends = _two(layers.sent.seconds)

    # Of so many tokens on every rank, decoding or all of one prompt.
    mean = np.minimum(tables.tokens, len(tables.sequences) - 1)
    computes = {
        "decode": seconds["decode_ns"][mean] + together["decode"],
        "mixed": seconds["mixed_ns"] + seconds["chunk_ns"] + together["mixed"],
    }
    host, more = {}, Parts()
    for kind, table in _KINDS:
        step_s = layers.step_s + 2 * layers.captured * costs.operations.gap_s
        step_s += overhead.mixed_step_s if kind == "mixed" else 0.0
        took = layers.took_s(computes[kind], sends)
        waits = 2 * layers.launched * overhead.launch_s - took - alone[mean if kind == "decode" else 1] - step_s
        waits = np.maximum(waits, 0.0) if kind == "mixed" or not overhead.captured_sizes else 0.0
        host[kind] = np.where(tables.tokens > 0, step_s + waits, 0.0)
        hidden = computes[kind] + sends - took
        engine = Work.waiting(costs.profile.power, host[kind])
        parts: list[Parts] = [
            {("communication", f"together split {kind}"): _more(layers.sent)},
            {(HIDDEN, f"together split {kind}"): _nothing_but(-hidden)},
            {("engine", f"together split {kind}"): _beyond(engine, layers.engine["engine", f"together {kind}"])},
        ]
        for pieces, wanted in ((layers.own, table), (layers.together, f"together {kind}")):
            parts += [
                times({(name, f"together split {kind}"): _by_tokens(_more(work, slower[kind]), mean, of)}, count)
                for count, piece in pieces
                for (name, of), work in piece.parts.items()
                if of == wanted
            ]
        more = merged(more, *parts)
    return (
        Halves(
            law=costs.law_of(seconds),
            decode_ns=costs.integers(together["decode"]),
            mixed_ns=costs.integers(together["mixed"]),
            network_ns=costs.integers(sends),
            decode_host_ns=costs.integers(host["decode"]),
            mixed_host_ns=costs.integers(host["mixed"]),
            alone_ns=costs.integers(alone),
            layers=layers.number,
        ),
        more,
    )


def _larger(entries: int) -> Ints:
    """Of so many sizes from 0 on the larger half."""
    every = np.arange(entries, dtype=np.int64)
    return every - every // 2


def _two(values: Floats) -> Floats:
    """What both halves take, by the size of the whole."""
    larger = _larger(len(values))
    return np.asarray(values[np.arange(len(values)) - larger] + values[larger])


def _more(work: Work, slower: float = 1.0) -> Work:
    """How much more two halves are than the whole."""
    larger = _larger(len(work.seconds))
    both = work.at(np.arange(len(larger)) - larger) + work.at(larger)
    return _beyond(replace(both, seconds=slower * both.seconds), work)


def _beyond(both: Work, work: Work) -> Work:
    """How much more one work is than another, of energy and traffic nothing less."""
    return Work(
        seconds=both.seconds - work.seconds,
        flops=np.maximum(both.flops - work.flops, 0.0),
        moved=np.maximum(both.moved - work.moved, 0.0),
        joules=np.maximum(both.joules - work.joules, 0.0),
    )


def _nothing_but(seconds: Floats) -> Work:
    """Time in which nothing is computed or moved, and that costs no energy."""
    zero = np.zeros_like(seconds)
    return Work(seconds=seconds, flops=zero, moved=zero, joules=zero)


def _by_tokens(work: Work, mean: Ints, table: str) -> Work:
    """A work by sequences as one by tokens, of as many sequences as there can be."""
    return work.at(mean) if table == "decode_ns" else work
