"""What an engine is given, and what it gives back: the same for every engine."""

from typing import NamedTuple

from traincert.trainer.segments import Segment
from traincert.trainer.tasks import Task


class Order(NamedTuple):
    """A task, and the SHA-256 (32 raw bytes) of each file that it needs."""

    task: Task
    segment: Segment
    model_hash: bytes
    shard_hash: bytes
    memory_hash: bytes | None  # what the miner kept from its last task; None: nothing


class Answer(NamedTuple):
    """What came of a task."""

    update: bytes  # as `updates.encode_update` makes it
    memory_hash: bytes | None  # SHA-256 of what the miner keeps for its next task; None: nothing
    seconds: float  # that the training took
