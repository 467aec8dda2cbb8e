"""Makes training chains of known keys for tests: valid blocks, and blocks that are wrong in one thing."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bitcoin.core import CBlock, CMutableTransaction, CTxOut, lx
from bitcoin.core.script import OP_0, OP_RETURN, OP_TRUE, CScript
from coincurve import PrivateKey

from traincert import regtest
from traincert.bridge.beacon import Beacon
from traincert.bridge.block import PAYLOAD_MAGIC, SIGNATURE_SIZE, build_block, payload_script, winner_sighash
from traincert.bridge.certificate import Certificate, CoordinatorSignature, Draw
from traincert.bridge.lottery import U64_MAX, ContributionTable, Leaf, Node, contribution_weight, draw_ticket
from traincert.bridge.params import TrainingKeys, TrainingParams

AUX = bytes(32)  # BIP340's auxiliary bytes, fixed so that vectors can be made again
ANYONE_CAN_SPEND = CScript([OP_TRUE])
PAYOUT_SCRIPT = CScript([OP_0, hashlib.sha256(ANYONE_CAN_SPEND).digest()])  # P2WSH


def secret(name: str) -> PrivateKey:
    return PrivateKey(hashlib.sha256(name.encode()).digest())


def digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


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
        return draw_of(self.table, self.table.find(draw_ticket(reveal, prev_block, round_, self.table.weight)))

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
        rotated = max((start for start in self.rotations if start <= height), default=None)
        numbers = range(len(COORDINATORS)) if rotated is None else self.rotations[rotated]
        if signers is None:
            signers = (0, 2) if rotated is None else range(len(numbers))
        message = certificate.sighash(self.params.chain_id)
        signatures = (CoordinatorSignature(i, COORDINATORS[numbers[i]].sign_schnorr(message, AUX)) for i in signers)
        return replace(certificate, coordinator_signatures=tuple(signatures))

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


def draw_of(table: ContributionTable, index: int) -> tuple[bytes, Draw]:
    """A leaf's miner, and its place in the table."""
    leaf = table.leaves[index]
    draw = Draw(leaf.update_hash, leaf.params, leaf.loss_reduction, leaf.weight, index, table.path(index))
    return leaf.miner_key, draw


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


def with_scripts(block: CBlock, *scripts: bytes) -> CBlock:
    """The block with other outputs in place of the coinbase's last one, which is the payload."""
    coinbase = CMutableTransaction.from_tx(block.vtx[0])
    coinbase.vout[-1:] = [CTxOut(0, CScript(script)) for script in scripts]
    vtx = [coinbase, *block.vtx[1:]]
    return CBlock(
        block.nVersion, block.hashPrevBlock, nTime=block.nTime, nBits=block.nBits, nNonce=block.nNonce, vtx=vtx
    )


def payload_of(block: CBlock) -> bytes:
    push: bytes = list(block.vtx[0].vout[-1].scriptPubKey)[1]
    return push


