# Copyright (c) 2026-present The traincert developers
# Distributed under the MIT software license, see the accompanying
# file COPYING or https://opensource.org/license/mit/.
"""Training chains for tests: certificates, contribution tables, and the blocks that winners build.

It implements SPEC.md a third time, without code of the node or of bridge/, so that a mistake of those two shows here.
Keep it independent.

A TrainingChain knows all the secrets of a training network. Its block() makes a valid block on any block that it made
before; overrides change one thing in it, so that a test's invalid block is a valid one with a single change.
"""

import hashlib
import json
import unittest
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate
from math import isqrt
from pathlib import Path
from typing import NamedTuple

from .blocktools import TIME_GENESIS_BLOCK, add_witness_commitment, create_block, create_coinbase
from .key import TaggedHash, compute_xonly_pubkey, sign_schnorr
from .messages import CBlock, CTxOut, hash256, ser_compact_size, uint256_from_str
from .script import OP_RETURN, CScript

REGTEST_GENESIS_HASH = "0f9188f13cb7b2c71f2a335e3a4fc328bf5beb436012afca590b1a11466e2206"
PAYLOAD_MAGIC = b"TCRT"
SIGNATURE_SIZE = 64
BEACON_LENGTH = 2000
# The nTime of a chain's first block, unless it is told another. Tests run with a mocked time shortly after.
START_TIME = 1_700_000_000


def digest(name):
    """Return 32 bytes that stand for something: a model, an update, a secret key."""
    return hashlib.sha256(name.encode()).digest()


@cache
def xonly(secret):
    """Return the x-only public key of a secret key."""
    return compute_xonly_pubkey(secret)[0]


# Signing is deterministic here and slow, and bodies of one certificate share the coordinator's signatures.
sign = cache(sign_schnorr)

COORDINATORS = [digest(f"coordinator {i}") for i in range(4)]
# Powers of two, because sign_schnorr computes the public key each time.
MINERS = {xonly(secret): secret for secret in ((1 << i).to_bytes(32, "big") for i in range(1, 5))}


# The next three do without what CBlock calls differently, or caches, in other releases.
def block_hash(block):
    """Return a block's hash as RPC shows it."""
    return hash256(block.serialize()[:80])[::-1].hex()


def block_hash_int(block):
    """Return a block's hash as messages and hashPrevBlock have it."""
    return uint256_from_str(hash256(block.serialize()[:80]))


def update_merkle_root(block):
    """Make a header fit its transactions."""
    block.hashMerkleRoot = CBlock.get_merkle_root([hash256(tx.serialize_without_witness()) for tx in block.vtx])


def le(value, size):
    """Serialize an unsigned integer."""
    return value.to_bytes(size, "little")


class Leaf(NamedTuple):
    """A miner's contribution to a cycle."""

    miner_key: bytes
    update_hash: bytes
    params: int
    loss_reduction: int
    weight: int

    def node(self):
        """Return the tree's node for it."""
        message = (
            self.miner_key + self.update_hash + le(self.params, 8) + le(self.loss_reduction, 8) + le(self.weight, 8)
        )
        return Node(TaggedHash("traincert/contribution", message), self.weight)


class Node(NamedTuple):
    """A node of the Merkle-sum tree."""

    hash: bytes
    sum: int

    def serialize(self):
        """Return it as branches and certificates have it."""
        return self.hash + le(self.sum, 8)


def branch(left, right):
    """Return the parent of two nodes."""
    return Node(TaggedHash("traincert/branch", left.serialize() + right.serialize()), left.sum + right.sum)


