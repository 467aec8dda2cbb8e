"""The training certificate: fields, serialization, signing and verifying.

The rules are those of SPEC.md; the node's side is bitcoind-patch/src/training/certificate.h and validation.cpp.
No network, clock or files here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from coincurve import PrivateKey

from traincert.bridge.consensus.codec import Reader, compact_size, tagged_hash, verify_schnorr
from traincert.bridge.consensus.lottery import ContributionTable, Leaf, Node, draw_ticket
from traincert.bridge.consensus.params import TrainingKeys
from traincert.bridge.errors import CertificateError

VERSION = 1


@dataclass(frozen=True)
class Draw:
    """The winner's leaf in the parent's table (its miner_key is the certificate's winner_key), and its path."""

    update_hash: bytes
    params: int
    loss_reduction: int
    weight: int
    index: int
    siblings: tuple[Node, ...]

    def leaf(self, winner_key: bytes) -> Leaf:
        """Return the leaf that was drawn."""
        return Leaf(winner_key, self.update_hash, self.params, self.loss_reduction, self.weight)


def draw_winner(table: ContributionTable, beacon_reveal: bytes, prev_block: bytes, round_: int) -> tuple[bytes, Draw]:
    """Return the key of the miner that wins a slot's round, and its place in the parent's table, which has leaves."""
    return draw_of(table, table.find(draw_ticket(beacon_reveal, prev_block, round_, table.weight)))


def draw_of(table: ContributionTable, index: int) -> tuple[bytes, Draw]:
    """Return the key of the miner of a leaf, and the leaf's place in the table."""
    leaf = table.leaves[index]
    draw = Draw(leaf.update_hash, leaf.params, leaf.loss_reduction, leaf.weight, index, table.path(index))
    return leaf.miner_key, draw


@dataclass(frozen=True)
class CoordinatorSignature:
    """A BIP340 signature (64 bytes) and the position of its key among those in force."""

    key_index: int
    signature: bytes


# Integer fields before the award by their length in bytes, hashes by 0; in the order of their serialization.
_FIELDS: Mapping[str, int] = {
    "version": 1,
    "height": 4,
    "prev_block": 0,
    "round": 2,
    "beacon_reveal": 0,
    "model_before": 0,
    "model_after": 0,
    "dataset_root": 0,
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
        """Serialize everything before the coordinator's signatures."""
        parts = [_encode(getattr(self, name), length) for name, length in _FIELDS.items()]
        parts.append(b"\x01" if self.draw else b"\x00")
        if self.draw:
            draw = self.draw
            parts.append(draw.update_hash)
            parts += [number.to_bytes(8, "little") for number in (draw.params, draw.loss_reduction, draw.weight)]
            parts += [draw.index.to_bytes(4, "little"), compact_size(len(draw.siblings))]
            parts += [node.hash + node.sum.to_bytes(8, "little") for node in draw.siblings]
        return b"".join(parts)

    def serialize(self) -> bytes:
        """Serialize the certificate."""
        signatures = [s.key_index.to_bytes(1, "little") + s.signature for s in self.coordinator_signatures]
        return self.body() + compact_size(len(signatures)) + b"".join(signatures)

    @classmethod
    def read(cls, reader: Reader) -> Certificate:
        """Read a certificate.

        Raises CertificateError: -version for any other than version 1, -parse for what is malformed.
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
                CoordinatorSignature(reader.uint(1), reader.take(64)) for _ in range(reader.compact_size())
            )
        except ValueError as error:
            raise CertificateError("parse", str(error)) from None
        return cls(**fields, coordinator_signatures=signatures)

    def sighash(self, chain_id: bytes) -> bytes:
        """Return the 32 bytes that the coordinator's keys sign."""
        return tagged_hash("traincert/certificate", chain_id + self.body())

    def sign(self, chain_id: bytes, secrets: Mapping[int, PrivateKey]) -> Certificate:
        """Return the certificate with the signatures of `secrets`, by their position among the keys in force."""
        message = self.sighash(chain_id)
        signatures = tuple(CoordinatorSignature(i, secrets[i].sign_schnorr(message)) for i in sorted(secrets))
        return replace(self, coordinator_signatures=signatures)

    def check_signatures(self, chain_id: bytes, keys: TrainingKeys) -> None:
        """Raise CertificateError unless exactly the threshold of `keys` signed, in ascending order."""
        indices = [each.key_index for each in self.coordinator_signatures]
        if len(indices) != keys.threshold:
            raise CertificateError("coordinator-sig", f"{len(indices)} signatures, expected {keys.threshold}")
        if indices != sorted(set(indices)) or indices[-1] >= len(keys.keys):
            raise CertificateError("coordinator-sig", f"key indices {indices} of {len(keys.keys)} keys")
        message = self.sighash(chain_id)
        for each in self.coordinator_signatures:
            if not verify_schnorr(keys.keys[each.key_index], message, each.signature):
                raise CertificateError("coordinator-sig", f"signature of key {each.key_index} does not verify")


def _encode(value: int | bytes, length: int) -> bytes:
    return value.to_bytes(length, "little") if isinstance(value, int) else value


def _decode(reader: Reader, length: int) -> int | bytes:
    return reader.uint(length) if length else reader.take(32)


def _read_draw(reader: Reader) -> Draw:
    update_hash = reader.take(32)
    params, loss_reduction, weight = (reader.uint(8) for _ in range(3))
    index = reader.uint(4)
    siblings = tuple(Node(reader.take(32), reader.uint(8)) for _ in range(reader.compact_size()))
    return Draw(update_hash, params, loss_reduction, weight, index, siblings)
