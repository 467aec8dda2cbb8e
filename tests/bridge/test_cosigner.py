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
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
from bitcoin.core import lx
from coincurve import PrivateKey

from traincert.bridge import rpc
from traincert.bridge.audit import PastChecker
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
from traincert.bridge.recorded import CycleRecord, read_record
from traincert.bridge.rpc import NodeClient
from traincert.bridge.testing.invalid import digest
from traincert.regtest.plugin import NetworkFactory
from traincert.trainer.accounting import Spent
from traincert.trainer.cycle import CycleResult, Trainer
from traincert.trainer.engines.broker import Connection, StoppedError, poll_answer
from traincert.trainer.engines.executor import Executor
from traincert.trainer.engines.orders import Answer, Commit, OnCommit, Order
from traincert.trainer.errors import EngineError, Reason
from traincert.trainer.examples import Dataset, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.records import Record, RunFolder, record_hash, standings
from traincert.trainer.resources import Resources, impossible
from traincert.trainer.scoring import Evaluation
from traincert.trainer.segments import cut_segments
from traincert.trainer.spot_checks import Drawn, SpotCheck, SpotChecker
from traincert.trainer.standings import Standing, choose, draw_checks, next_standings
from traincert.trainer.state import State, load_state, state_hash
from traincert.trainer.store import read_blob, write_blob
from traincert.trainer.updates import encode_update, read_update
from traincert.trainer.weights import limit_norms, paid
from training_chain import COORDINATORS, PAYOUT_SCRIPT

SECRETS = [digest(f"miner {number}") for number in range(10)]
KEYS = {PrivateKey(secret).public_key_xonly.format(): PrivateKey(secret) for secret in SECRETS}
MINERS = sorted(KEYS)
OWN = COORDINATORS[1]
NOT_JUDGED = 60 * 60 * 24
USED = Resources(1.0, 0.0, 1, 1, 10**8, 0, 0, None, peak_flops=1e11)
"""What all tasks say that they used."""
CHEATED = "cheated"
"""A fault: the update helps, but is not what the task gives. It is found in the next cycle."""


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
        self._first: dict[int, bytes] = {}  # the first update of each segment

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
            commit = Commit.to(answer, hashlib.sha256(answer.update).digest())._replace(place=len(commits))
            message = CommitMessage(
                hashlib.sha256(self.opening).digest(),
                commit.update_hash,
                commit.update_size,
                commit.memory_before,
                commit.memory_after,
                commit.seconds,
                commit.numeric_class,
                replace(USED, user_seconds=0.0) if fault == Reason.IMPOSSIBLE_RESOURCES else USED,
                commit.noise_hash,
            )
            commit = commit._replace(resources=message.resources)
            commits.append(commit._replace(statement=seal(KEYS[order.task.miner], self.chain_id, message)))
            self._updates.append(Reason.WITHHELD if fault == Reason.WITHHELD else answer.update)
        return commits

    def reveal(self, orders: Sequence[Order], commits: Sequence[Commit | Reason]) -> list[bytes | Reason]:
        del orders, commits
        return self._updates

    def bring(self, wanted: Mapping[bytes, Sequence[bytes]]) -> None:
        """Do nothing: all memories are in the store."""

    def _spoiled(self, order: Order, answer: Answer, fault: str) -> Answer:
        first = self._first.setdefault(order.task.segment, answer.update)
        if fault == Reason.MALFORMED:
            return answer._replace(update=b"no safetensors")
        if fault == Reason.WRONG_MEMORY:
            return answer._replace(memory_before=digest("a memory"))
        if fault == Reason.COPY:
            return answer._replace(update=first)
        if scale := {Reason.NO_IMPROVEMENT: -1.0, CHEATED: 0.9}.get(fault):
            state = load_state(self.store, order.model_hash)
            update = read_update(answer.update, self.job, self._segments[order.task.segment], state)
            return answer._replace(update=encode_update(update.scaled(scale), self.job.density)[0])
        return answer


class Waiting(SpotChecker):
    """Does tasks again before the next ones begin: both are done in this process."""

    def begin(self, drawn: Sequence[Drawn]) -> Future[list[SpotCheck]]:
        future = super().begin(drawn)
        wait([future])
        return future


