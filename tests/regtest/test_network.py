"""Several real nodes that hear each other."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

import pytest

from traincert.regtest.errors import NodeError, WaitTimeoutError
from traincert.regtest.network import Network
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
    ends = {peer["addrbind"] for peer in network.nodes[2].rpc("getpeerinfo")}
    for node in network.nodes[:2]:  # not left to chance, as their synchronisation without this order is
        assert min(node.rpc("getpeerinfo"), key=itemgetter("id"))["addr"] in ends
    assert network.wait_until_same_tip() == tip


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
