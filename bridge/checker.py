"""What a cosigner checks before it signs a certificate: all that can be found true from the record.

`Checker` says what is checked, and what no cosigner can check. This module imports torch only when a check needs it.
"""

from __future__ import annotations

import hashlib
import json
import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from bitcoin.core import b2lx, lx

from traincert.bridge.chain import read_certificate
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.codec import Reader
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.consensus.rules import (
    check_coordinator_signatures,
    check_totals,
    contextual_check_training_certificate,
)
from traincert.bridge.errors import BridgeError, CertificateError
from traincert.bridge.messages import (
    CommitMessage,
    MessageError,
    Opening,
    Proposal,
    assignment_seed,
    commits_root,
    score_seed,
    unseal,
)
from traincert.bridge.recorded import CycleRecord, R, RecordedTask, StartRecord, read_record
from traincert.bridge.rpc import NodeClient
from traincert.trainer.accounting import epsilon, spent_after
from traincert.trainer.engines.broker import StoppedError
from traincert.trainer.errors import EngineError, IntegrityError, Reason
from traincert.trainer.job import TrainingJob
from traincert.trainer.resources import impossible
from traincert.trainer.standings import Standing, draw_checks, next_standings
from traincert.trainer.store import write_blob
from traincert.trainer.tasks import assign
from traincert.trainer.weights import foreign, limit_norms, paid

if TYPE_CHECKING:
    import torch

    from traincert.bridge.coordinator import Slot
    from traincert.trainer.aggregation import Accepted
    from traincert.trainer.examples import Examples
    from traincert.trainer.records import Record
    from traincert.trainer.segments import Layout, Segment
    from traincert.trainer.state import State

PATIENCE = 30.0
"""Seconds that a checker waits for its node to have a certificate's parent."""

_SHARES = {0.0, 1.0, 0.5, 0.25, 0.125, 0.0625}
_WITHOUT_COMMIT = {Reason.WORKER_DIED, Reason.LATE, Reason.ABSENT}
_BEFORE_READING = {
    Reason.BARRED,
    Reason.SPOT_CHECK_FAILED,
    Reason.IMPOSSIBLE_RESOURCES,
    Reason.WITHHELD,
    Reason.WRONG_MEMORY,
}
"""Refusals of a committed update that is not read."""
_AFTER_READING = {Reason.COPY, Reason.NOT_ITS_SHARD, Reason.NO_IMPROVEMENT, Reason.MEMORY_WITHHELD}
"""Refusals of an update that has the right form. All others are for its form."""
_NORM_TOLERANCE = 1e-6  # processors add the squares in other orders
_EPSILON_TOLERANCE = 1e-6  # processors and versions of SciPy may differ in the last bits
_SHOWN = 120  # characters of a value in a message


class CosignError(BridgeError):
    """A certificate that must not be signed. `name` is the short name of the check that failed; `detail` says why."""

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name = name
        self.detail = detail


class _Records(NamedTuple):
    """A cycle's record and the one before, as JSON and with types."""

    files: tuple[Record, Record]
    before: StartRecord
    cycle: CycleRecord


_FIELDS: Mapping[str, str] = {
    "version": "wrong-form",
    "height": "wrong-height",
    "prev_block": "wrong-parent",
    "beacon_reveal": "wrong-beacon",
    "model_before": "wrong-lineage",
    "model_after": "wrong-model",
    "dataset_root": "wrong-dataset",
    "loss_before": "wrong-loss",
    "loss_after": "wrong-loss",
    "params_trained": "wrong-table",
    "contributions_root": "wrong-table",
    "contributions_weight": "wrong-table",
    "contributions_count": "wrong-table",
    "winner_key": "wrong-winner",
    "draw": "wrong-winner",
}
"""What it is called if a certificate's field is not what the records say. The other fields name them."""

_RULES: Mapping[str, str] = {
    "totals": "wrong-table",
    "award": "wrong-winner",
    "weight": "wrong-winner",
    "draw": "wrong-winner",
    "beacon": "wrong-beacon",
    "model": "wrong-lineage",
}
"""What it is called if a consensus rule does not hold."""