class Judge(Trainer):
    """A trainer that can find the next models bad, so many times, that the guard halves the step."""

    bad = 0

    def __init__(self, dataset: Dataset, engine: Engine) -> None:
        super().__init__(dataset, engine)
        self._checker = Waiting(dataset, engine.store, self.segments)

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
        spot_checks=1.0,
        copy_cosine=0.9999,  # who is accepted must not depend on the block's hash
        shard_margin=100.0,
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
        write_blob(self.files, read_blob(dataset.shard_folder, dataset.shards[0]))
        self.lies: dict[bytes, bytes] = {}
        self._save(self.run.records[0])

    @property
    def slot(self) -> Slot:
        tip = self.node.call("getbestblockhash")
        header = self.node.call("getblockheader", tip)
        return Slot(header["height"] + 1, lx(tip), header["time"])

    def result(self, faults: Mapping[bytes, str], miners: Sequence[bytes] = (), bad: int = 0) -> CycleResult:
        """Run the slot's cycle, with all miners that may have a task, or with these. It is not saved."""
        slot, before = self.slot, self.run.load()
        miners = miners or choose(b"", before.cycle, MINERS, before.standings, self.job.most_tasks)
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

    def next_record(self, faults: Mapping[bytes, str], miners: Sequence[bytes] = (), bad: int = 0) -> Record:
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
    MINERS[7]: Reason.IMPOSSIBLE_RESOURCES,
    MINERS[8]: Reason.WRONG_MEMORY,
    MINERS[9]: Reason.COPY,
}
CHEAT = 4
"""The number of a task whose miner cheated in the cycle before."""
ACCEPTED = 5
"""The number of a task that is accepted."""


class Lies(World):
    """A world at height 1: the record of its second cycle has accepted updates and refused ones of each kind."""

    record: Record

    def lie(self, **changes: Any) -> Proposal:
        """Propose the record with some of its fields changed."""
        return self.lie_of({**self.record, **changes})

    def altered(self, number: int, **changes: Any) -> Proposal:
        """Propose the record with some fields of a task changed, and nothing else."""
        tasks = [{**task, **changes} if i == number else task for i, task in enumerate(self.record["tasks"])]
        return self.lie(tasks=tasks)

    def rescored(self, number: int = 5, **changes: Any) -> Proposal:
        """Propose the record with some fields of a task's score changed, and nothing else."""
        return self.altered(number, score={**self.record["tasks"][number]["score"], **changes})

    def with_standing(self, number: int, **changes: Any) -> Proposal:
        """Propose the record with a standing after it changed."""
        miner = MINERS[number].hex()
        changed = Standing(*self.record["standings"][miner])._replace(**changes)
        return self.lie(standings={**self.record["standings"], miner: list(changed)})

    def checked(self, miner: bytes, **changes: Any) -> Proposal:
        """Propose the record with a spot check changed."""
        checks = [
            {**check, **changes} if check["miner"] == miner.hex() else check for check in self.record["spot_checks"]
        ]
        return self.lie(spot_checks=checks)

    def lie_of_task(self, number: int, **changes: Any) -> Proposal:
        """Propose the record with some fields of a task changed, and with all that follows from that."""
        tasks = [{**task, **changes} if i == number else task for i, task in enumerate(self.record["tasks"])]
        return self.lie(**self.following(tasks))

    def following(self, tasks: Sequence[Record]) -> Record:
        """These tasks, and what follows from them: scales, norms, standings, drawn tasks and memories."""
        before = self.run.records[-1]
        valid = [task for task in tasks if task["norm"] is not None]
        scales, norms = limit_norms(
            [task["segment"] for task in valid],
            [task["norm"] for task in valid],
            {int(segment): norm for segment, norm in before["norms"].items()},
        )
        scale = {task["miner"]: each for task, each in zip(valid, scales, strict=True)}
        measured = standings(before)
        for task in tasks:
            if task["own_shard"] is not None:
                miner = bytes.fromhex(task["miner"])
                measured[miner] = measured.get(miner, Standing()).measured(task["own_shard"])
        accepted = [bytes.fromhex(task["miner"]) for task in tasks if not task["refusal"]]
        passed = {bytes.fromhex(check["miner"]): not check["failure"] for check in self.record["spot_checks"]}
        proven = [miner for miner, has_passed in passed.items() if has_passed]
        seed = bytes.fromhex(self.record["score_seed"])
        drawn = draw_checks(seed, accepted, measured, self.job.spot_checks, proven)
        steady = {
            bytes.fromhex(task["miner"]): bool(task["commit"])
            and task["refusal"] not in (Reason.WITHHELD, Reason.MEMORY_WITHHELD)
            for task in tasks
        }
        unproven = [bytes.fromhex(task["miner"]) for task in tasks if task["refusal"] == Reason.MEMORY_WITHHELD]
        until = self.record["cycle"] + self.job.penalty_cycles
        moved = {task["miner"]: task["memory_after"] for task in tasks if not task["refusal"] and task["memory_after"]}
        memories = {**before["memories"], **moved}
        return {
            "tasks": [
                {**task, "scale": scale.get(task["miner"], 1.0), "drawn": bytes.fromhex(task["miner"]) in drawn}
                for task in tasks
            ],
            "norms": {str(segment): norm for segment, norm in norms.items()},
            "standings": {
                miner.hex(): list(each)
                for miner, each in next_standings(
                    measured, steady=steady, passed=passed, unproven=unproven, barred_until=until
                ).items()
            },
            "memories": {miner: each for miner, each in memories.items() if passed.get(bytes.fromhex(miner), True)},
        }

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
        world.append(world.next_record({MINERS[CHEAT]: CHEATED}))
        world.record = world.next_record(FAULTS, bad=1)
        expected = {**FAULTS, MINERS[CHEAT]: Reason.SPOT_CHECK_FAILED}
        assert [task["refusal"] for task in world.record["tasks"]] == [expected.get(miner) for miner in MINERS]
        assert world.record["share"] == 0.5
        assert len(world.record["spot_checks"]) == len(MINERS)
        yield world


