"""A cosigner signs what is true, and refuses each lie by its name.

Node, training, keys and commits are real. The world is a coordinator that can lie: `World.propose` makes a proposal
from any record, and each lie is one change to the honest one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any, cast

import pytest
from bitcoin.core import lx
from coincurve import PrivateKey

from traincert.bridge import rpc
from traincert.bridge.broker import Credential
from traincert.bridge.checker import Checker, CosignError, _Model
from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.certificate import Certificate, CoordinatorSignature, draw_of
from traincert.bridge.consensus.codec import verify_schnorr
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.coordinator import Slot, certificate_of, contribution_table
from traincert.bridge.cosigner import Cosigner, CosignerSigner, check_key, cosign, make_cosigner_key
from traincert.bridge.errors import BridgeError, CertificateError
from traincert.bridge.invitations import COSIGNER, Invitation
from traincert.bridge.member import Member, MemberFolder
from traincert.bridge.messages import (
    CommitMessage,
    Cosignature,
    MessageError,
    Opening,
    Proposal,
    assignment_seed,
    commits_root,
    score_seed,
    seal,
    unseal,
)
from traincert.bridge.producer import NodeProducer
from traincert.bridge.rpc import NodeClient
from traincert.bridge.testing.invalid import digest
from traincert.regtest.plugin import NetworkFactory
from traincert.trainer.cycle import CycleResult, Trainer
from traincert.trainer.engines.broker import Connection, StoppedError
from traincert.trainer.engines.executor import Executor
from traincert.trainer.engines.orders import Answer, Commit, OnCommit, Order
from traincert.trainer.errors import EngineError, Reason
from traincert.trainer.examples import Dataset, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.records import Record, RunFolder, record_hash
from traincert.trainer.scoring import Evaluation
from traincert.trainer.segments import cut_segments
from traincert.trainer.state import State, load_state, state_hash
from traincert.trainer.store import read_blob, write_blob
from traincert.trainer.updates import encode_update, read_update
from training_chain import COORDINATORS, PAYOUT_SCRIPT

SECRETS = [digest(f"miner {number}") for number in range(7)]
KEYS = {PrivateKey(secret).public_key_xonly.format(): PrivateKey(secret) for secret in SECRETS}
MINERS = sorted(KEYS)
OWN = COORDINATORS[1]
NOT_JUDGED = 60 * 60 * 24


class Engine:
    """Miners in this process that sign their commits. `faults` are what some of them do, by miner."""

    def __init__(self, job: TrainingJob, store: Path) -> None:
        self.job, self.store = job, store
        self.faults: Mapping[bytes, str] = {}
        self.opening = b""
        self.chain_id = b""
        self._executor = Executor(job, store)
        self._segments = cut_segments(build_model(job), job)
        self._updates: list[bytes | Reason] = []

    def collect(
        self, shards: Path, orders: Sequence[Order], on_commit: OnCommit | None = None
    ) -> list[Commit | Reason]:
        del on_commit
        commits: list[Commit | Reason] = []
        self._updates = []
        for order in orders:
            fault = self.faults.get(order.task.miner, "")
            if fault in (Reason.ABSENT, Reason.LATE):
                commits.append(Reason(fault))
                self._updates.append(Reason(fault))
                continue
            answer = self._spoiled(order, self._executor.execute(shards, order), fault)
            write_blob(self.store, answer.update)
            commit = Commit.to(answer, hashlib.sha256(answer.update).digest())
            message = CommitMessage(
                hashlib.sha256(self.opening).digest(),
                commit.update_hash,
                commit.update_size,
                commit.memory_before,
                commit.memory_after,
                commit.seconds,
                "a machine",
            )
            commits.append(commit._replace(statement=seal(KEYS[order.task.miner], self.chain_id, message)))
            self._updates.append(Reason.WITHHELD if fault == Reason.WITHHELD else answer.update)
        return commits

    def reveal(self, orders: Sequence[Order], commits: Sequence[Commit | Reason]) -> list[bytes | Reason]:
        del orders, commits
        return self._updates

    def _spoiled(self, order: Order, answer: Answer, fault: str) -> Answer:
        if fault == Reason.MALFORMED:
            return answer._replace(update=b"no safetensors")
        if fault == Reason.NO_IMPROVEMENT:
            state = load_state(self.store, order.model_hash)
            update = read_update(answer.update, self.job, self._segments[order.task.segment], state)
            return answer._replace(update=encode_update(update.scaled(-1.0), self.job.density)[0])
        return answer


class Judge(Trainer):
    """A trainer that can find the next models bad, so many times, that the guard halves the step."""

    bad = 0

    def evaluate(self, model: State) -> Evaluation:
        evaluation = super().evaluate(model)
        if self.bad:
            self.bad -= 1
            return replace(evaluation, loss=2**60)
        return evaluation


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A small model, trained little, so that there is a contribution in every cycle, and it takes no time."""
    job = replace(
        TrainingJob.named("digits"),
        model_options={"inputs": 64, "hidden": [8], "classes": 10},
        local_steps=9,
        segments=2,
        density=1.0,
        outer_momentum=0.3,
        optimizer="SGD",
        optimizer_options={"momentum": 0.9},
        keep_optimizer_state=True,
    )
    return prepare_dataset(job, tmp_path_factory.mktemp("data"))


