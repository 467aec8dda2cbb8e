"""Who takes part: names and keys are bound once, and what a member says counts for itself alone. Without a broker."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from coincurve import PrivateKey

from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.certificate import Certificate, CoordinatorSignature, Draw
from traincert.bridge.consensus.codec import Reader
from traincert.bridge.consensus.lottery import contribution_weight
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.coordinator import Slot, contribution_table
from traincert.bridge.cosigning import Cosigned
from traincert.bridge.errors import BridgeError, CertificateError
from traincert.bridge.invitations import COSIGNER, MINER
from traincert.bridge.member import Member
from traincert.bridge.members import MemberList
from traincert.bridge.messages import (
    Award,
    CommitReceipt,
    Cosignature,
    Join,
    MemoryRequest,
    Message,
    MessageError,
    Opening,
    Proposal,
    Receipt,
    Report,
    message_json,
    seal,
    unseal,
)
from traincert.bridge.miner import VERSION, Miner
from traincert.bridge.remote_miners import RemoteMiners, receipts
from traincert.bridge.signer import Signer
from traincert.bridge.testing.invalid import digest
from traincert.trainer.engines.broker import RefusedError
from traincert.trainer.engines.nats import NatsEngine
from traincert.trainer.errors import EngineError
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import record_hash
from traincert.trainer.standings import Standing
from traincert.trainer.store import read_blob, write_blob
from traincert.trainer.weights import paid

SECRETS = {name: PrivateKey(digest(name)) for name in ("coordinator", "alice", "bob", "carol", "cosigner")}
KEYS = {name: secret.public_key_xonly.format() for name, secret in SECRETS.items()}
BEACON = Beacon(digest("beacon"))
PARAMS = TrainingParams({1: TrainingKeys(2, (KEYS["coordinator"], KEYS["cosigner"]))}, BEACON.anchor, digest("model"))


@pytest.fixture
def members(tmp_path: Path) -> MemberList:
    return MemberList(tmp_path / "members.sqlite")


@pytest.fixture
def joined(members: MemberList) -> MemberList:
    for name in ("alice", "bob", "carol", "cosigner"):
        members.invite(name, COSIGNER if name == "cosigner" else MINER)
        members.join(name, KEYS[name])
    return members


def test_a_member_is_invited_and_then_joins(members: MemberList) -> None:
    assert members.roles() == {}
    members.invite("alice", MINER)
    members.invite("carl", COSIGNER)
    assert members.roles() == {"alice": (MINER, None), "carl": (COSIGNER, None)}
    assert members.keys() == members.with_role(MINER) == {}
    members.join("alice", KEYS["alice"])
    members.join("carl", KEYS["cosigner"])
    assert members.keys() == {"alice": KEYS["alice"], "carl": KEYS["cosigner"]}
    assert members.with_role(MINER) == {"alice": KEYS["alice"]}
    assert members.with_role(COSIGNER) == {"carl": KEYS["cosigner"]}


def test_a_name_has_one_key_and_a_key_one_name(joined: MemberList) -> None:
    joined.join("alice", KEYS["alice"])  # again
    with pytest.raises(BridgeError, match=f"^this invitation was used already: .* the key {KEYS['alice'].hex()}$"):
        joined.join("alice", digest("another key"))
    joined.invite("dave", MINER)
    with pytest.raises(BridgeError, match=f"^the key {KEYS['bob'].hex()} is that of bob: each member needs a key of"):
        joined.join("dave", KEYS["bob"])
    with pytest.raises(BridgeError, match=r"^erin is not invited$"):
        joined.join("erin", digest("a key"))
    assert joined.with_role(MINER) == {name: KEYS[name] for name in ("alice", "bob", "carol")}


def test_an_invitation_may_be_replaced_until_it_was_used(members: MemberList) -> None:
    members.invite("alice", COSIGNER)
    members.invite("alice", MINER)
    members.join("alice", KEYS["alice"])
    assert members.roles() == {"alice": (MINER, KEYS["alice"])}
    with pytest.raises(BridgeError, match=r"^alice has joined already: remove it first "):
        members.invite("alice", MINER)


def test_a_removed_name_and_its_key_may_come_back(joined: MemberList) -> None:
    joined.remove("alice")
    assert "alice" not in joined.roles()
    with pytest.raises(BridgeError, match=r"^alice is not invited$"):
        joined.join("alice", KEYS["alice"])
    with pytest.raises(BridgeError, match=r"^there is no member alice; there are: bob, carol, cosigner$"):
        joined.remove("alice")
    joined.invite("alice", MINER)
    joined.join("alice", digest("a new key"))
    joined.invite("dave", MINER)
    joined.join("dave", KEYS["alice"])
    assert joined.keys()["dave"] == KEYS["alice"]


def test_to_remove_from_an_empty_list_is_said(members: MemberList) -> None:
    with pytest.raises(BridgeError, match=r"^there is no member alice; there are: none$"):
        members.remove("alice")


def test_a_process_sees_what_another_one_changes(joined: MemberList, tmp_path: Path) -> None:
    def elsewhere(statement: str) -> str:
        code = f"import sqlite3\nwith sqlite3.connect({str(tmp_path / 'members.sqlite')!r}) as members:\n"
        code += f"    print(members.execute({statement!r}).fetchall())"
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    assert set(joined.keys()) == {"alice", "bob", "carol", "cosigner"}
    elsewhere("DELETE FROM members WHERE name = 'alice'")
    assert set(joined.keys()) == {"bob", "carol", "cosigner"}
    joined.remove("bob")
    assert elsewhere("SELECT name FROM members ORDER BY name") == "[('carol',), ('cosigner',)]"


def test_two_lists_of_one_file_agree(joined: MemberList, tmp_path: Path) -> None:
    other = MemberList(tmp_path / "members.sqlite")
    for number in range(20):
        first, second = (joined, other) if number % 2 else (other, joined)
        first.invite(f"miner{number}", MINER)
        second.join(f"miner{number}", digest(f"{number}"))
        assert first.keys() == second.keys()
        with pytest.raises(BridgeError, match="used already"):
            first.join(f"miner{number}", digest("another"))


@dataclass
class Engine:
    """What `RemoteMiners` and `Cosigned` use of the engine, without a connection."""

    handlers: dict[str, Any] = field(default_factory=dict)
    posted: dict[tuple[bytes, str], bytes] = field(default_factory=dict)
    there: list[bytes] = field(default_factory=list)
    opening: bytes | None = None
    opened: list[bytes] = field(default_factory=list)
    on_wait: Any = None

    def present(self) -> list[bytes]:
        return self.there

    def post(self, miner: bytes, kind: str, statement: bytes) -> None:
        self.posted[miner, kind] = statement

    def clear(self, kind: str) -> None:
        self.posted = {key: each for key, each in self.posted.items() if key[1] != kind}

    def open(self, opening: bytes, deadline: float) -> None:
        del deadline
        self.opened.append(opening)
        self.opening = opening

    def notify(self) -> None:
        pass

    def wait(self, seconds: float) -> None:
        del seconds
        if self.on_wait:
            self.on_wait()

    def ask(self, kind: str, member: str, data: bytes) -> bytes:
        answer: bytes = asyncio.run(self.handlers[kind](member, data))
        return answer


RECORDS: list[dict[str, Any]] = [
    {
        "cycle": number,
        "model_after": digest(f"model {number}").hex(),
        "velocity": digest(f"velocity {number}").hex(),
        "tasks": [],
        "memories": {},
        "standings": {},
    }
    for number in range(2)
]


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def remote(joined: MemberList, engine: Engine, tmp_path: Path) -> RemoteMiners:
    dataset = SimpleNamespace(
        root=digest("root"), directory=tmp_path / "data", shards=[digest("shard")], shard_folder=tmp_path / "shards"
    )
    job = SimpleNamespace(
        digest=lambda: digest("job"), task_seconds=100.5, shared_identity=lambda: {"job": "x"}, seed=0, most_tasks=2
    )
    run = SimpleNamespace(
        records=list(RECORDS),
        store=tmp_path / "store",
        memories=lambda: {KEYS["bob"]: digest("memory")},
        record_path=lambda cycle: tmp_path / f"{cycle}.json",
    )
    remote = RemoteMiners(joined, SECRETS["coordinator"], PARAMS, wanted=2, waiting=lambda *_: None)
    remote.attach(cast(Any, engine), cast(Any, SimpleNamespace(job=job, dataset=dataset)), cast(Any, run))
    return remote


def sealed(name: str, message: Message) -> bytes:
    return seal(SECRETS[name], PARAMS.chain_id, message)


def refusal(engine: Engine, kind: str, member: str, data: bytes) -> str:
    with pytest.raises(EngineError) as caught:
        engine.ask(kind, member, data)
    return str(caught.value)


@pytest.mark.usefixtures("remote")
def test_a_member_registers_its_key_by_a_message_that_it_signs(engine: Engine, joined: MemberList) -> None:
    joined.invite("dave", MINER)
    secret = PrivateKey(digest("dave"))
    join = seal(secret, PARAMS.chain_id, Join("dave"))
    assert "is for dave, not for erin" in refusal(engine, "join", "erin", join)
    assert "does not verify" in refusal(engine, "join", "dave", seal(secret, bytes(32), Join("dave")))
    assert joined.roles()["dave"] == (MINER, None)
    for _ in range(3):
        assert engine.ask("join", "dave", join) == KEYS["coordinator"]
    assert joined.keys()["dave"] == secret.public_key_xonly.format()
    assert "used already" in refusal(engine, "join", "dave", sealed("alice", Join("dave")))
    joined.invite("erin", MINER)
    assert "is that of alice" in refusal(engine, "join", "erin", sealed("alice", Join("erin")))
    joined.remove("dave")
    assert refusal(engine, "join", "dave", join) == "dave is not invited"


def test_the_first_cycle_waits_for_enough_miners(engine: Engine, remote: RemoteMiners) -> None:
    waited = []

    def come() -> None:
        waited.append(len(engine.there))
        engine.there = sorted([*engine.there, KEYS["cosigner"], KEYS["bob"] if waited[1:] else KEYS["carol"]])

    engine.on_wait = come
    miners, statement = remote.open(Slot(1, digest("block"), 0), 0)
    assert miners == sorted([KEYS["bob"], KEYS["carol"]])  # no cosigner
    key, opening = unseal(PARAMS.chain_id, Opening, statement)
    assert key == KEYS["coordinator"]
    assert opening.memories == [digest("memory") if miner == KEYS["bob"] else None for miner in miners]
    assert opening.deadline - opening.opened == 101
    assert engine.opened == [statement]
    assert remote.open(Slot(1, digest("block"), 0), 0) == (miners, statement)  # it is open already
    assert engine.opened == [statement]
    engine.there = [KEYS["alice"]]
    assert remote.open(Slot(2, digest("block 1"), 0), 1)[0] == [KEYS["alice"]]


def test_a_cycle_has_at_most_as_many_miners_as_the_job_takes_and_none_that_is_barred(
    engine: Engine, remote: RemoteMiners
) -> None:
    """Of three at most two have a task, first those that committed in their last one; by the block's hash if equal."""
    names = ("alice", "bob", "carol")
    engine.there = sorted(KEYS[name] for name in names)

    def chosen(known: Mapping[str, Standing], cycle: int = 2, block: str = "block") -> set[str]:
        remote._run.records[-1]["standings"] = {KEYS[name].hex(): list(each) for name, each in known.items()}
        engine.opening = None
        miners, statement = remote.open(Slot(cycle + 1, digest(block), 0), cycle)
        assert list(miners) == sorted(miners)
        assert unseal(PARAMS.chain_id, Opening, statement)[1].miners == miners
        return {name for name in names if KEYS[name] in miners}

    by_block = [frozenset(chosen({}, block=f"block {number}")) for number in range(20)]
    assert len(set(by_block)) == 3
    assert {len(each) for each in by_block} == {2}
    steady = Standing(steady=True)
    assert chosen({"bob": steady, "carol": steady}) == {"bob", "carol"}
    known = {"bob": steady, "carol": steady._replace(barred_until=3)}
    assert chosen(known) == {"alice", "bob"}
    assert chosen(known, cycle=3) == {"bob", "carol"}
    assert chosen({name: Standing(barred_until=3) for name in names[1:]}) == {"alice"}
    assert len(chosen({name: Standing(barred_until=3) for name in names})) == 2  # otherwise the chain would end