class Checker:
    """Checks proposals against a cosigner's own node and the files of the cycle.

    `job` is its own copy of the job, `params` are the network's. `node` is its own node, which it trusts. `fetch`
    returns the bytes of the file with a SHA-256 (32 bytes); it may raise EngineError or IntegrityError if there is no
    such file. `keep` is called with the bytes of files that the next check will need. `patience` are the seconds that a
    check may wait for the node to have the parent block, and for the clock to allow the round.

    What is checked, in this order; in brackets the names of the refusals:

    - The certificate is well formed (wrong-form). Its parent is the node's tip, and it is for the next height
      (wrong-parent, wrong-height).
    - The consensus rules hold: beacon, draw, lineage, totals.
    - The record hashes to what the certificate says, is canonical and has known fields only (wrong-record). Its parent
      is the record that the parent's certificate names, and that of the first cycle is the network's start
      (wrong-lineage). Data, model and loss continue those of the record before (wrong-dataset, wrong-lineage,
      wrong-loss).
    - The opening is signed by the coordinator, for this job, slot, model and data. It offers each miner its own memory,
      and at least the job's time (wrong-opening). It has the miners of the record's tasks (left-out).
    - Segment, shard and seed of each task follow from the parent block (wrong-assignment).
    - Each commit is the miner's statement for this opening, and its hashes and size are the record's (forged-commit).
      A commit is neither late nor absent, and what is accepted has one; whose resources are called impossible says
      what cannot be (left-out). What drew the examples for scoring follows from the beacon and the commits
      (wrong-score-seed).
    - What counts of each measured score is what the job pays for it; parameters and memories follow from the tasks
      (wrong-params, wrong-weight, wrong-score, wrong-memories). The updates' norms are limited as the job says
      (wrong-norm). The miners' standings follow from the record before, and so does who is barred, who trained on
      another shard than its own (wrong-standing, left-out), and whose task is done again (wrong-draw). In a job with
      privacy each update's epsilon, and the sum for each shard, follow from the shard's size (wrong-epsilon).
      A share of the step is one that the guard can give; where the model stays, so does the loss; where it moves, the
      loss is not above the guard's bound (wrong-share, wrong-loss).
    - All fields of the certificate are the record's: losses, models, table, winner (wrong-table and so on).
    - There is a certificate with all signatures for each earlier round, for the same cycle (skipped-round). The round
      has its time by this machine's clock, and so had the round before since this checker first saw its certificate
      (too-early). The rules alone would let a coordinator whose cycle took long go through many rounds at once.
    - An update that is refused for its form is refused by our own reading, for the same reason (left-out). An accepted
      one is the one committed to, and can be read (wrong-update).
    - The accepted updates, aggregated, give the next model (wrong-model) and velocity (wrong-velocity).

    What cannot be checked without held-out data, or without having been there: the losses, and so each measured
    reduction and its error, how much more an update helps on its own shard, and the share of the step; whether an
    update is a `copy`, was late or was `withheld`, and a memory `memory-withheld`; what a spot check found; in which
    order commits came; whether a miner without a commit in the record was `late`, `absent` or `worker-died` (a miner
    that committed has a receipt); whether another opening was announced before; whether a winner got its award.

    A failed check says nothing of the next one: another proposal for the slot can be true.
    """

    def __init__(
        self,
        job: TrainingJob,
        params: TrainingParams,
        node: NodeClient,
        fetch: Callable[[bytes], bytes],
        keep: Callable[[bytes], object] = lambda _data: None,
        patience: float = PATIENCE,
    ) -> None:
        self.patience = patience
        self.needed: set[bytes] = set()
        """SHA-256 of the files that the next check needs, 32 bytes each. Empty before the first successful check."""
        self._job = job
        self._params = params
        self._node = node
        self._fetch_file = fetch
        self._keep = keep
        self._coordinator = params.keys_at(params.start_height).keys[0]
        self._model: _Model | None = None
        self._flops: Sequence[int] | None = None
        self._true: tuple[bytes, bytes] | None = None  # parent block and record of the last cycle that was found true
        self._slot = b""
        self._seen: dict[int, float] = {}  # when each round of this slot was first seen, time.monotonic()

    def check(self, proposal: Proposal) -> Certificate:
        """Return a proposal's certificate if it is true.

        Raises CosignError for the first check that fails, RegtestError if the node does not answer, JobError if the
        job's model cannot be built, and StoppedError if the connection that `fetch` uses has ended.
        """
        certificate = parse_certificate(proposal.certificate, "wrong-form")
        _require("wrong-form", "number of signatures in a proposal", 0, len(certificate.coordinator_signatures))
        slot, parent = self._find_parent(certificate)
        with _renaming(_RULES):
            check_totals(certificate)
            allowed = slot.parent_time + certificate.round * self._params.round_seconds  # the round is checked below
            contextual_check_training_certificate(certificate, parent, allowed, slot.parent_time, self._params)
        records = self._read_records(certificate, parent)
        known = self._true == (certificate.prev_block, certificate.record)
        if not known:
            self._check_lineage(records, slot, parent)
            self._check_tasks(records, slot, certificate)
            self._check_scores(records)
        self._check_fields(certificate, records, slot)
        self._check_earlier(certificate, proposal.earlier, records, slot)
        if not known:
            self._check_updates(records)
        self._wait_for_round(certificate, slot)
        before, cycle = records.before, records.cycle
        self._true = certificate.prev_block, certificate.record
        self.needed = {certificate.record, cycle.parent, cycle.dataset_root, cycle.model_before, cycle.model_after}
        self.needed |= {before.velocity, cycle.velocity}
        return certificate

    # The slot, by our own node.

    def _find_parent(self, certificate: Certificate) -> tuple[Slot, Certificate | None]:
        """Return the slot after our node's tip, and the tip's certificate; None below the start height."""
        from traincert.bridge.coordinator import Slot

        parent = b2lx(certificate.prev_block)
        if not self._node.wait_for_tip(parent, self.patience):
            tip = self._node.call("getbestblockhash")
            raise CosignError("wrong-parent", f"our node's tip is {tip}, the certificate's parent is {parent}")
        header = self._node.call("getblockheader", parent)
        slot = Slot(header["height"] + 1, lx(parent), header["time"])
        _require("wrong-height", "height", slot.height, certificate.height)
        if slot.height < self._params.start_height:
            raise CosignError("wrong-height", f"certificates begin at height {self._params.start_height}")
        return slot, read_certificate(self._node, parent) if slot.height > self._params.start_height else None

    def _check_earlier(self, certificate: Certificate, earlier: Sequence[bytes], records: _Records, slot: Slot) -> None:
        """Check that each earlier round has a certificate with all signatures, for the same cycle."""
        _require("skipped-round", "number of earlier rounds' certificates", certificate.round, len(earlier))
        keys = self._params.keys_at(slot.height)
        for round_, data in enumerate(earlier):
            found = parse_certificate(data, "skipped-round")
            expected = _expected_certificate(records, slot, round_, certificate.beacon_reveal)
            if found.body() != expected.body():
                raise CosignError("skipped-round", f"round {round_}: its certificate is not of this cycle and round")
            with _renaming({"coordinator-sig": "skipped-round"}):
                check_coordinator_signatures(found, keys, self._params.chain_id)

    def _wait_for_round(self, certificate: Certificate, slot: Slot) -> None:
        """Wait until the round is allowed, and note that it and all earlier ones have been seen."""
        if slot.prev_block != self._slot:
            self._slot, self._seen = slot.prev_block, {}
        round_, seconds = certificate.round, self._params.round_seconds
        for earlier in range(round_):
            self._seen.setdefault(earlier, time.monotonic())
        until = time.monotonic() + self.patience
        while round_:
            by_clock = slot.parent_time + round_ * seconds - time.time()
            since_seen = self._seen[round_ - 1] + seconds - time.monotonic()
            left = max(by_clock, since_seen)
            if left <= 0:
                break
            if time.monotonic() + left > until:
                raise CosignError("too-early", f"round {round_} is allowed in {left:.1f} s, not now")
            time.sleep(left)
        self._seen.setdefault(round_, time.monotonic())

    # The records.

    def _read_records(self, certificate: Certificate, parent: Certificate | None) -> _Records:
        file, cycle = self._read_record(certificate.record, CycleRecord)
        if parent:
            _require("wrong-lineage", "the record's parent", parent.record, cycle.parent)
        first = cycle.cycle == 1
        before_file, before = self._read_record(cycle.parent, StartRecord if first else CycleRecord)
        return _Records((before_file, file), before, cycle)

    def _read_record(self, digest: bytes, kind: type[R]) -> tuple[Record, R]:
        try:
            return read_record(self._fetch(digest, "record"), kind)
        except CosignError:
            raise
        except BridgeError as error:
            raise CosignError("wrong-record", f"the record {digest.hex()}: {error}") from None

    def _check_lineage(self, records: _Records, slot: Slot, parent: Certificate | None) -> None:
        """Check that the cycle continues from the record before, and that from the chain."""
        before, cycle = records.before, records.cycle
        number = slot.height - self._params.start_height + 1
        _require("wrong-record", "cycle", number, cycle.cycle)
        _require("wrong-record", "cycle of the record before", number - 1, before.cycle)
        _require("wrong-record", "loss_offset", self._job.loss_offset, cycle.loss_offset)
        model = parent.model_after if parent else self._params.model
        _require("wrong-lineage", "model after the cycle before", model, before.model_after)
        if parent is None:
            _require("wrong-lineage", "tasks of record 0", [], before.tasks)
            _require("wrong-lineage", "memories of record 0", {}, before.memories)
            _require("wrong-lineage", "norms of record 0", {}, before.norms)
            _require("wrong-lineage", "standings of record 0", {}, before.standings)
            _require("wrong-lineage", "spent of record 0", {}, before.spent)
            _require("wrong-lineage", "velocity of record 0", self._built(before).no_velocity, before.velocity)
        else:
            root = _table(records.files[0]).root
            _require("wrong-lineage", "table of the record before", parent.contributions_root, root)
        _require("wrong-lineage", "model_before", before.model_after, cycle.model_before)
        _require("wrong-dataset", "dataset_root", before.dataset_root, cycle.dataset_root)
        _require("wrong-loss", "loss_before", before.loss_after, cycle.loss_before)

    def _check_tasks(self, records: _Records, slot: Slot, certificate: Certificate) -> None:
        """Check who had which task, and what each miner committed to."""
        before, cycle = records.before, records.cycle
        opening = self._read_opening(cycle.opening)
        for name, expected in {
            "job": self._job.digest(),
            "cycle": cycle.cycle - 1,
            "height": slot.height,
            "prev_block": slot.prev_block,
            "model": cycle.model_before,
            "dataset_root": cycle.dataset_root,
            "miners": sorted(set(opening.miners)),
            "memories": [before.memories.get(miner.hex()) for miner in opening.miners],
        }.items():
            _require("wrong-opening", name, expected, getattr(opening, name))
        if not opening.miners:
            raise CosignError("wrong-opening", "miners: at least one expected, found none")
        if len(opening.miners) > self._job.most_tasks:
            most = self._job.most_tasks
            raise CosignError("wrong-opening", f"miners: at most {most} expected, found {len(opening.miners)}")
        barred = {miner for miner in opening.miners if before.standing(miner).barred_until >= cycle.cycle}
        if barred and barred != set(opening.miners):
            raise CosignError("wrong-opening", f"miners: {min(barred).hex()} is barred, and others are not")
        if opening.deadline - opening.opened < self._job.task_seconds:
            allowed, found = self._job.task_seconds, opening.deadline - opening.opened
            raise CosignError("wrong-opening", f"deadline: at least {allowed:g} s after the opening, found {found} s")
        _require("left-out", "miners of the tasks", opening.miners, [task.miner for task in cycle.tasks])
        shards = self._shards(cycle)
        seed = assignment_seed(self._job.seed, slot.prev_block)
        assigned = assign(seed, opening.cycle, opening.miners, self._job.segments, len(shards))
        for given, task, memory in zip(assigned, cycle.tasks, opening.memories, strict=True):
            right = given.segment, shards[given.shard], given.seed
            if (task.segment, task.shard, task.seed) != right:
                raise CosignError("wrong-assignment", f"{task.name} has not the segment, shard and seed that follow")
            self._check_commit(cycle, task, memory)
        root = commits_root({task.miner: task.update_hash for task in cycle.tasks if task.update_hash})
        _require("wrong-score-seed", "score_seed", score_seed(certificate.beacon_reveal, root), cycle.score_seed)

    def _read_opening(self, statement: bytes) -> Opening:
        try:
            key, opening = unseal(self._params.chain_id, Opening, statement)
        except MessageError as error:
            raise CosignError("wrong-opening", str(error)) from None
        _require("wrong-opening", "its signer", self._coordinator, key)
        return opening

    def _check_commit(self, cycle: CycleRecord, task: RecordedTask, memory: bytes | None) -> None:
        """Check a task's commit. `memory` is what the opening offers its miner."""
        if task.commit is None:
            nothing: tuple[object, ...] = (memory, None, None, None, 0, "", None, False)
            found = (
                task.memory,
                task.memory_after,
                task.noise,
                task.update_hash,
                task.update_size,
                task.numeric_class,
                task.place,
                task.late,
            )
            _require("forged-commit", f"{task.name} without a commit", nothing, found)
            if task.refusal not in _WITHOUT_COMMIT:
                raise CosignError("left-out", f"{task.name} has no commit, but is {task.refusal or 'accepted'}")
            return
        try:
            key, message = unseal(self._params.chain_id, CommitMessage, task.commit)
        except MessageError as error:
            raise CosignError("forged-commit", f"{task.name}: {error}") from None
        _require("forged-commit", f"{task.name}: the signer", task.miner, key)
        opening = hashlib.sha256(cycle.opening).digest()
        _require("forged-commit", f"{task.name}: opening", opening, message.opening)
        for name, value in {
            "update_hash": task.update_hash,
            "update_size": task.update_size,
            "memory_before": task.memory,
            "memory_after": task.memory_after,
            "noise": task.noise,
            "numeric_class": task.numeric_class,
        }.items():
            _require("forged-commit", f"{task.name}: {name}", getattr(message, name), value)
        _require("forged-commit", f"{task.name}: it has noise", bool(self._job.privacy), task.noise is not None)
        if task.refusal in _WITHOUT_COMMIT:
            raise CosignError("left-out", f"{task.name} has a commit, but is {task.refusal}")
        # A miner that lost its memory has none. Any other one could be made up.
        wrong = task.memory not in (None, memory)
        earlier = task.refusal in _BEFORE_READING - {Reason.WRONG_MEMORY}
        if wrong != (task.refusal is Reason.WRONG_MEMORY) and not earlier:
            raise CosignError(
                "left-out", f"{task.name}: memory {_shown(task.memory)} of {_shown(memory)}, refused as {task.refusal}"
            )
        if task.refusal is Reason.IMPOSSIBLE_RESOURCES:
            flops = self._task_flops(cycle)[task.segment]
            if not impossible(flops, message.resources):
                raise CosignError("left-out", f"{task.name}: what it used is possible, but is refused as impossible")

    def _check_scores(self, records: _Records) -> None:
        """Check all that counts of the measurements, and what follows from it without held-out data."""
        before, cycle = records.before, records.cycle
        failed = self._check_spot_checks(before, cycle)
        for task in cycle.tasks:
            _require(
                "wrong-params", f"{task.name}: params", self._built(cycle).segments[task.segment].params, task.params
            )
            if (task.refusal is None) != (task.detail is None):
                raise CosignError("wrong-record", f"{task.name}: a refusal has a detail, and nothing else has one")
            barred = before.standing(task.miner).barred_until >= cycle.cycle
            outcast = Reason.SPOT_CHECK_FAILED if task.miner in failed else Reason.BARRED if barred else None
            if task.commit and (outcast or task.refusal in {Reason.SPOT_CHECK_FAILED, Reason.BARRED}):
                _require("left-out", f"{task.name}: why its update is not read", outcast, task.refusal)
            self._check_score(task, cycle)
        self._check_norms(before, cycle)
        self._check_standings(before, cycle)
        self._check_epsilons(before, cycle)
        if cycle.share not in _SHARES or (cycle.share and not cycle.accepted):
            raise CosignError("wrong-share", f"share {cycle.share:g} with {len(cycle.accepted)} accepted updates")
        moved = {task.miner.hex(): task.memory_after for task in cycle.accepted if task.memory_after and cycle.share}
        memories = {key: each for key, each in {**before.memories, **moved}.items() if bytes.fromhex(key) not in failed}
        _require("wrong-memories", "memories", memories, cycle.memories)
        if not cycle.share:
            _require("wrong-loss", "loss_after of an unchanged model", cycle.loss_before, cycle.loss_after)
        elif cycle.loss_after > (most := cycle.loss_before * (1 + self._job.guard)):
            raise CosignError("wrong-loss", f"loss_after: the guard allows {most:.0f}, found {cycle.loss_after}")

    def _check_score(self, task: RecordedTask, cycle: CycleRecord) -> None:
        """Check that a task's weight is what its measured score pays."""
        measured = task.refusal in {None, Reason.NO_IMPROVEMENT, Reason.MEMORY_WITHHELD}
        _require("wrong-score", f"{task.name} was measured", measured, task.score is not None)
        counts = (0, 0)
        if score := task.score:
            if abs(score.reduction) >= 2**63 or not 0 <= score.error < 2**63:
                raise CosignError("wrong-score", f"{task.name}: its reduction or its error is no loss")
            shares = {"noise_margin": self._job.noise_margin, "late_share": self._job.late_share}
            expected = paid(task.params, score.reduction, score.error, **shares, late=task.late)
            _require("wrong-weight", f"{task.name}: what counts", expected, score)
            good = task.refusal is not Reason.NO_IMPROVEMENT
            _require("left-out", f"{task.name} takes enough off the loss", score.weight > 0, good)
            # Scored on all validation examples, no update takes off more than all of their loss.
            if not self._job.score_examples and score.reduction > cycle.loss_before:
                what = f"a loss of {cycle.loss_before} nano-nats cannot fall by {score.reduction}"
                raise CosignError("wrong-score", f"{task.name}: {what}")
            if task.refusal is None:
                counts = score.loss_reduction, score.weight
        _require("wrong-weight", f"{task.name}: loss_reduction, weight", counts, (task.loss_reduction, task.weight))

    def _check_norms(self, before: StartRecord, cycle: CycleRecord) -> None:
        """Check what each update was scaled by. The norms themselves are checked with the files."""
        for task in cycle.tasks:
            read = task.refusal is None or task.refusal in _AFTER_READING
            _require("wrong-norm", f"{task.name}: its update was read", read, task.norm is not None)
        valid = [(task, task.norm) for task in cycle.tasks if task.norm is not None]
        last = {int(segment): norm for segment, norm in before.norms.items()}
        scales, usual = limit_norms([task.segment for task, _ in valid], [norm for _, norm in valid], last)
        by_miner = {task.miner: scale for (task, _), scale in zip(valid, scales, strict=True)}
        for task in cycle.tasks:
            _require("wrong-norm", f"{task.name}: scale", by_miner.get(task.miner, 1.0), task.scale)
        _require("wrong-norm", "norms", {str(segment): norm for segment, norm in usual.items()}, cycle.norms)

    def _check_standings(self, before: StartRecord, cycle: CycleRecord) -> None:
        """Check that the miners' standings follow, and who is refused because of them."""
        measured = before.by_miner
        for task in cycle.tasks:
            if task.own_shard is not None:
                if task.norm is None or task.refusal is Reason.COPY or not self._job.shard_examples:
                    raise CosignError("wrong-standing", f"{task.name}: its own shard was not measured")
                measured[task.miner] = measured.get(task.miner, Standing()).measured(task.own_shard)
        evidence = {
            task.miner: measured[task.miner].own_shard or 0.0 for task in cycle.tasks if task.own_shard is not None
        }
        refused = [task.miner for task in cycle.tasks if task.refusal is Reason.NOT_ITS_SHARD]
        _require("left-out", "not on their own shards", sorted(foreign(evidence, self._job.shard_margin)), refused)
        good = [task.miner for task in cycle.tasks if task.refusal in {None, Reason.MEMORY_WITHHELD}]
        passed = {check.miner: not check.failure for check in cycle.spot_checks}
        proven = [miner for miner, has_passed in passed.items() if has_passed]
        drawn = draw_checks(cycle.score_seed, good, measured, self._job.spot_checks, proven)
        without = [task.miner for task in cycle.tasks if task.refusal is Reason.MEMORY_WITHHELD]
        found = [task.miner for task in cycle.tasks if task.drawn != (task.miner in without)]
        _require("wrong-draw", "tasks that are done again", drawn, found)
        expected = next_standings(
            measured,
            steady={
                task.miner: task.commit is not None and task.refusal not in {Reason.WITHHELD, Reason.MEMORY_WITHHELD}
                for task in cycle.tasks
            },
            unproven=without,
            passed=passed,
            barred_until=cycle.cycle + self._job.penalty_cycles,
        )
        _require("wrong-standing", "standings", expected, cycle.by_miner)

    def _check_epsilons(self, before: StartRecord, cycle: CycleRecord) -> None:
        """Check what the tasks have cost the examples of their shards."""
        tasks = {f"epsilon of {task.name}": task.epsilon for task in cycle.tasks}
        found = tasks | {f"epsilon of shard {shard}": each.epsilon for shard, each in cycle.spent.items()}
        counts = {shard: each.tasks for shard, each in cycle.spent.items()}
        expected: dict[str, float | None] = dict.fromkeys(tasks)
        expected_counts: dict[str, int] = {}
        if self._job.privacy:
            sizes = dict(self._sizes(cycle))
            known = {shard.hex() for shard in sizes}
            if any(shard not in known or not 0 <= each.tasks < 2**32 for shard, each in before.spent.items()):
                raise CosignError("wrong-epsilon", "the record before says what cannot be of its shards")
            done = [task for task in cycle.tasks if task.update_hash]
            expected |= {f"epsilon of {task.name}": epsilon(self._job, sizes[task.shard], 1) for task in done}
            spent = {bytes.fromhex(shard): each for shard, each in before.spent.items()}
            for shard, each in spent_after(self._job, sizes, spent, [task.shard for task in done]).items():
                expected_counts[shard.hex()] = each.tasks
                expected[f"epsilon of shard {shard.hex()}"] = each.epsilon
        _require("wrong-epsilon", "tasks of each shard", expected_counts, counts)
        for what, value in expected.items():
            given = found[what]
            if given is None or value is None or abs(given - value) > _EPSILON_TOLERANCE * value:
                _require("wrong-epsilon", what, value, given)

    def _check_spot_checks(self, before: StartRecord, cycle: CycleRecord) -> set[bytes]:
        """Check the form of what came of the tasks that were done again. Return the miners that failed."""
        drawn = {task.miner: task.update_hash for task in before.tasks if task.drawn}
        found = [(check.miner, check.committed) for check in cycle.spot_checks]
        _require("wrong-draw", "spot checks", sorted(drawn.items()), found)
        for check in cycle.spot_checks:
            near = check.distance is not None and check.distance <= self._job.spot_tolerance
            if not check.failure and not near and check.found != check.committed:
                raise CosignError("wrong-draw", f"miner {check.miner.hex()[:16]} has passed a spot check that differs")
        return {check.miner for check in cycle.spot_checks if check.failure}

    def _check_fields(self, certificate: Certificate, records: _Records, slot: Slot) -> None:
        """Check each field of the certificate against the records."""
        expected = _expected_certificate(records, slot, certificate.round, certificate.beacon_reveal)
        for name, wrong in _FIELDS.items():
            _require(wrong, name, getattr(expected, name), getattr(certificate, name))
        _require("wrong-form", "body", expected.body(), certificate.body())

    # The files.

    def _check_updates(self, records: _Records) -> None:
        """Check refusals for an update's form, and the next model and velocity."""
        before, cycle = records.before, records.cycle
        built = self._built(cycle)
        state: State | None = None
        accepted: list[Accepted] = []
        for task in cycle.tasks:
            if task.update_hash is None or task.refusal in _BEFORE_READING:
                continue
            if state is None:
                state = built.read_state(self._fetch(cycle.model_before, "model"))
            data = self._fetch(task.update_hash, f"update of {task.name}")
            _require("wrong-update", f"{task.name}: size of the update", task.update_size, len(data))
            if each := built.read_task(task, data, state):
                accepted.append(each)
        model_after, velocity_after = cycle.model_before, before.velocity
        if accepted and state is not None:
            if cycle.share:
                velocity = (
                    built.zeros()
                    if before.velocity == built.no_velocity
                    else built.read_velocity(self._fetch(before.velocity, "velocity"))
                )
                files = built.aggregated(state, velocity, accepted, cycle.share)
                for data in files:
                    self._keep(data)
                model_after, velocity_after = (hashlib.sha256(data).digest() for data in files)
            else:
                velocity_after = built.no_velocity
        _require("wrong-model", "model_after", model_after, cycle.model_after)
        _require("wrong-velocity", "velocity", velocity_after, cycle.velocity)

    def _shards(self, cycle: StartRecord) -> list[bytes]:
        """Return the shards' hashes, from the manifest of the data."""
        return [shard for shard, _ in self._sizes(cycle)]

    def _sizes(self, cycle: StartRecord) -> list[tuple[bytes, int]]:
        """Return the shards' hashes and numbers of examples, from the manifest of the data."""
        data = self._fetch(cycle.dataset_root, "manifest")
        try:
            manifest = json.loads(data)
            shards = [bytes.fromhex(each) for each in manifest["shards"]]
            sizes = list(zip(shards, map(operator.index, manifest["sizes"]), strict=True))
        except (ValueError, KeyError, TypeError):
            raise CosignError("wrong-dataset", f"the manifest {cycle.dataset_root.hex()} lists no shards") from None
        if min((size for _, size in sizes), default=0) < 1:
            raise CosignError("wrong-dataset", f"the manifest {cycle.dataset_root.hex()} has a shard without examples")
        _require("wrong-dataset", "number of shards", self._job.shards, len(shards))
        return sizes

    def _built(self, cycle: StartRecord) -> _Model:
        """Return the job's model, built once."""
        if self._model is None:
            shard = b""
            if self._job.balance == "flops":
                shard = self._fetch(self._shards(cycle)[0], "shard, by whose shapes the model is cut,")
            self._model = _Model(self._job, shard)
        return self._model

    def _task_flops(self, cycle: CycleRecord) -> Sequence[int]:
        """Return how many floating-point operations a task of each segment needs at least. They are counted once."""
        if self._flops is None:
            sizes = self._sizes(cycle)
            shard = self._fetch(sizes[0][0], "shard, by whose shapes operations are counted,")
            self._flops = self._built(cycle).task_flops(shard, min(size for _, size in sizes))
        return self._flops

    def _fetch(self, digest: bytes, what: str) -> bytes:
        try:
            data = self._fetch_file(digest)
        except StoppedError:
            raise
        except (EngineError, IntegrityError) as error:
            raise CosignError("missing-file", f"the {what} {digest.hex()} does not come: {error}") from None
        if hashlib.sha256(data).digest() != digest:
            raise CosignError("missing-file", f"the {what} {digest.hex()} does not come: it has another SHA-256")
        return data


