"""Tasks in persistent worker processes on this machine.

Not `concurrent.futures.ProcessPoolExecutor`: there one killed worker breaks the whole pool and fails every task.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
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
from typing import NamedTuple, cast

from traincert.trainer.datasets import Dataset, read_examples
from traincert.trainer.job import TrainerError, TrainingJob
from traincert.trainer.state import State, load_state, save_state
from traincert.trainer.tasks import Task
from traincert.trainer.training import train_task

_SPAWN = multiprocessing.get_context("spawn")  # forking a process in which torch has run is not safe


class EngineError(TrainerError):
    """A task could not be run, or the engine is closed."""


class _Order(NamedTuple):
    """What a worker is sent: hashes of the files to read, and the task."""

    model: bytes
    directory: Path
    shard: bytes
    task: Task


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: int | None = None  # the number of the task it is at


class LocalEngine:
    """Runs tasks in `workers` processes, each on one thread, that stay for many cycles.

    Use it as a context manager, or call `close`. Workers die with the process that made them, even if that is
    killed, and leave Ctrl-C to it. A task whose worker dies is tried once more, in a new worker. As always with
    the spawn start method, a script that makes an engine needs `if __name__ == "__main__":`.

    Not safe for use from several threads at once.
    """

    def __init__(self, job: TrainingJob, directory: Path, *, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers = {workers}: must be at least 1")
        self.job = job
        directory.mkdir(parents=True, exist_ok=True)
        self._models = tempfile.TemporaryDirectory(dir=directory, prefix=".models-")
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
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
        """End the workers at once and remove what the engine wrote. Closing twice is fine."""
        for worker in self._workers:
            _end(worker)  # by force: a worker owns nothing that it would have to leave in order
        self._workers = []
        self._models.cleanup()

    def train(
        self,
        dataset: Dataset,
        state: State,
        tasks: Sequence[Task],
        on_update: Callable[[int, int], None] | None = None,
    ) -> list[bytes | None]:
        """Run all tasks from `state`, and return their updates in the order of `tasks`.

        An update is as `training.train_task` returns it, or None if the task's worker died twice. `state` is
        written to a file once, and read by each worker once. `on_update` is called with the number
        of tasks done and their total: at the start, and after each answer or death of a worker.

        Raises EngineError if a task failed otherwise; the message has the worker's traceback. This, and any other
        exception on the way, closes the engine, because some workers are still busy.
        """
        if not self._workers:
            raise EngineError("the engine is closed")
        try:
            model = save_state(Path(self._models.name), state)
            updates = self._run(dataset, model, tasks, on_update or (lambda _done, _total: None))
            (Path(self._models.name) / model.hex()).unlink()
        except BaseException:
            self.close()
            raise
        return updates

    def _run(
        self, dataset: Dataset, model: bytes, tasks: Sequence[Task], on_update: Callable[[int, int], None]
    ) -> list[bytes | None]:
        updates: list[bytes | None] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        deaths: Counter[int] = Counter()
        done = 0
        while True:
            for worker in self._workers:
                if worker.task is None and waiting:
                    worker.task = waiting.popleft()
                    task = tasks[worker.task]
                    _send(worker, _Order(model, dataset.directory, dataset.shards[task.shard], task))
            on_update(done, len(tasks))
            if done == len(tasks):
                return updates
            busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
            for ready in connection.wait(list(busy)):
                worker = busy[cast(Connection, ready)]
                number, worker.task = cast(int, worker.task), None
                try:
                    updates[number] = _receive(worker)
                except (EOFError, OSError):  # the worker died, between two messages or inside one
                    _end(worker)
                    self._workers[self._workers.index(worker)] = self._start()
                    deaths[number] += 1
                    if deaths[number] == 1:
                        waiting.appendleft(number)
                        continue
                done += 1

    def _start(self) -> _Worker:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(
            target=_work, args=(theirs, self.job, Path(self._models.name)), name="traincert-worker", daemon=True
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


def _send(worker: _Worker, order: _Order) -> None:
    # A worker that died while it was idle shows below, where its answer is awaited.
    with contextlib.suppress(OSError):
        worker.connection.send(order)


def _receive(worker: _Worker) -> bytes:
    answer: bytes | str = worker.connection.recv()
    if isinstance(answer, str):
        raise EngineError(f"a task failed in its worker process:\n{answer}")
    return answer


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _work(engine: Connection, job: TrainingJob, models: Path) -> None:
    """Answer orders until the engine is gone: an update's bytes, or a traceback as text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    Thread(target=_exit_with_parent, daemon=True).start()
    model: bytes = b""
    state: State = {}
    while True:
        try:
            order: _Order = engine.recv()
        except EOFError:
            return
        answer: bytes | str
        try:
            if order.model != model:
                model, state = order.model, load_state(models, order.model)
            answer = train_task(job, state, read_examples(order.directory, order.shard), order.task)
        except Exception:  # whatever it is, the engine raises it again, with its traceback
            answer = traceback.format_exc()
        engine.send(answer)


def _exit_with_parent() -> None:
    # Also in the middle of a task, where nobody reads the pipe. Not prctl's PDEATHSIG: that one fires when the
    # thread ends that started the worker.
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101 - a spawned process has one
    connection.wait([parent.sentinel])
    os._exit(1)
