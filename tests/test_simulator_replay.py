"""apex_opt.simulator.replay: recorded batches come out batch for batch, and bad cases are refused."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from golden.condense import TARGET, digest, read_recorded
from simulator_cases import IMPLEMENTATIONS, REPLAYED, assert_recorded

from apex_opt.errors import ApexError, CapacityError, InputError, UnknownNameError, UsageError
from apex_opt.simulator import Replay, replay, replay_case

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.simulator.api import Implementation

RECORDED: dict[str, dict[str, Any]] = json.loads(gzip.decompress(TARGET.read_bytes()))
SMALL: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "max_model_len": 32,
    "chunked_prefill": True,
    "long_prefill_token_threshold": 0,
    "block_size": 4,
    "num_gpu_blocks": 9,
    "prefix_caching": False,
    "async_scheduling": False,
    "stages": 1,
    "stage_weight": [1],
    "law_us": [10, 1, 0],
}


def test_the_recording_has_every_kind_of_engine_loop() -> None:
    configs = [case["config"] for case in RECORDED.values()]
    assert len(configs) == 216
    assert sum(c["async_scheduling"] and c["stages"] > 1 for c in configs) >= 45
    assert {c["stages"] for c in configs} >= {1, 2, 4}
    assert sum(case["preemptions"] > 0 for case in RECORDED.values()) >= 40
    assert sum(c["long_prefill_token_threshold"] > 0 for c in configs) >= 20


@REPLAYED
def test_recorded_batches_come_out_batch_for_batch(implementation: Implementation, every: int) -> None:
    for name in list(RECORDED)[::every]:
        case = RECORDED[name]
        assert_recorded(replay(case["config"], case["trace"], implementation), case, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_case_comes_out_with_every_recorded_key_and_a_foreign_one_is_refused(implementation: Implementation) -> None:
    case = RECORDED["memory_thrash"]
    found = json.loads(json.dumps(replay_case("plain", case, implementation)))
    assert digest(found.pop("steps")) == case["batches_sha256"]
    assert found == {key: value for key, value in case.items() if key not in ("config", "trace")}
    with pytest.raises(UnknownNameError, match="unknown kind of recording 'plane'; did you mean plain"):
        replay_case("plane", case, implementation)
    with pytest.raises(UsageError, match="a case of kind plain holds config, trace; missing: config"):
        replay_case("plain", {"trace": []}, implementation)


@pytest.fixture(scope="module")
def full(shared: Path) -> dict[str, dict[str, Any]]:
    """The recording with all batches."""
    return read_recorded(shared / "scheduler-golden")


@pytest.mark.nightly
@pytest.mark.data
def test_condensed_file_is_the_recording_without_its_batches(full: dict[str, dict[str, Any]]) -> None:
    assert full.keys() == RECORDED.keys()
    for name, case in full.items():
        assert {key: value for key, value in case.items() if key != "steps"} == RECORDED[name], name
        assert digest(case["steps"]) == case["batches_sha256"], name


@pytest.mark.nightly
@pytest.mark.data
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_first_batch_that_differs_from_the_full_recording(
    full: dict[str, dict[str, Any]], implementation: Implementation
) -> None:
    for name, case in full.items():
        ours = replay(case["config"], case["trace"], implementation).steps
        for number, (got, recorded) in enumerate(zip(ours, case["steps"], strict=False)):
            assert got == recorded, f"{name}: batch {number}"
        assert len(ours) == len(case["steps"]), name


# Orders and errors.


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["memory_tight", "async_tight", "random-007"])
def test_requests_keep_their_ids_where_a_trace_is_not_sorted(name: str, implementation: Implementation) -> None:
    """Reversed, with the order among equal arrivals kept, ids are all that changes."""
    case = RECORDED[name]
    trace = case["trace"]
    order = sorted(range(len(trace)), key=lambda i: -trace[i][0])
    assert [trace[i] for i in order] != trace
    result = replay(case["config"], [trace[i] for i in order], implementation)
    assert result.first_token_us == [case["first_token_us"][i] for i in order]
    assert result.finish_us == [case["finish_us"][i] for i in order]
    original = [
        [start, end, [[order[i], c, held] for i, c, held in rows], sorted(order[i] for i in lost)]
        for start, end, rows, lost in result.steps
    ]
    assert digest(original) == case["batches_sha256"]


def test_a_replay_is_json_of_plain_integers() -> None:
    result = replay(SMALL, [[0, 5, 3]])
    assert json.loads(json.dumps(result.steps)) == result.steps
    assert result == Replay(
        steps=[[0, 15, [[0, 5, 5]], []], [15, 26, [[0, 1, 6]], []], [26, 37, [[0, 1, 7]], []]],
        first_token_us=[15],
        finish_us=[37],
        preemptions=0,
    )


def test_the_one_reserved_block_is_never_handed_out() -> None:
    """8 blocks of 4 hold a request of 32 tokens, the last of which is never computed; 7 do not."""
    assert replay(SMALL | {"num_gpu_blocks": 9}, [[0, 16, 16]]).preemptions == 0
    with pytest.raises(CapacityError, match="need 8 KV blocks of 4, the cache has 7"):
        replay(SMALL | {"num_gpu_blocks": 8}, [[0, 16, 16]])


def test_stages_and_weights_may_be_left_out() -> None:
    config = {key: value for key, value in SMALL.items() if key not in ("stages", "stage_weight", "prefix_caching")}
    trace = [[0, 5, 3], [3, 20, 9]]
    assert replay(config, trace) == replay(SMALL, trace)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("changes", "trace", "error", "message"),
    [
        ({"stages": 2}, [[0, 5, 3]], UsageError, "1 stage weights for 2 stages"),
        ({"stage_weight": [1, 2]}, [[0, 5, 3]], UsageError, "2 stage weights for 1 stages"),
        ({"max_num_seqs": 0}, [[0, 5, 3]], UsageError, "max_num_seqs: 0"),
        ({"max_num_batched_tokens": 3}, [[0, 5, 3]], UsageError, "max_num_batched_tokens 3 is below max_num_seqs 4"),
        ({"chunked_prefill": False}, [[0, 5, 3]], UsageError, "a longer prompt would never be scheduled"),
        ({}, [[0, 5, 3], [0, 32, 1]], CapacityError, "request 1: a prompt of 32 tokens.*max_model_len 32"),
        ({"num_gpu_blocks": 4}, [[0, 5, 3], [9, 9, 5]], CapacityError, "request 1: 9 prompt .* need 4 .* has 3; use"),
        ({}, [], InputError, "0 requests"),
        ({}, [[0, 0, 3]], InputError, "row 1: prompt 0 is outside"),
        ({}, [[0, 5, 3], [0, 5, 0]], InputError, "row 2: output 0 is outside"),
        ({}, [[-1, 5, 3]], InputError, "arrival_ns -1000 is outside"),
    ],
)
def test_cases_no_engine_accepts_are_refused_in_one_line(
    changes: dict[str, Any], trace: list[Any], error: type[ApexError], message: str, implementation: Implementation
) -> None:
    with pytest.raises(error, match=message) as caught:
        replay(SMALL | changes, trace, implementation)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["max_num_seqs", "block_size", "num_gpu_blocks", "law_us", "async_scheduling"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(UsageError, match=f"config: missing {key}$"):
        replay({k: v for k, v in SMALL.items() if k != key}, [[0, 5, 3]])


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(UsageError, match=r"missing max_num_seqs, .*, num_gpu_blocks, law_us$"):
        replay({}, [[0, 5, 3]])


# The same code without the compiler, and with every index checked.

REPLAY = """
import gzip, json, sys
from pathlib import Path
from apex_opt.simulator import replay
recorded = json.loads(gzip.decompress(Path(sys.argv[1]).read_bytes()))
results = {}
for name in sys.argv[2:]:
    result = replay(recorded[name]["config"], recorded[name]["trace"])
    results[name] = [result.steps, result.first_token_us, result.finish_us, result.preemptions]
