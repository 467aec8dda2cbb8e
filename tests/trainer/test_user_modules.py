"""Models, datasets, losses and metrics from a module beside the job's file: whatever PyTorch can train."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from traincert.trainer.cycle import CycleResult, Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.state import set_state, state_hash

WriteJob = Callable[..., Path]
MakeTrainer = Callable[..., AbstractContextManager[Trainer]]

MODULE = """
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, relu

    def plain():
        return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def batch_norm():
        return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    def convolutions():
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(36, 10),
        )

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 16, bias=False)
            self.middle = nn.Linear(16, 16)
            self.last = nn.Linear(64, 16, bias=False)
            self.last.weight = self.first.weight
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(relu(self.middle(self.first(x))) @ self.last.weight + x)

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 16)
            self.middle = nn.Linear(16, 16).requires_grad_(False)
            self.last = nn.Linear(16, 10)
            self.last.bias.requires_grad_(False)

        def forward(self, x):
            return self.last(relu(self.middle(relu(self.first(x)))))

    class Brief(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = plain().bfloat16()

        def forward(self, x):
            return self.layers(x.bfloat16()).float()

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 16).double()
            self.last = nn.Linear(16, 10)

        def forward(self, x):
            return self.last(relu(self.first(x.double())).float())

    def dropout():
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))

    class Counting(nn.Module):
        # buffers: of integers, of floats, of bools, none kept, and one that is a scalar
        def __init__(self):
            super().__init__()
            self.layers = plain()
            self.register_buffer("seen", torch.zeros(10, dtype=torch.int64))
            self.register_buffer("steps", torch.tensor(0, dtype=torch.int32))
            self.register_buffer("mean", torch.zeros(64))
            self.register_buffer("mask", torch.ones(64, dtype=torch.bool))
            self.register_buffer("cache", torch.zeros(3), persistent=False)

        def forward(self, x):
            outputs = self.layers(x * self.mask)
            if self.training:
                with torch.no_grad():
                    self.seen += torch.bincount(outputs.argmax(1), minlength=10)
                    self.steps += 1
                    self.mean += 0.1 * (x.mean(0) - self.mean)
                    self.cache += 1
            return outputs

    class Scalar(nn.Module):
        # parameters of no dimension, of one element, not contiguous, and one that nothing uses
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.layer = nn.Linear(64, 10)
            self.layer.weight = nn.Parameter(torch.randn(64, 10).mul(0.1).t())
            self.unused = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return self.layer(x) * self.scale

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(8, 16)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.layer(self.embed(x.view(-1, 8, 8))).mean(1))

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.GRU(8, 16, batch_first=True)
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.cells(x.view(-1, 8, 8))[0][:, -1])
"""

MODELS = [
    "plain",
    "batch_norm",
    "convolutions",
    "Tied",
    "Frozen",
    "Brief",
    "Mixed",
    "dropout",
    "Counting",
    "Scalar",
    "Attention",
    "Recurrent",
]


def run(trainer: Trainer, miners: list[bytes], cycles: int) -> list[CycleResult]:
    results: list[CycleResult] = []
    state = trainer.start()
    for number in range(cycles):
        results.append(trainer.run_cycle(state, miners, seed=bytes([number])))
        state = results[-1].after
    return results


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_users_model_is_trained(
    write_job: WriteJob, make_trainer: MakeTrainer, miners: list[bytes], tmp_path: Path, name: str, segments: int
) -> None:
    path = write_job(
        MODULE,
        model=f'"{{module}}:{name}"',
        model_options=None,
        segments=str(segments),
        cycles="3",
        outer_learning_rate="0.7",
    )
    job = TrainingJob.load(path)
    with make_trainer(job, tmp_path / "one") as trainer:
        start = trainer.start()
        results = run(trainer, miners[:2], 3)
        assert sum(segment.params for segment in trainer.segments) == trainer.layout.params
    assert all(result.contributions for result in results), [result.refusals for result in results]
    assert results[-1].loss_after < 0.95 * start.evaluation.loss
    after = results[-1].after.model
    assert {key: tensor.dtype for key, tensor in after.items()} == {k: v.dtype for k, v in start.model.items()}

    model = build_model(job)
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    for key in frozen:
        assert torch.equal(after[key], start.model[key])
    assert bool(frozen) == (name == "Frozen")
    set_state(model, after)
    if name == "Tied":
        weights = dict(model.named_parameters(remove_duplicate=False))
        assert weights["last.weight"] is weights["first.weight"]
        assert "last.weight" not in after
        assert not torch.equal(after["first.weight"], start.model["first.weight"])
    if name == "Counting":
        assert int(after["steps"]) > 0
        assert after["seen"].sum() > 0
        assert after["mask"].all()
        assert "cache" not in after

    with make_trainer(job, tmp_path / "again") as trainer:
        assert state_hash(run(trainer, miners[:2], 3)[-1].after.model) == state_hash(after)


@pytest.mark.parametrize("name", ["batch_norm", "Tied", "Frozen", "Brief", "Counting"])
def test_a_users_model_is_trained_with_compressed_updates(
    write_job: WriteJob, make_trainer: MakeTrainer, miners: list[bytes], tmp_path: Path, name: str
) -> None:
    path = write_job(MODULE, model=f'"{{module}}:{name}"', model_options=None, segments="2", density="0.2", cycles="4")
    job = TrainingJob.load(path)
    with make_trainer(job, tmp_path / "one") as trainer:
        results = run(trainer, miners[:2], 4)
        assert results[-1].loss_after < results[0].loss_before
        assert any(result.contributions for result in results)


@pytest.mark.parametrize("name", ["batch_norm", "Tied", "Frozen", "Brief", "Attention"])
def test_a_users_model_is_cut_by_operations(
    write_job: WriteJob, make_trainer: MakeTrainer, miners: list[bytes], tmp_path: Path, name: str
) -> None:
    path = write_job(
        MODULE, model=f'"{{module}}:{name}"', model_options=None, segments="2", balance='"flops"', cycles="2"
    )
    with make_trainer(TrainingJob.load(path), tmp_path / "one") as trainer:
        assert {segment.start for segment in trainer.segments} <= set(trainer.layout.bounds)
        results = run(trainer, miners[:2], 2)
    assert results[-1].loss_after < results[0].loss_before


ALL = """
    import numpy as np
    import torch
    from traincert.trainer.datasets import RawDataset

    def dataset(count):
        # y = 2a - b, from two inputs, one of them of integers
        def train():
            generator = np.random.RandomState(0)
            a = generator.normal(size=(count, 3)).astype(np.float32)
            b = generator.randint(0, 5, (count, 1)).astype(np.int16)
            yield {"a": a, "b": b, "y": 2 * a[:, :1] - b.astype(np.float32)}
        return RawDataset(train)

    class Model(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layer = torch.nn.Linear(4, width)
            self.head = torch.nn.Linear(width, 1)

        def forward(self, a, b):
            return self.head(torch.tanh(self.layer(torch.cat([a, b.to(a.dtype)], 1))))

    def loss(outputs, target):
        return torch.nn.functional.mse_loss(outputs, target.to(outputs.dtype))

    def metric(outputs, target):
        return ((outputs - target).abs() < 0.5).double().mean()
"""


def test_everything_may_be_the_users_own_and_workers_find_it(
    write_job: WriteJob, miners: list[bytes], tmp_path: Path
) -> None:
    """Dataset, model of two inputs, loss and metric; in worker processes, which import the module themselves."""
    path = write_job(
        ALL,
        dataset='"{module}:dataset"',
        dataset_options="{ count = 500 }",
        inputs='["a", "b"]',
        target='"y"',
        normalize='{ a = "each" }',
        validation_examples="100",
        test_examples="50",
        model='"{module}:Model"',
        model_options="{ width = 8 }",
        loss='"{module}:loss"',
        metric='"{module}:metric"',
        optimizer='"Adam"',
        optimizer_options="{}",
        learning_rate="0.02",
        local_steps="50",
        max_update_norm="100.0",
        cycles="4",
    )
    job = TrainingJob.load(path)
    dataset = prepare_dataset(job, tmp_path / "data")
    with LocalEngine(job, tmp_path / "store", workers=2) as engine, Trainer(dataset, engine) as trainer:
        results = run(trainer, miners[:2], 4)
        assert results[-1].loss_after < results[0].loss_before / 3
        assert results[-1].metric > trainer.start().evaluation.metric
        assert trainer.test(results[-1].after.model).loss < results[0].loss_before / 3


def test_a_module_beside_the_job_hides_nobodys(write_job: WriteJob, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise AssertionError")
    TrainingJob.load(write_job())
    assert sys.path[-1] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1
    TrainingJob.load(write_job())
    assert sys.path.count(str(tmp_path)) == 1
