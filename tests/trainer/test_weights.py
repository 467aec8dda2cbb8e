"""What counts of measured updates: nobody gains by a larger, a noisier or a later one, or by another name."""

import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traincert.trainer.weights import ENOUGH, Score, foreign, limit_norms, paid

reductions = st.integers(-(2**62), 2**62)
errors = st.integers(0, 2**62)
shares = st.floats(0, 1)
margins = st.floats(0, 10)
norms = st.floats(1e-6, 1e6)


def pay(
    reduction: int, error: int = 0, *, late: bool = False, noise_margin: float = 1.0, late_share: float = 0.5
) -> Score:
    return paid(100, reduction, error, noise_margin=noise_margin, late_share=late_share, late=late)


@given(st.integers(0, 2**40), reductions, errors, margins, shares, st.booleans())
def test_only_a_reduction_above_the_margin_pays(
    params: int, reduction: int, error: int, noise_margin: float, late_share: float, late: bool
) -> None:
    """Whatever the signs and sizes of the factors: no two bad ones make a good one."""
    found = paid(params, reduction, error, noise_margin=noise_margin, late_share=late_share, late=late)
    assert found.margin >= 0
    assert 0 <= found.loss_reduction <= max(0, reduction - found.margin)
    assert found.weight**2 <= params * found.loss_reduction < (found.weight + 1) ** 2
    if reduction <= found.margin:
        assert (found.loss_reduction, found.weight) == (0, 0)


@given(reductions, reductions, errors, errors, st.booleans())
def test_who_helps_less_or_less_surely_is_never_paid_more(a: int, b: int, c: int, d: int, late: bool) -> None:
    low, high = sorted((a, b))
    sure, noisy = sorted((c, d))
    assert pay(low, noisy, late=late).weight <= pay(high, sure, late=late).weight
    assert pay(low, sure, late=True).weight <= pay(low, sure).weight


def test_a_late_update_has_its_share_of_the_weight() -> None:
    assert pay(10**12, late=True, late_share=0.25).weight == pytest.approx(pay(10**12).weight / 4, rel=1e-5)
    assert pay(10**12, late=True, late_share=0.0).weight == 0


def test_the_margin_is_subtracted() -> None:
    assert pay(1000, 300, noise_margin=2.0) == Score(1000, 300, 600, 400, 200)


@given(st.lists(st.tuples(reductions, errors, st.integers(0, 3)), min_size=1), st.data())
def test_the_task_is_paid_whoever_does_it(tasks: list[tuple[int, int, int]], data: st.DataObject) -> None:
    """An owner's chance is the sum of its tasks' weights: with one name for each task, with others, or with fewer."""
    weights = [pay(reduction, error).weight for reduction, error, _ in tasks]
    whole = sum(weights) or 1
    names = data.draw(st.permutations(range(len(tasks))))
    for owner in range(4):
        mine = [place for place, (_, _, each) in enumerate(tasks) if each == owner]
        by_name = {names[place]: Fraction(weights[place], whole) for place in mine}
        assert sum(by_name.values()) == Fraction(sum(weights[place] for place in mine), whole)


@given(st.lists(st.tuples(st.integers(0, 2), norms), min_size=1), st.data())
def test_the_miners_order_does_not_change_what_their_norms_count(
    updates: list[tuple[int, float]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(updates))))
    last = {0: 1.0, 1: 2.0}
    segments, sizes = zip(*updates, strict=True)
    scales, usual = limit_norms(segments, sizes, last)
    moved, again = limit_norms([segments[i] for i in order], [sizes[i] for i in order], last)
    assert moved == [scales[i] for i in order]
    assert again == usual


@given(st.lists(norms, min_size=ENOUGH), st.floats(1, 1e3))
def test_a_larger_update_counts_no_more_than_the_median(sizes: list[float], factor: float) -> None:
    larger = max(sizes) * factor
    scales, _ = limit_norms([0] * (len(sizes) + 1), [*sizes, larger], {})
    assert larger * scales[-1] <= statistics.median_low([*sizes, larger]) * (1 + 1e-9)
    assert all(0 < scale <= 1 for scale in scales)


def test_where_updates_are_few_the_last_norms_and_their_change_say_what_is_usual() -> None:
    last = {0: 1.0, 1: 10.0, 2: 100.0}
    scales, usual = limit_norms([0, 1, 2], [0.5, 5.0, 500.0], last)
    assert scales == [1.0, 1.0, 0.1]
    assert usual == {0: 0.5, 1: 5.0, 2: 50.0}
    assert limit_norms([0, 1], [1.0, 30.0], {})[0] == [1.0, 1.0]  # nothing is known yet
    assert limit_norms([], [], last) == ([], last)


def test_who_has_much_less_evidence_than_the_others_is_foreign() -> None:
    evidence = {bytes([number]): 10.0 + number / 10 for number in range(8)} | {b"x": 0.5, b"y": 8.0}
    assert foreign(evidence, 3.0) == {b"x": statistics.median(evidence.values())}
    assert foreign({b"x": 0.0, b"y": 9.0}, 3.0) == {}  # too few to say what is usual
    assert foreign({bytes([number]): each for number, each in enumerate((0.1, 0.5, 0.2, -0.4))}, 3.0) == {}


@given(st.lists(st.floats(-100, 100), min_size=ENOUGH, max_size=20), st.floats(0, 50))
def test_less_evidence_never_helps(evidence: list[float], less: float) -> None:
    before = dict(enumerate(evidence))
    named = {bytes([number]): each for number, each in before.items()}
    worse = named | {b"\0": named[b"\0"] - less}
    if b"\0" in foreign(named, 3.0):
        assert b"\0" in foreign(worse, 3.0)
