"""Without a training option the patched node is as fast as upstream: instructions counted by callgrind.

Both nodes reindex the same chain, whose transactions are signed. Counted is the thread that imports the blocks, with
one thread for scripts: the others also seed random numbers, for as long as a clock says.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from pathlib import Path

from bench.blocks import WITHOUT_CHECKS
from bench.rows import Row, row
from traincert.regtest import Node

REPEATS = 2
MATURE = 105  # blocks, after which there are coins to spend
FULL_BLOCKS = 50
TRANSACTIONS = 4  # in each of them
BITCOIND_OPTIONS = [
    *("-regtest", "-reindex", "-stopafterblockimport", "-par=1", "-dbcache=16", "-rpcthreads=1", "-printtoconsole=0"),
    *("-disablewallet", "-server=0", "-listen=0", "-dnsseed=0", "-connect=0"),
    *(f"-{name}={value}" for name, value in WITHOUT_CHECKS.items()),
]


def measure(patched: Path, stock: Path, folder: Path) -> list[Row]:
    """Count both, by turns."""
    _make_chain(stock, folder / "made")
    counts: list[tuple[int, int]] = []
    for i in range(REPEATS):
        stock_count = _instructions(stock, folder / "made", folder / f"stock{i}")
        counts.append((_instructions(patched, folder / "made", folder / f"patched{i}"), stock_count))
    ours, theirs = (statistics.mean(each) for each in zip(*counts, strict=True))
    spread = max(max(each) / min(each) - 1 for each in zip(*counts, strict=True))
    return [
        row("no training option: instructions that import a fixed chain, stock node", theirs / 1e6, "million"),
        row("the same on the patched node, off by", 100 * abs(ours / theirs - 1), "%", 0.5),
        row("two runs of the same node, apart by", 100 * spread, "%"),
    ]


def _make_chain(bitcoind: Path, datadir: Path) -> None:
    with Node(bitcoind, datadir) as node:
        node.rpc("createwallet", "bench")
        miner = node.rpc("getnewaddress", "", "bech32")
        node.rpc("generatetoaddress", MATURE, miner)
        for _ in range(FULL_BLOCKS):
            for i in range(TRANSACTIONS):
                node.rpc("sendtoaddress", node.rpc("getnewaddress", "", "bech32m" if i % 2 else "bech32"), 1)
            node.rpc("generatetoaddress", 1, miner)


def _instructions(bitcoind: Path, made: Path, datadir: Path) -> int:
    blocks = "regtest/blocks"
    shutil.copytree(made / blocks, datadir / blocks, ignore=shutil.ignore_patterns("index"))
    counts = datadir / "callgrind.out"
    command = ["valgrind", "--quiet", "--tool=callgrind", "--separate-threads=yes", f"--callgrind-out-file={counts}"]
    subprocess.run([*command, str(bitcoind), f"-datadir={datadir}", *BITCOIND_OPTIONS], check=True)
    # One file a thread, the main one's first: the import thread is the one that does most of the others.
    return max(_total(file) for file in sorted(datadir.glob(f"{counts.name}-*"))[1:])


def _total(file: Path) -> int:
    return next(int(line.split()[1]) for line in file.open() if line.startswith(("totals:", "summary:")))
