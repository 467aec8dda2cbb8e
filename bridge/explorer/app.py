"""The explorer's web application: pages, API, feeds, metrics. It only reads."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from traincert.bridge.explorer import views
from traincert.bridge.explorer.metrics import metrics
from traincert.bridge.explorer.pictures import draw_picture, fork_picture
from traincert.bridge.explorer.texts import FACTORS, REASONS
from traincert.bridge.explorer.views import NotFoundError
from traincert.bridge.explorer.watch import Watch
from traincert.bridge.fields import FIELDS

_FOLDER = Path(__file__).parent

RELOAD = (_FOLDER / "static" / "reload.js").read_text()
"""The only script that stands in the pages themselves."""

_RELOAD_HASH = b64encode(sha256(RELOAD.encode()).digest()).decode()

HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src 'self' 'sha256-{_RELOAD_HASH}'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a browser asks again whether a file has changed
}

_SHOWN_BLOCKS = 25
"""On a page."""


class _Headers:
    """Adds the security headers to each answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, with_headers)


def make_app(watch: Watch) -> Starlette:
    """Return the application over what a watch knows. It follows the nodes while it runs."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown_time": _shown_time, "http_time": partial(formatdate, usegmt=True)}
    environment.globals |= {"RELOAD": RELOAD, "FIELDS": FIELDS, "REASONS": REASONS, "FACTORS": FACTORS}
    templates = Jinja2Templates(env=environment)

    def page(name: str, view: Callable[[Request], Awaitable[dict[str, Any]]]) -> Callable[..., Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                context, status = await view(request), 200
            except NotFoundError as error:
                return _problem(request, error.status, str(error))
            return templates.TemplateResponse(request, name, {**_everywhere(watch), **context}, status)

        return endpoint

    def answer(view: Callable[[Request], Awaitable[Any]]) -> Callable[..., Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                return JSONResponse(await view(request))
            except NotFoundError as error:
                return JSONResponse({"error": str(error)}, error.status)

        return endpoint

    def _problem(request: Request, status: int, text: str) -> Response:
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": text}, status)
        return templates.TemplateResponse(request, "problem.html", {**_everywhere(watch), "text": text}, status)

    async def on_http_error(request: Request, error: Exception) -> Response:
        status, detail = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
        return _problem(request, status, "There is no such page." if status == 404 else f"{detail}.")

    async def api_info(_: Request) -> Any:
        return watch.info()

    async def api_params(_: Request) -> Any:
        return views.params(watch.main)

    async def api_blocks(request: Request) -> Any:
        before = _number(request, "before")
        count = _number(request, "count")
        return {"blocks": views.blocks(watch, before, views.MOST_BLOCKS if count is None else count)}

    async def api_series(_: Request) -> Any:
        return views.series(watch)

    async def api_block(request: Request) -> Any:
        return await views.block(watch, views.find_block(watch, request.path_params["which"]))

    async def raw_block(request: Request) -> Response:
        try:
            raw = await views.raw_block(watch, views.find_block(watch, request.path_params["which"]))
        except NotFoundError as error:
            return JSONResponse({"error": str(error)}, 404)
        return Response(raw, media_type="application/octet-stream")

    async def api_cycle(request: Request) -> Any:
        return views.cycle(watch, request.path_params["height"])

    async def api_miners(_: Request) -> Any:
        return views.miners(watch)

    async def api_miner(request: Request) -> Any:
        return views.miner(watch, request.path_params["key"])

    async def api_alarms(_: Request) -> Any:
        return views.alarms(watch)

    async def api_forks(_: Request) -> Any:
        return views.forks(watch)

    async def api_address(request: Request) -> Any:
        return await views.address(watch, request.path_params["address"])

    async def api_search(request: Request) -> Any:
        return {"path": await views.search(watch, request.query_params.get("q", ""))}

    async def changes(request: Request) -> Response:
        last = request.headers.get("last-event-id", "")

        async def events() -> AsyncIterator[ServerSentEvent]:
            async for change in watch.changes(int(last) if last.isdecimal() else None):
                yield ServerSentEvent(change.data, event=change.event, id=str(change.number))

        return EventSourceResponse(events())

    async def live(_: Request) -> dict[str, Any]:
        shown = views.blocks(watch, None, _SHOWN_BLOCKS)
        luck = {"miners": views.miners(watch), "totals": views.totals(watch, None)}
        return {"blocks": shown, "alarms": views.alarms(watch), **luck}

    async def blocks_page(request: Request) -> dict[str, Any]:
        before = _number(request, "before")
        shown = views.blocks(watch, before, _SHOWN_BLOCKS)
        top = watch.main.height + 1 if before is None else before
        return {"blocks": shown, "before": top, "count": _SHOWN_BLOCKS}

    async def block_page(request: Request) -> dict[str, Any]:
        found = views.find_block(watch, request.path_params["which"])
        shown, parent = await views.block(watch, found), watch.blocks.get(found.previous)
        count = parent.certificate.contributions_count if parent and parent.certificate else 0
        drawn = shown["certificate"] and "draw" in shown["certificate"]
        following = watch.at(found.height + 1) if shown["in_chain"] else None
        return {
            "block": shown,
            "picture": draw_picture(shown["certificate"]["draw"], count) if drawn else None,
            "next": following.hash if following else None,
        }

    async def cycle_page(request: Request) -> dict[str, Any]:
        return {"cycle": await api_cycle(request)}

    async def miners_page(request: Request) -> dict[str, Any]:
        before = _number(request, "before")
        return {"miners": views.miners(watch, before), "totals": views.totals(watch, before)}

    async def miner_page(request: Request) -> dict[str, Any]:
        return {"miner": await api_miner(request)}

    async def address_page(request: Request) -> dict[str, Any]:
        return {"address": await api_address(request)}

    async def nodes_page(_: Request) -> dict[str, Any]:
        forks = views.forks(watch)
        return {"forks": forks, "picture": fork_picture(forks), "alarms": views.alarms(watch)}

    async def search(request: Request) -> Response:
        try:
            return RedirectResponse(await views.search(watch, request.query_params.get("q", "")), 303)
        except NotFoundError as error:
            return _problem(request, 404, str(error))

    async def feed(request: Request) -> Response:
        kind = request.path_params["kind"]
        if kind not in ("blocks", "alarms"):
            raise HTTPException(404)
        shown: list[dict[str, Any]] = views.alarms(watch)[:50] if kind == "alarms" else views.blocks(watch, None, 50)
        context = {"kind": kind, "items": shown, "base": str(request.base_url).rstrip("/")}
        return templates.TemplateResponse(request, "feed.xml", context, media_type="application/rss+xml")

    async def show_metrics(_: Request) -> Response:
        return Response(metrics(watch), media_type="text/plain; version=0.0.4")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with watch.running():
            yield

    return Starlette(
        routes=[
            Route("/", page("live.html", live)),
            Route("/blocks", page("blocks.html", blocks_page)),
            Route("/block/{which}", page("block.html", block_page)),
            Route("/cycle/{height:int}", page("cycle.html", cycle_page)),
            Route("/miners", page("miners.html", miners_page)),
            Route("/miner/{key}", page("miner.html", miner_page)),
            Route("/address/{address}", page("address.html", address_page)),
            Route("/nodes", page("nodes.html", nodes_page)),
            Route("/search", search),
            Route("/feed/{kind}.xml", feed),
            Route("/metrics", show_metrics),
            Route("/api/info", answer(api_info)),
            Route("/api/params", answer(api_params)),
            Route("/api/blocks", answer(api_blocks)),
            Route("/api/series", answer(api_series)),
            Route("/api/block/{which}", answer(api_block)),
            Route("/api/rawblock/{which}", raw_block),
            Route("/api/cycle/{height:int}", answer(api_cycle)),
            Route("/api/miners", answer(api_miners)),
            Route("/api/miner/{key}", answer(api_miner)),
            Route("/api/alarms", answer(api_alarms)),
            Route("/api/forks", answer(api_forks)),
            Route("/api/address/{address}", answer(api_address)),
            Route("/api/search", answer(api_search)),
            Route("/api/changes", changes),
            Mount("/static", StaticFiles(directory=_FOLDER / "static")),
        ],
        middleware=[
            Middleware(_Headers),
            # A page of another site must not read this one through a name that it points at this machine.
            Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
            Middleware(GZipMiddleware),
        ],
        exception_handlers={HTTPException: on_http_error},
        lifespan=lifespan,
    )


def _everywhere(watch: Watch) -> dict[str, Any]:
    """What every page shows. `people` has a name and a colour's number for each key of a member or a winner."""
    people: dict[str, dict[str, Any]]
    people = {key.hex(): {"name": name, "colour": None} for key, name in watch.names().items()}
    for colour, each in enumerate(views.winners(watch)):
        people[each["key"]] = {"name": each["name"], "colour": colour}
    open_alarms = sum(alarm.ended is None for alarm in watch.alarms)
    return {"info": watch.info(), "people": people, "open_alarms": open_alarms, "now": time.time()}


def _number(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise HTTPException(400, f"{name} must be a number, 0 or more")
    return int(text)


def _shown_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
