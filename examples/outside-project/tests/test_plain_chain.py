"""Tests the watcher on a node with coins to spend."""

import pytest

from payments import Rpc, Watcher
from traincert.regtest import Node


@pytest.fixture
def watcher(chain_snapshot: Node) -> Watcher:
    return Watcher(Rpc(chain_snapshot.rpc_url, chain_snapshot.cookie_file), chain_snapshot.rpc("getnewaddress"))


def pay(node: Node, watcher: Watcher, bitcoins: str) -> object:
    return node.rpc("sendtoaddress", watcher.address, bitcoins)


def mine(node: Node, blocks: int) -> None:
    node.rpc("generatetoaddress", blocks, node.rpc("getnewaddress"))


def test_a_payment_is_confirmed_by_each_block(chain_snapshot: Node, watcher: Watcher) -> None:
    txid = pay(chain_snapshot, watcher, "0.12345678")
    watcher.poll()
    assert watcher.confirmations == {}
    for blocks in (1, 2, 3):
        mine(chain_snapshot, 1)
        assert watcher.poll() == []
        ((payment, confirmations),) = watcher.confirmations.items()
        assert (payment.txid, payment.satoshis, confirmations) == (txid, 12_345_678, blocks)


def test_a_payment_of_a_block_that_lost_is_gone(chain_snapshot: Node, watcher: Watcher) -> None:
    txid = pay(chain_snapshot, watcher, "7")
    mine(chain_snapshot, 2)
    watcher.poll()
    lost = chain_snapshot.rpc("getblockhash", 251)
    chain_snapshot.rpc("invalidateblock", lost)
    chain_snapshot.rpc("generateblock", chain_snapshot.rpc("getnewaddress"), [])
    assert [payment.txid for payment in watcher.poll()] == [txid]
    assert watcher.confirmations == {}

    mine(chain_snapshot, 1)  # invalidateblock had put the payment back into the mempool
    assert watcher.poll() == []
    assert [payment.height for payment in watcher.confirmations] == [252]
