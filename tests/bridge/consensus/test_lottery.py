"""The table, its paths and the draw, against a plain loop over weights: all trees of 1 to 9 leaves, all tickets.

The loop is an implementation of its own, to find mistakes of the other. Keep it independent.
"""

from hashlib import sha256
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traincert.bridge.consensus.codec import U64_MAX
from traincert.bridge.consensus.lottery import (
    NO_ROOT,
    ContributionTable,
    Leaf,
    TreeNode,
    contribution_weight,
    draw_ticket,
    follow_path,
    leaf_node,
)
from traincert.bridge.errors import CertificateError


def leaves(weights: list[int]) -> list[Leaf]:
    return [Leaf(i.to_bytes(32, "big"), sha256(bytes([i])).digest(), w, w, w) for i, w in enumerate(weights)]


@pytest.mark.parametrize("count", range(1, 10))
def test_every_ticket_is_held_by_the_leaf_that_a_plain_loop_finds(count: int) -> None:
    weights = [3, 1, 2, 5, 1, 1, 4, 2, 1][:count]
    table = ContributionTable(leaves(weights))
    owners = [i for i, weight in enumerate(weights) for _ in range(weight)]
    assert table.weight == len(owners)
    assert [table.find(ticket) for ticket in range(table.weight)] == owners


@pytest.mark.parametrize("count", range(1, 10))
def test_every_path_leads_from_its_leaf_to_the_root_and_from_no_other(count: int) -> None:
    table = ContributionTable(leaves(list(range(1, count + 1))))
    starts = [0, *accumulate(leaf.weight for leaf in table.leaves)]
    for index in range(count):
        path = table.path(index)
        for other in range(count):
            end = follow_path(leaf_node(table.leaves[other]), index, count, path)
            right = (TreeNode(table.root, table.weight), starts[index])
            assert (end == right) == (other == index)


@pytest.mark.parametrize("count", range(1, 10))
def test_a_path_that_is_too_short_too_long_or_for_another_index_does_not_lead_to_the_root(count: int) -> None:
    table = ContributionTable(leaves(list(range(1, count + 1))))
    root = (TreeNode(table.root, table.weight), 0)
    for index in range(count):
        leaf, path = leaf_node(table.leaves[index]), table.path(index)
        assert follow_path(leaf, index, count, (*path, leaf)) is None
        assert path == () or follow_path(leaf, index, count, path[:-1]) is None
        assert follow_path(leaf, count, count, path) is None
        for other in set(range(count)) - {index}:
            end = follow_path(leaf, other, count, path)
            assert end is None or end[0] != root[0]


def test_order_of_making_does_not_matter() -> None:
    made = leaves([4, 3, 2, 1])
    assert ContributionTable(made[::-1]).root == ContributionTable(made).root


def test_an_empty_table_is_all_zeros() -> None:
    table = ContributionTable([])
    assert (table.root, table.weight, table.count) == (NO_ROOT, 0, 0)


def test_the_same_update_twice_is_refused() -> None:
    leaf = leaves([1])[0]
    with pytest.raises(CertificateError, match="twice"):
        ContributionTable([leaf, leaf])


def test_a_weight_that_is_not_the_formulas_is_refused() -> None:
    for weight in (0, 1, 3):
        with pytest.raises(CertificateError, match="bad-traincert-weight"):
            ContributionTable([Leaf(bytes(32), bytes(32), 2, 2, weight)])


def test_a_total_of_more_than_64_bits_is_refused() -> None:
    half = leaves([U64_MAX // 2 + 1] * 2)
    with pytest.raises(CertificateError, match="bad-traincert-totals"):
        ContributionTable(half)
    assert ContributionTable(leaves([U64_MAX // 2, U64_MAX // 2 + 1])).weight == U64_MAX


def test_sums_that_overflow_end_no_path() -> None:
    assert follow_path(TreeNode(bytes(32), 1), 0, 2, [TreeNode(bytes(32), U64_MAX)]) is None
    assert follow_path(TreeNode(bytes(32), 1), 0, 2, [TreeNode(bytes(32), U64_MAX - 1)]) is not None


@given(st.integers(0, U64_MAX), st.integers(0, U64_MAX))
def test_weight_is_the_floor_of_the_root(params: int, loss_reduction: int) -> None:
    weight = contribution_weight(params, loss_reduction)
    assert weight**2 <= params * loss_reduction < (weight + 1) ** 2


def test_tickets_spread_over_the_weight() -> None:
    tickets = [draw_ticket(i.to_bytes(32, "big"), bytes(32), 0, 4) for i in range(4000)]
    # 1000 expected of each; six standard deviations are 164
    assert all(836 < tickets.count(ticket) < 1164 for ticket in range(4))
