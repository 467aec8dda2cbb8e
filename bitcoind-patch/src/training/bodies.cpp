// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#include <training/bodies.h>

#include <chain.h>
#include <consensus/consensus.h>
#include <consensus/params.h>
#include <consensus/validation.h>
#include <dbwrapper.h>
#include <kernel/cs_main.h>
#include <logging.h>
#include <node/blockstorage.h>
#include <primitives/block.h>
#include <primitives/transaction.h>
#include <script/script.h>
#include <serialize.h>
#include <streams.h>
#include <sync.h>
#include <tinyformat.h>
#include <training/certificate.h>
#include <training/params.h>
#include <training/validation.h>
#include <uint256.h>
#include <util/fs.h>
#include <util/signalinterrupt.h>
#include <util/translation.h>
#include <validation.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

/** Bodies of a certificate that are stored though no child needs them. */
static constexpr size_t MAX_BODIES{2};
/** How many bytes of bodies left alone are kept in memory. */
static constexpr size_t MAX_HELD_BYTES{2 * MAX_BLOCK_SERIALIZED_SIZE};

/** Blocks that this thread has given to TrainingBodies::Add and that were stored for the first time. */
static thread_local uint64_t g_added{0};

/** Key of a CertificateBodies in the block tree database, followed by the certificate's signature hash. */
static const std::string DB_BODIES{"training_bodies"};
/** Key of a TrainingParent in the block tree database, followed by the block's hash. */
static const std::string DB_PARENT{"training_parent"};

/** Whether a block that names this one as its parent was stored. */
static bool HasStoredChild(const CBlockIndex& index, const node::BlockManager& blockman)
{
    return blockman.m_blocks_unlinked.contains(const_cast<CBlockIndex*>(&index)); // a key only
}

/** Drop the bodies that this node does not have: after a crash the database may name a block that was never written. */
static void DropLost(std::vector<uint256>& blocks, const node::BlockManager& blockman) EXCLUSIVE_LOCKS_REQUIRED(::cs_main)
{
    std::erase_if(blocks, [&](const uint256& hash) EXCLUSIVE_LOCKS_REQUIRED(::cs_main) {
        const CBlockIndex* body{blockman.LookupBlockIndex(hash)};
        return !body || body->nTx == 0;
    });
}

bool TrainingBodies::Add(const CBlock& block, const std::optional<VerifiedCertificate>& certificate, const CBlockIndex& index, bool on_disk, ChainstateManager& chainman, BlockValidationState& state)
{
    AssertLockHeld(::cs_main);
    if (certificate) {
        const uint256& hash{index.GetBlockHash()};
        const auto key{std::make_pair(DB_BODIES, certificate->sighash)};
        CertificateBodies bodies{.height = certificate->height, .round = certificate->round, .winner_key = certificate->winner_key, .blocks = {}};
        auto& database{*chainman.m_blockman.m_block_tree_db};
        try {
            database.Read(key, bodies);
            DropLost(bodies.blocks, chainman.m_blockman);
            const bool recorded{std::ranges::find(bodies.blocks, hash) != bodies.blocks.end()}; // pruned, and fetched again
            if (!recorded && !on_disk && bodies.blocks.size() >= MAX_BODIES && !HasStoredChild(index, chainman.m_blockman)) {
                LogDebug(BCLog::VALIDATION, "Left alone block %s: %u others of its training certificate are stored, and no child of it\n", hash.ToString(), bodies.blocks.size());
                m_left_alone.insert(&index);
                Hold(index, block);
                return false;
            }
            if (!recorded) bodies.blocks.push_back(hash);
            CDBBatch batch{database};
            batch.Write(key, bodies);
            batch.Write(std::make_pair(DB_PARENT, hash), TrainingParent{*certificate});
            database.WriteBatch(batch);
        } catch (const dbwrapper_error& e) {
            return FatalError(chainman.GetNotifications(), state, strprintf(_("System error while saving the entries of a training block: %s"), e.what()));
        }
        m_left_alone.erase(&index);
        std::erase_if(m_held, [&](const auto& held) { return held.first == &index; });
    }
    if (index.nTx == 0) ++g_added;
    return true;
}

void TrainingBodies::Hold(const CBlockIndex& index, const CBlock& block)
{
    AssertLockHeld(::cs_main);
    VectorWriter{m_held.emplace_back(&index, std::vector<unsigned char>{}).second, 0, TX_WITH_WITNESS(block)};
    const auto size{[&] {
        size_t bytes{0};
        for (const auto& held : m_held)
            bytes += held.second.size();
        return bytes;
    }};
    while (size() > MAX_HELD_BYTES)
        m_held.pop_front();
}

