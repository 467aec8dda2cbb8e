// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TRAINING_VALIDATION_H
#define BITCOIN_TRAINING_VALIDATION_H

#include <training/certificate.h>
#include <uint256.h>

#include <cstddef>
#include <optional>

class BlockValidationState;
class CBlock;
class CBlockHeader;
class CTransaction;
namespace Consensus {
struct Params;
} // namespace Consensus

/** What a coinbase carries on a training network. */
struct TrainingPayload {
    TrainingCertificate certificate;
    SchnorrSignature winner_signature;
    size_t output{0}; //!< the coinbase output that it is in, whose script ends with winner_signature
};

/** Identifies a training network: commits to its genesis block and all -training... options. */
uint256 TrainingChainId(const Consensus::Params& params);

/** What coordinators sign (BIP340). */
uint256 CertificateSigHash(const uint256& chain_id, const TrainingCertificateBody& body);

/** What the winner signs (BIP340): the block's header, with the Merkle root that it has while winner_signature is zero. */
uint256 WinnerSigHash(const uint256& chain_id, const CBlock& block, size_t output);

/** Find and decode the payload. If there is none, several or a malformed one, state says so. */
std::optional<TrainingPayload> ReadTrainingPayload(const CTransaction& coinbase, BlockValidationState& state);

/** Check the proof of work of a header below the start height: true at other heights and on networks without training. */
bool CheckTrainingHeader(const CBlockHeader& header, int height, const Consensus::Params& params, BlockValidationState& state);

/**
 * Check all that a block's certificate must fulfil by itself: true on networks and at heights that need none.
 *
 * Expects that CheckBlock and ContextualCheckBlock have passed. Does not look at the parent's certificate, so it does
 * not know whether the draw was fair nor whether beacon and model continue the parent's.
 */
bool CheckTrainingCertificate(const CBlock& block, int height, const Consensus::Params& params, BlockValidationState& state);

#endif // BITCOIN_TRAINING_VALIDATION_H
