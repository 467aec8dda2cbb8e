// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#include <training/lottery.h>

#include <arith_uint256.h>
#include <hash.h>
#include <pubkey.h>
#include <training/certificate.h>
#include <uint256.h>
#include <util/overflow.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>

static const HashWriter HASHER_CONTRIBUTION{TaggedHash("traincert/contribution")};
static const HashWriter HASHER_BRANCH{TaggedHash("traincert/branch")};
static const HashWriter HASHER_DRAW{TaggedHash("traincert/draw")};

bool CheckContributionWeight(uint64_t params, uint64_t loss_reduction, uint64_t weight)
{
    const arith_uint256 product{arith_uint256{params} * arith_uint256{loss_reduction}};
    const arith_uint256 root{weight};
    return root * root <= product && product < (root + 1) * (root + 1);
}

MerkleSumNode ContributionLeaf(const XOnlyPubKey& miner_key, const uint256& update_hash, uint64_t params, uint64_t loss_reduction, uint64_t weight)
{
    HashWriter hasher{HASHER_CONTRIBUTION};
    hasher << miner_key << update_hash << params << loss_reduction << weight;
    return {hasher.GetSHA256(), weight};
}

std::optional<MerkleSumNode> ContributionBranch(const MerkleSumNode& left, const MerkleSumNode& right)
{
    const auto sum{CheckedAdd(left.sum, right.sum)};
    if (!sum) return std::nullopt;
    HashWriter hasher{HASHER_BRANCH};
    hasher << left << right;
    return MerkleSumNode{hasher.GetSHA256(), *sum};
}

std::optional<ContributionPath> FollowContributionPath(const MerkleSumNode& leaf, uint32_t index, uint32_t count, std::span<const MerkleSumNode> siblings)
{
    if (index >= count) return std::nullopt;
    ContributionPath path{.root = leaf};
    for (uint64_t width{count}; width > 1; index /= 2, width = (width + 1) / 2) {
        if (index % 2 == 0 && index + uint64_t{1} == width) continue; // odd node at the end of its level
        if (siblings.empty()) return std::nullopt;
        const MerkleSumNode& sibling{siblings.front()};
        siblings = siblings.subspan(1);
        const bool right{index % 2 == 1};
        const auto branch{right ? ContributionBranch(sibling, path.root) : ContributionBranch(path.root, sibling)};
        if (!branch) return std::nullopt;
        path.root = *branch;
        if (right) path.start += sibling.sum; // cannot overflow: at most root.sum
    }
    if (!siblings.empty()) return std::nullopt;
    return path;
}

uint64_t DrawTicket(const uint256& beacon_reveal, const uint256& prev_block, uint16_t round, uint64_t contributions_weight)
{
    HashWriter hasher{HASHER_DRAW};
    hasher << beacon_reveal << prev_block << round;
    uint256 seed{hasher.GetSHA256()};
    std::ranges::reverse(seed); // UintToArith256 reads little-endian, the draw big-endian
    const arith_uint256 dividend{UintToArith256(seed)};
    const arith_uint256 divisor{contributions_weight};
    return (dividend - dividend / divisor * divisor).GetLow64();
}
