"""A run's folder: what is in it, what is refused, what is pruned, and replaying."""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from traincert.trainer.cycle import Trainer
from traincert.trainer.errors import IntegrityError, RunError
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import Run
from traincert.trainer.report import TensorBoard, write_report
from traincert.trainer.state import state_hash

MakeTrainer = Callable[..., AbstractContextManager[Trainer]]


@pytest.fixture(scope="module")
def small(job: TrainingJob) -> TrainingJob:
    return replace(
        job, cycles=20, density=0.25, keep_optimizer_state=True, outer_momentum=0.3, local_steps=5, history=3
    )


@pytest.fixture
def go_on(make_trainer: MakeTrainer, small: TrainingJob, miners: list[bytes], tmp_path: Path) -> Callable[..., Path]:
    """Opens the folder of a run, or makes it, and does some cycles more, with the first `count` miners."""

    def go(cycles: int, count: int = 4, folder: Path = tmp_path / "run", job: TrainingJob = small) -> Path:
        with Run(folder, job) as run, make_trainer(job, folder) as trainer:
            if not run.records:
                run.begin(trainer.start(), trainer.dataset)
            state = run.load()
            for _ in range(cycles):
                result = trainer.run_cycle(state, miners[:count], seed=run.seed())
                run.save(result)
                state = result.after
        return folder

    return go


def opened(folder: Path) -> tuple[int, bytes]:
    with Run(folder) as run:
        return run.cycles, run.head


