#!/usr/bin/env python3
# Copyright (c) 2026-present The traincert developers
# Distributed under the MIT software license, see the accompanying
# file COPYING or https://opensource.org/license/mit/.
"""Test how training networks relay blocks.

Headers cost nothing there, bodies need signatures: headers without blocks, blocks out of order, mutated bodies under a
good header, thousands of bodies of one winner, bodies and headers in random order, invalid certificates, compact
blocks, and a sync from scratch.
"""

import copy
from collections import Counter
from random import Random

from test_framework.messages import (
    COIN,
    MSG_BLOCK,
    MSG_CMPCT_BLOCK,
    MSG_TYPE_MASK,
    BlockTransactions,
    CBlock,
    CBlockHeader,
    COutPoint,
    CTransaction,
    CTxIn,
    CTxOut,
    HeaderAndShortIDs,
    from_hex,
    msg_block,
    msg_blocktxn,
    msg_cmpctblock,
    msg_headers,
    msg_sendcmpct,
    ser_uint256,
)
from test_framework.p2p import P2PInterface, p2p_lock
from test_framework.script import OP_TRUE, CScript
from test_framework.test_framework import BitcoinTestFramework
from test_framework.training import SIGNATURE_SIZE, TrainingChain, block_hash, block_hash_int, digest, payload_script
from test_framework.util import assert_equal, util_xor

BODIES = 2000
SYNCED_BLOCKS = 110
ORDERS = 100
BATCH = 15  # fewer than the 16 blocks that a node may have in flight from one peer


class BlockPeer(P2PInterface):
    """A peer that announces blocks, gives those that it is told to have, and remembers what it was asked for."""

    def __init__(self):
        super().__init__()
        self.blocks = {}
        self.asked = Counter()  # block hashes
        self.asked_compact = Counter()
        self.announced_compact = {}
        self.wants_high_bandwidth = False

    def on_getdata(self, message):
        for inv in message.inv:
            kind = inv.type & MSG_TYPE_MASK
            if kind not in (MSG_BLOCK, MSG_CMPCT_BLOCK):
                continue
            (self.asked if kind == MSG_BLOCK else self.asked_compact)[inv.hash] += 1
            if inv.hash in self.blocks:
                block = self.blocks[inv.hash]
                self.send(msg_block(block) if kind == MSG_BLOCK else compact(block))

    def on_sendcmpct(self, message):
        self.wants_high_bandwidth = message.announce

    def on_cmpctblock(self, message):
        header_and_shortids = HeaderAndShortIDs(message.header_and_shortids)
        self.announced_compact[block_hash_int(header_and_shortids.header)] = header_and_shortids

    def send(self, message):
        self.send_raw_message(self.build_message(message))

    def announce(self, *blocks):
        """Announce blocks by a chain of headers."""
        self.send(msg_headers([CBlockHeader(block) for block in blocks]))

    def give(self, *blocks):
        """Have the blocks, so that the node gets them when it asks."""
        with p2p_lock:
            self.blocks.update({block_hash_int(block): block for block in blocks})


def compact(block):
    """The block as BIP152 sends it: the coinbase in full, short ids of the rest."""
    short = HeaderAndShortIDs()
    short.initialize_from_block(block, use_witness=True)
    return msg_cmpctblock(short.to_p2p())