class _Model:
    """A job's model, as far as an aggregate needs it. `shard` is the file of a shard, or empty bytes."""

    def __init__(self, job: TrainingJob, shard: bytes) -> None:
        from traincert.trainer.models import build_model
        from traincert.trainer.segments import Layout, cut_segments
        from traincert.trainer.state import state_hash, state_of

        self._job = job
        model = build_model(job)
        self._layout: Layout = Layout(model)
        self._shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in state_of(model).items()}
        with self._examples(shard) as examples:
            self.segments: tuple[Segment, ...] = cut_segments(build_model(job), job, examples)
        self.no_velocity: bytes = state_hash({"velocity": self.zeros()})
        """SHA-256 of the velocity of a model that rests."""

    @contextmanager
    def _examples(self, shard: bytes) -> Iterator[Examples | None]:
        """Read a shard's file; None for empty bytes."""
        from traincert.trainer.examples import read_examples

        with TemporaryDirectory() as folder:
            yield read_examples(self._job, Path(folder), write_blob(Path(folder), shard)) if shard else None

    def task_flops(self, shard: bytes, fewest: int) -> Sequence[int]:
        """Return what segments.count_task_flops does. `shard` is the file of a shard."""
        from traincert.trainer.models import build_model
        from traincert.trainer.segments import count_task_flops

        with self._examples(shard) as examples:
            assert examples is not None  # noqa: S101 - the file is not empty
            return count_task_flops(build_model(self._job), self._job, self.segments, examples, fewest)

    def zeros(self) -> torch.Tensor:
        """Return the velocity of a model that rests."""
        import torch

        return torch.zeros(self._layout.params)

    def read_state(self, data: bytes) -> State:
        """Read a model's file. Raises CosignError if it is none of the job's model."""
        return self._read(data, self._shapes, "wrong-model")

    def read_velocity(self, data: bytes) -> torch.Tensor:
        """Read a velocity's file. Raises CosignError if it is none of the job's model."""
        zeros = self.zeros()
        return self._read(data, {"velocity": (zeros.dtype, zeros.shape)}, "wrong-velocity")["velocity"]

    def read_task(self, task: RecordedTask, data: bytes, state: State) -> Accepted | None:
        """Read a task's update. Return None if it is rightly refused; raise CosignError if it is wrongly judged."""
        from traincert.trainer.aggregation import Accepted
        from traincert.trainer.scoring import Contribution
        from traincert.trainer.updates import UpdateError, l2_norm, read_update

        segment = self.segments[task.segment]
        try:
            update = read_update(data, self._job, segment, state)
        except UpdateError as error:
            if task.refusal is None:
                raise CosignError("wrong-update", f"{task.name} is accepted, but its update is {error}") from None
            _require("left-out", f"{task.name}: why the update is refused", error.reason, task.refusal)
            return None
        if task.refusal is not None and task.refusal not in _AFTER_READING:
            raise CosignError("left-out", f"{task.name} is refused as {task.refusal}, but its update has no such fault")
        norm = l2_norm(update.move)
        if task.norm is None or abs(norm - task.norm) > _NORM_TOLERANCE * norm:
            raise CosignError("wrong-norm", f"{task.name}: norm: expected {norm:g}, found {task.norm}")
        if task.refusal is not None:
            return None
        digest = hashlib.sha256(data).digest()
        contribution = Contribution(task.miner, digest, task.params, task.loss_reduction, task.weight)
        return Accepted(contribution, segment, update.scaled(task.scale) if task.scale < 1 else update)

    def aggregated(
        self, state: State, velocity: torch.Tensor, accepted: Sequence[Accepted], share: float
    ) -> tuple[bytes, bytes]:
        """Return the files of the next model and the next velocity."""
        from traincert.trainer.aggregation import aggregate
        from traincert.trainer.state import state_bytes

        model, moving, _ = aggregate(self._job, self._layout, state, velocity, accepted, share=share)
        return state_bytes(model), state_bytes({"velocity": moving})

    def _read(self, data: bytes, expected: Mapping[str, object], wrong: str) -> State:
        from safetensors import SafetensorError

        from traincert.trainer.state import state_from_bytes

        try:
            state = state_from_bytes(data)
        except SafetensorError as error:
            raise CosignError(wrong, f"a file of tensors cannot be read: {error}") from None
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()}
        _require(wrong, "tensors of a file", expected, found)
        return state