@pytest.fixture(scope="module")
def later(
    bitcoin_network_module: NetworkFactory, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lies]:
    """A world at height 2: who cheated is barred. The record of the third cycle is the one of this miner alone."""
    with ExitStack() as stack:
        world = Lies(bitcoin_network_module, stack, dataset, tmp_path_factory.mktemp("later"))
        world.append(world.next_record({MINERS[CHEAT]: CHEATED}))
        world.append(world.next_record({}))
        world.record = world.next_record({}, [MINERS[CHEAT]])
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


def _scored(world: Lies, number: int, reduction: int) -> dict[str, Any]:
    """What a task has that was measured with this reduction, without an error."""
    score = paid(world.record["tasks"][number]["params"], reduction, 0, noise_margin=0.5, late_share=0.5, late=False)
    return {"score": asdict(score), "loss_reduction": score.loss_reduction, "weight": score.weight}


def _other_norms(world: Lies) -> Proposal:
    """Norms that are not those of the files; all that follows from them does."""
    tasks = [{**task, "norm": task["norm"] and task["norm"] * 1.5} for task in world.record["tasks"]]
    return world.lie(**world.following(tasks))


def _without_check(world: Lies, number: int) -> Proposal:
    return world.lie(spot_checks=[each for i, each in enumerate(world.record["spot_checks"]) if i != number])


def _many_miners(world: Lies) -> Proposal:
    many = sorted(digest(f"stranger {number}") for number in range(world.job.most_tasks + 1))
    return world.opening(miners=many, memories=[None] * len(many))


NOT_SCORED: dict[str, Any] = {"detail": "a lie", "score": None, "loss_reduction": 0, "weight": 0}
NOT_READ: dict[str, Any] = {**NOT_SCORED, "norm": None, "own_shard": None}

