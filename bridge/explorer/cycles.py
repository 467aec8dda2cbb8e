"""The records of a run folder, as far as they belong to the blocks of a chain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.errors import BridgeError
from traincert.bridge.messages import CommitMessage, Opening, message_json, unseal_unchecked
from traincert.bridge.recorded import CycleRecord, RecordedTask, read_record


@dataclass(frozen=True)
class CycleFacts:
    """What is kept of a cycle: the metric on the validation examples, the loss without its offset, and its tasks."""

    metric: float | None
    loss: float
    tasks: Sequence[RecordedTask]

    @property
    def refusals(self) -> dict[str, int]:
        """How many updates were refused, by reason."""
        reasons = [str(task.refusal) for task in self.tasks if task.refusal]
        return {reason: reasons.count(reason) for reason in sorted(set(reasons))}

    @property
    def leaves(self) -> list[RecordedTask]:
        """The tasks that are in the table, in its order."""
        counted = [task for task in self.tasks if task.weight and task.update_hash]
        return sorted(counted, key=lambda task: (task.miner, task.update_hash))


class Cycles:
    """Reads records. Each is taken only if it is the one that a certificate names by its SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[bytes, CycleFacts] = {}  # by the record's SHA-256

    def path(self, cycle: int) -> Path:
        """Return the file of a cycle's record. Cycles count from 1."""
        return self.folder / "cycles" / f"{cycle:08}.json"

    def facts(self, certificate: Certificate, cycle: int) -> CycleFacts | None:
        """Return what is known of the cycle that a certificate closes; None: its record is not here."""
        if certificate.record not in self._kept:
            data = self.read(cycle)
            if data is None or hashlib.sha256(data).digest() != certificate.record:
                return None
            try:
                file, record = read_record(data, CycleRecord)
            except BridgeError:  # of another version
                return None
            loss = record.loss_after / 1e9 - record.loss_offset
            self._kept[certificate.record] = CycleFacts(file["metric"], loss, record.tasks)
        return self._kept[certificate.record]

    def read(self, cycle: int) -> bytes | None:
        """Return the bytes of a cycle's record, or None if it is not here."""
        try:
            return self.path(cycle).read_bytes()
        except OSError:
            return None


def shown_record(data: bytes) -> dict[str, Any]:
    """Return a record as JSON, with the opening and each task's commit, which are signed bytes, as JSON too.

    Raises BridgeError if it is none.
    """
    file, record = read_record(data, CycleRecord)
    file["opening"] = message_json(unseal_unchecked(Opening, record.opening)[1])
    for shown, task in zip(file["tasks"], record.tasks, strict=True):
        shown["commit"] = message_json(unseal_unchecked(CommitMessage, task.commit)[1]) if task.commit else None
    return file


def leaf_json(task: RecordedTask) -> Mapping[str, Any]:
    """Return a leaf of the table with the names of gettrainingcertificate."""
    names = ("miner", "update_hash", "params", "loss_reduction", "weight")
    shown = json.loads(json.dumps({name: getattr(task, name) for name in names}, default=bytes.hex))
    return {"miner_key": shown.pop("miner"), **shown}
