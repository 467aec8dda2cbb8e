"""One cycle: assign tasks, collect commits and updates, judge them, aggregate them into the next model."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Self

import torch

from traincert.trainer.accounting import Spent, epsilon, spent_after
from traincert.trainer.aggregation import Accepted, aggregate
from traincert.trainer.determinism import numeric_class, seeded
from traincert.trainer.engines.orders import Commit, Engine, OnCommit, Order
from traincert.trainer.errors import JobError, Reason
from traincert.trainer.examples import Dataset, read_examples
from traincert.trainer.judging import Judge, Judged, Known, TaskResult
from traincert.trainer.models import build_model
from traincert.trainer.privacy import check_private_training
from traincert.trainer.scoring import MAX_NANO_NATS, Contribution, Evaluation, Refusal, Scorer
from traincert.trainer.segments import Layout, count_task_flops, cut_segments
from traincert.trainer.spot_checks import Drawn, SpotCheck, SpotChecker, memories_of
from traincert.trainer.standings import Standing, Standings, draw_checks, next_standings
from traincert.trainer.state import State, initial_state, save_state
from traincert.trainer.tasks import assign
from traincert.trainer.training import check_optimizer
from traincert.trainer.updates import UpdateError
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
    velocity_hash: bytes
    """SHA-256 of its file, 32 raw bytes."""
    memories: Mapping[bytes, bytes] = field(default_factory=dict)
    """SHA-256 of each miner's memory, by miner. A miner without a memory is not in it."""
    norms: Mapping[int, float] = field(default_factory=dict)
    """The usual L2 norm of an update's move, by segment."""
    standings: Standings = field(default_factory=dict)
    """What is known of each miner."""
    drawn: tuple[Drawn, ...] = ()
    """The last cycle's tasks that are done again in the next one."""
    known: Known = field(default_factory=Known)
    """What updates are compared with, to find copies."""
    spent: Mapping[bytes, Spent] = field(default_factory=dict)
    """What all tasks have cost the examples of each shard, by its hash. Empty in a job without privacy."""


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
    """What drew the validation examples that the updates were scored on, and the tasks that are done again."""
    spot_checks: tuple[SpotCheck, ...]
    """What came of the tasks of the cycle before that were done again."""
    tasks: tuple[TaskResult, ...]
    """Sorted by miner."""

    @property
    def contributions(self) -> tuple[Contribution, ...]:
        """The accepted updates' contributions, sorted by miner."""
        return tuple(task.contribution for task in self.tasks if task.contribution)

    @property
    def refusals(self) -> tuple[Refusal, ...]:
        """The refused updates, sorted by miner."""
        return _refusals(self.tasks)

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
        self._sizes: dict[bytes, int] = dict(zip(dataset.shards, dataset.manifest()["sizes"], strict=True))
        self._scorer = Scorer(self.job)
        shard = read_examples(self.job, dataset.shard_folder, dataset.shards[0])
        fewest = min(self._sizes.values())
        flops = count_task_flops(build_model(self.job), self.job, self.segments, shard, fewest)
        self._judge = Judge(dataset, self.layout, self.segments, self._scorer, self.validation, flops)
        self._checker = SpotChecker(dataset, engine.store, self.segments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._checker.close()
        self._scorer.__exit__(kind, error, tb)

    def start(self) -> Checkpoint:
        """Store the job's initial model, and return the checkpoint that the first cycle starts from.

        Raises JobError if the job's `initial_model` cannot be used, if its loss is no number or has no gradient, or if
        training cannot be private as the job says.
        """
        model = initial_state(self.job)
        velocity = torch.zeros(self.layout.params)
        model_hash, velocity_hash = self._save(model, {"velocity": velocity})
        evaluation = self.evaluate(model)
        if evaluation.loss == MAX_NANO_NATS:
            raise JobError(f"loss = {self.job.loss!r}: the initial model's loss is no number (NaN), or is infinite")
        with seeded(self.job.seed):
            batch = self.validation.batch(slice(self.job.batch_size))
            Functions(self.job).check_gradient(self._model.eval(), batch.inputs, batch.target)
            check_private_training(self.job, batch.batch(slice(4)))
        return Checkpoint(0, model, model_hash, evaluation, evaluation.loss, velocity, velocity_hash)

    def _save(self, *states: State) -> list[bytes]:
        """Store states at the same time, because big ones take long. Return their hashes."""
        with ThreadPoolExecutor(len(states)) as pool:
            return list(pool.map(partial(save_state, self._engine.store), states))

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
        commits by miner, and returns the bytes that draw the validation examples for scoring, and the tasks
        that are done again; no miner may have known them before it committed. Without it miners are trusted: no task is
        done again, only the form of updates is checked, and all that they take off the loss counts.

        Within a numeric class the result depends on the dataset, `before`, the set of miners and the seeds alone. The
        order of `miners` and the number of workers do not change it.

        Raises ValueError if a miner is in `miners` twice, and OSError or EngineError if a task raises an exception.
        """
        orders = self.assign(before, miners, seed)
        checking = self._checker.begin(before.drawn)
        commits = self._engine.collect(self.dataset.shard_folder, orders, on_commit)
        updates = self._engine.reveal(orders, commits)
        spot_checks = checking.result()
        committed = {
            order.task.miner: commit
            for order, commit in zip(orders, commits, strict=True)
            if isinstance(commit, Commit)
        }
        drawn = score_seed(committed) if score_seed else seed
        judged = self._judge.judge(
            before.model,
            orders,
            commits,
            updates,
            score_seed=drawn,
            known=before.known,
            norms=before.norms,
            standings=before.standings,
            refused=self._refused(before, orders, spot_checks),
            strangers=score_seed is not None,
        )
        checked: tuple[Drawn, ...] = ()
        if score_seed:
            judged, checked = self._draw_checks(judged, drawn, {check.miner for check in spot_checks if check.passed})
        return self.aggregate(before, judged, spot_checks, checked, drawn)

    def assign(self, before: Checkpoint, miners: Sequence[bytes], seed: bytes) -> list[Order]:
        """Return an order for each miner, sorted by miner."""
        shards = self.dataset.shards
        return [
            Order(task, before.model_hash, shards[task.shard], before.memories.get(task.miner))
            for task in assign(seed, before.cycle, miners, len(self.segments), len(shards))
        ]

    def _refused(
        self, before: Checkpoint, orders: Sequence[Order], spot_checks: Sequence[SpotCheck]
    ) -> dict[bytes, UpdateError]:
        """Return the miners whose updates are refused for what they did before."""
        refused = {
            order.task.miner: UpdateError(Reason.BARRED, f"barred before cycle {standing.barred_until + 1}")
            for order in orders
            if (standing := before.standings.get(order.task.miner, Standing())).barred_until > before.cycle
        }
        for check in spot_checks:
            if not check.passed:
                detail = f"the task of cycle {before.cycle}, done again: {check.failure}"
                refused[check.miner] = UpdateError(Reason.SPOT_CHECK_FAILED, detail)
        return refused

    def _draw_checks(
        self, judged: Judged, score_seed: bytes, passed: Collection[bytes]
    ) -> tuple[Judged, tuple[Drawn, ...]]:
        """Draw the tasks that are done again, and have their miners send the memories that this needs.

        A miner that does not send them is refused. It may be away: it is not barred, but its next task is drawn first.
        """
        done = {task.order.task.miner: task for task in judged.tasks if task.contribution and task.commit}
        drawn = []
        for miner in draw_checks(score_seed, list(done), judged.standings, self.job.spot_checks, passed):
            order, commit = done[miner].order, done[miner].commit
            assert commit  # noqa: S101 - an accepted update has one
            began = order._replace(memory_hash=commit.memory_before, noise_hash=commit.noise_hash)
            drawn.append(Drawn(began, commit.update_hash, commit.memory_after, commit.numeric_class))
        ours = numeric_class(self.job.device)
        self._engine.bring({each.order.task.miner: memories_of(each, ours) for each in drawn})
        lacking = {
            each.order.task.miner
            for each in drawn
            if not all((self._engine.store / digest.hex()).exists() for digest in memories_of(each, ours))
        }
        return judged.without(lacking), tuple(each for each in drawn if each.order.task.miner not in lacking)

    def aggregate(
        self,
        before: Checkpoint,
        judged: Judged,
        spot_checks: Sequence[SpotCheck],
        drawn: tuple[Drawn, ...],
        score_seed: bytes,
    ) -> CycleResult:
        """Aggregate the accepted updates into the next model, store it, and return the cycle's result."""
        model, velocity, evaluation, share = before.model, before.velocity, before.evaluation, 0.0
        step: torch.Tensor | None = None
        memories: Mapping[bytes, bytes] = {}
        if judged.accepted:
            model, velocity, evaluation, share, step = self._moved(before, judged.accepted)
            memories = _memories(judged.tasks) if share else {}
        model_hash, velocity_hash = before.model_hash, before.velocity_hash
        if velocity is not before.velocity:
            model_hash, velocity_hash = self._save(model, {"velocity": velocity})
        after = Checkpoint(
            cycle=before.cycle + 1,
            model=model,
            model_hash=model_hash,
            evaluation=evaluation,
            best_loss=min(before.best_loss, evaluation.loss),
            velocity=velocity,
            velocity_hash=velocity_hash,
            memories=_without_cheats({**before.memories, **memories}, spot_checks),
            norms=judged.norms,
            standings=next_standings(
                judged.standings,
                steady={task.order.task.miner: _is_steady(task) for task in judged.tasks},
                passed={check.miner: check.passed for check in spot_checks},
                unproven=[each.miner for each in _refusals(judged.tasks) if each.reason is Reason.MEMORY_WITHHELD],
                barred_until=before.cycle + 1 + self.job.penalty_cycles,
            ),
            drawn=drawn,
            known=replace(judged.known, step=step),
            spent=spent_after(
                self.job,
                self._sizes,
                before.spent,
                [task.order.shard_hash for task in judged.tasks if self._costs(task)],
            ),
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
            spot_checks=tuple(spot_checks),
            tasks=tuple(
                replace(task, epsilon=epsilon(self.job, self._sizes[task.order.shard_hash], 1))
                if self._costs(task)
                else task
                for task in judged.tasks
            ),
        )

    def _costs(self, task: TaskResult) -> bool:
        """Return whether a task costs its shard's examples privacy: others see its update, if only its hash."""
        return bool(self.job.privacy and task.commit)

    def _moved(
        self, before: Checkpoint, accepted: Sequence[Accepted]
    ) -> tuple[State, torch.Tensor, Evaluation, float, torch.Tensor | None]:
        """Return the next model, its velocity and its evaluation, the share of the step that was taken, and the step.

        If the guard allows no step, the model stays, and the momentum starts again from 0.
        """
        for halvings in range(HALVINGS + 1):
            share = 0.5**halvings
            model, velocity, step = aggregate(
                self.job, self.layout, before.model, before.velocity, accepted, share=share
            )
            evaluation = self.evaluate(model)
            if evaluation.loss <= before.best_loss * (1 + self.job.guard):
                return model, velocity, evaluation, share, step
        return before.model, torch.zeros_like(before.velocity), before.evaluation, 0.0, None


def _refusals(tasks: Sequence[TaskResult]) -> tuple[Refusal, ...]:
    return tuple(task.refusal for task in tasks if task.refusal)


def _is_steady(task: TaskResult) -> bool:
    withheld = {Reason.WITHHELD, Reason.MEMORY_WITHHELD}
    return task.commit is not None and not (task.refusal and task.refusal.reason in withheld)


def _without_cheats(memories: Mapping[bytes, bytes], spot_checks: Sequence[SpotCheck]) -> dict[bytes, bytes]:
    """Leave out the memories of miners that failed a spot check: they may be anything."""
    failed = {check.miner for check in spot_checks if not check.passed}
    return {miner: memory for miner, memory in memories.items() if miner not in failed}


def _memories(tasks: Sequence[TaskResult]) -> dict[bytes, bytes]:
    """Return the accepted miners' new memories. A refused miner keeps the memory that it had."""
    return {
        task.order.task.miner: task.commit.memory_after
        for task in tasks
        if task.contribution and task.commit and task.commit.memory_after
    }
