// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TRAINING_CERTIFICATE_H
#define BITCOIN_TRAINING_CERTIFICATE_H

#include <pubkey.h>
#include <serialize.h>
#include <uint256.h>

#include <array>
#include <cstdint>
#include <ios>
#include <optional>
#include <vector>

/** A BIP340 signature. */
using SchnorrSignature = std::array<unsigned char, 64>;

/** A node of a Merkle-sum tree over a cycle's contributions: its hash, and the weight of all leaves below it. */
struct MerkleSumNode {
    uint256 hash;
    uint64_t sum{0};

    SERIALIZE_METHODS(MerkleSumNode, obj) { READWRITE(obj.hash, obj.sum); }
};

/** The winner's leaf in the parent's contribution table, and its path to the root. */
struct TrainingDraw {
    uint256 update_hash;
    uint64_t params{0};
    uint64_t loss_reduction{0}; //!< nano-nats
    uint64_t weight{0};
    uint32_t index{0};
    std::vector<MerkleSumNode> siblings; //!< leaf to root

    SERIALIZE_METHODS(TrainingDraw, obj) { READWRITE(obj.update_hash, obj.params, obj.loss_reduction, obj.weight, obj.index, obj.siblings); }
};

/** What the coordinator signs: one cycle's result, and who may append this block. */
struct TrainingCertificateBody {
    static constexpr uint8_t VERSION{1};

    uint8_t version{VERSION};
    uint32_t height{0};
    uint256 prev_block;
    uint16_t round{0}; //!< how often this slot was redrawn
    uint256 beacon_reveal;
    uint256 model_before;
    uint256 model_after;
    uint256 dataset_root;
    uint256 record;          //!< SHA-256 of the cycle's record, zeros if nothing was trained
    uint64_t loss_before{0}; //!< nano-nats
    uint64_t loss_after{0};  //!< nano-nats
    uint64_t params_trained{0};
    uint256 contributions_root;
    uint64_t contributions_weight{0};
    uint32_t contributions_count{0};
    XOnlyPubKey winner_key;
    std::optional<TrainingDraw> draw; //!< award: drawn if set, appointed if not

    SERIALIZE_METHODS(TrainingCertificateBody, obj)
    {
        READWRITE(obj.version, obj.height, obj.prev_block, obj.round, obj.beacon_reveal, obj.model_before, obj.model_after,
                  obj.dataset_root, obj.record, obj.loss_before, obj.loss_after, obj.params_trained, obj.contributions_root,
                  obj.contributions_weight, obj.contributions_count, obj.winner_key);
        uint8_t award{0};
        SER_WRITE(obj, award = obj.draw.has_value());
        READWRITE(award);
        if (award > 1) throw std::ios_base::failure("award is neither 0 nor 1");
        SER_READ(obj, if (award) obj.draw.emplace());
        if (award) READWRITE(*obj.draw);
    }
};

struct CoordinatorSignature {
    uint8_t key_index{0};
    SchnorrSignature signature{};

    SERIALIZE_METHODS(CoordinatorSignature, obj) { READWRITE(obj.key_index, obj.signature); }
};

/** A training certificate, version 1, byte for byte as in SPEC.md. */
struct TrainingCertificate : TrainingCertificateBody {
    std::vector<CoordinatorSignature> coordinator_signatures;

    SERIALIZE_METHODS(TrainingCertificate, obj) { READWRITE(AsBase<TrainingCertificateBody>(obj), obj.coordinator_signatures); }
};

/** A certificate whose signatures verify. */
struct VerifiedCertificate : TrainingCertificate {
    uint256 sighash; //!< what its coordinators signed
};

/** What the rules need of a parent's certificate. */
struct TrainingParent {
    uint256 beacon_reveal;
    uint256 model_after;
    uint256 contributions_root;
    uint64_t contributions_weight{0};
    uint32_t contributions_count{0};

    TrainingParent() = default;
    explicit TrainingParent(const TrainingCertificateBody& certificate)
        : beacon_reveal{certificate.beacon_reveal},
          model_after{certificate.model_after},
          contributions_root{certificate.contributions_root},
          contributions_weight{certificate.contributions_weight},
          contributions_count{certificate.contributions_count}
    {
    }

    SERIALIZE_METHODS(TrainingParent, obj) { READWRITE(obj.beacon_reveal, obj.model_after, obj.contributions_root, obj.contributions_weight, obj.contributions_count); }
};

#endif // BITCOIN_TRAINING_CERTIFICATE_H
