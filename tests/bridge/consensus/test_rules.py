"""The patched node takes a valid training chain, and refuses each wrong block for its reason."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bitcoin.core import CBlock, CMutableTransaction, COutPoint, CTxIn, CTxInWitness, CTxOut, CTxWitness, b2lx, lx
from bitcoin.core.script import CScriptWitness
from bitcoin.core.serialize import uint256_from_compact, uint256_from_str

from traincert.bridge.chain import certificate_json, read_chain, read_params
from traincert.bridge.consensus.certificate import Certificate, draw_of
from traincert.bridge.consensus.lottery import ContributionTable
from traincert.bridge.rpc import NodeClient
from traincert.bridge.testing.invalid import WRONG, WRONG_WITH_PARENT
from traincert.regtest import Network, Node, NodeError, RpcError, wait_for
from traincert.regtest.plugin import NetworkFactory
from training_chain import (
    ANYONE_CAN_SPEND,
    PAYOUT_SCRIPT,
    TrainingChain,
    made_table,
    submit,
    template,
)

ADDRESS = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202"
RPC_DOC_CHECK: dict[str, str | list[str]] = {"rpcdoccheck": "1"}  # the node compares its answers with its help texts


def append(chain: TrainingChain, node: Node, table: ContributionTable | None = None) -> tuple[CBlock, Certificate]:
    """Append a valid block."""
    slot = template(node)
    certificate = chain.next_certificate(slot, table)
    block = chain.block(slot, certificate)
    assert submit(node, block) is None
    chain.advance(certificate, table)
    return block, certificate


@pytest.fixture
def training_network(bitcoin_network: NetworkFactory) -> Network:
    return bitcoin_network(3, TrainingChain().params.node_options() | RPC_DOC_CHECK)


def test_every_node_takes_a_valid_chain_and_tells_its_certificates(training_network: Network) -> None:
    chain = TrainingChain()
    for height in range(1, 13):
        append(chain, training_network.nodes[height % 3])
        training_network.wait_until_same_tip()
    for node in training_network.nodes:
        with NodeClient.from_datadir(node.datadir) as client:
            params = read_params(client)
            blocks = read_chain(client, params)
        assert params == chain.params
        assert len(blocks) == 12
        assert {block.certificate.award for block in blocks[1:]} == {"drawn"}
        for block in blocks:
            assert node.rpc("gettrainingcertificate", block.hash) == certificate_json(block)
            assert node.rpc("gettrainingcertificate", block.certificate.height) == certificate_json(block)
        assert node.rpc("gettrainingcertificate") == certificate_json(blocks[-1])
        assert node.rpc("gettraininginfo") == {
            "chain_id": params.chain_id.hex(),
            "start_height": 1,
            "keys": [
                {
                    "height": 1,
                    "threshold": 2,
                    "keys": [key.hex() for key in params.keys[1].keys],
                    "in_force": True,
                }
            ],
            "beacon": params.beacon.hex(),
            "round_seconds": 60,
            "height": 12,
            "model": blocks[-1].certificate.model_after.hex(),
            "loss": blocks[-1].certificate.loss_after,
            "contributions_weight": blocks[-1].certificate.contributions_weight,
        }


@pytest.fixture(scope="module")
def at_block_two(node_programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TrainingChain, Node]]:
    """A node with two blocks, and what is needed for the third."""
    chain = TrainingChain()
    directory = tmp_path_factory.mktemp("rules") / "node0"
    with Node(node_programs / "bitcoind", directory, chain.params.node_options() | RPC_DOC_CHECK) as node:
        append(chain, node)
        append(chain, node)
        yield chain, node


ALL_WRONG = WRONG | WRONG_WITH_PARENT
CASES = [(reason, comment) for reason, ways in ALL_WRONG.items() for comment in ways]


@pytest.mark.parametrize(("reason", "comment"), CASES, ids=[f"{reason}: {comment}" for reason, comment in CASES])
def test_a_block_that_is_wrong_in_one_thing_is_refused_for_it(
    at_block_two: tuple[TrainingChain, Node], reason: str, comment: str
) -> None:
    chain, node = at_block_two
    slot = template(node)
    # A certificate of its own for each case: of one, a node keeps two blocks only.
    certificate = replace(chain.next_certificate(slot), loss_after=CASES.index((reason, comment)))
    certificate = chain.sign(certificate)
    valid = chain.block(slot, certificate)
    wrong = ALL_WRONG[reason][comment](chain.forger(certificate.height), valid, certificate)
    assert submit(node, wrong) == reason
    assert node.rpc("getbestblockhash") == slot["previousblockhash"]
    # Without the change the same block is taken, so the change was what was wrong; then back for the next case.
    assert submit(node, valid) is None
    node.rpc("invalidateblock", node.rpc("getbestblockhash"))
    assert node.rpc("getbestblockhash") == slot["previousblockhash"]


def test_the_cases_cover_just_the_reasons_that_the_node_has() -> None:
    source = Path(__file__).parents[3] / "bitcoind-patch/src/training/validation.cpp"
    reasons = {text.partition('"')[2].partition('"')[0] for text in source.read_text().split("Reject(state,")[1:]}
    assert {f"bad-traincert-{reason}" for reason in reasons} == set(ALL_WRONG)


def test_where_there_is_no_table_a_drawn_winner_is_refused(bitcoind_of: Callable[[TrainingChain], Node]) -> None:
    chain = TrainingChain()
    node = bitcoind_of(chain)
    for table in (ContributionTable([]), None):  # at the start height, and after an empty table
        slot = template(node)
        certificate = chain.next_certificate(slot, table)
        winner, draw = draw_of(made_table(slot["height"]), 0)
        drawn = chain.sign(replace(certificate, winner_key=winner, draw=draw))
        assert submit(node, chain.block(slot, drawn)) == "bad-traincert-award"
        append(chain, node, table)
    assert node.rpc("gettrainingcertificate")["award"] == "appointed"
    append(chain, node)
    assert node.rpc("gettrainingcertificate")["award"] == "drawn"


def test_a_redrawn_block_is_refused_a_second_too_early_and_taken_on_time(
    bitcoind_of: Callable[[TrainingChain], Node],
) -> None:
    chain = TrainingChain(round_seconds=100)
    node = bitcoind_of(chain)
    append(chain, node)
    for round_ in (1, 7):
        slot = template(node)
        parent_time = node.rpc("getblockheader", slot["previousblockhash"])["time"]
        certificate = chain.next_certificate(slot, round_=round_)
        early, on_time = (
            chain.block(slot | {"curtime": parent_time + 100 * round_ - wait}, certificate) for wait in (1, 0)
        )
        assert submit(node, early) == "bad-traincert-round"
        assert submit(node, on_time) is None
        assert node.rpc("gettrainingcertificate")["round"] == round_
        chain.advance(certificate)
    with NodeClient.from_datadir(node.datadir) as client:
        assert [block.certificate.round for block in read_chain(client, read_params(client))] == [0, 1, 7]


def test_the_keys_in_force_at_a_height_sign(bitcoind_of: Callable[[TrainingChain], Node]) -> None:
    chain = TrainingChain(rotations={3: (1,), 4: (2, 1)})
    node = bitcoind_of(chain)
    for height in range(1, 6):
        slot = template(node)
        certificate = chain.next_certificate(slot)
        in_force = max(start for start in (1, 3, 4) if start <= height)
        for other in {1, 3, 4} - {in_force}:
            block = chain.block(slot, chain.sign(certificate, keys_at=other))
            assert submit(node, block) == "bad-traincert-coordinator-sig", (height, other)
        keys = node.rpc("gettraininginfo")["keys"]
        assert [entry["height"] for entry in keys if entry["in_force"]] == [in_force]
        append(chain, node)
    with NodeClient.from_datadir(node.datadir) as client:
        assert read_params(client) == chain.params
        assert len(read_chain(client, chain.params)) == 5


def test_a_winner_that_signs_two_blocks_is_shown(bitcoind_of: Callable[[TrainingChain], Node]) -> None:
    chain = TrainingChain()
    node = bitcoind_of(chain)
    slot = template(node)
    certificate = chain.next_certificate(slot)
    blocks = [chain.block(slot | {"curtime": slot["curtime"] + later}, certificate) for later in range(3)]
    assert [submit(node, block) for block in blocks] == [None, "inconclusive", "inconclusive-not-stored"]
    (entry,) = node.rpc("gettrainingequivocations")
    hashes = [b2lx(block.GetHash()) for block in blocks[:2]]
    assert entry == {"height": 1, "round": 0, "winner_key": certificate.winner_key.hex(), "blocks": hashes}
    shown = subprocess.check_output(
        [Path(sys.executable).parent / "traincert", "chain", "--datadir", node.datadir], text=True
    )
    winner = certificate.winner_key.hex()[:16]
    assert shown.splitlines()[-1] == (
        f"equivocation: miner {winner} signed more than one block of height 1, round 0: {hashes[0]} and {hashes[1]}"
    )


@pytest.fixture
def bitcoind_of(bitcoin_network: NetworkFactory) -> Callable[[TrainingChain], Node]:
    """Starts a node on a chain's network."""
    return lambda chain: bitcoin_network(1, chain.params.node_options() | RPC_DOC_CHECK).nodes[0]


