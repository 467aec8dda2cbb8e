"""Who gets a task, whose task is done again, and who is barred."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traincert.trainer.standings import Standing, choose, draw_checks, next_standings

MINERS = [bytes([number]) * 32 for number in range(10)]
KNOWN = {miner: Standing(steady=True, proven=True) for miner in MINERS}


def seeds(count: int) -> list[bytes]:
    return [number.to_bytes(4, "big") for number in range(count)]


def test_all_get_a_task_where_there_are_enough() -> None:
    assert choose(b"", 0, MINERS[::-1], {}, 10) == MINERS


@given(st.binary(), st.integers(1, 12), st.permutations(MINERS))
def test_the_order_of_the_miners_does_not_matter(seed: bytes, most: int, miners: list[bytes]) -> None:
    found = choose(seed, 0, miners, {}, most)
    assert found == choose(seed, 0, MINERS, {}, most) == sorted(set(found))
    assert len(found) == min(most, 10)


def test_nobody_is_preferred_among_equals() -> None:
    counted = Counter(miner for seed in seeds(2000) for miner in choose(seed, 0, MINERS, KNOWN, 3))
    assert all(abs(counted[miner] - 600) < 100 for miner in MINERS)  # five standard deviations


def test_new_names_get_only_what_is_left() -> None:
    """So four names instead of one take nothing from those who were there."""
    new = [bytes([100 + number]) * 32 for number in range(4)]
    for seed in seeds(20):
        assert set(MINERS) <= set(choose(seed, 0, MINERS + new, KNOWN, 11))
        assert choose(seed, 0, MINERS + new, KNOWN, 10) == MINERS


def test_who_did_not_commit_is_behind_those_who_did() -> None:
    standings = KNOWN | {MINERS[0]: Standing(steady=False, proven=True)}
    assert all(MINERS[0] not in choose(seed, 0, MINERS, standings, 9) for seed in seeds(20))


def test_a_barred_miner_has_a_task_only_if_nobody_else_is_there() -> None:
    barred = KNOWN | {MINERS[0]: Standing(steady=True, barred_until=7)}
    assert choose(b"", 6, MINERS, barred, 10) == MINERS[1:]
    assert choose(b"", 7, MINERS, barred, 10) == MINERS
    assert choose(b"", 6, MINERS[:1], barred, 10) == MINERS[:1]


@pytest.mark.parametrize("share", [0.02, 0.25, 1.0])
def test_the_share_of_proven_miners_is_drawn(share: float) -> None:
    drawn = [draw_checks(seed, MINERS, KNOWN, share) for seed in seeds(2000)]
    assert sum(map(len, drawn)) / 20000 == pytest.approx(share, abs=0.01)
    counted = Counter(miner for each in drawn for miner in each)
    assert max(counted.values()) - min(counted.values()) < 10 * (2000 * share) ** 0.5
    assert all(each == sorted(set(each)) for each in drawn)


def test_who_is_not_proven_comes_first_and_of_them_who_has_the_least_evidence() -> None:
    standings = KNOWN | {
        MINERS[3]: Standing(evidence=5.0, spread=1.0),
        MINERS[4]: Standing(evidence=1.0, spread=4.0),
        MINERS[5]: Standing(evidence=0.7, spread=1.0),
    }
    for seed in seeds(20):
        assert draw_checks(seed, MINERS, standings, 0.001) == [MINERS[4]]
        assert draw_checks(seed, MINERS, standings, 0.2) == MINERS[4:6]
        assert draw_checks(seed, MINERS, standings, 0.001, passed=[MINERS[4]]) == [MINERS[5]]
    assert draw_checks(b"", MINERS, {}, 0.0) == []
    assert draw_checks(b"", [], {}, 1.0) == []


def test_evidence_of_about_ten_tasks_counts() -> None:
    standing = Standing()
    assert standing.own_shard is None
    for _ in range(100):
        standing = standing.measured(1.0)
    assert standing.own_shard == pytest.approx((1 / 0.1) / (1 / (1 - 0.81)) ** 0.5, rel=1e-3)


def test_who_failed_a_spot_check_is_barred_and_has_to_prove_itself_again() -> None:
    found = next_standings(
        KNOWN | {b"o": Standing(barred_until=3)},
        steady={MINERS[0]: True, MINERS[1]: False, b"n": True},
        passed={MINERS[0]: False, b"n": True},
        unproven=[MINERS[3]],
        barred_until=107,
    )
    assert list(found) == sorted(found)
    assert found[MINERS[0]] == Standing(steady=True, proven=False, barred_until=107)
    assert found[MINERS[1]] == Standing(steady=False, proven=True)
    assert found[MINERS[2]] == KNOWN[MINERS[2]]
    assert found[MINERS[3]] == Standing(steady=True, proven=False)
    assert found[b"n"] == Standing(steady=True, proven=True)
    assert found[b"o"] == Standing(barred_until=3)
