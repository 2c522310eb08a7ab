"""Programs of deployments: what fits together is what counting finds, and the closing proof finds what is left."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from formulations.deployment import beats, fitting


@pytest.mark.parametrize("seed", range(12))
def test_the_pools_that_fit_together_are_those_that_counting_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    devices = [rng.integers(1, 9, rng.integers(0 if seed % 4 == 0 else 1, 7)).tolist() for _ in range(2 + seed % 2)]
    most = int(rng.integers(1, 20))
    assert fitting(devices, most) == sum(sum(sizes) <= most for sizes in product(*devices))


@pytest.mark.parametrize("seed", range(12))
def test_the_closing_proof_finds_a_plan_that_could_win_exactly_where_one_is_left(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sign = -1 if seed % 3 == 0 else 1
    rows = [
        (cut, count, float(rng.choice([sign * rng.uniform(0.5, 2), float("inf")], p=[0.9, 0.1])))
        for cut in range(5)
        for count in range(1, 4)
    ]
    cost = sign * 1.2
    better = {(cut, count) for cut, count, bound in rows if bound < cost}
    assert beats(rows, better, cost) is None
    for left in sorted(better)[:4]:
        assert beats(rows, better - {left}, cost) == left
    assert beats([], (), cost) is None


@pytest.mark.parametrize("seed", range(8))
def test_the_closing_proof_orders_costs_exactly_however_far_apart_or_near_they_are(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = float(rng.uniform(0.1, 10) * 10.0 ** rng.integers(-12, 20)) * (-1 if seed % 2 else 1)
    near = [cost, cost, float(np.nextafter(cost, -np.inf)), float(np.nextafter(cost, np.inf))]
    bounds = [*near, -1e300, 0.0, 1e300, float("inf"), -float("inf")]
    rows = [(cut, 1 + int(rng.integers(3)), float(bound)) for cut, bound in enumerate(rng.permutation(bounds))]
    better = {(cut, count) for cut, count, bound in rows if bound < cost}
    assert beats(rows, better, cost) is None
    for left in better:
        assert beats(rows, better - {left}, cost) == left
