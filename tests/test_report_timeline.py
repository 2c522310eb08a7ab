"""apex_opt.report.timeline: every batch at its place and time, counters that add up, and a file that is whole."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from cli_cases import run
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import LOOPS, TRAFFIC, Case, Loop, cases, linear, requests

from apex_opt.cost.engine import load_engine
from apex_opt.errors import InputError
from apex_opt.plans.engine import EngineSettings
from apex_opt.report.timeline import timeline_events, write_timeline
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from apex_opt.simulator import Outcome

Events = list[dict[str, Any]]


def events_of(case: Case, outcome: Outcome) -> Events:
    return list(timeline_events(outcome, case.laws, case.settings))


def nanoseconds(microseconds: float) -> int:
    return round(microseconds * 1000)


def slices(events: Events, replica: int, stage: int) -> Events:
    return [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (replica, stage)]


def counted(events: Events, replica: int, name: str) -> list[tuple[int, int]]:
    """Times and values of a counter."""
    return [
        (nanoseconds(e["ts"]), *e["args"].values())
        for e in events
        if e["ph"] == "C" and e["pid"] == replica and e["name"] == name
    ]


def any_traffic(loop: Loop) -> st.SearchStrategy[Case]:
    return st.one_of([cases(loop, traffic, busy=True) for traffic in TRAFFIC])


@pytest.mark.parametrize("loop", LOOPS)
def test_batches_follow_each_other_on_every_stage_and_fill_its_busy_time(loop: Loop) -> None:
    @settings(max_examples=30)
    @given(any_traffic(loop))
    def check(case: Case) -> None:
        outcome = case.run()
        assert outcome.steps is not None and outcome.steps_per_replica is not None
        events, stages = events_of(case, outcome), range(len(case.laws))
        position = 0
        for replica, count in enumerate(outcome.steps_per_replica):
            steps = outcome.steps[position : position + count]
            position += count
            shown = [slices(events, replica, stage) for stage in stages]
            for stage in stages:
                assert [e["args"]["batch"] for e in shown[stage]] == list(range(count))
                spans = [(nanoseconds(e["ts"]), nanoseconds(e["ts"]) + nanoseconds(e["dur"])) for e in shown[stage]]
                assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
                assert sum(end - start for start, end in spans) == outcome.busy_ns[replica, stage]
            for number, (start, end, rows, lost) in enumerate(steps):
                first, last = shown[0][number], shown[-1][number]
                assert nanoseconds(first["ts"]) >= start
                assert nanoseconds(last["ts"]) + nanoseconds(last["dur"]) == end
                tokens = sum(c for _, c, _ in rows)
                for stage in stages:
                    facts = shown[stage][number]["args"]
                    assert facts["sequences"] == len(rows) and facts["tokens"] == tokens
                    assert facts.get("preempted", []) == lost
                    if stage:
                        # Activations are on their way in between.
                        before = shown[stage - 1][number]
                        left = nanoseconds(before["ts"]) + nanoseconds(before["dur"])
                        gap = int(case.laws[stage - 1].transfer_ns[tokens])
                        assert nanoseconds(shown[stage][number]["ts"]) >= left + gap
        assert position == len(outcome.steps)

    check()


@pytest.mark.parametrize("loop", LOOPS)
def test_counters_are_those_of_the_log_never_negative_and_nobody_waits_in_the_end(loop: Loop) -> None:
    @settings(max_examples=30)
    @given(any_traffic(loop))
    def check(case: Case) -> None:
        outcome = case.run()
        assert outcome.steps is not None and outcome.steps_per_replica is not None
        arrival, finish = outcome.arrival_ns.tolist(), outcome.finish_ns.tolist()
        events, size = events_of(case, outcome), case.settings.block_size
        hidden = outcome.preemptions - sum(len(lost) for _, _, _, lost in outcome.steps)  # in empty batches
        position = 0
        for replica, count in enumerate(outcome.steps_per_replica):
            steps = outcome.steps[position : position + count]
            position += count
            mine = {i for _, _, rows, _ in steps for i, _, _ in rows}
            waiting, held = counted(events, replica, "waiting"), counted(events, replica, "KV blocks")
            times = [step[0] for step in steps] + [max((step[1] for step in steps), default=0)] * bool(steps)
            assert [time for time, _ in waiting] == [time for time, _ in held] == times
            assert all(value >= 0 for _, value in waiting + held)
            last: dict[int, int] = {}
            for number, (start, _, rows, lost) in enumerate(steps):
                for i in lost:
                    del last[i]
                last |= {i: computed for i, _, computed in rows}
                running = {i for i in last if finish[i] > start}
                there = {i for i in mine if arrival[i] <= start < finish[i]}
                assert waiting[number][1] == len(there - running)
                assert held[number][1] == sum(ceil_div(last[i], size) for i in running)
                if not hidden and not case.settings.prefix_caching:
                    assert held[number][1] <= case.blocks
            assert [value for _, value in waiting[-1:] + held[-1:]] == [0, 0] * bool(steps)

    check()


ENGINE = EngineSettings(
    max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, block_size=4, async_scheduling=False
)


def case(rows: list[tuple[int, int, int]], stages: int = 1, **changes: Any) -> Case:
    law = linear(ENGINE, 1500, 100, transfer_ns=[700] * 65)
    return Case(settings=ENGINE, blocks=99, laws=(law,) * stages, trace=requests(rows), **changes)


def test_a_run_by_hand() -> None:
    """Times in microseconds; a prompt of eight tokens, then one token."""
    used = case([(1000, 8, 2)], stages=2)
    names = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "replica 0"}},
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 0, "args": {"name": "stage 0"}},
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": 1, "args": {"name": "stage 1"}},
    ]
    prefill = {"batch": 0, "sequences": 1, "tokens": 8, "prompt tokens": 8}
    decode = {"batch": 1, "sequences": 1, "tokens": 1, "prompt tokens": 0}
    spans = [
        {"ph": "X", "name": "100% prefill", "pid": 0, "tid": 0, "ts": 1.0, "dur": 2.3, "args": prefill},
        {"ph": "X", "name": "100% prefill", "pid": 0, "tid": 1, "ts": 4.0, "dur": 2.3, "args": prefill},
        {"ph": "X", "name": "decode", "pid": 0, "tid": 0, "ts": 6.3, "dur": 1.6, "args": decode},
        {"ph": "X", "name": "decode", "pid": 0, "tid": 1, "ts": 8.6, "dur": 1.6, "args": decode},
    ]
    counters = [
        {"ph": "C", "name": name, "pid": 0, "ts": ts, "args": args}
        for ts, blocks in ((1.0, 2), (6.3, 3), (10.2, 0))
        for name, args in (("waiting", {"sequences": 0}), ("KV blocks", {"held": blocks}))
    ]
    assert events_of(used, used.run()) == names + spans + counters


@pytest.mark.parametrize(
    ("decoding", "prompt", "name"),
    [
        (0, 8, "100% prefill"),
        (0, 1, "decode"),  # a prompt of one token cannot be told apart
        (6, 2, "25% prefill"),
        (6, 6, "50% prefill"),
        (2, 6, "75% prefill"),
        (1, 40, "100% prefill"),
        (7, 2, "25% prefill"),
        (5, 0, "decode"),
    ],
)
def test_batches_are_named_by_their_share_of_prompt_tokens(decoding: int, prompt: int, name: str) -> None:
    """Sequences that decode since before, and a prompt that comes in their second batch."""
    rows = [(0, 1, 3)] * decoding + [(1, prompt, 1)] * bool(prompt)
    used = case(rows)
    at = 1 if decoding else 0
    batch = slices(events_of(used, used.run()), 0, 0)[at]
    assert batch["args"]["tokens"] == decoding + prompt
    assert batch["name"] == name


def test_a_little_prefill_is_not_shown_as_none() -> None:
    engine = replace(ENGINE, max_num_seqs=40)
    used = Case(settings=engine, blocks=99, laws=(linear(engine, 10),), trace=requests([(0, 1, 3)] * 30 + [(1, 2, 1)]))
    assert [e["name"] for e in slices(events_of(used, used.run()), 0, 0)] == ["decode", "25% prefill", "decode"]


def test_replicas_are_processes_and_stages_are_threads() -> None:
    used = case([(1000 * i, 5, 3) for i in range(7)], stages=2, replicas=3)
    outcome = used.run()
    events = events_of(used, outcome)
    named = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M"}
    expected = {(r, None): f"replica {r}" for r in range(3)} | {
        (r, s): f"stage {s}" for r in range(3) for s in range(2)
    }
    assert named == expected
    assert Counter(e["pid"] for e in events if e["ph"] == "X" and e["tid"] == 0) == Counter(
        dict(enumerate(outcome.steps_per_replica or []))
    )
    assert {e["pid"] for e in events} == {0, 1, 2}


def test_preempted_requests_are_named_in_the_batch_that_took_their_blocks() -> None:
    used = case([(0, 4, 3), (0, 4, 2)]).having(blocks=2)
    outcome = used.run()
    assert outcome.preemptions == 1
    shown = slices(events_of(used, outcome), 0, 0)
    assert [e["args"].get("preempted") for e in shown] == [None, [1], None, None]
    assert [value for _, value in counted(events_of(used, outcome), 0, "waiting")] == [0, 1, 1, 0, 0]
    assert [value for _, value in counted(events_of(used, outcome), 0, "KV blocks")] == [2, 2, 2, 2, 0]


def test_every_kind_of_event_has_what_the_format_asks_for() -> None:
    used = case([(1000 * i, 5, 3) for i in range(7)], stages=2, replicas=2)
    for event in events_of(used, used.run()):
        assert {"ph", "name", "pid", "args"} <= event.keys()
        assert event["ph"] in "MXC" and len(event["ph"]) == 1
        if event["ph"] != "M":
            assert isinstance(event["ts"], float) and event["ts"] >= 0
        if event["ph"] == "X":
            assert isinstance(event["dur"], float) and event["dur"] >= 0 and "tid" in event


# The file.


def test_the_file_is_json_with_exactly_the_events(tmp_path: Path) -> None:
    used = case([(1000 * i, 5, 3) for i in range(7)], replicas=2)
    outcome, path = used.run(), tmp_path / "run.json"
    write_timeline(path, outcome, used.laws, used.settings)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document == {"displayTimeUnit": "ms", "traceEvents": events_of(used, outcome)}
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_file_that_is_there_is_replaced_also_behind_a_link(tmp_path: Path) -> None:
    used = case([(0, 5, 3)])
    path, link = tmp_path / "run.json", tmp_path / "link"
    path.write_text("old")
    link.symlink_to(path)
    write_timeline(link, used.run(), used.laws, used.settings)
    assert link.is_symlink() and json.loads(path.read_text())["traceEvents"]
    assert sorted(os.listdir(tmp_path)) == ["link", "run.json"]


def not_a_folder(folder: Path) -> Path:
    (folder / "file").write_text("here")
    return folder / "file" / "run.json"


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


PLACES: dict[str, Callable[[Path], Path]] = {
    "a folder": lambda folder: folder,
    "no such folder": lambda folder: folder / "none" / "run.json",
    "a file for a folder": not_a_folder,
    "the root": lambda folder: type(folder)("/"),
    "here": lambda folder: type(folder)("."),
    "a name too long": lambda folder: folder / ("x" * 300),
    "a null character": lambda folder: folder / "a\0b",
    "a pipe": a_pipe,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be_written_is_refused_in_one_line_and_left_as_it_was(place: str, tmp_path: Path) -> None:
    used = case([(0, 5, 3)])
    path = PLACES[place](tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(
        InputError, match=r"^timeline .*: cannot be written \(.+\); name a file in a folder that can$"
    ) as caught:
        write_timeline(path, used.run(), used.laws, used.settings)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_device_is_neither_written_nor_replaced(tmp_path: Path) -> None:
    null = type(tmp_path)(os.devnull)
    with pytest.raises(InputError, match="not a regular file"):
        write_timeline(null, case([(0, 5, 3)]).run(), case([(0, 5, 3)]).laws, case([(0, 5, 3)]).settings)
    assert null.is_char_device()


def test_a_run_that_cannot_be_shown_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    """Half way through: a batch of more tokens than the law has entries for."""
    used, path = case([(0, 5, 3), (9000, 20, 1)]), tmp_path / "run.json"
    path.write_text("old")
    narrow = linear(replace(ENGINE, max_num_batched_tokens=8), 1)
    with pytest.raises(IndexError):
        write_timeline(path, used.run(), [narrow], used.settings)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]


# The command.


SIMULATE = ("simulate", "--plan", "tp1", "--model", "llama-3.1-8b", "--trace=poisson:rate=20,n=30,prompt=300,output=9")


def test_simulate_writes_the_timeline_of_the_run_it_reports(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    code, out, _ = run(*SIMULATE, "--timeline", str(path), "--format=json")
    assert code == 0
    answer = json.loads(out)
    assert os.listdir(tmp_path) == ["run.json"]
    events = json.loads(path.read_text())["traceEvents"]
    batches = slices(events, 0, 0)
    assert [e["args"]["batch"] for e in batches] == list(range(len(batches)))
    assert sum(e["args"]["tokens"] for e in batches) == 30 * (300 + 9 - 1)
    assert sum(e["args"]["prompt tokens"] for e in batches) == 30 * 300
    assert {e["name"] for e in batches} >= {"decode", "100% prefill"}
    # From the first arrival to the last token, which then leaves the host.
    last = max(nanoseconds(e["ts"]) + nanoseconds(e["dur"]) for e in batches)
    first = min(nanoseconds(e["ts"]) for e in batches)
    outside_s = load_engine("vllm").request_s
    assert (last - first) / 1e9 + outside_s == pytest.approx(answer["best"]["metrics"]["makespan_s"], rel=1e-6)


def test_simulate_with_replicas_and_stages_shows_each(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    words = [word if word != "tp1" else "dp2 pp2 tp1" for word in SIMULATE]
    assert run(*words, "--cluster=4xh100-sxm", "--timeline", str(path))[0] == 0
    events = json.loads(path.read_text())["traceEvents"]
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == {(r, s) for r in range(2) for s in range(2)}


def test_simulate_refuses_a_place_that_cannot_be_written_in_one_line(tmp_path: Path) -> None:
    code, out, err = run(*SIMULATE, "--timeline", str(tmp_path / "none" / "run.json"))
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "cannot be written (No such file or directory)" in lines[0]
    assert os.listdir(tmp_path) == []


def test_only_simulate_takes_a_timeline(tmp_path: Path) -> None:
    code, _, err = run("plan", f"--timeline={tmp_path / 'run.json'}")
    assert code == 2 and "--timeline" in err
