// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#include <training/rest.h>

#include <chain.h>
#include <consensus/params.h>
#include <consensus/validation.h>
#include <httpserver.h>
#include <node/blockstorage.h>
#include <node/context.h>
#include <primitives/block.h>
#include <rest.h>
#include <rpc/protocol.h>
#include <rpc/server.h>
#include <rpc/training.h>
#include <streams.h>
#include <sync.h>
#include <training/certificate.h>
#include <training/params.h>
#include <training/validation.h>
#include <uint256.h>
#include <univalue.h>
#include <util/any.h>
#include <util/strencodings.h>
#include <validation.h>

#include <any>
#include <optional>
#include <string>

static bool Reply(HTTPRequest* req, HTTPStatusCode status, const std::string& content_type, const std::string& body)
{
    req->WriteHeader("Content-Type", content_type);
    req->WriteReply(status, body);
    return status == HTTP_OK;
}

bool rest_training_certificate(const std::any& context, HTTPRequest* req, const std::string& uri_part)
{
    const auto fail{[&](HTTPStatusCode status, const std::string& message) { return Reply(req, status, "text/plain", message + "\r\n"); }};

    std::string warmup_status;
    if (RPCIsInWarmup(&warmup_status)) return fail(HTTP_SERVICE_UNAVAILABLE, "Service temporarily unavailable: " + warmup_status);
    const auto node{util::AnyPtr<node::NodeContext>(context)};
    if (!node || !node->chainman) return fail(HTTP_INTERNAL_SERVER_ERROR, "Chainman disabled or instance not found");
    ChainstateManager& chainman{*node->chainman};
    const auto& training{chainman.GetConsensus().training};

    std::string hash_hex;
    const RESTResponseFormat format{ParseDataFormat(hash_hex, uri_part)};
    const auto hash{uint256::FromHex(hash_hex)};
    if (!hash) return fail(HTTP_BAD_REQUEST, "Invalid hash: " + hash_hex);
    const CBlockIndex* index{WITH_LOCK(cs_main, return chainman.m_blockman.LookupBlockIndex(*hash))};
    if (!index) return fail(HTTP_NOT_FOUND, hash_hex + " not found");
    if (!training || index->nHeight < training->StartHeight()) return fail(HTTP_NOT_FOUND, hash_hex + " has no training certificate");
    if (WITH_LOCK(cs_main, return !(index->nStatus & BLOCK_HAVE_DATA))) return fail(HTTP_NOT_FOUND, hash_hex + " not available (pruned or not fully downloaded)");

    CBlock block;
    BlockValidationState state;
    std::optional<TrainingPayload> payload;
    if (chainman.m_blockman.ReadBlock(block, *index)) payload = ReadTrainingPayload(*block.vtx.at(0), state);
    if (!payload) return fail(HTTP_INTERNAL_SERVER_ERROR, "I/O error reading " + hash_hex);

    DataStream bytes;
    bytes << TRAINING_PAYLOAD_MAGIC << payload->certificate << payload->winner_signature;
    switch (format) {
    case RESTResponseFormat::BINARY:
        return Reply(req, HTTP_OK, "application/octet-stream", bytes.str());
    case RESTResponseFormat::HEX:
        return Reply(req, HTTP_OK, "text/plain", HexStr(bytes) + "\n");
    case RESTResponseFormat::JSON:
        return Reply(req, HTTP_OK, "application/json", TrainingPayloadToJSON(*hash, *payload).write() + "\n");
    case RESTResponseFormat::UNDEF:
        break;
    } // no default case, so the compiler can warn about missing cases
    return fail(HTTP_NOT_FOUND, "output format not found (available: .bin, .hex, .json)");
}
