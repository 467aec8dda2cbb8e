"""A node that the explorer watches: one connection, in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from traincert.bridge.chain import read_params
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.errors import BridgeError
from traincert.bridge.rpc import NodeClient
from traincert.bridge.verifier import node_params
from traincert.regtest.errors import RpcError

T = TypeVar("T")

_METHOD_NOT_FOUND = -32601  # Bitcoin Core's RPC_METHOD_NOT_FOUND
_TRAINING_OFF = -1  # gettraininginfo's answer on a node without training options


def connect_to(place: str) -> NodeClient:
    """Return a client of the node that a command line names: a data directory, or URL,COOKIEFILE.

    Raises BridgeError if it names none.
    """
    if "://" not in place:
        return NodeClient.from_datadir(Path(place), retry_time=0)
    url, _, cookie = place.partition(",")
    if not cookie or not Path(cookie).is_file():
        raise BridgeError(
            f"{place}: name a file with the node's RPC login too, as in http://127.0.0.1:18443,/path/to/.cookie"
        )
    return NodeClient(url.rstrip("/"), Path(cookie), name=url.partition("://")[2].rstrip("/"), retry_time=0)


class WatchedNode:
    """What is known of a node. `hashes` is its chain, by height; it has gaps only while `loading`."""

    def __init__(self, place: str, name: str) -> None:
        """Raise BridgeError if the place, as a command line has it, is no node's."""
        self.name = name
        self.client = connect_to(place)
        self._datadir = None if "://" in place else Path(place)
        self.problem: str | None = "it is asked for the first time"
        self.asked = False
        self.info: dict[str, Any] = {}  # getblockchaininfo
        self.network: dict[str, Any] | None = None  # gettraininginfo
        self.params: TrainingParams | None = None
        self.subversion = ""
        self.connections = 0
        self.hashes: dict[int, str] = {}
        self.height = -1  # of the tip of `hashes`
        self.kept_up = 0.0  # when it did not lag, time.monotonic()
        self.loading: tuple[int, int] | None = None  # blocks that are read, and all
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @property
    def up(self) -> bool:
        """Whether it answered the last time."""
        return self.problem is None

    @property
    def tip(self) -> str | None:
        """The hash of its tip, as far as its chain is read."""
        return self.hashes.get(self.height)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the node's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def call(self, method: str, *params: Any) -> Any:
        """Call an RPC method. Raises RpcError and NodeUnreachableError."""
        return await self.run(self.client.call, method, *params)

    async def learn(self) -> None:
        """Ask for what changes rarely. Raises RpcError and NodeUnreachableError."""
        network = await self.call("getnetworkinfo")
        self.subversion, self.connections = network["subversion"], network["connections"]
        try:
            self.network = await self.call("gettraininginfo")
        except RpcError as error:  # a stock node, or one without training options
            if error.code not in (_METHOD_NOT_FOUND, _TRAINING_OFF):
                raise
            self.network = self.params = None
            return
        if self.params is None:
            with suppress(RpcError, BridgeError):  # pruned: the block at the start height has the model to start from
                self.params = await self.run(self._read_params)

    def _read_params(self) -> TrainingParams:
        return node_params(self.client, self._datadir) if self._datadir else read_params(self.client)

    def close(self) -> None:
        """End the thread and the connection."""
        self._thread.shutdown()
        self.client.close()

    def json(self, highest: int) -> dict[str, Any]:
        """Return the node as the API has it. `highest` is the height of the highest node."""
        return {
            "name": self.name,
            "up": self.up,
            "problem": self.problem,
            "subversion": self.subversion,
            "training": self.network is not None,
            "chain_id": self.network["chain_id"] if self.network else None,
            "blocks": self.info.get("blocks"),
            "headers": self.info.get("headers"),
            "bestblockhash": self.info.get("bestblockhash"),
            "loading": self.loading,
            "pruned": self.info.get("pruned", False),
            "pruneheight": self.info.get("pruneheight"),
            "connections": self.connections,
            "behind": highest - self.info["blocks"] if self.info else None,
        }
