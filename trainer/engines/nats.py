"""An engine whose miners are programs of their own, which reach the coordinator through a broker.

The coordinator only answers: each miner asks what there is for it (`poll`), gets files by their hash (`file`), commits
to its update (`commit`), and sends the update (`update`) when all commits are in. Every request may come twice.

What a miner was told to be taken is on disk before: a coordinator that is killed goes on with the same commits.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import secrets
import sqlite3
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple

from traincert.trainer.engines.broker import CHUNK, Connection, Handler, poll_answer, read_chunk
from traincert.trainer.engines.orders import Commit, OnCommit, Order
from traincert.trainer.errors import EngineError, Reason
from traincert.trainer.failpoints import reached
from traincert.trainer.job import TrainingJob
from traincert.trainer.store import begin_writeback, map_blob, map_file, sync

POLL_SECONDS = 3.0
"""A poll for which there is nothing new is answered after this time, in a network of few members."""
MOST_POLL_SECONDS = 8.0
"""And never later: the broker forgets requests that are not answered in 10 seconds."""
POLLS_PER_SECOND = 100
"""Where there are many members, polls are answered later, so that there are not more of them."""
GRACE_SECONDS = 5.0
"""A miner is absent if it has not polled for twice the time in which polls are answered, and this."""
REVEAL_SECONDS = 120.0
"""By then the updates must have come, after the commits are closed."""
_CHECK_SECONDS = 1e-5  # for each miner, between two looks at all of them: many commit, or send, at the same time
_SIZE_SLACK = 1 << 20  # bytes that an update may be larger than two models
_MOST_MEMORY = 16  # times the size of a model: moments of the optimizer, and the residual, in wider types
_LONGEST_COMMIT = 4096  # bytes of a commit's statement, which is in the record


class Pledge(NamedTuple):
    """A commit as it travelled: who made it, and the SHA-256 of the opening that it is for."""

    miner: bytes
    opening: bytes
    commit: Commit


@dataclass
class _Upload:
    """A file on its way from a miner."""

    file: int  # descriptor
    path: Path
    size: int  # bytes
    missing: set[int]  # offsets
    begin: hashlib._Hash = field(default_factory=hashlib.sha256)  # of what came in order from the beginning
    hashed: int = 0  # the size of that, bytes
    end: asyncio.Task[memoryview | None] | None = None  # what happens as soon as nothing is missing, see `_finish`


@dataclass
class _Cycle:
    """The open cycle. `closed` has why those without a commit have none, as soon as no more commits are taken.

    It is `revealed` as soon as no more updates are taken, and `brought` as soon as no more memories are.
    """

    opening: bytes  # the statement that is announced
    digest: bytes  # SHA-256 of it
    deadline: float  # Unix time, seconds
    commits: dict[bytes, Commit] = field(default_factory=dict)
    receipts: dict[bytes, bytes] = field(default_factory=dict)
    closed: dict[bytes, Reason] | None = None
    revealed: bool = False
    updates: dict[bytes, memoryview] = field(default_factory=dict)  # that came while this program ran, by SHA-256
    orders: dict[bytes, Order] = field(default_factory=dict)
    asked: dict[bytes, set[bytes]] = field(default_factory=dict)  # SHA-256 of memories, by miner
    brought: bool = False
    uploads: dict[tuple[bytes, bytes], _Upload] = field(default_factory=dict)  # by miner and SHA-256


class NatsEngine:
    """The coordinator's side. Use `handlers` to serve it.

    `store` is the run's store. `journal` is a SQLite file for the open cycle. `members` returns the keys (32 bytes) of
    the members that have joined, by name: the same mapping until that changes. `read_commit` checks a commit's
    signature and reads it; it raises EngineError if it must be refused. `make_receipt` returns the signed receipt of a
    commit's statement, given its place in order, and whether it is late. `make_closing` returns the signed statement
    that a cycle takes no more commits, given the SHA-256 of its opening and the SHA-256 of each miner's update.
    `make_request` returns the signed statement that a miner has to send memories, given the SHA-256 of the opening and
    of the memories. `shared` returns the file that a member, given by its name, may read under a hash besides its
    task's, or None.
    """

    def __init__(
        self,
        job: TrainingJob,
        store: Path,
        journal: Path,
        connection: Connection,
        *,
        members: Callable[[], Mapping[str, bytes]],
        read_commit: Callable[[bytes], Pledge],
        make_receipt: Callable[[bytes, int, bool], bytes],
        make_closing: Callable[[bytes, Mapping[bytes, bytes]], bytes],
        make_request: Callable[[bytes, Sequence[bytes]], bytes],
        shared: Callable[[str, bytes], Path | None],
    ) -> None:
        self.job = job
        self.store = store
        self._connection = connection
        self._members = members
        self._read_commit = read_commit
        self._make_receipt = make_receipt
        self._make_closing = make_closing
        self._make_request = make_request
        self._shared = shared
        self._boot = secrets.token_hex(8)  # a miner that sees another one asks for everything again
        self._version = 0
        self._notices: dict[str, dict[str, tuple[int, bytes]]] = {}  # by member and kind
        self._news: dict[str, asyncio.Event] = {}  # for the polls that wait, by member
        self._changed = Event()  # for the thread that runs the cycle
        self._seen: dict[str, float] = {}  # when a member last asked for something, time.monotonic()
        self._named: tuple[Mapping[str, bytes], dict[bytes, str]] = {}, {}
        self._sessions: dict[str, list[str]] = {}  # of the programs that polled as a member, the last one last
        self._shards = Path()
        self._journal = _Journal(journal)
        self._cycle = self._journal.load(read_commit, make_receipt)
        self.handlers: dict[str, Handler] = {
            "poll": self._poll,
            "file": self._file,
            "commit": self._commit,
            "update": self._update,
            "memory": self._memory,
        }
        """By the kind of the request. The owner may add some."""

    # What the coordinator's thread calls.

    @property
    def opening(self) -> bytes | None:
        """The statement that the open cycle was announced with; None: there was no cycle yet."""
        return self._cycle.opening if self._cycle else None

    def open(self, opening: bytes, deadline: float) -> None:
        """Begin a cycle: `opening` is the statement for its miners, `deadline` a Unix time in seconds. Durably."""
        self._journal.begin(opening, deadline)
        self._cycle = _Cycle(opening, hashlib.sha256(opening).digest(), deadline)
        reached("opened")

    def notify(self) -> None:
        """End a `wait`."""
        self._changed.set()

    def clear(self, kind: str) -> None:
        """Take back all statements of a kind."""

        def cleared() -> None:
            for notices in self._notices.values():
                notices.pop(kind, None)

        self._connection.call(cleared)

    def wait(self, seconds: float) -> None:
        """Wait until a member has asked for something or sent something, for at most so many seconds.

        Raises StoppedError if the connection has ended for good.
        """
        self._connection.check()
        self._changed.wait(seconds)
        self._changed.clear()

    def present(self) -> list[bytes]:
        """Return the keys of the members that are present, sorted."""
        members = self._members()
        since = time.monotonic() - 2 * self._hold(members) - GRACE_SECONDS
        return sorted(members[name] for name, seen in self._seen.copy().items() if seen >= since and name in members)

    def status(self) -> dict[str, Any]:
        """Return who is present, who has committed, and until when commits are awaited (Unix time), by name."""
        names, cycle = self._names(), self._cycle

        def named(keys: Iterable[bytes]) -> list[str]:
            return sorted(names.get(key, key.hex()) for key in keys)  # a member may join or leave meanwhile

        is_open = cycle is not None and cycle.closed is None
        return {
            "present": named(self.present()),
            "miners": named(cycle.orders.copy()) if cycle and is_open else [],
            "committed": named(cycle.commits.copy()) if cycle and is_open else [],
            "deadline": cycle.deadline if cycle and is_open else None,
        }

    def _names(self) -> dict[bytes, str]:
        """Return the members' names by key. They are sought for each statement, so they are kept while nobody joins."""
        members = self._members()
        if members is not self._named[0]:
            self._named = members, {key: name for name, key in members.items()}
        return self._named[1]

    def post(self, miner: bytes, kind: str, statement: bytes) -> None:
        """Put a statement where its miner, or another member with this key, finds it. It replaces one of its kind."""
        self._connection.call(self._post, miner, kind, statement)

    def collect(
        self, shards: Path, orders: Sequence[Order], on_commit: OnCommit | None = None
    ) -> list[Commit | Reason]:
        """Announce the cycle, and wait until all miners that are present have committed, or for the deadline.

        The reason why a miner has no commit is LATE, or ABSENT if it left.
        """
        cycle = self._begun(shards, orders)
        on_commit = on_commit or (lambda _done, _total: None)
        while cycle.closed is None:
            self._changed.clear()
            on_commit(len(cycle.commits), len(orders))
            present = set(self.present())
            without = [miner for miner in cycle.orders if miner not in cycle.commits]
            left = cycle.deadline - time.time()
            if left <= 0 or not present & set(without):
                why = {miner: Reason.LATE if miner in present else Reason.ABSENT for miner in without}
                self._connection.call(self._close, cycle, why)
            else:
                self._pause(cycle, left)
        on_commit(len(orders), len(orders))
        return [cycle.commits.get(miner) or cycle.closed[miner] for miner in cycle.orders]

    def reveal(self, orders: Sequence[Order], commits: Sequence[Commit | Reason]) -> list[memoryview | Reason]:  # noqa: ARG002
        """Ask those who have committed for their updates. The reason why one does not come is WITHHELD."""
        cycle = self._open_cycle()
        closing = self._make_closing(
            cycle.digest, {miner: commit.update_hash for miner, commit in cycle.commits.items()}
        )
        for miner in cycle.commits:
            self.post(miner, "reveal", closing)
        self._wait_for(cycle, lambda: {miner for miner, commit in cycle.commits.items() if self._lacks(commit)})
        cycle.revealed = True
        self._connection.run(self._end_uploads(cycle))
        return [commit if isinstance(commit, Reason) else self._sent(cycle, commit) for commit in commits]

    def bring(self, wanted: Mapping[bytes, Sequence[bytes]]) -> None:
        """Ask miners for their memories, and wait until they are here, or the miners are away."""
        cycle = self._open_cycle()
        asked = {
            miner: missing
            for miner, memories in wanted.items()
            if (missing := {digest for digest in memories if not (self.store / digest.hex()).exists()})
        }
        self._connection.call(cycle.asked.update, asked)
        for miner, memories in asked.items():
            self.post(miner, "memories", self._make_request(cycle.digest, sorted(memories)))
        self._wait_for(
            cycle,
            lambda: {
                miner
                for miner, memories in asked.items()
                if not all((self.store / digest.hex()).exists() for digest in memories)
            },
        )
        cycle.brought = True
        self._connection.run(self._end_uploads(cycle))

    def _wait_for(self, cycle: _Cycle, lacking: Callable[[], set[bytes]]) -> None:
        """Wait until no miner that is present lacks something, for `REVEAL_SECONDS` at most."""
        deadline = time.monotonic() + REVEAL_SECONDS
        while True:
            self._changed.clear()
            left = deadline - time.monotonic()
            if left <= 0 or not lacking() & set(self.present()):
                return
            self._pause(cycle, left)

    def _pause(self, cycle: _Cycle, left: float) -> None:
        """Wait until a miner does something, for `left` seconds at most.

        Raises StoppedError if the connection has ended for good.
        """
        self._connection.check()
        self._changed.wait(min(left, 1.0))
        time.sleep(len(cycle.orders) * _CHECK_SECONDS)

    def _sent(self, cycle: _Cycle, commit: Commit) -> memoryview | Reason:
        if self._lacks(commit):
            return Reason.WITHHELD
        return cycle.updates.get(commit.update_hash) or map_blob(self.store, commit.update_hash)

    @staticmethod
    def _hold(members: Mapping[str, bytes]) -> float:
        return min(MOST_POLL_SECONDS, max(POLL_SECONDS, len(members) / POLLS_PER_SECOND))

    def _begun(self, shards: Path, orders: Sequence[Order]) -> _Cycle:
        cycle = self._open_cycle()
        self._shards = shards

        def begin() -> None:
            for notices in self._notices.values():  # of the cycle before
                for kind in ("opening", "reveal", "memories"):
                    notices.pop(kind, None)
            cycle.orders = {order.task.miner: order for order in orders}
            now = time.monotonic()
            for name, key in self._members().items():
                if key in cycle.orders:  # after a restart they have some time to come back
                    self._seen[name] = now

        self._connection.call(begin)
        for miner in cycle.orders:  # one by one, or the answers to all of them would be in memory at the same time
            self.post(miner, "opening", cycle.opening)
        return cycle

    def _open_cycle(self) -> _Cycle:
        if self._cycle is None:
            raise EngineError("no cycle is open")
        return self._cycle

    def _lacks(self, commit: Commit) -> bool:
        try:
            return (self.store / commit.update_hash.hex()).stat().st_size != commit.update_size
        except FileNotFoundError:
            return True

    # What runs in the connection's thread.

    def _close(self, cycle: _Cycle, why: dict[bytes, Reason]) -> None:
        why = {miner: reason for miner, reason in why.items() if miner not in cycle.commits}
        self._journal.close(why)
        reached("closed")
        cycle.closed = why

    def _post(self, miner: bytes, kind: str, statement: bytes) -> None:
        if name := self._names().get(miner):
            self._version += 1
            self._notices.setdefault(name, {})[kind] = (self._version, statement)
            if news := self._news.pop(name, None):
                news.set()

    async def _poll(self, member: str, data: bytes) -> bytes:
        try:
            asked = json.loads(data)
            boot, since, session = asked["boot"], asked["version"], asked["session"]
        except (ValueError, KeyError, TypeError, RecursionError):
            since = session = None
        if not isinstance(since, int) or not isinstance(session, str):
            raise EngineError("a poll must be JSON with boot, version and session")
        if boot != self._boot:
            since = 0
        if member not in self._members():
            raise EngineError("this member has not joined yet: join with its invitation first")
        self._check_session(member, session[:32])
        hold = self._hold(self._members())
        until = time.monotonic() + hold
        while True:
            self._seen[member] = time.monotonic()
            self._changed.set()
            news = self._news.setdefault(member, asyncio.Event())
            notices = self._notices.get(member, {})
            fresh = {kind: each for kind, (version, each) in notices.items() if version > since}
            left = until - time.monotonic()
            if fresh or left <= 0:
                about = {"boot": self._boot, "version": self._version, "time": time.time(), "hold": hold}
                return poll_answer(about, fresh)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), left)

    def _check_session(self, member: str, session: str) -> None:
        """Raise EngineError if another program has begun to poll as this member: the last one counts."""
        sessions = self._sessions.setdefault(member, [session])
        if session in sessions[:-1]:
            raise EngineError(f"another program takes part as {member} now: each member needs an invitation of its own")
        if session != sessions[-1]:
            self._sessions[member] = [*sessions[-9:], session]

    async def _file(self, member: str, data: bytes) -> bytes:
        digest, (offset,) = data[:32], _unpacked("<Q", data[32:])
        path = self._readable(member, digest)
        try:
            file = os.open(path, os.O_RDONLY) if path else -1
        except OSError:
            file = -1
        if file < 0:
            raise EngineError(f"there is no file {digest.hex()} for {member}")
        try:
            size = os.fstat(file).st_size
            return read_chunk(struct.pack("<Q", size), file, min(offset, size))
        finally:
            os.close(file)

    def _readable(self, member: str, digest: bytes) -> Path | None:
        """Return where a file lies, if this member may read it."""
        if shared := self._shared(member, digest):
            return shared
        order = self._cycle.orders.get(self._members().get(member, b"")) if self._cycle else None
        if order and digest == order.model_hash:
            return self.store / digest.hex()
        if order and digest == order.shard_hash:
            return self._shards / digest.hex()
        return None

    async def _commit(self, member: str, data: bytes) -> bytes:
        if len(data) > _LONGEST_COMMIT:
            raise EngineError(f"a commit of {len(data)} bytes is refused: at most {_LONGEST_COMMIT}")
        pledge = self._read_commit(data)
        cycle = self._cycle
        if pledge.miner != self._members().get(member):
            raise EngineError(f"the commit is signed by {pledge.miner.hex()}, which is not the key of {member}")
        if cycle is None or pledge.opening != cycle.digest:
            raise EngineError("the commit is for a cycle that is not open")
        if first := cycle.commits.get(pledge.miner):
            if pledge.commit._replace(statement=first.statement, place=first.place, late=first.late) != first:
                self._journal.keep_evidence(pledge.miner, data)
            return cycle.receipts[pledge.miner]
        if pledge.miner not in cycle.orders:
            raise EngineError(f"{member} has no task in this cycle")
        if cycle.closed is not None:
            raise EngineError("the commit came too late: the cycle takes no more commits")
        limit = _SIZE_SLACK + 2 * (self.store / cycle.orders[pledge.miner].model_hash.hex()).stat().st_size
        if not 0 < pledge.commit.update_size <= limit:
            raise EngineError(f"an update of {pledge.commit.update_size} bytes is refused: at most {limit}")
        place, late = len(cycle.commits), self._is_late(cycle)
        receipt = self._make_receipt(data, place, late)
        self._journal.add(place, late, data)
        reached("committed")
        cycle.commits[pledge.miner] = pledge.commit._replace(place=place, late=late)
        cycle.receipts[pledge.miner] = receipt
        self._changed.set()
        return receipt

    def _is_late(self, cycle: _Cycle) -> bool:
        soon = self.job.late_seconds
        return soon is not None and time.time() > cycle.deadline - self.job.task_seconds + soon

    async def _update(self, member: str, data: bytes) -> bytes:
        digest, (size, offset), chunk = data[:32], _unpacked("<QQ", data[32:48]), memoryview(data)[48:]
        cycle, miner = self._cycle, self._members().get(member, b"")
        commit = cycle.commits.get(miner) if cycle else None
        if cycle is None or commit is None or commit.update_hash != digest:
            raise EngineError(f"{member} has not committed to the update {digest.hex()} in this cycle")
        if cycle.closed is None:
            raise EngineError("updates are taken when all commits are in")
        if not self._lacks(commit):
            return b"whole"
        if cycle.revealed:
            raise EngineError("the update came too late: the cycle takes no more updates")
        if size != commit.update_size:
            raise EngineError(f"the update has {size} bytes; {member} has committed to {commit.update_size}")
        update = await self._receive(cycle, miner, digest, size, offset, chunk)
        if update is None:
            return b""
        cycle.updates[digest] = update
        reached("revealed")
        return b"whole"

    async def _memory(self, member: str, data: bytes) -> bytes:
        digest, (size, offset), chunk = data[:32], _unpacked("<QQ", data[32:48]), memoryview(data)[48:]
        cycle, miner = self._cycle, self._members().get(member, b"")
        if cycle is None or digest not in cycle.asked.get(miner, ()):
            raise EngineError(f"nobody has asked {member} for the memory {digest.hex()}")
        if (self.store / digest.hex()).exists():
            return b"whole"
        if cycle.brought:
            raise EngineError("the memory came too late: the cycle takes no more memories")
        limit = _SIZE_SLACK + _MOST_MEMORY * (self.store / cycle.orders[miner].model_hash.hex()).stat().st_size
        if not 0 < size <= limit:
            raise EngineError(f"a memory of {size} bytes is refused: at most {limit}")
        return b"" if await self._receive(cycle, miner, digest, size, offset, chunk) is None else b"whole"

    async def _receive(
        self, cycle: _Cycle, miner: bytes, digest: bytes, size: int, offset: int, chunk: memoryview
    ) -> memoryview | None:
        """Take a chunk of a file. Return the file as soon as it is whole; it is in the store then."""
        if offset % CHUNK or offset >= size or len(chunk) != min(CHUNK, size - offset):
            raise EngineError(f"{len(chunk)} bytes at {offset} are no chunk of {size} bytes")
        upload = cycle.uploads.get((miner, digest)) or self._new_upload(cycle, miner, digest, size)
        if size != upload.size:
            raise EngineError(f"the file had {upload.size} bytes before, and {size} now")
        if offset in upload.missing:
            if os.pwrite(upload.file, chunk, offset) != len(chunk):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), upload.path)
            begin_writeback(upload.file, offset, len(chunk))
            if offset == upload.hashed:
                upload.begin.update(chunk)
                upload.hashed += len(chunk)
            upload.missing.discard(offset)
        if upload.missing:
            return None
        if upload.end is None:
            upload.end = asyncio.create_task(asyncio.to_thread(_finish, upload, self.store / digest.hex()))
        try:
            whole = await asyncio.shield(upload.end)
        finally:
            if cycle.uploads.get((miner, digest)) is upload:
                del cycle.uploads[miner, digest]
        if whole is None:
            raise EngineError(f"the file is not what it must be: its SHA-256 is not {digest.hex()}")
        self._changed.set()
        return whole

    def _new_upload(self, cycle: _Cycle, miner: bytes, digest: bytes, size: int) -> _Upload:
        handle, path = tempfile.mkstemp(dir=self.store, prefix=".writing-")
        upload = _Upload(handle, Path(path), size, set(range(0, size, CHUNK)))
        cycle.uploads[miner, digest] = upload
        return upload

    async def _end_uploads(self, cycle: _Cycle) -> None:
        """Give up the files that are on their way. After this nothing is written into the store."""
        uploads, cycle.uploads = cycle.uploads, {}
        for upload in uploads.values():
            if upload.end:
                await asyncio.wait([upload.end])
            else:
                os.close(upload.file)
                upload.path.unlink()


