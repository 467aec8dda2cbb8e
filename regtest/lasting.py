"""Networks that keep running after the command that made them.

A folder holds everything of one network. Its state file has what the user asked for, such as links and faults. Which
nodes run is not in it: each command looks at the processes. So the status is right after a crash or a reboot too.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from traincert.regtest.blockfiles import last_block, last_file
from traincert.regtest.errors import NodeError
from traincert.regtest.links import Link
from traincert.regtest.network import Network
from traincert.regtest.node import Node, Options
from traincert.regtest.processes import find_by_argument, kill
from traincert.regtest.snapshot import OPTIONS as SNAPSHOT_OPTIONS
from traincert.regtest.snapshot import copy_files

OWNED = "owned"
"""The name of the folder for the caller's own files. Snapshots contain it, and down() removes it."""

VERSION = 1
"""The version of network.json's format."""

_STATE = "network.json"
_LOCK = "lock"
_LINKS = "links"
_SNAPSHOTS = "snapshots"
_RESTORED = ".restored"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class NodeStatus:
    """What `traincert network status` shows for one node."""

    name: str
    state: str
    """`running`, `paused`, `stopped`, `died` (it ended without a regular shutdown), or `no answer` (it runs)."""
    pid: int | None
    rpc_port: int
    height: int | None
    """The height of the best block; None unless the state is `running`, as for `tip` and `peers`."""
    tip: str | None
    """The hash of the best block, in hex."""
    peers: list[str] | None
    """The names of the connected nodes."""
    faults: list[str]
    """The faults that the user has made, in words: cut links, delays, a full disk, a corrupt block."""


