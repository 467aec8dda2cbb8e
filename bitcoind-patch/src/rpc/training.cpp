// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#include <rpc/training.h>

#include <chain.h>
#include <consensus/params.h>
#include <consensus/validation.h>
#include <node/blockstorage.h>
#include <primitives/block.h>
#include <rpc/blockchain.h>
#include <rpc/protocol.h>
#include <rpc/register.h>
#include <rpc/request.h>
#include <rpc/server.h>
#include <rpc/server_util.h>
#include <rpc/util.h>
#include <sync.h>
#include <tinyformat.h>
#include <training/bodies.h>
#include <training/certificate.h>
#include <training/params.h>
#include <training/validation.h>
#include <uint256.h>
#include <univalue.h>
#include <util/check.h>
#include <util/strencodings.h>
#include <validation.h>

#include <optional>
#include <set>
#include <string>
#include <utility>

/** Whether blocks at a height need a certificate. */
static bool NeedsCertificate(const ChainstateManager& chainman, int height)
{
    const auto& training{chainman.GetConsensus().training};
    return training && height >= training->StartHeight();
}

void EnsureNeedsNoCertificate(ChainstateManager& chainman, const CBlockHeader& block)
{
    const CBlockIndex* prev{WITH_LOCK(cs_main, return chainman.m_blockman.LookupBlockIndex(block.hashPrevBlock))};
    const int height{CHECK_NONFATAL(prev)->nHeight + 1};
    if (!NeedsCertificate(chainman, height)) return;
    throw JSONRPCError(RPC_MISC_ERROR, strprintf("Block %d needs a training certificate (from height %d on): have the coordinator's winner build it and use submitblock",
                                                 height, chainman.GetConsensus().training->StartHeight()));
}

void EnsureTrainingRule(ChainstateManager& chainman, const uint256& tip, const std::set<std::string>& client_rules)
{
    const CBlockIndex* prev{chainman.m_blockman.LookupBlockIndex(tip)};
    if (NeedsCertificate(chainman, CHECK_NONFATAL(prev)->nHeight + 1) && !client_rules.contains("training")) {
        throw JSONRPCError(RPC_INVALID_PARAMETER, "getblocktemplate must be called with the training rule set (call with {\"rules\": [\"segwit\", \"training\"]})");
    }
}

void PushTrainingTemplate(ChainstateManager& chainman, const CBlockIndex& prev, UniValue& rules, UniValue& block_template)
{
    if (!NeedsCertificate(chainman, prev.nHeight + 1)) return;
    TrainingParent parent;
    parent.beacon_reveal = chainman.GetConsensus().training->beacon;
    if (NeedsCertificate(chainman, prev.nHeight)) {
        const auto entry{ReadTrainingParent(prev, chainman.m_blockman)};
        if (!entry) throw JSONRPCError(RPC_INTERNAL_ERROR, strprintf("The training_parent entry of block %s is missing from the block database", prev.GetBlockHash().ToString()));
        parent = *entry;
    }

    UniValue training{UniValue::VOBJ};
    training.pushKV("chain_id", HexStr(TrainingChainId(chainman.GetConsensus())));
    training.pushKV("height", prev.nHeight + 1);
    training.pushKV("contributions_root", HexStr(parent.contributions_root));
    training.pushKV("contributions_weight", parent.contributions_weight);
    training.pushKV("contributions_count", parent.contributions_count);
    training.pushKV("beacon_reveal", HexStr(parent.beacon_reveal));
    rules.push_back("!training");
    block_template.pushKV("training", std::move(training));
}

void PushTrainingChainId(const ChainstateManager& chainman, UniValue& info)
{
    if (chainman.GetConsensus().training) info.pushKV("training_chain_id", HexStr(TrainingChainId(chainman.GetConsensus())));
}

void PushTrainingDeployment(const ChainstateManager& chainman, const CBlockIndex& index, UniValue& deployments)
{
    if (!chainman.GetConsensus().training) return;
    UniValue training{UniValue::VOBJ};
    training.pushKV("type", "buried");
    training.pushKV("active", NeedsCertificate(chainman, index.nHeight + 1)); // as of the others: for the next block
    training.pushKV("height", chainman.GetConsensus().training->StartHeight());
    deployments.pushKV("training", std::move(training));
}