def test_a_template_tells_what_its_certificate_continues(bitcoind_of: Callable[[TrainingChain], Node]) -> None:
    chain = TrainingChain(start_height=2)
    node = bitcoind_of(chain)
    below = node.rpc("getblocktemplate", {"rules": ["segwit"]})
    assert "training" not in below
    assert "!training" not in below["rules"]
    node.rpc("generatetoaddress", 1, ADDRESS)
    with pytest.raises(RpcError, match=r'call with {"rules": \["segwit", "training"\]}') as caught:
        node.rpc("getblocktemplate", {"rules": ["segwit"]})
    assert caught.value.code == -8
    parent = {"contributions_root": "00" * 32, "contributions_weight": 0, "contributions_count": 0}
    parent["beacon_reveal"] = chain.params.beacon.hex()
    for height in (2, 3):
        slot = template(node)
        assert "!training" in slot["rules"]
        assert slot["training"] == {"chain_id": chain.params.chain_id.hex(), "height": height, **parent}
        append(chain, node)
        parent = {name: node.rpc("gettrainingcertificate")[name] for name in parent}


def test_a_block_is_taken_whose_hash_does_not_meet_the_target(at_block_two: tuple[TrainingChain, Node]) -> None:
    chain, node = at_block_two
    slot = template(node)
    target = uint256_from_compact(int(slot["bits"], 16))
    while True:
        block = chain.block(slot, chain.next_certificate(slot), compat_pow=False)
        if uint256_from_str(block.GetHash()) > target:
            break
        slot["curtime"] += 1
    assert submit(node, block) is None
    assert node.rpc("getblockcount") == 3
    node.restart()  # reads the header back from its index, and the block from disk
    assert node.rpc("getblockcount") == 3
    assert node.rpc("gettrainingcertificate")["height"] == 3
    assert node.rpc("verifychain", 4, 0)
    node.rpc("invalidateblock", node.rpc("getbestblockhash"))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("generatetoaddress", [1, ADDRESS]),
        ("generatetodescriptor", [1, f"addr({ADDRESS})"]),
        ("generateblock", [ADDRESS, []]),
        ("generateblock", [ADDRESS, [], False]),
    ],
)
def test_generate_says_that_a_certificate_is_needed(
    at_block_two: tuple[TrainingChain, Node], method: str, parameters: list[Any]
) -> None:
    _, node = at_block_two
    with pytest.raises(RpcError, match=r"Block 3 needs a training certificate \(from height 1 on\)"):
        node.rpc(method, *parameters)
    assert node.rpc("getblockcount") == 2