class World:
    """A network of one node, its coordinator and its miners. `slot` is the one after the tip."""

    def __init__(self, start: NetworkFactory, stack: ExitStack, dataset: Dataset, path: Path) -> None:
        self.path, self.job = path, dataset.job
        self.run = stack.enter_context(RunFolder(path / "run", dataset.job))
        self.engine = Engine(dataset.job, self.run.store)
        self.trainer = stack.enter_context(Judge(dataset, self.engine))
        state = self.trainer.start()
        self.run.begin(state, dataset)
        self.beacon = Beacon(digest("beacon"))
        keys = TrainingKeys(2, tuple(key.public_key_xonly.format() for key in COORDINATORS))
        self.params = TrainingParams({1: keys}, self.beacon.anchor, state_hash(state.model), round_seconds=1)
        self.engine.chain_id = self.params.chain_id
        self.network_node = start(1, self.params.node_options()).nodes[0]
        self.node = stack.enter_context(NodeClient.from_datadir(self.network_node.datadir))
        self.files = path / "files"
        self.files.mkdir()
        write_blob(self.files, read_blob(dataset.directory, dataset.root))
        self.lies: dict[bytes, bytes] = {}
        self._save(self.run.records[0])

    @property
    def slot(self) -> Slot:
        tip = self.node.call("getbestblockhash")
        header = self.node.call("getblockheader", tip)
        return Slot(header["height"] + 1, lx(tip), header["time"])

    def result(self, faults: Mapping[bytes, str], miners: Sequence[bytes] = MINERS, bad: int = 0) -> CycleResult:
        """Run the slot's cycle. It is not saved."""
        slot, before = self.slot, self.run.load()
        now = int(time.time())
        memories = self.run.memories()
        opening = Opening(
            self.job.digest(),
            slot.height - 1,
            slot.height,
            slot.prev_block,
            before.model_hash,
            self.trainer.dataset.root,
            list(miners),
            [memories.get(miner) for miner in miners],
            now,
            now + NOT_JUDGED,
        )
        self.engine.faults = faults
        self.engine.opening = seal(COORDINATORS[0], self.params.chain_id, opening)
        self.trainer.bad = bad
        reveal = self.beacon.reveal(slot.height - 1)
        return self.trainer.run_cycle(
            before,
            miners,
            seed=assignment_seed(self.job.seed, slot.prev_block),
            score_seed=lambda commits: score_seed(
                reveal, commits_root({miner: commit.update_hash for miner, commit in commits.items()})
            ),
        )

    def next_record(self, faults: Mapping[bytes, str], miners: Sequence[bytes] = MINERS, bad: int = 0) -> Record:
        """Return the record of the slot's cycle. Its files can be fetched."""
        record = self.run.next_record(self.result(faults, miners, bad), self.engine.opening)
        self._save(record)
        return record

    def _save(self, record: Record) -> None:
        shutil.copytree(self.run.store, self.files, dirs_exist_ok=True)
        write_blob(self.files, encoded(record))

    def fetch(self, digest: bytes) -> bytes:
        return self.lies[digest] if digest in self.lies else read_blob(self.files, digest)

    def certificate(self, record: Record, round_: int = 0) -> Certificate:
        return certificate_of(
            [self.run.records[-1], record], self.slot, round_, self.beacon.reveal(self.slot.height - 1)
        )

    def sign(self, certificate: Certificate, signers: Sequence[int] = (0, 1)) -> Certificate:
        message = certificate.sighash(self.params.chain_id)
        signatures = (CoordinatorSignature(number, COORDINATORS[number].sign_schnorr(message)) for number in signers)
        return replace(certificate, coordinator_signatures=tuple(signatures))

    def propose(self, record: Record, round_: int = 0, /, **changes: Any) -> Proposal:
        """The proposal of a record, with the certificates of the earlier rounds, and changes to its certificate."""
        earlier = [self.sign(self.certificate(record, number)).serialize() for number in range(round_)]
        return Proposal(replace(self.certificate(record, round_), **changes).serialize(), earlier)

    def append(self, record: Record, round_: int = 0) -> None:
        """Append the block of a record, as the winner does, and save the record."""
        certificate = self.sign(self.certificate(record, round_))
        secret = KEYS[certificate.winner_key].secret
        NodeProducer(secret, PAYOUT_SCRIPT, self.network_node.datadir).produce(certificate, self.params)
        self.run.save(record)

    def checker(self, **options: Any) -> Checker:
        return Checker(self.job, self.params, self.node, self.fetch, **{"patience": 0.2, **options})

    def signer(self, path: Path) -> CosignerSigner:
        return CosignerSigner(path / "journal.sqlite", self.params.chain_id, OWN.secret)


