"""The fixture `training_network`, as tests of other software use it."""

from __future__ import annotations

import pytest

from traincert.bridge.chain import read_chain
from traincert.bridge.errors import BridgeError
from traincert.bridge.rpc import NodeClient
from traincert.bridge.testing.invalid import WRONG, WRONG_WITH_PARENT
from traincert.bridge.testing.network import TrainingNetwork
from traincert.bridge.testing.plugin import TrainingNetworkFactory


def test_appended_blocks_are_valid_on_every_node(training_network: TrainingNetworkFactory) -> None:
    training = training_network(nodes=2)
    hashes = [
        training.append(miner=3, table=training.table(0, 5, 1)),
        training.append(),
        training.append(node=training.nodes[0], miner=training.miners[2].miner_key),
    ]
    assert training.network.wait_until_same_tip() == hashes[-1]
    training.append(node=training.nodes[1])
    training.network.wait_until_same_tip()
    for node in training.nodes:
        with NodeClient.from_datadir(node.datadir) as client:
            blocks = read_chain(client, training.params)
        assert [block.hash for block in blocks[:-1]] == hashes
        keys = [training.miners[number].miner_key for number in range(4)]
        winners = [keys.index(block.certificate.winner_key) for block in blocks]
        assert winners[::2] == [3, 2]
        assert winners[1] in (1, 2)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (0, 7)], ids=["a table of four", "a table of one"])
def test_every_rule_can_be_broken_and_then_a_valid_block_comes(
    training_network: TrainingNetworkFactory, weights: tuple[int, ...]
) -> None:
    training = training_network()
    training.append(table=training.table(*weights))
    tip = training.nodes[0].rpc("getbestblockhash")
    for reason in [*WRONG, *WRONG_WITH_PARENT] * 2:
        short = reason.removeprefix("bad-traincert-")
        assert training.append_invalid(short) == training.append_invalid(reason) == reason
    assert training.nodes[0].rpc("getbestblockhash") == tip
    training.append()
    assert training.nodes[0].rpc("getblockcount") == 2


def test_without_a_table_all_but_the_draw_can_be_wrong(training_network: TrainingNetworkFactory) -> None:
    training = training_network()
    for height in (1, 2):  # at the start height, and after an empty table
        for reason in [*WRONG, *WRONG_WITH_PARENT]:
            if reason in ("bad-traincert-draw", "bad-traincert-weight"):
                with pytest.raises(BridgeError, match=f"block {height} has no draw to be wrong in: append a table bef"):
                    training.append_invalid(reason)
            else:
                assert training.append_invalid(reason) == reason
        training.append()


@pytest.fixture
def training(training_network: TrainingNetworkFactory) -> TrainingNetwork:
    return training_network(start_height=2)


def test_wrong_uses_are_told(training: TrainingNetwork) -> None:
    with pytest.raises(BridgeError, match=r"^no block is refused for 'drew', but for: bad-traincert-missing, .*round$"):
        training.append_invalid("drew")
    with pytest.raises(BridgeError, match="node0 wants no certificate for block 1"):
        training.append_invalid("draw")
    with pytest.raises(BridgeError, match="5 weights for 4 miners"):
        training.table(1, 1, 1, 1, 1)


def test_below_the_start_height_coins_are_mined_that_blocks_with_certificates_confirm(
    training_network: TrainingNetworkFactory,
) -> None:
    training = training_network(start_height=102)
    (node,) = training.nodes
    node.rpc("createwallet", "payer")
    node.rpc("generatetoaddress", 101, node.rpc("getnewaddress"))
    txid = node.rpc("sendtoaddress", node.rpc("getnewaddress"), 1)
    training.append()
    assert node.rpc("gettransaction", txid)["blockheight"] == 102
    assert node.rpc("gettrainingcertificate", 102)["award"] == "appointed"


def test_a_modules_and_a_sessions_networks_go_on(
    training_network_module: TrainingNetworkFactory, training_network_session: TrainingNetworkFactory
) -> None:
    for factory in (training_network_module, training_network_session):
        assert factory().append_invalid("missing") == "bad-traincert-missing"
