"""Training networks for tests, with known secrets: a valid block takes milliseconds, an invalid one breaks one rule.

The pytest fixture `training_network` (plugin.py) makes them. Without pytest, use the class.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import count

from coincurve import PrivateKey

from traincert.bridge.appointing import AppointingCoordinator
from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.block import build_block
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.lottery import ContributionTable, Leaf
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.errors import BridgeError
from traincert.bridge.keys import payout_script
from traincert.bridge.producer import Producer, ask_for_template
from traincert.bridge.rpc import NodeClient
from traincert.bridge.testing.invalid import Forger, break_rule, digest, full_reason
from traincert.regtest import Network, Node
from traincert.regtest.node import Options

MINERS = 4
COORDINATORS = [PrivateKey(digest(f"coordinator {i}")) for i in range(3)]
SIGNERS = (0, 1)
"""Which of the coordinators sign: 2 of 3 must."""


class TrainingNetwork:
    """Nodes of a training network, four miners, and a coordinator whose cycles train nothing.

    `start(count, options)` must start and later stop the nodes. Use the network as a context manager. Blocks need
    certificates from `start_height` on; below it `generatetoaddress` makes blocks.
    """

    def __init__(self, start: Callable[[int, Options], Network], nodes: int = 1, *, start_height: int = 1) -> None:
        keys = TrainingKeys(len(SIGNERS), tuple(key.public_key_xonly.format() for key in COORDINATORS))
        self._beacon = Beacon(digest("beacon"))
        self.params = TrainingParams({start_height: keys}, self._beacon.anchor, digest("model 0"))
        self.network = start(nodes, self.params.node_options())
        self.nodes = self.network.nodes
        self.miners = [_producer(i) for i in range(MINERS)]
        # Not with a Signer: its journal takes most of a block's time, and tests may certify one slot twice.
        self._signed: dict[bytes, int] = {}  # by the parent: the slot's rounds that have a certificate
        self.coordinator = AppointingCoordinator(
            self.params, self._sign, lambda prev_block: self._signed.get(prev_block, 0), self._beacon, self.miners
        )
        self._clients: dict[Node, NodeClient] = {}
        self._closing = ExitStack()
        self._number = count(1)

    def __enter__(self) -> TrainingNetwork:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def append(
        self,
        *,
        miner: int | bytes | None = None,
        table: ContributionTable | None = None,
        round_: int | None = None,
        node: Node | None = None,
    ) -> str:
        """Append a valid block to a node's tip, by default the first node's, and return its hash as RPC shows it.

        The arguments are those of `AppointingCoordinator.append`. The block has the node's mempool in it. Other nodes
        receive it a moment later: `network.wait_until_same_tip()` waits for them.
        """
        return self.coordinator.append(self._client(node), miner=miner, table=table, round_=round_)

    def append_invalid(self, reason: str, *, node: Node | None = None) -> str:
        """Submit a block that breaks just one rule, check that the node refuses it for this reason, and return that.

        `reason` may be short, as in `draw`. The node's whole reason is returned: `bad-traincert-draw`. The tip does not
        change.

        Raises BridgeError if there is no such reason (the message lists all), if the reason is about a draw and the tip
        has no table, or if the node answers anything else.
        """
        reason = full_reason(reason)
        client = self._client(node)
        # At the earliest time that is allowed, every round but the first comes too early.
        template = dict(ask_for_template(client, self.params))
        template["curtime"] = template["mintime"]
        # A node checks each block once. Version bits without a meaning (BIP320) make this one new.
        number = next(self._number)
        template["version"] |= number % 2**16 << 13
        table = self.table(*[1] * MINERS)
        certificate = self.coordinator.next_certificate(client, template, None, table, round_=0)
        forger = self._forger(self.coordinator.parent_table(template), table)
        # A node looks at two blocks of one certificate only. This makes the certificate new.
        certificate = forger.sign(replace(certificate, loss_after=number), SIGNERS)
        block = build_block(
            template,
            certificate,
            self.miners[0].payout_script,
            self.params.chain_id,
            forger.miners[certificate.winner_key].sign_schnorr,
            compat_pow=False,
        )
        wrong = break_rule(reason, forger, block, certificate)
        found = client.call("submitblock", wrong.serialize().hex())
        if found != reason:
            raise BridgeError(f"{client.name} answered {found!r} to a block that is wrong by {reason}")
        return reason

    def table(self, *weights: int) -> ContributionTable:
        """Return a table in which miner 0, 1, ... have these weights in the draw. A miner of weight 0 is left out.

        Raises BridgeError for more weights than miners, and CertificateError or EncodingError for a weight that is not
        allowed.
        """
        if len(weights) > len(self.miners):
            raise BridgeError(f"{len(weights)} weights for {len(self.miners)} miners")
        return ContributionTable(
            Leaf(miner.miner_key, digest(f"update {i}"), params=weight, loss_reduction=weight, weight=weight)
            for i, (miner, weight) in enumerate(zip(self.miners, weights, strict=False))
            if weight
        )

    def _sign(self, certificate: Certificate) -> Certificate:
        self._signed[certificate.prev_block] = certificate.round + 1
        return self._forger(ContributionTable([]), ContributionTable([])).sign(certificate, SIGNERS)

    def _client(self, node: Node | None) -> NodeClient:
        node = node or self.nodes[0]
        if node not in self._clients:
            self._clients[node] = self._closing.enter_context(NodeClient.from_datadir(node.datadir))
        return self._clients[node]

    def _forger(self, parent_table: ContributionTable, table: ContributionTable) -> Forger:
        miners = {miner.miner_key: PrivateKey(digest(f"miner {i}")) for i, miner in enumerate(self.miners)}
        return Forger(self.params, COORDINATORS, miners, self._beacon, parent_table, table)


def _producer(number: int) -> Producer:
    secret = digest(f"miner {number}")
    return Producer(secret, payout_script(secret), f"miner{number}")
