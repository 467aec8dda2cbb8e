"""Plain PyTorch on a job's model and data, without anything of ours in the loop: what jobs are measured against.

    tests/bench/plain.py JOB.toml FOLDER --steps N --batch-size N

trains one process on one thread, or on the job's GPU, on all shards together, and prints JSON; `--save FILE` keeps the
model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation import evaluate
from traincert.trainer.examples import read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.state import initial_state, set_state, state_bytes, state_of
from traincert.trainer.usercode import Functions


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    job = TrainingJob.load(arguments.job)
    dataset = prepare_dataset(job, arguments.folder / "data")
    shards = [read_examples(job, dataset.shard_folder, shard) for shard in dataset.shards]
    inputs = [torch.cat(columns) for columns in zip(*(shard.inputs for shard in shards), strict=True)]
    target = torch.cat([shard.target for shard in shards])

    model = build_model(job)
    set_state(model, initial_state(job))
    model.to(job.device).train()
    functions = Functions(job)
    optimizer = getattr(torch.optim, job.optimizer)(model.parameters(), lr=job.learning_rate, **job.optimizer_options)
    torch.manual_seed(job.seed)
    left = torch.empty(0, dtype=torch.int64)
    start = time.perf_counter()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:  # the job's schedule
            group["lr"] = job.learning_rate_at(step * job.cycles // arguments.steps)
        if len(left) < arguments.batch_size:
            left = torch.randperm(len(target))
        batch, left = left[: arguments.batch_size], left[arguments.batch_size :]
        optimizer.zero_grad()
        outputs = model(*(column[batch].to(job.device) for column in inputs))
        functions.mean_loss(outputs, target[batch].to(job.device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if job.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if arguments.save:
        arguments.save.write_bytes(state_bytes(state_of(model)))
    tested = evaluate(model, job, state_of(model), read_examples(job, dataset.held_out_folder, dataset.test))
    print(
        json.dumps(
            {
                "samples_per_second": arguments.steps * arguments.batch_size / seconds,
                "test_loss": tested.loss / 1e9,
                "test_metric": tested.metric,
            }
        )
    )


if __name__ == "__main__":
    main()
