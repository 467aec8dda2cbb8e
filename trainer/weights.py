"""What counts of measured updates: arithmetic without torch, which everybody can do again from a cycle's record."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ENOUGH = 3
"""From so many updates on, their median says what is usual."""


@dataclass(frozen=True)
class Score:
    """How an update was measured, and what counts of it. Losses are in nano-nats."""

    reduction: int
    """How much the update lowers the mean loss; negative if it raises it."""
    error: int
    """The standard error of `reduction`, from how it differs between batches."""
    margin: int
    """The part of `reduction` that does not count, because it may be noise."""
    loss_reduction: int
    """What counts, at least 0."""
    weight: int
    """isqrt(params * loss_reduction)"""


def paid(params: int, reduction: int, error: int, *, noise_margin: float, late_share: float, late: bool) -> Score:
    """Return what counts of a measured reduction (nano-nats) with this standard error, in a segment of `params`.

    `noise_margin` and `late_share` are the job's. `late`: the task took longer than the job's `late_seconds`. No factor
    can be below 0, so no two bad ones make a good one.
    """
    margin = math.ceil(noise_margin * error)
    counts = max(0, reduction - margin)
    if late:
        counts = math.floor(counts * late_share**2)  # the weight has the root of it
    return Score(reduction, error, margin, counts, math.isqrt(params * counts))


def limit_norms(
    segments: Sequence[int], norms: Sequence[float], last: Mapping[int, float]
) -> tuple[list[float], dict[int, float]]:
    """Return what each update is multiplied by, so that its norm is not above what is usual, and the usual norms.

    `segments` and `norms` are of the updates, `last` has the usual norms of the cycle before, by segment.

    Usual is the median of the segment's updates; where they are few, the segment's last usual norm times the median of
    how all norms changed. Where both are unknown, nothing is scaled. The lower one of two medians is taken.
    """
    changes = [norm / last[segment] for segment, norm in zip(segments, norms, strict=True) if last.get(segment)]
    change = statistics.median_low(changes) if len(changes) >= ENOUGH else 0.0
    scales = [1.0] * len(norms)
    usual = dict(last)
    for segment in sorted(set(segments)):
        places = [place for place, each in enumerate(segments) if each == segment]
        here = [norms[place] for place in places]
        most = statistics.median_low(here) if len(here) >= ENOUGH else last.get(segment, 0.0) * change
        for place in places:
            if 0 < most < norms[place]:
                scales[place] = most / norms[place]
        usual[segment] = statistics.median_low(norms[place] * scales[place] for place in places)
    return scales, usual


def foreign(evidence: Mapping[bytes, float], margin: float) -> dict[bytes, float]:
    """Return the miners whose evidence that they train on their own shard is much too small, and the median of all.

    Much too small is less than half of the median, and less by more than `margin` standard deviations. The standard
    deviation is that of the miners (1.48 times the median distance from the median), at least 1.
    """
    if len(evidence) < ENOUGH:
        return {}
    median = statistics.median(evidence.values())
    deviation = max(1.0, 1.48 * statistics.median(abs(each - median) for each in evidence.values()))
    least = min(median / 2, median - margin * deviation)
    return {miner: median for miner, each in evidence.items() if each < least}