class ContributionTable:
    """A cycle's contributions, in order, and the Merkle-sum tree over them."""

    def __init__(self, leaves=()):
        self.leaves = sorted(leaves)
        self.levels = [[leaf.node() for leaf in self.leaves]]
        while len(self.levels[-1]) > 1:
            level = self.levels[-1]
            odd = level[-1:] if len(level) % 2 else []  # goes up unchanged
            self.levels.append(
                [branch(left, right) for left, right in zip(level[::2], level[1::2], strict=False)] + odd
            )

    @property
    def root(self):
        """The root's hash, zeros if there is none."""
        return self.levels[-1][0].hash if self.leaves else bytes(32)

    @property
    def weight(self):
        """The total weight."""
        return sum(leaf.weight for leaf in self.leaves)

    @property
    def count(self):
        """The number of leaves."""
        return len(self.leaves)

    def find(self, ticket):
        """Return the index of the leaf that holds a ticket."""
        return bisect_right(list(accumulate(leaf.weight for leaf in self.leaves)), ticket)

    def path(self, index):
        """Return a leaf's siblings, leaf to root."""
        siblings = []
        for level in self.levels[:-1]:
            if index ^ 1 < len(level):
                siblings.append(level[index ^ 1])
            index //= 2
        return siblings

    def draw(self, index):
        """Return the award to a leaf."""
        leaf = self.leaves[index]
        return Draw(leaf.update_hash, leaf.params, leaf.loss_reduction, leaf.weight, index, self.path(index))


def made_table(name, numbers=((1000, 10**6), (2000, 10**6), (1500, 3 * 10**6), (700, 10**7), (1, 1))):
    """Return a table of made contributions, by pairs of params and loss_reduction; miners take turns."""
    keys = list(MINERS)
    return ContributionTable(
        Leaf(
            keys[i % len(keys)], digest(f"update {i} of {name}"), params, loss_reduction, isqrt(params * loss_reduction)
        )
        for i, (params, loss_reduction) in enumerate(numbers)
    )


def draw_ticket(beacon_reveal, prev_block, round_, weight):
    """Return the ticket that a slot draws from a table of a total weight."""
    seed = TaggedHash("traincert/draw", beacon_reveal + prev_block + le(round_, 2))
    return int.from_bytes(seed, "big") % weight


@dataclass
class Draw:
    """The winner's leaf in the parent's table, and its path to the root."""

    update_hash: bytes
    params: int
    loss_reduction: int
    weight: int
    index: int
    siblings: list

    def serialize(self):
        """Return what a certificate has after an award of 1."""
        return (
            self.update_hash
            + le(self.params, 8)
            + le(self.loss_reduction, 8)
            + le(self.weight, 8)
            + le(self.index, 4)
            + ser_compact_size(len(self.siblings))
            + b"".join(node.serialize() for node in self.siblings)
        )


@dataclass
class Certificate:
    """A training certificate; the fields are SPEC.md's, in their order. draw is None for an award of 0."""

    version: int
    height: int
    prev_block: bytes
    round: int
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
    draw: Draw
    coordinator_signatures: list = field(default_factory=list)  # of (key_index, signature)

    def body(self):
        """Serialize what the coordinator signs."""
        return (
            le(self.version, 1)
            + le(self.height, 4)
            + self.prev_block
            + le(self.round, 2)
            + self.beacon_reveal
            + self.model_before
            + self.model_after
            + self.dataset_root
            + self.record
            + le(self.loss_before, 8)
            + le(self.loss_after, 8)
            + le(self.params_trained, 8)
            + self.contributions_root
            + le(self.contributions_weight, 8)
            + le(self.contributions_count, 4)
            + self.winner_key
            + (b"\x01" + self.draw.serialize() if self.draw else b"\x00")
        )

    def serialize(self):
        """Serialize all of it."""
        signatures = [le(key_index, 1) + signature for key_index, signature in self.coordinator_signatures]
        return self.body() + ser_compact_size(len(signatures)) + b"".join(signatures)

    def json(self):
        """Return it as gettrainingcertificate shows it, without blockhash and winner_signature."""
        shown = {name: value.hex() if isinstance(value, bytes) else value for name, value in vars(self).items()}
        shown["prev_block"] = self.prev_block[::-1].hex()
        shown["award"] = "drawn" if self.draw else "appointed"
        shown["coordinator_signatures"] = [
            {"key_index": key_index, "signature": signature.hex()}
            for key_index, signature in self.coordinator_signatures
        ]
        del shown["draw"]
        if self.draw:
            shown["draw"] = dict(vars(self.draw), update_hash=self.draw.update_hash.hex())
            shown["draw"]["siblings"] = [{"hash": node.hash.hex(), "sum": node.sum} for node in self.draw.siblings]
        return shown


