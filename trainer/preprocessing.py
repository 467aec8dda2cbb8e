"""Prepare a job's data: shuffle, split, normalize, hash, and store it as content-addressed, memory-mapped files.

Each step holds one chunk of the raw data in memory, and a few bytes for each example.
"""

import hashlib
import hmac
import json
import logging
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from traincert.trainer.datasets import Array, Chunk, RawDataset
from traincert.trainer.determinism import seeded
from traincert.trainer.errors import IntegrityError, JobError
from traincert.trainer.examples import (
    DTYPES,
    PREPARED,
    VERSION,
    Column,
    ColumnFile,
    Dataset,
    read_dataset,
    read_prepared,
    remove_temporary,
)
from traincert.trainer.job import TrainingJob
from traincert.trainer.sharding import cut_shards
from traincert.trainer.store import write_blob, write_file
from traincert.trainer.usercode import blaming, call

_LOG = logging.getLogger(__name__)
_KEY_BYTES = 32
_BLOCK = 2**22  # bytes of a column that are preprocessed at once
# The fields of a job that change the stored files.
_FIELDS = [
    "dataset",
    "dataset_options",
    "inputs",
    "target",
    "drop",
    "normalize",
    "hash",
    "encode",
    "missing",
    "shuffle_seed",
    "validation_examples",
    "test_examples",
    "shards",
    "shard_by",
    "shard_alpha",
]


def prepare_dataset(job: TrainingJob, directory: Path) -> Dataset:
    """Preprocess the job's data and store it in `directory`, which is made if it does not exist.

    Equal jobs give equal roots. If `directory` already has the data of an equal job, nothing is done; reading a file
    checks it. The split does not depend on `job.seed`: runs with different seeds have the same held-out examples.

    Raises JobError if the dataset cannot be loaded, or does not fit the job.
    """
    for folder in (directory, directory / "shards", directory / "held-out"):
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporary(folder)  # remove the temporary files of a killed process
    key = _hash_key(Path(job.hash_key)) if job.hash_key else b""
    facts = {name: getattr(job, name) for name in _FIELDS} | {"hash_key": hashlib.sha256(key).hexdigest()}
    source = job.identity().get(f"module {job.dataset.partition(':')[0]}")
    preparation = json.dumps(facts | {"source": source}, sort_keys=True, default=str)
    prepared = read_prepared(directory / PREPARED)
    if prepared.get("preparation") == preparation:
        try:
            return read_dataset(job, directory, bytes.fromhex(prepared["root"]))
        except IntegrityError:
            pass  # a file is missing or damaged: prepare all of them again
    manifest = _Preparation(job, key).run(directory, facts)
    root = write_blob(directory, json.dumps(manifest, sort_keys=True, default=str).encode())
    done = {"version": VERSION, "preparation": preparation, "root": root.hex()}
    write_file(directory / PREPARED, json.dumps(done).encode())
    return read_dataset(job, directory, root)


