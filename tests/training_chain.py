"""Makes training chains of known keys for tests, with cycles whose results are made up.

It fills in certificates without `bridge.consensus.certificate.new_certificate`, so that a mistake there shows in tests.
Keep it independent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitcoin.core import CBlock, lx
from bitcoin.core.script import OP_0, OP_TRUE, CScript
from coincurve import PrivateKey

from traincert import regtest
from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.block import build_block
from traincert.bridge.consensus.certificate import Certificate, Draw, draw_winner
from traincert.bridge.consensus.lottery import ContributionTable, Leaf, contribution_weight
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.testing.invalid import AUX, Forger, digest

ANYONE_CAN_SPEND = CScript([OP_TRUE])
PAYOUT_SCRIPT = CScript([OP_0, hashlib.sha256(ANYONE_CAN_SPEND).digest()])  # P2WSH


def secret(name: str) -> PrivateKey:
    return PrivateKey(digest(name))


COORDINATORS = [secret(f"coordinator {i}") for i in range(3)]
MINERS = {key.public_key_xonly.format(): key for key in (secret(f"miner {i}") for i in range(4))}


@dataclass
class TrainingChain:
    """What the coordinator of a training network knows: 2 of 3 keys, a beacon, and the parent of the next slot.

    `rotations` are the numbers of the coordinators, all of whom must sign, by the height from which on they do.
    """

    start_height: int = 1
    threshold: int = 2
    beacon: Beacon = field(default_factory=lambda: Beacon(digest("beacon")))
    model: bytes = digest("model 0")
    table: ContributionTable = field(default_factory=lambda: ContributionTable([]))
    rotations: Mapping[int, Sequence[int]] = field(default_factory=dict)
    round_seconds: int = 60

    @property
    def params(self) -> TrainingParams:
        xonly = [key.public_key_xonly.format() for key in COORDINATORS]
        keys = {self.start_height: TrainingKeys(self.threshold, tuple(xonly))}
        for height, numbers in self.rotations.items():
            keys[height] = TrainingKeys(len(numbers), tuple(xonly[number] for number in numbers))
        return TrainingParams(keys, self.beacon.anchor, digest("model 0"), self.round_seconds)

    def draw(self, reveal: bytes, prev_block: bytes, round_: int) -> tuple[bytes, Draw | None]:
        """The winner's key, and its place in the parent's table if it has any leaves."""
        if not self.table.count:
            return next(iter(MINERS)), None
        return draw_winner(self.table, reveal, prev_block, round_)

    def next_certificate(
        self, template: Mapping[str, Any], table: ContributionTable | None = None, *, round_: int = 0
    ) -> Certificate:
        """The coordinator's certificate for the template's slot; `table` is this cycle's, by default a made one."""
        table = made_table(template["height"]) if table is None else table
        prev_block = lx(template["previousblockhash"])
        reveal = self.beacon.reveal(template["height"] - self.start_height)
        winner, draw = self.draw(reveal, prev_block, round_)
        return self.sign(
            Certificate(
                height=template["height"],
                prev_block=prev_block,
                round=round_,
                beacon_reveal=reveal,
                model_before=self.model,
                model_after=digest(f"model {template['height']}"),
                dataset_root=digest("dataset"),
                record=digest(f"record {template['height']}"),
                loss_before=2_302_585_093,
                loss_after=2_000_000_000,
                params_trained=sum(leaf.params for leaf in table.leaves),
                contributions_root=table.root,
                contributions_weight=table.weight,
                contributions_count=table.count,
                winner_key=winner,
                draw=draw,
            )
        )

    def sign(
        self, certificate: Certificate, signers: Sequence[int] | None = None, *, keys_at: int | None = None
    ) -> Certificate:
        """Sign with some of the keys in force (at another height: `keys_at`).

        By default that are the first and the last, and after a rotation all.
        """
        height = certificate.height if keys_at is None else keys_at
        if signers is None:
            rotated = any(start <= height for start in self.rotations)
            signers = range(len(self.params.keys_at(height).keys)) if rotated else (0, 2)
        return self.forger(height).sign(certificate, signers)

    def forger(self, height: int) -> Forger:
        """What it takes to make this chain's next block wrong."""
        rotated = max((start for start in self.rotations if start <= height), default=None)
        numbers = range(len(COORDINATORS)) if rotated is None else self.rotations[rotated]
        coordinators = [COORDINATORS[number] for number in numbers]
        return Forger(self.params, coordinators, MINERS, self.beacon, self.table, made_table(height))

    def block(self, template: Mapping[str, Any], certificate: Certificate, *, compat_pow: bool = True) -> CBlock:
        """The winner's block."""
        winner = MINERS[certificate.winner_key]
        return build_block(
            template,
            certificate,
            PAYOUT_SCRIPT,
            self.params.chain_id,
            lambda message: winner.sign_schnorr(message, AUX),
            compat_pow=compat_pow,
        )

    def advance(self, certificate: Certificate, table: ContributionTable | None = None) -> None:
        """Take a certificate's block as the parent of the next slot."""
        self.table = made_table(certificate.height) if table is None else table
        self.model = certificate.model_after


def template(node: regtest.Node) -> dict[str, Any]:
    """What a producer asks its node for."""
    answer: dict[str, Any] = node.rpc("getblocktemplate", {"rules": ["segwit", "training"]})
    return answer


def submit(node: regtest.Node, block: CBlock) -> str | None:
    """The node's reason for refusing a block, or None."""
    answer: str | None = node.rpc("submitblock", block.serialize().hex())
    return answer


def made_table(height: int, miners: Sequence[bytes] = tuple(MINERS)) -> ContributionTable:
    numbers = [(1000 + 7 * i + height, 10**6 * (i + 1)) for i in range(len(miners))]
    return ContributionTable(
        Leaf(miner, digest(f"update {height} {i}"), *numbers[i], contribution_weight(*numbers[i]))
        for i, miner in enumerate(miners)
    )
