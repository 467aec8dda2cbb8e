"""An audit: a member repeats a closed cycle, or one task of it, and signs what it found.

The coordinator gives the files, but it cannot lie: the chain names the record, and the record names all files by their
hash. Besides what every member's folder has (member.py), an auditor's folder gets

    data/           shards by their hash; a miner has those of its own tasks there
    verdicts/       a signed verdict for each block that was audited
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from traincert.bridge.chain import CertifiedBlock, check_network, read_block, read_params
from traincert.bridge.checker import Checker, CosignError
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.codec import tagged_hash
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.coordinator import Slot
from traincert.bridge.errors import BridgeError
from traincert.bridge.member import Member, MemberFolder, View
from traincert.bridge.messages import AuditedTask, Finding, Verdict, unseal
from traincert.bridge.recorded import CycleRecord, RecordedTask
from traincert.bridge.rpc import NodeClient
from traincert.trainer.accounting import check_accountant
from traincert.trainer.determinism import numeric_class
from traincert.trainer.engines.broker import Connection, StoppedError
from traincert.trainer.engines.orders import Order
from traincert.trainer.errors import EngineError
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import finite
from traincert.trainer.segments import Segment
from traincert.trainer.spot_checks import Drawn, TaskChecker, memories_of
from traincert.trainer.store import read_blob, write_file
from traincert.trainer.tasks import Task
from traincert.trainer.training import check_device

_TOO_MUCH = 2**200  # floating-point operations
_MISSING = "missing-file"  # what the checker says if the coordinator has no such file for us


class PastChecker(Checker):
    """Checks the record of a cycle that is closed, as a cosigner did. Who was there checked more: see `Checker`."""

    def read(self, block: CertifiedBlock, parent: Certificate | None) -> CycleRecord:
        """Return the record of a block's cycle if all of it follows. `parent` is the certificate of the block before.

        Raises CosignError for the first check that fails, or for the first file that does not come.
        """
        certificate = block.certificate
        slot = Slot(certificate.height, certificate.prev_block, 0)  # the time matters only while a round is awaited
        self._past = self._read_records(certificate, parent)
        self._check_lineage(self._past, slot, parent)
        self._check_tasks(self._past, slot, certificate)
        self._check_scores(self._past)
        self._check_fields(certificate, self._past, slot)
        return self._past.cycle

    def check_model(self) -> None:
        """Check what the updates of the record that was read give. Raises CosignError as `read` does."""
        self._check_updates(self._past)

    def _task_flops(self, cycle: CycleRecord) -> Sequence[int]:
        """Return what `Checker` does.

        A miner may not read the shard, so it cannot count. Then it believes each refusal whose commit states resources.
        """
        try:
            return super()._task_flops(cycle)
        except CosignError as error:
            if error.name != _MISSING:
                raise
            return [_TOO_MUCH] * self._job.segments

    @property
    def shards(self) -> list[bytes]:
        """SHA-256 of each shard, by its number."""
        return self._shards(self._past.cycle)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments of the model."""
        return self._built(self._past.cycle).segments


