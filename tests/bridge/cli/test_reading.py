"""`traincert block`, `chain`, `export-blocks`, `verify`, `watch` and `miner show`, as their users run them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from bitcoin.core import CBlock

from traincert.bridge.block_files import BlockFiles
from traincert.bridge.chain import GENESIS
from traincert.bridge.fields import FIELDS
from traincert.bridge.testing.invalid import WRONG_WITH_PARENT
from traincert.regtest import Network, Node, RpcError, wait_for
from traincert.regtest.plugin import NetworkFactory
from training_chain import MINERS, TrainingChain, made_table, submit, template

TRAINCERT = Path(sys.executable).with_name("traincert")
ADDRESS = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202"
START = 3
LENGTH = 12
Run = Callable[..., subprocess.CompletedProcess[str]]
Made = tuple[TrainingChain, Node]


def hash_of(block: CBlock) -> str:
    return bytes(block.GetHash())[::-1].hex()


def append(chain: TrainingChain, node: Node, *, later: int = 0, record: bytes | None = None) -> CBlock:
    """Append a valid block. `later` makes it another one than that of the same parent before."""
    slot = template(node)
    slot["curtime"] += later
    certificate = chain.next_certificate(slot)
    if record is not None:
        certificate = chain.sign(replace(certificate, record=hashlib.sha256(record).digest()))
    block = chain.block(slot, certificate)
    assert submit(node, block) is None
    chain.advance(certificate)
    return block


@pytest.fixture
def env(tmp_path: Path) -> Mapping[str, str]:
    """An environment with a cache folder of the test's own."""
    return os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.fixture
def run(tmp_path: Path, env: Mapping[str, str]) -> Run:
    def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(TRAINCERT), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def made(bitcoin_network_module: NetworkFactory) -> Made:
    """A node with a chain, and what is needed for the next block."""
    chain = TrainingChain(start_height=START)
    node = bitcoin_network_module(1, chain.params.node_options()).nodes[0]
    node.rpc("generatetoaddress", START - 1, ADDRESS)
    while node.rpc("getblockcount") < LENGTH:
        append(chain, node)
    return chain, node


def blocks_folder(node: Node) -> Path:
    return node.chain_dir / "blocks"


def header_of(node: Node, height: int) -> dict[str, Any]:
    """The answer of `bitcoin-cli getblockheader`."""
    answer = subprocess.check_output([*node.cli, "getblockheader", node.rpc("getblockhash", height)])
    header: dict[str, Any] = json.loads(answer)
    return header


# block


def test_block_shows_header_certificate_and_transactions(made: Made, run: Run) -> None:
    _, node = made
    shown = run("block", "5", "--datadir", node.datadir).stdout
    certificate = node.rpc("gettrainingcertificate", 5)
    for value in (
        certificate["blockhash"],
        certificate["winner_key"],
        node.rpc("getblock", certificate["blockhash"])["tx"][0],
    ):
        assert value in shown
    words = " ".join(shown.split())
    for name, meaning in FIELDS.items():
        assert f"\n {name} " in shown
        assert all(word in words for word in meaning.split())
    assert set(certificate) - {"blockhash", "draw"} == {name for name in FIELDS if "." not in name}
    assert {f"draw.{name}" for name in certificate["draw"]} == {name for name in FIELDS if "." in name}


def test_block_takes_a_height_a_hash_or_nothing(made: Made, run: Run) -> None:
    _, node = made
    for which, height in (["7"], 7), ([node.rpc("getblockhash", 6).upper()], 6), ([], LENGTH):
        shown = json.loads(run("block", *which, "--json", "--datadir", node.datadir).stdout)
        assert shown == {**header_of(node, height), "certificate": node.rpc("gettrainingcertificate", height)}


def test_block_without_certificate_says_why(
    made: Made, bitcoind: Node, stock_programs: Path, run: Run, tmp_path: Path
) -> None:
    with Node(stock_programs / "bitcoind", tmp_path / "stock") as stock:
        for node, height, why in (
            (made[1], START - 1, f"Block {START - 1} has no training certificate: they start at height {START}"),
            (bitcoind, 0, "This is not a training network: the node was started without -trainingkeys"),
            (stock, 0, "stock is not the patched bitcoind"),
        ):
            assert f"\nno certificate: {why}\n" in run("block", str(height), "--datadir", node.datadir).stdout
            shown = json.loads(run("block", str(height), "--json", "--datadir", node.datadir).stdout)
            assert shown == {**header_of(node, height), "certificate": None}


