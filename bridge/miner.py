"""A miner on its own machine: it trains tasks, commits to its updates, sends them, and appends the blocks that it wins.

Its folder has

    miner.json      its name, the broker's address, the network's parameters, and where its job is
    miner.key       its secret key; it never leaves this machine
    broker.seed     the credential that opens the broker's door, and proves nothing else
    task.json       the task of the open cycle, and the commit to its update
    store/          models, updates and memories by their hash
    data/           manifests and shards by their hash
    receipts/       a signed receipt for each cycle

Every step is on disk before it is told to the coordinator. So a miner that is killed goes on where it was, and trains
nothing again that it has committed to.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any, Protocol

from bitcoin.core import b2lx
from coincurve import PrivateKey

from traincert.bridge.broker import Credential, connect
from traincert.bridge.chain import check_network, read_certificate
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.codec import Reader
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.consensus.rules import (
    check_coordinator_signatures,
    check_totals,
    contextual_check_training_certificate,
)
from traincert.bridge.errors import BridgeError
from traincert.bridge.invitations import Invitation
from traincert.bridge.keys import create_secret, load_secret, payout_script
from traincert.bridge.messages import (
    Award,
    CommitMessage,
    CommitReceipt,
    Join,
    M,
    MessageError,
    Opening,
    Receipt,
    Report,
    assignment_seed,
    seal,
    unseal,
)
from traincert.bridge.producer import CATCH_UP_TIME, NodeProducer
from traincert.bridge.rpc import NodeClient
from traincert.regtest.errors import RegtestError
from traincert.trainer.engines.broker import Connection, RefusedError
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Commit, Order
from traincert.trainer.failpoints import reached
from traincert.trainer.job import TrainingJob, differences
from traincert.trainer.store import prune, read_blob, write_blob, write_file
from traincert.trainer.tasks import assign

POLL_SLACK = 4.0  # seconds by which the answer to a poll may be late
VERSION = 1
"""Of miner.json and task.json."""


class View(Protocol):
    """Shows what a miner does."""

    def say(self, event: str, text: str, **facts: Any) -> None:
        """Show an event: a short name for programs, a sentence for people, and facts for programs."""


@dataclass
class Earned:
    """What a miner has earned since it began, by its receipts."""

    cycles: int = 0
    accepted: int = 0
    weight: int = 0
    total: int = 0
    """The weight of all miners in these cycles."""
    blocks: int = 0


class MinerFolder:
    """A miner's folder, see above."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that `create` made. Raises BridgeError if it is none."""
        self.folder = folder
        self.store, self.data, self.receipts = folder / "store", folder / "data", folder / "receipts"
        path = folder / "miner.json"
        try:
            facts = json.loads(path.read_text())
            if facts["version"] != VERSION:
                raise BridgeError(f"{path} has format {facts['version']}, this traincert reads format {VERSION}")
            self.name: str = facts["name"]
            self.job: str = facts["job"]
            self.params = TrainingParams.from_node_options(facts["options"])
            self.coordinator = self.params.keys_at(self.params.start_height).keys[0]
            seed = (folder / "broker.seed").read_text().strip()
            self.credential = Credential(facts["url"], facts["ca"], seed)
        except FileNotFoundError:
            raise BridgeError(f"{folder} is no miner's folder: run traincert miner join {folder}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BridgeError(f"{path} cannot be read: {error!r}") from None
        self.secret = load_secret(folder / "miner.key")

    def lock(self) -> IO[str]:
        """Lock the folder until the returned file is closed. Raises BridgeError if another process has it open."""
        file = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BridgeError(f"{self.folder} is in use by another process") from None
        return file

    @classmethod
    def create(cls, folder: Path, name: str, credential: Credential, params: TrainingParams, job: str) -> MinerFolder:
        """Make a miner's folder, with a new key unless there is one. `job` is a job's name or file."""
        for each in (folder, folder / "store", folder / "data", folder / "receipts"):
            each.mkdir(parents=True, exist_ok=True)
        if not (folder / "miner.key").exists():
            create_secret(folder / "miner.key")
        write_file(folder / "broker.seed", credential.seed.encode() + b"\n")
        facts = {
            "version": VERSION,
            "name": name,
            "url": credential.url,
            "ca": credential.ca,
            "options": params.node_options(),
            "job": job,
        }
        write_file(folder / "training.conf", params.conf().encode(), 0o644)
        write_file(folder / "miner.json", json.dumps(facts, indent=1).encode() + b"\n")
        return cls(folder)

    def task(self) -> dict[str, Any]:
        """Return the last task's state; an empty one before the first task."""
        path = self.folder / "task.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def save_task(self, task: dict[str, Any]) -> None:
        """Write a task's state, durably."""
        write_file(self.folder / "task.json", json.dumps(task, indent=1).encode() + b"\n")


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
        folder: MinerFolder,
        job: TrainingJob,
        connection: Connection,
        engine: LocalEngine,
        datadir: Path | None,
        view: View,
        *,
        compat_pow: bool = True,
    ) -> None:
        self.earned = Earned()
        self._folder = folder
        self._job = job
        self._connection = connection
        self._engine = engine
        self._view = view
        self._key = PrivateKey(folder.secret)
        self.key: bytes = self._key.public_key_xonly.format()
        self._datadir = datadir
        self._compat_pow = compat_pow
        self._since: dict[str, Any] = {"boot": "", "version": 0, "session": secrets.token_hex(8)}
        self._hold = 0.0  # the time for which the coordinator holds polls, seconds
        self._tasks, self._blocks = _Line("tasks"), _Line("blocks")

    def run(self) -> None:
        """Take part in cycles until the program is interrupted.

        Raises BridgeError or TrainerError if this miner cannot take part.
        """
        register(self._folder, self._job, self._connection)
        self._view.say("joined", f"{self._folder.name} takes part with the key {self.key.hex()}", key=self.key.hex())
        while True:
            for kind, statement in self._poll().items():
                self._handle(kind, statement)
            self._tasks.check()
            self._blocks.check()

    def _poll(self) -> dict[str, bytes]:
        """Ask what there is for us, and wait a while if there is nothing. Return statements by kind."""
        began = time.time()
        try:
            asked = json.dumps(self._since).encode()
            answer = json.loads(self._connection.ask("poll", asked, seconds=self._hold + POLL_SLACK))
        except RefusedError as error:
            raise BridgeError(str(error)) from None
        self._hold = answer["hold"]
        self._since |= {"boot": answer["boot"], "version": answer["version"]}
        now, limit = time.time(), self._folder.params.round_seconds
        if not began - limit <= answer["time"] <= now + limit:
            raise BridgeError(
                f"this machine's clock differs from the coordinator's by {now - answer['time']:+.0f} seconds, which is "
                f"more than a round ({limit} s): set the clock"
            )
        return {kind: bytes.fromhex(each) for kind, each in answer["notices"].items()}

    def _handle(self, kind: str, statement: bytes) -> None:
        """Take a statement. Polls go on during what takes long, so that we count as present."""
        match kind:
            case "opening":
                self._tasks.put(self._train, statement)
            case "reveal":
                self._tasks.put(self._reveal, statement)
            case "award":
                self._blocks.put(self._append, statement)
            case "receipt":
                self._take_receipt(statement)

    def _train(self, statement: bytes) -> None:
        """Do the task of an opening, and commit to its update, unless that was done before."""
        opening = self._read_opening(statement)
        digest = hashlib.sha256(statement).digest()
        task = self._folder.task()
        if task.get("opening") != digest.hex():
            task = self._do(opening, digest)
            self._folder.save_task(task)
            reached("task-saved")
        sealed = bytes.fromhex(task["commit"])
        try:
            receipt = self._connection.ask("commit", sealed)
        except RefusedError as error:
            self._view.say("refused", f"cycle {opening.cycle + 1}: the commit was refused: {error}", detail=str(error))
            return
        reached("committed")
        taken = self._read(CommitReceipt, receipt)
        if taken.commit != hashlib.sha256(sealed).digest():
            _, other = unseal(self._folder.params.chain_id, CommitMessage, sealed)
            raise BridgeError(f"the coordinator has another commit of ours than {other.update_hash.hex()}")
        self._view.say(
            "committed", f"cycle {opening.cycle + 1}: committed, number {taken.place + 1}", cycle=opening.cycle + 1
        )

    def _do(self, opening: Opening, digest: bytes) -> dict[str, Any]:
        """Train an opening's task, and return its state with the signed commit."""
        job, folder = self._job, self._folder
        self._connection.fetch(opening.dataset_root, folder.data)
        shards = json.loads(read_blob(folder.data, opening.dataset_root))["shards"]
        seed = assignment_seed(job.seed, opening.prev_block)
        tasks = assign(seed, opening.cycle, opening.miners, job.segments, len(shards))
        (task,) = [each for each in tasks if each.miner == self.key]
        shard = bytes.fromhex(shards[task.shard])
        self._view.say(
            "task",
            f"cycle {opening.cycle + 1}: segment {task.segment}, shard {task.shard}",
            cycle=opening.cycle + 1,
            segment=task.segment,
            shard=task.shard,
        )
        self._connection.fetch(opening.model, folder.store)
        self._connection.fetch(shard, folder.data)
        memory = opening.memories[opening.miners.index(self.key)]
        if memory and not (folder.store / memory.hex()).exists():
            self._view.say("memory", "the memory of the last task is not here: this task begins without one")
            memory = None
        order = Order(task, opening.model, shard, memory)
        begin = time.monotonic()
        (commit,) = self._engine.collect(folder.data, [order])
        (update,) = self._engine.reveal([order], [commit])
        if not isinstance(commit, Commit) or not isinstance(update, bytes):
            raise BridgeError(f"cycle {opening.cycle + 1}: the task failed: {commit}")
        reached("trained")
        write_blob(folder.store, update)
        kept = {opening.model, commit.update_hash, commit.memory_before, commit.memory_after} - {None}
        prune(folder.store, [each for each in kept if each])
        message = CommitMessage(
            digest,
            commit.update_hash,
            commit.update_size,
            commit.memory_before,
            commit.memory_after,
            commit.seconds,
            commit.numeric_class,
        )
        self._view.say(
            "trained",
            f"cycle {opening.cycle + 1}: trained in {time.monotonic() - begin:.1f} s, {commit.update_size:,} bytes",
            cycle=opening.cycle + 1,
            seconds=commit.seconds,
        )
        return {
            "version": VERSION,
            "cycle": opening.cycle,
            "opening": digest.hex(),
            "update": commit.update_hash.hex(),
            "commit": seal(self._key, folder.params.chain_id, message).hex(),
        }

    def _reveal(self, digest: bytes) -> None:
        """Send the update that we committed to in a cycle: the commits are closed."""
        task = self._folder.task()
        if task.get("opening") != digest.hex():
            return
        update = bytes.fromhex(task["update"])
        try:
            self._connection.send("update", update, read_blob(self._folder.store, update))
        except RefusedError as error:
            self._view.say("refused", f"the update was refused: {error}", detail=str(error))

    def _append(self, statement: bytes) -> None:
        """Check a certificate that we won, and append its block to our own node."""
        certificate = Certificate.read(Reader(self._read(Award, statement).certificate))
        where = f"block {certificate.height}, round {certificate.round}"
        self._view.say("won", f"{where}: won", height=certificate.height, round=certificate.round)
        block_hash = problem = ""
        try:
            if self._datadir is None:
                raise BridgeError("this miner has no node: start it with --datadir")
            with NodeClient.from_datadir(self._datadir) as node:
                if not self._check_award(certificate, node):
                    return
            producer = NodeProducer(self._folder.secret, payout_script(self._folder.secret), self._datadir)
            producer.compat_pow = self._compat_pow
            block_hash = producer.produce(certificate, self._folder.params)
            self.earned.blocks += 1
            self._view.say("block", f"{where}: appended {block_hash}", block=block_hash)
        except (BridgeError, RegtestError) as error:
            problem = str(error)
            self._view.say("absent", f"{where}: no block: {problem}", problem=problem)
        report = Report(certificate.height, certificate.round, block_hash, problem[:500])
        self._connection.ask("report", seal(self._key, self._folder.params.chain_id, report))

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
        if (
            parent
            and receipt
            and (receipt.record, receipt.contributions_root)
            != (
                parent.record,
                parent.contributions_root,
            )
        ):
            raise BridgeError(f"block {parent_hash} is of another record than our receipt of cycle {receipt.cycle}")
        return True

    def _receipt(self, cycle: int) -> Receipt | None:
        """Return our receipt of a cycle, counted from 1, if we have one."""
        path = self._folder.receipts / f"{cycle:08}"
        return self._read(Receipt, path.read_bytes()) if path.exists() else None

    def _take_receipt(self, statement: bytes) -> None:
        """Keep a receipt, and show what the cycle earned, or why its update was refused."""
        receipt = self._read(Receipt, statement)
        path = self._folder.receipts / f"{receipt.cycle:08}"
        if path.exists():
            return
        write_file(path, statement)
        earned = self.earned
        earned.cycles += 1
        earned.accepted += receipt.refusal is None
        earned.weight += receipt.weight
        earned.total += receipt.contributions_weight
        share = receipt.weight / receipt.contributions_weight if receipt.contributions_weight else 0.0
        text = (
            f"cycle {receipt.cycle}: refused as {receipt.refusal}: {receipt.detail}"
            if receipt.refusal
            else f"cycle {receipt.cycle}: weight {receipt.weight:,}, {share:.1%} of the next draw"
        )
        self._view.say(
            "receipt",
            text,
            cycle=receipt.cycle,
            weight=receipt.weight,
            share=share,
            refusal=receipt.refusal,
            earned=asdict(earned),
        )

    def _read_opening(self, statement: bytes) -> Opening:
        """Read an opening. Raises BridgeError if we must not take part in it."""
        opening = self._read(Opening, statement)
        if opening.job != self._job.digest():
            check_job(self._folder, self._job, self._connection)
            raise BridgeError("the cycle is of another job than ours")
        if self.key not in opening.miners or len(opening.memories) != len(opening.miners):
            raise BridgeError("the opening has no task for us")
        return opening

    def _read(self, kind: type[M], statement: bytes) -> M:
        """Read a statement of the coordinator. Raises MessageError if it is another's."""
        key, message = unseal(self._folder.params.chain_id, kind, statement)
        if key != self._folder.coordinator:
            raise MessageError(f"a message is signed by {key.hex()}, which is not the coordinator's key")
        return message


