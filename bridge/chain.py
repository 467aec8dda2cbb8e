"""Reading a training chain back from any node, and checking all of it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitcoin.core import CBlock

from traincert.bridge.consensus.beacon import check_reveal
from traincert.bridge.consensus.block import check_block
from traincert.bridge.consensus.certificate import Certificate, Draw
from traincert.bridge.consensus.lottery import contribution_weight, draw_ticket, follow_path, leaf_node
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.errors import CertificateError
from traincert.bridge.rpc import NodeClient


@dataclass(frozen=True)
class CertifiedBlock:
    """A block with a valid certificate; `hash` is as RPC shows it."""

    hash: str
    block: CBlock
    certificate: Certificate
    winner_signature: bytes


def certificate_json(block: CertifiedBlock) -> dict[str, Any]:
    """Return a block's certificate as the node's gettrainingcertificate does."""
    shown: dict[str, Any] = {"blockhash": block.hash}
    for name, value in vars(block.certificate).items():
        shown[name] = value.hex() if isinstance(value, bytes) else value
    shown["prev_block"] = block.certificate.prev_block[::-1].hex()
    shown["award"] = block.certificate.award
    shown["coordinator_signatures"] = [
        {"key_index": each.key_index, "signature": each.signature.hex()}
        for each in block.certificate.coordinator_signatures
    ]
    draw = shown.pop("draw")
    if draw:
        siblings = [{"hash": node.hash.hex(), "sum": node.sum} for node in draw.siblings]
        shown["draw"] = {**vars(draw), "update_hash": draw.update_hash.hex(), "siblings": siblings}
    shown["winner_signature"] = block.winner_signature.hex()
    return shown


def read_params(node: NodeClient) -> TrainingParams:
    """Return the parameters of the training network that a node is on.

    Raises NodeCallError if it is on none.
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


def read_chain(node: NodeClient, params: TrainingParams) -> list[CertifiedBlock]:
    """Read all blocks from the start height to the tip, and check every rule of SPEC.md on each.

    Raises CertificateError for the first rule that does not hold.
    """
    chain: list[CertifiedBlock] = []
    before = node.call("getblockheader", node.call("getblockhash", params.start_height - 1))
    parent_time: int = before["time"]
    for height in range(params.start_height, node.call("getblockcount") + 1):
        block_hash: str = node.call("getblockhash", height)
        block = CBlock.deserialize(bytes.fromhex(node.call("getblock", block_hash, 0)))
        payload = check_block(block, height, params)
        certificate = payload.certificate
        check_with_parent(certificate, chain[-1].certificate if chain else None, params)
        check_round(certificate, block.nTime, parent_time, params)
        parent_time = block.nTime
        chain.append(CertifiedBlock(block_hash, block, certificate, payload.winner_signature))
    return chain


def check_with_parent(certificate: Certificate, parent: Certificate | None, params: TrainingParams) -> None:
    """Check a fair draw and an unbroken lineage; `parent` is None at the start height.

    Raises CertificateError: -award, -weight, -draw, -beacon or -model.
    """
    table_weight = parent.contributions_weight if parent else 0
    if (certificate.draw is not None) != (table_weight > 0):
        raise CertificateError("award", f"{certificate.award}, but the parent's table has weight {table_weight}")
    if parent and certificate.draw:
        _check_draw(certificate, certificate.draw, parent)
    if not check_reveal(certificate.beacon_reveal, parent.beacon_reveal if parent else params.beacon):
        raise CertificateError("beacon", f"{certificate.beacon_reveal.hex()} is not the preimage of the one before")
    model = parent.model_after if parent else params.model
    if certificate.model_before != model:
        raise CertificateError("model", f"starts from {certificate.model_before.hex()}, expected {model.hex()}")


def check_round(certificate: Certificate, time: int, parent_time: int, params: TrainingParams) -> None:
    """Check that a slot was not redrawn too early, by the nTime of its block and of the parent.

    Raises CertificateError: -round.
    """
    earliest = parent_time + certificate.round * params.round_seconds
    if certificate.round and time < earliest:
        raise CertificateError("round", f"round {certificate.round} at {time}, allowed from {earliest} on")


def _check_draw(certificate: Certificate, draw: Draw, parent: Certificate) -> None:
    leaf = draw.leaf(certificate.winner_key)
    if leaf.weight < 1 or leaf.weight != contribution_weight(leaf.params, leaf.loss_reduction):
        raise CertificateError("weight", f"{leaf.weight} is not the weight of {leaf.params} and {leaf.loss_reduction}")
    path = follow_path(leaf_node(leaf), draw.index, parent.contributions_count, draw.siblings)
    if path is None or path[0] != (parent.contributions_root, parent.contributions_weight):
        raise CertificateError("draw", "the path does not end at the parent's root and total weight")
    ticket = draw_ticket(
        certificate.beacon_reveal, certificate.prev_block, certificate.round, parent.contributions_weight
    )
    start = path[1]
    if not start <= ticket < start + leaf.weight:
        raise CertificateError("draw", f"ticket {ticket} is not in [{start}, {start + leaf.weight})")
