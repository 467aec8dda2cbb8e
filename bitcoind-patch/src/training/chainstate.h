// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TRAINING_CHAINSTATE_H
#define BITCOIN_TRAINING_CHAINSTATE_H

#include <kernel/cs_main.h>
#include <pubkey.h>
#include <serialize.h>
#include <sync.h>
#include <training/certificate.h>
#include <uint256.h>

#include <cstdint>
#include <optional>
#include <set>
#include <utility>
#include <vector>

class BlockValidationState;
class CBlock;
class CBlockIndex;
namespace Consensus {
struct Params;
} // namespace Consensus
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

/** What the rules of a training network need besides a block and its header. Unused on other networks. */
class TrainingState
{
    /** The last block that was connected, and its certificate: as a rule the next one's parent. */
    std::optional<std::pair<uint256, TrainingCertificate>> m_last;
    std::set<const CBlockIndex*> m_left_alone;

public:
    /** Check a block that is to be connected against its parent's certificate, see ContextualCheckTrainingCertificate. */
    bool CheckConnect(const CBlock& block, const CBlockIndex& index, const node::BlockManager& blockman, const Consensus::Params& params, BlockValidationState& state) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

    /**
     * Whether to store a block whose certificate and signatures are valid, and if so, note that it is another body of
     * that certificate.
     *
     * Two bodies are kept, valid or not: the second is the evidence of the winner's equivocation. Any other is left
     * alone, not marked invalid, because a chain that is built on it must still be able to win.
     *
     * @param[in] on_disk  the block was read from our block files (-reindex), so it is stored already
     */
    bool MayStore(const CBlock& block, const CBlockIndex& index, bool on_disk, const CBlockIndex& best_header, const CBlockIndex* tip, const node::BlockManager& blockman, const Consensus::Params& params) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

    /** Whether MayStore refused a block and would do so again: not worth asking a peer for. */
    bool IsLeftAlone(const CBlockIndex& index, const CBlockIndex& best_header, const CBlockIndex* tip) const EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

    /** The certificate of a stored block at or above the start height; nothing if it cannot be read. */
    std::optional<TrainingCertificate> ReadCertificate(const CBlockIndex& index, const node::BlockManager& blockman) const EXCLUSIVE_LOCKS_REQUIRED(::cs_main);
};

/** The certificates with more than one stored body, by height. */
std::vector<CertificateBodies> ListEquivocations(const node::BlockManager& blockman) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

#endif // BITCOIN_TRAINING_CHAINSTATE_H
