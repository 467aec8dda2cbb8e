// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TRAINING_PARAMS_H
#define BITCOIN_TRAINING_PARAMS_H

#include <pubkey.h>
#include <uint256.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <vector>

/** The coordinator's keys, of which threshold must sign each certificate. */
struct TrainingKeys {
    uint8_t threshold;
    std::vector<XOnlyPubKey> keys;
};

/** What defines a training network: set by the -training... options, never empty. */
struct TrainingParams {
    std::map<int, TrainingKeys> keys; //!< each from its height on, until the next one's
    uint256 beacon;                   //!< anchor of the beacon, a SHA-256 hash chain
    uint32_t round_seconds{60};       //!< after which an absent winner may be redrawn
    uint256 model;                    //!< model_before of the first certificate

    /** The height from which on blocks need a certificate. */
    int StartHeight() const { return keys.begin()->first; }

    /** The keys in force at a height, which must not be below the start height. */
    const TrainingKeys& KeysAt(int height) const { return std::prev(keys.upper_bound(height))->second; }
};

#endif // BITCOIN_TRAINING_PARAMS_H