class _Preparation:
    """Prepares a job's data in several passes: count, statistics, store."""

    def __init__(self, job: TrainingJob, key: bytes) -> None:
        self.job = job
        self.key = key
        with seeded(job.shuffle_seed):
            raw = call(job.dataset, job.dataset_options, "dataset")
        if not isinstance(raw, RawDataset):
            raise JobError(f"dataset = {job.dataset!r}: returned {type(raw).__name__}, not a datasets.RawDataset")
        self.raw = raw
        self.names = job.columns
        self.columns: dict[str, Column] = {}
        self.values: dict[str, set[Any]] = {name: set() for name in (*job.hash, *job.encode)}
        """The values of each column to hash or encode."""
        self.fills: dict[str, Array] = {name: np.asarray(fill) for name, fill in job.missing.items() if fill != "mean"}

    def run(self, directory: Path, facts: dict[str, Any]) -> dict[str, Any]:
        """Store all shards and splits, and return the manifest."""
        job = self.job
        count = self._count(self.raw.train, "train")
        test_count = self._count(self.raw.test, "test") if self.raw.test else 0
        self._warn_of_collisions()
        if bool(test_count) == bool(job.test_examples):
            has = (
                f"brings a test split of {test_count}: must be 0"
                if test_count
                else "brings no test split: must not be 0"
            )
            raise JobError(f"test_examples = {job.test_examples}: {job.dataset} {has}")
        held_out = job.validation_examples + job.test_examples
        if held_out + job.shards > count:
            raise JobError(
                f"validation_examples = {job.validation_examples}, test_examples = {job.test_examples}: must leave one "
                f"example for each of {job.shards} shards, but {job.dataset} has {count} in all"
            )
        # RandomState, because numpy guarantees that its numbers never change.
        order = np.random.RandomState(job.shuffle_seed).permutation(count)
        validation, test, train = np.split(order, [job.validation_examples, held_out])
        self._fill_with_means(count, train)
        statistics = self._statistics(count, train)

        shard_folder, held_out_folder = directory / "shards", directory / "held-out"
        cuts = cut_shards(job, train, self._codes(count) if job.shard_by else None)
        folders = [shard_folder] * job.shards + [held_out_folder] * (1 + bool(job.test_examples))
        cuts += [validation] + ([test] if job.test_examples else [])
        stored = self._store(self.raw.train, count, cuts, folders, statistics)
        if self.raw.test:
            stored += self._store(self.raw.test, test_count, [np.arange(test_count)], [held_out_folder], statistics)
        return facts | {
            "statistics": {name: [each.tolist() for each in pair] for name, pair in statistics.items()},
            "codes": {name: sorted(self.values[name]) for name in job.encode},
            "fills": {name: fill.tolist() for name, fill in self.fills.items()},
            "shards": [digest.hex() for digest in stored[: job.shards]],
            "sizes": [len(cut) for cut in cuts[: job.shards]],
            "validation": stored[job.shards].hex(),
            "test": stored[job.shards + 1].hex(),
        }

    def _chunks(self, split: Callable[[], Iterable[Chunk]], count: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield a split of `count` examples in blocks: the number of examples before the block, and the columns used.

        A block is a part of a chunk. Its small size limits the memory of the computations on it. Missing values are
        replaced, as far as it is known by what.
        """
        start = 0
        for chunk in self._raw_chunks(split):
            length = len(chunk[self.names[0]])
            rows = max(1, min(_BLOCK // max(1, chunk[name][:1].nbytes) for name in self.names))
            if start + length > count:
                self._refuse_other_count(count, f"more than {count}")
            for first in range(0, length, rows):
                yield (
                    start + first,
                    {name: self._filled(name, chunk[name][first : first + rows]) for name in self.names},
                )
            start += length
        if start != count:
            self._refuse_other_count(count, str(start))

    def _refuse_other_count(self, count: int, found: str) -> None:
        raise JobError(
            f"dataset = {self.job.dataset!r}: its function gave {count} examples when it was called first, and {found} "
            "when it was called again; it must return a new iterator of the same chunks each time"
        )

    def _raw_chunks(self, split: Callable[[], Iterable[Chunk]]) -> Iterator[dict[str, Array]]:
        with seeded(self.job.shuffle_seed):  # so that each pass gives the same chunks
            with blaming("dataset", self.job.dataset):
                chunks = iter(split())
            while True:
                with blaming("dataset", self.job.dataset):
                    try:
                        chunk = next(chunks)
                    except StopIteration:
                        return
                if not isinstance(chunk, Mapping) or not all(isinstance(name, str) for name in chunk):
                    raise JobError(
                        f"dataset = {self.job.dataset!r}: gave a {type(chunk).__name__} as a chunk; each chunk must be "
                        "a dict of arrays by the columns' names (yield it, or return a list of them)"
                    )
                if all(np.size(column) for column in chunk.values()):  # an empty chunk has no examples
                    yield {name: _as_array(column) for name, column in chunk.items()}

    def _count(self, split: Callable[[], Iterable[Chunk]], name: str) -> int:
        """Count a split's examples, check that all chunks have the same columns, and collect what is to be encoded.

        Raises JobError if a value is missing, or not finite where it must be.
        """
        count = 0
        missing: dict[str, list[int]] = {name: [] for name in self.names}
        infinite: dict[str, list[int]] = {name: [] for name in self.names}
        for chunk in self._raw_chunks(split):
            self._check(chunk, name)
            for column in self.names:
                if column not in self.job.missing:
                    missing[column] += [count + int(row) for row in np.flatnonzero(_any(_holes(chunk[column])))]
                if chunk[column].dtype.kind == "f":
                    infinite[column] += [count + int(row) for row in np.flatnonzero(_any(np.isinf(chunk[column])))]
            for column, values in self.values.items():
                filled = self._filled(column, chunk[column])
                values.update(np.unique(filled[~_holes(filled)]).tolist())
            count += len(chunk[self.names[0]])
        for column in self.names:
            where = f"dataset = {self.job.dataset!r}: its {name} split has a column {column!r} in which"
            if found := missing[column]:
                number = "a number" if column in self.values else 'a number or "mean"'
                hint = number if self.columns[column].dtype.kind in "biufc" else "a text"
                raise JobError(
                    f"{where} {len(found)} rows have a missing value (NaN, None), the first is row {found[0]}; "
                    f"mend the data or set missing = {{ {column} = ... }} to {hint}"
                )
            if found := infinite[column]:
                said = f"{where} {len(found)} rows have an infinite value, the first is row {found[0]}"
                if column in self.job.normalize:
                    raise JobError(f"{said}; mend the data")
                _LOG.warning(said)
        if not count:
            raise JobError(f"dataset = {self.job.dataset!r}: its {name} split is empty")
        return count

    def _codes(self, count: int) -> npt.NDArray[np.int64]:
        """Return a number for each value of the column `shard_by`, for all examples, (count,)."""
        name = self.job.shard_by
        known: dict[Any, int] = {}
        codes: list[int] = []
        for chunk in self._raw_chunks(self.raw.train):
            column = self._filled(name, chunk[name])
            if column.size != len(column):
                raise JobError(
                    f"shard_by = {name!r}: the column is of {column.shape[1:]}; must be one value an example"
                )
            if (holes := _any(_holes(column))).any():
                row = len(codes) + int(np.flatnonzero(holes)[0])
                raise JobError(f"shard_by = {name!r}: the column has no value in row {row}; mend the data")
            codes += [known.setdefault(value, len(known)) for value in column.reshape(-1).tolist()]
        if len(codes) != count:
            self._refuse_other_count(count, str(len(codes)))
        return np.array(codes)

    def _filled(self, name: str, array: Array) -> Array:
        """Return a column with its missing values replaced, if the job says by what."""
        if name not in self.fills:
            return array
        holes = _holes(array)
        if not holes.any():
            return array
        try:
            return np.where(holes, self.fills[name].astype(array.dtype), array)
        except ValueError:
            raise JobError(f"missing.{name} = {self.job.missing[name]!r}: the column is of {array.dtype}") from None

    def _fill_with_means(self, count: int, train: npt.NDArray[np.int64]) -> None:
        """Find the mean of each feature over the training examples, without missing values, where the job wants it."""
        names = [name for name, fill in self.job.missing.items() if fill == "mean" and name not in self.values]
        if not names:
            return
        trained = np.zeros(count, np.bool_)
        trained[train] = True
        sums = {name: np.zeros(self.columns[name].shape) for name in names}
        numbers = {name: np.zeros(self.columns[name].shape) for name in names}
        for start, chunk in self._chunks(self.raw.train, count):
            for name in names:
                rows = chunk[name][trained[start : start + len(chunk[name])]].astype(np.float64)
                sums[name] += np.nansum(rows, axis=0)
                numbers[name] += np.isfinite(rows).sum(axis=0)
        self.fills |= {name: sums[name] / np.maximum(numbers[name], 1) for name in names}

    def _warn_of_collisions(self) -> None:
        for name, buckets in self.job.hash.items():
            used = Counter(_bucket(self.key, name, value, buckets) for value in self.values[name])
            colliding = sum(number for number in used.values() if number > 1)
            if colliding:
                _LOG.warning(
                    "hash: %d of the %d values of %r share one of the %d buckets with another value; take more "
                    "buckets, or encode the column",
                    colliding,
                    len(self.values[name]),
                    name,
                    buckets,
                )

    def _check(self, chunk: Chunk, split: str) -> None:
        job = self.job
        where = f"dataset = {job.dataset!r}: its {split} split"
        for name in [*self.names, *job.drop]:
            if name not in chunk:
                raise JobError(f"{where} has no column {name!r}; it has {', '.join(chunk)}")
        for name in chunk:
            if name not in self.names and name not in job.drop:
                raise JobError(
                    f"{where} has a column {name!r}, which is neither in inputs, nor the target, nor in drop"
                )
        for name in self.names:
            array = chunk[name]
            if not isinstance(array, np.ndarray) or not array.ndim:
                raise JobError(
                    f"{where} has a column {name!r} of {type(array).__name__}, not a numpy array or a tensor with one "
                    "row for each example"
                )
        if len({len(chunk[name]) for name in self.names}) != 1:
            raise JobError(f"{where} has columns of different lengths in a chunk")
        for name in self.names:
            array = chunk[name]
            column = self.columns.setdefault(name, Column(array.dtype, array.shape[1:]))
            same_kind = array.dtype == column.dtype or name in self.values  # the width of strings may differ
            if not same_kind or array.shape[1:] != column.shape:
                raise JobError(f"{where} has a column {name!r} of different types or shapes in its chunks")
            if array.dtype not in DTYPES and name not in self.values:
                numeric = array.dtype.kind in "biufc"
                how = (
                    f"convert it to one of {', '.join(map(str, DTYPES))}"
                    if numeric
                    else "encode it, hash it or drop it"
                )
                raise JobError(f"{where} has a column {name!r} of {array.dtype}: {how}")
            if name in job.normalize and array.dtype.kind not in "fiu":
                raise JobError(f"normalize: {name!r} is of {array.dtype}, not numbers")

    def _statistics(self, count: int, train: npt.NDArray[np.int64]) -> dict[str, tuple[Array, Array]]:
        """Return the mean and standard deviation (float64) of each column to normalize, over the training examples."""
        if not self.job.normalize:
            return {}
        trained = np.zeros(count, np.bool_)
        trained[train] = True

        def total(term: Callable[[str, Array], Array]) -> dict[str, Array]:
            sums: dict[str, Array] = {}
            for start, chunk in self._chunks(self.raw.train, count):
                for name in self.job.normalize:
                    array = chunk[name]
                    rows = array[trained[start : start + len(array)]].reshape(-1, math.prod(array.shape[1:]))
                    sums[name] = sums.get(name, np.float64(0)) + _sum_rows(term(name, rows.astype(np.float64)))
            return sums

        def mean(name: str, sums: Array, each: bool) -> Array:
            if each:
                return (sums / len(train)).reshape(self.columns[name].shape)
            return np.array(math.fsum(sums) / (len(train) * len(sums)))

        kind = self.job.normalize
        means = {name: mean(name, sums, kind[name] != "all") for name, sums in total(lambda _name, rows: rows).items()}
        squares = total(lambda name, rows: (rows - means[name].reshape(-1)) ** 2)
        deviations = {name: np.sqrt(mean(name, sums, kind[name] == "each")) for name, sums in squares.items()}
        return {name: (means[name], np.where(deviations[name] > 0, deviations[name], 1.0)) for name in means}

    def _store(
        self,
        split: Callable[[], Iterable[Chunk]],
        count: int,
        cuts: list[npt.NDArray[np.int64]],
        folders: list[Path],
        statistics: dict[str, tuple[Array, Array]],
    ) -> list[bytes]:
        """Write a file for each cut, which is an array of example numbers; return the files' hashes, 32 bytes each."""
        cut_of = np.empty(count, np.int32)
        place_of = np.empty(count, np.int64)
        for number, cut in enumerate(cuts):
            cut_of[cut], place_of[cut] = number, np.arange(len(cut))
        try:
            files = [ColumnFile(folder, len(cut), self._stored()) for folder, cut in zip(folders, cuts, strict=True)]
            for start, chunk in self._chunks(split, count):
                ready = {name: self._prepare(name, array, statistics) for name, array in chunk.items()}
                here = slice(start, start + len(ready[self.names[0]]))
                for number, file in enumerate(files):
                    rows = np.flatnonzero(cut_of[here] == number)
                    if len(rows):
                        file.write(place_of[here][rows], {name: array[rows] for name, array in ready.items()})
            return [file.finish() for file in files]
        except BaseException:
            for folder in set(folders):
                remove_temporary(folder)
            raise

    def _stored(self) -> dict[str, Column]:
        """Return the columns' dtypes and shapes after preprocessing."""

        def dtype(name: str) -> np.dtype[Any]:
            if name in self.values:
                return np.dtype(np.int64)
            return np.dtype(np.float32) if name in self.job.normalize else self.columns[name].dtype

        return {name: Column(dtype(name), self.columns[name].shape) for name in self.names}

    def _prepare(self, name: str, array: Array, statistics: dict[str, tuple[Array, Array]]) -> Array:
        if name in self.job.hash:
            values, inverse = np.unique(array, return_inverse=True)
            buckets = [_bucket(self.key, name, value, self.job.hash[name]) for value in values.tolist()]
            return np.array(buckets, np.int64)[inverse].reshape(array.shape)
        if name in self.job.encode:
            return np.searchsorted(np.array(sorted(self.values[name])), array).astype(np.int64)
        if name in statistics:
            mean, deviation = statistics[name]
            return ((array - mean) / deviation).astype(np.float32)
        return array


def _holes(array: Array) -> npt.NDArray[np.bool_]:
    """Return which values are missing: NaN or None."""
    if array.dtype.kind in "fc":
        return np.isnan(array)
    if array.dtype.kind == "O":
        return np.array([value is None or value != value for value in array.reshape(-1)], np.bool_).reshape(array.shape)
    return np.zeros(array.shape, np.bool_)


def _as_array(column: Any) -> Array:
    array: Array = column.detach().cpu().numpy() if isinstance(column, torch.Tensor) else column
    return array


def _any(values: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return for each row (N, ...) whether any value is true."""
    return np.array(values.reshape(len(values), -1).any(axis=1))


def _sum_rows(rows: Array) -> Array:
    """Add rows (N, features) in their order, so that every machine gets the same bits; return (features,)."""
    if rows.shape[1] == 1:  # numpy adds a single column in an order that depends on the processor
        return np.array([math.fsum(rows[:, 0])])
    total: Array = rows.sum(axis=0)
    return total


def _bucket(key: bytes, column: str, value: object, buckets: int) -> int:
    data = value if isinstance(value, bytes) else str(value).encode()
    digest = hmac.digest(key, column.encode() + b"\0" + data, "sha256")
    return int.from_bytes(digest[:8], "little") % buckets


def _hash_key(path: Path) -> bytes:
    """Read the secret key for hashed columns, 32 bytes. If there is no such file, make one with a random key."""
    try:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(handle, "wb") as file:
                file.write(os.urandom(_KEY_BYTES))
        key, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise JobError(f"hash_key = {str(path)!r}: {error.strerror}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise JobError(f"hash_key = {str(path)!r}: others may read it: chmod 600")
    if len(key) != _KEY_BYTES:
        raise JobError(f"hash_key = {str(path)!r}: has {len(key)} bytes, must have {_KEY_BYTES}")
    return key
