"""A client of a node's RPC port that adds as little time of its own as it can."""

from __future__ import annotations

import base64
import http.client
import json
import time

from traincert.regtest import Node


class RawClient:
    """One connection to a running node, kept open."""

    def __init__(self, node: Node) -> None:
        user = base64.b64encode(node.cookie_file.read_bytes()).decode()
        self._headers = {"Authorization": f"Basic {user}", "Content-Type": "application/json"}
        self._connection = http.client.HTTPConnection("127.0.0.1", node.rpc_port)

    def submit_block(self, block: str) -> float:
        """Submit a block, which must be taken; how many microseconds the answer took."""
        body = json.dumps({"id": 0, "method": "submitblock", "params": [block]}).encode()
        start = time.perf_counter()
        self._connection.request("POST", "/", body, self._headers)
        answer = self._connection.getresponse().read()
        microseconds = (time.perf_counter() - start) * 1e6
        if json.loads(answer) != {"result": None, "error": None, "id": 0}:
            raise AssertionError(f"submitblock: {answer.decode()}")
        return microseconds