def test_a_member_reads_what_closed_cycles_reveal_and_a_cosigner_also_shards(
    remote: RemoteMiners, tmp_path: Path
) -> None:
    def store(name: str) -> Path:
        return tmp_path / "store" / digest(name).hex()

    for member in ("alice", "cosigner", "invited"):
        assert remote.shared(member, digest("root")) == tmp_path / "data" / digest("root").hex()
        for cycle, record in enumerate(RECORDS):
            assert remote.shared(member, record_hash(record)) == tmp_path / f"{cycle}.json"
        for name in ("model 0", "model 1", "velocity 0", "velocity 1"):
            assert remote.shared(member, digest(name)) == store(name)

    def task(name: str, *, drawn: bool) -> dict[str, Any]:
        files = {what: digest(f"{what} {name}").hex() for what in ("update_hash", "memory", "memory_after", "noise")}
        return {**files, "drawn": drawn}

    absent = {"update_hash": None, "memory": None, "memory_after": None, "noise": None, "drawn": False}
    tasks = [task("of bob", drawn=True), task("of carol", drawn=False), absent]
    new = {"cycle": 2, "model_after": digest("model 2").hex(), "velocity": digest("velocity 2").hex(), "tasks": tasks}
    public = ["model 2", "velocity 2", "update_hash of bob", "update_hash of carol", "memory of bob"]
    public.append("memory_after of bob")
    for member in ("alice", "cosigner"):
        assert remote.shared(member, record_hash(new)) is None
        assert not any(remote.shared(member, digest(name)) for name in public)
    remote._run.records.append(new)
    for member in ("alice", "cosigner"):
        assert remote.shared(member, record_hash(new)) == tmp_path / "2.json"
        assert [remote.shared(member, digest(name)) for name in public] == list(map(store, public))
        assert not any(remote.shared(member, digest(f"{what} of carol")) for what in ("memory", "memory_after"))
    assert remote.shared("alice", digest("noise of bob")) is None
    assert remote.shared("cosigner", digest("noise of bob")) == store("noise of bob")
    assert remote.shared("cosigner", digest("noise of carol")) is None
    assert remote.shared("alice", digest("shard")) is None
    assert remote.shared("stranger", digest("shard")) is None
    assert remote.shared("cosigner", digest("shard")) == tmp_path / "shards" / digest("shard").hex()


