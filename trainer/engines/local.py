"""Tasks in persistent worker processes on this machine.

Not `concurrent.futures.ProcessPoolExecutor`: there one killed worker breaks the whole pool and fails every task.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import cast

import torch

from traincert.trainer.engines.executor import Executor
from traincert.trainer.engines.orders import Answer, Order
from traincert.trainer.errors import EngineError
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import Dataset
from traincert.trainer.training import check_device
from traincert.trainer.updates import Reason

_SPAWN = multiprocessing.get_context("spawn")  # forking a process in which torch has run is not safe


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: int | None = None  # the number of the task it is at
    began: float | None = None  # when it began with that, by the monotonic clock


class LocalEngine:
    """Runs tasks in `workers` processes, each on one thread, that stay for many cycles.

    `store` is the folder of models and miners' memories, which is made if need be.

    Use it as a context manager, or call `close`. Workers die with the process that made them, even if that is
    killed, and leave Ctrl-C to it. A task whose worker dies is tried once more, in a new worker. As always with
    the spawn start method, a script that makes an engine needs `if __name__ == "__main__":`.

    Not safe for use from several threads at once.
    """

    def __init__(self, job: TrainingJob, store: Path, *, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers = {workers}: must be at least 1")
        check_device(job)
        self.job = job
        self.store = store
        store.mkdir(parents=True, exist_ok=True)
        self._workers: list[_Worker] = []
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
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers if worker.process.pid is not None]

    def close(self) -> None:
        """End the workers at once. Closing twice is fine."""
        for worker in self._workers:
            _end(worker)  # by force: a worker owns nothing that it would have to leave in order
        self._workers = []

    def train(
        self,
        dataset: Dataset,
        orders: Sequence[Order],
        on_update: Callable[[int, int], None] | None = None,
    ) -> list[Answer | Reason]:
        """Carry out all orders, and return what came of each, or why nothing did.

        `on_update` is called with the number of tasks done and their total: at the start, and after each.

        Raises EngineError if a task failed otherwise; the message has the worker's traceback. This, and any other
        exception on the way, closes the engine, because some workers are still busy.
        """
        if not self._workers:
            raise EngineError("the engine is closed")
        try:
            return self._run(dataset, orders, on_update or (lambda _done, _total: None))
        except BaseException:
            self.close()
            raise

    def _run(
        self, dataset: Dataset, orders: Sequence[Order], on_update: Callable[[int, int], None]
    ) -> list[Answer | Reason]:
        answers: dict[int, Answer | Reason] = {}
        waiting = deque(range(len(orders)))
        deaths: Counter[int] = Counter()
        while True:
            for worker in self._workers:
                if worker.task is None and waiting:
                    worker.task = waiting.popleft()
                    _send(worker, (dataset.shard_folder, orders[worker.task]))
            on_update(len(answers), len(orders))
            if len(answers) == len(orders):
                return [answers[number] for number in range(len(orders))]
            for worker in self._wait():
                number = cast(int, worker.task)
                try:
                    received = worker.connection.recv()
                except (EOFError, OSError):  # the worker died, between two messages or inside one
                    self._replace(worker)
                    deaths[number] += 1
                    if deaths[number] == 1:
                        waiting.appendleft(number)
                    else:
                        answers[number] = Reason.WORKER_DIED
                    continue
                message = _unwrap(received)
                if message is None:
                    worker.began = time.monotonic()
                else:
                    answers[number] = message
                    worker.task = worker.began = None
            for worker in self._workers:
                if worker.began is not None and time.monotonic() >= worker.began + self.job.task_seconds:
                    answers[cast(int, worker.task)] = Reason.LATE
                    self._replace(worker)

    def _wait(self) -> list[_Worker]:
        """Wait until busy workers have something to say, or the first of them is late."""
        busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
        begun = [worker.began for worker in busy.values() if worker.began is not None]
        timeout = max(0, min(begun) + self.job.task_seconds - time.monotonic()) if begun else None
        return [busy[cast(Connection, ready)] for ready in connection.wait(list(busy), timeout)]

    def _replace(self, worker: _Worker) -> None:
        _end(worker)
        number = self._workers.index(worker)
        self._workers[number] = self._start(number)

    def _start(self, number: int) -> _Worker:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(
            target=_work, args=(theirs, self.job, self.store, number), name="traincert-worker", daemon=True
        )
        resource_tracker.ensure_running()  # starting it later would unblock SIGINT too early
        # Inherited by the worker, which would otherwise answer a Ctrl-C during its imports with a traceback.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()  # so that the worker holds the only other end, and its death is an end of file
        return _Worker(process, ours)


def _send(worker: _Worker, order: tuple[Path, Order]) -> None:
    # A worker that died while it was idle shows below, where its answer is awaited.
    with contextlib.suppress(OSError):
        worker.connection.send(order)


def _unwrap(message: Answer | OSError | str | None) -> Answer | None:
    """Return what a worker sent: an answer, or None if it says that it begins.

    Raises the OSError with which the task ended (for example: the disk is full), and EngineError for another exception.
    """
    if isinstance(message, OSError):
        raise message
    if isinstance(message, str):
        raise EngineError(f"a task failed in its worker process:\n{message}")
    return message


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _work(engine: Connection, job: TrainingJob, store: Path, number: int) -> None:
    """Answer orders until the engine is gone: None at the beginning; at the end an Answer, or a traceback as text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    Thread(target=_exit_with_parent, daemon=True).start()
    # Beside training, too: where all processors are busy, threads that wait for each other make copying a model of
    # 100,000 parameters take 10 ms, and not 0.1.
    torch.set_num_threads(1)
    if job.device == "cuda":
        torch.cuda.set_device(number % torch.cuda.device_count())
    executor = Executor(job, store)
    importlib.import_module("torch._dynamo")  # now, because the first optimizer would, in its task's time
    while True:
        try:
            shards, order = engine.recv()
        except EOFError:
            return
        engine.send(None)
        message: Answer | OSError | str
        try:
            message = executor.execute(shards, order)
        except OSError as error:
            message = error
        except Exception:  # whatever it is, the engine raises it again, with its traceback
            message = traceback.format_exc()
        engine.send(message)


def _exit_with_parent() -> None:
    # Also in the middle of a task, where nobody reads the pipe. Not prctl's PDEATHSIG: that one fires when the
    # thread ends that started the worker.
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - a spawned process has one
    connection.wait([parent.sentinel])
    os._exit(1)
