#!/usr/bin/env python3
# Copyright (c) 2026-present The traincert developers
# Distributed under the MIT software license, see the accompanying
# file COPYING or https://opensource.org/license/mit/.
"""Test which block bodies of a training network a node stores, and what it keeps of them.

Equivocation: of one winner's bodies two are stored, and any other once a child of it is. Headers alone change nothing,
and the order in which blocks arrive does not matter. Then pruning, -loadblock, lost blocks, unreadable parents, full
disks, and UTXO snapshots.
"""

import os
import re
import resource
from pathlib import Path
from random import Random
from threading import Thread

from test_framework.authproxy import JSONRPCException
from test_framework.messages import MAGIC_BYTES, CBlockHeader
from test_framework.p2p import P2PDataStore
from test_framework.script import OP_RETURN, CScript
from test_framework.test_framework import BitcoinTestFramework
from test_framework.training import TrainingChain, block_hash, block_hash_int, digest
from test_framework.util import assert_equal, assert_raises_rpc_error, util_xor

ROUND_SECONDS = 60
NOT_STORED = "inconclusive-not-stored"


class TrainingBodiesTest(BitcoinTestFramework):
    def set_test_params(self):
        self.setup_clean_chain = True
        self.num_nodes = 4
        self.training = TrainingChain(round_seconds=ROUND_SECONDS)
        self.extra_args = [self.training.node_args, self.training.node_args, self.training.node_args, []]
        self.extra_args[3] = [*self.training.node_args, "-prune=1", "-fastprune"]

    def setup_network(self):
        self.setup_nodes()  # each subtest connects those it needs

    def run_test(self):
        self.append(self.nodes[0])
        self.evidence = []
        self.test_two_bodies()
        self.test_two_invalid_bodies()
        self.test_third_body()
        self.test_headers_alone()
        self.test_restart_and_reindex()
        self.test_any_order()
        self.test_loadblock()
        self.test_lost_body()
        self.test_unreadable_parent()
        self.test_snapshot()
        self.test_full_disk()
        self.test_missing_entry()
        self.test_prune()

    def submit(self, node, block, answer=None):
        assert_equal(node.submitblock(block.serialize().hex()), answer)

    def submit_headers(self, node, blocks):
        for block in blocks:
            node.submitheader(CBlockHeader(block).serialize().hex())

    def append(self, node, count=1, **overrides):
        """Append valid blocks to a node's tip."""
        blocks = [self.training.block(**overrides) for _ in range(count)]
        for block in blocks:
            self.submit(node, block)
        assert_equal(node.getbestblockhash(), block_hash(blocks[-1]))
        return blocks

    def build_on(self, parent, count, **overrides):
        """Blocks on a block that need not be a node's tip."""
        self.training.tip = block_hash(parent)
        return [self.training.block(**overrides) for _ in range(count)]

    def listed(self, *bodies):
        """What gettrainingequivocations says of bodies that are stored."""
        certificate = self.training.certificate_of(bodies[0])
        return {
            "height": certificate.height,
            "round": certificate.round,
            "winner_key": certificate.winner_key.hex(),
            "blocks": [block_hash(body) for body in bodies],
        }

    def check_evidence(self, node):
        assert_equal(node.gettrainingequivocations(), [self.listed(*bodies) for bodies in self.evidence])

    def status(self, node, block):
        """How getchaintips calls a block that nothing is built on."""
        return next(tip["status"] for tip in node.getchaintips() if tip["hash"] == block_hash(block))

    def test_two_bodies(self):
        self.log.info("Two bodies of a certificate are stored as evidence, and any other is left alone")
        node = self.nodes[0]
        self.check_evidence(node)
        first, second, third = self.training.bodies(3)
        # The winner can also make any number of signatures for one header.
        fourth = self.training.block(ntime=first.nTime, aux=digest("aux"), move_tip=False)
        assert block_hash(first) != block_hash(fourth)
        self.submit(node, first)
        self.check_evidence(node)
        self.submit(node, second, "inconclusive")
        self.evidence.append([first, second])
        self.check_evidence(node)
        for body in (third, fourth, third):
            self.submit(node, body, NOT_STORED)
            assert_equal(self.status(node, body), "headers-only")
            assert_raises_rpc_error(-1, "Block not available (not fully downloaded)", node.getblock, block_hash(body))
        for body in (first, second):
            self.submit(node, body, "duplicate")
        assert_equal(self.status(node, second), "valid-headers")
        self.check_evidence(node)
        assert_equal(node.getbestblockhash(), block_hash(first))
        self.training.tip = block_hash(first)
        self.append(node)

    def test_two_invalid_bodies(self):
        self.log.info("A winner who signs two invalid blocks has lost its round, and a redraw wins")
        node = self.nodes[0]
        parent = self.training.tip
        first, second = self.training.bodies(2, fees=1)
        self.submit(node, first, "bad-cb-amount")
        self.submit(node, second, "bad-cb-amount")
        self.evidence.append([first, second])
        self.check_evidence(node)
        valid = self.training.block(parent, move_tip=False)
        self.submit(node, valid, NOT_STORED)
        assert_equal(node.getbestblockhash(), parent)
        time = self.training.made[parent].time + ROUND_SECONDS
        redraw = self.training.block(parent, round=1, ntime=time)
        self.submit(node, redraw)
        assert_equal(node.getbestblockhash(), block_hash(redraw))
        self.append(node)

    def test_third_body(self):
        self.log.info("A third body is stored once a child of it is, which only the coordinator can make")
        node = self.nodes[0]
        first, second, third, fourth = self.training.bodies(4)
        self.submit(node, first)
        self.submit(node, second, "inconclusive")
        self.evidence.append([first, second])
        child, grandchild = self.build_on(third, 2)
        self.submit_headers(node, [third, child, grandchild])
        self.submit(node, third, NOT_STORED)
        self.submit(node, fourth, NOT_STORED)
        self.check_evidence(node)
        # The node still has the third body in memory.
        self.submit(node, child)
        assert_equal(node.getbestblockhash(), block_hash(child))
        self.evidence[-1].append(third)
        self.check_evidence(node)
        self.submit(node, third, "duplicate")
        self.submit(node, grandchild)
        self.submit(node, fourth, NOT_STORED)
        self.append(node)

        self.log.info("... also if it is not in memory any more, which keeps two blocks of the greatest size")
        first, second, third = self.training.bodies(3)
        others = self.training.bodies(9, extra_output=CScript([OP_RETURN, bytes(900_000)]))
        child = self.build_on(third, 1)[0]
        self.submit_headers(node, [third])
        self.submit(node, first)
        self.submit(node, second, "inconclusive")
        self.submit(node, third, NOT_STORED)
        for body in others:
            self.submit(node, body, NOT_STORED)
        self.submit(node, child, "inconclusive")
        assert_equal(node.getbestblockhash(), block_hash(first))
        self.submit(node, third)
        assert_equal(node.getbestblockhash(), block_hash(child))
        self.evidence.append([first, second, third])
        self.check_evidence(node)

        self.log.info("... and all below it that were left alone, one after the other")
        self.training.tip = block_hash(child)
        low = self.training.bodies(3)
        high = self.training.bodies(3, block_hash(low[2]))
        top = self.build_on(high[2], 1)[0]
        self.submit_headers(node, [low[2], high[0], high[1], high[2], top])
        for body, answer in zip(low, (None, "inconclusive", NOT_STORED), strict=True):
            self.submit(node, body, answer)
        self.submit(node, high[0])
        assert_equal(node.getbestblockhash(), block_hash(high[0]))
        self.submit(node, high[1], "inconclusive")
        self.submit(node, high[2], NOT_STORED)
        self.submit(node, top)
        assert_equal(node.getbestblockhash(), block_hash(top))
        self.evidence += [low, high]
        self.check_evidence(node)
        self.append(node)

    def test_headers_alone(self):
        self.log.info("Headers, which cost nothing, decide nothing: a longer chain of them does not pin the tip")
        node = self.nodes[0]
        first, second, third = self.training.bodies(3)
        pin = self.forged_headers(first, 500)
        honest = self.build_on(third, 10)
        self.submit(node, first)
        self.submit(node, second, "inconclusive")
        self.submit_headers(node, pin)
        self.submit(node, third, NOT_STORED)
        self.submit(node, honest[0])
        for block in honest[1:]:
            self.submit(node, block)
        assert_equal(node.getbestblockhash(), block_hash(honest[-1]))
        self.evidence.append([first, second, third])

        self.log.info("... nor has it more bodies stored")
        bodies = self.training.bodies(20)
        self.submit(node, bodies[0])
        self.submit(node, bodies[1], "inconclusive")
        for i, body in enumerate(bodies[2:], start=1):
            self.submit_headers(node, [body, *self.forged_headers(body, 2 * i)])
            self.submit(node, body, NOT_STORED)
        self.evidence.append(bodies[:2])
        self.check_evidence(node)
        self.training.tip = block_hash(bodies[0])
        self.append(node)

    def forged_headers(self, parent, count):
        """Headers on a block that nobody has certified or signed."""
        headers = []
        previous, time = parent, parent.nTime
        for _ in range(count):
            header = CBlockHeader(previous)
            header.hashPrevBlock = int(block_hash(previous), 16)
            header.hashMerkleRoot = int.from_bytes(digest(f"{block_hash(previous)}"), "big")
            time += 1
            header.nTime = time
            headers.append(header)
            previous = header
        return headers

    def test_restart_and_reindex(self):
        self.log.info("Evidence and tip outlive a restart, -reindex-chainstate and -reindex")
        node = self.nodes[0]
        tip = node.getbestblockhash()
        for option in ([], ["-reindex-chainstate"], ["-reindex"]):
            self.restart_node(0, extra_args=[*self.training.node_args, *option])
            self.wait_until(lambda: node.getbestblockhash() == tip)
            if not option:
                self.check_evidence(node)
        # The order of arrival is then that of the files, in which a child may come before its parent.
        listed = [{**each, "blocks": sorted(each["blocks"])} for each in node.gettrainingequivocations()]
        expected = [self.listed(*bodies) for bodies in self.evidence]
        assert_equal(listed, [{**each, "blocks": sorted(each["blocks"])} for each in expected])
        self.restart_node(0, extra_args=self.training.node_args)
        self.append(node)

        self.log.info("A body that was left alone before a restart is stored when a child of it comes")
        first, second, third = self.training.bodies(3)
        child, grandchild = self.build_on(third, 2)
        self.submit(node, first)
        self.submit(node, second, "inconclusive")
        self.submit_headers(node, [third, child])
        self.submit(node, third, NOT_STORED)
        self.submit(node, child)
        assert_equal(node.getbestblockhash(), block_hash(child))
        self.training.tip = block_hash(child)
        first, second, third = self.training.bodies(3)
        child, grandchild = self.build_on(third, 2)
        self.submit(node, first)
        self.submit(node, second, "inconclusive")
        self.submit_headers(node, [third, child])
        self.submit(node, child, "inconclusive")
        self.restart_node(0, extra_args=self.training.node_args)
        self.submit(node, third)
        assert_equal(node.getbestblockhash(), block_hash(child))
        self.submit(node, grandchild)

    def test_any_order(self):
        self.log.info("Blocks with equivocations lead to the same tip in any order, each submitted once")
        node = self.nodes[0]
        random = Random(1)  # noqa: S311 - which order, not which key
        for _ in range(20):
            blocks = self.equivocating_chain(random)
            tip = self.training.tip
            self.submit_headers(node, blocks)
            random.shuffle(blocks)
            for block in blocks:
                assert node.submitblock(block.serialize().hex()) in (None, "inconclusive", NOT_STORED)
            assert_equal(node.getbestblockhash(), tip)

    def equivocating_chain(self, random, slots=4):
        """Up to four bodies in each slot, of which any is built on; all of them, parents before children."""
        blocks = []
        for _ in range(slots):
            bodies = self.training.bodies(random.randint(1, 4), name=f" {random.random()}")
            blocks += bodies
            self.training.tip = block_hash(random.choice(bodies))
        blocks.append(self.training.block())  # certified on one of the last slot's bodies
        return blocks

    def write_blocks(self, path, blocks):
        with path.open("wb") as stream:
            for block in blocks:
                serialized = block.serialize()
                stream.write(MAGIC_BYTES["regtest"] + len(serialized).to_bytes(4, "little") + serialized)

    def test_loadblock(self):
        self.log.info("-loadblock brings a node to the same tip, in whatever order the file has the blocks")
        node = self.nodes[1]
        random = Random(2)  # noqa: S311
        file = Path(self.options.tmpdir, "blocks.dat")
        orders = (lambda blocks: blocks, lambda blocks: blocks[::-1], lambda blocks: random.sample(blocks, len(blocks)))
        self.training.tip = node.getbestblockhash()
        for order in orders:
            blocks = self.equivocating_chain(random, slots=5)
            self.write_blocks(file, order(blocks))
            self.restart_node(1, extra_args=[*self.training.node_args, f"-loadblock={file}"])
            self.wait_until(lambda: node.getbestblockhash() == self.training.tip)

        self.log.info("... also if several files have them, or there is a pipe beside it, which is read once")
        blocks = self.equivocating_chain(random, slots=5)
        files = [Path(self.options.tmpdir, f"part{number}.dat") for number in range(3)]
        for number, part in enumerate(files):
            self.write_blocks(part, blocks[::-1][number::3])
        pipe = Path(self.options.tmpdir, "pipe.dat")
        os.mkfifo(pipe)
        writer = Thread(target=self.write_blocks, args=(pipe, blocks[:1]))
        writer.start()
        self.restart_node(
            1, extra_args=[*self.training.node_args, *(f"-loadblock={path}" for path in (*files, pipe, file))]
        )
        self.wait_until(lambda: node.getbestblockhash() == self.training.tip)
        writer.join()

        self.log.info("... also the file of a node that has a third body")
        self.stop_node(0)
        copied = Path(self.options.tmpdir, "copied.dat")
        with copied.open("wb") as stream:
            for path in sorted(self.nodes[0].blocks_path.glob("blk*.dat")):
                stream.write(util_xor(path.read_bytes(), self.nodes[0].read_xor_key(), offset=0))
        self.start_node(0, extra_args=self.training.node_args)
        self.restart_node(2, extra_args=[*self.training.node_args, f"-loadblock={copied}"])
        self.wait_until(lambda: self.nodes[2].getbestblockhash() == self.nodes[0].getbestblockhash())

    def test_lost_body(self):
        self.log.info("After a crash a block that was not written to the index is no evidence, nor one of two bodies")
        node = self.nodes[2]
        self.restart_node(2, extra_args=self.training.node_args)
        evidence = node.gettrainingequivocations()
        parent = self.training.tip = node.getbestblockhash()
        first, second, third, fourth, fifth = self.training.bodies(5)
        self.submit(node, first)
        self.submit(node, second, "inconclusive")
        self.submit(node, third, NOT_STORED)
        assert_equal(node.gettrainingequivocations(), [*evidence, self.listed(first, second)])
        node.process.kill()
        node.wait_until_stopped(expected_ret_code=-9)
        self.start_node(2, extra_args=self.training.node_args)
        assert_equal(node.getbestblockhash(), parent)
        assert_equal(node.gettrainingequivocations(), evidence)
        self.submit(node, third)
        assert_equal(node.gettrainingequivocations(), evidence)
        self.submit(node, fourth, "inconclusive")
        assert_equal(node.gettrainingequivocations(), [*evidence, self.listed(third, fourth)])
        self.submit(node, fifth, NOT_STORED)
        self.training.tip = block_hash(third)
        self.append(node)

    def test_unreadable_parent(self):
        self.log.info("A block connects although its parent cannot be read back, and a reorganisation works")
        node = self.nodes[2]
        parent = self.append(node, 2)[0]
        theirs = self.build_on(parent, 2, name=" theirs")
        self.stop_node(2)
        self.damage(node, parent)
        # -checkblocks=1: the start does not read it.
        self.start_node(2, extra_args=[*self.training.node_args, "-checkblocks=1"])
        assert_raises_rpc_error(-1, "Block not found on disk", node.gettrainingcertificate, block_hash(parent))
        self.submit(node, theirs[0], "inconclusive")
        self.submit(node, theirs[1])
        assert_equal(node.getbestblockhash(), block_hash(theirs[1]))
        assert_equal(node.getblocktemplate({"rules": ["segwit", "training"]})["height"], node.getblockcount() + 1)
        self.append(node)

    def damage(self, node, block):
        """Change a byte of a block's header in a node's block files."""
        for path in node.blocks_path.glob("blk*.dat"):
            content = bytearray(util_xor(path.read_bytes(), node.read_xor_key(), offset=0))
            at = content.find(block.serialize()[:80])
            if at >= 0:
                content[at + 40] ^= 1
                path.write_bytes(util_xor(content, node.read_xor_key(), offset=0))
                return
        raise AssertionError(f"block {block_hash(block)} is in no file")

    def test_snapshot(self):
        self.log.info("UTXO snapshots, whose blocks nobody has checked, are refused")
        node = self.nodes[0]
        snapshot = node.dumptxoutset("snapshot.dat", "latest")
        message = "UTXO snapshots are not for training networks: their blocks have no training certificates"
        assert_raises_rpc_error(-32603, f"Unable to load UTXO snapshot: {message}", node.loadtxoutset, snapshot["path"])
        assert_equal(len(node.getchainstates()["chainstates"]), 1)

    def test_full_disk(self):
        self.log.info("If the entries of a block cannot be written, the node says so and stops, and loses nothing")
        node = self.nodes[1]
        # A write beyond the limit fails, and does not end the node, if it starts with that signal ignored.
        self.stop_node(1)
        self.start_node(1, extra_args=self.training.node_args, restore_signals=False)
        self.training.tip = node.getbestblockhash()
        before = self.append(node)[0]
        block = self.training.block()
        database_log = max(path.stat().st_size for path in (node.blocks_path / "index").glob("*.log"))
        resource.prlimit(node.process.pid, resource.RLIMIT_FSIZE, (database_log, resource.RLIM_INFINITY))
        try:
            node.submitblock(block.serialize().hex())
        except Exception as e:  # the node may be gone before it answers
            self.log.debug(f"The answer: {e!r}")
        self.check_fatal(node, "System error while saving the entries of a training block: ")
        self.start_node(1, extra_args=self.training.node_args)
        if node.getbestblockhash() != block_hash(before):  # the full disk kept the index from being written, too
            self.submit(node, before)
        self.submit(node, block)
        self.stop_node(1)

        self.log.info("... also in -reindex, which goes on with the next start")
        limit = (4000, resource.RLIM_INFINITY)
        node.start(
            extra_args=[*self.training.node_args, "-reindex"],
            restore_signals=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        )
        self.check_fatal(node, "System error while saving the entries of a training block: ")
        self.start_node(1, extra_args=self.training.node_args)
        self.wait_until(lambda: node.getbestblockhash() == block_hash(block))

    def test_missing_entry(self):
        self.log.info("Without the entry of a parent the node stops, and says why, and -reindex makes it again")
        node = self.nodes[1]
        self.restart_node(1, extra_args=self.training.node_args)
        self.training.tip = node.getbestblockhash()
        parent = self.append(node)[0]
        child = self.training.block()
        self.stop_node(1)
        rename_key(node.blocks_path / "index", b"training_parent" + block_hash_int(parent).to_bytes(32, "little"))
        self.start_node(1, extra_args=self.training.node_args)
        rules = {"rules": ["segwit", "training"]}
        message = f"The training_parent entry of block {block_hash(parent)} is missing from the block database"
        assert_raises_rpc_error(-32603, message, node.getblocktemplate, rules)
        try:
            node.submitblock(child.serialize().hex())
        except Exception as e:  # the node may be gone before it answers
            self.log.debug(f"The answer: {e!r}")
        self.check_fatal(node, f"{message}. Restart with -reindex to make it again.")
        self.start_node(1, extra_args=[*self.training.node_args, "-reindex"])
        self.wait_until(lambda: node.getbestblockhash() == block_hash(child))

    def check_fatal(self, node, message):
        """The node stops by itself, and says why."""
        node.process.wait(timeout=60)
        node.stderr.seek(0)
        said = node.stderr.read().decode().strip()
        assert re.search(re.escape(message), said), said
        node.wait_until_stopped(expected_ret_code=1, expected_stderr=said)

    def test_prune(self):
        self.log.info("A pruned node connects blocks and reorganises")
        node = self.nodes[3]
        self.training.tip = node.getbestblockhash()
        three = self.training.bodies(3)
        self.submit(node, three[0])
        self.submit(node, three[1], "inconclusive")
        self.submit_headers(node, [three[2]])
        self.submit(node, three[2], NOT_STORED)
        blocks = self.build_on(three[2], 400)
        for block in blocks:
            self.submit(node, block)
        pruned = node.pruneblockchain(100)
        assert_equal(node.getblockchaininfo()["pruneheight"], pruned + 1)
        assert pruned > 0
        assert_raises_rpc_error(-1, "Block not available (pruned data)", node.gettrainingcertificate, 1)
        tip = node.getbestblockhash()
        assert_equal(tip, block_hash(blocks[-1]))

        self.log.info("... from the first block after the last pruned on, whose parent's body is gone")
        first_kept = node.getblockhash(pruned + 1)
        node.invalidateblock(first_kept)
        assert_equal(node.getblockcount(), pruned)
        node.reconsiderblock(first_kept)
        assert_equal(node.getbestblockhash(), tip)
        self.restart_node(3)
        assert_equal(node.getbestblockhash(), tip)
        self.log.info("... is checked by -checklevel=4 -checkblocks=0")
        self.restart_node(3, extra_args=[*self.extra_args[3], "-checklevel=4", "-checkblocks=0"])
        assert_equal(node.getbestblockhash(), tip)
        assert node.verifychain(4, node.getblockcount() - pruned)

        self.log.info("... and reorganises to a chain that forks at the last pruned block")
        self.training.tip = node.getblockhash(pruned)
        others = [self.training.block(name=" other") for _ in range(node.getblockcount() - pruned + 1)]
        for block in others[:-1]:
            self.submit(node, block, "inconclusive")
        self.submit(node, others[-1])
        assert_equal(node.getbestblockhash(), block_hash(others[-1]))
        self.restart_node(3)
        self.append(node)

        self.log.info("Each of three bodies can be fetched again once it is pruned")
        peer = node.add_p2p_connection(P2PDataStore())
        peer.block_store = {block_hash_int(body): body for body in three}
        peer_id = node.getpeerinfo()[0]["id"]
        for body in three:
            name = block_hash(body)
            assert_raises_rpc_error(-1, "Block not available (pruned data)", node.getblock, name)
            node.getblockfrompeer(name, peer_id)
            self.wait_until(lambda name=name: self.has_block(node, name))
        node.disconnect_p2ps()

        self.log.info("-loadblock, which brings pruned blocks back, ends")
        file = Path(self.options.tmpdir, "pruned.dat")
        self.write_blocks(file, [three[2], *blocks[:50]])
        readings = "Loaded [0-9]+ blocks from external file"
        before = len(re.findall(readings, node.debug_log_path.read_text()))
        tip = node.getbestblockhash()
        self.restart_node(3, extra_args=[*self.extra_args[3], f"-loadblock={file}"])
        self.wait_until(lambda: node.getmempoolinfo()["loaded"])  # it is loaded after the import
        assert_equal(len(re.findall(readings, node.debug_log_path.read_text())), before + 1)
        assert_equal(node.getbestblockhash(), tip)

    def has_block(self, node, name):
        try:
            node.getblock(name)
        except JSONRPCException:
            return False
        return True


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def rename_key(folder, key):
    """Change the last byte of a key in the log files of a LevelDB, so that nobody finds it.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    found = 0
    for path in folder.glob("*.log"):
        data = bytearray(path.read_bytes())
        at = 0
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # the rest of a block that is too short for a header
                at += 32768 - at % 32768
                continue
            end = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little")
            if key in data[at + 7 : end]:
                found += 1
                place = data.index(key, at + 7)
                data[place + len(key) - 1] ^= 1
                crc = crc32c(data[at + 6 : end])  # of the type and the content, and masked
                masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
                data[at : at + 4] = masked.to_bytes(4, "little")
            at = end
        path.write_bytes(data)
    assert_equal(found, 1)


if __name__ == "__main__":
    TrainingBodiesTest(__file__).main()