def encoded(record: Record) -> bytes:
    return json.dumps(record, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


FAULTS = {
    MINERS[0]: Reason.MALFORMED,
    MINERS[1]: Reason.NO_IMPROVEMENT,
    MINERS[2]: Reason.WITHHELD,
    MINERS[3]: Reason.ABSENT,
}
ACCEPTED = 5
"""The number of a task that is accepted."""


class Lies(World):
    """A world at height 1: the record of its second cycle has accepted updates and refused ones of each kind."""

    record: Record

    def lie(self, **changes: Any) -> Proposal:
        """Propose the record with some of its fields changed."""
        return self.lie_of({**self.record, **changes})

    def lie_of_task(self, number: int, **changes: Any) -> Proposal:
        """Propose the record with some fields of a task changed, and with the memories that follow from that."""
        tasks = [{**task, **changes} if i == number else task for i, task in enumerate(self.record["tasks"])]
        moved = {task["miner"]: task["memory_after"] for task in tasks if not task["refusal"] and task["memory_after"]}
        return self.lie(tasks=tasks, memories={**self.run.records[-1]["memories"], **moved})

    def lie_of(self, record: Record) -> Proposal:
        self.lies[record_hash(record)] = encoded(record)
        try:
            return self.propose(record)
        except (CertificateError, TypeError):  # no table can be made of it
            return self.propose(self.record, record=record_hash(record))

    def lie_of_bytes(self, data: bytes) -> Proposal:
        self.lies[hashlib.sha256(data).digest()] = data
        return self.propose(self.record, record=hashlib.sha256(data).digest())

    def opening(self, **changes: Any) -> Proposal:
        """Propose the record with another opening, which the coordinator has signed."""
        _, opening = unseal(self.params.chain_id, Opening, bytes.fromhex(self.record["opening"]))
        return self.lie(opening=seal(COORDINATORS[0], self.params.chain_id, replace(opening, **changes)).hex())

    def commit(self, key: PrivateKey, **changes: Any) -> str:
        """A commit for the accepted task, with another key or with changes, in hex."""
        statement = bytes.fromhex(self.record["tasks"][ACCEPTED]["commit"])
        _, message = unseal(self.params.chain_id, CommitMessage, statement)
        return seal(key, self.params.chain_id, replace(message, **changes)).hex()

    @property
    def miner(self) -> PrivateKey:
        """The key of the accepted task's miner."""
        return KEYS[MINERS[ACCEPTED]]


@pytest.fixture(scope="module")
def world(
    bitcoin_network_module: NetworkFactory, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lies]:
    with ExitStack() as stack:
        world = Lies(bitcoin_network_module, stack, dataset, tmp_path_factory.mktemp("world"))
        world.append(world.next_record({}))
        world.record = world.next_record(FAULTS, bad=1)
        assert [task["refusal"] for task in world.record["tasks"]] == [*map(str, FAULTS.values()), None, None, None]
        assert world.record["share"] == 0.5
        yield world


@pytest.fixture
def fresh(bitcoin_network: NetworkFactory, dataset: Dataset, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(bitcoin_network, stack, dataset, tmp_path)


def _other_draw(world: Lies) -> Proposal:
    table = contribution_table(world.run.records[-1])
    certificate = world.certificate(world.record)
    assert certificate.draw
    winner, draw = draw_of(table, (certificate.draw.index + 1) % table.count)
    return world.propose(world.record, winner_key=winner, draw=draw)


def _next_beacon(world: Lies) -> Proposal:
    certificate = certificate_of(
        [world.run.records[-1], world.record], world.slot, 0, world.beacon.reveal(world.slot.height)
    )
    return Proposal(certificate.serialize(), [])


def _round(world: Lies, change: Callable[[Certificate], Certificate]) -> Proposal:
    """Round 1 after a round 0 that is not as it must be."""
    first = change(world.sign(world.certificate(world.record)))
    return Proposal(world.certificate(world.record, 1).serialize(), [first.serialize()])


def _forged_signature(certificate: Certificate) -> Certificate:
    first, second = certificate.coordinator_signatures
    return replace(certificate, coordinator_signatures=(first, replace(second, signature=first.signature)))


def _not_aggregated(world: Lies) -> Proposal:
    """A model that an accepted update is not in. All else in the record is as if it were."""
    faults = {**FAULTS, MINERS[ACCEPTED]: Reason.WITHHELD}
    return world.lie(model_after=world.next_record(faults, bad=1)["model_after"])


def _without(world: Lies, number: int) -> Proposal:
    return world.lie(tasks=[task for i, task in enumerate(world.record["tasks"]) if i != number])


def _other_states(world: Lies) -> Proposal:
    """Another file as the velocity, which is one of the model's."""
    return world.lie(velocity=world.run.records[0]["velocity"])


def _without_last_byte(proposal: Proposal) -> Proposal:
    return replace(proposal, certificate=proposal.certificate[:-1])


LIES: dict[str, dict[str, Callable[[Lies], Proposal]]] = {
    "wrong-table": {
        "another root": lambda world: world.propose(world.record, contributions_root=digest("root")),
        "another weight": lambda world: world.propose(world.record, contributions_weight=1),
        "another number of leaves": lambda world: world.propose(world.record, contributions_count=2),
        "a root alone": lambda world: world.propose(world.record, contributions_weight=0, contributions_count=0),
        "more parameters trained": lambda world: world.propose(world.record, params_trained=10**6),
    },
    "wrong-weight": {
        "one more": lambda world: world.lie_of_task(ACCEPTED, weight=world.record["tasks"][ACCEPTED]["weight"] + 1),
        "none": lambda world: world.lie_of_task(ACCEPTED, weight=0, loss_reduction=0),
        "one of a refused update": lambda world: world.lie_of_task(0, weight=1),
        "a loss reduction of a refused update": lambda world: world.lie_of_task(0, loss_reduction=1),
    },
    "wrong-score": {
        "more than all of the loss": lambda world: world.lie_of_task(
            ACCEPTED,
            loss_reduction=(most := 2**40),
            weight=isqrt(world.record["tasks"][ACCEPTED]["params"] * most),
        ),
    },
    "wrong-params": {
        "more": lambda world: world.lie_of_task(0, params=10**6),
    },
    "forged-commit": {
        "signed by the coordinator": lambda world: world.lie_of_task(ACCEPTED, commit=world.commit(COORDINATORS[0])),
        "signed by another miner": lambda world: world.lie_of_task(ACCEPTED, commit=world.commit(KEYS[MINERS[0]])),
        "a byte changed": lambda world: world.lie_of_task(
            ACCEPTED, commit=world.commit(world.miner).replace("22", "23", 1)
        ),
        "no statement": lambda world: world.lie_of_task(ACCEPTED, commit=""),
        "for another opening": lambda world: world.lie_of_task(
            ACCEPTED, commit=world.commit(world.miner, opening=digest("another"))
        ),
        "to another update": lambda world: world.lie_of_task(
            ACCEPTED, commit=world.commit(world.miner, update_hash=digest("another"))
        ),
        "another update in the record": lambda world: world.lie_of_task(
            ACCEPTED, update_hash=world.record["tasks"][0]["update_hash"]
        ),
        "another size in the record": lambda world: world.lie_of_task(ACCEPTED, update_size=1),
        "another memory before": lambda world: world.lie_of_task(ACCEPTED, memory=digest("memory").hex()),
        "another memory after": lambda world: world.lie_of_task(ACCEPTED, memory_after=digest("memory").hex()),
        "an update of who did not commit": lambda world: world.lie_of_task(3, update_hash=digest("update").hex()),
    },
    "left-out": {
        "a good update is malformed": lambda world: world.lie_of_task(
            ACCEPTED, refusal="malformed", detail="a lie", weight=0, loss_reduction=0
        ),
        "a good update is too large": lambda world: world.lie_of_task(
            ACCEPTED, refusal="norm-too-large", detail="a lie", weight=0, loss_reduction=0
        ),
        "refused for another reason": lambda world: world.lie_of_task(0, refusal="not-finite"),
        "one that came is late": lambda world: world.lie_of_task(
            ACCEPTED, refusal="late", detail="a lie", weight=0, loss_reduction=0
        ),
        "one that came is absent": lambda world: world.lie_of_task(1, refusal="absent"),
        "who did not commit is malformed": lambda world: world.lie_of_task(3, refusal="malformed"),
        "who did not commit is accepted": lambda world: world.lie_of_task(3, refusal=None, detail=None),
        "a task is not there": lambda world: _without(world, ACCEPTED),
        "the task of a refused one is not there": lambda world: _without(world, 0),
        "a task is there twice": lambda world: world.lie(tasks=[*world.record["tasks"], world.record["tasks"][-1]]),
    },
    "wrong-model": {
        "any": lambda world: world.lie(model_after=digest("model").hex()),
        "the one before": lambda world: world.lie(model_after=world.record["model_before"]),
        "an accepted update is not in it": _not_aggregated,
        "the whole step": lambda world: world.lie(share=1.0),
        "another than the record's": lambda world: world.propose(world.record, model_after=digest("model")),
    },
    "wrong-velocity": {"any": lambda world: world.lie(velocity=digest("velocity").hex()), "none": _other_states},
    "wrong-update": {
        "a malformed one is accepted": lambda world: world.lie_of_task(
            0, refusal=None, detail=None, loss_reduction=10**6, weight=isqrt(world.record["tasks"][0]["params"] * 10**6)
        ),
    },
    "wrong-winner": {
        "another leaf": _other_draw,
        "another miner": lambda world: world.propose(world.record, winner_key=digest("a miner")),
        "one appointed": lambda world: world.propose(world.record, draw=None),
        "the next round's": lambda world: world.propose(
            world.record,
            **{
                name: getattr(world.certificate(world.record, _other_round(world)), name)
                for name in ("winner_key", "draw")
            },
        ),
    },
    "skipped-round": {
        "round 1 without round 0": lambda world: replace(world.propose(world.record, 1), earlier=[]),
        "round 2 without round 0": lambda world: replace(
            world.propose(world.record, 2), earlier=world.propose(world.record, 2).earlier[1:]
        ),
        "round 0 with an earlier one": lambda world: replace(
            world.propose(world.record), earlier=world.propose(world.record, 1).earlier
        ),
        "a signature too few": lambda world: _round(world, lambda certificate: world.sign(certificate, [0])),
        "no signature": lambda world: _round(world, lambda certificate: world.sign(certificate, [])),
        "a forged signature": lambda world: _round(world, _forged_signature),
        "of another cycle": lambda world: _round(
            world, lambda certificate: world.sign(replace(certificate, record=digest("another")))
        ),
        "no certificate": lambda world: replace(world.propose(world.record, 1), earlier=[b"nothing"]),
    },
    "too-early": {
        "rounds on end": lambda world: world.propose(world.record, 3),
        "the last round": lambda world: world.propose(world.record, 40),
    },
    "wrong-parent": {
        "no block": lambda world: world.propose(world.record, prev_block=digest("no block")),
        "an older block": lambda world: world.propose(world.record, prev_block=lx(world.node.call("getblockhash", 0))),
    },
    "wrong-height": {
        "the next": lambda world: world.propose(world.record, height=3),
        "the parent's": lambda world: world.propose(world.record, height=1),
    },
    "wrong-beacon": {
        "the value after the next": _next_beacon,
        "the parent's again": lambda world: Proposal(
            certificate_of([world.run.records[-1], world.record], world.slot, 0, world.beacon.reveal(0)).serialize(), []
        ),
    },
    "wrong-lineage": {
        "another model before": lambda world: world.propose(world.record, model_before=digest("model")),
        "another model before in the record": lambda world: world.lie(model_before=digest("model").hex()),
        "the record after another record": lambda world: world.lie(parent=record_hash(world.run.records[0]).hex()),
        "the parent's record again": lambda world: world.lie_of(world.run.records[-1]),
    },
    "wrong-loss": {
        "another before": lambda world: world.lie(loss_before=world.record["loss_before"] + 1),
        "higher than the guard allows": lambda world: world.lie(loss_after=2 * world.record["loss_before"]),
        "another than the record's": lambda world: world.propose(world.record, loss_after=1),
    },
    "wrong-share": {
        "one third": lambda world: world.lie(share=1 / 3),
        "two": lambda world: world.lie(share=2.0),
    },
    "wrong-dataset": {
        "another in the record": lambda world: world.lie(dataset_root=digest("data").hex()),
        "another in the certificate": lambda world: world.propose(world.record, dataset_root=digest("data")),
    },
    "wrong-opening": {
        "none": lambda world: world.lie(opening=""),
        "signed by a miner": lambda world: world.lie(
            opening=seal(
                KEYS[MINERS[0]],
                world.params.chain_id,
                unseal(world.params.chain_id, Opening, bytes.fromhex(world.record["opening"]))[1],
            ).hex()
        ),
        "for another job": lambda world: world.opening(job=digest("job")),
        "for another cycle": lambda world: world.opening(cycle=2),
        "for another height": lambda world: world.opening(height=3),
        "on another block": lambda world: world.opening(prev_block=digest("block")),
        "with another model": lambda world: world.opening(model=digest("model")),
        "with other data": lambda world: world.opening(dataset_root=digest("data")),
        "with a miner twice": lambda world: world.opening(miners=[MINERS[0], *MINERS]),
        "with another memory": lambda world: world.opening(memories=[digest("memory")] * len(MINERS)),
        "with a memory too few": lambda world: world.opening(memories=[]),
        "with less time than the job says": lambda world: world.opening(deadline=int(time.time()) + 1),
    },
    "wrong-assignment": {
        "another segment": lambda world: world.lie_of_task(1, segment=7),
        "another shard": lambda world: world.lie_of_task(1, shard=digest("shard").hex()),
        "another seed": lambda world: world.lie_of_task(1, seed=digest("seed").hex()),
    },
    "wrong-score-seed": {"another": lambda world: world.lie(score_seed=digest("seed").hex())},
    "wrong-memories": {
        "one lost": lambda world: world.lie(memories=dict(list(world.record["memories"].items())[1:])),
        "those before": lambda world: world.lie(memories=world.run.records[-1]["memories"]),
    },
    "wrong-record": {
        "no JSON": lambda world: world.lie_of_bytes(b"nothing"),
        "a field that nobody knows": lambda world: world.lie(bonus=1),
        "a field less": lambda world: world.lie_of({key: world.record[key] for key in world.record if key != "share"}),
        "a task of another form": lambda world: world.lie_of_bytes(encoded({**world.record, "tasks": [1]})),
        "a number with a fraction": lambda world: world.lie_of_bytes(encoded({**world.record, "cycle": 2.0})),
        "spaces": lambda world: world.lie_of_bytes(encoded(world.record) + b" "),
        "a field twice": lambda world: world.lie_of_bytes(encoded(world.record).replace(b"{", b'{\n "cycle": 9,', 1)),
        "capitals": lambda world: world.lie_of_bytes(
            encoded({**world.record, "model_after": world.record["model_after"].upper()})
        ),
        "NaN": lambda world: world.lie_of_bytes(json.dumps({**world.record, "metric": float("nan")}).encode()),
        "of another cycle": lambda world: world.lie(cycle=3),
        "of another loss_offset": lambda world: world.lie(loss_offset=7.0),
        "a reason that nobody knows": lambda world: world.lie_of_task(0, refusal="ugly"),
        "a refusal without a detail": lambda world: world.lie_of_task(0, detail=None),
        "an accepted update with a detail": lambda world: world.lie_of_task(ACCEPTED, detail="well done"),
    },
    "missing-file": {"the record": lambda world: world.propose(world.record, record=digest("record"))},
    "wrong-form": {
        "a byte too few": lambda world: _without_last_byte(world.propose(world.record)),
        "a byte too many": lambda world: Proposal(world.propose(world.record).certificate + b"\0", []),
        "nothing": lambda _: Proposal(b"", []),
        "signatures": lambda world: Proposal(world.sign(world.certificate(world.record)).serialize(), []),
        "another version": lambda world: world.propose(world.record, version=2),
    },
}
"""The name of a refusal → ways to earn it, each a proposal for the second slot."""


def _other_round(world: Lies) -> int:
    """A round that another miner wins."""
    winner = world.certificate(world.record).winner_key
    return next(number for number in range(1, 99) if world.certificate(world.record, number).winner_key != winner)


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, ways in LIES.items() for what in ways])
def test_each_lie_is_refused_by_its_name(world: Lies, tmp_path: Path, name: str, what: str) -> None:
    proposal = LIES[name][what](world)
    answer = cosign(world.checker(), world.signer(tmp_path), proposal)
    assert (answer.refusal, answer.signature) == (name, b"")
    assert answer.certificate == hashlib.sha256(proposal.certificate).digest()
    assert answer.detail
    assert "\n" not in answer.detail


