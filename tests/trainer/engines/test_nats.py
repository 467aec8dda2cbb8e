"""Engine `nats` with a real nats-server: what must be refused, what may come twice, and who may be killed.

There is no Bitcoin node. The tests are the miners: they send requests over real connections.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import random
import socket
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import nkeys
import psutil
import pytest
from coincurve import PrivateKey

from broker_process import PATIENCE, BrokerProcess
from traincert.bridge.broker import (
    Credential,
    connect,
    connect_options,
    coordinator_credential,
    public_key,
)
from traincert.bridge.consensus.codec import tagged_hash
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.coordinator import Slot
from traincert.bridge.invitations import MINER
from traincert.bridge.members import MemberList
from traincert.bridge.messages import (
    Closing,
    CommitMessage,
    CommitReceipt,
    Join,
    MemoryRequest,
    Opening,
    assignment_seed,
    commits_root,
    score_seed,
    seal,
    unseal,
)
from traincert.bridge.remote_miners import RemoteMiners
from traincert.regtest import wait_for
from traincert.trainer.cycle import CycleResult, Trainer
from traincert.trainer.engines import broker as broker_module
from traincert.trainer.engines import nats as nats_module
from traincert.trainer.engines.broker import (
    CHUNK,
    Connection,
    RefusedError,
    StoppedError,
    poll_answer,
    read_poll_answer,
)
from traincert.trainer.engines.executor import Executor
from traincert.trainer.engines.nats import NatsEngine
from traincert.trainer.engines.orders import Commit, Order
from traincert.trainer.errors import EngineError, Reason
from traincert.trainer.examples import Dataset
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import RunFolder
from traincert.trainer.spot_checks import Drawn, SpotCheck, SpotChecker
from traincert.trainer.store import write_blob
from traincert.trainer.tasks import assign

FAR = 10_000  # seconds until a deadline that does not come

NAMES = ["alice", "bob", "carol"]
SECRETS = {name: PrivateKey(hashlib.sha256(name.encode()).digest()) for name in [*NAMES, "coordinator", "mallory"]}
KEYS = {name: secret.public_key_xonly.format() for name, secret in SECRETS.items()}
PARAMS = TrainingParams({1: TrainingKeys(1, (KEYS["coordinator"],))}, bytes(32), bytes(32))


Commits = Callable[..., bytes]
"""Returns a member's signed commit, with some changes."""


class Server(BrokerProcess):
    """A nats-server, and the credentials of its members."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ["127.0.0.1"])
        self.credentials = {name: self.members.admit(name) for name in NAMES}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("broker"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(autouse=True)
def nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No thread of a connection, no task that was not awaited, nothing that only a log has."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "broker"] == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


class Coordinator:
    """The coordinator as its program has it, without chain and cosigners."""

    def __init__(self, server: Server, folder: Path, dataset: Dataset) -> None:
        self.server, self.folder, self.dataset = server, folder, dataset
        folder.mkdir(exist_ok=True)
        self.members = MemberList(folder / "members.sqlite")
        for name in NAMES:
            self.members.invite(name, MINER)
            self.members.join(name, KEYS[name])
        self.pool = ThreadPoolExecutor()
        self.start()

    def start(self, store: Path | None = None) -> None:
        self.stack = ExitStack()
        self.remote = RemoteMiners(self.members, SECRETS["coordinator"], PARAMS, wanted=3, waiting=lambda *_: None)
        credential = coordinator_credential(self.server.folder)
        self.connection = self.stack.enter_context(Connection(partial(connect, credential)))
        self.run = self.stack.enter_context(RunFolder(self.folder / "run", self.dataset.job))
        self.engine = NatsEngine(
            self.dataset.job,
            store or self.run.store,
            self.folder / "cycle.sqlite",
            self.connection,
            members=self.members.keys,
            read_commit=self.remote.read_commit,
            make_receipt=self.remote.make_receipt,
            make_closing=self.remote.make_closing,
            make_request=self.remote.make_request,
            shared=self.remote.shared,
        )
        self.trainer = self.stack.enter_context(Trainer(self.dataset, self.engine))
        if not self.run.records:
            self.run.begin(self.trainer.start(), self.dataset)
        self.state = self.run.load()
        self.remote.attach(self.engine, self.trainer, self.run)
        self.connection.serve(self.engine.handlers, self.members.roles)

    def kill(self) -> None:
        """Forget all that is not on disk."""
        self.stack.close()
        self.engine.notify()  # ends the thread of the cycle

    def restart(self) -> None:
        self.kill()
        self.start()

    def opening(self, cycle: int = 0, **changes: Any) -> bytes:
        """The statement that announces a cycle for alice and bob; carol has no task."""
        miners = sorted([KEYS["alice"], KEYS["bob"]])
        opening = Opening(
            job=bytes(32),
            cycle=cycle,
            height=cycle + 1,
            prev_block=bytes(32),
            model=self.state.model_hash,
            dataset_root=self.dataset.root,
            miners=miners,
            memories=[None] * len(miners),
            opened=0,
            deadline=0,
        )
        return seal(SECRETS["coordinator"], PARAMS.chain_id, replace(opening, **changes))

    def share(self, data: bytes) -> bytes:
        """Let members read a file. Returns its SHA-256."""
        folder = self.folder / "shared"
        folder.mkdir(exist_ok=True)
        digest = write_blob(folder, data)
        self.engine._shared = lambda _, asked: folder / asked.hex() if asked == digest else None
        return digest

    def orders(self) -> list[Order]:
        assert self.engine.opening is not None
        _, opening = unseal(PARAMS.chain_id, Opening, self.engine.opening)
        return self.trainer.assign(self.state, opening.miners, b"seed")

    def begin(self, cycle: int = 0, seconds: float = FAR) -> Cycle:
        """Open a cycle, and run it in a thread of its own."""
        self.engine.open(self.opening(cycle), time.time() + seconds)
        return self.go_on()

    def go_on(self) -> Cycle:
        assert self.engine.opening is not None
        return Cycle(hashlib.sha256(self.engine.opening).digest(), self.pool.submit(self._run), self)

    def _run(self) -> tuple[list[Commit | Reason], list[memoryview | Reason]]:
        orders = self.orders()
        commits = self.engine.collect(self.dataset.shard_folder, orders)
        return commits, self.engine.reveal(orders, commits)

    def bring(self, **wanted: Sequence[bytes]) -> Future[None]:
        """Ask members for files in a thread of its own, by their hashes."""
        return self.pool.submit(self.engine.bring, {KEYS[name]: each for name, each in wanted.items()})

    def commits(self) -> dict[str, tuple[int, bool]]:
        """The place of each commit that was taken, and whether it is late."""
        assert self.engine._cycle
        commits = self.engine._cycle.commits
        return {name: (commits[KEYS[name]].place, commits[KEYS[name]].late) for name in NAMES if KEYS[name] in commits}

    def evidence(self) -> list[tuple[bytes, bytes]]:
        with closing(sqlite3.connect(self.folder / "cycle.sqlite")) as database:
            return database.execute("SELECT miner, statement FROM evidence").fetchall()


class Cycle:
    """An open cycle. `digest` is the SHA-256 of its opening."""

    def __init__(
        self,
        digest: bytes,
        future: Future[tuple[list[Commit | Reason], list[memoryview | Reason]]],
        coordinator: Coordinator,
    ) -> None:
        self.digest, self._future, self._coordinator = digest, future, coordinator

    def result(self) -> tuple[dict[str, bytes | Reason], dict[str, bytes | Reason]]:
        """The hash of each miner's update, and the update itself; or the reason why there is none."""
        commits, updates = self._future.result(PATIENCE)
        miners = [order.task.miner for order in self._coordinator.orders()]
        names = [next(name for name, key in KEYS.items() if key == miner) for miner in miners]
        hashes = [commit.update_hash if isinstance(commit, Commit) else commit for commit in commits]
        sent = [each if isinstance(each, Reason) else bytes(each) for each in updates]
        return dict(zip(names, hashes, strict=True)), dict(zip(names, sent, strict=True))

    def ends_without_a_result(self) -> None:
        with pytest.raises(StoppedError):
            self._future.result(PATIENCE)


