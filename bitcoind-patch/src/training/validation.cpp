// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#include <training/validation.h>

#include <consensus/merkle.h>
#include <consensus/params.h>
#include <consensus/validation.h>
#include <crypto/sha256.h>
#include <hash.h>
#include <logging.h>
#include <pow.h>
#include <primitives/block.h>
#include <primitives/transaction.h>
#include <pubkey.h>
#include <script/script.h>
#include <serialize.h>
#include <streams.h>
#include <tinyformat.h>
#include <training/certificate.h>
#include <training/lottery.h>
#include <training/params.h>
#include <uint256.h>
#include <util/strencodings.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

static const HashWriter HASHER_CHAIN{TaggedHash("traincert/chain")};
static const HashWriter HASHER_CERTIFICATE{TaggedHash("traincert/certificate")};
static const HashWriter HASHER_BLOCK{TaggedHash("traincert/block")};

uint256 TrainingChainId(const Consensus::Params& params)
{
    HashWriter hasher{HASHER_CHAIN};
    hasher << params.hashGenesisBlock;
    WriteCompactSize(hasher, params.training->keys.size());
    for (const auto& [height, keys] : params.training->keys) {
        hasher << uint32_t(height) << keys.threshold << keys.keys;
    }
    hasher << params.training->beacon << params.training->round_seconds << params.training->model;
    return hasher.GetSHA256();
}

uint256 CertificateSigHash(const uint256& chain_id, const TrainingCertificateBody& body)
{
    HashWriter hasher{HASHER_CERTIFICATE};
    hasher << chain_id << body;
    return hasher.GetSHA256();
}

uint256 WinnerSigHash(const uint256& chain_id, const CBlock& block, size_t output)
{
    CMutableTransaction coinbase{*block.vtx.at(0)};
    CScript& script{coinbase.vout.at(output).scriptPubKey};
    std::fill(script.end() - std::tuple_size_v<SchnorrSignature>, script.end(), 0);

    std::vector<uint256> leaves{coinbase.GetHash().ToUint256()};
    for (size_t i{1}; i < block.vtx.size(); ++i) {
        leaves.push_back(block.vtx[i]->GetHash().ToUint256());
    }
    CBlockHeader header{block};
    header.hashMerkleRoot = ComputeMerkleRoot(std::move(leaves));

    HashWriter hasher{HASHER_BLOCK};
    hasher << chain_id << header;
    return hasher.GetSHA256();
}

static bool Reject(BlockValidationState& state, const std::string& reason, const std::string& message)
{
    return state.Invalid(BlockValidationResult::BLOCK_CONSENSUS, "bad-traincert-" + reason, message);
}

/** A push that starts with the magic. */
struct PayloadPush {
    std::vector<unsigned char> data;
    bool canonical; //!< it is minimal, and the script ends with it
    size_t output;
};

/** Decode a script that is OP_RETURN and a push which starts with the magic. */
static std::optional<PayloadPush> MatchPayload(const CScript& script, size_t output)
{
    auto pc{script.begin()};
    opcodetype opcode;
    std::vector<unsigned char> data;
    if (!script.GetOp(pc, opcode) || opcode != OP_RETURN || !script.GetOp(pc, opcode, data)) return std::nullopt;
    if (data.size() < TRAINING_PAYLOAD_MAGIC.size() || !std::equal(TRAINING_PAYLOAD_MAGIC.begin(), TRAINING_PAYLOAD_MAGIC.end(), data.begin())) return std::nullopt;
    const bool canonical{CheckMinimalPush(data, opcode) && pc == script.end()};
    return PayloadPush{std::move(data), canonical, output};
}

std::optional<TrainingPayload> ReadTrainingPayload(const CTransaction& coinbase, BlockValidationState& state)
{
    std::optional<PayloadPush> push;
    for (size_t i{0}; i < coinbase.vout.size(); ++i) {
        auto match{MatchPayload(coinbase.vout[i].scriptPubKey, i)};
        if (!match) continue;
        if (push) {
            Reject(state, "multiple", strprintf("coinbase outputs %u and %u both carry a training certificate", push->output, i));
            return std::nullopt;
        }
        push = std::move(match);
    }
    if (!push) {
        Reject(state, "missing", "no coinbase output carries a training certificate");
        return std::nullopt;
    }
    if (!push->canonical) {
        Reject(state, "parse", strprintf("coinbase output %u is not OP_RETURN and one minimal push", push->output));
        return std::nullopt;
    }
    SpanReader reader{std::span{push->data}.subspan(TRAINING_PAYLOAD_MAGIC.size())};
    // Another version has another layout: say so before anything else is read.
    if (!reader.empty() && push->data[TRAINING_PAYLOAD_MAGIC.size()] != TrainingCertificate::VERSION) {
        Reject(state, "version", strprintf("version %u, expected %u", push->data[TRAINING_PAYLOAD_MAGIC.size()], TrainingCertificate::VERSION));
        return std::nullopt;
    }
    try {
        TrainingPayload payload{.certificate = {}, .winner_signature = {}, .output = push->output};
        reader >> payload.certificate >> payload.winner_signature;
        if (reader.empty()) return payload;
        Reject(state, "parse", strprintf("%u bytes after the winner's signature", reader.size()));
    } catch (const std::exception& e) {
        Reject(state, "parse", e.what());
    }
    return std::nullopt;
}

