"""Worker processes: their deaths, their parent's death, and what they leave behind and never see."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from threading import Event, Thread

import pytest

from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Commit, Order
from traincert.trainer.errors import EngineError, IntegrityError, JobError, Reason
from traincert.trainer.examples import Dataset
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.state import initial_state, save_state
from traincert.trainer.tasks import assign

WriteJob = Callable[..., Path]

TIMEOUT = 60  # seconds
EXAMPLES = 1797 - 300 - 360  # that write_job's jobs have to train on, an odd number


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


def orders_of(dataset: Dataset, miners: Sequence[bytes], store: Path) -> list[Order]:
    """The first cycle's, with its model in the store."""
    job = dataset.job
    store.mkdir(exist_ok=True)
    model = save_state(store, initial_state(job))
    return [
        Order(task, model, dataset.shards[task.shard], None)
        for task in assign(b"", 0, miners, job.segments, job.shards)
    ]


def results(commits: Sequence[Commit | Reason]) -> list[Commit | Reason]:
    """The commits without what their tasks cost."""
    return [commit if isinstance(commit, Reason) else commit._replace(seconds=0, resources=None) for commit in commits]


def test_a_killed_worker_costs_nothing_but_time(
    job: TrainingJob, dataset: Dataset, engine: LocalEngine, miners: list[bytes], tmp_path: Path
) -> None:
    """One of two workers is stopped, so that it never answers, and is killed once the other has answered."""
    expected = results(engine.collect(dataset.shard_folder, orders_of(dataset, miners, engine.store)))
    orders = orders_of(dataset, miners, tmp_path)
    with LocalEngine(job, tmp_path, workers=2) as damaged:
        stopped = damaged.pids[0]
        os.kill(stopped, signal.SIGSTOP)

        def kill_after_an_answer(done: int, _total: int) -> None:
            if done == 1 and stopped in damaged.pids:
                os.kill(stopped, signal.SIGKILL)

        assert results(damaged.collect(dataset.shard_folder, orders, kill_after_an_answer)) == expected
        assert stopped not in damaged.pids
        assert len(damaged.pids) == 2
        os.kill(damaged.pids[0], signal.SIGKILL)  # while it is idle
        assert results(damaged.collect(dataset.shard_folder, orders)) == expected


def test_a_task_whose_worker_dies_twice_is_given_up(
    job: TrainingJob, dataset: Dataset, miners: list[bytes], tmp_path: Path
) -> None:
    over = Event()
    orders = orders_of(dataset, miners, tmp_path)[:1]
    with LocalEngine(job, tmp_path, workers=1) as engine:

        def kill_all() -> None:
            while not over.wait(0.01):
                for pid in engine.pids:
                    with suppress(ProcessLookupError):  # the engine was faster to notice the last kill
                        os.kill(pid, signal.SIGKILL)

        killer = Thread(target=kill_all)
        killer.start()
        try:
            answers = engine.collect(dataset.shard_folder, orders)
        finally:
            over.set()
            killer.join()
        assert answers == [Reason.WORKER_DIED]
        assert isinstance(engine.collect(dataset.shard_folder, orders)[0], Commit)


TROUBLE = """
    import os, time
    from pathlib import Path
    import torch
    from torch.nn.functional import cross_entropy

    MARKER = Path(__file__).with_suffix(".marker")

    def loss(outputs, target):
        if torch.is_grad_enabled() and MARKER.exists():
            with MARKER.open() as file:
                action, _, lost = file.read().rpartition(" ")
            if lost == str(len(target)):
                exec(action)
        return cross_entropy(outputs, target)
"""


def trouble(write_job: WriteJob, **changed: str) -> tuple[TrainingJob, Path]:
    """A job whose loss does what its marker file says, but only in batches of that size, and the marker.

    Shards are of different sizes, and batches as large as they are, so that this is one shard's task.
    """
    path = write_job(TROUBLE, **{"loss": '"{module}:loss"', "batch_size": "9999", "local_steps": "2"} | changed)
    job = TrainingJob.load(path)
    return job, path.with_name(job.loss.partition(":")[0] + ".marker")