class LastingNetwork(Network):
    """A network in a folder. `create()` makes it and `down()` removes it. Change it only inside `opened()`."""

    def __init__(
        self,
        bitcoind: Path,
        directory: Path,
        count: int,
        options: Options,
        topology: str | Sequence[Link],
        image: str | None = None,
        node_options: Mapping[str, Options] | None = None,
    ) -> None:
        directory = directory.resolve()
        docker = None
        if image:
            from traincert.regtest.containers import Docker  # a slow import, and only needed with Docker

            docker = Docker(directory, image, keep=True)
        super().__init__(
            bitcoind,
            directory,
            count,
            {**SNAPSHOT_OPTIONS, **options},
            topology=topology,
            keep=True,
            docker=docker,
            node_options=node_options,
        )
        self._made_of = {
            "bitcoind": str(bitcoind),
            "count": count,
            "options": options,
            "node_options": node_options or {},
            "topology": self.links,
            "image": image,
        }
        self.flips: dict[int, tuple[str, int]] = {}

    @classmethod
    def create(
        cls,
        bitcoind: Path,
        directory: Path,
        count: int,
        topology: str,
        image: str | None = None,
        prepare: Callable[[Path], Options] = lambda _: {},
        node_options: Mapping[str, Options] | None = None,
    ) -> Self:
        """Make a network, but do not start its nodes.

        With `image`, the nodes run in containers and `bitcoind` is ignored. `prepare` gets the path of the folder
        OWNED, which does not exist yet. It may make this folder for its own files. It returns the nodes' options.
        `node_options` are further options of single nodes, by the nodes' names.

        Raises NodeError if `directory` is not empty. With `image`, also if there is no Docker engine or no such image.
        """
        directory = directory.resolve()
        if (directory / _STATE).exists():
            raise NodeError(f"there is a network in {directory}: traincert network start starts it, down removes it")
        if directory.exists() and any(directory.iterdir()):
            raise NodeError(f"{directory} is not empty: choose another with --dir")
        bare = cls(bitcoind.absolute(), directory, count, {}, topology, image)
        directory.mkdir(parents=True, exist_ok=True)
        bare.save()  # if this process is killed after this line, `traincert network down` can clean up
        try:
            options = prepare(directory / OWNED)
            network = cls(bitcoind.absolute(), directory, count, options, topology, image, node_options)
            network.save()
        except BaseException:
            bare.down()
            raise
        return network

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the network in a folder, and attach to its running nodes.

        Raises NodeError if there is no network, if the state file is damaged, or if it has another format than VERSION.
        """
        directory = directory.resolve()
        path = directory / _STATE
        if not path.exists():
            raise NodeError(f"there is no network in {directory}: traincert network up makes one")
        state = _read_state_file(path)
        try:
            made_of = state["made_of"]
            topology = [(a, b) for a, b in made_of["topology"]]
            arguments = made_of["options"], topology, made_of["image"], made_of.get("node_options")
            network = cls(Path(made_of["bitcoind"]), directory, made_of["count"], *arguments)
            network._read_state()
        except (AttributeError, LookupError, TypeError, ValueError):
            raise _DamagedError(path) from None
        return network

    @classmethod
    @contextmanager
    def opened(cls, directory: Path) -> Iterator[Self]:
        """Load a network to change it, and save it at the end. Other commands that change it wait for the lock.

        Raises NodeError as `load()` does.
        """
        if not (directory / _STATE).exists():
            cls.load(directory)  # raises: there is no network
        with _locked(directory):
            network = cls.load(directory)
            try:
                yield network
            finally:
                if (directory / _STATE).exists():
                    network.save()

    @classmethod
    def remove(cls, directory: Path) -> None:
        """Take down the network in a folder, even if its state file is damaged.

        Raises NodeError as `load()` does, but not for a damaged file.
        """
        if not (directory / _STATE).exists():
            cls.load(directory)  # raises: there is no network
        with _locked(directory):
            try:
                network = cls.load(directory)
            except _DamagedError:
                count = len(list(directory.glob("node*")))
                network = cls(Path("bitcoind"), directory, count, {}, "full")
                for node in network.nodes:
                    node.attach()
            network.down()

    def save(self) -> None:
        """Write the state file. It is replaced as a whole, so a crash cannot leave half of it."""
        state = {
            "version": VERSION,
            "made_of": self._made_of,
            "groups": [sorted(group) for group in self.groups],
            "delays": [[*link, seconds] for link, seconds in self.delays.items()],
            "full": [number for number, node in enumerate(self.nodes) if node.disk_full],
            "flips": [[number, *flip] for number, flip in self.flips.items()],
            "time": self.time,
        }
        new = self.directory / f"{_STATE}.new"
        new.write_text(json.dumps(state, indent=1) + "\n")
        new.replace(self.directory / _STATE)

    def _read_state(self) -> None:
        state = _read_state_file(self.directory / _STATE)
        self.groups = [set(group) for group in state["groups"]]
        self.delays = {(a, b): seconds for a, b, seconds in state["delays"]}
        self.flips = {number: (path, offset) for number, path, offset in state["flips"]}
        for number, node in enumerate(self.nodes):
            node.disk_full = number in state["full"]
            node.attach()
        self._set_clock(state["time"])

    def status(self) -> list[NodeStatus]:
        """Return the status of all nodes, in their order."""
        found: dict[Node, NodeStatus] = {}

        def look(node: Node) -> None:
            found[node] = self._status(self.nodes.index(node), node)

        self._for_each(look)
        return [found[node] for node in self.nodes]

    def _status(self, number: int, node: Node) -> NodeStatus:
        state = "running"
        height = tip = peers = None
        if node.pid is None:
            state = "died" if node.died else "stopped"
        elif node.paused:
            state = "paused"
        else:
            try:
                chain = node.rpc("getblockchaininfo")
                height, tip = chain["blocks"], chain["bestblockhash"]
                peers = self.peers(number)
            except NodeError:
                state = "no answer"
        return NodeStatus(node.name, state, node.pid, node.rpc_port, height, tip, peers, self._faults(number))

    def _faults(self, number: int) -> list[str]:
        cut = [self.nodes[other].name for link in self.links if number in link and self.is_cut(link) for other in link]
        faults = [f"cut off from {', '.join(name for name in cut if name != self.nodes[number].name)}"] if cut else []
        for link, seconds in self.delays.items():
            if number in link:
                other = self.nodes[link[0] if link[1] == number else link[1]]
                faults.append(f"{other.name} {1000 * seconds:g} ms late")
        if self.nodes[number].disk_full:
            faults.append("disk full")
        if number in self.flips:
            path, offset = self.flips[number]
            faults.append(f"corrupt: byte {offset} of {Path(path).name}")
        return faults

    def corrupt(self, number: int) -> None:
        """Invert one byte of the last block in the node's block files, until `repair()`.

        The node notices when it reads this block next, at the latest at its next start. Raises NodeError if the node is
        corrupt already, or has no block file.
        """
        node = self.nodes[number]
        if number in self.flips:
            raise NodeError(f"{node.name} is corrupt already: traincert network repair {node.name} repairs it")
        path = last_file(node.chain_dir)
        if path is None:
            raise NodeError(f"{node.name} has no block file in {node.chain_dir}")
        offset = last_block(path) + 36  # hashMerkleRoot in the header; its change makes the block invalid
        _flip(path, offset)
        self.flips[number] = (str(path), offset)

    def repair(self, number: int) -> None:
        """Undo `corrupt()`. Raises NodeError if the node is not corrupt."""
        if number not in self.flips:
            raise NodeError(f"{self.nodes[number].name} is not corrupt")
        path, offset = self.flips.pop(number)
        _flip(Path(path), offset)

    def snapshot(self, name: str) -> None:
        """Copy the whole network under a name. Nodes that run are stopped first, and are as before afterwards.

        Raises NodeError if a snapshot with this name exists, if the name is not valid, or if a node that runs could not
        be started again, because it is corrupt or its disk is full.
        """
        copy = self._snapshot(name)
        if copy.exists():
            raise NodeError(f"there is a snapshot {name} already")
        for node in self.nodes:
            if node.pid is not None and node not in self._startable():
                raise NodeError(f"{node.name} could not be started again: disk-free or repair it first, or stop it")
        with self._stopped(), _new_folder(copy) as new:
            self.save()
            kept = (_SNAPSHOTS, _LOCK, _LINKS)
            copy_files([path for path in self.directory.iterdir() if path.name not in kept], new)

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        """Stop the nodes that run. In the end, also after an error, they run again, linked and paused as before."""
        running = [node for node in self.nodes if node.pid is not None]
        paused = [node for node in running if node.paused]
        try:
            self.stop()
            yield
        finally:
            try:
                self.start_nodes(running)
            finally:
                for node in paused:
                    if node.pid is not None:
                        node.pause()

    def _startable(self) -> list[Node]:
        """Return the nodes that no fault keeps from starting."""
        return [node for number, node in enumerate(self.nodes) if not node.disk_full and number not in self.flips]

    def restore(self, name: str) -> None:
        """Restore the whole network from a snapshot, and start all nodes that no fault keeps from starting.

        Raises NodeError if no snapshot has this name, if its state file cannot be used, or if it cannot be copied. Then
        nothing has changed.
        """
        copy = self._snapshot(name)
        if not copy.exists():
            there = sorted(path.name for path in copy.parent.glob("*") if _NAME.fullmatch(path.name))
            raise NodeError(f"there is no snapshot {name}; there are: {', '.join(there) or 'none'}")
        _read_state_file(copy / _STATE)  # raises before anything has changed
        with _new_folder(self.directory / _SNAPSHOTS / _RESTORED) as new:
            copy_files(list(copy.iterdir()), new)
        for node in self.nodes:
            node.kill()  # faster than a shutdown, which would save data that restore() replaces
        self.stop()
        restored = self.directory / _SNAPSHOTS / _RESTORED
        for path in restored.iterdir():
            target = self.directory / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        restored.rmdir()
        self._read_state()
        self.start_nodes(self._startable())

    def _snapshot(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name.endswith(".new"):
            raise NodeError(
                f"{name!r} is no name for a snapshot: use up to 100 letters, digits, '.', '_' and '-', no '.' at the "
                "start, and no '.new' at the end"
            )
        return self.directory / _SNAPSHOTS / name

    def down(self) -> None:
        """Kill all nodes, and remove all files of the network. Files that are not the network's stay."""
        for node in self.nodes:
            node.kill()  # faster than a shutdown, which would save data that down() removes
            # A traincert that was killed while it started this node may have left no pid file.
            for process in find_by_argument(f"-datadir={node.datadir}"):
                kill(process)
        self.stop()
        for name in [*(node.name for node in self.nodes), _LINKS, _SNAPSHOTS, OWNED]:
            shutil.rmtree(self.directory / name, ignore_errors=True)
        for name in (_STATE, f"{_STATE}.new", _LOCK):
            (self.directory / name).unlink(missing_ok=True)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()


class _DamagedError(NodeError):
    """A network's state file is damaged."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is damaged: traincert network down ends this network, then make it again")


def _read_state_file(path: Path) -> dict[str, Any]:
    """Read a network's state file. Raises NodeError if it is damaged, or has another format than VERSION."""
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError):
        state = None
    if not isinstance(state, dict):
        raise _DamagedError(path)
    if state.get("version") != VERSION:
        raise NodeError(
            f"{path} has format {state.get('version')}, this traincert reads format {VERSION}: take the network down "
            "with the traincert that made it, and make it again"
        )
    return state


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `path` in the end. If the block fails, it is removed."""
    new = path.with_name(f"{path.name}.new")
    for leftover in (new, path):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        new.replace(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def status_json(status: Sequence[NodeStatus]) -> list[Mapping[str, Any]]:
    """Return the status of a network in a form for json.dumps."""
    return [asdict(each) for each in status]


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
