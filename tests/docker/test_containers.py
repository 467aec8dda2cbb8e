"""Nodes in containers, behind the interface of those that are processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker import DockerClient

from traincert.regtest.containers import LABEL, Docker
from traincert.regtest.errors import NodeError
from traincert.regtest.network import Network
from traincert.regtest.node import wait_for

TRAINCERT = Path(sys.executable).with_name("traincert")

# Starts a network of two containers in another process, says so, and waits for its end.
HOLD_NETWORK = """\
import sys
from pathlib import Path
from traincert.regtest.containers import Docker
from traincert.regtest.network import Network
folder = Path(sys.argv[1])
with Network(Path("bitcoind"), folder, 2, docker=Docker(folder)):
    print("ready", flush=True)
    sys.stdin.read()
"""


def left(engine: DockerClient, folder: Path) -> tuple[list[object], list[object], set[str | None]]:
    """What the engine has of a network's folder: containers, networks, and volumes that nobody uses."""
    ours: dict[str, str | list[str] | bool] = {"label": f"{LABEL}={folder}"}
    return (
        list(engine.containers.list(all=True, filters=ours)),
        list(engine.networks.list(filters=ours)),
        {volume.id for volume in engine.volumes.list(filters={"dangling": True})},
    )


@pytest.fixture
def network(images: DockerClient, tmp_path: Path) -> Iterator[Network]:
    """Three nodes."""
    volumes = left(images, tmp_path)[2]
    with Network(Path("bitcoind"), tmp_path, 3, docker=Docker(tmp_path)) as network:
        yield network
    assert left(images, tmp_path) == ([], [], volumes)


def peers(network: Network) -> list[list[str]]:
    return [network.peers(number) for number in range(len(network.nodes))]


ALL = [["node1", "node2"], ["node0", "node2"], ["node0", "node1"]]


def mine(network: Network, node: int, blocks: int) -> str:
    hashes: list[str] = network.nodes[node].rpc("generatetodescriptor", blocks, "raw(51)")
    return hashes[-1]


def test_partition_cuts_and_its_end_joins(network: Network) -> None:
    assert peers(network) == ALL
    network.partition([{0, 1}])
    assert peers(network) == [["node1"], ["node0"], []]
    mine(network, 0, 1)
    theirs = mine(network, 2, 2)  # RPC goes on
    network.nodes[1].restart()
    network.connect()
    assert peers(network) == [["node1"], ["node0"], []]
    network.heal()
    assert peers(network) == ALL
    assert network.wait_until_same_tip() == theirs


def test_delay_makes_a_link_late(network: Network) -> None:
    network.delay((0, 2), 0.2)
    assert peers(network) == ALL

    def pings() -> dict[str, float | None]:
        found = network.nodes[0].rpc("getpeerinfo")
        return {name: peer.get("minping") for peer in found for name in network.peers(0) if name in peer["subver"]}

    wait_for(lambda: None not in pings().values(), 30, "pings", pings)
    assert (pings()["node2"] or 0) > 0.4 > (pings()["node1"] or 0)
    network.delay((0, 2), 0)
    assert peers(network) == ALL


def test_faults_are_those_of_processes(network: Network) -> None:
    tip = mine(network, 0, 3)
    network.wait_until_same_tip()
    node = network.nodes[1]
    node.pause()
    assert node.paused
    node.resume()
    assert node.rpc("getbestblockhash") == tip
    node.rpc("setnetworkactive", False)  # or a peer may hear of the block before the node ends, and give it back
    node.fill_disk()
    with pytest.raises(NodeError):
        node.rpc("generatetodescriptor", 1, "raw(51)")
    wait_for(lambda: node.pid is None, 30, "the node to end")
    node.free_disk()
    node.start()
    network.nodes[2].kill()
    assert network.nodes[2].died
    network.nodes[2].start()
    network.connect()
    assert network.wait_until_same_tip() == tip
    assert subprocess.check_output([*node.cli, "getblockcount"]) == b"3\n"


def test_nobody_but_this_machine_reaches_the_rpc_ports(network: Network, images: DockerClient) -> None:
    ours: dict[str, str | list[str] | bool] = {"label": f"{LABEL}={network.directory}"}
    for container in images.containers.list(filters=ours):
        assert {port["HostIp"] for ports in container.ports.values() for port in ports or []} == {"127.0.0.1"}


def test_bad_option_gives_the_nodes_own_words(images: DockerClient, tmp_path: Path) -> None:
    network = Network(Path("bitcoind"), tmp_path, 1, {"assumevalid": "zz"}, docker=Docker(tmp_path))
    with pytest.raises(NodeError, match=r"node0 did not start \(exit code 1\): Error: Invalid assumevalid .*\(zz\)"):
        network.start()
    assert left(images, tmp_path)[:2] == ([], [])


def test_missing_image_and_missing_engine_are_told(
    images: DockerClient,  # noqa: ARG001 - there is an engine
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(NodeError, match="Docker has no image traincert/nothing: make images builds it"):
        Docker(tmp_path, "traincert/nothing")
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    with pytest.raises(NodeError, match=r"no Docker engine answers \(.*\): start one, or use processes"):
        Docker(tmp_path)


def test_containers_end_with_us_even_if_we_are_killed(images: DockerClient, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD_NETWORK, str(tmp_path)]
    volumes = left(images, tmp_path)[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        assert len(left(images, tmp_path)[0]) == 2
        holder.kill()
    wait_for(
        lambda: left(images, tmp_path) == ([], [], volumes), 60, "nothing to be left", lambda: left(images, tmp_path)
    )


def test_network_of_containers_stays_until_it_is_taken_down(images: DockerClient, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        return subprocess.check_output([str(TRAINCERT), "network", *arguments], cwd=tmp_path, text=True)

    run("up", "--backend", "docker", "--nodes", "2", "--training")
    try:
        run("partition", "0|1")
        run("mine", "2")
        status = json.loads(run("status", "--json"))["nodes"]
        assert [(node["height"], node["faults"]) for node in status] == [
            (2, ["cut off from node1"]),
            (0, ["cut off from node0"]),
        ]
        run("heal")
        run("snapshot", "two")
        run("mine", "1")
        run("kill", "1")
        run("restore", "two")
        assert run("cli", "1", "getblockcount") == "2\n"
    finally:
        run("down")
    assert left(images, tmp_path / "network")[:2] == ([], [])
    assert list(tmp_path.iterdir()) == []


def test_the_plugins_fixtures_run_in_containers(
    images: DockerClient,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    (tmp_path / "test_it.py").write_text(
        "def test_it(bitcoind, bitcoin_network):\n"
        "    assert bitcoind.cli[0] == 'docker'\n"
        "    assert bitcoind.rpc('getblockcount') == 0\n"
        "    network = bitcoin_network(2)\n"
        "    network.nodes[0].rpc('generatetodescriptor', 1, 'raw(51)')\n"
        "    network.wait_until_same_tip()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--regtest-backend", "docker", "."]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