def _finish(upload: _Upload, path: Path) -> memoryview | None:
    """Make a file that has all its chunks one of the store, durably. Return it, or None if it has the wrong hash."""
    with os.fdopen(upload.file, "rb") as file:
        data = map_file(upload.path)
        upload.begin.update(data[upload.hashed :])
        if upload.begin.hexdigest() != path.name:
            upload.path.unlink()
            return None
        os.fsync(file.fileno())
    upload.path.replace(path)
    sync(path.parent)
    return data


def _unpacked(form: str, data: bytes) -> tuple[int, ...]:
    try:
        return struct.unpack(form, data)
    except struct.error:
        raise EngineError(f"a request of {len(data)} bytes where {struct.calcsize(form)} belong") from None


class _Journal:
    """The open cycle on disk: its opening, the commits in their order, and who had none when it was closed."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._lock = Lock()  # for the coordinator's thread and the connection's
        self._database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        # With a write-ahead log and FULL each transaction costs one fsync: there is one for each commit.
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._execute(
            "CREATE TABLE IF NOT EXISTS cycle (opening BLOB NOT NULL, deadline REAL NOT NULL, closed TEXT)",
            "CREATE TABLE IF NOT EXISTS commits (place INTEGER PRIMARY KEY, late INTEGER, statement BLOB NOT NULL)",
            "CREATE TABLE IF NOT EXISTS evidence (opening BLOB, miner BLOB, statement BLOB, UNIQUE (opening, miner))",
        )

    def begin(self, opening: bytes, deadline: float) -> None:
        """Forget the last cycle, and begin one."""
        self._execute(
            "DELETE FROM commits",
            "DELETE FROM cycle",
            ("INSERT INTO cycle VALUES (?, ?, NULL)", (opening, deadline)),
        )

    def add(self, place: int, late: bool, statement: bytes) -> None:
        """Add a commit."""
        self._execute(("INSERT INTO commits VALUES (?, ?, ?)", (place, late, statement)))

    def close(self, why: Mapping[bytes, Reason]) -> None:
        """Take no more commits."""
        self._execute(("UPDATE cycle SET closed = ?", (json.dumps({key.hex(): each for key, each in why.items()}),)))

    def keep_evidence(self, miner: bytes, statement: bytes) -> None:
        """Keep a second, different commit of a miner; one for each cycle is enough."""
        self._execute(("INSERT OR IGNORE INTO evidence SELECT opening, ?, ? FROM cycle", (miner, statement)))

    def load(
        self, read_commit: Callable[[bytes], Pledge], make_receipt: Callable[[bytes, int, bool], bytes]
    ) -> _Cycle | None:
        """Return the open cycle, or None if there was none yet."""
        with self._lock:
            row = self._database.execute("SELECT opening, deadline, closed FROM cycle").fetchone()
            statements = self._database.execute("SELECT place, late, statement FROM commits ORDER BY place").fetchall()
        if row is None:
            return None
        opening, deadline, closed = row
        cycle = _Cycle(opening, hashlib.sha256(opening).digest(), deadline)
        for place, late, statement in statements:
            pledge = read_commit(statement)
            cycle.commits[pledge.miner] = pledge.commit._replace(place=place, late=bool(late))
            cycle.receipts[pledge.miner] = make_receipt(statement, place, bool(late))
        if closed is not None:
            cycle.closed = {bytes.fromhex(key): Reason(reason) for key, reason in json.loads(closed).items()}
        return cycle

    def _execute(self, *statements: str | tuple[str, tuple[object, ...]]) -> None:
        """Execute all statements, or none, durably."""
        with self._lock, self._database as database:
            database.execute("BEGIN IMMEDIATE")
            for statement in statements:
                database.execute(*([statement] if isinstance(statement, str) else statement))
