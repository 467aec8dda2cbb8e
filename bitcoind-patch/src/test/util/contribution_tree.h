// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TEST_UTIL_CONTRIBUTION_TREE_H
#define BITCOIN_TEST_UTIL_CONTRIBUTION_TREE_H

#include <training/certificate.h>
#include <training/lottery.h>
#include <util/check.h>

#include <cstddef>
#include <utility>
#include <vector>

/** All levels of a contribution tree, leaves first. The weights must not overflow. */
using ContributionTree = std::vector<std::vector<MerkleSumNode>>;

/** Build the tree over one or more leaves. */
inline ContributionTree BuildContributionTree(std::vector<MerkleSumNode> leaves)
{
    ContributionTree tree{std::move(leaves)};
    while (tree.back().size() > 1) {
        std::vector<MerkleSumNode> level;
        for (size_t i{0}; i < tree.back().size(); i += 2) {
            const MerkleSumNode& left{tree.back()[i]};
            level.push_back(i + 1 < tree.back().size() ? *Assert(ContributionBranch(left, tree.back()[i + 1])) : left);
        }
        tree.push_back(std::move(level));
    }
    return tree;
}

/** The siblings of a leaf, leaf to root. */
inline std::vector<MerkleSumNode> GetContributionPath(const ContributionTree& tree, size_t index)
{
    std::vector<MerkleSumNode> siblings;
    for (const auto& level : tree) {
        if ((index ^ 1) < level.size()) siblings.push_back(level[index ^ 1]);
        index /= 2;
    }
    return siblings;
}

#endif // BITCOIN_TEST_UTIL_CONTRIBUTION_TREE_H
