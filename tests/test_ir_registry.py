"""The registry: published sizes, names and aliases, and the hub cache."""

import json
import os
from pathlib import Path

import pytest

from apex_opt.errors import InputError, UnknownNameError
from apex_opt.ir import checkpoint_of, list_models, load_model
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
    "qwen3-coder-480b-a35b": 480.15,
    "deepseek-v3": 671.03,
    "deepseek-r1": 671.03,
    "kimi-k2": 1026.4,
    "kimi-k2.5": 1026.4,
    "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.83,
    "minimax-m2": 228.7,
    "minimax-m2.5": 228.7,
    "qwen3-next-80b-a3b": 79.67,
    "qwen3.5-27b": 27.0,
    "qwen3.5-397b-a17b": 397.0,
    "deepseek-v3.2": 671.9,
    "deepseek-v4-flash": 284.0,
    "deepseek-v4-pro": 1573.0,  # published as 1.6 T; the sum is held against what our own cells add up to
    "kimi-k3": 2779.5,
    "glm-5": 744.0,
    "minimax-m3": 428.0,
    "nemotron-3-nano-30b-a3b": 31.6,
    "nemotron-3-super-120b-a12b": 120.6,
    "llama-4-maverick": 400.71,
    "gemma-3-27b": 27.016,
    "whisper-large-v3": 1.5435,
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
    ("name", "billions", "tolerance"),
    [
        ("gpt-oss-20b", 3.61, 0.005),
        ("gpt-oss-120b", 5.13, 0.005),
        ("deepseek-v3", 37.0, 0.02),
        ("kimi-k2", 32.0, 0.02),
        ("minimax-m2", 10.0, 0.05),
        ("qwen3-coder-480b-a35b", 35.0, 0.03),
    ],
)
def test_active_parameters_without_the_embedding_match_the_published_figure(
    name: str, billions: float, tolerance: float
) -> None:
    """OpenAI's model card counts the LM head but not the embedding; the others give two digits."""
    model = load_model(name)
    active = model.active_parameters - model.embedding_parameters
    assert active == pytest.approx(billions * 1e9, rel=tolerance)


def test_deepseek_v3_has_its_published_size_to_the_parameter() -> None:
    """The sum over the shapes of its checkpoint, without the multi-token-prediction layer."""
    attention = 7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168
    expert, norms = 3 * 7168 * 2048, 2 * 7168
    sparse = 257 * expert + 256 * 7168 + 256
    dense = 3 * 7168 * 18432
    total = 61 * (attention + norms) + 3 * dense + 58 * sparse + 2 * 129280 * 7168 + 7168
    assert load_model("deepseek-v3").parameters == total == 671_026_419_200


@pytest.mark.parametrize(
    ("name", "gigabytes", "tolerance"),
    [
        # OpenAI, gpt-oss model card, 2025, table 1: 60.8 and 12.8 GiB.
        ("gpt-oss-120b", 60.8 * 1.073741824, 0.002),
        ("gpt-oss-20b", 12.8 * 1.073741824, 0.005),
        # 688.6 GB of files hold the multi-token-prediction layer as well (README_WEIGHTS of DeepSeek-V3): 11.5 B
        # parameters, and copies of embedding and LM head.
        ("deepseek-r1", 688.6 - 11.5 - 2 * 1.85, 0.002),
        # vLLM recipe for MiniMax-M2: 220 GB.
        ("minimax-m2.5", 220.0, 0.05),
    ],
)
def test_weights_take_the_bytes_of_the_published_checkpoint(name: str, gigabytes: float, tolerance: float) -> None:
    assert load_model(name).weight_bytes() == pytest.approx(gigabytes * 1e9, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "kv_heads", "kv_bytes"),
    [
        ("deepseek-v3", 1, 70272),
        ("llama-3.1-8b", 8, 131072),
        ("llama-3.1-405b", 8, 516096),
        ("mixtral-8x22b", 8, 229376),
    ],
)
def test_kv_cache_per_token_in_bf16(name: str, kv_heads: int, kv_bytes: int) -> None:
    model = load_model(name)
    assert model.runs[0].block.attention.kv_heads == kv_heads
    assert model.kv_bytes_per_token(2) == kv_bytes


def test_kimi_k25_has_4_bit_routed_experts_and_all_else_in_16_bit() -> None:
    model = load_model("kimi-k2.5")
    experts = 60 * 384 * 3 * 7168 * 2048
    assert model.matrix_parameters == experts
    assert model.weight_bytes() == experts * 9 // 16 + 2 * (model.parameters - experts)
    assert model.weight_bytes("fp8") == experts + 2 * (model.parameters - experts)
    assert model.weight_bytes("bf16") == 2 * model.parameters == load_model("kimi-k2").weight_bytes("bf16")


