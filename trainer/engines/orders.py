"""Orders and answers: the input and the output of every engine."""

from typing import NamedTuple

from traincert.trainer.segments import Segment
from traincert.trainer.tasks import Task


class Order(NamedTuple):
    """A task, its segment, and the SHA-256 (32 raw bytes) of each file that it needs."""

    task: Task
    segment: Segment
    model_hash: bytes
    shard_hash: bytes
    memory_hash: bytes | None  # the miner's memory; None: it has none


class Answer(NamedTuple):
    """The result of a task that ended."""

    update: bytes  # as `updates.encode_update` returns it
    memory_hash: bytes | None  # SHA-256 of the miner's new memory; None: it has none
    seconds: float  # how long the training took
