"""What an update is worth: params trained, loss reduction, weight."""

import hashlib
import itertools
import math
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from traincert.trainer.determinism import deterministic
from traincert.trainer.job import TrainingJob, resolve
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import Examples
from traincert.trainer.state import State, set_state
from traincert.trainer.updates import Reason, UpdateError

MAX_NANO_NATS = 2**64 - 1


@dataclass(frozen=True)
class Refusal:
    """A miner whose update is not in a cycle's contributions."""

    miner: bytes
    reason: Reason
    detail: str


@dataclass(frozen=True, order=True)
class Contribution:
    """The score of a miner's update. Sorts by miner, then update_hash."""

    miner: bytes  # 32 bytes
    update_hash: bytes  # 32 bytes; SHA-256 of the update's bytes
    params: int  # parameters (scalars) trained
    loss_reduction: int  # nano-nats, at least 1
    weight: int  # isqrt(params * loss_reduction), at least 1


@dataclass(frozen=True)
class Evaluation:
    """A model measured on examples."""

    loss: int  # mean, nano-nats
    metric: float  # mean of the job's metric


class Scorer:
    """Measures states of a job's models, several at once, each on one thread. Use it as a context manager."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._models = threading.local()
        # What deterministic() sets is partly each thread's own: setting it at the start leaves nothing to restore.
        self._threads = os.cpu_count() or 1 if job.device == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._threads, "scoring", lambda: torch.set_num_threads(1))

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @deterministic()
    def evaluate(self, states: Iterable[State], examples: Examples) -> list[Evaluation]:
        """Measure each state on `examples`, with the same result as `evaluate`. Few of them are in memory at a time."""
        batches = _batches(examples)
        left = iter(states)
        found: list[Evaluation] = []
        while group := list(itertools.islice(left, self._threads)):
            totals = list(self._pool.map(self._measure, itertools.product(group, batches)))
            starts = range(0, len(totals), len(batches))
            found += [_evaluation(totals[start : start + len(batches)], examples) for start in starts]
        return found

    def _measure(self, pair: tuple[State, Examples]) -> tuple[float, float]:
        state, batch = pair
        mine = self._models
        if not hasattr(mine, "model"):
            mine.model = build_model(self._job).to(self._job.device)
            mine.state = None
        if mine.state is not state:
            set_state(mine.model, state)
            mine.state = state
        return _measure(mine.model, self._job, batch)


@deterministic()
def evaluate(
    model: nn.Module, job: TrainingJob, state: State, examples: Examples, *, batch_size: int | None = None
) -> Evaluation:
    """Measure `state` on `examples`; `model` is the job's, on its device, and has that state afterwards.

    Losses are computed in float64 from the model's outputs, summed, and divided once by their number, so that
    `batch_size` (by default as `_batches` has it) changes no more than the rounding. A loss that is no number,
    or too large for 64 bits of nano-nats, counts as `MAX_NANO_NATS`.
    """
    set_state(model, state)
    return _evaluation([_measure(model, job, batch) for batch in _batches(examples, batch_size)], examples)


def _batches(examples: Examples, batch_size: int | None = None) -> list[Examples]:
    # A quarter, if that is fewer than 128: so that processors can share the work, however many there are.
    size = batch_size or min(128, math.ceil(len(examples) / 4))
    return [
        Examples(
            tuple(column[start : start + size] for column in examples.inputs), examples.target[start : start + size]
        )
        for start in range(0, len(examples), size)
    ]


def _measure(model: nn.Module, job: TrainingJob, batch: Examples) -> tuple[float, float]:
    """Return the sums of losses and metrics."""
    inputs, target = batch.batch(slice(None), job.device)
    model.eval()
    with torch.inference_mode():
        outputs = model(*inputs).double()
        loss, metric = resolve(job.loss, "loss")(outputs, target), resolve(job.metric, "metric")(outputs, target)
    return float(loss) * len(target), float(metric) * len(target)


def _evaluation(totals: Sequence[tuple[float, float]], examples: Examples) -> Evaluation:
    loss, metric = (math.fsum(column) / len(examples) for column in zip(*totals, strict=True))
    return Evaluation(nano_nats(loss), metric)


def nano_nats(loss: float) -> int:
    """Return a loss in nats as fixed point: times 10⁹, to nearest, 0 to `MAX_NANO_NATS` (which also stands for NaN)."""
    if not loss * 1e9 < MAX_NANO_NATS:
        return MAX_NANO_NATS
    return max(0, round(loss * 1e9))


def score(miner: bytes, update: bytes, params: int, loss_before: int, loss_after: int) -> Contribution:
    """Score an update that was checked: the loss without it and with it alone, nano-nats, on the same examples.

    Raises UpdateError if the loss is not lower, so that the weight would be 0.
    """
    loss_reduction = max(0, loss_before - loss_after)
    weight = math.isqrt(params * loss_reduction)
    if weight < 1:
        raise UpdateError(Reason.NO_IMPROVEMENT, f"loss {loss_before} before and {loss_after} after, nano-nats")
    return Contribution(miner, hashlib.sha256(update).digest(), params, loss_reduction, weight)