class TrainingP2PTest(BitcoinTestFramework):
    def set_test_params(self):
        self.setup_clean_chain = True
        self.num_nodes = 3
        self.training = TrainingChain()
        self.extra_args = [self.training.node_args] * 3

    def setup_network(self):
        self.setup_nodes()  # nodes 1 and 2 are connected when there is a chain to sync

    def run_test(self):
        self.submit(self.training.block())  # a recent tip ends the initial block download
        self.test_headers_without_blocks()
        self.test_blocks_out_of_order()
        self.test_invalid_certificates()
        self.test_many_bodies()
        self.test_pinned_tip()
        self.test_requests_end()
        self.test_sync()
        self.test_sync_beside_late_bodies()
        self.test_random_orders()
        self.test_compact_blocks()
        self.test_mutated_bodies()

    def submit(self, block, answer=None):
        assert_equal(self.nodes[0].submitblock(block.serialize().hex()), answer)

    def connect(self, node=0):
        return self.nodes[node].add_p2p_connection(BlockPeer())

    def disconnect(self, node=0):
        self.nodes[node].disconnect_p2ps()

    def wait_for_tip(self, block, node=0):
        self.wait_until(lambda: self.nodes[node].getbestblockhash() == block_hash(block))

    def status(self, block):
        """How getchaintips calls a block that nothing is built on; nothing if the node does not know it."""
        return next((tip["status"] for tip in self.nodes[0].getchaintips() if tip["hash"] == block_hash(block)), None)

    def test_headers_without_blocks(self):
        self.log.info("Headers without blocks are taken, and their blocks from whoever has them")
        node = self.nodes[0]
        tip = node.getbestblockhash()
        blocks = [self.training.block() for _ in range(5)]
        hashes = [block_hash_int(block) for block in blocks]
        peer = self.connect()
        peer.announce(*blocks)
        peer.sync_with_ping()
        peer.wait_until(lambda: set(peer.asked) | set(peer.asked_compact) == set(hashes))
        assert_equal(node.getblockchaininfo()["headers"], node.getblockcount() + 5)
        assert_equal(self.status(blocks[-1]), "headers-only")
        assert_equal(node.getbestblockhash(), tip)
        self.disconnect()

        self.log.info("... and are not in the way of another chain, though it has less work")
        self.training.tip = tip
        others = [self.training.block(name=" others") for _ in range(2)]
        peer = self.connect()
        peer.give(*others)
        peer.announce(*others)
        self.wait_for_tip(others[-1])
        peer.give(*blocks)
        peer.announce(*blocks)
        self.wait_for_tip(blocks[-1])
        self.training.tip = block_hash(blocks[-1])
        self.disconnect()

    def test_blocks_out_of_order(self):
        self.log.info("Blocks arrive in reverse order")
        tip = self.nodes[0].getbestblockhash()
        blocks = [self.training.block() for _ in range(6)]
        peer = self.connect()
        peer.announce(*blocks)
        peer.wait_until(lambda: len(set(peer.asked) | set(peer.asked_compact)) == len(blocks))
        for block in blocks[:0:-1]:
            peer.send(msg_block(block))
        peer.sync_with_ping()
        assert_equal(self.nodes[0].getbestblockhash(), tip)
        peer.send(msg_block(blocks[0]))
        self.wait_for_tip(blocks[-1])
        self.disconnect()

    def test_invalid_certificates(self):
        node = self.nodes[0]
        for reason, overrides in {
            "parse": dict(payload=lambda payload: payload[:-1]),
            "coordinator-sig": dict(signers=(0,)),
            "winner-sig": dict(winner=digest("nobody")),
            "award": dict(draw=lambda draw, winner_key, table: (None, winner_key)),
            "draw": dict(draw=dict(siblings=[])),
            "beacon": dict(reveal=digest("nobody's")),
            "model": dict(cert=dict(model_before=digest("nobody's"))),
            "round": dict(round=1),
        }.items():
            self.log.info(f"bad-traincert-{reason}: the peer is disconnected, and the block's sibling accepted")
            parent = self.training.tip
            wrong = self.training.block(parent, name=f" {reason}", **overrides)
            child = self.training.block(block_hash(wrong))
            valid = self.training.block(parent, name=f" {reason}")
            peer = self.connect()
            peer.give(wrong)
            with node.assert_debug_log([f"bad-traincert-{reason}"]):
                peer.announce(wrong)
                peer.wait_for_disconnect()
            assert_equal(node.getbestblockhash(), parent)
            assert_equal(self.status(wrong), "invalid")

            peer = self.connect()
            peer.announce(child)  # what is built on it is invalid too
            peer.wait_for_disconnect()
            assert_equal(self.status(child), None)
            peer = self.connect()
            peer.give(valid)
            peer.announce(valid)
            self.wait_for_tip(valid)
            self.disconnect()

    def test_compact_blocks(self):
        node = self.nodes[0]
        self.log.info("Low bandwidth: a block that was announced by its header comes as a compact block")
        peer = self.connect()
        peer.send(msg_sendcmpct(announce=False, version=2))
        block = self.training.block()
        peer.give(block)
        peer.announce(block)
        self.wait_for_tip(block)
        assert_equal(peer.asked_compact[block_hash_int(block)], 1)
        assert_equal(peer.asked, {})

        self.log.info("High bandwidth: it comes unasked")
        peer.wait_until(lambda: peer.wants_high_bandwidth)
        block = self.training.block()
        peer.send(compact(block))
        self.wait_for_tip(block)

        self.log.info("... and the transactions that the node does not have are asked for")
        spend = self.spend(1)
        block = self.training.block(txs=[spend])
        peer.send(compact(block))
        peer.wait_until(lambda: "getblocktxn" in peer.last_message)
        answer = msg_blocktxn()
        answer.block_transactions = BlockTransactions(block_hash_int(block), [spend])
        peer.send(answer)
        self.wait_for_tip(block)

        self.log.info("A wrong one does not cost the peer its connection, which has not checked it, nor its sibling")
        parent = self.training.tip
        wrong = self.training.block(parent, name=" wrong", cert=dict(model_before=digest("another model")))
        with node.assert_debug_log(["bad-traincert-model"]):
            peer.send(compact(wrong))
            peer.sync_with_ping()
        self.wait_until(lambda: self.status(wrong) == "invalid")
        valid = self.training.block(parent)
        peer.send(compact(valid))
        self.wait_for_tip(valid)

        self.log.info("The node itself announces blocks as compact blocks, certificate and all")
        peer.send(msg_sendcmpct(announce=True, version=2))
        peer.sync_with_ping()
        block = self.training.block()
        self.submit(block)
        peer.wait_until(lambda: block_hash_int(block) in peer.announced_compact)
        prefilled = peer.announced_compact[block_hash_int(block)].prefilled_txn
        assert_equal(prefilled[0].tx.serialize(), block.vtx[0].serialize())
        self.disconnect()

    def test_many_bodies(self):
        node = self.nodes[0]
        self.log.info(f"Of {BODIES} bodies of one winner two are stored, and no other is asked for again")
        parent = self.training.tip
        time = self.training.made[parent].time + 1
        bodies = [self.training.block(parent, ntime=time + i) for i in range(BODIES)]
        peer = self.connect()
        peer.give(*bodies)
        for i in range(0, BODIES, BATCH):
            for body in bodies[i : i + BATCH]:
                peer.announce(body)
            peer.sync_with_ping()
        hashes = {block_hash_int(body) for body in bodies}
        peer.wait_until(lambda: set(peer.asked) == hashes)
        for _ in range(20):  # each lets the node look for blocks to ask for
            peer.sync_with_ping()
        assert_equal(set(peer.asked.values()), {1})
        self.check_stored(bodies, 2)
        stored, left_alone = bodies[:2], bodies[2:]
        assert_equal(node.getbestblockhash(), block_hash(bodies[0]))
        tips = {tip["hash"]: tip["status"] for tip in node.getchaintips()}
        assert_equal(tips[block_hash(bodies[1])], "valid-headers")
        assert_equal({tips[block_hash(body)] for body in left_alone}, {"headers-only"})
        evidence = [entry["blocks"] for entry in node.gettrainingequivocations()]
        assert_equal(evidence, [[block_hash(body) for body in stored]])

        self.log.info("... nor by another announcement or of another peer, nor stored if it is sent again")
        some = left_alone[:: BODIES // 20]
        other = self.connect()
        for body in some:
            peer.announce(body)
            peer.send(msg_block(body))
            peer.send(compact(body))
            other.announce(body)
            other.send(msg_block(body))
            other.send(compact(body))
        for _ in range(20):
            peer.sync_with_ping()
            other.sync_with_ping()
        self.check_stored(bodies, 2)
        assert_equal(set(peer.asked.values()), {1})
        assert_equal(other.asked | other.asked_compact, {})

        self.log.info("... and none of them keeps the node from the next block")
        self.training.tip = block_hash(bodies[0])
        block = self.training.block()
        peer.give(block)
        peer.announce(block)
        self.wait_for_tip(block)

        self.log.info("... unless a block that the coordinator certified is built on it")
        winner = left_alone[BODIES // 2]
        self.training.tip = block_hash(winner)
        children = [self.training.block() for _ in range(2)]
        other.give(winner, *children)
        other.announce(*children)
        self.wait_for_tip(children[-1])
        self.check_stored(bodies, 3)
        self.disconnect()

    def forge(self, body, count):
        """Headers on a body that nobody has certified or signed."""
        headers = []
        previous, time = body, body.nTime
        for _ in range(count):
            header = CBlockHeader(previous)
            header.hashPrevBlock = block_hash_int(previous)
            time += 1
            header.nTime = time
            headers.append(header)
            previous = header
        return headers

    def test_pinned_tip(self):
        self.log.info("A peer that sends headers on one body and leaves does not keep the node on it")
        node = self.nodes[0]
        parent = self.training.tip
        time = self.training.made[parent].time + 1
        bodies = [self.training.block(parent, ntime=time + i) for i in range(3)]
        attacker = self.connect()
        attacker.give(*bodies[:2])
        for body in bodies[:2]:
            attacker.announce(body)
        self.wait_until(lambda: self.status(bodies[1]) == "valid-headers")
        attacker.announce(*self.forge(bodies[0], 500))
        attacker.sync_with_ping()
        self.disconnect()
        assert_equal(node.getbestblockhash(), block_hash(bodies[0]))

        blocks = [bodies[2], *(self.training.block() for _ in range(10))]
        peer = self.connect()
        peer.give(*blocks)
        peer.announce(*blocks)
        self.wait_for_tip(blocks[-1])
        self.disconnect()

    def test_requests_end(self):
        self.log.info("A body that another peer brought is not waited for, left alone or needed")
        node = self.nodes[0]
        for needed in (False, True):
            first, second, third = self.training.bodies(3, self.training.tip)
            self.submit(first)
            self.submit(second, "inconclusive")
            asked, winner = self.connect(), self.connect()
            asked.announce(third)
            asked.wait_until(
                lambda asked=asked, third=third: block_hash_int(third) in asked.asked | asked.asked_compact
            )
            winner.send(msg_block(third))
            winner.sync_with_ping()
            if needed:
                self.training.tip = block_hash(third)
                child = self.training.block()
                winner.send(msg_block(child))
                self.wait_for_tip(child)
            else:
                asked.give(third)
                asked.send(compact(third))
                asked.sync_with_ping()
                self.training.tip = block_hash(first)
            self.wait_until(lambda: [peer["inflight"] for peer in node.getpeerinfo()] == [[], []])
            self.disconnect()
        self.submit(self.training.block())

    def test_sync_beside_late_bodies(self):
        self.log.info("A new node syncs although a former winner fed it two late bodies and a longer chain of headers")
        chain = [self.nodes[0].getblockhash(height) for height in range(1, self.nodes[0].getblockcount() + 1)]
        below = [from_hex(CBlock(), self.nodes[0].getblock(name, 0)) for name in chain[:4]]
        time = self.training.made[chain[3]].time + 20
        late = [self.training.block(chain[3], ntime=time + i, move_tip=False) for i in range(2)]
        assert self.training.certificate_of(late[0]).body() == self.training.made[chain[4]].certificate.body()
        attacker = self.connect(2)
        attacker.give(*below, *late)
        attacker.announce(*below, late[1])
        attacker.announce(late[0], *self.forge(late[0], 1000))
        self.wait_until(lambda: len(self.nodes[2].gettrainingequivocations()) == 1)
        self.disconnect(2)
        self.connect_nodes(2, 0)
        self.sync_blocks([self.nodes[0], self.nodes[2]])
        self.disconnect_nodes(2, 0)

    def test_random_orders(self):
        self.log.info(f"Bodies and forged headers in {ORDERS} random orders: the next certified block unites the nodes")
        random = Random(3)  # noqa: S311 - which order, not which key
        self.connect_nodes(0, 1)
        self.sync_blocks(self.nodes[:2])
        self.disconnect_nodes(0, 1)
        peers = [self.connect(node) for node in (0, 1)]
        different = 0
        for _ in range(ORDERS):
            blocks, parents = [], [self.training.tip]
            for _slot in range(3):
                bodies = self.make_bodies(random, random.choice(parents))
                blocks += bodies
                parents = [block_hash(body) for body in bodies]
            for node, peer in enumerate(peers):
                attacker = self.connect(node)
                for body in random.sample(blocks, 2):
                    attacker.announce(*self.branch(blocks, body), *self.forge(body, random.randint(1, 30)))
                attacker.sync_with_ping()
                attacker.peer_disconnect()
                attacker.wait_for_disconnect()
                for body in random.sample(blocks, len(blocks)):
                    peer.announce(*self.branch(blocks, body))
                    peer.send(msg_block(body))
            for peer in peers:
                peer.sync_with_ping()
            tips = [node.getbestblockhash() for node in self.nodes[:2]]
            different += tips[0] != tips[1]
            # The coordinator's node is node 0: it certifies the next block on that node's tip.
            self.training.tip = tips[0]
            block = self.training.block()
            self.submit(block)
            assert_equal(self.nodes[0].getbestblockhash(), block_hash(block))
            peers[1].give(*blocks, block)
            peers[1].announce(*self.branch(blocks, block))
            self.wait_for_tip(block, 1)
        self.log.info(f"... in {different} of them the two nodes had different tips before")
        assert different > ORDERS // 10
        self.disconnect(0)
        self.disconnect(1)

    def make_bodies(self, random, parent):
        """One to four bodies of a new certificate on a block."""
        time, name = self.training.made[parent].time + 1, f" {random.random()}"
        return [self.training.block(parent, ntime=time + i, name=name) for i in range(random.randint(1, 4))]

    def branch(self, blocks, body):
        """A body and those below it among the blocks, lowest first."""
        by_hash = {block_hash_int(block): block for block in blocks}
        branch = [body]
        while branch[0].hashPrevBlock in by_hash:
            branch.insert(0, by_hash[branch[0].hashPrevBlock])
        return branch

    def check_stored(self, bodies, count):
        """The block files have so many bodies of the certificate."""
        node = self.nodes[0]
        certificate = self.training.certificate_of(bodies[0]).body()
        stored = 0
        for file in node.blocks_path.glob("blk*.dat"):
            used = file.read_bytes().rstrip(b"\0")  # without the space that was allocated ahead
            stored += util_xor(used, node.read_xor_key(), offset=0).count(certificate)
        assert_equal(stored, count)

    def test_sync(self):
        self.log.info(f"A new node syncs {SYNCED_BLOCKS} blocks and more from its peer")
        count = self.nodes[0].getblockcount()
        for _ in range(count, SYNCED_BLOCKS):
            self.submit(self.training.block())
        self.connect_nodes(0, 1)
        self.sync_blocks(self.nodes[:2])
        assert_equal(self.nodes[1].getblockcount(), SYNCED_BLOCKS)
        assert_equal(self.nodes[1].gettrainingcertificate(), self.nodes[0].gettrainingcertificate())
        self.disconnect_nodes(0, 1)
        self.log.info("... and the rest as it comes")
        self.connect_nodes(0, 1)
        self.submit(self.training.block())
        self.sync_blocks(self.nodes[:2])
        self.disconnect_nodes(0, 1)

    def spend(self, height):
        """A transaction that spends the coinbase at a height."""
        node = self.nodes[0]
        coinbase = node.getblock(node.getblockhash(height), 2)["tx"][0]
        tx = CTransaction()
        tx.vin.append(CTxIn(COutPoint(int(coinbase["txid"], 16), 0)))
        tx.vout.append(CTxOut(from_hex(CTransaction(), coinbase["hex"]).vout[0].nValue - COIN, CScript([OP_TRUE] * 40)))
        return tx

    def test_mutated_bodies(self):
        self.log.info("A mutated body does not condemn a good header")
        mutations = {
            "a payload without the winner's signature": (drop_signature, "bad-txnmrklroot"),
            "no payload": (drop_payload, "bad-txnmrklroot"),
            "a transaction less": (lambda block: block.vtx.pop(), "bad-txnmrklroot"),
            "a transaction twice": (lambda block: block.vtx.append(block.vtx[-1]), "bad-txns-duplicate"),
            "another witness of the coinbase": (change_witness, "bad-witness-merkle-match"),
            "a witness of two items": (grow_witness, "bad-witness-nonce-size"),
        }
        for height, (comment, (mutate, reason)) in enumerate(mutations.items(), start=2):
            self.log.info(f"... {comment}: {reason}")
            # Three transactions, so that the last one twice has the same Merkle root.
            spends = [self.spend(2 * height - 1), self.spend(2 * height)]
            valid = self.training.block(txs=spends)
            mutated = copy.deepcopy(valid)
            mutate(mutated)
            assert_equal(block_hash(mutated), block_hash(valid))
            assert mutated.serialize() != valid.serialize()

            peer = self.connect()
            peer.give(mutated)
            peer.announce(valid)
            peer.wait_for_disconnect()
            assert_equal(self.status(valid), "headers-only")
            self.submit(mutated, reason)
            assert_equal(self.status(valid), "headers-only")

            peer = self.connect()
            peer.give(valid)
            peer.announce(valid)
            self.wait_for_tip(valid)
            self.disconnect()


def drop_signature(block):
    script = block.vtx[0].vout[-1].scriptPubKey
    block.vtx[0].vout[-1].scriptPubKey = CScript(script[:-SIGNATURE_SIZE] + bytes(SIGNATURE_SIZE))


def drop_payload(block):
    block.vtx[0].vout[-1].scriptPubKey = payload_script(b"no payload")


def change_witness(block):
    block.vtx[0].wit.vtxinwit[0].scriptWitness.stack = [ser_uint256(1)]


def grow_witness(block):
    block.vtx[0].wit.vtxinwit[0].scriptWitness.stack *= 2


if __name__ == "__main__":
    TrainingP2PTest(__file__).main()