json.dump(results, sys.stdout)
"""


def replay_in_subprocess(names: list[str], environment: dict[str, str]) -> None:
    """Replay recorded cases in a fresh interpreter and compare what comes out."""
    done = subprocess.run(
        [sys.executable, "-c", REPLAY, str(TARGET), *names],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results.keys() == set(names)
    for name, (steps, first, finish, preemptions) in results.items():
        assert_recorded(
            Replay(steps=steps, first_token_us=first, finish_us=finish, preemptions=preemptions), RECORDED[name], name
        )


def one_of_each() -> list[str]:
    """Per kind of engine loop, the two shortest random cases and the shortest with preemptions."""
    chosen: list[str] = []
    names = sorted((n for n in RECORDED if n.startswith("random-")), key=lambda n: int(RECORDED[n]["batches"]))
    for asynchronous in (False, True):
        for pipelined in (False, True):
            alike = [
                name
                for name in names
                if RECORDED[name]["config"]["async_scheduling"] is asynchronous
                and (RECORDED[name]["config"]["stages"] > 1) is pipelined
            ]
            chosen += alike[:2] + [name for name in alike[2:] if RECORDED[name]["preemptions"]][:1]
    return chosen


@pytest.mark.slow
def test_kernel_replays_the_recording_as_plain_python() -> None:
    names = one_of_each()
    assert len(names) == 12
    replay_in_subprocess(names, {"NUMBA_DISABLE_JIT": "1"})


@pytest.mark.nightly
def test_kernel_replays_the_recording_with_every_index_checked(tmp_path: Path) -> None:
    names = [name for name in RECORDED if name.startswith("random-")]
    replay_in_subprocess(names, {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (None, "a case is a mapping, got 'None'"),
        ({"config": None}, "config must be a mapping, got 'None'"),
        ({"config": SMALL | {"async_scheduling": 2}}, "config.async_scheduling must be true or false, got '2'"),
        ({"config": SMALL | {"chunked_prefill": "false"}}, "chunked_prefill must be true or false, got 'false'"),
        ({"config": SMALL | {"max_num_seqs": True}}, "config.max_num_seqs must be a whole number, got 'True'"),
        ({"config": SMALL | {"max_model_len": 10**30}}, "config.max_model_len must be below"),
        ({"config": SMALL | {"stage_weight": None}}, "config.stage_weight must be a list, got 'None'"),
        ({"trace": 5}, "trace must be a list with a row for each request, got '5'"),
        ({"trace": [[0, 5, 3], None]}, "trace: row 1 must be a list of whole numbers"),
        ({"trace": [[0, 5, 3], [-1, 5, 3]]}, "trace: row 1 must be a list of whole numbers"),
        ({"accept": [[1], ["1"]]}, "accept: row 1 must be a list of whole numbers"),
    ],
)
def test_a_case_of_another_form_is_refused_by_the_name_of_its_entry(
    changed: dict[str, Any] | None, message: str, implementation: Implementation
) -> None:
    case: Any = changed if changed is None else {"config": SMALL, "trace": [[0, 5, 3]]} | changed
    with pytest.raises(UsageError, match=message):
        replay_case("plain", case, implementation)
