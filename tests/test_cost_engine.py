"""The engine's own time, and the sizes decode batches are padded to."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import OVERHEAD, SMALL, SharingScheduling, dense, latent, make_cluster, make_model, sparse

from apex_opt.cost import CostModel
from apex_opt.cost.engine import load_engine
from apex_opt.engines.kinds import DATA
from apex_opt.errors import ApexError, InputError, UnknownNameError
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import parse_plan
from apex_opt.simulator.law import TABLES, BatchLaw

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.cost.engine import EngineOverhead

MODEL = make_model((dense(), 4))
FIELDS = (
    "step_s",
    "blocking_step_s",
    "sequence_s",
    "mixed_step_s",
    "gap_s",
    "launch_s",
    "request_s",
    "client_s",
    "client_token_s",
)
RELEASES = (
    "vllm-0.12",
    "vllm-0.6",
    "sglang-eager",
    "sglang-0.5.9",
    "sglang-0.5.9-drafts",
    "trtllm-1.0",
    "trtllm-1.1",
    "trtllm-1.2",
)
ENGINES = ("vllm", "sglang", "trtllm", *RELEASES, "orca", "static")


@pytest.mark.parametrize("name", ENGINES)
def test_the_shipped_engines_have_sane_times_a_source_and_rising_sizes(name: str) -> None:
    engine = load_engine(name)
    for field in FIELDS:
        assert 0 <= getattr(engine, field) < 0.1
    assert engine.blocking_step_s >= engine.step_s > 0
    assert list(engine.captured_sizes) == sorted(set(engine.captured_sizes))
    assert bool(engine.captured_sizes) == (name != "sglang-eager")
    assert engine.kernels in ("vllm", "sglang", "trtllm")
    assert any(word in engine.source for word in ("assumed", "fitted", "measured"))


def test_the_default_engine_captures_decode_batches_up_to_512() -> None:
    engine = load_engine("vllm")
    assert (engine.captured_sizes[:4], engine.captured_sizes[-1]) == ((1, 2, 4, 8), 512)


def test_an_engine_of_another_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownNameError, match="engine 'vlm'; did you mean vllm"):
        load_engine("vlm")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [-1e-9, 10.1, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        replace(OVERHEAD, **{field: value})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"captured_tokens": -1}, "captured_tokens = -1 must be a whole number from 0 to 65536"),
        ({"captured_tokens": 10**9}, "captured_tokens = 1000000000 must be a whole number from 0 to 65536"),
        ({"captured_sizes": (1, 10**9)}, "captured sizes must be whole numbers from 1 to 65536"),
        ({"fused": ("rotary", "rotery")}, "fused names 'rotery'; known: rotary, kv write, qk norm, norm"),
        ({"kernels": "triton"}, "kernels = 'triton' must be one of vllm, sglang, trtllm"),
    ],
)
def test_a_name_or_count_that_would_do_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        replace(OVERHEAD, **changes)
    assert said in str(caught.value)


def padded(captured: tuple[int, ...], seats: int, tokens: int = 4096) -> list[int]:
    settings = EngineSettings(max_num_seqs=seats, max_num_batched_tokens=tokens)
    costs = CostModel(MODEL, make_cluster(1), settings, replace(OVERHEAD, captured_sizes=captured))
    return costs.of(parse_plan("tp1", MODEL)).tables.padded.tolist()


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


def law_of(engine: EngineOverhead, plan: str = "tp1", **gpu: Any) -> BatchLaw:
    shared = replace(SMALL, scheduler=SharingScheduling())  # by attention copies
    costs = CostModel(MODEL, make_cluster(8, **gpu), shared, engine)
    return costs.plan_cost(parse_plan(plan, MODEL)).laws[0]


KERNELS = 4 * 11  # norm, QKV, rotary, cache write, attention twice, output; norm, up, activation, down


def test_gaps_count_every_kernel_of_every_layer_and_each_stage_has_its_own() -> None:
    engine = replace(OVERHEAD, gap_s=1e-6)
    for plan, kernels in (
        ("tp1", KERNELS),
        ("tp2", KERNELS + 4 * 2),
        ("attn(dp2) ffn(dp2)", KERNELS),
        ("pp2 tp1", KERNELS // 2),
    ):
        with_it, without = law_of(engine, plan), law_of(OVERHEAD, plan)
        for name in ("decode_ns", "mixed_ns"):
            gaps = (getattr(with_it, name) - getattr(without, name))[1:]
            assert set(gaps.tolist()) <= {1000 * kernels - 1, 1000 * kernels, 1000 * kernels + 1}, (plan, name)
        for name in ("sequence_ns", "attend_ns", "chunk_ns", "context_rate", "pair_rate"):
            assert np.array_equal(getattr(with_it, name), getattr(without, name))


def test_fused_kernels_leave_no_gap_and_kernels_that_start_early_none_at_all() -> None:
    engine = replace(OVERHEAD, gap_s=1e-6)
    fused = ("rotary", "kv write")
    gaps = law_of(replace(engine, fused=fused)).decode_ns - law_of(replace(OVERHEAD, fused=fused)).decode_ns
    assert np.abs(gaps[1:] - 1000 * (KERNELS - 4 * 2)).max() <= 1
    early = (law_of(chosen, overlapped_launch=True).decode_ns for chosen in (engine, OVERHEAD))
    assert np.array_equal(*early)


def test_batches_with_prompts_wait_for_their_launches_above_what_is_captured_and_decoding_never_does() -> None:
    engine = replace(OVERHEAD, launch_s=50e-6, captured_tokens=100)
    waiting, free = law_of(engine), law_of(OVERHEAD)
    assert np.array_equal(waiting.mixed_ns[:101], free.mixed_ns[:101])
    launches = KERNELS * 50_000
    assert free.mixed_ns[101] < launches
    assert np.array_equal(waiting.mixed_ns[101:], np.maximum(free.mixed_ns[101:], launches))
    for name in TABLES:
        if name != "mixed_ns":
            assert np.array_equal(getattr(waiting, name), getattr(free, name)), name
    # A batch that takes longer than its launches does not wait.
    quick = law_of(replace(engine, launch_s=1e-6))
    assert np.array_equal(quick.mixed_ns, free.mixed_ns)


def test_without_captured_graphs_decoding_waits_for_its_launches_too() -> None:
    eager = replace(OVERHEAD, launch_s=50e-6, captured_sizes=())
    waiting, free = law_of(eager), law_of(replace(OVERHEAD, captured_sizes=()))
    launches = KERNELS * 50_000
    assert (free.decode_ns < launches).all()
    assert set(waiting.decode_ns[1:].tolist()) == {launches}
    assert waiting.decode_ns[0] == free.decode_ns[0]
    assert np.array_equal(waiting.context_rate, free.context_rate)
    quick = law_of(replace(eager, launch_s=1e-6))
    assert np.array_equal(quick.decode_ns, free.decode_ns)


@pytest.mark.parametrize(
    ("plan", "collectives"), [("attn(dp2) ffn(dp2)", 0), ("attn(dp8) ffn(tp8)", 2), ("attn(dp4,tp2) ffn(dp2,tp4)", 4)]
)
def test_prompts_on_all_copies_wait_for_launches_once_and_one_prompt_at_most_as_long_again(
    plan: str, collectives: int
) -> None:
    launches = 30_000 * (KERNELS + 4 * collectives)
    waiting, free = law_of(replace(OVERHEAD, launch_s=30e-6), plan), law_of(OVERHEAD, plan)
    for tokens in (8, 16, 30):
        even = [(tokens, tokens)] * free.copies
        assert waiting.batch_ns(even) == pytest.approx(max(free.batch_ns(even), launches), rel=0.1)
        lone = [(tokens * free.copies, tokens * free.copies)]
        assert launches <= waiting.batch_ns(lone) <= free.batch_ns(lone) + launches


@pytest.mark.parametrize("name", ENGINES)
def test_every_shipped_engine_costs_every_kind_of_model(name: str) -> None:
    engine = load_engine(name)
    for model in (MODEL, make_model((sparse(shared=768), 2)), make_model((latent(dense()), 1), (latent(sparse()), 2))):
        costs = CostModel(model, make_cluster(4), SMALL, engine, "skewed")
        for plan in ("tp1", "tp4", "attn(dp4) ffn(dp4)", "pp2 tp2"):
            for law in costs.plan_cost(parse_plan(plan, model)).laws:
                assert (law.decode_ns[1:] > 0).all()
                assert (law.mixed_ns[1:] + law.chunk_ns[1:] > 0).all()


def test_a_broken_table_of_engines_is_refused_in_one_line(tmp_path: Path) -> None:
    shipped = (DATA / "vllm.toml").read_text()
    huge = shipped.replace("[1, 2, 1]", "[1, 1000000000000, 1]", 1)
    lacks = shipped.replace("step_us = 250.0", "", 1)
    for place, text in enumerate((huge, lacks, shipped.replace("250.0", '"soon"', 1), "[vllm\n", "vllm = 3\n", "\xff")):
        (folder := tmp_path / f"{place}").mkdir()
        (folder / "vllm.toml").write_bytes(text.encode("latin-1"))
        with pytest.raises(ApexError) as caught:
            load_engine("vllm", folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(ApexError):
        load_engine("vllm", tmp_path / "absent")
