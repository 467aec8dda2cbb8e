#!/usr/bin/env python3
# Copyright (c) 2026-present The traincert developers
# Distributed under the MIT software license, see the accompanying
# file COPYING or https://opensource.org/license/mit/.
"""Test the consensus rules of training networks.

Every rule is tested by blocks that are valid but for one change: the block is refused for its own reason, and the same
block without the change is accepted. Then rotation of keys, redraws, reorganisations, restarts, -reindex, and
the data directory that is bound to its network.
"""

import hashlib
from collections import Counter
from dataclasses import replace
from math import isqrt
from pathlib import Path

from test_framework.messages import CBlock, CBlockHeader, uint256_from_compact
from test_framework.script import OP_1, OP_PUSHDATA4, OP_RETURN, CScript
from test_framework.test_framework import BitcoinTestFramework
from test_framework.training import (
    COORDINATORS,
    MINERS,
    SIGNATURE_SIZE,
    ContributionTable,
    Draw,
    TrainingChain,
    block_hash,
    block_hash_int,
    digest,
    draw_ticket,
    made_table,
    payload_script,
    update_merkle_root,
    xonly,
)
from test_framework.util import assert_equal, assert_raises_rpc_error, util_xor

# In the order of SPEC.md: of several faults the first is named. Reasons not covered here can be found by running:
#
#     $ grep -Eho 'Reject\(state, "[a-z-]+"' src/training/validation.cpp | sort -u
REASONS = [
    "missing",
    "multiple",
    "parse",
    "version",
    "height",
    "prevblock",
    "totals",
    "coordinator-sig",
    "winner-sig",
    "award",
    "weight",
    "draw",
    "beacon",
    "model",
    "round",
]

AWARD_AT = 4 + 299  # in a payload
DRAW_SIBLINGS_AT = AWARD_AT + 1 + 32 + 3 * 8 + 4
ROUND_SECONDS = 60


def pushdata4(payload):
    return CScript(bytes([OP_RETURN, OP_PUSHDATA4]) + len(payload).to_bytes(4, "little") + payload)


def with_byte(at, change):
    """Replace a byte of the payload."""
    return lambda payload: payload[:at] + change(payload[at]) + payload[at + 1 :]


def renumber_second(key_index):
    """Say that the second signature is by another key."""
    return lambda signatures: [signatures[0], (key_index, signatures[1][1])]


def change_draw(change):
    """Change fields of the draw; change is a function of it."""
    return lambda draw, winner_key, table: (replace(draw, **change(draw)), winner_key)


def other_leaf(draw, winner_key, table):
    """The next leaf instead of the one that holds the ticket."""
    index = (draw.index + 1) % table.count
    return table.draw(index), table.leaves[index].miner_key


def other_leaf_of_wrong_weight(draw, winner_key, table):
    other, miner_key = other_leaf(draw, winner_key, table)
    return replace(other, weight=other.weight + 1), miner_key


def other_miner(draw, winner_key, table):
    """Another miner's key on the winner's leaf."""
    return draw, next(key for key in MINERS if key != winner_key)


def first_sibling_sum(change):
    """Change the sum of the draw's first sibling."""
    return change_draw(
        lambda draw: dict(siblings=[draw.siblings[0]._replace(sum=change(draw.siblings[0].sum)), *draw.siblings[1:]])
    )


def not_drawn(draw, winner_key, table):
    return None, winner_key


def drawn_from_nothing(draw, winner_key, table):
    return Draw(digest("update"), 1000, 1000, 1000, 0, []), winner_key


def other_block(block):
    """Another block under the signatures of this one."""
    block.nTime += 1


def other_transactions(block):
    block.vtx[0].nLockTime = 0
    block.vtx[0].vin[0].nSequence = 0
    update_merkle_root(block)


