"""Libraries that were never told of training check a training chain's blocks, as a stock node serves them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import bitcoin
import pytest
from bitcoin.core import CBlock, CheckBlock, CheckProofOfWorkError

from compat.made_chain import LENGTH, first_without_work
from traincert.regtest import Node
from training_chain import TrainingChain, submit

SCRIPT_FILES = ("check_blocks.mjs", "package.json", "package-lock.json")


@pytest.fixture(scope="module")
def served_blocks(
    certificate_chain: tuple[TrainingChain, list[CBlock]],
    stock_programs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    """The blocks in hex, from an unpatched node that took them all."""
    with Node(stock_programs / "bitcoind", tmp_path_factory.mktemp("serves")) as node:
        for block in certificate_chain[1]:
            assert submit(node, block) is None
        return [node.rpc("getblock", node.rpc("getblockhash", height), 0) for height in range(1, LENGTH + 1)]


@pytest.fixture
def _regtest_params() -> Iterator[None]:
    before = bitcoin.params.NAME
    bitcoin.SelectParams("regtest")
    yield
    bitcoin.SelectParams(before)


@pytest.mark.usefixtures("_regtest_params")
def test_python_bitcoinlib_takes_every_block(served_blocks: list[str]) -> None:
    for served in served_blocks:
        CheckBlock(CBlock.deserialize(bytes.fromhex(served)))


@pytest.mark.usefixtures("_regtest_params")
def test_python_bitcoinlib_refuses_a_block_without_work(
    chain_without_work: tuple[TrainingChain, list[CBlock]],
) -> None:
    blocks = chain_without_work[1]
    with pytest.raises(CheckProofOfWorkError, match="hash doesn't match nBits"):
        CheckBlock(blocks[first_without_work(blocks)])


@pytest.fixture(scope="module")
def bitcoinjs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that checks blocks with the pinned bitcoinjs-lib, installed outside the repository."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.fail("node or npm not found: install Node.js 18 or newer (on Debian: apt-get install nodejs npm)")
    folder = tmp_path_factory.mktemp("bitcoinjs")
    for name in SCRIPT_FILES:
        shutil.copy(Path(__file__).with_name(name), folder)
    install = [npm, "ci", "--prefer-offline", "--ignore-scripts", "--no-audit", "--no-fund"]
    installed = subprocess.run(install, cwd=folder, check=False, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return [node, str(folder / SCRIPT_FILES[0])]


def check(command: list[str], blocks: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input="\n".join(blocks) + "\n", check=False, capture_output=True, text=True)


def test_bitcoinjs_takes_every_block(bitcoinjs: list[str], served_blocks: list[str]) -> None:
    answer = check(bitcoinjs, served_blocks)
    assert answer.returncode == 0, answer.stderr
    transactions = sum(len(CBlock.deserialize(bytes.fromhex(served)).vtx) for served in served_blocks)
    assert transactions > LENGTH
    assert json.loads(answer.stdout) == {"blocks": LENGTH, "transactions": transactions}


def test_bitcoinjs_refuses_a_block_without_work(
    bitcoinjs: list[str], chain_without_work: tuple[TrainingChain, list[CBlock]]
) -> None:
    blocks = chain_without_work[1]
    answer = check(bitcoinjs, [block.serialize().hex() for block in blocks])
    assert (answer.returncode, answer.stderr) == (1, f"block {first_without_work(blocks) + 1}: not enough work\n")


def test_bitcoinjs_refuses_a_block_whose_certificate_was_changed(
    bitcoinjs: list[str], served_blocks: list[str]
) -> None:
    magic = served_blocks[0].index(b"TCRT".hex()) + 8
    changed = served_blocks[0][:magic] + "02" + served_blocks[0][magic + 2 :]
    answer = check(bitcoinjs, [changed])
    assert (answer.returncode, answer.stderr) == (1, "block 1: wrong Merkle root or witness commitment\n")
