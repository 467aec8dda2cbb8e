"""A browser, and Node.js, for the explorer's tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from explorer.javascript import JavaScript


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, without a window.

    While it runs, nothing in this process can use asyncio, as NodeClient and so TrainingNetwork do: make blocks with
    training_chain. So it ends with the module.
    """
    chromium = shutil.which("chromium")
    assert chromium is not None, "chromium not found: install it (on Debian: apt-get install chromium)"
    expect.set_options(timeout=60_000)  # milliseconds: machines are shared
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # root has no sandbox
        yield started
        started.close()


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JavaScript]:
    """The rules in JavaScript, without a browser."""
    with JavaScript(tmp_path_factory.mktemp("javascript")) as process:
        yield process
