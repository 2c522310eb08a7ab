"""How engines were started: texts of the tables come to numbers under a load, and rows find their family."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from apex_opt.errors import InputError
from apex_opt.measured.deployments import started
from apex_opt.measured.facts import SHIPPED, Labels, Load, read_facts, valued
from apex_opt.measured.names import find_model

if TYPE_CHECKING:
    from pathlib import Path

LOAD = Load(clients=64, prompt=1024, output=1024, tp=8, copies=1)


@pytest.mark.parametrize(
    ("text", "load", "value"),
    [
        ("", LOAD, None),
        ("16384", LOAD, 16384),
        ("default (8192)", LOAD, 8192),
        ("default 10", LOAD, 10),
        ("2*ISL, per attention copy", LOAD, 2048),
        ("max_batch+ISL+1500", LOAD, 64 + 1024 + 1500),
        ("max(8192, floor((C+ISL+127)/64)*64)", LOAD, 8192),
        ("floor((C+ISL+127)/64)*64", LOAD, 1215 // 64 * 64),
        ("C (C/4 with attention DP)", LOAD, 64),
        ("C (C/4 with attention DP)", LOAD._replace(copies=8, tp=1), 16),
        ("30 from 16 clients on, else 10", LOAD, 30),
        ("30 from 16 clients on, else 10", LOAD._replace(clients=15), 10),
        ("0.8; 0.75 at 8192 + 1024 on TP 4; 0.7 at 1024 + 8192 from 256 clients on", LOAD, 0.8),
        (
            "0.8; 0.75 at 8192 + 1024 on TP 4; 0.7 at 1024 + 8192 from 256 clients on",
            LOAD._replace(clients=256, output=8192),
            0.7,
        ),
        ("40 at 1024 + 1024 from 64 clients on", LOAD, 40),
        ("40 at 1024 + 1024 from 64 clients on", LOAD._replace(clients=63), None),
        ("chunk 131072, prompt tokens of a batch 16384 (default)", LOAD, 16384),
        ("ISL+1500 prompt tokens of a batch, if by the generator", LOAD, 2524),
        ("16384 (chunk and prompt tokens of a batch)", LOAD, 16384),
        ("batch_size column", LOAD, 64),
    ],
)
def test_texts_come_to_numbers_under_a_load(text: str, load: Load, value: float | None) -> None:
    assert valued(text, load) == value


@pytest.mark.parametrize("text", ["a lot", "C**9", "__import__('os')", "C/0", "ISL if C else 1"])
def test_what_is_no_sum_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(InputError, match="is no number and no sum of C, K, ISL and OSL"):
        valued(text, LOAD)


def test_every_shipped_family_comes_to_settings(tmp_path: Path) -> None:
    facts = read_facts(tmp_path / "rows.csv")
    assert facts.source == "shipped"
    assert len(facts.families) > 80
    for family in facts.families.values():
        for load in (LOAD, LOAD._replace(clients=4, prompt=8192), LOAD._replace(clients=256, tp=1, copies=8)):
            found = started(family, family.text("engine"), "8xb200-sxm", load)
            assert 1 <= found.settings.max_num_seqs <= load.clients
            assert found.requests_per_client in (10, 20, 50)
            assert 0 < found.settings.gpu_memory_utilization < 1


def test_a_row_finds_the_narrowest_family_of_its_day(tmp_path: Path) -> None:
    facts = read_facts(tmp_path / "rows.csv")
    labels = Labels("trtllm", "meta-llama/Llama-3.1-70B", "h200_sxm", "fp8", "2025-10-05", "", True)
    for load, name in (
        (LOAD._replace(tp=4), "llama70b-fp8-h200-trt-wait"),
        (LOAD, "llama70b-fp8-h200-trt"),
        (LOAD._replace(tp=4, output=8192), "llama70b-fp8-h200-trt"),
    ):
        family = facts.family("unknown id", labels, load)
        assert family is not None
        assert family.name == name
    for changed in (labels._replace(measured="2024-01-01"), labels._replace(engine="sglang")):
        assert facts.family("unknown id", changed, LOAD) is None


def test_versions_of_a_model_stand_for_each_other(tmp_path: Path) -> None:
    facts = read_facts(tmp_path / "rows.csv")
    labels = Labels(
        "sglang", "deepseek-ai/DeepSeek-V3", "b200_sxm", "fp4", "2026-03-25", "lmsysorg/sglang:v0.5.9-cu130", True
    )
    family = facts.family("unknown id", labels, LOAD)
    assert find_model("deepseek-ai/DeepSeek-V3") != find_model("deepseek-ai/DeepSeek-R1")
    assert family is not None
    assert family.text("model") == "deepseek-ai/DeepSeek-R1"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("x", "clients 'x' is not a finite number"),
        ("2.5", "is not a whole number"),
        ("-1", "clients '-1' is not"),
        ("0", "clients 0 is outside 1 to 65,536"),
        ("99999", "clients 99999 is outside"),
    ],
)
def test_degrees_that_cannot_be_are_refused_with_their_line(tmp_path: Path, cell: str, said: str) -> None:
    (tmp_path / "relabel_x.csv").write_text(f"id,clients,tp,dp,moe_tp,moe_ep\nrow,{cell},8,1,1,\n")
    with pytest.raises(InputError, match=f"relabel_x.csv: line 2: .*{said}"):
        read_facts(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("families_x.csv", "id,family\nrow,nobodys\n", r"families_x.csv: line 2: family 'nobodys' is none of "),
        (
            "set_aside_x.csv",
            "id,reason,metric\nrow,cold,latency\n",
            r"set_aside_x.csv: line 2: metric 'latency' must be one of ttft, tpot, both",
        ),
    ],
)
def test_a_family_or_a_metric_that_there_is_none_of_is_refused_with_its_line(
    tmp_path: Path, file: str, text: str, said: str
) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=said):
        read_facts(tmp_path / "rows.csv")


def test_a_faulty_expression_is_told_with_the_place_of_its_line(tmp_path: Path) -> None:
    shipped = SHIPPED.read_text().splitlines()
    columns = shipped[0].split(",")
    cells = dict.fromkeys(columns, "") | {"family": "mine", "engine": "vllm", "max_num_seqs": "C**2"}
    (tmp_path / "deployments.csv").write_text(f"{shipped[0]}\n{','.join(cells[name] for name in columns)}\n")
    family = read_facts(tmp_path / "rows.csv").families["mine"]
    with pytest.raises(InputError, match=r"deployments.csv: line 2: max_num_seqs: 'C\*\*2' is no number"):
        family.number("max_num_seqs", LOAD)
