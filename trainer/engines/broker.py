"""A program's connection to the broker: requests that are repeated until they are answered, and files by their hash.

nats-py is asynchronous. Its event loop runs in a thread of its own here, so that it answers the broker also while the
program trains, scores or waits for a node.

A member's request goes to `traincert.KIND`. The coordinator sees it as `traincert.MEMBER.KIND`: the broker itself puts
the member's name there. The coordinator has a connection of its own for each member: the broker closes a connection on
which too much waits, and nats-py stops reading from one on which something malformed came. So a member that floods, or
sends what is malformed, stops only its own requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import struct
import tempfile
import zlib
from asyncio import sslproto
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping
from concurrent.futures import CancelledError
from functools import lru_cache
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import IO, Any, Self, TypeVar, cast

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from traincert.trainer.errors import EngineError, IntegrityError
from traincert.trainer.store import verify_blob

CHUNK = 512 * 1024
"""Bytes of a file in one message."""
WINDOW = 8
"""How many chunks of a file are on their way at once."""
ANSWER_SECONDS = 12.0
"""A request that has no answer by then is repeated."""
MOST_REQUESTS = 32
"""So many requests of one member are handled at once."""
_PAUSE = 0.5  # seconds between two attempts
_FOLLOW_SECONDS = 1.0  # a new member is served within this time
_CLOSE_SECONDS = 5.0  # a server that hangs does not hold up our end for longer
_WAITING_MESSAGES = 64  # of one member; more are dropped: members repeat their requests
_WAITING_BYTES = 16 << 20
_MOST_UNSENT = 1 << 20  # bytes of answers to one member; above it, requests wait until the broker has taken them
_LONGEST_ERROR = 1000  # characters
_ERROR = "Traincert-Error"
_REMOVED = re.compile("Authorization Violation|Authentication Revoked|Account Authentication Expired", re.IGNORECASE)
_T = TypeVar("_T")

# asyncio reads TLS into a buffer of 256 KB, one for each connection: half a GB in a coordinator of 2,000 miners.
sslproto.SSLProtocol.max_size = 64 * 1024

Handler = Callable[[str, bytes], Awaitable[bytes]]
"""Takes a member's name and its request's bytes, and returns the answer's. An EngineError is told to the member."""


class RefusedError(EngineError):
    """The coordinator refused a request. The message says why. Repeating the request does not help."""


class StoppedError(EngineError):
    """The connection has ended while something waited for an answer. The message says why."""


