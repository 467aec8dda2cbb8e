"""`make bench`: measures, compares with bars, and writes bench/results.json. Exits 1 if a bar does not hold.

    tests/bench/run.py [--patched BITCOIND] [--stock BITCOIND]

takes other programs than those of the cache, which it builds if need be.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import explorer, harness, instructions, network, reindex, submit, table, training
from bench.blocks import certificate_blocks, stock_blocks
from bench.rows import Row
from traincert.regtest import NodeKind, RegtestError, build_node, node_folder

ROOT = Path(__file__).parents[2]


def bitcoind(kind: NodeKind, what: str) -> Path:
    if not node_folder(kind).is_dir():
        print(f"Building {what}: some minutes", flush=True)
    return build_node(kind) / "bin/bitcoind"


def measure(patched: Path, stock: Path) -> Iterator[list[Row]]:
    yield table.measure()
    with tempfile.TemporaryDirectory(prefix="traincert-bench-") as temporary:
        folder = Path(temporary)
        ours = certificate_blocks(reindex.BLOCKS)
        theirs = stock_blocks(stock, folder / "mined", reindex.BLOCKS)
        yield submit.measure(patched, stock, folder / "submit", ours, theirs)
        yield reindex.measure(patched, stock, folder / "reindex", ours, theirs)
        yield instructions.measure(patched, stock, folder / "instructions")
        yield explorer.measure(patched, folder / "explorer", ours)
        yield harness.measure(patched, folder / "harness")
        yield from network.measure(folder / "network")
        yield from training.measure(folder / "training")


def show(rows: list[Row]) -> None:
    shown = Table(box=None)
    for name in ("what", "value", "unit", "bar", "holds"):
        shown.add_column(name, justify="right" if name == "value" else "left")
    for each in rows:
        holds = "" if each["bar"] is None else "yes" if each["holds"] else "NO"
        shown.add_row(each["name"], f"{each['value']:.3f}", each["unit"], each["bar"], holds)
    Console().print(shown)


def write(rows: list[Row]) -> None:
    commit = subprocess.check_output(
        ["/usr/bin/env", "git", "-C", str(ROOT), "describe", "--always", "--dirty"], text=True
    ).strip()
    made_by = {"command": "make bench", "commit": commit, "python": platform.python_version()}
    results = {**made_by, "traincert": version("traincert"), "rows": rows}
    (ROOT / "bench").mkdir(exist_ok=True)
    (ROOT / "bench/results.json").write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures, compares with bars, and writes bench/results.json.")
    parser.add_argument("--patched", type=Path, help="the patched bitcoind (default: built from the patch)")
    parser.add_argument("--stock", type=Path, help="the unpatched bitcoind (default: built from the pinned source)")
    arguments = parser.parse_args()
    for program in ("valgrind", "chromium"):
        if shutil.which(program) is None:
            sys.exit(f"{program} not found; on Debian: apt-get install {program}")
    rows: list[Row] = []
    try:
        patched = arguments.patched or bitcoind(NodeKind(), "the patched node")
        for found in measure(patched, arguments.stock or bitcoind(NodeKind(stock=True), "the node without the patch")):
            rows += found
            write(rows)  # as far as it is: all of it takes an hour
    except RegtestError as error:
        sys.exit(str(error))
    show(rows)
    sys.exit(not all(each["holds"] for each in rows))


if __name__ == "__main__":
    main()
