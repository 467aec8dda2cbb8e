// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

/**
 * Answers, for each block on standard input, as the node would: "ok", or the reason that it is refused for.
 *
 * For tests/differential, which compares the answers with the bridge's. The first line is the -training... options of
 * the network, separated by spaces. Each other line is a case:
 *
 *     <height> <block, hex> <parent's certificate, hex, or - at the start height> <parent's nTime>
 */

#include <chainparams.h>
#include <chainparamsbase.h>
#include <common/args.h>
#include <consensus/params.h>
#include <consensus/validation.h>
#include <core_io.h>
#include <key.h>
#include <primitives/block.h>
#include <streams.h>
#include <training/certificate.h>
#include <training/validation.h>
#include <util/chaintype.h>
#include <util/strencodings.h>
#include <util/string.h>

#include <cstdint>
#include <exception>
#include <iostream>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

using util::SplitString;

/** A training network, from the options of its bitcoin.conf. */
static std::unique_ptr<const CChainParams> ReadNetwork(const std::string& line)
{
    ArgsManager args;
    SetupChainParamsBaseOptions(args);
    std::vector<std::string> arguments{"training_check"};
    for (const auto& option : SplitString(line, ' ')) {
        arguments.push_back("-" + option);
    }
    std::vector<const char*> argv;
    for (const auto& argument : arguments) {
        argv.push_back(argument.c_str());
    }
    std::string error;
    if (!args.ParseParameters(argv.size(), argv.data(), error)) throw std::runtime_error(error);
    return CreateChainParams(args, ChainType::REGTEST);
}

static bool Check(const std::string& line, const Consensus::Params& params, BlockValidationState& state)
{
    const auto fields{SplitString(line, ' ')};
    if (fields.size() != 4) throw std::runtime_error("expected 4 fields: " + line);
    const auto height{ToIntegral<int>(fields[0])};
    const auto parent_time{ToIntegral<int64_t>(fields[3])};
    CBlock block;
    if (!height || !parent_time || !DecodeHexBlk(block, fields[1])) throw std::runtime_error("malformed: " + line);
    std::optional<TrainingParent> parent;
    if (fields[2] != "-") {
        TrainingCertificate certificate;
        SpanReader{ParseHex(fields[2])} >> certificate;
        parent.emplace(certificate);
    }
    std::optional<VerifiedCertificate> certificate;
    if (!CheckTrainingCertificate(block, *height, params, state, certificate)) return false;
    return ContextualCheckTrainingCertificate(*certificate, parent ? &*parent : nullptr, block.GetBlockTime(), *parent_time, *params.training, state);
}

int main()
{
    const ECC_Context ecc_context{};
    try {
        std::string line;
        std::getline(std::cin, line);
        const auto network{ReadNetwork(line)};
        while (std::getline(std::cin, line)) {
            BlockValidationState state;
            const bool valid{Check(line, network->GetConsensus(), state)};
            std::cout << (valid ? "ok" : state.GetRejectReason()) << std::endl;
        }
    } catch (const std::exception& e) {
        std::cerr << "training_check: " << e.what() << std::endl;
        return 1;
    }
    return 0;
}
