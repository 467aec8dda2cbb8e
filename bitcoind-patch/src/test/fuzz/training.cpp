// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#include <arith_uint256.h>
#include <consensus/amount.h>
#include <consensus/params.h>
#include <consensus/validation.h>
#include <crypto/sha256.h>
#include <hash.h>
#include <key.h>
#include <primitives/block.h>
#include <primitives/transaction.h>
#include <pubkey.h>
#include <script/script.h>
#include <serialize.h>
#include <streams.h>
#include <test/fuzz/FuzzedDataProvider.h>
#include <test/fuzz/fuzz.h>
#include <test/fuzz/util.h>
#include <test/util/contribution_tree.h>
#include <training/certificate.h>
#include <training/lottery.h>
#include <training/params.h>
#include <training/validation.h>
#include <uint256.h>
#include <util/overflow.h>

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <ios>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr uint64_t MAX_U64{std::numeric_limits<uint64_t>::max()};

/** Reasons of what is wrong with a payload, and of what is wrong with a certificate by itself. */
const std::set<std::string> PAYLOAD_REASONS{"bad-traincert-missing", "bad-traincert-multiple", "bad-traincert-parse", "bad-traincert-version"};
const std::set<std::string> CERTIFICATE_REASONS{"bad-traincert-height", "bad-traincert-prevblock", "bad-traincert-totals", "bad-traincert-coordinator-sig", "bad-traincert-winner-sig"};

/** The largest coordinator, and a few miners: secret i + 1 is key i. */
constexpr size_t COORDINATOR_KEYS{16};
constexpr size_t MINER_KEYS{4};

/** Made in full before it is kept, so that it goes before the locked memory that it is in. */
const std::vector<CKey>& Secrets()
{
    static const std::vector<CKey> secrets{[] {
        std::vector<CKey> keys(COORDINATOR_KEYS + MINER_KEYS);
        for (size_t i{0}; i < keys.size(); ++i) {
            const uint256 secret{uint8_t(i + 1)};
            keys[i].Set(secret.begin(), secret.end(), /*fCompressedIn=*/true);
        }
        return keys;
    }()};
    return secrets;
}

std::vector<XOnlyPubKey> g_keys;

void initialize_training()
{
    static const ECC_Context ecc_context{};
    for (const CKey& secret : Secrets()) {
        g_keys.emplace_back(secret.GetPubKey());
    }
}

SchnorrSignature Sign(size_t key, const uint256& hash)
{
    SchnorrSignature signature;
    const bool signed_ok{Secrets().at(key).SignSchnorr(hash, signature, /*merkle_root=*/nullptr, /*aux=*/uint256::ZERO)};
    assert(signed_ok);
    return signature;
}

template <typename... Args>
std::vector<unsigned char> Encode(const Args&... args)
{
    std::vector<unsigned char> bytes;
    VectorWriter{bytes, 0, args...};
    return bytes;
}

CScript PayloadScript(const TrainingCertificate& certificate, const SchnorrSignature& winner_signature)
{
    return CScript{} << OP_RETURN << Encode(TRAINING_PAYLOAD_MAGIC, certificate, winner_signature);
}

/** A verdict must be the same each time, and say why if it is no. */
template <typename Check>
std::string GetReason(Check check)
{
    BlockValidationState state, again;
    const bool valid{check(state)};
    assert(valid == state.IsValid());
    assert(valid == state.GetRejectReason().empty());
    assert(valid == check(again));
    assert(state.ToString() == again.ToString());
    if (!valid) assert(state.GetResult() == BlockValidationResult::BLOCK_CONSENSUS);
    return state.GetRejectReason();
}

std::string GetAloneReason(const CBlock& block, int height, const Consensus::Params& params)
{
    return GetReason([&](auto& state) {
        std::optional<VerifiedCertificate> certificate;
        const bool valid{CheckTrainingCertificate(block, height, params, state, certificate)};
        assert(valid || !certificate);
        return valid;
    });
}

/** floor(sqrt(x)) of an x below 2^128, bit by bit. */
uint64_t SquareRoot(const arith_uint256& x)
{
    uint64_t root{0};
    for (uint64_t bit{uint64_t{1} << 63}; bit > 0; bit >>= 1) {
        const arith_uint256 larger{root | bit};
        if (larger * larger <= x) root |= bit;
    }
    return root;
}