def test_an_honest_proposal_is_signed_also_after_lies(world: Lies, tmp_path: Path) -> None:
    """The signature is the cosigner's, and is valid for the certificate. Refusals, and half of the step, are true."""
    checker, signer = world.checker(), world.signer(tmp_path)
    for ways in LIES.values():
        if ways is not LIES["wrong-parent"]:  # they wait
            assert cosign(checker, signer, next(iter(ways.values()))(world)).refusal
    proposal = world.propose(world.record)
    answer = cosign(checker, signer, proposal)
    assert (answer.refusal, answer.detail) == ("", "")
    sighash = world.certificate(world.record).sighash(world.params.chain_id)
    assert verify_schnorr(OWN.public_key_xonly.format(), sighash, answer.signature)
    again = cosign(checker, signer, proposal)
    assert verify_schnorr(OWN.public_key_xonly.format(), sighash, again.signature)


def test_a_second_body_for_a_slot_is_refused_however_true_it_is(world: Lies, tmp_path: Path) -> None:
    """The cycle was run again with fewer miners. Both results are true, but only one can be signed, in any round."""
    other = world.next_record(FAULTS, MINERS[:-1])
    for first, second in ((world.record, other), (other, world.record)):
        path = tmp_path / record_hash(first).hex()[:8]
        path.mkdir()
        signer = world.signer(path)
        assert not cosign(world.checker(), signer, world.propose(first)).refusal
        answer = cosign(world.checker(), signer, world.propose(second))
        assert answer.refusal == "second-body"
        assert record_hash(second).hex() in answer.detail
        assert not cosign(world.checker(), signer, world.propose(first)).refusal
    assert cosign(world.checker(patience=5.0), signer, world.propose(second, 1)).refusal == "second-body"


