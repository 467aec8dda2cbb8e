"""What other kinds of processors would compute, as far as this one can pretend to be them.

    tests/bench/processors.py [JOB ...]

does a task of each job (by default of all that come with traincert), a compression and an aggregation under several
limits on the instructions that PyTorch, oneDNN and MKL may use, and prints what is different from no limit, and how
much slower training is.

    tests/bench/processors.py --emulate Haswell --emulate EPYC --limit "portable, AVX2" --steps 2 --batch 4 [JOB ...]

does the same on processors that `qemu-x86_64 -cpu help` lists, too (Debian's package qemu-user), and compares them with
this processor under the same limit. It is slow. Of QEMU 7.2 two things must be known: it has no AVX-512, and its
approximate instructions (rsqrtps, rcpps) give the exact result rounded, which no real processor does.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    "MKL: compatible": {"MKL_CBWR": "COMPATIBLE"},
    "portable, AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"},
    "portable, no vectors": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}
HERE = "this one"


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


def train(job: TrainingJob, folder: Path) -> tuple[torch.Tensor, float]:
    """Do a task from the first child's initial model, and return its move and how many seconds it took."""
    dataset = prepare_dataset(job, folder)
    shard = read_examples(job, dataset.shard_folder, dataset.shards[0])
    (segment,) = cut_segments(build_model(job), replace(job, segments=1))
    task = Task(bytes(32), 0, 0, bytes(32), job.cycles // 2)
    start = folder / "start"
    if not start.exists():
        start.write_bytes(state_bytes(initial_state(job)))
    begin = state_from_bytes(start.read_bytes())
    importlib.import_module("torch._dynamo")  # slow; otherwise the first optimizer would import it during its task
    began = time.perf_counter()
    update = train_task(replace(job, density=1.0), begin, segment, shard, task, {}).update
    seconds = time.perf_counter() - began
    return state_from_bytes(update)["move"], seconds


def child(arguments: argparse.Namespace) -> None:
    """Do all jobs' tasks, and print what came of them as JSON."""
    found = {}
    for name in arguments.jobs:
        job = replace(TrainingJob.named(name), local_steps=arguments.steps)
        if arguments.batch:
            job = replace(job, batch_size=arguments.batch)
        move, seconds = train(job, arguments.child / name)
        saved = arguments.child / f"{name}.{os.getpid()}"
        torch.save(move, saved)
        found[name] = {
            "exact": exact(job),
            "initial": state_hash(initial_state(job)).hex(),
            "move": str(saved),
            "seconds": seconds,
        }
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", default=["digits", "fashion", "text"])
    parser.add_argument("--child", type=Path, help="do it, in this folder, and print JSON")
    parser.add_argument("--emulate", action="append", default=[], help="also do it on this processor, by qemu-x86_64")
    parser.add_argument("--limit", action="append", choices=LIMITS, help="only this one and 'none'; by default all")
    parser.add_argument("--steps", type=int, default=20, help="steps of a task")
    parser.add_argument("--batch", type=int, help="examples of a step; by default the job's")
    parser.add_argument("--turns", type=int, default=1, help="do all so many times, for the median of their speeds")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    limits = {each: LIMITS[each] for each in LIMITS if not arguments.limit or each in ("none", *arguments.limit)}
    options = ["--steps", str(arguments.steps), *(["--batch", str(arguments.batch)] if arguments.batch else [])]
    emulated = arguments.limit or limits
    kinds = [(limit, each) for limit in limits for each in (HERE, *(arguments.emulate if limit in emulated else []))]
    with tempfile.TemporaryDirectory(prefix="traincert-processors-") as folder:
        command = [sys.executable, __file__, "--child", folder, *options, *arguments.jobs]
        turns: list[dict[tuple[str, str], Any]] = []
        for _ in range(arguments.turns):
            turns.append({})
            for limit, processor in kinds:
                emulator = [] if processor == HERE else ["qemu-x86_64", "-cpu", processor]
                output = subprocess.check_output([*emulator, *command], env=os.environ | limits[limit], text=True)
                turns[-1][limit, processor] = json.loads(output)
        table = Table(box=None)
        for column in (
            "job",
            "limit",
            "processor",
            "aggregation, compression",
            "initial model",
            "training",
            "greatest difference / norm",
            "seconds / without limit",
        ):
            table.add_column(column)
        for name in arguments.jobs:
            for limit, processor in kinds:
                found = turns[0][limit, processor][name]
                # Another processor is compared with this one under the same limit.
                first = turns[0]["none" if processor == HERE else limit, HERE][name]
                move, reference = torch.load(found["move"]), torch.load(first["move"])
                difference = float((move - reference).norm() / reference.norm())
                slower = [
                    turn[limit, processor][name]["seconds"] / turn["none", HERE][name]["seconds"] for turn in turns
                ]
                table.add_row(
                    name,
                    limit,
                    processor,
                    "same" if found["exact"] == first["exact"] else "DIFFERENT",
                    "same" if found["initial"] == first["initial"] else "different",
                    "same" if torch.equal(move, reference) else "different",
                    f"{difference:.1e}" if difference else "0",
                    f"{statistics.median(slower):.2f}" if processor == HERE else "",
                )
        Console(width=160).print(table)


if __name__ == "__main__":
    main()