# chain


def test_chain_shows_the_chosen_heights_with_the_weight_of_the_table_before(made: Made, run: Run) -> None:
    _, node = made
    *whole, checked = run("chain", "--datadir", node.datadir).stdout.splitlines()
    assert len(whole) == 1 + LENGTH - START + 1
    assert checked == f"✓ every rule holds; blocks with a certificate: {len(whole) - 1}"
    for heights, lines in (
        ("5..7", whole[3:6]),
        ("5..", whole[3:]),
        ("..4", whole[1:3]),
        ("6", whole[4:5]),
        ("0..2", []),
    ):
        shown = run("chain", heights, "--datadir", node.datadir).stdout.splitlines()
        assert [line.split() for line in shown[1:-1]] == [line.split() for line in lines], heights
        certificates = json.loads(run("chain", heights, "--json", "--datadir", node.datadir).stdout)
        assert certificates == [node.rpc("gettrainingcertificate", each["height"]) for each in certificates]
        assert [each["height"] for each in certificates] == [int(line.split()[0]) for line in lines]


def test_chain_reads_a_block_once(made: Made, run: Run) -> None:
    _, node = made
    run("chain", "--datadir", node.datadir)
    assert json.loads(run("verify", "--json", "--datadir", node.datadir).stdout)["read"] == 0


def test_an_empty_chain_is_no_mistake(bitcoin_network: NetworkFactory, run: Run) -> None:
    chain = TrainingChain(start_height=5)
    node = bitcoin_network(1, chain.params.node_options()).nodes[0]
    for height in (0, 2):
        assert json.loads(run("chain", "--json", "--datadir", node.datadir).stdout) == []
        _, checked = run("chain", "--datadir", node.datadir).stdout.splitlines()  # and the names of the columns
        assert checked == "✓ every rule holds; blocks with a certificate: 0"
        for source in (["--datadir", node.datadir], ["--blocks", blocks_folder(node)]):
            shown = json.loads(run("verify", "--json", *source).stdout)
            assert (shown["valid"], shown["last"]) == (True, height)
        node.rpc("generatetoaddress", 2 - height, ADDRESS)


# export-blocks


def test_blocks_are_exported_by_height_without_the_genesis_block(made: Made, run: Run, tmp_path: Path) -> None:
    _, node = made
    all_blocks = [node.rpc("getblock", node.rpc("getblockhash", height), 0) for height in range(1, LENGTH + 1)]
    for name, heights, first, last in (
        ("all", [], 1, LENGTH),
        ("some", [f"{START}..7"], START, 7),
        ("one", ["5"], 5, 5),
        ("low", ["..2"], 1, 2),
    ):
        shown = run("export-blocks", *heights, "--out", name, "--datadir", node.datadir).stdout
        assert shown == f"{name} has blocks {first} to {last}\n"
        assert json.loads((tmp_path / name).read_text()) == all_blocks[first - 1 : last]


