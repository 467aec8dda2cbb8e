"""Cycles: tasks, updates, scores, and the next model."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import TracebackType
from typing import Self

import numpy as np
import torch

from traincert.trainer.aggregation import Accepted, aggregate
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Answer, Order
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import Dataset, Examples, read_examples
from traincert.trainer.scoring import Contribution, Evaluation, Refusal, Scorer, score
from traincert.trainer.segments import Layout, cut_segments
from traincert.trainer.state import State, initial_state, save_state
from traincert.trainer.store import prune
from traincert.trainer.tasks import assign
from traincert.trainer.training import build_optimizer
from traincert.trainer.updates import Reason, Update, UpdateError, read_update

HALVINGS = 4


@dataclass(frozen=True)
class Checkpoint:
    """What a run has come to, and all that its next cycle needs."""

    cycle: int
    """How many cycles there have been."""
    model: State
    model_hash: bytes
    """The model's SHA-256 (32 raw bytes), under which the engine's store has it."""
    evaluation: Evaluation
    """Of the model, on the validation examples."""
    best_loss: int
    """The lowest of the models so far, nano-nats."""
    velocity: torch.Tensor
    """Of the outer optimizer: (all trainable parameters,) float32."""
    memories: Mapping[bytes, bytes] = field(default_factory=dict)
    """For each miner that has one, the hash of what it keeps for its next task."""


@dataclass(frozen=True)
class TaskResult:
    """A task, and what came of it."""

    order: Order
    contribution: Contribution | None
    refusal: Refusal | None
    """Either this or `contribution` is None."""
    update_hash: bytes | None
    """SHA-256 of the update's bytes, if there was one, refused or not."""
    update_size: int
    """Bytes."""
    seconds: float
    """That the training took; 0 if it came to no end."""


@dataclass(frozen=True)
class CycleResult:
    """What a cycle did. Hashes are 32 raw bytes, losses are on the validation examples, in nano-nats."""

    model_before: bytes
    model_after: bytes
    after: Checkpoint
    """The next cycle's beginning; its model's hash is `model_after`."""
    dataset_root: bytes
    loss_before: int
    loss_after: int
    metric: float
    """Of the next model, on the validation examples."""
    tasks: tuple[TaskResult, ...]
    """Sorted by miner."""

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """Of the updates that were accepted, sorted by miner."""
        return tuple(task.contribution for task in self.tasks if task.contribution)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """Of the other miners, sorted by miner."""
        return tuple(task.refusal for task in self.tasks if task.refusal)

    @property
    def params_trained(self) -> int:
        """Sum of params over the contributions."""
        return sum(contribution.params for contribution in self.contributions)


class Trainer:
    """Runs a job's cycles. Use it as a context manager; the engine is the caller's."""

    def __init__(self, dataset: Dataset, engine: LocalEngine) -> None:
        """Prepare for cycles.

        Raises ValueError if the engine is of another job than the dataset, JobError if the job's model or optimizer
        cannot be made, and IntegrityError if a stored split is missing or damaged.
        """
        self.job = dataset.job
        if engine.job != self.job:
            raise ValueError("the engine and the dataset are of different jobs")
        self.dataset = dataset
        self._engine = engine
        self._model = build_model(self.job)
        self.layout = Layout(self._model)
        self.validation = read_examples(self.job, dataset.held_out_folder, dataset.validation)
        self.segments = cut_segments(build_model(self.job), self.job, self.validation)
        build_optimizer(self.job, list(self._model.parameters()), 0)
        self._scorer = Scorer(self.job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._scorer.__exit__(kind, error, tb)

    def start(self) -> Checkpoint:
        """Return the state that the first cycle begins with: a function of the job.

        Raises JobError if its `initial_model` cannot be used.
        """
        model = initial_state(self.job)
        model_hash = save_state(self._engine.store, model)
        evaluation = self.evaluate(model)
        return Checkpoint(0, model, model_hash, evaluation, evaluation.loss, torch.zeros(self.layout.params))

    def evaluate(self, model: State) -> Evaluation:
        """Measure a model on the validation examples."""
        return self._scorer.evaluate([model], self.validation)[0]

    def test(self, model: State) -> Evaluation:
        """Measure a model on the test examples."""
        examples = read_examples(self.job, self.dataset.held_out_folder, self.dataset.test)
        return self._scorer.evaluate([model], examples)[0]

    def run_cycle(
        self,
        before: Checkpoint,
        miners: Sequence[bytes],
        *,
        seed: bytes,
        on_update: Callable[[int, int], None] | None = None,
    ) -> CycleResult:
        """Let every miner do a task.

        On one kind of machine the result is a function of the dataset, the state before, the set of miners (32-byte
        ids; there may be none) and seed (any bytes, new ones for each cycle), which decides who trains what, and on
        which examples first. Neither the order of `miners` nor the engine's number of workers matters. `on_update` is
        called with the number of tasks done and their total: at the start, and as tasks end.

        Raises ValueError if a miner is there twice, and EngineError if a task fails for a reason that is not its
        miner's.
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
            # If the guard lets nothing through, it is as if nothing had been sent, and the outer optimizer begins anew.
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

    def prune(self, state: Checkpoint) -> None:
        """Remove from the engine's store what cycles from `state` on do not need."""
        prune(self._engine.store, [state.model_hash, *state.memories.values()])

    def _aggregate(
        self, before: Checkpoint, accepted: Sequence[Accepted]
    ) -> tuple[State, torch.Tensor, Evaluation] | None:
        """Return the next model, velocity and the model's evaluation: the guard halves a move that does harm."""
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
        """Check and score what the miners sent."""
        readable: list[Update | UpdateError] = []
        for order, answer in zip(orders, answers, strict=True):
            try:
                if isinstance(answer, Reason):
                    raise UpdateError(answer, _WHY[answer])
                readable.append(read_update(answer.update, self.job, order.segment, before.model))
            except UpdateError as error:
                readable.append(error)
        examples = self._score_examples(seed)
        sent = Counter(
            order.segment for order, update in zip(orders, readable, strict=True) if isinstance(update, Update)
        )
        # Each is measured at the share that it has of the segment's mean. All of it may well do harm where the mean
        # helps: training on a few examples leaves noise, which averages out.
        candidates = (
            update.scaled(1 / sent[order.segment]).applied(self.layout, order.segment, before.model)
            for order, update in zip(orders, readable, strict=True)
            if isinstance(update, Update)
        )
        evaluations = self._scorer.evaluate(chain([before.model], candidates), examples)
        loss_before, *losses = (each.loss for each in evaluations)

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
        """Draw the examples that this cycle's updates are scored on."""
        count, wanted = len(self.validation), self.job.score_examples
        if not 0 < wanted < count:
            return self.validation
        draw = np.random.RandomState(np.frombuffer(hashlib.sha256(b"score" + seed).digest(), np.uint32))
        return self.validation.batch(torch.from_numpy(np.sort(draw.permutation(count)[:wanted])))


def _memories(tasks: Sequence[TaskResult], answers: Sequence[Answer | Reason]) -> dict[bytes, bytes]:
    """Return what miners keep now; one whose update is refused goes on with what it had."""
    return {
        task.order.task.miner: answer.memory_hash
        for task, answer in zip(tasks, answers, strict=True)
        if task.contribution and isinstance(answer, Answer) and answer.memory_hash
    }


_WHY = {
    Reason.WORKER_DIED: "the task's worker process died twice",
    Reason.LATE: "the task was not done in time",
}