def test_a_journal_that_cannot_be_used_signs_nothing(world: Lies, tmp_path: Path) -> None:
    signer = world.signer(tmp_path)
    (tmp_path / "journal.sqlite").write_bytes(b"no journal")
    answer = cosign(world.checker(), signer, world.propose(world.record))
    assert (answer.refusal, answer.signature) == ("no-journal", b"")


def test_a_file_that_does_not_come_or_is_another_is_named(world: Lies) -> None:
    for name in ("model_before", "dataset_root"):
        wanted = bytes.fromhex(world.record[name])

        def refused(asked: bytes, wanted: bytes = wanted) -> bytes:
            if asked == wanted:
                raise EngineError("not for you")
            return world.fetch(asked)

        with pytest.raises(CosignError, match=f"missing-file: .*{wanted.hex()} does not come: not for you"):
            Checker(world.job, world.params, world.node, refused).check(world.propose(world.record))

    with pytest.raises(CosignError, match=r"missing-file: the record .* it has another SHA-256"):
        Checker(world.job, world.params, world.node, lambda _: b"other").check(world.propose(world.record))


def test_an_end_of_the_connection_is_no_refusal(world: Lies, tmp_path: Path) -> None:
    def stopped(_: bytes) -> bytes:
        raise StoppedError("closed")

    checker = Checker(world.job, world.params, world.node, stopped)
    with pytest.raises(StoppedError):
        cosign(checker, world.signer(tmp_path), world.propose(world.record))


