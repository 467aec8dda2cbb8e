"""Do drawn tasks again and compare: who did not do its task is found out.

A cycle's tasks are drawn when its commits are in. They are done again while the miners train the next cycle, so that
nobody waits. What comes of it is in that cycle's record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from traincert.trainer.determinism import numeric_class
from traincert.trainer.engines.executor import Executor
from traincert.trainer.engines.orders import Order
from traincert.trainer.errors import EngineError, IntegrityError
from traincert.trainer.examples import Dataset
from traincert.trainer.job import TrainingJob
from traincert.trainer.segments import Segment
from traincert.trainer.state import State, load_state
from traincert.trainer.store import read_blob
from traincert.trainer.updates import UpdateError, read_update


class Drawn(NamedTuple):
    """A task that is to be done again: what its miner was given, and what it committed to. Hashes are 32 raw bytes."""

    order: Order  # with the memory that the miner began with, and the secret of its noise
    update_hash: bytes
    memory_after: bytes | None
    numeric_class: str


class SpotCheck(NamedTuple):
    """What came of doing a task again."""

    miner: bytes
    committed: bytes  # SHA-256 of the update that the miner committed to
    found: bytes  # SHA-256 of the update that we found
    distance: float | None  # L2 distance of both, as a share of the norm of ours; None: the classes are the same
    failure: str  # what is wrong, as a sentence; empty: nothing is

    @property
    def passed(self) -> bool:
        """Whether the miner did the task as it must be done."""
        return not self.failure


class TaskChecker:
    """Does tasks again. `shards` is the folder of shards, `store` that of models, updates and memories."""

    def __init__(self, job: TrainingJob, shards: Path, store: Path, segments: Sequence[Segment]) -> None:
        self._job = job
        self._shards = shards
        self._store = store
        self._segments = segments
        self._executor: Executor | None = None

    def check(self, drawn: Drawn) -> SpotCheck:
        """Do a task again. Raises IntegrityError if a file that is ours is missing or damaged."""
        order, miner = drawn.order, drawn.order.task.miner
        ours = numeric_class(self._job.device)
        if self._executor is None:
            self._executor = Executor(self._job, self._store)
        try:
            answer = self._executor.execute(self._shards, order, self._on_step)
        except (OSError, MemoryError, torch.OutOfMemoryError, IntegrityError, EngineError):
            raise
        except Exception as error:
            if order.memory_hash is None and order.noise_hash is None:
                raise
            # A memory can be any bytes that the miner has chosen. It must not end the program of who checks.
            failure = f"the task cannot be done with what its miner sent: {ascii(str(error))[:200]}"
            return SpotCheck(miner, drawn.update_hash, b"", None, failure)
        found = hashlib.sha256(answer.update).digest()
        if drawn.numeric_class == ours:
            failure = ""
            if found != drawn.update_hash:
                failure = f"the update is {found.hex()}, committed was {drawn.update_hash.hex()}"
            elif answer.memory_after != drawn.memory_after:
                failure = "the update is right, the new memory is not"
            return SpotCheck(miner, drawn.update_hash, found, None, failure)
        distance = self._distance(drawn, answer.update, answer.memory_after)
        most = self._job.spot_tolerance
        failure = f"the update is {distance:.3g} away from ours, at most {most:g} is allowed" if distance > most else ""
        return SpotCheck(miner, drawn.update_hash, found, distance, failure)

    def _on_step(self) -> None:
        """Is called before each step of a task."""

    def _distance(self, drawn: Drawn, ours: bytes, memory: bytes | None) -> float:
        """Return the distance of the updates or of the memories, whichever is greater."""
        job, segment = self._job, self._segments[drawn.order.task.segment]
        model = load_state(self._store, drawn.order.model_hash)
        update = read_update(ours, job, segment, model).move
        try:
            theirs = read_update(read_blob(self._store, drawn.update_hash), job, segment, model).move
        except UpdateError:
            return float("inf")
        distance = _relative({"": theirs}, {"": update})
        if (memory is None) != (drawn.memory_after is None):
            return float("inf")
        if memory and drawn.memory_after:
            try:
                state = load_state(self._store, drawn.memory_after)
            except SafetensorError:
                return float("inf")
            distance = max(distance, _relative(state, load_state(self._store, memory)))
        return distance


class SpotChecker(TaskChecker):
    """Does tasks again, in a thread of its own. Call `close` at the end."""

    def __init__(self, dataset: Dataset, store: Path, segments: Sequence[Segment]) -> None:
        super().__init__(dataset.job, dataset.shard_folder, store, segments)
        self._closed = Event()
        self._thread: Thread | None = None

    def begin(self, drawn: Sequence[Drawn]) -> Future[list[SpotCheck]]:
        """Begin to do tasks again."""
        future: Future[list[SpotCheck]] = Future()

        def work() -> None:
            try:
                future.set_result([self.check(each) for each in drawn])
            except BaseException as error:
                future.set_exception(error)

        if drawn:
            self._thread = Thread(target=work, name="spot-checks", daemon=True)
            self._thread.start()
        else:
            future.set_result([])
        return future

    def close(self) -> None:
        """End the task that is being done again, after its step: a thread in torch would crash Python at its end."""
        self._closed.set()
        if self._thread:
            self._thread.join()

    def _on_step(self) -> None:
        if self._closed.is_set():
            raise EngineError("the spot checker is closed")


def memories_of(drawn: Drawn, ours: str) -> list[bytes]:
    """Return the files that a miner has to send for a check on a machine of the class `ours`.

    These are memories, and the secret of the task's noise.
    """
    memories = [drawn.order.memory_hash, drawn.order.noise_hash]
    if drawn.numeric_class != ours:  # equal hashes cannot be expected: they are compared by distance
        memories.append(drawn.memory_after)
    return [digest for digest in memories if digest]


def _relative(theirs: State, ours: State) -> float:
    """Return the L2 distance of two states, as a share of the second one's norm; infinite if they differ in form."""
    if {name: each.shape for name, each in theirs.items()} != {name: each.shape for name, each in ours.items()}:
        return float("inf")
    square = sum(float(((theirs[name].double() - each.double()) ** 2).sum()) for name, each in ours.items())
    norm = sum(float((each.double() ** 2).sum()) for each in ours.values())
    share = (square / norm) ** 0.5 if norm else float(square > 0)
    return share if torch.isfinite(torch.tensor(share)) else float("inf")
