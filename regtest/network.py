"""Starts and connects several nodes, and makes faults between them: partitions, delays, wrong clocks."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from traincert.regtest.errors import NodeError, RpcError
from traincert.regtest.links import Link, Relay, read_topology
from traincert.regtest.node import Node, Options, wait_for

if TYPE_CHECKING:
    from traincert.regtest.containers import Docker

CONNECT_TIMEOUT = 30.0  # seconds for two nodes to connect or disconnect


class Network:
    """`count` nodes with the same options, in `directory`/node0, node1, ...

    `topology` says which nodes are linked, see `read_topology`. With `full`, the running nodes stay connected when
    others are stopped. The context manager starts the network on entry and stops it on exit. For `keep` see `Node`.
    With `docker`, the nodes run in containers, and `bitcoind` is ignored. Each node's user agent contains its name, so
    `peers()` can recognise it.
    """

    def __init__(
        self,
        bitcoind: Path,
        directory: Path,
        count: int,
        options: Options | None = None,
        *,
        topology: str | Sequence[Link] = "full",
        keep: bool = False,
        docker: Docker | None = None,
    ) -> None:
        self.directory = directory
        self.docker = docker
        self.nodes = []
        for i in range(count):
            datadir, named = directory / f"node{i}", _with_name(options or {}, f"node{i}")
            self.nodes.append(docker.node(datadir, named) if docker else Node(bitcoind, datadir, named, keep=keep))
        self.keep = keep
        self.links = read_topology(topology, count)
        self.groups: list[set[int]] = []
        self.delays: dict[Link, float] = {}
        self._relays = {link: self._relay(link) for link in self.links}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if not self.keep:
            self.stop()

    def add(self, node: Node) -> None:
        """Add a node and link it to all others. It may run another bitcoind. Call this before the node starts."""
        node.options = _with_name(node.options, node.name)
        for number in range(len(self.nodes)):
            link = (number, len(self.nodes))
            self.links.append(link)
            self._relays[link] = self._relay(link)
        self.nodes.append(node)

    def start(self) -> None:
        """Start all nodes at the same time, and connect them. If one fails, stop the others.

        Raises NodeError or WaitTimeoutError for the first node that did not start or connect.
        """
        try:
            self._for_each(Node.start)
            self.connect()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all nodes at the same time, and all relays. With Docker, also remove the networks."""
        self._for_each(Node.stop)
        for relay in self._relays.values():
            relay.stop()
        if self.docker:
            self.docker.close()

    def connect(self) -> None:
        """Connect the running nodes along the links, and disconnect cut links. Call it also after a node's restart.

        The order matters for a node in initial block download, for example one that lost its chain when it was killed.
        Such a node asks only its first peer for headers, and asks no other peer for 15 minutes, even if the first one
        has no headers (upstream: net_processing.cpp, fSyncStarted). So we start at the node with the most blocks, and
        connect its neighbours first, then their neighbours.

        Raises WaitTimeoutError if two nodes do not complete the handshake within CONNECT_TIMEOUT seconds.
        """
        running = {number for number, node in enumerate(self.nodes) if node.pid is not None and not node.paused}
        links = [link for link in self.links if running.issuperset(link) and not self.is_cut(link)]
        self._disconnect(link for link in self.links if running.issuperset(link) and self.is_cut(link))
        blocks = {number: int(self.nodes[number].rpc("getblockcount")) for number in running}
        if len(set(blocks.values())) > 1:
            known = set[int]()
            for first in sorted(running, key=blocks.__getitem__, reverse=True):
                layer = {first} - known  # empty if an earlier round has already reached this node
                while layer:
                    known |= layer
                    outward = [link for link in links if len(known.intersection(link)) == 1]
                    self._connect(outward)
                    self._wait_for_headers(outward)
                    layer = set[int]().union(*outward) - known
        self._connect(links)

    def is_cut(self, link: Link) -> bool:
        """Whether a partition separates the two nodes of a link."""
        return bool(self.groups) and not any(group.issuperset(link) for group in self.groups)

    def partition(self, groups: Iterable[Iterable[int]]) -> None:
        """Cut the links between groups of nodes. All nodes without a group form one more group.

        Returns when no node has a peer of another group. Raises NodeError if a node is in two groups. Raises
        WaitTimeoutError if nodes do not connect or disconnect within CONNECT_TIMEOUT seconds.
        """
        parts = [set(group) for group in groups]
        named = [number for group in parts for number in group]
        if len(named) != len(set(named)):
            raise NodeError(f"node{next(number for number in named if named.count(number) > 1)} is in two groups")
        self.groups = [*parts, set(range(len(self.nodes))).difference(named)]
        self._divide()

    def heal(self) -> None:
        """End a partition. Returns when both nodes of each link report the connection.

        Raises WaitTimeoutError if nodes do not connect within CONNECT_TIMEOUT seconds.
        """
        self.groups = []
        self._divide()

    def _divide(self) -> None:
        if self.docker:
            self._disconnect(self.links)  # nothing else closes the connections of a node that changes its network
            self.docker.divide(self.nodes, self.groups)
        self.connect()

    def delay(self, link: Link, seconds: float) -> None:
        """Delay all data between two linked nodes by `seconds`, in each direction; 0 removes the delay.

        Raises NodeError if the nodes are not linked. Raises WaitTimeoutError if they do not connect again in time.
        """
        if link not in self.links:
            raise NodeError(f"node{link[0]} and node{link[1]} are not linked")
        self.delays.pop(link, None)
        self._relays[link].stop()
        if seconds:
            self.delays[link] = seconds
        self._disconnect([link])
        self.connect()

    @property
    def time(self) -> int | None:
        """The mock time of all nodes, in Unix seconds; None for the real time."""
        time = self.nodes[0].options.get("mocktime")
        return int(time) if isinstance(time, str) else None

    def set_time(self, time: int | None) -> None:
        """Set the mock time of all nodes, in Unix seconds, also for later starts; None sets the real time.

        A mock clock stands still. Raises RpcError if a node refuses the time.
        """
        for node in self.nodes:
            if node.pid is not None and not node.paused:
                node.rpc("setmocktime", time or 0)
        self._set_clock(time)  # only after all nodes accept the time: with a wrong time in its conf a node cannot start

    def _set_clock(self, time: int | None) -> None:
        for node in self.nodes:
            options = {name: value for name, value in node.options.items() if name != "mocktime"}
            node.options = options if time is None else {**options, "mocktime": str(time)}

    def peers(self, number: int) -> list[str]:
        """Return the names of the nodes to which a node is connected."""
        return [other.name for other in self.nodes if _peers(self.nodes[number], other)]

    def wait_until_same_tip(self, timeout: float = 60.0) -> str:
        """Wait until all running nodes that are not paused have the same best block. Returns its hash.

        Raises WaitTimeoutError after `timeout` seconds: the message has each node's height and tip. Raises NodeError if
        a node stops answering, or if no node runs.
        """
        nodes = [node for node in self.nodes if node.pid is not None and not node.paused]
        if not nodes:
            raise NodeError("no node of the network is running")
        tips: list[str] = []

        def same() -> bool:
            tips[:] = [node.rpc("getbestblockhash") for node in nodes]
            return len(set(tips)) == 1

        wait_for(same, timeout, "the same tip on all nodes", lambda: "; ".join(map(_tip, nodes)))
        return tips[0]

    def _for_each(self, action: Callable[[Node], None]) -> None:
        """Do something with all nodes at the same time. Raises a node's error after it has ended on all nodes.

        After Ctrl-C it waits for the actions that have begun: a node that is still being started could not be stopped.
        """
        begun: set[Node] = set()
        ended: set[Node] = set()
        interrupted = False
        lock = threading.Lock()

        def act(node: Node) -> None:
            with lock:
                if interrupted:
                    return
                begun.add(node)
            try:
                action(node)
            finally:
                ended.add(node)

        try:
            with ThreadPoolExecutor(max_workers=max(1, len(self.nodes))) as pool:
                results = [pool.submit(act, node) for node in self.nodes]
        except BaseException:
            with lock:
                interrupted = True
            # The pool does not know a thread during whose start the interrupt came.
            while begun - ended:
                time.sleep(0.01)
            raise
        for result in results:
            result.result()

    def _connect(self, links: Sequence[Link]) -> None:
        """Connect the nodes of each link and wait for it. Raises WaitTimeoutError if one link stays down."""

        def still_down() -> str:
            ends = map(self._ends, self._down(links))
            return "; ".join(
                f"{node.name} is not connected to {other.name}; log of {node.name}: {node.log_tail()}"
                for node, other in ends
            )

        for caller in {first for first, _ in self._try(links)}:
            _wake(self.nodes[caller])
        wait_for(lambda: not self._try(links), CONNECT_TIMEOUT, "nodes to connect", still_down)

    def _try(self, links: Sequence[Link]) -> list[Link]:
        """Return the links that are down. Ask the first node of each such link to connect.

        A node ignores the request if it has this connection already (upstream: `addnode` with onetry).
        """
        down = self._down(links)
        for link in down:
            node, other = self._ends(link)
            address = other.p2p_address
            if link in self.delays:
                address = self._relays[link].start(other.relay_target, self.delays[link], node.relay_host)
            node.rpc("addnode", address, "onetry")
        return down

    def _down(self, links: Sequence[Link]) -> list[Link]:
        """Return the links that are down: at least one node has not received the other's verack."""
        peers = {number: self.nodes[number].rpc("getpeerinfo") for number in set[int]().union(*links)}

        def has(number: int, other: int) -> bool:
            return any("verack" in peer["bytesrecv_per_msg"] for peer in _named(peers[number], self.nodes[other]))

        return [(first, second) for first, second in links if not (has(first, second) and has(second, first))]

    def _wait_for_headers(self, links: Sequence[Link]) -> None:
        """Wait until both nodes of each link know as many headers as either has blocks."""
        for node, other in map(self._ends, links):
            what = f"{node.name} and {other.name} to know of the same blocks"
            wait_for(partial(_know_the_same, node, other), CONNECT_TIMEOUT, what, node.log_tail)

    def _relay(self, link: Link) -> Relay:
        return Relay(self.directory / "links" / f"{link[0]}-{link[1]}.pid", keep=self.keep)

    def _ends(self, link: Link) -> tuple[Node, Node]:
        return self.nodes[link[0]], self.nodes[link[1]]

    def _disconnect(self, links: Iterable[Link]) -> None:
        for node, other in map(self._ends, links):
            if node.pid is None or other.pid is None:
                continue
            for one, another in ((node, other), (other, node)):
                for peer in _peers(one, another):
                    with contextlib.suppress(RpcError):  # the other node may have closed the connection already
                        one.rpc("disconnectnode", "", peer["id"])
            wait_for(
                partial(_strangers, node, other),
                CONNECT_TIMEOUT,
                f"{node.name} and {other.name} to be disconnected",
            )


