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
#include <pubkey.h>
#include <streams.h>
#include <test/data/training.json.h>
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

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
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
            const bool valid{CheckTrainingCertificate(block, vector["height"].getInt<int>(), params->GetConsensus(), state)};
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
