"""The contribution table as a Merkle-sum tree, its paths, and the draw (SPEC.md).

The node's side is bitcoind-patch/src/training/lottery.cpp.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from math import isqrt
from typing import NamedTuple

from traincert.bridge.consensus.codec import U64_MAX, encode_b32, encode_uint, tagged_hash
from traincert.bridge.errors import CertificateError

NO_ROOT = bytes(32)
_NODE_SIZE = 40  # a hash and a u64
_LEAF = struct.Struct("<32s32sQQQ")


class Leaf(NamedTuple):
    """One miner's scored update: key and hash are 32 bytes, loss_reduction is in nano-nats."""

    miner_key: bytes
    update_hash: bytes
    params: int
    loss_reduction: int
    weight: int

    def serialize(self) -> bytes:
        """Return the bytes that the leaf's hash is of. Raises EncodingError if a field does not fit."""
        try:
            if len(self.miner_key) == len(self.update_hash) == 32:
                return _LEAF.pack(*self)  # struct alone would pad a short key with zeros
        except (struct.error, TypeError):
            pass  # the encoders below name the field
        hashes = encode_b32("miner_key", self.miner_key) + encode_b32("update_hash", self.update_hash)
        return hashes + b"".join(encode_uint(name, getattr(self, name), 8) for name in self._fields[2:])


class TreeNode(NamedTuple):
    """A node of the tree: its hash (32 bytes), and the weight of all leaves below it (u64)."""

    hash: bytes
    sum: int

    def serialize(self) -> bytes:
        """Return its 40 bytes in a certificate's path. Raises EncodingError if a field does not fit."""
        return encode_b32("siblings: hash", self.hash) + encode_uint("siblings: sum", self.sum, 8)


def contribution_weight(params: int, loss_reduction: int) -> int:
    """Return the weight in the lottery of training `params` parameters for `loss_reduction` nano-nats.

    Raises EncodingError if one of the two does not fit u64.
    """
    if not (0 <= params <= U64_MAX and 0 <= loss_reduction <= U64_MAX):
        encode_uint("params", params, 8)
        encode_uint("loss_reduction", loss_reduction, 8)
    return isqrt(params * loss_reduction)


class ContributionTable:
    """The leaves of a cycle, in order, and the tree over them.

    An empty table has root 0, weight 0 and count 0.

    Raises CertificateError if two leaves are the same miner's same update, if a weight is 0 or is not what
    `contribution_weight` gives, or if the total does not fit u64; EncodingError if a leaf's field does not fit.
    """

    def __init__(self, leaves: Iterable[Leaf]) -> None:
        self.leaves = sorted(leaves)
        for left, right in itertools.pairwise(self.leaves):
            if left[:2] == right[:2]:
                raise CertificateError("draw", f"miner {left.miner_key.hex()} has the same update twice")
        for leaf in self.leaves:
            if leaf.weight < 1 or leaf.weight != contribution_weight(leaf.params, leaf.loss_reduction):
                raise CertificateError("weight", f"miner {leaf.miner_key.hex()}: {leaf.weight} is not its weight")
        self._ends = list(itertools.accumulate(leaf.weight for leaf in self.leaves))
        if self.weight > U64_MAX:
            raise CertificateError("totals", f"a total weight of {self.weight} does not fit 64 bits")
        self._levels = _build_levels(self.leaves)

    @property
    def root(self) -> bytes:
        """The tree's root hash, 32 bytes."""
        return bytes(self._levels[-1][:32]) if self.leaves else NO_ROOT

    @property
    def weight(self) -> int:
        """The total weight."""
        return self._ends[-1] if self._ends else 0

    @property
    def count(self) -> int:
        """The number of leaves."""
        return len(self.leaves)

    def find(self, ticket: int) -> int:
        """Return the index of the leaf that holds a ticket, 0 <= ticket < weight."""
        return bisect_right(self._ends, ticket)

    def path(self, index: int) -> tuple[TreeNode, ...]:
        """Return the siblings of the leaf with this index, from the leaf to the root."""
        siblings = []
        for level in self._levels[:-1]:
            at = (index ^ 1) * _NODE_SIZE
            if at < len(level):
                node = level[at : at + _NODE_SIZE]
                siblings.append(TreeNode(bytes(node[:32]), int.from_bytes(node[32:], "little")))
            index //= 2
        return tuple(siblings)


