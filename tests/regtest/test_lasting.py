"""Networks that outlive whoever made them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import psutil
import pytest

from traincert.regtest.errors import NodeError
from traincert.regtest.faucet import Faucet
from traincert.regtest.lasting import LastingNetwork
from traincert.regtest.node import Node, wait_for


@pytest.fixture
def network(node_programs: Path, tmp_path: Path) -> Iterator[LastingNetwork]:
    network = LastingNetwork.create(node_programs / "bitcoind", tmp_path / "network", 2, "full")
    try:
        network.start()
        yield network
    finally:
        if network.directory.exists():
            network.down()


def mine(network: LastingNetwork, count: int) -> None:
    network.nodes[0].rpc("generatetodescriptor", count, "raw(51)")
    network.wait_until_same_tip()


def height(network: LastingNetwork) -> list[int]:
    return [node.rpc("getblockcount") for node in network.nodes]


def test_another_process_finds_everything_again(network: LastingNetwork) -> None:
    with LastingNetwork.opened(network.directory) as opened:
        opened.partition([[0], [1]])
        opened.delay((0, 1), 0.05)
        opened.set_time(1_900_000_000)
        opened.nodes[1].pause()
        opened.nodes[0].fill_disk()
    found = LastingNetwork.load(network.directory)
    assert [node.pid for node in found.nodes] == [node.pid for node in network.nodes]
    assert [node.rpc_port for node in found.nodes] == [node.rpc_port for node in network.nodes]
    assert (found.groups, found.delays, found.time) == ([{0}, {1}, set()], {(0, 1): 0.05}, 1_900_000_000)
    assert [(node.state, node.faults) for node in found.status()] == [
        ("running", ["cut off from node1", "node1 50 ms late", "disk full"]),
        ("paused", ["cut off from node0", "node0 50 ms late"]),
    ]
    with LastingNetwork.opened(network.directory) as opened:
        opened.nodes[1].resume()
        opened.nodes[0].free_disk()
        opened.delay((0, 1), 0)
        opened.heal()
        opened.set_time(None)
    assert [(node.state, node.peers, node.faults) for node in LastingNetwork.load(network.directory).status()] == [
        ("running", ["node1"], []),
        ("running", ["node0"], []),
    ]


def test_status_asks_each_node_once_for_its_peers(network: LastingNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rpc = Node.rpc

    def count(node: Node, method: str, *params: object) -> object:
        asked.append(method)
        return rpc(node, method, *params)

    monkeypatch.setattr(Node, "rpc", count)
    assert [node.peers for node in network.status()] == [["node1"], ["node0"]]
    assert asked.count("getpeerinfo") == 2


def test_a_node_that_does_not_start_keeps_no_other_from_it(network: LastingNetwork) -> None:
    mine(network, 3)
    network.corrupt(0)
    network.stop()
    with pytest.raises(NodeError, match=r"^node0 did not start \(exit code 1\)"):
        network.start_nodes(network.nodes)
    assert [node.state for node in network.status()] == ["stopped", "running"]


def test_snapshot_is_refused_if_a_node_could_not_be_started_again(network: LastingNetwork) -> None:
    mine(network, 1)
    network.corrupt(0)
    with pytest.raises(NodeError, match="node0 could not be started again: disk-free or repair it first, or stop it"):
        network.snapshot("a")
    network.repair(0)
    network.nodes[1].fill_disk()
    with pytest.raises(NodeError, match="node1 could not be started again"):
        network.snapshot("a")
    network.nodes[1].free_disk()
    assert [node.peers for node in network.status()] == [["node1"], ["node0"]]
    network.corrupt(1)
    network.nodes[1].stop()
    network.snapshot("a")
    network.repair(1)
    network.restore("a")  # node1 is as corrupt as it was
    assert [(node.state, bool(node.faults)) for node in network.status()] == [("running", False), ("stopped", True)]


def test_snapshot_brings_back_wallets_and_pauses(network: LastingNetwork) -> None:
    for name in ("a # b", "c"):
        network.nodes[0].rpc("createwallet", name)
    network.nodes[0].rpc("createwallet", "d")
    network.nodes[0].rpc("unloadwallet", "d")
    network.nodes[1].pause()
    network.snapshot("two")
    assert [node.state for node in network.status()] == ["running", "paused"]
    network.nodes[1].resume()
    assert sorted(network.nodes[0].rpc("listwallets")) == ["a # b", "c"]
    network.nodes[0].rpc("unloadwallet", "c")
    network.stop()
    network.start()
    assert network.nodes[0].rpc("listwallets") == ["a # b"]
    network.restore("two")
    assert sorted(network.nodes[0].rpc("listwallets")) == ["a # b", "c"]


def test_restore_that_cannot_be_written_changes_nothing(
    network: LastingNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.snapshot("a")
    mine(network, 2)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OSError, match="cp"):
        network.restore("a")
    monkeypatch.undo()
    assert [(node.state, node.height) for node in network.status()] == [("running", 2)] * 2
    network.restore("a")
    assert height(network) == [0, 0]
    assert [path.name for path in (network.directory / "snapshots").iterdir()] == ["a"]


def test_payments_reach_all_nodes_after_the_clocks_were_set_forward(network: LastingNetwork) -> None:
    payer = network.nodes[0]
    payer.rpc("createwallet", "mine")
    payer.mine(101, payer.rpc("getnewaddress"))
    network.wait_until_synced()
    network.set_time(int(time.time()) + 2 * 86400)
    network.snapshot("later")
    network.restore("later")
    txid = payer.rpc("sendtoaddress", payer.rpc("getnewaddress"), 1)
    network.wait_until_synced()
    assert network.nodes[1].rpc("getrawmempool") == [txid]


def test_a_network_is_the_same_by_all_names_of_its_folder(node_programs: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    network = LastingNetwork.create(node_programs / "bitcoind", tmp_path / "link" / "network", 1, "full")
    network.start()
    with LastingNetwork.opened(tmp_path / "real" / "network") as found:
        assert [node.state for node in found.status()] == ["running"]
    LastingNetwork.remove(tmp_path / "real" / "network")
    network.nodes[0].kill()  # reaps our child
    assert processes_of(str(tmp_path)) == []
    assert list((tmp_path / "real").iterdir()) == []


@pytest.mark.parametrize("damaged", ["network.json", "node0/bitcoin.conf"])
def test_network_with_an_empty_file_can_be_taken_down(network: LastingNetwork, damaged: str) -> None:
    network.delay((0, 1), 0.01)
    (network.directory / damaged).write_text("")
    if damaged == "network.json":
        with pytest.raises(NodeError, match="is damaged: traincert network down ends this network, then make it again"):
            LastingNetwork.load(network.directory)
    else:
        assert [node.state for node in LastingNetwork.load(network.directory).status()] == ["no answer", "running"]
    LastingNetwork.remove(network.directory)
    assert processes_of(str(network.directory)) == []
    assert not network.directory.exists()
    network.stop()  # reaps our children


def test_node_without_block_files_cannot_be_corrupted(tmp_path: Path) -> None:
    network = LastingNetwork.create(Path("bitcoind"), tmp_path / "network", 1, "full")
    with pytest.raises(NodeError, match="node0 has no block file in "):
        network.corrupt(0)


def test_status_tells_how_a_node_ended(network: LastingNetwork) -> None:
    network.nodes[0].kill()
    network.nodes[1].stop()
    assert [(node.state, node.height) for node in network.status()] == [("died", None), ("stopped", None)]


def test_snapshot_brings_back_blocks_and_faults(network: LastingNetwork) -> None:
    mine(network, 3)
    network.delay((0, 1), 0.01)
    network.snapshot("three")
    assert height(network) == [3, 3]
    network.delay((0, 1), 0)
    mine(network, 2)
    network.corrupt(1)
    network.nodes[1].kill()
    network.restore("three")
    network.restore("three")
    assert height(network) == [3, 3]
    assert network.delays == {(0, 1): 0.01}
    assert [node.faults for node in network.status()] == [["node1 10 ms late"], ["node0 10 ms late"]]


def test_snapshot_leaves_stopped_nodes_stopped(network: LastingNetwork) -> None:
    network.nodes[1].stop()
    network.snapshot("one")
    assert [node.state for node in network.status()] == ["running", "stopped"]


def test_time_that_nodes_refuse_changes_nothing(network: LastingNetwork) -> None:
    with pytest.raises(NodeError, match="node0 has a block of 2011-02-02 23:16:42 UTC"):
        network.set_time(-1)
    assert network.time is None


def test_snapshots_are_told_apart(network: LastingNetwork) -> None:
    network.snapshot("a")
    with pytest.raises(NodeError, match="there is a snapshot a already"):
        network.snapshot("a")
    with pytest.raises(NodeError, match="there is no snapshot b; there are: a"):
        network.restore("b")
    for name in ("", "../a", "a/b", ".a", "a.new", "a" * 253):
        with pytest.raises(NodeError, match="is no name for a snapshot"):
            network.snapshot(name)


def test_snapshot_that_cannot_be_written_leaves_none_and_nodes_that_run(
    network: LastingNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(OSError, match="cp"):
        network.snapshot("a")
    monkeypatch.undo()
    assert [node.state for node in network.status()] == ["running", "running"]
    assert list((network.directory / "snapshots").iterdir()) == []
    network.snapshot("a")


def test_corrupt_block_is_found_and_repaired(network: LastingNetwork) -> None:
    mine(network, 3)
    tip = network.nodes[1].rpc("getbestblockhash")
    network.corrupt(1)
    with pytest.raises(NodeError, match="node1 is corrupt already"):
        network.corrupt(1)
    network.nodes[1].stop()
    with pytest.raises(NodeError, match=r"node1 did not start.*Corrupted block database"):
        network.nodes[1].start()
    network.repair(1)
    network.nodes[1].start()
    assert network.nodes[1].rpc("getblock", tip)["height"] == 3
    with pytest.raises(NodeError, match="node1 is not corrupt"):
        network.repair(1)


def test_nothing_is_left_after_down(network: LastingNetwork) -> None:
    network.delay((0, 1), 0.01)
    network.snapshot("a")
    network.nodes[1].pause()
    folder = str(network.directory)
    os.utime(network.directory / "links/0-1.pid", (0, 0))  # as after a step of the machine's clock
    assert processes_of(folder)
    (network.directory / "notes").write_text("the user's own")
    network.down()
    assert [path.name for path in network.directory.iterdir()] == ["notes"]
    assert processes_of(folder) == []
    (network.directory / "notes").unlink()
    network.directory.rmdir()


def processes_of(folder: str) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if folder in " ".join(process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


UP = """\
import sys
from pathlib import Path
from traincert.regtest.lasting import LastingNetwork
network = LastingNetwork.create(Path(sys.argv[1]), Path(sys.argv[2]), 3, "full")
print("made", flush=True)
network.start()
"""


def test_network_whose_maker_was_killed_at_once_can_be_taken_down(node_programs: Path, tmp_path: Path) -> None:
    """Nodes are on their way, and have not written a pid file yet."""
    folder = tmp_path / "network"
    command = [sys.executable, "-c", UP, str(node_programs / "bitcoind"), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as maker:
        assert maker.stdout is not None
        maker.stdout.readline()
        wait_for(lambda: list(folder.glob("node*/regtest/.lock")), 30, "a node to be under way")
        os.kill(maker.pid, signal.SIGKILL)
    LastingNetwork.load(folder).down()
    assert not folder.exists()
    assert processes_of(str(folder)) == []


def test_node_that_has_not_even_locked_its_data_directory_is_ended(network: LastingNetwork) -> None:
    network.nodes[1].stop()
    command = [sys.executable, "-c", "input()", f"-datadir={network.nodes[1].datadir}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as starting:
        wait_for(lambda: starting.pid in processes_of(str(network.directory)), 30, "the process")
        network.down()
        assert processes_of(str(network.directory)) == []


def test_folder_in_use_is_refused(network: LastingNetwork, tmp_path: Path) -> None:
    bitcoind = network.nodes[0].bitcoind
    with pytest.raises(NodeError, match=r"there is a network in .*network: traincert network start starts it"):
        LastingNetwork.create(bitcoind, network.directory, 1, "full")
    with pytest.raises(NodeError, match=r"is not empty: choose another with --dir"):
        LastingNetwork.create(bitcoind, tmp_path, 1, "full")
    with pytest.raises(NodeError, match=r"there is no network in .*: traincert network up makes one"):
        LastingNetwork.load(tmp_path)


def test_faucet_pays_and_fees_are_known(network: LastingNetwork) -> None:
    faucet = Faucet(network, lambda count, address: network.nodes[0].rpc("generatetoaddress", count, address))
    faucet.make_fee_history()
    for node in network.nodes:
        assert node.rpc("estimatesmartfee", 6)["feerate"] > 0
    network.nodes[1].rpc("createwallet", "mine")
    address = network.nodes[1].rpc("getnewaddress", wallet="mine")
    txid = faucet.fund(address, Decimal("120.5"))  # more than a block pays
    network.wait_until_same_tip()
    paid = network.nodes[1].rpc("gettransaction", txid, wallet="mine")
    assert (paid["amount"], paid["confirmations"]) == (120.5, 1)
    with pytest.raises(NodeError, match="nonsense is not a regtest address"):
        faucet.fund("nonsense", Decimal(1))


def test_faucet_leaves_the_users_wallet_the_only_one(network: LastingNetwork) -> None:
    node = network.nodes[0]
    node.rpc("createwallet", "mine")
    faucet = Faucet(network, lambda count, address: node.rpc("generatetoaddress", count, address))
    faucet.fund(node.rpc("getnewaddress"), Decimal("1.00000001"))
    assert node.rpc("getbalance") == Decimal("1.00000001")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('"version": 1', '"version": 2'), "has format 2, this traincert reads format 1: take the network down with "),
        (('"version": 1', '"other": 1'), "has format None, this traincert reads format 1: take the network down with "),
        (
            ('"version"', "version"),
            "is damaged: traincert network down ends this network, then make it again",
        ),
    ],
)
def test_a_state_file_that_cannot_be_read_is_told_by_a_line_that_says_what_to_do(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    network = LastingNetwork.create(Path("bitcoind"), tmp_path / "network", 1, "full")
    path = network.directory / "network.json"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(NodeError, match=f"^{path} {said}"), LastingNetwork.opened(network.directory):
        pass
    assert change[1] in path.read_text()


def test_a_snapshot_of_another_format_is_not_restored(network: LastingNetwork) -> None:
    mine(network, 1)
    network.snapshot("old")
    path = network.directory / "snapshots" / "old" / "network.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    mine(network, 1)
    with pytest.raises(NodeError, match=f"^{path} has format 0"):
        network.restore("old")
    assert height(network) == [2, 2]
