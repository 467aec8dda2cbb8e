"""Starts and connects several nodes, and makes faults between them: partitions, delays, wrong clocks."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from traincert.regtest.blockfiles import newest_time
from traincert.regtest.errors import NodeError, RegtestError, RpcError
from traincert.regtest.links import Link, Relay, read_topology
from traincert.regtest.node import Node, Options, anybodys_script, values, wait_for

if TYPE_CHECKING:
    from traincert.regtest.containers import Docker

CONNECT_TIMEOUT = 30.0  # seconds for two nodes to connect or disconnect
MAX_DELAY = 10.0  # seconds by which a link may be slow
HANDSHAKE = 8  # messages after each other, at most, until two nodes are connected and know each other's blocks
MAX_AHEAD = 60 * 60  # seconds by which a block may be ahead of a clock; nodes accept two hours (upstream: chain.h)
MAX_TIME = 2**32 - 1  # a block's time has 32 bits
OLD = 24 * 60 * 60  # seconds; a node whose best header is older asks only one peer for headers (net_processing.cpp)

# A node sends transactions to whitelisted peers at once. Other peers get them seconds later, or never if clocks stand.
_OPTIONS: Options = {"whitelist": "in,out,noban@0.0.0.0/0"}


class Network:
    """`count` nodes with the same options, in `directory`/node0, node1, ...

    `topology` says which nodes are linked, see `read_topology`. With `full`, the running nodes stay connected when
    others are stopped. The context manager starts the network on entry and stops it on exit. For `keep` see `Node`.
    With `docker`, the nodes run in containers, and `bitcoind` is ignored. `node_options` are further options of single
    nodes, by the nodes' names. Each node's user agent contains its name, so `peers()` can recognise it.

    Raises NodeError if there is no node of a name, or if two nodes were given the same port.
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
        node_options: Mapping[str, Options] | None = None,
    ) -> None:
        self.directory = directory
        self.docker = docker
        self.nodes = []
        own = dict(node_options or {})
        for i in range(count):
            name = f"node{i}"
            named = _with_name({**_OPTIONS, **(options or {}), **own.pop(name, {})}, name)
            datadir = directory / name
            self.nodes.append(docker.node(datadir, named) if docker else Node(bitcoind, datadir, named, keep=keep))
            self.nodes[-1].reconnect = self.connect
        for unknown in own:
            raise NodeError(f"there is no node {unknown}: there are node0 to node{count - 1}")
        self._check_ports()
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

    def _check_ports(self) -> None:
        for option in ("port", "rpcport"):
            ports = [str(node.options[option]) for node in self.nodes if option in node.options]
            if len(ports) != len(set(ports)):
                raise NodeError(f"option {option}: two nodes cannot have the same port: give each node its own")

    def add(self, node: Node) -> None:
        """Add a node and link it to all others. It may run another bitcoind. Call this before the node starts."""
        node.options = _with_name({**_OPTIONS, **node.options}, node.name)
        node.reconnect = self.connect
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

    def start_nodes(self, nodes: Sequence[Node]) -> None:
        """Start some nodes at the same time, and connect all that run, also if some do not start.

        Raises NodeError if a node does not start, and WaitTimeoutError as `connect()`.
        """
        try:
            self._for_each(Node.start, nodes)
        finally:
            self.connect()

    def stop_nodes(self, nodes: Sequence[Node]) -> None:
        """Stop some nodes at the same time."""
        self._for_each(Node.stop, nodes)

    def stop(self) -> None:
        """Stop all nodes at the same time, and all relays. With Docker, also remove the networks."""
        with contextlib.ExitStack() as stack:  # each is ended, also if another cannot be
            if self.docker:
                stack.callback(self.docker.close)
            for relay in self._relays.values():
                stack.callback(relay.stop)
            self._for_each(Node.stop)

    def connect(self) -> None:
        """Connect the running nodes along the links, and disconnect cut links. Call it also after a node's start.

        Nodes that somebody starts with bitcoind alone find each other: afterwards their bitcoin.conf has the links.

        The order matters for a node whose tip is old, for example one that lost its chain when it was killed. Such a
        node asks only its first peer for headers, and asks no other peer for 15 minutes, even if the first one has no
        headers (upstream: net_processing.cpp, fSyncStarted). So we start at the node with the most blocks, and connect
        its neighbours first, then their neighbours. Where such a node has other peers already, it loses them before.

        Raises WaitTimeoutError if two nodes do not complete the handshake within CONNECT_TIMEOUT seconds, or longer on
        slow links.
        """
        running = self._running()
        links = [link for link in self.links if running.issuperset(link) and not self.is_cut(link)]
        self._disconnect(link for link in self.links if self.is_cut(link))
        chains = {number: self.nodes[number].rpc("getblockchaininfo") for number in running}
        blocks = {number: int(chain["blocks"]) for number, chain in chains.items()}
        if len(set(blocks.values())) > 1:
            old = self._now() - OLD
            for part in _parts(running, links):
                most = max(blocks[number] for number in part)
                behind = {number for number in part if blocks[number] < most and chains[number]["time"] <= old}
                self._disconnect(link for link in links if behind.intersection(link))
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
        self._write_confs()

    def _write_confs(self) -> None:
        """Write bitcoin.conf of each node that has been started, as for a start with bitcoind alone.

        It has the clock, and the links that are neither cut nor slow. Our own starts leave the links out, because we
        make and cut them ourselves.
        """
        links = [link for link in self.links if not self.is_cut(link) and link not in self.delays]
        for number, node in enumerate(self.nodes):
            others = {self.nodes[each] for link in links if number in link for each in link} - {node}
            if node.p2p_port and node.datadir.is_dir():
                node.write_conf(sorted(other.p2p_address for other in others if other.p2p_port))

    def _running(self) -> set[int]:
        """Return the numbers of the nodes that run and are not paused."""
        return {number for number, node in enumerate(self.nodes) if node.pid is not None and not node.paused}

    def linked(self, number: int) -> list[Node]:
        """Return a running node, and the running nodes that can hear of it over any number of links.

        Raises NodeError if it does not run.
        """
        for part in self._running_parts():
            if number in part:
                return [self.nodes[each] for each in sorted(part)]
        raise NodeError(f"{self.nodes[number].name} is not running")

    def _running_parts(self) -> list[set[int]]:
        running = self._running()
        return _parts(running, [link for link in self.links if running.issuperset(link) and not self.is_cut(link)])

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
        with self._all_or_nothing():
            self.groups = [*parts, set(range(len(self.nodes))).difference(named)]
            self._divide()

    def heal(self) -> None:
        """End a partition. Returns when both nodes of each link report the connection.

        Raises WaitTimeoutError if nodes do not connect within CONNECT_TIMEOUT seconds.
        """
        with self._all_or_nothing():
            self.groups = []
            self._divide()

    def _divide(self) -> None:
        if self.docker:
            self._disconnect(self.links)  # nothing else closes the connections of a node that changes its network
            self.docker.divide(self.nodes, self.groups)
        self.connect()

    def delay(self, link: Link, seconds: float) -> None:
        """Delay all data between two linked nodes by `seconds`, in each direction; 0 removes the delay.

        Raises NodeError if the nodes are not linked, or if the delay is longer than MAX_DELAY. Raises WaitTimeoutError
        if they do not connect again in time. Then nothing has changed.
        """
        if link not in self.links:
            raise NodeError(f"node{link[0]} and node{link[1]} are not linked")
        if not 0 <= seconds <= MAX_DELAY:
            raise NodeError(f"a link cannot be {seconds:g} s slow, but up to {MAX_DELAY:g} s")
        with self._all_or_nothing():
            others = {other: delay for other, delay in self.delays.items() if other != link}
            self.delays = {**others, link: seconds} if seconds else others
            self._link_again([link])

    def _link_again(self, links: Sequence[Link]) -> None:
        for link in links:
            self._relays[link].stop()
        self._disconnect(links)
        self.connect()

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Bring the partition and the delays back if the block fails."""
        groups, delays = self.groups, self.delays
        try:
            yield
        except BaseException:
            changed = [link for link in self.links if self.delays.get(link) != delays.get(link)]
            self.groups, self.delays = groups, delays
            with contextlib.suppress(RegtestError):
                self._link_again(changed)
                self._divide()
            raise

    @property
    def time(self) -> int | None:
        """The mock time of all nodes, in Unix seconds; None for the real time."""
        time = self.nodes[0].options.get("mocktime")
        return int(time) if isinstance(time, str | int) else None

    def _now(self) -> float:
        return time.time() if self.time is None else self.time

    def set_time(self, time: int | None) -> None:
        """Set the mock time of all nodes, in Unix seconds, also for later starts; None sets the real time.

        A mock clock stands still. Raises NodeError if a node, running or not, has a block that is too far in the future
        of this time, or if the time is too late for blocks. Raises NodeUnreachableError if a node does not answer. Then
        nothing has changed.
        """
        before = self.time
        try:
            self._set_clock(time)
            self._check_clock()
            self._tell_clock()
            self._write_confs()
        except BaseException:
            self._set_clock(before)
            with contextlib.suppress(RegtestError):
                self._tell_clock()
                self._write_confs()
            raise

    def _check_clock(self) -> None:
        now = self._now()
        if now > MAX_TIME:
            raise NodeError(f"a block's time ends at {_shown(MAX_TIME)}")
        running = self._running()
        for number, node in enumerate(self.nodes):
            newest = node.rpc("getblockchaininfo")["time"] if number in running else newest_time(node.chain_dir)
            if newest > now + MAX_AHEAD:
                raise NodeError(
                    f"{node.name} has a block of {_shown(newest)}: with a clock more than an hour before that, it "
                    "takes no more blocks and does not start"
                )

    def _tell_clock(self) -> None:
        for number in sorted(self._running()):
            self.nodes[number].rpc("setmocktime", self.time or 0)

    def _set_clock(self, time: int | None) -> None:
        for node in self.nodes:
            options = {name: value for name, value in node.options.items() if name != "mocktime"}
            node.options = options if time is None else {**options, "mocktime": str(time)}

    def peers(self, number: int) -> list[str]:
        """Return the names of the nodes to which a node is connected."""
        peers = self.nodes[number].rpc("getpeerinfo")
        return [other.name for other in self.nodes if _named(peers, other)]

    def reorg(self, depth: int, number: int = 0) -> str:
        """Replace the last `depth` blocks of a node's chain by one more empty blocks. Returns the new tip's hash.

        The transactions of the replaced blocks go back to the mempool. The other nodes follow: `wait_until_synced()`.
        Raises RpcError if the chain is too short, or if its blocks need certificates.
        """
        node = self.nodes[number]
        first = node.rpc("getblockhash", node.rpc("getblockcount") - depth + 1)
        node.rpc("invalidateblock", first)
        try:
            for _ in range(depth + 1):
                node.rpc("generateblock", anybodys_script(), [])
        finally:
            node.rpc("reconsiderblock", first)  # the old blocks are valid, but no longer the best chain
        tip: str = node.rpc("getbestblockhash")
        return tip

    def wait_until_synced(self, timeout: float = 60.0) -> None:
        """Wait until nodes that can hear of each other have the same tip and mempool, and each node its indexes.

        Nodes that do not run, or are paused, do not count. A node that holds a block of the others for invalid need not
        have their tip and mempool.

        Raises WaitTimeoutError after `timeout` seconds: the message has each node's height, tip and mempool. Raises
        NodeError if a node stops answering.
        """
        for part in self._running_parts():
            nodes = [self.nodes[number] for number in sorted(part)]
            names = ", ".join(node.name for node in nodes)
            wait_for(partial(_synced, nodes), timeout, f"{names} to be in step", partial(_states, nodes))

    def wait_until_same_tip(self, timeout: float = 60.0) -> str:
        """Wait until all running nodes that are not paused have the same best block. Returns its hash.

        Raises WaitTimeoutError after `timeout` seconds: the message has each node's height and tip. Raises NodeError if
        a node stops answering, or if no node runs.
        """
        nodes = [self.nodes[number] for number in sorted(self._running())]
        if not nodes:
            raise NodeError("no node of the network is running")
        tips: list[str] = []

        def same() -> bool:
            tips[:] = [node.rpc("getbestblockhash") for node in nodes]
            return len(set(tips)) == 1

        wait_for(same, timeout, "the same tip on all nodes", lambda: "; ".join(map(_tip, nodes)))
        return tips[0]

    def _for_each(self, action: Callable[[Node], None], nodes: Sequence[Node] | None = None) -> None:
        """Do something with nodes, by default all, at the same time. Raises their errors after it has ended on all.

        After Ctrl-C it waits for the actions that have begun: a node that is still being started could not be stopped.
        """
        nodes = self.nodes if nodes is None else nodes
        begun: set[Node] = set()
        ended: set[Node] = set()
        failed: dict[str, Exception] = {}
        interrupted = False
        lock = threading.Lock()

        def act(node: Node) -> None:
            with lock:
                if interrupted:
                    return
                begun.add(node)
            try:
                action(node)
            except Exception as error:
                failed[node.name] = error
            finally:
                ended.add(node)

        if threading.main_thread().is_alive():
            try:
                with ThreadPoolExecutor(max_workers=max(1, len(nodes))) as pool:
                    results = [pool.submit(act, node) for node in nodes]
            except BaseException:
                with lock:
                    interrupted = True
                # The pool does not know a thread during whose start the interrupt came.
                while begun - ended:
                    time.sleep(0.01)
                raise
            for result in results:
                result.result()
        else:  # in a function of `atexit`: no thread can be started any more
            for node in nodes:
                act(node)
        names = [node.name for node in nodes if node.name in failed]
        if len(names) > 1 and isinstance(failed[names[0]], RegtestError):
            raise NodeError(f"{failed[names[0]]} ({', '.join(names[1:])}: failed, too)") from failed[names[0]]
        if names:
            raise failed[names[0]]

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
        wait_for(lambda: not self._try(links), self._patience(links), "nodes to connect", still_down)

    def _patience(self, links: Iterable[Link]) -> float:
        """Return in how many seconds the nodes of the links must have connected, and know each other's blocks."""
        return CONNECT_TIMEOUT + HANDSHAKE * max((self.delays.get(link, 0.0) for link in links), default=0.0)

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
        """Wait until both nodes of each link know the other's blocks, or refuse them."""
        for link in links:
            node, other = self._ends(link)
            what = f"{node.name} and {other.name} to know of the same blocks"
            wait_for(partial(_know_the_same, node, other), self._patience([link]), what, node.log_tail)

    def _relay(self, link: Link) -> Relay:
        return Relay(self.directory / "links" / f"{link[0]}-{link[1]}.pid", keep=self.keep)

    def _ends(self, link: Link) -> tuple[Node, Node]:
        return self.nodes[link[0]], self.nodes[link[1]]

    def _disconnect(self, links: Iterable[Link]) -> None:
        """Close the connections of the links, from each end that runs. A paused end learns of it when it goes on."""
        links = list(links)
        ends = self._running() & set[int]().union(*links)
        for number in ends:
            self._forget_peers(self.nodes[number])

        def connections() -> list[tuple[Node, int]]:
            peers = {number: self.nodes[number].rpc("getpeerinfo") for number in ends}
            return [
                (self.nodes[one], peer["id"])
                for link in links
                for one, other in (link, link[::-1])
                if one in ends
                for peer in _named(peers[one], self.nodes[other])
            ]

        for node, peer in connections():
            with contextlib.suppress(RpcError):  # the other node may have closed the connection already
                node.rpc("disconnectnode", "", peer)
        wait_for(lambda: not connections(), CONNECT_TIMEOUT, "nodes to be disconnected")

    def _forget_peers(self, node: Node) -> None:
        """Let a node that was started with bitcoind alone not connect again on its own, see `_write_confs()`."""
        ours = {other.p2p_address for other in self.nodes}
        for peer in node.rpc("getaddednodeinfo"):
            if peer["addednode"] in ours:
                node.rpc("addnode", peer["addednode"], "remove")