def test_a_file_that_is_there_is_not_overwritten(made: Made, run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    error = run("export-blocks", "--out", "mine", "--datadir", made[1].datadir, code=1).stderr
    assert error == "traincert: mine exists already\n"
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_chain_without_training_is_exported_when_it_has_blocks(bitcoind: Node, run: Run, tmp_path: Path) -> None:
    export = ["export-blocks", "--out", "blocks.json", "--datadir", bitcoind.datadir]
    error = run(*export, code=1).stderr
    assert error == "traincert: there is nothing to export: block 0, the genesis block, is on every node\n"
    assert not (tmp_path / "blocks.json").exists()
    (block,) = bitcoind.rpc("generatetoaddress", 1, ADDRESS)
    run(*export)
    assert json.loads((tmp_path / "blocks.json").read_text()) == [bitcoind.rpc("getblock", block, 0)]


# verify


def test_verify_says_what_was_checked_and_on_whose_word(made: Made, run: Run, tmp_path: Path) -> None:
    chain, node = made
    conf, chain_id = tmp_path / "training.conf", chain.params.chain_id.hex()
    conf.write_text(chain.params.conf())
    tip = node.rpc("getbestblockhash")
    lines = run("verify", "--datadir", node.datadir).stdout.splitlines()
    assert lines == [
        f"✓ every rule holds in blocks 0 to {LENGTH}; the last is {tip}",
        f"{LENGTH} read now, 1 known before",
        f"network {chain_id}, because node0 says so: name it with --conf or --chain-id",
    ]
    for source in (["--datadir", node.datadir], ["--blocks", blocks_folder(node)]):
        for stated in (["--conf", conf], ["--chain-id", chain_id], ["--conf", conf, "--chain-id", chain_id]):
            lines = run("verify", *source, *stated, "--anew").stdout.splitlines()
            assert lines[1:] == [f"{LENGTH} read now, 1 known before", f"network {chain_id}"]
    lines = run("verify", "--blocks", blocks_folder(node)).stdout.splitlines()
    assert lines[1:] == [
        f"0 read now, {LENGTH + 1} known before",
        f"network {chain_id}, because {node.datadir}/bitcoin.conf says so: name it with --conf or --chain-id",
    ]
    lines = run("verify", "7..8", "--anew", "--datadir", node.datadir).stdout.splitlines()
    assert lines[:3] == [
        f"✓ every rule holds in blocks 7 to 8; the last is {node.rpc('getblockhash', 8)}",
        "below block 7 only the headers were checked",
        "2 read now, 0 known before",
    ]
    facts = {"valid": True, "chain_id": chain_id, "believed": False, "first": 8, "last": 8, "read": 1, "whole": False}
    command = ["verify", "8", "--anew", "--json", "--datadir", str(node.datadir), "--chain-id", chain_id]
    assert json.loads(run(*command).stdout) == {**facts, "tip": node.rpc("getblockhash", 8)}


def test_the_block_files_of_a_stopped_node_and_a_stock_nodes_chain_are_verified(
    stock_programs: Path, bitcoin_network: NetworkFactory, run: Run, tmp_path: Path
) -> None:
    chain = TrainingChain()
    node = bitcoin_network(1, chain.params.node_options()).nodes[0]
    blocks = [append(chain, node) for _ in range(4)]
    node.stop()
    assert "blocks 0 to 4" in run("verify", "--blocks", blocks_folder(node)).stdout
    conf = tmp_path / "training.conf"
    conf.write_text(chain.params.conf())
    with Node(stock_programs / "bitcoind", tmp_path / "stock") as stock:
        for block in blocks:
            assert submit(stock, block) is None
        assert "blocks 0 to 4" in run("verify", "--anew", "--datadir", stock.datadir, "--conf", conf).stdout
        error = run("verify", "--datadir", stock.datadir, "--chain-id", chain.params.chain_id.hex(), code=1).stderr
        assert error == "traincert: stock is not the patched bitcoind: it is on no training network\n"
    run("verify", "--datadir", stock.datadir, "--conf", conf, code=3)


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Path:
    """A copy of the node's block files, with the conf that belongs to them."""
    chain, node = made
    folder = tmp_path / "copy/regtest/blocks"
    shutil.copytree(blocks_folder(node), folder, ignore=shutil.ignore_patterns("index"))
    (tmp_path / "copy/bitcoin.conf").write_text(chain.params.conf())
    return folder


def flip(folder: Path, block_hash: str, at: int) -> None:
    """Change a byte of a block in its file."""
    path, offset, _ = BlockFiles(folder)._places[block_hash]
    data = bytearray(path.read_bytes())
    data[offset + at] ^= 1
    path.write_bytes(data)


def test_verify_names_the_block_that_was_changed(made: Made, copied: Path, run: Run) -> None:
    _, node = made
    seventh = node.rpc("getblockhash", 7)
    run("verify", "--blocks", copied)
    flip(copied, seventh, 200)
    run("verify", "--blocks", copied)  # not read again
    error = run("verify", "--blocks", copied, "--anew", code=1).stderr
    assert error.startswith(f"traincert: block 7 {seventh}: bad-txnmrklroot: the transactions have the Merkle root ")
    assert len(error.splitlines()) == 1
    shown = json.loads(run("verify", "--blocks", copied, "--anew", "--json", code=1).stdout)
    assert (shown["valid"], shown["height"], shown["hash"]) == (False, 7, seventh)
    assert (shown["reason"], f"{shown['reason']}: {shown['detail']}") == (
        "bad-txnmrklroot",
        error.split(": ", 2)[2][:-1],
    )
    run("verify", "..6", "--blocks", copied, "--anew")
    flip(copied, seventh, 200)
    run("verify", "--blocks", copied, "--anew")


def test_verify_names_a_block_that_leads_nowhere(made: Made, copied: Path, run: Run) -> None:
    _, node = made
    tip = node.rpc("getblockhash", LENGTH)
    flip(copied, tip, 10)  # in the hash of the block before
    error = run("verify", "--blocks", copied, "--anew", code=1).stderr
    assert "which is in no file: a file is missing or damaged" in error
    assert len(error.splitlines()) == 1
    assert json.loads(run("verify", "--blocks", copied, "--anew", "--json", code=1).stdout)["valid"] is False
    assert f"0 to {LENGTH - 1};" in run("verify", f"..{LENGTH - 1}", "--blocks", copied, "--anew").stdout


@pytest.mark.parametrize("reason", WRONG_WITH_PARENT)
def test_verify_names_the_rule_that_a_stored_block_breaks(made: Made, copied: Path, run: Run, reason: str) -> None:
    chain, node = made
    slot = template(node)
    certificate = chain.next_certificate(slot)
    change = next(iter(WRONG_WITH_PARENT[reason].values()))
    wrong = change(chain.forger(certificate.height), chain.block(slot, certificate), certificate)
    key = (copied / "xor.dat").read_bytes()
    data = wrong.serialize()
    data = bytes.fromhex("fabfb5da") + len(data).to_bytes(4, "little") + data
    (copied / "blk00001.dat").write_bytes(bytes(byte ^ key[i % 8] for i, byte in enumerate(data)))
    error = run("verify", "--blocks", copied, code=1).stderr
    assert error.startswith(f"traincert: block {LENGTH + 1} {hash_of(wrong)}: {reason}: ")
    assert len(error.splitlines()) == 1


def test_a_damaged_cache_costs_one_line(made: Made, run: Run, tmp_path: Path) -> None:
    _, node = made
    run("verify", "--datadir", node.datadir)
    cached = tmp_path / "cache/traincert/verified-1.sqlite"
    cached.write_bytes(b"x" * 5000)
    done = run("verify", "--datadir", node.datadir)
    assert done.stderr.startswith(f"traincert: {cached} is damaged (")
    assert len(done.stderr.splitlines()) == 1
    assert f"{LENGTH} read now" in done.stdout
    done = run("verify", "--datadir", node.datadir)
    assert (done.stderr, "0 read now" in done.stdout) == ("", True)


def test_two_programs_verify_at_once(made: Made, env: Mapping[str, str]) -> None:
    _, node = made
    command = [str(TRAINCERT), "verify", "--datadir", str(node.datadir)]
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(each.communicate()[1], each.returncode) for each in both] == [(b"", 0)] * 2