/** An integer that is often at one of the edges where sums and products overflow. */
uint64_t ConsumeU64(FuzzedDataProvider& provider)
{
    return provider.PickValueInArray<uint64_t>({0, 1, 2, std::numeric_limits<uint32_t>::max(), MAX_U64 / 2, MAX_U64 - 1, MAX_U64, provider.ConsumeIntegral<uint64_t>()});
}

std::vector<MerkleSumNode> ConsumeNodes(FuzzedDataProvider& provider, unsigned max)
{
    std::vector<MerkleSumNode> nodes;
    LIMITED_WHILE(provider.ConsumeBool(), max)
    {
        nodes.push_back({ConsumeUInt256(provider), ConsumeU64(provider)});
    }
    return nodes;
}

/** Whether a script carries a payload, as SPEC.md says it. */
bool CarriesPayload(std::span<const unsigned char> script)
{
    if (script.size() < 2 || script[0] != OP_RETURN) return false;
    const size_t opcode{script[1]};
    script = script.subspan(2);
    size_t size{opcode};
    if (opcode >= OP_PUSHDATA1) {
        if (opcode > OP_PUSHDATA4) return false;
        const size_t length_bytes{size_t{1} << (opcode - OP_PUSHDATA1)};
        if (script.size() < length_bytes) return false;
        size = 0;
        for (size_t i{0}; i < length_bytes; ++i) {
            size |= size_t{script[i]} << (8 * i);
        }
        script = script.subspan(length_bytes);
    }
    return size >= TRAINING_PAYLOAD_MAGIC.size() && script.size() >= size && std::equal(TRAINING_PAYLOAD_MAGIC.begin(), TRAINING_PAYLOAD_MAGIC.end(), script.begin());
}

} // namespace

FUZZ_TARGET(training_payload, .init = initialize_training)
{
    TrainingCertificate certificate;
    SchnorrSignature winner_signature;
    SpanReader reader{buffer};
    bool decodes{false};
    try {
        reader >> certificate >> winner_signature;
        decodes = reader.empty();
    } catch (const std::ios_base::failure&) {
    }
    if (decodes) assert(std::ranges::equal(Encode(certificate, winner_signature), buffer));

    auto push{Encode(TRAINING_PAYLOAD_MAGIC)};
    push.insert(push.end(), buffer.begin(), buffer.end());
    CMutableTransaction coinbase;
    coinbase.vin.emplace_back();
    coinbase.vout.emplace_back(0, CScript{} << OP_RETURN << push);
    CBlock block;
    block.vtx.push_back(MakeTransactionRef(coinbase));

    std::optional<TrainingPayload> payload;
    const std::string reason{GetReason([&](auto& state) {
        payload = ReadTrainingPayload(*block.vtx[0], state);
        return payload.has_value();
    })};
    const bool other_version{!buffer.empty() && buffer[0] != TrainingCertificate::VERSION};
    assert(reason == (other_version ? "bad-traincert-version" : decodes ? "" :
                                                                          "bad-traincert-parse"));
    if (!payload) return;
    assert(payload->output == 0);
    assert(PayloadScript(payload->certificate, payload->winner_signature) == coinbase.vout[0].scriptPubKey);

    // No key of this network has signed anything: it is refused, after as many checks as it passes.
    Consensus::Params params;
    auto training{std::make_shared<TrainingParams>()};
    training->keys.emplace(1, TrainingKeys{.threshold = 2, .keys = {g_keys.begin(), g_keys.begin() + 3}});
    params.training = training;
    block.hashPrevBlock = certificate.prev_block;
    const int height{int(certificate.height & std::numeric_limits<int>::max())};
    const std::string verdict{GetAloneReason(block, height, params)};
    assert(verdict.empty() ? height == 0 : CERTIFICATE_REASONS.contains(verdict));
}

