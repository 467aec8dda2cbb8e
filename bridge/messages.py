"""What travels between the roles: statements that are signed over their bytes (BIP340), and what they say.

A statement is `key (32 bytes) || signature (64 bytes) || message`. The signature is over T("traincert/message",
chain_id || u8 length of kind || kind || message), so a statement of one kind or network is none of another. The message
is JSON; bytes are in hex. Nobody encodes it again to verify it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from coincurve import PrivateKey
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from traincert.bridge.consensus.codec import encode_b32, encode_uint, tagged_hash, verify_schnorr
from traincert.bridge.errors import BridgeError
from traincert.bridge.recorded import CONFIG, Hash, RecordedTask, Uint
from traincert.trainer.errors import Reason
from traincert.trainer.resources import Resources

_HEAD = 32 + 64  # bytes of key and signature

Seconds = Annotated[float, Field(ge=0, lt=2**63)]


class MessageError(BridgeError):
    """A statement that is not what it must be: its form, its signature or its signer is wrong."""


@dataclass(frozen=True, config=CONFIG)
class Join:
    """A miner's: this credential is my key's from now on. The signer is the miner."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,32}$")]


@dataclass(frozen=True, config=CONFIG)
class Opening:
    """The coordinator's: a cycle begins. `prev_block` is in header byte order.

    Who trains what follows from `prev_block`, the job's seed and `miners` alone.
    """

    job: Hash
    """The job's digest."""
    cycle: Uint
    """Counted from 0."""
    height: Uint
    prev_block: Hash
    model: Hash
    dataset_root: Hash
    miners: list[Hash]
    """The keys of the miners that are present, sorted."""
    memories: list[Hash | None]
    """SHA-256 of the memory that each miner's last accepted task left, in the order of `miners`; None: it has none."""
    opened: Uint
    """Unix time, seconds, by the coordinator's clock."""
    deadline: Uint
    """Unix time, seconds. Commits that come later are refused."""


@dataclass(frozen=True, config=CONFIG)
class CommitMessage:
    """A miner's: I shall send the update with this hash. `opening` is the SHA-256 of the opening's statement."""

    opening: Hash
    update_hash: Hash
    update_size: Uint
    memory_before: Hash | None
    memory_after: Hash | None
    seconds: Seconds
    numeric_class: Annotated[str, Field(max_length=200)]
    resources: Resources | None = None
    """What the task used, as the miner says; None: it was not measured."""
    noise: Hash | None = None
    """SHA-256 of the secret that the task's noise is made from; None: the job has no privacy."""


@dataclass(frozen=True, config=CONFIG)
class CommitReceipt:
    """The coordinator's: the statement with this SHA-256 is the commit number `place` (from 0) of the cycle."""

    commit: Hash
    place: Uint
    late: bool
    """It came after the job's late_seconds."""


@dataclass(frozen=True, config=CONFIG)
class Closing:
    """The coordinator's: the cycle takes no more commits; send your update. `commits` is their `commits_root`."""

    opening: Hash
    """SHA-256 of the opening's statement."""
    commits: Hash


@dataclass(frozen=True, config=CONFIG)
class Award:
    """The coordinator's, for the winner: a certificate with all signatures, as in a block."""

    certificate: bytes


@dataclass(frozen=True, config=CONFIG)
class Proposal:
    """The coordinator's, for its cosigners: a certificate that they are to sign, as bytes without signatures.

    `earlier` has the certificates, with all signatures, of the earlier rounds of the same slot, in order.
    """

    certificate: bytes
    earlier: list[bytes]


@dataclass(frozen=True, config=CONFIG)
class Cosignature:
    """A cosigner's: its signature of the certificate with this SHA-256 (without signatures), or why it does not sign.

    A refusal has an empty signature, the name of the check that failed, and a sentence.
    """

    certificate: Hash
    signature: Annotated[bytes, Field(max_length=64)]
    refusal: Annotated[str, Field(max_length=40)]
    detail: Annotated[str, Field(max_length=1000)]


