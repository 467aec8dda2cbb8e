"""Score an update: the parameters that it trained, the loss that it takes off, its weight in the lottery."""

import itertools
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from traincert.trainer.determinism import deterministic
from traincert.trainer.errors import JobError, Reason
from traincert.trainer.examples import Examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.state import State, set_state
from traincert.trainer.updates import UpdateError
from traincert.trainer.usercode import Functions, blaming, shown

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

    loss: int  # mean, nano-nats, with the job's loss_offset
    metric: float  # the job's metric
    more: tuple[float, ...] = ()  # the job's more_metrics


class Scorer:
    """Evaluates states of a job's model: on the CPU in one thread for each core. Use it as a context manager."""

    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._functions = Functions(job)
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
    def losses(self, states: Iterable[State], examples: Examples) -> list[int]:
        """Return each state's mean loss on `examples`, in nano-nats.

        The model's outputs go to the job's loss as they are. The batches' losses are added in float64, and divided once
        by their weight. A loss that is NaN, or above 64 bits of nano-nats, counts as `MAX_NANO_NATS`.

        This takes one state for each thread from `states` at a time: not all have to fit into memory.

        Raises JobError if a loss is below 0 with the job's `loss_offset` added.
        """
        return [loss for loss, _ in self._measure_all(states, examples, keep_outputs=False)]

    @deterministic()
    def evaluate(self, state: State, examples: Examples) -> Evaluation:
        """Return a state's loss, as `losses` does, and its metric, of the outputs for all examples at once."""
        ((loss, outputs),) = self._measure_all([state], examples, keep_outputs=True)
        with torch.inference_mode():
            metric, *more = self._functions.metrics(self._concatenated(outputs), examples.batch(slice(None)).target)
        return Evaluation(loss, metric, tuple(more))

    def _measure_all(
        self, states: Iterable[State], examples: Examples, *, keep_outputs: bool
    ) -> Iterator[tuple[int, list[Any]]]:
        batches = _batches(len(examples))
        left = iter(states)
        while group := list(itertools.islice(left, self._threads)):
            pairs = itertools.product(group, batches)
            measured = list(self._pool.map(lambda pair: self._measure(examples, keep_outputs, *pair), pairs))
            for start in range(0, len(measured), len(batches)):
                losses, weights, outputs = zip(*measured[start : start + len(batches)], strict=True)
                weight = math.fsum(weights)
                loss = math.fsum(losses) / weight if weight else math.nan
                yield nano_nats(loss, self._job.loss_offset), list(outputs)

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
        with blaming("model", self._job.model, f"its outputs {shown(outputs[0])} have no row for each example"):
            columns = zip(*leaves, strict=True)
            return tree_unflatten([None if each[0] is None else torch.cat(each) for each in columns], structure)


def _batches(count: int) -> list[slice]:
    # At least four batches, which threads can share. The number of CPUs must not change the batches, and so the bits.
    size = min(128, math.ceil(count / 4))
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


def score(miner: bytes, update_hash: bytes, params: int, loss_before: int, loss_after: int) -> Contribution:
    """Score an update that passed all checks. `update_hash` is its SHA-256, `params` the size of its segment.

    `loss_before` is the loss without the update, `loss_after` with this update alone: nano-nats, on the same examples.

    Raises UpdateError if the loss is not lower, because the weight would be 0.
    """
    loss_reduction = max(0, loss_before - loss_after)
    weight = math.isqrt(params * loss_reduction)
    if weight < 1:
        raise UpdateError(Reason.NO_IMPROVEMENT, f"loss {loss_before} before and {loss_after} after, nano-nats")
    return Contribution(miner, update_hash, params, loss_reduction, weight)
