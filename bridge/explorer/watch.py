"""What the explorer knows: it follows its nodes, and tells the pages what changed.

All of this runs in one event loop; only the calls of nodes run in threads (nodes.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traincert.bridge.explorer.blocks import BlockFacts, read_branch
from traincert.bridge.explorer.cycles import CycleFacts, Cycles
from traincert.bridge.explorer.nodes import WatchedNode
from traincert.bridge.status import is_locked, read_status
from traincert.regtest.errors import NodeError, RpcError

if TYPE_CHECKING:
    from traincert.bridge.coordinator_folder import CoordinatorFolder

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
"""How often a node is asked for its tip."""
LEARN_SECONDS = 5.0
"""How often it is asked for what changes rarely."""
LAGGING_BLOCKS = 3
LAGGING_SECONDS = 5.0
"""A node that is so many blocks behind the highest one for so long lags."""
QUIET_ROUNDS = 3
"""No block for so many rounds is an alarm."""
_MOST_CHANGES = 5000  # kept for pages that lost their connection
_MOST_ALARMS = 1000
_NO_NUMBER = 2**64 - 1  # a certificate's loss that is not finite: trainer/scoring.py's MAX_NANO_NATS
_MOST_BRANCH = 100  # blocks of a branch that a node reports


@dataclass(frozen=True)
class Change:
    """Something that pages are told: `event` is the kind, `data` JSON."""

    number: int
    event: str
    data: str


@dataclass
class Alarm:
    """Something that people should look at. `ended` is None while it goes on; times are Unix times in seconds."""

    number: int
    kind: str
    text: str
    time: float
    ended: float | None = None


class Watch:
    """Follows the nodes. `cycles` reads records, where there are any; `coordinator` is the coordinator's folder."""

    def __init__(
        self, nodes: Sequence[WatchedNode], cycles: Cycles | None, coordinator: CoordinatorFolder | None
    ) -> None:
        self.nodes = nodes
        self.cycles = cycles
        self.coordinator = coordinator
        self.blocks: dict[str, BlockFacts] = {}
        self.reorganisations = 0
        self.errors: dict[str, int] = {node.name: 0 for node in nodes}  # calls that failed
        self.alarms: deque[Alarm] = deque(maxlen=_MOST_ALARMS)
        self._open: dict[str, Alarm] = {}  # those that go on, by what they are about
        self._alarms = 0
        self._changes: deque[Change] = deque(maxlen=_MOST_CHANGES)
        self._number = 0
        self._news = asyncio.Event()
        self._said: dict[str, Any] = {}
        self._main: str | None = None  # the node whose chain is shown
        self.kept: dict[Any, Any] = {}  # what views.py has computed of all blocks
        self.kept_for = ""  # the tip of these blocks

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the nodes while the code inside runs."""
        tasks = [asyncio.create_task(self._follow(node)) for node in self.nodes]
        tasks.append(asyncio.create_task(self._look()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # What pages ask for.

    @property
    def main(self) -> WatchedNode:
        """The node whose chain is shown: the first one that is up, or else that was up."""
        return next((node for node in self.nodes if node.up), None) or next(
            (node for node in self.nodes if node.hashes), self.nodes[0]
        )

    @property
    def start_height(self) -> int | None:
        """The first height at which a block of the shown chain needs a certificate; None: no training network."""
        return self.main.network["start_height"] if self.main.network else None

    def at(self, height: int) -> BlockFacts | None:
        """Return the block at a height of the shown chain."""
        return self.blocks.get(self.main.hashes.get(height, ""))

    def chain(self, first: int = 0) -> Iterator[BlockFacts]:
        """Return the blocks of the shown chain from a height on."""
        for height in range(max(first, 0), self.main.height + 1):
            if block := self.at(height):
                yield block

    def cycle(self, block: BlockFacts | None) -> CycleFacts | None:
        """Return what the record says of the cycle that a block closes."""
        start = self.start_height
        if self.cycles is None or block is None or block.certificate is None or start is None:
            return None
        return self.cycles.facts(block.certificate, block.height - start + 1)

    def loss(self, block: BlockFacts) -> float | None:
        """Return the validation loss of the model after a block's cycle, in nats; None: there is none, or it is NaN."""
        cycle, certificate = self.cycle(block), block.certificate
        if certificate and certificate.loss_after == _NO_NUMBER:
            return None
        if cycle:
            return cycle.loss
        return certificate.loss_after / 1e9 if certificate and certificate.record != bytes(32) else None

    def names(self) -> dict[bytes, str]:
        """Return the members' names by their keys, as the coordinator has them."""
        return {key: name for name, key in self.coordinator.members.keys().items()} if self.coordinator else {}

    def block_json(self, block: BlockFacts) -> dict[str, Any]:
        """Return a block as the API has it, with what its record says."""
        shown, start = block.json(), self.start_height
        if start is None or block.height < start:
            shown["certificate"] = None
        cycle = self.cycle(block)
        shown["name"] = self.names().get(block.certificate.winner_key) if block.certificate else None
        shown |= {
            "loss": self.loss(block) if shown["certificate"] else None,
            "metric": cycle.metric if cycle else None,
            "tasks": len(cycle.tasks) if cycle else None,
            "refusals": cycle.refusals if cycle else None,
        }
        return shown

    def info(self) -> dict[str, Any]:
        """Return the state of all, as /api/info has it."""
        main = self.main
        tip = self.blocks.get(main.tip or "")
        highest = max((node.info.get("blocks", 0) for node in self.nodes), default=0)
        loading = main.loading and {"done": main.loading[0], "total": main.loading[1]}
        coordinator = None
        if self.coordinator:
            folder = self.coordinator.folder
            coordinator = {"runs": is_locked(folder / "run" / ".lock"), **read_status(folder)}
            coordinator.pop("time", None)
        return {
            "version": self._number,
            "nodes": [node.json(highest) for node in self.nodes],
            "network": main.network,
            "tip": self.block_json(tip) if tip else None,
            "loading": loading or None,
            "records": self.cycles is not None,
            "coordinator": coordinator,
        }

    def branches(self) -> list[BlockFacts]:
        """Return the known blocks that are not in the shown chain, the highest first."""
        off = [block for block in self.blocks.values() if self.main.hashes.get(block.height) != block.hash]
        return sorted(off, key=lambda block: (-block.height, block.hash))

    async def changes(self, since: int | None) -> AsyncIterator[Change]:
        """Return the changes after one of them, and then each as it comes. None: from now on.

        A change `reset` says: too much has changed, fetch everything again.
        """
        number = self._number if since is None else since
        while True:
            kept = self._changes[0].number if self._changes else self._number + 1
            if number > self._number or number < kept - 1:
                number = self._number
                yield Change(number, "reset", "{}")
            for change in list(self._changes):
                if change.number > number:
                    number = change.number
                    yield change
            news = self._news
            if number == self._number:
                await news.wait()

    # How it learns.

    def _tell(self, event: str, data: Any) -> None:
        self._number += 1
        self._changes.append(Change(self._number, event, json.dumps(data)))
        self._news.set()
        self._news = asyncio.Event()

    async def _follow(self, node: WatchedNode) -> None:
        """Ask a node again and again, whatever happens to it."""
        learned = 0.0
        while True:
            try:
                if time.monotonic() - learned > LEARN_SECONDS or not node.up:
                    await node.learn()
                    await self._find_equivocations(node)
                    learned = time.monotonic()
                await self._update(node)
            except NodeError as error:
                self.errors[node.name] += 1
                node.problem, learned = str(error), 0.0
            except Exception as error:  # a defect of ours: the page and the log say so, and the rest goes on
                _log.exception("%s cannot be read", node.name)
                node.problem, learned = f"the explorer cannot read it: {error!r}", 0.0
            else:
                node.problem = None
            node.asked = True
            await asyncio.sleep(POLL_SECONDS)

    async def _update(self, node: WatchedNode) -> None:
        info = await node.call("getblockchaininfo")
        node.info, node.problem = info, None
        if not node.hashes:
            node.loading = (0, info["blocks"] + 1)
        if info["bestblockhash"] != node.tip:
            await self._find_branches(node)
            await self._read_chain(node, info["bestblockhash"], info["blocks"])

    async def _read_chain(self, node: WatchedNode, tip: str, height: int) -> None:
        """Read a node's new blocks, make them its chain, and tell which they are."""
        initial = not node.hashes
        branch: dict[int, str] = {}
        at, at_height = tip, height
        while at_height >= 0 and node.hashes.get(at_height) != at:
            if at not in self.blocks:
                if initial:
                    node.loading = (height - at_height, height + 1)
                for block in await node.run(read_branch, node.client, at, at_height, self.blocks):
                    self.blocks[block.hash] = block
            branch[at_height] = at
            if initial:
                node.hashes[at_height], node.height = at, height  # what is read is shown
            at, at_height = self.blocks[at].previous, at_height - 1
        reorganised = not initial and node.height > at_height
        if reorganised:
            self._reorganised(node, at_height, height)
        node.hashes |= branch
        for gone in range(height + 1, node.height + 1):
            node.hashes.pop(gone, None)
        node.height, node.loading = height, None
        if node is not self.main:
            return
        if initial or reorganised:
            self._tell("reset", {})
            return
        for new in sorted(branch):
            self._tell("block", self.block_json(self.blocks[branch[new]]))

    def _reorganised(self, node: WatchedNode, fork: int, height: int) -> None:
        self.reorganisations += 1
        left, new = node.height - fork, height - fork
        text = f"{node.name} left {left} blocks of its chain, down to height {fork}, for {new} others"
        self._alarm("reorganisation", text)

    async def _find_branches(self, node: WatchedNode) -> None:
        """Read the branches that a node knows besides its chain."""
        for tip in await node.call("getchaintips"):
            known = tip["hash"] in self.blocks or tip["status"] not in ("valid-fork", "valid-headers")
            if known or tip["branchlen"] > _MOST_BRANCH:
                continue
            try:
                for block in await node.run(read_branch, node.client, tip["hash"], tip["height"], self.blocks):
                    self.blocks[block.hash] = block
            except RpcError:
                continue  # pruned, or it went away meanwhile

    async def _find_equivocations(self, node: WatchedNode) -> None:
        if node.network is None:
            return
        for each in await node.call("gettrainingequivocations"):
            about = f"equivocation {each['height']} {each['round']} {each['winner_key']}"
            name = self.names().get(bytes.fromhex(each["winner_key"]), each["winner_key"][:16])
            self._begin(
                about,
                "equivocation",
                f"{name} signed {len(each['blocks'])} blocks for one certificate, height {each['height']}, round "
                f"{each['round']}: {' and '.join(each['blocks'])}",
            )

    async def _look(self) -> None:
        """Tell what changes without a block, and begin and end alarms."""
        while True:
            if self._main not in (None, self.main.name):
                self._tell("reset", {})
            self._main = self.main.name if self.main.up else self._main
            try:
                self._check_nodes()
                self._check_time()
                self._tell_info()
            except Exception:  # as in `_follow`
                _log.exception("the state of the nodes cannot be told")
            await asyncio.sleep(POLL_SECONDS)

    def _tell_info(self) -> None:
        info = self.info()
        del info["version"]
        if info != self._said:
            self._said = info
            self._tell("info", self.info())

    def _check_nodes(self) -> None:
        highest = max((node.height for node in self.nodes if node.up), default=-1)
        main = self.main
        for node in self.nodes:
            self._set(
                f"down {node.name}", node.asked and not node.up, "down", f"{node.name} does not answer: {node.problem}"
            )
            behind = highest - node.height
            if not node.up or node.loading or behind < LAGGING_BLOCKS:
                node.kept_up = time.monotonic()
            lags = time.monotonic() - node.kept_up > LAGGING_SECONDS
            self._set(f"lagging {node.name}", lags, "lagging", f"{node.name} is {behind} blocks behind")
            forked = node.up and main.up and node.loading is main.loading is None and not _agree(node, main)
            text = f"{node.name} and {main.name} have different blocks at height {min(node.height, main.height)}"
            self._set(f"fork {node.name}", forked, "fork", text)

    def _check_time(self) -> None:
        tip, network = self.blocks.get(self.main.tip or ""), self.main.network
        if tip is None or network is None or tip.certificate is None or not self.main.up:
            self._set("no block", False, "no-block", "")
            return
        seconds = QUIET_ROUNDS * network["round_seconds"]
        quiet = time.time() - tip.time > seconds
        self._set("no block", quiet, "no-block", f"no block for {QUIET_ROUNDS} rounds ({seconds} seconds)")

    def _set(self, about: str, holds: bool, kind: str, text: str) -> None:
        if holds:
            self._begin(about, kind, text)
        elif alarm := self._open.pop(about, None):
            alarm.ended = time.time()
            self._tell("alarm", vars(alarm))

    def _begin(self, about: str, kind: str, text: str) -> None:
        if about not in self._open:
            self._open[about] = self._alarm(kind, text)

    def _alarm(self, kind: str, text: str) -> Alarm:
        self._alarms += 1
        alarm = Alarm(self._alarms, kind, text, time.time())
        if kind == "reorganisation":
            alarm.ended = alarm.time
        self.alarms.append(alarm)
        self._tell("alarm", vars(alarm))
        return alarm


def _agree(one: WatchedNode, other: WatchedNode) -> bool:
    height = min(one.height, other.height)
    return one.hashes.get(height) == other.hashes.get(height)


def open_watch(nodes: Iterable[WatchedNode], records: Path | None, coordinator: Path | None) -> Watch:
    """Return a watch of nodes, with the folders that were given. Raises BridgeError if one is not what it should be."""
    opened = None
    if coordinator:
        from traincert.bridge.coordinator_folder import CoordinatorFolder  # needs what only training needs

        opened = CoordinatorFolder(coordinator)
        records = records or opened.folder / "run"
    return Watch(list(nodes), Cycles(records) if records else None, opened)