@dataclass(frozen=True, config=CONFIG)
class MemoryRequest:
    """The coordinator's, for a miner: your task is done again; send these memories. `opening` is as in `Closing`."""

    opening: Hash
    memories: list[Hash]


@dataclass(frozen=True, config=CONFIG)
class Receipt:
    """The coordinator's, for a miner: what came of its task, and its place in the lottery.

    With it and the chain the miner can check why it did or did not win (receipts.py).
    """

    cycle: Uint
    """Counted from 1, as in the records."""
    record: Hash
    """SHA-256 of the cycle's record."""
    task: RecordedTask
    """The task, as it is in the record."""
    noise_margin: Annotated[float, Field(ge=0)]
    late_share: Annotated[float, Field(ge=0, le=1)]
    """What the job says of these two, which decide what counts."""
    contributions_root: Hash
    contributions_weight: Uint
    contributions_count: Uint
    """The table of the cycle's contributions, as in the certificate."""
    index: Uint | None
    """The leaf's place in the table; None: the update was refused."""
    path: list[tuple[Hash, Uint]]
    """The path from the leaf to the root: each node's hash and sum."""


@dataclass(frozen=True, config=CONFIG)
class Report:
    """A winner's: why there is no block of this height and round, or its hash."""

    height: Uint
    round: Uint
    block_hash: Annotated[str, Field(max_length=64)]
    problem: Annotated[str, Field(max_length=500)]


@dataclass(frozen=True, config=CONFIG)
class Finding:
    """What an auditor found when it repeated something.

    `problem` says what is wrong, or why it was not repeated. It is empty if it was repeated, and all is right.
    """

    repeated: bool
    problem: Annotated[str, Field(max_length=1000)]


@dataclass(frozen=True, config=CONFIG)
class AuditedTask(Finding):
    """What an auditor found when it did a task again."""

    miner: Hash
    segment: Uint
    shard: Uint
    refusal: Reason | None
    """Why the update was refused, by the record; None: it was accepted."""
    distance: float | None
    """How far the update is from the auditor's, as a share of its L2 norm; None: hashes were compared."""


@dataclass(frozen=True, config=CONFIG)
class Verdict:
    """A member's: what it found when it repeated a closed cycle (audit.py)."""

    height: Uint
    """The block that closed the cycle."""
    record: Hash
    """SHA-256 of the cycle's record."""
    numeric_class: Annotated[str, Field(max_length=200)]
    """Of the auditor's machine."""
    drawn: bool
    """One task was repeated, which the block's hash drew; not all of them."""
    checked: Finding
    """Whether all of the record follows from the chain and the miners' commits."""
    tasks: list[AuditedTask]
    model: Finding | None
    """Whether the accepted updates give the next model and velocity; None: nobody looked."""

    @property
    def findings(self) -> list[Finding]:
        """All that was found."""
        return [self.checked, *self.tasks, *([self.model] if self.model else [])]

    @property
    def right(self) -> bool:
        """Whether all that was repeated is right."""
        return not any(each.repeated and each.problem for each in self.findings)


Message = (
    Join
    | Opening
    | CommitMessage
    | CommitReceipt
    | Closing
    | Award
    | Proposal
    | Cosignature
    | MemoryRequest
    | Receipt
    | Report
    | Verdict
)
M = TypeVar("M", bound=Message)

_KINDS: Mapping[type, str] = {
    Join: "join",
    Opening: "opening",
    CommitMessage: "commit",
    CommitReceipt: "commit-receipt",
    Closing: "closing",
    Award: "award",
    Proposal: "proposal",
    Cosignature: "cosignature",
    MemoryRequest: "memory-request",
    Receipt: "receipt",
    Report: "report",
    Verdict: "verdict",
}
_READERS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in _KINDS}