def test_a_conf_of_another_network_is_refused(made: Made, run: Run, tmp_path: Path) -> None:
    chain, node = made
    conf, other = tmp_path / "training.conf", replace(chain, round_seconds=61).params
    conf.write_text(other.conf())
    first = node.rpc("getblockhash", START)
    error = run("verify", "--datadir", node.datadir, "--conf", conf, code=1).stderr
    assert error.startswith(f"traincert: block {START} {first}: bad-traincert-coordinator-sig: ")
    for stated in (["--conf", conf, "--chain-id", chain.params.chain_id.hex()], ["--chain-id", other.chain_id.hex()]):
        error = run("verify", "--datadir", node.datadir, *stated, code=1).stderr
        assert "is of network" in error
        assert "not of the one of --chain-id" in error


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["block", "seven"], 2, "'seven' is neither a height nor a block hash of 64 hex digits"),
        (["block", "99"], 1, "Block height out of range"),
        (["block", "ab" * 32], 1, "Block not found"),
        (["block", "7", "8"], 2, "unexpected extra argument"),
        (["chain", "5..x"], 2, "'5..x' are no heights such as 7, 3..7, 3.. or ..7"),
        (["chain", ".."], 2, "'..' are no heights"),
        (["chain", ""], 2, "'' are no heights"),
        (["chain", "7..5"], 2, "'7..5': 5 is below 7"),
        (["chain", "99"], 1, f"node0 has no block 99: its last block is {LENGTH}"),
        (["chain", "99.."], 1, f"there is no block 99: the last one is block {LENGTH}"),
        (["chain", "--run", "nowhere"], 2, "'nowhere' does not exist"),
        (["export-blocks", "99", "--out", "new"], 1, f"node0 has no block 99: its last block is {LENGTH}"),
        (["export-blocks", "99..", "--out", "new"], 1, f"there is no block 99: the last one is block {LENGTH}"),
        (["export-blocks", "0", "--out", "new"], 1, "there is nothing to export: block 0, the genesis block, is on"),
        (["export-blocks", "--out", "nowhere/new"], 1, "there is no folder nowhere"),
        (["export-blocks"], 2, "Missing option '--out'"),
        (["verify", "5-7"], 2, "'5-7' are no heights"),
        (["verify", "..99"], 1, f"node0 has no block 99: its last block is {LENGTH}"),
        (["verify", "--chain-id", "12"], 2, "'12' is no chain_id of 64 hex digits"),
        (["verify", "--conf", "nowhere"], 2, "'nowhere' does not exist"),
        (["verify", "--blocks", "."], 2, "give --datadir or --blocks, not both"),
        (["miner", "show", "me"], 2, "'me' is no x-only key of 64 hex digits"),
        (["watch", "now"], 2, "unexpected extra argument"),
    ],
)
def test_mistakes_get_one_line(made: Made, run: Run, arguments: list[str], code: int, said: str) -> None:
    error = run(*arguments, "--datadir", made[1].datadir, code=code).stderr
    assert said in error.splitlines()[-1]
    assert len(error.splitlines()) == 1 or code == 2  # click shows how to use the command, too


