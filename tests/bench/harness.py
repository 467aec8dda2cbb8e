"""The harness against bitcoind alone: starting, ending, a chain to spend, and many tests at once."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil
import requests

from bench.rows import Row, row, timed
from traincert.regtest import Network, Node, wait_for
from traincert.regtest.node import free_ports
from traincert.regtest.snapshot import OPTIONS, copy_snapshot, make_snapshot

NODES = 3
REPEATS = 5
TESTS, TIMES = 100, 3
MANY_TESTS = f"""\
import pytest

@pytest.mark.parametrize("number", range({TESTS}))
def test_each_has_a_node(number, bitcoind):
    assert bitcoind.rpc("getblockcount") == 0
"""


def measure(bitcoind: Path, folder: Path) -> list[Row]:
    """Each repeat measures one after the other, so that all see the same machine."""
    snapshot = folder / "snapshot"
    make_snapshot(bitcoind, snapshot)
    bare_start, bare_stop, start, stop, bare_one, copied = ([] for _ in range(6))
    for repeat in range(REPEATS):
        bare = [_Bare(bitcoind, folder / f"bare{repeat}-{i}") for i in range(NODES)]
        bare_start.append(timed(partial(_start, bare))[0])
        bare_stop.append(timed(partial(_stop, bare))[0])
        network = Network(bitcoind, folder / f"network{repeat}", NODES)
        start.append(timed(network.start)[0])
        stop.append(timed(network.stop)[0])
        one = [_Bare(bitcoind, folder / f"one{repeat}")]
        bare_one.append(timed(partial(_start, one))[0])
        _stop(one)
        node = Node(bitcoind, folder / f"copied{repeat}", OPTIONS)
        copied.append(timed(partial(_start_copy, snapshot, node))[0])
        node.stop()
    times = list(map(statistics.median, (bare_start, bare_stop, start, stop, bare_one, copied)))
    most = max(1.5, 1.2 * times[1])
    return [
        row(f"{NODES} bitcoind side by side: until the slowest answers", times[0], "s"),
        row(f"network of {NODES} nodes: until they are connected", times[2], "s"),
        row("the same, against bitcoind alone", times[2] / times[0], "ratio", 1.3),
        row(f"{NODES} bitcoind: bitcoin-cli stop, until they have ended", times[1], "s"),
        row(f"network of {NODES} nodes: until they have ended", times[3], "s", most),
        row("chain_snapshot: copied and started, against a bitcoind with no chain", times[5] / times[4], "ratio", 1.5),
        *_many_tests(bitcoind, folder / "many"),
    ]


class _Bare:
    """A bitcoind that is started without anything of ours: with its own options, and ports that let several run."""

    def __init__(self, bitcoind: Path, datadir: Path) -> None:
        self.bitcoind, self.datadir = bitcoind, datadir
        datadir.mkdir(parents=True)
        self.rpc_port, p2p_port = free_ports(2)
        ports = f"port={p2p_port}\nrpcport={self.rpc_port}\nbind=127.0.0.1:{p2p_port}\n"
        (datadir / "bitcoin.conf").write_text(f"regtest=1\n[regtest]\n{ports}")
        self.process: subprocess.Popen[bytes] | None = None

    def answers(self) -> bool:
        """Whether it has a height; asked without bitcoin-cli, which waits a second between two tries."""
        try:
            user, _, password = (self.datadir / "regtest/.cookie").read_text().partition(":")
            answer = requests.post(
                f"http://127.0.0.1:{self.rpc_port}",
                json={"method": "getblockcount"},
                auth=(user, password),
                timeout=60,
            )
        except (OSError, requests.RequestException):
            return False
        return answer.status_code == 200


def _start(nodes: Sequence[_Bare]) -> None:
    for node in nodes:
        node.process = subprocess.Popen(
            [node.bitcoind, f"-datadir={node.datadir}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    for node in nodes:
        wait_for(node.answers, 60, "bitcoind to answer")


def _stop(nodes: Sequence[_Bare]) -> None:
    for node in nodes:
        cli = node.bitcoind.with_name("bitcoin-cli")
        subprocess.run([cli, f"-datadir={node.datadir}", "stop"], check=True, stdout=subprocess.DEVNULL)
    for node in nodes:
        if node.process is not None:
            node.process.wait()


def _start_copy(snapshot: Path, node: Node) -> None:
    copy_snapshot(snapshot, node.datadir)
    node.start()


def _many_tests(bitcoind: Path, folder: Path) -> list[Row]:
    folder.mkdir()
    (folder / "test_many.py").write_text(MANY_TESTS)
    failures, seconds = 0, 0.0
    for _ in range(TIMES):
        command = [sys.executable, "-m", "pytest", "-q", "-n", "4", "-p", "no:cacheprovider"]
        command += ["--basetemp", str(folder / "temporary"), "--bitcoind", str(bitcoind), "test_many.py"]
        run = partial(subprocess.run, command, cwd=folder, check=False, capture_output=True, text=True)
        took, done = timed(run)
        seconds += took
        failures += f"{TESTS} passed" not in done.stdout
    left = [each for each in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(each.info["cmdline"] or [])]
    shutil.rmtree(folder)
    return [
        row(f"{TESTS} tests with a node each, pytest -n 4: a run", seconds / TIMES, "s"),
        row(f"the same, {TIMES} times: runs that failed", failures, "", 0),
        row("the same: processes left", len(left), "", 0),
    ]