def seal(key: PrivateKey, chain_id: bytes, message: Message) -> bytes:
    """Return the statement that a key makes by a message."""
    data: bytes = _READERS[type(message)].dump_json(message)
    return key.public_key_xonly.format() + key.sign_schnorr(_sighash(chain_id, type(message), data)) + data


def unseal(chain_id: bytes, kind: type[M], statement: bytes) -> tuple[bytes, M]:
    """Return the signer's key (32 bytes) and the message of a statement.

    Raises MessageError if the signature does not verify, or if the message is not of this kind.
    """
    key, signature, data = _parts(kind, statement)
    if not verify_schnorr(key, _sighash(chain_id, kind, data), signature):
        name = _KINDS[kind]
        raise MessageError(f"{name}: the signature does not verify: it is forged, altered, or of another network")
    return key, _read(kind, data)


def unseal_unchecked(kind: type[M], statement: bytes) -> tuple[bytes, M]:
    """Return the same, but do not check the signature: the statement may be anybody's. Use it only to show it."""
    key, _, data = _parts(kind, statement)
    return key, _read(kind, data)


def message_json(message: Message) -> dict[str, Any]:
    """Return a message as JSON, as it is in its statement."""
    found: dict[str, Any] = _READERS[type(message)].dump_python(message, mode="json")
    return found


def _parts(kind: type, statement: bytes) -> tuple[bytes, bytes, bytes]:
    """Return key, signature and message of a statement."""
    if len(statement) < _HEAD:
        raise MessageError(f"{_KINDS[kind]}: {len(statement)} bytes are too few for a statement")
    return statement[:32], statement[32:_HEAD], statement[_HEAD:]


def _read(kind: type[M], data: bytes) -> M:
    name = _KINDS[kind]
    try:
        message: M = _READERS[kind].validate_json(data)
        json.loads(data, object_pairs_hook=_each_once)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{ascii(each)[:50]}: " for each in first["loc"])  # it may be what a stranger chose
        raise MessageError(f"{name}: {where}{first['msg']}: is it another version of traincert?") from None
    except ValueError as error:
        raise MessageError(f"{name}: {error}") from None
    return message


def commits_root(updates: Mapping[bytes, bytes]) -> bytes:
    """Return the hash (32 bytes) of a cycle's commits: SHA-256 of each miner's update, by the miner's key.

    T("traincert/commits", u32 count || miner_key || update_hash || ...), sorted by miner. It has nothing that differs
    when a cycle is run again, such as times: the same updates give the same next model.
    """
    pairs = b"".join(
        encode_b32("miner_key", miner) + encode_b32("update_hash", update) for miner, update in sorted(updates.items())
    )
    return tagged_hash("traincert/commits", encode_uint("count", len(updates), 4) + pairs)


def score_seed(beacon_reveal: bytes, root: bytes) -> bytes:
    """Return what draws the validation examples for scoring, 32 bytes: nobody but the coordinator can know it before.

    The beacon's value was fixed when the network began, and the commits are fixed by their root. So nobody chooses it.
    """
    return tagged_hash("traincert/score", encode_b32("beacon_reveal", beacon_reveal) + encode_b32("root", root))


def assignment_seed(job_seed: int, prev_block: bytes) -> bytes:
    """Return what decides who trains what, 32 bytes. Nobody knows it before the parent's winner signs its block."""
    return tagged_hash("traincert/assignment", encode_uint("seed", job_seed, 8) + encode_b32("prev_block", prev_block))


def _each_once(pairs: list[tuple[str, object]]) -> None:
    """Refuse an object that has a key twice: readers differ in which of the values they take."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")


def _sighash(chain_id: bytes, kind: type, data: bytes) -> bytes:
    name = _KINDS[kind].encode()
    head = encode_b32("chain_id", chain_id) + encode_uint("length of kind", len(name), 1) + name
    return tagged_hash("traincert/message", head + data)
