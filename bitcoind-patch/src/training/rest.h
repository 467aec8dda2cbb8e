// Copyright (c) 2026-present The traincert developers
// Distributed under the MIT software license, see the accompanying
// file COPYING or https://opensource.org/license/mit/.

#ifndef BITCOIN_TRAINING_REST_H
#define BITCOIN_TRAINING_REST_H

#include <any>
#include <string>

class HTTPRequest;

/** /rest/trainingcertificate/<hash>.<ext>: what gettrainingcertificate says, or the payload as it stands in the coinbase. */
bool rest_training_certificate(const std::any& context, HTTPRequest* req, const std::string& uri_part);

#endif // BITCOIN_TRAINING_REST_H
