"""Jobs of the trainer against plain PyTorch, with the same model, data, number of samples and seed, in the same run.

Everything runs in processes of its own. Speed is compared with two plain single-thread processes side by side, because
the cycle loop has two workers.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.rows import Row, row
from bench.run_job import WORKERS
from traincert.trainer.job import TrainingJob

MINERS = 4
SPEED_CYCLES = 13  # of which the first is not counted; the second still has what happens once
TURNS = 5
SEEDS = 3
Numbers = dict[str, Any]


def measure(folder: Path) -> Iterator[list[Row]]:
    """Run all jobs, one after the other."""
    digits, fashion, text = map(TrainingJob.named, ("digits", "fashion", "text"))
    bench = Runs(folder)
    accuracy = bench.run("digits", digits)["test_metric"]
    yield [row("digits, 4 miners: test accuracy", accuracy, "", at_least=0.95), *_miners(bench, digits)]
    yield _fashion(bench, fashion)
    yield _text(bench, text)


def _fashion(bench: Runs, job: TrainingJob) -> list[Row]:
    plain = bench.plain("fashion", job)
    whole = bench.run("fashion", job)
    segments = replace(
        job,
        density=1.0,
        segments=4,
        cycles=3 * job.cycles,  # shorter, because segments that move at once know less of each other
        # A segment sees a quarter of the samples: twice as many steps, with half as many samples each.
        local_steps=2 * job.local_steps // 3,
        batch_size=job.batch_size // 2,
        outer_learning_rate=0.7,
        outer_momentum=0.8,
        keep_optimizer_state=True,
    )
    same = bench.run("fashion", segments)
    more = bench.run("fashion", replace(segments, cycles=3 * segments.cycles))

    def behind(found: Numbers) -> float:
        return 100 * float(plain["test_metric"] - found["test_metric"])

    return [
        row("fashion, plain PyTorch: test accuracy", plain["test_metric"], ""),
        row("fashion, whole model, 4 miners: test accuracy", whole["test_metric"], "", at_least=0.90),
        row("the same: behind plain PyTorch", behind(whole), "points", 1),
        row("fashion, 4 segments, 4 miners, same samples: behind plain PyTorch", behind(same), "points", 1),
        row("the same, three times the samples", behind(more), "points", 1.5),
        *_compression(bench, "fashion", job, 0.042, 1.03),
        *_speed(bench, "fashion", job),
        row("fashion: peak memory of coordinator and 2 workers", whole["gigabytes"], "GB", 2.5),
    ]


def _text(bench: Runs, job: TrainingJob) -> list[Row]:
    """From nothing, and from a model that plain PyTorch trained first, as in DiLoCo's own experiments."""
    trained = trained_text(bench)
    rows = []
    for start, each, bar in (("nothing", job, 1.02), ("a trained model", trained, 1.03)):
        plain, whole = bench.plain("text", each)["test_loss"], bench.run("text", each)["test_loss"]
        rows += [
            row(f"text from {start}, plain PyTorch: test loss", plain, "nats"),
            row(f"text from {start}, whole model, 4 miners: test loss", whole, "nats"),
            row("the same, against plain PyTorch", whole / plain, "ratio", bar),
        ]
    return [*rows, *_compression(bench, "text", trained, 0.0435, 1.01), *_speed(bench, "text", job)]


def trained_text(bench: Runs) -> TrainingJob:
    """Return the job `text`, beginning with a model that plain PyTorch has trained, which needs fewer, longer tasks."""
    job = replace(
        TrainingJob.named("text"),
        cycles=24,
        validation_examples=64,
        learning_rate=0.003,
        warmup_cycles=4,
        batch_size=16,
        local_steps=9,
        score_examples=16,
        outer_momentum=0.4,
    )
    start = bench.folder / "text.safetensors"
    if not start.exists():
        first = replace(
            job,
            schedule="constant",
            learning_rate=0.004,
            batch_size=8,
            cycles=25,
            local_steps=18,
            warmup_cycles=2,
        )
        bench.plain("text", first, save=start)
    return replace(job, initial_model=str(start))


