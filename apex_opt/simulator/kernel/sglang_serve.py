"""All replicas of a run, by the engine of SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.deployment import serving
from apex_opt.simulator.kernel.jit import inner
from apex_opt.simulator.kernel.router import routing
from apex_opt.simulator.kernel.sglang import engine_nb, sglang_nb
from apex_opt.simulator.kernel.sglang_drafts import sglang_drafts_nb
from apex_opt.simulator.kernel.sglang_state import G_WAIT_HEAD, G_WAIT_TAIL
from apex_opt.simulator.kernel.state import FOLLOWING, HEAD, NONE

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.sglang_state import Sglang, Tree
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def empty_nb(its: Any, r: I64) -> None:
    """A replica empties its memory itself, before its first turn."""


@inner
def waiting_nb(run: Run, its: tuple[Sglang, Tree | None], replica: int) -> int:
    """Requests of a replica that wait, or have been sent and not been seen yet."""
    own, _ = its
    e, following = engine_nb(run, own, replica), column_nb(run, FOLLOWING)
    waiting, i = e.g[G_WAIT_TAIL] - e.g[G_WAIT_HEAD], e.r[HEAD]
    while i != NONE:
        waiting += 1
        i = following[i]
    return waiting


by_sglang_nb = serving(sglang_nb, empty_nb)
by_drafts_nb = serving(sglang_drafts_nb, empty_nb)
routed_sglang_nb = routing(sglang_nb, empty_nb, waiting_nb)
routed_drafts_nb = routing(sglang_drafts_nb, empty_nb, waiting_nb)