@pytest.fixture
def coordinator(server: Server, tmp_path: Path, dataset: Dataset) -> Iterator[Coordinator]:
    coordinator = Coordinator(server, tmp_path / "coordinator", dataset)
    try:
        yield coordinator
    finally:
        coordinator.kill()
        coordinator.pool.shutdown()


class Miner:
    """A member's side."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name, self.connection = name, connection
        self.key = KEYS[name]
        self.since: dict[str, Any] = {"boot": "", "version": 0, "session": name}

    def ask(self, kind: str, data: bytes) -> bytes:
        return self.connection.ask(kind, data)

    def refusal(self, kind: str, data: bytes) -> str:
        """Why the coordinator refuses a request: one line."""
        with pytest.raises(RefusedError) as caught:
            self.ask(kind, data)
        assert str(caught.value).isprintable()
        return str(caught.value)

    def poll(self) -> dict[str, bytes]:
        answer, notices = read_poll_answer(self.ask("poll", json.dumps(self.since).encode()))
        self.since |= {"boot": answer["boot"], "version": answer["version"]}
        return notices

    def wait_for(self, kind: str) -> bytes:
        """Poll until there is a statement of this kind."""
        while kind not in (notices := self.poll()):
            pass
        return notices[kind]

    def sealed(self, cycle: Cycle, update: bytes, **changes: Any) -> bytes:
        """The commit to an update. `changes` are of its fields, or of who signs it and for which network."""
        secret, chain_id = changes.pop("secret", SECRETS[self.name]), changes.pop("chain_id", PARAMS.chain_id)
        digest = hashlib.sha256(update).digest()
        message = CommitMessage(cycle.digest, digest, len(update), None, None, 1.0, "a class")
        return seal(secret, chain_id, replace(message, **changes))

    def commit(self, cycle: Cycle, update: bytes) -> CommitReceipt:
        return read_receipt(self.ask("commit", self.sealed(cycle, update)))

    def send(self, update: bytes) -> None:
        self._send("update", update)

    def send_memory(self, memory: bytes) -> None:
        self._send("memory", memory)

    def _send(self, kind: str, data: bytes) -> None:
        with TemporaryDirectory() as folder:
            self.connection.send(kind, write_blob(Path(folder), data), Path(folder))


def read_receipt(statement: bytes) -> CommitReceipt:
    key, receipt = unseal(PARAMS.chain_id, CommitReceipt, statement)
    assert key == KEYS["coordinator"]
    return receipt


@pytest.fixture
def miners(server: Server, coordinator: Coordinator) -> Iterator[dict[str, Miner]]:
    assert coordinator.members.roles()  # it serves them
    with ExitStack() as stack:
        yield {
            name: Miner(name, stack.enter_context(Connection(partial(connect, server.credentials[name]))))
            for name in NAMES
        }


@pytest.fixture
def alice(miners: dict[str, Miner]) -> Miner:
    return miners["alice"]


@pytest.fixture
def bob(miners: dict[str, Miner]) -> Miner:
    return miners["bob"]


@pytest.fixture
def carol(miners: dict[str, Miner]) -> Miner:
    return miners["carol"]


@pytest.fixture
def cycle(coordinator: Coordinator, alice: Miner, bob: Miner) -> Cycle:
    """A cycle that alice and bob know of."""
    cycle = coordinator.begin()
    alice.wait_for("opening")
    bob.wait_for("opening")
    return cycle


UPDATES = {name: name.encode() * 100 for name in NAMES}
BIG = random.Random(1).randbytes(2 * CHUNK + 1)  # noqa: S311


def closing_of(statement: bytes) -> Closing:
    key, closing = unseal(PARAMS.chain_id, Closing, statement)
    assert key == KEYS["coordinator"]
    return closing


def request_of(statement: bytes) -> MemoryRequest:
    key, request = unseal(PARAMS.chain_id, MemoryRequest, statement)
    assert key == KEYS["coordinator"]
    return request


def closes(cycle: Cycle, alice: Miner, bob: Miner) -> None:
    """Both commit, unless they have, and send their updates: the cycle closes, and has them."""
    for miner in (alice, bob):
        miner.commit(cycle, UPDATES[miner.name])
    for miner in (alice, bob):
        assert closing_of(miner.wait_for("reveal")).opening == cycle.digest
        miner.send(UPDATES[miner.name])
    hashes, updates = cycle.result()
    assert updates == {"alice": UPDATES["alice"], "bob": UPDATES["bob"]}
    assert hashes == {name: hashlib.sha256(UPDATES[name]).digest() for name in ("alice", "bob")}


# What must be refused. The cycle goes on, and closes.


def changed(sealed: bytes, old: bytes, new: bytes) -> bytes:
    """A commit of which some bytes were changed before it was signed."""
    data = sealed[96:]
    assert old in data
    return signed("commit", data.replace(old, new))


def signed(kind: str, data: bytes) -> bytes:
    """A statement of alice's that may be malformed, with a right signature."""
    digest = tagged_hash("traincert/message", PARAMS.chain_id + bytes([len(kind)]) + kind.encode() + data)
    return KEYS["alice"] + SECRETS["alice"].sign_schnorr(digest) + data


FORGED = "commit: the signature does not verify: it is forged, altered, or of another network"

# How the commit comes about, by what is wrong with it, and why it is refused.
COMMITS: dict[str, tuple[Callable[[Commits], bytes], str]] = {
    "altered": (lambda made: made()[:-1] + b" }", FORGED),
    "of another network": (lambda made: made(chain_id=bytes(32)), FORGED),
    "of another kind": (lambda _: seal(SECRETS["alice"], PARAMS.chain_id, Join("alice")), FORGED),
    "garbage": (lambda _: b"garbage" * 100, FORGED),
    "empty": (lambda _: b"", "commit: 0 bytes are too few for a statement"),
    "1 MiB long": (lambda _: bytes(1 << 20), "a commit of 1048576 bytes is refused: at most 4096"),
    "long with a signature": (lambda made: changed(made(), b"}", b"}" + b" " * 4096), "is refused: at most 4096"),
    "for another opening": (lambda made: made(opening=bytes(32)), "the commit is for a cycle that is not open"),
    "signed by another member": (
        lambda made: made(secret=SECRETS["bob"]),
        f"the commit is signed by {KEYS['bob'].hex()}, which is not the key of alice",
    ),
    "signed by a stranger": (
        lambda made: made(secret=SECRETS["mallory"]),
        f"the commit is signed by {KEYS['mallory'].hex()}, which is not the key of alice",
    ),
    "to nothing": (lambda made: made(update_size=0), "an update of 0 bytes is refused: at most "),
    "to too much": (lambda made: made(update_size=2**63), "an update of 9223372036854775808 bytes is refused: at most"),
    "with a key twice": (lambda made: changed(made(), b"}", b',"update_size":1}'), "commit: a key is there twice"),
    "with another key": (
        lambda made: changed(made(), b"}", b',"a\\r\\nb":1}'),
        r"commit: 'a\r\nb': Unexpected keyword argument",
    ),
    "nested deeply": (lambda _: signed("commit", b"[" * 4000), "commit: Invalid JSON: recursion limit exceeded"),
    "not a number": (
        lambda made: changed(made(), b":1.0", b":NaN"),
        "commit: 'seconds': Input should be a finite number",
    ),
}


