"""Data: how it is split, scaled, stored and verified."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from traincert.trainer.datasets import (
    Dataset,
    IntegrityError,
    prepare_dataset,
    read_blob,
    read_examples,
    write_blob,
)
from traincert.trainer.job import JobError, TrainingJob


def test_every_example_is_in_exactly_one_split_or_shard(dataset: Dataset) -> None:
    parts = [read_examples(dataset.directory, digest) for digest in (*dataset.shards, dataset.validation, dataset.test)]
    assert [len(part.labels) for part in parts] == [285, 284, 284, 284, 300, 360]
    pooled = torch.cat([part.inputs for part in parts])
    assert pooled.shape == (1797, 64)
    assert len(torch.unique(pooled, dim=0)) == 1797  # no image is there twice in the original either


def test_scaling_uses_the_training_examples_alone(dataset: Dataset) -> None:
    train = torch.cat([read_examples(dataset.directory, shard).inputs for shard in dataset.shards]).double()
    torch.testing.assert_close(train.mean(dim=0), torch.zeros(64, dtype=torch.float64), atol=1e-6, rtol=0)
    test = read_examples(dataset.directory, dataset.test).inputs
    assert test.mean(dim=0).abs().max() > 0.01


def test_types_and_shapes(dataset: Dataset) -> None:
    inputs, labels = read_examples(dataset.directory, dataset.shards[0])
    assert inputs.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(10))


def test_preparing_twice_and_with_another_seed_gives_the_same_root(
    job: TrainingJob, dataset: Dataset, tmp_path: Path
) -> None:
    assert prepare_dataset(job, dataset.directory).root == dataset.root
    assert prepare_dataset(replace(job, seed=99), tmp_path).root == dataset.root


def test_the_root_commits_to_the_split(job: TrainingJob, dataset: Dataset, tmp_path: Path) -> None:
    assert prepare_dataset(replace(job, shards=5), tmp_path).root != dataset.root
    manifest = read_blob(dataset.directory, dataset.root).decode()
    for digest in (*dataset.shards, dataset.validation, dataset.test):
        assert digest.hex() in manifest


def test_only_named_files_are_left(dataset: Dataset) -> None:
    names = {digest.hex() for digest in (*dataset.shards, dataset.validation, dataset.test, dataset.root)}
    assert {path.name for path in dataset.directory.iterdir()} == names


def test_a_flipped_byte_is_refused(job: TrainingJob, tmp_path: Path) -> None:
    dataset = prepare_dataset(job, tmp_path)
    path = tmp_path / dataset.shards[1].hex()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"{path}: the file's SHA-256 is [0-9a-f]{{64}}, not its name"):
        read_examples(tmp_path, dataset.shards[1])
    prepare_dataset(job, tmp_path)
    read_examples(tmp_path, dataset.shards[1])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=f"{'00' * 32}: no such file"):
        read_blob(tmp_path, bytes(32))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08").mkdir()  # in the way
    with pytest.raises(IsADirectoryError):
        write_blob(tmp_path, b"test")
    assert len(list(tmp_path.iterdir())) == 1


def test_more_held_out_examples_than_there_are_is_an_error(job: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"validation_examples = 1500, test_examples = 360: .* has 1797 in all"):
        prepare_dataset(replace(job, validation_examples=1500), tmp_path)
