// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#include <chainparams.h>
#include <chainparamsbase.h>
#include <common/args.h>
#include <consensus/validation.h>
#include <core_io.h>
#include <crypto/common.h>
#include <hash.h>
#include <primitives/block.h>
#include <primitives/transaction.h>
#include <pubkey.h>
#include <script/script.h>
#include <serialize.h>
#include <streams.h>
#include <test/data/training.json.h>
#include <test/util/contribution_tree.h>
#include <training/certificate.h>
#include <training/lottery.h>
#include <training/options.h>
#include <training/params.h>
#include <training/validation.h>
#include <uint256.h>
#include <univalue.h>
#include <util/chaintype.h>
#include <util/strencodings.h>

#include <boost/test/unit_test.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

using namespace util::hex_literals;

/** The vectors that the bridge's tests read too. */
static std::vector<UniValue> ReadVectors(const std::string& name)
{
    UniValue vectors;
    BOOST_REQUIRE(vectors.read(json_tests::training));
    return vectors[name].getValues();
}

static uint256 ReadBytes32(const UniValue& hex) { return uint256{ParseHex(hex.get_str())}; }

/** The parameters of a training network, from the options of its bitcoin.conf. */
static std::unique_ptr<const CChainParams> ReadNetwork(const UniValue& options)
{
    ArgsManager args;
    SetupChainParamsBaseOptions(args);
    std::vector<std::string> arguments{"test_training"};
    for (const auto& option : options.getValues())
        arguments.push_back("-" + option.get_str());
    std::vector<const char*> argv;
    for (const auto& argument : arguments)
        argv.push_back(argument.c_str());
    std::string error;
    BOOST_REQUIRE_MESSAGE(args.ParseParameters(argv.size(), argv.data(), error), error);
    return CreateChainParams(args, ChainType::REGTEST);
}

BOOST_AUTO_TEST_SUITE(training_tests)

BOOST_AUTO_TEST_CASE(chain_id)
{
    for (const auto& vector : ReadVectors("networks")) {
        const auto params{ReadNetwork(vector["options"])};
        BOOST_CHECK_EQUAL(HexStr(TrainingChainId(params->GetConsensus())), vector["chain_id"].get_str());
    }
}

BOOST_AUTO_TEST_CASE(certificate_round_trip_and_sighash)
{
    for (const auto& vector : ReadVectors("certificates")) {
        const auto bytes{ParseHex(vector["certificate"].get_str())};
        TrainingCertificate certificate;
        SpanReader reader{bytes};
        reader >> certificate;
        BOOST_CHECK(reader.empty());
        std::vector<unsigned char> again;
        VectorWriter{again, 0, certificate};
        BOOST_CHECK_EQUAL(HexStr(again), HexStr(bytes));
        BOOST_CHECK_EQUAL(certificate.height, vector["height"].getInt<uint32_t>());
        BOOST_CHECK_EQUAL(certificate.prev_block.GetHex(), vector["prev_block"].get_str());
        BOOST_CHECK_EQUAL(certificate.loss_after, vector["loss_after"].getInt<uint64_t>());
        BOOST_CHECK_EQUAL(certificate.draw ? certificate.draw->siblings.size() : 0, vector["siblings"].getInt<size_t>());
        BOOST_CHECK_EQUAL(HexStr(CertificateSigHash(ReadBytes32(vector["chain_id"]), certificate)), vector["sighash"].get_str());
    }
}

BOOST_AUTO_TEST_CASE(block_rules)
{
    for (const auto& vector : ReadVectors("blocks")) {
        BOOST_TEST_CONTEXT(vector["comment"].get_str())
        {
            const auto params{ReadNetwork(vector["options"])};
            CBlock block;
            BOOST_REQUIRE(DecodeHexBlk(block, vector["block"].get_str()));
            if (vector.exists("winner_sighash")) {
                BlockValidationState state;
                const auto payload{ReadTrainingPayload(*block.vtx.at(0), state)};
                BOOST_REQUIRE(payload);
                BOOST_CHECK_EQUAL(HexStr(WinnerSigHash(TrainingChainId(params->GetConsensus()), block, payload->output)), vector["winner_sighash"].get_str());
            }
            BlockValidationState state;
            std::optional<VerifiedCertificate> certificate;
            const bool valid{CheckTrainingCertificate(block, vector["height"].getInt<int>(), params->GetConsensus(), state, certificate)};
            BOOST_CHECK_EQUAL(certificate.has_value(), valid);
            BOOST_CHECK_EQUAL(valid, vector["reason"].isNull());
            BOOST_CHECK_EQUAL(state.GetRejectReason(), vector["reason"].isNull() ? "" : vector["reason"].get_str());
        }
    }
}

