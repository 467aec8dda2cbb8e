"""Which shard each training example goes to: random shards, or shards of different data (not IID)."""

import heapq

import numpy as np
import numpy.typing as npt

from traincert.trainer.errors import JobError
from traincert.trainer.job import TrainingJob

_DRAWS = 100  # how often Dirichlet shares are drawn until no shard is empty

Rows = npt.NDArray[np.int64]
"""Numbers of examples, (N,)."""


def cut_shards(job: TrainingJob, train: Rows, codes: Rows | None) -> list[Rows]:
    """Cut the shuffled training examples into `job.shards` shards.

    `codes` has a number for each value of the column `job.shard_by`, (all examples,); None if the job names none.

    Raises JobError if a shard would be empty.
    """
    if codes is None:
        return np.array_split(train, job.shards)
    _, first = np.unique(codes[train], return_inverse=True)
    groups = [train[first == value] for value in range(first.max() + 1)]
    return _cut_whole(job, groups) if job.shard_alpha is None else _cut_by_shares(job, groups, job.shard_alpha)


def _cut_whole(job: TrainingJob, groups: list[Rows]) -> list[Rows]:
    """Give each value to the shard that has the fewest examples so far, the most frequent values first."""
    if len(groups) < job.shards:
        raise JobError(
            f"shard_by = {job.shard_by!r}: the column has {len(groups)} values; must have at least one for each of "
            f"{job.shards} shards, or set shard_alpha"
        )
    shards: list[list[Rows]] = [[] for _ in range(job.shards)]
    sizes = [(0, number) for number in range(job.shards)]
    for group in sorted(groups, key=len, reverse=True):
        size, number = heapq.heappop(sizes)
        shards[number].append(group)
        heapq.heappush(sizes, (size + len(group), number))
    return [np.concatenate(shard) for shard in shards]


def _cut_by_shares(job: TrainingJob, groups: list[Rows], alpha: float) -> list[Rows]:
    """Spread each value over all shards, by shares from a Dirichlet distribution, as in arXiv 1909.06335."""
    draw = np.random.RandomState(job.shuffle_seed)
    for _ in range(_DRAWS):
        parts = []
        for group in groups:
            shares = draw.dirichlet([alpha] * job.shards)
            ends = np.rint(np.cumsum(shares)[:-1] * len(group)).astype(np.int64)
            parts.append(np.split(group, ends))
        shards = [np.concatenate(shard) for shard in zip(*parts, strict=True)]
        if all(map(len, shards)):
            return shards
    raise JobError(f"shard_alpha = {alpha:g}: in {_DRAWS} draws a shard stayed empty; must be greater, or shards less")