@pytest.mark.parametrize("what", COMMITS)
def test_a_commit_is_refused_by_a_line_that_says_why(cycle: Cycle, alice: Miner, bob: Miner, what: str) -> None:
    make, why = COMMITS[what]
    assert why in alice.refusal("commit", make(partial(alice.sealed, cycle, b"update")))
    closes(cycle, alice, bob)


def test_the_answer_to_a_poll_has_any_statements() -> None:
    about = {"boot": "a", "version": 7, "time": 1.5, "hold": 3}
    for notices in ({}, {"receipt": b""}, {"opening": b"\n{}\n", "receipt": b"", "reveal": bytes(range(256))}):
        assert read_poll_answer(poll_answer(about, notices)) == (about, notices)
    hashes = {"opening": b"".join(hashlib.sha256(bytes([each])).hexdigest().encode() for each in range(250))}
    assert read_poll_answer(poll_answer(about, hashes)) == (about, hashes)
    assert len(poll_answer(about, hashes)) < 9_500  # of 16,000


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]\n",
        b"{}\n",
        b'{"notices": {}}\n',
        b'{"notices": {"opening": 3}}\nabc',
        b'{"notices": {"opening": ""}}\n',
        b'{"notices": {}, "boot": "a", "version": 7, "time": 1.5}\n',
        b'{"notices": {}, "boot": "a", "version": 7, "time": "now", "hold": 3}\n',
    ],
)
def test_a_malformed_answer_to_a_poll_is_named(answer: bytes) -> None:
    with pytest.raises(EngineError, match="malformed: is it another version"):
        read_poll_answer(answer)


def test_an_older_cycles_commit_is_refused_when_it_comes_again(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner
) -> None:
    old = alice.sealed(cycle, UPDATES["alice"])
    closes(cycle, alice, bob)
    again = coordinator.begin(1)
    alice.wait_for("opening")
    bob.wait_for("opening")
    assert alice.refusal("commit", old) == "the commit is for a cycle that is not open"
    closes(again, alice, bob)


def test_a_second_commit_is_answered_with_the_firsts_receipt_and_kept_once(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner
) -> None:
    first = alice.ask("commit", alice.sealed(cycle, UPDATES["alice"]))
    others = [alice.sealed(cycle, other) for other in (b"other", b"another")]
    assert [alice.ask("commit", other) for other in others] == [first, first]
    assert read_receipt(first).commit != hashlib.sha256(others[0]).digest()  # so she sees that it is not this one's
    assert coordinator.evidence() == [(KEYS["alice"], others[0])]
    closes(cycle, alice, bob)
    again = coordinator.begin(1)
    for miner in (alice, bob):
        miner.wait_for("opening")
        miner.commit(again, b"one")
    bobs = bob.sealed(again, b"two")
    bob.ask("commit", bobs)  # after the commits are closed
    assert coordinator.evidence() == [(KEYS["alice"], others[0]), (KEYS["bob"], bobs)]


def test_a_member_without_a_task_cannot_commit(cycle: Cycle, alice: Miner, bob: Miner, carol: Miner) -> None:
    assert carol.refusal("commit", carol.sealed(cycle, b"u")) == "carol has no task in this cycle"
    assert carol.refusal("update", update_chunk(b"u")).startswith("carol has not committed to the update ")
    closes(cycle, alice, bob)


