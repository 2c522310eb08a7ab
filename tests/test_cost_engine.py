"""The engine's own time, and the sizes decode batches are padded to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from plan_cases import OVERHEAD, SMALL, dense, make_cluster, make_model

from apex_opt.cost import CostModel
from apex_opt.cost.engine import EngineOverhead, load_engine
from apex_opt.errors import ApexError, InputError, UnknownNameError
from apex_opt.plan.engine import EngineSettings
from apex_opt.plan.plan import parse_plan

if TYPE_CHECKING:
    from pathlib import Path

MODEL = make_model((dense(), 4))
FIELDS = ("step_s", "blocking_step_s", "sequence_s", "mixed_step_s", "request_s")


def test_the_shipped_engine_has_sane_times_a_source_and_rising_sizes() -> None:
    engine = load_engine("vllm")
    for field in FIELDS:
        assert 0 < getattr(engine, field) < 0.1
    assert engine.blocking_step_s >= engine.step_s
    assert list(engine.captured_sizes) == sorted(set(engine.captured_sizes))
    assert (engine.captured_sizes[:4], engine.captured_sizes[-1]) == ((1, 2, 4, 8), 512)
    assert engine.source


def test_an_engine_of_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownNameError, match="engine 'vlm'; did you mean vllm"):
        load_engine("vlm")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(field: str, value: float) -> None:
    figures: dict[str, Any] = dict.fromkeys(FIELDS, 1e-6)
    with pytest.raises(InputError, match=field):
        EngineOverhead(name="x", captured_sizes=(), source="", **(figures | {field: value}))


def padded(captured: tuple[int, ...], seats: int, tokens: int = 4096) -> list[int]:
    settings = EngineSettings(max_num_seqs=seats, max_num_batched_tokens=tokens)
    costs = CostModel(MODEL, make_cluster(1), settings, replace(OVERHEAD, captured_sizes=captured))
    return costs.tables.padded.tolist()


def test_a_decode_batch_is_padded_to_the_next_captured_size_and_beyond_the_largest_to_itself() -> None:
    assert padded((1, 2, 4, 8), 10) == [0, 1, 2, 4, 4, 8, 8, 8, 8, 9, 10]
    assert padded((), 3) == [0, 1, 2, 3]
    assert padded((8,), 8, tokens=8) == [0] + [8] * 8
    assert padded((16,), 8, tokens=10) == [0] + [10] * 8  # no batch is larger than the budget
    sizes = load_engine("vllm").captured_sizes
    full = padded(sizes, 1024)
    assert [full[n] for n in (1, 3, 9, 255, 257, 512, 513, 1024)] == [1, 4, 16, 256, 272, 512, 513, 1024]


def test_the_law_carries_the_engine_time_of_its_kind_of_batch() -> None:
    settings = {"async": SMALL, "sync": replace(SMALL, async_scheduling=False)}
    base = replace(OVERHEAD, step_s=0.0, blocking_step_s=0.0, sequence_s=0.0, mixed_step_s=0.0)

    def law(kind: str, plan: str, **times: float) -> Any:
        costs = CostModel(MODEL, make_cluster(2), settings[kind], replace(base, **times))
        return costs.plan_cost(parse_plan(plan, MODEL)).laws[0]

    for kind, plan, field in (
        ("async", "tp1", "step_s"),
        ("sync", "tp1", "blocking_step_s"),
        ("sync", "pp2", "step_s"),
    ):
        without, with_it = law(kind, plan), law(kind, plan, **{field: 1e-3})
        assert set((with_it.decode_ns - without.decode_ns)[1:].tolist()) == {10**6}
        assert set((with_it.mixed_ns - without.mixed_ns)[1:].tolist()) == {10**6}
    without, with_it = law("async", "tp1"), law("async", "tp1", sequence_s=1e-6, mixed_step_s=1e-3)
    assert (with_it.decode_ns - without.decode_ns).tolist() == [1000 * n for n in range(SMALL.max_num_seqs + 1)]
    assert (with_it.sequence_ns - without.sequence_ns).tolist() == [1000 * n for n in range(SMALL.max_num_seqs + 1)]
    assert set((with_it.mixed_ns - without.mixed_ns)[1:].tolist()) == {10**6}
    assert with_it.decode_ns[0] == without.decode_ns[0]


def test_a_broken_table_of_engines_is_refused_in_one_line(tmp_path: Path) -> None:
    for text in ("[vllm]\nstep_us = 1.0\n", "[vllm\n", "vllm = 3\n", "\xff"):
        path = tmp_path / f"{abs(hash(text))}.toml"
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ApexError) as caught:
            load_engine("vllm", path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ApexError):
        load_engine("vllm", tmp_path / "absent.toml")
