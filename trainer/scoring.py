"""Score an update: the parameters that it trained, the loss that it takes off, its weight in the lottery."""

import itertools
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from traincert.trainer.determinism import deterministic
from traincert.trainer.errors import JobError, Reason
from traincert.trainer.examples import Examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.state import State, set_state
from traincert.trainer.usercode import Functions, blaming, shown
from traincert.trainer.weights import Score, paid

MAX_NANO_NATS = 2**64 - 1
_LEAST = 4  # batches of examples
_MOST = 2.0**62  # nano-nats: a reduction that counts has to fit into 64 bits


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
    loss_reduction: int  # nano-nats that count, at least 1
    weight: int  # isqrt(params * loss_reduction), at least 1


@dataclass(frozen=True)
class Evaluation:
    """A model's loss and metric on some examples."""

    loss: int  # mean, nano-nats, with the job's loss_offset
    metric: float  # the job's metric
    more: tuple[float, ...] = ()  # the job's more_metrics


class Losses(NamedTuple):
    """A state's losses on the batches of some examples."""

    sums: tuple[float, ...]  # nats, of each batch
    weights: tuple[float, ...]  # what each batch's sum is divided by for its mean, such as its number of examples

    @property
    def mean(self) -> float:
        """The mean loss, nats. NaN if all weights are 0."""
        weight = math.fsum(self.weights)
        return math.fsum(self.sums) / weight if weight else math.nan

    def fall(self, after: "Losses") -> tuple[float, float]:
        """Return how much lower the mean of `after`, on the same batches, is than this one, and its standard error.

        Both are in nats. The error is 0 if there is one batch only. A loss that is no number gives NaN.
        """
        batches = [
            (weight, before / weight - later / other)
            for before, weight, later, other in zip(self.sums, self.weights, after.sums, after.weights, strict=True)
            if weight and other
        ]
        fall, count, whole = self.mean - after.mean, len(batches), math.fsum(weight for weight, _ in batches)
        if count < 2 or not math.isfinite(fall):
            return fall, 0.0
        mean = math.fsum(weight * each for weight, each in batches) / whole
        squares = math.fsum((weight / whole * (each - mean)) ** 2 for weight, each in batches)
        return fall, math.sqrt(squares * count / (count - 1))


