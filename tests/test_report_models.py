"""The list of models: what is told of each, and of files that are read or not."""

import json
from pathlib import Path

import pytest
from cli_cases import run

import apex_opt
from apex_opt.ir import load_model
from apex_opt.report.models import model_row

CASES = Path(__file__).parent / "cases"


def test_a_row_counts_its_cells() -> None:
    row = model_row(load_model("gpt-oss-20b"))
    assert row.cells == {"attention over 128": 12, "attention": 12, "4 of 32 experts": 24}
    assert model_row(load_model("deepseek-v3")).cells == {
        "latent attention": 61,
        "dense FFN": 3,
        "8 of 256 experts + shared": 58,
    }


def test_windows_keep_no_more_than_they_see() -> None:
    row = model_row(load_model("gpt-oss-20b"))
    layer = 2 * 8 * 64 * 2
    assert row.kv_bytes_per_token == 24 * layer
    assert row.kv_bytes_at_context == 12 * layer * (131072 + 128)


def test_the_format_of_the_cache_is_the_checkpoints() -> None:
    plain, narrow = (
        model_row(load_model(str(CASES / "configs" / f"L8-{n}.json"))) for n in ("FP8-dynamic", "kv-static")
    )
    assert (plain.kv, narrow.kv) == ("bf16", "fp8")
    assert plain.kv_bytes_per_token == 2 * narrow.kv_bytes_per_token


def test_what_no_table_has_is_told_to_be_derived() -> None:
    measured = model_row(load_model("llama-3.1-8b")).figures
    assert set(measured) == {"measured"}
    derived = model_row(load_model(str(CASES / "models" / "dbrx.json"))).figures
    assert "moe bf16" in derived["derived"] and "attention decode" in derived["measured"]


def test_a_file_that_is_not_read_is_told_with_what_it_lacks() -> None:
    file = str(CASES / "configs" / "EAGLE3-LLaMA3.1-8B.json")
    refused = apex_opt.models(supports=file)
    assert not refused.found and refused.status == "refused"
    assert "draft head" in refused.to_dict()["reason"]
    assert "is not read" in refused.page() and "draft head" in refused.page()


@pytest.mark.parametrize(("asked", "said"), [("none.json", "no such file"), ("no-such-model", "unknown model")])
def test_what_is_not_there_is_a_fault_of_the_command_as_an_unknown_name_is(asked: str, said: str) -> None:
    ran = run("models", f"--supports={asked}")
    assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1


def test_a_file_of_a_type_that_is_not_known_is_told_field_by_field(tmp_path: Path) -> None:
    config = json.loads((CASES / "models" / "qwen3-vl-30b-a3b.json").read_text())["text_config"]
    config |= {
        "model_type": "qwen9_moe",
        "attention_sink_size": 4,
        "linear_attn_config": {"rank": 2},
        "use_cache": True,
    }
    del config["moe_intermediate_size"]
    (file := tmp_path / "qwen9.json").write_text(json.dumps(config))
    refused = apex_opt.models(supports=str(file)).to_dict()
    assert "model_type 'qwen9_moe' is not supported" in refused["reason"]
    assert refused["nearest"] == "qwen3_moe"
    odd = {name: text for name, text in refused["fields"].items() if text not in ("read", "changes nothing")}
    assert odd == {
        "attention_sink_size": "not understood",
        "linear_attn_config": "not understood",
        "moe_intermediate_size": "is missing",
    }
    assert refused["fields"]["num_experts"] == "read" and refused["fields"]["use_cache"] == "changes nothing"
    page = apex_opt.models(supports=str(file)).page()
    assert "By the fields of qwen3_moe, the family nearest to it" in page and "attention_sink_size" in page


@pytest.mark.parametrize("model_type", ["x", "", [[]], {"a": []}, True, 0, 10**18])
@pytest.mark.parametrize("name", ["glm-5.2", "dbrx"])
def test_a_type_that_names_no_family_is_told_in_one_line_and_field_by_field(
    name: str, model_type: object, tmp_path: Path
) -> None:
    refused = apex_opt.models(supports=write(tmp_path, name, model_type=model_type))
    document, page = refused.to_dict(), refused.page()
    assert not document["own_family"] and "model_type" in document["reason"] and "\n" not in document["reason"]
    odd = {key for key, text in document["fields"].items() if text not in ("read", "changes nothing")}
    assert odd == (set() if isinstance(model_type, str) else {"model_type"})
    if not odd:
        assert f"All fields of its decoder are those of {document['nearest']}, the family nearest to it: " in page
    assert (" 1 changes nothing" if name == "dbrx" else " change nothing") in page


