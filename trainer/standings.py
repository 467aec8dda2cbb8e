"""What is known of each miner from cycle to cycle: who gets a task, whose task is done again, and who is barred."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

KEPT = 0.9
"""The share of a miner's evidence that counts on in its next task: about the last ten tasks count."""


class Standing(NamedTuple):
    """What is known of a miner. A miner that is not known has `Standing()`."""

    steady: bool = False
    """It committed to an update in its last task."""
    proven: bool = False
    """A spot check found a task done as it must be, since the miner joined or was barred."""
    barred_until: int = 0
    """Its updates are refused in the cycles before this one, counted from 0."""
    evidence: float = 0.0
    """That it trains on its own shard: the sum of its z-scores, each cycle's times `KEPT` in the next."""
    spread: float = 0.0
    """The variance that `evidence` would have if it were noise."""

    @property
    def own_shard(self) -> float | None:
        """`evidence` in standard deviations; None: nothing was measured yet."""
        return self.evidence / math.sqrt(self.spread) if self.spread else None

    def measured(self, z_score: float) -> "Standing":
        """Return the standing after one more measurement."""
        return self._replace(evidence=KEPT * self.evidence + z_score, spread=KEPT**2 * self.spread + 1)


Standings = Mapping[bytes, Standing]
"""The standings of all miners that have had a task, by miner (32 bytes)."""


def choose(seed: bytes, cycle: int, present: Sequence[bytes], standings: Standings, most: int) -> list[bytes]:
    """Return the miners that get a task in a cycle, sorted: at most `most` of those that are present.

    First come miners that committed in their last task, then new ones and those that did not. The seed decides among
    equals, so nobody chooses the order. A barred miner gets a task only if there would be none otherwise: then the
    chain goes on, without any training.
    """

    def order(miner: bytes) -> tuple[bool, bytes]:
        return not standings.get(miner, Standing()).steady, _hash(b"choose", seed, miner)

    free = [miner for miner in present if standings.get(miner, Standing()).barred_until <= cycle]
    return sorted(sorted(free or present, key=order)[:most])


def draw_checks(
    seed: bytes, miners: Sequence[bytes], standings: Standings, share: float, passed: Collection[bytes] = ()
) -> list[bytes]:
    """Return the miners whose task is done again, sorted: the share (0 to 1) of `miners`, on average over the seeds.

    First come miners that are not proven: of these, those with the least evidence that they train on their own shard.
    There is at least one check while there are such miners. The seed draws the others. `passed` are miners that are
    proven since this cycle. No check is drawn if `share` is 0.
    """
    if not share:
        return []
    unproven = {
        miner: standing.own_shard or 0.0
        for miner in miners
        if not (standing := standings.get(miner, Standing())).proven and miner not in passed
    }
    whole, part = divmod(share * len(miners), 1)
    fraction = int.from_bytes(_hash(b"checks", seed, b"")[:8], "big") / 2**64
    count = max(int(whole) + (fraction < part), bool(unproven))

    def order(miner: bytes) -> tuple[bool, float, bytes]:
        return miner not in unproven, unproven.get(miner, 0.0), _hash(b"check", seed, miner)

    return sorted(sorted(miners, key=order)[:count])


def next_standings(
    measured: Standings,
    *,
    steady: Mapping[bytes, bool],
    passed: Mapping[bytes, bool],
    unproven: Collection[bytes],
    barred_until: int,
) -> dict[bytes, Standing]:
    """Return the standings after a cycle, sorted by miner.

    `measured` are the standings before, with the cycle's measurements. `steady` says of each miner that had a task
    whether it committed to an update and sent it; `passed` says of each that was checked what came of it. Who failed is
    barred until the cycle `barred_until`, counted from 0. Those of `unproven` have to prove themselves again.
    """
    found = dict(measured)
    for miner, is_steady in steady.items():
        found[miner] = found.get(miner, Standing())._replace(steady=is_steady)
    for miner, has_passed in passed.items():
        standing = found.get(miner, Standing())
        until = standing.barred_until if has_passed else barred_until
        found[miner] = standing._replace(proven=has_passed, barred_until=until)
    for miner in unproven:
        found[miner] = found[miner]._replace(proven=False)
    return dict(sorted(found.items()))


def _hash(purpose: bytes, seed: bytes, miner: bytes) -> bytes:
    return hashlib.sha256(purpose + len(seed).to_bytes(8, "little") + seed + miner).digest()
