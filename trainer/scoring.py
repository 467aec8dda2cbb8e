"""Score an update: the parameters that it trained, the loss that it takes off, its weight in the lottery."""

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
    """Why a miner has no contribution in a cycle."""

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
    """A model's loss and metric on some examples."""

    loss: int  # mean, nano-nats
    metric: float  # mean of the job's metric


class Scorer:
    """Evaluates states of a job's model: on the CPU in one thread for each core. Use it as a context manager."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._models = threading.local()
        # torch has a number of threads for each thread. Set it once, when a thread of the pool starts; deterministic()
        # sets it in the calling thread only.
        self._threads = os.cpu_count() or 1 if job.device == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._threads, "scoring", lambda: torch.set_num_threads(1))

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @deterministic()
    def evaluate(self, states: Iterable[State], examples: Examples) -> list[Evaluation]:
        """Return each state's loss and metric on `examples`.

        Losses are float64, computed from the model's outputs, summed, and divided once by the number of examples. A
        loss that is NaN, or above 64 bits of nano-nats, counts as `MAX_NANO_NATS`.

        This takes one state for each thread from `states` at a time: not all have to fit into memory.
        """
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


def _batches(examples: Examples) -> list[Examples]:
    # At least four batches, which threads can share. The number of CPUs must not change the batches, and so the bits.
    size = min(128, math.ceil(len(examples) / 4))
    return [
        Examples(
            tuple(column[start : start + size] for column in examples.inputs), examples.target[start : start + size]
        )
        for start in range(0, len(examples), size)
    ]


def _measure(model: nn.Module, job: TrainingJob, batch: Examples) -> tuple[float, float]:
    """Return the sums of the batch's losses (nats) and metrics."""
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
    """Return a loss as nano-nats: nats times 10⁹, rounded, 0 to `MAX_NANO_NATS`. NaN gives `MAX_NANO_NATS`."""
    if not loss * 1e9 < MAX_NANO_NATS:
        return MAX_NANO_NATS
    return max(0, round(loss * 1e9))


def score(miner: bytes, update: bytes, params: int, loss_before: int, loss_after: int) -> Contribution:
    """Score an update that passed all checks. `update` is its bytes, `params` the size of its segment.

    `loss_before` is the loss without the update, `loss_after` with this update alone: nano-nats, on the same examples.

    Raises UpdateError if the loss is not lower, because the weight would be 0.
    """
    loss_reduction = max(0, loss_before - loss_after)
    weight = math.isqrt(params * loss_reduction)
    if weight < 1:
        raise UpdateError(Reason.NO_IMPROVEMENT, f"loss {loss_before} before and {loss_after} after, nano-nats")
    return Contribution(miner, hashlib.sha256(update).digest(), params, loss_reduction, weight)
