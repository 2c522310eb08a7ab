"""apex_opt.engines.kinds: every engine's own file, what releases and likenesses take from others, and faults."""

from __future__ import annotations

import shutil
from dataclasses import fields
from typing import TYPE_CHECKING

import pytest

from apex_opt.engines.kinds import COMMON, DATA, kind_names, load_kind
from apex_opt.engines.schedulers import SCHEDULINGS, VllmScheduling
from apex_opt.errors import ApexError, InputError, UnknownNameError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.units import GIB

if TYPE_CHECKING:
    from pathlib import Path

H100, T4 = 80e9, 15 * GIB


def test_there_is_a_kind_for_every_scheduler_and_every_release() -> None:
    releases = {
        "vllm-0.12",
        "vllm-0.6",
        "sglang-eager",
        "sglang-0.5.9",
        "sglang-0.5.9-drafts",
        "trtllm-1.0",
        "trtllm-1.1",
        "trtllm-1.2",
    }
    assert set(kind_names()) == {"vllm", "sglang", "trtllm", "orca", "static"} | releases
    assert {load_kind(name).scheduler for name in SCHEDULINGS} == set(SCHEDULINGS.values())
    for name in SCHEDULINGS:
        assert load_kind(name).scheduler.name == name


@pytest.mark.parametrize("name", kind_names())
def test_every_setting_has_a_default_with_its_source_that_the_engine_accepts(name: str) -> None:
    kind = load_kind(name)
    assert set(kind.defaults) == {*COMMON, *(field.name for field in fields(kind.scheduler))}
    assert all(default.source.strip() for default in kind.defaults.values())
    for memory in (T4, H100, 288e9):
        common = kind.common(memory)
        EngineSettings(**common, scheduler=kind.scheduling(), max_model_len=2048)


def test_defaults_in_code_are_those_of_the_files_but_for_the_sleep_of_vllm() -> None:
    """Schedulers that are simulated on their own, as recorded ones are, do not sleep unless they are told to."""
    plain = EngineSettings(scheduler=VllmScheduling(idle_sleep_us=1000))
    assert {name: getattr(plain, name) for name in COMMON} == load_kind("vllm").common(H100)
    assert plain.scheduler == load_kind("vllm").scheduling()
    for name, kind in SCHEDULINGS.items():
        slept = {"idle_sleep_us": 1000} if name == "vllm" else {}
        assert load_kind(name).scheduling() == kind(**slept)


def test_a_release_takes_from_its_engine_all_that_it_does_not_say() -> None:
    new, old = load_kind("vllm"), load_kind("vllm-0.6")
    assert (old.rules, old.scheduler, old.commands) == (new.rules, new.scheduler, True)
    assert old.own_time["sequence_us"] == 300 and old.own_time["gap_us"] == new.own_time["gap_us"]
    assert (new.common(H100)["async_scheduling"], old.common(H100)["async_scheduling"]) == (True, False)
    assert load_kind("sglang-eager").rules is load_kind("sglang").rules


@pytest.mark.parametrize("name", ["orca", "static"])
def test_orca_and_static_are_vllm_but_for_the_scheduler_and_have_no_commands(name: str) -> None:
    kind, vllm = load_kind(name), load_kind("vllm")
    assert (kind.rules, kind.own_time, kind.common(H100)) == (vllm.rules, vllm.own_time, vllm.common(H100))
    assert (kind.scheduler.name, kind.commands) == (name, False)


def test_a_default_may_go_by_the_memory_of_the_gpu() -> None:
    sglang = load_kind("sglang")
    tokens = [sglang.common(gib * GIB)["max_num_batched_tokens"] for gib in (15, 20, 48, 80, 160, 288)]
    assert tokens == [2048, 4096, 4096, 8192, 16384, 16384]


def test_settings_of_a_scheduler_are_given_by_name() -> None:
    kind = load_kind("vllm")
    assert kind.scheduling() == VllmScheduling(idle_sleep_us=1000)
    given = " long_prefill_token_threshold = 512 , idle_sleep_us=0"
    assert kind.scheduling(given) == VllmScheduling(long_prefill_token_threshold=512)
    assert load_kind("vllm-0.6").scheduling() == VllmScheduling()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("vllm", "long_prefil=1", "unknown setting of vllm 'long_prefil'; did you mean long_prefill_token_threshold"),
        ("vllm", "long_prefill_token_threshold", "is not of the form name=value"),
        ("vllm", "", "is not of the form name=value"),
        ("vllm", "long_prefill_token_threshold=x", "long_prefill_token_threshold is a whole number, not 'x'"),
        (
            "vllm",
            "long_prefill_token_threshold=-1",
            "--engine_settings: long_prefill_token_threshold: -1 is not a whole number from 0",
        ),
        ("vllm", "long_prefill_token_threshold=1,long_prefill_token_threshold=2", "is given twice"),
        ("orca", "long_prefill_token_threshold=1", "orca has no settings of its own"),
        *((name, "stream_interval=10", "stream_interval is not simulated") for name in ("vllm", "sglang", "trtllm")),
        ("trtllm-1.1", "host_cache_size=1000", "host_cache_size is not simulated; leave it out: KV blocks are kept on"),
        ("trtllm", "enable_partial_reuse=true", "enable_partial_reuse is not simulated"),
        ("sglang", "enable_hierarchical_cache=true", "enable_hierarchical_cache is not simulated"),
    ],
)
def test_a_setting_that_the_engine_does_not_have_is_refused_in_one_line(name: str, text: str, said: str) -> None:
    with pytest.raises(ApexError) as caught:
        load_kind(name).scheduling(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, UsageError | UnknownNameError)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("vllm", "proxy=1", "unknown part of a hand-over of vllm 'proxy'; did you mean proxy_us"),
        ("vllm", "rate_share=0", "--handover: rate_share 0 is not above 0 and at most 1"),
        ("orca", None, "--serving: how orca hands prompts over to another pool is not modelled; use vllm or sglang"),
        (
            "static",
            None,
            "--serving: how static hands prompts over to another pool is not modelled; use vllm or sglang",
        ),
        ("trtllm", None, "--serving: how trtllm hands prompts over"),
    ],
)
def test_hand_overs_that_are_not_known_are_refused_in_one_line(name: str, text: str | None, said: str) -> None:
    with pytest.raises(ApexError) as caught:
        load_kind(name).handing_over(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_engine_is_named_with_those_there_are() -> None:
    with pytest.raises(UnknownNameError, match="unknown engine 'vlm'; did you mean vllm"):
        load_kind("vlm")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('scheduler = "vllm"', 'scheduler = "v2"'),
        ('rules = "vllm"', ""),
        ("[defaults]", "[faults]"),
        ("block_size", "blocksize"),
        ('source = "vLLM 0.20.2, config/cache.py"', ""),
        ("[own_time]", "own_time = 3\n[other]"),
        ("[defaults]", "[defaults"),
    ],
)
def test_a_file_with_faults_is_refused_in_one_line(old: str, new: str, tmp_path: Path) -> None:
    for path in DATA.glob("*.toml"):
        shutil.copy(path, tmp_path)
    file = tmp_path / "vllm.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=r"vllm") as caught:
        load_kind("vllm", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_engines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file in"):
        load_kind("vllm", tmp_path)


def test_a_path_that_is_no_file_of_an_engine_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; give a name, or a file of solve"):
        load_kind(str(tmp_path))
    (file := tmp_path / "m.txt").write_text("x")
    with pytest.raises(InputError, match=r"is a file whose name does not end in \.toml; give a name"):
        load_kind(str(file))
