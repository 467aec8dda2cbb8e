"""The training certificate: its fields, its bytes, and what is signed (SPEC.md, "The certificate").

The node's side is bitcoind-patch/src/training/certificate.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from traincert.bridge.consensus.codec import Reader, compact_size, encode_b32, encode_bytes, encode_uint, tagged_hash
from traincert.bridge.consensus.lottery import ContributionTable, Leaf, TreeNode, draw_ticket
from traincert.bridge.errors import CertificateError

VERSION = 1
SIGNATURE_SIZE = 64
"""Bytes of a BIP340 signature."""


@dataclass(frozen=True)
class Draw:
    """The winner's leaf in the parent's table, and the path from it to the root.

    The leaf's miner_key is the certificate's winner_key. `siblings` go from the leaf to the root.
    """

    update_hash: bytes
    params: int
    loss_reduction: int
    weight: int
    index: int
    siblings: tuple[TreeNode, ...]

    def leaf(self, winner_key: bytes) -> Leaf:
        """Return the leaf that was drawn."""
        return Leaf(winner_key, self.update_hash, self.params, self.loss_reduction, self.weight)


def draw_winner(table: ContributionTable, beacon_reveal: bytes, prev_block: bytes, round_: int) -> tuple[bytes, Draw]:
    """Return the key of the miner that wins a round of a slot, and the miner's place in the parent's table.

    `table` is the parent's and must not be empty; `prev_block` is in header byte order.
    """
    return draw_of(table, table.find(draw_ticket(beacon_reveal, prev_block, round_, table.weight)))


def draw_of(table: ContributionTable, index: int) -> tuple[bytes, Draw]:
    """Return the miner's key of a table's leaf, and the leaf's place in the table."""
    leaf = table.leaves[index]
    draw = Draw(leaf.update_hash, leaf.params, leaf.loss_reduction, leaf.weight, index, table.path(index))
    return leaf.miner_key, draw


@dataclass(frozen=True)
class CoordinatorSignature:
    """A BIP340 signature (64 bytes) and the position of its key among those in force."""

    key_index: int
    signature: bytes


# The fields before the award, in the order of their bytes: an integer has its length in bytes, a hash has 0.
_FIELDS: Mapping[str, int] = {
    "version": 1,
    "height": 4,
    "prev_block": 0,
    "round": 2,
    "beacon_reveal": 0,
    "model_before": 0,
    "model_after": 0,
    "dataset_root": 0,
    "record": 0,
    "loss_before": 8,
    "loss_after": 8,
    "params_trained": 8,
    "contributions_root": 0,
    "contributions_weight": 8,
    "contributions_count": 4,
    "winner_key": 0,
}


@dataclass(frozen=True)
class Certificate:
    """A training certificate. Hashes and keys are 32 bytes, prev_block in header byte order, losses in nano-nats.

    `draw` is the winner's place in the parent's table, or None if the coordinator appointed it (award 0).
    """

    height: int
    prev_block: bytes
    beacon_reveal: bytes
    model_before: bytes
    model_after: bytes
    dataset_root: bytes
    record: bytes
    loss_before: int
    loss_after: int
    params_trained: int
    contributions_root: bytes
    contributions_weight: int
    contributions_count: int
    winner_key: bytes
    draw: Draw | None
    round: int = 0
    version: int = VERSION
    coordinator_signatures: tuple[CoordinatorSignature, ...] = ()

    @property
    def award(self) -> str:
        """`drawn` or `appointed`."""
        return "drawn" if self.draw else "appointed"

    def body(self) -> bytes:
        """Return the bytes before the coordinator's signatures. Raises EncodingError if a field does not fit."""
        parts = [_encode(name, getattr(self, name), length) for name, length in _FIELDS.items()]
        parts.append(b"\x01" if self.draw else b"\x00")
        if self.draw:
            parts.append(encode_b32("draw: update_hash", self.draw.update_hash))
            for name in ("params", "loss_reduction", "weight"):
                parts.append(encode_uint(f"draw: {name}", getattr(self.draw, name), 8))
            parts += [encode_uint("draw: index", self.draw.index, 4), compact_size(len(self.draw.siblings))]
            parts += [node.serialize() for node in self.draw.siblings]
        return b"".join(parts)

    def serialize(self) -> bytes:
        """Return the whole certificate's bytes. Raises EncodingError if a field does not fit."""
        parts = [self.body(), compact_size(len(self.coordinator_signatures))]
        for each in self.coordinator_signatures:
            parts.append(encode_uint("coordinator_signatures: key_index", each.key_index, 1))
            parts.append(encode_bytes("coordinator_signatures: signature", each.signature, SIGNATURE_SIZE))
        return b"".join(parts)

    @classmethod
    def read(cls, reader: Reader) -> Certificate:
        """Read a certificate from the front of some bytes.

        Raises CertificateError: -version for another version than 1, -parse for malformed bytes.
        """
        if reader.left() and reader.data[reader.position] != VERSION:
            raise CertificateError("version", f"version {reader.data[reader.position]}, expected {VERSION}")
        try:
            fields: dict[str, Any] = {name: _decode(reader, length) for name, length in _FIELDS.items()}
            award = reader.uint(1)
            if award > 1:
                raise ValueError(f"award is {award}, neither 0 nor 1")
            fields["draw"] = _read_draw(reader) if award else None
            signatures = tuple(
                CoordinatorSignature(reader.uint(1), reader.take(SIGNATURE_SIZE)) for _ in range(reader.compact_size())
            )
        except ValueError as error:
            raise CertificateError("parse", str(error)) from None
        return cls(**fields, coordinator_signatures=signatures)

    def sighash(self, chain_id: bytes) -> bytes:
        """Return the 32 bytes that the coordinator's keys sign."""
        return tagged_hash("traincert/certificate", chain_id + self.body())


def new_certificate(
    *,
    height: int,
    prev_block: bytes,
    round_: int,
    beacon_reveal: bytes,
    model_before: bytes,
    model_after: bytes,
    dataset_root: bytes,
    record: bytes,
    losses: tuple[int, int],
    table: ContributionTable,
    winner: tuple[bytes, Draw | None],
) -> Certificate:
    """Return the unsigned certificate of a slot's round, for a cycle with this table of contributions.

    `record` is the SHA-256 of the cycle's record, 32 bytes; zeros if nothing was trained. `losses` are those before and
    after the cycle, in nano-nats. `winner` is what `draw_winner` gives, or the key of the miner that the coordinator
    appoints, and None.
    """
    winner_key, draw = winner
    return Certificate(
        height=height,
        prev_block=prev_block,
        round=round_,
        beacon_reveal=beacon_reveal,
        model_before=model_before,
        model_after=model_after,
        dataset_root=dataset_root,
        record=record,
        loss_before=losses[0],
        loss_after=losses[1],
        params_trained=sum(leaf.params for leaf in table.leaves),
        contributions_root=table.root,
        contributions_weight=table.weight,
        contributions_count=table.count,
        winner_key=winner_key,
        draw=draw,
    )


def _encode(name: str, value: Any, length: int) -> bytes:
    return encode_uint(name, value, length) if length else encode_b32(name, value)


def _decode(reader: Reader, length: int) -> int | bytes:
    return reader.uint(length) if length else reader.take(32)


def _read_draw(reader: Reader) -> Draw:
    update_hash = reader.take(32)
    params, loss_reduction, weight = (reader.uint(8) for _ in range(3))
    index = reader.uint(4)
    siblings = tuple(TreeNode(reader.take(32), reader.uint(8)) for _ in range(reader.compact_size()))
    return Draw(update_hash, params, loss_reduction, weight, index, siblings)
