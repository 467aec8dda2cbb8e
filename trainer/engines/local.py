"""An engine that runs tasks in worker processes on this machine.

It does not use `concurrent.futures.ProcessPoolExecutor`: there one killed worker breaks the pool and fails every task.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import cast

from traincert.trainer.engines.orders import Commit, OnCommit, Order
from traincert.trainer.errors import EngineError, Reason, TrainerError
from traincert.trainer.imports import importing
from traincert.trainer.interrupts import ctrl_c_later
from traincert.trainer.job import TrainingJob
from traincert.trainer.monitoring import Monitor, MonitorError
from traincert.trainer.resources import Meter, Resources, measure_peak_flops
from traincert.trainer.store import map_blob, write_blob

_SPAWN = multiprocessing.get_context("spawn")  # a fork is not safe after torch has started threads


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: int | None = None  # the number of its task; None: it is idle
    began: float | None = None  # when it began the task, time.monotonic(); None: it has not begun
    peak_flops: float = 0.0  # of this machine, see resources.py
    watched: bool = False  # its task is monitored

    def __post_init__(self) -> None:
        """Measure the process."""
        assert self.process.pid is not None  # noqa: S101 - it has been started
        self.meter = Meter(self.process.pid)


class LocalEngine:
    """Runs tasks in `workers` processes, each with one thread. The processes stay for many cycles.

    `store` is the folder of models and miners' memories. It is made if it does not exist. Workers put the updates
    there, too, as files: 100 MB through a pipe are slow. A power failure may damage updates, unless they are `durable`.

    Use the engine as a context manager, or call `close`. Only `close` may be called from another thread. A script that
    makes an engine needs `if __name__ == "__main__":`, because workers use the spawn start method.

    Workers end when the process that made them ends, even if it is killed. They ignore Ctrl-C, which that process
    handles. If a worker dies, a new worker tries its task once more.

    `monitor`, if there is one, watches the tasks. It must allow the store.

    The constructor raises ValueError if `workers` is below 1, and JobError if this machine does not have the job's
    device.
    """

    def __init__(
        self, job: TrainingJob, store: Path, *, workers: int, monitor: Monitor | None = None, durable: bool = False
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers = {workers}: must be at least 1")
        if job.device != "cpu":
            from traincert.trainer.training import check_device

            check_device(job)
        self.job = job
        self.store = store
        store.mkdir(parents=True, exist_ok=True)
        self._workers: list[_Worker] = []
        self._closing = Lock()
        self._monitor = monitor
        self._durable = durable
        try:
            for number in range(workers):
                self._workers.append(self._start(number))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def close(self) -> None:
        """Kill the workers. Closing twice is allowed, also while another thread waits in `collect`, which then ends."""
        with self._closing:
            workers, self._workers = self._workers, []
            for worker in workers:
                _end(worker)  # killing is safe, because a worker has nothing to save

    def collect(
        self, shards: Path, orders: Sequence[Order], on_commit: OnCommit | None = None
    ) -> list[Commit | Reason]:
        """Carry out all orders; `shards` is the folder of the shards.

        Return, in the same order, the commit to an update or the reason why there is none. The updates are in the store
        then.

        The reason is WORKER_DIED if two workers died, LATE after `job.task_seconds`. `on_commit` is called at the
        start, and after tasks end.

        Raises EngineError if the engine is closed; the task's OSError (for example: the disk is full) or TrainerError
        if it raised one; and EngineError, with the worker's traceback, if a task raised another exception. Any
        exception closes the engine, because some workers are still busy.
        """
        if not self._workers:
            raise EngineError("the engine is closed")
        try:
            commits = self._run(shards, orders, on_commit or (lambda _done, _total: None))
            return [self._placed(commit, number) for number, commit in enumerate(commits)]
        except BaseException:
            self.close()
            raise

    def reveal(self, orders: Sequence[Order], commits: Sequence[Commit | Reason]) -> list[memoryview | Reason]:  # noqa: ARG002
        """Take the updates of the tasks that `collect` had done last out of the store, and return them."""
        updates = [
            map_blob(self.store, commit.update_hash) if isinstance(commit, Commit) else commit for commit in commits
        ]
        for commit in commits:
            if isinstance(commit, Commit):
                (self.store / commit.update_hash.hex()).unlink(missing_ok=True)  # two miners' may be equal
        return updates

    def bring(self, wanted: Mapping[bytes, Sequence[bytes]]) -> None:
        """Do nothing: all memories are in the store."""

    def _run(self, shards: Path, orders: Sequence[Order], on_commit: OnCommit) -> list[Commit | Reason]:
        commits: dict[int, Commit | Reason] = {}
        waiting = deque(range(len(orders)))
        deaths: Counter[int] = Counter()
        while True:
            for worker in self._workers:
                if worker.task is None and waiting:
                    worker.task = waiting.popleft()
                    _send(worker, (shards, orders[worker.task]))
            on_commit(len(commits), len(orders))
            if len(commits) == len(orders):
                return [commits[number] for number in range(len(orders))]
            for worker in self._wait():
                number = cast(int, worker.task)
                try:
                    received = worker.connection.recv()
                except (EOFError, OSError):  # the worker died
                    self._replace(worker)
                    deaths[number] += 1
                    if deaths[number] == 1:
                        waiting.appendleft(number)
                    else:
                        commits[number] = Reason.WORKER_DIED
                    continue
                message = _unwrap(received)
                if isinstance(message, float):
                    worker.peak_flops = message
                    self._measure(worker, shards / orders[number].shard_hash.hex())
                    worker.began = time.monotonic()
                    _send(worker, None)
                else:
                    commits[number] = message._replace(resources=self._measured(worker))
                    worker.task = worker.began = None
            for worker in self._workers:
                if worker.began is not None and time.monotonic() >= worker.began + self.job.task_seconds:
                    commits[cast(int, worker.task)] = Reason.LATE
                    self._replace(worker)

    def _measure(self, worker: _Worker, shard: Path) -> None:
        """A worker is about to begin a task on the file `shard`: measure what the task uses."""
        worker.meter.begin()
        worker.watched = False
        if self._monitor:
            try:
                self._monitor.begin(worker.meter.pid, shard)
                worker.watched = True
            except MonitorError:  # bpftrace has ended, or hangs: this task is not monitored, and no later one
                self._monitor = None

    def _measured(self, worker: _Worker) -> Resources | None:
        """Return what a worker's task has used."""
        found = worker.meter.end(worker.peak_flops)
        if self._monitor and worker.watched and found:
            with contextlib.suppress(MonitorError):
                watched = self._monitor.end(worker.meter.pid)
                return replace(found, tree_seconds=watched.cpu_seconds, flags=watched.flags)
        return found

    def _placed(self, commit: Commit | Reason, number: int) -> Commit | Reason:
        if isinstance(commit, Reason):
            return commit
        soon = self.job.late_seconds
        return commit._replace(place=number, late=soon is not None and commit.seconds > soon)

    def _wait(self) -> list[_Worker]:
        """Wait until a busy worker sends a message, or the first is late; return the workers with a message."""
        busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
        begun = [worker.began for worker in busy.values() if worker.began is not None]
        timeout = max(0, min(begun) + self.job.task_seconds - time.monotonic()) if begun else None
        return [busy[cast(Connection, ready)] for ready in connection.wait(list(busy), timeout)]

    def _replace(self, worker: _Worker) -> None:
        with self._closing:
            if worker not in self._workers:
                raise EngineError("the engine is closed")
            _end(worker)
            number = self._workers.index(worker)
            self._workers[number] = self._start(number)

    def _start(self, number: int) -> _Worker:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(
            target=_work,
            args=(theirs, self.job, self.store, number, self._durable),
            name="traincert-worker",
            daemon=True,
        )
        resource_tracker.ensure_running()  # now: if process.start() started it, it would unblock SIGINT
        # The worker inherits this mask. Without it, Ctrl-C during the worker's imports would print a traceback.
        with ctrl_c_later():  # a half-started worker would print a traceback
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()  # only the worker has this end now: if the worker dies, recv raises EOFError
        return _Worker(process, ours)