bool WasLeftAlone(ChainstateManager& chainman, const CBlock& block)
{
    LOCK(cs_main);
    const CBlockIndex* index{chainman.m_blockman.LookupBlockIndex(block.GetHash())};
    return index && chainman.m_training.IsLeftAlone(*index, chainman.m_blockman);
}

RPCResult TrainingTemplateResult()
{
    // clang-format off
    return {
        RPCResult::Type::OBJ, "training", /*optional=*/true, "what the next block's training certificate must continue (only if the block needs one)", {
            {RPCResult::Type::STR_HEX, "chain_id", "identifies the network: every signature covers it"},
            {RPCResult::Type::NUM, "height", "the height of the next block"},
            {RPCResult::Type::STR_HEX, "contributions_root", "Merkle-sum root of the parent's contributions, from which the winner is drawn"},
            {RPCResult::Type::NUM, "contributions_weight", "total weight of the parent's contributions, 0 if the coordinator appoints the winner"},
            {RPCResult::Type::NUM, "contributions_count", "number of the parent's contributions"},
            {RPCResult::Type::STR_HEX, "beacon_reveal", "the parent's beacon_reveal, at the start height the beacon's anchor: this block must reveal its preimage"},
        },
    };
    // clang-format on
}

static const TrainingParams& EnsureTrainingNetwork(const ChainstateManager& chainman)
{
    if (!chainman.GetConsensus().training) throw JSONRPCError(RPC_MISC_ERROR, "This is not a training network: the node was started without -trainingkeys");
    return *chainman.GetConsensus().training;
}

/** The payload of a block at or above the start height, read back from disk. */
static TrainingPayload ReadPayload(ChainstateManager& chainman, const CBlockIndex& index)
{
    WITH_LOCK(cs_main, CheckBlockDataAvailability(chainman.m_blockman, index, /*check_for_undo=*/false));
    CBlock block;
    if (!chainman.m_blockman.ReadBlock(block, index)) throw JSONRPCError(RPC_MISC_ERROR, "Block not found on disk");
    BlockValidationState state;
    auto payload{ReadTrainingPayload(*block.vtx.at(0), state)};
    if (!payload) throw JSONRPCError(RPC_INTERNAL_ERROR, strprintf("Stored block %s: %s", index.GetBlockHash().ToString(), state.ToString()));
    return *std::move(payload);
}

static UniValue DrawToJSON(const TrainingDraw& draw)
{
    UniValue siblings{UniValue::VARR};
    for (const auto& sibling : draw.siblings) {
        UniValue node{UniValue::VOBJ};
        node.pushKV("hash", HexStr(sibling.hash));
        node.pushKV("sum", sibling.sum);
        siblings.push_back(std::move(node));
    }
    UniValue result{UniValue::VOBJ};
    result.pushKV("update_hash", HexStr(draw.update_hash));
    result.pushKV("params", draw.params);
    result.pushKV("loss_reduction", draw.loss_reduction);
    result.pushKV("weight", draw.weight);
    result.pushKV("index", draw.index);
    result.pushKV("siblings", std::move(siblings));
    return result;
}