def test_a_commit_after_the_close_is_late(
    coordinator: Coordinator, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cycle = coordinator.begin()
    alice.wait_for("opening")
    alice.commit(cycle, UPDATES["alice"])
    monkeypatch.setattr(nats_module, "time", SetClock(2 * FAR))
    alice.wait_for("reveal")
    late = "the commit came too late: the cycle takes no more commits"
    assert bob.refusal("commit", bob.sealed(cycle, b"u")) == late
    alice.send(UPDATES["alice"])
    assert cycle.result()[1] == {"alice": UPDATES["alice"], "bob": Reason.LATE}


class SetClock:
    """The module `time`, whose clock was set by so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.monotonic, self.sleep = time.monotonic, time.sleep

    def time(self) -> float:
        return time.time() + self._seconds


def update_chunk(data: bytes, offset: int = 0, digest: bytes | None = None, size: int | None = None) -> bytes:
    head = struct.pack("<QQ", len(data) if size is None else size, offset)
    return (digest or hashlib.sha256(data).digest()) + head + data[offset : offset + CHUNK]


def test_an_update_is_taken_only_as_it_was_committed_to(cycle: Cycle, alice: Miner, bob: Miner) -> None:
    digest = hashlib.sha256(BIG).digest()
    alice.commit(cycle, BIG)
    assert alice.refusal("update", update_chunk(BIG)) == "updates are taken when all commits are in"
    bob.commit(cycle, UPDATES["bob"])
    alice.wait_for("reveal")
    no_chunk = f"no chunk of {len(BIG)} bytes"
    for data, offset in (
        (BIG[:10], 0),
        (BIG + b"x", 2 * CHUNK),
        (BIG[:-1], 2 * CHUNK),
        (BIG, 1),
        (BIG, CHUNK - 1),
        (BIG, 3 * CHUNK),
        (BIG, CHUNK << 40),
        (BIG, 2**64 - CHUNK),
    ):
        assert no_chunk in alice.refusal("update", update_chunk(data, offset, digest, len(BIG))), (len(data), offset)
    for size in (0, 1, len(BIG) - 1, len(BIG) + 1, 2**64 - 1):
        why = f"the update has {size} bytes; alice has committed to {len(BIG)}"
        assert alice.refusal("update", update_chunk(BIG, 0, digest, size)) == why
    assert "a request of 4 bytes where 16 belong" in alice.refusal("update", digest + bytes(4))
    assert "a request of 0 bytes where 16 belong" in alice.refusal("update", b"")
    for foreign in (BIG, UPDATES["alice"]):
        assert "bob has not committed to the update" in bob.refusal("update", update_chunk(foreign))
    wrong = BIG[:-1] + b"?"
    for offset in (0, CHUNK):
        alice.ask("update", update_chunk(wrong, offset, digest))
    last = update_chunk(wrong, 2 * CHUNK, digest)
    assert alice.refusal("update", last) == f"the file is not what it must be: its SHA-256 is not {digest.hex()}"
    alice.send(BIG)
    bob.send(UPDATES["bob"])
    assert cycle.result()[1] == {"alice": BIG, "bob": UPDATES["bob"]}


def test_an_update_of_another_size_than_committed_does_not_come(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_module, "REVEAL_SECONDS", 0.0)
    write_blob(coordinator.engine.store, UPDATES["alice"])  # even if there is such a file
    write_blob(coordinator.engine.store, UPDATES["bob"])
    alice.ask("commit", alice.sealed(cycle, UPDATES["alice"], update_size=5))
    bob.commit(cycle, UPDATES["bob"])
    assert cycle.result()[1] == {"alice": Reason.WITHHELD, "bob": UPDATES["bob"]}


def test_a_withheld_update_is_named_and_does_not_come_later(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice.commit(cycle, BIG)
    bob.commit(cycle, UPDATES["bob"])
    alice.wait_for("reveal")
    alice.ask("update", update_chunk(BIG))
    bob.send(UPDATES["bob"])
    monkeypatch.setattr(nats_module, "REVEAL_SECONDS", 0.0)  # of the next cycle
    monkeypatch.setattr(nats_module, "GRACE_SECONDS", -FAR)
    assert cycle.result()[1] == {"alice": Reason.WITHHELD, "bob": UPDATES["bob"]}
    late = "the update came too late: the cycle takes no more updates"
    assert alice.refusal("update", update_chunk(BIG, CHUNK)) == late
    assert bob.ask("update", update_chunk(UPDATES["bob"])) == b"whole"
    assert [path for path in coordinator.engine.store.iterdir() if path.name.startswith(".")] == []


def test_a_member_gets_the_files_that_its_task_names_and_no_others(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner, carol: Miner, dataset: Dataset, tmp_path: Path
) -> None:
    tasks = {order.task.miner: order for order in coordinator.orders()}
    alices, bobs = tasks[KEYS["alice"]].shard_hash, tasks[KEYS["bob"]].shard_hash
    assert alices != bobs
    store = coordinator.engine.store
    model = coordinator.state.model_hash
    (tmp_path / "files").mkdir()
    for digest in (model, alices, dataset.root, coordinator.run.hashes[0]):
        alice.connection.fetch(digest, tmp_path / "files")
    earlier = write_blob(store, b"the model of an earlier cycle")
    update = write_blob(store, b"bob's update")
    for digest in (bobs, earlier, update, dataset.validation, dataset.test, bytes(32), b"../" * 10 + b"..", b"\n" * 32):
        assert alice.refusal("file", digest + bytes(8)) == f"there is no file {digest.hex()} for alice"
    carol.connection.fetch(model, tmp_path)  # a closed cycle's model is everybody's
    for digest in (alices, bobs, earlier, update):
        assert carol.refusal("file", digest + bytes(8)) == f"there is no file {digest.hex()} for carol"
    for request in (b"", model, model + bytes(7), model + bytes(9), bytes(1 << 20)):
        assert "where 8 belong" in alice.refusal("file", request)
    size = (store / model.hex()).stat().st_size
    for offset in (size, size + 1, 2**63 - 1, 2**63, 2**64 - 1):
        assert alice.ask("file", model + struct.pack("<Q", offset)) == struct.pack("<Q", size)
    closes(cycle, alice, bob)


POLLS = [
    b"",
    b"{",
    b"[]",
    b"1",
    b"null",
    b'{"boot": ""}',
    b'{"version": 0}',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"boot": "BOOT", "version": 1e400, "session": ""}',
    b'{"boot": "BOOT", "version": NaN, "session": ""}',
    b'{"boot": "BOOT", "version": null, "session": ""}',
    b'{"boot": "BOOT", "version": "1", "session": ""}',
    b'{"boot": "BOOT", "version": ' + b"9" * 5000 + b', "session": ""}',
    b'{"boot": "", "version": 0}',
    b'{"boot": "", "version": 0, "session": 1}',
    bytes(1 << 20),
]


def test_a_poll_that_is_malformed_is_refused(cycle: Cycle, alice: Miner, bob: Miner) -> None:
    for data in POLLS:
        request = data.replace(b"BOOT", alice.since["boot"].encode())
        assert alice.refusal("poll", request) == "a poll must be JSON with boot, version and session"
    closes(cycle, alice, bob)


def test_a_poll_of_another_boot_gets_all_again(
    cycle: Cycle, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_module, "POLL_SECONDS", 0.1)
    for other in ({"boot": "x", "version": 2**70}, {"boot": None, "version": -1}, {"boot": [], "version": True}):
        alice.since |= other
        assert hashlib.sha256(alice.wait_for("opening")).digest() == cycle.digest
    alice.since["version"] = 10**30  # news of its own have smaller numbers: it sees none
    assert alice.poll() == {}
    closes(cycle, alice, bob)


def test_a_copy_of_a_member_takes_over_from_it(
    cycle: Cycle, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_module, "POLL_SECONDS", 0.0)
    alice.since["session"] = "copy"
    alice.poll()
    for _ in range(2):
        alice.since["session"] = "alice"
        taken = alice.refusal("poll", json.dumps(alice.since).encode())
        assert taken.startswith("another program takes part as alice now: ")
        alice.since["session"] = "copy"
        alice.poll()
    for number in range(100):
        alice.since["session"] = str(number)
        alice.poll()
    alice.since["boot"] = ""
    closes(cycle, alice, bob)


def test_a_member_that_has_not_joined_is_told_so(coordinator: Coordinator, alice: Miner) -> None:
    coordinator.members.remove("alice")
    coordinator.members.invite("alice", MINER)
    assert alice.refusal("poll", json.dumps(alice.since).encode()) == (
        "this member has not joined yet: join with its invitation first"
    )


def test_an_unknown_kind_of_request_is_refused(cycle: Cycle, alice: Miner, bob: Miner) -> None:
    for kind in ("nothing", "file.file", "POLL", "x" * 900, "ä"):
        assert alice.refusal(kind, b"").startswith(f"there is no request {kind!r}"[:500])
    closes(cycle, alice, bob)


def test_an_answer_is_one_line_that_fits_whatever_was_sent(cycle: Cycle, alice: Miner, bob: Miner) -> None:
    """A header above the broker's limit would end the connection of the coordinator."""
    longest = b'{"name":"alice","' + b"\\u000a" * 170_000 + b'":1}'
    assert "Unexpected keyword argument" in alice.refusal("join", signed("join", longest))
    closes(cycle, alice, bob)


# What may come twice, or in another order.


def test_a_cycle_is_the_same_if_each_request_comes_three_times_in_any_order(
    coordinator: Coordinator, alice: Miner, bob: Miner
) -> None:
    update = {"alice": BIG, "bob": UPDATES["bob"]}
    for number in range(2):
        cycle = coordinator.begin(number)
        order = random.Random(number)  # noqa: S311
        receipts: dict[str, set[int]] = {"alice": set(), "bob": set()}
        for miner in order.sample([alice, bob] * 3, 6):
            assert (
                miner.ask("join", seal(SECRETS[miner.name], PARAMS.chain_id, Join(miner.name))) == (KEYS["coordinator"])
            )
            miner.since["boot"] = ""
            while hashlib.sha256(miner.wait_for("opening")).digest() != cycle.digest:
                pass  # it is the cycle before: the thread of the new one has not announced it yet
        for miner in order.sample([alice, bob] * 3, 6):
            receipts[miner.name].add(miner.commit(cycle, update[miner.name]).place)
        assert sorted(receipts.values(), key=str) == [{0}, {1}]
        alice.wait_for("reveal")
        chunks = [(alice, update_chunk(BIG, offset)) for offset in range(0, len(BIG), CHUNK)]
        chunks.append((bob, update_chunk(UPDATES["bob"])))
        answers = [miner.ask("update", chunk) for miner, chunk in order.sample(chunks * 3, 12)]
        assert b"whole" in answers
        assert cycle.result()[1] == update
        assert coordinator.evidence() == []


def test_chunks_that_come_twice_at_once_are_written_once(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner
) -> None:
    alice.commit(cycle, BIG)
    bob.commit(cycle, UPDATES["bob"])
    alice.wait_for("reveal")
    chunks = [update_chunk(BIG, offset) for offset in range(0, len(BIG), CHUNK)]
    before = open_files(coordinator.engine.store)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(partial(alice.ask, "update"), chunks * 4))
    assert b"whole" in answers
    bob.send(UPDATES["bob"])
    assert cycle.result()[1] == {"alice": BIG, "bob": UPDATES["bob"]}
    assert open_files(coordinator.engine.store) == before


def open_files(folder: Path) -> list[str]:
    return sorted(file.path for file in psutil.Process().open_files() if file.path.startswith(str(folder)))


# The coordinator is killed.


