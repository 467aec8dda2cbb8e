"""`make screenshots`: the pictures of the explorer in docs/, of a demo that this runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from explorer_process import TRAINCERT, Explorer
from traincert.regtest import build_node

DOCS = Path(__file__).parents[2] / "docs"
CYCLES = 40


def main() -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("chromium not found; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command: list[str | Path] = [TRAINCERT, "demo", "--data", folder, "--keep", "--cycles", str(CYCLES)]
        try:
            subprocess.run(command, check=True)
            nodes = [option for node in sorted(folder.glob("node*")) for option in ("--node", node)]
            with (
                Explorer(*nodes, "--coordinator", folder / "coordinator") as explorer,
                sync_playwright() as playwright,
                playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser,
            ):
                take(browser, explorer.url, "light", "explorer.png")
                take(browser, f"{explorer.url}/block/5", "dark", "explorer-block.png")
        finally:
            for node in folder.glob("node*"):
                subprocess.run([build_node() / "bin/bitcoin-cli", f"-datadir={node}", "stop"], check=False)


def take(browser: Browser, url: str, theme: Literal["light", "dark"], name: str) -> None:
    """Take a picture of a page as soon as all that it shows is checked."""
    with browser.new_context(viewport={"width": 1200, "height": 760}, color_scheme=theme) as context:
        page = context.new_page()
        page.goto(url)
        page.wait_for_function(
            "() => [...document.querySelectorAll('.check')].every(({ dataset }) => dataset.state === 'good')",
            timeout=120_000,
        )
        page.wait_for_timeout(1000)  # the chart is drawn a moment later
        page.screenshot(path=DOCS / name)


if __name__ == "__main__":
    main()
