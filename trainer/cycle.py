"""One cycle: assign tasks, train, check and score the updates, aggregate them into the next model."""

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
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Answer, Order
from traincert.trainer.errors import JobError
from traincert.trainer.examples import Dataset, Examples, read_examples
from traincert.trainer.models import build_model
from traincert.trainer.scoring import MAX_NANO_NATS, Contribution, Evaluation, Refusal, Scorer, score
from traincert.trainer.segments import Layout, cut_segments
from traincert.trainer.state import State, initial_state, save_state
from traincert.trainer.tasks import assign
from traincert.trainer.training import check_optimizer
from traincert.trainer.updates import Reason, Update, UpdateError, read_update
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
    contribution: Contribution | None
    refusal: Refusal | None
    """Exactly one of `contribution` and `refusal` is None."""
    update_hash: bytes | None
    """SHA-256 of the update's bytes, also of a refused update. None: the task gave no update."""
    update_size: int
    """Length of the update, bytes."""
    seconds: float
    """How long the training took; 0 if it did not end."""


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


class Trainer:
    """Runs a job's cycles. Use it as a context manager; it does not close the engine."""

    def __init__(self, dataset: Dataset, engine: LocalEngine) -> None:
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
        on_update: Callable[[int, int], None] | None = None,
    ) -> CycleResult:
        """Run one cycle, in which every miner does one task.

        `miners` are ids of 32 bytes; there may be none. `seed` is any bytes, other ones in each cycle. It decides which
        miner trains which segment on which shard, and the order of the examples. `on_update` is called with the number
        of tasks done and their total: at the start, and after tasks end.

        Within a numeric class the result depends on the dataset, `before`, the set of miners and `seed` alone. The
        order of `miners` and the number of workers do not change it.

        Raises ValueError if a miner is in `miners` twice, and OSError or EngineError if a task raises an exception.
        """
        orders = [
            Order(
                task,
                self.segments[task.segment],
                before.model_hash,
                self.dataset.shards[task.shard],
                before.memories.get(task.miner),
            )
            for task in assign(seed, before.cycle, miners, len(self.segments), len(self.dataset.shards))
        ]
        answers = self._engine.train(self.dataset, orders, on_update)
        tasks, accepted = self._judge(before, orders, answers, seed)
        model, velocity, evaluation, memories = before.model, before.velocity, before.evaluation, {}
        if accepted:
            moved = self._aggregate(before, accepted)
            # If the guard allows no move, the model and the memories stay, and the momentum starts again from 0.
            model, velocity, evaluation = moved or (model, torch.zeros_like(velocity), evaluation)
            memories = _memories(tasks, answers) if moved else {}
        after = Checkpoint(
            cycle=before.cycle + 1,
            model=model,
            model_hash=before.model_hash if model is before.model else save_state(self._engine.store, model),
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
            tasks=tuple(tasks),
        )

    def _aggregate(
        self, before: Checkpoint, accepted: Sequence[Accepted]
    ) -> tuple[State, torch.Tensor, Evaluation] | None:
        """Return the next model, its velocity and its evaluation; None if the guard allows no move."""
        for halvings in range(HALVINGS + 1):
            model, velocity = aggregate(
                self.job, self.layout, before.model, before.velocity, accepted, share=0.5**halvings
            )
            evaluation = self.evaluate(model)
            if evaluation.loss <= before.best_loss * (1 + self.job.guard):
                return model, velocity, evaluation
        return None

    def _judge(
        self, before: Checkpoint, orders: Sequence[Order], answers: Sequence[Answer | Reason], seed: bytes
    ) -> tuple[list[TaskResult], list[Accepted]]:
        """Check and score the miners' updates."""
        readable: list[Update | UpdateError] = []
        for order, answer in zip(orders, answers, strict=True):
            try:
                if isinstance(answer, Reason):
                    raise UpdateError(answer, _WHY[answer])
                readable.append(read_update(answer.update, self.job, order.segment, before.model))
            except UpdateError as error:
                readable.append(error)
        examples = self._score_examples(seed)
        # Score each of n updates at 1/n of its size. At full size, the noise of one miner's few examples can raise the
        # loss, although the mean of all, in which noise averages out, lowers it.
        share = 1 / max(1, sum(isinstance(update, Update) for update in readable))
        candidates = (
            update.scaled(share).applied(self.layout, order.segment, before.model)
            for order, update in zip(orders, readable, strict=True)
            if isinstance(update, Update)
        )
        loss_before, *losses = self._scorer.losses(chain([before.model], candidates), examples)

        tasks, accepted = [], []
        left = iter(losses)
        for order, answer, update in zip(orders, answers, readable, strict=True):
            contribution = refusal = None
            data, seconds = (answer.update, answer.seconds) if isinstance(answer, Answer) else (b"", 0.0)
            try:
                if isinstance(update, UpdateError):
                    raise update
                contribution = score(order.task.miner, data, order.segment.params, loss_before, next(left))
                accepted.append(Accepted(contribution, order.segment, update))
            except UpdateError as error:
                refusal = Refusal(order.task.miner, error.reason, error.detail)
            update_hash = hashlib.sha256(data).digest() if isinstance(answer, Answer) else None
            tasks.append(TaskResult(order, contribution, refusal, update_hash, len(data), seconds))
        return tasks, accepted

    def _score_examples(self, seed: bytes) -> Examples:
        """Draw the validation examples that this cycle's updates are scored on."""
        count, wanted = len(self.validation), self.job.score_examples
        if not 0 < wanted < count:
            return self.validation
        draw = np.random.RandomState(np.frombuffer(hashlib.sha256(b"score" + seed).digest(), np.uint32))
        return self.validation.batch(torch.from_numpy(np.sort(draw.permutation(count)[:wanted])))


def _memories(tasks: Sequence[TaskResult], answers: Sequence[Answer | Reason]) -> dict[bytes, bytes]:
    """Return the accepted miners' new memories. A refused miner keeps the memory that it had."""
    return {
        task.order.task.miner: answer.memory_hash
        for task, answer in zip(tasks, answers, strict=True)
        if task.contribution and isinstance(answer, Answer) and answer.memory_hash
    }


_WHY = {
    Reason.WORKER_DIED: "the task's worker process died twice",
    Reason.LATE: "the task was not done in time",
}