def certificate(winner: str = "alice", round_: int = 0, signatures: Sequence[CoordinatorSignature] = ()) -> Certificate:
    table = contribution_table(RECORDS[0])
    return Certificate(
        height=1,
        prev_block=digest("block"),
        beacon_reveal=BEACON.reveal(0),
        model_before=digest("model"),
        model_after=digest("model 1"),
        dataset_root=digest("root"),
        record=digest("record"),
        loss_before=2,
        loss_after=1,
        params_trained=0,
        contributions_root=table.root,
        contributions_weight=0,
        contributions_count=0,
        winner_key=KEYS[winner],
        draw=None,
        round=round_,
        coordinator_signatures=tuple(signatures),
    )


def test_a_winner_alone_says_why_its_block_is_absent(engine: Engine, remote: RemoteMiners, joined: MemberList) -> None:
    assert remote.why_absent(certificate()) == "it is away"
    engine.there = [KEYS["alice"]]
    assert remote.why_absent(certificate()) == "no answer yet"
    for name, signer in (("bob", "bob"), ("bob", "alice"), ("alice", "bob")):
        engine.ask("report", name, sealed(signer, Report(1, 0, "", "a lie")))
    assert remote.why_absent(certificate()) == "no answer yet"
    engine.ask("report", "alice", sealed("alice", Report(1, 0, "", "its disk is full")))
    assert remote.why_absent(certificate()) == "its disk is full"
    assert remote.why_absent(certificate(round_=1)) == "no answer yet"
    for number in range(1000):  # it keeps one
        engine.ask("report", "alice", sealed("alice", Report(1, number % 2, "ab", "")))
    assert remote.why_absent(certificate(round_=1)) == "its node took block ab, but ours has not heard of it"
    assert len(remote._reports) <= len(joined.keys())
    joined.remove("alice")
    assert remote.why_absent(certificate(round_=2)) == "it takes part no longer"


