// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_RPC_TRAINING_H
#define BITCOIN_RPC_TRAINING_H

#include <kernel/cs_main.h>
#include <sync.h>

#include <set>
#include <string>

class CBlock;
class CBlockHeader;
class CBlockIndex;
class ChainstateManager;
struct RPCResult;
struct TrainingPayload;
class UniValue;
class uint256;

/** Throw a JSONRPCError if a block needs a training certificate, which this node cannot make. */
void EnsureNeedsNoCertificate(ChainstateManager& chainman, const CBlockHeader& block);

/** Throw a JSONRPCError if the block after tip needs a certificate and the caller of getblocktemplate does not know the rule. */
void EnsureTrainingRule(ChainstateManager& chainman, const uint256& tip, const std::set<std::string>& client_rules) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

/** Add what a block producer needs to a template, if the block after prev needs a certificate. */
void PushTrainingTemplate(ChainstateManager& chainman, const CBlockIndex& prev, UniValue& rules, UniValue& block_template) EXCLUSIVE_LOCKS_REQUIRED(::cs_main);

/** Add the field of getblockchaininfo that identifies the training network, if there is one. */
void PushTrainingChainId(const ChainstateManager& chainman, UniValue& info);

/** Add the training network's start height to deployments, as that of a buried deployment. */
void PushTrainingDeployment(const ChainstateManager& chainman, const CBlockIndex& index, UniValue& deployments);

/** Whether a block that was just submitted was not stored, because two others of its certificate are. */
bool WasLeftAlone(ChainstateManager& chainman, const CBlock& block);

/** The help text of what PushTrainingTemplate adds. */
RPCResult TrainingTemplateResult();

/** A block's payload as gettrainingcertificate and REST show it. */
UniValue TrainingPayloadToJSON(const uint256& block_hash, const TrainingPayload& payload);

#endif // BITCOIN_RPC_TRAINING_H