FUZZ_TARGET(training_coinbase)
{
    FuzzedDataProvider provider{buffer.data(), buffer.size()};
    CMutableTransaction coinbase;
    LIMITED_WHILE(provider.remaining_bytes() > 0, 4)
    {
        std::vector<unsigned char> script;
        if (provider.ConsumeBool()) { // OP_RETURN and any form of push, or almost
            const uint8_t opcode{provider.PickValueInArray<uint8_t>({OP_PUSHDATA1, OP_PUSHDATA2, OP_PUSHDATA4, provider.ConsumeIntegral<uint8_t>()})};
            script = {OP_RETURN, opcode};
            const uint32_t size{provider.ConsumeIntegralInRange<uint32_t>(0, 600)};
            for (int i{0}; opcode >= OP_PUSHDATA1 && opcode <= OP_PUSHDATA4 && i < 1 << (opcode - OP_PUSHDATA1); ++i) {
                script.push_back(uint8_t(size >> (8 * i)));
            }
            script.insert(script.end(), TRAINING_PAYLOAD_MAGIC.begin(), TRAINING_PAYLOAD_MAGIC.end());
        }
        const auto rest{ConsumeRandomLengthByteVector(provider)};
        script.insert(script.end(), rest.begin(), rest.end());
        coinbase.vout.emplace_back(0, CScript{script.begin(), script.end()});
    }

    std::optional<TrainingPayload> payload;
    const std::string reason{GetReason([&](auto& state) {
        payload = ReadTrainingPayload(CTransaction{coinbase}, state);
        return payload.has_value();
    })};
    const auto carrying{std::ranges::count_if(coinbase.vout, [](const CTxOut& output) { return CarriesPayload(output.scriptPubKey); })};
    assert((reason == "bad-traincert-missing") == (carrying == 0));
    assert((reason == "bad-traincert-multiple") == (carrying > 1));
    if (payload) {
        assert(PayloadScript(payload->certificate, payload->winner_signature) == coinbase.vout.at(payload->output).scriptPubKey);
    } else {
        assert(PAYLOAD_REASONS.contains(reason));
    }
}

FUZZ_TARGET(training_lottery)
{
    FuzzedDataProvider provider{buffer.data(), buffer.size()};

    // The weight is the square root, and nothing else is.
    const uint64_t params{ConsumeU64(provider)};
    const uint64_t loss_reduction{ConsumeU64(provider)};
    const uint64_t weight{SquareRoot(arith_uint256{params} * arith_uint256{loss_reduction})};
    assert(CheckContributionWeight(params, loss_reduction, weight));
    if (weight > 0) assert(!CheckContributionWeight(params, loss_reduction, weight - 1));
    if (weight < MAX_U64) assert(!CheckContributionWeight(params, loss_reduction, weight + 1));
    const uint64_t other_weight{ConsumeU64(provider)};
    assert(CheckContributionWeight(params, loss_reduction, other_weight) == (other_weight == weight));

    // The ticket is the rest of the draw's hash, a digit at a time.
    const uint256 beacon_reveal{ConsumeUInt256(provider)};
    const uint256 prev_block{ConsumeUInt256(provider)};
    const uint16_t round{provider.ConsumeIntegral<uint16_t>()};
    const uint64_t total{std::max<uint64_t>(ConsumeU64(provider), 1)};
    const uint64_t ticket{DrawTicket(beacon_reveal, prev_block, round, total)};
    arith_uint256 rest{0};
    for (const unsigned char digit : (HashWriter{TaggedHash("traincert/draw")} << beacon_reveal << prev_block << round).GetSHA256()) {
        rest = (rest << 8) + digit;
        rest -= rest / total * arith_uint256{total};
    }
    assert(ticket < total);
    assert(rest == ticket);

    // In a tree, each leaf's path ends at the root and starts where the weights before it end.
    std::vector<MerkleSumNode> leaves;
    uint64_t sum{0};
    LIMITED_WHILE(provider.ConsumeBool(), 40)
    {
        const uint64_t leaf_weight{ConsumeU64(provider)};
        if (!CheckedAdd(sum, leaf_weight)) break;
        sum += leaf_weight;
        leaves.push_back({ConsumeUInt256(provider), leaf_weight});
    }
    if (!leaves.empty()) {
        const ContributionTree tree{BuildContributionTree(leaves)};
        const MerkleSumNode& root{tree.back()[0]};
        assert(root.sum == sum);
        uint64_t start{0};
        for (uint32_t i{0}; i < leaves.size(); ++i) {
            const auto path{FollowContributionPath(leaves[i], i, leaves.size(), GetContributionPath(tree, i))};
            assert(path);
            assert(path->root.hash == root.hash && path->root.sum == root.sum);
            assert(path->start == start);
            start += leaves[i].sum;
        }
    }

    // An accepted path of anything lies within the total, and another leaf or sibling ends at another root.
    MerkleSumNode leaf{ConsumeUInt256(provider), ConsumeU64(provider)};
    const uint32_t count{provider.ConsumeIntegral<uint32_t>()};
    const uint32_t index{provider.ConsumeBool() ? provider.ConsumeIntegralInRange<uint32_t>(0, count) : provider.ConsumeIntegral<uint32_t>()};
    std::vector<MerkleSumNode> siblings{ConsumeNodes(provider, 34)};
    const auto path{FollowContributionPath(leaf, index, count, siblings)};
    if (!path) return;
    assert(index < count);
    assert(siblings.size() <= 32);
    uint64_t others{0};
    for (const MerkleSumNode& sibling : siblings) {
        others += sibling.sum;
    }
    assert(path->root.sum == leaf.sum + others);
    assert(path->start <= others);
    MerkleSumNode& changed{siblings.empty() || provider.ConsumeBool() ? leaf : siblings[provider.ConsumeIntegralInRange<size_t>(0, siblings.size() - 1)]};
    changed.hash = (HashWriter{} << changed.hash).GetHash();
    const auto other_path{FollowContributionPath(leaf, index, count, siblings)};
    assert(other_path);
    assert(other_path->root.hash != path->root.hash);
    siblings.emplace_back();
    assert(!FollowContributionPath(leaf, index, count, siblings));
}

