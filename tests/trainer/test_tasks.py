"""Tasks: who trains what is a function of the seed, and even."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traincert.trainer.tasks import Task, assign

SEEDS = st.binary(max_size=40)
MINERS = st.lists(st.binary(min_size=32, max_size=32), max_size=50, unique=True)
COUNTS = st.integers(1, 9)


@given(SEEDS, MINERS, COUNTS, COUNTS, st.randoms(use_true_random=False))
def test_every_miner_has_one_task_whatever_their_order(
    seed: bytes, miners: list[bytes], segments: int, shards: int, shuffler: random.Random
) -> None:
    tasks = assign(seed, 5, miners, segments, shards)
    assert [task.miner for task in tasks] == sorted(miners)
    assert {task.cycle for task in tasks} <= {5}
    shuffler.shuffle(miners)
    assert assign(seed, 5, miners, segments, shards) == tasks


@given(SEEDS, MINERS, COUNTS, COUNTS)
def test_segments_and_shards_are_covered_evenly(seed: bytes, miners: list[bytes], segments: int, shards: int) -> None:
    tasks = assign(seed, 5, miners, segments, shards)
    for counts, kinds in (
        (Counter(task.segment for task in tasks), segments),
        (Counter((task.segment, task.shard) for task in tasks), segments * shards),
    ):
        assert len(counts) == min(kinds, len(miners))
        assert max(counts.values(), default=0) <= math.ceil(len(miners) / kinds)
    if len(miners) >= shards:
        assert {task.shard for task in tasks} == set(range(shards))


def test_a_lone_miner_comes_to_train_every_segment_and_shard() -> None:
    miner = bytes(32)
    tasks = [task for number in range(100) for task in assign(bytes([number]), number, [miner], 3, 4)]
    assert {(task.segment, task.shard) for task in tasks} == {(x, y) for x in range(3) for y in range(4)}


def test_the_assignment_is_frozen() -> None:
    """Anybody must be able to check who had to train what; these values come from the first version."""
    tasks = assign(b"seed", 7, [bytes([number]) * 32 for number in range(4)], 2, 4)
    assert [(task.segment, task.shard) for task in tasks] == [(0, 1), (1, 2), (0, 0), (1, 3)]
    assert tasks[0].seed.hex() == "cedaa8823c01bbef6245de191e834d0cf96a10caacdfa5603d287a4799a90fc7"
    assert len({task.seed for task in tasks}) == 4


def test_a_miner_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="only one task"):
        assign(b"", 0, [bytes(32), bytes(32)], 1, 1)


def test_no_miners_have_no_tasks() -> None:
    empty: list[Task] = []
    assert assign(b"", 0, [], 1, 1) == empty
