"""The committed vectors, which the node's unit tests read too, are what the bridge makes and checks."""

import json
from hashlib import sha256
from typing import Any

import pytest
from bitcoin.core import CBlock
from make_vectors import VECTORS, make
from training_chain import TrainingChain

from traincert.bridge.block import check_block
from traincert.bridge.certificate import Certificate
from traincert.bridge.codec import Reader
from traincert.bridge.errors import CertificateError
from traincert.bridge.lottery import Leaf, Node, follow_path, leaf_node

COMMITTED = json.loads(VECTORS.read_text())


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
    if vector["reason"] is None:
        check_block(block, vector["height"], TrainingChain().params)
    else:
        with pytest.raises(CertificateError) as caught:
            check_block(block, vector["height"], TrainingChain().params)
        assert caught.value.reason == vector["reason"]


def test_paths_end_at_their_tables_root() -> None:
    for table in COMMITTED["tables"]:
        for path in table["paths"]:
            number = path["index"] ** 2 + 1
            siblings = [Node(bytes.fromhex(node["hash"]), node["sum"]) for node in path["siblings"]]
            leaf = made_leaf_node(path["index"], number)
            end = follow_path(leaf, path["index"], table["count"], siblings)
            assert end == (Node(bytes.fromhex(table["root"]), table["weight"]), path["start"])


def made_leaf_node(index: int, number: int) -> Node:
    key = index.to_bytes(32, "big")
    return leaf_node(Leaf(key, sha256(key).digest(), number, number, number))
