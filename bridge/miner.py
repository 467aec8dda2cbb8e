"""A miner on its own machine: it trains tasks, commits to its updates, sends them, and appends the blocks that it wins.

Besides what every member's folder has (member.py), its folder has

    task.json       the task of the open cycle, and the commit to its update
    data/           manifests and shards by their hash
    receipts/       a signed receipt for each cycle

Every step is on disk before it is told to the coordinator. So a miner that is killed goes on where it was, and trains
nothing again that it has committed to.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from bitcoin.core import b2lx

from traincert.bridge.chain import check_network, read_certificate
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.codec import Reader
from traincert.bridge.consensus.rules import (
    check_coordinator_signatures,
    check_totals,
    contextual_check_training_certificate,
)
from traincert.bridge.errors import BridgeError
from traincert.bridge.invitations import MINER
from traincert.bridge.keys import payout_script
from traincert.bridge.member import Member, MemberFolder, View
from traincert.bridge.messages import (
    Award,
    Closing,
    CommitMessage,
    CommitReceipt,
    MemoryRequest,
    Opening,
    Receipt,
    Report,
    assignment_seed,
    unseal,
)
from traincert.bridge.producer import CATCH_UP_TIME, NodeProducer
from traincert.bridge.rpc import NodeClient
from traincert.regtest.errors import RegtestError
from traincert.trainer.engines.broker import RefusedError
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Commit, Order
from traincert.trainer.errors import IntegrityError
from traincert.trainer.failpoints import reached
from traincert.trainer.job import TrainingJob
from traincert.trainer.monitoring import start_monitor
from traincert.trainer.store import prune, read_blob, write_file
from traincert.trainer.tasks import assign

VERSION = 2
"""Of task.json."""


@dataclass
class Earned:
    """What a miner has earned since it began, by its receipts."""

    cycles: int = 0
    accepted: int = 0
    weight: int = 0
    total: int = 0
    """The weight of all miners in these cycles."""
    blocks: int = 0

    @classmethod
    def read(cls, folder: Path) -> Earned:
        """Return what the miner in a folder has earned."""
        path = folder / "earned.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()


class _Line:
    """Does steps one after the other in a thread of its own, which does not hold up the end of the program."""

    def __init__(self, name: str) -> None:
        self._steps: SimpleQueue[tuple[Callable[[bytes], None], bytes]] = SimpleQueue()
        self._error: BaseException | None = None
        Thread(target=self._work, name=name, daemon=True).start()

    def put(self, step: Callable[[bytes], None], statement: bytes) -> None:
        """Do a step after those that wait."""
        self._steps.put((step, statement))

    def check(self) -> None:
        """Raise the exception that a step raised, if one did."""
        if self._error:
            raise self._error

    def _work(self) -> None:
        while not self._error:
            step, statement = self._steps.get()
            try:
                step(statement)
            except BaseException as error:
                self._error = error


class Miner:
    """The program of a miner. `engine` does its tasks; `datadir` is the data directory of its node, if it has one."""

    def __init__(
        self,
        folder: MemberFolder,
        job: TrainingJob,
        member: Member,
        engine: LocalEngine,
        datadir: Path | None,
        view: View,
        *,
        compat_pow: bool = True,
        monitored: bool = False,
    ) -> None:
        self.earned = Earned.read(folder.folder)
        self._folder = folder
        self._data, self._receipts = folder.folder / "data", folder.folder / "receipts"
        for each in (self._data, self._receipts):
            each.mkdir(exist_ok=True)
        self._job = job
        self._member = member
        self._engine = engine
        self._view = view
        self._datadir = datadir
        self._compat_pow = compat_pow
        self._monitored = monitored
        self._shards: set[bytes] = set()  # that were fetched, and were not damaged
        self._tasks, self._blocks = _Line("tasks"), _Line("blocks")

    def run(self) -> None:
        """Take part in cycles until the program is interrupted.

        Raises BridgeError or TrainerError if this miner cannot take part.
        """
        self._member.register()
        key = self._member.key.hex()
        self._view.say("joined", f"{self._folder.name} takes part with the key {key}", key=key)
        while True:
            for kind, statement in self._member.poll().items():
                self._handle(kind, statement)
            self._tasks.check()
            self._blocks.check()

    def _handle(self, kind: str, statement: bytes) -> None:
        """Take a statement. Polls go on during what takes long, so that we count as present."""
        match kind:
            case "opening":
                self._tasks.put(self._train, statement)
            case "reveal":
                self._tasks.put(self._reveal, statement)
            case "memories":
                self._tasks.put(self._send_memories, statement)
            case "award":
                self._blocks.put(self._append, statement)
            case "receipt":
                self._take_receipt(statement)

    def _train(self, statement: bytes) -> None:
        """Do the task of an opening, and commit to its update, unless that was done before."""
        opening = self._read_opening(statement)
        digest = hashlib.sha256(statement).digest()
        task = self._saved_task()
        if task.get("opening") != digest.hex():
            try:
                task = self._do(opening, digest)
            except RefusedError as error:  # the cycle is over, and its files are not for us any more
                self._view.say("refused", f"cycle {opening.cycle + 1}: too late: {error}", detail=str(error))
                return
            write_file(self._folder.folder / "task.json", json.dumps(task, indent=1).encode() + b"\n")
            reached("task-saved")
        sealed = bytes.fromhex(task["commit"])
        try:
            receipt = self._member.connection.ask("commit", sealed)
        except RefusedError as error:
            self._view.say("refused", f"cycle {opening.cycle + 1}: the commit was refused: {error}", detail=str(error))
            return
        reached("committed")
        prune(self._folder.store, map(bytes.fromhex, task["files"]))
        taken = self._member.read(CommitReceipt, receipt)
        if taken.commit != hashlib.sha256(sealed).digest():
            _, other = unseal(self._folder.params.chain_id, CommitMessage, sealed)
            raise BridgeError(f"the coordinator has another commit of ours than {other.update_hash.hex()}")
        self._view.say(
            "committed",
            f"cycle {opening.cycle + 1}: committed, number {taken.place + 1}{', late' if taken.late else ''}",
            cycle=opening.cycle + 1,
        )

    def _do(self, opening: Opening, digest: bytes) -> dict[str, Any]:
        """Train an opening's task, and return its state with the signed commit."""
        connection, store, me = self._member.connection, self._folder.store, self._member.key
        connection.fetch(opening.dataset_root, self._data)
        shards = json.loads(read_blob(self._data, opening.dataset_root))["shards"]
        seed = assignment_seed(self._job.seed, opening.prev_block)
        tasks = assign(seed, opening.cycle, opening.miners, self._job.segments, len(shards))
        (task,) = [each for each in tasks if each.miner == me]
        shard = bytes.fromhex(shards[task.shard])
        self._view.say(
            "task",
            f"cycle {opening.cycle + 1}: segment {task.segment}, shard {task.shard}",
            cycle=opening.cycle + 1,
            segment=task.segment,
            shard=task.shard,
        )
        connection.fetch(opening.model, store)
        # To check a big file again in each cycle takes long.
        if shard not in self._shards or not (self._data / shard.hex()).exists():
            connection.fetch(shard, self._data)
            self._shards.add(shard)
        memory = opening.memories[opening.miners.index(me)]
        if memory and not (store / memory.hex()).exists():
            self._view.say("memory", "the memory of the last task is not here: this task begins without one")
            memory = None
        order = Order(task, opening.model, shard, memory)
        begin = time.monotonic()
        (commit,) = self._engine.collect(self._data, [order])
        if not isinstance(commit, Commit):
            raise BridgeError(f"cycle {opening.cycle + 1}: the task failed: {commit}")
        reached("trained")
        message = CommitMessage(
            digest,
            commit.update_hash,
            commit.update_size,
            commit.memory_before,
            commit.memory_after,
            commit.seconds,
            commit.numeric_class,
            commit.resources,
            commit.noise_hash,
        )
        used = commit.resources
        seconds = f"{time.monotonic() - begin:.1f} s" + (f" ({used.cpu_seconds:.1f} CPU seconds)" if used else "")
        if self._monitored and (used is None or used.flags is None):
            self._view.say("not-monitored", f"cycle {opening.cycle + 1}: the task was not monitored")
        if used and used.flags:
            self._view.say("flagged", f"cycle {opening.cycle + 1}: the task also did this: {', '.join(used.flags)}")
        self._view.say(
            "trained",
            f"cycle {opening.cycle + 1}: trained in {seconds}, {commit.update_size:,} bytes",
            cycle=opening.cycle + 1,
            seconds=commit.seconds,
            resources=asdict(used) if used else None,
        )
        files = (opening.model, commit.update_hash, commit.memory_before, commit.memory_after, commit.noise_hash)
        return {
            "version": VERSION,
            "cycle": opening.cycle,
            "opening": digest.hex(),
            "update": commit.update_hash.hex(),
            "files": [each.hex() for each in files if each],
            "commit": self._member.seal(message).hex(),
        }

    def _reveal(self, statement: bytes) -> None:
        """Send the update that we committed to in a cycle: the commits are closed."""
        task = self._saved_task()
        if task.get("opening") != self._member.read(Closing, statement).opening.hex():
            return
        update = bytes.fromhex(task["update"])
        try:
            self._member.connection.send("update", update, self._folder.store)
        except RefusedError as error:
            self._view.say("refused", f"the update was refused: {error}", detail=str(error))

    def _send_memories(self, statement: bytes) -> None:
        """Send the memories with which our task is done again."""
        request = self._member.read(MemoryRequest, statement)
        if self._saved_task().get("opening") != request.opening.hex():
            return
        self._view.say("checked", "our task is done again: sending what it began with")
        for digest in request.memories:
            try:
                self._member.connection.send("memory", digest, self._folder.store)
            except (RefusedError, IntegrityError) as error:
                self._view.say("refused", f"a file for the spot check was not sent: {error}", detail=str(error))

    def _append(self, statement: bytes) -> None:
        """Check a certificate that we won, and append its block to our own node."""
        certificate = Certificate.read(Reader(self._member.read(Award, statement).certificate))
        where = f"block {certificate.height}, round {certificate.round}"
        self._view.say("won", f"{where}: won", height=certificate.height, round=certificate.round)
        block_hash = problem = ""
        try:
            if self._datadir is None:
                raise BridgeError("this miner has no node: start it with --datadir")
            with NodeClient.from_datadir(self._datadir) as node:
                if not self._check_award(certificate, node):
                    return
            secret = self._folder.secret
            producer = NodeProducer(secret, payout_script(secret), self._datadir, self._folder.name)
            producer.compat_pow = self._compat_pow
            block_hash = producer.produce(certificate, self._folder.params)
            self.earned.blocks += 1
            self._save_earned()
            self._view.say("block", f"{where}: appended {block_hash}", block=block_hash)
        except (BridgeError, RegtestError) as error:
            problem = str(error)
            self._view.say("absent", f"{where}: no block: {problem}", problem=problem)
        report = Report(certificate.height, certificate.round, block_hash, problem[:500])
        self._member.ask("report", report)

    def _check_award(self, certificate: Certificate, node: NodeClient) -> bool:
        """Check a certificate against our own node before we sign its block. Return whether a block is still needed.

        Raises CertificateError for the first rule that does not hold, and BridgeError if the parent block is not the
        one that our receipt of its cycle speaks of.
        """
        params = self._folder.params
        parent_hash = b2lx(certificate.prev_block)
        if not node.wait_for_height(certificate.height - 1, CATCH_UP_TIME):
            raise BridgeError(f"{node.name} has no block {certificate.height - 1} yet")
        if node.call("getblockcount") >= certificate.height:
            return False
        is_first = certificate.height == params.start_height
        parent = None if is_first else read_certificate(node, parent_hash)
        check_totals(certificate)
        check_coordinator_signatures(certificate, params.keys_at(certificate.height), params.chain_id)
        far_future = 2**32 - 1  # the node itself makes sure that the round has come
        contextual_check_training_certificate(certificate, parent, far_future, 0, params)
        receipt = self._receipt(certificate.height - params.start_height)
        if parent and receipt and receipt.record != parent.record:
            raise BridgeError(f"block {parent_hash} is of another record than our receipt of cycle {receipt.cycle}")
        return True

    def _receipt(self, cycle: int) -> Receipt | None:
        """Return our receipt of a cycle, counted from 1, if we have one."""
        path = self._receipts / f"{cycle:08}"
        return self._member.read(Receipt, path.read_bytes()) if path.exists() else None

    def _take_receipt(self, statement: bytes) -> None:
        """Keep a receipt, and show what the cycle earned, or why its update was refused."""
        receipt = self._member.read(Receipt, statement)
        path = self._receipts / f"{receipt.cycle:08}"
        if path.exists():
            return
        write_file(path, statement)
        earned, task = self.earned, receipt.task
        earned.cycles += 1
        earned.accepted += task.refusal is None
        earned.weight += task.weight
        earned.total += receipt.contributions_weight
        self._save_earned()
        share = task.weight / receipt.contributions_weight if receipt.contributions_weight else 0.0
        text = (
            f"cycle {receipt.cycle}: refused as {task.refusal}: {task.detail}"
            if task.refusal
            else f"cycle {receipt.cycle}: weight {task.weight:,}, {share:.1%} of the next draw"
        )
        self._view.say(
            "receipt",
            text,
            cycle=receipt.cycle,
            weight=task.weight,
            share=share,
            refusal=task.refusal,
            earned=asdict(earned),
        )

    def _read_opening(self, statement: bytes) -> Opening:
        """Read an opening. Raises BridgeError if we must not take part in it."""
        opening = self._member.read(Opening, statement)
        if opening.job != self._job.digest():
            self._member.check_job()
            raise BridgeError("the cycle is of another job than ours")
        if self._member.key not in opening.miners or len(opening.memories) != len(opening.miners):
            raise BridgeError("the opening has no task for us")
        return opening

    def _saved_task(self) -> dict[str, Any]:
        """Return the last task's state; an empty one before the first task, or if it has another format."""
        path = self._folder.folder / "task.json"
        task: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return task if task.get("version") == VERSION else {}

    def _save_earned(self) -> None:
        write_file(self._folder.folder / "earned.json", json.dumps(asdict(self.earned)).encode() + b"\n")


def run_miner(
    folder: Path, datadir: Path | None, view: View, *, compat_pow: bool = True, monitored: bool = False
) -> None:
    """Run a miner until it is interrupted. With `monitored` its tasks are watched, if this machine allows it.

    Raises BridgeError, RegtestError or TrainerError if it cannot take part.
    """
    opened = MemberFolder(folder, MINER)
    job = TrainingJob.named(opened.job)
    with ExitStack() as stack:
        stack.enter_context(opened.lock())
        if datadir:
            with NodeClient.from_datadir(datadir) as node:
                check_network(node, opened.params)
        else:
            view.say("no-node", "without --datadir this miner appends no blocks")
        monitor = stack.enter_context(
            start_monitor(
                monitored,
                [opened.store],
                lambda why: view.say("not-monitored", f"tasks are not monitored: {why}"),
            )
        )
        engine = stack.enter_context(LocalEngine(job, opened.store, workers=1, monitor=monitor, durable=True))
        member = Member(opened, job, stack.enter_context(opened.connection(view, patient=True)))
        watched = monitor is not None
        Miner(opened, job, member, engine, datadir, view, compat_pow=compat_pow, monitored=watched).run()