def test_folders_that_are_none_get_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    conf = tmp_path / "training.conf"
    conf.write_text(TrainingChain().params.conf())
    for arguments, code, said in (
        (["verify"], 1, "demo/node0 is no node's data directory"),
        (["verify", "--datadir", "empty"], 1, "empty is no node's data directory"),
        (["verify", "--blocks", "nowhere"], 2, "'nowhere' does not exist"),
        (["verify", "--blocks", "empty"], 2, "bitcoin.conf: give --conf"),
        (["verify", "--blocks", "empty", "--conf", "training.conf"], 1, "empty has no blk00000.dat"),
        (["verify", "--blocks", "empty", "--conf", "empty"], 2, "'empty' is a directory"),
        (["watch", "--datadir", "empty"], 1, "empty is no node's data directory"),
    ):
        assert said in run(*arguments, code=code).stderr.splitlines()[-1], arguments


class LyingNode(HTTPServer):
    """A server that answers RPC as a node does, or as it likes. `datadir` leads to it."""

    def __init__(self, datadir: Path, answer: Callable[[str, list[Any]], Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Answering)
        self.answer = answer
        self.datadir = datadir
        (datadir / "regtest").mkdir(parents=True)
        (datadir / "regtest/.cookie").write_text("user:password")
        (datadir / "bitcoin.conf").write_text(f"rpcport={self.server_port}\n")
        self._thread = threading.Thread(target=self.serve_forever)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Answering(BaseHTTPRequestHandler):
    server: LyingNode

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = [self._answer(call) for call in (asked if isinstance(asked, list) else [asked])]
        body = json.dumps(answers if isinstance(asked, list) else answers[0], default=float).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, call: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"id": call["id"], "error": None, "result": self.server.answer(call["method"], call["params"])}
        except RpcError as error:
            return {"id": call["id"], "error": {"code": error.code, "message": error.message}}

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("lies", "said"),
    [
        ({"getbestblockhash": 7}, "liar does not answer getbestblockhash as a Bitcoin node does"),
        ({"getbestblockhash": "no hash"}, "hash must be of length 64"),
        ({"getblockheader": None}, "liar does not answer getblockheader as a Bitcoin node does"),
        ({"getblockheader": "zz"}, "liar does not answer getblockheader as a Bitcoin node does"),
        ({"getblockheader": "00" * 80}, "it came with another hash"),
        ({"getblock": "00" * 81}, "unreadable: the block has no transactions"),
        ({"getblock": "00"}, "unreadable: these bytes are no block"),
        ({"getblock": {}}, "liar does not answer getblock as a Bitcoin node does"),
        ({"height": "high"}, "liar does not answer getblockheader as a Bitcoin node does"),
        ({"getblockcount": "many"}, "liar does not answer getblockcount as a Bitcoin node does"),
    ],
)
def test_a_node_that_lies_is_not_believed(
    made: Made, run: Run, tmp_path: Path, lies: dict[str, Any], said: str
) -> None:
    chain, node = made
    conf = tmp_path / "training.conf"
    conf.write_text(chain.params.conf())

    def answer(method: str, params: list[Any]) -> Any:
        if method == "getblockheader" and params[1:] != [False] and "height" in lies:
            return {"height": lies["height"]}
        return lies[method] if method in lies else node.rpc(method, *params)

    heights = ["..9"] if "getblockcount" in lies else []
    with LyingNode(tmp_path / "liar", answer) as liar:
        error = run("verify", *heights, "--datadir", liar.datadir, "--conf", conf, code=1).stderr
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_node_whose_heights_are_wrong_is_read_header_by_header(made: Made, run: Run, tmp_path: Path) -> None:
    _, node = made

    def answer(method: str, params: list[Any]) -> Any:
        return {"height": 10**9} if method == "getblockheader" and len(params) == 1 else node.rpc(method, *params)

    with LyingNode(tmp_path / "liar", answer) as liar:
        assert f"blocks 0 to {LENGTH};" in run("verify", "--datadir", liar.datadir).stdout


