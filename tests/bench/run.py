"""`make bench`: measures, compares with bars, and writes bench/results.json. Exits 1 if a bar does not hold.

Machines are shared and noisy, so each time also stands as a ratio to a peer measured in the same run: plain SHA-256
over as many messages of the same length.
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from traincert.bridge.lottery import ContributionTable, Leaf, Node, contribution_weight, follow_path, leaf_node

LEAVES = 1_000_000
PATHS = 1000
ROOT = Path(__file__).parents[2]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def made_leaves() -> list[Leaf]:
    def leaf(i: int) -> Leaf:
        key, params, loss_reduction = i.to_bytes(32, "big"), 1000 + i, 10**6 + i
        return Leaf(key, key, params, loss_reduction, contribution_weight(params, loss_reduction))

    return [leaf(i) for i in range(LEAVES)]


def plain_hashes(count: int, length: int) -> None:
    message = bytes(length)
    for _ in range(count):
        hashlib.sha256(message).digest()


def follow_paths(table: ContributionTable) -> None:
    step = LEAVES // PATHS
    for index in range(0, LEAVES, step):
        end = follow_path(leaf_node(table.leaves[index]), index, table.count, table.path(index))
        if end is None or end[0] != Node(table.root, table.weight):
            raise AssertionError(f"the path of leaf {index} does not lead to the root")


def measure() -> list[dict[str, Any]]:
    leaves = made_leaves()
    peer, _ = timed(lambda: plain_hashes(2 * LEAVES, 144))  # a leaf's or a branch's message with its tag
    seconds, table = timed(lambda: ContributionTable(leaves))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    path_seconds, _ = timed(lambda: follow_paths(table))
    return [
        row("table of 1,000,000 leaves: build", seconds, "s", 4.0),
        row("the same, against 2,000,000 plain SHA-256", seconds / peer, "ratio", None),
        row("table of 1,000,000 leaves: peak memory of the process, leaves included", memory, "GiB", 1.0),
        row("a path out of it, and its check", 1000 * path_seconds / PATHS, "ms", 1.0),
    ]


def row(name: str, value: float, unit: str, bar: float | None) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "unit": unit, "bar": bar, "holds": bar is None or value <= bar}


def main() -> None:
    rows = measure()
    table = Table(box=None)
    for name in ("what", "value", "unit", "bar (at most)", "holds"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for each in rows:
        bar = "" if each["bar"] is None else str(each["bar"])
        table.add_row(each["name"], f"{each['value']:.3f}", each["unit"], bar, "yes" if each["holds"] else "NO")
    Console().print(table)
    commit = subprocess.check_output(
        ["/usr/bin/env", "git", "-C", str(ROOT), "describe", "--always", "--dirty"], text=True
    ).strip()
    made_by = {"command": "make bench", "commit": commit, "python": platform.python_version()}
    results = {**made_by, "traincert": version("traincert"), "rows": rows}
    (ROOT / "bench").mkdir(exist_ok=True)
    (ROOT / "bench/results.json").write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(not all(each["holds"] for each in rows))


if __name__ == "__main__":
    main()
