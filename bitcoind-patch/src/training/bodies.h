// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TRAINING_BODIES_H
#define BITCOIN_TRAINING_BODIES_H

#include <kernel/cs_main.h>
#include <pubkey.h>
#include <serialize.h>
#include <sync.h>
#include <training/certificate.h>
#include <uint256.h>
#include <util/fs.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

class BlockValidationState;
class CBlock;
class CBlockIndex;
class ChainstateManager;
namespace node {
class BlockManager;
} // namespace node

/** The blocks that one winner signed under one certificate, and that this node has stored. More than one is equivocation. */
struct CertificateBodies {
    uint32_t height{0};
    uint16_t round{0};
    XOnlyPubKey winner_key;
    std::vector<uint256> blocks; //!< hashes, in the order of arrival

    SERIALIZE_METHODS(CertificateBodies, obj) { READWRITE(obj.height, obj.round, obj.winner_key, obj.blocks); }
};

/**
 * Decides which block bodies of a training network are stored, and makes entries for them in the block tree database.
 * Does nothing on other networks.
 */
class TrainingBodies
{
    std::set<const CBlockIndex*> m_left_alone;
    /** The last of the bodies that were left alone, serialized, for the case that a child needs one. */
    std::deque<std::pair<const CBlockIndex*, std::vector<unsigned char>>> m_held;

    /** Keep a body in m_held, and drop the oldest ones if they get too large. */
    void Hold(const CBlockIndex& index, const CBlock& block) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

public:
    /**
     * Write the entries of a block that is going to be stored, unless it is to be left alone.
     *
     * Two bodies of a certificate are stored, valid or not: the second is the evidence of the winner's equivocation.
     * Any other is left alone until a child of it is stored. The child's certificate names its parent, so only the
     * coordinator can make another body needed. A body that is left alone is not marked invalid.
     *
     * @param[in] certificate  the block's, valid with all its signatures, or nothing below the start height
     * @param[in] on_disk      the block was read from our block files (-reindex), so it is stored already
     * @param[out] state       an error if the database failed, which is fatal
     * @return whether to store the block
     */
    bool Add(const CBlock& block, const std::optional<VerifiedCertificate>& certificate, const CBlockIndex& index, bool on_disk, ChainstateManager& chainman, BlockValidationState& state) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

    /** Whether Add refused a block and would do so again: not worth asking a peer for. */
    bool IsLeftAlone(const CBlockIndex& index, const node::BlockManager& blockman) const EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

    /** Take out a body that was left alone and is needed now, if it is still in memory. */
    std::shared_ptr<const CBlock> TakeNeeded(const CBlockIndex* index, const node::BlockManager& blockman) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);
};

/** Check a block that is to be connected against its parent's certificate, see ContextualCheckTrainingCertificate. */
bool CheckTrainingConnect(const CBlock& block, const CBlockIndex& index, ChainstateManager& chainman, BlockValidationState& state) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

/** The entry of a block that was ever stored, at or above the start height; nothing if it cannot be read. */
std::optional<TrainingParent> ReadTrainingParent(const CBlockIndex& index, const node::BlockManager& blockman) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

/** The certificates with more than one stored body, by height and round. */
std::vector<CertificateBodies> ListEquivocations(const node::BlockManager& blockman) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

/** The weight of the largest coinbase output that the certificate of the block after prev can need. */
uint64_t MaxTrainingOutputWeight(const CBlockIndex& prev, const ChainstateManager& chainman) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

/**
 * Read files of blocks (-loadblock) again until a reading of all stores no further block.
 *
 * A body that one reading leaves alone may be needed by a block after it, and a block before its parent is skipped.
 * Pipes cannot be read again, and with -prune it would bring pruned blocks back.
 */
void LoadTrainingBlocksAgain(ChainstateManager& chainman, std::span<const fs::path> paths) LOCKS_EXCLUDED(::cs_main);

#endif // BITCOIN_TRAINING_BODIES_H
