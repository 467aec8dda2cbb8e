"""`traincert job run` and `traincert job replay` as a user runs them: killed, interrupted, resumed, and refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from textwrap import dedent
from typing import Any

import matplotlib.image
import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from traincert.trainer.errors import RunError
from traincert.trainer.export import export_model
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model, mlp
from traincert.trainer.records import RunFolder
from traincert.trainer.run import run_job
from traincert.trainer.state import state_hash, state_of
from users_models import MODULE

TRAINCERT = str(Path(sys.executable).parent / "traincert")
TIMEOUT = 120  # seconds
CYCLES = 8

JOB = f"""
cycles = {CYCLES}
dataset = "traincert.trainer.datasets:digits"
normalize = {{ inputs = "all" }}
validation_examples = 300
test_examples = 360
shards = 4
model = "traincert.trainer.models:mlp"
model_options = {{ inputs = 64, hidden = [16], classes = 10 }}
segments = 2
optimizer_options = {{ momentum = 0.9 }}
learning_rate = 0.05
batch_size = 32
local_steps = 60
outer_momentum = 0.3
density = 0.25
"""


class Silent:
    def step(self, text: str) -> None: ...

    def update(self, done: int, total: int) -> None: ...

    def cycle(self, record: dict[str, Any]) -> None: ...


def traincert(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [TRAINCERT, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT)


def head(shown: str) -> str:
    found = re.search(r"^last record ([0-9a-f]{64})$", shown, re.MULTILINE)
    assert found, shown
    return found[1]


def records(folder: Path) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted((folder / "cycles").glob("*.json"))]


@pytest.fixture(scope="module")
def job_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "small.toml"
    path.write_text(JOB, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(job_file: Path) -> tuple[Path, str]:
    """A run from its beginning to its end, and what it printed."""
    folder = job_file.parent / "finished"
    answer = traincert("job", "run", job_file, "--out", folder)
    assert answer.returncode == 0, answer.stderr
    return folder, answer.stdout


def running(mark: str) -> list[str]:
    """The processes whose environment has a mark, as all those that a marked one starts do."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            if mark.encode() in (process / "environ").read_bytes() and state not in "ZX":
                found.append(process.name)
        except OSError:  # it ended, or is not ours
            continue
    return found


