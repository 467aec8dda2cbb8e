// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#include <training/chainstate.h>

#include <chain.h>
#include <consensus/params.h>
#include <consensus/validation.h>
#include <dbwrapper.h>
#include <kernel/cs_main.h>
#include <logging.h>
#include <node/blockstorage.h>
#include <primitives/block.h>
#include <tinyformat.h>
#include <training/certificate.h>
#include <training/params.h>
#include <training/validation.h>
#include <uint256.h>
#include <util/check.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

static constexpr size_t MAX_BODIES{2};

/** Key of a CertificateBodies in the block tree database, followed by the certificate's signature hash. */
static const std::string DB_BODIES{"training_bodies"};

/** Whether the best header's chain was built on a block, and overtakes the tip. */
static bool IsNeeded(const CBlockIndex& index, const CBlockIndex& best_header, const CBlockIndex* tip)
{
    return best_header.nHeight > index.nHeight && best_header.GetAncestor(index.nHeight) == &index &&
           (!tip || best_header.nChainWork > tip->nChainWork);
}

/** Drop the bodies that this node does not have: after a crash the database may name a block that was never written. */
static void DropLost(std::vector<uint256>& blocks, const node::BlockManager& blockman) EXCLUSIVE_LOCKS_REQUIRED(::cs_main)
{
    std::erase_if(blocks, [&](const uint256& hash) EXCLUSIVE_LOCKS_REQUIRED(::cs_main) {
        const CBlockIndex* body{blockman.LookupBlockIndex(hash)};
        return !body || body->nTx == 0;
    });
}

std::optional<TrainingCertificate> TrainingState::ReadCertificate(const CBlockIndex& index, const node::BlockManager& blockman) const
{
    AssertLockHeld(::cs_main);
    if (m_last && m_last->first == index.GetBlockHash()) return m_last->second;
    CBlock block;
    if (!blockman.ReadBlock(block, index)) return std::nullopt;
    BlockValidationState state;
    auto payload{ReadTrainingPayload(*block.vtx.at(0), state)};
    if (!payload) return std::nullopt;
    return std::move(payload->certificate);
}

bool TrainingState::CheckConnect(const CBlock& block, const CBlockIndex& index, const node::BlockManager& blockman, const Consensus::Params& params, BlockValidationState& state)
{
    AssertLockHeld(::cs_main);
    if (!params.training || index.nHeight < params.training->StartHeight()) return true;

    auto payload{ReadTrainingPayload(*block.vtx.at(0), state)};
    if (!payload) return false;
    std::optional<TrainingCertificate> parent;
    if (index.nHeight > params.training->StartHeight()) {
        parent = ReadCertificate(*index.pprev, blockman);
        if (!parent) return state.Error(strprintf("cannot read the training certificate of block %s", index.pprev->GetBlockHash().ToString()));
    }
    if (!ContextualCheckTrainingCertificate(payload->certificate, parent ? &*parent : nullptr, block.GetBlockTime(), index.pprev->GetBlockTime(), *params.training, state)) return false;
    m_last.emplace(index.GetBlockHash(), std::move(payload->certificate));
    return true;
}

bool TrainingState::MayStore(const CBlock& block, const CBlockIndex& index, bool on_disk, const CBlockIndex& best_header, const CBlockIndex* tip, const node::BlockManager& blockman, const Consensus::Params& params)
{
    AssertLockHeld(::cs_main);
    if (!params.training || index.nHeight < params.training->StartHeight()) return true;

    BlockValidationState state;
    const auto payload{ReadTrainingPayload(*block.vtx.at(0), state)};
    const TrainingCertificate& certificate{Assert(payload)->certificate};
    const auto key{std::make_pair(DB_BODIES, CertificateSigHash(TrainingChainId(params), certificate))};
    CertificateBodies bodies{.height = certificate.height, .round = certificate.round, .winner_key = certificate.winner_key, .blocks = {}};
    blockman.m_block_tree_db->Read(key, bodies);
    DropLost(bodies.blocks, blockman);
    std::erase(bodies.blocks, index.GetBlockHash()); // pruned, and fetched again

    if (bodies.blocks.size() >= MAX_BODIES && !on_disk && !IsNeeded(index, best_header, tip)) {
        LogDebug(BCLog::VALIDATION, "Left alone block %s: it is not needed, and %u others of its training certificate are stored\n", index.GetBlockHash().ToString(), bodies.blocks.size());
        m_left_alone.insert(&index);
        return false;
    }
    m_left_alone.erase(&index);
    bodies.blocks.push_back(index.GetBlockHash());
    blockman.m_block_tree_db->Write(key, bodies);
    return true;
}

bool TrainingState::IsLeftAlone(const CBlockIndex& index, const CBlockIndex& best_header, const CBlockIndex* tip) const
{
    AssertLockHeld(::cs_main);
    return m_left_alone.contains(&index) && !IsNeeded(index, best_header, tip);
}

std::vector<CertificateBodies> ListEquivocations(const node::BlockManager& blockman)
{
    AssertLockHeld(::cs_main);
    std::vector<CertificateBodies> equivocations;
    const std::unique_ptr<CDBIterator> it{blockman.m_block_tree_db->NewIterator()};
    std::pair<std::string, uint256> key;
    CertificateBodies bodies;
    for (it->Seek(std::make_pair(DB_BODIES, uint256{})); it->Valid() && it->GetKey(key) && key.first == DB_BODIES; it->Next()) {
        if (!it->GetValue(bodies)) continue;
        DropLost(bodies.blocks, blockman);
        if (bodies.blocks.size() >= MAX_BODIES) equivocations.push_back(bodies);
    }
    std::ranges::sort(equivocations, {}, [](const auto& each) { return std::make_pair(each.height, each.round); });
    return equivocations;
}
