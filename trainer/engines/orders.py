"""Orders, answers and commits, and what an engine is: it has tasks done, collects commits, then the updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from traincert.trainer.resources import Resources
from traincert.trainer.tasks import Task

if TYPE_CHECKING:
    from traincert.trainer.errors import Reason
    from traincert.trainer.job import TrainingJob

OnCommit = Callable[[int, int], None]
"""Is called with the number of orders that have a commit or a refusal, and the number of all orders."""


class Order(NamedTuple):
    """A task, and the SHA-256 (32 raw bytes) of each file that it needs."""

    task: Task
    model_hash: bytes
    shard_hash: bytes
    memory_hash: bytes | None  # the miner's memory; None: it has none
    noise_hash: bytes | None = None  # the secret of its noise, if it is done again; None: it draws one if it needs one


class Answer(NamedTuple):
    """The result of a task that ended."""

    update: bytes  # as `updates.encode_update` returns it
    memory_before: bytes | None  # SHA-256 of the memory that it began with; None: it had none
    memory_after: bytes | None  # SHA-256 of the miner's new memory; None: it has none
    seconds: float  # how long the training took
    numeric_class: str = ""  # of the machine, as `determinism.numeric_class` returns it
    noise_hash: bytes | None = None  # SHA-256 of the secret of its noise; None: the job has no privacy


class Commit(NamedTuple):
    """What a miner binds itself to before anybody sees its update. Hashes are 32 raw bytes."""

    update_hash: bytes
    update_size: int  # bytes
    memory_before: bytes | None
    memory_after: bytes | None
    seconds: float
    numeric_class: str = ""
    statement: bytes = b""  # the miner's signed statement of all this, where there is one
    place: int = 0  # how many commits of the cycle came before it
    late: bool = False  # it came after the job's late_seconds
    resources: Resources | None = None  # what the task used; None: it was not measured
    noise_hash: bytes | None = None  # as in Answer

    @classmethod
    def to(cls, answer: Answer, update_hash: bytes) -> Commit:
        """Return the commit to an answer whose update has this SHA-256, without a statement."""
        size, before, after = len(answer.update), answer.memory_before, answer.memory_after
        found = cls(update_hash, size, before, after, answer.seconds, answer.numeric_class)
        return found._replace(noise_hash=answer.noise_hash)


class Engine(Protocol):
    """Has a cycle's tasks done. `store` is the folder of models and memories."""

    @property
    def job(self) -> TrainingJob:
        """The job whose tasks it has done."""

    @property
    def store(self) -> Path:
        """The folder of models and memories."""

    def collect(
        self, shards: Path, orders: Sequence[Order], on_commit: OnCommit | None = None
    ) -> list[Commit | Reason]:
        """Hand out all orders; `shards` is the folder of the shards.

        Return, in the same order, what each miner commits to, or why it does not.
        """

    def reveal(
        self, orders: Sequence[Order], commits: Sequence[Commit | Reason]
    ) -> Sequence[bytes | memoryview | Reason]:
        """Return, in the same order, the update that each commit is for, or why it did not come."""

    def bring(self, wanted: Mapping[bytes, Sequence[bytes]]) -> None:
        """Bring files that miners have, their memories, into the store: SHA-256 of each (32 bytes), by miner.

        A file that a miner does not send is missing there afterwards.
        """