class MadeBlock(NamedTuple):
    """What a TrainingChain remembers of a block, to build on it. Below the start height there is no certificate."""

    height: int
    time: int
    certificate: Certificate
    table: ContributionTable


def payload_script(payload):
    """Return the scriptPubKey that carries a payload."""
    return CScript([OP_RETURN, payload])


def payload_of(block):
    """Return the payload of a block, which is the push of its coinbase's last output."""
    return list(CScript(block.vtx[0].vout[-1].scriptPubKey))[1]


class TrainingChain:
    """A training network's parameters and secrets, and every block that was made for it.

    keys maps the height from which coordinator keys are in force to a threshold and their secrets.
    """

    def __init__(self, *, keys=None, beacon="beacon", model="model 0", round_seconds=60, start_time=START_TIME):
        self.keys = keys or {1: (2, COORDINATORS[:3])}
        self.model = digest(model)
        self.round_seconds = round_seconds
        self.start_time = start_time
        self.beacon_values = [digest(beacon)]
        while len(self.beacon_values) <= BEACON_LENGTH:
            self.beacon_values.append(hashlib.sha256(self.beacon_values[-1]).digest())
        self.made = {REGTEST_GENESIS_HASH: MadeBlock(0, TIME_GENESIS_BLOCK, None, ContributionTable())}
        self.tip = REGTEST_GENESIS_HASH  # on which block() builds if it is not told on which

    @property
    def start_height(self):
        """From this height on blocks need a certificate."""
        return min(self.keys)

    @property
    def beacon(self):
        """The beacon's anchor."""
        return self.beacon_values[-1]

    @cached_property
    def chain_id(self):
        """What every signature covers."""
        message = bytes.fromhex(REGTEST_GENESIS_HASH)[::-1] + ser_compact_size(len(self.keys))
        for height, (threshold, secrets) in sorted(self.keys.items()):
            message += le(height, 4) + le(threshold, 1)
            message += ser_compact_size(len(secrets)) + b"".join(xonly(secret) for secret in secrets)
        return TaggedHash("traincert/chain", message + self.beacon + le(self.round_seconds, 4) + self.model)

    @property
    def node_args(self):
        """The options that put a node on this network, and a time at which it takes some thousand blocks."""
        return [
            f"-trainingkeys={height}:{threshold}:{','.join(xonly(secret).hex() for secret in secrets)}"
            for height, (threshold, secrets) in self.keys.items()
        ] + [
            f"-trainingbeacon={self.beacon.hex()}",
            f"-traininground={self.round_seconds}",
            f"-trainingmodel={self.model.hex()}",
            f"-mocktime={self.start_time + 3600}",
        ]

    def reveal(self, height):
        """Return the beacon's value for a height."""
        return self.beacon_values[-2 - (height - self.start_height)]

    def keys_at(self, height):
        """Return threshold and secrets in force at a height."""
        return self.keys[max(start for start in self.keys if start <= height)]

    def certificate(
        self, parent, *, table, round=0, reveal=None, draw_round=None, draw_parent=None, name="", cert=None, draw=None
    ):
        """Return the coordinator's certificate for a block on parent, not signed yet. For the overrides see block()."""
        made = self.made[parent]
        height = made.height + 1
        prev_block = bytes.fromhex(parent)[::-1]
        reveal = reveal or self.reveal(height)
        parents_table = draw_parent or made.table
        award, winner_key = None, next(iter(MINERS))
        if parents_table.count:
            ticket = draw_ticket(reveal, prev_block, round if draw_round is None else draw_round, parents_table.weight)
            index = parents_table.find(ticket)
            award, winner_key = parents_table.draw(index), parents_table.leaves[index].miner_key
        if callable(draw):
            award, winner_key = draw(award, winner_key, parents_table)
        elif draw:
            award = replace(award, **draw)
        certificate = Certificate(
            version=1,
            height=height,
            prev_block=prev_block,
            round=round,
            beacon_reveal=reveal,
            model_before=made.certificate.model_after if made.certificate else self.model,
            model_after=digest(f"model {height}{name}"),
            dataset_root=digest("dataset"),
            record=digest(f"record {height}{name}"),
            loss_before=made.certificate.loss_after if made.certificate else 2_302_585_093,
            loss_after=(made.certificate.loss_after if made.certificate else 2_302_585_093) * 99 // 100,
            params_trained=sum(leaf.params for leaf in table.leaves),
            contributions_root=table.root,
            contributions_weight=table.weight,
            contributions_count=table.count,
            winner_key=winner_key,
            draw=award,
        )
        return replace(certificate, **cert or {})

    def sign_certificate(self, certificate, height, signers=None):
        """Let the keys in force at a height sign: those with these indices, by default the first ones."""
        threshold, secrets = self.keys_at(height)
        message = TaggedHash("traincert/certificate", self.chain_id + certificate.body())
        signers = range(threshold) if signers is None else signers
        certificate.coordinator_signatures = [(i, sign(secrets[i], message)) for i in signers]

    def winner_signature(self, block, secret, aux=None):
        """Sign a block whose winner_signature is zero."""
        header = block.serialize()[:80]
        return sign(secret, TaggedHash("traincert/block", self.chain_id + header), aux)

    def block(
        self,
        parent=None,
        *,
        ntime=None,
        txs=(),
        fees=0,
        extra_output=None,
        table=None,
        name="",
        aux=None,
        signers=None,
        signatures=None,
        other_certificate=None,
        winner=None,
        payload=None,
        scripts=None,
        after=None,
        move_tip=True,
        **overrides,
    ):
        """Make a block on parent, by default on the one made last, and remember it.

        These leave the block valid:
        ntime, txs and fees: of the block; by default a second after the parent, and none.
        extra_output: a scriptPubKey for one more output of the coinbase, before the payload's.
        table: this cycle's contributions; name: something that makes the certificate another one.
        round: how often the slot was redrawn.
        aux: BIP340's auxiliary bytes for the winner's signature; others make another signature, so another block.
        move_tip: whether the next block is built on this one.

        These change one thing, and everything that depends on it unless it says otherwise:
        reveal, draw_round, draw_parent: the beacon's value, round or table from which the winner is drawn.
        draw: fields of the draw, or a function of draw, winner_key and the parent's table that returns the former two.
        cert: fields of the certificate, before the coordinator signs.
        signers, signatures: the key indices that sign; a function of the list of key indices and signatures.
        other_certificate: a function that changes the certificate after the coordinator signed.
        winner: the secret that signs as winner.
        payload: a function of the payload as it is, after the winner signed.
        scripts: a function of the payload that returns the scripts of the outputs in place of the one that carries it.
        after: a function that changes the block in the end.
        """
        parent = parent or self.tip
        made = self.made[parent]
        height = made.height + 1
        ntime = ntime or max(made.time + 1, self.start_time)
        coinbase = create_coinbase(height, fees=fees)
        block = create_block(int(parent, 16), coinbase, ntime=ntime, txlist=list(txs))
        add_witness_commitment(block)
        if extra_output is not None:
            coinbase.vout.append(CTxOut(0, extra_output))
        certificate = None
        if height < self.start_height:
            update_merkle_root(block)
            block.solve()
        else:
            table = made_table(f"{height}{name}") if table is None else table
            certificate = self.certificate(parent, table=table, name=name, **overrides)
            self.sign_certificate(certificate, height, signers)
            if signatures:
                certificate.coordinator_signatures = signatures(certificate.coordinator_signatures)
            if other_certificate:
                other_certificate(certificate)
            carried = PAYLOAD_MAGIC + certificate.serialize()
            coinbase.vout.append(CTxOut(0, payload_script(carried + bytes(SIGNATURE_SIZE))))
            # The zero signature's Merkle root is the one that the winner signs: a signature cannot sign itself.
            update_merkle_root(block)
            carried += self.winner_signature(block, winner or MINERS[certificate.winner_key], aux)
            if payload:
                carried = payload(carried)
            coinbase.vout[-1:] = [
                CTxOut(0, script) for script in (scripts(carried) if scripts else [payload_script(carried)])
            ]
            update_merkle_root(block)
        if after:
            after(block)
        self.made[block_hash(block)] = MadeBlock(height, block.nTime, certificate, table or ContributionTable())
        if move_tip:
            self.tip = block_hash(block)
        return block

    def bodies(self, count, parent=None, **overrides):
        """Bodies of one certificate on a block, by default on the one made last, which differ in their time."""
        parent = parent or self.tip
        time = self.made[parent].time + 1
        return [self.block(parent, ntime=time + i, move_tip=False, **overrides) for i in range(count)]

    def certificate_of(self, block):
        """Return the certificate of a block that was made here."""
        return self.made[block_hash(block)].certificate