def _compression(bench: Runs, name: str, job: TrainingJob, hundredth: float, bar: float) -> list[Row]:
    """Means over seeds, because one run's loss differs by as much as what is looked for.

    `hundredth` is the density that makes updates 100 times smaller, and `bar` what it may cost.
    """

    def runs(density: float) -> list[Numbers]:
        return [bench.run(name, replace(job, density=density, seed=job.seed + number)) for number in range(SEEDS)]

    plain = [float(each["test_loss"]) for each in runs(1.0)]
    rows = [row(f"{name}, float32: test loss, mean of {SEEDS} seeds", statistics.mean(plain), "nats")]
    for density, times, gap in ((0.11, 50, 1.01), (hundredth, 100, bar), (0.025, 146, None)):
        found = runs(density)
        smaller = statistics.mean(each["times_smaller"] for each in found)
        ratio = statistics.mean(each["test_loss"] / loss for each, loss in zip(found, plain, strict=True))
        rows += [
            row(f"{name}, density {density}: smaller than float32", smaller, "times", at_least=times),
            row("the same: test loss, against float32 of the same seed", ratio, "ratio", gap),
        ]
    return rows


def _speed(bench: Runs, name: str, job: TrainingJob) -> list[Row]:
    """In turns, because the machine's own speed comes and goes."""
    short = replace(job, cycles=SPEED_CYCLES, warmup_cycles=0)
    turns = [(bench.run_again(name, short), bench.plain_speed(name, short)) for _ in range(TURNS)]
    ratios = [loop["samples_per_second"] / plain for loop, plain in turns]
    shares = [100 * loop["outside_training"] for loop, _ in turns]
    return [
        row(
            f"{name}: samples per second of the cycle loop, 2 workers",
            statistics.median(loop["samples_per_second"] for loop, _ in turns),
            "1/s",
        ),
        row(
            f"the same, against two plain PyTorch processes side by side, median of {TURNS}",
            statistics.median(ratios),
            "ratio",
            at_least=0.95,
        ),
        row(f"{name}: share of a cycle that is not training, median of {TURNS}", statistics.median(shares), "%", 10),
    ]


def _miners(bench: Runs, job: TrainingJob) -> list[Row]:
    """The same total work by 2 miners and by 64."""
    per_task = {}
    for miners in (2, 64):
        steps = 64 * job.local_steps // miners
        each = replace(job, local_steps=steps, cycles=6)
        per_task[miners] = bench.run("digits", each, miners)["overhead_per_task"]
    return [
        row("digits, 2 miners: a cycle's overhead for each task", 1000 * per_task[2], "ms"),
        row("digits, 64 miners: a cycle's overhead for each task", 1000 * per_task[64], "ms"),
        row("the same, against 2 miners", per_task[64] / per_task[2], "ratio", 1.3),
    ]


class Runs:
    """Runs programs on jobs. The data of each name are prepared once, and results are kept in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # it is in jobs, whose own folder is another

    def run(self, name: str, job: TrainingJob, miners: int = MINERS) -> Numbers:
        """Run a job's cycles, unless that was done before."""
        key = hashlib.sha256(f"{job.to_toml()} {miners}".encode()).hexdigest()
        kept = self.folder / name / f"{key}.json"
        if not kept.exists():
            kept.write_text(json.dumps(self.run_again(name, job, miners)))
        found: Numbers = json.loads(kept.read_text())
        return found

    def run_again(self, name: str, job: TrainingJob, miners: int = MINERS) -> Numbers:
        """Run a job's cycles, even if that was done before: for what differs from run to run."""
        return _result(self._start("run_job.py", name, job, "--miners", miners))

    def plain(self, name: str, job: TrainingJob, save: Path | None = None) -> Numbers:
        """Train as many samples as the job's miners, in as many steps, in one process."""
        options = ["--steps", job.cycles * job.local_steps, "--batch-size", MINERS * job.batch_size]
        if save:
            options += ["--save", save]
        return _result(self._start("plain.py", name, job, *options))

    def plain_speed(self, name: str, job: TrainingJob) -> float:
        """Measure processes that do the steps of the loop's workers side by side: samples per second of all."""
        steps = (job.cycles - 1) * MINERS * job.local_steps // WORKERS
        options = ("--steps", steps, "--batch-size", job.batch_size)
        processes = [self._start("plain.py", name, job, *options) for _ in range(WORKERS)]
        return sum(float(_result(process)["samples_per_second"]) for process in processes)

    def _start(self, program: str, name: str, job: TrainingJob, *options: object) -> subprocess.Popen[str]:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        described = folder / "job.toml"
        described.write_text(job.to_toml())
        command = [sys.executable, str(Path(__file__).parent / program), str(described), str(folder)]
        print(f"{program} {name} {' '.join(map(str, options))}", flush=True)
        return subprocess.Popen([*command, *map(str, options)], stdout=subprocess.PIPE, text=True)


def _result(process: subprocess.Popen[str]) -> Numbers:
    output, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    numbers: Numbers = json.loads(output)
    return numbers