class Scorer:
    """Evaluates states of a job's model: on the CPU in one thread for each core. Use it as a context manager."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._functions = Functions(job)
        self._models = threading.local()
        self._last: tuple[State, Examples, Losses] | None = None  # what was evaluated
        # torch has a number of threads for each thread. Set it once, when a thread of the pool starts; deterministic()
        # sets it in the calling thread only.
        self._threads = os.cpu_count() or 1 if job.device == "cpu" else 1
        self._pool = ThreadPoolExecutor(self._threads, "scoring", lambda: torch.set_num_threads(1))

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    @deterministic()
    def losses(self, states: Iterable[State], examples: Examples, batches: int = _LEAST) -> list[Losses]:
        """Return each state's losses on `examples`, in at least so many batches, if there are so many examples.

        The model's outputs go to the job's loss as they are. The batches' losses are added in float64.

        This takes one state for each thread from `states` at a time: not all have to fit into memory.
        """
        return [losses for losses, _ in self._measure_all(states, examples, batches, keep_outputs=False)]

    def known_losses(self, state: State, examples: Examples) -> list[Losses]:
        """Return what `losses` returns for a state, if it was the last to be evaluated, and on the same examples.

        Otherwise return an empty list.
        """
        last = self._last
        return [last[2]] if last and last[0] is state and last[1] is examples else []

    @deterministic()
    def evaluate(self, state: State, examples: Examples) -> Evaluation:
        """Return a state's mean loss, and its metric, of the outputs for all examples at once.

        A loss that is NaN, or above 64 bits of nano-nats, counts as `MAX_NANO_NATS`. Raises JobError if a loss is below
        0 with the job's `loss_offset` added.
        """
        ((losses, outputs),) = self._measure_all([state], examples, _LEAST, keep_outputs=True)
        self._last = state, examples, losses
        with torch.inference_mode():
            metric, *more = self._functions.metrics(self._concatenated(outputs), examples.batch(slice(None)).target)
        return Evaluation(nano_nats(losses.mean, self._job.loss_offset), metric, tuple(more))

    def _measure_all(
        self, states: Iterable[State], examples: Examples, least: int, *, keep_outputs: bool
    ) -> Iterator[tuple[Losses, list[Any]]]:
        batches = _batches(len(examples), least)
        left = iter(states)
        while group := list(itertools.islice(left, self._threads)):
            pairs = itertools.product(group, batches)
            measured = list(self._pool.map(lambda pair: self._measure(examples, keep_outputs, *pair), pairs))
            for start in range(0, len(measured), len(batches)):
                sums, weights, outputs = zip(*measured[start : start + len(batches)], strict=True)
                yield Losses(sums, weights), list(outputs)

    def _measure(self, examples: Examples, keep_outputs: bool, state: State, rows: slice) -> tuple[float, float, Any]:
        """Return a batch's loss (nats), summed up, its weight, and the model's outputs on the CPU, or None."""
        mine = self._models
        if not hasattr(mine, "model"):
            mine.model = build_model(self._job).to(self._job.device).eval()
            mine.state = None
        if mine.state is not state:
            set_state(mine.model, state)
            mine.state = state
        inputs, target = examples.batch(rows, self._job.device)
        with torch.inference_mode():
            outputs = self._functions.outputs(mine.model, inputs)
            total, weight = self._functions.total_loss(outputs, target, len(inputs[0]))
        return total, weight, _to_cpu(outputs) if keep_outputs else None

    def _concatenated(self, outputs: Sequence[Any]) -> Any:
        """Return the outputs of all batches, tensors or structures of tensors (N, ...), as those of one batch."""
        leaves = [tree_flatten(each)[0] for each in outputs]
        first, structure = tree_flatten(outputs[0])
        if strange := [leaf for leaf in first if not isinstance(leaf, torch.Tensor | None)]:
            raise JobError(
                f"model = {self._job.model!r}: its outputs have a {type(strange[0]).__name__}; must be a tensor, or a "
                "tuple, list or dict of tensors"
            )
        with blaming("model", self._job.model, lambda: f"its outputs {shown(outputs[0])} have no row for each example"):
            columns = zip(*leaves, strict=True)
            return tree_unflatten([None if each[0] is None else torch.cat(each) for each in columns], structure)


def _batches(count: int, least: int) -> list[slice]:
    # Threads share the batches. The number of CPUs must not change the batches, and so the bits.
    size = min(128, math.ceil(count / least))
    return [slice(start, start + size) for start in range(0, count, size)]


def _to_cpu(outputs: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), outputs)


def nano_nats(loss: float, offset: float = 0.0) -> int:
    """Return a loss plus an offset as nano-nats: nats times 10⁹, rounded, 0 to `MAX_NANO_NATS`.

    NaN gives `MAX_NANO_NATS`. Raises JobError for a number below 0.
    """
    shifted = (loss + offset) * 1e9
    if not shifted < MAX_NANO_NATS:
        return MAX_NANO_NATS
    if round(shifted) < 0:
        raise JobError(
            f"loss_offset = {offset:g}: the loss is {loss:g} nats, and no loss may be below 0 with the offset added; "
            f"choose an offset that is greater than {-loss:g} and than that of every better model"
        )
    return round(shifted)


def nats(recorded: int, offset: float) -> float:
    """Return a recorded loss, nano-nats with the job's `loss_offset`, in nats without it. `MAX_NANO_NATS` gives NaN."""
    return math.nan if recorded == MAX_NANO_NATS else recorded / 1e9 - offset


def score(
    job: TrainingJob, params: int, before: Losses, after: Losses, noise_margin: float, *, late: bool = False
) -> Score:
    """Score an update that passed all checks. `params` is the size of its segment.

    `before` are the losses without the update, `after` with this update alone, on the same batches. `noise_margin` is
    how many standard errors do not count. `late`: the task took longer than `late_seconds`.
    """
    fall, error = before.fall(after)
    if not math.isfinite(fall):
        fall, error = -math.inf, 0.0
    reduction = round(max(-_MOST, min(fall * 1e9, _MOST)))
    deviation = math.ceil(min(error * 1e9, _MOST))
    return paid(params, reduction, deviation, noise_margin=noise_margin, late_share=job.late_share, late=late)