class Auditor:
    """Repeats cycles for a member. `data` is the folder of shards, `store` an empty folder for all other files."""

    def __init__(
        self,
        job: TrainingJob,
        params: TrainingParams,
        key: bytes,
        node: NodeClient,
        connection: Connection,
        data: Path,
        store: Path,
        view: View,
    ) -> None:
        check_device(job)
        check_accountant(job)
        self._job = job
        self._params = params
        self._key = key
        self._node = node
        self._connection = connection
        self._data = data
        self._store = store
        self._view = view
        self._class = numeric_class(job.device)

    def audit(self, height: int | None) -> Verdict:
        """Repeat the cycle that the block at a height closed; with None one task of the last cycle, which is drawn.

        Raises BridgeError if nothing can be repeated, RegtestError if the node does not answer, and TrainerError if the
        job cannot be used here, or the connection has ended.
        """
        block, parent = self._find(height)
        certificate = block.certificate
        checker = PastChecker(self._job, self._params, self._node, self._fetch)
        tasks: list[AuditedTask] = []
        model = None
        try:
            cycle = checker.read(block, parent)
        except CosignError as error:
            if error.name == _MISSING:
                raise
            checked = Finding(True, _short(str(error)))
            self._say("record", checked, record_line(certificate.height, checked))
        else:
            checked = Finding(True, "")
            self._say("record", checked, record_line(certificate.height, checked))
            drawn_by = bytes.fromhex(block.hash) if height is None else None
            for task in self._repeated(checker, cycle, drawn_by):
                self._say("task", task, task_line(task), miner=task.miner.hex(), segment=task.segment, shard=task.shard)
                tasks.append(task)
            if height is not None:
                model = self._aggregate(checker)
                self._say("model", model, model_line(model))
            if not any(each.repeated for each in (*tasks, *([model] if model else []))):
                raise BridgeError(f"nothing of block {certificate.height} can be repeated by this member")
        return Verdict(certificate.height, certificate.record, self._class, height is None, checked, tasks, model)

    def _find(self, height: int | None) -> tuple[CertifiedBlock, Certificate | None]:
        """Return a block, or the tip, and the certificate of the block before if it has one."""
        if height is None:
            height = int(self._node.call("getblockcount"))
        block = find_block(self._node, height, self._params)
        first = height == self._params.start_height
        return block, None if first else read_block(self._node, height - 1, self._params).certificate

    def _repeated(self, checker: PastChecker, cycle: CycleRecord, drawn_by: bytes | None) -> Iterator[AuditedTask]:
        """Repeat all tasks; or, in an order that a block's hash draws, only the first one that can be repeated."""
        shards = checker.shards
        repeater = TaskChecker(self._job, self._data, self._store, checker.segments)
        tasks = cycle.tasks
        if drawn_by is not None:
            tasks = sorted(tasks, key=lambda task: _place(drawn_by, self._key, task.miner))
        for task in tasks:
            audited = self._repeat(repeater, cycle, task, shards.index(task.shard))
            yield audited
            if drawn_by is not None and audited.repeated:
                break

    def _repeat(self, repeater: TaskChecker, cycle: CycleRecord, task: RecordedTask, shard: int) -> AuditedTask:
        """Do a task again, if we may have what it needs."""

        def audited(repeated: bool, problem: str, distance: float | None = None) -> AuditedTask:
            return AuditedTask(repeated, _short(problem), task.miner, task.segment, shard, task.refusal, distance)

        if task.update_hash is None:
            return audited(False, "it gave no update")
        given = Task(task.miner, task.segment, shard, task.seed, cycle.cycle - 1)
        order = Order(given, cycle.model_before, task.shard, task.memory, task.noise)
        drawn = Drawn(order, task.update_hash, task.memory_after, task.numeric_class)
        if lacking := self._lacks(drawn, revealed=task.drawn):
            return audited(False, lacking)
        check = repeater.check(drawn)
        return audited(True, check.failure, None if check.distance is None else finite(check.distance))

    def _lacks(self, drawn: Drawn, *, revealed: bool) -> str:
        """Fetch what a task needs. Return why it cannot be repeated, or an empty string."""
        memories = memories_of(drawn, self._class)
        if memories and not revealed:
            return "only its miner has its memory, because the task was not drawn"
        files = [("shard", drawn.order.shard_hash, self._data), ("model", drawn.order.model_hash, self._store)]
        files += [("memory", memory, self._store) for memory in memories]
        if drawn.numeric_class != self._class:  # it is compared by its distance
            files.append(("update", drawn.update_hash, self._store))
        for what, digest, folder in files:
            try:
                self._connection.fetch(digest, folder)
            except StoppedError:
                raise
            except EngineError:
                return f"the coordinator does not give this member its {what}"
        return ""

    def _aggregate(self, checker: PastChecker) -> Finding:
        """Aggregate the accepted updates again."""
        try:
            checker.check_model()
        except CosignError as error:
            missing = error.name == _MISSING
            return Finding(not missing, _short(error.detail if missing else str(error)))
        return Finding(True, "")

    def _fetch(self, digest: bytes) -> bytes:
        self._connection.fetch(digest, self._store)
        return read_blob(self._store, digest)

    def _say(self, event: str, finding: Finding, text: str, **facts: object) -> None:
        self._view.say(event, text, repeated=finding.repeated, problem=finding.problem, **facts)


