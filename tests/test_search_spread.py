"""A search spread over workers answers what it answers alone, in whatever order they end and however many there are."""

from __future__ import annotations

import json
import os
import pickle
import signal
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from cli_cases import run
from plan_cases import random_problem
from search_cases import ROWS, SPACE, answer_of, problem_of
from test_search_shapes_disaggregated import over_two, question

from apex_opt.engines.kinds import ENGINES
from apex_opt.errors import CapacityError, InputError
from apex_opt.figures import load_objective
from apex_opt.grids.workers import Lost, Processes
from apex_opt.search import search
from apex_opt.search.best_first import ROUND
from apex_opt.search.spread import Spread
from apex_opt.studies.pareto import pareto

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.search import Problem

ASKED = ("plan", "--model=llama-3.1-8b", "--trace=poisson:rate=40,n=60,prompt=256,output=24", "--format=json")


@dataclass(frozen=True)
class Bytes:
    """Bytes as they are."""

    whole: bytes

    def packed(self) -> bytes:
        return self.whole


class Shuffled:
    """Workers in this process that end in any order; what they get and give is packed, as between machines."""

    def __init__(self, count: int) -> None:
        self.count, self.begun, self._rng = count, 0, Random(count)
        self._put: dict[int, Callable[[], Any]] = {}

    @property
    def in_hand(self) -> int:
        return len(self._put)

    def put(self, function: Callable[[Any], Any], item: Any) -> int:
        self.begun += 1
        self._put[self.begun] = partial(function, pickle.loads(pickle.dumps(item)))
        return self.begun

    def take(self) -> tuple[int, Any]:
        ticket = self._rng.choice(list(self._put))
        return ticket, pickle.loads(pickle.dumps(self._put.pop(ticket)()))

    def keep(self, packed: bytes) -> Bytes:
        return Bytes(packed)


@pytest.mark.parametrize("place", range(0, len(ROWS), 3))
def test_every_part_of_an_answer_is_that_of_one_process_whatever_the_shape(place: int) -> None:
    workers = Shuffled(1 + place % 7)
    spread = search(problem_of(place), SPACE, top=ROWS[place]["top"], crew=partial(Spread, workers=workers))
    assert repr(spread) == repr(answer_of(place))


@pytest.mark.parametrize("problem", [question(1), question(4), over_two(0)])
def test_pools_that_hand_over_are_found_alike(problem: Problem) -> None:
    spread = search(problem, SPACE, top=3, crew=partial(Spread, workers=Shuffled(9)))
    assert repr(spread) == repr(search(problem, SPACE, top=3))


@pytest.mark.parametrize("seed", range(300, 304))
def test_a_front_is_found_alike(seed: int) -> None:
    objectives = tuple(map(load_objective, ("ttft_p95", "energy", "cost")[: 2 + seed % 2]))
    spread = pareto(random_problem(seed), objectives, SPACE, crew=partial(Spread, workers=Shuffled(5)))
    assert repr(spread) == repr(pareto(random_problem(seed), objectives, SPACE))


def test_idle_workers_begin_with_what_comes_next() -> None:
    problem = problem_of(0)
    runs = [part.simulated for part in answer_of(0).ledger.parts]
    few, many = Shuffled(1), Shuffled(3 * ROUND)
    for workers in (few, many):
        search(problem, SPACE, top=ROWS[0]["top"], crew=partial(Spread, workers=workers))
    assert many.begun > few.begun >= sum(runs)


def test_the_rules_of_an_engine_travel_whole() -> None:
    for rules in ENGINES.values():
        there = pickle.loads(pickle.dumps(rules))
        assert all(getattr(there, each.name) == getattr(rules, each.name) for each in fields(rules))


def test_what_cannot_be_simulated_is_told_as_by_one_process() -> None:
    workers = Shuffled(2)
    workers.put(_refuse, 0)
    with pytest.raises(CapacityError, match="no room"):
        search(problem_of(0), SPACE, crew=partial(Spread, workers=workers))


def _refuse(_: int) -> None:
    raise CapacityError("no room")


def test_a_plan_that_ends_its_process_twice_is_an_error_in_a_line() -> None:
    class Dying(Shuffled):
        def take(self) -> tuple[int, Any]:
            return next(iter(self._put)), Lost("its process died, twice")

    with pytest.raises(InputError, match=r"--workers: a part of the search has no outcome: its process died, twice"):
        search(problem_of(0), SPACE, crew=partial(Spread, workers=Dying(2)))


def test_a_process_that_dies_changes_nothing(tmp_path: Path) -> None:
    problem, mark = problem_of(0), tmp_path / "mark"
    with Processes(2) as workers:
        workers.put(_die, str(mark))  # takes with it what is in hand besides
        spread = search(problem, SPACE, top=ROWS[0]["top"], crew=partial(Spread, workers=workers))
    assert mark.exists()
    assert repr(spread) == repr(answer_of(0))


def _die(mark: str) -> None:
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.nightly  # Ray takes 8 s to start and to end
def test_the_command_answers_alike_on_ray() -> None:
    pytest.importorskip("ray", reason="needs ray")
    asked = (*ASKED, "--cluster=2xh100-sxm+2xl40s", "--slo=ttft_p95<=1s")
    spread = run(*asked, "--ray=local", "--workers=2")
    assert spread.code == 0
    assert json.loads(spread.out) == json.loads(run(*asked).out)


@pytest.mark.parametrize("command", ["plan", "explain"])
def test_the_command_answers_alike_with_processes(command: str) -> None:
    asked = (command, *ASKED[1:], "--cluster=2xh100-sxm+2xl40s", "--slo=ttft_p95<=1s")
    alone, spread = run(*asked), run(*asked, "--workers=2")
    assert (alone.code, spread.code) == (0, 0)
    assert json.loads(spread.out) == json.loads(alone.out)


def test_the_highest_rate_is_found_alike_with_processes() -> None:
    words = ("capacity", "--model=llama-3.1-8b", "--cluster=2xh100-sxm", "--slo=ttft_p95<=100ms", "--resolution=0.2")
    words = (*words, "--trace=poisson:rate=4,n=100,prompt=64,output=8", "--format=json")
    alone, spread = run(*words), run(*words, "--workers=2")
    assert (alone.code, spread.code) == (0, 0)
    assert json.loads(spread.out) == json.loads(alone.out)
