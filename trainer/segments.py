"""A model's trainable parameters as one flat vector, which is cut into balanced segments."""

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
from traincert.trainer.examples import Examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.state import State
from traincert.trainer.usercode import Functions


@dataclass(frozen=True)
class Segment:
    """What one task trains: the range [start, end) of the flat vector, and the names of the buffers in it."""

    start: int
    end: int
    buffers: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        """The number of parameters (scalars) of the segment."""
        return self.end - self.start


class Piece(NamedTuple):
    """The part of one parameter tensor that is in a segment: [begin, end) of the flattened tensor."""

    name: str
    begin: int
    end: int


class Layout:
    """Where each trainable parameter is in the flat vector.

    Parameters are in module order. A tied parameter is in the vector once, a frozen one is not in it.
    """

    def __init__(self, model: nn.Module) -> None:
        trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.names = list(trainable)
        self.bounds = [0, *accumulate(parameter.numel() for parameter in trainable.values())]
        # A buffer belongs to the segment of the last parameter before it: a batch norm's statistics follow its bias.
        self.buffers: list[tuple[int, str]] = []
        kept = model.state_dict().keys()
        seen = 0
        for prefix, module in model.named_modules():
            names = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
            seen += sum(name in trainable for name in names)
            place = max(0, self.bounds[seen] - 1)
            for name, _ in module.named_buffers(prefix, recurse=False):
                if name in kept:
                    self.buffers.append((place, name))

    @property
    def params(self) -> int:
        """The number of trainable parameters (scalars)."""
        return self.bounds[-1]

    def segment(self, start: int, end: int) -> Segment:
        """Return the segment [start, end) of the flat vector, with its buffers."""
        return Segment(start, end, tuple(name for place, name in self.buffers if start <= place < end))

    def pieces(self, segment: Segment) -> list[Piece]:
        """Return the segment's pieces, in the order of the flat vector."""
        first = bisect_right(self.bounds, segment.start) - 1
        found = []
        for number in itertools.count(first):
            begin, end = self.bounds[number : number + 2]
            found.append(Piece(self.names[number], max(segment.start - begin, 0), min(segment.end, end) - begin))
            if end >= segment.end:
                return found
        raise AssertionError

    def flatten(self, tensors: State, segment: Segment) -> torch.Tensor:
        """Return the segment's parameters as one vector, (params,) float32."""
        return torch.cat([tensors[name].reshape(-1)[begin:end].float() for name, begin, end in self.pieces(segment)])

    def add(self, state: State, segment: Segment, move: torch.Tensor) -> State:
        """Return a new state: `state` with `move`, (params,) float32, added to the segment's parameters.

        Each sum is computed in float32, or in the parameter's dtype if that is wider, and rounded once to that dtype.
        """
        changed = dict(state)
        start = 0
        for name, begin, end in self.pieces(segment):
            tensor = state[name].clone()
            tensor.view(-1)[begin:end].add_(move[start : start + end - begin])
            changed[name] = tensor
            start += end - begin
        return changed


def cut_segments(model: nn.Module, job: TrainingJob, examples: Examples | None = None) -> tuple[Segment, ...]:
    """Cut the model's trainable parameters into `job.segments` contiguous ranges of the flat vector.

    With `job.balance` "parameters" all segments have the same number of parameters, ± 1.

    With "flops" tensors stay whole. The cut minimizes the floating-point operations of the most expensive segment, in a
    training step on the first of `examples`. PyTorch's FlopCounterMode counts the operations: unlike times, counts are
    the same on every machine.

    Raises JobError if there are fewer parameters, or tensors, than segments; ValueError if "flops" gets no examples.
    """
    layout = Layout(model)
    if job.balance == "parameters" or job.segments == 1:
        if job.segments > layout.params:
            raise JobError(f"segments = {job.segments}: must be at most {layout.params}, the trainable parameters")
        bounds = [layout.params * number // job.segments for number in range(job.segments + 1)]
    else:
        if job.segments > len(layout.names):
            raise JobError(f"segments = {job.segments}: must be at most {len(layout.names)}, the trainable tensors")
        if examples is None:
            raise ValueError("balance by flops needs examples")
        first, more = _count_flops(model, job, examples)
        bounds = [layout.bounds[cut] for cut in _cut(first, more, job.segments)]
    return tuple(layout.segment(start, end) for start, end in pairwise(bounds))


def count_task_flops(
    model: nn.Module, job: TrainingJob, segments: Sequence[Segment], shard: Examples, fewest: int
) -> tuple[int, ...]:
    """Return how many floating-point operations a task of each segment needs at least, as FlopCounterMode counts them.

    Shapes alone count, so any of the shards will do. `fewest` is the number of examples of the smallest one.

    Zeros if a processor's speed in float32 says nothing: the job is not for the CPU, or not all parameters are float32;
    or if batches differ in size, and may be empty (dp-sgd).
    """
    parameters = dict(model.named_parameters())
    others = any(parameter.dtype != torch.float32 for parameter in parameters.values())
    if job.device != "cpu" or job.privacy == "dp-sgd" or others:
        return (0,) * len(segments)
    layout = Layout(model)
    size = min(job.batch_size, fewest)
    found = []
    for segment in segments:
        trained = [parameters[piece.name] for piece in layout.pieces(segment)]
        first, two = (_count_step(model, job, shard.batch(slice(0, count)), trained) for count in (1, min(2, size)))
        found.append(job.local_steps * (first + (two - first) * (size - 1)))  # some are the same for any batch size
    return tuple(found)


def _count_step(model: nn.Module, job: TrainingJob, batch: Examples, trained: Sequence[nn.Parameter]) -> int:
    """Count the floating-point operations of a training step of the tensors `trained`; all others are frozen.

    Gradients stay in `trained`, and their `requires_grad`.
    """
    functions = Functions(job)
    model.eval()  # training mode would change buffers, and batch norm would need more than one example
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        # torch.autograd.grad does not work with FlopCounterMode and parametrizations.
        functions.backward(functions.mean_loss(functions.outputs(model, batch.inputs), batch.target))
    return int(counter.get_total_flops())


def _count_flops(model: nn.Module, job: TrainingJob, examples: Examples) -> tuple[list[int], list[int]]:
    """Count the floating-point operations of a training step on one example, for each trainable tensor i.

    Return two lists: the operations if only tensor i is trained, and the operations that tensor i adds to a step that
    trains all tensors (0 for the first tensor).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = examples.batch(slice(0, 1))

    def count(trained: Sequence[nn.Parameter]) -> int:
        return _count_step(model, job, batch, trained)

    every = count(trainable)
    first = [count([parameter]) for parameter in trainable]
    more = [every - count([each for each in trainable if each is not parameter]) for parameter in trainable[1:]]
    for parameter in trainable:
        parameter.requires_grad_(True)
        parameter.grad = None
    return first, [0, *more]


def _cut(first: Sequence[int], more: Sequence[int], count: int) -> list[int]:
    """Return the bounds of the `count` parts whose greatest cost is the smallest possible.

    There are count + 1 rising bounds, from 0 to len(first). The cost of a part [start, end) is first[start] plus the
    sum of more[start + 1 : end].
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
