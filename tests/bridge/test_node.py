"""The bridge's way to a node, and a producer's errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from training_chain import MINERS, PAYOUT_SCRIPT, TrainingChain

from traincert.bridge import node as node_module
from traincert.bridge.errors import BridgeError, NodeCallError, NodeUnreachableError
from traincert.bridge.node import NodeClient
from traincert.bridge.producer import Producer
from traincert.regtest import Node


@pytest.fixture
def chain() -> TrainingChain:
    return TrainingChain()


@pytest.fixture
def node(node_programs: Path, tmp_path: Path, chain: TrainingChain) -> Iterator[Node]:
    with Node(node_programs / "bitcoind", tmp_path / "node0", chain.params.node_options()) as node:
        yield node


@pytest.fixture
def client(node: Node) -> Iterator[NodeClient]:
    with NodeClient.from_datadir(node.datadir) as client:
        yield client


def test_a_nodes_error_keeps_its_code_and_names_the_node(client: NodeClient) -> None:
    with pytest.raises(
        NodeCallError, match=r"node0: getblockhash: Block height out of range \(RPC error -8\)"
    ) as caught:
        client.call("getblockhash", 1)
    assert caught.value.code == -8


def test_a_client_finds_the_node_again_after_a_restart(node: Node, client: NodeClient) -> None:
    assert client.call("getblockcount") == 0
    node.restart()  # with a new cookie
    assert client.call("getblockcount") == 0


def test_a_node_that_is_stopped_is_unreachable(node: Node, client: NodeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "RETRY_TIME", 0.2)
    assert client.call("getblockcount") == 0
    node.stop()
    with pytest.raises(NodeUnreachableError, match="node0"):
        client.call("getblockcount")


def test_a_producer_appends_its_block(client: NodeClient, chain: TrainingChain) -> None:
    template = client.call("getblocktemplate", {"rules": ["segwit"]})
    certificate = chain.next_certificate(template)
    winner = Producer(MINERS[certificate.winner_key].secret, client, PAYOUT_SCRIPT)
    block_hash = winner.produce(certificate, chain.params.chain_id)
    assert client.call("getbestblockhash") == block_hash


def test_a_producer_tells_why_its_node_refused_the_block(client: NodeClient, chain: TrainingChain) -> None:
    template = client.call("getblocktemplate", {"rules": ["segwit"]})
    certificate = replace(chain.next_certificate(template), loss_after=0)  # not what the coordinator signed
    winner = Producer(MINERS[certificate.winner_key].secret, client, PAYOUT_SCRIPT)
    with pytest.raises(BridgeError, match=r"node0 refused block 1 .*: bad-traincert-coordinator-sig"):
        winner.produce(certificate, chain.params.chain_id)
    assert client.call("getblockcount") == 0


def test_a_producer_does_not_use_anothers_certificate(client: NodeClient, chain: TrainingChain) -> None:
    certificate = chain.next_certificate(client.call("getblocktemplate", {"rules": ["segwit"]}))
    other = next(secret for key, secret in MINERS.items() if key != certificate.winner_key)
    with pytest.raises(BridgeError, match="for another miner"):
        Producer(other.secret, client, PAYOUT_SCRIPT).produce(certificate, chain.params.chain_id)


def test_a_certificate_for_an_old_slot_makes_no_block(client: NodeClient, chain: TrainingChain) -> None:
    old = chain.next_certificate(client.call("getblocktemplate", {"rules": ["segwit"]}))
    winner = Producer(MINERS[old.winner_key].secret, client, PAYOUT_SCRIPT)
    winner.produce(old, chain.params.chain_id)
    with pytest.raises(BridgeError, match="the node's next block is 2"):
        winner.produce(replace(old, prev_block=bytes.fromhex(client.call("getbestblockhash"))[::-1]), bytes(32))
