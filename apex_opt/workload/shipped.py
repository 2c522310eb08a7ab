"""The traces in `traces/`: the laws they are drawn from, and the command that writes them.

    python -m apex_opt.workload.shipped [FOLDER]

The laws are ours; the figures they are chosen after are public and named in `Recipe.inspiration`. Each seed is one
whose realised rate and mean lengths lie within 4% of the law's, so that the title holds for the file.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from apex_opt import units
from apex_opt.errors import ApexError, InputError, UnknownNameError
from apex_opt.outputs import write_whole
from apex_opt.workload.generators import describe_trace
from apex_opt.workload.readers import trace_jsonl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.workload.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What one shipped trace is drawn from: a description as `describe_trace` reads it, and why these figures."""

    title: str
    law: str
    seed: int
    inspiration: str


RECIPES: Final = {
    "chat": Recipe(
        title="Chat: short prompts with a long tail, answers as long, 4 requests/s",
        law="poisson:rate=4,n=1000,prompt=lognormal(mean=220,sigma=1.1,max=4096),"
        "output=lognormal(mean=220,sigma=0.9,max=2048)",
        seed=1001,
        inspiration="LMSYS-Chat-1M (arXiv:2309.11998) as counted in two APEX traces (github.com/microsoft/apex_plus): "
        "prompts of 62 and 73 tokens, answers of 162 and 189 on average; Azure conversation trace 2023 "
        "(github.com/Azure/AzurePublicDataset): 1,155 and 211. Our prompt mean lies between: a little history.",
    ),
    "creation": Recipe(
        title="Content creation: short prompts, long answers, 1 request/s",
        law="poisson:rate=1,n=1000,prompt=lognormal(mean=300,sigma=0.4,max=2048),"
        "output=lognormal(mean=700,sigma=0.5,max=4096)",
        seed=1006,
        inspiration="Two creation traces of APEX (arXiv:2411.17651, github.com/microsoft/apex_plus): prompts of 308 "
        "and 356 tokens, answers of 1,144 and 761 on average.",
    ),
    "summarization": Recipe(
        title="Summarization: long prompts, short answers, 1 request/s",
        law="poisson:rate=1,n=1000,prompt=normal(mean=2800,std=800,max=6144),"
        "output=lognormal(mean=180,sigma=0.6,max=1024)",
        seed=1003,
        inspiration="arXiv summarization (Cohan et al., NAACL 2018) as cut to 4,096 tokens in Vidur "
        "(github.com/microsoft/vidur): most prompts of 1,500 to 3,900 tokens, most summaries of 70 to 450.",
    ),
    "code": Recipe(
        title="Code completion: long prompts, a line or two of answer, 3 requests/s",
        law="poisson:rate=3,n=1000,prompt=lognormal(mean=2000,sigma=0.8,max=7437),"
        "output=lognormal(mean=32,sigma=0.9,max=1024)",
        seed=1027,
        inspiration="Azure code trace 2023 (Splitwise, arXiv:2311.18677, github.com/Azure/AzurePublicDataset): "
        "prompts of 2,048 tokens on average and 7,437 at most, answers of 28.",
    ),
}


def generate(name: str) -> Trace:
    """The shipped trace of this name, drawn anew from its law and seed.

    Raises
    ------
    UnknownNameError               no recipe of this name
    """
    if name not in RECIPES:
        raise UnknownNameError("shipped trace", str(name)[:40], RECIPES)
    recipe = RECIPES[name]
    return replace(describe_trace(recipe.law, recipe.seed), name=name)


def card(name: str) -> str:
    """The card of a shipped trace as TOML: title, law, seed, statistics as realised, checksum, licence, inspiration."""
    trace = generate(name)
    recipe = RECIPES[name]
    head = {
        "title": recipe.title,
        "file": f"{name}.jsonl",
        "sha256": hashlib.sha256(trace_jsonl(trace).encode()).hexdigest(),
        "licence": "Apache-2.0",
        "method": "generated: python -m apex_opt.workload.shipped",
        "law": recipe.law,
        "seed": recipe.seed,
        "n": len(trace),
        "inspiration": recipe.inspiration,
    }
    units_of = {"StartTimeOffset": "ns", "ContextTokens": "tokens", "GeneratedTokens": "tokens"}
    statistics = {key: value for key, value in trace.summary().items() if isinstance(value, int | float)}
    return "\n".join([_toml(head), "[units]", _toml(units_of), "[statistics]", _toml(statistics)])


def write_all(folder: Path) -> tuple[Path, ...]:
    """Write every shipped trace and its card into a folder; returns the files written.

    Raises
    ------
    InputError                     the folder cannot be written
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in RECIPES:
            for suffix, text in ((".jsonl", trace_jsonl(generate(name))), (".toml", card(name))):
                path = folder / f"{name}{suffix}"
                write_whole(path, text.encode(), "trace")
                written.append(path)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); name another folder") from error
    return tuple(written)


def _toml(table: Mapping[str, object]) -> str:
    """A flat table; JSON strings and numbers are TOML too. Six decimals are enough for statistics."""
    return "".join(
        f"{key} = {json.dumps(round(value, 6) if isinstance(value, float) else value, ensure_ascii=False)}\n"
        for key, value in table.items()
    )


if __name__ == "__main__":
    try:
        for file in write_all(Path(sys.argv[1]) if len(sys.argv) > 1 else units.DATA_ROOT / "traces"):
            print(file)
    except ApexError as error:
        sys.exit(f"error: {error}")
