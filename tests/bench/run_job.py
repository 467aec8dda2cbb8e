"""Runs a job's cycles and prints JSON: where the time went, how much memory there was, and what came of it.

tests/bench/run_job.py JOB.toml FOLDER [--miners N] [--workers N]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.store import prune

WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--miners", type=int, default=4)
    parser.add_argument("--workers", type=int, default=WORKERS)
    arguments = parser.parse_args()
    job = TrainingJob.load(arguments.job)
    dataset = prepare_dataset(job, arguments.folder / "data")
    miners = [number.to_bytes(32, "big") for number in range(arguments.miners)]
    workers: int = arguments.workers
    with LocalEngine(job, arguments.folder / "store", workers=workers) as engine, Trainer(dataset, engine) as trainer:
        state = trainer.start()
        seconds = training = 0.0
        size = values = accepted = 0
        for number in range(job.cycles):
            begin = time.perf_counter()
            seed = (job.seed << 32 | number).to_bytes(8, "big")  # other tasks for other seeds, too
            result = trainer.run_cycle(state, miners, seed=seed)
            elapsed = time.perf_counter() - begin
            state = result.after
            prune(engine.store, [state.model_hash, *state.memories.values()])
            size += sum(task.commit.update_size for task in result.tasks if task.commit)
            values += sum(task.params for task in result.tasks)
            accepted += len(result.contributions)
            if number:  # in the first one, the workers are still starting
                seconds += elapsed
                training += result.training_seconds / workers
        memory = sum(_peak_memory(pid) for pid in [os.getpid(), *engine.pids])
        tested = trainer.test(state.model)
    samples = (job.cycles - 1) * arguments.miners * job.local_steps * job.batch_size
    print(
        json.dumps(
            {
                "samples_per_second": samples / seconds,
                "outside_training": 1 - training / seconds,
                "overhead_per_task": (seconds - training) / ((job.cycles - 1) * arguments.miners),
                "gigabytes": memory / 1e9,
                "times_smaller": 4 * values / size,
                "accepted": accepted / (job.cycles * arguments.miners),
                "test_loss": tested.loss / 1e9,
                "test_metric": tested.metric,
            }
        )
    )


def _peak_memory(pid: int) -> int:
    """Return the most that a process has had resident, bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    main()
