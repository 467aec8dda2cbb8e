"""Where the parts of the explorer's pictures are."""

from __future__ import annotations

from typing import Any

import pytest

from traincert.bridge.consensus.lottery import ContributionTable, Leaf
from traincert.bridge.explorer.pictures import draw_picture, fork_picture
from traincert.bridge.testing.invalid import digest


def drawn(table: ContributionTable, index: int) -> dict[str, Any]:
    siblings = [{"hash": node.hash.hex(), "sum": node.sum} for node in table.path(index)]
    return {"index": index, "weight": table.leaves[index].weight, "siblings": siblings}


@pytest.mark.parametrize("count", range(1, 10))
def test_the_path_of_each_leaf_goes_from_its_tickets_to_all(count: int) -> None:
    table = ContributionTable(Leaf(digest(f"miner {i}"), bytes(32), i + 1, i + 1, i + 1) for i in range(count))
    for index, leaf in enumerate(table.leaves):
        picture = draw_picture(drawn(table, index), count)
        start = sum(each.weight for each in table.leaves[:index])
        path = [bar for bar in picture["bars"] if bar["kind"] == "path"]
        assert (path[0]["start"], path[0]["sum"]) == (start, leaf.weight) == (picture["start"], leaf.weight)
        assert (path[-1]["row"], path[-1]["start"], path[-1]["sum"]) == (0, 0, table.weight)
        assert len(path) == picture["rows"] == len(picture["sides"]) + 1
        for parent in path[1:]:  # it is as wide as the two bars below it, which do not overlap
            below = sorted((bar["start"], bar["sum"]) for bar in picture["bars"] if bar["row"] == parent["row"] + 1)
            assert below[0][0] == parent["start"]
            assert below[0][0] + below[0][1] == below[1][0]
            assert below[1][0] + below[1][1] == parent["start"] + parent["sum"]


def block(name: str, height: int, before: str) -> dict[str, Any]:
    return {"hash": name, "height": height, "previousblockhash": before}


def test_a_chain_without_branches_is_its_ends() -> None:
    tips = [{"node": name, "hash": "tip", "height": 12} for name in ("a", "b")]
    picture = fork_picture({"blocks": [], "tips": [*tips, {"node": "c", "hash": "old", "height": 11}]})
    assert picture["columns"] == [0, None, 11, 12]
    assert [(each["column"], each["nodes"]) for each in picture["blocks"]] == [(0, []), (2, ["c"]), (3, ["a", "b"])]
    assert [(each["from"], each["to"], each["gap"]) for each in picture["edges"]] == [
        ((0, 0), (2, 0), True),
        ((2, 0), (3, 0), False),
    ]


def test_each_branch_has_a_lane_of_its_own() -> None:
    blocks = [block("x2", 6, "x1"), block("y", 6, "x1"), block("x1", 5, "main"), block("z", 9, "main")]
    tips = [{"node": "a", "hash": "tip", "height": 9}, {"node": "b", "hash": "x2", "height": 6}]
    picture = fork_picture({"blocks": blocks, "tips": tips})
    places = {each["block"]["hash"]: (each["height"], each["lane"]) for each in picture["blocks"] if each["block"]}
    assert places == {"x1": (5, 1), "x2": (6, 1), "y": (6, 2), "z": (9, 1)}
    assert picture["lanes"] == 3
    column = picture["columns"].index
    branches = {(each["from"], each["to"]) for each in picture["edges"] if each["to"][1]}
    assert branches == {
        ((column(4), 0), (column(5), 1)),
        ((column(5), 1), (column(6), 1)),
        ((column(5), 1), (column(6), 2)),
        ((column(8), 0), (column(9), 1)),
    }
    assert [each["gap"] for each in picture["edges"] if not each["to"][1]] == [True, False, False, True, False]
    assert [each["nodes"] for each in picture["blocks"] if each["nodes"]] == [["a"], ["b"]]


def test_nothing_is_known_yet() -> None:
    assert fork_picture({"blocks": [], "tips": []})["blocks"] == []
