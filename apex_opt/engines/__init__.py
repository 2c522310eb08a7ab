"""What serving engines can run: one description of each, which the plan space and the commands read alike."""

from apex_opt.engines.rules import ANY, EngineRules, Held
from apex_opt.engines.sglang import SGLANG
from apex_opt.engines.trtllm import TRTLLM
from apex_opt.engines.vllm import VLLM
from apex_opt.errors import UnknownNameError

__all__ = ["ANY", "ENGINES", "SGLANG", "TRTLLM", "VLLM", "EngineRules", "Held", "load_rules", "rules_of"]

ENGINES = {rules.name: rules for rules in (VLLM, SGLANG, TRTLLM)}


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


def rules_of(kind: str) -> EngineRules | None:
    """What an engine kind of `profiles/engines.toml` can run, such as `vllm-0.6`; None where no engine is described."""
    return ENGINES.get(kind) or ENGINES.get(kind.partition("-")[0])
