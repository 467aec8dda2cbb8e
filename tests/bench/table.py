"""The contribution table of a cycle with a million contributions.

Machines are shared and noisy, so the time also stands as a ratio to a peer measured in the same run: plain SHA-256 over
as many messages of the same length.
"""

from __future__ import annotations

import hashlib
import resource

from bench.rows import Row, row, timed
from traincert.bridge.consensus.lottery import (
    ContributionTable,
    Leaf,
    TreeNode,
    contribution_weight,
    follow_path,
    leaf_node,
)

LEAVES = 1_000_000
PATHS = 1000


def measure() -> list[Row]:
    """Build the table, take paths out of it and check them."""
    leaves = _made_leaves()
    peer, _ = timed(lambda: _plain_hashes(2 * LEAVES, 144))  # a leaf's or a branch's message with its tag
    seconds, table = timed(lambda: ContributionTable(leaves))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    path_seconds, _ = timed(lambda: _follow_paths(table))
    return [
        row("table of 1,000,000 leaves: build", seconds, "s", 4.0),
        row("the same, against 2,000,000 plain SHA-256", seconds / peer, "ratio"),
        row("table of 1,000,000 leaves: peak memory of the process, leaves included", memory, "GiB", 1.0),
        row("a path out of it, and its check", 1000 * path_seconds / PATHS, "ms", 1.0),
    ]


def _made_leaves() -> list[Leaf]:
    def leaf(i: int) -> Leaf:
        key, params, loss_reduction = i.to_bytes(32, "big"), 1000 + i, 10**6 + i
        return Leaf(key, key, params, loss_reduction, contribution_weight(params, loss_reduction))

    return [leaf(i) for i in range(LEAVES)]


def _plain_hashes(count: int, length: int) -> None:
    message = bytes(length)
    for _ in range(count):
        hashlib.sha256(message).digest()


def _follow_paths(table: ContributionTable) -> None:
    step = LEAVES // PATHS
    for index in range(0, LEAVES, step):
        end = follow_path(leaf_node(table.leaves[index]), index, table.count, table.path(index))
        if end is None or end[0] != TreeNode(table.root, table.weight):
            raise AssertionError(f"the path of leaf {index} does not lead to the root")
