"""Time to place a plan, from 8 to 1,024 GPUs of which every ninth is taken, on one core."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from benchmarks.problems import problem
from benchmarks.registry import Benchmark, best_of, one_core

_SPINE = 4
"""Nodes below a leaf switch."""


def benchmarks() -> tuple[Benchmark, ...]:
    """Figures of this module."""
    preset = "server-8xl40s"
    said = f"nodes of {preset}, every ninth GPU busy, {_SPINE} nodes on a leaf, 2:1"
    found = [
        Benchmark(
            name=f"place_{gpus}_gpus_s",
            unit="s",
            about=f"as many replicas of pp2 tp2 as fit on {gpus} GPUs ({said}): tree, program and proof, on one core",
            measure=partial(place, preset, gpus // 8),
        )
        for gpus in (8, 64, 256, 1024)
    ]
    return tuple(found)


def place(preset: str, nodes: int, quick: bool) -> float:
    """Best of three after a warm-up."""
    from apex_opt.cluster import Composition, Tree, load_wiring
    from apex_opt.plans.plan import parse_plan
    from apex_opt.search.facts import Facts
    from formulations.placement import place_plan

    asked = problem("llama-3.1-8b", preset, "chat")
    wiring = load_wiring(preset)
    assert isinstance(wiring, Composition)
    nodes = 1 if quick else nodes
    network = replace(wiring.network, nodes_per_leaf=_SPINE, oversubscription=2.0)
    wiring = replace(wiring, nodes=((nodes, wiring.nodes[0][1]),), network=network)
    busy = {f"node{index // 8}:{index % 8}" for index in range(0, 8 * nodes, 9)}
    replicas = (8 * nodes - len(busy)) // 4
    plan = parse_plan(f"dp{replicas} pp2 tp2", asked.model)

    def run() -> None:
        tree = Tree.of(wiring, busy)
        offered = asked.offering(cluster=replace(asked.cluster, nodes=nodes), tree=tree)
        assert place_plan(Facts(offered).layouts, plan).optimal

    with one_core():
        run()
        return best_of(1 if quick else 3, run)
