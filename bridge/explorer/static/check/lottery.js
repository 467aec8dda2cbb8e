// The paths of the contribution table, a Merkle-sum tree, and the draw (SPEC.md): the twin of bridge/consensus/lottery.py.
// A node of the tree is {hash: 32 bytes, sum: BigInt}.

import { U64_MAX, encodeUint, hex, taggedHash } from './codec.js';

/** Whether a weight is the square root of parameters × loss reduction (nano-nats), rounded down. */
export function checkContributionWeight(params, lossReduction, weight) {
  const product = params * lossReduction;
  return weight * weight <= product && product < (weight + 1n) * (weight + 1n);
}

/** The node of the tree that stands for a leaf: a miner's key, and its fields of a certificate's draw. */
export function leafNode(minerKey, { update_hash, params, loss_reduction, weight }) {
  const numbers = [params, loss_reduction, weight].map((number) => encodeUint(number, 8));
  return { hash: taggedHash('traincert/contribution', minerKey, update_hash, ...numbers), sum: weight };
}

/** The parent of two nodes, or null if the sum of their weights overflows 64 bits. */
export function branchNode(left, right) {
  const sum = left.sum + right.sum;
  if (sum > U64_MAX) return null;
  const parts = [left.hash, encodeUint(left.sum, 8), right.hash, encodeUint(right.sum, 8)];
  return { hash: taggedHash('traincert/branch', ...parts), sum };
}

/**
 * Follow a path from a leaf to the root: {root, start}, the node at its end and the total weight of all leaves to the left of the
 * leaf. Null if the index is not below the count, if the path has too many or too few siblings, or if the sums overflow 64 bits.
 */
export function followPath(leaf, index, count, siblings) {
  if (index >= count) return null;
  let root = leaf;
  let start = 0n;
  const left = siblings.values();
  while (count > 1) {
    const right = index % 2 === 1;
    if (right || index + 1 < count) { // else an odd node at the end of its level: no sibling
      const { value: sibling, done } = left.next();
      if (done) return null;
      root = right ? branchNode(sibling, root) : branchNode(root, sibling);
      if (root === null) return null;
      if (right) start += sibling.sum;
    }
    index = Math.floor(index / 2);
    count = Math.floor((count + 1) / 2);
  }
  return left.next().done ? { root, start } : null;
}

/** The ticket that is drawn, from 0 to contributionsWeight - 1. `prevBlock` is in header byte order. */
export function drawTicket(beaconReveal, prevBlock, round, contributionsWeight) {
  const seed = taggedHash('traincert/draw', beaconReveal, prevBlock, encodeUint(round, 2));
  return BigInt(`0x${hex(seed)}`) % contributionsWeight;
}