def test_a_job_of_another_digest_is_refused(world: Lies, tmp_path: Path) -> None:
    checker = Checker(replace(world.job, local_steps=10), world.params, world.node, world.fetch)
    assert cosign(checker, world.signer(tmp_path), world.propose(world.record)).refusal == "wrong-opening"


def test_the_second_round_needs_no_file_again(world: Lies) -> None:
    """The cycle was found true; only the winner is another one. The winner of round 0 has its time."""
    checker = world.checker(patience=5.0)
    checker.check(world.propose(world.record))
    seen = time.monotonic()
    asked = []

    def fetch(digest: bytes) -> bytes:
        asked.append(digest)
        return world.fetch(digest)

    checker._fetch_file = fetch
    assert checker.check(world.propose(world.record, 1)).round == 1
    assert time.monotonic() - seen > 0.9
    assert set(asked) == {record_hash(world.record), record_hash(world.run.records[-1])}


def test_a_node_that_does_not_answer_is_named(world: Lies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "RETRY_TIME", 0.1)
    with NodeClient("http://127.0.0.1:1", tmp_path / "cookie", name="away") as node:
        checker = Checker(world.job, world.params, node, world.fetch)
        assert cosign(checker, world.signer(tmp_path), world.propose(world.record)).refusal == "no-node"


