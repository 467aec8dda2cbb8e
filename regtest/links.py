"""Reads which nodes are linked, and makes links slow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

import psutil

from traincert.regtest import relay
from traincert.regtest.errors import NodeError
from traincert.regtest.node import wait_for
from traincert.regtest.processes import find_process, kill, spawn

Link = tuple[int, int]
"""The numbers of two nodes, the lower one first. The node with the lower number makes the connection."""

RELAY_TIMEOUT = 30.0  # seconds that a relay may take to start


def read_topology(topology: str | Sequence[Link], count: int) -> list[Link]:
    """Return the links of `count` nodes.

    `topology` is `full` (all nodes are linked), `line`, `ring`, a list of links, or the path of a text file. Each line
    of the file has the numbers of two linked nodes, such as "0 2". A `#` starts a comment.

    Raises NodeError for a file that cannot be read, and for a wrong line in the file.
    """
    if not isinstance(topology, str):
        return list(topology)
    if topology == "full":
        return list(combinations(range(count), 2))
    if topology in ("line", "ring"):
        neighbours = list(pairwise(range(count)))
        return sorted([*neighbours, (0, count - 1)]) if topology == "ring" and count > 2 else neighbours
    try:
        lines = Path(topology).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NodeError(f"topology {topology} is not full, line or ring, and not a readable file: {error}") from None
    links = set()
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        numbers = sorted(int(word) for word in words if word.isdecimal() and int(word) < count)
        if len(words) != 2 or len(set(numbers)) != 2:
            raise NodeError(
                f"{topology}, line {number}: {line!r} must be two different node numbers, from 0 to {count - 1}"
            )
        links.add((numbers[0], numbers[1]))
    return sorted(links)


class Relay:
    """A process that makes one link slow. It ends with this Python process, unless `keep` is set."""

    def __init__(self, pid_file: Path, *, keep: bool) -> None:
        self._pid_file = pid_file.absolute()
        self._keep = keep
        self._process: psutil.Process | None = None

    def start(self, target: str, seconds: float, host: str) -> str:
        """Make sure that a relay on `host` passes data on to `target` (host:port), `seconds` later.

        Returns the relay's host:port. Nodes connect to it instead of to `target`.

        Raises WaitTimeoutError if the relay does not start within RELAY_TIMEOUT seconds.
        """
        arguments = [str(self._pid_file), host, target, str(seconds)]
        process = self._find()
        if process is not None and process.cmdline()[-len(arguments) :] != arguments:
            self.stop()
            process = None
        if process is None:
            self._pid_file.parent.mkdir(exist_ok=True)
            self._process = spawn([sys.executable, str(Path(relay.__file__)), *arguments], keep=self._keep)
            wait_for(self._find, RELAY_TIMEOUT, f"the relay to {target} to start")
        return f"{host}:{self._pid_file.with_suffix('.port').read_text()}"

    def stop(self) -> None:
        """End the relay if it runs. This closes its connections."""
        process = self._process or self._find()
        if process is not None:
            kill(process)
        self._process = None
        self._pid_file.unlink(missing_ok=True)

    def _find(self) -> psutil.Process | None:
        return find_process(self._pid_file)