LIES: dict[str, dict[str, Callable[[Lies], Proposal]]] = {
    "wrong-table": {
        "another root": lambda world: world.propose(world.record, contributions_root=digest("root")),
        "another weight": lambda world: world.propose(world.record, contributions_weight=1),
        "another number of leaves": lambda world: world.propose(world.record, contributions_count=3),
        "a root alone": lambda world: world.propose(world.record, contributions_weight=0, contributions_count=0),
        "more parameters trained": lambda world: world.propose(world.record, params_trained=10**6),
    },
    "wrong-weight": {
        "one more": lambda world: world.lie_of_task(ACCEPTED, weight=world.record["tasks"][ACCEPTED]["weight"] + 1),
        "none": lambda world: world.lie_of_task(ACCEPTED, weight=0, loss_reduction=0),
        "one of a refused update": lambda world: world.lie_of_task(0, weight=1),
        "a loss reduction of a refused update": lambda world: world.lie_of_task(0, loss_reduction=1),
        "one without an improvement": lambda world: world.lie_of_task(1, weight=1),
        "another reduction": lambda world: world.rescored(reduction=1),
        "a smaller error": lambda world: world.rescored(
            error=world.record["tasks"][ACCEPTED]["score"]["error"] // 2 - 1
        ),
        "another margin": lambda world: world.rescored(margin=0),
        "another loss reduction": lambda world: world.rescored(loss_reduction=1),
        "another weight of the score": lambda world: world.rescored(weight=1),
        "all of a late one's": lambda world: world.altered(ACCEPTED, late=True),
    },
    "wrong-score": {
        "more than all of the loss": lambda world: world.lie_of_task(ACCEPTED, **_scored(world, ACCEPTED, 2**40)),
        "none of an accepted update": lambda world: world.altered(ACCEPTED, score=None),
        "none where it was too low": lambda world: world.altered(1, score=None),
        "one of an update that was not read": lambda world: world.lie_of_task(0, score=_scored(world, 0, 1)["score"]),
        "a huge reduction": lambda world: world.rescored(reduction=10**400),
        "a huge rise": lambda world: world.rescored(reduction=-(10**400)),
        "a huge error": lambda world: world.rescored(error=10**400),
        "an error below 0": lambda world: world.rescored(error=-1),
    },
    "wrong-norm": {
        "another scale": lambda world: world.altered(ACCEPTED, scale=0.123),
        "a scale of what was not read": lambda world: world.altered(0, scale=0.5),
        "another norm": lambda world: world.altered(ACCEPTED, norm=1e-9),
        "norms that are not the files'": _other_norms,
        "no norm": lambda world: world.altered(ACCEPTED, norm=None),
        "no norm of a copy": lambda world: world.altered(9, norm=None),
        "a norm of what cannot be read": lambda world: world.lie_of_task(0, norm=1.0),
        "others for the next cycle": lambda world: world.lie(
            norms={segment: 2 * norm for segment, norm in world.record["norms"].items()}
        ),
        "none for the next cycle": lambda world: world.lie(norms={}),
    },
    "wrong-standing": {
        "another measurement": lambda world: world.altered(
            ACCEPTED, own_shard=world.record["tasks"][ACCEPTED]["own_shard"] + 1
        ),
        "no measurement": lambda world: world.altered(ACCEPTED, own_shard=None),
        "a measurement of a copy": lambda world: world.lie_of_task(9, own_shard=1.0),
        "a measurement of what was not read": lambda world: world.lie_of_task(0, own_shard=1.0),
        "more evidence": lambda world: world.with_standing(ACCEPTED, evidence=9.0),
        "another spread": lambda world: world.with_standing(ACCEPTED, spread=9.0),
        "proven without a check": lambda world: world.with_standing(CHEAT, proven=True),
        "not proven": lambda world: world.with_standing(ACCEPTED, proven=False),
        "barred without a reason": lambda world: world.with_standing(ACCEPTED, barred_until=9),
        "not barred": lambda world: world.with_standing(CHEAT, barred_until=0),
        "barred for less": lambda world: world.with_standing(CHEAT, barred_until=3),
        "steady, but absent": lambda world: world.with_standing(3, steady=True),
        "steady, but withheld": lambda world: world.with_standing(2, steady=True),
        "not steady": lambda world: world.with_standing(ACCEPTED, steady=False),
        "one forgotten": lambda world: world.lie(standings=dict(list(world.record["standings"].items())[1:])),
        "one of a stranger": lambda world: world.lie(
            standings={**world.record["standings"], digest("stranger").hex(): list(Standing())}
        ),
    },
    "wrong-draw": {
        "one left out": lambda world: world.altered(ACCEPTED, drawn=False),
        "one added": lambda world: world.altered(0, drawn=True),
        "a check left out": lambda world: _without_check(world, CHEAT),
        "no checks": lambda world: world.lie(spot_checks=[]),
        "a check made up": lambda world: world.lie(
            spot_checks=[
                *world.record["spot_checks"],
                {**world.record["spot_checks"][0], "miner": digest("stranger").hex(), "failure": "a lie"},
            ]
        ),
        "a check of another update": lambda world: world.checked(MINERS[CHEAT], committed=digest("update").hex()),
        "passed although it differs": lambda world: world.checked(MINERS[CHEAT], failure=""),
        "passed although it is too far": lambda world: world.checked(MINERS[CHEAT], failure="", distance=0.06),
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
        "another numeric class": lambda world: world.altered(ACCEPTED, numeric_class="a machine"),
        "a numeric class of who did not commit": lambda world: world.altered(3, numeric_class="a machine"),
        "a place of who did not commit": lambda world: world.altered(3, place=0),
        "who did not commit is slow": lambda world: world.altered(3, late=True),
        "an update of who did not commit": lambda world: world.lie_of_task(3, update_hash=digest("update").hex()),
    },
    "left-out": {
        "a good update is malformed": lambda world: world.lie_of_task(ACCEPTED, refusal="malformed", **NOT_READ),
        "a good update is too large": lambda world: world.lie_of_task(ACCEPTED, refusal="norm-too-large", **NOT_READ),
        "one that is possible is impossible": lambda world: world.lie_of_task(
            ACCEPTED, refusal="impossible-resources", **NOT_READ
        ),
        "refused for another reason": lambda world: world.lie_of_task(0, refusal="not-finite"),
        "one that came is late": lambda world: world.lie_of_task(ACCEPTED, refusal="late", **NOT_READ),
        "one that came is absent": lambda world: world.lie_of_task(1, refusal="absent"),
        "who did not commit is malformed": lambda world: world.lie_of_task(3, refusal="malformed"),
        "who did not commit is accepted": lambda world: world.lie_of_task(3, refusal=None, detail=None),
        "one that is not foreign is not on its shard": lambda world: world.lie_of_task(
            ACCEPTED, refusal="not-its-shard", **NOT_SCORED
        ),
        "a foreign one is accepted": lambda world: world.lie_of_task(ACCEPTED, own_shard=-1e4),
        "one that did not cheat has failed": lambda world: world.lie_of_task(
            ACCEPTED, refusal="spot-check-failed", **NOT_READ
        ),
        "one that is not barred is barred": lambda world: world.lie_of_task(ACCEPTED, refusal="barred", **NOT_READ),
        "one that cheated is accepted": lambda world: world.lie_of_task(CHEAT, refusal=None, detail=None),
        "one that cheated is barred already": lambda world: world.lie_of_task(CHEAT, refusal="barred"),
        "one that cheated has only withheld": lambda world: world.lie_of_task(CHEAT, refusal="withheld"),
        "the right memory is wrong": lambda world: world.lie_of_task(ACCEPTED, refusal="wrong-memory", **NOT_READ),
        "a memory that was made up is accepted": lambda world: world.lie_of_task(8, refusal=None, detail=None),
        "a memory that was made up does not help": lambda world: world.lie_of_task(8, refusal="no-improvement"),
        "an improvement is none": lambda world: world.altered(
            ACCEPTED, refusal="no-improvement", detail="a lie", loss_reduction=0, weight=0
        ),
        "none is an improvement": lambda world: world.altered(1, refusal=None, detail=None),
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
            0, refusal=None, detail=None, norm=1.0, **_scored(world, 0, 10**6)
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
        "with more miners than the job takes": _many_miners,
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
        "the one of who cheated": lambda world: world.lie(
            memories={**world.record["memories"], MINERS[CHEAT].hex(): world.record["tasks"][CHEAT]["memory"]}
        ),
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
        "a scale above 1": lambda world: world.altered(ACCEPTED, scale=1.5),
        "a norm below 0": lambda world: world.altered(ACCEPTED, norm=-1.0),
        "a field of a score more": lambda world: world.rescored(bonus=1),
        "a standing with a field more": lambda world: world.lie(
            standings={**world.record["standings"], MINERS[0].hex(): [*Standing(), 1]}
        ),
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


LATER: dict[str, dict[str, Callable[[Lies], Proposal]]] = {
    "wrong-opening": {
        "who is barred is there beside others": lambda world: world.lie_of(world.next_record({}, MINERS)),
    },
    "left-out": {
        "who is barred is accepted": lambda world: world.lie_of_task(0, refusal=None, detail=None),
        "who is barred has not improved": lambda world: world.lie_of_task(0, refusal="no-improvement"),
        "who is barred has failed again": lambda world: world.lie_of_task(0, refusal="spot-check-failed"),
    },
    "wrong-standing": {
        "who is barred is so no longer": lambda world: world.with_standing(CHEAT, barred_until=3),
    },
}
"""The same in the third slot, for a record of who is barred alone."""


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, ways in LATER.items() for what in ways])
def test_each_lie_about_who_is_barred_is_refused_by_its_name(later: Lies, tmp_path: Path, name: str, what: str) -> None:
    answer = cosign(later.checker(), later.signer(tmp_path), LATER[name][what](later))
    assert (answer.refusal, answer.signature) == (name, b"")


