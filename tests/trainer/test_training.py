"""Training: what a task changes, and that it is plain SGD with the same bits each time."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from traincert.trainer.datasets import Dataset, Examples, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.scoring import add
from traincert.trainer.segments import cut_segments
from traincert.trainer.state import initial_state, state_from_bytes, state_hash
from traincert.trainer.tasks import Task
from traincert.trainer.training import deterministic, train_task

TASK = Task(miner=bytes(32), segment=0, shard=0, seed=bytes(range(32)))


@pytest.fixture
def shard(dataset: Dataset) -> Examples:
    return read_examples(dataset.directory, dataset.shards[0])


@pytest.mark.parametrize(("segments", "segment"), [(1, 0), (2, 0), (2, 1)])
def test_a_task_is_plain_training_of_its_segment(
    job: TrainingJob, shard: Examples, segments: int, segment: int
) -> None:
    """Epoch by epoch the same model as a plain loop over torch.optim.SGD; with one segment, that of the whole model."""
    plain = replace(job, segments=segments)
    task = replace(TASK, segment=segment)
    state = initial_state(plain)
    model = build_model(plain)
    trained = [dict(model.named_parameters())[name] for name in cut_segments(model, segments)[segment]]
    optimizer = torch.optim.SGD(trained, lr=plain.learning_rate, momentum=plain.momentum)
    generator = torch.Generator().manual_seed(int.from_bytes(TASK.seed[:8], "little"))
    for epochs in range(1, 5):
        order = torch.randperm(len(shard.labels), generator=generator)
        for start in range(0, len(order), plain.batch_size):
            batch = order[start : start + plain.batch_size]
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(model(shard.inputs[batch]), shard.labels[batch]).backward()
            optimizer.step()
        found = add(state, state_from_bytes(train_task(replace(plain, local_epochs=epochs), state, shard, task)))
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("segment", [0, 1])
def test_only_the_segment_is_in_the_update(job: TrainingJob, shard: Examples, segment: int) -> None:
    state = initial_state(job)
    before = state_hash(state)
    update = state_from_bytes(train_task(job, state, shard, replace(TASK, segment=segment)))
    assert set(update) == set(cut_segments(build_model(job), job.segments)[segment])
    assert all(tensor.count_nonzero() for tensor in update.values())
    assert state_hash(state) == before


def test_the_task_seed_decides_the_bits(job: TrainingJob, shard: Examples) -> None:
    state = initial_state(job)
    update = train_task(job, state, shard, TASK)
    torch.manual_seed(5)
    assert train_task(job, state, shard, TASK) == update
    assert train_task(job, state, shard, replace(TASK, seed=bytes(32))) != update


def test_training_does_not_import_the_compiler() -> None:
    """It would double the CPU time in which a worker starts."""
    program = (
        "import sys, torch; from traincert.trainer.engines import local;"
        "from traincert.trainer.datasets import Examples; from traincert.trainer.job import TrainingJob;"
        "from traincert.trainer.state import initial_state; from traincert.trainer.tasks import Task;"
        "job = TrainingJob.named('digits');"
        "shard = Examples(torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64));"
        "local.train_task(job, initial_state(job), shard, Task(bytes(32), 0, 0, bytes(32)));"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_switches_are_set_inside_and_restored_after() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with deterministic():
            assert torch.get_num_threads() == 1
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)
