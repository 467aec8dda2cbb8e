"""Doing a run's tasks again: the same updates if nothing was changed, and what is said if something was."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from traincert.trainer.errors import IntegrityError, RunError
from traincert.trainer.records import RunFolder
from traincert.trainer.replay import replay_tasks


def test_replaying_an_untouched_run_finds_the_same_updates(go_on: Callable[..., Path]) -> None:
    """With compression and kept optimizers, whose memories come from the store."""
    folder = go_on(3)
    with RunFolder(folder) as run:
        found = list(replay_tasks(run))
        assert len(found) == 12
        assert all(each.same for each in found)
        assert any(task["memory"] for record in run.records for task in record["tasks"])
        assert [(each.cycle, each.miner) for each in found] == [
            (record["cycle"], task["miner"]) for record in run.records[1:] for task in record["tasks"]
        ]
        assert [each for each in found if each.cycle == 2] == list(replay_tasks(run, 2))


def test_replaying_leaves_the_folder_as_it_was(go_on: Callable[..., Path]) -> None:
    folder = go_on(3)
    before = {path: path.stat().st_size for path in folder.rglob("*")}
    with RunFolder(folder) as run:
        list(replay_tasks(run))
    assert {path: path.stat().st_size for path in folder.rglob("*")}.keys() <= before.keys()


@pytest.mark.parametrize("key", ["update_hash", "seed", "shard"])
def test_replaying_finds_what_was_tampered_with(go_on: Callable[..., Path], key: str) -> None:
    folder = go_on(2)
    path = folder / "cycles" / "00000002.json"
    record = json.loads(path.read_text())
    other = next(task[key] for task in record["tasks"] if task[key] != record["tasks"][0][key])
    record["tasks"][0][key] = other
    path.write_text(json.dumps(record, sort_keys=True, indent=1) + "\n")
    with RunFolder(folder) as run:
        assert [each.same for each in replay_tasks(run)] == [True] * 4 + [False] + [True] * 3


@pytest.mark.parametrize("cycle", [0, 3, -1])
def test_a_cycle_that_is_not_there_cannot_be_replayed(go_on: Callable[..., Path], cycle: int) -> None:
    folder = go_on(2)
    with RunFolder(folder) as run, pytest.raises(RunError, match=f"has no cycle {cycle}; it has 1 to 2"):
        list(replay_tasks(run, cycle))


def test_a_cycle_that_is_too_old_cannot_be_replayed(go_on: Callable[..., Path]) -> None:
    folder = go_on(5)
    with RunFolder(folder) as run:
        with pytest.raises(RunError, match="the store has the models of cycles 3 to 5 only: history = 3"):
            list(replay_tasks(run, 2))
        assert len(list(replay_tasks(run, 3))) == 4


def test_a_file_that_replaying_needs_is_named_if_it_is_missing(go_on: Callable[..., Path]) -> None:
    folder = go_on(2)
    with RunFolder(folder) as run:
        path = folder / "store" / run.records[2]["model_before"]
        path.unlink()
        with pytest.raises(IntegrityError, match=f"^{path}: no such file"):
            list(replay_tasks(run, 2))
