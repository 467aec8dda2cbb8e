"""Training chains, made on a running node, for tools that know nothing of training."""

from __future__ import annotations

from bitcoin.core import CBlock, CMutableTransaction, COutPoint, CTransaction, CTxIn, CTxInWitness, CTxOut, CTxWitness
from bitcoin.core.script import CScriptWitness
from bitcoin.core.serialize import uint256_from_compact, uint256_from_str

from traincert.regtest import Node
from training_chain import ANYONE_CAN_SPEND, PAYOUT_SCRIPT, TrainingChain, submit, template

LENGTH = 200
MATURITY = 100  # blocks until a coinbase can be spent
FEE = 10_000


def append(chain: TrainingChain, node: Node, *, compat_pow: bool = True, round_: int = 0) -> CBlock:
    """Append a valid block to the node's tip."""
    slot = template(node)
    if round_:  # it may come only so long after its parent
        parent_time = node.rpc("getblockheader", slot["previousblockhash"])["time"]
        slot["curtime"] = max(slot["curtime"], parent_time + round_ * chain.round_seconds)
    certificate = chain.next_certificate(slot, round_=round_)
    block = chain.block(slot, certificate, compat_pow=compat_pow)
    assert submit(node, block) is None
    chain.advance(certificate)
    return block


def make_chain(chain: TrainingChain, node: Node, *, compat_pow: bool = True) -> list[CBlock]:
    """Append LENGTH blocks, which spend each coinbase as soon as that is allowed."""
    blocks: list[CBlock] = []
    while len(blocks) < LENGTH:
        if len(blocks) >= MATURITY:
            node.rpc("sendrawtransaction", spend(blocks[len(blocks) - MATURITY].vtx[0]).serialize().hex())
        blocks.append(append(chain, node, compat_pow=compat_pow))
    return blocks


def spend(coinbase: CTransaction) -> CMutableTransaction:
    return CMutableTransaction(
        [CTxIn(COutPoint(coinbase.GetTxid(), 0))],
        [CTxOut(coinbase.vout[0].nValue - FEE, PAYOUT_SCRIPT)],
        witness=CTxWitness([CTxInWitness(CScriptWitness([ANYONE_CAN_SPEND]))]),
    )


def first_without_work(blocks: list[CBlock]) -> int:
    """The index of the first block whose hash does not meet its target."""
    return next(i for i, block in enumerate(blocks) if not has_work(block))


def has_work(block: CBlock) -> bool:
    work: int = uint256_from_str(block.GetHash())
    return work <= int(uint256_from_compact(block.nBits))
