"""Prepared data: examples and datasets, and their content-addressed, memory-mapped files."""

import hashlib
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch.utils._pytree import tree_map

from traincert.trainer.datasets import Array
from traincert.trainer.errors import IntegrityError, JobError
from traincert.trainer.job import TrainingJob
from traincert.trainer.store import read_blob, sync, verify_blob

# The dtypes that a prepared column may have: numpy's, and safetensors' name.
DTYPES = {
    np.dtype(name): short
    for name, short in {
        "float64": "F64",
        "float32": "F32",
        "float16": "F16",
        "int64": "I64",
        "int32": "I32",
        "int16": "I16",
        "int8": "I8",
        "uint8": "U8",
        "bool": "BOOL",
    }.items()
}
PREPARED = "prepared.json"
VERSION = 2
"""Version of the format of prepared.json."""


class Examples(NamedTuple):
    """A shard, the validation split or the test split.

    The tensors may be memory-mapped. `batch` copies them.
    """

    inputs: tuple[torch.Tensor, ...]  # each (N, ...)
    target: Any  # (N, ...); a tuple of tensors if the job names several columns

    def __len__(self) -> int:
        """Return the number of examples, N."""
        return len(self.inputs[0])

    def batch(self, index: torch.Tensor | slice, device: str = "cpu") -> "Examples":
        """Return a copy, on `device`, of the examples that `index` selects."""

        def take(tensor: torch.Tensor) -> torch.Tensor:
            # Copy: tensors inside a file start at any address, and the bits of vectorized sums may depend on alignment.
            return (tensor[index].clone() if isinstance(index, slice) else tensor[index]).to(device)

        return tree_map(take, self)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Dataset:
    """A job's prepared data in a directory. Hashes are 32 raw bytes; in hex they are the files' names."""

    job: TrainingJob
    directory: Path
    shards: tuple[bytes, ...]
    """The shards' files in `shard_folder`, the only folder that miners see."""
    validation: bytes
    """The validation split's file in `held_out_folder`."""
    test: bytes
    """The test split's file in `held_out_folder`."""
    root: bytes
    """SHA-256 of the manifest (JSON): how the data was prepared, and the hashes above."""

    @property
    def shard_folder(self) -> Path:
        """The folder of the shards."""
        return self.directory / "shards"

    def manifest(self) -> dict[str, Any]:
        """Return the manifest. Raises IntegrityError if its file is missing or damaged."""
        manifest: dict[str, Any] = json.loads(read_blob(self.directory, self.root))
        return manifest

    @property
    def held_out_folder(self) -> Path:
        """The folder of the validation and the test split."""
        return self.directory / "held-out"


def read_examples(job: TrainingJob, directory: Path, digest: bytes) -> Examples:
    """Check the file of a shard or split against its hash (32 bytes), and map it into memory.

    Raises IntegrityError if the file is missing or damaged.
    """
    path = verify_blob(directory, digest)
    with safe_open(path, framework="pt") as file:
        targets = tuple(map(file.get_tensor, job.target))
        return Examples(tuple(map(file.get_tensor, job.inputs)), targets[0] if len(targets) == 1 else targets)


def stored_dataset(job: TrainingJob, directory: Path) -> Dataset:
    """Return the data that is in `directory`, which was prepared before. The files that the job names need not exist.

    Raises JobError if it was not, and IntegrityError if a file is missing.
    """
    prepared = read_prepared(directory / PREPARED)
    if "root" not in prepared:
        raise JobError(f"{directory}: no data was prepared here")
    return read_dataset(job, directory, bytes.fromhex(prepared["root"]))


def read_prepared(path: Path) -> dict[str, Any]:
    """Read prepared.json. A missing or damaged file gives {}. Raises JobError if it has another format."""
    try:
        prepared = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(prepared, dict) or prepared.get("version") != VERSION:
        found = prepared.get("version") if isinstance(prepared, dict) else None
        raise JobError(
            f"{path} has format {found}, this traincert reads format {VERSION}: go on with the traincert that made it, "
            "or prepare the data in another folder"
        )
    return prepared


def read_dataset(job: TrainingJob, directory: Path, root: bytes) -> Dataset:
    """Return the dataset whose manifest has the SHA-256 `root`. Raises IntegrityError if a file is missing."""
    manifest = json.loads(read_blob(directory, root))
    shards = tuple(map(bytes.fromhex, manifest["shards"]))
    dataset = Dataset(
        job, directory, shards, bytes.fromhex(manifest["validation"]), bytes.fromhex(manifest["test"]), root
    )
    for folder, digest in [
        *((dataset.shard_folder, shard) for shard in shards),
        (dataset.held_out_folder, dataset.validation),
        (dataset.held_out_folder, dataset.test),
    ]:
        if not (folder / digest.hex()).is_file():
            raise IntegrityError(f"{folder / digest.hex()}: no such file")
    return dataset


@dataclass(frozen=True)
class Column:
    """The dtype and shape that a column must have in every chunk."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # of one example


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files of a killed process."""
    for path in folder.glob(".writing-*"):
        path.unlink()


class ColumnFile:
    """A safetensors file that is written row by row, in any order, and is never whole in memory.

    Format (https://huggingface.co/docs/safetensors): the header's length (u64, little-endian), the header (JSON, padded
    with spaces), and the tensors' bytes, in the order that the safetensors library writes.
    """

    def __init__(self, folder: Path, count: int, columns: dict[str, Column]) -> None:
        header: dict[str, Any] = {}
        end = 0
        ordered = sorted(columns.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
        for name, column in ordered:
            start, end = end, end + count * math.prod(column.shape) * column.dtype.itemsize
            shape = [count, *column.shape]
            header[name] = {"dtype": DTYPES[column.dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".writing-")
        self.path = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            # Reserve the disk space now. If the disk were full later, writing to the memory map would kill the process.
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        self._arrays = {
            name: (column.dtype, 8 + len(text) + header[name]["data_offsets"][0], (count, *column.shape))
            for name, column in ordered
        }

    def write(self, places: npt.NDArray[np.int64], rows: dict[str, Array]) -> None:
        """Write the rows of all columns to their places, which are row numbers."""
        for name, (dtype, offset, shape) in self._arrays.items():
            # Map anew each time: unmapping removes the written pages from this process's memory.
            array: Array = np.memmap(self.path, dtype, "r+", offset, shape)
            array[places] = rows[name]

    def finish(self) -> bytes:
        """Rename the file to its SHA-256, durably; return the hash, 32 bytes."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            os.fsync(file.fileno())
        self.path.replace(self.path.parent / digest.hex())
        sync(self.path.parent)
        return digest