def _send(worker: _Worker, order: tuple[Path, Order] | None) -> None:
    # If the worker died while it was idle, the next recv raises EOFError or OSError, and a new worker gets the task.
    with contextlib.suppress(OSError):
        worker.connection.send(order)


def _unwrap(message: Commit | OSError | TrainerError | str | float) -> Commit | float:
    """Return a worker's commit, or, if the worker is about to begin its task, the machine's peak_flops.

    Raises the task's OSError or TrainerError, and EngineError if it raised another exception.
    """
    if isinstance(message, OSError | TrainerError):
        raise message
    if isinstance(message, str):
        raise EngineError(f"a task failed in its worker process:\n{message}")
    return message


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _work(engine: Connection, job: TrainingJob, store: Path, number: int, durable: bool) -> None:
    """Carry out orders until the engine closes the connection.

    For each order send the machine's peak_flops, and wait for an answer: the engine measures from here. Then send a
    Commit, an OSError, a TrainerError, or another exception's traceback as text.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # Only workers import torch, which takes seconds: the program that has them may have no other use for it.
    with importing():
        import torch

        importlib.import_module("torch._dynamo")  # slow; otherwise the first optimizer would import it during its task
        from traincert.trainer.engines.executor import Executor

    Thread(target=_exit_with_parent, daemon=True).start()
    # One thread outside training, too. If all processors are busy, threads wait for each other: copying a model of
    # 100,000 parameters then takes 10 ms instead of 0.1 ms.
    torch.set_num_threads(1)
    if job.device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
    executor = Executor(job, store)
    peak_flops = measure_peak_flops()
    while True:
        try:
            shards, order = engine.recv()
            engine.send(peak_flops)
            engine.recv()
        except EOFError:
            return
        message: Commit | OSError | TrainerError | str
        try:
            answer = executor.execute(shards, order)
            message = Commit.to(answer, write_blob(store, answer.update, durable=durable))
        except (OSError, TrainerError) as error:
            message = error
        except Exception:  # the engine raises an EngineError with this traceback
            message = traceback.format_exc()
        engine.send(message)


def _exit_with_parent() -> None:
    # This thread ends the worker even during a task, when the worker does not read its pipe. prctl's PDEATHSIG would
    # not do: it fires when the thread that started the worker ends.
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - a spawned process has one
    connection.wait([parent.sentinel])
    os._exit(1)
