"""Accepted updates → the next model, never worse than the last."""

from collections.abc import Sequence

import torch
from torch import nn

from traincert.trainer.datasets import Examples
from traincert.trainer.scoring import Contribution, add, evaluate
from traincert.trainer.state import State
from traincert.trainer.training import deterministic

HALVINGS = 10


@deterministic()
def aggregate(
    model: nn.Module,
    state: State,
    validation: Examples,
    loss_before: int,
    accepted: Sequence[tuple[Contribution, State]],
) -> tuple[State, int]:
    """Combine updates into the next state; `state` itself is not changed.

    Each parameter moves by the mean, weighted by the contributions' weights, of the updates that trained it. Since
    updates that each help alone can hurt together, the move is halved, up to `HALVINGS` times, until the validation
    loss is not above `loss_before`; if that never happens, the state stays as it is. Returns the next state and its
    validation loss, nano-nats.
    """
    move = _weighted_mean(accepted)
    for halvings in range(HALVINGS + 1):
        candidate = add(state, {name: (tensor * 0.5**halvings).float() for name, tensor in move.items()})
        loss = evaluate(model, candidate, validation).loss
        if loss <= loss_before:
            return candidate, loss
    return state, loss_before


def _weighted_mean(accepted: Sequence[tuple[Contribution, State]]) -> dict[str, torch.Tensor]:
    """Average in float64 and in the contributions' own order, so that the order they came in does not matter."""
    total: dict[str, torch.Tensor] = {}
    weight: dict[str, float] = {}
    for contribution, update in sorted(accepted, key=lambda pair: pair[0]):
        for name, tensor in update.items():
            weight[name] = weight.get(name, 0) + float(contribution.weight)  # tensors take integers of 63 bits only
            total[name] = total.get(name, 0) + float(contribution.weight) * tensor.double()
    return {name: total[name] / weight[name] for name in total}
