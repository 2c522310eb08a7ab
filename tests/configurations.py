"""The table of configurations in docs/models.md: `python tests/configurations.py` writes it anew.

It lists the published configurations that come with aiconfigurator-core (extra `distill`), which it needs.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from apex_opt.arguments import Ask
from apex_opt.errors import ApexError
from apex_opt.ir import load_model
from apex_opt.oracle.checks import violations
from apex_opt.plans.plan import Plan, Template
from apex_opt.report.models import model_row
from apex_opt.resolve import resolve

if TYPE_CHECKING:
    from apex_opt.ir import Model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
HEAD = "| configuration | family | parameters | weights | layers | KV per token | states | tp that starts |"
ENGINES = ("vllm", "sglang", "trtllm")
SHARDS = (1, 2, 4, 8, 16)
_CLUSTER = "2x8xb200-sxm"  # has all number formats
_ENDING = "_config.json"


def published() -> dict[str, Path]:
    """Files of the package by the Hugging Face id in their names; none where it is not installed."""
    spec = importlib.util.find_spec("aiconfigurator_core")
    if spec is None or not spec.submodule_search_locations:
        return {}
    files = sorted((Path(spec.submodule_search_locations[0]) / "model_configs").glob(f"*{_ENDING}"))
    names = {file.name.removesuffix(_ENDING).replace("--", "/", 1): file for file in files}
    return {name: file for name, file in names.items() if not name.endswith("_hf_quant")}


def row_of(name: str, given: str) -> str:
    """The row of a configuration.

    Parameters
    ----------
    name : Hugging Face id
    given : name or path of the model
    """
    model = load_model(given)
    row = model_row(model)
    weights, states = row.weights, row.state_bytes_per_sequence
    layers = ", ".join(f"{count} x {kind}" for kind, count in row.cells.items())
    started = {engine: _shards(given, model, engine) for engine in ENGINES}
    alike = len(set(started.values())) == 1
    degrees = started[ENGINES[0]] if alike else "; ".join(f"{engine} {text}" for engine, text in started.items())
    cells = (
        name,
        model.family,
        f"{row.parameters / 1e9:.2f} B",
        weights,
        layers,
        f"{row.kv_bytes_per_token / 1e3:,.1f} kB",
        f"{states / 1e6:.1f} MB" if states else "",
        degrees,
    )
    return f"| {' | '.join(cells)} |"


def _shards(given: str, model: Model, engine: str) -> str:
    """Degrees of tensor parallelism that the engine starts, if memory suffices."""
    try:
        problem = resolve(Ask(model=given, cluster=_CLUSTER, engine=engine, trace="static:n=1,prompt=8,output=1"))
    except ApexError:
        return "-"
    instance, able = problem.instance(), []
    for tp in SHARDS:
        plan = Plan(
            replicas=1,
            layers=(model.layers,),
            attention=Template(tp=tp),
            ffn=Template(tp=tp),
            weight_format=instance.weight_formats[0],
            kv_format=instance.kv_formats[0],
        )
        if {fault.family for fault in violations(instance, plan)} <= {"memory", "bandwidth"}:
            able.append(str(tp))
    return ", ".join(able) or "-"


def shown() -> dict[str, str]:
    """Rows of the page by configuration."""
    rows = PAGE.read_text(encoding="utf-8").partition(HEAD)[2].splitlines()[2:]
    table = rows[: next((n for n, row in enumerate(rows) if not row.startswith("|")), len(rows))]
    return {row.split(" | ")[0].removeprefix("| "): row for row in table}


def main() -> None:
    """Write the table."""
    files = published()
    if not files:
        raise SystemExit("aiconfigurator-core is not installed: it is in the extra distill")
    table = "\n".join([HEAD, re.sub("[^|]+", "---", HEAD), *(row_of(name, str(file)) for name, file in files.items())])
    text = PAGE.read_text(encoding="utf-8")
    before, _, after = text.partition(HEAD)
    rest = after.partition("\n\n")[2]
    PAGE.write_text(f"{before}{table}\n\n{rest}", encoding="utf-8")


if __name__ == "__main__":
    main()
