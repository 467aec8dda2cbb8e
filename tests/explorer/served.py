"""A small server with what the checks in the browser need, which can also lie. It has none of the explorer's pages."""

from __future__ import annotations

import html
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from bitcoin.core import CBlock
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from explorer.javascript import STATIC
from explorer.made_chain import MadeChain, block_id
from traincert.bridge.chain import certificate_fields
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.explorer.app import HEADERS, RELOAD


@dataclass
class Served:
    """What the server says: true of the chain, until a test changes it.

    `blocks` are bytes by hash, `heights` what the server says of them, `shown` the fields of each block's page.
    `asked` are the hashes of the blocks that browsers asked for.
    """

    url: str
    made: MadeChain
    blocks: dict[str, bytes] = field(default_factory=dict)
    heights: dict[str, int] = field(default_factory=dict)
    shown: dict[str, dict[str, str]] = field(default_factory=dict)
    params: dict[str, Any] | None = None
    tip: str = ""
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for height, block in enumerate(self.made.blocks):
            self.add(block, height)
        self.tip = block_id(self.made.blocks[-1])
        self.params = stated(self.made.chain.params)

    def add(self, block: CBlock, height: int) -> str:
        """Serve one more block. Returns its hash."""
        shown = block_id(block)
        self.blocks[shown], self.heights[shown] = block.serialize(), height
        fields: dict[str, Any] = {
            "hash": shown,
            "previousblockhash": block.hashPrevBlock[::-1].hex(),
            "merkleroot": block.hashMerkleRoot[::-1].hex(),
            "time": block.nTime,
            "nTx": len(block.vtx),
            "size": len(block.serialize()),
            "height": height,
        }
        if height in self.made.certificates and block is self.made.blocks[height]:
            certificate = certificate_fields(self.made.certificates[height])
            draw = certificate.pop("draw", {})
            del certificate["coordinator_signatures"]
            draw.pop("siblings", None)
            fields |= certificate | {f"draw.{name}": value for name, value in draw.items()}
        self.shown[shown] = {name: str(value) for name, value in fields.items()}
        return shown

    def app(self) -> Starlette:
        """The web application."""

        async def list_page(_: Request) -> Response:
            newest = sorted(self.heights, key=lambda each: -self.heights[each])
            rows = "".join(f"<li>{self._mark(each)}</li>" for each in newest)
            return page(f'<section id="chain-check"></section><ul>{rows}</ul>')

        async def chain_page(_: Request) -> Response:
            return page('<section id="chain-check"></section>')

        async def block_page(request: Request) -> Response:
            each = request.path_params["hash"]
            cells = "".join(
                f'<dt>{name}</dt><dd data-field="{name}">{html.escape(text)}</dd>'
                for name, text in self.shown[each].items()
            )
            place = f'data-hash="{each}" data-height="{self.heights[each]}"'
            return page(f'{self._mark(each)}<dl data-hash="{each}">{cells}</dl><section id="checks" {place}></section>')

        async def api_params(_: Request) -> Response:
            return JSONResponse(
                self.params or {"error": "No node is on a training network."}, 200 if self.params else 404
            )

        async def api_info(_: Request) -> Response:
            return JSONResponse({"tip": {"hash": self.tip, "height": self.heights[self.tip]} if self.tip else None})

        async def raw_block(request: Request) -> Response:
            each = request.path_params["hash"]
            self.asked.append(each)
            if each not in self.blocks:
                return JSONResponse({"error": f"The node does not have block {each}."}, 404)
            return Response(self.blocks[each], media_type="application/octet-stream")

        async def with_policy(request: Request, call_next: RequestResponseEndpoint) -> Response:
            response = await call_next(request)
            response.headers.update(HEADERS)
            return response

        routes = [
            Route("/", list_page),
            Route("/chain", chain_page),
            Route("/block/{hash}", block_page),
            Route("/api/params", api_params),
            Route("/api/info", api_info),
            Route("/api/rawblock/{hash}", raw_block),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
        return Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=with_policy)])

    def _mark(self, block_hash: str) -> str:
        return f'<span class="check" data-hash="{block_hash}" data-height="{self.heights[block_hash]}"></span>'


def stated(params: TrainingParams) -> dict[str, Any]:
    """What /api/params says of a network."""
    chain_id, start_height = params.chain_id.hex(), params.start_height
    return {"chain_id": chain_id, "options": params.node_options(), "start_height": start_height}


def page(body: str) -> HTMLResponse:
    """A page with the checks."""
    scripts = f'<script>{RELOAD}</script><script type="module" src="/static/check/page.js"></script>'
    head = f'<link rel="icon" href="data:,">{scripts}'
    return HTMLResponse(f'<!doctype html><html lang="en"><title>Test</title>{head}<body>{body}</body></html>')


@contextmanager
def serve(made: MadeChain) -> Iterator[Served]:
    """Serve a chain on a free port of this machine."""
    with socket.socket(proto=socket.IPPROTO_TCP) as listening:  # else asyncio does not send at once
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # a browser that comes before the server runs waits
        served = Served(f"http://127.0.0.1:{listening.getsockname()[1]}", made)
        server = uvicorn.Server(uvicorn.Config(served.app(), log_level="error", ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield served
        finally:
            server.should_exit = True
            thread.join()
