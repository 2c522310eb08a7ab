"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Tables are as wide as what is shown in documents, whatever terminal the tests run in.
os.environ["COLUMNS"] = "120"

# No deadline: the first example of a property may have to wait for the kernel to compile.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recordings and measurements beside the checkout; a test that needs it is skipped without."""
    if not SHARED.is_dir():
        pytest.skip(f"needs recordings that are not part of the repository: no folder {SHARED}")
    return SHARED