BOOST_AUTO_TEST_CASE(rules_with_the_parent)
{
    for (const auto& vector : ReadVectors("with_parent")) {
        BOOST_TEST_CONTEXT(vector["comment"].get_str())
        {
            const auto params{ReadNetwork(vector["options"])};
            TrainingCertificate certificate;
            TrainingCertificateBody parent_body;
            SpanReader{ParseHex(vector["certificate_hex"].get_str())} >> certificate;
            const bool start{vector["parent_body_hex"].isNull()};
            if (!start) SpanReader{ParseHex(vector["parent_body_hex"].get_str())} >> parent_body;
            const TrainingParent parent{parent_body};
            BlockValidationState state;
            const bool valid{ContextualCheckTrainingCertificate(certificate, start ? nullptr : &parent, vector["time"].getInt<int64_t>(), vector["parent_time"].getInt<int64_t>(), *params->GetConsensus().training, state)};
            BOOST_CHECK_EQUAL(valid, vector["reason"].isNull());
            BOOST_CHECK_EQUAL(state.GetRejectReason(), vector["reason"].isNull() ? "" : vector["reason"].get_str());
        }
    }
}

/** A table of made leaves: params, loss_reduction and weight of leaf i are all i * i + 1. */
static std::vector<MerkleSumNode> MakeLeaves(uint32_t count)
{
    std::vector<MerkleSumNode> leaves;
    for (uint32_t i{0}; i < count; ++i) {
        uint256 key;
        WriteBE32(key.begin() + 28, i);
        const uint64_t number{uint64_t{i} * i + 1};
        leaves.push_back(ContributionLeaf(XOnlyPubKey{key}, (HashWriter{} << key).GetSHA256(), number, number, number));
    }
    return leaves;
}

BOOST_AUTO_TEST_CASE(tables_and_paths)
{
    for (const auto& vector : ReadVectors("tables")) {
        const auto leaves{MakeLeaves(vector["count"].getInt<uint32_t>())};
        const uint32_t count(leaves.size());
        for (const auto& entry : vector["paths"].getValues()) {
            std::vector<MerkleSumNode> siblings;
            for (const auto& node : entry["siblings"].getValues()) {
                siblings.push_back({ReadBytes32(node["hash"]), node["sum"].getInt<uint64_t>()});
            }
            const auto index{entry["index"].getInt<uint32_t>()};
            const auto path{FollowContributionPath(leaves[index], index, count, siblings)};
            BOOST_REQUIRE(path);
            BOOST_CHECK_EQUAL(HexStr(path->root.hash), vector["root"].get_str());
            BOOST_CHECK_EQUAL(path->root.sum, vector["weight"].getInt<uint64_t>());
            BOOST_CHECK_EQUAL(path->start, entry["start"].getInt<uint64_t>());

            BOOST_CHECK(!FollowContributionPath(leaves[index], count, count, siblings));
            siblings.push_back(leaves[index]);
            BOOST_CHECK(!FollowContributionPath(leaves[index], index, count, siblings));
            if (count > 1) {
                siblings.resize(siblings.size() - 2);
                BOOST_CHECK(!FollowContributionPath(leaves[index], index, count, siblings));
            }
        }
    }
}

BOOST_AUTO_TEST_CASE(every_ticket_of_every_small_table)
{
    for (uint32_t count{1}; count <= 9; ++count) {
        const auto leaves{MakeLeaves(count)};
        const ContributionTree tree{BuildContributionTree(leaves)};
        uint64_t ticket{0};
        for (uint32_t winner{0}; winner < count; ++winner) {
            const auto siblings{GetContributionPath(tree, winner)};
            const auto path{FollowContributionPath(leaves[winner], winner, count, siblings)};
            BOOST_REQUIRE(path);
            BOOST_CHECK(path->root.hash == tree.back()[0].hash);
            BOOST_CHECK_EQUAL(path->root.sum, tree.back()[0].sum);
            BOOST_CHECK_EQUAL(path->start, ticket); // so each ticket is just one leaf's
            ticket += leaves[winner].sum;

            // No other leaf, position or table has this path.
            for (uint32_t other{0}; other < count; ++other) {
                if (other == winner) continue;
                const auto moved{FollowContributionPath(leaves[winner], other, count, siblings)};
                BOOST_CHECK(!moved || moved->root.hash != path->root.hash);
                const auto replaced{FollowContributionPath(leaves[other], winner, count, siblings)};
                BOOST_CHECK(replaced && replaced->root.hash != path->root.hash);
            }
        }
        BOOST_CHECK_EQUAL(ticket, tree.back()[0].sum);
    }
}

