"""Networks that outlive the command that made them.

A folder holds all of one. Its state file says what was asked for; what runs is asked of the processes themselves, so it
is known after a crash and after a reboot too.
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

from traincert.regtest.errors import NodeError
from traincert.regtest.links import Link
from traincert.regtest.network import Network
from traincert.regtest.node import Node, Options
from traincert.regtest.processes import find_by_argument, kill
from traincert.regtest.snapshot import OPTIONS as SNAPSHOT_OPTIONS
from traincert.regtest.snapshot import copy_files

OWNED = "owned"
"""A folder in the network's for whatever its owner keeps with it: it is in snapshots, and gone with the network."""

VERSION = 1
"""Of the format of network.json."""

_STATE = "network.json"
_LOCK = "lock"
_LINKS = "links"
_SNAPSHOTS = "snapshots"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
# Peers get transactions at once, not after seconds as strangers do.
_OPTIONS: Options = {**SNAPSHOT_OPTIONS, "whitelist": "in,out,noban@0.0.0.0/0"}


@dataclass(frozen=True)
class NodeStatus:
    """What `traincert network status` shows of a node; `height`, `tip` and `peers` are None if it gives no answer."""

    name: str
    state: str
    pid: int | None
    rpc_port: int
    height: int | None
    tip: str | None
    peers: list[str] | None
    faults: list[str]


