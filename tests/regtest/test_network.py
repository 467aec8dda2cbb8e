"""Several real nodes that hear each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from operator import itemgetter
from pathlib import Path

import psutil
import pytest

from traincert.regtest import network as network_module
from traincert.regtest.errors import NodeError, RpcError, WaitTimeoutError
from traincert.regtest.links import read_topology
from traincert.regtest.network import Network
from traincert.regtest.node import Node, Options, free_ports, wait_for
from traincert.regtest.plugin import NetworkFactory


def mine(network: Network, node: int, blocks: int) -> str:
    """Mine on one node, without a wallet; the last block's hash."""
    script_address = network.nodes[node].rpc("decodescript", "51")["p2sh"]
    hashes = network.nodes[node].rpc("generatetoaddress", blocks, script_address)
    assert isinstance(hashes, list)
    return str(hashes[-1])


def test_a_block_reaches_every_node(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(3)
    for node in range(3):
        assert mine(network, node, 2) == network.wait_until_same_tip()
    assert [node.rpc("getblockcount") for node in network.nodes] == [6, 6, 6]


def test_the_rest_still_hear_each_other(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(4)
    network.nodes[1].kill()
    network.nodes[2].stop()
    tip = mine(network, 0, 1)
    assert network.wait_until_same_tip() == tip
    for node in network.nodes[1:3]:
        node.start()
    network.connect()
    network.connect()  # changes nothing
    assert network.wait_until_same_tip() == tip
    assert {len(node.rpc("getpeerinfo")) for node in network.nodes} == {3}


def test_nodes_that_lost_their_chain_hear_of_it_though_they_hear_each_other(bitcoin_network: NetworkFactory) -> None:
    """Each could have only the other to ask for headers, see Network.connect()."""
    network = bitcoin_network(3)
    tip = mine(network, 2, 2)
    network.wait_until_same_tip()
    for node in network.nodes[:2]:
        node.kill()  # before it has written its chain to disk
        node.start()
        assert node.rpc("getblockcount") == 0
    network.connect()
    for node in network.nodes[:2]:  # not left to chance, as their synchronisation without this order is
        assert "(node2)" in min(node.rpc("getpeerinfo"), key=itemgetter("id"))["subver"]
    assert network.wait_until_same_tip() == tip


def test_nodes_that_lost_their_chain_in_a_partition_hear_of_it_when_it_ends(bitcoin_network: NetworkFactory) -> None:
    """They have asked each other for headers, and would ask nobody else."""
    network = bitcoin_network(3)
    tip = mine(network, 0, 2)
    network.wait_until_same_tip()
    network.partition([[0]])
    for node in network.nodes[1:]:
        node.kill()
        node.start()
        assert node.rpc("getblockcount") == 0
    network.connect()
    network.heal()
    assert network.wait_until_same_tip() == tip


def test_node_may_refuse_a_branch(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(3)
    mine(network, 0, 5)
    network.wait_until_same_tip()
    network.nodes[1].rpc("invalidateblock", network.nodes[1].rpc("getblockhash", 3))
    network.nodes[1].restart()
    network.nodes[1].stop()
    mine(network, 0, 1)  # node1 will not even take this header
    network.nodes[1].start()
    network.connect()
    network.wait_until_synced()
    assert [node.rpc("getblockcount") for node in network.nodes] == [6, 2, 6]


def test_each_part_of_a_network_is_in_step_for_itself(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(4, {"txindex": True}, topology=[(0, 1), (1, 2)])
    mine(network, 0, 2)
    mine(network, 3, 1)
    network.wait_until_synced()
    assert [node.rpc("getblockcount") for node in network.nodes] == [2, 2, 2, 1]
    assert {index["best_block_height"] for node in network.nodes for index in node.rpc("getindexinfo").values()} == {
        1,
        2,
    }
    network.nodes[1].pause()
    mine(network, 0, 1)  # node2 does not hear of it, and need not
    network.wait_until_synced()
    network.nodes[1].resume()
    network.wait_until_synced()
    assert [node.rpc("getblockcount") for node in network.nodes] == [3, 3, 3, 1]


def test_what_is_not_in_step_is_told(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(2)
    network.nodes[0].rpc("setnetworkactive", False)
    mine(network, 0, 1)
    with pytest.raises(
        WaitTimeoutError, match=r"node0, node1 to be in step; last seen: node0 at height 1, .*, 0 in the"
    ):
        network.wait_until_synced(timeout=0.2)


def test_reorganisation_puts_payments_back_into_every_mempool(
    bitcoin_network: NetworkFactory, chain_snapshot: Node
) -> None:
    network = bitcoin_network(1)
    network.add(Node(chain_snapshot.bitcoind, chain_snapshot.datadir, name="payer"))
    chain_snapshot.stop()
    network.start()
    payer = network.nodes[1]
    network.wait_until_synced()
    txid = payer.rpc("sendtoaddress", payer.rpc("getnewaddress"), 1)
    network.wait_until_synced()
    assert network.nodes[0].rpc("getrawmempool") == [txid]
    payer.mine(2)
    assert payer.rpc("gettransaction", txid)["confirmations"] == 2
    tip = network.reorg(2, 1)
    network.wait_until_synced()
    assert [node.rpc("getbestblockhash") for node in network.nodes] == [tip, tip]
    assert network.nodes[0].rpc("getrawmempool") == [txid]
    assert payer.rpc("gettransaction", txid)["confirmations"] == 0
    assert payer.rpc("getblockcount") == 253
    payer.stop()


def test_reorganisations_while_the_clock_stands(bitcoin_network: NetworkFactory) -> None:
    """The new blocks have the times of the old ones, and are not the same."""
    network = bitcoin_network(1)
    network.set_time(1_900_000_000)
    tips = {network.nodes[0].mine(3)[-1], *(network.reorg(1) for _ in range(3))}
    assert len(tips) == 4
    assert network.nodes[0].rpc("getblockcount") == 6


def test_restarted_node_is_linked_again(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(2)
    network.nodes[1].restart()
    assert peers(network) == [{"node1"}, {"node0"}]


def test_transactions_reach_peers_although_clocks_stand_and_no_block_is_new(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(2)
    payer = network.nodes[0]
    payer.rpc("createwallet", "mine")
    payer.mine(101, payer.rpc("getnewaddress"))
    network.wait_until_synced()
    network.set_time(int(time.time()) + 2 * 86400)
    for node in network.nodes:
        node.restart()
    txid = payer.rpc("sendtoaddress", payer.rpc("getnewaddress"), 1)
    network.wait_until_synced()
    assert network.nodes[1].rpc("getrawmempool") == [txid]


def test_different_tips_are_told_for_each_node(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(2)
    for peer in network.nodes[0].rpc("getpeerinfo"):
        network.nodes[0].rpc("disconnectnode", "", peer["id"])
    tip = mine(network, 0, 1)
    with pytest.raises(
        WaitTimeoutError, match=rf"same tip on all nodes; last seen: node0 at height 1, {tip}; node1 at height 0, "
    ):
        network.wait_until_same_tip(timeout=0.2)


def test_one_node_that_does_not_start_stops_the_others(node_programs: Path, tmp_path: Path) -> None:
    network = Network(node_programs / "bitcoind", tmp_path, 3)
    (tmp_path / "node1").write_text("not a folder")
    with pytest.raises(FileExistsError):
        network.start()
    assert [node.pid for node in network.nodes] == [None, None, None]


def test_options_go_to_every_node(node_programs: Path, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match=r"node0 did not start \(exit code 1\): Error: Invalid assumevalid"):
        Network(node_programs / "bitcoind", tmp_path, 2, {"assumevalid": "zz"}).start()


def test_network_with_no_node_running_has_no_tip(node_programs: Path, tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="no node of the network is running"):
        Network(node_programs / "bitcoind", tmp_path, 2).wait_until_same_tip()


def peers(network: Network) -> list[set[str]]:
    """The names of each node's peers."""
    return [{peer["subver"].split("(")[1][:-2] for peer in node.rpc("getpeerinfo")} for node in network.nodes]


def test_topology_says_who_is_linked(node_programs: Path, tmp_path: Path) -> None:
    with Network(node_programs / "bitcoind", tmp_path, 4, topology="line") as network:
        assert peers(network) == [{"node1"}, {"node0", "node2"}, {"node1", "node3"}, {"node2"}]
        assert mine(network, 0, 1) == network.wait_until_same_tip()


def test_partition_cuts_and_its_end_joins(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(3)
    network.partition([{0, 1}])
    assert peers(network) == [{"node1"}, {"node0"}, set()]
    ours, theirs = mine(network, 0, 1), mine(network, 2, 2)
    assert network.nodes[1].rpc("waitforblock", ours, 30_000)["hash"] == ours
    network.nodes[1].restart()
    network.connect()  # the partition goes on
    assert peers(network) == [{"node1"}, {"node0"}, set()]
    network.heal()
    assert peers(network) == [{"node1", "node2"}, {"node0", "node2"}, {"node0", "node1"}]
    assert network.wait_until_same_tip() == theirs


def test_node_in_two_groups_is_refused(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(3)
    with pytest.raises(NodeError, match="node1 is in two groups"):
        network.partition([{0, 1}, {1, 2}])
    assert peers(network) == [{"node1", "node2"}, {"node0", "node2"}, {"node0", "node1"}]


def test_delay_makes_a_link_late_until_it_is_undone(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(2)
    network.delay((0, 1), 0.2)
    assert least_ping(network) > 0.4
    assert mine(network, 0, 50) == network.wait_until_same_tip()
    network.nodes[1].restart()  # comes back with the same delay
    network.connect()
    assert least_ping(network) > 0.4
    network.delay((0, 1), 0)
    assert least_ping(network) < 0.4
    assert list((network.directory / "links").glob("*.pid")) == []
    with pytest.raises(NodeError, match="node0 and node5 are not linked"):
        network.delay((0, 5), 1)


def test_link_of_a_paused_node_can_be_delayed_and_cut(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(2)
    for paused in network.nodes:
        paused.pause()
        network.delay((0, 1), 0.2)
        paused.resume()
        network.connect()
        assert least_ping(network) > 0.4
        paused.pause()
        network.partition([[0], [1]])
        network.delay((0, 1), 0)
        paused.resume()
        wait_for(lambda: peers(network) == [set(), set()], 10, "the node that was paused to learn that its link is cut")
        network.heal()


def test_slow_link_gets_the_time_that_it_needs(
    bitcoin_network: NetworkFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = bitcoin_network(2)
    mine(network, 0, 1)
    monkeypatch.setattr(network_module, "CONNECT_TIMEOUT", 0.5)
    network.delay((0, 1), 0.5)
    assert peers(network) == [{"node1"}, {"node0"}]


def test_delay_and_partition_that_fail_change_nothing(
    bitcoin_network: NetworkFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = bitcoin_network(3)
    for seconds in (-1, 10.5, float("nan"), float("inf")):
        with pytest.raises(NodeError, match=r"a link cannot be .* s slow, but up to 10 s"):
            network.delay((0, 1), seconds)
    network.delay((1, 2), 0.01)
    network.partition([[2]])
    network.nodes[1].rpc("setnetworkactive", False)
    with monkeypatch.context() as patch:
        patch.setattr(network_module, "CONNECT_TIMEOUT", 0.2)
        with pytest.raises(WaitTimeoutError):
            network.delay((0, 1), 0.01)
        with pytest.raises(WaitTimeoutError):
            network.heal()
        with pytest.raises(WaitTimeoutError):
            network.partition([[0]])
    assert (network.groups, network.delays) == ([{2}, {0, 1}], {(1, 2): 0.01})
    assert [file.name for file in (network.directory / "links").glob("*.pid")] == ["1-2.pid"]
    network.nodes[1].rpc("setnetworkactive", True)
    network.connect()
    assert peers(network) == [{"node1"}, {"node0"}, set()]


def test_time_that_a_node_does_not_take_changes_no_clock(
    bitcoin_network: NetworkFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = bitcoin_network(2)
    network.set_time(1_900_000_000)
    answer = network.nodes[1].rpc

    def refuse(method: str, *params: object) -> object:
        if params == (1_900_000_001,):
            raise RpcError("node1", method, -1, "no")
        return answer(method, *params)

    monkeypatch.setattr(network.nodes[1], "rpc", refuse)
    with pytest.raises(RpcError, match="node1: setmocktime: no"):
        network.set_time(1_900_000_001)
    assert network.time == 1_900_000_000
    mine(network, 0, 1)
    assert network.nodes[0].rpc("getblockchaininfo")["time"] == 1_900_000_000


def test_all_else_ends_when_one_node_does_not_stop(
    bitcoin_network: NetworkFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = bitcoin_network(2)
    network.delay((0, 1), 0.01)
    relay = int((network.directory / "links/0-1.pid").read_text())

    stop = Node.stop

    def stop_others(node: Node) -> None:
        if node.name == "node0":
            raise NodeError("node0 does not stop")
        stop(node)

    with monkeypatch.context() as patch:
        patch.setattr(Node, "stop", stop_others)
        with pytest.raises(NodeError, match="node0 does not stop"):
            network.stop()
    assert network.nodes[1].pid is None
    wait_for(lambda: not psutil.pid_exists(relay), 30, "the relay to end")


def test_options_of_single_nodes(node_programs: Path, tmp_path: Path) -> None:
    bitcoind, (port, *_) = node_programs / "bitcoind", free_ports(1)
    single: dict[str, Options] = {"node1": {"rpcport": port, "uacomment": "mine"}}
    with Network(bitcoind, tmp_path, 2, {"txindex": True}, node_options=single) as network:
        assert [set(node.rpc("getindexinfo")) for node in network.nodes] == [{"txindex"}] * 2
        assert "(node1; mine)" in network.nodes[1].rpc("getnetworkinfo")["subversion"]
        assert network.nodes[1].rpc_port == port
    with pytest.raises(NodeError, match="there is no node node2: there are node0 to node1"):
        Network(bitcoind, tmp_path, 2, node_options={"node2": {}})
    with pytest.raises(NodeError, match="option port: two nodes cannot have the same port"):
        Network(bitcoind, tmp_path, 2, {"port": port})


STOPS_AT_EXIT = """\
import atexit, sys
from pathlib import Path
from traincert.regtest import Network
network = Network(Path(sys.argv[1]), Path(sys.argv[2]), 2)
network.start()
atexit.register(network.stop)
network.nodes[0].mine(3)
network.wait_until_synced()
"""


def test_network_can_be_stopped_when_python_exits(node_programs: Path, tmp_path: Path) -> None:
    bitcoind = node_programs / "bitcoind"
    subprocess.run([sys.executable, "-c", STOPS_AT_EXIT, str(bitcoind), str(tmp_path)], check=True)
    with Network(bitcoind, tmp_path, 2) as network:
        assert [node.rpc("getblockcount") for node in network.nodes] == [3, 3]


def least_ping(network: Network) -> float:
    """Seconds there and back between the first two nodes."""
    (peer,) = network.nodes[0].rpc("getpeerinfo")
    wait_for(lambda: "minping" in network.nodes[0].rpc("getpeerinfo")[0], 30, "a ping")
    (peer,) = network.nodes[0].rpc("getpeerinfo")
    return float(peer["minping"])


def test_relays_end_with_us(node_programs: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from traincert.regtest import Network; "
        "network = Network(Path(sys.argv[1]), Path(sys.argv[2]), 2); network.start(); network.delay((0, 1), 0.01); "
        "print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(node_programs / "bitcoind"), str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        pid = int((tmp_path / "links/0-1.pid").read_text())
        assert psutil.pid_exists(pid)
        holder.kill()
    wait_for(lambda: not psutil.pid_exists(pid), 30, "the relay to end")


def test_time_is_the_same_for_all_and_survives_a_restart(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(2)
    time = 1_900_000_000
    network.set_time(time)
    mine(network, 0, 1)
    network.wait_until_same_tip()
    network.nodes[1].restart()  # it would not take a block of the future at its real time
    assert [node.rpc("getblockheader", node.rpc("getbestblockhash"))["time"] for node in network.nodes] == [time] * 2
    network.nodes[1].stop()
    tip = network.nodes[0].rpc("getbestblockhash")
    network.nodes[0].rpc("invalidateblock", tip)
    with pytest.raises(NodeError, match="node1 has a block of 2030-03-17 17:46:40 UTC: with a clock more than an hour"):
        network.set_time(time - 3601)  # known although the node is stopped
    assert network.time == time
    network.nodes[0].rpc("reconsiderblock", tip)
    with pytest.raises(NodeError, match="node0 has a block of 2030-03-17"):
        network.set_time(None)
    with pytest.raises(NodeError, match="a block's time ends at 2106-02-07 06:28:15 UTC"):
        network.set_time(2**32)
    network.set_time(time - 3600)
    mine(network, 0, 1)
    network.nodes[1].start()


def test_clocks_run_again(bitcoin_network: NetworkFactory) -> None:
    network = bitcoin_network(1)
    network.set_time(1_900_000_000)
    network.set_time(None)
    mine(network, 0, 1)
    assert network.nodes[0].rpc("getblockchaininfo")["time"] < 1_900_000_000
    assert "mocktime" not in network.nodes[0].options


@pytest.mark.parametrize(
    ("text", "links"),
    [("0 1\n\n2 1  # back\n0 1\n", [(0, 1), (1, 2)]), ("", [])],
)
def test_topology_file(text: str, links: list[tuple[int, int]], tmp_path: Path) -> None:
    (tmp_path / "links").write_text(text)
    assert read_topology(str(tmp_path / "links"), 3) == links


@pytest.mark.parametrize("line", ["0", "0 0", "0 3", "a b", "0 1 2", "-1 0"])
def test_line_of_a_topology_file_that_makes_no_sense_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "links").write_text(f"0 1\n{line}\n")
    with pytest.raises(NodeError, match=rf"links, line 2: '{line}' must be two different node numbers, from 0 to 2"):
        read_topology(str(tmp_path / "links"), 3)


def test_topologies() -> None:
    assert read_topology("line", 3) == [(0, 1), (1, 2)]
    assert read_topology("ring", 3) == [(0, 1), (0, 2), (1, 2)]
    assert read_topology("ring", 2) == read_topology("full", 2) == [(0, 1)]
    with pytest.raises(NodeError, match="topology star is not full, line or ring, and not a readable file"):
        read_topology("star", 3)


@pytest.mark.parametrize("late", [0.0, 0.1], ids=["at once", "a moment later"])
def test_ctrl_c_while_nodes_start_leaves_none(
    node_programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: float
) -> None:
    """Also none that its thread launches a moment later, and that would be kept."""
    network = Network(node_programs / "bitcoind", tmp_path, 1, keep=True)
    (node,) = network.nodes
    launch = node._launch
    starter = threading.main_thread()

    def launch_late() -> None:
        nonlocal starter
        starter = threading.current_thread()
        time.sleep(late)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # for the main thread to act on it: whether it waits for us is what is tested
        launch()

    monkeypatch.setattr(node, "_launch", launch_late)
    try:
        with pytest.raises(KeyboardInterrupt):
            network.start()
        wait_for(lambda: starter not in threading.enumerate(), 30, "the thread that starts the node to end")
        assert node.pid is None
    finally:
        node.kill()


def test_nodes_started_with_bitcoind_alone_find_each_other_and_can_be_cut_off(
    bitcoin_network: NetworkFactory,
) -> None:
    network = bitcoin_network(3)
    now = int(time.time()) + 3600
    network.set_time(now)
    ports = [(node.rpc_port, node.p2p_port) for node in network.nodes]
    network.partition([[2]])
    network.stop()

    def start_alone() -> None:
        for node in reversed(network.nodes):
            subprocess.run([node.bitcoind, f"-datadir={node.datadir}", "-daemonwait"], check=True, capture_output=True)
            assert node.attach()

    start_alone()
    assert [(node.rpc_port, node.p2p_port) for node in network.nodes] == ports
    wait_for(lambda: network.peers(0) == ["node1"], 30, "the nodes to find each other", lambda: network.peers(0))
    assert network.peers(2) == []
    mine(network, 0, 1)
    tip = network.nodes[0].rpc("getbestblockhash")
    assert now <= network.nodes[0].rpc("getblockheader", tip)["time"] <= now + 1  # the clock stands there, too
    network.partition([[0]])
    assert all(node.rpc("getaddednodeinfo") == [] for node in network.nodes[:2])  # it would connect again
    assert [network.peers(number) for number in range(3)] == [[], ["node2"], ["node1"]]
    network.delays = {(1, 2): 0.01}
    network.heal()
    network.stop()
    start_alone()
    wait_for(lambda: network.peers(0) == ["node1", "node2"], 30, "the nodes to find each other")
    assert network.peers(1) == ["node0"]  # the slow link is left to us


def test_users_own_addnode_stays(node_programs: Path, tmp_path: Path) -> None:
    other = "127.0.0.1:1"
    with Network(node_programs / "bitcoind", tmp_path, 2, {"addnode": other}) as network:
        network.partition([[0]])
        network.heal()
        for node in network.nodes:
            assert [peer["addednode"] for peer in node.rpc("getaddednodeinfo")] == [other]
            lines = (node.datadir / "bitcoin.conf").read_text().splitlines()
            assert next(line for line in lines if line.startswith("addnode")) == f"addnode={other}"
            assert len([line for line in lines if line.startswith("addnode")]) == 2
