"""Template + certificate → signed block, and back. Pure: no network, clock or files.

Blocks and transactions are python-bitcoinlib's. What that untyped library returns gets its type here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from bitcoin.core.script import OP_0, OP_RETURN, CScript, CScriptInvalidError, CScriptWitness
from bitcoin.core.serialize import uint256_from_compact, uint256_from_str

from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.codec import Reader, tagged_hash, verify_schnorr
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.errors import BridgeError, CertificateError

PAYLOAD_MAGIC = b"TCRT"
SIGNATURE_SIZE = 64
MAX_NONCE = 2**32 - 1


@dataclass(frozen=True)
class Payload:
    """What a coinbase carries: the certificate, the winner's signature (64 bytes), and the output that it is in."""

    certificate: Certificate
    winner_signature: bytes
    output: int


def build_block(
    template: Mapping[str, Any],
    certificate: Certificate,
    payout_script: bytes,
    chain_id: bytes,
    sign: Callable[[bytes], bytes],
    *,
    compat_pow: bool = True,
) -> CBlock:
    """Build and sign the block that a certificate allows.

    `template` is getblocktemplate's answer, `payout_script` the scriptPubKey that is paid, and `sign` makes the
    winner's BIP340 signature of 32 bytes. With `compat_pow` nonces are tried (two on average on regtest) until the hash
    also meets the template's target, so that tools which check proof of work take the block.

    Raises BridgeError if the template is for another slot than the certificate.
    """
    if lx(template["previousblockhash"]) != certificate.prev_block or template["height"] != certificate.height:
        raise BridgeError(
            f"the node's next block is {template['height']} on {template['previousblockhash']}, but the certificate is "
            f"for {certificate.height} on {certificate.prev_block[::-1].hex()}"
        )
    coinbase = _coinbase(template, certificate, payout_script)
    transactions = [CTransaction.deserialize(bytes.fromhex(tx["data"])) for tx in template["transactions"]]
    nbits = int(template["bits"], 16)
    target = uint256_from_compact(nbits)
    for nonce in range(MAX_NONCE + 1):
        block = _with_signature(bytes(SIGNATURE_SIZE), coinbase, transactions, template, nbits, nonce)
        # The zero signature's Merkle root is the one that the winner signs: a signature cannot sign itself.
        signature = sign(tagged_hash("traincert/block", chain_id + block.get_header().serialize()))
        block = _with_signature(signature, coinbase, transactions, template, nbits, nonce)
        if not compat_pow or uint256_from_str(block.GetHash()) <= target:
            return block
    raise BridgeError(f"no nonce meets the target {template['target']}")


def payload_script(payload: bytes) -> CScript:
    """Return the scriptPubKey that carries a payload."""
    return CScript([OP_RETURN, payload])


def _coinbase(template: Mapping[str, Any], certificate: Certificate, payout_script: bytes) -> CMutableTransaction:
    outputs = [CTxOut(template["coinbasevalue"], CScript(payout_script))]
    if "default_witness_commitment" in template:
        outputs.append(CTxOut(0, CScript(bytes.fromhex(template["default_witness_commitment"]))))
    payload = PAYLOAD_MAGIC + certificate.serialize() + bytes(SIGNATURE_SIZE)
    outputs.append(CTxOut(0, payload_script(payload)))
    # OP_0: BIP34's height alone would be shorter than the two bytes that a coinbase's script must have.
    coin = CTxIn(COutPoint(), CScript([template["height"], OP_0]))
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
    """Return the 32 bytes that the winner signs, for a block whose payload is in that output of its coinbase."""
    coinbase = CMutableTransaction.from_tx(block.vtx[0])
    script = coinbase.vout[output].scriptPubKey
    coinbase.vout[output].scriptPubKey = CScript(script[:-SIGNATURE_SIZE] + bytes(SIGNATURE_SIZE))
    root = CBlock.build_merkle_tree_from_txs([coinbase, *block.vtx[1:]])[-1]
    header = CBlockHeader(block.nVersion, block.hashPrevBlock, root, block.nTime, block.nBits, block.nNonce)
    return tagged_hash("traincert/block", chain_id + header.serialize())


def read_payload(coinbase: CTransaction) -> Payload:
    """Find and decode the payload of a coinbase.

    Raises CertificateError: -missing, -multiple, -parse or -version.
    """
    found = [
        (output, script)
        for output, txout in enumerate(coinbase.vout)
        if _push(script := txout.scriptPubKey) is not None
    ]
    if not found:
        raise CertificateError("missing", "no coinbase output carries a training certificate")
    if len(found) > 1:
        raise CertificateError("multiple", f"coinbase outputs {found[0][0]} and {found[1][0]} both carry a certificate")
    output, script = found[0]
    push = _push(script) or b""
    if script != payload_script(push):
        raise CertificateError("parse", f"coinbase output {output} is not OP_RETURN and one minimal push")
    reader = Reader(push)
    reader.take(len(PAYLOAD_MAGIC))
    certificate = Certificate.read(reader)
    if reader.left() != SIGNATURE_SIZE:
        raise CertificateError("parse", f"{reader.left()} bytes after the certificate, expected {SIGNATURE_SIZE}")
    return Payload(certificate, reader.take(SIGNATURE_SIZE), output)


def _push(script: CScript) -> bytes | None:
    """The push of a script that starts with OP_RETURN and a push which starts with the magic; None of another."""
    try:
        operations = script.raw_iter()
        if next(operations)[0] != OP_RETURN:
            return None
        data: bytes | None = next(operations)[1]
    except (StopIteration, CScriptInvalidError):
        return None
    return data if data is not None and data.startswith(PAYLOAD_MAGIC) else None


def check_block(block: CBlock, height: int, params: TrainingParams) -> Payload:
    """Check all that a block's certificate must fulfil by itself, as the node does, and return the payload.

    Raises CertificateError for the first rule that does not hold.
    """
    payload = read_payload(block.vtx[0])
    certificate = payload.certificate
    if certificate.height != height:
        raise CertificateError("height", f"height {certificate.height} in a block at height {height}")
    if certificate.prev_block != block.hashPrevBlock:
        raise CertificateError("prevblock", "the header has another previous block")
    zeros = {
        certificate.contributions_root == bytes(32),
        certificate.contributions_weight == 0,
        certificate.contributions_count == 0,
    }
    if len(zeros) > 1:
        raise CertificateError("totals", "count, weight and root are not zero together")
    certificate.check_signatures(params.chain_id, params.keys_at(height))
    message = winner_sighash(block, payload.output, params.chain_id)
    if not verify_schnorr(certificate.winner_key, message, payload.winner_signature):
        raise CertificateError("winner-sig", "the winner's signature does not verify")
    return payload