class LastingNetwork(Network):
    """The network in a folder, from `create()` to `down()`. Change it within `opened()`."""

    def __init__(
        self,
        bitcoind: Path,
        directory: Path,
        count: int,
        options: Options,
        topology: str | Sequence[Link],
        image: str | None = None,
    ) -> None:
        docker = None
        if image:
            from traincert.regtest.containers import Docker  # takes a while, and not everybody has an engine

            docker = Docker(directory, image, keep=True)
        super().__init__(
            bitcoind, directory, count, {**_OPTIONS, **options}, topology=topology, keep=True, docker=docker
        )
        self._made_of = {
            "bitcoind": str(bitcoind),
            "count": count,
            "options": options,
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
    ) -> Self:
        """Make a network, and start nothing yet; with an `image` nodes run in containers, and `bitcoind` is not used.

        `prepare` is given the folder OWNED, to make it if there is anything to keep, and returns the nodes' options.

        Raises NodeError if the folder is not empty, or if there is no engine or no image.
        """
        directory = directory.absolute()
        if (directory / _STATE).exists():
            raise NodeError(f"there is a network in {directory}: traincert network start starts it, down removes it")
        if directory.exists() and any(directory.iterdir()):
            raise NodeError(f"{directory} is not empty: choose another with --dir")
        bare = cls(bitcoind.absolute(), directory, count, {}, topology, image)
        directory.mkdir(parents=True, exist_ok=True)
        bare.save()  # so that whatever comes now, down() removes it
        try:
            network = cls(bitcoind.absolute(), directory, count, prepare(directory / OWNED), topology, image)
            network.save()
        except BaseException:
            bare.down()
            raise
        return network

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the network in a folder, with the nodes that run. Raises NodeError if there is none."""
        directory = directory.absolute()
        if not (directory / _STATE).exists():
            raise NodeError(f"there is no network in {directory}: traincert network up makes one")
        made_of = _read_state_file(directory / _STATE)["made_of"]
        topology = [(a, b) for a, b in made_of["topology"]]
        arguments = made_of["count"], made_of["options"], topology, made_of["image"]
        network = cls(Path(made_of["bitcoind"]), directory, *arguments)
        network._read_state()
        return network

    @classmethod
    @contextmanager
    def opened(cls, directory: Path) -> Iterator[Self]:
        """Load a network to change it, which no other command does meanwhile; what it is then is written at the end."""
        if not (directory / _STATE).exists():
            cls.load(directory)  # says so
        with (directory / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            network = cls.load(directory)
            try:
                yield network
            finally:
                if (directory / _STATE).exists():
                    network.save()

    def save(self) -> None:
        """Write the state file: wholly or not at all."""
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
        """Ask all nodes how they are."""
        return [self._status(number, node) for number, node in enumerate(self.nodes)]

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
        """Flip a byte of the last block in the node's block files, until `repair()`.

        The node finds out when it next reads the block, at the latest when it is started. Raises NodeError if it was
        done already.
        """
        node = self.nodes[number]
        if number in self.flips:
            raise NodeError(f"{node.name} is corrupt already: traincert network repair {node.name}")
        path = max((node.chain_dir / "blocks").glob("blk*.dat"))
        offset = _last_block(path) + 36  # the header's Merkle root
        _flip(path, offset)
        self.flips[number] = (str(path), offset)

    def repair(self, number: int) -> None:
        """Undo `corrupt()`."""
        if number not in self.flips:
            raise NodeError(f"{self.nodes[number].name} is not corrupt")
        path, offset = self.flips.pop(number)
        _flip(Path(path), offset)

    def snapshot(self, name: str) -> None:
        """Keep a copy of everything under a name; nodes that run are stopped for it, and started again.

        Raises NodeError if there is one of this name.
        """
        copy = self._snapshot(name)
        if copy.exists():
            raise NodeError(f"there is a snapshot {name} already")
        running = [node for node in self.nodes if node.pid is not None]
        self.stop()
        new = copy.with_name(f"{name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        self.save()
        everything = [path for path in self.directory.iterdir() if path.name not in (_SNAPSHOTS, _LOCK, _LINKS)]
        try:
            copy_files(everything, new)
            new.replace(copy)
        finally:  # also where the disk is full
            shutil.rmtree(new, ignore_errors=True)
            self._for_each(lambda node: node.start() if node in running else None)
            self.connect()

    def restore(self, name: str) -> None:
        """Make everything as it was at a snapshot, and start all nodes.

        Raises NodeError if there is none of this name.
        """
        copy = self._snapshot(name)
        if not copy.exists():
            there = sorted(path.name for path in copy.parent.glob("*") if _NAME.fullmatch(path.name))
            raise NodeError(f"there is no snapshot {name}; there are: {', '.join(there) or 'none'}")
        _read_state_file(copy / _STATE)  # raises before anything has changed
        for node in self.nodes:
            node.kill()  # what it would write is not kept
        self.stop()
        for path in copy.iterdir():
            target = self.directory / path.name
            if target.is_dir():
                shutil.rmtree(target)
        copy_files(list(copy.iterdir()), self.directory)
        self._read_state()
        self.start()

    def _snapshot(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name.endswith(".new"):
            raise NodeError(f"{name!r} is no name for a snapshot: letters, digits, '.', '_' and '-'")
        return self.directory / _SNAPSHOTS / name

    def down(self) -> None:
        """End everything, and remove all that `create()` and what came after it made."""
        for node in self.nodes:
            node.kill()  # what it would write is not kept
            # If whoever started it was killed just then, there may be no pid file yet.
            for process in find_by_argument(f"-datadir={node.datadir}"):
                kill(process)
        self.stop()
        for name in [*(node.name for node in self.nodes), _LINKS, _SNAPSHOTS, OWNED]:
            shutil.rmtree(self.directory / name, ignore_errors=True)
        for name in (_STATE, f"{_STATE}.new", _LOCK):
            (self.directory / name).unlink(missing_ok=True)
        if not any(self.directory.iterdir()):
            self.directory.rmdir()


def _read_state_file(path: Path) -> dict[str, Any]:
    """Read a network's state file. Raises NodeError if it is damaged, or has another format than VERSION."""
    try:
        state = json.loads(path.read_text())
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise NodeError(f"{path} is damaged: end the nodes of this network, remove the folder, and make it again")
    if state.get("version") != VERSION:
        raise NodeError(
            f"{path} has format {state.get('version')}, this traincert reads format {VERSION}: take the network down "
            "with the traincert that made it, and make it again"
        )
    return state


def status_json(status: Sequence[NodeStatus]) -> list[Mapping[str, Any]]:
    """Return a status as JSON has it."""
    return [asdict(each) for each in status]


def _last_block(path: Path) -> int:
    """Where in a block file the last block begins; each comes after a magic number and its size (4 bytes each)."""
    data = path.read_bytes()
    key_file = path.with_name("xor.dat")  # since Bitcoin Core 28
    key = key_file.read_bytes() if key_file.exists() else bytes(8)

    def decoded(start: int) -> bytes:
        return bytes(byte ^ key[i % len(key)] for i, byte in enumerate(data[start : start + 4], start))

    magic, last, start = decoded(0), 0, 0
    while decoded(start) == magic:
        last = start + 8
        start = last + int.from_bytes(decoded(start + 4), "little")
    return last


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