def _with_name(options: Options, name: str) -> Options:
    comments = options.get("uacomment", [])
    return {**options, "uacomment": [name, *([comments] if isinstance(comments, str) else comments)]}


def _wake(node: Node) -> None:
    """Make a node use its new connections at once.

    Otherwise its message thread waits up to 100 ms, and its socket thread up to 50 ms (upstream: net.cpp,
    ThreadMessageHandler and SELECT_TIMEOUT_MILLISECONDS). Any message wakes both threads. We send an empty `version` on
    a short connection, because nodes ignore it. If this fails, connecting only takes longer.
    """
    host, _, port = node.relay_target.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1) as connection:
        connection.sendall(_EMPTY_VERSION)


# Regtest's message start, the message type, a payload length of 0, and the checksum of an empty payload.
_EMPTY_VERSION = bytes.fromhex("fabfb5da") + b"version".ljust(12, b"\0") + bytes(4) + bytes.fromhex("5df6e0e2")


def _peers(node: Node, other: Node) -> list[dict[str, Any]]:
    """Return the entries of `node`'s getpeerinfo that are connections to `other`."""
    return _named(node.rpc("getpeerinfo"), other)


def _named(peers: list[dict[str, Any]], node: Node) -> list[dict[str, Any]]:
    """Return the entries of a getpeerinfo whose user agent has the name of `node`."""
    return [peer for peer in peers if f"({node.name};" in peer["subver"].replace(")", ";")]


def _strangers(node: Node, other: Node) -> bool:
    return not _peers(node, other) and not _peers(other, node)


def _know_the_same(node: Node, other: Node) -> bool:
    chains = [each.rpc("getblockchaininfo") for each in (node, other)]
    return bool(min(chain["headers"] for chain in chains) >= max(chain["blocks"] for chain in chains))


def _tip(node: Node) -> str:
    chain = node.rpc("getblockchaininfo")
    return f"{node.name} at height {chain['blocks']}, {chain['bestblockhash']}"
