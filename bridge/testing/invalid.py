"""Invalid blocks: ways to break each rule, each as one change to a valid block.

The tests of the rules use them. Tests of other software can too, see `TrainingNetwork.append_invalid`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bitcoin.core import CBlock, CMutableTransaction, CTxOut
from bitcoin.core.script import OP_RETURN, CScript
from coincurve import PrivateKey

from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.block import PAYLOAD_MAGIC, payload_script, winner_sighash
from traincert.bridge.consensus.certificate import (
    SIGNATURE_SIZE,
    Certificate,
    CoordinatorSignature,
    Draw,
    draw_of,
    draw_winner,
)
from traincert.bridge.consensus.codec import U64_MAX
from traincert.bridge.consensus.lottery import ContributionTable, TreeNode
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.errors import BridgeError

AUX = bytes(32)  # BIP340's auxiliary bytes; fixed, so that making the vectors again gives the same bytes
PREFIX = "bad-traincert-"


def digest(name: str) -> bytes:
    """Return 32 bytes for a name: a made-up hash, or a secret key that is not secret."""
    return hashlib.sha256(name.encode()).digest()


@dataclass(frozen=True)
class Forger:
    """All secrets of a network, and the tables of a slot: enough to make a block that is wrong in just one thing.

    `coordinators` are all secret keys in force; two of them sign. `miners` are the miners' secret keys by public key.
    The winner is drawn from `parent_table`; the block itself commits to `table`.
    """

    params: TrainingParams
    coordinators: Sequence[PrivateKey]
    miners: Mapping[bytes, PrivateKey]
    beacon: Beacon
    parent_table: ContributionTable
    table: ContributionTable

    def sign(self, certificate: Certificate, signers: Sequence[int] | None = None) -> Certificate:
        """Sign a certificate, by default with the keys that have signed it. Without a journal: for tests only."""
        if signers is None:
            signers = [each.key_index for each in certificate.coordinator_signatures]
        message = certificate.sighash(self.params.chain_id)
        signatures = (CoordinatorSignature(i, self.coordinators[i].sign_schnorr(message, AUX)) for i in signers)
        return replace(certificate, coordinator_signatures=tuple(signatures))

    def draw(self, beacon_reveal: bytes, prev_block: bytes, round_: int) -> tuple[bytes, Draw | None]:
        """Return the winner's key, and its place in the parent's table; None as the place if that table is empty."""
        if not self.parent_table.count:
            return next(iter(self.miners)), None
        return draw_winner(self.parent_table, beacon_reveal, prev_block, round_)


def with_scripts(block: CBlock, *scripts: bytes) -> CBlock:
    """Return the block with other outputs instead of the coinbase's last one, which holds the payload."""
    coinbase = CMutableTransaction.from_tx(block.vtx[0])
    coinbase.vout[-1:] = [CTxOut(0, CScript(script)) for script in scripts]
    vtx = [coinbase, *block.vtx[1:]]
    return CBlock(
        block.nVersion, block.hashPrevBlock, nTime=block.nTime, nBits=block.nBits, nNonce=block.nNonce, vtx=vtx
    )


def payload_of(block: CBlock) -> bytes:
    """Return the payload, from the coinbase's last output."""
    push: bytes = list(block.vtx[0].vout[-1].scriptPubKey)[1]
    return push