def test_wrong_questions_get_upstreams_error_codes(at_block_two: tuple[TrainingChain, Node]) -> None:
    _, node = at_block_two
    for parameter, code in [("00" * 32, -5), (3, -8), (-1, -8), (0, -8), ("no hash", -8)]:
        with pytest.raises(RpcError) as caught:
            node.rpc("gettrainingcertificate", parameter)
        assert caught.value.code == code, parameter
    assert "start at height 1" in cli_error(node, "gettrainingcertificate", "0")


def cli_error(node: Node, *arguments: str) -> str:
    command = [str(node.bitcoind.parent / "bitcoin-cli"), f"-datadir={node.datadir}", *arguments]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.returncode != 0
    return answer.stderr


def test_bitcoin_cli_reads_a_certificate_by_height_and_by_hash(at_block_two: tuple[TrainingChain, Node]) -> None:
    _, node = at_block_two
    cli = [str(node.bitcoind.parent / "bitcoin-cli"), f"-datadir={node.datadir}", "gettrainingcertificate"]
    by_height = json.loads(subprocess.check_output([*cli, "1"]))
    assert json.loads(subprocess.check_output([*cli, node.rpc("getblockhash", 1)])) == by_height
    assert by_height["award"] == "appointed"


def test_below_the_start_height_proof_of_work_rules(bitcoin_network: NetworkFactory) -> None:
    chain = TrainingChain(start_height=4)
    node, other = bitcoin_network(2, chain.params.node_options() | RPC_DOC_CHECK).nodes
    assert len(node.rpc("generatetoaddress", 2, ADDRESS)) == 2

    # A block with a certificate, but without work, is none here: not even its header.
    slot = template(node)
    target = uint256_from_compact(int(slot["bits"], 16))
    block = CBlock.deserialize(bytes.fromhex(node.rpc("generateblock", ADDRESS, [], False)["hex"]))
    while uint256_from_str(block.GetHash()) <= target:
        block = CBlock(block.nVersion, block.hashPrevBlock, nTime=block.nTime + 1, nBits=block.nBits, vtx=block.vtx)
    assert submit(node, block) == "high-hash"
    with pytest.raises(RpcError, match="high-hash"):
        node.rpc("submitheader", block.get_header().serialize().hex())
    with pytest.raises(RpcError, match="they start at height 4"):
        node.rpc("gettrainingcertificate", 2)
    info = node.rpc("gettraininginfo")
    assert info["model"] == chain.params.model.hex()
    assert "loss" not in info
    assert not info["keys"][0]["in_force"]

    # The last of them is mined, then the call says why it goes no further.
    with pytest.raises(RpcError, match=r"Block 4 needs a training certificate \(from height 4 on\)"):
        node.rpc("generatetoaddress", 5, ADDRESS)
    assert node.rpc("getblockcount") == 3
    append(chain, node)
    append(chain, node)
    wait_for(lambda: other.rpc("getblockcount") == 5, 30, "the other node to follow")
    with NodeClient.from_datadir(other.datadir) as client:
        assert [block.certificate.height for block in read_chain(client, read_params(client))] == [4, 5]


