"""What the explorer keeps of a block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bitcoin.core import CBlock

from traincert.bridge.chain import certificate_fields
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.rules import read_training_payload
from traincert.bridge.errors import CertificateError
from traincert.bridge.rpc import NodeClient
from traincert.regtest.errors import RpcError

_RPC_MISC_ERROR = -1  # of getblock: the node has pruned the block
_MOST_READ = 200  # blocks in one go, so that others' questions are answered between


@dataclass(frozen=True)
class BlockFacts:
    """A block. Hashes are in hex as RPC shows them.

    Of a block that its node has pruned, `size` is None, and only the header is known. `certificate` is without siblings
    and signatures; None: the block carries none. `scripts` are the scriptPubKeys that its transactions pay to.
    """

    hash: str
    height: int
    previous: str
    time: int
    transactions: int
    size: int | None
    certificate: Certificate | None
    txids: tuple[str, ...]
    scripts: frozenset[bytes]

    def json(self) -> dict[str, Any]:
        """Return the block as the API has it, with the names of the RPC."""
        certificate = None
        if self.certificate:
            certificate = certificate_fields(self.certificate)
            del certificate["coordinator_signatures"]
            if "draw" in certificate:
                del certificate["draw"]["siblings"]
        return {
            "height": self.height,
            "hash": self.hash,
            "previousblockhash": self.previous,
            "time": self.time,
            "nTx": self.transactions,
            "size": self.size,
            "certificate": certificate,
        }


def read_facts(raw: bytes, height: int) -> BlockFacts:
    """Read a block's bytes."""
    block = CBlock.deserialize(raw)
    certificate: Certificate | None
    try:
        certificate = read_training_payload(block.vtx[0]).certificate
    except CertificateError:
        certificate = None
    else:
        draw = certificate.draw and replace(certificate.draw, siblings=())
        certificate = replace(certificate, draw=draw, coordinator_signatures=())
    return BlockFacts(
        hash=block.GetHash()[::-1].hex(),
        height=height,
        previous=block.hashPrevBlock[::-1].hex(),
        time=block.nTime,
        transactions=len(block.vtx),
        size=len(raw),
        certificate=certificate,
        txids=tuple(tx.GetTxid()[::-1].hex() for tx in block.vtx),
        scripts=frozenset(bytes(out.scriptPubKey) for tx in block.vtx for out in tx.vout if out.nValue),
    )


def read_branch(node: NodeClient, tip: str, height: int, known: dict[str, BlockFacts]) -> list[BlockFacts]:
    """Read blocks from one of them back, until one is known or the genesis block is read, but not too many at once.

    Raises RpcError and NodeUnreachableError.
    """
    branch: list[BlockFacts] = []
    while height >= 0 and tip not in known and len(branch) < _MOST_READ:
        branch.append(_read(node, tip, height))
        tip, height = branch[-1].previous, height - 1
    return branch


def _read(node: NodeClient, block_hash: str, height: int) -> BlockFacts:
    try:
        return read_facts(bytes.fromhex(node.call("getblock", block_hash, 0)), height)
    except RpcError as error:
        if error.code != _RPC_MISC_ERROR:
            raise
    header = node.call("getblockheader", block_hash)
    previous = header.get("previousblockhash", "00" * 32)
    return BlockFacts(block_hash, height, previous, header["time"], header["nTx"], None, None, (), frozenset())
