"""Several nodes, linked to each other, and what can go wrong between them."""

from __future__ import annotations

import contextlib
import socket
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

CONNECT_TIMEOUT = 30.0  # seconds


class Network:
    """`count` nodes with the same options, in `directory`/node0, node1, ...

    `topology` says which are linked, see `read_topology`; with all links (`full`) the rest still hear each other
    whichever nodes are stopped. As a context manager the network is started on entry and stopped on exit; for `keep`
    see `Node`. With `docker` nodes run in containers, and `bitcoind` is not used. Nodes are told apart by their peers
    by their names, which are in their user agents.
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
        """Let another node take part, of whatever program, linked to every other: before it is started."""
        node.options = _with_name(node.options, node.name)
        for number in range(len(self.nodes)):
            link = (number, len(self.nodes))
            self.links.append(link)
            self._relays[link] = self._relay(link)
        self.nodes.append(node)

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
        """Stop all nodes, all at once, and what makes links slow."""
        self._for_each(Node.stop)
        for relay in self._relays.values():
            relay.stop()
        if self.docker:
            self.docker.close()

    def connect(self) -> None:
        """Connect the nodes that run as the links say, and no others: also after one was restarted.

        It goes outward from the node with the most blocks, because a node in initial block download (one that was
        killed may have lost its chain) asks the first peer it meets for headers, and nobody else for the next 15
        minutes, even if that one has none either (upstream: net_processing.cpp, fSyncStarted).

        Raises WaitTimeoutError if two nodes did not shake hands within CONNECT_TIMEOUT seconds.
        """
        running = {number for number, node in enumerate(self.nodes) if node.pid is not None and not node.paused}
        links = [link for link in self.links if running.issuperset(link) and not self.is_cut(link)]
        self._disconnect(link for link in self.links if running.issuperset(link) and self.is_cut(link))
        blocks = {number: int(self.nodes[number].rpc("getblockcount")) for number in running}
        if len(set(blocks.values())) > 1:
            known = set[int]()
            for first in sorted(running, key=blocks.__getitem__, reverse=True):
                layer = {first} - known  # empty, unless nothing leads here from those before
                while layer:
                    known |= layer
                    outward = [link for link in links if len(known.intersection(link)) == 1]
                    self._connect(outward)
                    self._wait_for_headers(outward)
                    layer = set[int]().union(*outward) - known
        self._connect(links)

    def is_cut(self, link: Link) -> bool:
        """Whether a partition is between two nodes."""
        return bool(self.groups) and not any(group.issuperset(link) for group in self.groups)

    def partition(self, groups: Iterable[Iterable[int]]) -> None:
        """Cut the links between groups of nodes; nodes that are in none are a group of their own together.

        Returns when no node has a peer of another group. Raises NodeError if a node is in two groups.
        """
        parts = [set(group) for group in groups]
        named = [number for group in parts for number in group]
        if len(named) != len(set(named)):
            raise NodeError(f"node{next(number for number in named if named.count(number) > 1)} is in two groups")
        self.groups = [*parts, set(range(len(self.nodes))).difference(named)]
        self._divide()

    def heal(self) -> None:
        """End a partition: returns when both ends of every link say that they are connected."""
        self.groups = []
        self._divide()

    def _divide(self) -> None:
        if self.docker:
            self._disconnect(self.links)  # who moves to another network leaves connections that nobody closes
            self.docker.divide(self.nodes, self.groups)
        self.connect()

    def delay(self, link: Link, seconds: float) -> None:
        """Let all that two linked nodes say arrive `seconds` later, each way; 0 undoes it.

        Raises NodeError if they are not linked.
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
        """The Unix time in seconds at which all clocks stand, if it is not the real one."""
        time = self.nodes[0].options.get("mocktime")
        return int(time) if isinstance(time, str) else None

    def set_time(self, time: int | None) -> None:
        """Let all nodes' clocks stand at a Unix time in seconds, also when they are restarted; None: the real time."""
        for node in self.nodes:
            if node.pid is not None and not node.paused:
                node.rpc("setmocktime", time or 0)
        self._set_clock(time)  # only now: a time that nodes refuse would keep them from starting

    def _set_clock(self, time: int | None) -> None:
        for node in self.nodes:
            options = {name: value for name, value in node.options.items() if name != "mocktime"}
            node.options = options if time is None else {**options, "mocktime": str(time)}

    def peers(self, number: int) -> list[str]:
        """Return the names of the nodes that a node is connected to."""
        return [other.name for other in self.nodes if _peers(self.nodes[number], other)]

    def wait_until_same_tip(self, timeout: float = 60.0) -> str:
        """Wait until all nodes that run, and are not paused, have the same best block, and return its hash.

        Raises WaitTimeoutError if they had not within `timeout` seconds, with each node's height and tip, and NodeError
        if a node stopped answering.
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
        with ThreadPoolExecutor(max_workers=max(1, len(self.nodes))) as pool:
            results = [pool.submit(action, node) for node in self.nodes]
        for result in results:  # only now, when every node has been tried
            result.result()

    def _connect(self, links: Sequence[Link]) -> None:
        """Wait until nodes are connected."""

        def still_down() -> str:
            ends = map(self._ends, self._down(links))
            return "; ".join(f"{node.name} has no {other.name}, its log: {node.log_tail()}" for node, other in ends)

        for caller in {first for first, _ in self._try(links)}:
            _wake(self.nodes[caller])
        wait_for(lambda: not self._try(links), CONNECT_TIMEOUT, "nodes to connect", still_down)

    def _try(self, links: Sequence[Link]) -> list[Link]:
        """Return which links are not up; there a node tries to connect, unless it has an earlier connection."""
        down = self._down(links)
        for link in down:
            node, other = self._ends(link)
            address = other.p2p_address
            if link in self.delays:
                address = self._relays[link].start(other.relay_target, self.delays[link], node.relay_host)
            node.rpc("addnode", address, "onetry")
        return down

    def _down(self, links: Sequence[Link]) -> list[Link]:
        """Which links are not up: there an end has not had the other's verack."""
        peers = {number: self.nodes[number].rpc("getpeerinfo") for number in set[int]().union(*links)}

        def has(number: int, other: int) -> bool:
            return any("verack" in peer["bytesrecv_per_msg"] for peer in _named(peers[number], self.nodes[other]))

        return [(first, second) for first, second in links if not (has(first, second) and has(second, first))]

    def _wait_for_headers(self, links: Sequence[Link]) -> None:
        """Wait until each of two nodes knows of as many blocks as the other has."""
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
                    with contextlib.suppress(RpcError):  # the other's end was first
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
    """Let a node look now at the connections that it has just made.

    Else it begins to speak on them up to 100 ms later, and hears an answer up to 50 ms after that (upstream: net.cpp,
    ThreadMessageHandler and SELECT_TIMEOUT_MILLISECONDS). A message wakes both threads: `version` without content,
    which is ignored, on a connection that ends with it. Where that is not possible, it only takes longer.
    """
    host, _, port = node.relay_target.rpartition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1) as connection:
        connection.sendall(_EMPTY_VERSION)


# The magic of regtest, the command, a length of 0, and the checksum of nothing.
_EMPTY_VERSION = bytes.fromhex("fabfb5da") + b"version".ljust(12, b"\0") + bytes(4) + bytes.fromhex("5df6e0e2")


def _peers(node: Node, other: Node) -> list[dict[str, Any]]:
    """The connections that `node` has with `other`."""
    return _named(node.rpc("getpeerinfo"), other)


def _named(peers: list[dict[str, Any]], node: Node) -> list[dict[str, Any]]:
    """Those of a node's peers that are `node`."""
    return [peer for peer in peers if f"({node.name};" in peer["subver"].replace(")", ";")]


def _strangers(node: Node, other: Node) -> bool:
    return not _peers(node, other) and not _peers(other, node)


def _know_the_same(node: Node, other: Node) -> bool:
    chains = [each.rpc("getblockchaininfo") for each in (node, other)]
    return bool(min(chain["headers"] for chain in chains) >= max(chain["blocks"] for chain in chains))


def _tip(node: Node) -> str:
    chain = node.rpc("getblockchaininfo")
    return f"{node.name} at height {chain['blocks']}, {chain['bestblockhash']}"