def test_a_block_carries_the_mempools_transactions(bitcoin_network: NetworkFactory) -> None:
    chain = TrainingChain()
    network = bitcoin_network(2, chain.params.node_options())
    node = network.nodes[0]
    first, _ = append(chain, node)
    for _ in range(100):  # until its coins are mature
        append(chain, node)
    value = first.vtx[0].vout[0].nValue
    spend = CMutableTransaction(
        [CTxIn(COutPoint(first.vtx[0].GetTxid(), 0))],
        [CTxOut(value - 10_000, PAYOUT_SCRIPT)],
        witness=CTxWitness([CTxInWitness(CScriptWitness([ANYONE_CAN_SPEND]))]),
    )
    txid = node.rpc("sendrawtransaction", spend.serialize().hex())
    block, _ = append(chain, node)
    assert [tx.GetTxid() for tx in block.vtx[1:]] == [lx(txid)]
    assert block.vtx[0].vout[0].nValue == value + 10_000
    network.wait_until_same_tip()


def test_without_options_the_node_is_on_no_training_network(bitcoind: Node) -> None:
    for method in ("gettraininginfo", "gettrainingcertificate"):
        with pytest.raises(RpcError, match="not a training network: the node was started without -trainingkeys"):
            bitcoind.rpc(method)
    assert len(bitcoind.rpc("generatetoaddress", 3, ADDRESS)) == 3


def test_a_wrong_option_stops_the_node_and_is_named(node_programs: Path, tmp_path: Path) -> None:
    options = TrainingChain().params.node_options() | {"traininground": "0"}
    node = Node(node_programs / "bitcoind", tmp_path / "node0", options)
    with pytest.raises(NodeError, match="-traininground must be a whole number of seconds from 1 to 86400, not '0'"):
        node.start()


def test_the_options_are_for_regtest_only(node_programs: Path, tmp_path: Path) -> None:
    command = [str(node_programs / "bitcoind"), f"-datadir={tmp_path}", "-signet", "-traininground=5"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.returncode != 0
    assert "-traininground=5 is for -chain=regtest only, not for -chain=signet." in answer.stderr
