"""The coordinator whose cycles train nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from traincert.bridge.appointing import AppointingCoordinator
from traincert.bridge.chain import read_chain, read_params
from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.lottery import ContributionTable, Leaf
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.errors import BridgeError, JournalError, KeyFileError
from traincert.bridge.keys import create_network_keys, load_network_keys, xonly_key
from traincert.bridge.producer import Producer
from traincert.bridge.rpc import NodeClient
from traincert.bridge.signer import Signer
from traincert.regtest import Node
from traincert.regtest.plugin import NetworkFactory
from training_chain import PAYOUT_SCRIPT

MODEL = bytes([7] * 32)

# Another process, which knows the key files and the node's data directory, and nothing else.
ANOTHER_PROCESS = """
import sys
from pathlib import Path
from traincert.bridge.rpc import NodeClient
sys.path[:0] = [{tests!r}, {here!r}]
from test_appointing import coordinator_of
with NodeClient.from_datadir(Path({datadir!r})) as client:
    print(coordinator_of(Path({folder!r})).append(client))
"""


def coordinator_of(folder: Path, journal: str = "journal.sqlite") -> AppointingCoordinator:
    """The coordinator of the network whose keys are in a folder, its journal beside them."""
    keys = load_network_keys(folder)
    beacon = Beacon(keys.beacon)
    in_force = TrainingKeys(2, tuple(map(xonly_key, keys.coordinators)))
    params = TrainingParams({3: in_force}, beacon.anchor, MODEL)
    signer = Signer(folder / journal, params.chain_id, {i: keys.coordinators[i] for i in (1, 2)})
    producers = [Producer(secret, PAYOUT_SCRIPT, f"miner{i}") for i, secret in enumerate(keys.miners)]
    return AppointingCoordinator(params, signer.sign, signer.next_round, beacon, producers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_network_keys(tmp_path / "keys", coordinators=3, miners=12)
    return tmp_path / "keys"


@pytest.fixture
def node(folder: Path, bitcoin_network: NetworkFactory) -> Node:
    """A node that is one block below the start height."""
    node = bitcoin_network(1, coordinator_of(folder).params.node_options()).nodes[0]
    node.rpc("generatetoaddress", 2, "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202")
    return node


@pytest.fixture
def client(node: Node) -> Iterator[NodeClient]:
    with NodeClient.from_datadir(node.datadir) as client:
        yield client


@pytest.fixture
def coordinator(folder: Path) -> AppointingCoordinator:
    return coordinator_of(folder)


def table_of(coordinator: AppointingCoordinator, *numbers: int) -> ContributionTable:
    """A table of these miners, all of one weight."""
    keys = (coordinator.producers[number].miner_key for number in numbers)
    return ContributionTable(Leaf(key, bytes(32), params=9, loss_reduction=4, weight=6) for key in keys)


def test_its_certificates_say_that_nothing_was_trained(client: NodeClient, coordinator: AppointingCoordinator) -> None:
    hashes = [coordinator.append(client) for _ in range(3)]
    params = read_params(client)
    blocks = read_chain(client, params)
    assert [block.hash for block in blocks] == hashes
    assert params == coordinator.params
    for block in blocks:
        certificate = block.certificate
        assert certificate.award == "appointed"
        assert certificate.model_before == certificate.model_after == MODEL
        assert certificate.dataset_root == certificate.record == certificate.contributions_root == bytes(32)
        assert certificate.contributions_weight == certificate.contributions_count == certificate.params_trained == 0
        assert certificate.loss_before == certificate.loss_after == 0
    assert len({block.certificate.winner_key for block in blocks}) == 3  # one after the other


def test_another_process_goes_on(folder: Path, node: Node, client: NodeClient) -> None:
    here = Path(__file__).parent
    first = coordinator_of(folder).append(client)
    code = ANOTHER_PROCESS.format(tests=str(here.parent), here=str(here), folder=str(folder), datadir=str(node.datadir))
    second = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    third = coordinator_of(folder).append(client)
    assert [node.rpc("getblockhash", height) for height in (3, 4, 5)] == [first, second, third]
    assert len(read_chain(client, read_params(client))) == 3


def test_the_miner_who_is_to_win_wins(client: NodeClient, coordinator: AppointingCoordinator) -> None:
    for miner in (11, coordinator.producers[5].miner_key):
        coordinator.append(client, miner=miner)
    winners = [block.certificate.winner_key for block in read_chain(client, coordinator.params)]
    assert winners == [coordinator.producers[number].miner_key for number in (11, 5)]
    with pytest.raises(BridgeError, match="there is no miner 12: there are 12, from 0 on"):
        coordinator.append(client, miner=12)


def test_explorers_find_the_miners_name_in_the_coinbase(client: NodeClient, coordinator: AppointingCoordinator) -> None:
    for number in (11, 0):
        block = client.call("getblock", coordinator.append(client, miner=number), 2)
        assert f"/traincert/miner{number}/".encode() in bytes.fromhex(block["tx"][0]["vin"][0]["coinbase"])


def test_a_table_draws_the_next_winner(client: NodeClient, coordinator: AppointingCoordinator) -> None:
    for _ in range(2):  # one whose table is empty comes between
        coordinator.append(client, miner=3, table=table_of(coordinator, 0, 8))
        with pytest.raises(BridgeError, match=r"miner [08] was drawn, not miner 3"):
            coordinator.append(client, miner=3)
        coordinator.append(client)
    certificates = [block.certificate for block in read_chain(client, coordinator.params)]
    assert [certificate.award for certificate in certificates] == ["appointed", "drawn", "appointed", "drawn"]
    assert [certificate.params_trained for certificate in certificates] == [18, 0, 18, 0]
    drawn = {certificate.winner_key for certificate in certificates[1::2]}
    assert drawn <= {coordinator.producers[number].miner_key for number in (0, 8)}


def test_a_table_belongs_to_its_block(
    folder: Path, node: Node, client: NodeClient, coordinator: AppointingCoordinator
) -> None:
    """Also when the chain is reorganised to another block, and back."""
    drawn_from = coordinator.append(client, table=table_of(coordinator, 2))
    node.rpc("invalidateblock", drawn_from)
    rival = coordinator_of(folder, "another journal")
    rival.append(client, table=table_of(coordinator, 4))
    rival.append(client, miner=4)
    node.rpc("invalidateblock", node.rpc("getblockhash", 3))
    node.rpc("reconsiderblock", drawn_from)
    coordinator.append(client, miner=2)


def test_without_the_parents_table_nobody_can_be_drawn(
    folder: Path, client: NodeClient, coordinator: AppointingCoordinator
) -> None:
    block = coordinator.append(client, table=table_of(coordinator, 1))
    with pytest.raises(BridgeError, match=f"block 4 is drawn from the table of block {block}, which only the coord"):
        coordinator_of(folder).append(client)


def test_with_a_journal_it_never_signs_two_certificates_for_a_slot_and_round(
    folder: Path, node: Node, client: NodeClient, coordinator: AppointingCoordinator
) -> None:
    block = coordinator.append(client, miner=0)
    node.rpc("invalidateblock", block)
    with pytest.raises(JournalError, match="block 3, round 0"):
        coordinator_of(folder).append(client, miner=1, round_=0)
    node.rpc("reconsiderblock", block)
    assert node.rpc("getbestblockhash") == block


def test_who_mines_again_after_a_reorganisation_is_no_equivocator(
    folder: Path, node: Node, client: NodeClient, coordinator: AppointingCoordinator
) -> None:
    first = coordinator.append(client)
    for round_ in range(1, 5):
        node.rpc("invalidateblock", node.rpc("getbestblockhash"))
        again = coordinator_of(folder).append(client)
        assert node.rpc("getbestblockhash") == again != first
        assert node.rpc("gettrainingcertificate")["round"] == round_
    assert node.rpc("gettrainingequivocations") == []
    coordinator.append(client)
    assert node.rpc("gettrainingcertificate")["round"] == 0


def test_a_block_that_is_not_the_tip_is_no_success(node: Node, coordinator: AppointingCoordinator) -> None:
    class Elsewhere(NodeClient):
        """A node that goes to another block at once."""

        def call(self, method: str, *params: object) -> object:
            answer = super().call(method, *params)
            if method == "submitblock":
                node.rpc("invalidateblock", node.rpc("getbestblockhash"))
            return answer

    with Elsewhere.from_datadir(node.datadir) as client, pytest.raises(BridgeError, match="but it is not its tip"):
        coordinator.append(client)


def test_a_redraw_is_another_winners_turn(node: Node, client: NodeClient, coordinator: AppointingCoordinator) -> None:
    parent_time = node.rpc("getblockheader", coordinator.append(client))["time"]
    node.rpc("setmocktime", parent_time + 119)
    with pytest.raises(BridgeError, match="bad-traincert-round"):
        coordinator.append(client, round_=2)
    node.rpc("setmocktime", parent_time + 120)
    coordinator.append(client, round_=2)
    assert node.rpc("gettrainingcertificate")["round"] == 2


def test_below_the_start_height_and_on_another_network_it_appends_nothing(
    bitcoind: Node, coordinator: AppointingCoordinator
) -> None:
    with (
        NodeClient.from_datadir(bitcoind.datadir) as client,
        pytest.raises(BridgeError, match="node0 wants no certificate for block 1"),
    ):
        coordinator.append(client)


def test_a_networks_keys_read_back(tmp_path: Path) -> None:
    keys = create_network_keys(tmp_path, coordinators=1, miners=11)
    assert load_network_keys(tmp_path) == keys
    assert len({*keys.coordinators, keys.beacon, *keys.miners}) == 13
    with pytest.raises(KeyFileError, match=r"coordinator0\.key is there already"):
        create_network_keys(tmp_path, coordinators=1, miners=1)
    (tmp_path / "beacon.key").unlink()
    with pytest.raises(KeyFileError, match=r"beacon\.key: No such file"):
        load_network_keys(tmp_path)