bool TrainingBodies::IsLeftAlone(const CBlockIndex& index, const node::BlockManager& blockman) const
{
    AssertLockHeld(::cs_main);
    return m_left_alone.contains(&index) && !HasStoredChild(index, blockman);
}

std::shared_ptr<const CBlock> TrainingBodies::TakeNeeded(const CBlockIndex* index, const node::BlockManager& blockman)
{
    AssertLockHeld(::cs_main);
    const auto held{std::ranges::find(m_held, index, [](const auto& each) { return each.first; })};
    if (held == m_held.end() || !HasStoredChild(*index, blockman)) return nullptr;
    auto block{std::make_shared<CBlock>()};
    SpanReader{held->second} >> TX_WITH_WITNESS(*block);
    m_held.erase(held);
    return block;
}

bool CheckTrainingConnect(const CBlock& block, const CBlockIndex& index, ChainstateManager& chainman, BlockValidationState& state)
{
    AssertLockHeld(::cs_main);
    const auto& training{chainman.GetConsensus().training};
    if (!training || index.nHeight < training->StartHeight()) return true;

    const auto payload{ReadTrainingPayload(*block.vtx.at(0), state)};
    if (!payload) return false;
    std::optional<TrainingParent> parent;
    if (index.nHeight > training->StartHeight()) {
        parent = ReadTrainingParent(*index.pprev, chainman.m_blockman);
        if (!parent) {
            return FatalError(chainman.GetNotifications(), state, strprintf(_("The training_parent entry of block %s is missing from the block database. Restart with -reindex to make it again."), index.pprev->GetBlockHash().ToString()));
        }
    }
    return ContextualCheckTrainingCertificate(payload->certificate, parent ? &*parent : nullptr, block.GetBlockTime(), index.pprev->GetBlockTime(), *training, state);
}

std::optional<TrainingParent> ReadTrainingParent(const CBlockIndex& index, const node::BlockManager& blockman)
{
    AssertLockHeld(::cs_main);
    TrainingParent parent;
    try {
        if (blockman.m_block_tree_db->Read(std::make_pair(DB_PARENT, index.GetBlockHash()), parent)) return parent;
    } catch (const dbwrapper_error& e) {
        LogError("Cannot read the training_parent entry of block %s: %s\n", index.GetBlockHash().ToString(), e.what());
    }
    return std::nullopt;
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
        if (bodies.blocks.size() > 1) equivocations.push_back(bodies);
    }
    std::ranges::sort(equivocations, {}, [](const auto& each) { return std::make_pair(each.height, each.round); });
    return equivocations;
}

uint64_t MaxTrainingOutputWeight(const CBlockIndex& prev, const ChainstateManager& chainman)
{
    AssertLockHeld(::cs_main);
    const auto& training{chainman.GetConsensus().training};
    if (!training || prev.nHeight + 1 < training->StartHeight()) return 0;

    TrainingCertificate largest;
    largest.coordinator_signatures.resize(training->KeysAt(prev.nHeight + 1).threshold);
    if (const auto parent{ReadTrainingParent(prev, chainman.m_blockman)}; parent && parent->contributions_count > 0) {
        largest.draw.emplace().siblings.resize(std::bit_width(parent->contributions_count - 1));
    }
    const size_t payload_size{GetSerializeSize(TRAINING_PAYLOAD_MAGIC) + GetSerializeSize(largest) + GetSerializeSize(SchnorrSignature{})};
    const CTxOut output{0, CScript{} << OP_RETURN << std::vector<unsigned char>(payload_size)};
    return GetSerializeSize(output) * WITNESS_SCALE_FACTOR;
}

void LoadTrainingBlocksAgain(ChainstateManager& chainman, std::span<const fs::path> paths)
{
    if (!chainman.GetConsensus().training || chainman.m_blockman.IsPruneMode()) return;
    uint64_t before;
    do {
        before = g_added;
        for (const fs::path& path : paths) {
            if (chainman.m_interrupt || !fs::is_regular_file(path)) continue;
            AutoFile file{fsbridge::fopen(path, "rb")};
            if (!file.IsNull()) chainman.LoadExternalBlockFile(file);
        }
    } while (g_added > before && !chainman.m_interrupt);
}