def test_a_node_that_names_another_block_by_a_height_is_not_believed(made: Made, run: Run, tmp_path: Path) -> None:
    _, node = made
    sixth = node.rpc("getblockhash", 6)

    def answer(method: str, params: list[Any]) -> Any:
        return sixth if (method, params) == ("getblockhash", [9]) else node.rpc(method, *params)

    with LyingNode(tmp_path / "liar", answer) as liar:
        error = run("verify", "..9", "--datadir", liar.datadir, code=1).stderr
    assert error == f"traincert: block {sixth} is not block 9: it is block 6\n"


def test_a_node_whose_parameters_are_nonsense_is_not_believed(run: Run, tmp_path: Path) -> None:
    with LyingNode(tmp_path / "liar", lambda *_: {"keys": 5}) as liar:
        for command in ("verify", "chain", "watch"):
            error = run(command, "--datadir", liar.datadir, code=1).stderr
            assert error == "traincert: liar does not answer gettraininginfo as the patched bitcoind does\n"


# watch


class Watching:
    """A running `traincert watch`, whose lines are read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait(self, text: str) -> str:
        """The next line with a text in it; lines before it are gone."""

        def there() -> bool:
            while self.lines and text not in self.lines[0]:
                self.skipped.append(self.lines.pop(0))
            return bool(self.lines)

        self.skipped: list[str] = []
        wait_for(there, 60, f"a line with {text}", lambda: (self.skipped, self.process.poll()))
        return self.lines.pop(0)

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str]:
        self.process.send_signal(number)
        self._thread.join()
        assert self.process.stderr
        error = self.process.stderr.read().strip()
        return self.process.wait(), error


@pytest.fixture
def watch(env: Mapping[str, str]) -> Iterator[Callable[..., Watching]]:
    started: list[subprocess.Popen[str]] = []

    def watch(*arguments: str | Path) -> Watching:
        command = [str(TRAINCERT), "watch", *map(str, arguments)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return Watching(started[-1])

    yield watch
    for process in started:
        process.kill()
        process.communicate()


def test_watch_says_blocks_reorganisations_and_equivocations(
    bitcoin_network: NetworkFactory, watch: Callable[..., Watching]
) -> None:
    chain = TrainingChain(start_height=2)
    network: Network = bitcoin_network(2, chain.params.node_options())
    first, second = network.nodes
    people, programs = watch("--datadir", first.datadir), watch("--json", "--datadir", first.datadir)
    assert people.wait("node0") == f"node0 is at block 0, {GENESIS}"
    assert json.loads(programs.wait("start"))["chain_id"] == chain.params.chain_id.hex()
    below = first.rpc("generatetoaddress", 1, ADDRESS)[0]
    assert people.wait("block") == f"block 1 without a certificate: {below}"
    assert json.loads(programs.wait("block"))["hash"] == below
    block = append(chain, first)
    winner = first.rpc("gettrainingcertificate")["winner_key"]
    assert people.wait("block") == f"block 2 by {winner[:16]}: loss 2.3026 → 2.0000, {hash_of(block)}"
    shown = json.loads(programs.wait("block"))
    assert (shown["event"], shown["height"], shown["winner_key"], shown["loss_after"]) == (
        "block",
        2,
        winner,
        2 * 10**9,
    )

    network.wait_until_same_tip()
    network.partition([[0], [1]])
    fork = replace(chain)
    old = [append(chain, first) for _ in range(2)][-1]
    people.wait(hash_of(old))
    new = [append(fork, second, later=1) for _ in range(3)]
    network.heal()
    network.wait_until_same_tip()
    text = f"reorganisation: from 4 {hash_of(old)} to 5 {hash_of(new[-1])}; they fork after 2"
    assert people.wait("reorganisation") == text
    assert [people.wait("block").split()[-1] for _ in new] == [hash_of(block) for block in new]
    shown = json.loads(programs.wait("reorganisation"))
    assert (shown["old_hash"], shown["hash"], shown["fork_hash"]) == (hash_of(old), hash_of(new[-1]), hash_of(block))
    assert (shown["old_height"], shown["height"], shown["fork_height"]) == (4, 5, 2)

    slot = template(first)
    certificate = fork.next_certificate(slot)
    twice = [fork.block(slot | {"curtime": slot["curtime"] + later}, certificate) for later in range(2)]
    assert [submit(first, block) for block in twice] == [None, "inconclusive"]
    line = people.wait("of height 6")  # that of height 3 comes first: both branches began with the same certificate
    assert line.endswith(f"of height 6, round 0: {hash_of(twice[0])} and {hash_of(twice[1])}")
    assert json.loads(programs.wait("of height 6"))["blocks"] == [hash_of(block) for block in twice]
    assert people.stop() == programs.stop(signal.SIGTERM) == (130, "traincert: interrupted")


def test_watch_goes_on_when_the_node_is_back(
    bitcoin_network: NetworkFactory, watch: Callable[..., Watching], run: Run
) -> None:
    chain = TrainingChain()
    node = bitcoin_network(1, chain.params.node_options()).nodes[0]
    append(chain, node)
    watching = watch("--datadir", node.datadir)
    watching.wait("node0 is at block 1")
    node.stop()
    assert watching.wait("away") == "node0 is away"
    run("watch", "--datadir", node.datadir, code=3)
    node.start()
    assert watching.wait("back") == "node0 is back"
    block = append(chain, node)
    watching.wait(f"block 2 by {node.rpc('gettrainingcertificate')['winner_key'][:16]}")
    assert watching.stop()[0] == 130
    assert json.loads(run("verify", "--json", "--datadir", node.datadir).stdout)["read"] == 0  # what it saw is kept
    assert hash_of(block) == node.rpc("getbestblockhash")


def test_watch_ends_when_the_node_comes_back_on_another_network(
    bitcoin_network: NetworkFactory, watch: Callable[..., Watching]
) -> None:
    node = bitcoin_network(1, TrainingChain().params.node_options()).nodes[0]
    watching = watch("--datadir", node.datadir)
    watching.wait("node0 is at block 0")
    node.stop()
    watching.wait("away")
    shutil.rmtree(node.chain_dir)
    other = TrainingChain(round_seconds=61).params
    node.options = {**node.options, **other.node_options()}
    node.start()
    watching.process.wait(60)
    assert watching.stop() == (
        1,
        f"traincert: node0 is on network {other.chain_id.hex()} now, not on {TrainingChain().params.chain_id.hex()}",
    )


def test_a_reader_that_has_enough_of_watch_ends_it(bitcoin_network: NetworkFactory, env: Mapping[str, str]) -> None:
    chain = TrainingChain()
    node = bitcoin_network(1, chain.params.node_options()).nodes[0]
    command = [str(TRAINCERT), "watch", "--datadir", str(node.datadir)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout
        watching.stdout.readline()
        watching.stdout.close()
        append(chain, node)
        assert watching.wait(60) == 1
        assert watching.stderr
        assert watching.stderr.read() == ""


# miner show


def record_of(height: int) -> bytes:
    """The record of the cycle that a made block closes, as far as `miner show` reads it."""
    leaves = made_table(height).leaves
    facts = [
        {
            "miner": leaf.miner_key.hex(),
            "update_hash": leaf.update_hash.hex(),
            "params": leaf.params,
            "loss_reduction": leaf.loss_reduction,
            "weight": leaf.weight,
            "refusal": None,
        }
        for leaf in leaves
    ]
    refused = {
        "miner": "00" * 32,
        "update_hash": None,
        "params": 1,
        "loss_reduction": 0,
        "weight": 0,
        "refusal": "late",
    }
    return json.dumps({"tasks": [*facts, refused]}).encode()


def test_miner_show_counts_blocks_and_draws(bitcoin_network: NetworkFactory, run: Run, tmp_path: Path) -> None:
    chain = TrainingChain(start_height=2)
    node = bitcoin_network(1, chain.params.node_options()).nodes[0]
    node.rpc("generatetoaddress", 1, ADDRESS)
    run_folder = tmp_path / "run"
    (run_folder / "cycles").mkdir(parents=True)
    for height in range(2, 22):
        append(chain, node, record=record_of(height))
        (run_folder / f"cycles/{height - 1:08}.json").write_bytes(record_of(height))
    certificates = [node.rpc("gettrainingcertificate", height) for height in range(2, 22)]
    won, drawn, expected = 0, 0, 0.0
    for key in MINERS:
        command = ["miner", "show", key.hex(), "--datadir", str(node.datadir)]
        shown = json.loads(run(*command, "--json", "--run", run_folder).stdout)
        ours = [each for each in certificates if each["winner_key"] == key.hex()]
        assert (shown["key"], shown["won"], shown["of"]) == (key.hex(), len(ours), 20)
        assert (shown["draws"], shown["drawn"]) == (19, sum("draw" in each for each in ours))
        assert shown["low"] <= shown["expected"] <= shown["high"]
        assert shown["blocks"] == [
            {
                "height": each["height"],
                "hash": each["blockhash"],
                "round": 0,
                "weight": each["draw"]["weight"] if "draw" in each else None,
                "total": certificates[each["height"] - 3]["contributions_weight"] if "draw" in each else None,
            }
            for each in ours
        ]
        won, drawn, expected = won + shown["won"], drawn + shown["drawn"], expected + shown["expected"]
    assert (won, drawn) == (20, 19)
    assert expected == pytest.approx(19)
    text = run(*command, "--run", run_folder).stdout
    assert f"has won {len(ours)} of 20 blocks ({len(ours) / 20:.1%})" in text
    assert f"it was drawn {shown['drawn']} times in 19 draws" in text
    assert "with --run it says how often to expect this miner" in run(*command).stdout
    stranger = ["miner", "show", "77" * 32, "--json", "--run", run_folder, "--datadir", node.datadir]
    shown = json.loads(run(*stranger).stdout)
    assert (shown["won"], shown["drawn"], shown["expected"], shown["blocks"]) == (0, 0, 0, [])

    (run_folder / "cycles/00000003.json").write_bytes(record_of(5))
    error = run(*command, "--run", run_folder, code=1).stderr
    assert error.startswith("traincert: block 4: the certificate has record ")
    (run_folder / "cycles/00000003.json").unlink()
    assert "00000003.json: No such file" in run(*command, "--run", run_folder, code=1).stderr


# what bitcoin-cli says


def test_the_examples_in_the_nodes_help_work(made: Made) -> None:
    _, node = made
    text: str = node.rpc("help", "gettrainingcertificate")
    examples = [line.split()[2:] for line in text.splitlines() if line.startswith("> bitcoin-cli")]
    assert len(examples) >= 2
    for words in examples:
        done = subprocess.run([*node.cli, *words], capture_output=True, text=True, check=False)
        if done.returncode:  # the example's height is below this chain's first certificate
            assert f"they start at height {START}" in done.stderr
        else:
            assert json.loads(done.stdout) == node.rpc("gettrainingcertificate")
    with pytest.raises(RpcError):
        node.rpc("gettrainingcertificate", START - 1)
