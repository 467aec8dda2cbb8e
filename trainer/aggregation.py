"""Accepted updates → the next model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from traincert.trainer.determinism import deterministic
from traincert.trainer.job import TrainingJob
from traincert.trainer.scoring import Contribution
from traincert.trainer.segments import Layout, Segment
from traincert.trainer.state import State
from traincert.trainer.updates import Update

_BLOCK = 2**16  # values at a time: they stay in the processor's cache, which is seven times as fast


@dataclass(frozen=True)
class Accepted:
    """An accepted update, its contribution and its segment."""

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
) -> tuple[State, torch.Tensor]:
    """Return the next state and the next velocity. `state` and `velocity` are not changed.

    In each segment the outer optimizer makes one step: SGD with Nesterov momentum, as in DiLoCo (arXiv 2311.08105). Its
    gradient is the updates' mean, weighted by the contributions' weights. A segment without updates stays the same.
    `velocity` is the momentum buffer, (all trainable parameters,) float32. `share` (0 to 1) scales the step and the new
    velocity.

    Every operation is elementwise, in float64, in the contributions' order: every machine gets the same bits.
    """
    velocity = velocity.clone()
    for segment in sorted({each.segment for each in accepted}, key=lambda segment: segment.start):
        updates = sorted((each for each in accepted if each.segment == segment), key=lambda each: each.contribution)
        moved = torch.empty(segment.params)
        moving = velocity[segment.start : segment.end]
        for begin in range(0, segment.params, _BLOCK):
            here = slice(begin, begin + _BLOCK)
            mean = _weighted_mean([(each.contribution.weight, each.update.move[here]) for each in updates])
            momentum = (moving[here].double() * job.outer_momentum + mean) * share
            moved[here] = (momentum * job.outer_momentum + mean * share) * job.outer_learning_rate
            moving[here] = momentum
        buffers: dict[str, torch.Tensor] = {}
        for name in segment.buffers:
            changes = [each.update.buffers.get(name) for each in updates]
            sent = [each for each in changes if each is not None]
            if sent:  # the others' did not change
                every = [torch.zeros_like(sent[0]) if each is None else each for each in changes]
                mean = _weighted_mean(
                    [(each.contribution.weight, one) for each, one in zip(updates, every, strict=True)]
                )
                buffers[name] = (mean if sent[0].is_floating_point() else mean.round()).to(sent[0].dtype)
        state = Update(moved, buffers).applied(layout, segment, state)
    return state, velocity


def _weighted_mean(weighted: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    total = torch.zeros_like(weighted[0][1], dtype=torch.float64)
    for weight, tensor in weighted:
        # Multiply, then add: a fused multiply-add rounds once instead of twice, which would change bits between
        # processors.
        product = tensor.double() * float(weight)  # float, because torch takes no integer above 63 bits
        total = total + product
    return total / float(sum(weight for weight, _ in weighted))