static UniValue CertificateToJSON(const TrainingCertificate& certificate)
{
    UniValue signatures{UniValue::VARR};
    for (const auto& [key_index, signature] : certificate.coordinator_signatures) {
        UniValue entry{UniValue::VOBJ};
        entry.pushKV("key_index", key_index);
        entry.pushKV("signature", HexStr(signature));
        signatures.push_back(std::move(entry));
    }
    UniValue result{UniValue::VOBJ};
    result.pushKV("version", certificate.version);
    result.pushKV("height", certificate.height);
    result.pushKV("prev_block", certificate.prev_block.GetHex());
    result.pushKV("round", certificate.round);
    result.pushKV("beacon_reveal", HexStr(certificate.beacon_reveal));
    result.pushKV("model_before", HexStr(certificate.model_before));
    result.pushKV("model_after", HexStr(certificate.model_after));
    result.pushKV("dataset_root", HexStr(certificate.dataset_root));
    result.pushKV("record", HexStr(certificate.record));
    result.pushKV("loss_before", certificate.loss_before);
    result.pushKV("loss_after", certificate.loss_after);
    result.pushKV("params_trained", certificate.params_trained);
    result.pushKV("contributions_root", HexStr(certificate.contributions_root));
    result.pushKV("contributions_weight", certificate.contributions_weight);
    result.pushKV("contributions_count", certificate.contributions_count);
    result.pushKV("winner_key", HexStr(certificate.winner_key));
    result.pushKV("award", certificate.draw ? "drawn" : "appointed");
    if (certificate.draw) result.pushKV("draw", DrawToJSON(*certificate.draw));
    result.pushKV("coordinator_signatures", std::move(signatures));
    return result;
}

UniValue TrainingPayloadToJSON(const uint256& block_hash, const TrainingPayload& payload)
{
    UniValue result{UniValue::VOBJ};
    result.pushKV("blockhash", block_hash.GetHex());
    result.pushKVs(CertificateToJSON(payload.certificate));
    result.pushKV("winner_signature", HexStr(payload.winner_signature));
    return result;
}

static RPCMethod gettrainingcertificate()
{
    return RPCMethod{
        "gettrainingcertificate",
        "Returns the training certificate of a block.\n"
        "Hashes are in the order of their bytes, except for those of blocks, which are reversed as everywhere.\n"
        "Losses are in nano-nats (loss times 10^9).\n",
        {
            {"hash_or_height", RPCArg::Type::NUM, RPCArg::DefaultHint{"the tip"}, "The block hash or height of the block", RPCArgOptions{.skip_type_check = true, .type_str = {"", "string or numeric"}}},
        },
        // clang-format off
        RPCResult{
            RPCResult::Type::OBJ, "", "", {
                {RPCResult::Type::STR_HEX, "blockhash", "the hash of the block that carries the certificate"},
                {RPCResult::Type::NUM, "version", "the certificate's version"},
                {RPCResult::Type::NUM, "height", "the block's height"},
                {RPCResult::Type::STR_HEX, "prev_block", "the hash of the previous block"},
                {RPCResult::Type::NUM, "round", "how often the slot was redrawn because the winner was absent"},
                {RPCResult::Type::STR_HEX, "beacon_reveal", "the preimage of the parent's beacon_reveal"},
                {RPCResult::Type::STR_HEX, "model_before", "hash of the model that this cycle started from"},
                {RPCResult::Type::STR_HEX, "model_after", "hash of the model that this cycle produced"},
                {RPCResult::Type::STR_HEX, "dataset_root", "hash of the manifest of the data set"},
                {RPCResult::Type::STR_HEX, "record", "SHA-256 of the cycle's record, zeros if nothing was trained"},
                {RPCResult::Type::NUM, "loss_before", "validation loss of model_before"},
                {RPCResult::Type::NUM, "loss_after", "validation loss of model_after"},
                {RPCResult::Type::NUM, "params_trained", "number of parameters trained, summed over the contributions"},
                {RPCResult::Type::STR_HEX, "contributions_root", "Merkle-sum root of the contributions, from which the next block's winner is drawn"},
                {RPCResult::Type::NUM, "contributions_weight", "total weight of the contributions"},
                {RPCResult::Type::NUM, "contributions_count", "number of contributions"},
                {RPCResult::Type::STR_HEX, "winner_key", "the x-only key that signed this block"},
                {RPCResult::Type::STR, "award", "\"drawn\" from the parent's contributions or \"appointed\" by the coordinator"},
                {RPCResult::Type::OBJ, "draw", /*optional=*/true, "the winner's contribution in the parent's table (if drawn)", {
                    {RPCResult::Type::STR_HEX, "update_hash", "hash of the winner's update"},
                    {RPCResult::Type::NUM, "params", "number of parameters that the winner trained"},
                    {RPCResult::Type::NUM, "loss_reduction", "by how much the winner's update reduced the validation loss"},
                    {RPCResult::Type::NUM, "weight", "the winner's weight in the lottery"},
                    {RPCResult::Type::NUM, "index", "position of the leaf in the table"},
                    {RPCResult::Type::ARR, "siblings", "path from the leaf to the root", {
                        {RPCResult::Type::OBJ, "", "", {
                            {RPCResult::Type::STR_HEX, "hash", "the node's hash"},
                            {RPCResult::Type::NUM, "sum", "the weight of all leaves below it"},
                        }},
                    }},
                }},
                {RPCResult::Type::ARR, "coordinator_signatures", "", {
                    {RPCResult::Type::OBJ, "", "", {
                        {RPCResult::Type::NUM, "key_index", "position of the key among those in force"},
                        {RPCResult::Type::STR_HEX, "signature", "BIP340 signature over the certificate"},
                    }},
                }},
                {RPCResult::Type::STR_HEX, "winner_signature", "the winner's BIP340 signature over the block"},
            },
        },
        // clang-format on
        RPCExamples{HelpExampleCli("gettrainingcertificate", "") + HelpExampleCli("gettrainingcertificate", "1") + HelpExampleRpc("gettrainingcertificate", "1")},
        [](const RPCMethod& self, const JSONRPCRequest& request) -> UniValue {
            ChainstateManager& chainman{EnsureAnyChainman(request.context)};
            const TrainingParams& training{EnsureTrainingNetwork(chainman)};
            const CBlockIndex& index{*CHECK_NONFATAL(request.params[0].isNull() ? WITH_LOCK(cs_main, return chainman.ActiveTip()) : ParseHashOrHeight(request.params[0], chainman))};
            if (!NeedsCertificate(chainman, index.nHeight)) {
                throw JSONRPCError(RPC_INVALID_PARAMETER, strprintf("Block %d has no training certificate: they start at height %d", index.nHeight, training.StartHeight()));
            }
            return TrainingPayloadToJSON(index.GetBlockHash(), ReadPayload(chainman, index));
        },
    };
}

