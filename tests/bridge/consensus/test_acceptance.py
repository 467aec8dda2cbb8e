"""Which block bodies a node stores (SPEC.md, "Equivocation"), as a simulation: ten thousand random orders of arrival.

Two honest nodes get the same bodies of equivocating winners in different orders. An attacker sends them headers that
nobody has certified. Real nodes do the same in `p2p_training.py`, a hundred times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest

ORDERS = 10_000


@dataclass(frozen=True, eq=False)
class Block:
    """A block; `certificate` is None for a header that nobody can give a body to."""

    parent: Block | None
    certificate: int | None

    @property
    def branch(self) -> list[Block]:
        """The block and all below it, lowest first."""
        return [*(self.parent.branch if self.parent else []), self]


@dataclass
class Node:
    """The acceptance rules, without signatures. `is_needed` says when a third body is stored."""

    is_needed: Callable[[Node, Block], bool]
    headers: list[Block] = field(default_factory=list)
    stored: list[Block] = field(default_factory=list)
    linked: list[Block] = field(default_factory=list)
    """Those whose ancestors are all stored, in the order in which this became true."""
    held: deque[Block] = field(default_factory=lambda: deque(maxlen=16))

    @property
    def tip(self) -> Block:
        """The first of the longest chains."""
        return max(self.linked, key=lambda block: len(block.branch))

    def hear(self, *headers: Block) -> None:
        self.headers += [header for header in headers if header not in self.headers]

    def receive(self, block: Block) -> None:
        """Get a block whose header is known."""
        if block in self.stored:
            return
        bodies = [each for each in self.stored if each.certificate == block.certificate]
        if len(bodies) >= 2 and not self.is_needed(self, block):
            self.held.append(block)
            return
        self.stored.append(block)
        waiting = [block]
        while waiting:
            each = waiting.pop(0)
            if each.parent is None or each.parent in self.linked:
                self.linked.append(each)
                waiting += [child for child in self.stored if child.parent is each]
        if block.parent and block.parent in self.held and self.is_needed(self, block.parent):
            self.held.remove(block.parent)
            self.receive(block.parent)

    def fetch(self, tip: Block) -> None:
        """Download a chain from a peer: what is not stored, as long as that changes anything."""
        self.hear(*tip.branch)
        before = -1
        while before < len(self.stored):
            before = len(self.stored)
            for block in tip.branch:
                self.receive(block)


def has_stored_child(node: Node, block: Block) -> bool:
    return any(child.parent is block for child in node.stored)


def best_header_is_built_on_it(node: Node, block: Block) -> bool:
    """The rule that free headers can turn against a node."""
    best = max(node.headers, key=lambda header: len(header.branch))
    return best is not block and block in best.branch and len(best.branch) > len(node.tip.branch)


def split(is_needed: Callable[[Node, Block], bool], random: Random) -> tuple[bool, bool]:
    """Whether two nodes have different tips: after ten blocks, and after the coordinator's next one."""
    genesis = Block(None, 0)
    blocks: list[Block] = []
    parents = [genesis]
    certificate = 0
    while len(blocks) < 10:
        certificate += 1
        parent = random.choice(parents)
        bodies = [Block(parent, certificate) for _ in range(min(random.randint(1, 5), 10 - len(blocks)))]
        blocks += bodies
        parents = bodies
    nodes = [Node(is_needed), Node(is_needed)]
    for node in nodes:
        node.receive(genesis)
        for block in random.sample(blocks, len(blocks)):
            if random.random() < 0.3:  # the attacker's turn
                forged = random.choice(blocks)
                for _ in range(random.randint(1, 12)):
                    forged = Block(forged, None)
                node.hear(*forged.branch)
            node.hear(*block.branch)
            node.receive(block)
    random.shuffle(nodes)
    before = nodes[0].tip is not nodes[1].tip
    following = Block(nodes[0].tip, certificate + 1)
    for node in nodes:
        node.fetch(following)
    return before, nodes[0].tip is not following or nodes[1].tip is not following


def test_honest_nodes_end_on_one_tip_in_any_order() -> None:
    random = Random(1)  # noqa: S311 - which order, not which key
    results = [split(has_stored_child, random) for _ in range(ORDERS)]
    assert sum(before for before, _after in results) > ORDERS // 10
    assert not any(after for _before, after in results)


def test_the_simulation_shows_a_rule_that_headers_can_turn_against_a_node() -> None:
    random = Random(1)  # noqa: S311
    assert any(split(best_header_is_built_on_it, random)[1] for _ in range(ORDERS // 10))


@pytest.mark.parametrize("held", [True, False], ids=["in memory", "fetched again"])
def test_a_body_left_alone_is_stored_when_its_child_is(held: bool) -> None:
    genesis = Block(None, 0)
    bodies = [Block(genesis, 1) for _ in range(3)]
    child = Block(bodies[2], 2)
    node = Node(has_stored_child)
    for block in (genesis, *bodies):
        node.receive(block)
    assert node.stored == [genesis, *bodies[:2]]
    if not held:
        node.held.clear()
    node.receive(child)
    assert (node.tip is child) == held
    node.fetch(child)
    assert node.tip is child