def test_who_is_barred_has_a_task_only_if_nobody_else_is_there(later: Lies, tmp_path: Path) -> None:
    """Both records are true. Nobody is accepted in the one of who is barred alone, so the chain goes on."""
    assert later.record["tasks"][0]["refusal"] == Reason.BARRED
    assert not cosign(later.checker(), later.signer(tmp_path), later.propose(later.record)).refusal
    others = later.next_record({})
    assert [task["miner"] for task in others["tasks"]] == [key.hex() for key in MINERS if key != MINERS[CHEAT]]
    (tmp_path / "other").mkdir()
    assert not cosign(later.checker(), later.signer(tmp_path / "other"), later.propose(others)).refusal


@pytest.fixture(scope="module")
def private(
    bitcoin_network_module: NetworkFactory, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lies]:
    """A world at height 1 whose job has privacy. The fourth miner is absent in its second cycle."""
    job = replace(dataset.job, privacy="dp-sgd", noise_multiplier=1.0, max_grad_norm=1.0, shard_examples=0)
    with ExitStack() as stack:
        world = Lies(bitcoin_network_module, stack, replace(dataset, job=job), tmp_path_factory.mktemp("private"))
        world.append(world.next_record({}))
        world.record = world.next_record({MINERS[3]: Reason.ABSENT})
        yield world