namespace {

/** A slot of a training network, and a block for it that can be made wrong and signed again. */
struct Slot {
    Consensus::Params params;
    std::optional<TrainingParent> parent; //!< none at the start height
    int64_t parent_time{0};
    int height{1};
    std::vector<uint8_t> signers; //!< positions of the coordinator's keys, ascending
    TrainingCertificate certificate;
    size_t winner{COORDINATOR_KEYS}; //!< the key that signs the block
    CBlock block;                    //!< its coinbase has the payload in the last output

    const TrainingKeys& Keys() const { return params.training->KeysAt(height); }

    /** Sign the certificate, then the block. */
    void SignCertificate()
    {
        const uint256 hash{CertificateSigHash(TrainingChainId(params), certificate)};
        certificate.coordinator_signatures.clear();
        for (const uint8_t position : signers) {
            const auto key{std::ranges::find(g_keys, Keys().keys.at(position)) - g_keys.begin()};
            certificate.coordinator_signatures.push_back({position, Sign(key, hash)});
        }
        SignBlock();
    }

    /** Put the certificate into the block, and sign that. */
    void SignBlock()
    {
        SetScript(PayloadScript(certificate, SchnorrSignature{}));
        const uint256 hash{WinnerSigHash(TrainingChainId(params), block, block.vtx[0]->vout.size() - 1)};
        SetScript(PayloadScript(certificate, Sign(winner, hash)));
    }

    void SetScript(const CScript& script)
    {
        CMutableTransaction coinbase{*block.vtx[0]};
        coinbase.vout.back().scriptPubKey = script;
        block.vtx[0] = MakeTransactionRef(std::move(coinbase));
    }

    /** Why the block is refused, or an empty string. */
    std::string Check() const
    {
        const std::string reason{GetAloneReason(block, height, params)};
        if (!reason.empty()) return reason;
        return GetReason([&](auto& state) { return ContextualCheckTrainingCertificate(certificate, parent ? &*parent : nullptr, block.GetBlockTime(), parent_time, *params.training, state); });
    }

    /** Change the block's header or transactions after the winner has signed. */
    void ChangeBlock(FuzzedDataProvider& provider)
    {
        CallOneOf(
            provider,
            [&] { block.nVersion ^= 1 << provider.ConsumeIntegralInRange(0, 30); },
            [&] { block.nTime ^= 1U << provider.ConsumeIntegralInRange(0, 31); },
            [&] { block.nBits ^= 1U << provider.ConsumeIntegralInRange(0, 31); },
            [&] { block.nNonce ^= 1U << provider.ConsumeIntegralInRange(0, 31); },
            [&] {
                CMutableTransaction tx{*block.vtx[provider.ConsumeIntegralInRange<size_t>(0, block.vtx.size() - 1)]};
                ++tx.vout[0].nValue;
                block.vtx.push_back(MakeTransactionRef(tx));
            },
            [&] {
                CMutableTransaction coinbase{*block.vtx[0]};
                ++coinbase.vout[0].nValue;
                block.vtx[0] = MakeTransactionRef(coinbase);
            });
    }
};

/** A leaf of a made table, of a miner whose key we know. */
struct Contribution {
    size_t miner;
    uint256 update_hash;
    uint64_t params;
    uint64_t loss_reduction;
    uint64_t weight;

