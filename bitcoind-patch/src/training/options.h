// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TRAINING_OPTIONS_H
#define BITCOIN_TRAINING_OPTIONS_H

#include <util/chaintype.h>

#include <memory>

class ArgsManager;
struct TrainingParams;

/** Register the -training... options. */
void SetupTrainingOptions(ArgsManager& argsman);

/**
 * Read the -training... options.
 *
 * @return nullptr if none is given
 * @throws std::runtime_error naming option and value if one is malformed, missing, given twice, contradictory, or if
 *         the chain is not regtest
 */
std::shared_ptr<const TrainingParams> ReadTrainingOptions(const ArgsManager& args, ChainType chain);

#endif // BITCOIN_TRAINING_OPTIONS_H
