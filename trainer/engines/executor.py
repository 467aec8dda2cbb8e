"""Carry out one order. All engines and the replay share this code."""

import secrets
import time
from collections.abc import Callable
from pathlib import Path

from traincert.trainer.determinism import numeric_class
from traincert.trainer.engines.orders import Answer, Order
from traincert.trainer.examples import Examples, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.privacy import SECRET_BYTES
from traincert.trainer.segments import Segment, cut_segments
from traincert.trainer.state import State, load_state, save_state
from traincert.trainer.store import read_blob, write_blob
from traincert.trainer.training import check_device, train_task


class Executor:
    """Carries out orders: reads the files, trains, and stores the miner's memory and the secret of its noise."""

    def __init__(self, job: TrainingJob, store: Path) -> None:
        """Check the job's device. `store` is the folder of models and memories.

        Raises JobError if this machine does not have the device.
        """
        check_device(job)
        self._job = job
        self._store = store
        self._model: bytes = b""
        self._state: State = {}
        self._shards: dict[bytes, Examples] = {}  # memory-mapped
        self._segments: tuple[Segment, ...] = ()

    def execute(self, shards: Path, order: Order, on_step: Callable[[], None] = lambda: None) -> Answer:
        """Do the order's task. `shards` is the folder of the shards; `on_step` is as in `training.train_task`.

        A shard's hash is checked at its first use only.

        Raises IntegrityError if a file is missing or damaged, and ValueError if `order.noise_hash` is no secret's.
        """
        if order.model_hash != self._model:
            self._model, self._state = order.model_hash, load_state(self._store, order.model_hash)
        if order.shard_hash not in self._shards:
            self._shards[order.shard_hash] = read_examples(self._job, shards, order.shard_hash)
        shard = self._shards[order.shard_hash]
        if not self._segments:  # they depend on the shapes of examples, which are the same in all shards
            self._segments = cut_segments(build_model(self._job), self._job, shard)
        memory = load_state(self._store, order.memory_hash) if order.memory_hash else {}
        secret, noise_hash = self._secret(order)
        begin = time.perf_counter()
        trained = train_task(
            self._job, self._state, self._segments[order.task.segment], shard, order.task, memory, on_step, secret
        )
        seconds = time.perf_counter() - begin
        kept = save_state(self._store, trained.memory) if trained.memory else None
        return Answer(trained.update, order.memory_hash, kept, seconds, numeric_class(self._job.device), noise_hash)

    def _secret(self, order: Order) -> tuple[bytes, bytes | None]:
        """Return the secret of the task's noise, and its hash. A new one is drawn for each task, and stored."""
        if not self._job.privacy:
            return b"", None
        if order.noise_hash is None:
            secret = secrets.token_bytes(SECRET_BYTES)
            return secret, write_blob(self._store, secret)
        secret = read_blob(self._store, order.noise_hash)
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"the secret of its noise has {len(secret)} bytes")
        return secret, order.noise_hash
