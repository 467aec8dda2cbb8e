"""How the coordinator reaches its miners: through the engine, with signed statements."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from coincurve import PrivateKey

from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.coordinator import ClosedSlot, Slot, contribution_table
from traincert.bridge.errors import BridgeError
from traincert.bridge.invitations import COSIGNER, MINER
from traincert.bridge.members import MemberList
from traincert.bridge.messages import (
    Award,
    Closing,
    CommitMessage,
    CommitReceipt,
    Join,
    M,
    MemoryRequest,
    Message,
    MessageError,
    Opening,
    Receipt,
    Report,
    assignment_seed,
    commits_root,
    seal,
    unseal,
)
from traincert.bridge.recorded import read_tasks
from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.nats import NatsEngine, Pledge
from traincert.trainer.engines.orders import Commit
from traincert.trainer.errors import EngineError
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import Record, RunFolder, record_hash, standings
from traincert.trainer.standings import choose


class RemoteMiners:
    """The coordinator's miners, reached through the engine; see `coordinator.Miners`.

    `key` is the coordinator's own. The first cycle begins when `wanted` miners are present, all others when one is.
    `waiting` is called with the number of miners that are present, and that are wanted, while there are too few.
    `privacy` says whether the job has privacy: commits are read before there is a trainer, too.
    """

    def __init__(
        self,
        members: MemberList,
        key: PrivateKey,
        params: TrainingParams,
        *,
        wanted: int,
        waiting: Callable[[int, int], None],
        privacy: bool = False,
    ) -> None:
        self._members = members
        self._key = key
        self._params = params
        self._wanted = wanted
        self._waiting = waiting
        self._privacy = privacy
        self._reports: dict[bytes, Report] = {}  # each member's last one, by its key
        self._records: dict[bytes, int] = {}  # the cycle of each record, by its hash
        self._revealed: set[bytes] = set()  # the files of all these cycles that everybody may read
        self._secrets: set[bytes] = set()  # of the noise of all these cycles' tasks that were drawn
        self._engine: NatsEngine
        self._trainer: Trainer
        self._job_digest: bytes

    def attach(self, engine: NatsEngine, trainer: Trainer, run: RunFolder) -> None:
        """Use this engine, and add the requests that it does not know to its handlers."""
        self._engine, self._trainer, self._run = engine, trainer, run
        self._job_digest = trainer.job.digest()
        self._shards = frozenset(trainer.dataset.shards)
        engine.handlers |= {"join": self._join, "job": self._identity, "report": self._report}

    def open(self, slot: Slot, cycle: int) -> tuple[Sequence[bytes], bytes]:
        """Wait for miners, and open a cycle with those that are present, unless it is open already."""
        if statement := self._engine.opening:
            _, opening = unseal(self._params.chain_id, Opening, statement)
            if (opening.cycle, opening.prev_block) == (cycle, slot.prev_block):
                return opening.miners, statement
        present = self._wait(1 if cycle else self._wanted)
        job, state = self._trainer.job, self._run.records[-1]
        seed = assignment_seed(job.seed, slot.prev_block)
        miners = choose(seed, cycle, present, standings(state), job.most_tasks)
        memories = self._run.memories()
        now = int(time.time())
        opening = Opening(
            job=self._job_digest,
            cycle=cycle,
            height=slot.height,
            prev_block=slot.prev_block,
            model=bytes.fromhex(state["model_after"]),
            dataset_root=self._trainer.dataset.root,
            miners=miners,
            memories=[memories.get(miner) for miner in miners],
            opened=now,
            deadline=now + math.ceil(job.task_seconds),
        )
        statement = self._seal(opening)
        self._engine.open(statement, opening.deadline)
        return miners, statement

    def award(self, certificate: Certificate) -> None:
        """Put a certificate where its winner, and nobody else, finds it."""
        self._engine.post(certificate.winner_key, "award", self._seal(Award(certificate.serialize())))

    def why_absent(self, certificate: Certificate) -> str:
        """Return what a winner said about its block, or what else is known."""
        said = self._reports.get(certificate.winner_key)
        if said and (said.height, said.round) == (certificate.height, certificate.round):
            return said.problem or f"its node took block {said.block_hash}, but ours has not heard of it"
        members = self._members.with_role(MINER)
        if certificate.winner_key not in members.values():
            return "it takes part no longer"
        return "no answer yet" if certificate.winner_key in self._engine.present() else "it is away"

    def closed(self, slot: ClosedSlot) -> None:
        """Give each miner of the cycle its receipt."""
        self._reports.clear()
        for kind in ("opening", "reveal", "memories", "award"):
            self._engine.clear(kind)
        for miner, receipt in receipts(slot.record, self._trainer.job):
            self._engine.post(miner, "receipt", self._seal(receipt))

    def shared(self, member: str, digest: bytes) -> Path | None:
        """Return a file that a member may read: the manifest, and what closed cycles reveal; for cosigners shards, too.

        Nothing of the open cycle is among them: it has no record yet.
        """
        dataset = self._trainer.dataset
        if digest == dataset.root:
            return dataset.directory / digest.hex()
        for cycle in range(len(self._records), len(self._run.records)):
            record = self._run.records[cycle]
            self._revealed |= revealed(record)
            secrets = {task["noise"] for task in record["tasks"] if task["drawn"]} - {None}
            self._secrets |= set(map(bytes.fromhex, secrets))
            self._records[record_hash(record)] = cycle
        if digest in self._records:
            return self._run.record_path(self._records[digest])
        if digest in self._revealed:
            return self._run.store / digest.hex()
        role, _ = self._members.roles().get(member, ("", None))
        if role == COSIGNER and digest in self._secrets:  # it may have the shards, too, so noise hides nothing from it
            return self._run.store / digest.hex()
        return dataset.shard_folder / digest.hex() if role == COSIGNER and digest in self._shards else None

    def read_commit(self, statement: bytes) -> Pledge:
        """Read a miner's commit. Raises EngineError if it must be refused."""
        miner, message = self._unseal(CommitMessage, statement)
        commit = Commit(
            message.update_hash,
            message.update_size,
            message.memory_before,
            message.memory_after,
            message.seconds,
            message.numeric_class,
            statement,
            resources=message.resources,
            noise_hash=message.noise,
        )
        if bool(commit.noise_hash) != self._privacy:
            raise EngineError("a commit names the secret of the task's noise if, and only if, the job has privacy")
        return Pledge(miner, message.opening, commit)

    def make_receipt(self, statement: bytes, place: int, late: bool) -> bytes:
        """Return the signed receipt of a commit."""
        return self._seal(CommitReceipt(hashlib.sha256(statement).digest(), place, late))

    def make_request(self, opening: bytes, memories: Sequence[bytes]) -> bytes:
        """Return the signed statement that a miner has to send memories."""
        return self._seal(MemoryRequest(opening, list(memories)))

    def make_closing(self, opening: bytes, updates: Mapping[bytes, bytes]) -> bytes:
        """Return the signed statement that a cycle takes no more commits."""
        return self._seal(Closing(opening, commits_root(updates)))

    def _wait(self, wanted: int) -> list[bytes]:
        """Wait until so many miners are present. Return their keys, sorted."""
        told = -1
        while True:
            miners = sorted(set(self._engine.present()) & set(self._members.with_role(MINER).values()))
            if len(miners) >= wanted:
                return miners
            if len(miners) != told:
                told = len(miners)
                self._waiting(told, wanted)
            self._engine.wait(1.0)

    async def _join(self, member: str, data: bytes) -> bytes:
        """Register a member's key. The answer is the key of the coordinator."""
        key, message = self._unseal(Join, data)
        if message.name != member:
            raise EngineError(f"the request to join is for {message.name}, not for {member}")
        try:
            self._members.join(member, key)
        except BridgeError as error:
            raise EngineError(str(error)) from None
        return self._key.public_key_xonly.format()

    async def _identity(self, member: str, data: bytes) -> bytes:  # noqa: ARG002
        """Answer with what makes the job, so that a member can say in what its own differs."""
        return json.dumps(self._trainer.job.shared_identity()).encode()

    async def _report(self, member: str, data: bytes) -> bytes:
        """Note what a winner says about its block."""
        key, report = self._unseal(Report, data)
        if key == self._members.keys().get(member):
            self._reports[key] = report
        return b""

    def _seal(self, message: Message) -> bytes:
        return seal(self._key, self._params.chain_id, message)

    def _unseal(self, kind: type[M], statement: bytes) -> tuple[bytes, M]:
        try:
            return unseal(self._params.chain_id, kind, statement)
        except MessageError as error:
            raise EngineError(str(error)) from None


def revealed(record: Record) -> set[bytes]:
    """Return SHA-256 of the files that a closed cycle reveals to all members.

    They are its model, velocity and updates, and the memories of the tasks that were drawn.
    """
    files = {record["model_after"], record["velocity"]}
    for task in record["tasks"]:
        files.add(task["update_hash"])
        if task["drawn"]:
            files |= {task["memory"], task["memory_after"]}
    return {bytes.fromhex(digest) for digest in files if digest}


def receipts(record: Record, job: TrainingJob) -> Iterator[tuple[bytes, Receipt]]:
    """Return each miner of a cycle, and the receipt of what came of its task."""
    table, digest = contribution_table(record), record_hash(record)
    places = {leaf.miner_key: index for index, leaf in enumerate(table.leaves)}
    for task in read_tasks(record):
        index = places.get(task.miner)
        yield (
            task.miner,
            Receipt(
                cycle=record["cycle"],
                record=digest,
                task=task,
                noise_margin=job.noise_margin,
                late_share=job.late_share,
                contributions_root=table.root,
                contributions_weight=table.weight,
                contributions_count=table.count,
                index=index,
                path=[] if index is None else [(node.hash, node.sum) for node in table.path(index)],
            ),
        )