def _build_levels(leaves: Sequence[Leaf]) -> list[bytearray]:
    """Return all levels of the tree, leaves first, each as the bytes of its nodes.

    Two neighbours stand side by side, as a branch hashes them.
    """
    hasher = _tagged_hasher("traincert/contribution")
    level = bytearray()
    for leaf in leaves:
        each = hasher.copy()
        each.update(leaf.serialize())
        level += each.digest() + leaf.weight.to_bytes(8, "little")
    levels = [level]
    hasher = _tagged_hasher("traincert/branch")
    sums = [leaf.weight for leaf in leaves]
    while len(sums) > 1:
        below = memoryview(level)
        odd = sums[-1:] if len(sums) % 2 else []
        sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=False)]
        level = bytearray()
        for i, total in enumerate(sums):
            each = hasher.copy()
            each.update(below[2 * _NODE_SIZE * i : 2 * _NODE_SIZE * (i + 1)])
            level += each.digest() + total.to_bytes(8, "little")
        if odd:  # the odd node at the end of a level goes up unchanged
            level += below[-_NODE_SIZE:]
        sums += odd
        levels.append(level)
    return levels


def _tagged_hasher(tag: str) -> hashlib._Hash:
    prefix = hashlib.sha256(tag.encode()).digest()
    return hashlib.sha256(prefix + prefix)


def leaf_node(leaf: Leaf) -> TreeNode:
    """Return the node of the tree that stands for a leaf."""
    return TreeNode(tagged_hash("traincert/contribution", leaf.serialize()), leaf.weight)


def branch_node(left: TreeNode, right: TreeNode) -> TreeNode | None:
    """Return the parent of two nodes, or None if the sum of their weights overflows u64."""
    total = left.sum + right.sum
    if total > U64_MAX:
        return None
    message = left.serialize() + right.serialize()
    return TreeNode(tagged_hash("traincert/branch", message), total)


def follow_path(leaf: TreeNode, index: int, count: int, siblings: Sequence[TreeNode]) -> tuple[TreeNode, int] | None:
    """Follow a path from a leaf to the root.

    Returns the node at its end, and the total weight of all leaves to the left of the leaf. Returns None if the index
    is not below the count, if the path has too many or too few siblings, or if the sums overflow u64.
    """
    if index >= count:
        return None
    root, start, left = leaf, 0, list(siblings)
    while count > 1:
        if index % 2 == 1 or index + 1 < count:  # else an odd node at the end of its level: no sibling
            if not left:
                return None
            sibling = left.pop(0)
            branch = branch_node(sibling, root) if index % 2 else branch_node(root, sibling)
            if branch is None:
                return None
            start += sibling.sum if index % 2 else 0
            root = branch
        index //= 2
        count = (count + 1) // 2
    return None if left else (root, start)


def draw_ticket(beacon_reveal: bytes, prev_block: bytes, round_: int, contributions_weight: int) -> int:
    """Return the ticket that is drawn, from 0 to contributions_weight - 1. Everybody draws the same.

    `beacon_reveal` and `prev_block` are 32 bytes each, the block hash in header byte order. The table must not be
    empty.

    Raises EncodingError if an argument does not fit its field.
    """
    message = encode_b32("beacon_reveal", beacon_reveal) + encode_b32("prev_block", prev_block)
    seed = tagged_hash("traincert/draw", message + encode_uint("round", round_, 2))
    return int.from_bytes(seed, "big") % contributions_weight
