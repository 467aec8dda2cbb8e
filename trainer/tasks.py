"""Which miner trains which segment on which shard: a function of the seed, not of anyone's choice."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One miner's part of a cycle."""

    miner: bytes  # 32 bytes
    segment: int
    shard: int
    seed: bytes  # 32 bytes; decides the order of the examples, and what else is random
    cycle: int  # from 0; decides the learning rate


def assign(seed: bytes, cycle: int, miners: Sequence[bytes], segments: int, shards: int) -> list[Task]:
    """Give every miner a segment and a shard, both numbered from 0; the order of `miners` does not matter.

    Miners, segments and shards are each shuffled by sorting them by a hash of the seed. Going through the shuffled
    miners, segments and shards are then dealt round and round, so that both are covered evenly (± 1), and no
    (segment, shard) pair is used twice before all have been used once. Tasks are sorted by miner.

    Raises ValueError if a miner is there twice, or if there are no segments or shards.
    """
    if len(set(miners)) != len(miners):
        raise ValueError("a miner can have only one task in a cycle")
    if segments < 1 or shards < 1:
        raise ValueError(f"cannot assign {segments} segments and {shards} shards")
    segment_order = sorted(range(segments), key=lambda number: _hash(b"segment", seed, number.to_bytes(8, "little")))
    shard_order = sorted(range(shards), key=lambda number: _hash(b"shard", seed, number.to_bytes(8, "little")))
    shuffled = sorted(miners, key=lambda miner: _hash(b"miner", seed, miner))
    # Dealing both at once comes back to the same pairs after this many; one step aside gives new ones.
    period = math.lcm(segments, shards)
    tasks = [
        Task(
            miner=miner,
            segment=segment_order[place % segments],
            shard=shard_order[(place + place // period) % shards],
            seed=_hash(b"task", seed, miner),
            cycle=cycle,
        )
        for place, miner in enumerate(shuffled)
    ]
    return sorted(tasks, key=lambda task: task.miner)


def _hash(purpose: bytes, seed: bytes, item: bytes) -> bytes:
    """Hash without ambiguity: the seed's length comes before it, and purposes are no prefixes of each other."""
    return hashlib.sha256(purpose + len(seed).to_bytes(8, "little") + seed + item).digest()
