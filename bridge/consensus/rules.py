"""The consensus rules: all checks of SPEC.md, of a block alone and of a block with its parent.

This is the twin of bitcoind-patch/src/training/validation.cpp: one function for each rule, with the same names in the
same order, so that both can be read side by side. A check that fails raises CertificateError with the rule's reason.
Cheap checks come before costly ones.

Only the node's CheckTrainingHeader (proof of work below the start height) has no twin: the bridge reads no block there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from bitcoin.core import CBlock, CTransaction
from bitcoin.core.script import OP_RETURN, CScript, CScriptInvalidError

from traincert.bridge.consensus.block import PAYLOAD_MAGIC, payload_script, winner_sighash
from traincert.bridge.consensus.certificate import SIGNATURE_SIZE, Certificate, Draw
from traincert.bridge.consensus.codec import Reader, verify_schnorr
from traincert.bridge.consensus.lottery import contribution_weight, draw_ticket, follow_path, leaf_node
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.errors import CertificateError


@dataclass(frozen=True)
class Payload:
    """What a coinbase carries: the certificate, the winner's signature (64 bytes), and which output has them."""

    certificate: Certificate
    winner_signature: bytes
    output: int


def _match_payload(script: CScript) -> bytes | None:
    """Return what a script pushes, if it is OP_RETURN and a push that starts with the magic; else None."""
    try:
        operations = script.raw_iter()
        if next(operations)[0] != OP_RETURN:
            return None
        data: bytes | None = next(operations)[1]
    except (StopIteration, CScriptInvalidError):
        return None
    return data if data is not None and data.startswith(PAYLOAD_MAGIC) else None


def read_training_payload(coinbase: CTransaction) -> Payload:
    """Find and decode the payload of a coinbase.

    Raises CertificateError: -missing, -multiple, -parse or -version.
    """
    found = [
        (output, script)
        for output, txout in enumerate(coinbase.vout)
        if _match_payload(script := txout.scriptPubKey) is not None
    ]
    if not found:
        raise CertificateError("missing", "no coinbase output carries a training certificate")
    if len(found) > 1:
        raise CertificateError("multiple", f"coinbase outputs {found[0][0]} and {found[1][0]} both carry a certificate")
    output, script = found[0]
    push = _match_payload(script) or b""
    if script != payload_script(push):
        raise CertificateError("parse", f"coinbase output {output} is not OP_RETURN and one minimal push")
    reader = Reader(push)
    reader.take(len(PAYLOAD_MAGIC))
    certificate = Certificate.read(reader)
    if reader.left() != SIGNATURE_SIZE:
        raise CertificateError("parse", f"{reader.left()} bytes after the certificate, expected {SIGNATURE_SIZE}")
    return Payload(certificate, reader.take(SIGNATURE_SIZE), output)


def check_height(certificate: Certificate, height: int) -> None:
    """Rule bad-traincert-height."""
    if certificate.height != height:
        raise CertificateError("height", f"height {certificate.height} in a block at height {height}")


def check_prev_block(certificate: Certificate, block: CBlock) -> None:
    """Rule bad-traincert-prevblock."""
    if certificate.prev_block != block.hashPrevBlock:
        found, expected = certificate.prev_block[::-1].hex(), block.hashPrevBlock[::-1].hex()
        raise CertificateError("prevblock", f"previous block {found}, but the header's is {expected}")


def check_totals(certificate: Certificate) -> None:
    """Rule bad-traincert-totals."""
    no_root = certificate.contributions_root == bytes(32)
    no_weight = certificate.contributions_weight == 0
    no_count = certificate.contributions_count == 0
    if not no_root == no_weight == no_count:
        raise CertificateError(
            "totals",
            f"{certificate.contributions_count} contributions of total weight {certificate.contributions_weight}, "
            f"and a root that is {'' if no_root else 'not '}zero",
        )


def check_coordinator_signatures(certificate: Certificate, keys: TrainingKeys, chain_id: bytes) -> None:
    """Rule bad-traincert-coordinator-sig."""
    indices = [each.key_index for each in certificate.coordinator_signatures]
    if len(indices) != keys.threshold:
        raise CertificateError("coordinator-sig", f"{len(indices)} signatures, expected {keys.threshold}")
    if indices != sorted(set(indices)) or indices[-1] >= len(keys.keys):
        raise CertificateError("coordinator-sig", f"key indices {indices} of {len(keys.keys)} keys")
    message = certificate.sighash(chain_id)
    for each in certificate.coordinator_signatures:
        if not verify_schnorr(keys.keys[each.key_index], message, each.signature):
            raise CertificateError("coordinator-sig", f"signature of key {each.key_index} does not verify")


