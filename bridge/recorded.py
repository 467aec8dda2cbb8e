"""A cycle's record with types, as trainer/records.py writes it, for programs that did not write it.

A field that is not here is not known: a record that has one is refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from traincert.bridge.errors import BridgeError
from traincert.trainer.accounting import Spent
from traincert.trainer.errors import Reason
from traincert.trainer.standings import Standing
from traincert.trainer.weights import Score

CONFIG = ConfigDict(strict=True, extra="forbid", ser_json_bytes="hex", val_json_bytes="hex", allow_inf_nan=False)
Hash = Annotated[bytes, Field(min_length=32, max_length=32)]
Uint = Annotated[int, Field(ge=0, lt=2**64)]
_HexHash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, config=CONFIG)
class RecordedTask:
    """A task and what came of it; see trainer/judging.py's TaskResult."""

    miner: Hash
    segment: Uint
    shard: Hash
    seed: Hash
    memory: Hash | None
    memory_after: Hash | None
    update_hash: Hash | None
    update_size: Uint
    commit: bytes | None
    numeric_class: str
    place: Uint | None
    late: bool
    params: Uint
    norm: Annotated[float, Field(ge=0)] | None
    scale: Annotated[float, Field(ge=0, le=1)]
    own_shard: float | None
    score: Score | None
    loss_reduction: Uint
    weight: Uint
    drawn: bool
    refusal: Reason | None
    detail: str | None
    noise: Hash | None = None
    epsilon: Annotated[float, Field(ge=0)] | None = None

    @property
    def name(self) -> str:
        """The miner, as messages name it."""
        return f"miner {self.miner.hex()[:16]}"


@dataclass(frozen=True, config=CONFIG)
class RecordedCheck:
    """A spot check, as in a record."""

    miner: Hash
    committed: Hash
    found: bytes
    distance: float | None
    failure: str


@dataclass(frozen=True, config=CONFIG)
class StartRecord:
    """What all records have."""

    cycle: Uint
    dataset_root: Hash
    model_after: Hash
    loss_after: Uint
    loss_offset: float
    metric: float | None
    more_metrics: list[float | None]
    velocity: Hash
    memories: dict[_HexHash, Hash]
    norms: dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,3})$")], Annotated[float, Field(ge=0)]]
    standings: dict[_HexHash, Standing]
    spent: dict[_HexHash, Spent]
    tasks: list[RecordedTask]

    def standing(self, miner: bytes) -> Standing:
        """What is known of a miner."""
        return self.standings.get(miner.hex(), Standing())

    @property
    def by_miner(self) -> dict[bytes, Standing]:
        """The standings, by miner."""
        return {bytes.fromhex(miner): each for miner, each in self.standings.items()}


@dataclass(frozen=True, config=CONFIG)
class CycleRecord(StartRecord):
    """What the record of a cycle has too. Record 0, the state before the first cycle, lacks it."""

    opening: bytes
    parent: Hash
    model_before: Hash
    loss_before: Uint
    score_seed: Hash
    share: float
    spot_checks: list[RecordedCheck]

    @property
    def accepted(self) -> list[RecordedTask]:
        """The tasks whose updates were accepted."""
        return [task for task in self.tasks if task.refusal is None]


R = TypeVar("R", StartRecord, CycleRecord)
_READERS: dict[type, TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in (StartRecord, CycleRecord)}

_TASKS = TypeAdapter(list[RecordedTask])


def read_record(data: bytes, kind: type[R]) -> tuple[dict[str, Any], R]:
    """Return the record that a file's bytes are, as JSON and with types.

    Raises BridgeError if they are none, or are not canonical.
    """
    try:
        record: R = _READERS[kind].validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BridgeError(f"{where}: {first['msg']}: is the coordinator another version?") from None
    file: dict[str, Any] = _READERS[kind].dump_python(record, mode="json")
    if json.dumps(file, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n" != data:
        raise BridgeError("it is not canonical JSON")
    return file, record


def read_tasks(record: dict[str, Any]) -> list[RecordedTask]:
    """Return the tasks of a record of our own, with types."""
    tasks: list[RecordedTask] = _TASKS.validate_json(json.dumps(record["tasks"]))
    return tasks
