"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, settings

if TYPE_CHECKING:
    from collections.abc import Generator

LONGEST = (
    *("frozen", "cli", "search_search", "studies_robust", "studies_explain", "docs_robust", "studies_check"),
    *("studies_capacity", "studies_robust_rates", "studies_candidates"),
    *("profiles_operations", "simulator_handover", "simulator_kernel", "docs_pools", "process", "studies_steady"),
    *("formulations_plan_space", "search_bounds_isolated", "docs_examples", "docs_tour", "cost_model", "figures_stops"),
    *("solve", "docs_clusters", "packaging", "simulator_replay", "docs_adding", "report_html", "simulator_speculative"),
    *("figures_registry", "report_robust", "readme", "formulations_placement", "search_best_first", "studies_pareto"),
)
"""Files that take long, by `--cpu`: the workers begin with them, so that none is left with a long one at the end."""

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Tables are as wide as what is shown in documents, whatever terminal the tests run in.
os.environ["COLUMNS"] = "120"

# Tests are half a million objects that stay: no garbage is looked for among them, neither while they are collected nor
# afterwards.
gc.disable()

# Where bytecode is not to be kept, each of the hundred processes that tests start would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# No deadline: the first example of a property may have to wait for the kernel to compile.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True, max_examples=40)
# That a fault is found is enough: the smallest example of it is not looked for.
settings.register_profile("mutants", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recordings and measurements beside the checkout; a test that needs it is skipped without."""
    if not SHARED.is_dir():
        pytest.skip(f"needs recordings that are not part of the repository: no folder {SHARED}")
    return SHARED


@pytest.fixture(scope="module")
def short_rates() -> Generator[None]:
    """Rates held for 2,000 requests rather than 20,000: the search and what it is compared with hold them alike."""
    from apex_opt.workload.steady import loops_of

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apex_opt.studies.steady.loops_of", lambda trace: loops_of(trace, 2_000))
        patch.setattr("apex_opt.studies.steady.TOLD", 1_000)
        yield


def pytest_configure() -> None:
    if gone := [name for name in LONGEST if not Path(__file__).with_name(f"test_{name}.py").is_file()]:
        raise pytest.UsageError(f"LONGEST in tests/conftest.py names files that there are not: {', '.join(gone)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Compile the kernel once, before there are workers that would each compile it."""
    from apex_opt.simulator.warm import warm_up

    warm_up()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu", type=int, default=0, metavar="N", help="show the N files that take the most CPU-seconds")


def pytest_runtest_logstart() -> None:
    _spent["before"] = sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell of each step of a test the CPU-seconds, its processes included, which other work does not lengthen."""
    report = yield
    now = sum(os.times()[:4])
    report.user_properties.append(("cpu_s", now - _spent["before"]))
    _spent["before"] = now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not (most := config.getoption("--cpu")):
        return
    files: Counter[str] = Counter()
    for report in (one for reports in terminalreporter.stats.values() for one in reports):
        spent = dict(getattr(report, "user_properties", ())).get("cpu_s", 0.0)
        files[getattr(report, "nodeid", "").partition("::")[0]] += spent
    terminalreporter.section(f"CPU-seconds: {sum(files.values()):.0f} in all")
    for name, seconds in files.most_common(most):
        terminalreporter.write_line(f"{seconds:8.1f}  {name}")


_spent = {"before": 0.0}
