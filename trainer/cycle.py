"""One cycle: tasks, updates, scores, and the next model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from traincert.trainer.aggregation import aggregate
from traincert.trainer.datasets import Dataset, read_examples
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.models import build_model
from traincert.trainer.scoring import Contribution, Reason, Refusal, UpdateError, evaluate, read_update, score_update
from traincert.trainer.segments import cut_segments
from traincert.trainer.state import State, state_hash
from traincert.trainer.tasks import assign


@dataclass(frozen=True)
class CycleResult:
    """What a cycle did. Hashes are 32 raw bytes, losses are on the validation examples, in nano-nats."""

    model_before: bytes
    model_after: bytes
    state: State
    """The next model; its hash is `model_after`."""
    dataset_root: bytes
    loss_before: int
    loss_after: int
    """Never above `loss_before`."""
    accuracy: float
    """Of the next model, on the test examples; 0 to 1."""
    contributions: tuple[Contribution, ...]
    """Sorted by miner, then update_hash."""
    refusals: tuple[Refusal, ...]
    """Sorted by miner. Every miner is either here or in `contributions`."""

    @property
    def params_trained(self) -> int:
        """Sum of params over the contributions."""
        return sum(contribution.params for contribution in self.contributions)


def run_cycle(
    dataset: Dataset,
    state: State,
    miners: Sequence[bytes],
    engine: LocalEngine,
    *,
    seed: bytes,
    on_update: Callable[[int, int], None] | None = None,
) -> CycleResult:
    """Let every miner train its part of `state`, which is `initial_state(job)` or the last cycle's result's.

    On one kind of machine the result is a function of dataset, state, the set of miners (32-byte ids; there may be
    none) and seed (any bytes, new ones for each cycle), which decides who trains what, and on which examples first.
    Neither the order of `miners` nor the engine's number of workers matters. `state` is not changed. `on_update` is
    called with the number of tasks done and their total: at the start, and as tasks end.

    Raises ValueError if a miner is there twice or the engine is of another job than the dataset, IntegrityError if
    a stored split is missing or damaged, and EngineError if a task fails for a reason that is not its miner's.
    """
    job = dataset.job
    if engine.job != job:
        raise ValueError("the engine and the dataset are of different jobs")
    model = build_model(job)
    segments = cut_segments(model, job.segments)
    validation = read_examples(dataset.directory, dataset.validation)
    test = read_examples(dataset.directory, dataset.test)
    loss_before = evaluate(model, state, validation).loss

    tasks = assign(seed, miners, job.segments, job.shards)
    updates = engine.train(dataset, state, tasks, on_update)
    accepted, refusals = [], []
    for task, data in zip(tasks, updates, strict=True):
        try:
            if data is None:
                raise UpdateError(Reason.WORKER_DIED, "the task's worker process died twice")
            expected = {name: state[name] for name in segments[task.segment]}
            update = read_update(data, expected, job.max_update_norm)
            accepted.append((score_update(model, state, validation, loss_before, task.miner, update), update))
        except UpdateError as error:
            refusals.append(Refusal(task.miner, error.reason, error.detail))

    next_state, loss_after = aggregate(model, state, validation, loss_before, accepted)
    return CycleResult(
        model_before=state_hash(state),
        model_after=state_hash(next_state),
        state=next_state,
        dataset_root=dataset.root,
        loss_before=loss_before,
        loss_after=loss_after,
        accuracy=evaluate(model, next_state, test).accuracy,
        contributions=tuple(contribution for contribution, _ in accepted),
        refusals=tuple(refusals),
    )
