"""compose.yaml, as the README has it."""

from __future__ import annotations

import json
import os
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


def output(coordinator: Container) -> str:
    said: str = coordinator.logs().decode()
    return said


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
    assert coordinator.wait(timeout=TIMEOUT)["StatusCode"] == 0, output(coordinator)

    tips = {compose("exec", "-T", node, "bitcoin-cli", "getbestblockhash") for node in NODES}
    assert len(tips) == 1
    assert compose("exec", "-T", "node0", "bitcoin-cli", "getblockcount").strip() == "12"
    certificate = json.loads(compose("exec", "-T", "node0", "bitcoin-cli", "gettrainingcertificate", "5"))
    assert certificate["height"] == 5

    compose("stop", "--timeout", "60")
    for node in NODES:
        assert container(project, node).wait(timeout=TIMEOUT)["StatusCode"] == 0


def test_only_the_coordinator_has_keys_and_they_are_its_users_alone(project: DockerClient) -> None:
    compose("run", "--rm", "prepare")
    options = ("run", "--rm", "--no-deps", "-T")
    listed = compose(*options, "prepare", "sh", "-c", "stat --format '%a %u' /coordinator/keys/*.key")
    assert listed.splitlines() == ["600 1000"] * (3 + 1 + 4)
    seen = compose(*options, "node0", "sh", "-c", "ls / /home/bitcoin/.bitcoin")
    assert "bitcoin.conf" in seen.split()
    assert "coordinator" not in seen.split()
    assert not project.containers.list(filters={"label": f"com.docker.compose.project={PROJECT}"})
