"""One cycle: assign tasks, collect commits and updates, judge them, aggregate them into the next model."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import TracebackType
from typing import Self

import numpy as np
import torch

from traincert.trainer.aggregation import Accepted, aggregate
from traincert.trainer.determinism import seeded
from traincert.trainer.engines.orders import Commit, Engine, OnCommit, Order
from traincert.trainer.errors import JobError, Reason
from traincert.trainer.examples import Dataset, Examples, read_examples
from traincert.trainer.models import build_model
from traincert.trainer.scoring import MAX_NANO_NATS, Contribution, Evaluation, Refusal, Scorer, score
from traincert.trainer.segments import Layout, cut_segments
from traincert.trainer.state import State, initial_state, save_state
from traincert.trainer.tasks import assign
from traincert.trainer.training import check_optimizer
from traincert.trainer.updates import Update, UpdateError, read_update
from traincert.trainer.usercode import Functions

HALVINGS = 4


@dataclass(frozen=True)
class Checkpoint:
    """A run's state between two cycles: all that the next cycle needs."""

    cycle: int
    """How many cycles are done."""
    model: State
    model_hash: bytes
    """The model's SHA-256, 32 raw bytes; its name in the engine's store."""
    evaluation: Evaluation
    """Loss and metric of the model, on the validation examples."""
    best_loss: int
    """The lowest validation loss of all models so far, nano-nats."""
    velocity: torch.Tensor
    """The outer optimizer's momentum buffer, (all trainable parameters,) float32."""
    memories: Mapping[bytes, bytes] = field(default_factory=dict)
    """SHA-256 of each miner's memory, by miner. A miner without a memory is not in it."""


@dataclass(frozen=True)
class TaskResult:
    """A task and its outcome: a contribution or a refusal."""

    order: Order
    params: int
    """The number of parameters (scalars) of its segment."""
    commit: Commit | None
    """What the miner committed to. None: it did not commit."""
    contribution: Contribution | None
    refusal: Refusal | None
    """Exactly one of `contribution` and `refusal` is None."""