@pytest.mark.parametrize(("action", "reason"), [("time.sleep(600)", Reason.LATE), ("os._exit(1)", Reason.WORKER_DIED)])
def test_only_the_task_that_is_late_or_dies_is_lost_and_the_next_cycle_goes_on(
    write_job: WriteJob, miners: list[bytes], tmp_path: Path, action: str, reason: Reason
) -> None:
    # Time enough for the other task even on a busy machine, from when its worker begins.
    job, marker = trouble(write_job, task_seconds="6.0" if reason is Reason.LATE else "600.0")
    dataset = prepare_dataset(job, tmp_path / "data")
    marker.write_text(f"{action} {EXAMPLES // 2}")
    with (
        LocalEngine(job, tmp_path / "store", workers=2) as engine,
        Trainer(dataset, engine) as trainer,
    ):
        first = trainer.run_cycle(trainer.start(), miners[:2], seed=b"first")
        (refusal,) = first.refusals
        assert refusal.reason == reason
        assert refusal.detail
        assert len(first.contributions) == 1
        lost = next(task for task in first.tasks if task.refusal)
        assert lost.commit is None
        marker.unlink()
        second = trainer.run_cycle(first.after, miners[:2], seed=b"second")
        assert second.refusals == ()


def test_what_the_system_refuses_a_worker_is_raised_as_it_is(
    job: TrainingJob, dataset: Dataset, miners: list[bytes], tmp_path: Path
) -> None:
    """A full disk, or here a folder in a file's place: the command line says it in one line."""
    orders = orders_of(dataset, miners, tmp_path)
    model = tmp_path / orders[0].model_hash.hex()
    model.unlink()
    model.mkdir()
    with LocalEngine(job, tmp_path, workers=1) as engine, pytest.raises(IsADirectoryError) as caught:
        engine.collect(dataset.shard_folder, orders)
    assert caught.value.filename == str(model)


def test_a_damaged_shard_is_an_error_that_names_the_file(job: TrainingJob, miners: list[bytes], tmp_path: Path) -> None:
    dataset = prepare_dataset(job, tmp_path / "data")
    orders = orders_of(dataset, miners, tmp_path / "store")
    damaged = dataset.shard_folder / orders[0].shard_hash.hex()
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with LocalEngine(job, tmp_path / "store", workers=1) as engine:
        with pytest.raises(IntegrityError, match=f"{damaged}: the file's SHA-256 is"):
            engine.collect(dataset.shard_folder, orders)
        with pytest.raises(EngineError, match="the engine is closed"):
            engine.collect(dataset.shard_folder, orders)


def test_a_mistake_in_the_users_module_is_one_line_with_its_place(
    write_job: WriteJob, miners: list[bytes], tmp_path: Path
) -> None:
    job, marker = trouble(write_job, shards="1")
    dataset = prepare_dataset(job, tmp_path / "data")
    marker.write_text(f"raise ArithmeticError('mine') {EXAMPLES}")
    with LocalEngine(job, tmp_path / "store", workers=1) as engine:
        said = r"^loss = '\w+:loss': ArithmeticError: mine; /.*\.py, line \d+, in loss; it got the outputs float32 \("
        with pytest.raises(JobError, match=said):
            engine.collect(dataset.shard_folder, orders_of(dataset, miners, tmp_path / "store"))
        assert engine.pids == []


def test_closing_leaves_no_process(job: TrainingJob, dataset: Dataset, miners: list[bytes], tmp_path: Path) -> None:
    """Here closed by an exception in the middle of a task."""

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    orders = orders_of(dataset, miners, tmp_path)
    with LocalEngine(job, tmp_path, workers=2) as engine:
        pids = engine.pids
        assert all(is_running(pid) for pid in pids)
        with pytest.raises(KeyboardInterrupt):
            engine.collect(dataset.shard_folder, orders, interrupt)
    assert not any(is_running(pid) for pid in pids)
    assert [path.name for path in tmp_path.iterdir()] == [orders[0].model_hash.hex()]
    engine.close()


