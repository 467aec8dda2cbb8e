"""A model's trainable parameters as one flat vector, and cutting it into balanced segments."""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from traincert.trainer.errors import JobError
from traincert.trainer.job import TrainingJob, resolve
from traincert.trainer.preprocessing import Examples
from traincert.trainer.state import State


@dataclass(frozen=True)
class Segment:
    """What one task trains: a range of the flat vector, and the buffers that belong to it."""

    start: int
    end: int
    buffers: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        """How many parameters (scalars) it has."""
        return self.end - self.start


class Piece(NamedTuple):
    """The part of one parameter tensor, flattened, that is in a segment."""

    name: str
    begin: int
    end: int


class Layout:
    """Where each trainable parameter is in the flat vector: in module order, tied ones once, frozen ones nowhere."""

    def __init__(self, model: nn.Module) -> None:
        trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.names = list(trainable)
        self.bounds = [0, *accumulate(parameter.numel() for parameter in trainable.values())]
        # A buffer goes with the parameters before it: a batch norm's statistics with its weight and bias.
        self.buffers: list[tuple[int, str]] = []
        kept = model.state_dict().keys()
        seen = 0
        for prefix, module in model.named_modules():
            names = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
            seen += sum(name in trainable for name in names)
            place = max(0, self.bounds[seen] - 1)
            for name, buffer in module.named_buffers(prefix, recurse=False):
                if name in kept and buffer.dtype is not torch.bool:  # those are masks, which nothing changes
                    self.buffers.append((place, name))

    @property
    def params(self) -> int:
        """How many trainable parameters (scalars) there are."""
        return self.bounds[-1]

    def segment(self, start: int, end: int) -> Segment:
        """Return a range of the flat vector with its buffers."""
        return Segment(start, end, tuple(name for place, name in self.buffers if start <= place < end))

    def pieces(self, segment: Segment) -> list[Piece]:
        """Return the segment's parts of tensors, in order."""
        first = bisect_right(self.bounds, segment.start) - 1
        found = []
        for number in itertools.count(first):
            begin, end = self.bounds[number : number + 2]
            found.append(Piece(self.names[number], max(segment.start - begin, 0), min(segment.end, end) - begin))
            if end >= segment.end:
                return found
        raise AssertionError

    def flatten(self, tensors: State, segment: Segment) -> torch.Tensor:
        """Return the segment's parameters (params,) in float32."""
        return torch.cat([tensors[name].reshape(-1)[begin:end].float() for name, begin, end in self.pieces(segment)])

    def add(self, state: State, segment: Segment, move: torch.Tensor) -> State:
        """Return a new state in which the segment's parameters are changed by `move` (params,) float32.

        Each sum is rounded once, to the parameter's own type: float32, or what has at least its precision.
        """
        changed = dict(state)
        start = 0
        for name, begin, end in self.pieces(segment):
            tensor = state[name].clone()
            part = tensor.view(-1)[begin:end]
            part.copy_(part.to(torch.promote_types(part.dtype, torch.float32)) + move[start : start + end - begin])
            changed[name] = tensor
            start += end - begin
        return changed


def cut_segments(model: nn.Module, job: TrainingJob, examples: Examples | None = None) -> tuple[Segment, ...]:
    """Cut the model's trainable parameters into `job.segments` contiguous ranges of the flat vector.

    With `job.balance` "parameters" each has the same number of them, ± 1. With "flops" tensors are kept whole, and the
    greatest number of floating-point operations that a step on one of `examples` (of which there must be some) takes is
    as small as it can be; operations are counted as PyTorch's FlopCounterMode does, not timed, so that everybody cuts
    alike. Raises JobError if there is less to cut than `job.segments`.
    """
    layout = Layout(model)
    if job.balance == "parameters" or job.segments == 1:
        if job.segments > layout.params:
            raise JobError(f"segments = {job.segments}: must be at most {layout.params}, the model's parameters")
        bounds = [layout.params * number // job.segments for number in range(job.segments + 1)]
    else:
        if job.segments > len(layout.names):
            raise JobError(f"segments = {job.segments}: must be at most {len(layout.names)}, the parameter tensors")
        if examples is None:
            raise ValueError("balance by flops needs examples")
        first, more = _count_flops(model, job, examples)
        bounds = [layout.bounds[cut] for cut in _cut(first, more, job.segments)]
    return tuple(layout.segment(start, end) for start, end in pairwise(bounds))


def _count_flops(model: nn.Module, job: TrainingJob, examples: Examples) -> tuple[list[int], list[int]]:
    """Count a step's operations: if only tensor i is trained, and how many more it is if tensor i is trained, too."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = resolve(job.loss, "loss")
    batch = examples.batch(slice(0, 1))
    model.eval()  # so that no buffer changes, and one example is enough for batch norm

    def count(trained: Sequence[nn.Parameter]) -> int:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(loss(model(*batch.inputs), batch.target), trained, allow_unused=True)
        return int(counter.get_total_flops())

    every = count(trainable)
    first = [count([parameter]) for parameter in trainable]
    more = [every - count([each for each in trainable if each is not parameter]) for parameter in trainable[1:]]
    for parameter in trainable:
        parameter.requires_grad_(True)
    return first, [0, *more]


def _cut(first: Sequence[int], more: Sequence[int], count: int) -> list[int]:
    """Return count + 1 rising bounds, 0 first and len(first) last, that minimize the greatest cost between two.

    The cost of a part [start, end) is first[start] + the sum of more[start + 1 : end].
    """
    before = [0, *accumulate(more)]

    def cost(start: int, end: int) -> int:
        return first[start] + before[end] - before[start + 1]

    # best[end]: (greatest cost, bounds) of cutting [0, end) into the number of parts reached so far
    best = {end: (cost(0, end), [0, end]) for end in range(1, len(first) + 1)}
    for parts in range(2, count + 1):
        best = {
            end: min((max(best[start][0], cost(start, end)), [*best[start][1], end]) for start in range(parts - 1, end))
            for end in range(parts, len(first) + 1)
        }
    return best[len(first)][1]
