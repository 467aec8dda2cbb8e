"""What it costs that the kernel watches a task: seconds with a monitor divided by seconds without one.

    tests/bench/monitoring.py [--turns N] [--steps N]

does tasks of the job `fashion` in one worker process, with and without a monitor in turns, as root, and prints the
median of the pairs' ratios, and between which ratios the middle half of them is. A pair's second task has no memory of
its first. The processor time that bpftrace itself uses is given, too: on a busy machine tasks pay for it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil

from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Commit, Order
from traincert.trainer.job import TrainingJob
from traincert.trainer.monitoring import Monitor
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.state import initial_state, save_state
from traincert.trainer.tasks import Task


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=30, help="pairs of tasks")
    parser.add_argument("--steps", type=int, default=120, help="steps of a task; by default the job's")
    arguments = parser.parse_args()
    job = replace(TrainingJob.named("fashion"), local_steps=arguments.steps)
    with tempfile.TemporaryDirectory(prefix="traincert-monitoring-") as folder:
        dataset = prepare_dataset(job, Path(folder, "data"))
        with LocalEngine(job, Path(folder, "store"), workers=1) as engine:
            (pid,) = engine.pids
            worker, model = psutil.Process(pid), save_state(engine.store, initial_state(job))
            task = Task(miner=bytes(32), segment=0, shard=0, seed=bytes(32), cycle=0)
            order = Order(task, model, dataset.shards[0], None)
            shard = dataset.shard_folder / dataset.shards[0].hex()

            def done(monitor: Monitor | None) -> tuple[float, float]:
                """Seconds that a task took, and seconds of processor time."""
                before = sum(worker.cpu_times()[:2])
                if monitor:
                    monitor.begin(pid, shard)
                (commit,) = engine.collect(dataset.shard_folder, [order])
                assert isinstance(commit, Commit), commit
                if monitor:
                    assert monitor.end(pid).flags == ()
                return commit.seconds, sum(worker.cpu_times()[:2]) - before

            done(None)  # the first is slower
            pairs, tracing, watched = [], 0.0, 0.0
            for turn in range(arguments.turns):
                found = {}
                for with_monitor in (True, False) if turn % 2 else (False, True):
                    monitor = Monitor.start([engine.store]) if with_monitor else None
                    used = sum(psutil.Process(monitor._process.pid).cpu_times()[:2]) if monitor else 0.0
                    found[with_monitor] = done(monitor)
                    if monitor:
                        tracing += sum(psutil.Process(monitor._process.pid).cpu_times()[:2]) - used
                        watched += found[True][0]
                        monitor.close()
                pairs.append([a / b for a, b in zip(found[True], found[False], strict=True)])
    for name, ratios in zip(("seconds", "processor seconds"), zip(*pairs, strict=True), strict=True):
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"{name} with a monitor / without: {median:.4f} ({low:.4f} to {high:.4f}, {len(ratios)} pairs)")
    print(f"bpftrace used {tracing / watched:.2%} of a processor")


if __name__ == "__main__":
    main()
