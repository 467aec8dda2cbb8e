"""docs/machines.md, as it is written: two machines, between which only the two ports are open that it names.

A machine is a container in a network of its own. The gateway is in both networks, and passes connections to the hub's
ports on. So the hub cannot reach the miner's machine at all.
"""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from docker import DockerClient
from docker.errors import NotFound
from docker.models.containers import Container
from docker.models.networks import Network

from traincert.regtest import wait_for

PAGE = (Path(__file__).parents[2] / "docs/machines.md").read_text()
IMAGE = "traincert/traincert"
BROKER, P2P = 4222, 18444
TIMEOUT = 180  # seconds
GATEWAY = f"""\
import asyncio

async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def listen(port):
    async def connected(reader, writer):
        there = await asyncio.open_connection("hub.inside", port)
        await asyncio.gather(copy(reader, there[1]), copy(there[0], writer), return_exceptions=True)
    return await asyncio.start_server(connected, "0.0.0.0", port)

async def main():
    servers = [await listen(port) for port in ({BROKER}, {P2P})]
    await asyncio.gather(*(server.serve_forever() for server in servers))

asyncio.run(main())
"""


def commands(heading: str) -> list[str]:
    """The commands below a heading of the page, without comments."""
    section = re.split(r"^#+ ", PAGE.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [textwrap.dedent(line) for line in section.splitlines() if line.startswith("    ")]
    assert lines, heading
    return [line.partition("   #")[0] for line in lines]


@pytest.fixture
def networks(images: DockerClient) -> Iterator[tuple[Network, Network]]:
    """The hub's network and the miner's. No container of one can reach the other, or the world."""
    made = [images.networks.create(f"traincert-test-{uuid.uuid4().hex[:12]}", internal=True) for _ in range(2)]
    yield made[0], made[1]
    for network in made:
        network.remove()


@pytest.fixture
def machines(images: DockerClient, networks: tuple[Network, Network]) -> Iterator[tuple[Container, Container]]:
    """The hub, and the miner's machine, to which the gateway is `hub.example`."""
    inside, outside = networks
    started: list[Container] = []

    def start(network: Network, alias: str, *command: str) -> Container:
        container = images.containers.create(IMAGE, list(command), network=inside.name)
        started.append(container)
        inside.disconnect(container)
        network.connect(container, aliases=[alias])
        container.start()
        return container

    try:
        hub = start(inside, "hub.inside", "sleep", "infinity")
        alpha = start(outside, "alpha", "sleep", "infinity")
        gateway = start(outside, "hub.example", "python3", "-c", GATEWAY)
        inside.connect(gateway)
        yield hub, alpha
    finally:
        for container in started:
            with suppress(NotFound):
                container.remove(force=True, v=True)


def run(machine: Container, command: str, given: str = "") -> str:
    """Run a command in the home folder of a machine's user, and return what it printed."""
    words = [os.environ.get("DOCKER", "docker"), "exec", "-i", machine.id or "", "sh", "-c", command]
    done = subprocess.run(words, input=given, check=False, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def follow(machine: Container, lines: list[str]) -> None:
    """Type commands in. Those that run a role get a terminal of their own, and a log."""
    for line in lines:
        role = re.fullmatch(r"traincert (\w+) run .*", line)
        if role:
            machine.exec_run(["sh", "-c", f"{line} > {role[1]}.log 2>&1; echo ended $? >> {role[1]}.log"], detach=True)
            if role[1] == "broker":
                wait_for(lambda: "Server is ready" in log(machine, "broker"), TIMEOUT, "the broker to be ready")
        else:
            run(machine, line)


def log(machine: Container, role: str) -> str:
    return run(machine, f"cat {role}.log")


def test_a_miner_on_another_machine_joins_trains_appends_blocks_and_is_removed(
    machines: tuple[Container, Container],
) -> None:
    hub, alpha = machines
    *start, invite = commands("On the hub")
    follow(hub, start)
    join, *rest = commands("On the miner's machine")
    run(alpha, join, given=run(hub, invite))
    follow(alpha, rest)
    wait_for(lambda: "ended" in log(hub, "coordinator"), TIMEOUT, "all cycles", lambda: log(hub, "coordinator"))
    assert "all 12 cycles are done\nended 0\n" in log(hub, "coordinator")

    members_command, chain_command = commands("See it work")
    members, chain = run(hub, members_command), run(hub, chain_command)
    assert re.fullmatch(r"alpha  miner  [0-9a-f]{64}\n", members)
    assert len(re.findall(r"^ +\d+ ", chain, re.MULTILINE)) == 12
    assert members.split()[-1] in log(alpha, "miner")
    assert "block 12, round 0: appended" in log(alpha, "miner")
    assert re.search(
        r"refused|timed out|No route|Could not", run(alpha, "bash -c ': < /dev/tcp/hub.example/18443' 2>&1; true")
    )

    (remove,) = re.findall(r"^\| A miner must go \| `(.*?)`", PAGE, re.MULTILINE)
    run(hub, remove)
    assert run(hub, members_command) == ""
    wait_for(lambda: "ended 1" in log(alpha, "miner"), TIMEOUT, "the miner to end", lambda: log(alpha, "miner"))
    assert "traincert: the broker does not let us in any more" in log(alpha, "miner")