@dataclass(frozen=True)
class CycleResult:
    """The result of a cycle. Hashes are 32 raw bytes; losses are of the validation examples, in nano-nats."""

    model_before: bytes
    model_after: bytes
    after: Checkpoint
    """What the next cycle starts from. The hash of its model is `model_after`."""
    dataset_root: bytes
    loss_before: int
    loss_after: int
    metric: float
    """The next model's metric, on the validation examples."""
    share: float
    """The share of the step that was taken, 1 or less; 0 if the guard allowed none, or nothing was accepted."""
    score_seed: bytes
    """What drew the validation examples that the updates were scored on."""
    tasks: tuple[TaskResult, ...]
    """Sorted by miner."""

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """The accepted updates' contributions, sorted by miner."""
        return tuple(task.contribution for task in self.tasks if task.contribution)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The refused updates, sorted by miner."""
        return tuple(task.refusal for task in self.tasks if task.refusal)

    @property
    def params_trained(self) -> int:
        """The sum of `params` over the contributions."""
        return sum(contribution.params for contribution in self.contributions)

    @property
    def training_seconds(self) -> float:
        """How long the training of all tasks took together, as the miners say."""
        return sum(task.commit.seconds for task in self.tasks if task.commit)


class Trainer:
    """Runs a job's cycles. Use it as a context manager; it does not close the engine."""

    def __init__(self, dataset: Dataset, engine: Engine) -> None:
        """Build the model, cut it into segments, and read the validation examples.

        Raises ValueError if engine and dataset belong to different jobs, JobError if the job's model, segments or
        optimizer cannot be made, and IntegrityError if the validation file is missing or damaged.
        """
        self.job = dataset.job
        if engine.job != self.job:
            raise ValueError("the engine and the dataset belong to different jobs")
        self.dataset = dataset
        self._engine = engine
        self._model = build_model(self.job)
        self.layout = Layout(self._model)
        self.validation = read_examples(self.job, dataset.held_out_folder, dataset.validation)
        self.segments = cut_segments(build_model(self.job), self.job, self.validation)
        check_optimizer(self.job, self._model)
        self._scorer = Scorer(self.job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._scorer.__exit__(kind, error, tb)

    def start(self) -> Checkpoint:
        """Store the job's initial model, and return the checkpoint that the first cycle starts from.

        Raises JobError if the job's `initial_model` cannot be used, or if its loss is no number or has no gradient.
        """
        model = initial_state(self.job)
        model_hash = save_state(self._engine.store, model)
        evaluation = self.evaluate(model)
        if evaluation.loss == MAX_NANO_NATS:
            raise JobError(f"loss = {self.job.loss!r}: the initial model's loss is no number (NaN), or is infinite")
        with seeded(self.job.seed):
            batch = self.validation.batch(slice(self.job.batch_size))
            Functions(self.job).check_gradient(self._model.eval(), batch.inputs, batch.target)
        return Checkpoint(0, model, model_hash, evaluation, evaluation.loss, torch.zeros(self.layout.params))

    def evaluate(self, model: State) -> Evaluation:
        """Return a model's loss and metric on the validation examples."""
        return self._scorer.evaluate(model, self.validation)

    def test(self, model: State) -> Evaluation:
        """Return a model's loss and metric on the test examples."""
        examples = read_examples(self.job, self.dataset.held_out_folder, self.dataset.test)
        return self._scorer.evaluate(model, examples)

    def run_cycle(
        self,
        before: Checkpoint,
        miners: Sequence[bytes],
        *,
        seed: bytes,
        score_seed: Callable[[Mapping[bytes, Commit]], bytes] | None = None,
        on_commit: OnCommit | None = None,
    ) -> CycleResult:
        """Run one cycle, in which every miner does one task.

        `miners` are ids of 32 bytes; there may be none. `seed` is any bytes, other ones in each cycle. It decides which
        miner trains which segment on which shard, and the order of the examples. `score_seed` is called with all
        commits by miner, and returns the bytes that draw the validation examples for scoring; by default they
        are `seed`. Where miners are not trusted it must return what no miner knew before it committed.

        Within a numeric class the result depends on the dataset, `before`, the set of miners and the seeds alone. The
        order of `miners` and the number of workers do not change it.

        Raises ValueError if a miner is in `miners` twice, and OSError or EngineError if a task raises an exception.
        """
        orders = self.assign(before, miners, seed)
        commits = self._engine.collect(self.dataset.shard_folder, orders, on_commit)
        updates = self._engine.reveal(orders, commits)
        committed = {
            order.task.miner: commit
            for order, commit in zip(orders, commits, strict=True)
            if isinstance(commit, Commit)
        }
        drawn = score_seed(committed) if score_seed else seed
        tasks, accepted = self.judge(before, orders, commits, updates, drawn)
        return self.aggregate(before, tasks, accepted, drawn)

    def assign(self, before: Checkpoint, miners: Sequence[bytes], seed: bytes) -> list[Order]:
        """Return an order for each miner, sorted by miner."""
        shards = self.dataset.shards
        return [
            Order(task, before.model_hash, shards[task.shard], before.memories.get(task.miner))
            for task in assign(seed, before.cycle, miners, len(self.segments), len(shards))
        ]

    def judge(
        self,
        before: Checkpoint,
        orders: Sequence[Order],
        commits: Sequence[Commit | Reason],
        updates: Sequence[bytes | Reason],
        score_seed: bytes,
    ) -> tuple[list[TaskResult], list[Accepted]]:
        """Check and score the miners' updates, and say what came of each task."""
        readable: list[Update | UpdateError] = []
        for order, sent in zip(orders, updates, strict=True):
            try:
                if isinstance(sent, Reason):
                    raise UpdateError(sent, _WHY[sent])
                readable.append(read_update(sent, self.job, self.segments[order.task.segment], before.model))
            except UpdateError as error:
                readable.append(error)
        examples = self._score_examples(score_seed)
        # Score each of n updates at 1/n of its size. At full size, the noise of one miner's few examples can raise the
        # loss, although the mean of all, in which noise averages out, lowers it.
        share = 1 / max(1, sum(isinstance(update, Update) for update in readable))
        candidates = (
            update.scaled(share).applied(self.layout, self.segments[order.task.segment], before.model)
            for order, update in zip(orders, readable, strict=True)
            if isinstance(update, Update)
        )
        loss_before, *losses = self._scorer.losses(chain([before.model], candidates), examples)

        tasks, accepted = [], []
        left = iter(losses)
        for order, commit, update in zip(orders, commits, readable, strict=True):
            contribution = refusal = None
            committed = commit if isinstance(commit, Commit) else None
            segment = self.segments[order.task.segment]
            try:
                if isinstance(update, UpdateError):
                    raise update
                assert committed  # noqa: S101 - an update comes after its commit
                miner = order.task.miner
                contribution = score(miner, committed.update_hash, segment.params, loss_before, next(left))
                accepted.append(Accepted(contribution, segment, update))
            except UpdateError as error:
                refusal = Refusal(order.task.miner, error.reason, error.detail)
            tasks.append(TaskResult(order, segment.params, committed, contribution, refusal))
        return tasks, accepted

    def aggregate(
        self, before: Checkpoint, tasks: Sequence[TaskResult], accepted: Sequence[Accepted], score_seed: bytes
    ) -> CycleResult:
        """Aggregate the accepted updates into the next model, store it, and return the cycle's result."""
        model, velocity, evaluation, share = before.model, before.velocity, before.evaluation, 0.0
        memories: Mapping[bytes, bytes] = {}
        if accepted:
            model, velocity, evaluation, share = self._moved(before, accepted)
            memories = _memories(tasks) if share else {}
        after = Checkpoint(
            cycle=before.cycle + 1,
            model=model,
            model_hash=save_state(self._engine.store, model) if share else before.model_hash,
            evaluation=evaluation,
            best_loss=min(before.best_loss, evaluation.loss),
            velocity=velocity,
            memories={**before.memories, **memories},
        )
        return CycleResult(
            model_before=before.model_hash,
            model_after=after.model_hash,
            after=after,
            dataset_root=self.dataset.root,
            loss_before=before.evaluation.loss,
            loss_after=evaluation.loss,
            metric=evaluation.metric,
            share=share,
            score_seed=score_seed,
            tasks=tuple(tasks),
        )

    def _moved(self, before: Checkpoint, accepted: Sequence[Accepted]) -> tuple[State, torch.Tensor, Evaluation, float]:
        """Return the next model, its velocity and its evaluation, and the share of the step that was taken.

        If the guard allows no step, the model stays, and the momentum starts again from 0.
        """
        for halvings in range(HALVINGS + 1):
            share = 0.5**halvings
            model, velocity = aggregate(self.job, self.layout, before.model, before.velocity, accepted, share=share)
            evaluation = self.evaluate(model)
            if evaluation.loss <= before.best_loss * (1 + self.job.guard):
                return model, velocity, evaluation, share
        return before.model, torch.zeros_like(before.velocity), before.evaluation, 0.0

    def _score_examples(self, seed: bytes) -> Examples:
        """Draw the validation examples that this cycle's updates are scored on."""
        count, wanted = len(self.validation), self.job.score_examples
        if not 0 < wanted < count:
            return self.validation
        draw = np.random.RandomState(np.frombuffer(hashlib.sha256(b"score" + seed).digest(), np.uint32))
        return self.validation.batch(torch.from_numpy(np.sort(draw.permutation(count)[:wanted])))


def _memories(tasks: Sequence[TaskResult]) -> dict[bytes, bytes]:
    """Return the accepted miners' new memories. A refused miner keeps the memory that it had."""
    return {
        task.order.task.miner: task.commit.memory_after
        for task in tasks
        if task.contribution and task.commit and task.commit.memory_after
    }


_WHY = {
    Reason.WORKER_DIED: "the task's worker process died twice",
    Reason.LATE: "the task was not done in time",
    Reason.ABSENT: "the miner left before it committed",
    Reason.WITHHELD: "the update that the miner committed to did not come",
}
