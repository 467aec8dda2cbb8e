"""A miner that won: builds, signs and submits its block to its own node."""

from __future__ import annotations

from bitcoin.core import b2lx
from coincurve import PrivateKey

from traincert.bridge.block import build_block
from traincert.bridge.certificate import Certificate
from traincert.bridge.errors import BridgeError
from traincert.bridge.node import NodeClient

CATCH_UP_TIME = 30.0  # seconds for the node to hear of the block before


class Producer:
    """A miner's key, the node that it trusts, and the scriptPubKey that it is paid to."""

    def __init__(self, secret: bytes, node: NodeClient, payout_script: bytes) -> None:
        self._key = PrivateKey(secret)
        self.miner_key: bytes = self._key.public_key_xonly.format()
        self.node = node
        self.payout_script = payout_script

    def produce(self, certificate: Certificate, chain_id: bytes) -> str:
        """Append the block that a certificate allows, and return its hash as RPC shows it.

        Raises BridgeError if the certificate is another miner's, if the node does not have the block before, or if it
        refuses the new one, with the node's reason.
        """
        if certificate.winner_key != self.miner_key:
            raise BridgeError(f"the certificate for block {certificate.height} is for another miner")
        before = b2lx(certificate.prev_block)
        if not self.node.wait_for_block(before, CATCH_UP_TIME):
            raise BridgeError(f"{self.node.name} did not get block {before} within {CATCH_UP_TIME:g} s")
        template = self.node.call("getblocktemplate", {"rules": ["segwit", "training"]})
        block = build_block(template, certificate, self.payout_script, chain_id, self._key.sign_schnorr)
        block_hash: str = b2lx(block.GetHash())
        answer = self.node.call("submitblock", block.serialize().hex())
        if answer not in (None, "duplicate"):
            raise BridgeError(f"{self.node.name} refused block {certificate.height} {block_hash}: {answer}")
        return block_hash
