"""Accepted updates → the next model."""

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from traincert.trainer.determinism import deterministic
from traincert.trainer.job import TrainingJob
from traincert.trainer.scoring import Contribution
from traincert.trainer.segments import Layout, Segment
from traincert.trainer.state import State
from traincert.trainer.updates import Update

_BLOCK = 2**16  # values at a time: they stay in the processor's cache, which is seven times as fast
_STEPS = 30  # of Weiszfeld's algorithm


@dataclass(frozen=True)
class Accepted:
    """An accepted update, its contribution and its segment. The update has the size at which it was scored."""

    contribution: Contribution
    segment: Segment
    update: Update


@deterministic()
def aggregate(
    job: TrainingJob,
    layout: Layout,
    state: State,
    velocity: torch.Tensor,
    accepted: Sequence[Accepted],
    *,
    share: float = 1.0,
) -> tuple[State, torch.Tensor, torch.Tensor]:
    """Return the next state, the next velocity, and the step that was made. `state` and `velocity` are not changed.

    In each segment the outer optimizer makes one step: SGD with Nesterov momentum, as in DiLoCo (arXiv 2311.08105). Its
    gradient is the updates' mean, weighted by the contributions' weights, or what the job's `aggregation` says: the
    coordinate-wise trimmed mean (arXiv 1803.01498), or the geometric median (arXiv 1912.13445). A segment without
    updates stays the same. `velocity`, the momentum buffer, and the step are (all trainable parameters,) float32.
    `share` (0 to 1) scales the step and the new velocity.

    Every operation is elementwise, in float64, in the contributions' order: every machine gets the same bits.
    """
    velocity, step = velocity.clone(), torch.zeros(layout.params)
    threads = os.cpu_count() or 1
    for segment in sorted({each.segment for each in accepted}, key=lambda segment: segment.start):
        updates = sorted((each for each in accepted if each.segment == segment), key=lambda each: each.contribution)
        moves = [each.update.move for each in updates]
        weights = [float(each.contribution.weight) for each in updates]
        if job.aggregation == "geometric_median":
            weights = _geometric_weights(moves, weights)
        trim = int(job.trim * len(updates)) if job.aggregation == "trimmed_mean" else 0
        moved = step[segment.start : segment.end]
        moving = velocity[segment.start : segment.end]
        blocks = range(0, segment.params, _BLOCK)
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            make = partial(_make_step, job, moves, weights, trim, share, moving, moved)
            list(pool.map(make, (blocks[number::threads] for number in range(threads))))
        buffers: dict[str, torch.Tensor] = {}
        for name in segment.buffers:
            changes = [each.update.buffers.get(name) for each in updates]
            sent = [each for each in changes if each is not None]
            if sent:  # the others' did not change
                every = [torch.zeros_like(sent[0]) if each is None else each for each in changes]
                mean = _weighted_mean(every, weights, trim)
                buffers[name] = (mean if sent[0].is_floating_point() else mean.round()).to(sent[0].dtype)
        state = Update(moved, buffers).applied(layout, segment, state)
    return state, velocity, step


def _make_step(
    job: TrainingJob,
    moves: Sequence[torch.Tensor],
    weights: Sequence[float],
    trim: int,
    share: float,
    moving: torch.Tensor,
    moved: torch.Tensor,
    begins: Iterable[int],
) -> None:
    """Make the outer optimizer's step in some blocks of a segment, given by where they begin.

    `moving` is the segment's momentum, which is changed, and `moved` is where the step goes: (params,) float32.
    """
    for begin in begins:
        here = slice(begin, begin + _BLOCK)
        mean = _weighted_mean([move[here] for move in moves], weights, trim)
        # In place, which is faster: momentum * outer_momentum + mean, and then the same with the new momentum.
        momentum = moving[here].double().mul_(job.outer_momentum).add_(mean).mul_(share)
        moving[here] = momentum
        moved[here] = momentum.mul_(job.outer_momentum).add_(mean.mul_(share)).mul_(job.outer_learning_rate)


def _weighted_mean(tensors: Sequence[torch.Tensor], weights: Sequence[float], trim: int) -> torch.Tensor:
    """Return the mean in float64. Of each element the `trim` smallest and the `trim` greatest values are left out."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    if not trim:
        for weight, tensor in zip(weights, tensors, strict=True):
            # Multiply, then add: a fused multiply-add rounds once instead of twice, which would change bits between
            # processors.
            product = tensor.double() * weight
            total += product
        return total.div_(sum(weights))
    values, order = torch.stack([tensor.double() for tensor in tensors]).sort(dim=0, stable=True)
    sorted_weights = torch.tensor(weights, dtype=torch.float64)[order]
    whole = torch.zeros_like(total)
    for value, weight_ in list(zip(values, sorted_weights, strict=True))[trim:-trim]:
        product = value * weight_
        total, whole = total + product, whole + weight_
    return total / whole


def _geometric_weights(moves: Sequence[torch.Tensor], weights: Sequence[float]) -> list[float]:
    """Return the weights with which the mean of `moves` is their weighted geometric median (Weiszfeld's algorithm)."""
    found = list(weights)
    for _ in range(_STEPS):
        squares = [0.0] * len(moves)
        for begin in range(0, len(moves[0]), _BLOCK):
            parts = [move[begin : begin + _BLOCK] for move in moves]
            mean = _weighted_mean(parts, found, 0)
            for number, part in enumerate(parts):
                squares[number] += _sum((part.double() - mean) ** 2)
        distances = [math.sqrt(square) for square in squares]
        least = 1e-6 * max(distances)  # the median may be one of the moves: its distance is 0 then
        if not least:
            break
        found = [weight / max(distance, least) for weight, distance in zip(weights, distances, strict=True)]
    return found


def _sum(values: torch.Tensor) -> float:
    """Return the sum of a vector, with the same bits on every processor: it adds halves elementwise."""
    while len(values) > 1:
        half = len(values) // 2
        values = torch.cat([values[:half] + values[half : 2 * half], values[2 * half :]])
    return float(values[0])