BOOST_AUTO_TEST_CASE(no_certificate_is_cut_short_or_too_long)
{
    for (const auto& vector : ReadVectors("certificates")) {
        const auto bytes{ParseHex(vector["certificate"].get_str())};
        CMutableTransaction coinbase;
        const auto read{[&](std::span<const unsigned char> certificate) {
            std::vector<unsigned char> push{TRAINING_PAYLOAD_MAGIC.begin(), TRAINING_PAYLOAD_MAGIC.end()};
            push.insert(push.end(), certificate.begin(), certificate.end());
            push.insert(push.end(), std::tuple_size_v<SchnorrSignature>, 0);
            coinbase.vout = {CTxOut{0, CScript{} << OP_RETURN << push}};
            BlockValidationState state;
            const auto payload{ReadTrainingPayload(CTransaction{coinbase}, state)};
            BOOST_CHECK_EQUAL(payload.has_value(), state.IsValid());
            return state.GetRejectReason();
        }};
        BOOST_CHECK_EQUAL(read(bytes), "");
        // With no byte left, the signature's first is where the version should be.
        BOOST_CHECK_EQUAL(read({}), "bad-traincert-version");
        for (size_t size{1}; size < bytes.size(); ++size) {
            BOOST_CHECK_EQUAL(read(std::span{bytes}.first(size)), "bad-traincert-parse");
        }
        auto longer{bytes};
        longer.push_back(0);
        BOOST_CHECK_EQUAL(read(longer), "bad-traincert-parse");
    }
}

BOOST_AUTO_TEST_CASE(sums_that_overflow_end_no_path)
{
    const MerkleSumNode leaf{uint256::ONE, 1};
    const std::vector<MerkleSumNode> fits{{uint256::ONE, std::numeric_limits<uint64_t>::max() - 1}};
    const std::vector<MerkleSumNode> overflows{{uint256::ONE, std::numeric_limits<uint64_t>::max()}};
    BOOST_CHECK(FollowContributionPath(leaf, 0, 2, fits));
    BOOST_CHECK(!FollowContributionPath(leaf, 0, 2, overflows));
}

BOOST_AUTO_TEST_CASE(draw_tickets)
{
    for (const auto& vector : ReadVectors("draws")) {
        const auto prev_block{uint256::FromHex(vector["prev_block"].get_str())};
        BOOST_REQUIRE(prev_block);
        BOOST_CHECK_EQUAL(DrawTicket(ReadBytes32(vector["beacon_reveal"]), *prev_block, vector["round"].getInt<uint16_t>(), vector["contributions_weight"].getInt<uint64_t>()),
                          vector["ticket"].getInt<uint64_t>());
    }
}

BOOST_AUTO_TEST_CASE(contribution_weights)
{
    for (const auto& vector : ReadVectors("weights")) {
        const auto params{vector["params"].getInt<uint64_t>()};
        const auto loss_reduction{vector["loss_reduction"].getInt<uint64_t>()};
        const auto weight{vector["weight"].getInt<uint64_t>()};
        BOOST_CHECK(CheckContributionWeight(params, loss_reduction, weight));
        if (weight > 0) BOOST_CHECK(!CheckContributionWeight(params, loss_reduction, weight - 1));
        if (weight < std::numeric_limits<uint64_t>::max()) BOOST_CHECK(!CheckContributionWeight(params, loss_reduction, weight + 1));
    }
}

BOOST_AUTO_TEST_CASE(wrong_options_are_named)
{
    for (const auto& vector : ReadVectors("wrong_options")) {
        try {
            ReadNetwork(vector["options"]);
            BOOST_ERROR("accepted: " + vector["options"].write());
        } catch (const std::runtime_error& e) {
            BOOST_CHECK_EQUAL(e.what(), vector["error"].get_str());
        }
    }
}

BOOST_AUTO_TEST_SUITE_END()
