#!/usr/bin/env python3
# Copyright (c) 2026-present The traincert developers
# Distributed under the MIT software license, see the accompanying
# file COPYING or https://opensource.org/license/mit/.
"""Test what RPC and REST say on a training network, and that they say no less than elsewhere.

gettrainingcertificate, gettraininginfo, gettrainingequivocations, the rule "training" of getblocktemplate and the room
that it leaves, training_chain_id in getblockchaininfo, the deployment in getdeploymentinfo, the refusal of generate*,
and /rest/trainingcertificate.
"""

import http.client
import json
import urllib.parse
from decimal import Decimal

from test_framework.blocktools import NORMAL_GBT_REQUEST_PARAMS
from test_framework.messages import MAX_BLOCK_WEIGHT, COutPoint, CTransaction, CTxIn, CTxOut, from_hex
from test_framework.script import OP_RETURN, CScript
from test_framework.test_framework import BitcoinTestFramework
from test_framework.training import (
    COORDINATORS,
    ContributionTable,
    TrainingChain,
    block_hash,
    digest,
    made_table,
    payload_of,
    xonly,
)
from test_framework.util import assert_equal, assert_raises_rpc_error

START_HEIGHT = 3
LARGEST_START_HEIGHT = 130
TRAINING_METHODS = ("gettraininginfo", "gettrainingcertificate", "gettrainingequivocations")
TRAINING_GBT_REQUEST_PARAMS = {"rules": ["segwit", "training"]}
ADDRESS = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202"


