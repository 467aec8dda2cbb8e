"""Where the parts of the explorer's pictures are: the draw of a winner, and the forks of the chain."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any


def draw_picture(draw: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the path from the winner's leaf to the root, each node as the interval of tickets below it.

    `draw` is that of gettrainingcertificate, and `count` the number of leaves in the parent's table.

    `bars` have `row` (0: the root), `start`, `sum` (both in tickets) and `kind`: path or sibling. `sides` says of each
    sibling, from the leaf to the root, whether it is left or right. `rows` is the number of rows, and `start` that of
    the leaf.
    """
    index, siblings = draw["index"], list(draw["siblings"])
    sides: list[str] = []
    while count > 1 and len(sides) < len(siblings):
        if index % 2 or index + 1 < count:  # else an odd node at the end of its level: no sibling
            sides.append("left" if index % 2 else "right")
        index, count = index // 2, (count + 1) // 2
    lefts = [sibling["sum"] for sibling, side in zip(siblings, sides, strict=True) if side == "left"]
    start, weight = sum(lefts), draw["weight"]
    rows = len(sides) + 1
    bars = [{"row": rows - 1, "start": start, "sum": weight, "kind": "path"}]
    for row, sibling, side in zip(range(rows - 2, -1, -1), siblings, sides, strict=True):
        at = start - sibling["sum"] if side == "left" else start + weight
        bars.append({"row": row + 1, "start": at, "sum": sibling["sum"], "kind": "sibling"})
        start, weight = min(start, at), weight + sibling["sum"]
        bars.append({"row": row, "start": start, "sum": weight, "kind": "path"})
    return {"bars": bars, "rows": rows, "sides": sides, "start": sum(lefts)}


def fork_picture(forks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chain and its branches as columns and lanes, from what /api/forks answers.

    Lane 0 is the shown chain, up to the highest tip on it. A branch has a lane in which no other one is at its heights.
    `columns` are heights from left to right, or None for a run of blocks that are left out. `blocks` have `column`,
    `lane`, `height`, `block` (None: on the shown chain) and `nodes`, whose tip it is. `edges` are `from` and `to`, each
    a column and a lane, and `gap`: blocks between them are left out.
    """
    off = {each["hash"]: each for each in forks["blocks"]}
    tips: dict[tuple[int, str], list[str]] = {}
    for tip in forks["tips"]:
        where = tip["hash"] if tip["hash"] in off else ""
        tips.setdefault((tip["height"], where), []).append(tip["node"])
    top = max((height for height, where in tips if not where), default=-1)
    heights = {height for height, _ in tips} | {each["height"] - back for each in off.values() for back in (0, 1)}
    columns: list[int | None] = []
    for height in sorted(heights | {0}):
        if columns and columns[-1] is not None and height > columns[-1] + 1:
            columns.append(None)
        columns.append(height)
    column = {height: number for number, height in enumerate(columns) if height is not None}
    chain = [height for height in column if height <= top]
    blocks = [
        {"column": column[height], "lane": 0, "height": height, "block": None, "nodes": tips.get((height, ""), [])}
        for height in chain
    ]
    edges = [
        {"from": (column[one], 0), "to": (column[other], 0), "gap": other > one + 1} for one, other in pairwise(chain)
    ]
    lanes = _lanes(off)
    for each in off.values():
        height, lane = each["height"], lanes[each["hash"]]
        nodes = tips.get((height, each["hash"]), [])
        blocks.append({"column": column[height], "lane": lane, "height": height, "block": each, "nodes": nodes})
        before = (column[height - 1], lanes.get(each["previousblockhash"], 0))
        edges.append({"from": before, "to": (column[height], lane), "gap": False})
    return {"columns": columns, "blocks": blocks, "edges": edges, "lanes": max(lanes.values(), default=0) + 1}


def _lanes(off: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return a lane for each block that is not in the shown chain: its parent's, or the first that is free there."""
    lanes: dict[str, int] = {}
    last: dict[int, int] = {}  # the highest block in each lane
    for each in sorted(off.values(), key=lambda each: (each["height"], each["hash"])):
        height, parent = each["height"], lanes.get(each["previousblockhash"])
        if parent is not None and last[parent] == height - 1:
            lane = parent
        else:
            lane = next(lane for lane in range(1, len(off) + 1) if last.get(lane, -1) < height - 1)
        lanes[each["hash"]], last[lane] = lane, height
    return lanes