def create_miner(folder: Path, invitation: Invitation, job: str) -> MinerFolder:
    """Make a miner's folder, with a new key unless it has one. `job` is the job's name or file."""
    credential = Credential(invitation.url, invitation.ca, invitation.seed)
    return MinerFolder.create(folder, invitation.name, credential, invitation.params, TrainingJob.located(job))


def join_as_miner(folder: Path, invitation: Invitation, job: str) -> bytes:
    """Make a miner's folder, register its key with the coordinator, and return the key (32 bytes).

    `job` is the job's name or file. Raises BridgeError or TrainerError if that cannot be done; another call goes on.
    """
    training_job = TrainingJob.named(job)
    made = create_miner(folder, invitation, job)
    with Connection(partial(connect, made.credential)) as connection:
        register(made, training_job, connection)
    return PrivateKey(made.secret).public_key_xonly.format()


def run_miner(folder: Path, datadir: Path | None, view: View, *, compat_pow: bool = True) -> None:
    """Run a miner until it is interrupted. Raises BridgeError, RegtestError or TrainerError if it cannot take part."""
    made = MinerFolder(folder)
    job = TrainingJob.named(made.job)

    def on_lost(lost: bool) -> None:
        view.say("broker", "the broker is away: waiting for it" if lost else "the broker is there again", lost=lost)

    with ExitStack() as stack:
        stack.enter_context(made.lock())
        if datadir:
            with NodeClient.from_datadir(datadir) as node:
                check_network(node, made.params)
        else:
            view.say("no-node", "without --datadir this miner appends no blocks")
        engine = stack.enter_context(LocalEngine(job, made.store, workers=1))
        connection = stack.enter_context(Connection(partial(connect, made.credential), on_lost))
        miner = Miner(made, job, connection, engine, datadir, view, compat_pow=compat_pow)
        miner.run()


def register(folder: MinerFolder, job: TrainingJob, connection: Connection) -> None:
    """Register a miner's key with the coordinator. It may be registered already.

    Raises BridgeError if the coordinator does not take it, is another one, or trains another job.
    """
    key = PrivateKey(folder.secret)
    try:
        answer = connection.ask("join", seal(key, folder.params.chain_id, Join(folder.name)))
    except RefusedError as error:
        raise BridgeError(str(error)) from None
    if answer != folder.coordinator:
        raise BridgeError("the coordinator has another key than the invitation says: ask for a new invitation")
    check_job(folder, job, connection)


def check_job(folder: MinerFolder, job: TrainingJob, connection: Connection) -> None:
    """Raise BridgeError that says in what the coordinator's job differs from ours, if it does."""
    if different := differences(job.shared_identity(), json.loads(connection.ask("job"))):
        raise BridgeError(
            f"the coordinator trains another job than {folder.job}: {', '.join(different)}: use the same files as the "
            "coordinator"
        )
