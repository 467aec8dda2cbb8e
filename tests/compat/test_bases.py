"""Patched nodes of different releases follow one training chain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bitcoin.core import CBlock

from compat.made_chain import append
from traincert.regtest import Node
from traincert.regtest.plugin import NetworkFactory
from training_chain import TrainingChain, submit


def test_two_bases_follow_one_chain(
    chain_without_work: tuple[TrainingChain, list[CBlock]],
    bitcoin_network: NetworkFactory,
    base28_programs: Path,
    tmp_path: Path,
) -> None:
    """Without proof of work, so that each takes the blocks by their certificates alone, from the other as well."""
    chain, blocks = chain_without_work
    network = bitcoin_network(1, chain.params.node_options())
    for block in blocks:
        assert submit(network.nodes[0], block) is None
    older = Node(base28_programs / "bitcoind", tmp_path / "base28", chain.params.node_options())
    network.add(older)
    with older:
        network.connect()
        assert network.wait_until_same_tip() == blocks[-1].GetHash()[::-1].hex()
        ours, theirs = (node.rpc("getnetworkinfo")["version"] for node in network.nodes)
        assert (ours, theirs) == (319900, 289900)
        added = append(replace(chain), older, compat_pow=False)
        assert network.wait_until_same_tip() == added.GetHash()[::-1].hex()
