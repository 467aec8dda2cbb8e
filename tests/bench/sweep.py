"""Trains a job with updates of several sizes and draws bytes against test loss; the table is printed as Markdown.

    tests/bench/sweep.py JOB FOLDER PICTURE.png [--seeds N]

JOB is as for `traincert job run`; `text` begins as in `training.py`, with a model that plain PyTorch has trained.
Results are kept in FOLDER, so that a sweep that was interrupted goes on. Each seed has a float32 run of its own, with
which its others are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.training import Numbers, Runs, trained_text
from traincert.trainer.job import TrainingJob

DENSITIES = (1.0, 0.3, 0.11, 0.042, 0.02)


def draw(points: list[tuple[float, list[float]]], picture: Path, name: str) -> None:
    matplotlib.use("svg" if picture.suffix == ".svg" else "agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for times, gaps in points:
        axes.plot([times] * len(gaps), gaps, "o", color="C0", alpha=0.5)
    axes.plot([times for times, _ in points], [statistics.mean(gaps) for _, gaps in points], color="C0", label="mean")
    axes.plot([50, 100], [1, 3], "_", color="C3", markersize=24, label="at most: 1 % at 50, 3 % at 100")
    axes.set_xscale("log")
    axes.set_xlabel("bytes of float32 updates / bytes that travelled")
    axes.set_ylabel("test loss above float32's, %")
    axes.set_title(f"{name}: size of updates and what it costs")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    bench, name = Runs(arguments.folder), Path(arguments.job).stem
    job = trained_text(bench) if arguments.job == "text" else TrainingJob.named(arguments.job)
    found: dict[float, list[Numbers]] = {density: [] for density in DENSITIES}
    for seed in range(arguments.seeds):
        for density in DENSITIES:
            found[density].append(bench.run(name, replace(job, seed=seed, density=density)))
    points = []
    print("| density | times smaller | test loss above float32's, % | test metric |\n|---|---|---|---|")
    for density, runs in found.items():
        gaps = [
            100 * (each["test_loss"] / plain["test_loss"] - 1) for each, plain in zip(runs, found[1.0], strict=True)
        ]
        times = statistics.mean(each["times_smaller"] for each in runs)
        metric = statistics.mean(each["test_metric"] for each in runs)
        points.append((times, gaps))
        each_gap = ", ".join(f"{gap:+.1f}" for gap in gaps)
        print(f"| {density:g} | {times:.1f} | {statistics.mean(gaps):+.1f} ({each_gap}) | {metric:.4f} |")
    draw(points, arguments.picture, name)


if __name__ == "__main__":
    main()