def test_gpt_oss_alternates_windows_and_quantises_its_experts_alone() -> None:
    model = load_model("gpt-oss-120b")
    assert [run.block.attention.window for run in model.runs] == [128, None] * 18
    assert model.matrix_parameters == 36 * 128 * 3 * 2880 * 2880


def test_list_holds_every_model_once_under_its_own_name() -> None:
    models = list_models()
    assert [model.name for model in models] == list(SIZES)
    models = models[: 1 + [model.name for model in models].index("minimax-m2.5")]  # of later ones other tests tell
    runs = {model.name: len(model.runs) for model in models if len(model.runs) > 1}
    latent = dict.fromkeys(("deepseek-v3", "deepseek-r1", "kimi-k2", "kimi-k2.5"), 2)
    assert runs == latent | {"gpt-oss-20b": 24, "gpt-oss-120b": 36}
    formats = {model.name: model.weight_format for model in models if model.weight_format != "bf16"}
    assert formats == {
        "deepseek-v3": "fp8",
        "deepseek-r1": "fp8",
        "kimi-k2": "fp8",
        "kimi-k2.5": "w4a16g32",
        "gpt-oss-20b": "mxfp4",
        "gpt-oss-120b": "mxfp4",
        "minimax-m2": "fp8",
        "minimax-m2.5": "fp8",
    }
    assert all(model.dtype == "bf16" for model in models)


def test_hybrid_models_have_the_formats_that_their_checkpoints_have() -> None:
    formats = {name: load_model(name).weight_format for name in list(SIZES)[list(SIZES).index("qwen3-next-80b-a3b") :]}
    mixed = {"deepseek-v4-flash": "mxfp4+fp8", "deepseek-v4-pro": "mxfp4+fp8", "kimi-k3": "mxfp4"}
    assert {name: its for name, its in formats.items() if its not in ("bf16", "fp16")} == {
        "deepseek-v3.2": "fp8"
    } | mixed


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
        ("qwen3-coder-480b", "qwen3-coder-480b-a35b"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1"),
        ("deepseek-v3.1", "deepseek-v3"),
        ("deepseek-ai/DeepSeek-V3.1", "deepseek-v3"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
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
    write_config(tmp_path / "direct" / "models--acme--one" / "snapshots" / "a", 4)
    write_config(tmp_path / "xdg" / "huggingface" / "hub" / "models--acme--two" / "snapshots" / "a", 2)
    write_config(tmp_path / ".cache" / "huggingface" / "hub" / "models--three" / "snapshots" / "a", 3)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "direct"))
    assert load_model("acme/one").layers == 4
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


@pytest.mark.parametrize("name", ["", " ", "nonsense-9z", "acme/unknown", "a\0b", pytest.param("x" * 5000, id="long")])
def test_an_unknown_name_tells_the_three_ways(name: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_model(name)
    message = str(caught.value)
    for way in ("listed name", "path of a config.json", "Hugging Face id in the local hub cache"):
        assert way in message
    assert "\n" not in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("llama3.1-70b", "did you mean llama-3.1-70b"),
        ("LLAMA-3.1-71B", "did you mean llama-3.1-70b"),
        ("meta-llama/Llama-3.1-71B", "meta-llama/llama-3.1-70b"),
        ("nonsense-9z", "known: deepseek-r1, "),
    ],
)
def test_an_unknown_name_comes_with_suggestions(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_model(name)
    assert near in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/config.json", "../../models--a", "nothing.json"])
def test_a_path_with_nothing_there_is_called_one_first(path: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"model '{path}': no such file; give a listed name")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("llama-3.1-70b", "meta-llama/Llama-3.1-70B"),
        ("meta-llama/llama-3.1-70b-instruct", "meta-llama/Llama-3.1-70B-Instruct"),
        ("deepseek-v3.1", "deepseek-ai/DeepSeek-V3.1"),
        ("qwen3-coder-480b", "Qwen/Qwen3-Coder-480B-A35B-Instruct"),
        ("llama-1t", "llama-1t"),
        ("someone/something", "someone/something"),
    ],
)
def test_weights_are_found_under_the_id_nearest_to_the_name(wanted: str, found: str) -> None:
    assert checkpoint_of(wanted) == found


def test_weights_lie_in_the_folder_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert checkpoint_of(str(tmp_path)) == checkpoint_of(str(tmp_path / "config.json")) == str(tmp_path)


def test_a_file_of_another_name_does_not_stand_for_the_folder_it_lies_in(tmp_path: Path) -> None:
    (tmp_path / "tuned-8b.json").write_text("{}", encoding="utf-8")
    assert checkpoint_of(str(tmp_path / "tuned-8b.json")) == "tuned-8b"