def _with_name(options: Options, name: str) -> Options:
    return {**options, "uacomment": [name, *values(options.get("uacomment", []))]}


def _parts(numbers: Iterable[int], links: Iterable[Link]) -> list[set[int]]:
    """Return the numbers in parts: two are in one part if links lead from one to the other."""
    parts = [{number} for number in numbers]
    for link in links:
        joined = [part for part in parts if part.intersection(link)]
        parts = [part for part in parts if part not in joined] + [set[int]().union(*joined)]
    return parts


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


def _named(peers: list[dict[str, Any]], node: Node) -> list[dict[str, Any]]:
    """Return the entries of a getpeerinfo whose user agent has the name of `node`."""
    return [peer for peer in peers if f"({node.name};" in peer["subver"].replace(")", ";")]


def _know_the_same(node: Node, other: Node) -> bool:
    return all(_has_heard(*pair) or _refuses(*pair) for pair in ((node, other), (other, node)))


def _has_heard(node: Node, other: Node) -> bool:
    """Whether a node knows the header of another one's tip."""
    try:
        node.rpc("getblockheader", other.rpc("getbestblockhash"))
    except RpcError:
        return False
    return True


def _refuses(node: Node, other: Node) -> bool:
    """Whether a node holds a block of another one's chain for invalid."""
    for tip in node.rpc("getchaintips"):
        if tip["status"] == "invalid":
            with contextlib.suppress(RpcError):  # the other node does not have this block
                if other.rpc("getblockheader", tip["hash"])["confirmations"] > 0:
                    return True
    return False


def _synced(nodes: Sequence[Node]) -> bool:
    for node in nodes:
        blocks = node.rpc("getblockcount")
        if any(
            index["best_block_height"] < blocks or not index["synced"] for index in node.rpc("getindexinfo").values()
        ):
            return False
    best = max(nodes, key=lambda node: int(node.rpc("getblockcount")))
    tip, mempool = best.rpc("getbestblockhash"), set(best.rpc("getrawmempool"))
    return all(
        (node.rpc("getbestblockhash") == tip and set(node.rpc("getrawmempool")) == mempool) or _refuses(node, best)
        for node in nodes
    )


def _tip(node: Node) -> str:
    chain = node.rpc("getblockchaininfo")
    return f"{node.name} at height {chain['blocks']}, {chain['bestblockhash']}"


def _states(nodes: Sequence[Node]) -> str:
    return "; ".join(f"{_tip(node)}, {node.rpc('getmempoolinfo')['size']} in the mempool" for node in nodes)


def _shown(time: int) -> str:
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"