class Connection:
    """A connection to the broker. Use it as a context manager. Its methods may be called from any thread.

    `connect` makes a connected client, with the given options of `nats.connect`; nats-py reconnects by itself.
    `on_lost` is called with True when the connection is lost, and with False when it is there again. `on_silent` is
    called with True when a request has no answer in its time, and with False when one is answered again.
    """

    def __init__(
        self,
        connect: Callable[..., Coroutine[Any, Any, Client]],
        on_lost: Callable[[bool], None] | None = None,
        on_silent: Callable[[bool], None] | None = None,
    ) -> None:
        self._connect = connect
        self._on_lost = on_lost or (lambda _lost: None)
        self._on_silent = on_silent or (lambda _silent: None)
        self._silent = False
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="broker", daemon=True)
        self._lock = Lock()
        self._stopped = False  # the loop takes nothing more
        self._client: Client | None = None
        self._served: dict[str, Client] = {}  # by member
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._failure = "the connection to the broker is closed"
        self._fault: Exception | None = None  # what a handler raised that it must not

    def __enter__(self) -> Self:
        """Connect. Raises what `connect` raises."""
        self._thread.start()
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
        self.close()

    def close(self) -> None:
        """End the connection: all that waits for an answer raises StoppedError. Closing twice is allowed."""
        with contextlib.suppress(StoppedError):  # it is closed
            self.run(self._close())
            self._stop_loop()

    def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the connection's loop, and return its result. Raises StoppedError if that has ended."""
        with self._lock:
            if self._stopped:
                coroutine.close()
                raise StoppedError(self._failure)
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise StoppedError(self._failure) from None
        except BaseException:
            future.cancel()
            raise

    def check(self) -> None:
        """Raise what a handler raised by accident, such as a full disk, or StoppedError if the connection has ended."""
        if self._fault:
            raise self._fault
        if self._ended.is_set():
            raise StoppedError(self._failure)

    def call(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """Call a function in the connection's thread, and return its result."""

        async def called() -> _T:
            return function(*arguments)

        return self.run(called())

    def serve(self, handlers: Mapping[str, Handler], members: Callable[[], Collection[str]]) -> None:
        """Answer the requests of the members with these names, each kind with its handler. Both may change later."""

        async def follow() -> None:
            while True:
                await asyncio.sleep(_FOLLOW_SECONDS)
                await self._follow(handlers, members)

        async def begin() -> None:
            await self._follow(handlers, members)
            self._start(follow())

        self.run(begin())

    def ask(self, kind: str, data: bytes = b"", *, seconds: float = ANSWER_SECONDS) -> bytes:
        """Send a request to the coordinator, again and again until there is an answer. `seconds` are for one attempt.

        Raises RefusedError if the coordinator refuses it, and StoppedError if the connection ends.
        """
        return self.run(self._ask(kind, data, seconds))

    def fetch(self, digest: bytes, folder: Path) -> None:
        """Get the file with this SHA-256 (32 bytes) into a folder, unless it is there already, and is not damaged.

        Raises RefusedError if the coordinator has no such file for us, and EngineError if it sent another one.
        """
        path = folder / digest.hex()
        with contextlib.suppress(IntegrityError):
            verify_blob(folder, digest)
            return
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                found = self.run(self._fetch(digest, file))
            if found != digest:
                raise EngineError(f"the coordinator sent the file {found.hex()} for {digest.hex()}")
            Path(temporary).replace(path)  # without fsync: a file that a power failure damaged is fetched again
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def send(self, kind: str, digest: bytes, folder: Path) -> None:
        """Send the file with this SHA-256 from a folder in chunks, until the coordinator has all of it.

        Raises IntegrityError if the file is missing or damaged, RefusedError if the coordinator does not want it, and
        StoppedError if the connection ends.
        """
        try:
            file = os.open(folder / digest.hex(), os.O_RDONLY)
        except FileNotFoundError:
            raise IntegrityError(f"{folder / digest.hex()}: no such file") from None
        try:
            self.run(self._send(kind, digest, file))
        except RefusedError:
            verify_blob(folder, digest)  # now, because it takes long: the coordinator refuses a damaged file
            raise
        finally:
            os.close(file)

    async def _fetch(self, digest: bytes, file: IO[bytes]) -> bytes:
        """Write a file to another one. Return the SHA-256 of what came, 32 bytes."""
        hashed = hashlib.sha256()  # while more chunks come: to hash the whole file at the end takes long

        async def get(offset: int) -> bytes:
            return await self._ask("file", digest + struct.pack("<Q", offset), ANSWER_SECONDS)

        def take(answer: bytes) -> None:
            chunk = memoryview(answer)[8:]
            hashed.update(chunk)
            file.write(chunk)

        first = await get(0)
        take(first)
        await _windowed((get(offset) for offset in range(CHUNK, int.from_bytes(first[:8], "little"), CHUNK)), take)
        return hashed.digest()

    async def _send(self, kind: str, digest: bytes, file: int) -> None:
        size = os.fstat(file).st_size

        async def put(offset: int) -> bytes:
            head = digest + struct.pack("<QQ", size, offset)
            return await self._ask(kind, read_chunk(head, file, offset), ANSWER_SECONDS)

        # The coordinator may have been restarted on the way, and may have lost chunks: then it asks for all again.
        while await put(0) != b"whole":
            await _windowed(put(offset) for offset in range(CHUNK, size, CHUNK))

    async def _ask(self, kind: str, data: bytes, seconds: float) -> bytes:
        while True:
            try:
                answer = await self._request(kind, data, seconds)
            except (TimeoutError, nats.errors.Error, OSError):
                # The broker or the coordinator is away, or a message was lost. To ask twice does no harm.
                self._note_silence(True)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._ended.wait(), _PAUSE)
                continue
            self._note_silence(False)
            if answer.headers and _ERROR in answer.headers:
                raise RefusedError(answer.headers[_ERROR])
            return answer.data

    def _note_silence(self, silent: bool) -> None:
        """Tell `on_silent` when requests begin to have no answer, and when they have one again."""
        if silent != self._silent:
            self._silent = silent
            self._on_silent(silent)

    async def _request(self, kind: str, data: bytes, seconds: float) -> Msg:
        """Send a request once, and return the answer. Raises StoppedError as soon as the connection ends."""
        assert self._client  # noqa: S101 - it is connected
        self.check()
        ended = asyncio.create_task(self._ended.wait())
        answered = asyncio.create_task(self._client.request(f"traincert.{kind}", data, timeout=seconds))
        try:
            await asyncio.wait([ended, answered], return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                raise StoppedError(self._failure)
            return answered.result()
        finally:
            ended.cancel()
            if not answered.cancel():  # it has ended already, but we were cancelled before we saw it
                _forget(answered)

    async def _follow(self, handlers: Mapping[str, Handler], members: Callable[[], Collection[str]]) -> None:
        """Have a connection for each member, and for nobody else."""
        names = set(members())
        gone = [name for name, client in self._served.items() if name not in names or client.is_closed]
        await _close_all(self._served.pop(name) for name in gone)
        await _windowed(self._serve(handlers, name) for name in names - self._served.keys())

    async def _serve(self, handlers: Mapping[str, Handler], member: str) -> None:
        free = asyncio.Semaphore(MOST_REQUESTS)

        async def received(message: Msg) -> None:
            await free.acquire()
            task = self._start(self._answer(handlers, client, member, message))  # one must not hold up the others
            task.add_done_callback(lambda _: free.release())

        async def failed(error: Exception) -> None:
            if isinstance(error, nats.errors.SlowConsumerError):  # it floods: while we do not read, the broker waits
                await asyncio.sleep(_PAUSE)

        with contextlib.suppress(Exception):  # the broker is away: we try it again
            client = await self._connect(error_cb=failed)
            try:
                await client.subscribe(
                    f"traincert.{member}.>",
                    cb=received,
                    pending_msgs_limit=_WAITING_MESSAGES,
                    pending_bytes_limit=_WAITING_BYTES,
                )
            except BaseException:
                await client.close()
                raise
            self._served[member] = client

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, handlers: Mapping[str, Handler], client: Client, member: str, message: Msg) -> None:
        kind = message.subject.split(".", 2)[2]
        headers = None
        try:
            if kind not in handlers:
                raise EngineError(f"there is no request {kind!r}: is this another version of traincert?")
            answer = await handlers[kind](member, message.data)
        except EngineError as error:
            answer, headers = b"", {_ERROR: _one_line(str(error))}
        except Exception as error:  # the member asks again; `check` tells our own program
            self._fault = error
            return
        # Without a connection there is no answer: the member asks again.
        with contextlib.suppress(nats.errors.Error):
            # Not with message.respond, which sends the request's headers back.
            await client.publish(message.reply, answer, headers=headers)
            while client.pending_data_size > _MOST_UNSENT and client.is_connected:
                await asyncio.sleep(_PAUSE)

    async def _disconnected(self) -> None:
        if not self._ended.is_set():
            self._on_lost(True)

    async def _reconnected(self) -> None:
        self._on_lost(False)

    async def _failed(self, error: Exception) -> None:
        """End the connection if it was lost because we were removed. nats-py would try again without end."""
        if _REMOVED.search(str(error)) and self._client and not self._ended.is_set():
            self._end(error)
            self._start(_close_all([self._client]))

    async def _closed(self) -> None:
        if self._client and not self._ended.is_set():
            self._end(self._client.last_error)

    def _end(self, error: Exception | None) -> None:
        self._failure = f"the broker has closed the connection: {error}"
        if _REMOVED.search(str(error)):
            self._failure = "the broker does not let us in any more: the coordinator has removed us"
        self._ended.set()

    async def _close(self) -> None:
        self._ended.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await _close_all([*self._served.values(), *([self._client] if self._client else [])])

    def _stop_loop(self) -> None:
        async def rest() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._loop.shutdown_default_executor()

        with self._lock:
            self._stopped = True
            future = asyncio.run_coroutine_threadsafe(rest(), self._loop)
        future.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def poll_answer(about: Mapping[str, Any], notices: Mapping[str, bytes]) -> bytes:
    """Return the answer to a poll: a line of JSON, then the statements, each compressed (zlib).

    The line has each one's kind and compressed size in bytes. The opening of a cycle of 2,000 miners has 150 KB, and
    half of that when it is compressed.
    """
    packed = {kind: _packed(each) for kind, each in notices.items()}
    line = json.dumps({**about, "notices": {kind: len(each) for kind, each in packed.items()}})
    return b"".join([line.encode(), b"\n", *packed.values()])


