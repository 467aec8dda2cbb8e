"""Calls to a Bitcoin node."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import requests


class Rpc:
    """A node's JSON-RPC interface, by its URL and its cookie file."""

    def __init__(self, url: str, cookie_file: Path) -> None:
        self._url = url
        self._cookie_file = cookie_file

    def __call__(self, method: str, *params: object) -> Any:
        """Return the answer to a call, amounts as Decimal.

        Raises RuntimeError with the node's own error, and requests' exceptions if it does not answer.
        """
        user, _, password = self._cookie_file.read_text().partition(":")
        call: dict[str, Any] = {"id": 0, "method": method, "params": list(params)}
        response = requests.post(self._url, json=call, auth=(user, password), timeout=30)
        answer = response.json(parse_float=Decimal)
        if answer["error"]:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]