class TestFrameworkTraining(unittest.TestCase):
    """The node and the bridge are held to the same vectors."""

    def setUp(self):
        data = Path(__file__).resolve().parents[3] / "src/test/data/training.json"
        self.vectors = json.loads(data.read_text(encoding="utf8"))

    def test_chain_id(self):
        network, rotating = self.vectors["networks"]
        chain = TrainingChain()
        chain.beacon_values = [bytes.fromhex(network["options"][1].removeprefix("trainingbeacon="))]
        self.assertEqual(chain.node_args[:4], [f"-{option}" for option in network["options"]])
        self.assertEqual(chain.chain_id.hex(), network["chain_id"])

        secrets = COORDINATORS[:3]
        chain = TrainingChain(
            keys={1: (1, secrets[:1]), 150: (3, secrets), 70000: (1, secrets[1:])}, round_seconds=86400
        )
        chain.beacon_values = [bytes.fromhex(rotating["options"][3].removeprefix("trainingbeacon="))]
        chain.model = bytes.fromhex(rotating["options"][5].removeprefix("trainingmodel="))
        self.assertEqual(chain.node_args[:6], [f"-{option}" for option in rotating["options"]])
        self.assertEqual(chain.chain_id.hex(), rotating["chain_id"])

    def test_tables(self):
        for vector in self.vectors["tables"]:
            table = ContributionTable(
                Leaf(key, hashlib.sha256(key).digest(), number, number, number)
                for key, number in ((i.to_bytes(32, "big"), i * i + 1) for i in range(vector["count"]))
            )
            self.assertEqual(
                (table.root.hex(), table.weight, table.count), (vector["root"], vector["weight"], vector["count"])
            )
            for path in vector["paths"]:
                siblings = [{"hash": node.hash.hex(), "sum": node.sum} for node in table.path(path["index"])]
                self.assertEqual(siblings, path["siblings"])
                self.assertEqual(table.find(path["start"]), path["index"])

    def test_draws(self):
        for vector in self.vectors["draws"]:
            prev_block = bytes.fromhex(vector["prev_block"])[::-1]
            reveal = bytes.fromhex(vector["beacon_reveal"])
            ticket = draw_ticket(reveal, prev_block, vector["round"], vector["contributions_weight"])
            self.assertEqual(ticket, vector["ticket"])
