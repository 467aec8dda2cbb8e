"""Training chains that are made without a node, for the explorer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bitcoin.core import (
    CBlock,
    CMutableTransaction,
    CoreRegTestParams,
    COutPoint,
    CTransaction,
    CTxIn,
    CTxInWitness,
    CTxOut,
    CTxWitness,
    b2lx,
)
from bitcoin.core.script import OP_0, CScript, CScriptWitness

from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.lottery import ContributionTable, Leaf, contribution_weight
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.testing.invalid import Forger, digest
from training_chain import MINERS, PAYOUT_SCRIPT, TrainingChain, made_table

GENESIS: CBlock = CoreRegTestParams.GENESIS_BLOCK
FIRST_TIME = GENESIS.nTime


def block_id(block: CBlock) -> str:
    """A block's hash as RPC shows it."""
    shown: str = b2lx(block.GetHash())
    return shown


def options_of(params: TrainingParams) -> list[str]:
    """The network's options as lines of bitcoin.conf."""
    return params.conf().splitlines()[1:]


@dataclass
class MadeChain:
    """The genesis block, and blocks on it up to `length`: from the chain's start height on with certificates.

    Each cycle has a table of `leaves`, by four miners. Every third block has transactions, with and without witnesses.
    """

    length: int
    leaves: int = 4
    chain: TrainingChain = field(default_factory=TrainingChain)
    blocks: list[CBlock] = field(default_factory=lambda: [GENESIS])
    certificates: dict[int, Certificate] = field(default_factory=dict)
    forgers: dict[int, Forger] = field(default_factory=dict)
    """By height: what it takes to make this height's block wrong in one thing."""

    def __post_init__(self) -> None:
        while len(self.blocks) <= self.length:
            self._append()

    def _append(self) -> None:
        height = len(self.blocks)
        if height < self.chain.start_height:
            self.blocks.append(plain_block(height, self.blocks[-1]))
            return
        table = made_leaves(height, self.leaves)
        template = self._template(height)
        certificate = self.chain.next_certificate(template, table)
        self.certificates[height] = certificate
        self.forgers[height] = self.chain.forger(height)
        self.blocks.append(self.chain.block(template, certificate))
        self.chain.advance(certificate, table)

    def _template(self, height: int) -> dict[str, Any]:
        spends = [spend(height, i) for i in range(0 if height % 3 else height % 7)]
        return {
            "version": 0x20000000,
            "previousblockhash": block_id(self.blocks[-1]),
            "transactions": [{"data": each.serialize().hex()} for each in spends],
            "coinbasevalue": 5_000_000_000,
            "default_witness_commitment": "6a24aa21a9ed" + digest("commitment").hex(),
            "bits": "207fffff",
            "curtime": FIRST_TIME + height,
            "height": height,
        }


def plain_block(height: int, parent: CBlock) -> CBlock:
    """A block without a certificate."""
    coinbase = CMutableTransaction(
        [CTxIn(COutPoint(), CScript([height, OP_0]))], [CTxOut(5_000_000_000, PAYOUT_SCRIPT)]
    )
    return CBlock(0x20000000, parent.GetHash(), nTime=FIRST_TIME + height, nBits=0x207FFFFF, vtx=[coinbase])


def spend(height: int, number: int) -> CTransaction:
    """Any transaction; those of an odd number have a witness."""
    inputs = [CTxIn(COutPoint(digest(f"coin {height} {number}"), each)) for each in range(1 + number)]
    stacks = [CTxInWitness(CScriptWitness([b"\x01" * each])) for each in range(1 + number)]
    witness = CTxWitness(stacks) if number % 2 else CTxWitness()
    return CTransaction(inputs, [CTxOut(1000 + number, CScript(b"\x51"))], witness=witness)


def made_leaves(height: int, count: int) -> ContributionTable:
    """A table of this many leaves."""
    if count == len(MINERS):
        return made_table(height)
    miners = list(MINERS)

    def leaf(i: int) -> Leaf:
        params, loss_reduction = 1000 + i, 10**6 + height
        weight = contribution_weight(params, loss_reduction)
        return Leaf(miners[i % len(miners)], digest(f"update {height} {i}"), params, loss_reduction, weight)

    return ContributionTable(leaf(i) for i in range(count))
