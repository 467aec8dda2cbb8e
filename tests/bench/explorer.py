"""How fast the explorer's first page is on a long chain, against a static page of as many bytes."""

from __future__ import annotations

import re
import shutil
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from playwright.sync_api import Browser, Request, sync_playwright

from bench.blocks import OPTIONS, WITHOUT_CHECKS
from bench.rows import Row, row, timed
from explorer_process import Explorer
from traincert.regtest import Node, wait_for

TURNS = 9


def measure(patched: Path, folder: Path, blocks: Sequence[str]) -> list[Row]:
    """Rows about a node with these blocks. A page is there with its `load` event, all of it with its chart."""
    chromium = shutil.which("chromium")
    with Node(patched, folder / "node", {**OPTIONS, **WITHOUT_CHECKS}) as node:
        for block in blocks:
            node.rpc("submitblock", block)
        with Explorer("--node", node.datadir) as explorer, sync_playwright() as playwright:
            reading, _ = timed(lambda: wait_for(partial(_has_read, explorer, len(blocks)), 600, "all blocks read"))
            with playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser:
                (folder / "static").mkdir()
                (folder / "static/index.html").write_text(_static_page(browser, explorer.url))
                with _served(folder / "static") as static:
                    turns = [(_load(browser, explorer.url), _load(browser, static)) for _ in range(TURNS)]
                drawn = statistics.median(_load(browser, explorer.url, "#chart[data-blocks]") for _ in range(TURNS))
    name = f"explorer, {len(blocks):,} blocks"
    return [
        row(f"{name}: first page in Chromium", statistics.median(ours for ours, _ in turns), "s", 1),
        row(f"{name}: against a static page", statistics.median(ours / static for ours, static in turns), "ratio", 3),
        row(f"{name}: until its chart is drawn", drawn, "s"),
        row(f"{name}: read for the first time", reading, "s"),
    ]


def _has_read(explorer: Explorer, height: int) -> bool:
    info = explorer.get("info")
    return info["loading"] is None and (info["tip"] or {}).get("height") == height


def _static_page(browser: Browser, url: str) -> str:
    """The explorer's first page without its scripts and styles, but with as many bytes."""
    sizes = []

    def count(request: Request) -> None:
        response = request.response()
        if response and "/api/" not in response.url:
            sizes.append(len(response.body()))

    with browser.new_context() as context:
        page = context.new_page()
        page.on("requestfinished", count)
        page.goto(url)
        page.wait_for_selector("#chart[data-blocks]")
        page.remove_listener("requestfinished", count)
        html = re.sub(r"(?s)<script.*?</script>|<link [^>]*>", "", page.content())
    return f"{html}<!--{'x' * (sum(sizes) - len(html))}-->"


def _load(browser: Browser, url: str, selector: str | None = None) -> float:
    """Seconds until a page is loaded, and until there is an element, in a browser that was never there."""
    with browser.new_context() as context:
        page = context.new_page()
        seconds, _ = timed(lambda: page.goto(url))
        if selector:
            seconds += timed(lambda: page.wait_for_selector(selector))[0]
    return seconds


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
