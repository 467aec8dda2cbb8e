"""Statements and invitations: what is signed, and what a reader refuses."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from coincurve import PrivateKey

from traincert.bridge.consensus.codec import tagged_hash
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.errors import BridgeError
from traincert.bridge.invitations import COSIGNER, MINER, Invitation
from traincert.bridge.messages import (
    AuditedTask,
    Award,
    CommitMessage,
    CommitReceipt,
    Cosignature,
    Finding,
    Join,
    MemoryRequest,
    Message,
    MessageError,
    Opening,
    Proposal,
    Receipt,
    Report,
    Verdict,
    assignment_seed,
    commits_root,
    score_seed,
    seal,
    unseal,
)
from traincert.bridge.recorded import RecordedTask
from traincert.trainer.errors import Reason
from traincert.trainer.weights import Score

KEY = PrivateKey(b"\x01" * 32)
PUBLIC = KEY.public_key_xonly.format()
CHAIN_ID = b"\x02" * 32
A, B, C = (bytes([number]) * 32 for number in (10, 11, 12))

COMMIT = CommitMessage(A, B, 1000, None, C, 1.5, "x86-64")
ABSENT = RecordedTask(
    miner=A,
    segment=1,
    shard=B,
    seed=C,
    memory=None,
    memory_after=None,
    update_hash=None,
    update_size=0,
    commit=None,
    numeric_class="",
    place=None,
    late=False,
    params=100,
    norm=None,
    scale=1.0,
    own_shard=None,
    score=None,
    loss_reduction=0,
    weight=0,
    drawn=False,
    refusal=Reason.ABSENT,
    detail="it was absent",
)
ACCEPTED = replace(
    ABSENT,
    memory=A,
    memory_after=B,
    update_hash=C,
    update_size=1000,
    commit=b"\x00\xff",
    numeric_class="x86-64",
    place=2**64 - 1,
    late=True,
    norm=0.1,
    scale=1 / 3,
    own_shard=-1.5,
    score=Score(2**62, 3, 2, 2**61, 7),
    loss_reduction=2**61,
    weight=7,
    drawn=True,
    refusal=None,
    detail=None,
)
MESSAGES: list[Message] = [
    Join("alice"),
    Opening(A, 2**64 - 1, 1, B, C, A, [A, B], [None, C], 5, 6),
    COMMIT,
    CommitReceipt(A, 0, late=True),
    MemoryRequest(A, [B, C]),
    Award(b""),
    Proposal(b"\x00\xff", [b"x"]),
    Cosignature(A, b"", "too-early", "it is too early"),
    Receipt(1, A, ABSENT, 0.5, 0.25, C, 9, 3, None, []),
    Receipt(1, A, ACCEPTED, 0.5, 1.0, C, 9, 3, 2, [(A, 1), (B, 2**64 - 1)]),
    Report(1, 0, "", "no node"),
    Verdict(
        9,
        A,
        "x86-64",
        False,
        Finding(True, ""),
        [AuditedTask(True, "far", B, 1, 2, Reason.COPY, 0.5), AuditedTask(False, "no memory", C, 1, 2, None, None)],
        Finding(False, "no velocity"),
    ),
]


def signed(data: bytes, kind: str = "commit", chain_id: bytes = CHAIN_ID) -> bytes:
    """A statement of any bytes, with a right signature."""
    digest = tagged_hash("traincert/message", chain_id + bytes([len(kind)]) + kind.encode() + data)
    return PUBLIC + KEY.sign_schnorr(digest) + data


def refused(statement: bytes, kind: type[Any] = CommitMessage) -> str:
    with pytest.raises(MessageError) as caught:
        unseal(CHAIN_ID, kind, statement)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 300
    return said


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_read_as_it_was_sealed(message: Message) -> None:
    statement = seal(KEY, CHAIN_ID, message)
    assert unseal(CHAIN_ID, type(message), statement) == (PUBLIC, message)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_statement_is_of_one_kind(message: Message) -> None:
    statement = seal(KEY, CHAIN_ID, message)
    for other in {type(each) for each in MESSAGES} - {type(message)}:
        assert "the signature does not verify" in refused(statement, other)


def test_a_statement_is_of_one_network() -> None:
    assert "of another network" in refused(seal(KEY, b"\x03" * 32, COMMIT))


def test_a_statement_with_any_bit_changed_is_refused() -> None:
    statement = seal(KEY, CHAIN_ID, COMMIT)
    for place in range(len(statement)):
        altered = bytearray(statement)
        altered[place] ^= 1
        assert "the signature does not verify" in refused(bytes(altered))


def test_a_statement_with_bytes_more_or_less_is_refused() -> None:
    statement = seal(KEY, CHAIN_ID, COMMIT)
    for length in range(96):
        assert refused(statement[:length]) == f"commit: {length} bytes are too few for a statement"
    for altered in (statement[:96], statement[:-1], statement + b" ", b"\x00" + statement):
        assert "the signature does not verify" in refused(altered)


def test_a_key_that_is_none_is_refused() -> None:
    for key in (bytes(32), b"\xff" * 32):
        assert "the signature does not verify" in refused(key + seal(KEY, CHAIN_ID, COMMIT)[32:])


def test_a_message_may_be_written_in_another_way_if_it_is_signed_so() -> None:
    data = json.dumps(json.loads(seal(KEY, CHAIN_ID, COMMIT)[96:]), indent=3).encode()
    assert unseal(CHAIN_ID, CommitMessage, signed(data)) == (PUBLIC, COMMIT)


def commit(**changes: Any) -> bytes:
    """A commit's JSON with some fields changed; the value `...` takes one out."""
    content = json.loads(seal(KEY, CHAIN_ID, COMMIT)[96:]) | changes
    return json.dumps({key: value for key, value in content.items() if value is not ...}).encode()


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "Invalid JSON"),
    "no JSON": (b"{", "Invalid JSON"),
    "garbage": (bytes(1 << 20), "Invalid JSON"),
    "nested deeply": (b"[" * (1 << 20), "Invalid JSON: recursion limit exceeded"),
    "nested deeply in a field": (
        commit(seconds=0).replace(b": 0,", b": " + b"[" * 100_000 + b","),
        "recursion limit exceeded",
    ),
    "a list": (b"[]", "Input should be an object"),
    "null": (b"null", "Input should be an object"),
    "bytes that are no text": (b"\xff" + commit(), "Invalid JSON"),
    "half a character": (commit(numeric_class="X").replace(b"X", b"\\ud800"), "Invalid JSON"),
    "two objects": (commit() + commit(), "Invalid JSON: trailing characters"),
    "without a field": (commit(opening=...), "'opening': Field required"),
    "another field": (commit(more=1), "'more': Unexpected keyword argument"),
    "another field with any name": (commit(**{"a\r\n\x1b" * 1000: 1}), r"'a\r\n\x1ba\r\n\x1b"),
    "a field twice": (commit()[:-1] + b',"update_size":1000}', "commit: a key is there twice"),
    "not a number": (commit(seconds=float("nan")), "'seconds': Input should be a finite number"),
    "infinite": (commit(seconds=float("inf")), "'seconds': Input should be a finite number"),
    "infinite when read": (
        commit(seconds=0).replace(b": 0,", b": 1e999,"),
        "'seconds': Input should be a finite number",
    ),
    "negative": (commit(seconds=-0.001), "'seconds': Input should be greater than or equal to 0"),
    "a negative size": (commit(update_size=-1), "'update_size': Input should be greater than or equal to 0"),
    "a size of 65 bits": (commit(update_size=2**64), "'update_size': Input should be less than 18446744073709551616"),
    "a size of 5000 digits": (
        commit(update_size=0).replace(b": 0,", b": " + b"9" * 5000 + b","),
        "number out of range",
    ),
    "a size with a point": (commit(update_size=1.0), "'update_size': Input should be a valid integer"),
    "a size that is true": (commit(update_size=True), "'update_size': Input should be a valid integer"),
    "a size in quotes": (commit(update_size="1"), "'update_size': Input should be a valid integer"),
    "31 bytes": (commit(update_hash="00" * 31), "'update_hash': Data should have at least 32 bytes"),
    "33 bytes": (commit(update_hash="00" * 33), "'update_hash': Data should have at most 32 bytes"),
    "no hex": (commit(update_hash="xy" * 32), "'update_hash': Data should be valid hex"),
    "half a byte": (commit(update_hash="0" * 63), "'update_hash': Data should be valid hex"),
    "long text": (commit(numeric_class="x" * 201), "'numeric_class': String should have at most 200 characters"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_signed_message_that_is_malformed_is_refused_by_its_field(what: str) -> None:
    data, why = MALFORMED[what]
    said = refused(signed(data))
    assert said.startswith("commit: ")
    assert why in said


@pytest.mark.parametrize("name", ["", "a b", "a.b", "x" * 33, "é", "a\n", "*", ">"])
def test_a_name_that_no_member_can_have_is_refused(name: str) -> None:
    data = json.dumps({"name": name}).encode()
    assert "'name': String should match pattern" in refused(signed(data, "join"), Join)


def test_the_commits_root_is_of_the_updates_whatever_their_order() -> None:
    root = commits_root({A: B, B: C})
    assert root == commits_root({B: C, A: B})
    assert (
        len({root, commits_root({A: C, B: B}), commits_root({A: B}), commits_root({}), commits_root({A: B, C: C})}) == 5
    )


def test_the_seeds_change_with_each_of_their_parts() -> None:
    seeds = [score_seed(A, B), score_seed(B, A), score_seed(A, C), assignment_seed(0, A), assignment_seed(1, A)]
    seeds += [assignment_seed(0, B), assignment_seed(2**64 - 1, A)]
    assert len(set(seeds)) == len(seeds)
    assert {len(seed) for seed in seeds} == {32}


PARAMS = TrainingParams({1: TrainingKeys(1, (PUBLIC,))}, A, B, 60)
INVITATION = Invitation("alice", MINER, "tls://host:4222", "CA", "SEED", PARAMS.node_options(), A.hex())
NO_INVITATION = "this is no invitation of this version of traincert, or a part of it is missing: copy all of the line"


def no_invitation(text: str) -> str:
    with pytest.raises(BridgeError) as caught:
        Invitation.read(text, MINER)
    assert "\n" not in str(caught.value)
    assert "SEED" not in str(caught.value)
    return str(caught.value)


def packed(content: object) -> str:
    """A text that looks like an invitation, with any content."""
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return "traincert-invitation-1:" + base64.urlsafe_b64encode(zlib.compress(data)).decode()


def test_an_invitation_is_read_as_it_was_written() -> None:
    text = INVITATION.text()
    assert text.isascii()
    assert text.isprintable()
    assert Invitation.read(text, MINER) == INVITATION
    assert INVITATION.params == PARAMS


@pytest.mark.parametrize("between", ["\n", "\r\n", " ", "\n> ".replace(">", "\t")])
def test_line_breaks_and_spaces_in_an_invitation_do_no_harm(between: str) -> None:
    text = INVITATION.text()
    broken = between.join(text[place : place + 70] for place in range(0, len(text), 70))
    assert Invitation.read(f"\n  {broken}\n", MINER) == INVITATION


def test_an_invitation_that_was_cut_off_is_refused_wherever() -> None:
    text = INVITATION.text()
    for length in range(len(text.rstrip("="))):
        assert NO_INVITATION in no_invitation(text[:length])
        assert NO_INVITATION in no_invitation(text[len(text) - length :])


def test_an_invitation_with_a_changed_letter_is_refused_or_means_the_same() -> None:
    text = INVITATION.text()
    for place in range(len(text)):
        for letter in ("A", "b", "-", "=", "é", "\x00"):
            if letter != text[place]:
                try:
                    assert Invitation.read(text[:place] + letter + text[place + 1 :], MINER) == INVITATION
                except BridgeError as error:
                    assert NO_INVITATION in str(error)  # noqa: PT017


def test_an_invitation_is_for_one_role() -> None:
    with pytest.raises(BridgeError, match="this invitation is for a miner, not for a cosigner"):
        Invitation.read(INVITATION.text(), COSIGNER)
    with pytest.raises(BridgeError, match="this invitation is for a cosigner, not for a miner"):
        Invitation.read(replace(INVITATION, role=COSIGNER).text(), MINER)


CONTENT = json.loads(zlib.decompress(base64.urlsafe_b64decode(INVITATION.text().partition(":")[2])))
CHANGES: dict[str, Callable[[], object]] = {
    "no JSON": lambda: b"{",
    "no text": lambda: b"\xff",
    "nested deeply": lambda: b"[" * 100_000,
    "a list": lambda: [],
    "null": lambda: None,
    "without a field": lambda: {key: value for key, value in CONTENT.items() if key != "seed"},
    "another field": lambda: CONTENT | {"more": 1},
    "a number as its name": lambda: CONTENT | {"name": 1},
    "a list as its role": lambda: CONTENT | {"role": []},
    "no options": lambda: CONTENT | {"options": {}},
    "options that are none": lambda: CONTENT | {"options": None},
    "a key that is no hex": lambda: CONTENT | {"options": CONTENT["options"] | {"trainingkeys": ["1:1:xy"]}},
    "a round that is no number": lambda: CONTENT | {"options": CONTENT["options"] | {"traininground": "x"}},
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_invitation_with_another_content_is_refused(what: str) -> None:
    assert NO_INVITATION in no_invitation(packed(CHANGES[what]()))


@pytest.mark.parametrize(
    "text", ["", "traincert-invitation-1:", "traincert-invitation-2:eJw", "hello", "\x00", "é" * 100]
)
def test_another_text_is_no_invitation(text: str) -> None:
    assert NO_INVITATION in no_invitation(text)