def test_a_coordinator_that_is_killed_goes_on_with_the_same_commits(
    coordinator: Coordinator, alice: Miner, bob: Miner
) -> None:
    cycle = coordinator.begin()
    opening = alice.wait_for("opening")

    def again() -> Cycle:
        coordinator.kill()
        cycle.ends_without_a_result()
        coordinator.start()
        assert coordinator.engine.opening == opening
        return coordinator.go_on()

    cycle = again()
    receipts = []
    for miner in (bob, alice):
        assert miner.wait_for("opening") == opening
        commit = miner.sealed(cycle, BIG)
        receipts.append(read_receipt(miner.ask("commit", commit)))
        if miner is bob:
            cycle = again()
        assert read_receipt(miner.ask("commit", commit)) == receipts[-1]
    assert [each.place for each in receipts] == [0, 1]
    alice.wait_for("reveal")
    alice.ask("update", update_chunk(BIG))
    cycle = again()
    assert cycle.digest == hashlib.sha256(opening).digest()
    assert alice.commit(cycle, b"other") == receipts[1]  # it is closed, and nothing is forgotten
    alice.wait_for("reveal")
    alice.send(BIG)
    assert cycle.result()[1] == {"alice": BIG, "bob": BIG}  # they committed to the same
    coordinator.restart()
    assert bob.commit(cycle, BIG) == receipts[0]  # before the cycle goes on
    assert bob.ask("update", update_chunk(BIG)) == b"whole"
    assert coordinator.go_on().result()[1] == {"alice": BIG, "bob": BIG}


def test_no_commit_is_taken_after_the_close_even_after_a_restart(
    coordinator: Coordinator, alice: Miner, bob: Miner
) -> None:
    cycle = coordinator.begin(seconds=-1)
    assert cycle.result()[0] == {"alice": Reason.LATE, "bob": Reason.LATE}
    coordinator.restart()
    assert alice.refusal("commit", alice.sealed(cycle, b"u")) == "alice has no task in this cycle"
    cycle = coordinator.go_on()
    assert cycle.result()[0] == {"alice": Reason.LATE, "bob": Reason.LATE}
    assert alice.refusal("commit", alice.sealed(cycle, b"u")).startswith("the commit came too late")
    assert bob.refusal("commit", bob.sealed(cycle, b"u")).startswith("the commit came too late")


def test_an_upload_goes_on_when_the_coordinator_is_killed_in_its_middle(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "ANSWER_SECONDS", 0.5)
    bob.commit(cycle, UPDATES["bob"])
    alice.commit(cycle, BIG)
    bob.send(UPDATES["bob"])
    reached = threading.Event()
    update = coordinator.engine.handlers["update"]

    async def stuck(member: str, data: bytes) -> bytes:
        if data[40:48] == struct.pack("<Q", CHUNK):
            reached.set()
            await asyncio.Event().wait()
        return await update(member, data)

    coordinator.engine.handlers["update"] = stuck
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(alice.send, BIG)
        assert reached.wait(PATIENCE)
        coordinator.kill()
        cycle.ends_without_a_result()
        coordinator.start()
        cycle = coordinator.go_on()
        sent.result(PATIENCE)
    assert cycle.result()[1] == {"alice": BIG, "bob": UPDATES["bob"]}


# Memories, with which tasks are done again.


