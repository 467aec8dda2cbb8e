// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TRAINING_BLOCKSDIR_H
#define BITCOIN_TRAINING_BLOCKSDIR_H

#include <util/fs.h>

#include <optional>
#include <string>

class CChainParams;

/**
 * Bind a directory of block files to the network that the -training... options define, by a file with its chain_id.
 *
 * @return an error, with nothing changed, if the blocks there were made on another training network, or on none
 */
std::optional<std::string> BindBlocksDir(const fs::path& blocks_dir, const CChainParams& chainparams);

#endif // BITCOIN_TRAINING_BLOCKSDIR_H
