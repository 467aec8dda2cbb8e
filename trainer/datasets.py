"""A job's data: loaded, split, scaled, and stored as content-addressed files.

Every stored file is named by the SHA-256 of its bytes, in hex, and is checked against its name when it is read.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from traincert.trainer.job import JobError, TrainerError, TrainingJob


class IntegrityError(TrainerError):
    """A stored file is missing, or its bytes do not hash to its name."""


class Examples(NamedTuple):
    """Examples with their classes: a shard, the validation split or the test split."""

    inputs: torch.Tensor  # (N, features) float32, scaled
    labels: torch.Tensor  # (N,) int64


@dataclass(frozen=True)
class Dataset:
    """A job's data as stored in a directory. Hashes are 32 raw bytes, each the name of a file there."""

    job: TrainingJob
    directory: Path
    shards: tuple[bytes, ...]
    validation: bytes
    test: bytes
    root: bytes
    """Hash of the manifest: the dataset's name and all the hashes above, as JSON."""


def prepare_dataset(job: TrainingJob, directory: Path) -> Dataset:
    """Load and split the job's data and store it in `directory`, which is made if need be.

    The split does not depend on `job.seed`, so that runs with other seeds are measured on the same examples. Inputs
    are centred by each feature's mean and divided by the standard deviation over all features, both of the training
    examples alone, so that nothing of the held-out data leaks. Equal jobs give the same `root`; files already there
    are written again. Raises JobError if the job wants more examples than there are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    raw, labels = _load_digits()
    held_out = job.validation_examples + job.test_examples
    if held_out + job.shards > len(raw):
        raise JobError(
            f"validation_examples = {job.validation_examples}, test_examples = {job.test_examples}: must leave one "
            f"example for each of {job.shards} shards, but {job.dataset} has {len(raw)} in all"
        )
    # Shuffled by a hash, because neighbours in the original order were written by the same hand.
    order = np.array(sorted(range(len(raw)), key=lambda index: hashlib.sha256(index.to_bytes(8, "little")).digest()))
    validation, test, train = np.split(order, [job.validation_examples, held_out])
    inputs = _scale(raw, train)

    def store(indices: npt.NDArray[np.int64]) -> bytes:
        tensors = {"inputs": torch.from_numpy(inputs[indices]), "labels": torch.from_numpy(labels[indices])}
        return write_blob(directory, safetensors.torch.save(tensors))

    shards = tuple(store(indices) for indices in np.array_split(train, job.shards))
    validation_hash, test_hash = store(validation), store(test)
    manifest = {
        "dataset": job.dataset,
        "shards": [shard.hex() for shard in shards],
        "test": test_hash.hex(),
        "validation": validation_hash.hex(),
    }
    root = write_blob(directory, json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
    return Dataset(job, directory, shards, validation_hash, test_hash, root)


def read_examples(directory: Path, digest: bytes) -> Examples:
    """Read a shard or split that `prepare_dataset` stored; raises as `read_blob` does."""
    tensors = safetensors.torch.load(read_blob(directory, digest))
    # Cloned, because tensors inside a file start at any address, and vectorized sums may depend on alignment.
    return Examples(tensors["inputs"].clone(), tensors["labels"].clone())


def write_blob(directory: Path, data: bytes) -> bytes:
    """Store `data` in `directory` under its hash, durably and never half-written; return the hash, 32 bytes."""
    digest = hashlib.sha256(data).digest()
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(directory / digest.hex())
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
    return digest


def read_blob(directory: Path, digest: bytes) -> bytes:
    """Read the bytes that hash to `digest` (32 bytes) from `directory`.

    Raises IntegrityError if the file is missing, or its bytes hash to something else.
    """
    path = directory / digest.hex()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file") from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest.hex():
        raise IntegrityError(f"{path}: the file's SHA-256 is {found}, not its name")
    return data


def _load_digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """scikit-learn's bundled digits: inputs (1797, 64), whole numbers 0 to 16; labels (1797,), 0 to 9."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    inputs, labels = load_digits(return_X_y=True)
    return inputs.astype(np.float64), labels.astype(np.int64)


def _scale(raw: npt.NDArray[np.float64], train: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Scale all examples (N, features) by the statistics of those at the indices `train`."""
    mean = raw[train].mean(axis=0)  # (features,)
    # Mean of squares less square of the mean: sums of small whole numbers are exact in float64, so that every
    # machine gets the same bits, whatever the order in which it adds.
    deviation = np.sqrt((raw[train] ** 2).mean() - raw[train].mean() ** 2)
    scaled: npt.NDArray[np.float32] = ((raw - mean) / deviation).astype(np.float32)
    return scaled
