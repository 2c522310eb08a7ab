"""Models as documents: what they are made of, what they keep, and whether their times are measured or derived."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.text import Text

from apex_opt.cluster import load_cluster
from apex_opt.cost.cells import Operations
from apex_opt.cost.tables import Tables
from apex_opt.engines import VLLM
from apex_opt.errors import InputError
from apex_opt.ir import list_models, load_model
from apex_opt.ir.cells.skipped import Skipped
from apex_opt.ir.formats import KV_BYTES
from apex_opt.ir.huggingface import told_by_field
from apex_opt.ir.registry import find_config
from apex_opt.launch.commands import brings_code
from apex_opt.plans.plan import Template
from apex_opt.profiles import load_profile
from apex_opt.profiles.collectives import load_collectives
from apex_opt.report import listed
from apex_opt.report.layout import page, table
from apex_opt.report.sources import in_groups
from apex_opt.schema import of
from apex_opt.units import GB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from apex_opt.ir.model import Model
    from apex_opt.schema import Document

_GPU: Final = "h200-sxm"
"""The GPU of which most operations are measured."""
_TOKENS: Final = 64
"""Largest batch that is priced to see where times come from."""
_READ: Final = "read"
_IDLE: Final = "changes nothing"
_UNDERSTOOD: Final = (_READ, _IDLE)
"""What is said of a field that is understood."""
_OF_ALL: Final = ("power", "memory")
"""Figures of every model, which tell nothing of one."""


def models_document(asked: str | None) -> listed.Models:
    """The models that can be named; or the one of a name or file that is asked for, or why it is not read.

    Raises
    ------
    UnknownNameError    a name that nothing bears
    InputError          no such file, or none of JSON
    """
    if asked is None:
        return listed.Models(status="ok", models=tuple(map(model_row, list_models())))
    config, _, source = find_config(asked)
    try:
        model = load_model(asked)
    except InputError as error:
        nearest, own, fields = _told(config, source)
        return listed.Models(
            status="refused", asked=asked, reason=str(error), nearest=nearest, own_family=own, fields=fields, models=()
        )
    return listed.Models(status="read", asked=asked, runs=_runs(model), models=(model_row(model),))


def _told(config: dict[str, Any], source: str) -> tuple[str | None, bool | None, dict[str, str] | None]:
    """What is understood of a file that is not read, as `told_by_field` has it; None where there is no decoder."""
    try:
        return told_by_field(config, source)
    except InputError:
        return None, None, None


def model_row(model: Model) -> listed.ListedModel:
    """A model: its sizes, its cells, what it keeps, and where its times come from."""
    widest = max((block.attention for block in model.blocks), key=lambda cell: cell.query_heads)
    kv_format = model.kv_format or model.dtype
    kinds: Counter[str] = Counter()
    for run in model.runs:
        for cell in run.block.cells:
            if not isinstance(cell, Skipped):
                kinds[cell.kind] += run.count
    return of(
        listed.ListedModel,
        model,
        query_heads=widest.query_heads,
        kv_heads=widest.kv_heads,
        weights=model.weight_format,
        cells=dict(kinds),
        kv=kv_format,
        kv_bytes_per_token=model.kv_bytes_per_token(KV_BYTES[kv_format]),
        kv_bytes_at_context=_kept_bytes(model, KV_BYTES[kv_format]),
        figures=_figures(model, kv_format),
        tower_reads=model.tower and model.tower.reads,
        tower_parameters=model.tower and model.tower.parameters,
    )


def _runs(model: Model) -> str | None:
    """What is to be known of the engine whose rules were held against its own code; None where there is nothing."""
    family, found = model.family, []
    if family in VLLM.without_class:
        found.append("it has no class of its own, and refuses it or runs one of Transformers, whose times are others")
    if VLLM.misreads(model):
        found.append(f"it refuses it for head_dim {model.stated_head_dim}, which is to be taken out of the file")
    if brings_code(model):
        found.append("its checkpoint brings code, which engines run where they are told to trust it")
    if family in VLLM.whole_models or (model.tied_embeddings and family in VLLM.whole_when_tied):
        found.append("it is not cut into stages")
    return f"{VLLM.release}: {'; '.join(found)}." if found else None


def _kept_bytes(model: Model, kv_bytes: int) -> int:
    """Bytes that one sequence of the longest context keeps, blocks not rounded up: of windows what can be seen."""
    total, longest = 0, model.max_position
    for run in model.runs:
        for kept in run.block.attention.cache():
            tokens = kept.fixed_tokens or min(longest, getattr(kept, "window", None) or longest)
            total += run.count * (tokens * kept.token_bytes(kv_bytes) + kept.sequence_bytes())
    return total


def _figures(model: Model, kv_format: str) -> dict[str, str]:
    """Operations whose times are measured on the GPU that most is known of, and those that are derived there."""
    cluster, one = load_cluster(f"1x{_GPU}"), Template()
    profile, entries = load_profile(cluster.gpu), np.arange(_TOKENS + 1)
    collectives = load_collectives(cluster, profile=profile)
    operations = Operations(Tables(entries, entries, entries), profile, collectives, by_block=model.scaled_by_block)
    for block in model.blocks:
        operations.attention(block.attention, one, model.weight_format, kv_format)
        operations.ffn(block.ffn, one, one, model.weight_format)
    found = in_groups({name: text for name, text in profile.provenance.items() if name not in _OF_ALL})
    return {group: text for group, text in found.items() if group != "each"}


# ---- the page ----------------------------------------------------------------------------------------------------


def models_page(document: Document) -> str:
    """The list of models as text; or whether a configuration is read."""

    def draw(console: Console) -> None:
        if document["status"] == "refused":
            console.print(Text(f"{document['asked']} is not read."), soft_wrap=True)
            console.print(Text(document["reason"]), soft_wrap=True)
            if document.get("fields"):
                _fields(console, document["nearest"], document["own_family"], document["fields"])
        elif document["status"] == "read":
            (row,) = document["models"]
            console.print(Text(f"{row['name']} is read."), soft_wrap=True)
            for text in _left_out(row):
                console.print(Text(text), soft_wrap=True)
            if "runs" in document:
                console.print(Text(document["runs"]), soft_wrap=True)
            console.print()
        if document["models"]:
            _models(console, document["models"])

    return page(draw)


def _fields(console: Console, nearest: str, own: bool, fields: dict[str, str]) -> None:
    """How much of a file that is not read is understood, and each field that is not."""
    odd = [(name, text) for name, text in fields.items() if text not in _UNDERSTOOD]
    plain = Counter(text for text in fields.values() if text in _UNDERSTOOD)
    idle = plain[_IDLE]
    counts = f"{plain[_READ]} read, {idle} {'changes' if idle == 1 else 'change'} nothing"
    family = f"{nearest}, {'its family' if own else 'the family nearest to it'}"
    if not odd:
        console.print(Text(f"All fields of its decoder are those of {family}: {counts}."), soft_wrap=True)
        return
    console.print(Text(f"By the fields of {family}, {counts}; the others:"), soft_wrap=True)
    table(console, "", ("field", ""), odd, left={0, 1})


def _left_out(row: dict[str, Any]) -> Iterator[str]:
    """What of the file is not served, and what that means."""
    if row["tower_reads"] == "images":
        yield "Its tower is counted where a trace has image_tokens, and left out elsewhere."
    if row["unread"]:
        names = ", ".join(row["unread"])
        yield f"Left out: {names}. Nothing of it is counted, neither weights nor time; traces that need it are refused."


def _models(console: Console, rows: list[dict[str, Any]]) -> None:
    sizes = [
        (
            row["name"],
            f"{row['parameters'] / 1e9:.2f} B",
            f"{row['active_parameters'] / 1e9:.2f} B",
            str(row["layers"]),
            f"{row['max_position']:,}",
            row["weights"],
            row["kv"],
            f"{row['kv_bytes_per_token'] / 1e3:,.1f} kB",
            f"{row['state_bytes_per_sequence'] / 1e6:.1f} MB" if row["state_bytes_per_sequence"] else "-",
            f"{row['kv_bytes_at_context'] / GB:.2f} GB",
        )
        for row in rows
    ]
    heads = (
        *("name", "parameters", "active", "layers", "context", "weights", "KV"),
        *("per token", "states", "full context"),
    )
    table(console, "", heads, sizes, left={0, 5, 6}, kept=range(3))
    made = [
        (
            row["name"],
            _made_of(row),
            row["figures"].get("derived", "-"),
        )
        for row in rows
    ]
    table(console, f"Layers, and what is derived on {_GPU}", ("name", "layers", "derived"), made, left={0, 1, 2})


def _made_of(row: dict[str, Any]) -> str:
    cells = [f"{count} x {kind}" for kind, count in row["cells"].items()]
    if row["tower_reads"]:
        cells.append(f"a tower of {row['tower_parameters'] / 1e9:.2f} B that reads {row['tower_reads']}")
    return ", ".join(cells)
