"""Do a run's tasks again, from its records and its store, and compare the updates."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from traincert.trainer.engines.executor import Executor
from traincert.trainer.errors import RunError
from traincert.trainer.records import RunFolder, recorded_order


@dataclass(frozen=True)
class Replayed:
    """A task that was done again. The miner's id and the hashes are in hex."""

    cycle: int
    """Counted from 1, as in the records."""
    miner: str
    recorded: str
    """SHA-256 of the update in the record."""
    found: str
    """SHA-256 of the update that the replay gave; empty if only the miner has what the task needs: memory, secret."""

    @property
    def same(self) -> bool:
        """Whether the replay gave the same update."""
        return self.recorded == self.found


def replay_tasks(run: RunFolder, cycle: int | None = None) -> Iterator[Replayed]:
    """Do the tasks of one cycle again. `cycle` counts from 1; None: all cycles that the store still has.

    A task that gave no update is left out.

    Raises RunError if the run has no such cycle or its store no longer has the cycle's files, IntegrityError if a file
    is missing or damaged, and JobError if this machine does not have the job's device.
    """
    if cycle is not None and not 1 <= cycle <= run.cycles:
        raise RunError(f"{run.folder} has no cycle {cycle}; it has 1 to {run.cycles}")
    first = max(1, run.cycles + 1 - run.job.history)
    if cycle is not None and cycle < first:
        raise RunError(f"the store has the models of cycles {first} to {run.cycles} only: history = {run.job.history}")
    dataset = run.dataset()
    executor = Executor(run.job, run.store)
    for number in [cycle] if cycle else range(first, run.cycles + 1):
        record = run.records[number]
        for task in record["tasks"]:
            if task["update_hash"] is None:
                continue  # the task gave no update
            order = recorded_order(record, task, dataset.shards.index(bytes.fromhex(task["shard"])))
            needed = [digest for digest in (order.memory_hash, order.noise_hash) if digest]
            if not all((run.store / digest.hex()).exists() for digest in needed):
                yield Replayed(number, task["miner"], task["update_hash"], "")
                continue
            found = hashlib.sha256(executor.execute(dataset.shard_folder, order).update).hexdigest()
            yield Replayed(number, task["miner"], task["update_hash"], found)
