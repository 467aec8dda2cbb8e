"""Calls RPC methods of a Bitcoin node."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import requests


class Rpc:
    """The JSON-RPC interface of a node, with the login from its cookie file."""

    def __init__(self, url: str, cookie_file: Path) -> None:
        self._url = url
        self._cookie_file = cookie_file

    def __call__(self, method: str, *params: object) -> Any:
        """Call a method and return its result. Numbers with a fraction, such as amounts in BTC, are Decimal.

        Raises RuntimeError if the node answers with an error. If the node does not answer, raises OSError for a missing
        cookie file, or an exception of requests.
        """
        user, _, password = self._cookie_file.read_text().partition(":")
        call: dict[str, Any] = {"id": 0, "method": method, "params": list(params)}
        response = requests.post(self._url, json=call, auth=(user, password), timeout=30)
        answer = response.json(parse_float=Decimal)
        if answer["error"]:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]