def test_an_award_is_posted_for_its_winner_only(engine: Engine, remote: RemoteMiners) -> None:
    remote.award(certificate("bob"))
    ((who, kind),) = engine.posted
    assert (who, kind) == (KEYS["bob"], "award")
    _, award = unseal(PARAMS.chain_id, Award, engine.posted[who, kind])
    assert award.certificate == certificate("bob").serialize()


def test_a_commits_receipt_is_the_coordinators(remote: RemoteMiners) -> None:
    statement = b"any statement"
    key, receipt = unseal(PARAMS.chain_id, CommitReceipt, remote.make_receipt(statement, 3, True))
    assert key == KEYS["coordinator"]
    assert receipt == CommitReceipt(hashlib.sha256(statement).digest(), 3, late=True)


def test_a_request_for_memories_is_the_coordinators(remote: RemoteMiners) -> None:
    statement = remote.make_request(digest("opening"), [digest("memory"), digest("another")])
    key, request = unseal(PARAMS.chain_id, MemoryRequest, statement)
    assert key == KEYS["coordinator"]
    assert request == MemoryRequest(digest("opening"), [digest("memory"), digest("another")])


def test_each_miner_of_a_cycle_gets_its_leaf_and_path_or_the_refusal() -> None:
    def task(name: str, reduction: int, refusal: str | None) -> dict[str, Any]:
        return {
            "miner": KEYS[name].hex(),
            "segment": 0,
            "shard": digest("shard").hex(),
            "seed": digest("seed").hex(),
            "memory": None,
            "memory_after": None,
            "update_hash": None if refusal else digest(f"update {name}").hex(),
            "update_size": 0 if refusal else 1000,
            "commit": None if refusal else "00ff",
            "numeric_class": "" if refusal else "a machine",
            "place": None if refusal else 1,
            "late": False,
            "norm": None if refusal else 1.5,
            "scale": 1.0,
            "own_shard": None if refusal else -0.5,
            "score": None if refusal else asdict(paid(100, reduction, 0, noise_margin=0.5, late_share=0.5, late=False)),
            "drawn": not refusal,
            "params": 100,
            "loss_reduction": reduction,
            "weight": 0 if refusal else contribution_weight(100, reduction),
            "refusal": refusal,
            "detail": "it came too late" if refusal else None,
            "noise": None if refusal else digest(f"noise {name}").hex(),
            "epsilon": None if refusal else 1.25,
        }

    tasks = [task("alice", 1000, None), task("bob", 0, "late"), task("carol", 3000, None)]
    record = {"cycle": 1, "tasks": sorted(tasks, key=lambda each: str(each["miner"]))}
    job = cast(TrainingJob, SimpleNamespace(noise_margin=0.25, late_share=0.75))
    found: dict[bytes, Receipt] = dict(receipts(record, job))
    assert set(found) == {KEYS[name] for name in ("alice", "bob", "carol")}
    bobs = found[KEYS["bob"]]
    assert (bobs.task.refusal, bobs.index, bobs.path) == ("late", None, [])
    for each in tasks:
        receipt = found[bytes.fromhex(each["miner"])]
        assert message_json(receipt)["task"] == each
        assert (receipt.cycle, receipt.record) == (1, record_hash(record))
        assert (receipt.noise_margin, receipt.late_share) == (0.25, 0.75)
    table = contribution_table(record)
    for name in ("alice", "carol"):
        receipt = found[KEYS[name]]
        assert receipt.index is not None
        assert table.leaves[receipt.index].miner_key == KEYS[name]
        assert receipt.path == [(node.hash, node.sum) for node in table.path(receipt.index)]
        assert (receipt.contributions_root, receipt.contributions_weight) == (table.root, table.weight)