def test_a_model_that_is_cut_by_operations_needs_a_shard(dataset: Dataset) -> None:
    job = replace(dataset.job, balance="flops")
    validation = read_examples(job, dataset.held_out_folder, dataset.validation)
    model = _Model(job, read_blob(dataset.shard_folder, dataset.shards[0]))
    assert model.segments == cut_segments(build_model(job), job, validation)
    assert model.segments != _Model(dataset.job, b"").segments


def test_the_module_imports_no_torch() -> None:
    code = "import sys, traincert.bridge.cosigner; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


ALL_WITHHELD = dict.fromkeys(MINERS, Reason.WITHHELD)
ALL_WORSE = dict.fromkeys(MINERS, Reason.NO_IMPROVEMENT)
CYCLES: list[tuple[Mapping[bytes, str], int, float]] = [
    ({}, 0, 1.0),
    (ALL_WITHHELD, 0, 0.0),  # nothing came
    ({}, 2, 0.25),  # miners are appointed
    ({}, 5, 0.0),  # the guard allows no step: the momentum ends
    (ALL_WORSE, 0, 0.0),
    (FAULTS, 0, 1.0),
]


def test_a_chain_of_honest_cycles_is_signed_by_who_follows_it_and_by_who_comes_new(
    fresh: World, tmp_path: Path
) -> None:
    """Two have a redraw: a winner drawn, and one appointed. Who follows needs no velocity: it has kept what it made."""
    signer = fresh.signer(tmp_path)
    velocities: set[bytes] = set()
    made: dict[bytes, bytes] = {}

    def fetch(digest: bytes) -> bytes:
        assert digest not in velocities
        return fresh.fetch(digest)

    follower = Checker(
        fresh.job,
        fresh.params,
        fresh.node,
        lambda digest: made.get(digest) or fetch(digest),
        keep=lambda data: made.__setitem__(hashlib.sha256(data).digest(), data),
        patience=5.0,
    )
    for number, (faults, bad, share) in enumerate(CYCLES):
        record = fresh.next_record(faults, bad=bad)
        assert record["share"] == share
        velocities.add(bytes.fromhex(record["velocity"]))
        rounds = range(2 if number in (1, 2) else 1)
        for round_ in rounds:
            assert cosign(follower, signer, fresh.propose(record, round_)).refusal == ""
        for old in set(made) - follower.needed:
            del made[old]
        assert bytes.fromhex(record["velocity"]) in follower.needed
        assert fresh.checker().check(fresh.propose(record)).record == record_hash(record)
        fresh.append(record, rounds[-1])


