"""A chain is checked in full, whoever gives it: real nodes, their block files, and sources that lie."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from bitcoin.core import CBlock, CBlockHeader
from bitcoin.core.serialize import uint256_from_str

from traincert.bridge import verifier as verifier_module
from traincert.bridge.block_files import BlockFiles
from traincert.bridge.chain import GENESIS, read_chain
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.errors import BridgeError
from traincert.bridge.rpc import NodeClient
from traincert.bridge.testing.invalid import WRONG, WRONG_WITH_PARENT
from traincert.bridge.verified import VerifiedBlocks
from traincert.bridge.verifier import ChainError, NodeBlocks, Source, Verifier, conf_params, node_params
from traincert.regtest import Node
from traincert.regtest.plugin import NetworkFactory
from training_chain import TrainingChain, submit, template

TRAINCERT = Path(sys.executable).with_name("traincert")
ADDRESS = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202"
START = 4
LENGTH = 30
ALL_WRONG = WRONG | WRONG_WITH_PARENT
CASES = [(reason, comment) for reason, ways in ALL_WRONG.items() for comment in ways]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def hash_of(block: CBlock | CBlockHeader) -> str:
    return bytes(block.GetHash())[::-1].hex()


def append(chain: TrainingChain, node: Node, *, later: int = 0) -> CBlock:
    """Append a valid block. `later` makes it another one than that of the same parent before."""
    slot = template(node)
    certificate = chain.next_certificate(slot | {"curtime": slot["curtime"] + later})
    block = chain.block(slot | {"curtime": slot["curtime"] + later}, certificate)
    assert submit(node, block) is None
    chain.advance(certificate)
    return block


class Given:
    """A source that gives these blocks, and remembers which were asked for."""

    def __init__(self, blocks: Sequence[CBlock], tips: Sequence[CBlock] = ()) -> None:
        self._blocks = {hash_of(block): block for block in blocks}
        self._tips = [hash_of(block) for block in tips or blocks[-1:]]
        self.asked: list[str] = []
        self.bodies: dict[str, bytes] = {}

    def tips(self, last: int | None = None) -> list[str]:
        assert last is None
        return self._tips

    def headers(self, block_hash: str) -> Iterator[bytes]:
        while True:
            header = self._blocks[block_hash].get_header()
            yield header.serialize()
            block_hash = header.hashPrevBlock[::-1].hex()

    def blocks(self, hashes: Sequence[str]) -> Iterator[bytes]:
        for block_hash in hashes:
            self.asked.append(block_hash)
            yield self.bodies.get(block_hash) or self._blocks[block_hash].serialize()


@contextmanager
def opened(source: Source, params: TrainingParams) -> Iterator[Verifier]:
    said: list[str] = []
    with VerifiedBlocks(params.chain_id, said.append) as verified:
        yield Verifier(source, params, verified)
    assert said == []


@pytest.fixture(scope="module")
def made(bitcoin_network_module: NetworkFactory) -> tuple[TrainingChain, Node, list[CBlock]]:
    """A node, its blocks after the genesis block, and what is needed for the next one."""
    chain = TrainingChain(start_height=START)
    node = bitcoin_network_module(1, chain.params.node_options()).nodes[0]
    node.rpc("generatetoaddress", START - 1, ADDRESS)
    while node.rpc("getblockcount") < LENGTH:
        append(chain, node)
    hashes = [node.rpc("getblockhash", height) for height in range(1, LENGTH + 1)]
    return chain, node, [CBlock.deserialize(bytes.fromhex(node.rpc("getblock", each, 0))) for each in hashes]


Made = tuple[TrainingChain, Node, list[CBlock]]


def test_a_node_and_its_files_give_the_same_chain(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier_module, "_MOST_HEADERS", 5)
    monkeypatch.setattr(verifier_module, "_BLOCKS", 4)
    chain, node, blocks = made
    with NodeClient.from_datadir(node.datadir) as client:
        with opened(NodeBlocks(client), node_params(client, node.datadir)) as verifier:
            over_rpc = verifier.longest()
            assert verifier.read == LENGTH
        expected = read_chain(client, chain.params)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with opened(BlockFiles(node.chain_dir / "blocks"), chain.params) as verifier:
        from_files = verifier.longest()
        assert verifier.read == LENGTH
    assert over_rpc == from_files
    assert over_rpc.whole
    assert over_rpc.parent is None
    assert [block.hash for block in over_rpc.blocks] == [GENESIS, *map(hash_of, blocks)]
    assert [(each.hash, each.certificate, each.winner_signature) for each in over_rpc.certified] == [
        (each.hash, each.certificate, each.winner_signature) for each in expected
    ]


def test_what_was_verified_is_not_read_again_from_any_source(made: Made) -> None:
    chain, node, blocks = made
    with opened(BlockFiles(node.chain_dir / "blocks"), chain.params) as verifier:
        first = verifier.longest()
    source = Given(blocks)
    with opened(source, chain.params) as verifier:
        assert verifier.longest() == first
        assert verifier.read == 0
        assert source.asked == []
        assert verifier.block(hash_of(blocks[7])).height == 8
    with opened(source, replace(chain, round_seconds=61).params) as verifier:  # on another network nothing counts
        with pytest.raises(ChainError, match=r"^block 4 [0-9a-f]{64}: bad-traincert-coordinator-sig: "):
            verifier.longest()
        assert source.asked == [hash_of(blocks[START - 1])]


def test_heights_choose_the_blocks_and_what_is_read(made: Made) -> None:
    chain, _, blocks = made
    hashes = [GENESIS, *map(hash_of, blocks)]
    source = Given(blocks)
    with opened(source, chain.params) as verifier:
        found = verifier.chain(hashes[20], 15)
        assert [block.height for block in found.blocks] == list(range(15, 21))
        assert source.asked == hashes[14:21]  # the parent's certificate is needed
        assert not found.whole
        assert found.parent
        assert found.parent.hash == hashes[14]
        assert verifier.read == 6
    source.asked.clear()
    with opened(source, chain.params) as verifier:
        found = verifier.chain(hashes[20], 2)  # those below the start height have no certificate to miss
        assert found.whole
        assert source.asked == hashes[START:21]  # what is not verified down to the genesis block is not kept
    with opened(source, chain.params) as verifier:
        found = verifier.chain(hashes[20], 15)
        assert found.whole
        assert [block.height for block in found.blocks] == list(range(15, 21))
        assert verifier.chain(hashes[20], 21).blocks == []
        assert verifier.chain(GENESIS).blocks[0].hash == GENESIS


@pytest.mark.parametrize(("reason", "comment"), CASES, ids=[f"{reason}: {comment}" for reason, comment in CASES])
def test_each_rule_is_named_with_the_block_that_breaks_it(made: Made, reason: str, comment: str) -> None:
    chain, node, blocks = made
    slot = template(node)
    certificate = chain.next_certificate(slot)
    valid = chain.block(slot, certificate)
    wrong = ALL_WRONG[reason][comment](chain.forger(certificate.height), valid, certificate)
    with opened(Given([*blocks, wrong]), chain.params) as verifier:
        with pytest.raises(ChainError) as caught:
            verifier.longest()
        assert (caught.value.height, caught.value.hash, caught.value.reason) == (LENGTH + 1, hash_of(wrong), reason)
        assert str(caught.value).startswith(f"block {LENGTH + 1} {hash_of(wrong)}: {reason}: ")
        assert not caught.value.detail.startswith("bad-")
    with opened(Given([*blocks, valid]), chain.params) as verifier:  # the blocks below were kept
        assert verifier.longest().tip.height == LENGTH + 1
        assert verifier.read == 1


def test_below_the_start_height_headers_need_work(made: Made) -> None:
    chain, _, blocks = made
    header = blocks[1]
    nonce = 0
    while True:
        lazy = CBlock(4, header.hashPrevBlock, header.hashMerkleRoot, header.nTime, header.nBits, nonce, header.vtx)
        if uint256_from_str(lazy.GetHash()) >> 255:
            break
        nonce += 1
    with opened(Given([blocks[0], lazy]), chain.params) as verifier, pytest.raises(ChainError) as caught:
        verifier.longest()
    assert str(caught.value) == f"block 2 {hash_of(lazy)}: high-hash: the hash does not meet the target"


@pytest.mark.parametrize("height", [2, 20])
def test_the_difficulty_never_changes(made: Made, height: int) -> None:
    chain, _, blocks = made
    last = blocks[height - 1]
    easy = CBlock(4, last.hashPrevBlock, last.hashMerkleRoot, last.nTime, 0x207FFFFE, last.nNonce, last.vtx)
    with opened(Given([*blocks[: height - 1], easy]), chain.params) as verifier, pytest.raises(ChainError) as caught:
        verifier.longest()
    assert str(caught.value) == f"block {height} {hash_of(easy)}: bad-diffbits: nBits is 207ffffe, expected 207fffff"


def test_bodies_that_are_not_the_headers_are_named(made: Made) -> None:
    chain, _, blocks = made
    source, wrong = Given(blocks), hash_of(blocks[9])
    body = blocks[9].serialize()
    for lie, reason, detail in (
        (body[:-1], "unreadable", "these bytes are no block: "),
        (body + b"x", "unreadable", "these bytes are no block: "),
        (body[:80] + b"\0", "unreadable", "the block has no transactions"),
        (blocks[8].serialize(), "unreadable", f"block {hash_of(blocks[8])} came instead"),
        (body[:80] + blocks[8].serialize()[80:], "bad-txnmrklroot", "the transactions have the Merkle root "),
    ):
        source.bodies = {wrong: lie}
        with opened(source, chain.params) as verifier, pytest.raises(ChainError) as caught:
            verifier.longest()
        assert str(caught.value).startswith(f"block 10 {wrong}: {reason}: {detail}")


def test_a_header_of_another_block_is_refused(made: Made) -> None:
    chain, _, blocks = made
    source = Given(blocks)
    source._blocks[hash_of(blocks[9])] = blocks[8]
    with opened(source, chain.params) as verifier, pytest.raises(BridgeError, match="it came with another hash"):
        verifier.longest()


def test_of_the_longest_chains_one_must_be_valid(made: Made) -> None:
    chain, node, blocks = made
    slot = template(node)
    certificate = chain.next_certificate(slot)
    valid = chain.block(slot, certificate)
    wrong = [
        next(iter(ALL_WRONG[reason].values()))(chain.forger(certificate.height), valid, certificate)
        for reason in ("bad-traincert-winner-sig", "bad-traincert-beacon")
    ]
    with opened(Given([*blocks, *wrong, valid], [*wrong, valid]), chain.params) as verifier:
        assert verifier.longest().tip.hash == hash_of(valid)
    first = f"{hash_of(wrong[0])}: bad-traincert-winner-sig"
    with opened(Given([*blocks, *wrong], wrong), chain.params) as verifier, pytest.raises(ChainError, match=first):
        verifier.longest()


def test_after_a_reorganisation_only_the_other_blocks_are_read(bitcoin_network: NetworkFactory) -> None:
    chain = TrainingChain()
    node = bitcoin_network(1, chain.params.node_options()).nodes[0]
    for _ in range(6):
        append(chain, node)
    fork = replace(chain)
    stale = [append(chain, node) for _ in range(3)]
    with NodeClient.from_datadir(node.datadir) as client:
        with opened(NodeBlocks(client), chain.params) as verifier:
            verifier.longest()
            assert verifier.read == 9
        node.rpc("invalidateblock", hash_of(stale[0]))
        new = [append(fork, node, later=1) for _ in range(4)]
        with opened(NodeBlocks(client), chain.params) as verifier:
            assert verifier.longest().tip.hash == hash_of(new[-1])
            assert verifier.read == 4
        # A block of the stale branch is still verified, though the node's heights lead elsewhere.
        node.rpc("reconsiderblock", hash_of(stale[0]))
        with VerifiedBlocks(chain.params.chain_id, print, keep=False) as nothing:
            found = Verifier(NodeBlocks(client), chain.params, nothing).chain(hash_of(stale[2]))
        assert [block.hash for block in found.blocks[-3:]] == [hash_of(block) for block in stale]
    with opened(BlockFiles(node.chain_dir / "blocks"), chain.params) as verifier:
        assert verifier.longest().tip.hash == hash_of(new[-1])
        assert verifier.read == 0


@pytest.mark.parametrize("place", ["header", "body"])
def test_a_byte_changed_in_a_block_file_is_found_at_its_block(made: Made, tmp_path: Path, place: str) -> None:
    chain, node, blocks = made
    folder = tmp_path / "blocks"
    shutil.copytree(node.chain_dir / "blocks", folder, ignore=shutil.ignore_patterns("index"))
    path, offset, _ = BlockFiles(folder)._places[hash_of(blocks[16])]
    data = bytearray(path.read_bytes())
    data[offset + (70 if place == "header" else 300)] ^= 1
    path.write_bytes(data)
    files = BlockFiles(folder)
    with opened(files, chain.params) as verifier, pytest.raises(ChainError) as caught:
        verifier.longest()
    assert caught.value.height == 17
    if place == "header":  # it has another hash now, and what follows is loose
        assert caught.value.reason == "bad-traincert-winner-sig"
        assert files.loose == [hash_of(blocks[17])]
    else:
        assert caught.value.hash == hash_of(blocks[16])
        assert caught.value.reason in ("bad-txnmrklroot", "unreadable")


PRUNED = 420  # blocks: Bitcoin Core keeps the last 288


def test_of_a_pruned_node_is_verified_what_it_has(bitcoin_network: NetworkFactory) -> None:
    chain = TrainingChain(start_height=2)
    node = bitcoin_network(1, chain.params.node_options() | {"prune": "1", "fastprune": "1"}).nodes[0]
    node.rpc("generatetoaddress", 1, ADDRESS)
    while node.rpc("getblockcount") < 100:
        append(chain, node)
    folder = node.chain_dir / "blocks"
    with opened(BlockFiles(folder), chain.params) as verifier:
        assert verifier.longest().tip.height == 100
    while node.rpc("getblockcount") < PRUNED:
        append(chain, node)
    first = node.rpc("pruneblockchain", 100) + 1
    assert 2 < first <= 101
    with NodeClient.from_datadir(node.datadir) as client:
        assert node_params(client, node.datadir) == chain.params
        with VerifiedBlocks(chain.params.chain_id, print, keep=False) as nothing:
            verifier = Verifier(NodeBlocks(client), chain.params, nothing)
            with pytest.raises(ChainError, match=r"^block 2 [0-9a-f]{64}: unreadable: .*pruned data") as caught:
                verifier.longest()
            assert caught.value.hash == node.rpc("getblockhash", 2)
            found = verifier.longest(first + 1)
            assert (found.tip.height, found.whole) == (PRUNED, False)
        for words in (["block", "3"], ["block", "3", "--json"], ["verify", "--anew"]):
            command = [str(TRAINCERT), *words, "--datadir", str(node.datadir)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 1
            assert "pruned data" in done.stderr
            assert len(done.stderr.splitlines()) == 1
        files = BlockFiles(folder)
        assert files.tips() == [GENESIS]
        assert len(files.loose) == 1
        with VerifiedBlocks(chain.params.chain_id, print) as verified:  # the first 100 are known
            files = BlockFiles(folder, verified.height)
            assert files.loose == []
            verifier = Verifier(files, chain.params, verified)
            assert (verifier.longest().whole, verifier.read) == (True, PRUNED - 100)
        (node.datadir / "bitcoin.conf").write_text(chain.params.conf().replace(":2:", ":1:"))
        with pytest.raises(BridgeError, match=r"node0 is on network [0-9a-f]{64}, but its bitcoin.conf is of "):
            node_params(client, node.datadir)


def test_parameters_are_read_from_a_conf(tmp_path: Path) -> None:
    params = TrainingChain(rotations={9: (1,)}, round_seconds=7).params
    conf, path = params.conf(), tmp_path / "training.conf"
    for text in (
        conf,
        f"server=1\n# a comment\n[main]\ntrainingkeys=5\n{conf}[test]\ntrainingmodel=8\n",
        conf.removeprefix("[regtest]\n"),
        conf.removeprefix("[regtest]\n").replace("training", "regtest.training"),
        conf.replace("=", " = ").replace("\n", " # so\n"),
    ):
        path.write_text(text)
        assert conf_params(path) == params
    path.write_text("\n".join(line for line in conf.splitlines() if "round" not in line))
    assert conf_params(path).round_seconds == 60


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("trainingkeys", "keys", "has no trainingkeys: it is of no training network"),
        ("trainingbeacon", "beacon", "has no trainingbeacon: one is needed"),
        ("trainingmodel=", "trainingmodel=00\ntrainingmodel=", "has 2 trainingmodel: one is needed"),
        ("trainingbeacon=", "trainingbeacon=00", "has a malformed -training... option: beacon: 32 bytes expected"),
        ("trainingkeys=1:", "trainingkeys=x:", "has a malformed -training... option: "),
        ("trainingkeys=1:2:", "trainingkeys=", "has a malformed -training... option: "),
        ("traininground=60", "traininground=-1", "has a malformed -training... option: round_seconds: "),
        ("[regtest]", "[main]", "has no trainingkeys: it is of no training network"),
    ],
)
def test_a_conf_without_the_parameters_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    path, conf = tmp_path / "training.conf", TrainingChain().params.conf()
    assert old in conf
    path.write_text(conf.replace(old, new))
    with pytest.raises(BridgeError) as caught:
        conf_params(path)
    assert str(caught.value).startswith(f"{path} {said}")


def test_any_bytes_are_no_conf(tmp_path: Path) -> None:
    (tmp_path / "conf").write_bytes(bytes(range(256)))
    with pytest.raises(BridgeError, match="has no trainingkeys"):
        conf_params(tmp_path / "conf")


def test_nodes_on_no_training_network_say_so(bitcoind: Node, stock_programs: Path, tmp_path: Path) -> None:
    with Node(stock_programs / "bitcoind", tmp_path / "stock") as stock:
        for node, said in (
            (bitcoind, "node0 is on no training network: it was started without -trainingkeys"),
            (stock, "stock is not the patched bitcoind: it is on no training network"),
        ):
            with NodeClient.from_datadir(node.datadir) as client, pytest.raises(BridgeError, match=said):
                node_params(client, node.datadir)
