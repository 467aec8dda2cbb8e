"""Tests the watcher on a training network, where blocks need certificates."""

import pytest

from payments import Rpc, Watcher
from traincert.bridge.testing.network import TrainingNetwork
from traincert.bridge.testing.plugin import TrainingNetworkFactory


@pytest.fixture
def training(training_network: TrainingNetworkFactory) -> TrainingNetwork:
    """A network whose first node has coins, from blocks below the start height."""
    training = training_network(nodes=2, start_height=102)
    payer = training.nodes[0]
    payer.rpc("createwallet", "payer")
    payer.rpc("generatetoaddress", 101, payer.rpc("getnewaddress"))
    training.network.wait_until_same_tip()
    return training


def test_blocks_with_certificates_confirm_and_others_do_not(training: TrainingNetwork) -> None:
    payer, other = training.nodes
    watcher = Watcher(Rpc(other.rpc_url, other.cookie_file), payer.rpc("getnewaddress"), start=102)
    txid = payer.rpc("sendtoaddress", watcher.address, 3)
    for reason in ("missing", "coordinator-sig", "model"):
        training.append_invalid(reason)
    training.append(table=training.table(5, 1))
    training.append_invalid("draw")
    training.append()
    training.network.wait_until_same_tip()
    assert watcher.poll() == []
    assert {payment.txid: count for payment, count in watcher.confirmations.items()} == {txid: 2}