@pytest.fixture
def cosigned(joined: MemberList, engine: Engine, tmp_path: Path) -> Cosigned:
    signer = Signer(tmp_path / "journal.sqlite", PARAMS.chain_id, {0: SECRETS["coordinator"].secret})
    coordinator = SECRETS["coordinator"]
    return Cosigned(signer, coordinator, PARAMS, joined, cast(NatsEngine, engine), lambda _: None)


def proposal(engine: Engine) -> Certificate:
    _, asked = unseal(PARAMS.chain_id, Proposal, engine.posted[KEYS["cosigner"], "proposal"])
    return Certificate.read(Reader(asked.certificate))


def cosignature(asked: Certificate, refusal: str = "", signer: str = "cosigner") -> bytes:
    signature = b"" if refusal else SECRETS[signer].sign_schnorr(asked.sighash(PARAMS.chain_id))
    bare = hashlib.sha256(asked.serialize()).digest()
    return sealed(signer, Cosignature(bare, signature, refusal, "a sentence" if refusal else ""))


def test_a_certificate_gets_the_signature_of_its_cosigner_and_no_other(engine: Engine, cosigned: Cosigned) -> None:
    def answer() -> None:
        asked = proposal(engine)
        for member, data, why in (
            ("alice", cosignature(asked, signer="alice"), "is not the key of the cosigner alice"),
            ("alice", cosignature(asked), "is not the key of the cosigner alice"),
            ("cosigner", cosignature(asked, signer="coordinator"), "is not the key of the cosigner cosigner"),
            ("cosigner", b"", "too few for a statement"),
        ):
            assert why in refusal(engine, "cosign", member, data)
        wrong = hashlib.sha256(asked.serialize()).digest()
        bad = sealed("cosigner", Cosignature(wrong, bytes(64), "", ""))
        assert refusal(engine, "cosign", "cosigner", bad) == "the signature does not verify"
        other = cosignature(replace(asked, round=1))
        assert engine.ask("cosign", "cosigner", other) == b""  # of another proposal
        engine.ask("cosign", "cosigner", cosignature(asked, "too-early"))  # that passes
        for _ in range(2):
            engine.ask("cosign", "cosigner", cosignature(asked))

    engine.on_wait = answer
    signed = cosigned.sign(certificate())
    assert [each.key_index for each in signed.coordinator_signatures] == [0, 1]
    assert engine.posted == {}


