"""Serving engines: what each can run, how it forms batches, its own time and its defaults."""

from apex_opt.engines.kinds import ENGINES, EngineKind, kind_names, load_kind
from apex_opt.engines.rules import ANY, EngineRules, Held
from apex_opt.engines.sglang import SGLANG
from apex_opt.engines.trtllm import TRTLLM
from apex_opt.engines.vllm import VLLM
from apex_opt.errors import UnknownNameError

__all__ = [
    "ANY",
    "ENGINES",
    "SGLANG",
    "TRTLLM",
    "VLLM",
    "EngineKind",
    "EngineRules",
    "Held",
    "kind_names",
    "load_kind",
    "load_rules",
]


def load_rules(name: str) -> EngineRules | None:
    """What the engine of a name can run; None for `ANY`, where no engine is asked.

    Raises
    ------
    UnknownNameError    no such engine
    """
    if name == ANY:
        return None
    if name not in ENGINES:
        raise UnknownNameError("runnable", name, (*ENGINES, ANY))
    return ENGINES[name]
