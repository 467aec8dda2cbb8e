"""A program's connection to the broker: requests that are repeated until they are answered, and files by their hash.

nats-py is asynchronous. Its event loop runs in a thread of its own here, so that it answers the broker also while the
program trains, scores or waits for a node.

A member's request goes to `traincert.KIND`. The coordinator sees it as `traincert.MEMBER.KIND`: the broker itself puts
the member's name there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import struct
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self, TypeVar

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from traincert.trainer.errors import EngineError
from traincert.trainer.store import sync_folder

CHUNK = 512 * 1024
"""Bytes of a file in one message."""
WINDOW = 8
"""How many chunks of a file are on their way at once."""
ANSWER_SECONDS = 12.0
"""A request that has no answer by then is repeated."""
_PAUSE = 0.5  # seconds between two attempts
_ERROR = "Traincert-Error"
_T = TypeVar("_T")

Handler = Callable[[str, bytes], Awaitable[bytes]]
"""Takes a member's name and its request's bytes, and returns the answer's. An EngineError is told to the member."""


class RefusedError(EngineError):
    """The coordinator refused a request. The message says why. Repeating the request does not help."""


class StoppedError(EngineError):
    """The connection has ended while something waited for an answer. The message says why."""


class Connection:
    """A connection to the broker. Use it as a context manager. Its methods may be called from any thread.

    `connect` makes a connected client, with the given options of `nats.connect`; nats-py reconnects by itself.
    `on_lost` is called with True when the connection is lost, and with False when it is there again.
    """

    def __init__(
        self, connect: Callable[..., Awaitable[Client]], on_lost: Callable[[bool], None] | None = None
    ) -> None:
        self._connect = connect
        self._on_lost = on_lost or (lambda _lost: None)
        self._loop = asyncio.new_event_loop()
        self._client: Client | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._failure = "the connection to the broker is closed"
        self.ended = Event()
        """Is set when the connection has ended for good."""

    def __enter__(self) -> Self:
        """Connect. Raises what `connect` raises."""
        Thread(target=self._loop.run_forever, name="broker", daemon=True).start()
        callbacks = {
            "disconnected_cb": self._disconnected,
            "reconnected_cb": self._reconnected,
            "closed_cb": self._closed,
            "error_cb": self._failed,
        }
        try:
            self._client = self.run(self._connect(**callbacks))
        except BaseException:
            self._stop_loop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.run(self._close())
        self._stop_loop()

    def run(self, awaitable: Awaitable[_T]) -> _T:
        """Run something in the connection's loop, and return its result."""

        async def awaited() -> _T:
            return await awaitable

        future = asyncio.run_coroutine_threadsafe(awaited(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call a function in the connection's thread, and return its result."""

        async def called() -> _T:
            return function(*arguments)

        return self.run(called())

    def serve(self, handlers: dict[str, Handler]) -> None:
        """Answer the members' requests, each kind with its handler. `handlers` may be changed later."""

        async def received(message: Msg) -> None:
            task = asyncio.create_task(self._answer(handlers, message))  # a request that waits must not hold up others
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        assert self._client  # noqa: S101 - it is connected
        self.run(self._client.subscribe("traincert.*.>", cb=received))

    def ask(self, kind: str, data: bytes = b"", *, seconds: float = ANSWER_SECONDS) -> bytes:
        """Send a request to the coordinator, again and again until there is an answer. `seconds` are for one attempt.

        Raises RefusedError if the coordinator refuses it, and StoppedError if the connection ends.
        """
        return self.run(self._ask(kind, data, seconds))

    def fetch(self, digest: bytes, folder: Path) -> None:
        """Get the file with this SHA-256 (32 bytes) into a folder, unless it is there already.

        Raises RefusedError if the coordinator has no such file for us, and EngineError if it sent another one.
        """
        path = folder / digest.hex()
        if path.exists():
            return
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
        try:
            with os.fdopen(handle, "r+b") as file:
                self.run(self._fetch(digest, file.fileno()))
                file.seek(0)
                found = hashlib.file_digest(file, "sha256").digest()
                if found != digest:
                    raise EngineError(f"the coordinator sent the file {found.hex()} for {digest.hex()}")
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(folder)

    def send(self, kind: str, digest: bytes, data: bytes) -> None:
        """Send the bytes with this SHA-256 in chunks, until the coordinator has all of them.

        Raises RefusedError if the coordinator does not want them, and StoppedError if the connection ends.
        """
        self.run(self._send(kind, digest, data))

    async def _fetch(self, digest: bytes, file: int) -> None:
        async def get(offset: int) -> int:
            answer = await self._ask("file", digest + struct.pack("<Q", offset), ANSWER_SECONDS)
            os.pwrite(file, answer[8:], offset)
            return int.from_bytes(answer[:8], "little")

        size = await get(0)
        await _windowed(get(offset) for offset in range(CHUNK, size, CHUNK))

    async def _send(self, kind: str, digest: bytes, data: bytes) -> None:
        async def put(offset: int) -> bytes:
            head = digest + struct.pack("<Q", offset)
            return await self._ask(kind, head + data[offset : offset + CHUNK], ANSWER_SECONDS)

        # The coordinator may have been restarted on the way, and may have lost chunks: then it asks for all again.
        while await put(0) != b"whole":
            await _windowed(put(offset) for offset in range(CHUNK, len(data), CHUNK))

    async def _ask(self, kind: str, data: bytes, seconds: float) -> bytes:
        assert self._client  # noqa: S101 - it is connected
        while True:
            if self._ended.is_set():
                raise StoppedError(self._failure)
            try:
                answer = await self._client.request(f"traincert.{kind}", data, timeout=seconds)
            except (TimeoutError, nats.errors.Error, OSError):
                # The broker or the coordinator is away, or a message was lost. To ask twice does no harm.
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), _PAUSE)
                continue
            if answer.headers and _ERROR in answer.headers:
                raise RefusedError(answer.headers[_ERROR])
            return answer.data

    async def _answer(self, handlers: dict[str, Handler], message: Msg) -> None:
        assert self._client  # noqa: S101 - it is connected
        _, member, kind = message.subject.split(".", 2)
        headers = None
        try:
            if kind not in handlers:
                raise EngineError(f"there is no request {kind!r}: is this another version of traincert?")
            answer = await handlers[kind](member, message.data)
        except EngineError as error:
            answer, headers = b"", {_ERROR: str(error).replace("\n", " ")}
        # Without a connection there is no answer: the member asks again.
        with contextlib.suppress(nats.errors.Error):
            # Not with message.respond, which sends the request's headers back.
            await self._client.publish(message.reply, answer, headers=headers)

    async def _disconnected(self) -> None:
        if not self._ended.is_set():
            self._on_lost(True)

    async def _reconnected(self) -> None:
        self._on_lost(False)

    async def _closed(self) -> None:
        self._ended.set()
        self.ended.set()

    async def _failed(self, error: Exception) -> None:
        if "authorization" in str(error).lower() or "revoked" in str(error).lower():
            self._failure = "the broker does not let us in any more: the coordinator has removed us"

    async def _close(self) -> None:
        self._ended.set()
        self.ended.set()
        if self._client:
            await asyncio.wait([asyncio.create_task(self._client.close())])  # it may cancel the task that it runs in
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _stop_loop(self) -> None:
        async def rest() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.run(rest())
        self._loop.call_soon_threadsafe(self._loop.stop)


async def _windowed(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Run coroutines, `WINDOW` at a time. The first exception ends all."""
    window = asyncio.Semaphore(WINDOW)
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(coroutine).add_done_callback(lambda _: window.release())
                await window.acquire()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