bool CheckTrainingHeader(const CBlockHeader& header, int height, const Consensus::Params& params, BlockValidationState& state)
{
    if (!params.training || height >= params.training->StartHeight()) return true;
    if (CheckProofOfWorkImpl(header.GetHash(), header.nBits, params)) return true;
    state.Invalid(BlockValidationResult::BLOCK_INVALID_HEADER, "high-hash", "proof of work failed");
    LogDebug(BCLog::VALIDATION, "%s: %s, %s\n", __func__, header.GetHash().ToString(), state.ToString());
    return false;
}

/** Reason: bad-traincert-height. */
static bool CheckHeight(const TrainingCertificate& certificate, int height, BlockValidationState& state)
{
    if (certificate.height == uint32_t(height)) return true;
    return Reject(state, "height", strprintf("height %u in a block at height %d", certificate.height, height));
}

/** Reason: bad-traincert-prevblock. */
static bool CheckPrevBlock(const TrainingCertificate& certificate, const CBlock& block, BlockValidationState& state)
{
    if (certificate.prev_block == block.hashPrevBlock) return true;
    return Reject(state, "prevblock", strprintf("previous block %s, but the header's is %s", certificate.prev_block.ToString(), block.hashPrevBlock.ToString()));
}

/** Reason: bad-traincert-totals. */
static bool CheckTotals(const TrainingCertificate& certificate, BlockValidationState& state)
{
    const bool no_root{certificate.contributions_root.IsNull()};
    const bool no_weight{certificate.contributions_weight == 0};
    const bool no_count{certificate.contributions_count == 0};
    if (no_root == no_weight && no_weight == no_count) return true;
    return Reject(state, "totals", strprintf("%u contributions of total weight %u, and a root that is %szero", certificate.contributions_count, certificate.contributions_weight, no_root ? "" : "not "));
}

/** Reason: bad-traincert-coordinator-sig. */
static bool CheckCoordinatorSignatures(const TrainingCertificate& certificate, const TrainingKeys& keys, const uint256& sighash, BlockValidationState& state)
{
    const auto& signatures{certificate.coordinator_signatures};
    if (signatures.size() != keys.threshold) {
        return Reject(state, "coordinator-sig", strprintf("%u coordinator signatures, expected %u", signatures.size(), keys.threshold));
    }
    for (size_t i{0}; i < signatures.size(); ++i) {
        if (signatures[i].key_index >= keys.keys.size()) {
            return Reject(state, "coordinator-sig", strprintf("key index %u of %u keys", signatures[i].key_index, keys.keys.size()));
        }
        if (i > 0 && signatures[i].key_index <= signatures[i - 1].key_index) {
            return Reject(state, "coordinator-sig", strprintf("key index %u after %u", signatures[i].key_index, signatures[i - 1].key_index));
        }
    }
    for (const auto& [key_index, signature] : signatures) {
        if (!keys.keys[key_index].VerifySchnorr(sighash, signature)) {
            return Reject(state, "coordinator-sig", strprintf("signature of coordinator key %u does not verify", key_index));
        }
    }
    return true;
}

/** Reason: bad-traincert-winner-sig. */
static bool CheckWinnerSignature(const TrainingPayload& payload, const CBlock& block, const uint256& chain_id, BlockValidationState& state)
{
    if (payload.certificate.winner_key.VerifySchnorr(WinnerSigHash(chain_id, block, payload.output), payload.winner_signature)) return true;
    return Reject(state, "winner-sig", "the winner's signature does not verify");
}

