"""What other kinds of processors would compute, as far as this one can pretend to be them.

    tests/bench/processors.py [JOB ...]

does a task of each job (by default of all that come with traincert), a compression and an aggregation under several
limits on the instructions that PyTorch, oneDNN and MKL may use, and prints what is different from no limit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from traincert.trainer.aggregation import Accepted, aggregate
from traincert.trainer.examples import read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.scoring import Contribution
from traincert.trainer.segments import Layout, cut_segments
from traincert.trainer.state import initial_state, state_bytes, state_from_bytes, state_hash
from traincert.trainer.tasks import Task
from traincert.trainer.training import train_task
from traincert.trainer.updates import Update, encode_update

LIMITS: dict[str, dict[str, str]] = {
    "none": {},
    "PyTorch's kernels: AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "PyTorch's kernels: no vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "oneDNN: AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "oneDNN: SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "MKL: AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "all of them at their least": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


def exact(job: TrainingJob) -> str:
    """Return a hash of what must be the same on all processors: compression and aggregation of given numbers."""
    layout = Layout(build_model(job))
    state = initial_state(job)
    (segment,) = cut_segments(build_model(job), replace(job, segments=1))
    generator = torch.Generator().manual_seed(1)
    total = hashlib.sha256()
    accepted = []
    for number in range(3):
        # Integers, scaled by division: torch's own normal numbers are not the same everywhere.
        integers = torch.randint(-(2**20), 2**20, (layout.params,), generator=generator)
        move = integers.float() / 3e7
        data, sent = encode_update(Update(move), 0.05)
        total.update(data)
        contribution = Contribution(bytes([number]) * 32, b"", layout.params, 1, 7 + number)
        accepted += [Accepted(contribution, segment, Update(move)), Accepted(contribution, segment, Update(sent))]
    velocity = torch.zeros(layout.params)
    momentum = replace(job, outer_learning_rate=0.7, outer_momentum=0.6)
    start = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for _ in range(2):
        start, velocity, _ = aggregate(momentum, layout, start, velocity, accepted)  # type: ignore[assignment]
    total.update(state_hash({**start, "velocity": velocity}))
    return total.hexdigest()


def train(job: TrainingJob, folder: Path) -> torch.Tensor:
    """Do a task from the first child's initial model, and return its move."""
    dataset = prepare_dataset(job, folder)
    shard = read_examples(job, dataset.shard_folder, dataset.shards[0])
    (segment,) = cut_segments(build_model(job), replace(job, segments=1))
    task = Task(bytes(32), 0, 0, bytes(32), job.cycles // 2)
    start = folder / "start"
    if not start.exists():
        start.write_bytes(state_bytes(initial_state(job)))
    begin = state_from_bytes(start.read_bytes())
    return state_from_bytes(train_task(job, begin, segment, shard, task, {}).update)["move"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", default=["digits", "fashion", "text"])
    parser.add_argument("--child", type=Path, help="do it, in this folder, and print JSON")
    arguments = parser.parse_args()
    if arguments.child:
        found = {}
        for name in arguments.jobs:
            job = replace(TrainingJob.named(name), local_steps=20)
            move = train(job, arguments.child / name)
            saved = arguments.child / f"{name}.{os.getpid()}"
            torch.save(move, saved)
            initial = state_hash(initial_state(job)).hex()
            found[name] = {
                "exact": exact(job),
                "initial": initial,
                "move": str(arguments.child / f"{name}.{os.getpid()}"),
            }
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(prefix="traincert-processors-") as folder:
        results = {}
        for limit, settings in LIMITS.items():
            command = [sys.executable, __file__, "--child", folder, *arguments.jobs]
            output = subprocess.check_output(command, env=os.environ | settings, text=True)
            results[limit] = json.loads(output)
        table = Table(box=None)
        for column in (
            "job",
            "limit",
            "aggregation, compression",
            "initial model",
            "training",
            "greatest difference / norm",
        ):
            table.add_column(column)
        for name in arguments.jobs:
            first = results["none"][name]
            reference = torch.load(first["move"])
            for limit, found in results.items():
                move = torch.load(found[name]["move"])
                difference = float((move - reference).norm() / reference.norm())
                table.add_row(
                    name,
                    limit,
                    "same" if found[name]["exact"] == first["exact"] else "DIFFERENT",
                    "same" if found[name]["initial"] == first["initial"] else "different",
                    "same" if torch.equal(move, reference) else "different",
                    f"{difference:.1e}" if difference else "0",
                )
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
