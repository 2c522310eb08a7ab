"""The space is what vLLM starts: held against verdicts of its own code (`../shared/startable` says how to record)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from startable_cases import (
    FAMILIES,
    SHARED,
    THIN,
    Asked,
    Row,
    UnsaidError,
    asked,
    free_bytes,
    of_family,
    rows,
)

from apex_opt.oracle.checks import violations
from apex_opt.units import GIB

ASIDE = 3 * GIB
"""Memory that the recording pretends to be in use, so that a verdict on memory this near may be another on a GPU."""

KNOWN = {
    ("Llama-3.1-405B-FP8-fbgemm-kv16", "deprecated"): "started with --allow-deprecated-quantization, which we emit",
    (
        "Qwen--Qwen3-32B-FP8-Static-PerTensor",
        "compute capability",
    ): "no quant_method in the file: vLLM takes it as bf16",
}
"""Verdicts that are not ours, by part of the model's name and of what vLLM or we say, each with the reason."""

HEAVIER = {
    "L8-gptq-dynamic": "vLLM finds what is quantised in the weight files, of which the recording has none",
    "Qwen--Qwen3-32B-FP8-Static-PerTensor": "no quant_method in the file: vLLM takes it as bf16",
    "kimi-k2.5": "the image tower, and orders of groups dropped once weights are loaded, are not counted",
}
"""Models whose weights are more than 2% off in some row, each with the reason."""

OTHER_WEIGHTS = {
    "gemma-3n-e2b": "the case has no towers, in whose place vLLM builds some of 1.77 GiB",
    "gemma-3n-e4b": "the case has no towers, in whose place vLLM builds some of 1.78 GiB",
    "glm-4.1v-9b": "the case has no tower, in whose place vLLM builds one",
    "ministral-3-8b": "the case does not say whether its head is tied",
    "opt-125m": "learned positions on every stage",
    "solar-open-100b": "run by a class of Transformers",
    "qwen2.5-vl-7b": "parts of the tower that are built all the same",
}
"""Cases whose weights are more than 2% off, each with what differs."""


def held(path_rows: list[Row]) -> list[tuple[Row, Asked]]:
    """Rows whose model is read and whose arguments a plan can say."""
    found = []
    for row in path_rows:
        try:
            found.append((row, asked(row)))
        except UnsaidError:
            continue
    return found


def differences(pairs: list[tuple[Row, Asked]]) -> list[str]:
    """Rows on which we and vLLM disagree, less those near the limit of memory and those known."""
    found = []
    for row, problem in pairs:
        broken = violations(problem.instance, problem.plan)
        texts = " ".join(fault.text for fault in broken)
        if (row["verdict"] == "accept") == (not broken) or _near(row, problem):
            continue
        name, said = row["config"], f"{row['message']} {texts}"
        if not any(part in name and words in said for part, words in KNOWN):
            found.append(
                f"{name} {problem.plan} on {row['capability']}: vLLM {row['verdict']}s {row['message']}; {texts}"
            )
    return found


def _near(row: Row, problem: Asked) -> bool:
    """Whether the verdict is on memory within what the recording pretends."""
    if row["stage"] != "kv" or not row["kv_free_gib"]:
        return False
    block = max(stage.kv_block_bytes for stage in problem.memory)
    need = int(problem.settings.most_blocks(np.array(problem.settings.max_model_len))) * block
    return abs(free_bytes(row)) <= ASIDE or abs(free_bytes(row) - need) <= ASIDE


def misweighed(pairs: list[tuple[Row, Asked]]) -> list[str]:
    """Accepted rows whose weights are more than 2% off, or whose blocks more than 5%, less those known."""
    found = []
    for row, problem in pairs:
        if row["verdict"] != "accept":
            continue
        stages, name = problem.memory, row["config"]
        weights = max(stage.weights_bytes for stage in stages) / GIB
        # The recording rounds to thousandths of a GiB.
        off = abs(weights - float(row["weights_gib"])) - 0.001
        if off > 0.02 * float(row["weights_gib"]) and not any(part in name for part in HEAVIER):
            found.append(f"{name} {problem.plan} on {row['capability']}: {weights:.3f} not {row['weights_gib']} GiB")
        blocks = int(free_bytes(row) / max(stage.kv_block_bytes for stage in stages))
        told = int(row["blocks"])
        if abs(blocks - told) > 0.05 * told:
            found.append(f"{name} {problem.plan} on {row['capability']}: {blocks} not {told} blocks")
    return found


def test_a_plan_is_in_the_space_exactly_where_vllm_starts_it() -> None:
    pairs = held(rows(THIN))
    assert len(pairs) >= 150
    assert Counter(row["verdict"] for row, _ in pairs).keys() == {"accept", "refuse"}
    assert {row["stage"] for row, _ in pairs} == {"config", "quant", "layer", "kv"}
    assert differences(pairs) == []


def test_weights_and_blocks_are_those_that_vllm_counts() -> None:
    pairs = held(rows(THIN))
    assert sum(row["verdict"] == "accept" for row, _ in pairs) >= 80
    assert misweighed(pairs) == []


def test_plans_of_all_families_are_let_through_and_weighed_as_vllm_does() -> None:
    every = rows(FAMILIES)
    assert len({row["model"] for row in every}) >= 95
    wrong = []
    for row in every:
        problem = of_family(row)
        refused = {fault.family for fault in violations(problem.instance, problem.plan)} & {"engine"}
        if bool(refused) != (row["verdict"] == "refuse"):
            wrong.append((row["model"], row["plan"], row["verdict"]))
        if row["verdict"] == "refuse" or row["model"] in OTHER_WEIGHTS:
            continue
        told = [float(gib) for gib in row["stage_weights_gib"].split(";")]
        ours = [stage.weights_bytes / GIB for stage in problem.memory]
        if len(ours) != len(told) or any(
            abs(mine - its) > 0.02 * its + 0.001 for mine, its in zip(ours, told, strict=True)
        ):
            wrong.append((row["model"], row["plan"], ours, told))
    assert wrong == []


@pytest.mark.data
def test_all_recorded_verdicts_agree_where_their_models_are_at_hand() -> None:
    path = SHARED / "startable" / "startable_dev.csv"
    if not path.is_file():
        pytest.skip("../shared/startable is absent: only its thinned copy is tested")
    pairs = held(rows(path))
    assert differences(pairs) == []
    assert misweighed(pairs) == []


def test_a_rule_lifted_is_noticed() -> None:
    pairs = [(row, problem) for row, problem in held(rows(THIN)) if row["stage"] == "layer"]
    lifted = [
        row
        for row, problem in pairs
        if not {fault.family for fault in violations(problem.instance, problem.plan)} - {"engine"}
    ]
    assert len(lifted) >= 3