def test_a_class_that_is_not_the_family_s_is_told_among_the_fields(tmp_path: Path) -> None:
    refused = apex_opt.models(supports=write(tmp_path, "dbrx", architectures=["DbrxNewForCausalLM"]))
    assert refused.to_dict()["fields"]["architectures"] == "has no class of dbrx"
    assert "By the fields of dbrx, its family, " in refused.page()


def test_a_decoder_without_a_type_is_told_by_that_of_the_file_around_it(tmp_path: Path) -> None:
    config = json.loads((CASES / "models" / "qwen3-vl-2b.json").read_text())
    del config["text_config"]["model_type"]
    (file := tmp_path / "vl.json").write_text(json.dumps(config))
    refused = apex_opt.models(supports=str(file)).to_dict()
    assert refused["nearest"] == "qwen3_vl_text" and refused["own_family"] is True
    assert refused["fields"]["model_type"] == "is missing" and "give 'qwen3_vl_text'" in refused["reason"]


@pytest.mark.parametrize("config", [{}, {"model_type": "x"}, {"a": 1}])
def test_a_file_without_a_field_of_a_decoder_has_no_nearest_family(config: dict[str, object], tmp_path: Path) -> None:
    (file := tmp_path / "empty.json").write_text(json.dumps(config))
    refused = apex_opt.models(supports=str(file)).to_dict()
    assert refused["status"] == "refused" and "nearest" not in refused and "fields" not in refused


def test_a_file_of_a_known_type_is_told_by_the_fields_of_its_own(tmp_path: Path) -> None:
    refused = apex_opt.models(supports=write(tmp_path, "dbrx", window_kind="far")).to_dict()
    assert refused["nearest"] == "dbrx" and refused["fields"]["window_kind"] == "not understood"
    assert "fields" not in apex_opt.models(supports=write(tmp_path, "dbrx")).to_dict()


@pytest.mark.parametrize("asked", ["llama-3.1-8b", str(CASES / "models" / "bloom.json")])
def test_a_file_or_a_name_that_is_read_is_told_like_those_listed(asked: str) -> None:
    read = apex_opt.models(supports=asked)
    (row,) = read.to_dict()["models"]
    assert read.found and read.status == "read"
    assert f"{row['name']} is read" in read.page()


def write(tmp_path: Path, name: str, **fields: object) -> str:
    """A file of the model tests with some fields changed."""
    config = json.loads((CASES / "models" / f"{name}.json").read_text())
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(config | fields))
    return str(file)


def test_a_tower_that_is_not_known_is_told_by_its_name_and_kind(tmp_path: Path) -> None:
    tower = {"model_type": "intern_vit_6b", "hidden_size": 3200, "num_attention_heads": 25}
    file = write(tmp_path, "dbrx", vision_config=tower, audio_config={"d_model": 8}, rope_scaling=None)
    read = apex_opt.models(supports=file)
    assert read.to_dict()["models"][0]["unread"] == ["vision_config (intern_vit_6b)", "audio_config"]
    assert "Left out: vision_config (intern_vit_6b), audio_config." in read.page()


def test_a_tower_that_is_known_is_not_left_out() -> None:
    page = apex_opt.models(supports=str(CASES / "models" / "qwen3-vl-2b.json")).page()
    assert "Left out" not in page and "Its tower is counted" in page
    assert "Left out" not in apex_opt.models(supports="llama-3.1-8b").page()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("codegen-16b", "vLLM 0.20: it has no class of its own"),
        ("baichuan2-13b", "vLLM 0.20: its checkpoint brings code"),
        ("falcon-7b", None),
        ("internvl3-8b", "vLLM 0.20: its checkpoint brings code"),
        ("clip-vit-large-patch14", "vLLM 0.20: it is not cut into stages."),
    ],
)
def test_what_runs_a_model_is_told_in_one_line_where_there_is_something_to_know(name: str, said: str | None) -> None:
    read = apex_opt.models(supports=str(CASES / "models" / f"{name}.json"))
    assert ("runs" in read.to_dict()) is (said is not None)
    lines = [line for line in read.page().splitlines() if line.startswith("vLLM 0.20: ")]
    assert [line.startswith(said or "") for line in lines] == [True] * (said is not None)


def test_layers_of_one_cell_name_no_other() -> None:
    row = model_row(load_model("nemotron-3-nano-30b-a3b"))
    assert sum(row.cells.values()) == row.layers
    assert "none" not in row.cells
