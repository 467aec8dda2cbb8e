// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TRAINING_LOTTERY_H
#define BITCOIN_TRAINING_LOTTERY_H

#include <pubkey.h>
#include <training/certificate.h>
#include <uint256.h>

#include <cstdint>
#include <optional>
#include <span>

/** Whether weight is the integer square root of params * loss_reduction. */
bool CheckContributionWeight(uint64_t params, uint64_t loss_reduction, uint64_t weight);

/** The leaf of a contribution table that stands for one miner's update. Does not check its weight. */
MerkleSumNode ContributionLeaf(const XOnlyPubKey& miner_key, const uint256& update_hash, uint64_t params, uint64_t loss_reduction, uint64_t weight);

/** The parent of two nodes, or nothing if their sums overflow. */
std::optional<MerkleSumNode> ContributionBranch(const MerkleSumNode& left, const MerkleSumNode& right);

/** Where a path ends, and the weight of all leaves to the left of the one where it starts. */
struct ContributionPath {
    MerkleSumNode root;
    uint64_t start{0};
};

/**
 * Follow a path from a leaf to the root.
 *
 * An odd node at the end of a level goes up unchanged, so index and count fix at which levels there is a sibling.
 *
 * @param[in] count  number of leaves in the table
 * @return nothing if the index is not below the count, if the siblings are more or fewer than the path needs, or if the
 *         sums overflow
 */
std::optional<ContributionPath> FollowContributionPath(const MerkleSumNode& leaf, uint32_t index, uint32_t count, std::span<const MerkleSumNode> siblings);

/** The ticket that is drawn from a table of a total weight, which must not be 0: below it, and the same for everyone. */
uint64_t DrawTicket(const uint256& beacon_reveal, const uint256& prev_block, uint16_t round, uint64_t contributions_weight);

#endif // BITCOIN_TRAINING_LOTTERY_H