def with_certificate(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
    """Return the block with another certificate, signed by that certificate's winner."""
    payload = PAYLOAD_MAGIC + certificate.serialize()
    blank = with_scripts(block, payload_script(payload + bytes(SIGNATURE_SIZE)))
    message = winner_sighash(blank, len(blank.vtx[0].vout) - 1, forger.params.chain_id)
    return with_scripts(
        block, payload_script(payload + forger.miners[certificate.winner_key].sign_schnorr(message, AUX))
    )


Change = Callable[[Forger, CBlock, Certificate], CBlock]
"""Makes a valid block, whose certificate is given too, wrong in one thing."""


def _edit(**changes: Any) -> Change:
    """Change fields, and sign as coordinator and winner as if they were right."""
    return lambda forger, block, cert: with_certificate(forger, block, forger.sign(replace(cert, **changes)))


def _sign(*signers: int) -> Change:
    return lambda forger, block, cert: with_certificate(forger, block, forger.sign(cert, signers))


def _payload(change: Callable[[bytes], bytes]) -> Change:
    return lambda _, block, __: with_scripts(block, payload_script(change(payload_of(block))))


def _script(change: Callable[[bytes], Sequence[bytes]]) -> Change:
    return lambda _, block, __: with_scripts(block, *change(payload_of(block)))


def _pushdata4(payload: bytes) -> bytes:
    return bytes([OP_RETURN, 0x4E]) + len(payload).to_bytes(4, "little") + payload


def _long_count(_: Forger, block: CBlock, certificate: Certificate) -> CBlock:
    """Write the number of coordinator signatures as a CompactSize of three bytes, not one."""
    at = len(PAYLOAD_MAGIC + certificate.body())
    payload = payload_of(block)
    return with_scripts(block, payload_script(payload[:at] + b"\xfd\x02\x00" + payload[at + 1 :]))


def _other_winner(forger: Forger, block: CBlock, _: Certificate) -> CBlock:
    payload = payload_of(block)
    message = winner_sighash(block, len(block.vtx[0].vout) - 1, forger.params.chain_id)
    return with_scripts(
        block, payload_script(payload[:-SIGNATURE_SIZE] + forger.coordinators[0].sign_schnorr(message, AUX))
    )


def _other_time(_: Forger, block: CBlock, __: Certificate) -> CBlock:
    return CBlock(
        block.nVersion, block.hashPrevBlock, nTime=block.nTime + 1, nBits=block.nBits, nNonce=0, vtx=block.vtx
    )


def _swapped_signatures(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
    swapped = certificate.coordinator_signatures[::-1]
    return with_certificate(forger, block, replace(certificate, coordinator_signatures=swapped))


def _second_signature_as(key_index: int) -> Change:
    def change(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
        first, second = certificate.coordinator_signatures
        signatures = (first, replace(second, key_index=key_index))
        return with_certificate(forger, block, replace(certificate, coordinator_signatures=signatures))

    return change


def _other_chain(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
    other = replace(forger, params=replace(forger.params, beacon=Beacon(digest("another beacon")).anchor))
    return with_certificate(forger, block, other.sign(certificate))


def _other_height(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
    # the vectors are of height 3: this gives 1000
    return _edit(height=certificate.height + 997)(forger, block, certificate)


WRONG: dict[str, dict[str, Change]] = {
    "bad-traincert-missing": {
        "no payload": _script(lambda _: []),
        "another magic": _payload(lambda payload: b"TCRX" + payload[4:]),
        "a push that the script cuts short": _script(lambda payload: [payload_script(payload)[:-1]]),
    },
    "bad-traincert-multiple": {"the payload twice": _script(lambda payload: [payload_script(payload)] * 2)},
    "bad-traincert-parse": {
        "nothing after the magic": _payload(lambda payload: payload[:4]),
        "a byte short": _payload(lambda payload: payload[:-1]),
        "a byte too many": _payload(lambda payload: payload + b"\x00"),
        "an award of 2": lambda _, block, cert: with_scripts(
            block, payload_script(payload_of(block).replace(cert.winner_key + b"\x01", cert.winner_key + b"\x02"))
        ),
        "a push that is not minimal": _script(lambda payload: [_pushdata4(payload)]),
        "an opcode after the push": _script(lambda payload: [payload_script(payload) + b"\x51"]),
        "a CompactSize that is not the shortest": _long_count,
    },
    "bad-traincert-version": {"version 2": _edit(version=2), "version 0": _edit(version=0)},
    "bad-traincert-height": {"the next height": _other_height},
    "bad-traincert-prevblock": {"another previous block": _edit(prev_block=digest("another block"))},
    "bad-traincert-totals": {
        "no count": _edit(contributions_count=0),
        "no weight": _edit(contributions_weight=0),
        "no root": _edit(contributions_root=bytes(32)),
        "a root alone": _edit(contributions_weight=0, contributions_count=0),
    },
    "bad-traincert-coordinator-sig": {
        "none": _sign(),
        "one of two": _sign(0),
        "three of two": _sign(0, 1, 2),
        "the same key twice": _sign(0, 0),
        "descending order": _swapped_signatures,
        "a key that is not there": _second_signature_as(3),
        "another key's signature": _second_signature_as(1),
        "another certificate": lambda forger, block, cert: with_certificate(
            forger, block, replace(cert, loss_after=cert.loss_after - 1)
        ),
        "another network": _other_chain,
    },
    "bad-traincert-winner-sig": {
        "another key's": _other_winner,
        "another block's": _other_time,
        "zeros": _payload(lambda payload: payload[:-SIGNATURE_SIZE] + bytes(SIGNATURE_SIZE)),
    },
}
"""Reason → ways to earn it, each a change to a valid block; all that a block alone can be wrong in."""


def _edit_draw(change: Callable[[Draw], Draw]) -> Change:
    def edit(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
        if certificate.draw is None:
            raise BridgeError(f"block {certificate.height} has no draw to be wrong in: append a table before it")
        return _edit(draw=change(certificate.draw))(forger, block, certificate)

    return edit


def _edit_sibling(change: Callable[[TreeNode], TreeNode]) -> Change:
    return _edit_draw(lambda draw: replace(draw, siblings=(change(draw.siblings[0]), *draw.siblings[1:])))


def _drawn_with(beacon_reveal: Callable[[Forger, Certificate], bytes]) -> Change:
    """Reveal another value, and take the winner that it draws."""

    def change(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
        reveal = beacon_reveal(forger, certificate)
        winner, draw = forger.draw(reveal, certificate.prev_block, certificate.round)
        return _edit(beacon_reveal=reveal, winner_key=winner, draw=draw)(forger, block, certificate)

    return change


def _in_round(round_: int) -> Change:
    """Take the winner of another round."""

    def change(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
        winner, draw = forger.draw(certificate.beacon_reveal, certificate.prev_block, round_)
        return _edit(round=round_, winner_key=winner, draw=draw)(forger, block, certificate)

    return change


def _other_rounds_winner(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
    """Take the winner of another round, but say round 0."""
    rounds = (forger.draw(certificate.beacon_reveal, certificate.prev_block, i) for i in itertools.count(1))
    winner, draw = next(each for each in rounds if each[1] != certificate.draw)
    return _edit(winner_key=winner, draw=draw)(forger, block, certificate)


def _other_tables_winner(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
    """Take the winner that a draw from the block's own table gives."""
    winner, draw = draw_winner(forger.table, certificate.beacon_reveal, certificate.prev_block, certificate.round)
    return _edit(winner_key=winner, draw=draw)(forger, block, certificate)


def _other_leafs_miner(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
    other = next(key for key in forger.miners if key != certificate.winner_key)
    return _edit(winner_key=other)(forger, block, certificate)


def _beyond_table(forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
    count = forger.parent_table.count
    return _edit_draw(lambda draw: replace(draw, index=draw.index + count))(forger, block, certificate)


WRONG_WITH_PARENT: dict[str, dict[str, Change]] = {
    "bad-traincert-award": {"appointed where it must be drawn": _edit(draw=None)},
    "bad-traincert-weight": {
        "one too many": _edit_draw(lambda draw: replace(draw, weight=draw.weight + 1)),
        "one too few": _edit_draw(lambda draw: replace(draw, weight=draw.weight - 1)),
        "zero, by the formula": _edit_draw(lambda draw: replace(draw, params=0, weight=0)),
        "the greatest": _edit_draw(lambda draw: replace(draw, weight=U64_MAX)),
    },
    "bad-traincert-draw": {
        "who would win another round": _other_rounds_winner,
        "who would win from this cycle's table": _other_tables_winner,
        "another miner's leaf": _other_leafs_miner,
        "another update": _edit_draw(lambda draw: replace(draw, update_hash=digest("another update"))),
        "metrics of the same weight": _edit_draw(
            lambda draw: replace(draw, params=draw.loss_reduction, loss_reduction=draw.params)
        ),
        "another index": _edit_draw(lambda draw: replace(draw, index=draw.index ^ 1)),
        "an index beyond the table": _beyond_table,
        "a sibling too few": _edit_draw(lambda draw: replace(draw, siblings=draw.siblings[:-1])),
        "a sibling too many": _edit_draw(lambda draw: replace(draw, siblings=(*draw.siblings, draw.siblings[0]))),
        "siblings in another order": _edit_draw(lambda draw: replace(draw, siblings=draw.siblings[::-1])),
        "another sum": _edit_sibling(lambda node: node._replace(sum=node.sum + 1)),
        "a sum that overflows": _edit_sibling(lambda node: node._replace(sum=U64_MAX)),
        "another hash": _edit_sibling(lambda node: node._replace(hash=digest("another hash"))),
    },
    "bad-traincert-beacon": {
        "no preimage": _drawn_with(lambda _, __: digest("another reveal")),
        "the parent's again": _drawn_with(lambda _, cert: hashlib.sha256(cert.beacon_reveal).digest()),
        "the next slot's": _drawn_with(
            lambda forger, cert: forger.beacon.reveal(cert.height + 1 - forger.params.start_height),
        ),
    },
    "bad-traincert-model": {
        "another": _edit(model_before=digest("another model")),
        "the one that this cycle produced": lambda forger, block, cert: _edit(model_before=cert.model_after)(
            forger, block, cert
        ),
    },
    "bad-traincert-round": {"hours too early": _in_round(1000), "the last round": _in_round(2**16 - 1)},
}
"""The same for what it can be wrong in together with its parent; the valid block has a winner drawn in round 0."""


def full_reason(name: str) -> str:
    """Return the reason as the node says it. `name` may lack the prefix `bad-traincert-`.

    Raises BridgeError, with a list of all reasons, if there is none of this name.
    """
    reason = PREFIX + name.removeprefix(PREFIX)
    reasons = WRONG | WRONG_WITH_PARENT
    if reason not in reasons:
        raise BridgeError(f"no block is refused for {name!r}, but for: {', '.join(reasons)}")
    return reason


def break_rule(reason: str, forger: Forger, block: CBlock, certificate: Certificate) -> CBlock:
    """Return a valid block changed so that a node refuses it for the reason given.

    The block's own table must not be empty, and its nTime must be the earliest that is allowed.

    Raises BridgeError if the reason is about a draw and the parent's table is empty.
    """
    if reason == "bad-traincert-award" and certificate.draw is None:
        winner, draw = draw_of(forger.table, 0)
        return _edit(winner_key=winner, draw=draw)(forger, block, certificate)
    if reason == "bad-traincert-draw":  # the other ways need a table of two leaves
        return WRONG_WITH_PARENT[reason]["another update"](forger, block, certificate)
    return next(iter((WRONG | WRONG_WITH_PARENT)[reason].values()))(forger, block, certificate)