class TrainingTest(BitcoinTestFramework):
    def set_test_params(self):
        self.setup_clean_chain = True
        self.num_nodes = 5
        self.training = TrainingChain(round_seconds=ROUND_SECONDS)
        # Starts at 4; other keys at 6 and 8.
        self.rotating = TrainingChain(
            keys={4: (2, COORDINATORS[:3]), 6: (1, COORDINATORS[3:]), 8: (3, COORDINATORS)}, beacon="rotating"
        )
        self.extra_args = [
            self.training.node_args,
            self.rotating.node_args,
            self.training.node_args,
            [],
            [],
        ]

    def setup_network(self):
        self.setup_nodes()  # each subtest connects those it needs

    def run_test(self):
        self.test_rules()
        self.test_first_reason()
        self.test_redraw()
        self.test_reorganisation()
        self.test_out_of_order()
        self.test_restart_and_reindex()
        self.test_below_start_height()
        self.test_rotation()
        self.test_data_directory()
        self.test_options()

    def submit(self, node, block, answer=None):
        assert_equal(node.submitblock(block.serialize().hex()), answer)

    def append(self, node, training, count=1, **overrides):
        """Append valid blocks to a node's tip."""
        blocks = [training.block(**overrides) for _ in range(count)]
        for block in blocks:
            self.submit(node, block)
        assert_equal(node.getbestblockhash(), block_hash(blocks[-1]))
        return blocks

    def count_verified(self, node):
        """How often a node verified the certificate of each block, by its debug.log."""
        log = node.debug_log_path.read_text(encoding="utf8", errors="replace")
        words = "Verified the training certificate of block "
        return Counter(line.partition(words)[2].strip() for line in log.splitlines() if words in line)

    def chain_hashes(self, node, start=1):
        return [node.getblockhash(height) for height in range(start, node.getblockcount() + 1)]

    def cases(self, height):
        """Return reason -> ways to earn it on a parent with contributions: overrides of TrainingChain.block()."""
        training = self.training
        other_network = TrainingChain(beacon="another beacon")
        return {
            "missing": {
                "no output for the payload": dict(scripts=lambda payload: []),
                "another magic": dict(payload=lambda payload: b"TCRX" + payload[4:]),
                "no OP_RETURN": dict(scripts=lambda payload: [CScript([payload])]),
                "a push that the script cuts short": dict(scripts=lambda payload: [payload_script(payload)[:-1]]),
            },
            "multiple": {
                "the payload twice": dict(scripts=lambda payload: [payload_script(payload)] * 2),
                "one more of the magic alone": dict(extra_output=payload_script(b"TCRT")),
                "one more that is not minimal": dict(extra_output=pushdata4(b"TCRT")),
            },
            "parse": {
                "nothing after the magic": dict(payload=lambda payload: payload[:4]),
                "a byte short": dict(payload=lambda payload: payload[:-1]),
                "a signature short": dict(payload=lambda payload: payload[:-SIGNATURE_SIZE]),
                "a byte too many": dict(payload=lambda payload: payload + b"\x00"),
                "an award of 2": dict(payload=with_byte(AWARD_AT, lambda award: b"\x02")),
                "a push that is not minimal": dict(scripts=lambda payload: [pushdata4(payload)]),
                "an opcode after the push": dict(scripts=lambda payload: [CScript([OP_RETURN, payload, OP_1])]),
                "a long number of siblings": dict(
                    payload=with_byte(DRAW_SIBLINGS_AT, lambda count: bytes([0xFD, count, 0]))
                ),
                "far too many siblings": dict(
                    payload=with_byte(DRAW_SIBLINGS_AT, lambda count: b"\xfe\x00\x00\x00\x02")
                ),
                "too many siblings for a CompactSize": dict(
                    payload=with_byte(DRAW_SIBLINGS_AT, lambda count: b"\xff" * 9)
                ),
            },
            "version": {
                "version 0": dict(cert=dict(version=0)),
                "version 2": dict(cert=dict(version=2)),
                "version 2 of unknown layout": dict(payload=lambda payload: b"TCRT\x02"),
            },
            "height": {
                "the parent's": dict(cert=dict(height=height - 1)),
                "the next": dict(cert=dict(height=height + 1)),
                "the greatest": dict(cert=dict(height=2**32 - 1)),
            },
            "prevblock": {
                "another block": dict(cert=dict(prev_block=digest("another block"))),
                "the parent reversed": dict(cert=dict(prev_block=bytes.fromhex(training.tip))),
            },
            "totals": {
                "no count": dict(cert=dict(contributions_count=0)),
                "no weight": dict(cert=dict(contributions_weight=0)),
                "no root": dict(cert=dict(contributions_root=bytes(32))),
                "a root alone": dict(cert=dict(contributions_weight=0, contributions_count=0)),
                "a weight alone": dict(cert=dict(contributions_root=bytes(32), contributions_count=0)),
                "a count alone": dict(cert=dict(contributions_root=bytes(32), contributions_weight=0)),
            },
            "coordinator-sig": {
                "none": dict(signers=()),
                "one of two": dict(signers=(0,)),
                "three of two": dict(signers=(0, 1, 2)),
                "the same key twice": dict(signers=(0, 0)),
                "descending order": dict(signers=(2, 0)),
                "a key that is not there": dict(signatures=renumber_second(3)),
                "another key's signature": dict(signatures=renumber_second(2)),
                "zeros": dict(signatures=lambda signatures: [signatures[0], (1, bytes(SIGNATURE_SIZE))]),
                "another certificate": dict(other_certificate=lambda cert: setattr(cert, "loss_after", 0)),
                "another network": dict(other_certificate=lambda cert: other_network.sign_certificate(cert, height)),
            },
            "winner-sig": {
                "another key's": dict(winner=COORDINATORS[0]),
                "zeros": dict(payload=lambda payload: payload[:-SIGNATURE_SIZE] + bytes(SIGNATURE_SIZE)),
                "another header's": dict(after=other_block),
                "other transactions'": dict(after=other_transactions),
                "no key": dict(cert=dict(winner_key=b"\xff" * 32), winner=COORDINATORS[0]),
            },
            "award": {"appointed where it must be drawn": dict(draw=not_drawn)},
            "weight": {
                "one more": dict(draw=change_draw(lambda draw: dict(weight=draw.weight + 1))),
                "one less": dict(draw=change_draw(lambda draw: dict(weight=draw.weight - 1))),
                "of more params": dict(draw=change_draw(lambda draw: dict(params=4 * draw.params))),
                "of a greater loss_reduction": dict(draw=change_draw(lambda draw: dict(loss_reduction=2**64 - 1))),
                "nothing": dict(draw=dict(params=0, loss_reduction=0, weight=0)),
            },
            "draw": {
                "another leaf": dict(draw=other_leaf),
                "another round's": dict(draw_round=self.other_round()),
                "another table's": dict(draw_parent=made_table("another")),
                "another miner": dict(draw=other_miner),
                "another update": dict(draw=dict(update_hash=digest("another update"))),
                "a leaf of greater weight": dict(
                    draw=change_draw(
                        lambda draw: dict(params=4 * draw.params, weight=isqrt(4 * draw.params * draw.loss_reduction))
                    )
                ),
                "another index": dict(draw=change_draw(lambda draw: dict(index=draw.index ^ 1))),
                "an index beyond the count": dict(draw=change_draw(lambda draw: dict(index=draw.index + 8))),
                "the greatest index": dict(draw=dict(index=2**32 - 1)),
                "no siblings": dict(draw=dict(siblings=[])),
                "a sibling short": dict(draw=change_draw(lambda draw: dict(siblings=draw.siblings[:-1]))),
                "a sibling too many": dict(
                    draw=change_draw(lambda draw: dict(siblings=draw.siblings + draw.siblings[-1:]))
                ),
                "siblings root to leaf": dict(draw=change_draw(lambda draw: dict(siblings=draw.siblings[::-1]))),
                "a sibling of another sum": dict(draw=first_sibling_sum(lambda total: total + 1)),
                "a sum that overflows": dict(draw=first_sibling_sum(lambda total: 2**64 - 1)),
            },
            "beacon": {
                "no preimage": dict(reveal=digest("no preimage")),
                "the parent's again": dict(reveal=training.reveal(height - 1)),
                "the next one already": dict(reveal=training.reveal(height + 1)),
                "zeros": dict(reveal=bytes(32)),
            },
            "model": {
                "another": dict(cert=dict(model_before=digest("another model"))),
                "the network's first": dict(cert=dict(model_before=training.model)),
                "its own model_after": dict(
                    cert=dict(model_before=digest(f"model {height} own"), model_after=digest(f"model {height} own"))
                ),
            },
            "round": {
                "at once": dict(round=1),
                "a second too early": dict(round=1, ntime=self.parent().time + ROUND_SECONDS - 1),
                "the next one a second too early": dict(round=2, ntime=self.parent().time + 2 * ROUND_SECONDS - 1),
                "the last one": dict(round=65535, ntime=self.parent().time + ROUND_SECONDS),
            },
        }

    def cases_at_start(self):
        """The same for the first certificate, whose winner is appointed."""
        return {
            "award": {"drawn": dict(draw=drawn_from_nothing)},
            "beacon": {
                "no preimage": dict(reveal=digest("no preimage")),
                "the anchor": dict(reveal=self.training.beacon),
                "the next one already": dict(reveal=self.training.reveal(2)),
            },
            "model": {"not -trainingmodel": dict(cert=dict(model_before=digest("another model")))},
        }

    def cases_after_empty_cycle(self):
        """The same for a parent without contributions."""
        before = self.training.made[self.parent().certificate.prev_block[::-1].hex()]
        return {
            "award": {
                "drawn from nothing": dict(draw=drawn_from_nothing),
                "drawn from the table before": dict(draw_parent=before.table),
            },
            "beacon": {"no preimage": dict(reveal=digest("no preimage"))},
            "model": {"another": dict(cert=dict(model_before=digest("another model")))},
            "round": {"at once": dict(round=1)},
        }

    def parent(self):
        """The block that the next one is built on."""
        return self.training.made[self.training.tip]

    def other_round(self):
        """A round in which another leaf than round 0's is drawn."""
        prev_block = bytes.fromhex(self.training.tip)[::-1]
        parent = self.parent()
        reveal = self.training.reveal(parent.height + 1)

        def winner(round_):
            return parent.table.find(draw_ticket(reveal, prev_block, round_, parent.table.weight))

        return next(round_ for round_ in range(1, 1000) if winner(round_) != winner(0))

    def test_rules(self):
        self.log.info("Blocks with one fault are refused for it, and accepted without it: with the first certificate")
        node = self.nodes[0]
        self.check_cases(node, self.cases_at_start())
        self.append(node, self.training)

        self.log.info("... drawn from the parent's table")
        eight = made_table("eight", [(1000 + i, 10**6) for i in range(8)])  # each path has three siblings
        self.append(node, self.training, table=eight)
        cases = self.cases(height=3)
        assert_equal(list(cases), REASONS)
        self.check_cases(node, cases)

        self.log.info("... after a cycle without contributions")
        self.append(node, self.training, table=ContributionTable())
        self.check_cases(node, self.cases_after_empty_cycle())
        self.append(node, self.training, 2)

    def check_cases(self, node, cases):
        parent = self.training.tip
        for reason, ways in cases.items():
            for comment, overrides in ways.items():
                self.log.debug(f"bad-traincert-{reason}: {comment}")
                # A certificate of its own, or the two bodies that a node keeps of each would be used up.
                name = f" {reason}: {comment}"
                time = overrides.get("ntime")
                wrong = self.training.block(parent, name=name, **overrides)
                self.submit(node, wrong, f"bad-traincert-{reason}")
                assert_equal(node.getbestblockhash(), parent)
                valid = self.training.block(parent, name=name, ntime=time)
                self.submit(node, valid)
                assert_equal(node.getbestblockhash(), block_hash(valid))
                node.invalidateblock(block_hash(valid))
                assert_equal(node.getbestblockhash(), parent)
        self.training.tip = parent

    def test_first_reason(self):
        self.log.info("Of several faults the first in the order of SPEC.md is named")
        node = self.nodes[0]
        parent = self.training.tip
        height = self.parent().height + 1
        faults = {
            "missing": dict(scripts=lambda payload: []),
            "multiple": dict(scripts=lambda payload: [payload_script(payload)] * 2),
            "parse": dict(scripts=lambda payload: [pushdata4(payload)]),
            "version": dict(cert=dict(version=2)),
            "height": dict(cert=dict(height=height + 1)),
            "prevblock": dict(cert=dict(prev_block=digest("another block"))),
            "totals": dict(cert=dict(contributions_count=0)),
            "coordinator-sig": dict(signers=(0,)),
            "winner-sig": dict(winner=COORDINATORS[0]),
            "award": dict(draw=not_drawn),
            "weight": dict(draw=other_leaf_of_wrong_weight),
            "draw": dict(draw=other_leaf),
            "beacon": dict(reveal=digest("no preimage")),
            "model": dict(cert=dict(model_before=digest("another model"))),
            "round": dict(round=1),
        }
        assert_equal(list(faults), REASONS)
        for i, reason in enumerate(REASONS):
            overrides = dict(cert={})
            for fault in reversed([faults[each] for each in REASONS[i:]]):
                overrides = {**overrides, **fault, "cert": {**overrides["cert"], **fault.get("cert", {})}}
            self.submit(
                node, self.training.block(parent, name=f" first {reason}", **overrides), f"bad-traincert-{reason}"
            )
        self.training.tip = parent
        self.append(node, self.training)
        # No certificate had more than one body that was stored.
        assert_equal(node.gettrainingequivocations(), [])

    def test_redraw(self):
        self.log.info("A slot may be redrawn for the r-th time from r times -traininground after its parent on")
        node = self.nodes[0]
        for round_ in (1, 2, 7):
            parent = self.training.tip
            allowed = self.parent().time + round_ * ROUND_SECONDS
            early = self.training.block(name=" early", round=round_, ntime=allowed - 1, move_tip=False)
            self.submit(node, early, "bad-traincert-round")
            block = self.training.block(parent, round=round_, ntime=allowed)
            self.submit(node, block)
            assert_equal(node.gettrainingcertificate()["round"], round_)

        self.log.info("A redrawn block is from the future until the node's clock is near")
        parent = self.parent()
        late = self.training.block(round=200, ntime=parent.time + 200 * ROUND_SECONDS)
        self.submit(node, late, "time-too-new")
        late_time = parent.time + 200 * ROUND_SECONDS
        node.setmocktime(late_time)
        self.late_args = [*self.training.node_args, f"-mocktime={late_time}"]  # from here on
        self.submit(node, late)
        assert_equal(node.getbestblockhash(), block_hash(late))

        self.log.info("A winner that was late after all does not replace its redraw, unless its chain becomes longer")
        slot = self.training.tip
        redraw = self.training.block(slot, round=1, ntime=self.parent().time + ROUND_SECONDS)
        self.submit(node, redraw)
        self.training.tip = slot
        absent = self.training.block(slot)
        self.submit(node, absent, "inconclusive")
        assert_equal(node.getbestblockhash(), block_hash(redraw))
        longer = self.training.block(block_hash(absent))
        self.submit(node, longer)
        assert_equal(node.getbestblockhash(), block_hash(longer))
        # Two certificates of the coordinator for one slot are no equivocation of a winner.
        assert_equal(node.gettrainingequivocations(), [])

    def test_reorganisation(self):
        self.log.info("The longer of two training chains wins, and the other again once it is longer")
        node = self.nodes[0]
        fork = self.training.tip
        ours = self.append(node, self.training, 3, name=" ours")
        self.training.tip = fork
        theirs = [self.training.block(name=" theirs") for _ in range(4)]
        for block in theirs[:3]:
            self.submit(node, block, "inconclusive")
            assert_equal(node.getbestblockhash(), block_hash(ours[-1]))
        self.submit(node, theirs[3])
        assert_equal(node.getbestblockhash(), block_hash(theirs[3]))
        self.check_tip(node)

        self.training.tip = block_hash(ours[-1])
        more = [self.training.block(name=" ours") for _ in range(2)]
        self.submit(node, more[0], "inconclusive")
        self.submit(node, more[1])
        assert_equal(node.getbestblockhash(), block_hash(more[1]))
        self.check_tip(node)

        self.log.info("A fork with a wrong draw is refused when it becomes longer, and all that is built on it")
        self.training.tip = fork
        fork_blocks = [
            self.training.block(name=" wrong", **wrong) for wrong in ({}, {}, dict(draw=other_leaf), {}, {}, {})
        ]
        for block in fork_blocks:
            self.submit(node, block, "inconclusive")
        assert_equal(node.getbestblockhash(), block_hash(more[1]))
        self.submit(node, self.training.block(), "bad-prevblk")
        status = {tip["hash"]: tip["status"] for tip in node.getchaintips()}
        assert_equal(status[block_hash(fork_blocks[-1])], "invalid")
        self.training.tip = block_hash(more[1])
        self.append(node, self.training)

        self.log.info("invalidateblock and reconsiderblock lead back and forth")
        tip = node.getbestblockhash()
        node.invalidateblock(block_hash(ours[1]))
        assert_equal(node.getbestblockhash(), block_hash(theirs[-1]))
        self.check_tip(node)
        node.invalidateblock(block_hash(theirs[0]))
        assert_equal(node.getbestblockhash(), block_hash(fork_blocks[1]))
        self.check_tip(node)
        node.reconsiderblock(block_hash(theirs[0]))
        node.reconsiderblock(block_hash(ours[1]))
        assert_equal(node.getbestblockhash(), tip)
        self.append(node, self.training)

    def check_tip(self, node):
        """The node shows the certificate that was made for its tip."""
        shown = node.gettrainingcertificate()
        tip = node.getbestblockhash()
        assert_equal(shown.pop("blockhash"), tip)
        del shown["winner_signature"]
        assert_equal(shown, self.training.made[tip].certificate.json())

    def test_out_of_order(self):
        self.log.info("Blocks may arrive in any order after their headers")
        node = self.nodes[0]
        tip = self.training.tip
        blocks = [self.training.block() for _ in range(6)]
        for block in blocks:
            node.submitheader(CBlockHeader(block).serialize().hex())
        for i in (5, 1, 4, 2, 3):
            self.submit(node, blocks[i], "inconclusive")
        assert_equal(node.getbestblockhash(), tip)
        self.submit(node, blocks[0])
        assert_equal(node.getbestblockhash(), block_hash(blocks[5]))
        self.check_tip(node)

        self.log.info("... and a wrong one is found when its parent is there, with all that are built on it")
        wrong = [
            self.training.block(name=" wrong", **overrides) for overrides in ({}, dict(reveal=digest("wrong")), {})
        ]
        for block in wrong:
            node.submitheader(CBlockHeader(block).serialize().hex())
        self.submit(node, wrong[2], "inconclusive")
        self.submit(node, wrong[1], "inconclusive")
        self.submit(node, wrong[0])
        assert_equal(node.getbestblockhash(), block_hash(wrong[0]))
        self.training.tip = block_hash(wrong[0])
        self.append(node, self.training)

    def test_restart_and_reindex(self):
        node = self.nodes[0]
        tip = node.getbestblockhash()
        chain = set(self.chain_hashes(node))
        self.log.info("Each certificate was verified once when its block was submitted")
        submitted = self.count_verified(node)
        assert_equal({submitted[block] for block in chain}, {1})
        assert_equal(max(submitted.values()), 1)

        self.log.info("... and once on a node that got the chain from its peer")
        peer = self.nodes[2]
        peer.setmocktime(node.mocktime)
        self.connect_nodes(0, 2)
        self.sync_blocks([node, peer])
        received = self.count_verified(peer)
        assert_equal({received[block] for block in chain}, {1})
        assert_equal(max(received.values()), 1)
        self.disconnect_nodes(0, 2)

        def verified_again(option):
            before = self.count_verified(node)
            self.restart_node(0, extra_args=[*self.late_args, *option])
            self.wait_until(lambda: node.getbestblockhash() == tip)
            self.check_tip(node)
            return self.count_verified(node) - before

        self.log.info("... not again by a restart")
        assert_equal(verified_again([]), {})
        self.log.info("... nor by -reindex-chainstate")
        assert_equal(verified_again(["-reindex-chainstate"]), {})
        self.log.info("... and once by -reindex")
        reindexed = verified_again(["-reindex"])
        assert_equal({reindexed[block] for block in chain}, {1})
        assert_equal(max(reindexed.values()), 1)

        self.log.info("The next blocks connect, and a reorganisation works, right after a restart")
        verified_again([])
        fork = self.append(node, self.training, 2, name=" ours")
        self.training.tip = tip
        theirs = [self.training.block(name=" theirs") for _ in range(3)]
        self.submit(node, theirs[0], "inconclusive")
        self.restart_node(0, extra_args=self.late_args)
        assert_equal(node.getbestblockhash(), block_hash(fork[-1]))
        self.submit(node, theirs[1], "inconclusive")
        self.submit(node, theirs[2])
        assert_equal(node.getbestblockhash(), block_hash(theirs[2]))
        assert node.verifychain(4, 0)

    def test_below_start_height(self):
        self.log.info("Below the start height certificates mean nothing, and proof of work is needed")
        node, training = self.nodes[1], self.rotating
        for script in (None, payload_script(b"TCRT"), pushdata4(b"TCRT and more")):
            block = training.block(extra_output=script)
            target = uint256_from_compact(block.nBits)
            wrong = CBlock(block)
            wrong.vtx = block.vtx
            while block_hash_int(wrong) <= target:
                wrong.nNonce += 1
            with node.assert_debug_log([f"CheckTrainingHeader: {block_hash(wrong)}, high-hash, proof of work failed"]):
                self.submit(node, wrong, "high-hash")
            assert_raises_rpc_error(-25, "high-hash", node.submitheader, CBlockHeader(wrong).serialize().hex())
            self.submit(node, block)
        assert_equal(node.getblockcount(), 3)

    def test_rotation(self):
        self.log.info("From each rotation on the new keys sign, and the old ones do not")
        node, training = self.nodes[1], self.rotating
        in_force = []
        while node.getblockcount() < 10:
            parent = training.tip
            height = node.getblockcount() + 1
            threshold, secrets = training.keys_at(height)
            info = node.gettraininginfo()
            in_force.append([entry["in_force"] for entry in info["keys"]])
            assert_equal(
                info["keys"],
                [
                    {
                        "height": start,
                        "threshold": m,
                        "keys": [xonly(key).hex() for key in keys],
                        "in_force": keys == secrets,
                    }
                    for start, (m, keys) in training.keys.items()
                ],
            )
            for other in training.keys:
                if training.keys_at(other) != (threshold, secrets):
                    by_others = training.block(
                        parent, other_certificate=lambda cert, other=other: training.sign_certificate(cert, other)
                    )
                    self.submit(node, by_others, "bad-traincert-coordinator-sig")
            training.tip = parent
            self.append(node, training)
        assert_equal(in_force, [[True, False, False]] * 2 + [[False, True, False]] * 2 + [[False, False, True]] * 3)
        self.log.info("... also by -reindex, when each block is verified by the keys of its height")
        self.restart_node(1, extra_args=[*training.node_args, "-reindex"])
        self.wait_until(lambda: node.getblockcount() == 10)

    def files(self, node):
        """Names, contents and times of all files that hold the chain."""
        found = {}
        for folder in (node.blocks_path, node.chain_path / "chainstate"):
            for path in sorted(Path(folder).rglob("*")):
                content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
                found[str(path)] = (content, path.stat().st_mtime_ns)
        return found

    def check_refused(self, node, extra_args, message):
        before = self.files(node)
        node.assert_start_raises_init_error(extra_args=extra_args, expected_msg=message)
        assert_equal(self.files(node), before)

    def test_data_directory(self):
        ours = self.training.chain_id.hex()
        another = TrainingChain(beacon="another beacon")
        self.log.info("A data directory of no training network is refused with training options once it has blocks")
        node = self.nodes[3]
        record = node.blocks_path / "training_chain_id"
        assert not record.exists()
        self.generate(node, 1, sync_fun=self.no_op)
        self.stop_node(3)
        refusal = (
            f'Error: The blocks in "{node.blocks_path}" are of no training network, but the options given define '
            f"training network {ours}. Give no -training... options, or another -datadir."
        )
        for more in ([], ["-reindex"], ["-reindex-chainstate"], ["-prune=1"]):
            self.check_refused(node, [*self.training.node_args, *more], refusal)
        self.start_node(3, extra_args=[])
        assert_equal(node.getblockcount(), 1)
        assert not record.exists()
        self.stop_node(3)

        self.log.info("... also without an XOR key, and if the first file of blocks is gone")
        key, file = node.blocks_path / "xor.dat", node.blocks_path / "blk00000.dat"
        plain = util_xor(file.read_bytes(), key.read_bytes(), offset=0)
        kept = key.read_bytes(), file.read_bytes()
        key.unlink()
        file.write_bytes(plain)
        self.check_refused(node, self.training.node_args, refusal)
        key.write_bytes(bytes(8))
        self.check_refused(node, self.training.node_args, refusal)
        file.rename(node.blocks_path / "blk00001.dat")
        self.check_refused(node, self.training.node_args, refusal)
        (node.blocks_path / "blk00001.dat").unlink()
        self.check_refused(node, self.training.node_args, refusal)
        key.write_bytes(kept[0])
        file.write_bytes(kept[1])

        self.log.info("... but not while it has none but the genesis block")
        node = self.nodes[4]
        self.stop_node(4)
        self.start_node(4, extra_args=another.node_args)
        record = node.blocks_path / "training_chain_id"
        assert_equal(record.read_text(encoding="utf8"), another.chain_id.hex() + "\n")
        self.stop_node(4)

        self.log.info("... and from then on it is that network's, even without blocks")
        refusal = (
            f'Error: The blocks in "{node.blocks_path}" are of the training network {another.chain_id.hex()}, but the '
            "options given define {}. Give the -training... options that they were made with, or another -datadir."
        )
        self.check_refused(node, self.training.node_args, refusal.format(f"training network {ours}"))
        self.check_refused(node, [], refusal.format("no training network"))

        self.log.info("One of a training network is refused without its options, and with another's")
        node = self.nodes[0]
        record = node.blocks_path / "training_chain_id"
        assert_equal(record.read_text(encoding="utf8"), ours + "\n")
        tip = node.getbestblockhash()
        self.stop_node(0)
        refusal = (
            f'Error: The blocks in "{node.blocks_path}" are of the training network {ours}, but the options given '
            "define {}. Give the -training... options that they were made with, or another -datadir."
        )
        self.check_refused(node, [], refusal.format("no training network"))
        for more in ([], ["-reindex"], ["-reindex-chainstate"]):
            network = f"training network {another.chain_id.hex()}"
            self.check_refused(node, [*another.node_args, *more], refusal.format(network))
        self.start_node(0, extra_args=self.late_args)
        assert_equal(node.getbestblockhash(), tip)
        self.stop_node(0)

        self.log.info("A damaged record is refused too")
        record.write_text(ours[:-1] + "\n", encoding="utf8")
        damaged = refusal.replace(f"network {ours}", f"network {ours[:-1]}", 1).format(f"training network {ours}")
        self.check_refused(node, self.late_args, damaged)
        record.write_text(ours + "\n", encoding="utf8")
        self.start_node(0, extra_args=self.late_args)
        assert_equal(node.getbestblockhash(), tip)

    def test_options(self):
        self.log.info("A wrong option stops the node and is named")
        self.stop_node(1)
        node = self.nodes[1]
        key, other = (xonly(secret).hex() for secret in COORDINATORS[:2])
        keys, beacon, model = f"-trainingkeys=1:1:{key}", f"-trainingbeacon={'aa' * 32}", f"-trainingmodel={'bb' * 32}"
        needs = "a training network needs -trainingkeys, -trainingbeacon and -trainingmodel."
        rest = [beacon, model]
        for extra_args, message in (
            ([f"-trainingkeys=1:{key}", *rest], f"-trainingkeys=1:{key}: expected <height>:<m>:<key>[,<key>...]."),
            (
                [f"-trainingkeys=0:1:{key}", *rest],
                f"-trainingkeys=0:1:{key}: the height must be a whole number from 1 to 2147483647, not '0'.",
            ),
            (
                [f"-trainingkeys=1:2:{key}", *rest],
                f"-trainingkeys=1:2:{key}: m must be a whole number from 1 to the number of keys (1), not '2'.",
            ),
            ([f"-trainingkeys=1:1:{key},{key}", *rest], f"-trainingkeys=1:1:{key},{key}: key '{key}' is there twice."),
            (
                [keys, f"-trainingkeys=1:1:{other}", *rest],
                f"-trainingkeys=1:1:{other}: height 1 is there twice.",
            ),
            (rest, f"-trainingkeys is missing: {needs}"),
            ([keys, model], f"-trainingbeacon is missing: {needs}"),
            ([keys, beacon], f"-trainingmodel is missing: {needs}"),
            ([keys, "-trainingbeacon=aa", model], "-trainingbeacon must be 64 hex digits, not 'aa'."),
            (
                [keys, *rest, "-traininground=0"],
                "-traininground must be a whole number of seconds from 1 to 86400, not '0'.",
            ),
        ):
            node.assert_start_raises_init_error(extra_args=extra_args, expected_msg=f"Error: {message}")


if __name__ == "__main__":
    TrainingTest(__file__).main()
