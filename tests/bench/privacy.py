"""Accuracy against epsilon on Fashion-MNIST; the table is printed as Markdown.

    tests/bench/privacy.py FOLDER

Four miners train for 15 cycles, scored as on a chain: only what is above the measurement's noise counts. All rows have
one seed of the job; the noise is drawn anew in each run. Results are kept in FOLDER/privacy.json, so an interrupted
bench goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.orders import Commit
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import mlp
from traincert.trainer.preprocessing import prepare_dataset

PLAIN = TrainingJob(
    cycles=15,
    dataset="traincert.trainer.datasets:fashion_mnist",
    normalize={"inputs": "all"},
    validation_examples=1000,
    shards=4,
    model="privacy:flat_mlp",
    optimizer_options={"momentum": 0.9},
    learning_rate=0.05,
    batch_size=256,
    local_steps=16,
    shard_examples=0,
    spot_checks=0.0,
)

# Clipped gradients are small.
SGD = replace(PLAIN, privacy="dp-sgd", noise_multiplier=1.0, max_grad_norm=1.0, learning_rate=0.3)

JOBS = {
    "none": PLAIN,
    **{f"dp-sgd, {noise:g}": replace(SGD, noise_multiplier=noise) for noise in (0.6, 1.0, 2.0, 4.0)},
    "noised-update, 1": replace(SGD, privacy="noised-update"),
}


def flat_mlp() -> nn.Module:
    """Return a multilayer perceptron with ReLU: (N, 1, 28, 28) -> (N, 10), logits."""
    return nn.Sequential(nn.Flatten(), mlp(28 * 28, [64], 10))


def run(job: TrainingJob, folder: Path) -> dict[str, Any]:
    """Train a job. Return what came of it."""
    miners = [hashlib.sha256(bytes([number])).digest() for number in range(job.shards)]
    accepted, task = 0, None
    with (
        LocalEngine(job, folder / "store", workers=1) as engine,
        Trainer(prepare_dataset(job, folder / "data"), engine) as trainer,
    ):
        state = trainer.start()
        for cycle in range(job.cycles):
            seed = hashlib.sha256(bytes([cycle])).digest()
            result = trainer.run_cycle(state, miners, seed=seed, score_seed=partial(_constant, seed))
            state, task = result.after, result.tasks[0].epsilon
            accepted += len(result.contributions)
        test = trainer.test(state.model)
    return {
        "task": task,
        "epsilon": max((each.epsilon for each in state.spent.values()), default=None),
        "accuracy": test.metric,
        "loss": test.loss / 1e9,
        "accepted": accepted / (job.cycles * len(miners)),
    }


def _constant(seed: bytes, commits: Mapping[bytes, Commit]) -> bytes:
    del commits
    return seed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "privacy.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    print("| noise | epsilon of a task | of the run | test accuracy | test loss | accepted |")
    print("|---|---|---|---|---|---|")
    for name, job in JOBS.items():
        if name not in found:
            found[name] = run(job, folder)
            path.write_text(json.dumps(found, indent=1) + "\n")
        row = found[name]
        epsilons = ["" if each is None else f"{each:.2f}" for each in (row["task"], row["epsilon"])]
        print(
            f"| {name} | {' | '.join(epsilons)} | {row['accuracy']:.4f} | {row['loss']:.4f} | {row['accepted']:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
