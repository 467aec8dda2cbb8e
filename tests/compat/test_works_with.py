"""Rows of docs/works-with.md that need no further package: Bitcoin Core's linearize, and python-bitcoinlib's RPC."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bitcoin
import pytest
from bitcoin.core import CBlock, CoreRegTestParams, b2lx
from bitcoin.rpc import Proxy

from compat.made_chain import LENGTH
from traincert.regtest import Node, wait_for
from training_chain import TrainingChain, submit

MAGIC = bitcoin.RegTestParams.MESSAGE_START.hex()
GENESIS = b2lx(CoreRegTestParams.GENESIS_BLOCK.GetHash())


@pytest.fixture(scope="module")
def node(
    certificate_chain: tuple[TrainingChain, list[CBlock]], node_programs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    """A patched node with the 200 blocks."""
    chain, blocks = certificate_chain
    with Node(node_programs / "bitcoind", tmp_path_factory.mktemp("works"), chain.params.node_options()) as running:
        for block in blocks:
            assert submit(running, block) is None
        yield running


def test_linearize_writes_a_file_that_another_node_loads(
    node: Node, certificate_chain: tuple[TrainingChain, list[CBlock]], node_programs: Path, tmp_path: Path
) -> None:
    scripts = node_programs.parent / "contrib/linearize"
    if not scripts.is_dir():
        pytest.skip("a bitcoind of --bitcoind has no contrib/linearize beside it")
    config, hashes, chain_file = tmp_path / "linearize.cfg", tmp_path / "hashlist.txt", tmp_path / "chain.dat"
    settings = {
        "datadir": node.chain_dir,
        "port": node.rpc_port,
        "max_height": LENGTH,
        "netmagic": MAGIC,
        "genesis": GENESIS,
        "input": node.chain_dir / "blocks",
        "hashlist": hashes,
        "output_file": chain_file,
    }
    config.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    listed = subprocess.run(
        [sys.executable, scripts / "linearize-hashes.py", config], check=True, capture_output=True, text=True
    )
    hashes.write_text(listed.stdout)
    blocks = certificate_chain[1]
    assert hashes.read_text().split() == [GENESIS, *(b2lx(block.GetHash()) for block in blocks)]
    written = subprocess.run(
        [sys.executable, scripts / "linearize-data.py", config], check=True, capture_output=True, text=True
    )
    assert written.stdout.endswith(f"Done ({LENGTH + 1} blocks written)\n")

    options = {**certificate_chain[0].params.node_options(), "loadblock": str(chain_file)}
    with Node(node_programs / "bitcoind", tmp_path / "loads", options) as loads:
        tip = b2lx(blocks[-1].GetHash())
        wait_for(lambda: loads.rpc("getbestblockhash") == tip, 60, "the node to load the blocks", loads.log_tail)


def test_python_bitcoinlib_asks_a_node(
    node: Node, certificate_chain: tuple[TrainingChain, list[CBlock]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitcoin, "params", bitcoin.RegTestParams())  # where it looks for the cookie
    proxy = Proxy(btc_conf_file=str(node.datadir / "bitcoin.conf"))
    assert proxy.getblockcount() == LENGTH
    for height in (0, 1, LENGTH):
        block_hash = proxy.getblockhash(height)
        assert proxy.getblock(block_hash).GetHash() == block_hash
    assert proxy.getblock(block_hash) == certificate_chain[1][-1]
    proxy.close()