def test_a_memory_comes_when_the_coordinator_asks_for_it(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is there already is not asked for. What comes twice is answered twice."""
    closes(cycle, alice, bob)
    memories = {hashlib.sha256(data).digest(): data for data in (BIG, b"small")}
    there = write_blob(coordinator.engine.store, b"there already")
    brought = coordinator.bring(alice=[there, *memories], bob=[there])
    request = request_of(alice.wait_for("memories"))
    assert request == MemoryRequest(cycle.digest, sorted(memories))
    chunks = [update_chunk(data, offset) for data in memories.values() for offset in range(0, len(data), CHUNK)]
    before = open_files(coordinator.engine.store)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(partial(alice.ask, "memory"), chunks * 3))
    assert set(answers) <= {b"", b"whole"}
    brought.result(PATIENCE)
    for data in memories.values():
        alice.send_memory(data)
    assert open_files(coordinator.engine.store) == before
    for digest, data in memories.items():
        assert (coordinator.engine.store / digest.hex()).read_bytes() == data
    monkeypatch.setattr(nats_module, "POLL_SECONDS", 0.0)
    assert "memories" not in bob.poll()
    again = coordinator.begin(1)
    alice.wait_for("opening")
    alice.since["boot"] = ""
    assert set(alice.poll()) == {"opening"}  # the next cycle takes the request back
    closes(again, alice, bob)


def test_a_memory_is_taken_only_as_it_was_asked_for(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner, carol: Miner
) -> None:
    digest = hashlib.sha256(BIG).digest()
    for miner in (alice, carol):
        assert miner.refusal("memory", update_chunk(BIG)) == (
            f"nobody has asked {miner.name} for the memory {digest.hex()}"
        )
    closes(cycle, alice, bob)
    assert "nobody has asked alice" in alice.refusal("memory", update_chunk(BIG))
    brought = coordinator.bring(alice=[digest], bob=[hashlib.sha256(b"bob's").digest()])
    alice.wait_for("memories")
    bob.wait_for("memories")
    for miner, data in ((bob, BIG), (alice, b"bob's"), (carol, BIG), (alice, UPDATES["alice"])):
        assert f"nobody has asked {miner.name} for the memory" in miner.refusal("memory", update_chunk(data))
    assert "a request of 0 bytes where 16 belong" in alice.refusal("memory", b"")
    assert "a request of 15 bytes where 16 belong" in alice.refusal("memory", digest + bytes(15))
    most = (1 << 20) + 16 * (coordinator.engine.store / coordinator.state.model_hash.hex()).stat().st_size
    for size in (0, most + 1, 2**63, 2**64 - 1):
        why = f"a memory of {size} bytes is refused: at most {most}"
        assert alice.refusal("memory", update_chunk(BIG, 0, digest, size)) == why
    for data, offset in ((BIG[:10], 0), (BIG, 1), (BIG + b"x", 2 * CHUNK), (BIG, 3 * CHUNK), (BIG, 2**64 - CHUNK)):
        why = f"no chunk of {len(BIG)} bytes"
        assert why in alice.refusal("memory", update_chunk(data, offset, digest, len(BIG))), (len(data), offset)
    assert alice.ask("memory", update_chunk(BIG)) == b""
    other = update_chunk(BIG, CHUNK, digest, 2 * CHUNK)
    assert alice.refusal("memory", other) == f"the file had {len(BIG)} bytes before, and {2 * CHUNK} now"
    wrong = BIG[:-1] + b"?"
    alice.ask("memory", update_chunk(wrong, CHUNK, digest))
    last = update_chunk(wrong, 2 * CHUNK, digest)
    assert alice.refusal("memory", last) == f"the file is not what it must be: its SHA-256 is not {digest.hex()}"
    assert not brought.done()
    alice.send_memory(BIG)
    bob.send_memory(b"bob's")
    brought.result(PATIENCE)


def test_a_miner_that_sends_no_memory_holds_up_nobody_for_long(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alice is silent, then she is away, while the time is not over. She cannot send anything later."""
    closes(cycle, alice, bob)
    late = "the memory came too late: the cycle takes no more memories"
    monkeypatch.setattr(coordinator.engine, "present", lambda: [KEYS["alice"]])
    monkeypatch.setattr(nats_module, "REVEAL_SECONDS", 1.0)
    brought = coordinator.bring(alice=[hashlib.sha256(BIG).digest()], bob=[hashlib.sha256(b"bob's").digest()])
    alice.wait_for("memories")
    alice.ask("memory", update_chunk(BIG))
    brought.result(PATIENCE)
    assert alice.refusal("memory", update_chunk(BIG, CHUNK)) == late
    assert bob.refusal("memory", update_chunk(b"bob's")) == late
    monkeypatch.setattr(nats_module, "REVEAL_SECONDS", FAR)
    monkeypatch.setattr(coordinator.engine, "present", list)
    coordinator.bring(alice=[hashlib.sha256(BIG).digest()]).result(PATIENCE)
    assert not (coordinator.engine.store / hashlib.sha256(BIG).hexdigest()).exists()
    assert [path for path in coordinator.engine.store.iterdir() if path.name.startswith(".")] == []


def test_a_coordinator_that_is_killed_asks_again_for_memories(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner
) -> None:
    closes(cycle, alice, bob)
    digest = hashlib.sha256(BIG).digest()
    brought = coordinator.bring(alice=[digest])
    statement = alice.wait_for("memories")
    alice.ask("memory", update_chunk(BIG))
    coordinator.kill()
    with pytest.raises(StoppedError):
        brought.result(PATIENCE)
    coordinator.start()
    assert "nobody has asked alice" in alice.refusal("memory", update_chunk(BIG, CHUNK))
    assert coordinator.go_on().result()[1] == {"alice": UPDATES["alice"], "bob": UPDATES["bob"]}
    brought = coordinator.bring(alice=[digest])
    assert request_of(alice.wait_for("memories")) == request_of(statement)
    alice.send_memory(BIG)
    brought.result(PATIENCE)
    assert (coordinator.engine.store / digest.hex()).read_bytes() == BIG


# Miners that are away, and deadlines.


def test_a_commit_after_the_jobs_late_seconds_is_late_and_stays_so_after_a_restart(
    coordinator: Coordinator, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alice commits in time. Place and lateness are in the receipts, and in what the engine returns."""
    coordinator.engine.job = replace(coordinator.engine.job, task_seconds=1000.0, late_seconds=500.0)
    cycle = coordinator.begin(seconds=1000)
    bob.wait_for("opening")
    monkeypatch.setattr(nats_module, "time", SetClock(400))
    bob.commit(cycle, UPDATES["bob"])
    monkeypatch.setattr(nats_module, "time", SetClock(600))
    alice.commit(cycle, UPDATES["alice"])
    for _ in range(2):
        for miner, place, late in ((bob, 0, False), (alice, 1, True)):
            receipt = miner.commit(cycle, UPDATES[miner.name])
            assert (receipt.place, receipt.late) == (place, late)
        assert coordinator.commits() == {"alice": (1, True), "bob": (0, False)}
        coordinator.kill()
        coordinator.start()  # with a job without late_seconds
    cycle = coordinator.go_on()
    closes(cycle, alice, bob)
    assert coordinator.commits() == {"alice": (1, True), "bob": (0, False)}
    assert coordinator.evidence() == []


def test_no_commit_is_late_without_late_seconds(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert coordinator.engine.job.late_seconds is None
    monkeypatch.setattr(nats_module, "time", SetClock(FAR - 100))
    assert not alice.commit(cycle, UPDATES["alice"]).late
    closes(cycle, alice, bob)


def test_a_cycle_closes_as_soon_as_all_who_are_present_have_committed(
    coordinator: Coordinator, alice: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bob is away. The deadline is far."""
    cycle = coordinator.begin()
    alice.wait_for("opening")
    alice.commit(cycle, UPDATES["alice"])
    monkeypatch.setattr(coordinator.engine, "present", lambda: [KEYS["alice"]])
    alice.wait_for("reveal")
    alice.send(UPDATES["alice"])
    assert cycle.result()[1] == {"alice": UPDATES["alice"], "bob": Reason.ABSENT}


def test_a_miner_is_away_when_it_polls_no_longer(
    coordinator: Coordinator, alice: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert coordinator.engine.present() == []
    monkeypatch.setattr(nats_module, "POLL_SECONDS", 0.0)
    alice.poll()
    assert coordinator.engine.present() == [KEYS["alice"]]
    monkeypatch.setattr(nats_module, "GRACE_SECONDS", -1.0)
    assert coordinator.engine.present() == []
    assert coordinator.begin().result()[0] == {"alice": Reason.ABSENT, "bob": Reason.ABSENT}


def test_a_deadline_in_the_past_closes_at_once(coordinator: Coordinator, alice: Miner) -> None:
    cycle = coordinator.begin(seconds=-FAR)
    assert cycle.result()[0] == {"alice": Reason.LATE, "bob": Reason.LATE}
    assert alice.refusal("commit", alice.sealed(cycle, b"u")).startswith("the commit came too late")


def test_an_opening_is_taken_back_when_the_next_cycle_begins(
    coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a miner that comes back would begin a task that is over."""
    closes(cycle, alice, bob)
    monkeypatch.setattr(nats_module, "POLL_SECONDS", 0.0)
    alice.since["boot"] = ""
    assert set(alice.poll()) == {"opening", "reveal"}
    miners = [KEYS["bob"]]
    coordinator.engine.open(coordinator.opening(1, miners=miners, memories=[None]), time.time() + FAR)
    coordinator.go_on()
    bob.wait_for("opening")
    alice.since["boot"] = ""
    assert alice.poll() == {}


# Engine `nats` gives the results of engine `local`.


def train(miner: Miner, job: TrainingJob, files: Path, executing: threading.Lock, stop: threading.Event) -> None:
    """Be a miner: do the task of each opening, commit to the update, and send it. Models and memories stay here."""
    files.mkdir()
    executor = Executor(job, files)
    updates: dict[bytes, bytes] = {}
    while not stop.is_set():
        notices = miner.poll()
        if statement := notices.get("opening"):
            _, opening = unseal(PARAMS.chain_id, Opening, statement)
            miner.connection.fetch(opening.dataset_root, files)
            shards = json.loads((files / opening.dataset_root.hex()).read_bytes())["shards"]
            seed = assignment_seed(job.seed, opening.prev_block)
            tasks = assign(seed, opening.cycle, opening.miners, job.segments, len(shards))
            (task,) = [task for task in tasks if task.miner == miner.key]
            order = Order(
                task,
                opening.model,
                bytes.fromhex(shards[task.shard]),
                opening.memories[opening.miners.index(miner.key)],
            )
            miner.connection.fetch(order.model_hash, files)
            miner.connection.fetch(order.shard_hash, files)
            with executing:  # torch's random numbers are the whole process's
                answer = executor.execute(files, order)
            digest = hashlib.sha256(statement).digest()
            commit = Commit.to(answer, hashlib.sha256(answer.update).digest())
            message = CommitMessage(digest, *commit[:6])
            miner.ask("commit", seal(SECRETS[miner.name], PARAMS.chain_id, message))
            updates[digest] = answer.update
        if statement := notices.get("reveal", b""):
            miner.send(updates[closing_of(statement).opening])
        if statement := notices.get("memories", b""):
            for memory in request_of(statement).memories:
                miner.send_memory((files / memory.hex()).read_bytes())


class Locked(SpotChecker):
    """Does no task again while a miner in this process does its own."""

    executing: threading.Lock

    def check(self, drawn: Drawn) -> SpotCheck:
        with self.executing:
            return super().check(drawn)


@pytest.mark.parametrize("keep", [False, True], ids=["without-memory", "density-and-memory"])
def test_the_models_are_those_of_engine_local(
    server: Server, job: TrainingJob, small: TrainingJob, make_trainer: Any, tmp_path: Path, keep: bool
) -> None:
    job = replace(small if keep else job, cycles=3, spot_checks=1.0)
    names = sorted(NAMES, key=KEYS.__getitem__)

    def drawn(commits: Mapping[bytes, Commit]) -> bytes:
        return score_seed(bytes(32), commits_root({key: commit.update_hash for key, commit in commits.items()}))

    def seeds() -> Iterator[bytes]:
        yield from (hashlib.sha256(bytes([cycle])).digest() for cycle in range(3))

    local: list[CycleResult] = []
    with make_trainer(job, tmp_path / "local") as trainer:
        state = trainer.start()
        for prev_block in seeds():
            seed = assignment_seed(job.seed, prev_block)
            local.append(trainer.run_cycle(state, [KEYS[name] for name in names], seed=seed, score_seed=drawn))
            state = local[-1].after
        dataset = trainer.dataset

    over_nats: list[CycleResult] = []
    stop, executing = threading.Event(), threading.Lock()
    coordinator = Coordinator(server, tmp_path / "coordinator", dataset)
    checker = Locked(dataset, coordinator.engine.store, coordinator.trainer.segments)
    checker.executing, coordinator.trainer._checker = executing, checker
    with ExitStack() as stack:
        stack.callback(coordinator.pool.shutdown)
        stack.callback(coordinator.kill)
        connections = [stack.enter_context(Connection(partial(connect, server.credentials[name]))) for name in NAMES]
        miners = [Miner(*each) for each in zip(NAMES, connections, strict=True)]
        futures = [
            coordinator.pool.submit(train, miner, job, tmp_path / miner.name, executing, stop) for miner in miners
        ]
        for cycle, prev_block in enumerate(seeds()):
            present, opening = coordinator.remote.open(Slot(cycle + 1, prev_block, 0), cycle)
            seed = assignment_seed(job.seed, prev_block)
            result = coordinator.trainer.run_cycle(coordinator.state, present, seed=seed, score_seed=drawn)
            coordinator.run.save(coordinator.run.next_record(result, opening))
            coordinator.state = result.after
            over_nats.append(result)
        stop.set()
        for name in NAMES:  # ends their polls
            coordinator.engine.post(KEYS[name], "end", b"")
        for future in futures:
            future.result(PATIENCE)

    assert [facts(result) for result in over_nats] == [facts(result) for result in local]
    assert len({result.model_after for result in local}) == 3
    assert all(len(result.contributions) == 3 for result in local)
    checks = [check for result in over_nats for check in result.spot_checks]
    assert [(check.failure, check.distance) for check in checks] == [("", None)] * 6  # of two cycles
    if keep:
        files = {path.name for path in (tmp_path / "alice").iterdir()}
        memory = coordinator.state.memories[KEYS["alice"]].hex()
        assert memory in files
        assert not (coordinator.run.store / memory).exists()
        for task in over_nats[-1].tasks:  # they were sent
            assert task.commit
            assert task.commit.memory_before
            assert (coordinator.run.store / task.commit.memory_before.hex()).exists()


def facts(result: CycleResult) -> tuple[Any, ...]:
    """All that must be equal in equal cycles."""
    commits = [task.commit for task in result.tasks]
    made = [commit and (commit.update_hash, commit.memory_before, commit.memory_after) for commit in commits]
    weights = [each.weight for each in result.contributions]
    found = (result.spot_checks, result.after.standings, result.after.norms)
    return result.model_after, result.loss_after, result.score_seed, result.after.memories, made, weights, found


# The connection.


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A server that a test may kill."""
    server = Server(tmp_path / "broker")
    try:
        server.start()
        yield server
    finally:
        server.kill()


def test_requests_are_repeated_while_the_server_is_down(
    own_server: Server, tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "ANSWER_SECONDS", 0.5)
    coordinator = Coordinator(own_server, tmp_path / "coordinator", dataset)
    lost: list[bool] = []
    away, back = threading.Event(), threading.Event()

    def on_lost(gone: bool) -> None:
        lost.append(gone)
        (away if gone else back).set()

    with ExitStack() as stack:
        stack.callback(coordinator.pool.shutdown)
        stack.callback(coordinator.kill)
        alice = stack.enter_context(Connection(partial(connect, own_server.credentials["alice"]), on_lost))
        assert alice.ask("join", JOIN) == KEYS["coordinator"]
        own_server.kill()
        assert away.wait(PATIENCE)
        answers = [coordinator.pool.submit(alice.ask, "join", JOIN) for _ in range(3)]
        fetched = coordinator.pool.submit(alice.fetch, coordinator.dataset.root, tmp_path)
        own_server.start()
        assert [answer.result(PATIENCE) for answer in answers] == [KEYS["coordinator"]] * 3
        fetched.result(PATIENCE)
        assert back.wait(PATIENCE)
    assert lost == [True, False]


JOIN = seal(SECRETS["alice"], PARAMS.chain_id, Join("alice"))


def test_requests_are_repeated_while_the_coordinator_is_down(coordinator: Coordinator, alice: Miner) -> None:
    coordinator.kill()
    asked = coordinator.pool.submit(alice.ask, "join", JOIN)
    coordinator.start()
    assert asked.result(PATIENCE) == KEYS["coordinator"]


def test_a_member_is_told_that_the_coordinator_is_silent_and_that_it_answers_again(
    server: Server, coordinator: Coordinator
) -> None:
    said: list[bool] = []
    silent = threading.Event()

    def on_silent(is_silent: bool) -> None:
        said.append(is_silent)
        silent.set()

    with Connection(partial(connect, server.credentials["alice"]), on_silent=on_silent) as connection:
        connection.ask("join", JOIN)
        coordinator.kill()
        asked = coordinator.pool.submit(connection.ask, "join", JOIN, seconds=1.0)
        assert silent.wait(PATIENCE)
        coordinator.start()
        assert asked.result(PATIENCE) == KEYS["coordinator"]
    assert said == [True, False]


def test_what_the_coordinator_cannot_write_ends_it(coordinator: Coordinator, alice: Miner) -> None:
    """And the member asks again: it was told nothing."""

    async def full(member: str, data: bytes) -> bytes:
        raise OSError(28, f"No space left on device: {member}, {len(data)}")

    join = coordinator.engine.handlers["join"]
    coordinator.engine.handlers["join"] = full
    asked = coordinator.pool.submit(alice.ask, "join", JOIN)

    def is_told() -> bool:
        try:
            coordinator.connection.check()
        except OSError as error:
            return error.errno == 28
        return False

    wait_for(is_told, PATIENCE, "the full disk to be told")
    coordinator.engine.handlers["join"] = join
    assert asked.result(PATIENCE) == KEYS["coordinator"]


def test_a_damaged_file_of_our_own_is_fetched_again(coordinator: Coordinator, alice: Miner, tmp_path: Path) -> None:
    digest = coordinator.share(b"whole")
    (tmp_path / digest.hex()).write_bytes(b"half")
    alice.connection.fetch(digest, tmp_path)
    assert (tmp_path / digest.hex()).read_bytes() == b"whole"


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK + 12345])
def test_a_file_of_any_size_is_fetched(coordinator: Coordinator, alice: Miner, tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)  # noqa: S311
    digest = coordinator.share(data)
    (tmp_path / "files").mkdir()
    alice.connection.fetch(digest, tmp_path / "files")
    assert [path.name for path in (tmp_path / "files").iterdir()] == [digest.hex()]
    assert (tmp_path / "files" / digest.hex()).read_bytes() == data
    coordinator.connection.call(coordinator.engine.handlers.clear)  # what is there is not asked for again
    alice.connection.fetch(digest, tmp_path / "files")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"x" + data[1:]])
