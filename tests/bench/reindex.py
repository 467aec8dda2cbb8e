"""`-reindex` of certificate blocks on the patched node, and of as many stock blocks on a stock node, by turns."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from bench.blocks import OPTIONS, WITHOUT_CHECKS, one_client_node
from bench.client import RawClient
from bench.rows import Row, row

BLOCKS = 5000
REPEATS = 3


def measure(patched: Path, stock: Path, folder: Path, certificate: Sequence[str], plain: Sequence[str]) -> list[Row]:
    """Time both, with regtest's own checks of its consistency and without; the least of some repeats counts."""
    ours, theirs = folder / "patched", folder / "stock"
    _fill(patched, ours, certificate, OPTIONS)
    _fill(stock, theirs, plain, {})
    times = [(_reindex(patched, ours, {}), _reindex(stock, theirs, {})) for _ in range(REPEATS)]
    bare = [(_reindex(patched, ours, WITHOUT_CHECKS), _reindex(stock, theirs, WITHOUT_CHECKS)) for _ in range(REPEATS)]
    least_ours, least_theirs = map(min, zip(*times, strict=True))
    bare_ours, bare_theirs = map(min, zip(*bare, strict=True))
    return [
        row("-reindex of 5,000 such certificate blocks", least_ours, "s"),
        row("-reindex of 5,000 empty blocks, stock node", least_theirs, "s"),
        row("-reindex: certificate blocks against stock blocks", least_ours / least_theirs, "ratio", 1.5),
        row("-reindex without regtest's own checks: certificate against stock", bare_ours / bare_theirs, "ratio"),
    ]


def _fill(bitcoind: Path, datadir: Path, blocks: Sequence[str], options: Mapping[str, str | list[str]]) -> None:
    with one_client_node(bitcoind, datadir, options) as node:
        client = RawClient(node)
        for block in blocks[:BLOCKS]:
            client.submit_block(block)


def _reindex(bitcoind: Path, datadir: Path, options: Mapping[str, str]) -> float:
    """How many seconds by the node's log lie between the start of the work and the tip."""
    log = datadir / "regtest/debug.log"
    log.unlink()
    command = [str(bitcoind), f"-datadir={datadir}", "-reindex", "-stopafterblockimport"]
    subprocess.run([*command, *(f"-{name}={value}" for name, value in options.items())], check=True)
    text = log.read_text()
    start = re.search(r"^(\S+) .*Reindexing block file blk00000", text, re.MULTILINE)
    tip = re.search(rf"^(\S+) UpdateTip: .* height={BLOCKS} ", text, re.MULTILINE)
    if start is None or tip is None:
        raise AssertionError(f"{log}: the node did not come to block {BLOCKS}")
    return (datetime.fromisoformat(tip[1]) - datetime.fromisoformat(start[1])).total_seconds()