def _expected_certificate(records: _Records, slot: Slot, round_: int, beacon_reveal: bytes) -> Certificate:
    from traincert.bridge.coordinator import certificate_of

    with _renaming({}, otherwise="wrong-table"):
        return certificate_of(records.files, slot, round_, beacon_reveal)


def _table(record: Record) -> Any:
    from traincert.bridge.coordinator import contribution_table

    with _renaming({}, otherwise="wrong-table"):
        return contribution_table(record)


def parse_certificate(data: bytes, wrong: str) -> Certificate:
    """Return the certificate that some bytes are. Raises CosignError, named `wrong`, if they are none."""
    reader = Reader(data)
    with _renaming({}, otherwise=wrong):
        certificate = Certificate.read(reader)
    _require(wrong, "bytes after a certificate", 0, reader.left())
    return certificate


@contextmanager
def _renaming(names: Mapping[str, str], otherwise: str = "") -> Iterator[None]:
    """Turn a CertificateError into a CosignError, by the reason without bad-traincert-."""
    try:
        yield
    except CertificateError as error:
        reason = error.reason.removeprefix("bad-traincert-")
        raise CosignError(names.get(reason, otherwise or f"wrong-{reason}"), str(error)) from None


def _require(name: str, what: str, expected: object, found: object) -> None:
    """Raise CosignError unless both are equal."""
    if found != expected:
        raise CosignError(name, f"{what}: expected {_shown(expected)}, found {_shown(found)}")


def _shown(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
