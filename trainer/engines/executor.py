"""Carries out one order; the same code for every engine, and for a replay."""

import time
from pathlib import Path

from traincert.trainer.engines.orders import Answer, Order
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import Examples, read_examples
from traincert.trainer.state import State, load_state, save_state
from traincert.trainer.training import check_device, train_task


class Executor:
    """Carries out orders: reads what they name, trains, and stores what the miner keeps."""

    def __init__(self, job: TrainingJob, store: Path) -> None:
        """Prepare for orders. Raises JobError if this machine does not have the job's device."""
        check_device(job)
        self._job = job
        self._store = store
        self._model: bytes = b""
        self._state: State = {}
        self._shards: dict[bytes, Examples] = {}  # memory-mapped

    def execute(self, shards: Path, order: Order) -> Answer:
        """Train, and return the update; each shard is checked against its hash when it is first used.

        Raises IntegrityError if a file is missing or damaged.
        """
        if order.model_hash != self._model:
            self._model, self._state = order.model_hash, load_state(self._store, order.model_hash)
        if order.shard_hash not in self._shards:
            self._shards[order.shard_hash] = read_examples(self._job, shards, order.shard_hash)
        memory = load_state(self._store, order.memory_hash) if order.memory_hash else {}
        begin = time.perf_counter()
        trained = train_task(self._job, self._state, order.segment, self._shards[order.shard_hash], order.task, memory)
        seconds = time.perf_counter() - begin
        kept = save_state(self._store, trained.memory) if trained.memory else None
        return Answer(trained.update, kept, seconds)