class TrainingRPCTest(BitcoinTestFramework):
    def set_test_params(self):
        self.setup_clean_chain = True
        self.num_nodes = 3
        self.training = TrainingChain(
            keys={START_HEIGHT: (2, COORDINATORS[:3]), START_HEIGHT + 2: (1, COORDINATORS[3:])}, round_seconds=90
        )
        mocktime = self.training.node_args[-1]
        secrets = [digest(f"coordinator {i}") for i in range(16)]
        self.largest = TrainingChain(keys={LARGEST_START_HEIGHT: (16, secrets)})
        room = ["-acceptnonstdtxn", "-blockmaxweight=4000000", "-datacarriersize=100000"]
        self.extra_args = [
            [*self.training.node_args, "-rest", "-disablewallet=0"],
            [mocktime, "-rest"],
            [*self.largest.node_args, *room],
        ]

    def setup_network(self):
        self.setup_nodes()  # node 1 is on no training network, and node 2 on another

    def run_test(self):
        self.test_below_start_height()
        self.test_at_start_height()
        self.test_certificates()
        self.test_errors()
        self.test_rest()
        self.test_generate()
        self.test_help()
        self.test_fields_are_only_added()
        self.test_template_weight()

    def append(self, **overrides):
        block = self.training.block(**overrides)
        for node in self.nodes[:2] if self.training.made[block_hash(block)].certificate is None else self.nodes[:1]:
            assert_equal(node.submitblock(block.serialize().hex()), None)
        return block

    def expected_info(self, height, in_force, **tip):
        """What gettraininginfo answers."""
        return {
            "chain_id": self.training.chain_id.hex(),
            "start_height": START_HEIGHT,
            "keys": [
                {
                    "height": start,
                    "threshold": m,
                    "keys": [xonly(key).hex() for key in keys],
                    "in_force": start == in_force,
                }
                for start, (m, keys) in self.training.keys.items()
            ],
            "beacon": self.training.beacon.hex(),
            "round_seconds": 90,
            "height": height,
            **tip,
        }

    def test_below_start_height(self):
        self.log.info("Below the start height nothing changes but what says that there will be training")
        node, plain = self.nodes[:2]
        self.append()
        none_yet = dict(model=self.training.model.hex(), contributions_weight=0)
        assert_equal(node.gettraininginfo(), self.expected_info(1, None, **none_yet))
        for method, arguments in [
            ("getblocktemplate", [NORMAL_GBT_REQUEST_PARAMS]),
            ("getblocktemplate", [TRAINING_GBT_REQUEST_PARAMS]),
            ("getblockheader", [plain.getbestblockhash()]),
            ("getblock", [plain.getbestblockhash(), 2]),
            ("getmininginfo", []),
            ("getchaintips", []),
            ("getblockstats", [1]),
        ]:
            ours, theirs = (getattr(each, method)(*arguments) for each in (node, plain))
            if method == "getblocktemplate":
                del ours["longpollid"], theirs["longpollid"]  # counts the node's transactions, whenever they came
            assert_equal(ours, theirs)
        assert_equal(node.gettrainingequivocations(), [])
        assert_equal(node.getblockchaininfo()["training_chain_id"], self.training.chain_id.hex())
        self.check_deployment(active=False)
        assert "training_chain_id" not in plain.getblockchaininfo()

    def check_deployment(self, active):
        """The rule is a deployment from the block before the start height on, as upstream's are."""
        deployment = {"type": "buried", "active": active, "height": START_HEIGHT}
        deployments = self.nodes[0].getdeploymentinfo()["deployments"]
        assert_equal(deployments.pop("training"), deployment)
        assert_equal(deployments, self.nodes[1].getdeploymentinfo()["deployments"])

    def check_template(self, **expected):
        """The template for the next block tells the winner what its certificate continues."""
        node = self.nodes[0]
        message = (
            'getblocktemplate must be called with the training rule set (call with {"rules": ["segwit", "training"]})'
        )
        assert_raises_rpc_error(-8, message, node.getblocktemplate, NORMAL_GBT_REQUEST_PARAMS)
        template = node.getblocktemplate(TRAINING_GBT_REQUEST_PARAMS)
        assert_equal(
            template["training"],
            {"chain_id": self.training.chain_id.hex(), "height": template["height"], **expected},
        )
        assert "!training" in template["rules"]
        assert "!segwit" in template["rules"]

    def test_at_start_height(self):
        self.log.info("For the first certificate the template has the beacon's anchor, and no contributions")
        self.append()
        none_yet = dict(model=self.training.model.hex(), contributions_weight=0)
        assert_equal(self.nodes[0].gettraininginfo(), self.expected_info(2, START_HEIGHT, **none_yet))
        self.check_template(
            contributions_root="00" * 32,
            contributions_weight=0,
            contributions_count=0,
            beacon_reveal=self.training.beacon.hex(),
        )
        # Segwit is asked for first, as upstream does.
        assert_raises_rpc_error(-8, "segwit rule set", self.nodes[0].getblocktemplate, {"rules": ["training"]})

        self.check_deployment(active=True)

        self.log.info("A proposal needs no certificate, as no block template has one")
        block = self.training.block(scripts=lambda payload: [], move_tip=False)
        proposal = {"mode": "proposal", "data": block.serialize().hex(), **TRAINING_GBT_REQUEST_PARAMS}
        assert_equal(self.nodes[0].getblocktemplate(proposal), None)

    def test_certificates(self):
        self.log.info("gettrainingcertificate shows every field, by hash, by height, and of the tip")
        node = self.nodes[0]
        self.blocks = []
        for height in range(START_HEIGHT, START_HEIGHT + 6):
            empty = height == START_HEIGHT + 3
            block = self.append(table=ContributionTable() if empty else None)
            self.blocks.append(block)
            certificate = self.training.certificate_of(block)
            expected = {
                "blockhash": block_hash(block),
                **certificate.json(),
                "winner_signature": payload_of(block)[-64:].hex(),
            }
            assert_equal(node.gettrainingcertificate(), expected)
            assert_equal(expected["award"], "appointed" if height in (START_HEIGHT, START_HEIGHT + 4) else "drawn")
            assert_equal(
                node.gettraininginfo(),
                self.expected_info(
                    height,
                    START_HEIGHT if height + 1 < START_HEIGHT + 2 else START_HEIGHT + 2,
                    model=certificate.model_after.hex(),
                    loss=certificate.loss_after,
                    contributions_weight=certificate.contributions_weight,
                ),
            )
            self.check_template(
                contributions_root=certificate.contributions_root.hex(),
                contributions_weight=certificate.contributions_weight,
                contributions_count=certificate.contributions_count,
                beacon_reveal=certificate.beacon_reveal.hex(),
            )
        for height, block in enumerate(self.blocks, start=START_HEIGHT):
            shown = node.gettrainingcertificate(height)
            assert_equal(shown["blockhash"], block_hash(block))
            assert_equal(node.gettrainingcertificate(block_hash(block)), shown)
            assert_equal(node.gettrainingcertificate(hash_or_height=height), shown)

        self.log.info("... also of a block that is not in the active chain")
        stale = self.training.block(block_hash(self.blocks[1]), name=" stale", move_tip=False)
        assert_equal(node.submitblock(stale.serialize().hex()), "inconclusive")
        assert_equal(node.gettrainingcertificate(block_hash(stale))["model_after"], self.stale_model(stale))
        self.stale = stale

    def stale_model(self, block):
        return self.training.certificate_of(block).model_after.hex()

    def test_errors(self):
        self.log.info("Wrong questions are answered as upstream answers them")
        node, plain = self.nodes[:2]
        tip = node.getblockcount()
        assert_raises_rpc_error(-5, "Block not found", node.gettrainingcertificate, "00" * 32)
        assert_raises_rpc_error(
            -8, f"Target block height {tip + 1} after current tip {tip}", node.gettrainingcertificate, tip + 1
        )
        assert_raises_rpc_error(-8, "Target block height -1 is negative", node.gettrainingcertificate, -1)
        assert_raises_rpc_error(
            -8, "hash_or_height must be of length 64 (not 7, for 'no hash')", node.gettrainingcertificate, "no hash"
        )
        assert_raises_rpc_error(-8, "hash_or_height must be hexadecimal string", node.gettrainingcertificate, "zz" * 32)
        for below in (0, START_HEIGHT - 1, node.getblockhash(START_HEIGHT - 1)):
            message = f"has no training certificate: they start at height {START_HEIGHT}"
            assert_raises_rpc_error(-8, message, node.gettrainingcertificate, below)
        unknown = self.training.block(move_tip=False)
        node.submitheader(unknown.serialize()[:80].hex())
        message = "Block not available (not fully downloaded)"
        assert_raises_rpc_error(-1, message, node.gettrainingcertificate, block_hash(unknown))
        self.header_only = unknown
        for method in TRAINING_METHODS:
            message = "This is not a training network: the node was started without -trainingkeys"
            assert_raises_rpc_error(-1, message, getattr(plain, method))

    def rest(self, node, path, status=200):
        """The answer to a GET request, and its content type."""
        url = urllib.parse.urlparse(node.url)
        connection = http.client.HTTPConnection(url.hostname, url.port)
        connection.request("GET", f"/rest/trainingcertificate/{path}")
        response = connection.getresponse()
        body = response.read()
        assert_equal((response.status, body if response.status != status else None), (status, None))
        return body, response.getheader("Content-Type")

    def test_rest(self):
        self.log.info("REST gives the certificate as JSON, and the payload as bytes and as hex")
        node, plain = self.nodes[:2]
        for block in [*self.blocks, self.stale]:
            name = block_hash(block)
            body, content_type = self.rest(node, f"{name}.json")
            assert_equal(json.loads(body), node.gettrainingcertificate(name))
            assert_equal(content_type, "application/json")
            assert_equal(self.rest(node, f"{name}.bin"), (payload_of(block), "application/octet-stream"))
            assert_equal(self.rest(node, f"{name}.hex"), (payload_of(block).hex().encode() + b"\n", "text/plain"))

        self.log.info("... and upstream's errors")
        tip = block_hash(self.blocks[-1])
        below = node.getblockhash(START_HEIGHT - 1)
        for path, status, message in [
            ("no_hash.json", 400, "Invalid hash: no_hash"),
            (f"{tip[:-1]}.hex", 400, f"Invalid hash: {tip[:-1]}"),
            ("", 400, "Invalid hash: "),
            (f"{'00' * 32}.json", 404, f"{'00' * 32} not found"),
            (f"{below}.bin", 404, f"{below} has no training certificate"),
            (tip, 404, "output format not found (available: .bin, .hex, .json)"),
            (f"{tip}.xml", 400, f"Invalid hash: {tip}.xml"),
            (f"{block_hash(self.header_only)}.json", 404, "not available (pruned or not fully downloaded)"),
        ]:
            body, content_type = self.rest(node, path, status)
            assert message in body.decode(), (path, body)
            assert_equal(content_type, "text/plain")
        self.rest(plain, f"{plain.getbestblockhash()}.json", 404)

    def test_generate(self):
        self.log.info("generate* says that a certificate is needed")
        node = self.nodes[0]
        height = node.getblockcount()
        message = (
            f"Block {height + 1} needs a training certificate (from height {START_HEIGHT} on): "
            "have the coordinator's winner build it and use submitblock"
        )
        for method, arguments in [
            ("generatetoaddress", [1, ADDRESS]),
            ("generatetodescriptor", [1, f"addr({ADDRESS})"]),
            ("generateblock", [ADDRESS, []]),
            ("generateblock", [ADDRESS, [], False]),
        ]:
            generate = getattr(self, method)
            assert_raises_rpc_error(-1, message, generate, node, *arguments, sync_fun=self.no_op)
        if self.is_wallet_compiled():  # bitcoin-cli -generate asks it for an address
            node.createwallet("wallet")
            assert_raises_rpc_error(-1, message, node.cli("-generate").send_cli)
        assert_equal(node.getblockcount(), height)

        self.log.info("... and works below the start height, up to it")
        # Back there, where it searches a nonce for its own blocks.
        node.invalidateblock(node.getblockhash(1))
        message = f"Block {START_HEIGHT} needs a training certificate"
        assert_raises_rpc_error(-1, message, self.generatetoaddress, node, 5, ADDRESS, sync_fun=self.no_op)
        assert_equal(node.getblockcount(), START_HEIGHT - 1)
        node.invalidateblock(node.getblockhash(1))
        self.generatetodescriptor(node, 1, "raw(51)", sync_fun=self.no_op)  # not the same block again
        self.generateblock(node, ADDRESS, [], sync_fun=self.no_op)
        assert_equal(node.getblockcount(), START_HEIGHT - 1)
        node.reconsiderblock(self.training.certificate_of(self.blocks[0]).prev_block[::-1].hex())
        assert_equal(node.getbestblockhash(), block_hash(self.blocks[-1]))

    def test_help(self):
        self.log.info("help has examples, and lists the calls")
        for node in self.nodes:
            for method in TRAINING_METHODS:
                text = node.help(method)
                assert text.startswith(method), text
                assert f"> bitcoin-cli {method}" in text
                assert f'"method": "{method}"' in text
            listed = node.help()
            assert "\ngettrainingcertificate ( hash_or_height )\ngettrainingequivocations\ngettraininginfo\n" in listed
        assert_equal(self.nodes[0].help("gettrainingcertificate").count("> bitcoin-cli"), 2)

    def test_fields_are_only_added(self):
        self.log.info("No field of an upstream RPC changes its kind or disappears: fields are only added")
        node, plain = self.nodes[:2]
        while plain.getblockcount() < node.getblockcount():
            self.generatetodescriptor(plain, 1, "raw(51)", sync_fun=self.no_op)  # paid as our blocks are
        added = {}
        for method, arguments in {
            "getblockchaininfo": [],
            "getblock": ["tip", 2],
            "getblockheader": ["tip"],
            "getblockstats": ["tip"],
            "getblocktemplate": ["rules"],
            "getmininginfo": [],
            "getnetworkinfo": [],
            "getchaintips": [],
            "getchainstates": [],
            "getdeploymentinfo": [],
            "gettxoutsetinfo": [],
            "getindexinfo": [],
            "getchaintxstats": [],
        }.items():
            kinds = []
            for each, rules in ((node, TRAINING_GBT_REQUEST_PARAMS), (plain, NORMAL_GBT_REQUEST_PARAMS)):
                stand_ins = {"tip": each.getbestblockhash(), "rules": rules}
                answer = getattr(each, method)(*[stand_ins.get(argument, argument) for argument in arguments])
                kinds.append(self.kinds(answer))
            ours, theirs = kinds
            assert_equal({path: kind for path, kind in theirs.items() if ours.get(path) != kind}, {})
            added[method] = {path for path in ours if path not in theirs}
        assert_equal({method: paths for method, paths in added.items() if paths}, self.added())

    def added(self):
        template = {"training", *(f"training.{field}" for field in ("chain_id", "height", "contributions_root"))}
        template |= {f"training.{field}" for field in ("contributions_weight", "contributions_count", "beacon_reveal")}
        deployment = {f"deployments.training{field}" for field in ("", ".type", ".active", ".height")}
        return {
            "getblockchaininfo": {"training_chain_id"},
            "getblocktemplate": template,
            "getdeploymentinfo": deployment,
        }

    def test_template_weight(self):
        self.log.info("A full template leaves room for the largest certificate that its block can need")
        node = self.nodes[2]
        for _ in range(1, LARGEST_START_HEIGHT):
            assert_equal(node.submitblock(self.largest.block().serialize().hex()), None)
        table = made_table("large", [(1000 + i, 10**6) for i in range(8192)])
        assert_equal(node.submitblock(self.largest.block(table=table).serialize().hex()), None)

        # Larger ones pay more for each byte, so that they go first and the smaller ones fill what is left.
        sizes = [99_000] * 9 + [
            50_000,
            25_000,
            15_000,
            7500,
            4000,
            2000,
            1000,
            1000,
            500,
            500,
            250,
            250,
            120,
            120,
            90,
            90,
        ]
        for height, size in enumerate(sizes, start=1):
            tx = self.spend(node, height, size, fee=size * size // 10 + 20 * size)
            node.sendrawtransaction(tx.hex(), maxfeerate=0, maxburnamount=50)
        template = node.getblocktemplate(TRAINING_GBT_REQUEST_PARAMS)
        txs = [from_hex(CTransaction(), tx["data"]) for tx in template["transactions"]]
        assert len(txs) < len(sizes)
        block = self.largest.block(txs=txs, move_tip=False)
        assert_equal(len(self.largest.certificate_of(block).draw.siblings), 13)
        weight = 3 * len(block.serialize(with_witness=False)) + len(block.serialize())
        # 8000 is what upstream reserves for everything else.
        assert MAX_BLOCK_WEIGHT - 8000 - 2000 < weight <= MAX_BLOCK_WEIGHT, weight
        assert_equal(node.submitblock(block.serialize().hex()), None)

    def spend(self, node, height, size, fee):
        """A transaction of a size, in bytes, that spends the coinbase at a height."""
        coinbase = node.getblock(node.getblockhash(height), 2)["tx"][0]
        tx = CTransaction()
        tx.vin.append(CTxIn(COutPoint(int(coinbase["txid"], 16), 0)))
        value = from_hex(CTransaction(), coinbase["hex"]).vout[0].nValue
        tx.vout.append(CTxOut(value - fee, CScript()))
        tx.vout[0].scriptPubKey = CScript([OP_RETURN, bytes(max(0, size - 80))])
        return tx.serialize()

    def kinds(self, value, path=""):
        """The kind of each field, by its path; the items of an array share one."""
        if isinstance(value, list):
            return {key: kind for item in value for key, kind in self.kinds(item, f"{path}[]").items()}
        kind = "number" if isinstance(value, int | Decimal) and not isinstance(value, bool) else type(value).__name__
        kinds = {path: kind} if path else {}
        if isinstance(value, dict):
            for key, field in value.items():
                kinds |= self.kinds(field, f"{path}.{key}" if path else key)
        return kinds


if __name__ == "__main__":
    TrainingRPCTest(__file__).main()
