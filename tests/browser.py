"""A headless Chromium for tests of pages: the system's, driven by playwright."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PHONE = {"width": 375, "height": 800}
DESK = {"width": 1200, "height": 900}


def chromium() -> str:
    """Where Chromium is; tests that need it are skipped without it, but fail where CI could have installed it."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("CI") and shutil.which("apt-get") and os.geteuid() == 0:
            pytest.fail("no Chromium: .ci/run installs Debian's package `chromium`")
        pytest.skip("no Chromium: install Debian's package `chromium`")
    return found


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A browser without any network."""
    path = chromium()
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield opened
        finally:
            opened.close()
