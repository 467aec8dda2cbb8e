"""Runs the explorer: opens the nodes, serves the application."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import uvicorn

from traincert.bridge.errors import BridgeError
from traincert.bridge.explorer.app import make_app
from traincert.bridge.explorer.nodes import WatchedNode
from traincert.bridge.explorer.watch import open_watch

ADDRESS = "127.0.0.1"


def serve(
    places: Sequence[str], records: Path | None, coordinator: Path | None, port: int, on_ready: Callable[[str], None]
) -> None:
    """Serve the explorer of some nodes until Ctrl-C. `on_ready` is told the URL as soon as a browser may open it.

    Each place is a data directory, or URL,COOKIEFILE. Port 0: any that is free.

    Raises BridgeError if a place is no node's, a folder is not what it should be, or the port is taken.
    """
    with ExitStack() as stack:
        nodes = []
        for place, name in zip(places, names(places), strict=True):
            nodes.append(WatchedNode(place, name))
            stack.callback(nodes[-1].close)
        app = make_app(open_watch(nodes, records, coordinator))
        listening = stack.enter_context(closing(_listen(port)))
        on_ready(f"http://{ADDRESS}:{listening.getsockname()[1]}")
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run([listening])


def names(places: Sequence[str]) -> list[str]:
    """Return a short name for each place: a folder's own name, or a URL's host and port; all of it where two agree."""
    short = [each.partition("://")[2].partition(",")[0] or Path(each).resolve().name for each in places]
    return [place if short.count(name) > 1 else name for place, name in zip(places, short, strict=True)]


def _listen(port: int) -> socket.socket:
    try:
        listening = socket.create_server((ADDRESS, port))
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise BridgeError(f"port {port} of {ADDRESS}: {problem}: choose another one with --port") from None
    # Connections inherit it. asyncio sets it only where the socket names its protocol; without it answers wait 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
