"""The run folder: a record of each cycle, and a store. An interrupted run continues from the last record.

job.toml            the job, with all its keys
identity.json       what makes the job: its keys, SHA-256 of the users' modules that it names, and where they were
version             the version of the folder's format
data/               shards/ and held-out/: content-addressed files
store/              models, velocities and miners' memories: content-addressed files
cycles/00000012.json  the record of cycle 12; it has the hash of the record before
costs/00000012.json what cycle 12 cost: seconds, and what the operating system says of each task
initial.safetensors the model that the run began with, if it is from another run
"""

import fcntl
import hashlib
import json
import math
import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypedDict

from traincert.trainer.accounting import Spent
from traincert.trainer.cycle import Checkpoint, CycleResult
from traincert.trainer.energy import Spending
from traincert.trainer.engines.orders import Order
from traincert.trainer.errors import IntegrityError, RunError
from traincert.trainer.examples import Dataset, stored_dataset
from traincert.trainer.job import TrainingJob, differences
from traincert.trainer.judging import Known, TaskResult
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.privacy import check_private
from traincert.trainer.scoring import Contribution, Evaluation
from traincert.trainer.spot_checks import Drawn, SpotCheck
from traincert.trainer.standings import Standing
from traincert.trainer.state import load_state
from traincert.trainer.store import prune, verify_blob, write_file
from traincert.trainer.tasks import Task

VERSION = 6
"""Version of the run folder's format, records included."""

_COSTS = "costs"
_INITIAL = "initial.safetensors"

Record = dict[str, Any]
"""A cycle's record, as in its JSON file. Record 0 is the state before the first cycle. Hashes are in hex."""


def record_hash(record: Record) -> bytes:
    """Return the SHA-256 of a record's file, 32 bytes."""
    return hashlib.sha256(_encode(record)).digest()


def contributions(record: Record) -> tuple[Contribution, ...]:
    """Return a cycle's contributions, sorted by miner. Record 0 has none."""
    return tuple(
        Contribution(
            bytes.fromhex(task["miner"]),
            bytes.fromhex(task["update_hash"]),
            task["params"],
            task["loss_reduction"],
            task["weight"],
        )
        for task in record["tasks"]
        if task["refusal"] is None
    )


def standings(record: Record) -> dict[bytes, Standing]:
    """Return the miners' standings after a cycle, by miner."""
    return {bytes.fromhex(miner): Standing(*each) for miner, each in record["standings"].items()}


class Costs(TypedDict):
    """What a cycle cost."""

    cycle: int
    """Counted from 1."""
    seconds: float
    """How long it took."""
    training: float
    """How long the training of all tasks took together, as the miners say; seconds."""
    cpu_seconds: float
    """CPU seconds of the coordinator's process, for all but the miners' tasks: scoring, spot checks, aggregation."""
    joules: dict[str, float]
    """What each meter of energy of the coordinator's machine counted meanwhile, by its name (energy.py)."""
    tasks: dict[str, dict[str, Any] | None]
    """The fields of each committed task's Resources (resources.py), by miner; None: they were not measured."""


