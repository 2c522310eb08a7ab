"""The problems that benchmarks pose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apex_opt.search import Problem


def problem(model: str, cluster: str, trace: str, **options: Any) -> Problem:
    """What `solve.py plan` asks for these names; options left out have the defaults of the command line."""
    from apex_opt.arguments import Ask
    from apex_opt.resolve import resolve

    return resolve(Ask(model=model, cluster=cluster, trace=trace, **options))


def generated_chat(requests: int) -> str:
    """As many requests as wanted, of lengths like those of the shipped chat trace."""
    lengths = "prompt=lognormal(mean=220,sigma=1.1,max=4096),output=lognormal(mean=220,sigma=0.9,max=2048)"
    return f"poisson:rate=4,n={requests},{lengths}"
