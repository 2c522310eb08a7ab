"""The questions that benchmarks ask."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apex_opt.search import Question


def question(model: str, cluster: str, trace: str, **options: Any) -> Question:
    """What `solve.py plan` asks for these names; options left out have the defaults of the command line."""
    from apex_opt.ask import Options, ask
    from apex_opt.options import COMMANDS

    values = {option.name: option.default for option in COMMANDS["plan"].options}
    values |= {"model": model, "cluster": cluster, "trace": trace, **options}
    return ask(Options(**{f.name: values[f.name] for f in fields(Options)}))


def generated_chat(requests: int) -> str:
    """As many requests as wanted, of lengths like those of the shipped chat trace."""
    lengths = "prompt=lognormal(mean=220,sigma=1.1,max=4096),output=lognormal(mean=220,sigma=0.9,max=2048)"
    return f"poisson:rate=4,n={requests},{lengths}"
