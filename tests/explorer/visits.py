"""Visits of pages with a browser, while the network of this machine may change.

It does when a test beside this one starts or stops a container. Chromium then gives up requests that wait for a
connection.
"""

from __future__ import annotations

from playwright.sync_api import Error, Page, Request

CHANGED = "ERR_NETWORK_CHANGED"


def problems_of(page: Page) -> list[str]:
    """The errors of a page's scripts, and what its console says of errors: a list that grows."""
    problems: list[str] = []

    def add(text: str) -> None:
        if CHANGED not in text:
            problems.append(text)

    page.on("pageerror", lambda error: add(str(error)))
    page.on("console", lambda message: add(message.text) if message.type == "error" else None)
    return problems


def visit(page: Page, url: str) -> None:
    """Open a page, and open it again if the network changed meanwhile."""
    lost: list[Request] = []
    page.on("requestfailed", lambda request: lost.append(request) if CHANGED in (request.failure or "") else None)
    for _ in range(5):
        lost.clear()
        try:
            page.goto(url)
        except Error as error:
            if CHANGED not in error.message:
                raise
        else:
            if not lost:
                return
    raise AssertionError(f"the network changes all the time: {[each.url for each in lost]}")
