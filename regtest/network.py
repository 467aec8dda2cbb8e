"""Several nodes, each connected to every other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from traincert.regtest.errors import NodeError
from traincert.regtest.node import Node, Options, wait_for

CONNECT_TIMEOUT = 30.0  # seconds


class Network:
    """`count` nodes with the same options, in `directory`/node0, node1, ...

    Every node is connected to every other, so that whichever of them are stopped the rest still hear each other. As
    a context manager the network is started on entry and stopped on exit; for `keep` see `Node`.
    """

    def __init__(
        self, bitcoind: Path, directory: Path, count: int, options: Options | None = None, *, keep: bool = False
    ) -> None:
        self.nodes = [Node(bitcoind, directory / f"node{i}", options, keep=keep) for i in range(count)]
        self.keep = keep

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if not self.keep:
            self.stop()

    def start(self) -> None:
        """Start all nodes and connect them; if one does not start, stop the others.

        Raises NodeError or WaitTimeoutError for the first node that did not start or connect.
        """
        try:
            self._for_each(Node.start)
            self.connect()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all nodes, all at once."""
        self._for_each(Node.stop)

    def connect(self) -> None:
        """Connect every pair of running nodes that is not connected: also after one was restarted.

        The node with the most blocks is connected first, because a node in initial block download (one that was killed
        may have lost its chain) asks the first peer it meets for headers, and nobody else for the next 15 minutes,
        even if that one has none either (upstream: net_processing.cpp, fSyncStarted).

        Raises WaitTimeoutError if two nodes did not shake hands within CONNECT_TIMEOUT seconds.
        """
        running = [node for node in self.nodes if node.pid is not None]
        running.sort(key=lambda node: node.rpc("getblockcount"), reverse=True)
        pairs = list(combinations(running, 2))
        first = len(running) - 1  # so many are the pairs with the first of them
        _connect_pairs(pairs[:first])
        _connect_pairs(pairs[first:])

    def wait_until_same_tip(self, timeout: float = 60.0) -> str:
        """Wait until all running nodes have the same best block, and return its hash.

        Raises WaitTimeoutError if they had not within `timeout` seconds, with each node's height and tip, and NodeError
        if a node stopped answering.
        """
        nodes = [node for node in self.nodes if node.pid is not None]
        if not nodes:
            raise NodeError("no node of the network is running")
        tips: list[str] = []

        def same() -> bool:
            tips[:] = [node.rpc("getbestblockhash") for node in nodes]
            return len(set(tips)) == 1

        wait_for(same, timeout, "the same tip on all nodes", lambda: "; ".join(map(_tip, nodes)))
        return tips[0]

    def _for_each(self, action: Callable[[Node], None]) -> None:
        with ThreadPoolExecutor(max_workers=max(1, len(self.nodes))) as pool:
            results = [pool.submit(action, node) for node in self.nodes]
        for result in results:  # only now, when every node has been tried
            result.result()


def _connect_pairs(pairs: Sequence[tuple[Node, Node]]) -> None:
    for node, other in pairs:
        if not _either_connected(node, other):
            node.rpc("addnode", other.p2p_address, "onetry")
    for node, other in pairs:
        wait_for(
            partial(_either_connected, node, other),
            CONNECT_TIMEOUT,
            f"{node.name} to connect to {other.name}",
            node.log_tail,
        )


def _either_connected(node: Node, other: Node) -> bool:
    return _connected(node, other) or _connected(other, node)


def _connected(node: Node, other: Node) -> bool:
    """Whether `node` has made a connection to `other`, and both have the other's verack."""
    ends = {peer["addrbind"] for peer in _shaken(node) if peer["addr"] == other.p2p_address}
    return any(peer["addr"] in ends for peer in _shaken(other)) if ends else False


def _shaken(node: Node) -> list[dict[str, Any]]:
    return [peer for peer in node.rpc("getpeerinfo") if "verack" in peer["bytesrecv_per_msg"]]


def _tip(node: Node) -> str:
    chain = node.rpc("getblockchaininfo")
    return f"{node.name} at height {chain['blocks']}, {chain['bestblockhash']}"
