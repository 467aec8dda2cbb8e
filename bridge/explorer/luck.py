"""How many blocks a fair lottery gives a miner."""

from __future__ import annotations

import math
from collections.abc import Sequence

_EXACT = 200  # draws up to which the distribution is computed; above, the normal one is as good and quick
_TAIL = 0.025


def fair_range(chances: Sequence[float]) -> tuple[int, int]:
    """Return how many draws are won at least and at most in 95 of 100 fair lotteries, given the chance in each draw.

    The number of wins has a Poisson binomial distribution; above 200 draws the normal one is used.
    """
    if len(chances) > _EXACT:
        mean = math.fsum(chances)
        spread = 1.96 * math.sqrt(math.fsum(chance * (1 - chance) for chance in chances))
        return max(0, math.floor(mean - spread)), min(len(chances), math.ceil(mean + spread))
    wins = [1.0]  # the probability of each number of wins
    for chance in chances:
        wins = [here * (1 - chance) + below * chance for here, below in zip([*wins, 0.0], [0.0, *wins], strict=True)]
    low, below = 0, wins[0]
    while below < _TAIL:
        low += 1
        below += wins[low]
    high, above = len(chances), wins[-1]
    while above < _TAIL:
        high -= 1
        above += wins[high]
    return low, high