def _spent(world: Lies, change: Callable[[int, float], list[Any]]) -> Proposal:
    """Propose the record with a change to what the first shard's examples have spent."""
    spent = dict(world.record["spent"])
    shard = min(spent)
    return world.lie(spent={**spent, shard: change(*spent[shard])})


PRIVATE: dict[str, dict[str, Callable[[Lies], Proposal]]] = {
    "wrong-epsilon": {
        "less for a task": lambda world: world.altered(0, epsilon=world.record["tasks"][0]["epsilon"] * 0.99),
        "none for a task": lambda world: world.altered(0, epsilon=None),
        "some for who is absent": lambda world: world.altered(3, epsilon=world.record["tasks"][0]["epsilon"]),
        "less for a shard": lambda world: _spent(world, lambda tasks, epsilon: [tasks, epsilon * 0.99]),
        "fewer tasks of a shard": lambda world: _spent(world, lambda tasks, epsilon: [tasks - 1, epsilon]),
        "what was spent before only": lambda world: world.lie(spent=world.run.records[-1]["spent"]),
        "nothing": lambda world: world.lie(spent={}),
    },
    "forged-commit": {
        "another secret": lambda world: world.altered(0, noise=digest("secret").hex()),
        "no secret": lambda world: world.altered(ACCEPTED, noise=None, commit=world.commit(world.miner, noise=None)),
        "a secret of who is absent": lambda world: world.altered(3, noise=digest("secret").hex()),
    },
}
"""The same for a job with privacy."""


