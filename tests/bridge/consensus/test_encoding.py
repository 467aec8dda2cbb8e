"""What does not fit its field is an error that names the field; nothing is cut or padded."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from traincert.bridge.consensus.certificate import Certificate, CoordinatorSignature, Draw
from traincert.bridge.consensus.codec import Reader, compact_size
from traincert.bridge.consensus.lottery import ContributionTable, Leaf, TreeNode, branch_node, draw_ticket, leaf_node
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.errors import EncodingError

B32 = bytes(range(32))
KEYS = TrainingKeys(1, (B32,))
LEAF = Leaf(B32, B32, 1, 1, 1)
NODE = TreeNode(B32, 1)
DRAW = Draw(B32, 1, 1, 1, 0, (NODE,))
CERTIFICATE = Certificate(
    height=1,
    prev_block=B32,
    beacon_reveal=B32,
    model_before=B32,
    model_after=B32,
    dataset_root=B32,
    record=B32,
    loss_before=0,
    loss_after=0,
    params_trained=0,
    contributions_root=B32,
    contributions_weight=0,
    contributions_count=0,
    winner_key=B32,
    draw=DRAW,
    coordinator_signatures=(CoordinatorSignature(0, bytes(64)),),
)

BYTES = {
    "empty": b"",
    "one": b"k",
    "one padded": b"k\0",
    "short": bytes(31),
    "long": bytes(33),
    "hex": "00" * 32,
    "none": None,
}
HASHES = [
    "prev_block",
    "beacon_reveal",
    "model_before",
    "model_after",
    "dataset_root",
    "record",
    "contributions_root",
    "winner_key",
]
INTEGERS = {
    "version": 1,
    "height": 4,
    "round": 2,
    "loss_before": 8,
    "loss_after": 8,
    "params_trained": 8,
    "contributions_weight": 8,
    "contributions_count": 4,
}


def wrong_integers(length: int) -> list[Any]:
    return [-1, 1 << 8 * length, 2**70, 1.0, "1", None]


def encodings() -> list[tuple[str, Callable[[Any], object], list[Any]]]:
    """Each field's name, what encodes it, and values that do not fit."""

    def certificate(name: str) -> Callable[[Any], object]:
        return lambda value: replace(CERTIFICATE, **{name: value}).serialize()

    def draw(name: str) -> Callable[[Any], object]:
        return lambda value: replace(CERTIFICATE, draw=replace(DRAW, **{name: value})).serialize()

    def sibling(name: str) -> Callable[[Any], object]:
        return lambda value: draw("siblings")((NODE._replace(**{name: value}),))

    def signature(name: str) -> Callable[[Any], object]:
        one = CERTIFICATE.coordinator_signatures[0]
        return lambda value: certificate("coordinator_signatures")((replace(one, **{name: value}),))

    def leaf(name: str) -> Callable[[Any], object]:
        return lambda value: leaf_node(LEAF._replace(**{name: value}))

    wrong = list(BYTES.values())
    params = TrainingParams({1: KEYS}, B32, B32)
    return [
        *((name, certificate(name), wrong) for name in HASHES),
        *((name, certificate(name), wrong_integers(length)) for name, length in INTEGERS.items()),
        ("draw: update_hash", draw("update_hash"), wrong),
        *((f"draw: {name}", draw(name), wrong_integers(8)) for name in ("params", "loss_reduction", "weight")),
        ("draw: index", draw("index"), wrong_integers(4)),
        ("siblings: hash", sibling("hash"), wrong),
        ("siblings: sum", sibling("sum"), wrong_integers(8)),
        ("coordinator_signatures: key_index", signature("key_index"), wrong_integers(1)),
        ("coordinator_signatures: signature", signature("signature"), [b"", bytes(32), bytes(63), bytes(65), None]),
        ("miner_key", leaf("miner_key"), wrong),
        ("update_hash", leaf("update_hash"), wrong),
        *((name, leaf(name), wrong_integers(8)) for name in ("params", "loss_reduction", "weight")),
        ("siblings: hash", lambda value: branch_node(TreeNode(value, 1), NODE), wrong),
        ("beacon_reveal", lambda value: draw_ticket(value, B32, 0, 1), wrong),
        ("prev_block", lambda value: draw_ticket(B32, value, 0, 1), wrong),
        ("round", lambda value: draw_ticket(B32, B32, value, 1), wrong_integers(2)),
        ("keys: height", lambda value: TrainingParams({value: KEYS}, B32, B32).chain_id, [-1, 2**32]),
        ("keys: threshold", lambda value: replace(params, keys={1: TrainingKeys(value, (B32,))}).chain_id, [-1, 256]),
        ("keys: key", lambda value: replace(params, keys={1: TrainingKeys(1, (value,))}).chain_id, wrong),
        ("beacon", lambda value: replace(params, beacon=value).chain_id, wrong),
        ("model", lambda value: replace(params, model=value).chain_id, wrong),
        ("round_seconds", lambda value: replace(params, round_seconds=value).chain_id, wrong_integers(4)),
        ("CompactSize", compact_size, [-1, 2**32]),
    ]


CASES = [(name, encode, value) for name, encode, values in encodings() for value in values]


@pytest.mark.parametrize(("name", "encode", "value"), CASES, ids=[f"{name}={value!r}" for name, _, value in CASES])
def test_a_value_that_does_not_fit_is_an_error_that_names_the_field(
    name: str, encode: Callable[[Any], object], value: object
) -> None:
    with pytest.raises(EncodingError, match=f"^{name}: ") as caught:
        encode(value)
    assert "\n" not in str(caught.value)


def test_every_integer_field_of_a_certificate_is_tried() -> None:
    fields = {name for name, value in vars(CERTIFICATE).items() if not isinstance(value, tuple | Draw)}
    assert fields == {*HASHES, *INTEGERS}


def test_the_certificate_that_the_cases_change_can_be_read_back() -> None:
    assert Certificate.read(Reader(CERTIFICATE.serialize())) == CERTIFICATE


@pytest.mark.parametrize(
    "change", [{"params": -1}, {"loss_reduction": 2**64}, {"miner_key": b"k"}, {"update_hash": b""}]
)
def test_a_table_takes_no_leaf_that_does_not_fit(change: dict[str, Any]) -> None:
    with pytest.raises(EncodingError, match=f"^{next(iter(change))}: "):
        ContributionTable([LEAF._replace(**change)])
