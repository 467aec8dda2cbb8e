"""Worker processes: their deaths, their parent's death, and what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pytest

from traincert.trainer.datasets import Dataset, prepare_dataset
from traincert.trainer.engines.local import EngineError, LocalEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.state import initial_state
from traincert.trainer.tasks import Task, assign

TIMEOUT = 60  # seconds


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that is dead, but not yet waited for, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], awaited: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT} s: {awaited}"
        time.sleep(0.02)


@pytest.fixture
def tasks(job: TrainingJob, miners: list[bytes]) -> list[Task]:
    return assign(b"", miners, job.segments, job.shards)


def test_a_killed_worker_costs_nothing_but_time(
    job: TrainingJob, dataset: Dataset, engine: LocalEngine, tasks: list[Task], tmp_path: Path
) -> None:
    """One of two workers is stopped, so that it never answers, and is killed once the other has answered."""
    expected = engine.train(dataset, initial_state(job), tasks)
    with LocalEngine(job, tmp_path, workers=2) as damaged:
        stopped = damaged.pids[0]
        os.kill(stopped, signal.SIGSTOP)

        def kill_after_an_answer(done: int, _total: int) -> None:
            if done == 1 and stopped in damaged.pids:
                os.kill(stopped, signal.SIGKILL)

        assert damaged.train(dataset, initial_state(job), tasks, kill_after_an_answer) == expected
        assert stopped not in damaged.pids
        assert len(damaged.pids) == 2
        assert damaged.train(dataset, initial_state(job), tasks) == expected


def test_a_task_whose_worker_dies_twice_is_given_up(
    job: TrainingJob, dataset: Dataset, tasks: list[Task], tmp_path: Path
) -> None:
    over = Event()
    with LocalEngine(job, tmp_path, workers=1) as engine:

        def kill_all() -> None:
            while not over.wait(0.01):
                for pid in engine.pids:
                    with suppress(ProcessLookupError):  # the engine was faster to notice the last kill
                        os.kill(pid, signal.SIGKILL)

        killer = Thread(target=kill_all)
        killer.start()
        try:
            updates = engine.train(dataset, initial_state(job), tasks[:1])
        finally:
            over.set()
            killer.join()
        assert updates == [None]
        assert engine.train(dataset, initial_state(job), tasks[:1]) != [None]


def test_a_damaged_shard_is_an_error_that_shows_what_happened(
    job: TrainingJob, tasks: list[Task], tmp_path: Path
) -> None:
    dataset = prepare_dataset(job, tmp_path / "data")
    damaged = dataset.shards[tasks[0].shard].hex()
    (dataset.directory / damaged).write_bytes(b"")
    with LocalEngine(job, tmp_path / "engine", workers=1) as engine:
        with pytest.raises(EngineError, match=f"IntegrityError: .*{damaged}: the file's SHA-256 is"):
            engine.train(dataset, initial_state(job), tasks)
        with pytest.raises(EngineError, match="the engine is closed"):
            engine.train(dataset, initial_state(job), tasks)


def test_closing_leaves_no_process_and_no_file(
    job: TrainingJob, dataset: Dataset, tasks: list[Task], tmp_path: Path
) -> None:
    """Here closed by an exception in the middle of a task."""

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with LocalEngine(job, tmp_path, workers=2) as engine:
        pids = engine.pids
        assert all(is_running(pid) for pid in pids)
        with pytest.raises(KeyboardInterrupt):
            engine.train(dataset, initial_state(job), tasks, interrupt)
    assert not any(is_running(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []
    engine.close()


def test_the_model_file_is_gone_after_the_cycle(
    job: TrainingJob, dataset: Dataset, tasks: list[Task], tmp_path: Path
) -> None:
    files: list[list[str]] = []

    def look(_done: int, _total: int) -> None:
        files.append([path.name for path in tmp_path.rglob("*") if path.is_file()])

    with LocalEngine(job, tmp_path, workers=1) as engine:
        engine.train(dataset, initial_state(job), tasks, look)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert len(files) == len(tasks) + 1
    assert all(len(names) == 1 for names in files)


def test_workers_leave_ctrl_c_to_their_parent(
    job: TrainingJob, dataset: Dataset, tasks: list[Task], tmp_path: Path
) -> None:
    """From the first moment on, while they still import."""
    with LocalEngine(job, tmp_path, workers=1) as engine:
        pids = engine.pids

        def interrupt_workers(_done: int, _total: int) -> None:
            for pid in pids:
                os.kill(pid, signal.SIGINT)

        assert None not in engine.train(dataset, initial_state(job), tasks, interrupt_workers)
        assert engine.pids == pids


PARENT = """
import os
import sys
from pathlib import Path
from traincert.trainer.datasets import prepare_dataset
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.state import initial_state
from traincert.trainer.tasks import Task

if __name__ == "__main__":
    job = TrainingJob.named("digits")
    dataset = prepare_dataset(job, Path(sys.argv[1]))
    shard = dataset.directory / dataset.shards[0].hex()
    shard.unlink()
    os.mkfifo(shard)
    with LocalEngine(job, dataset.directory, workers=1) as engine:
        print(shard, *engine.pids, flush=True)
        engine.train(dataset, initial_state(job), [Task(miner=bytes(32), segment=0, shard=0, seed=bytes(32))])
"""


def test_workers_die_with_a_killed_parent_in_the_middle_of_a_task(tmp_path: Path) -> None:
    """The task's shard is a named pipe, so that the worker, once it has opened it, waits in its task for ever."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf-8")
    with subprocess.Popen([sys.executable, script, tmp_path / "data"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        shard, pid = parent.stdout.readline().split()
        handles: list[int] = []

        def worker_reads_its_shard() -> bool:
            with suppress(OSError):  # ENXIO: nobody has opened it for reading
                handles.append(os.open(shard, os.O_WRONLY | os.O_NONBLOCK))
            return bool(handles)

        try:
            wait_until(worker_reads_its_shard, "the worker at its task")
            assert is_running(int(pid))
        finally:
            parent.kill()
    wait_until(lambda: not is_running(int(pid)), f"the end of worker {pid}")
    os.close(handles[0])


def test_an_engine_needs_a_worker(job: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers = 0: must be at least 1"):
        LocalEngine(job, tmp_path, workers=0)