@pytest.mark.parametrize(("name", "what"), [(name, what) for name, ways in PRIVATE.items() for what in ways])
def test_each_lie_about_privacy_is_refused_by_its_name(private: Lies, tmp_path: Path, name: str, what: str) -> None:
    answer = cosign(private.checker(), private.signer(tmp_path), PRIVATE[name][what](private))
    assert (answer.refusal, answer.signature) == (name, b"")


def test_epsilons_are_signed_whose_last_bits_another_processor_found(private: Lies, tmp_path: Path) -> None:
    """And all tasks of the first cycle, done again with their secrets, were found right."""
    assert len(private.record["spot_checks"]) > 1
    assert not any(check["failure"] for check in private.record["spot_checks"])
    proposal = private.altered(0, epsilon=private.record["tasks"][0]["epsilon"] * (1 + 1e-12))
    assert not cosign(private.checker(), private.signer(tmp_path), proposal).refusal


@pytest.mark.parametrize("changed", [{digest("shard").hex(): Spent(1, 1.0)}, None])
def test_sums_that_cannot_be_of_the_record_before_are_refused(private: Lies, changed: dict[str, Spent] | None) -> None:
    """A cosigner that comes new has not checked that record."""
    _, before = read_record(encoded(private.run.records[-1]), CycleRecord)
    _, cycle = read_record(encoded(private.record), CycleRecord)
    spent = changed or dict.fromkeys(before.spent, Spent(10**400, 1.0))
    with pytest.raises(CosignError, match=r"^wrong-epsilon: the record before says what cannot be of its shards$"):
        private.checker()._check_epsilons(replace(before, spent=spent), cycle)


def test_who_may_read_a_shard_counts_operations_and_who_may_not_believes_the_refusal(world: Lies) -> None:
    _, cycle = read_record(encoded(world.record), CycleRecord)
    assert world.checker()._task_flops(cycle) == world.trainer._judge.task_flops
    shards = json.loads(world.fetch(cycle.dataset_root))["shards"]

    def fetch(digest: bytes) -> bytes:
        if digest.hex() in shards:
            raise EngineError("no such file")
        return world.fetch(digest)

    member = PastChecker(world.job, world.params, world.node, fetch)
    flops = member._task_flops(cycle)
    assert all(impossible(count, USED) for count in flops)
    assert not any(impossible(count, None) for count in flops)


def test_a_job_without_privacy_has_no_epsilons(world: Lies, tmp_path: Path) -> None:
    spent = {world.record["tasks"][0]["shard"]: [1, 1.0]}
    for number, lie in enumerate([world.altered(ACCEPTED, epsilon=1.0), world.lie(spent=spent)]):
        (tmp_path / str(number)).mkdir()
        answer = cosign(world.checker(), world.signer(tmp_path / str(number)), lie)
        assert answer.refusal == "wrong-epsilon"


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
ALL_CHEAT = dict.fromkeys(MINERS, CHEATED)
CYCLES: list[tuple[Mapping[bytes, str], int, float]] = [
    ({}, 0, 1.0),
    (ALL_WITHHELD, 0, 0.0),  # nothing came
    ({}, 2, 0.25),  # miners are appointed
    ({}, 5, 0.0),  # the guard allows no step: the momentum ends
    (ALL_WORSE, 0, 0.0),
    ({**FAULTS, MINERS[CHEAT]: CHEATED}, 0, 1.0),
    ({}, 0, 1.0),  # who cheated is found
    (ALL_CHEAT, 0, 1.0),
    ({}, 0, 0.0),  # all are found
    ({}, 0, 0.0),  # all are barred
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
        {"norms": {"0": 1.0}},
        {"standings": {MINERS[0].hex(): list(Standing(proven=True))}},
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
                about = {"boot": "", "version": 1, "time": time.time(), "hold": 1.0}
                return poll_answer(about, {"proposal": self.notices.pop(0), "receipt": b""})
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