def test_records_are_chained_and_the_last_ones_hash_is_the_head(go_on: Callable[..., Path], small: TrainingJob) -> None:
    folder = go_on(3)
    paths = sorted((folder / "cycles").iterdir())
    assert [path.name for path in paths] == [f"{number:08}.json" for number in range(4)]
    records = [json.loads(path.read_text()) for path in paths]
    for before, after, path in zip(records, records[1:], paths, strict=False):
        assert after["parent"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert after["model_before"] == before["model_after"]
        assert after["loss_before"] == before["loss_after"]
    assert opened(folder) == (3, hashlib.sha256(paths[-1].read_bytes()).digest())
    with Run(folder) as run:
        assert run.job == small
        assert state_hash(run.load().model).hex() == records[-1]["model_after"]


def test_a_run_that_goes_on_is_the_same_as_one_that_was_never_left(go_on: Callable[..., Path], tmp_path: Path) -> None:
    for _ in range(4):
        go_on(1)
    assert opened(tmp_path / "run") == opened(go_on(4, folder=tmp_path / "other"))
    assert opened(go_on(1)) != opened(go_on(1, folder=tmp_path / "other", count=3))


def test_the_number_of_miners_may_change_between_resumes(go_on: Callable[..., Path]) -> None:
    for count in (1, 4, 0, 2):
        folder = go_on(1, count)
    with Run(folder) as run:
        assert [len(record["tasks"]) for record in run.records] == [0, 1, 4, 0, 2]
        assert all(each.same for each in run.replay())


def test_a_run_of_another_job_is_refused(go_on: Callable[..., Path], small: TrainingJob) -> None:
    folder = go_on(0)
    with pytest.raises(RunError, match=f"^{folder} is a run of another job, see {folder}/job.toml: choose another"):
        Run(folder, replace(small, learning_rate=0.06))
    with Run(folder, small):
        pass


def test_a_folder_in_use_is_refused(go_on: Callable[..., Path], small: TrainingJob) -> None:
    folder = go_on(0)
    with Run(folder), pytest.raises(RunError, match=f"^{folder} is in use by another process$"):
        Run(folder, small)
    with Run(folder):
        pass


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(small: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no job\.toml: it is no run's folder"):
        Run(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(RunError, match="is not empty, and no run's: choose another folder"):
        Run(tmp_path, small)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_beginning_that_was_killed_is_taken_up(go_on: Callable[..., Path], tmp_path: Path) -> None:
    """After any of the first things that are made."""
    expected = opened(go_on(1, folder=tmp_path / "whole"))
    for number, made in enumerate([[], [".lock"], [".lock", "store"], [".lock", "store", "cycles"]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in made:
            if name == ".lock":
                (folder / name).touch()
            else:
                (folder / name).mkdir()
        assert opened(go_on(1, folder=folder)) == expected


@pytest.mark.parametrize("change", ["byte", "gone", "truncated", "empty"])
def test_a_damaged_record_is_an_error_that_names_it(go_on: Callable[..., Path], change: str) -> None:
    folder = go_on(3)
    path = folder / "cycles" / "00000001.json"
    text = path.read_text()
    match change:
        case "byte":
            path.write_text(text.replace('"loss_after": ', '"loss_after": 1'))
        case "gone":
            path.unlink()
        case "truncated":
            path.write_text(text[:100])
        case "empty":
            path.write_text("")
    with pytest.raises(IntegrityError, match=rf"^{folder}/cycles/0000000[12]\.json: ") as caught:
        Run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", '{"cycle": 3}', "\xff"])
def test_a_last_record_that_is_none_is_an_error_that_names_it(go_on: Callable[..., Path], text: str) -> None:
    folder = go_on(2)
    path = folder / "cycles" / "00000002.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(IntegrityError, match=f"^{path}: "):
        Run(folder)


@pytest.mark.parametrize("key", ["model_after", "velocity"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_damaged_file_that_the_next_cycle_needs_is_an_error_that_names_it(
    go_on: Callable[..., Path], key: str, missing: bool
) -> None:
    folder = go_on(2)
    with Run(folder) as run:
        path = folder / "store" / run.records[-1][key]
        if missing:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"\x77")
        with pytest.raises(IntegrityError, match=f"^{path}: "):
            run.load()


def test_old_files_are_removed_and_what_is_needed_is_kept(go_on: Callable[..., Path], small: TrainingJob) -> None:
    sizes = []
    for number in range(1, 9):
        folder = go_on(1)
        with Run(folder) as run:
            stored = {path.name for path in (folder / "store").iterdir()}
            last = run.records[-1]
            needed = {last["model_after"], last["velocity"], *last["memories"].values()}
            assert needed <= stored
            for record in run.records[1:][-small.history :]:
                assert {
                    record["model_before"],
                    *(task["memory"] for task in record["tasks"] if task["memory"]),
                } <= stored
            assert len({each.cycle for each in run.replay()}) == min(number, small.history)
        sizes.append(len(stored))
    assert max(sizes[4:]) <= 2 + 4 + small.history * 5


def test_replaying_an_untouched_run_finds_the_same_updates(go_on: Callable[..., Path]) -> None:
    """With compression and kept optimizers, whose memories come from the store."""
    folder = go_on(3)
    with Run(folder) as run:
        found = list(run.replay())
        assert len(found) == 12
        assert all(each.same for each in found)
        assert any(task["memory"] for record in run.records for task in record["tasks"])
        assert [(each.cycle, each.miner) for each in found] == [
            (record["cycle"], task["miner"]) for record in run.records[1:] for task in record["tasks"]
        ]
        assert [each for each in found if each.cycle == 2] == list(run.replay(2))


def test_replaying_leaves_the_folder_as_it_was(go_on: Callable[..., Path]) -> None:
    folder = go_on(3)
    before = {path: path.stat().st_size for path in folder.rglob("*")}
    with Run(folder) as run:
        list(run.replay())
    assert {path: path.stat().st_size for path in folder.rglob("*")}.keys() <= before.keys()


@pytest.mark.parametrize("key", ["update_hash", "seed", "shard"])
def test_replaying_finds_what_was_tampered_with(go_on: Callable[..., Path], key: str) -> None:
    folder = go_on(2)
    path = folder / "cycles" / "00000002.json"
    record = json.loads(path.read_text())
    other = next(task[key] for task in record["tasks"] if task[key] != record["tasks"][0][key])
    record["tasks"][0][key] = other
    path.write_text(json.dumps(record, sort_keys=True, indent=1) + "\n")
    with Run(folder) as run:
        assert [each.same for each in run.replay()] == [True] * 4 + [False] + [True] * 3


@pytest.mark.parametrize("cycle", [0, 3, -1])
def test_a_cycle_that_is_not_there_cannot_be_replayed(go_on: Callable[..., Path], cycle: int) -> None:
    folder = go_on(2)
    with Run(folder) as run, pytest.raises(RunError, match=f"has no cycle {cycle}; it has 1 to 2"):
        list(run.replay(cycle))


def test_a_cycle_that_is_too_old_cannot_be_replayed(go_on: Callable[..., Path]) -> None:
    folder = go_on(5)
    with Run(folder) as run:
        with pytest.raises(RunError, match="the store has the models of cycles 3 to 5 only: history = 3"):
            list(run.replay(2))
        assert len(list(run.replay(3))) == 4


def test_a_file_that_replaying_needs_is_named_if_it_is_missing(go_on: Callable[..., Path]) -> None:
    folder = go_on(2)
    with Run(folder) as run:
        path = folder / "store" / run.records[2]["model_before"]
        path.unlink()
        with pytest.raises(IntegrityError, match=f"^{path}: no such file"):
            list(run.replay(2))


def test_a_report_of_a_run_without_cycles_can_be_written(
    go_on: Callable[..., Path], small: TrainingJob, tmp_path: Path
) -> None:
    folder = go_on(0)
    with Run(folder) as run:
        path = write_report(tmp_path / "report", small, run.records, run.load().evaluation)
        with TensorBoard(tmp_path / "tensorboard", run.records):
            pass
    assert "Training report" in path.read_text()
    assert json.loads((path.parent / "report.json").read_text())["times_smaller_than_float32"] is None


def test_a_reports_job_is_text_and_no_markup(go_on: Callable[..., Path], small: TrainingJob, tmp_path: Path) -> None:
    folder = go_on(1)
    sly = replace(small, dataset_options={"note": "<script>alert(1)</script>"})
    with Run(folder) as run:
        path = write_report(tmp_path / "report", sly, run.records, run.load().evaluation)
    assert "<script>" not in path.read_text()