def test_workers_leave_ctrl_c_to_their_parent(
    job: TrainingJob, dataset: Dataset, miners: list[bytes], tmp_path: Path
) -> None:
    """From the first moment on, while they still import."""
    orders = orders_of(dataset, miners, tmp_path)
    with LocalEngine(job, tmp_path, workers=1) as engine:
        pids = engine.pids

        def interrupt_workers(_done: int, _total: int) -> None:
            for pid in pids:
                os.kill(pid, signal.SIGINT)

        answers = engine.collect(dataset.shard_folder, orders, interrupt_workers)
        assert all(isinstance(commit, Commit) for commit in answers)
        assert engine.pids == pids


def test_a_worker_maps_its_shards_and_never_opens_what_is_held_out(
    dataset: Dataset, engine: LocalEngine, miners: list[bytes]
) -> None:
    """After tasks on all shards: what is mapped and open in the workers' processes, and what they were told."""
    orders = orders_of(dataset, miners, engine.store)
    assert {order.shard_hash for order in orders} == set(dataset.shards)
    engine.collect(dataset.shard_folder, orders)
    mapped = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in engine.pids)
    opened = [str(path.readlink()) for pid in engine.pids for path in Path(f"/proc/{pid}/fd").iterdir()]
    found = set(re.findall(rf"{dataset.directory}/(\S+)/(\S+)", mapped + "\n".join(opened)))
    assert found <= {("shards", shard.hex()) for shard in dataset.shards}
    assert found
    assert dataset.validation not in {each for order in orders for each in order}


def test_workers_can_do_without_the_held_out_files(job: TrainingJob, miners: list[bytes], tmp_path: Path) -> None:
    """Which are away while they train."""
    dataset = prepare_dataset(job, tmp_path / "data")
    orders = orders_of(dataset, miners, tmp_path / "store")
    dataset.held_out_folder.rename(tmp_path / "away")
    with LocalEngine(job, tmp_path / "store", workers=1) as engine:
        assert all(isinstance(commit, Commit) for commit in engine.collect(dataset.shard_folder, orders))


PARENT = """
import os
import sys
from pathlib import Path
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Order
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.state import initial_state, save_state
from traincert.trainer.tasks import Task

if __name__ == "__main__":
    job = TrainingJob.named("digits")
    dataset = prepare_dataset(job, Path(sys.argv[1]))
    model = save_state(dataset.directory, initial_state(job))
    shard = dataset.shard_folder / dataset.shards[0].hex()
    shard.unlink()
    os.mkfifo(shard)
    task = Task(miner=bytes(32), segment=0, shard=0, seed=bytes(32), cycle=0)
    with LocalEngine(job, dataset.directory, workers=1) as engine:
        print(shard, *engine.pids, flush=True)
        engine.collect(dataset.shard_folder, [Order(task, model, dataset.shards[0], None)])
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


def test_memories_are_in_the_store_already(engine: LocalEngine, miners: list[bytes]) -> None:
    before = sorted(engine.store.iterdir())
    engine.bring({miners[0]: [bytes(32)]})
    assert sorted(engine.store.iterdir()) == before


def test_an_engine_needs_a_worker(job: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers = 0: must be at least 1"):
        LocalEngine(replace(job), tmp_path, workers=0)


def test_ctrl_c_while_a_worker_starts_waits_for_it(
    job: TrainingJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may get the signal, so a mask of this one is not enough."""
    start = SpawnProcess.start
    started = []

    def interrupted(process: SpawnProcess) -> None:
        Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()
        time.sleep(0.2)
        start(process)
        started.append(process)

    monkeypatch.setattr(SpawnProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LocalEngine(job, tmp_path, workers=1)
    (process,) = started
    process.kill()
    process.join()