class RunFolder:
    """A run folder, locked while it is open. Use it as a context manager."""

    def __init__(
        self,
        folder: Path,
        job: TrainingJob | None = None,
        *,
        source: Path | None = None,
        replace_untrained: bool = False,
    ) -> None:
        """Open a run folder. With `job`, make the folder if it does not exist.

        A new run begins with the last model of the run folder `source`, if it is given; the model is copied. With
        `replace_untrained` a run of another job that has trained nothing is begun anew.

        Raises RunError if the folder belongs to another job, is in use by another process, has another format, or is
        not a run folder, or if `source` is not; IntegrityError if a record is damaged.
        """
        self.folder = folder
        self.store = folder / "store"
        self._cycles = folder / "cycles"
        described = folder / "job.toml"
        if job is None and not described.is_file():
            raise RunError(f"{folder} has no job.toml: it is not a run folder")
        if job and folder.exists() and any(folder.iterdir()) and not (folder / ".lock").exists():
            raise RunError(f"{folder} is not empty, and is not a run folder: choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder / ".lock")  # first, because this file marks the folder as a run folder
        try:
            for each in (self.store, self._cycles):
                each.mkdir(exist_ok=True)
            _check_version(folder / "version", new=not described.exists())
            if job:
                untrained = not described.exists() or (replace_untrained and len(list(self._cycles.iterdir())) <= 1)
                job = self._with_initial_model(job, source, untrained)
                self._bind(job, described, untrained)
            else:
                sys.path += [path for path in _read_identity(folder / "identity.json")["paths"] if path not in sys.path]
            self.job = job or TrainingJob.load(described)
            self._moved = job is None  # the files that the job names may be elsewhere
            self.records = _read_records(self._cycles)
        except BaseException:
            self._lock.close()
            raise

    def _with_initial_model(self, job: TrainingJob, source: Path | None, untrained: bool) -> TrainingJob:
        """Return the job with the initial model in this folder, if there is one. First copy it from `source`."""
        initial = self.folder / _INITIAL
        if source and untrained and (source.exists() or not initial.exists()):
            with RunFolder(source) as run:
                write_file(initial, run.last_model().read_bytes())
        elif source and not initial.exists():
            raise RunError(
                f"{self.folder} did not begin with the model of another run: choose another folder with --out"
            )
        return replace(job, initial_model=str(initial)) if initial.exists() else job

    def _bind(self, job: TrainingJob, described: Path, untrained: bool) -> None:
        """Write what makes the job into the folder, or compare it. A run that has trained nothing is begun anew.

        Raises RunError if it is another job.
        """
        path = self.folder / "identity.json"
        ours = job.identity()
        theirs = _read_identity(path)["identity"] if path.exists() else ours
        if job.initial_model and not ours["initial_model"]:  # it is not needed any more
            ours["initial_model"] = theirs.get("initial_model", "")
        if different := differences(ours, theirs):
            if not untrained:
                raise RunError(
                    f"{self.folder} is a run of another job ({', '.join(different)}): choose another folder with "
                    f"--out; to begin there with this run's model, add --from {self.folder}"
                )
            for old in (described, path, *self._cycles.iterdir()):
                old.unlink(missing_ok=True)
        if not described.exists():
            write_file(described, job.to_toml().encode())
        paths = sorted({str(folder) for _, folder in job.modules().values()})  # they may have moved
        write_file(path, json.dumps({"identity": ours, "paths": paths}, indent=1).encode() + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.close()

    @property
    def cycles(self) -> int:
        """The number of cycles that are done."""
        return max(0, len(self.records) - 1)

    @property
    def identity(self) -> dict[str, str]:
        """What makes the job, as `TrainingJob.identity` had it when the run was last opened with its job."""
        identity: dict[str, str] = _read_identity(self.folder / "identity.json")["identity"]
        return identity

    @property
    def best_cycle(self) -> int:
        """The cycle after which the validation loss was lowest; the first of several. 0 is the initial model."""
        losses = [record["loss_after"] for record in self.records]
        return losses.index(min(losses))

    @property
    def hashes(self) -> list[bytes]:
        """SHA-256 of each record's file, 32 bytes each. Record 0 comes first."""
        return [record_hash(record) for record in self.records]

    @property
    def head(self) -> bytes:
        """SHA-256 of the last record, 32 bytes. Two runs with equal heads have equal records."""
        return record_hash(self.records[-1])

    def seed(self) -> bytes:
        """Return the next cycle's seed, 32 bytes. Nobody knows it before the last cycle ends."""
        return hashlib.sha256(b"cycle" + self.job.seed.to_bytes(8, "little") + self.head).digest()

    def dataset(self) -> Dataset:
        """Return the job's data. The first call prepares it.

        Raises RunError if the data is not that of the records, and JobError if the job cannot be private as it says.
        """
        if not self._moved:
            check_private(self.job)
        prepare = stored_dataset if self._moved else prepare_dataset
        dataset = prepare(self.job, self.folder / "data")
        if self.records and dataset.root.hex() != self.records[-1]["dataset_root"]:
            raise RunError(
                f"{self.folder}: its records are of the data {self.records[-1]['dataset_root']}, but the data is now "
                f"{dataset.root.hex()}: is hash_key another file? Put the old one back, or choose another folder"
            )
        return dataset

    def last_model(self) -> Path:
        """Return the file (safetensors) of the last cycle's model. Raises RunError if the run has not begun."""
        if not self.records:
            raise RunError(f"{self.folder} has no model yet")
        return verify_blob(self.store, bytes.fromhex(self.records[-1]["model_after"]))

    def begin(self, state: Checkpoint, dataset: Dataset) -> None:
        """Write record 0, the state before the first cycle."""
        self._append(
            {
                "cycle": 0,
                "dataset_root": dataset.root.hex(),
                "model_after": state.model_hash.hex(),
                **self._checkpoint_record(state),
                "tasks": [],
            }
        )

    def load(self) -> Checkpoint:
        """Return the checkpoint after the last cycle. Raises IntegrityError if a file is missing or damaged."""
        last = self.records[-1]
        return Checkpoint(
            cycle=last["cycle"],
            model=load_state(self.store, bytes.fromhex(last["model_after"])),
            model_hash=bytes.fromhex(last["model_after"]),
            evaluation=Evaluation(
                last["loss_after"], number_of(last["metric"]), tuple(map(number_of, last["more_metrics"]))
            ),
            best_loss=min(record["loss_after"] for record in self.records),
            velocity=load_state(self.store, bytes.fromhex(last["velocity"]))["velocity"],
            velocity_hash=bytes.fromhex(last["velocity"]),
            memories=self.memories(),
            norms={int(segment): norm for segment, norm in last["norms"].items()},
            standings=standings(last),
            drawn=tuple(drawn_tasks(last)),
            known=Known(frozenset(self._update_hashes())),
            spent=spent(last),
        )

    def record_path(self, cycle: int) -> Path:
        """Return the file of a cycle's record."""
        return self._cycles / f"{cycle:08}.json"

    def _update_hashes(self) -> Iterator[bytes]:
        """Yield SHA-256 of all updates that were read."""
        for record in self.records:
            for task in record["tasks"]:
                if task["norm"] is not None:
                    yield bytes.fromhex(task["update_hash"])

    def memories(self) -> dict[bytes, bytes]:
        """Return SHA-256 of the memory that each miner has after the last cycle, by miner."""
        return {bytes.fromhex(miner): bytes.fromhex(kept) for miner, kept in self.records[-1]["memories"].items()}

    def next_record(self, result: CycleResult, opening: bytes = b"") -> Record:
        """Return the record of the next cycle. `save` writes it. `opening` is the statement that announced the cycle.

        All files that it names are in the store.
        """
        drawn = {each.order.task.miner for each in result.after.drawn}
        return {
            "opening": opening.hex(),
            "cycle": result.after.cycle,
            "parent": self.head.hex(),
            "dataset_root": result.dataset_root.hex(),
            "model_before": result.model_before.hex(),
            "model_after": result.model_after.hex(),
            "loss_before": result.loss_before,
            "score_seed": result.score_seed.hex(),
            "share": result.share,
            "spot_checks": [_check_record(check) for check in result.spot_checks],
            **self._checkpoint_record(result.after),
            "tasks": [_task_record(task, drawn) for task in result.tasks],
        }

    def save(self, record: Record) -> None:
        """Write the next record, durably. Remove files from the store that are older than `job.history` cycles."""
        self._append(record)
        self._prune()

    def costs(self) -> list[Costs]:
        """Return what the cycles cost, in order.

        A cycle that ended just before its process was killed may be missing.
        """
        return [json.loads(path.read_bytes()) for path in sorted((self.folder / _COSTS).glob("*.json"))]

    def save_costs(self, result: CycleResult, spending: Spending) -> None:
        """Note what a cycle cost.

        It is not in the record, because records of equal runs are equal.
        """
        tasks = {
            task.order.task.miner.hex(): asdict(resources) if (resources := task.commit.resources) else None
            for task in result.tasks
            if task.commit
        }
        cycle = result.after.cycle
        costs = Costs(
            cycle=cycle,
            seconds=spending.seconds,
            training=result.training_seconds,
            cpu_seconds=spending.cpu_seconds,
            joules=spending.joules,
            tasks=tasks,
        )
        (self.folder / _COSTS).mkdir(exist_ok=True)
        write_file(self.folder / _COSTS / f"{cycle:08}.json", json.dumps(costs, indent=1).encode() + b"\n")

    def _checkpoint_record(self, state: Checkpoint) -> Record:
        return {
            "loss_after": state.evaluation.loss,
            "loss_offset": self.job.loss_offset,
            "metric": finite(state.evaluation.metric),
            "more_metrics": list(map(finite, state.evaluation.more)),
            "velocity": state.velocity_hash.hex(),
            "memories": {miner.hex(): kept.hex() for miner, kept in sorted(state.memories.items())},
            "norms": {str(segment): norm for segment, norm in sorted(state.norms.items())},
            "standings": {miner.hex(): list(each) for miner, each in sorted(state.standings.items())},
            "spent": {shard.hex(): list(each) for shard, each in sorted(state.spent.items())},
        }

    def _append(self, record: Record) -> None:
        write_file(self.record_path(record["cycle"]), _encode(record))
        self.records.append(record)

    def _prune(self) -> None:
        last = self.records[-1]
        best = self.records[self.best_cycle]["model_after"]  # for export
        kept = {best, last["model_after"], last["velocity"], *last["memories"].values()}
        kept |= {record["velocity"] for record in self.records[-self.job.history - 1 :]}  # for who repeats a cycle
        for record in self.records[1:][-self.job.history :]:
            kept.add(record["model_before"])
            for task in record["tasks"]:
                kept |= {task["memory"], task["noise"], task["update_hash"]} - {None}
                kept |= {task["memory_after"]} - {None} if task["drawn"] else set()
        prune(self.store, [bytes.fromhex(digest) for digest in kept])


def spent(record: Record) -> dict[bytes, Spent]:
    """Return what all tasks until the end of a cycle have cost the examples of each shard, by the shard's hash."""
    return {bytes.fromhex(shard): Spent(*each) for shard, each in record["spent"].items()}


def finite(number: float) -> float | None:
    """Return the number, or None, JSON's null, for NaN and infinity."""
    return number if math.isfinite(number) else None


def number_of(recorded: float | None) -> float:
    """Return a recorded number; NaN for None."""
    return math.nan if recorded is None else recorded


def _lock(path: Path) -> IO[str]:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"{path.parent} is in use by another process") from None
    return file


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        identity: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    return identity


def _check_version(path: Path, *, new: bool) -> None:
    """Write the version into a new run folder, or check it. Raises RunError for another version.

    The version is not in the records, because their hashes are the cycles' seeds and must not depend on it.
    """
    if new and not path.exists():
        write_file(path, f"{VERSION}\n".encode())
    found = path.read_text().strip() if path.exists() else "none"
    if found != str(VERSION):
        raise RunError(
            f"{path}: the run's format is {found}, this traincert reads {VERSION}: "
            "go on with the traincert that made it, or start a new run in another folder"
        )


def _read_records(folder: Path) -> list[Record]:
    """Read all records, and check each against the hash in the next one.

    Raises IntegrityError if a record is damaged or missing.
    """
    paths = sorted(path for path in folder.iterdir() if re.fullmatch(r"\d{8}\.json", path.name))
    records: list[Record] = []
    for number, path in enumerate(paths):
        data = path.read_bytes()
        try:
            record = json.loads(data)
        except ValueError:
            raise IntegrityError(f"{path}: not JSON") from None
        is_next = isinstance(record, dict) and path.name == f"{number:08}.json" and record.get("cycle") == number
        if not is_next or (number and record.get("parent") != record_hash(records[-1]).hex()):
            raise IntegrityError(f"{path}: it does not follow the record before it")
        records.append(record)
    return records


def _encode(record: Record) -> bytes:
    return json.dumps(record, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def drawn_tasks(record: Record) -> Iterator[Drawn]:
    """Return the tasks of a record that are done again in the next cycle. The shards' numbers are unknown: -1."""
    for task in record["tasks"]:
        if task["drawn"]:
            yield Drawn(
                recorded_order(record, task, -1),
                bytes.fromhex(task["update_hash"]),
                _unhex(task["memory_after"]),
                task["numeric_class"],
            )


def recorded_order(record: Record, task: Record, shard: int) -> Order:
    """Return the order of one of a record's tasks. `shard` is the number of its shard."""
    return Order(
        Task(bytes.fromhex(task["miner"]), task["segment"], shard, bytes.fromhex(task["seed"]), record["cycle"] - 1),
        bytes.fromhex(record["model_before"]),
        bytes.fromhex(task["shard"]),
        _unhex(task["memory"]),
        _unhex(task["noise"]),
    )


def _unhex(text: str | None) -> bytes | None:
    return bytes.fromhex(text) if text else None


def _check_record(check: SpotCheck) -> Record:
    return {
        "miner": check.miner.hex(),
        "committed": check.committed.hex(),
        "found": check.found.hex(),
        "distance": None if check.distance is None else finite(check.distance),
        "failure": check.failure,
    }


def _task_record(result: TaskResult, drawn: Collection[bytes]) -> Record:
    order, commit, refused = result.order, result.commit, result.refusal
    memory = commit.memory_before if commit else order.memory_hash
    return {
        "miner": order.task.miner.hex(),
        "segment": order.task.segment,
        "shard": order.shard_hash.hex(),
        "seed": order.task.seed.hex(),
        "memory": memory.hex() if memory else None,
        "memory_after": commit.memory_after.hex() if commit and commit.memory_after else None,
        "noise": commit.noise_hash.hex() if commit and commit.noise_hash else None,
        "epsilon": result.epsilon,
        "update_hash": commit.update_hash.hex() if commit else None,
        "update_size": commit.update_size if commit else 0,
        "numeric_class": commit.numeric_class if commit else "",
        "commit": commit.statement.hex() if commit else None,
        "place": commit.place if commit else None,
        "late": bool(commit and commit.late),
        "params": result.params,
        "norm": result.norm,
        "scale": result.scale,
        "own_shard": result.own_shard,
        "score": asdict(result.score) if result.score else None,
        "loss_reduction": result.contribution.loss_reduction if result.contribution else 0,
        "weight": result.contribution.weight if result.contribution else 0,
        "drawn": order.task.miner in drawn,
        "refusal": str(refused.reason) if refused else None,
        "detail": refused.detail if refused else None,
    }
