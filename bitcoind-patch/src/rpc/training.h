// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_RPC_TRAINING_H
#define BITCOIN_RPC_TRAINING_H

class CBlockHeader;
class ChainstateManager;

/** Throw a JSONRPCError if a block needs a training certificate, which this node cannot make. */
void EnsureNeedsNoCertificate(ChainstateManager& chainman, const CBlockHeader& block);

#endif // BITCOIN_RPC_TRAINING_H