static RPCMethod gettraininginfo()
{
    return RPCMethod{
        "gettraininginfo",
        "Returns what defines the training network, and the state of training at the tip.\n",
        {},
        // clang-format off
        RPCResult{
            RPCResult::Type::OBJ, "", "", {
                {RPCResult::Type::STR_HEX, "chain_id", "identifies the network: every signature covers it"},
                {RPCResult::Type::NUM, "start_height", "from this height on blocks need a certificate"},
                {RPCResult::Type::ARR, "keys", "the coordinator's keys", {
                    {RPCResult::Type::OBJ, "", "", {
                        {RPCResult::Type::NUM, "height", "the height from which they are in force"},
                        {RPCResult::Type::NUM, "threshold", "how many of them must sign"},
                        {RPCResult::Type::ARR, "keys", "", {{RPCResult::Type::STR_HEX, "key", "x-only public key"}}},
                        {RPCResult::Type::BOOL, "in_force", "whether they sign the next block's certificate"},
                    }},
                }},
                {RPCResult::Type::STR_HEX, "beacon", "anchor of the coordinator's beacon"},
                {RPCResult::Type::NUM, "round_seconds", "seconds after which an absent winner may be redrawn"},
                {RPCResult::Type::NUM, "height", "the tip's height"},
                {RPCResult::Type::STR_HEX, "model", "hash of the model that the next cycle starts from"},
                {RPCResult::Type::NUM, "loss", /*optional=*/true, "validation loss of that model in nano-nats (if the tip has a certificate)"},
                {RPCResult::Type::NUM, "contributions_weight", "total weight of the table from which the next winner is drawn, 0 if the coordinator appoints"},
            },
        },
        // clang-format on
        RPCExamples{HelpExampleCli("gettraininginfo", "") + HelpExampleRpc("gettraininginfo", "")},
        [](const RPCMethod& self, const JSONRPCRequest& request) -> UniValue {
            ChainstateManager& chainman{EnsureAnyChainman(request.context)};
            const TrainingParams& training{EnsureTrainingNetwork(chainman)};
            LOCK(cs_main);
            const CBlockIndex& tip{*CHECK_NONFATAL(chainman.ActiveTip())};

            UniValue rotations{UniValue::VARR};
            for (const auto& [height, keys] : training.keys) {
                UniValue xonly{UniValue::VARR};
                for (const auto& key : keys.keys)
                    xonly.push_back(HexStr(key));
                UniValue entry{UniValue::VOBJ};
                entry.pushKV("height", height);
                entry.pushKV("threshold", keys.threshold);
                entry.pushKV("keys", std::move(xonly));
                entry.pushKV("in_force", tip.nHeight + 1 >= training.StartHeight() && &training.KeysAt(tip.nHeight + 1) == &keys);
                rotations.push_back(std::move(entry));
            }
            UniValue result{UniValue::VOBJ};
            result.pushKV("chain_id", HexStr(TrainingChainId(chainman.GetConsensus())));
            result.pushKV("start_height", training.StartHeight());
            result.pushKV("keys", std::move(rotations));
            result.pushKV("beacon", HexStr(training.beacon));
            result.pushKV("round_seconds", training.round_seconds);
            result.pushKV("height", tip.nHeight);
            if (tip.nHeight < training.StartHeight()) {
                result.pushKV("model", HexStr(training.model));
                result.pushKV("contributions_weight", 0);
            } else {
                const TrainingCertificate certificate{ReadPayload(chainman, tip).certificate};
                result.pushKV("model", HexStr(certificate.model_after));
                result.pushKV("loss", certificate.loss_after);
                result.pushKV("contributions_weight", certificate.contributions_weight);
            }
            return result;
        },
    };
}