@lru_cache(1)
def _packed(statement: bytes) -> bytes:
    """Compress a statement. An opening goes to all miners: it is compressed once."""
    return zlib.compress(statement)


_ABOUT: dict[str, type | tuple[type, ...]] = {"boot": str, "version": int, "time": (int, float), "hold": (int, float)}


def read_poll_answer(answer: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return what `poll_answer` was made from. Raises EngineError if it is malformed."""
    line, _, rest = answer.partition(b"\n")
    notices = {}
    try:
        about = json.loads(line)
        for kind, size in about.pop("notices").items():
            notices[kind], rest = zlib.decompress(rest[:size]), rest[size:]
        if not all(isinstance(about[name], kind) for name, kind in _ABOUT.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
        raise EngineError("the coordinator's answer is malformed: is it another version of traincert?") from None
    return about, notices


def read_chunk(head: bytes, file: int, offset: int) -> bytes:
    """Return `head`, followed by the chunk at `offset` of a file, given by its descriptor."""
    message = bytearray(len(head) + CHUNK)  # read into it: to join two would copy the chunk again
    message[: len(head)] = head
    count = os.preadv(file, [memoryview(message)[len(head) :]], offset)
    del message[len(head) + count :]
    return cast(bytes, message)  # nats-py takes both


async def _close_all(clients: Iterable[Client]) -> None:
    # In tasks of their own, because a client may cancel the task in which it is closed.
    if not (closing := [asyncio.create_task(client.close()) for client in clients]):
        return
    done, late = await asyncio.wait(closing, timeout=_CLOSE_SECONDS)
    for task in late:
        task.cancel()
    for task in done:
        _forget(task)


def _forget(task: asyncio.Task[Any]) -> None:
    """Look at how a task ended: asyncio logs an exception at which nobody looked."""
    if not task.cancelled():
        task.exception()


async def _ignore(error: Exception) -> None:
    del error


def _one_line(text: str) -> str:
    """Return a text as a header can have it. It may say what a member sent, which may be long, and anything."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST_ERROR])


async def _windowed(
    coroutines: Iterable[Coroutine[Any, Any, _T]], take: Callable[[_T], object] = lambda _result: None
) -> None:
    """Run coroutines, `WINDOW` at a time, and take their results in order. The first exception ends all."""
    running = deque[asyncio.Task[_T]]()
    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                running.append(group.create_task(coroutine))
                if len(running) == WINDOW:
                    take(await running.popleft())
            while running:
                take(await running.popleft())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
