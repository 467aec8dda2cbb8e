"""A run's folder: what is in it, what is refused, and what is pruned."""

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from traincert.trainer.cycle import Trainer
from traincert.trainer.errors import IntegrityError, RunError
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import VERSION, RunFolder, record_hash
from traincert.trainer.replay import replay_tasks
from traincert.trainer.report import TensorBoard, write_report
from traincert.trainer.scoring import MAX_NANO_NATS, Evaluation
from traincert.trainer.state import state_hash

MakeTrainer = Callable[..., AbstractContextManager[Trainer]]


def opened(folder: Path) -> tuple[int, bytes]:
    with RunFolder(folder) as run:
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
    with RunFolder(folder) as run:
        assert run.job == small
        assert state_hash(run.load().model).hex() == records[-1]["model_after"]


def test_a_cycles_record_has_the_hash_that_was_told_before_it_was_written(
    make_trainer: MakeTrainer, small: TrainingJob, miners: list[bytes], tmp_path: Path
) -> None:
    with RunFolder(tmp_path, small) as run, make_trainer(small, tmp_path) as trainer:
        run.begin(trainer.start(), trainer.dataset)
        state = run.load()
        for cycle, count in enumerate((4, 0, 2), start=1):
            result = trainer.run_cycle(state, miners[:count], seed=run.seed())
            record = run.next_record(result)
            told = record_hash(record)
            assert run.cycles == cycle - 1
            run.save(record)
            assert told == hashlib.sha256((run.folder / f"cycles/{cycle:08}.json").read_bytes()).digest()
            assert run.hashes[cycle] == run.head == told
            state = result.after


def test_a_run_that_goes_on_is_the_same_as_one_that_was_never_left(go_on: Callable[..., Path], tmp_path: Path) -> None:
    for _ in range(4):
        go_on(1)
    assert opened(tmp_path / "run") == opened(go_on(4, folder=tmp_path / "other"))
    assert opened(go_on(1)) != opened(go_on(1, folder=tmp_path / "other", count=3))


def test_the_number_of_miners_may_change_between_resumes(go_on: Callable[..., Path]) -> None:
    for count in (1, 4, 0, 2):
        folder = go_on(1, count)
    with RunFolder(folder) as run:
        assert [len(record["tasks"]) for record in run.records] == [0, 1, 4, 0, 2]
        assert all(each.same for each in replay_tasks(run))


def test_a_run_of_another_job_is_refused(go_on: Callable[..., Path], small: TrainingJob) -> None:
    folder = go_on(0)
    said = r"\(cycles was 20, is 21, learning_rate was 0.05, is 0.06\): choose another folder with --out; "
    with pytest.raises(RunError, match=f"^{folder} is a run of another job {said}"):
        RunFolder(folder, replace(small, learning_rate=0.06, cycles=21))
    with RunFolder(folder, small):
        pass


def test_a_folder_in_use_is_refused(go_on: Callable[..., Path], small: TrainingJob) -> None:
    folder = go_on(0)
    with RunFolder(folder), pytest.raises(RunError, match=f"^{folder} is in use by another process$"):
        RunFolder(folder, small)
    with RunFolder(folder):
        pass


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(small: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no job\.toml: it is not a run folder"):
        RunFolder(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(RunError, match="is not empty, and is not a run folder: choose another folder"):
        RunFolder(tmp_path, small)
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
        RunFolder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", '{"cycle": 3}', "\xff"])
def test_a_last_record_that_is_none_is_an_error_that_names_it(go_on: Callable[..., Path], text: str) -> None:
    folder = go_on(2)
    path = folder / "cycles" / "00000002.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(IntegrityError, match=f"^{path}: "):
        RunFolder(folder)


@pytest.mark.parametrize("version", ["99", None])
def test_a_run_of_another_format_is_refused_by_a_line_that_says_what_to_do(
    go_on: Callable[..., Path], version: str | None
) -> None:
    folder = go_on(0)
    path = folder / "version"
    if version:
        path.write_text(version)
    else:
        path.unlink()
    with pytest.raises(
        RunError, match=rf"^{path}: the run's format is (99|none), this traincert reads {VERSION}: go on with "
    ):
        RunFolder(folder)


@pytest.mark.parametrize("key", ["model_after", "velocity"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_damaged_file_that_the_next_cycle_needs_is_an_error_that_names_it(
    go_on: Callable[..., Path], key: str, missing: bool
) -> None:
    folder = go_on(2)
    with RunFolder(folder) as run:
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
        with RunFolder(folder) as run:
            stored = {path.name for path in (folder / "store").iterdir()}
            last = run.records[-1]
            needed = {last["model_after"], last["velocity"], *last["memories"].values()}
            needed |= {record["velocity"] for record in run.records[-small.history - 1 :]}
            assert needed <= stored
            for record in run.records[1:][-small.history :]:
                assert {
                    record["model_before"],
                    *(task["memory"] for task in record["tasks"] if task["memory"]),
                } <= stored
            assert len({each.cycle for each in replay_tasks(run)}) == min(number, small.history)
        sizes.append(len(stored))
    assert max(sizes[4:]) <= 3 + 4 + small.history * 6


def test_a_report_of_a_run_without_cycles_can_be_written(
    go_on: Callable[..., Path], small: TrainingJob, tmp_path: Path
) -> None:
    folder = go_on(0)
    with RunFolder(folder) as run:
        path = write_report(tmp_path / "report", small, run.records, run.load().evaluation)
        with TensorBoard(tmp_path / "tensorboard", small, run.records):
            pass
    assert "Training report" in path.read_text()
    assert json.loads((path.parent / "report.json").read_text())["times_smaller_than_float32"] is None


def test_a_reports_job_is_text_and_no_markup(go_on: Callable[..., Path], small: TrainingJob, tmp_path: Path) -> None:
    folder = go_on(1)
    sly = replace(small, dataset_options={"note": "<script>alert(1)</script>"})
    with RunFolder(folder) as run:
        path = write_report(tmp_path / "report", sly, run.records, run.load().evaluation)
    assert "<script>" not in path.read_text()


def test_a_report_of_numbers_that_are_none_is_json(small: TrainingJob, tmp_path: Path) -> None:
    record: dict[str, object] = {
        "cycle": 0,
        "loss_after": MAX_NANO_NATS,
        "loss_offset": 2.0,
        "metric": None,
        "more_metrics": [],
        "model_after": "00",
        "dataset_root": "00",
        "tasks": [],
    }
    after = {**record, "cycle": 1, "loss_after": 1_500_000_000, "metric": 0.5}
    job = replace(small, loss_offset=2.0)
    path = write_report(tmp_path / "report", job, [record, after], Evaluation(MAX_NANO_NATS, math.nan))
    found = json.loads((path.parent / "report.json").read_text(), parse_constant=pytest.fail)
    assert (found["validation_loss_first"], found["validation_loss"], found["validation_metric"]) == (None, -0.5, 0.5)
    assert (found["test_loss"], found["test_metric"]) == (None, None)
    assert "no number → -0.5000 nats" in path.read_text()
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o644}