def test_a_cosigner_that_refuses_for_good_is_quoted(engine: Engine, cosigned: Cosigned) -> None:
    engine.on_wait = lambda: engine.ask("cosign", "cosigner", cosignature(proposal(engine), "wrong-weight"))
    with pytest.raises(BridgeError, match="block 1, round 0: 1 of 2 signatures; cosigner: wrong-weight: a sentence: "):
        cosigned.sign(certificate())


def test_a_cosigner_that_joins_while_its_signature_is_awaited_is_asked(
    engine: Engine, cosigned: Cosigned, joined: MemberList
) -> None:
    """All programs of a network may be started at the same time: the coordinator may be the first that is ready."""
    joined.remove("cosigner")
    joined.invite("cosigner", COSIGNER)
    waits = iter(range(3))

    def answer() -> None:
        match next(waits):
            case 0:
                assert engine.posted == {}
                joined.join("cosigner", KEYS["cosigner"])
            case 1:
                engine.ask("cosign", "cosigner", cosignature(proposal(engine)))

    engine.on_wait = answer
    assert [each.key_index for each in cosigned.sign(certificate()).coordinator_signatures] == [0, 1]


def test_a_signature_that_is_late_is_not_taken_for_the_next_certificate(engine: Engine, cosigned: Cosigned) -> None:
    late: list[bytes] = []

    def answer() -> None:
        for data in late:
            engine.ask("cosign", "cosigner", data)
        late.append(cosignature(proposal(engine)))
        if len(late) != 2:
            engine.ask("cosign", "cosigner", late[-1])

    engine.on_wait = answer
    first = cosigned.sign(certificate())
    second = cosigned.sign(certificate("bob", 1))
    for signed in (first, second):
        (_, by_cosigner) = signed.coordinator_signatures
        bare = replace(signed, coordinator_signatures=())
        assert SECRETS["cosigner"].public_key_xonly.verify(by_cosigner.signature, bare.sighash(PARAMS.chain_id))


@pytest.fixture
def member() -> Member:
    folder = SimpleNamespace(params=PARAMS, coordinator=KEYS["coordinator"], secret=SECRETS["alice"].secret)
    return Member(cast(Any, folder), cast(Any, None), cast(Any, None))


