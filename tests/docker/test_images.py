"""The images, as somebody uses them who knows those of other nodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from docker import DockerClient
from docker.models.containers import Container

from traincert.regtest import wait_for
from traincert.regtest.source import file_sha256

NODE, TRAINCERT = "traincert/node", "traincert/traincert"
START_TIME = 60.0  # seconds


RunContainer = Callable[..., Container]


def health(container: Container) -> str:
    container.reload()
    status: str = container.attrs["State"]["Health"]["Status"]
    return status


def wait_until_healthy(container: Container) -> None:
    wait_for(lambda: health(container) == "healthy", START_TIME, "the node to be healthy", lambda: container.logs())


def output(container: Container, *command: str) -> str:
    """What a command prints in a container that runs."""
    code, said = container.exec_run(list(command))
    assert isinstance(said, bytes)
    assert code == 0, said
    return said.decode().strip()


def end(container: Container) -> tuple[int, str]:
    """The exit code of a container's command, and what it said."""
    code: int = container.wait(timeout=START_TIME)["StatusCode"]
    return code, container.logs().decode().strip()


def test_the_node_image_adds_at_most_60_mb_to_its_base(images: DockerClient) -> None:
    node, base = (images.images.get(name).attrs["Size"] for name in (NODE, "debian:bookworm-slim"))
    assert node - base <= 60e6


def test_the_node_image_has_only_the_two_programs_without_symbols(
    run_container: RunContainer, node_programs: Path
) -> None:
    code, listed = end(run_container(NODE, "ls", "/usr/local/bin"))
    assert (code, listed.split()) == (0, ["bitcoin-cli", "bitcoind", "entrypoint", "healthcheck"])
    for program in ("bitcoin-cli", "bitcoind"):
        code, digest = end(run_container(NODE, "sha256sum", f"/usr/local/bin/{program}"))
        assert digest.split()[0] == file_sha256(node_programs / program)
        symbols = subprocess.run(["/usr/bin/nm", node_programs / program], check=False, capture_output=True, text=True)
        assert "no symbols" in symbols.stderr


def test_options_reach_bitcoind_which_is_healthy_and_stops_cleanly(run_container: RunContainer) -> None:
    container = run_container(NODE, "-regtest", "-rpcport=18555", "-uacomment=passed")
    wait_until_healthy(container)
    assert output(container, "id", "-u") == "1000"
    assert output(container, "cat", "/proc/1/comm") == "bitcoind"
    network = json.loads(output(container, "bitcoin-cli", "-regtest", "-rpcport=18555", "getnetworkinfo"))
    assert "passed" in network["subversion"]
    container.stop(timeout=int(START_TIME))
    code, said = end(container)
    assert code == 0
    assert said.endswith("Shutdown done")


def test_without_arguments_bitcoind_is_started_and_any_other_argument_is_a_command(run_container: RunContainer) -> None:
    configured = run_container(NODE, "sh", "-c", "echo regtest=1 > .bitcoin/bitcoin.conf")
    assert end(configured) == (0, "")
    container = run_container(NODE, volumes_from=[configured.id])
    wait_until_healthy(container)
    assert output(container, "bitcoin-cli", "getblockcount") == "0"
    code, said = end(run_container(NODE, "bitcoin-cli", "--version"))
    assert code == 0
    assert said.startswith("Bitcoin Core RPC client")


def test_without_a_node_the_check_of_health_fails(run_container: RunContainer) -> None:
    code, said = end(run_container(NODE, "healthcheck"))
    assert code == 1
    assert "Could not connect to the server" in said


def test_the_volume_keeps_the_chain(run_container: RunContainer) -> None:
    first = run_container(NODE, "-regtest")
    wait_until_healthy(first)
    output(first, "bitcoin-cli", "-regtest", "generatetodescriptor", "3", "raw(51)")
    first.stop(timeout=int(START_TIME))
    second = run_container(NODE, "-regtest", volumes_from=[first.id])
    wait_until_healthy(second)
    assert output(second, "bitcoin-cli", "-regtest", "getblockcount") == "3"
    second.stop(timeout=int(START_TIME))


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (["python3", "--version"], "Python 3.11."),
        (["traincert", "--version"], "traincert, version "),
        (["python3", "-c", "import torch; print(torch.cuda.is_available(), torch.version.cuda)"], "False None"),
        (["bitcoind", "--version"], "Bitcoin Core daemon"),
        (["id", "-u"], "1000"),
    ],
)
def test_the_traincert_image_has_all_that_a_coordinator_needs(
    run_container: RunContainer, command: list[str], answer: str
) -> None:
    code, said = end(run_container(TRAINCERT, *command))
    assert code == 0
    assert said.startswith(answer)
