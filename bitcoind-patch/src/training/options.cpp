// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#include <training/options.h>

#include <common/args.h>
#include <pubkey.h>
#include <tinyformat.h>
#include <training/params.h>
#include <uint256.h>
#include <util/chaintype.h>
#include <util/strencodings.h>
#include <util/string.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using util::SplitString;

static constexpr uint32_t MAX_ROUND_SECONDS{24 * 60 * 60};
static constexpr size_t MAX_COORDINATOR_KEYS{16};

void SetupTrainingOptions(ArgsManager& argsman)
{
    const auto flags{ArgsManager::ALLOW_ANY | ArgsManager::DEBUG_ONLY | ArgsManager::DISALLOW_NEGATION};
    argsman.AddArg("-trainingkeys=<height>:<m>:<key>[,<key>...]", "From this height on, blocks need a training certificate signed by m of these coordinator keys (x-only, hex) instead of proof of work. May be given again with another height to rotate the keys. (regtest-only)", flags, OptionsCategory::CHAINPARAMS);
    argsman.AddArg("-trainingbeacon=<hex>", "Anchor of the coordinator's beacon, a SHA-256 hash chain (regtest-only)", flags, OptionsCategory::CHAINPARAMS);
    argsman.AddArg("-traininground=<seconds>", strprintf("Seconds after which an absent winner may be redrawn, 1 to %u (default: %u, regtest-only)", MAX_ROUND_SECONDS, TrainingParams{}.round_seconds), flags, OptionsCategory::CHAINPARAMS);
    argsman.AddArg("-trainingmodel=<hex>", "Hash of the model that training starts from (regtest-only)", flags, OptionsCategory::CHAINPARAMS);
}

/** Parse the hex of 32 bytes, in the order written. */
static std::optional<uint256> ParseBytes32(const std::string& hex)
{
    const auto bytes{TryParseHex<uint8_t>(hex)};
    if (!bytes || hex.size() != 2 * uint256::size()) return std::nullopt; // TryParseHex allows white space
    return uint256{*bytes};
}

/** The one value of an option, or nothing if it is not given. */
static std::optional<std::string> ReadOnce(const ArgsManager& args, const std::string& name)
{
    const auto values{args.GetArgs(name)};
    if (values.empty()) return std::nullopt;
    if (values.size() > 1) throw std::runtime_error(strprintf("%s may be given once only, not as both '%s' and '%s'.", name, values[0], values[1]));
    return values[0];
}

static uint256 ReadBytes32(const ArgsManager& args, const std::string& name)
{
    const auto value{ReadOnce(args, name)};
    if (!value) throw std::runtime_error(strprintf("%s is missing: a training network needs -trainingkeys, -trainingbeacon and -trainingmodel.", name));
    const auto bytes{ParseBytes32(*value)};
    if (!bytes) throw std::runtime_error(strprintf("%s must be 64 hex digits, not '%s'.", name, *value));
    return *bytes;
}

static std::pair<int, TrainingKeys> ParseKeys(const std::string& value)
{
    const auto fail{[&](const std::string& problem) { return std::runtime_error(strprintf("-trainingkeys=%s: %s", value, problem)); }};

    const auto parts{SplitString(value, ':')};
    if (parts.size() != 3) throw fail("expected <height>:<m>:<key>[,<key>...].");
    const auto height{ToIntegral<int>(parts[0])};
    if (!height || *height < 1) throw fail(strprintf("the height must be a whole number from 1 to %d, not '%s'.", std::numeric_limits<int>::max(), parts[0]));

    TrainingKeys keys;
    for (const auto& hex : SplitString(parts[2], ',')) {
        const auto bytes{ParseBytes32(hex)};
        if (!bytes || !XOnlyPubKey{*bytes}.IsFullyValid()) throw fail(strprintf("'%s' is not an x-only public key of 64 hex digits.", hex));
        if (std::ranges::find(keys.keys, XOnlyPubKey{*bytes}) != keys.keys.end()) throw fail(strprintf("key '%s' is there twice.", hex));
        keys.keys.emplace_back(*bytes);
    }
    if (keys.keys.size() > MAX_COORDINATOR_KEYS) throw fail(strprintf("%u keys are more than %u.", keys.keys.size(), MAX_COORDINATOR_KEYS));
    const auto threshold{ToIntegral<uint8_t>(parts[1])};
    if (!threshold || *threshold < 1 || *threshold > keys.keys.size()) throw fail(strprintf("m must be a whole number from 1 to the number of keys (%u), not '%s'.", keys.keys.size(), parts[1]));
    keys.threshold = *threshold;
    return {*height, std::move(keys)};
}

std::shared_ptr<const TrainingParams> ReadTrainingOptions(const ArgsManager& args, ChainType chain)
{
    const std::vector<std::string> names{"-trainingkeys", "-trainingbeacon", "-traininground", "-trainingmodel"};
    const auto given{std::ranges::find_if(names, [&](const auto& name) { return args.IsArgSet(name); })};
    if (given == names.end()) return nullptr;
    if (chain != ChainType::REGTEST) {
        throw std::runtime_error(strprintf("%s=%s is for -chain=regtest only, not for -chain=%s.", *given, args.GetArg(*given, ""), ChainTypeToString(chain)));
    }

    auto params{std::make_shared<TrainingParams>()};
    for (const auto& value : args.GetArgs("-trainingkeys")) {
        const auto [height, keys]{ParseKeys(value)};
        if (!params->keys.emplace(height, keys).second) throw std::runtime_error(strprintf("-trainingkeys=%s: height %d is there twice.", value, height));
    }
    if (params->keys.empty()) throw std::runtime_error("-trainingkeys is missing: a training network needs -trainingkeys, -trainingbeacon and -trainingmodel.");
    params->beacon = ReadBytes32(args, "-trainingbeacon");
    params->model = ReadBytes32(args, "-trainingmodel");
    if (const auto value{ReadOnce(args, "-traininground")}) {
        const auto seconds{ToIntegral<uint32_t>(*value)};
        if (!seconds || *seconds < 1 || *seconds > MAX_ROUND_SECONDS) throw std::runtime_error(strprintf("-traininground must be a whole number of seconds from 1 to %u, not '%s'.", MAX_ROUND_SECONDS, *value));
        params->round_seconds = *seconds;
    }
    return params;
}
