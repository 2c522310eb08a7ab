"""The registry: published sizes, names and aliases, and the hub cache."""

import json
import os
from pathlib import Path

import pytest

from apex_opt.errors import InputError, UnknownNameError
from apex_opt.ir import list_models, load_model
from apex_opt.ir.registry import CONFIG_FOLDER

# Billions of parameters: sums over the published checkpoints.
SIZES = {
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "llama-3.3-70b": 70.55,
    "llama-1t": 998.9,
    "mistral-7b": 7.25,
    "mistral-large-123b": 122.6,
    "mixtral-8x7b": 46.70,
    "mixtral-8x22b": 140.6,
    "qwen2.5-7b": 7.62,
    "qwen2.5-32b": 32.76,
    "qwen2.5-72b": 72.71,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.76,
    "qwen3-30b-a3b": 30.53,
    "qwen3-235b-a22b": 235.09,
}


@pytest.fixture(autouse=True)
def _no_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.mark.parametrize(("name", "billions"), SIZES.items())
def test_parameters_match_the_published_checkpoint(name: str, billions: float) -> None:
    assert load_model(name).parameters == pytest.approx(billions * 1e9, rel=0.005)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("mixtral-8x7b", 12.9), ("mixtral-8x22b", 39.1), ("qwen3-30b-a3b", 3.3), ("qwen3-235b-a22b", 22.0)],
)
def test_active_parameters_match_the_published_figure(name: str, billions: float) -> None:
    assert load_model(name).active_parameters == pytest.approx(billions * 1e9, rel=0.02)


@pytest.mark.parametrize(
    ("name", "kv_heads", "kv_bytes"),
    [("llama-3.1-8b", 8, 131072), ("llama-3.1-405b", 8, 516096), ("mixtral-8x22b", 8, 229376)],
)
def test_kv_cache_per_token_in_bf16(name: str, kv_heads: int, kv_bytes: int) -> None:
    model = load_model(name)
    assert model.runs[0].block.attention.kv_heads == kv_heads
    assert model.kv_bytes_per_token(2) == kv_bytes


def test_list_holds_every_model_once_under_its_own_name() -> None:
    models = list_models()
    assert [model.name for model in models] == list(SIZES)
    assert all(len(model.runs) == 1 for model in models)
    assert all(model.weight_format == model.dtype == "bf16" for model in models)


def test_the_trillion_parameter_model_says_that_it_is_synthetic() -> None:
    assert "synthetic" in load_model("llama-1t").source


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("meta-llama/Llama-3.1-70B", "llama-3.1-70b"),
        ("meta-llama/Meta-Llama-3.1-70B-Instruct", "llama-3.1-70b"),
        ("META-LLAMA/LLAMA-3.3-70B-INSTRUCT", "llama-3.3-70b"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
        ("Qwen/Qwen3-30B-A3B", "qwen3-30b-a3b"),
        (" Llama-3.1-8B ", "llama-3.1-8b"),
    ],
)
def test_names_and_aliases_are_found_in_any_case(alias: str, name: str) -> None:
    assert load_model(alias).name == name


def test_the_index_uses_every_file_and_no_spelling_twice() -> None:
    index = json.loads((CONFIG_FOLDER / "index.json").read_text())
    files = {file.name for file in CONFIG_FOLDER.glob("*.json")} - {"index.json"}
    assert {entry["config"] for entry in index.values()} == files
    spellings = [name.lower() for key, entry in index.items() for name in (key, *entry["aliases"])]
    assert len(spellings) == len(set(spellings))
    assert all(entry["note"] for entry in index.values())


def write_config(folder: Path, layers: int) -> None:
    config = json.loads((CONFIG_FOLDER / "llama-3.1-8b.json").read_text())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))


def test_a_path_is_loaded_and_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path / "tuned", 3)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_model(str(tmp_path / "tuned")).layers == 3
    assert load_model(str(tmp_path / "tuned" / "config.json")).name == "tuned"
    assert load_model("~/tuned").layers == 3


def test_a_registered_name_wins_over_a_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path / "qwen3-8b", 3)
    monkeypatch.chdir(tmp_path)
    assert load_model("qwen3-8b").layers == 36
    assert load_model("./qwen3-8b").layers == 3


def test_the_hub_cache_gives_the_revision_of_main(tmp_path: Path) -> None:
    cached = tmp_path / "hf" / "hub" / "models--acme--tuned"
    write_config(cached / "snapshots" / "aaa", 3)
    write_config(cached / "snapshots" / "bbb", 5)
    os.utime(cached / "snapshots" / "aaa" / "config.json", (1, 1))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("aaa\n")
    model = load_model("acme/tuned")
    assert (model.layers, model.name) == (3, "acme/tuned")


@pytest.mark.parametrize("main", [None, "gone", "../../..", "\xff"])
def test_the_hub_cache_gives_the_newest_snapshot_otherwise(tmp_path: Path, main: str | None) -> None:
    cached = tmp_path / "hf" / "hub" / "models--acme--tuned"
    write_config(cached / "snapshots" / "aaa", 3)
    write_config(cached / "snapshots" / "bbb", 5)
    os.utime(cached / "snapshots" / "aaa" / "config.json", (1, 1))
    if main is not None:
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(main)
    assert load_model("acme/tuned").layers == 5


def test_the_hub_cache_is_found_by_each_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path / "direct" / "models--acme--one" / "snapshots" / "a", 1)
    write_config(tmp_path / "xdg" / "huggingface" / "hub" / "models--acme--two" / "snapshots" / "a", 2)
    write_config(tmp_path / ".cache" / "huggingface" / "hub" / "models--three" / "snapshots" / "a", 3)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "direct"))
    assert load_model("acme/one").layers == 1
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert load_model("acme/two").layers == 2
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_model("three").layers == 3


def test_a_cached_model_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hf" / "hub" / "models--acme--tuned" / "snapshots" / "aaa").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no snapshot holds a config\.json"):
        load_model("acme/tuned")


@pytest.mark.parametrize(
    "name", ["", " ", "nonsense-9z", "acme/unknown", "a\0b", pytest.param("x" * 5000, id="long"), "../../models--a"]
)
def test_an_unknown_name_tells_the_three_ways(name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_model(name)
    message = str(caught.value)
    for way in ("listed name", "path of a config.json", "Hugging Face id in the local hub cache"):
        assert way in message
    assert "\n" not in message
    assert len(message) < 800


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("llama3.1-70b", "did you mean llama-3.1-70b"),
        ("LLAMA-3.1-71B", "did you mean llama-3.1-70b"),
        ("meta-llama/Llama-3.1-71B", "meta-llama/llama-3.1-70b"),
        ("nonsense-9z", "known: llama-1t, "),
    ],
)
def test_an_unknown_name_comes_with_suggestions(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_model(name)
    assert near in str(caught.value)


def test_a_path_with_nothing_there_is_called_one() -> None:
    with pytest.raises(UnknownNameError, match="no such file"):
        load_model("/nowhere/config.json")
