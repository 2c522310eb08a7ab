"""Bounds of phases that share a GPU: two machines, each slower while both are at work."""

from __future__ import annotations

import pytest
from simulator_cases import linear, requests

from apex_opt.plans.engine import EngineSettings
from apex_opt.search.bounds import StageFloor
from apex_opt.search.bounds.load import Load, works_ns
from apex_opt.search.bounds.phases import Side
from apex_opt.simulator.api import run_phases
from apex_opt.simulator.phases import SCALE, Multiplexing, Phases
from apex_opt.simulator.pools import EnginePool
from apex_opt.units import NS_PER_S


def test_weights_are_what_no_second_can_exceed() -> None:
    """Whatever mixture of paces there is, weighted work is done no faster than time passes."""
    for phases in (
        Phases(prefill_share=50, decode_share=50),
        Phases(prefill_share=80, decode_share=100),
        Phases(prefill_share=30, decode_share=40),
        Multiplexing(divisions=((112, 20), (88, 44), (72, 60)), layers=4),
    ):
        for preempts in (False, True):
            for u, v in Side.of(phases, preempts=preempts).weights:
                assert u >= 0 and v >= 0 and (v <= u or not preempts)
                assert u <= phases.alone.prefill / SCALE + 1e-12 and v <= phases.alone.decode / SCALE + 1e-12
                for p, d in phases.together:
                    assert u * SCALE / p + v * SCALE / d <= 1 + 1e-12


def test_shares_of_half_a_gpu_each_are_two_machines() -> None:
    side = Side.of(Phases(prefill_share=50, decode_share=50), preempts=False)
    assert side.weights == ((0.0, 1.62), (2.0, 0.0)) and (side.first, side.later) == (20_000, 16_200)
    assert Side.of(Phases(prefill_share=50, decode_share=50), preempts=True).later == 16_200
    assert Side.of(Phases(prefill_share=100, decode_share=60), preempts=True).later == SCALE


@pytest.mark.parametrize("shares", [(50, 50), (80, 100), (40, 90)])
def test_a_run_is_as_long_as_its_bound_where_both_phases_are_at_work_throughout(shares: tuple[int, int]) -> None:
    settings = EngineSettings(max_num_seqs=64, max_num_batched_tokens=128, max_model_len=4_096, async_scheduling=False)
    prefill, decode = shares
    phases = Phases(prefill_share=prefill, decode_share=decode)
    # As much of the one as of the other: by 1,000 tokens of prompts come so many of answers that both take as long.
    ratio = phases.together[0].prefill / phases.together[0].decode
    output = [1 + round(100 * ratio)] * 40
    trace, law = requests([(0, 100, tokens) for tokens in output]), linear(settings, 0, 1_000)
    pool = EnginePool(settings=settings, blocks=10_000, laws=[law])
    load = Load.of(
        settings, StageFloor.of(law), 1, trace, 10_000, ["mean", "p95"], side=Side.of(phases, preempts=False)
    )
    run = run_phases(pool, phases, trace)
    ran = run.makespan_ns / NS_PER_S
    first, later = (float(work.sum()) / NS_PER_S for work in works_ns(settings, StageFloor.of(law), trace))
    apart = (first * phases.alone.prefill + later * phases.alone.decode) / SCALE
    assert 0.9 * ran < load.total_s <= ran < apart
    assert load.first_s["mean"] <= float((run.first_token_ns - trace.arrival_ns).mean()) / NS_PER_S
