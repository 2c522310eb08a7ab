"""All replicas of a run, by the engine of SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.simulator.kernel.deployment import serving
from apex_opt.simulator.kernel.jit import inner
from apex_opt.simulator.kernel.sglang import sglang_nb
from apex_opt.simulator.kernel.sglang_state import Sglang, Tree
from apex_opt.simulator.kernel.state import Run

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.sglang_state import F64
    from apex_opt.simulator.kernel.state import I64


@inner
def empty_nb(its: Any, r: I64) -> None:
    """A replica empties its memory itself, before its first turn."""


_by_sglang_nb = serving(sglang_nb, empty_nb)


def serve_sglang_nb(
    control: I64,
    requests: I64,
    replicas: I64,
    stages: I64,
    laws: I64,
    counts: I64,
    scratch: I64,
    stops: I64,
    floors: I64,
    steps: I64,
    rows: I64,
    lost: I64,
    first: int,
    last: int,
    routed: I64,
    turns: int,
    registers: I64,
    ratio: F64,
) -> None:
    """`serve_nb` by the engine of SGLang, without its tree."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    _by_sglang_nb(run, (Sglang(registers, ratio), None), first, last, routed, turns)


def serve_sglang_caching_nb(
    control: I64,
    requests: I64,
    replicas: I64,
    stages: I64,
    laws: I64,
    counts: I64,
    scratch: I64,
    stops: I64,
    floors: I64,
    steps: I64,
    rows: I64,
    lost: I64,
    first: int,
    last: int,
    routed: I64,
    turns: int,
    registers: I64,
    ratio: F64,
    piece_tokens: int,
    pieces: I64,
    starts: I64,
    own: I64,
    last_token: I64,
    nodes: I64,
    slots: I64,
    heap: I64,
) -> None:
    """`serve_nb` by the engine of SGLang, with its tree."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    tree = Tree(piece_tokens, pieces, starts, own, last_token, nodes, slots, heap)
    _by_sglang_nb(run, (Sglang(registers, ratio), tree), first, last, routed, turns)