def test_a_file_that_is_damaged_is_refused_and_leaves_nothing(
    coordinator: Coordinator, alice: Miner, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    digest = coordinator.share(BIG)
    (coordinator.folder / "shared" / digest.hex()).write_bytes(damage(BIG))
    (tmp_path / "files").mkdir()
    with pytest.raises(EngineError, match=rf"the coordinator sent the file [0-9a-f]{{64}} for {digest.hex()}"):
        alice.connection.fetch(digest, tmp_path / "files")
    with pytest.raises(RefusedError, match="there is no file"):
        alice.connection.fetch(bytes(32), tmp_path / "files")
    assert list((tmp_path / "files").iterdir()) == []


def test_to_close_a_connection_ends_all_requests_that_wait(
    server: Server, coordinator: Coordinator, tmp_path: Path
) -> None:
    coordinator.kill()  # so nobody answers
    threads = threading.active_count()
    files = open_sockets()
    connection = Connection(partial(connect, server.credentials["alice"]))
    with connection:
        with ThreadPoolExecutor() as pool:
            waiting: list[Future[Any]] = [pool.submit(connection.ask, "join", JOIN) for _ in range(3)]
            waiting.append(pool.submit(connection.fetch, bytes(32), tmp_path))
            waiting.append(pool.submit(connection.send, "update", write_blob(tmp_path, BIG), tmp_path))
            connection.close()
            for future in waiting:
                with pytest.raises(StoppedError, match="the connection to the broker is closed"):
                    future.result(PATIENCE)
        with pytest.raises(StoppedError):
            connection.ask("join", JOIN)
        with pytest.raises(StoppedError):
            connection.check()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert threading.active_count() == threads
    assert open_sockets() == files
    coordinator.start()


def open_sockets() -> int:
    return len(psutil.Process().net_connections())


def test_a_request_that_waits_for_its_answer_ends_with_the_connection(
    coordinator: Coordinator, bob: Miner, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_module, "POLL_SECONDS", FAR)
    monkeypatch.setattr(nats_module, "MOST_POLL_SECONDS", FAR)
    asked = threading.Event()
    poll = coordinator.engine.handlers["poll"]

    async def noted(member: str, data: bytes) -> bytes:
        asked.set()
        return await poll(member, data)

    coordinator.engine.handlers["poll"] = noted
    with Connection(partial(connect, server.credentials["bob"])) as connection:
        future = coordinator.pool.submit(connection.ask, "poll", json.dumps(bob.since).encode())
        assert asked.wait(PATIENCE)
    with pytest.raises(StoppedError):
        future.result(PATIENCE)


def test_a_removed_member_is_told_so_and_a_new_one_is_served(server: Server, coordinator: Coordinator) -> None:
    coordinator.members.invite("mallory", MINER)
    credential = server.members.admit("mallory")
    join = seal(SECRETS["mallory"], PARAMS.chain_id, Join("mallory"))
    with Connection(partial(connect, credential)) as connection:
        assert connection.ask("join", join) == KEYS["coordinator"]
        coordinator.connection.call(coordinator.engine.handlers.pop, "join")
        waiting = threading.Event()

        async def join_later(member: str, data: bytes) -> bytes:
            del member, data
            waiting.set()
            return await asyncio.Event().wait() and b""

        coordinator.engine.handlers["join"] = join_later
        future = coordinator.pool.submit(connection.ask, "join", join)
        assert waiting.wait(PATIENCE)
        coordinator.members.remove("mallory")
        server.members.remove("mallory")
        removed = "the broker does not let us in any more: the coordinator has removed us"
        with pytest.raises(StoppedError, match=removed):
            future.result(PATIENCE)
        with pytest.raises(StoppedError, match=removed):
            connection.ask("poll")
        with pytest.raises(StoppedError, match=removed):
            connection.check()
    wait_for(lambda: sorted(coordinator.connection._served) == NAMES, PATIENCE, "the connection to be closed")


# A member that floods, or sends what is malformed.


class Raw:
    """A connection that sends any bytes, and reads nothing."""

    def __init__(self, credential: Credential) -> None:
        where = urlsplit(credential.url)
        plain = socket.create_connection((where.hostname, where.port), PATIENCE)
        self.socket = connect_options(credential)["tls"].wrap_socket(plain, server_hostname=where.hostname)
        nonce = json.loads(self.line().removeprefix(b"INFO "))["nonce"]
        signature = nkeys.from_seed(bytearray(credential.seed.encode())).sign(nonce.encode())
        options = {"nkey": public_key(credential.seed), "sig": base64.b64encode(signature).decode()}
        self.socket.sendall(f"CONNECT {json.dumps(options | {'verbose': False, 'headers': True})}\r\n".encode())
        self.sync()

    def line(self) -> bytes:
        data = b""
        while not data.endswith(b"\r\n"):
            if not (received := self.socket.recv(1)):
                raise EOFError
            data += received
        return data

    def sync(self) -> None:
        """Wait until the server has taken all that was sent."""
        self.socket.sendall(b"PING\r\n")
        while self.line() != b"PONG\r\n":
            pass


def flood(credential: Credential, requests: bytes, stop: threading.Event, sent: list[int]) -> None:
    """Send requests again and again, and read no answers. If the server ends the connection, make another one."""
    while not stop.is_set():
        with suppress(OSError, EOFError):
            raw = Raw(credential)
            raw.socket.settimeout(1)
            with raw.socket:
                while not stop.is_set():
                    raw.socket.sendall(requests)
                    sent[0] += len(requests)


@pytest.mark.parametrize(
    ("kind", "data", "count"),
    [
        ("x", b"x", 1000),
        ("x", bytes(1 << 20), 1),
        ("commit", bytes(1 << 20), 1),
        ("poll", b'{"boot": "", "version": 0, "session": ""}', 1000),
        ("file", b"MODEL", 1000),
    ],
    ids=["small", "large", "commits", "polls", "files"],
)
def test_a_member_that_floods_stops_nobody_else(
    server: Server, coordinator: Coordinator, cycle: Cycle, alice: Miner, bob: Miner, kind: str, data: bytes, count: int
) -> None:
    data = data.replace(b"MODEL", coordinator.share(bytes(CHUNK)) + bytes(8))
    request = f"PUB traincert.{kind} _INBOX.x {len(data)}\r\n".encode() + data + b"\r\n"
    stop, sent = threading.Event(), [0]
    flooding = coordinator.pool.submit(flood, server.credentials["carol"], request * count, stop, sent)
    try:
        wait_for(lambda: sent[0] > 1 << 20, PATIENCE, "the flood")
        for _ in range(5):
            bob.ask("join", seal(SECRETS["bob"], PARAMS.chain_id, Join("bob")))
        closes(cycle, alice, bob)
    finally:
        stop.set()
        flooding.result(PATIENCE)
    clients = [miner.connection._client for miner in (alice, bob)]
    clients += [coordinator.connection._served[name] for name in ("alice", "bob")]
    assert [client and client.stats["reconnects"] for client in clients] == [0, 0, 0, 0]


def test_a_member_that_sends_what_no_client_can_read_stops_only_its_own_requests(
    server: Server, cycle: Cycle, alice: Miner, bob: Miner
) -> None:
    for subject, header in (
        (b"traincert.\xff\xfe", b""),
        (b"traincert.poll", b"NATS/1.0 \xff\xff\r\n\r\n"),
        (b"traincert.poll", b"NATS/1.0\r\n\r\n"),
        (b"traincert.poll", b"NATS/1.0\r\n: \xff\r\n\r\n"),
    ):
        for reply in (b"_INBOX.x", b"", b"traincert.poll"):
            raw = Raw(server.credentials["carol"])
            sizes = b"%d %d" % (len(header), len(header) + 1) if header else b"1"
            line = (b"H" if header else b"") + b" ".join([b"PUB", subject, reply, sizes])
            raw.socket.sendall(line + b"\r\n" + header + b"x\r\n")
            with suppress(OSError, EOFError):
                raw.sync()
            raw.socket.close()
    closes(cycle, alice, bob)