def wait_until(condition: Callable[[], bool], awaited: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"not within {TIMEOUT} s: {awaited}"
        time.sleep(0.005)


@contextmanager
def started(job_file: Path, folder: Path, workers: int, mark: str) -> Iterator[subprocess.Popen[str]]:
    command = [TRAINCERT, "job", "run", str(job_file), "--out", str(folder), "--workers", str(workers)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TEST_MARK": mark},
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_a_run_that_is_killed_and_interrupted_comes_to_the_same_end(
    job_file: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    """First in its preparation, then twice in its cycles (all processes; the main one alone), then by Ctrl-C."""
    random = Random(int.from_bytes(os.urandom(4)))  # noqa: S311 - a test
    folder = tmp_path / "run"
    mark = f"run in {tmp_path}"

    def cycles(least: int) -> Callable[[], bool]:
        return lambda: (folder / "cycles" / f"{least:08}.json").exists()

    def prepares() -> bool:
        return (folder / "data" / "shards").exists()

    for workers, moment, kill_all, number in [
        (1, prepares, True, signal.SIGKILL),
        (1, cycles(1), True, signal.SIGKILL),
        (2, cycles(3), False, signal.SIGKILL),
        (1, cycles(5), True, signal.SIGINT),
    ]:
        with started(job_file, folder, workers, mark) as process:
            wait_until(lambda moment=moment, process=process: moment() or process.poll() is not None, "the moment")  # type: ignore[misc]
            if moment is not prepares and number == signal.SIGKILL and not kill_all:
                with pytest.raises(RunError, match="is in use by another process"):
                    RunFolder(folder)
            time.sleep(random.uniform(0, 0.1))
            assert process.poll() is None, process.communicate()
            if kill_all:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            _, errors = process.communicate(timeout=TIMEOUT)
        if number == signal.SIGINT:
            assert process.returncode == 130, errors
            assert errors.splitlines()[-1] == "traincert: interrupted"
            assert "Traceback" not in errors
        wait_until(lambda: not running(mark), "the end of the workers")
        assert not (folder / "report").exists()
    answer = traincert("job", "run", job_file, "--out", folder, "--workers", 4)
    assert answer.returncode == 0, answer.stderr
    assert head(answer.stdout) == head(finished[1])
    assert records(folder) == records(finished[0])
    assert cycles_of_tensorboard(folder) == cycles_of_tensorboard(finished[0])


def cycles_of_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    (path,) = (folder / "tensorboard").iterdir()
    events = EventAccumulator(str(path))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_each_cycle_once(finished: tuple[Path, str]) -> None:
    found = cycles_of_tensorboard(finished[0])
    written = records(finished[0])
    steps, losses = zip(*found["validation/loss (nats)"], strict=True)
    assert steps == tuple(record["cycle"] for record in written)
    assert losses == pytest.approx([record["loss_after"] / 1e9 for record in written])
    assert [step for step, _ in found["validation/metric"]] == list(range(CYCLES + 1))
    assert [step for step, _ in found["updates/accepted"]] == list(range(1, CYCLES + 1))
    sizes = [(record["cycle"], sum(task["update_size"] for task in record["tasks"])) for record in written[1:]]
    assert found["updates/bytes"] == sizes


def test_the_report_agrees_with_the_records(finished: tuple[Path, str]) -> None:
    folder, shown = finished
    written = records(folder)
    summary = json.loads((folder / "report" / "report.json").read_text())
    tasks = [task for record in written for task in record["tasks"]]
    assert summary["cycles"] == CYCLES == len(written) - 1
    assert summary["validation_loss_first"] == written[0]["loss_after"] / 1e9
    assert summary["validation_loss"] == written[-1]["loss_after"] / 1e9
    assert summary["validation_metric"] == written[-1]["metric"]
    assert summary["model"] == written[-1]["model_after"]
    assert summary["updates"] == len(tasks) == 4 * CYCLES
    assert summary["update_bytes"] == sum(task["update_size"] for task in tasks)
    assert sum(summary["refusals"].values()) == sum(bool(task["refusal"]) for task in tasks)
    assert f"test accuracy {summary['test_metric']:.4f}, test loss {summary['test_loss']:.4f} nats" in shown
    assert str(folder / "report" / "report.html") in shown.replace("\n", "")
    page = (folder / "report" / "report.html").read_text()
    assert summary["model"] in page
    names = re.findall(r'<img src="([^"]+)"', page)
    assert set(names) == {"loss.png", "miners.png", "segments.png"}
    for name in names:
        assert (folder / "report" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        height, width, _ = matplotlib.image.imread(folder / "report" / name).shape
        assert height > 300
        assert width > 600


def test_a_run_that_is_over_is_not_run_again(job_file: Path, finished: tuple[Path, str]) -> None:
    """It only writes its report again; and miners may be others then."""
    shutil.rmtree(finished[0] / "report")
    answer = run_job(TrainingJob.load(job_file), finished[0], 9, 1, Silent())
    assert answer.head.hex() == head(finished[1])
    assert answer.path.is_file()


def test_replaying_finds_that_all_updates_are_the_same(finished: tuple[Path, str]) -> None:
    answer = traincert("job", "replay", finished[0])
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[-1] == f"all {4 * CYCLES} updates are the same"
    assert len(lines) == 4 * CYCLES + 1
    assert all(line.endswith(": same") for line in lines[:-1])


def test_replaying_finds_a_record_that_was_tampered_with(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "tampered"
    shutil.copytree(finished[0], folder)
    path = folder / "cycles" / f"{CYCLES:08}.json"
    record = json.loads(path.read_text())
    genuine = record["tasks"][2]["update_hash"]
    record["tasks"][2]["update_hash"] = "00" * 32
    path.write_text(json.dumps(record, sort_keys=True, indent=1) + "\n")
    answer = traincert("job", "replay", folder, "--cycle", CYCLES)
    assert answer.returncode == 1
    assert answer.stderr == "traincert: 1 of 4 updates are different\n"
    assert f"update {'00' * 32}: DIFFERENT, now {genuine}" in answer.stdout


def test_a_folder_that_is_no_runs_is_refused_in_one_line(job_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for command in (["run", job_file, "--out", tmp_path], ["replay", tmp_path]):
        answer = traincert("job", *command)
        assert answer.returncode == 1
        assert re.fullmatch(rf"traincert: {tmp_path} .*not a run folder.*", answer.stderr.splitlines()[-1])
        assert "Traceback" not in answer.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["/bin/mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("making a small disk needs root, and a kernel that lets it")
    try:
        yield
    finally:
        # Lazily, because memory-mapped shards may still be open; a mount that stayed would trouble later test runs.
        subprocess.run(["/bin/umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [200, 680])
def test_a_full_disk_is_one_line_and_the_run_can_go_on(
    job_file: Path, finished: tuple[Path, str], tmp_path: Path, kilobytes: int
) -> None:
    """Full while the data is prepared, or in the cycles."""
    disk = tmp_path / "disk"
    with small_disk(disk, kilobytes):
        answer = traincert("job", "run", job_file, "--out", disk / "run", "--workers", 1)
        assert answer.returncode == 1, answer.stderr
        assert re.match(r"traincert: .*No space left on device", answer.stderr.splitlines()[-1]), answer.stderr
        assert "Traceback" not in answer.stderr
        subprocess.run(["/bin/mount", "-o", "remount,size=50m", str(disk)], check=True)
        done = run_job(TrainingJob.load(job_file), disk / "run", 4, 1, Silent())
    assert done.head.hex() == head(finished[1])


def test_a_cycle_that_trains_nothing_ends_the_run(tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text(JOB + "max_update_norm = 0.001\n", encoding="utf-8")
    answer = traincert("job", "run", strict, "--out", tmp_path / "run")
    assert answer.returncode == 1
    assert re.search(
        r"cycle 1: all 4 updates were refused, so nothing was trained; 1 as norm-too-large: L2 norm [\d.]+, at most "
        r"0.001 \(max_update_norm\)",
        answer.stderr.replace("\n", " "),
    ), answer.stderr
    assert "Traceback" not in answer.stderr
    assert len(records(tmp_path / "run")) == 1


def test_a_target_that_is_missed_is_a_failure(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    missing.write_text(JOB.replace(f"cycles = {CYCLES}", "cycles = 1") + "target_metric = 1.1\n", encoding="utf-8")
    answer = traincert("job", "run", missing, "--out", tmp_path / "run")
    assert answer.returncode == 1
    assert re.search(r"test accuracy 0\.\d+ misses target_metric = 1.1", answer.stderr), answer.stderr
    assert (tmp_path / "run/report/report.html").is_file()


def test_a_run_ends_early_and_goes_on_with_more_cycles(tmp_path: Path) -> None:
    """Its optimizer raises the loss."""
    job, folder = tmp_path / "job.toml", tmp_path / "run"
    job.write_text(
        JOB.replace("{ momentum = 0.9 }", "{ maximize = true }") + "early_stop = 2\n",
        encoding="utf-8",
    )
    answer = traincert("job", "run", job, "--out", folder)
    assert answer.returncode == 0, answer.stderr
    stopped = "the run ended early: no lower validation loss in 2 cycles; the best model is of cycle 0\n"
    assert answer.stdout.startswith(stopped)
    first = records(folder)
    assert len(first) == 3
    assert traincert("job", "run", job, "--out", folder).stdout == answer.stdout  # it is not run again
    answer = traincert("job", "run", job, "--out", folder, "--cycles", CYCLES + 1)
    assert answer.returncode == 0, answer.stderr
    assert "ended early" not in answer.stdout
    assert (len(records(folder)), records(folder)[:3]) == (CYCLES + 2, first)
    assert traincert("job", "replay", folder).returncode == 0  # cycles after the job's last one, too
    answer = traincert("job", "run", job, "--out", folder, "--cycles", 1)
    assert answer.returncode == 1
    assert f"{folder} already has {CYCLES + 1} cycles: give as many or more, not 1" in answer.stderr
    costs = [json.loads(path.read_bytes()) for path in sorted((folder / "costs").iterdir())]
    assert [each["cycle"] for each in costs] == list(range(1, CYCLES + 2))
    assert all(task["user_seconds"] > 0 for each in costs for task in each["tasks"].values())
    report = json.loads((folder / "report/report.json").read_text())
    assert 0 < report["task_seconds"] < 2 * report["seconds"]


def test_a_changed_job_starts_from_the_old_model(finished: tuple[Path, str], tmp_path: Path) -> None:
    job, folder = tmp_path / "job.toml", tmp_path / "run"
    job.write_text(JOB.replace(f"cycles = {CYCLES}", "cycles = 1").replace("0.05", "0.01"), encoding="utf-8")
    old = records(finished[0])[-1]
    answer = traincert("job", "run", job, "--out", finished[0])
    assert answer.returncode == 1
    assert f"(cycles was {CYCLES}, is 1, learning_rate was 0.05, is 0.01): choose another folder" in answer.stderr
    for _ in range(2):  # the second call finds that the run is over
        answer = traincert("job", "run", job, "--out", folder, "--from", finished[0])
        assert answer.returncode == 0, answer.stderr
        first, second = records(folder)
        assert first["model_after"] == second["model_before"] == old["model_after"]
        assert first["loss_after"] == old["loss_after"]
    source, going_on = tmp_path / "source", tmp_path / "going_on"
    shutil.copytree(finished[0], source)
    assert traincert("job", "run", job, "--out", going_on, "--from", source).returncode == 0
    shutil.rmtree(source)
    for options in (("--from", source), ()):  # the model was copied
        answer = traincert("job", "run", job, "--out", going_on, "--cycles", 2, *options)
        assert answer.returncode == 0, answer.stderr
    assert len(records(going_on)) == 3
    own = tmp_path / "own.toml"
    own.write_text(job.read_text() + 'initial_model = "model.safetensors"\n', encoding="utf-8")
    answer = traincert("job", "run", own, "--out", tmp_path / "other", "--from", finished[0])
    assert answer.returncode == 2
    assert "has an initial_model: give one of them" in answer.stderr
    (tmp_path / "empty").mkdir()
    answer = traincert("job", "run", job, "--out", tmp_path / "other", "--from", tmp_path / "empty")
    assert answer.returncode == 1
    assert "has no job.toml: it is not a run folder" in answer.stderr


def test_a_run_that_has_trained_nothing_is_begun_anew(tmp_path: Path) -> None:
    """Here the first cycle was refused; then the job was mended."""
    job, folder = tmp_path / "job.toml", tmp_path / "run"
    job.write_text(JOB.replace(f"cycles = {CYCLES}", "cycles = 1") + "max_update_norm = 0.001\n", encoding="utf-8")
    assert traincert("job", "run", job, "--out", folder).returncode == 1
    job.write_text(JOB.replace(f"cycles = {CYCLES}", "cycles = 1").replace("[16]", "[8]"), encoding="utf-8")
    answer = traincert("job", "run", job, "--out", folder)
    assert answer.returncode == 0, answer.stderr
    assert len(records(folder)) == 2
    job.write_text(JOB, encoding="utf-8")
    answer = traincert("job", "run", job, "--out", folder)
    assert answer.returncode == 1
    assert "is a run of another job (cycles was 1, is 8, model_options was " in answer.stderr.replace("\n", " ")


def test_runs_are_compared(finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a table has no place for long names
    folder, other, picture = Path(os.path.relpath(finished[0])), Path("other"), Path("compare.png")
    slower = tmp_path / "slower.toml"
    slower.write_text(JOB.replace(f"cycles = {CYCLES}", "cycles = 2").replace("0.05", "0.01"), encoding="utf-8")
    assert traincert("job", "run", slower, "--out", other).returncode == 0
    answer = traincert("job", "compare", folder, other, "--out", picture)
    assert answer.returncode == 0, answer.stderr
    rows = {line.split()[0]: line.split()[1:] for line in answer.stdout.splitlines() if line.strip()}
    last, scored = records(folder)[-1], re.search(r"test accuracy (0\.\d+), test loss (\d\.\d+)", finished[1])
    assert scored
    assert rows[str(folder)][:2] == [str(CYCLES), f"{last['loss_after'] / 1e9:.4f}"]
    assert rows[str(folder)][6:8] == [scored[2], scored[1]]
    assert rows["cycles"] == [str(CYCLES), "2"]
    assert rows["learning_rate"] == ["0.05", "0.01"]
    assert set(rows) == {"run", str(folder), str(other), "key", "cycles", "learning_rate", str(picture)}
    assert matplotlib.image.imread(picture).size
    assert "different losses" not in answer.stdout
    answer = traincert("job", "compare", folder, folder, "--out", picture)
    assert "the jobs are equal" in answer.stdout
    for wrong, said in (([folder], "give two run folders or more"), ([folder, tmp_path], "has no job.toml")):
        answer = traincert("job", "compare", *wrong, "--out", picture)
        assert answer.returncode in (1, 2)
        assert said in answer.stderr


USERS = """
    import numpy as np
    from torch import nn
    from traincert.trainer import RawDataset

    def data(since):
        def train():
            generator = np.random.default_rng(0)
            x = generator.normal(size=(300, 4)).astype(np.float32)
            yield {"inputs": x, "kind": np.array(["a", "b"] * 150), "labels": (x.sum(1) > 0).astype(np.int64)}
        return RawDataset(train)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, inputs, kind):
            return self.layer(inputs)
"""

USERS_JOB = """
cycles = {cycles}
dataset = "mine:data"
dataset_options = {{ since = 2024-02-29 }}
inputs = ["inputs", "kind"]
hash = {{ kind = 16 }}
hash_key = "kind.key"
validation_examples = 50
test_examples = 50
shards = 4
model = "mine:Model"
learning_rate = 0.05
batch_size = 16
local_steps = 8
"""


@pytest.fixture
def users_job(tmp_path: Path) -> Path:
    """A job with a module of its own, a hashed column, and a date in its options."""
    folder = tmp_path / "users"
    folder.mkdir()
    (folder / "mine.py").write_text(dedent(USERS), encoding="utf-8")
    (folder / "job.toml").write_text(USERS_JOB.format(cycles=2), encoding="utf-8")
    return folder / "job.toml"


def test_a_users_run_is_replayed_from_anywhere_and_goes_on_where_it_was_moved(users_job: Path, tmp_path: Path) -> None:
    run = users_job.parent / "run"
    first = traincert("job", "run", users_job, "--out", run)
    assert first.returncode == 0, first.stderr
    replayed = traincert("job", "replay", run)
    assert replayed.returncode == 0, replayed.stderr
    assert "all 8 updates are the same" in replayed.stdout

    elsewhere = tmp_path / "elsewhere"
    users_job.parent.rename(elsewhere)
    again = traincert("job", "run", elsewhere / "job.toml", "--out", elsewhere / "run")
    assert (again.returncode, head(again.stdout)) == (0, head(first.stdout)), again.stderr
    assert traincert("job", "replay", elsewhere / "run").returncode == 0


def test_a_module_that_was_mended_is_named(users_job: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert traincert("job", "run", users_job, "--out", run).returncode == 0
    module = users_job.parent / "mine.py"
    module.write_text(module.read_text() + "# mended\n")
    answer = traincert("job", "run", users_job, "--out", run)
    assert answer.returncode == 1
    assert "is a run of another job (module mine has changed): choose another folder" in answer.stderr
    assert traincert("job", "run", users_job, "--out", tmp_path / "new").returncode == 0


def test_another_hash_key_in_a_run_is_named(users_job: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert traincert("job", "run", users_job, "--out", run).returncode == 0
    (users_job.parent / "kind.key").unlink()
    answer = traincert("job", "run", users_job, "--out", run)
    assert answer.returncode == 1
    assert re.search(r"is hash_key another file\? Put the old one back", answer.stderr), answer.stderr


def test_plain_pytorch_loads_an_exported_model(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, shown = finished
    scored = re.search(r"test accuracy (0\.\d+)", shown)
    assert scored
    losses = [record["loss_after"] for record in records(folder)]
    for options, cycle in (((), CYCLES), (("--best",), losses.index(min(losses))), (("--cycle", 1), 1)):
        for suffix in (".pt", ".safetensors"):
            out = tmp_path / f"model{suffix}"
            answer = traincert("job", "export", folder, *options, "--out", out)
            assert answer.returncode == 0, answer.stderr
            said, load = answer.stdout.splitlines()
            assert said == f"{out}: the model after cycle {cycle}"
            model = mlp(64, [16], 10)
            exec(load, {"model": model, "torch": torch, "safetensors": safetensors})  # noqa: S102 - the printed line
            with RunFolder(folder) as run:
                assert state_hash(state_of(model)).hex() == run.records[cycle]["model_after"]


def test_tied_parameters_and_buffers_are_exported(
    write_job: Callable[..., Path], make_trainer: Callable[..., Any], miners: list[bytes], tmp_path: Path
) -> None:
    for name in ("Tied", "batch_norm"):
        job = TrainingJob.load(write_job(MODULE, model=f'"{{module}}:{name}"', model_options=None))
        folder = tmp_path / name
        with RunFolder(folder, job) as run, make_trainer(job, folder) as trainer:
            run.begin(trainer.start(), trainer.dataset)
            run.save(run.next_record(trainer.run_cycle(run.load(), miners, seed=b"")))
            for suffix in (".pt", ".safetensors"):
                export_model(run, 1, folder / f"model{suffix}")
            state = run.load().model
        model = build_model(job)
        model.load_state_dict(torch.load(folder / "model.pt"))
        assert state_hash(state_of(model)) == state_hash(state)
        other = build_model(job)
        other.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        assert state_hash(state_of(other)) == state_hash(state)


def test_what_cannot_be_exported_is_one_line(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    for options, said in (
        (("--out", tmp_path / "model.onnx"), "model.onnx: the name must end with .pt or .safetensors"),
        (("--out", tmp_path / "model.pt", "--cycle", 99), f"{folder} has no cycle 99; it has {CYCLES}"),
        (("--out", tmp_path / "absent" / "model.pt"), f"{tmp_path / 'absent'}: no such folder"),
    ):
        answer = traincert("job", "export", folder, *options)
        assert (answer.returncode, answer.stdout) == (1, "")
        assert said in answer.stderr
        assert "Traceback" not in answer.stderr
    assert list(tmp_path.iterdir()) == []
