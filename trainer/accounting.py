"""What the tasks of a job with privacy cost the examples of their shards: epsilon, by Opacus' RDP accountant.

This module does not import torch; Opacus, which does, is imported when it is needed.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from traincert.trainer.errors import JobError

if TYPE_CHECKING:
    from traincert.trainer.job import TrainingJob


class Spent(NamedTuple):
    """What the tasks that were done on a shard have cost its examples."""

    tasks: int
    epsilon: float


def check_accountant(job: TrainingJob) -> None:
    """Raise JobError if the job has privacy, and Opacus is not installed."""
    if job.privacy:
        epsilon(job, job.batch_size, 1)


def sample_rate(job: TrainingJob, count: int) -> float:
    """Return the probability with which a step of dp-sgd uses an example of a shard of `count`."""
    return min(1.0, job.batch_size / count)


def epsilon(job: TrainingJob, count: int, tasks: int) -> float:
    """Return what so many tasks on a shard of `count` examples cost each of its examples, at `job.delta`.

    dp-sgd: for adding or removing one example. noised-update: for any change of the shard. Raises JobError if Opacus is
    not installed.
    """
    if job.privacy == "dp-sgd":
        return _epsilon(job.noise_multiplier or 0.0, sample_rate(job, count), job.local_steps * tasks, job.delta)
    return _epsilon(job.noise_multiplier or 0.0, 1.0, tasks, job.delta)


@lru_cache(maxsize=4096)
def _epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    try:
        accountant = importlib.import_module("opacus.accountants").RDPAccountant()
    except ImportError:
        raise JobError(
            "privacy: needs Opacus, which is not installed: pip install '.[privacy]' in a clone of traincert"
        ) from None
    accountant.history = [(noise_multiplier, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that more orders could give a smaller epsilon: this one is still a bound
        return max(0.0, float(accountant.get_epsilon(delta)))


def spent_after(
    job: TrainingJob, sizes: Mapping[bytes, int], before: Mapping[bytes, Spent], shards: Sequence[bytes]
) -> dict[bytes, Spent]:
    """Return what the examples of each shard have spent after a cycle, by the shard's hash, sorted.

    `sizes` are the shards' numbers of examples. `shards` has a shard for each task of the cycle that gave an update.
    """
    tasks = {shard: each.tasks for shard, each in before.items()}
    for shard in shards:
        tasks[shard] = tasks.get(shard, 0) + 1
    return {shard: Spent(count, epsilon(job, sizes[shard], count)) for shard, count in sorted(tasks.items())}


def guarantee(job: TrainingJob, spent: Iterable[Spent]) -> dict[str, Any]:
    """Return what a run promises to an example of any shard, as JSON. Each example is in one shard only."""
    return {"privacy": job.privacy, "epsilon": max((each.epsilon for each in spent), default=0.0), "delta": job.delta}