def with_certificate(chain: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
    """The block with another certificate, signed by its winner all the same."""
    payload = PAYLOAD_MAGIC + certificate.serialize()
    blank = with_scripts(block, payload_script(payload + bytes(SIGNATURE_SIZE)))
    message = winner_sighash(blank, len(blank.vtx[0].vout) - 1, chain.params.chain_id)
    return with_scripts(block, payload_script(payload + MINERS[certificate.winner_key].sign_schnorr(message, AUX)))


Change = Callable[[TrainingChain, CBlock, Certificate], CBlock]


def _edit(**changes: Any) -> Change:
    """Other fields, signed by coordinator and winner as if they were right."""
    return lambda chain, block, cert: with_certificate(chain, block, chain.sign(replace(cert, **changes)))


def _sign(*signers: int) -> Change:
    return lambda chain, block, cert: with_certificate(chain, block, chain.sign(cert, signers))


def _payload(change: Callable[[bytes], bytes]) -> Change:
    return lambda _, block, __: with_scripts(block, payload_script(change(payload_of(block))))


def _script(change: Callable[[bytes], Sequence[bytes]]) -> Change:
    return lambda _, block, __: with_scripts(block, *change(payload_of(block)))


def _pushdata4(payload: bytes) -> bytes:
    return bytes([OP_RETURN, 0x4E]) + len(payload).to_bytes(4, "little") + payload


def _long_count(_: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
    """The number of coordinator signatures as a CompactSize of three bytes."""
    at = len(PAYLOAD_MAGIC + certificate.body())
    payload = payload_of(block)
    return with_scripts(block, payload_script(payload[:at] + b"\xfd\x02\x00" + payload[at + 1 :]))


def _other_winner(chain: TrainingChain, block: CBlock, _: Certificate) -> CBlock:
    payload = payload_of(block)
    message = winner_sighash(block, len(block.vtx[0].vout) - 1, chain.params.chain_id)
    return with_scripts(block, payload_script(payload[:-SIGNATURE_SIZE] + COORDINATORS[0].sign_schnorr(message, AUX)))


def _other_time(_: TrainingChain, block: CBlock, __: Certificate) -> CBlock:
    return CBlock(
        block.nVersion, block.hashPrevBlock, nTime=block.nTime + 1, nBits=block.nBits, nNonce=0, vtx=block.vtx
    )


def _swapped_signatures(chain: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
    swapped = certificate.coordinator_signatures[::-1]
    return with_certificate(chain, block, replace(certificate, coordinator_signatures=swapped))


def _second_signature_as(key_index: int) -> Change:
    def change(chain: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
        first, second = certificate.coordinator_signatures
        signatures = (first, replace(second, key_index=key_index))
        return with_certificate(chain, block, replace(certificate, coordinator_signatures=signatures))

    return change


def _other_chain(chain: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
    other = TrainingChain(chain.start_height, beacon=Beacon(digest("another beacon")))
    return with_certificate(chain, block, other.sign(certificate))


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
    "bad-traincert-height": {"the next height": _edit(height=1000)},
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
        "another certificate": lambda chain, block, cert: with_certificate(
            chain, block, replace(cert, loss_after=cert.loss_after - 1)
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
    def edit(chain: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
        assert certificate.draw is not None
        return _edit(draw=change(certificate.draw))(chain, block, certificate)

    return edit


def _edit_sibling(change: Callable[[Node], Node]) -> Change:
    return _edit_draw(lambda draw: replace(draw, siblings=(change(draw.siblings[0]), *draw.siblings[1:])))


def _drawn_with(beacon_reveal: Callable[[TrainingChain, Certificate], bytes]) -> Change:
    """Another reveal, and the winner that it draws."""

    def change(chain: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
        reveal = beacon_reveal(chain, certificate)
        winner, draw = chain.draw(reveal, certificate.prev_block, certificate.round)
        return _edit(beacon_reveal=reveal, winner_key=winner, draw=draw)(chain, block, certificate)

    return change


def _in_round(round_: int) -> Change:
    """Drawn in another round."""

    def change(chain: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
        winner, draw = chain.draw(certificate.beacon_reveal, certificate.prev_block, round_)
        return _edit(round=round_, winner_key=winner, draw=draw)(chain, block, certificate)

    return change


def _other_rounds_winner(chain: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
    """Who would win another round."""
    rounds = (chain.draw(certificate.beacon_reveal, certificate.prev_block, i) for i in itertools.count(1))
    winner, draw = next(each for each in rounds if each[1] != certificate.draw)
    return _edit(winner_key=winner, draw=draw)(chain, block, certificate)


def _other_tables_winner(chain: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
    """Who would win if the cycle's own table were drawn from."""
    winner, draw = replace(chain, table=made_table(certificate.height)).draw(
        certificate.beacon_reveal, certificate.prev_block, certificate.round
    )
    return _edit(winner_key=winner, draw=draw)(chain, block, certificate)


def _other_leafs_miner(chain: TrainingChain, block: CBlock, certificate: Certificate) -> CBlock:
    other = next(key for key in MINERS if key != certificate.winner_key)
    return _edit(winner_key=other)(chain, block, certificate)


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
        "an index beyond the table": _edit_draw(lambda draw: replace(draw, index=draw.index + len(MINERS))),
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
            lambda chain, cert: chain.beacon.reveal(cert.height + 1 - chain.start_height),
        ),
    },
    "bad-traincert-model": {
        "another": _edit(model_before=digest("another model")),
        "the one that this cycle produced": lambda chain, block, cert: _edit(model_before=cert.model_after)(
            chain, block, cert
        ),
    },
    "bad-traincert-round": {"hours too early": _in_round(1000), "the last round": _in_round(2**16 - 1)},
}
"""The same for what it can be wrong in together with its parent; the valid block has a winner drawn in round 0."""