def check_winner_signature(payload: Payload, block: CBlock, chain_id: bytes) -> None:
    """Rule bad-traincert-winner-sig."""
    message = winner_sighash(block, payload.output, chain_id)
    if not verify_schnorr(payload.certificate.winner_key, message, payload.winner_signature):
        raise CertificateError("winner-sig", "the winner's signature does not verify")


def check_training_certificate(block: CBlock, height: int, params: TrainingParams) -> Payload:
    """Check the block alone: all that its certificate must fulfil by itself. Returns the payload.

    Raises CertificateError for the first rule that does not hold.
    """
    payload = read_training_payload(block.vtx[0])
    certificate = payload.certificate
    check_height(certificate, height)
    check_prev_block(certificate, block)
    check_totals(certificate)
    check_coordinator_signatures(certificate, params.keys_at(height), params.chain_id)
    check_winner_signature(payload, block, params.chain_id)
    return payload


def check_award(certificate: Certificate, parent: Certificate | None) -> None:
    """Rule bad-traincert-award."""
    table_weight = parent.contributions_weight if parent else 0
    if (certificate.draw is not None) != (table_weight > 0):
        raise CertificateError("award", f"{certificate.award}, but the parent's table has weight {table_weight}")


def check_weight(draw: Draw) -> None:
    """Rule bad-traincert-weight."""
    if draw.weight < 1 or draw.weight != contribution_weight(draw.params, draw.loss_reduction):
        raise CertificateError("weight", f"{draw.weight} is not the weight of {draw.params} and {draw.loss_reduction}")


def check_draw(certificate: Certificate, draw: Draw, parent: Certificate) -> None:
    """Rule bad-traincert-draw."""
    leaf = leaf_node(draw.leaf(certificate.winner_key))
    path = follow_path(leaf, draw.index, parent.contributions_count, draw.siblings)
    if path is None or path[0] != (parent.contributions_root, parent.contributions_weight):
        raise CertificateError("draw", "the path does not end at the parent's root and total weight")
    ticket = draw_ticket(
        certificate.beacon_reveal, certificate.prev_block, certificate.round, parent.contributions_weight
    )
    start = path[1]
    if not start <= ticket < start + draw.weight:
        raise CertificateError("draw", f"ticket {ticket} is not among the {draw.weight} from {start} on")


def check_beacon(certificate: Certificate, parent: Certificate | None, params: TrainingParams) -> None:
    """Rule bad-traincert-beacon."""
    beacon = hashlib.sha256(certificate.beacon_reveal).digest()
    expected = parent.beacon_reveal if parent else params.beacon
    if beacon != expected:
        raise CertificateError("beacon", f"the reveal's hash is {beacon.hex()}, expected {expected.hex()}")


def check_model(certificate: Certificate, parent: Certificate | None, params: TrainingParams) -> None:
    """Rule bad-traincert-model."""
    expected = parent.model_after if parent else params.model
    if certificate.model_before != expected:
        raise CertificateError(
            "model", f"starts from model {certificate.model_before.hex()}, expected {expected.hex()}"
        )


def check_round(certificate: Certificate, time: int, parent_time: int, params: TrainingParams) -> None:
    """Rule bad-traincert-round."""
    earliest = parent_time + certificate.round * params.round_seconds
    if certificate.round and time < earliest:
        raise CertificateError("round", f"round {certificate.round} at time {time}, allowed from {earliest} on")


def contextual_check_training_certificate(
    certificate: Certificate, parent: Certificate | None, time: int, parent_time: int, params: TrainingParams
) -> None:
    """Check a block with its parent: the draw is fair, beacon and lineage are unbroken, no redraw came too early.

    `parent` is the parent's certificate, None at the start height. `time` and `parent_time` are the nTime of the two
    blocks.

    Raises CertificateError for the first rule that does not hold.
    """
    check_award(certificate, parent)
    if parent and certificate.draw:
        check_weight(certificate.draw)
        check_draw(certificate, certificate.draw, parent)
    check_beacon(certificate, parent, params)
    check_model(certificate, parent, params)
    check_round(certificate, time, parent_time, params)
