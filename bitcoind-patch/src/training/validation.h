// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TRAINING_VALIDATION_H
#define BITCOIN_TRAINING_VALIDATION_H

#include <training/certificate.h>
#include <uint256.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

class BlockValidationState;
class CBlock;
class CBlockHeader;
class CTransaction;
struct TrainingParams;
namespace Consensus {
struct Params;
} // namespace Consensus

/** The bytes that a payload starts with. */
inline constexpr std::array<uint8_t, 4> TRAINING_PAYLOAD_MAGIC{'T', 'C', 'R', 'T'};

/** What a coinbase carries on a training network, after the magic. */
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
 * The block alone: check all that a block's certificate must fulfil by itself. True on networks and at heights that need
 * none.
 *
 * Expects that CheckBlock and ContextualCheckBlock have passed.
 *
 * @param[out] certificate  the block's, if it needs one and it is valid
 */
bool CheckTrainingCertificate(const CBlock& block, int height, const Consensus::Params& params, BlockValidationState& state, std::optional<VerifiedCertificate>& certificate);

/**
 * With the parent: check that a certificate's draw is fair, that beacon and model continue the parent's, and that its
 * slot was not redrawn too early.
 *
 * Expects that CheckTrainingCertificate has passed for both.
 *
 * @param[in] parent       of the parent's certificate, nullptr at the start height
 * @param[in] time         the nTime of the certificate's block
 * @param[in] parent_time  the nTime of the parent, which there is at the start height too
 */
bool ContextualCheckTrainingCertificate(const TrainingCertificate& certificate, const TrainingParent* parent, int64_t time, int64_t parent_time, const TrainingParams& params, BlockValidationState& state);

#endif // BITCOIN_TRAINING_VALIDATION_H