@pytest.mark.parametrize(
    "changes",
    [
        {"memories": {MINERS[0].hex(): digest("memory").hex()}},
        {"velocity": digest("velocity").hex()},
        {"model_after": digest("model").hex()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_first_record_is_the_start_of_the_network(world: Lies, changes: Mapping[str, Any]) -> None:
    """The lie is in record 0, which no certificate names."""
    checker = world.checker()
    certificate = world.certificate(world.record)
    zero = {**world.run.records[0], **changes}
    first = {**world.run.records[1], "parent": record_hash(zero).hex()}
    for record in (zero, first):
        world.lies[record_hash(record)] = encoded(record)
    records = checker._read_records(replace(certificate, record=record_hash(first)), None)
    slot = Slot(1, lx(world.node.call("getblockhash", 0)), 0)
    with pytest.raises(CosignError, match="wrong-lineage"):
        checker._check_lineage(records, slot, None)


# The program.


class Events:
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def say(self, event: str, text: str, **facts: Any) -> None:
        assert facts
        self.said.append((event, text))


class Wire:
    """A connection to a coordinator: it answers what is asked, and ends when it has no more notices."""

    def __init__(self, world: Lies) -> None:
        self.world = world
        self.notices: list[bytes] = []
        self.answers: list[tuple[bytes, Cosignature]] = []

    def ask(self, kind: str, data: bytes = b"", *, seconds: float = 0) -> bytes:  # noqa: ARG002
        chain_id = self.world.params.chain_id
        match kind:
            case "join":
                return COORDINATORS[0].public_key_xonly.format()
            case "job":
                return json.dumps(self.world.job.shared_identity()).encode()
            case "poll":
                if not self.notices:
                    raise StoppedError("the end")
                notices = {"proposal": self.notices.pop(0).hex(), "receipt": ""}
                return json.dumps(
                    {"boot": "", "version": 1, "time": time.time(), "hold": 1.0, "notices": notices}
                ).encode()
            case "cosign":
                self.answers.append(unseal(chain_id, Cosignature, data))
                return b""
        raise AssertionError(kind)

    def fetch(self, digest: bytes, folder: Path) -> None:
        path = folder / digest.hex()
        if not path.exists():
            path.write_bytes(self.world.fetch(digest))


@pytest.fixture
def folder(world: Lies, tmp_path: Path) -> MemberFolder:
    (tmp_path / "cosigner").mkdir()
    (tmp_path / "cosigner" / "cosigner.key").write_text(OWN.secret.hex())
    (tmp_path / "cosigner" / "cosigner.key").chmod(0o600)
    return MemberFolder.create(tmp_path / "cosigner", invitation(world), "digits")


CREDENTIAL = Credential("tls://localhost:4222", "a certificate", "a seed")


def invitation(world: Lies) -> Invitation:
    return Invitation("carol", COSIGNER, *CREDENTIAL, options=world.params.node_options(), job="")


def program(world: Lies, folder: MemberFolder, wire: Wire, events: Events) -> Cosigner:
    return Cosigner(folder, world.job, Member(folder, world.job, cast(Connection, wire)), world.node, events)


def test_the_program_answers_each_proposal_and_keeps_its_store_small(world: Lies, folder: MemberFolder) -> None:
    wire, events = Wire(world), Events()
    cosigner = program(world, folder, wire, events)
    for proposal in (LIES["wrong-model"]["the whole step"](world), world.propose(world.record)):
        wire.notices.append(seal(COORDINATORS[0], world.params.chain_id, proposal))
    with pytest.raises(StoppedError):
        cosigner.run()
    assert [event for event, _ in events.said] == ["joined", "not-cosigned", "cosigned"]
    assert events.said[1][1].startswith("block 2, round 0: not signed: wrong-model: model_after: expected ")
    (key, refusal), (_, signature) = wire.answers
    assert key == OWN.public_key_xonly.format()
    assert (refusal.refusal, signature.refusal) == ("wrong-model", "")
    assert verify_schnorr(key, world.certificate(world.record).sighash(world.params.chain_id), signature.signature)
    before, record = world.run.records[-1], world.record
    states = {each[name] for each in (before, record) for name in ("model_after", "velocity")}
    kept = {*states, record["dataset_root"], record_hash(before).hex(), record_hash(record).hex()}
    assert {path.name for path in folder.store.iterdir()} == kept


def test_what_only_a_refused_proposal_needed_is_removed(world: Lies, folder: MemberFolder) -> None:
    cosigner = program(world, folder, Wire(world), Events())
    write_blob(folder.store, b"from before")
    proposal = LIES["wrong-model"]["the whole step"](world)
    cosigner.answer(seal(COORDINATORS[0], world.params.chain_id, proposal))
    assert [path.read_bytes() for path in folder.store.iterdir()] == [b"from before"]


def test_another_ones_proposal_is_not_answered(world: Lies, folder: MemberFolder) -> None:
    wire = Wire(world)
    cosigner = program(world, folder, wire, Events())
    with pytest.raises(MessageError, match="which is not the coordinator's key"):
        cosigner.answer(seal(COORDINATORS[2], world.params.chain_id, world.propose(world.record)))
    assert not wire.answers


def test_a_folder_is_opened_again(world: Lies, folder: MemberFolder) -> None:
    again = MemberFolder(folder.folder, COSIGNER)
    assert (again.name, again.job, again.params, again.secret) == ("carol", "digits", world.params, OWN.secret)
    assert again.credential == CREDENTIAL
    assert make_cosigner_key(folder.folder) == OWN.public_key_xonly.format()
    with again.lock(), pytest.raises(BridgeError, match="in use by another process"):
        again.lock()


def test_a_key_that_is_no_cosigners_is_refused(world: Lies, tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="is the coordinator's own"):
        check_key(COORDINATORS[0].public_key_xonly.format(), world.params)
    key = make_cosigner_key(tmp_path)
    with pytest.raises(BridgeError, match=f"the key {key.hex()} is none of the network's"):
        check_key(key, world.params)
    with pytest.raises(BridgeError, match="is no cosigner's folder"):
        MemberFolder(tmp_path, COSIGNER)