def run_audit(folder: Path, datadir: Path, height: int | None, view: View) -> Verdict:
    """Audit a cycle as the member in a folder does, see `Auditor.audit`. Save the signed verdict, and return it.

    The member's program may run meanwhile. `datadir` is the data directory of the member's own node, or of one that it
    trusts. Raises as `Auditor.audit` does, and BridgeError if the folder or the node are not of one network.
    """
    opened = MemberFolder.of_any_role(folder)
    job = TrainingJob.named(opened.job)
    data, verdicts = folder / "data", folder / "verdicts"
    with ExitStack() as stack:
        node = stack.enter_context(NodeClient.from_datadir(datadir))
        check_network(node, opened.params)
        member = Member(opened, job, stack.enter_context(opened.connection(view)))
        member.check_job()
        for each in (data, verdicts):
            each.mkdir(exist_ok=True)
        # Not in the member's own store: its program removes files there.
        store = Path(stack.enter_context(TemporaryDirectory(dir=folder, prefix=".audit-")))
        auditor = Auditor(job, opened.params, member.key, node, member.connection, data, store, view)
        verdict = auditor.audit(height)
        path = verdicts / f"{verdict.height}-{verdict.record.hex()[:8]}"
        write_file(path, member.seal(verdict), 0o644)
    view.say("verdict", f"signed: {path}", file=str(path), right=verdict.right)
    return verdict


def verify(statement: bytes, node: NodeClient) -> tuple[bytes, Verdict]:
    """Return the key of who signed a verdict (32 bytes), and the verdict.

    Raises MessageError if it is altered or of another network, and BridgeError if the chain has another record.
    """
    params = read_params(node)
    key, verdict = unseal(params.chain_id, Verdict, statement)
    named = find_block(node, verdict.height, params).certificate.record
    if named != verdict.record:
        raise BridgeError(
            f"the verdict is of the record {verdict.record.hex()}, but block {verdict.height} names {named.hex()}"
        )
    return key, verdict


def find_block(node: NodeClient, height: int, params: TrainingParams) -> CertifiedBlock:
    """Return the block at a height. Raises BridgeError if there is none, or none with a certificate."""
    first, last = params.start_height, int(node.call("getblockcount"))
    if not first <= height <= last:
        there = f"it has {first} to {last}" if last >= first else "it has none yet"
        raise BridgeError(f"{node.name} has no block {height} with a certificate; {there}")
    return read_block(node, height, params)


def lines(verdict: Verdict) -> Iterator[str]:
    """Return what a verdict says, a line for each finding."""
    yield record_line(verdict.height, verdict.checked)
    yield from map(task_line, verdict.tasks)
    if verdict.model:
        yield model_line(verdict.model)


def record_line(height: int, finding: Finding) -> str:
    """Return what came of a record's checks, as a line."""
    return _line("the record", finding, f"block {height} names it, and all of it follows")


def task_line(task: AuditedTask) -> str:
    """Return what came of a task, as a line."""
    what = f"miner {task.miner.hex()[:16]}, segment {task.segment}, shard {task.shard}"
    if task.refusal:
        what += f", refused as {task.refusal}"
    right = "the hashes of update and memory are those of its commit"
    if task.distance is not None:
        right = f"the update is {task.distance:.3g} away from the auditor's, which is near enough"
    return _line(what, task, right)


def model_line(finding: Finding) -> str:
    """Return what came of the aggregation, as a line."""
    return _line("the next model and its velocity", finding, "the accepted updates give them")


def _line(what: str, finding: Finding, right: str) -> str:
    problem = _short(finding.problem)  # it may be what a stranger wrote
    if not finding.repeated:
        return f"- {what}: not repeated: {problem}"
    return f"✗ {what}: {problem}" if problem else f"✓ {what}: {right}"


def _place(block_hash: bytes, auditor: bytes, miner: bytes) -> bytes:
    """Return what orders a cycle's tasks for an auditor: others get another order, so that more tasks are repeated."""
    return tagged_hash("traincert/audit", block_hash + auditor + miner)


def _short(text: str) -> str:
    """Return a text as one line that a verdict can have, and a terminal can show."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:1000])