bool CheckTrainingCertificate(const CBlock& block, int height, const Consensus::Params& params, BlockValidationState& state, std::optional<VerifiedCertificate>& certificate)
{
    if (!params.training || height < params.training->StartHeight()) return true;

    auto payload{ReadTrainingPayload(*block.vtx.at(0), state)};
    if (!payload) return false;
    if (!CheckHeight(payload->certificate, height, state)) return false;
    if (!CheckPrevBlock(payload->certificate, block, state)) return false;
    if (!CheckTotals(payload->certificate, state)) return false;
    const uint256 chain_id{TrainingChainId(params)};
    const uint256 sighash{CertificateSigHash(chain_id, payload->certificate)};
    if (!CheckCoordinatorSignatures(payload->certificate, params.training->KeysAt(height), sighash, state)) return false;
    if (!CheckWinnerSignature(*payload, block, chain_id, state)) return false;
    LogDebug(BCLog::VALIDATION, "Verified the training certificate of block %s\n", block.GetHash().ToString());
    certificate.emplace(std::move(payload->certificate), sighash);
    return true;
}

/** Reason: bad-traincert-award. */
static bool CheckAward(const TrainingCertificate& certificate, const TrainingParent* parent, BlockValidationState& state)
{
    const uint64_t table_weight{parent ? parent->contributions_weight : 0};
    if (certificate.draw.has_value() == (table_weight > 0)) return true;
    return Reject(state, "award", strprintf("%s, but the parent's table has weight %u", certificate.draw ? "drawn" : "appointed", table_weight));
}

/** Reason: bad-traincert-weight. */
static bool CheckWeight(const TrainingDraw& draw, BlockValidationState& state)
{
    if (draw.weight > 0 && CheckContributionWeight(draw.params, draw.loss_reduction, draw.weight)) return true;
    return Reject(state, "weight", strprintf("%u is not the weight of %u parameters and a loss reduction of %u", draw.weight, draw.params, draw.loss_reduction));
}

/** Reason: bad-traincert-draw. */
static bool CheckDraw(const TrainingCertificate& certificate, const TrainingDraw& draw, const TrainingParent& parent, BlockValidationState& state)
{
    const MerkleSumNode leaf{ContributionLeaf(certificate.winner_key, draw.update_hash, draw.params, draw.loss_reduction, draw.weight)};
    const auto path{FollowContributionPath(leaf, draw.index, parent.contributions_count, draw.siblings)};
    if (!path || path->root.hash != parent.contributions_root || path->root.sum != parent.contributions_weight) {
        return Reject(state, "draw", "the path does not end at the parent's root and total weight");
    }
    const uint64_t ticket{DrawTicket(certificate.beacon_reveal, certificate.prev_block, certificate.round, parent.contributions_weight)};
    if (ticket < path->start || ticket - path->start >= draw.weight) {
        return Reject(state, "draw", strprintf("ticket %u is not among the %u from %u on", ticket, draw.weight, path->start));
    }
    return true;
}

/** Reason: bad-traincert-beacon. */
static bool CheckBeacon(const TrainingCertificate& certificate, const TrainingParent* parent, const TrainingParams& params, BlockValidationState& state)
{
    uint256 beacon;
    CSHA256().Write(certificate.beacon_reveal.data(), certificate.beacon_reveal.size()).Finalize(beacon.data());
    const uint256& expected{parent ? parent->beacon_reveal : params.beacon};
    if (beacon == expected) return true;
    return Reject(state, "beacon", strprintf("the reveal's hash is %s, expected %s", HexStr(beacon), HexStr(expected)));
}

/** Reason: bad-traincert-model. */
static bool CheckModel(const TrainingCertificate& certificate, const TrainingParent* parent, const TrainingParams& params, BlockValidationState& state)
{
    const uint256& expected{parent ? parent->model_after : params.model};
    if (certificate.model_before == expected) return true;
    return Reject(state, "model", strprintf("starts from model %s, expected %s", HexStr(certificate.model_before), HexStr(expected)));
}

/** Reason: bad-traincert-round. */
static bool CheckRound(const TrainingCertificate& certificate, int64_t time, int64_t parent_time, const TrainingParams& params, BlockValidationState& state)
{
    const int64_t earliest{parent_time + int64_t{certificate.round} * params.round_seconds};
    if (certificate.round == 0 || time >= earliest) return true;
    return Reject(state, "round", strprintf("round %u at time %d, allowed from %d on", certificate.round, time, earliest));
}

bool ContextualCheckTrainingCertificate(const TrainingCertificate& certificate, const TrainingParent* parent, int64_t time, int64_t parent_time, const TrainingParams& params, BlockValidationState& state)
{
    if (!CheckAward(certificate, parent, state)) return false;
    if (certificate.draw) {
        if (!CheckWeight(*certificate.draw, state)) return false;
        // A drawn award means that there is a parent with a table.
        if (!CheckDraw(certificate, *certificate.draw, *parent, state)) return false;
    }
    if (!CheckBeacon(certificate, parent, params, state)) return false;
    if (!CheckModel(certificate, parent, params, state)) return false;
    return CheckRound(certificate, time, parent_time, params, state);
}
