"""Reading a training chain back from a node, and checking every rule on it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitcoin.core import CBlock
from bitcoin.core.serialize import SerializationError

from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.lottery import ContributionTable, Leaf
from traincert.bridge.consensus.params import GENESIS_HASH, TrainingKeys, TrainingParams
from traincert.bridge.consensus.rules import (
    check_training_certificate,
    contextual_check_training_certificate,
    read_training_payload,
)
from traincert.bridge.errors import BridgeError
from traincert.bridge.rpc import NodeClient

HEADER_SIZE = 80  # bytes
GENESIS = GENESIS_HASH[::-1].hex()
"""The hash of the genesis block, as RPC shows it."""


@dataclass(frozen=True)
class Certified:
    """What a block's payload says. `hash` is the block's, in hex as RPC shows it."""

    hash: str
    certificate: Certificate
    winner_signature: bytes


@dataclass(frozen=True)
class CertifiedBlock(Certified):
    """A block with a valid certificate."""

    block: CBlock


def certificate_fields(certificate: Certificate) -> dict[str, Any]:
    """Return a certificate as JSON, with the names and in the form of the node's gettrainingcertificate."""
    shown: dict[str, Any] = {}
    for name, value in vars(certificate).items():
        shown[name] = value.hex() if isinstance(value, bytes) else value
    shown["prev_block"] = certificate.prev_block[::-1].hex()
    shown["award"] = certificate.award
    shown["coordinator_signatures"] = [
        {"key_index": each.key_index, "signature": each.signature.hex()} for each in certificate.coordinator_signatures
    ]
    draw = shown.pop("draw")
    if draw:
        siblings = [{"hash": node.hash.hex(), "sum": node.sum} for node in draw.siblings]
        shown["draw"] = {**vars(draw), "update_hash": draw.update_hash.hex(), "siblings": siblings}
    return shown


def certificate_json(block: Certified) -> dict[str, Any]:
    """Return a block's certificate as JSON, in the form of the node's gettrainingcertificate."""
    return {
        "blockhash": block.hash,
        **certificate_fields(block.certificate),
        "winner_signature": block.winner_signature.hex(),
    }


def read_params(node: NodeClient) -> TrainingParams:
    """Return the parameters of the training network that a node is on.

    Raises RpcError if the node is on none, and NodeUnreachableError if it does not answer.
    """
    info: dict[str, Any] = node.call("gettraininginfo")
    keys = {
        entry["height"]: TrainingKeys(entry["threshold"], tuple(bytes.fromhex(key) for key in entry["keys"]))
        for entry in info["keys"]
    }
    first = min(keys)
    model = info["model"]
    if info["height"] >= first:
        model = node.call("gettrainingcertificate", first)["model_before"]
    return TrainingParams(keys, bytes.fromhex(info["beacon"]), bytes.fromhex(model), info["round_seconds"])


def check_network(node: NodeClient, params: TrainingParams) -> None:
    """Raise BridgeError if a node is on another training network. RpcError: it is on none."""
    found = read_params(node)
    if found != params:
        raise BridgeError(
            f"{node.name} is on network {found.chain_id.hex()}, not on {params.chain_id.hex()}: start it on a new data "
            "directory with the options in training.conf"
        )


def header_hash(header: bytes) -> str:
    """Return a block's hash, as RPC shows it, from its header (80 bytes)."""
    return hashlib.sha256(hashlib.sha256(header).digest()).digest()[::-1].hex()


def previous_hash(header: bytes) -> str:
    """Return the hash of the block before, as RPC shows it, from a header (80 bytes)."""
    return header[4:36][::-1].hex()


def parse_block(data: bytes) -> CBlock:
    """Return the block that some bytes are: it has transactions, but they need not be those of its Merkle root.

    Raises ValueError for any other bytes.
    """
    try:
        block = CBlock.deserialize(data)
    except SerializationError as error:
        raise ValueError(f"these bytes are no block: {error}") from None
    if not block.vtx:
        raise ValueError("the block has no transactions")
    return block


def read_certificate(node: NodeClient, block_hash: str) -> Certificate:
    """Return the certificate of a node's block, given by its hash as RPC shows it."""
    block = CBlock.deserialize(bytes.fromhex(node.call("getblock", block_hash, 0)))
    return read_training_payload(block.vtx[0]).certificate


def read_block(node: NodeClient, height: int, params: TrainingParams) -> CertifiedBlock:
    """Read the block at a height of a node's chain, and check every rule of SPEC.md that does not need its parent.

    Raises CertificateError for the first rule that does not hold, RpcError and NodeUnreachableError.
    """
    block_hash: str = node.call("getblockhash", height)
    block = CBlock.deserialize(bytes.fromhex(node.call("getblock", block_hash, 0)))
    payload = check_training_certificate(block, height, params)
    return CertifiedBlock(block_hash, payload.certificate, payload.winner_signature, block)


def check_records(chain: Iterable[Certified], params: TrainingParams, run: Path) -> None:
    """Check that each block's certificate has the hash of its cycle's record in the run folder `run`.

    Raises BridgeError for the first that does not.
    """
    for block in chain:
        record_bytes(block.certificate, params, run)


def record_bytes(certificate: Certificate, params: TrainingParams, run: Path) -> bytes:
    """Return the record of the cycle that a certificate closes, from the run folder `run`.

    Raises BridgeError if it is not there, or has another hash than the certificate.
    """
    path = run / "cycles" / f"{certificate.height - params.start_height + 1:08}.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BridgeError(f"block {certificate.height}: {path}: {error.strerror}") from None
    found = hashlib.sha256(data).digest()
    if found != certificate.record:
        raise BridgeError(
            f"block {certificate.height}: the certificate has record {certificate.record.hex()}, but {path} is "
            f"{found.hex()}"
        )
    return data


def record_table(certificate: Certificate, record: bytes) -> ContributionTable:
    """Return the table of contributions of a cycle, from its record (`record_bytes`).

    Raises BridgeError if it is not the one to which the certificate commits.
    """
    try:
        table = ContributionTable(
            Leaf(
                bytes.fromhex(task["miner"]),
                bytes.fromhex(task["update_hash"]),
                task["params"],
                task["loss_reduction"],
                task["weight"],
            )
            for task in json.loads(record)["tasks"]
            if task["refusal"] is None
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BridgeError(f"block {certificate.height}: its record is of another version: {error!r}") from None
    if table.root != certificate.contributions_root:
        raise BridgeError(f"block {certificate.height}: its record has another table of contributions")
    return table


def read_chain(node: NodeClient, params: TrainingParams) -> list[CertifiedBlock]:
    """Read all blocks from the start height to the tip, and check every rule of SPEC.md on each.

    Raises CertificateError for the first rule that does not hold, RpcError and NodeUnreachableError.
    """
    chain: list[CertifiedBlock] = []
    before = node.call("getblockheader", node.call("getblockhash", params.start_height - 1))
    parent_time: int = before["time"]
    for height in range(params.start_height, node.call("getblockcount") + 1):
        found = read_block(node, height, params)
        parent = chain[-1].certificate if chain else None
        contextual_check_training_certificate(found.certificate, parent, found.block.nTime, parent_time, params)
        parent_time = found.block.nTime
        chain.append(found)
    return chain
