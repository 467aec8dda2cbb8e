"""The block that a certificate allows: template + certificate → signed block.

Blocks and transactions are python-bitcoinlib's. What that untyped library returns gets its type here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitcoin.core import (
    CBlock,
    CBlockHeader,
    CMutableTransaction,
    COutPoint,
    CTransaction,
    CTxIn,
    CTxInWitness,
    CTxOut,
    CTxWitness,
    lx,
)
from bitcoin.core.script import OP_0, OP_RETURN, CScript, CScriptWitness
from bitcoin.core.serialize import uint256_from_compact, uint256_from_str

from traincert.bridge.consensus.certificate import SIGNATURE_SIZE, Certificate
from traincert.bridge.consensus.codec import encode_b32, encode_bytes, tagged_hash
from traincert.bridge.errors import BridgeError

PAYLOAD_MAGIC = b"TCRT"
MAX_NONCE = 2**32 - 1


def build_block(
    template: Mapping[str, Any],
    certificate: Certificate,
    payout_script: bytes,
    chain_id: bytes,
    sign: Callable[[bytes], bytes],
    *,
    compat_pow: bool = True,
    tag: bytes = b"",
) -> CBlock:
    """Build and sign the block that a certificate allows.

    `template` is getblocktemplate's answer. `payout_script` is the scriptPubKey that the block pays to. `sign` takes 32
    bytes and returns the winner's BIP340 signature of them. With `compat_pow` nonces are tried, on average two on
    regtest, until the hash meets the template's target: then tools that check proof of work accept the block, too.
    `tag` is put into the coinbase's script, where explorers look for the miner's name: at most 75 bytes.

    Raises BridgeError if the template is for another slot than the certificate, and EncodingError if a field of the
    certificate, chain_id or the signature does not fit.
    """
    encode_b32("chain_id", chain_id)
    if lx(template["previousblockhash"]) != certificate.prev_block or template["height"] != certificate.height:
        raise BridgeError(
            f"the node's next block is {template['height']} on {template['previousblockhash']}, but the certificate is "
            f"for {certificate.height} on {certificate.prev_block[::-1].hex()}"
        )
    coinbase = _coinbase(template, certificate, payout_script, tag)
    transactions = [CTransaction.deserialize(bytes.fromhex(tx["data"])) for tx in template["transactions"]]
    nbits = int(template["bits"], 16)
    target = uint256_from_compact(nbits)
    for nonce in range(MAX_NONCE + 1):
        block = _with_signature(bytes(SIGNATURE_SIZE), coinbase, transactions, template, nbits, nonce)
        # A signature cannot sign itself: the winner signs the Merkle root of the block with 64 zeros in its place.
        signature = sign(tagged_hash("traincert/block", chain_id + block.get_header().serialize()))
        encode_bytes("winner_signature", signature, SIGNATURE_SIZE)
        block = _with_signature(signature, coinbase, transactions, template, nbits, nonce)
        if not compat_pow or uint256_from_str(block.GetHash()) <= target:
            return block
    raise BridgeError(f"no nonce meets the target {template['target']}")


def payload_script(payload: bytes) -> CScript:
    """Return the scriptPubKey that carries a payload."""
    return CScript([OP_RETURN, payload])


def _coinbase(
    template: Mapping[str, Any], certificate: Certificate, payout_script: bytes, tag: bytes
) -> CMutableTransaction:
    outputs = [CTxOut(template["coinbasevalue"], CScript(payout_script))]
    if "default_witness_commitment" in template:
        outputs.append(CTxOut(0, CScript(bytes.fromhex(template["default_witness_commitment"]))))
    payload = PAYLOAD_MAGIC + certificate.serialize() + bytes(SIGNATURE_SIZE)
    outputs.append(CTxOut(0, payload_script(payload)))
    # OP_0: BIP34's height alone would be shorter than the two bytes that a coinbase's script must have.
    coin = CTxIn(COutPoint(), CScript([template["height"], tag or OP_0]))
    reserved = CTxWitness([CTxInWitness(CScriptWitness([bytes(32)]))])  # BIP141
    return CMutableTransaction([coin], outputs, nVersion=2, witness=reserved)


def _with_signature(
    signature: bytes,
    coinbase: CMutableTransaction,
    transactions: Sequence[CTransaction],
    template: Mapping[str, Any],
    nbits: int,
    nonce: int,
) -> CBlock:
    signed = CMutableTransaction.from_tx(coinbase)
    blank = signed.vout[-1].scriptPubKey
    signed.vout[-1].scriptPubKey = CScript(blank[:-SIGNATURE_SIZE] + signature)
    return CBlock(
        template["version"],
        lx(template["previousblockhash"]),
        nTime=template["curtime"],
        nBits=nbits,
        nNonce=nonce,
        vtx=[signed, *transactions],
    )


def winner_sighash(block: CBlock, output: int, chain_id: bytes) -> bytes:
    """Return the 32 bytes that the winner signs. `output` is the number of the coinbase output with the payload."""
    coinbase = CMutableTransaction.from_tx(block.vtx[0])
    script = coinbase.vout[output].scriptPubKey
    coinbase.vout[output].scriptPubKey = CScript(script[:-SIGNATURE_SIZE] + bytes(SIGNATURE_SIZE))
    root = CBlock.build_merkle_tree_from_txs([coinbase, *block.vtx[1:]])[-1]
    header = CBlockHeader(block.nVersion, block.hashPrevBlock, root, block.nTime, block.nBits, block.nNonce)
    return tagged_hash("traincert/block", chain_id + header.serialize())
