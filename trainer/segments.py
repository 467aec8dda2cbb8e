"""Cutting a model's parameters into balanced segments."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from torch import nn

Segment = tuple[str, ...]
"""Names of the parameters that one task trains, in module order."""


def cut_segments(model: nn.Module, count: int) -> tuple[Segment, ...]:
    """Cut the model's parameters into `count` segments, contiguous in module order, tensors kept whole.

    Of all such cuts it is one whose greatest segment is smallest. Raises ValueError if the model has fewer than
    `count` parameter tensors.
    """
    parameters = dict(model.named_parameters())
    names = list(parameters)
    bounds = _cut([parameters[name].numel() for name in names], count)
    return tuple(tuple(names[start:end]) for start, end in pairwise(bounds))


def _cut(sizes: Sequence[int], count: int) -> list[int]:
    """Return count + 1 rising bounds, 0 first and len(sizes) last, that minimize the greatest sum between two."""
    if not 1 <= count <= len(sizes):
        raise ValueError(f"cannot cut {len(sizes)} tensors into {count} segments")
    before = [0, *accumulate(sizes)]
    # best[end]: (greatest sum, bounds) of cutting sizes[:end] into the number of parts reached so far
    best = {end: (before[end], [0, end]) for end in range(1, len(sizes) + 1)}
    for parts in range(2, count + 1):
        best = {
            end: min(
                (max(best[start][0], before[end] - before[start]), [*best[start][1], end])
                for start in range(parts - 1, end)
            )
            for end in range(parts, len(sizes) + 1)
        }
    return best[len(sizes)][1]
