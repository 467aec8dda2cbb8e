"""The producer: the miner that won, while it builds, signs and submits its block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitcoin.core import CBlock, b2lx
from coincurve import PrivateKey

from traincert.bridge.consensus.block import build_block
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.errors import BridgeError
from traincert.bridge.rpc import NodeClient, retrying

CATCH_UP_TIME = 30.0  # seconds for the node to receive the parent block, and for its clock to come to the round's time


class Producer:
    """A miner's key, and the scriptPubKey that its blocks pay to.

    Unless `compat_pow` is set to False, its blocks also meet the network's proof-of-work target, see `build_block`.
    With a `name`, its coinbases have the tag /traincert/NAME/. Nobody checks that the name is right.
    """

    def __init__(self, secret: bytes, payout_script: bytes, name: str = "") -> None:
        self._key = PrivateKey(secret)
        self.miner_key: bytes = self._key.public_key_xonly.format()
        self.payout_script = payout_script
        self.compat_pow = True
        self.tag = f"/traincert/{name}/".encode() if name else b""

    def append(
        self, node: NodeClient, template: Mapping[str, Any], certificate: Certificate, params: TrainingParams
    ) -> str:
        """Append a certificate's block to the node that gave the template, and return its hash as RPC shows it.

        Raises BridgeError if the template is for another slot, and if the node refuses the block.
        """
        block = build_block(
            template,
            certificate,
            self.payout_script,
            params.chain_id,
            self._key.sign_schnorr,
            compat_pow=self.compat_pow,
            tag=self.tag,
        )
        self.submit(node, certificate, block)
        block_hash: str = b2lx(block.GetHash())
        return block_hash

    def submit(self, node: NodeClient, certificate: Certificate, block: CBlock) -> None:
        """Submit a block to the node. Raises BridgeError, with the node's reason, if it does not become the tip."""
        answer = node.call("submitblock", block.serialize().hex())
        if answer not in (None, "duplicate"):
            refused = f"{node.name} refused block {certificate.height} {b2lx(block.GetHash())}"
            raise BridgeError(f"{refused}: {answer}")


class NodeProducer(Producer):
    """A producer with a node of its own, which it trusts: the node that runs on `datadir`."""

    def __init__(self, secret: bytes, payout_script: bytes, datadir: Path, name: str = "") -> None:
        super().__init__(secret, payout_script, name)
        self.datadir = datadir

    def produce(self, certificate: Certificate, params: TrainingParams) -> str:
        """Append the block that a certificate allows, and return its hash as RPC shows it.

        Raises BridgeError if the certificate is another miner's or another network's, or if the node lacks the parent
        block, has another block on it, or refuses the new one; NodeUnreachableError if the node does not answer.
        """
        if certificate.winner_key != self.miner_key:
            raise BridgeError(f"the certificate for block {certificate.height} is for another miner")
        with NodeClient.from_datadir(
            self.datadir
        ) as node:  # a connection for this call only: if the node hangs, nobody else waits
            parent = b2lx(certificate.prev_block)
            if not node.wait_for_tip(parent, CATCH_UP_TIME):
                raise BridgeError(f"{node.name} is not at block {parent}, nor was within {CATCH_UP_TIME:g} s")
            return self.append(node, _wait_for_template(node, certificate, params), certificate, params)


class _TooEarlyError(BridgeError):
    """The node's clock is behind the coordinator's."""


def _wait_for_template(node: NodeClient, certificate: Certificate, params: TrainingParams) -> Mapping[str, Any]:
    """Return a template for the certificate's slot, as soon as the node's clock allows the certificate's round."""
    parent_time: int = node.call("getblockheader", b2lx(certificate.prev_block))["time"]
    earliest = parent_time + certificate.round * params.round_seconds if certificate.round else 0
    return retrying(_TooEarlyError, CATCH_UP_TIME)(_template, node, certificate.round, earliest, params)


def ask_for_template(node: NodeClient, params: TrainingParams) -> Mapping[str, Any]:
    """Return a node's template for a block that needs a certificate.

    Raises BridgeError if the node's next block needs none, or if the node is on another network.
    """
    template: Mapping[str, Any] = node.call("getblocktemplate", {"rules": ["segwit", "training"]})
    if "training" not in template:
        raise BridgeError(f"{node.name} wants no certificate for block {template['height']}: it is on another network")
    chain_id = template["training"]["chain_id"]
    if chain_id != params.chain_id.hex():
        raise BridgeError(f"{node.name} is on network {chain_id}, the certificate is for {params.chain_id.hex()}")
    return template


def _template(node: NodeClient, round_: int, earliest: int, params: TrainingParams) -> Mapping[str, Any]:
    template = ask_for_template(node, params)
    now = template["curtime"]
    if now < earliest:
        raise _TooEarlyError(f"{node.name}'s time is {now}, but round {round_} is allowed from {earliest} on")
    return template