static RPCMethod gettrainingequivocations()
{
    return RPCMethod{
        "gettrainingequivocations",
        "Returns the certificates under which the winner signed more than one block that this node stored.\n"
        "The blocks are the evidence: each has the winner's signature.\n",
        {},
        // clang-format off
        RPCResult{
            RPCResult::Type::ARR, "", "by height and round", {
                {RPCResult::Type::OBJ, "", "", {
                    {RPCResult::Type::NUM, "height", "the slot's height"},
                    {RPCResult::Type::NUM, "round", "the certificate's round"},
                    {RPCResult::Type::STR_HEX, "winner_key", "the x-only key that signed the blocks"},
                    {RPCResult::Type::ARR, "blocks", "the stored blocks, valid or not, in the order of arrival", {{RPCResult::Type::STR_HEX, "hash", "the block's hash"}}},
                }},
            },
        },
        // clang-format on
        RPCExamples{HelpExampleCli("gettrainingequivocations", "") + HelpExampleRpc("gettrainingequivocations", "")},
        [](const RPCMethod& self, const JSONRPCRequest& request) -> UniValue {
            ChainstateManager& chainman{EnsureAnyChainman(request.context)};
            EnsureTrainingNetwork(chainman);
            UniValue result{UniValue::VARR};
            for (const auto& bodies : WITH_LOCK(cs_main, return ListEquivocations(chainman.m_blockman))) {
                UniValue blocks{UniValue::VARR};
                for (const auto& hash : bodies.blocks)
                    blocks.push_back(hash.GetHex());
                UniValue entry{UniValue::VOBJ};
                entry.pushKV("height", bodies.height);
                entry.pushKV("round", bodies.round);
                entry.pushKV("winner_key", HexStr(bodies.winner_key));
                entry.pushKV("blocks", std::move(blocks));
                result.push_back(std::move(entry));
            }
            return result;
        },
    };
}

void RegisterTrainingRPCCommands(CRPCTable& t)
{
    static const CRPCCommand commands[]{
        {"blockchain", &gettrainingcertificate},
        {"blockchain", &gettrainingequivocations},
        {"blockchain", &gettraininginfo},
    };
    for (const auto& c : commands) {
        t.appendCommand(c.name, &c);
    }
}
