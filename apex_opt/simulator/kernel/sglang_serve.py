"""All replicas of a run, by the engine of SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.simulator.kernel.deployment import serving
from apex_opt.simulator.kernel.jit import inner
from apex_opt.simulator.kernel.sglang import sglang_nb
from apex_opt.simulator.kernel.sglang_drafts import sglang_drafts_nb

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64


@inner
def empty_nb(its: Any, r: I64) -> None:
    """A replica empties its memory itself, before its first turn."""


by_sglang_nb = serving(sglang_nb, empty_nb)
by_drafts_nb = serving(sglang_drafts_nb, empty_nb)
