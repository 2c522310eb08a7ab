"""docs/engines.md: its table is that of the facts, its figures those of the recorded verdicts, its commands are run."""

from __future__ import annotations

import re
from math import inf

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed
from startable_cases import THIN, rows
from test_startable import HEAVIER, KNOWN, held

from apex_opt.engines import ENGINES, kind_names, load_kind

TEXT = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
WORDS = {
    "cuda_only": "GPUs with CUDA alone",
    "formats": "weight formats, from which compute capability on",
    "attention": "kinds of attention, and of its cache",
    "methods": "methods of quantisation that need more than their format",
    "no_half": "families that are not computed in fp16",
    "made_on_load": "weights made of 16 bits while they are loaded",
    "ffn_copies": "copies of the FFN in a stage",
    "dense_attention_copies": "attention copies before a dense FFN",
    "copied_attention": "families with attention copies",
    "copied_drafts": "ways to make drafts over attention copies",
    "one_gpu_copies": "an attention copy has one GPU",
    "experts_by_both": "experts cut by ep and tp at once",
    "dense_per_copy": "dense and shared FFNs in each attention copy",
    "whole_shared": "families with whole shared experts where experts are cut by ep and attention has copies",
    "gate_room": "experts without a gate that are made on load have room for one",
    "whole_scales": "shards hold whole groups and blocks of scales",
    "least_group": "groups of experts halved to fit a shard, down to",
    "padded_experts": "experts stored in rounded sizes",
    "vocab_multiple": "attention shards divide the vocabulary, padded to a multiple of",
    "vocab_on_every_stage": "families with embedding and LM head on every stage",
    "embedding_on_every_stage": "families with the embedding on every stage",
    "whole_models": "families that are not cut into stages",
    "whole_when_tied": "families that are not cut into stages where the LM head is the embedding",
    "whole_experts": "families whose experts are not dealt over GPUs",
    "without_class": "families that the release has no class of its own for",
    "misread_heads": "families whose head_dim is taken for the width of the rotary key",
    "brought_code": "families whose configuration comes as code with the checkpoint",
    "sound_shards": "families where attention shards divide the heads of a sound tower",
    "whole_vocabulary": "families whose embedding and LM head are whole on every GPU",
    "whole_kv_heads": "families whose KV heads are not copied",
    "tower_shards": "attention shards divide the heads of an image tower",
    "whole_towers": "families whose image tower is whole where its heads do not divide",
    "block_multiples": "multiples of tokens in a KV block",
    "kernel_blocks": "tokens in a KV block of the fastest kernels, by compute capability and cache",
    "block_powers": "tokens in a KV block are a power of two",
    "multiplexes": "prompts and answers side by side on divisions of a GPU",
    "overlaps": "families whose forwards are split into two halves that hide each other's sending",
    "split_formats": "formats whose experts run in such forwards",
    "whole_methods": "methods of quantisation whose experts do not",
    "split_seqs": "sequences of a rank that such forwards can answer",
    "rotary_table": "a table of cosines and sines on every GPU",
}
"""The rules by their fields, in the order of the table."""


def said(value: object) -> str:
    """A fact as the table has it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, frozenset):
        return ", ".join(sorted(value)) or "none"
    if value is None:
        return "all"
    if not hasattr(value, "items"):
        return str(value)
    parts = []
    for name, entry in value.items():
        if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], float):
            least, below = entry
            parts.append(f"{name} {least:g}" + ("" if below == inf else f" to below {below:g}"))
        elif isinstance(entry, tuple) and isinstance(entry[0][2], str):
            for least, below, cache, tokens in entry:
                where = f"{least:g} to below {below:g}" + (f" with a cache in {cache}" if cache else "")
                parts.append(f"{name or 'any'} {tokens} on {where}")
        elif isinstance(entry, tuple):
            sizes = "; ".join(f"{hidden} and {columns} from {least:g}" for least, _, hidden, columns in entry)
            parts.append(f"{name} to multiples of {sizes}")
        else:
            parts.append(f"{name} {entry}")
    return ", ".join(parts) or "none"


def table() -> str:
    """Rule, engine, what holds, and where that was read."""
    lines = ["| rule | engine | | source |", "|---|---|---|---|"]
    for field, words in WORDS.items():
        for name, rules in ENGINES.items():
            if field in rules.sources:
                lines.append(f"| {words} | {name} | {said(getattr(rules, field))} | {rules.sources[field]} |")
    return "\n".join(lines)


def test_every_rule_stands_in_the_table_with_its_source() -> None:
    assert {field for rules in ENGINES.values() for field in rules.sources} == set(WORDS)
    assert table() in TEXT


def defaults() -> str:
    """Setting, engine, its default, and where that was read."""
    lines = ["| setting | engine | default | source |", "|---|---|---|---|"]
    kinds = {name: load_kind(name) for name in ENGINES}
    for setting in dict.fromkeys(setting for kind in kinds.values() for setting in kind.defaults):
        for name, kind in kinds.items():
            if default := kind.defaults.get(setting):
                value = str(default.value).lower() if isinstance(default.value, bool) else str(default.value)
                parts = [*(f"{less} below {gib} GiB" for gib, less in default.below_gib), value]
                lines.append(f"| `{setting}` | {name} | {', else '.join(parts)} | {default.source} |")
    return "\n".join(lines)


def test_every_default_stands_in_the_table_with_its_source_and_every_kind_with_its_scheduler() -> None:
    assert defaults() in TEXT
    for name in kind_names():
        assert f"| `{name}` | " in TEXT


def test_the_counts_are_those_of_the_verdicts_kept_here() -> None:
    every = rows(THIN)
    pairs = held(every)
    accepted = sum(row["verdict"] == "accept" for row, _ in pairs)
    assert f"{len(every)} of them are kept in `tests/`; {len(pairs)} ask for a plan, {accepted} of these start" in TEXT


def test_every_known_difference_is_listed_with_its_reason() -> None:
    for reason in {*KNOWN.values(), *HEAVIER.values()}:
        assert reason in re.sub(r"\s+", " ", TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("body", [body for kind, body in blocks_of(TEXT) if kind == "console"], ids=lambda b: b[:60])
def test_the_output_shown_is_the_output_printed(body: str) -> None:
    shown, printed = shown_and_printed(body)
    for part in shown.split(" ... "):
        assert part.strip(" .") in printed