def test_a_member_reads_only_what_its_coordinator_said(member: Member) -> None:
    receipt = CommitReceipt(digest("commit"), 0, late=False)
    statement = sealed("coordinator", receipt)
    assert member.read(CommitReceipt, statement) == receipt
    for place in range(len(statement)):
        altered = bytearray(statement)
        altered[place] ^= 1
        with pytest.raises(MessageError, match="does not verify"):
            member.read(CommitReceipt, bytes(altered))
    for name in ("alice", "bob", "cosigner"):
        with pytest.raises(MessageError, match=f"signed by {KEYS[name].hex()}, which is not the coordinator's key"):
            member.read(CommitReceipt, sealed(name, receipt))
    with pytest.raises(MessageError, match="of another network"):
        member.read(CommitReceipt, seal(SECRETS["coordinator"], bytes(32), receipt))


class Node:
    """A node at the height before the first certificate."""

    name = "a node"

    def wait_for_height(self, height: int, seconds: float) -> bool:
        del seconds
        return height == 0

    def call(self, method: str) -> int:
        assert method == "getblockcount"
        return 0


def awarded(unsigned: Certificate, chain_id: bytes = PARAMS.chain_id) -> Certificate:
    keys = (SECRETS["coordinator"], SECRETS["cosigner"])
    signatures = [CoordinatorSignature(n, key.sign_schnorr(unsigned.sighash(chain_id))) for n, key in enumerate(keys)]
    return replace(unsigned, coordinator_signatures=tuple(signatures))


def test_a_miner_takes_only_an_award_that_its_own_node_will_take(tmp_path: Path) -> None:
    miner = Miner.__new__(Miner)
    miner._folder = cast(Any, SimpleNamespace(params=PARAMS))
    miner._receipts = tmp_path
    node = cast(Any, Node())
    good = certificate()
    assert miner._check_award(awarded(good), node) is True
    draw = Draw(digest("update"), 1, 1, 1, 0, ())
    wrong = {
        "bad-traincert-coordinator-sig": awarded(good, bytes(32)),  # of another network
        "bad-traincert-award": awarded(replace(good, draw=draw)),
        "bad-traincert-beacon": awarded(replace(good, beacon_reveal=digest("another"))),
        "bad-traincert-model": awarded(replace(good, model_before=digest("another"))),
    }
    found = {}
    for reason, each in wrong.items():
        with pytest.raises(CertificateError) as caught:
            miner._check_award(each, node)
        found[reason] = caught.value.reason
    assert found == {reason: reason for reason in wrong}


def test_a_miner_sends_the_memories_of_its_last_task_and_says_which_are_lost(tmp_path: Path) -> None:
    """It goes on after one that the coordinator does not want. A request of an older cycle is not for it."""
    sent: list[tuple[str, bytes, bytes]] = []
    said: list[tuple[str, str]] = []

    def send(kind: str, asked: bytes, folder: Path) -> None:
        data = read_blob(folder, asked)
        if data == b"not wanted":
            raise RefusedError("the memory came too late")
        sent.append((kind, asked, data))

    here, refused = (write_blob(tmp_path, data) for data in (b"memory", b"not wanted"))
    folder = SimpleNamespace(params=PARAMS, coordinator=KEYS["coordinator"], folder=tmp_path, store=tmp_path)
    folder.secret = SECRETS["alice"].secret
    miner = Miner.__new__(Miner)
    miner._folder = cast(Any, folder)
    miner._member = Member(cast(Any, folder), cast(Any, None), cast(Any, SimpleNamespace(send=send)))
    miner._view = cast(Any, SimpleNamespace(say=lambda event, text, **_: said.append((event, text))))

    def ask(opening: str, name: str = "coordinator") -> None:
        miner._send_memories(sealed(name, MemoryRequest(digest(opening), [refused, digest("lost"), here])))

    ask("opening")  # there is no task yet
    (tmp_path / "task.json").write_text(json.dumps({"version": VERSION, "opening": digest("opening").hex()}))
    ask("an older opening")
    with pytest.raises(MessageError, match="which is not the coordinator's key"):
        ask("opening", "bob")
    assert (sent, said) == ([], [])
    ask("opening")
    assert sent == [("memory", here, b"memory")]
    assert [event for event, _ in said] == ["checked", "refused", "refused"]
    assert "the memory came too late" in said[1][1]
    assert digest("lost").hex() in said[2][1]
