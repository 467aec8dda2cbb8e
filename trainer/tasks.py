"""Which miner trains which segment on which shard: the seed decides it; nobody chooses it."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """What one miner trains in a cycle."""

    miner: bytes  # 32 bytes
    segment: int
    shard: int
    seed: bytes  # 32 bytes; seeds the order of the examples and all other randomness, such as dropout
    cycle: int  # counted from 0; decides the learning rate


def assign(seed: bytes, cycle: int, miners: Sequence[bytes], segments: int, shards: int) -> list[Task]:
    """Give every miner a segment and a shard, both numbered from 0. Return the tasks, sorted by miner.

    The seed shuffles miners, segments and shards: each list is sorted by a hash of the seed and the item. Then each
    miner in turn gets the next segment and the next shard; both lists start again at their end. So every segment and
    every shard gets the same number of miners (± 1), and all (segment, shard) pairs are used before one is repeated.
    The order of `miners` does not change the result.

    Raises ValueError if a miner is in `miners` twice, or if there are no segments or no shards.
    """
    if len(set(miners)) != len(miners):
        raise ValueError("a miner can have only one task in a cycle")
    if segments < 1 or shards < 1:
        raise ValueError(f"cannot assign {segments} segments and {shards} shards")
    segment_order = sorted(range(segments), key=lambda number: _hash(b"segment", seed, number.to_bytes(8, "little")))
    shard_order = sorted(range(shards), key=lambda number: _hash(b"shard", seed, number.to_bytes(8, "little")))
    shuffled = sorted(miners, key=lambda miner: _hash(b"miner", seed, miner))
    # Pairs repeat after lcm(segments, shards) miners. From then on, one step aside in the shards gives unused pairs.
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
    """Hash unambiguously: the seed's length comes before the seed, and no purpose is a prefix of another."""
    return hashlib.sha256(purpose + len(seed).to_bytes(8, "little") + seed + item).digest()
