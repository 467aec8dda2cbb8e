"""How many blocks a fair lottery gives: compared with the whole distribution, made in another way."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from traincert.bridge.explorer.luck import fair_range


@pytest.mark.parametrize("seed", range(20))
def test_at_most_one_in_forty_fair_lotteries_gives_less_and_one_in_forty_more(seed: int) -> None:
    generator = random.Random(seed)  # noqa: S311
    chances = [generator.random() for _ in range(generator.randrange(1, 12))]
    distribution = [0.0] * (len(chances) + 1)
    for outcome in itertools.product((0, 1), repeat=len(chances)):
        distribution[sum(outcome)] += math.prod(
            chance if won else 1 - chance for chance, won in zip(chances, outcome, strict=True)
        )
    low, high = fair_range(chances)
    assert sum(distribution[:low]) < 0.025 <= sum(distribution[: low + 1])
    assert sum(distribution[high + 1 :]) < 0.025 <= sum(distribution[high:])


@pytest.mark.parametrize("chance", [0.01, 0.25, 0.5, 0.99])
def test_above_two_hundred_draws_it_is_nearly_the_same(chance: float) -> None:
    exact, normal = fair_range([chance] * 200), fair_range([chance] * 201)
    assert all(abs(one - other) <= 2 for one, other in zip(exact, normal, strict=True))


def test_a_certain_winner_and_one_without_a_chance() -> None:
    assert fair_range([1.0] * 5) == (5, 5)
    assert fair_range([0.0] * 5) == (0, 0)
    assert fair_range([]) == (0, 0)
