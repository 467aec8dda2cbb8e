"""A small job, its data, an engine and a trainer, shared by the trainer's tests."""

import hashlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import dedent
from threading import Lock

import pytest

from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.executor import Executor
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Commit, OnCommit, Order
from traincert.trainer.errors import Reason
from traincert.trainer.examples import Dataset
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.records import RunFolder
from traincert.trainer.store import write_blob

WriteJob = Callable[..., Path]
"""Writes a job's TOML file and, if `module` is given, a module beside it; {module} in values is the module's name."""

MakeTrainer = Callable[..., AbstractContextManager[Trainer]]
"""Makes a trainer of a job in a folder, with `workers` processes; by default tasks are done in this process."""

_MODULES = itertools.count()


@pytest.fixture(scope="session")
def job() -> TrainingJob:
    return TrainingJob(
        cycles=3,
        dataset="traincert.trainer.datasets:digits",
        normalize={"inputs": "all"},
        validation_examples=300,
        test_examples=360,
        shards=4,
        model="traincert.trainer.models:mlp",
        model_options={"inputs": 64, "hidden": [16], "classes": 10},
        segments=2,
        optimizer="SGD",
        optimizer_options={"momentum": 0.9},
        learning_rate=0.05,
        batch_size=32,
        local_steps=18,
    )


@pytest.fixture(scope="session")
def dataset(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare_dataset(job, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def engine(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    with LocalEngine(job, tmp_path_factory.mktemp("store"), workers=2) as engine:
        yield engine


@pytest.fixture(scope="session")
def trainer(dataset: Dataset, engine: LocalEngine) -> Iterator[Trainer]:
    with Trainer(dataset, engine) as trainer:
        yield trainer


class InlineEngine(LocalEngine):
    """Does what the workers do in this process, which saves the seconds in which they start."""

    def __init__(self, job: TrainingJob, store: Path) -> None:
        store.mkdir(parents=True, exist_ok=True)
        self.job, self.store = job, store
        self._workers = []
        self._closing = Lock()
        self._executor = Executor(job, store)

    def collect(
        self, shards: Path, orders: Sequence[Order], on_commit: OnCommit | None = None
    ) -> list[Commit | Reason]:
        commits = self._run(shards, orders, on_commit or (lambda _done, _total: None))
        return [self._placed(commit, number) for number, commit in enumerate(commits)]

    def _run(self, shards: Path, orders: Sequence[Order], on_commit: OnCommit) -> list[Commit | Reason]:
        del on_commit
        answers = [self._executor.execute(shards, order) for order in orders]
        return [Commit.to(answer, write_blob(self.store, answer.update)) for answer in answers]


@pytest.fixture(scope="session")
def make_trainer() -> MakeTrainer:
    @contextmanager
    def make(job: TrainingJob, folder: Path, workers: int = 0) -> Iterator[Trainer]:
        dataset = prepare_dataset(job, folder / "data")
        store = folder / "store"
        engine = LocalEngine(job, store, workers=workers) if workers else InlineEngine(job, store)
        with engine, Trainer(dataset, engine) as trainer:
            yield trainer

    return make


@pytest.fixture(scope="session")
def miners() -> list[bytes]:
    return [hashlib.sha256(bytes([number])).digest() for number in range(4)]


@pytest.fixture
def write_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteJob:
    """A small job on few cycles, with what is changed in it; None leaves a key out."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(module: str = "", name: str = "job", **changed: str | None) -> Path:
        module_name = f"users_module_{next(_MODULES)}"
        keys = {
            "cycles": "2",
            "dataset": '"traincert.trainer.datasets:digits"',
            "normalize": '{ inputs = "all" }',
            "validation_examples": "300",
            "test_examples": "360",
            "shards": "2",
            "model": '"traincert.trainer.models:mlp"',
            "model_options": "{ inputs = 64, hidden = [16], classes = 10 }",
            "optimizer_options": "{ momentum = 0.9 }",
            "learning_rate": "0.05",
            "batch_size": "32",
            "local_steps": "10",
        } | changed
        if module:
            (tmp_path / f"{module_name}.py").write_text(dedent(module), encoding="utf-8")
        lines = [f"{key} = {value}\n".replace("{module}", module_name) for key, value in keys.items() if value]
        path = tmp_path / f"{name}.toml"
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def small(job: TrainingJob) -> TrainingJob:
    return replace(
        job, cycles=20, density=0.25, keep_optimizer_state=True, outer_momentum=0.3, local_steps=5, history=3
    )


@pytest.fixture
def go_on(make_trainer: MakeTrainer, small: TrainingJob, miners: list[bytes], tmp_path: Path) -> Callable[..., Path]:
    """Opens the folder of a run, or makes it, and does some cycles more, with the first `count` miners."""

    def go(cycles: int, count: int = 4, folder: Path = tmp_path / "run", job: TrainingJob = small) -> Path:
        with RunFolder(folder, job) as run, make_trainer(job, folder) as trainer:
            if not run.records:
                run.begin(trainer.start(), trainer.dataset)
            state = run.load()
            for _ in range(cycles):
                result = trainer.run_cycle(state, miners[:count], seed=run.seed())
                run.save(run.next_record(result))
                state = result.after
        return folder

    return go
