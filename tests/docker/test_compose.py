"""compose.yaml, as the README has it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker import DockerClient
from docker.models.containers import Container

from traincert.regtest import wait_for

ROOT = Path(__file__).parents[2]
PROJECT = f"traincert-test-{os.getpid()}"
NODES = ("node0", "node1", "node2")
TIMEOUT = 180  # seconds


def compose(*arguments: str) -> str:
    """Run docker-compose, or `docker compose` where there is only that."""
    program = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    command = [*program, "--project-name", PROJECT, *arguments]
    answer = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=TIMEOUT)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture
def project(images: DockerClient) -> Iterator[DockerClient]:
    """The engine, to look at what compose made there; afterwards nothing of it is left."""
    try:
        yield images
    finally:
        compose("down", "--volumes", "--timeout", "60")
    left: dict[str, str | list[str] | bool] = {"label": f"com.docker.compose.project={PROJECT}"}
    assert not images.containers.list(all=True, filters=left)
    assert not images.networks.list(filters=left)
    assert not images.volumes.list(filters=left)


def container(engine: DockerClient, service: str) -> Container:
    labels = [f"com.docker.compose.project={PROJECT}", f"com.docker.compose.service={service}"]
    (found,) = engine.containers.list(all=True, filters={"label": labels})
    return found


def wait_for_line(coordinator: Container, start: str) -> None:
    """Wait until the coordinator has said something, now or in a former life."""
    wait_for(lambda: f"\n{start}" in output(coordinator), TIMEOUT, f"a line {start!r}", lambda: output(coordinator))


def output(container: Container) -> str:
    said: str = container.logs().decode()
    return said


def wait_for_all_cycles(engine: DockerClient) -> None:
    """Wait until the coordinator has ended, and all nodes have its twelve blocks."""
    coordinator = container(engine, "coordinator")
    assert coordinator.wait(timeout=TIMEOUT)["StatusCode"] == 0, output(coordinator)
    for node in NODES:
        wait_for(lambda node=node: bitcoin_cli(node, "getblockcount") == "12", TIMEOUT, f"{node} to have 12 blocks")  # type: ignore[misc]
    assert len({bitcoin_cli(node, "getbestblockhash") for node in NODES}) == 1


def bitcoin_cli(node: str, *arguments: str) -> str:
    return compose("exec", "-T", node, "bitcoin-cli", *arguments).strip()


def test_a_network_of_containers_trains_to_height_12_though_its_coordinator_is_stopped_and_killed(
    project: DockerClient,
) -> None:
    compose("up", "--detach")
    coordinator = container(project, "coordinator")
    wait_for_line(coordinator, "block 2 ")
    coordinator.stop(timeout=60)
    assert coordinator.wait(timeout=TIMEOUT)["StatusCode"] == 130
    compose("up", "--detach")
    wait_for_line(coordinator, "block 5 ")
    coordinator.kill()
    coordinator.wait(timeout=TIMEOUT)
    compose("up", "--detach")
    wait_for_all_cycles(project)
    assert json.loads(bitcoin_cli("node0", "gettrainingcertificate", "5"))["height"] == 5
    receipt = compose("exec", "-T", "miner0", "traincert", "receipt", "show", "/miner/folder")
    assert re.search(
        r"the task used +\d+\.\d\d CPU seconds, \d+ MB of memory\s+and did besides\s+not monitored", receipt
    ), receipt

    compose("stop", "--timeout", "60")
    for node in NODES:
        assert container(project, node).wait(timeout=TIMEOUT)["StatusCode"] == 0
    for member in ("miner0", "cosigner1"):
        assert container(project, member).wait(timeout=TIMEOUT)["StatusCode"] == 130


def test_the_chain_goes_on_without_a_miner_that_is_killed_or_cut_off_and_after_the_broker_is_killed(
    project: DockerClient,
) -> None:
    compose("up", "--detach")
    coordinator = container(project, "coordinator")
    wait_for_line(coordinator, "block 1 ")
    container(project, "miner0").kill()
    wait_for_line(coordinator, "block 3 ")
    (network,) = project.networks.list(filters={"label": f"com.docker.compose.project={PROJECT}"})
    network.disconnect(container(project, "miner1"))
    wait_for_line(coordinator, "block 5 ")
    broker = container(project, "broker")
    broker.kill()
    wait_for_line(coordinator, "the broker is away")
    compose("up", "--detach")  # starts the broker and miner0
    wait_for_all_cycles(project)
    miner0 = container(project, "miner0")
    assert miner0.status == "running", output(miner0)
    assert " takes part " in output(container(project, "miner1"))

    for service, expected in MOUNTS.items():
        mounts = container(project, service).attrs["Mounts"]
        named = {mount["Name"].removeprefix(f"{PROJECT}_") + ("" if mount["RW"] else ":ro") for mount in mounts}
        assert {name for name in named if len(name) < 64} == expected  # the images' own volumes have long names
    members = [name for name in MOUNTS if name[:-1] in ("miner", "cosigner")]
    secrets = {}
    for name in members:
        look = f"cat /{name[:-1]}/folder/*.key /{name[:-1]}/folder/broker.seed; ls /handover"
        said = compose("run", "--rm", "--no-deps", "-T", name, "sh", "-c", look).split()
        secrets[name], handed_over = said[:2], said[2:]
        assert handed_over == (["key"] if "cosigner" in name else []), "the invitation is still there"
    for name, folders in {"coordinator": "/coordinator /broker", "miner2": "/miner /handover /node2"}.items():
        others = [secret for member in members if member != name for secret in secrets[member]]
        search = f"if grep -raF {' '.join(f'-e {secret}' for secret in others)} {folders}; then exit 1; fi"
        compose("run", "--rm", "--no-deps", "-T", name, "sh", "-c", search)


MOUNTS = {
    "cosigner1-key": {"cosigner1", "hand-cosigner1"},
    "cosigner2-key": {"cosigner2", "hand-cosigner2"},
    "node0": {"node0"},
    "node1": {"node1"},
    "node2": {"node2"},
    "broker": {"broker:ro"},
    "coordinator": {"coordinator", "broker", "node0:ro"},
    "cosigner1": {"cosigner1", "hand-cosigner1", "node1:ro"},
    "cosigner2": {"cosigner2", "hand-cosigner2", "node2:ro"},
    "miner0": {"miner0", "hand-miner0", "node0:ro"},
    "miner1": {"miner1", "hand-miner1", "node1:ro"},
    "miner2": {"miner2", "hand-miner2", "node2:ro"},
    "miner3": {"miner3", "hand-miner3", "node0:ro"},
}
"""Which volumes each service has; all others are closed to it."""


def test_an_interrupted_preparation_goes_on_and_only_the_coordinator_has_its_keys(project: DockerClient) -> None:
    compose("up", "--detach", "prepare")
    prepare = container(project, "prepare")
    inside = ("run", "--rm", "--no-deps", "-T", "coordinator", "sh", "-c")
    compose(*inside, "until [ -e /coordinator/network ]; do sleep 0.1; done")
    prepare.kill()
    prepare.wait(timeout=TIMEOUT)
    for _ in range(2):
        compose("run", "--rm", "prepare")
    listed = compose(*inside, "stat --format '%a %u' /coordinator/network/keys/*.key /broker/broker/server/server.key")
    assert listed.splitlines() == ["600 1000"] * 3
    told = compose("run", "--rm", "--no-deps", "-T", "prepare", "sh", "-c", "cat /handovers/*/invitation").split()
    assert len(told) == len(set(told)) == 6
    seen = compose("run", "--rm", "--no-deps", "-T", "node0", "ls", "/", "/home/bitcoin/.bitcoin").split()
    assert "bitcoin.conf" in seen
    assert "coordinator" not in seen