    MerkleSumNode Leaf() const { return ContributionLeaf(g_keys.at(miner), update_hash, params, loss_reduction, weight); }
};

std::vector<Contribution> ConsumeContributions(FuzzedDataProvider& provider)
{
    std::vector<Contribution> table;
    uint64_t sum{0};
    LIMITED_WHILE(provider.ConsumeBool(), 9)
    {
        Contribution each{.miner = provider.ConsumeIntegralInRange(COORDINATOR_KEYS, g_keys.size() - 1), .update_hash = ConsumeUInt256(provider), .params = ConsumeU64(provider), .loss_reduction = ConsumeU64(provider), .weight = 0};
        each.weight = SquareRoot(arith_uint256{each.params} * arith_uint256{each.loss_reduction});
        if (each.weight == 0 || !CheckedAdd(sum, each.weight)) continue;
        sum += each.weight;
        table.push_back(each);
    }
    return table;
}

/** A network, any parent, and a block that fulfils every rule. */
Slot ConsumeSlot(FuzzedDataProvider& provider)
{
    Slot slot;
    auto training{std::make_shared<TrainingParams>()};
    int height{provider.PickValueInArray({1, 2, 1000, std::numeric_limits<int>::max() - 3})};
    do {
        const size_t count{provider.ConsumeIntegralInRange<size_t>(1, COORDINATOR_KEYS)};
        const size_t first{provider.ConsumeIntegralInRange<size_t>(0, COORDINATOR_KEYS - count)};
        const uint8_t threshold{provider.ConsumeIntegralInRange<uint8_t>(1, std::min<size_t>(count, 3))};
        training->keys.emplace(height, TrainingKeys{.threshold = threshold, .keys = {g_keys.begin() + first, g_keys.begin() + first + count}});
        ++height;
    } while (training->keys.size() < 3 && provider.ConsumeBool());
    training->round_seconds = provider.ConsumeIntegralInRange<uint32_t>(1, 86400);
    training->model = ConsumeUInt256(provider);
    TrainingCertificate& certificate{slot.certificate};
    certificate.beacon_reveal = ConsumeUInt256(provider);
    uint256 beacon;
    CSHA256().Write(certificate.beacon_reveal.data(), certificate.beacon_reveal.size()).Finalize(beacon.data());
    training->beacon = beacon;
    slot.params.training = training;

    slot.height = training->StartHeight();
    certificate.prev_block = ConsumeUInt256(provider);
    certificate.round = provider.ConsumeIntegral<uint16_t>();
    certificate.model_before = training->model;
    if (provider.ConsumeBool()) {
        slot.height += provider.ConsumeIntegralInRange(1, 2);
        slot.parent.emplace();
        slot.parent->beacon_reveal = beacon;
        slot.parent->model_after = certificate.model_before = ConsumeUInt256(provider);
        if (const auto table{ConsumeContributions(provider)}; !table.empty()) {
            std::vector<MerkleSumNode> leaves;
            for (const Contribution& each : table) {
                leaves.push_back(each.Leaf());
            }
            const ContributionTree tree{BuildContributionTree(leaves)};
            const MerkleSumNode& root{tree.back()[0]};
            slot.parent->contributions_root = root.hash;
            slot.parent->contributions_weight = root.sum;
            slot.parent->contributions_count = table.size();
            uint64_t ticket{DrawTicket(certificate.beacon_reveal, certificate.prev_block, certificate.round, root.sum)};
            size_t index{0};
            while (ticket >= table.at(index).weight) {
                ticket -= table[index++].weight;
            }
            const Contribution& drawn{table[index]};
            slot.winner = drawn.miner;
            certificate.draw.emplace(TrainingDraw{.update_hash = drawn.update_hash, .params = drawn.params, .loss_reduction = drawn.loss_reduction, .weight = drawn.weight, .index = uint32_t(index), .siblings = GetContributionPath(tree, index)});
        }
    }
    certificate.height = slot.height;
    certificate.winner_key = g_keys.at(slot.winner);
    certificate.model_after = ConsumeUInt256(provider);
    certificate.loss_after = ConsumeU64(provider);
    if (provider.ConsumeBool()) {
        certificate.contributions_root = uint256::ONE;
        certificate.contributions_weight = std::max<uint64_t>(ConsumeU64(provider), 1);
        certificate.contributions_count = provider.ConsumeIntegralInRange<uint32_t>(1, std::numeric_limits<uint32_t>::max());
    }

    const int64_t wait{int64_t{certificate.round} * training->round_seconds}; // can be more than nTime, which need not be so on a chain
    slot.block.nTime = std::numeric_limits<uint32_t>::max() - (provider.ConsumeBool() ? provider.ConsumeIntegral<uint32_t>() : 0);
    slot.parent_time = int64_t{slot.block.nTime} - wait;
    slot.block.hashPrevBlock = certificate.prev_block;
    LIMITED_WHILE(slot.block.vtx.empty() || provider.ConsumeBool(), 4)
    {
        CMutableTransaction tx;
        tx.vin.emplace_back();
        tx.vout.emplace_back(provider.ConsumeIntegralInRange<CAmount>(0, MAX_MONEY - 1), CScript{});
        if (slot.block.vtx.empty()) tx.vout.emplace_back();
        slot.block.vtx.push_back(MakeTransactionRef(tx));
    }

    for (uint8_t i{0}; i < slot.Keys().keys.size() && slot.signers.size() < slot.Keys().threshold; ++i) {
        const size_t left{slot.Keys().keys.size() - i};
        if (left == slot.Keys().threshold - slot.signers.size() || provider.ConsumeBool()) slot.signers.push_back(i);
    }
    slot.SignCertificate();
    return slot;
}

/** Change some bytes. */
void ChangeHash(FuzzedDataProvider& provider, uint256& hash)
{
    hash.data()[provider.ConsumeIntegralInRange<size_t>(0, uint256::size() - 1)] ^= provider.ConsumeIntegralInRange<uint8_t>(1, 255);
}

/** Another number. */
template <typename T>
void ChangeNumber(FuzzedDataProvider& provider, T& number)
{
    number ^= provider.ConsumeIntegralInRange<T>(1, std::numeric_limits<T>::max());
}

/** Make one thing wrong that the block alone shows. Returns the reason that it must be refused for. */
std::string BreakCertificate(FuzzedDataProvider& provider, Slot& slot)
{
    TrainingCertificate& certificate{slot.certificate};
    std::string reason;
    CallOneOf(
        provider,
        [&] {
            ChangeNumber(provider, certificate.height);
            slot.SignCertificate();
            reason = "height";
        },
        [&] {
            ChangeHash(provider, provider.ConsumeBool() ? certificate.prev_block : slot.block.hashPrevBlock);
            slot.SignCertificate();
            reason = "prevblock";
        },
        [&] {
            CallOneOf(
                provider,
                [&] { certificate.contributions_root = certificate.contributions_root.IsNull() ? uint256::ONE : uint256::ZERO; },
                [&] { certificate.contributions_weight = certificate.contributions_weight == 0; },
                [&] { certificate.contributions_count = certificate.contributions_count == 0; });
            slot.SignCertificate();
            reason = "totals";
        },
        [&] {
            slot.signers.pop_back();
            slot.SignCertificate();
            reason = "coordinator-sig";
        },
        [&] {
            slot.signers.push_back(provider.ConsumeIntegralInRange<uint8_t>(0, slot.Keys().keys.size() - 1));
            slot.SignCertificate();
            reason = "coordinator-sig";
        },
        [&] { // another position, whose key did not sign: not there, not ascending, or not the signer's
            ChangeNumber(provider, provider.PickValueInArray({std::ref(certificate.coordinator_signatures.front()), std::ref(certificate.coordinator_signatures.back())}).get().key_index);
            slot.SignBlock();
            reason = "coordinator-sig";
        },
        [&] { // another certificate than what was signed
            ChangeHash(provider, provider.PickValueInArray({std::ref(certificate.model_before), std::ref(certificate.model_after), std::ref(certificate.dataset_root), std::ref(certificate.beacon_reveal), std::ref(certificate.record)}).get());
            slot.SignBlock();
            reason = "coordinator-sig";
        },
        [&] { // another network's
            auto training{std::make_shared<TrainingParams>(*slot.params.training)};
            ChangeHash(provider, provider.ConsumeBool() ? training->beacon : training->model);
            slot.params.training = training;
            reason = "coordinator-sig";
        },
        [&] {
            slot.winner = provider.ConsumeIntegralInRange<size_t>(0, COORDINATOR_KEYS - 1);
            slot.SignBlock();
            reason = "winner-sig";
        },
        [&] {
            slot.ChangeBlock(provider);
            reason = "winner-sig";
        });
    return reason;
}

/** Make one thing wrong that only the parent shows. */
std::string BreakLineage(FuzzedDataProvider& provider, Slot& slot)
{
    TrainingCertificate& certificate{slot.certificate};
    std::optional<TrainingDraw>& draw{certificate.draw};
    std::string reason;
    CallOneOf(
        provider,
        [&] {
            if (draw) {
                draw.reset();
            } else {
                draw.emplace();
            }
            reason = "award";
        },
        [&] {
            if (!draw) return;
            reason = "weight";
            CallOneOf(
                provider,
                [&] { ChangeNumber(provider, draw->weight); },
                [&] { draw->params = draw->loss_reduction = draw->weight = 0; });
        },
        [&] {
            if (!draw) return;
            reason = "draw";
            CallOneOf(
                provider,
                [&] { ChangeHash(provider, draw->update_hash); },
                [&] { draw->siblings.emplace_back(); },
                [&] {
                    if (draw->siblings.empty()) {
                        ++draw->index;
                    } else {
                        draw->siblings.pop_back();
                    }
                },
                [&] {
                    if (!draw->siblings.empty())
                        ChangeHash(provider, draw->siblings[provider.ConsumeIntegralInRange<size_t>(0, draw->siblings.size() - 1)].hash);
                    else
                        ++draw->index;
                },
                [&] { draw->index = slot.parent->contributions_count; },
                [&] { ChangeNumber(provider, slot.parent->contributions_weight); },
                [&] { ChangeHash(provider, slot.parent->contributions_root); });
            if (slot.parent->contributions_weight == 0) reason = "award";
        },
        [&] {
            if (!slot.parent) return;
            ChangeHash(provider, slot.parent->beacon_reveal);
            reason = "beacon";
        },
        [&] {
            ChangeHash(provider, certificate.model_before);
            reason = "model";
        },
        [&] {
            if (certificate.round == 0) return;
            slot.parent_time += provider.ConsumeIntegralInRange<int64_t>(1, std::numeric_limits<uint32_t>::max());
            reason = "round";
        });
    slot.SignCertificate();
    return reason;
}

} // namespace

FUZZ_TARGET(training_block, .init = initialize_training)
{
    FuzzedDataProvider provider{buffer.data(), buffer.size()};
    Slot slot{ConsumeSlot(provider)};
    assert(slot.Check().empty());
    CallOneOf(
        provider,
        [&] { // any byte of the script: whatever it is now, it is not what was signed
            CScript script{slot.block.vtx[0]->vout.back().scriptPubKey};
            const CScript before{script};
            LIMITED_WHILE(provider.ConsumeBool(), 8)
            {
                script[provider.ConsumeIntegralInRange<size_t>(0, script.size() - 1)] = provider.ConsumeIntegral<uint8_t>();
            }
            slot.SetScript(script);
            const std::string reason{GetAloneReason(slot.block, slot.height, slot.params)};
            assert(script == before ? reason.empty() : PAYLOAD_REASONS.contains(reason) || CERTIFICATE_REASONS.contains(reason));
        },
        [&] {
            const std::string reason{BreakCertificate(provider, slot)};
            assert(slot.Check() == "bad-traincert-" + reason);
        },
        [&] {
            const std::string reason{BreakLineage(provider, slot)};
            assert(slot.Check() == (reason.empty() ? "" : "bad-traincert-" + reason));
        });
}
