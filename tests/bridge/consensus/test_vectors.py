"""The committed vectors, which the node's unit tests read too, are what the bridge makes and checks."""

import json
from hashlib import sha256
from typing import Any

import pytest
from bitcoin.core import CBlock

from make_vectors import VECTORS, make
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.codec import Reader, compact_size
from traincert.bridge.consensus.lottery import Leaf, TreeNode, follow_path, leaf_node
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.consensus.rules import (
    check_coordinator_signatures,
    check_training_certificate,
    contextual_check_training_certificate,
)
from traincert.bridge.errors import CertificateError

COMMITTED = json.loads(VECTORS.read_text())


def params_of(options: list[str]) -> TrainingParams:
    """The network that options, as bitcoin.conf has them, define."""
    values = [option.partition("=")[::2] for option in options]
    keys = {}
    for name, value in values:
        if name == "trainingkeys":
            height, threshold, xonly = value.split(":")
            keys[int(height)] = TrainingKeys(int(threshold), tuple(map(bytes.fromhex, xonly.split(","))))
    rest = dict(values)
    beacon, model = bytes.fromhex(rest["trainingbeacon"]), bytes.fromhex(rest["trainingmodel"])
    return TrainingParams(keys, beacon, model, int(rest["traininground"]))


def test_options_define_the_network_with_the_chain_id() -> None:
    for vector in COMMITTED["networks"]:
        assert params_of(vector["options"]).chain_id.hex() == vector["chain_id"]


def test_committed_vectors_are_what_the_bridge_makes() -> None:
    assert make() == COMMITTED


def test_certificates_decode_to_what_encodes_to_the_same_bytes() -> None:
    for vector in COMMITTED["certificates"]:
        data = bytes.fromhex(vector["certificate"])
        reader = Reader(data)
        certificate = Certificate.read(reader)
        assert reader.left() == 0
        assert certificate.serialize() == data
        assert certificate.height == vector["height"]


@pytest.mark.parametrize("vector", COMMITTED["blocks"], ids=lambda vector: vector["comment"])
def test_blocks_are_refused_for_the_reason_named(vector: dict[str, Any]) -> None:
    block = CBlock.deserialize(bytes.fromhex(vector["block"]))
    params = params_of(vector["options"])
    if vector["reason"] is None:
        check_training_certificate(block, vector["height"], params)
    else:
        with pytest.raises(CertificateError) as caught:
            check_training_certificate(block, vector["height"], params)
        assert caught.value.reason == vector["reason"]


@pytest.mark.parametrize("vector", COMMITTED["with_parent"], ids=lambda vector: vector["comment"])
def test_certificates_are_refused_with_their_parent_for_the_reason_named(vector: dict[str, Any]) -> None:
    params = params_of(vector["options"])
    certificate = Certificate.read(Reader(bytes.fromhex(vector["certificate_hex"])))
    check_coordinator_signatures(certificate, params.keys_at(certificate.height), params.chain_id)
    parent = None
    if vector["parent_body_hex"]:
        no_signatures = compact_size(0)
        parent = Certificate.read(Reader(bytes.fromhex(vector["parent_body_hex"]) + no_signatures))

    def check() -> None:
        contextual_check_training_certificate(certificate, parent, vector["time"], vector["parent_time"], params)

    if vector["reason"] is None:
        check()
    else:
        with pytest.raises(CertificateError) as caught:
            check()
        assert caught.value.reason == vector["reason"]


def test_paths_end_at_their_tables_root() -> None:
    for table in COMMITTED["tables"]:
        for path in table["paths"]:
            number = path["index"] ** 2 + 1
            siblings = [TreeNode(bytes.fromhex(node["hash"]), node["sum"]) for node in path["siblings"]]
            leaf = made_leaf_node(path["index"], number)
            end = follow_path(leaf, path["index"], table["count"], siblings)
            assert end == (TreeNode(bytes.fromhex(table["root"]), table["weight"]), path["start"])


def made_leaf_node(index: int, number: int) -> TreeNode:
    key = index.to_bytes(32, "big")
    return leaf_node(Leaf(key, sha256(key).digest(), number, number, number))
