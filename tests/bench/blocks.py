"""The blocks that nodes are measured with, in hex: empty ones with a certificate, and empty ones of a stock node."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from traincert.bridge.consensus.lottery import ContributionTable, Leaf, contribution_weight
from traincert.bridge.consensus.params import GENESIS_HASH
from traincert.bridge.testing.invalid import digest
from traincert.regtest import Node
from training_chain import MINERS, TrainingChain

LEAVES = 1024
ADDRESS = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202"
# Of a block without other transactions, as getblocktemplate has it.
WITNESS_COMMITMENT = "6a24aa21a9ede2f61c3f71d1defd3fa999dfa36953755c690689799962b48bebd836974e8cf9"

# Regtest walks through all its blocks after each new one, to find mistakes of its own; other networks do not.
WITHOUT_CHECKS = {"checkblockindex": "0", "checkmempool": "0"}

OPTIONS = TrainingChain().params.node_options()
"""Of a node that takes the certificate blocks."""


def certificate_blocks(count: int) -> list[str]:
    """A chain from the genesis block on, signed by 2 of 3 keys, each parent with a table of 1,024 leaves."""
    chain, table = TrainingChain(), _table()
    prev_block, first_time = GENESIS_HASH, int(time.time()) - count - 1
    blocks = []
    for height in range(1, count + 1):
        template = {
            "version": 0x20000000,
            "previousblockhash": prev_block[::-1].hex(),
            "height": height,
            "bits": "207fffff",
            "curtime": first_time + height,
            "coinbasevalue": 50 * 10**8 >> height // 150,
            "default_witness_commitment": WITNESS_COMMITMENT,
            "transactions": [],
        }
        certificate = chain.next_certificate(template, table)
        block = chain.block(template, certificate)
        chain.advance(certificate, table)
        blocks.append(block.serialize().hex())
        prev_block = block.GetHash()
    return blocks


def _table() -> ContributionTable:
    miners = list(MINERS)

    def leaf(i: int) -> Leaf:
        params, loss_reduction = 1000 + i, 10**6 + i
        weight = contribution_weight(params, loss_reduction)
        return Leaf(miners[i % len(miners)], digest(f"update {i}"), params, loss_reduction, weight)

    return ContributionTable(leaf(i) for i in range(LEAVES))


def stock_blocks(bitcoind: Path, folder: Path, count: int) -> list[str]:
    """A chain from the genesis block on, as the node mines it."""
    with Node(bitcoind, folder, WITHOUT_CHECKS) as node:
        hashes: Sequence[str] = node.rpc("generatetoaddress", count, ADDRESS)
        return [node.rpc("getblock", block_hash, 0) for block_hash in hashes]


def one_client_node(bitcoind: Path, folder: Path, options: Mapping[str, str | list[str]]) -> Node:
    """A node, to be started, for one client: with one thread, or each call would find another's cold cache."""
    return Node(bitcoind, folder, {**options, "rpcthreads": "1", "logtimemicros": "1"})
