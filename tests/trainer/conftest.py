"""A small job, its data, and an engine, shared by the trainer's tests."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import pytest

from traincert.trainer.datasets import Dataset, prepare_dataset
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.job import TrainingJob


@pytest.fixture(scope="session")
def job() -> TrainingJob:
    return replace(TrainingJob.named("digits"), hidden=(16,), local_epochs=2, learning_rate=0.05)


@pytest.fixture(scope="session")
def dataset(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare_dataset(job, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def engine(job: TrainingJob, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    with LocalEngine(job, tmp_path_factory.mktemp("engine"), workers=2) as engine:
        yield engine


@pytest.fixture(scope="session")
def miners() -> list[bytes]:
    return [hashlib.sha256(bytes([number])).digest() for number in range(4)]
