"""An unpatched Bitcoin Core follows a training chain, as long as its blocks also meet regtest's trivial target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from bitcoin.core import CBlock

from compat.made_chain import LENGTH, append, first_without_work
from traincert.regtest import Node, RpcError, wait_for
from traincert.regtest.plugin import NetworkFactory
from training_chain import TrainingChain, submit


@pytest.fixture
def stock_node(stock_programs: Path, tmp_path: Path) -> Iterator[Node]:
    with Node(stock_programs / "bitcoind", tmp_path / "stock") as node:
        yield node


def test_a_stock_node_syncs_and_reorganises_with_the_rest(
    certificate_chain: tuple[TrainingChain, list[CBlock]], bitcoin_network: NetworkFactory, stock_node: Node
) -> None:
    chain, blocks = certificate_chain
    network = bitcoin_network(2, chain.params.node_options())
    first, second = network.nodes
    for block in blocks:
        assert submit(first, block) is None
    stock_node.stop()
    network.add(stock_node)
    stock_node.start()
    network.connect()
    assert network.wait_until_same_tip() == blocks[-1].GetHash()[::-1].hex()
    assert stock_node.rpc("getblockcount") == LENGTH

    # The second node hears nothing of the winner's block and of the next, redraws the slot, and gets ahead.
    second.rpc("setnetworkactive", False)
    branch = replace(chain)
    append(branch, first)
    shorter = append(branch, first).GetHash()[::-1].hex()
    wait_for(lambda: stock_node.rpc("getbestblockhash") == shorter, 60, "the stock node to follow the shorter branch")
    branch = replace(chain)
    append(branch, second, round_=1)
    append(branch, second)
    longer = append(branch, second).GetHash()[::-1].hex()
    second.rpc("setnetworkactive", True)
    network.connect()
    assert network.wait_until_same_tip() == longer
    tips = {tip["hash"]: (tip["status"], tip["branchlen"]) for tip in stock_node.rpc("getchaintips")}
    assert tips == {longer: ("active", 0), shorter: ("valid-fork", 2)}
    assert stock_node.rpc("verifychain", 4, 0)


def test_a_stock_node_refuses_a_chain_without_work(
    chain_without_work: tuple[TrainingChain, list[CBlock]], bitcoin_network: NetworkFactory, stock_node: Node
) -> None:
    chain, blocks = chain_without_work
    network = bitcoin_network(2, chain.params.node_options())
    for block in blocks:
        assert submit(network.nodes[0], block) is None
    assert network.wait_until_same_tip() == blocks[-1].GetHash()[::-1].hex()

    # As a peer it hangs up on whoever offers such headers ...
    def heard_and_hung_up() -> bool:
        return stock_node.rpc("getnettotals")["totalbytesrecv"] > 0 and not stock_node.rpc("getpeerinfo")

    network.nodes[0].rpc("addnode", stock_node.p2p_address, "onetry")
    wait_for(heard_and_hung_up, 60, "the stock node to hang up", stock_node.log_tail)
    assert stock_node.rpc("getblockcount") == 0
    # ... and it says why when it is handed them: the blocks before, which happen to have work, are fine.
    bad = first_without_work(blocks)
    for block in blocks[:bad]:
        assert submit(stock_node, block) is None
    with pytest.raises(RpcError, match="high-hash"):
        stock_node.rpc("submitheader", blocks[bad].get_header().serialize().hex())
    assert submit(stock_node, blocks[bad]) == "high-hash"
    assert stock_node.rpc("getblockcount") == bad
