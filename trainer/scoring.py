"""What an update is worth: params trained, loss reduction, weight; and why one is refused.

An update comes from a miner, so its bytes are taken for hostile until `read_update` has checked them.
"""

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum

import safetensors
import torch
from torch import nn
from torch.func import functional_call

from traincert.trainer.datasets import Examples
from traincert.trainer.job import TrainerError
from traincert.trainer.state import State, state_bytes, state_from_bytes
from traincert.trainer.training import deterministic

MAX_NANO_NATS = 2**64 - 1

_BATCH = 1024  # bounds the memory that measuring needs


class Reason(StrEnum):
    """Why a miner's update is not in a cycle's contributions."""

    WORKER_DIED = "worker-died"
    TOO_LARGE = "too-large"
    MALFORMED = "malformed"
    WRONG_NAMES = "wrong-names"
    WRONG_DTYPE = "wrong-dtype"
    WRONG_SHAPE = "wrong-shape"
    NOT_CANONICAL = "not-canonical"
    NOT_FINITE = "not-finite"
    NORM_TOO_LARGE = "norm-too-large"
    NO_IMPROVEMENT = "no-improvement"


class UpdateError(TrainerError):
    """An update is refused; `reason` says why, the message what was expected and found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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
    update_hash: bytes  # 32 bytes; SHA-256 of the update's canonical safetensors
    params: int  # parameters (scalars) trained
    loss_reduction: int  # nano-nats, at least 1
    weight: int  # isqrt(params * loss_reduction), at least 1


@dataclass(frozen=True)
class Evaluation:
    """A model measured on examples."""

    loss: int  # mean cross-entropy, nano-nats
    accuracy: float  # 0 to 1


@deterministic()
def evaluate(model: nn.Module, state: State, examples: Examples, *, batch_size: int = _BATCH) -> Evaluation:
    """Measure `state` on `examples`; `model` only lends its structure and is not changed.

    Losses are summed in float64 and divided once by their number, so that `batch_size` changes no more than the
    rounding. A loss that is no number, or too large for 64 bits of nano-nats, counts as `MAX_NANO_NATS`.
    """
    model.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for inputs, labels in zip(*(torch.split(tensor, batch_size) for tensor in examples), strict=True):
            logits = functional_call(model, dict(state), (inputs,))  # (batch, classes)
            loss += nn.functional.cross_entropy(logits.double(), labels, reduction="sum").item()
            correct += int((logits.argmax(dim=1) == labels).sum())
    count = len(examples.labels)
    return Evaluation(nano_nats(loss / count), correct / count)


def nano_nats(loss: float) -> int:
    """Return a loss in nats as fixed point: times 10⁹, to nearest, 0 to `MAX_NANO_NATS` (which also stands for NaN)."""
    if not loss * 1e9 < MAX_NANO_NATS:
        return MAX_NANO_NATS
    return max(0, round(loss * 1e9))


@deterministic()
def read_update(data: bytes, expected: State, max_norm: float) -> State:
    """Check and decode `data`, the bytes that a miner sent as its update; cheap checks come first.

    The update must have the names, dtypes and shapes of `expected` (the segment's parameters), be encoded as
    `state_bytes` does, and have an L2 norm, over all its values, of at most `max_norm`. Raises UpdateError if not.
    """
    # Twice, so that one with other names or wider values is still refused for what it is.
    limit = 2 * len(state_bytes(expected))
    if len(data) > limit:
        raise UpdateError(Reason.TOO_LARGE, f"{len(data)} bytes, at most {limit} are read")
    try:
        found = _header(data)
    except safetensors.SafetensorError as error:
        raise UpdateError(Reason.MALFORMED, str(error)[:200]) from None
    wanted = _header(state_bytes(expected))
    if found.keys() != wanted.keys():
        raise UpdateError(Reason.WRONG_NAMES, f"expected {sorted(wanted)}, found {repr(sorted(found))[:200]}")
    for name, (dtype, shape) in wanted.items():
        if found[name][0] != dtype:
            raise UpdateError(Reason.WRONG_DTYPE, f"{name}: expected {dtype}, found {found[name][0]}")
        if found[name][1] != shape:
            raise UpdateError(Reason.WRONG_SHAPE, f"{name}: expected {shape}, found {str(found[name][1])[:200]}")
    update = state_from_bytes(data)
    if state_bytes(update) != data:
        raise UpdateError(Reason.NOT_CANONICAL, "the same tensors have another encoding")
    for name, tensor in update.items():
        if not tensor.isfinite().all():
            raise UpdateError(Reason.NOT_FINITE, f"{name} has a value that is NaN or infinite")
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))
    if norm > max_norm:
        raise UpdateError(Reason.NORM_TOO_LARGE, f"L2 norm {norm:g}, at most {max_norm:g}")
    return update


def score_update(
    model: nn.Module, state: State, validation: Examples, loss_before: int, miner: bytes, update: State
) -> Contribution:
    """Score a checked update: how much it alone, added to `state`, lowers the validation loss.

    `loss_before` is the loss of `state` on `validation`, nano-nats. Raises UpdateError if the loss is not lower, so
    that the weight would be 0.
    """
    loss_after = evaluate(model, add(state, update), validation).loss
    params = sum(tensor.numel() for tensor in update.values())
    loss_reduction = max(0, loss_before - loss_after)
    weight = math.isqrt(params * loss_reduction)
    if weight < 1:
        raise UpdateError(Reason.NO_IMPROVEMENT, f"loss {loss_before} before and {loss_after} after, nano-nats")
    update_hash = hashlib.sha256(state_bytes(update)).digest()
    return Contribution(miner, update_hash, params, loss_reduction, weight)


def add(state: State, update: State) -> State:
    """Return a new state: `state` with the update's tensors added to those of the same name."""
    return {name: tensor + update[name] if name in update else tensor for name, tensor in state.items()}


def _header(data: bytes) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of each tensor in safetensors bytes, without making tensors of them."""
    return {name: (tensor["dtype"], tensor["shape"]) for name, tensor in safetensors.deserialize(data)}  # type: ignore[no-untyped-call]
