"""Models, datasets, losses and metrics from a module beside the job's file: whatever PyTorch can train."""

import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.errors import JobError, Reason
from traincert.trainer.examples import read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.records import RunFolder
from traincert.trainer.report import write_report
from traincert.trainer.state import set_state, state_hash
from users_models import MODELS, MODULE, run

WriteJob = Callable[..., Path]
MakeTrainer = Callable[..., AbstractContextManager[Trainer]]


@pytest.mark.parametrize("segments", [1, 2, 3])
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

    if name == "Flags":
        assert after["seen"].any()
        assert not torch.equal(after["mean"], start.model["mean"])
        assert not torch.equal(after["phase"], start.model["phase"])
        assert torch.equal(after["constant"], start.model["constant"])

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


def test_a_segment_that_the_loss_does_not_depend_on_stays_as_it_is(
    write_job: WriteJob, make_trainer: MakeTrainer, miners: list[bytes], tmp_path: Path
) -> None:
    path = write_job(MODULE, model='"{module}:Unused"', model_options=None, segments="3", cycles="3")
    with make_trainer(TrainingJob.load(path), tmp_path / "one") as trainer:
        start = trainer.start()
        results = run(trainer, miners, 3)
    assert {refusal.reason for result in results for refusal in result.refusals} == {Reason.NO_IMPROVEMENT}
    assert results[-1].loss_after < 0.95 * start.evaluation.loss
    after = results[-1].after.model
    assert torch.equal(after["other.weight"], start.model["other.weight"])
    assert not torch.equal(after["layer.weight"], start.model["layer.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "batch_norm",
        "Tied",
        "Frozen",
        "Brief",
        "Attention",
        "Unused",
        "Scalar",
        "Sparse",
        "Checkpointed",
        "weight_norm",
        "spectral_norm",
        "orthogonal",
    ],
)
def test_a_users_model_is_cut_by_operations(
    write_job: WriteJob, make_trainer: MakeTrainer, miners: list[bytes], tmp_path: Path, name: str
) -> None:
    path = write_job(
        MODULE, model=f'"{{module}}:{name}"', model_options=None, segments="2", balance='"flops"', cycles="2"
    )
    with make_trainer(TrainingJob.load(path), tmp_path / "one") as trainer:
        assert {segment.start for segment in trainer.segments} <= set(trainer.layout.bounds)
        results = run(trainer, miners, 2)
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


SEVERAL = """
    import numpy as np
    from torch import nn
    from torch.nn.functional import cross_entropy, mse_loss
    from traincert.trainer import RawDataset

    def dataset():
        def train():
            x = np.random.normal(size=(400, 4)).astype(np.float32)
            yield {"x": x, "sign": (x.sum(1) > 0).astype(np.int64), "sum": x.sum(1), "first": x[:, 0]}
        return RawDataset(train)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.classes, self.numbers = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return {"logits": self.classes(x), "numbers": self.numbers(x).unbind(1)}

    def loss(outputs, target):
        sign, total, first = target
        found, other = outputs["numbers"]
        return cross_entropy(outputs["logits"], sign) + mse_loss(found, total) + mse_loss(other, first)

    def accuracy(outputs, target):
        return (outputs["logits"].argmax(1) == target[0]).double().mean()

    def error_of_sum(outputs, target):
        return (outputs["numbers"][0] - target[1]).abs().max()  # not a mean of batches

    def none(outputs, target):
        return float("nan")
"""


def test_outputs_targets_and_metrics_may_be_several(
    write_job: WriteJob, make_trainer: MakeTrainer, miners: list[bytes], tmp_path: Path
) -> None:
    path = write_job(
        SEVERAL,
        dataset='"{module}:dataset"',
        inputs='["x"]',
        target='["sign", "sum", "first"]',
        normalize="{}",
        validation_examples="100",
        test_examples="100",
        model='"{module}:Model"',
        model_options=None,
        segments="2",
        loss='"{module}:loss"',
        metric='"{module}:accuracy"',
        more_metrics='["{module}:error_of_sum", "{module}:none"]',
        local_steps="50",
    )
    job = TrainingJob.load(path)
    with RunFolder(tmp_path / "run", job) as folder, make_trainer(job, tmp_path / "run") as trainer:
        folder.begin(trainer.start(), trainer.dataset)
        before = folder.load().evaluation
        folder.save(folder.next_record(trainer.run_cycle(folder.load(), miners, seed=b"")))
        after = folder.load().evaluation
        validation, state = trainer.validation, folder.load().model
        report = write_report(tmp_path / "report", job, folder.records, trainer.test(state))
    assert after.loss < before.loss
    model = build_model(job)
    set_state(model, state)
    with torch.no_grad():
        outputs = model(*validation.inputs)
    assert after.metric == pytest.approx(float((outputs["logits"].argmax(1) == validation.target[0]).double().mean()))
    error, nothing = after.more
    assert error == pytest.approx(float((outputs["numbers"][0] - validation.target[1]).abs().max()), rel=1e-5)
    assert math.isnan(nothing)
    found = json.loads((report.parent / "report.json").read_text())["more_metrics"]
    assert found["error_of_sum"]["validation"] == error
    assert found["none"] == {"validation": None, "test": None}


def test_a_module_beside_the_job_hides_nobodys(write_job: WriteJob, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise AssertionError")
    TrainingJob.load(write_job())
    assert sys.path[-1] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1
    TrainingJob.load(write_job())
    assert sys.path.count(str(tmp_path)) == 1


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nn.ParameterList([of(torch.complex64), of(torch.float32)])", "0 is torch.complex64 and requires gradients"),
        ("nn.ParameterList([of(torch.float32), nn.Parameter(of(torch.complex128), False)])", "1 is torch.complex128:"),
        ("nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))", "0.weight has no shape yet: it is of a lazy module"),
        ("nn.ParameterList([of(torch.float32).to_sparse(), of(torch.float32)])", "0 is torch.sparse_coo: it must be"),
    ],
)
def test_a_tensor_that_cannot_be_trained_or_stored_is_named(write_job: WriteJob, model: str, said: str) -> None:
    module = f"""
        import torch
        from torch import nn

        def of(dtype):
            return torch.zeros(3, dtype=dtype)

        def model():
            return {model}
    """
    job = TrainingJob.load(write_job(module, model='"{module}:model"', model_options=None))
    with pytest.raises(JobError, match=re.escape(said)):
        build_model(job)


RANDOM = """
    import random
    import numpy as np
    from traincert.trainer import RawDataset

    def dataset():
        def train():
            x = np.random.normal(size=(400, 2)).astype(np.float32)  # without a seed: other numbers in each pass
            yield {"inputs": x, "labels": (x.sum(1) > random.random() - 0.5).astype(np.int64)}
        return RawDataset(train)
"""


def test_a_dataset_that_draws_its_numbers_gives_the_same_ones_in_each_pass(write_job: WriteJob, tmp_path: Path) -> None:
    job = TrainingJob.load(
        write_job(
            RANDOM,
            dataset='"{module}:dataset"',
            model_options="{ inputs = 2, hidden = [4], classes = 2 }",
            validation_examples="100",
            test_examples="100",
        )
    )
    state = np.random.get_state(legacy=False)["state"]["key"]
    first, again = (prepare_dataset(job, tmp_path / name) for name in ("first", "again"))
    assert first.root == again.root
    assert np.array_equal(state, np.random.get_state(legacy=False)["state"]["key"])
    means = read_examples(job, first.shard_folder, first.shards[0]).inputs[0].mean(0)
    assert abs(means).max() < 0.5  # normalized by the mean of the same numbers


MISTAKES = """
    import sys
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy
    from traincert.trainer import RawDataset
    from traincert.trainer.datasets import digits

    class Tuple(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Dict(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x)}

    class Missing(nn.Linear):
        def forward(self, x):
            return self.absent(x)

    class Backward(nn.Linear):
        def forward(self, x):
            return super().forward(x).exp().add_(1)  # exp needs its result, which add_ has changed

    class Whole(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean()

    def model(name, dtype="float32"):
        module = (globals().get(name) or getattr(nn, name))(64, 10)
        return module.to("meta") if dtype == "meta" else module.to(getattr(torch, dtype))

    def each(outputs, target):
        return cross_entropy(outputs, target, reduction="none")

    def nothing(outputs, target):
        cross_entropy(outputs, target)

    def sum_of(outputs, target):
        return outputs.sum()

    class Nothing(nn.Linear):
        def forward(self, x):
            super().forward(x)

    class Named(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x), "name": "linear", "cache": None}

    class Ends(nn.Linear):
        def forward(self, x):
            sys.exit(0)

    def logits(outputs, target):
        return cross_entropy(outputs["logits"], target)

    def constant(outputs, target):
        return (outputs.argmax(1) != target).float().mean()

    def negative(outputs, target):
        return outputs.sum(), -1.0

    def infinite(outputs, target):
        return outputs.sum() * float("inf")

    def rows(outputs, target):
        return outputs.sum(1)

    def dataset():
        def train():
            yield from digits().train()
            raise KeyError("next page")
        return RawDataset(train)

    def absent():
        return RawDataset(lambda: open("/absent.csv"))

    def whole():
        return RawDataset(lambda: next(digits().train()))

    def pair():
        return RawDataset(lambda: [tuple(next(digits().train()).values())])

    def scalar():
        return RawDataset(lambda: [next(digits().train()) | {"labels": 3}])
"""


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "Tuple"}, r"^loss = '.*cross_entropy': AttributeError: 'tuple' .*; it got the outputs \(float32 \("),
        ({"model": "Dict"}, r"^loss = .* 'dict' .*; it got the outputs {'logits': float32 \(\d+, 10\)} and the target"),
        (
            {"model": "Missing"},
            r"^model = .*AttributeError: .* 'absent'; .*\.py, line \d+, in forward; its inputs were ",
        ),
        (
            {"model": "Linear", "dtype": "float64"},
            r"^model = .*RuntimeError: .*; its inputs were \(float32 \(\d+, 64\),",
        ),
        ({"model": "Backward"}, r"^model = .*inplace operation.*; in the backward pass$"),
        ({"model": "Whole", "loss": "sum_of"}, r"^model = .*; its outputs float32 \(\) have no row for each example$"),
        (
            {"model": "Linear", "loss": "CrossEntropyLoss"},
            r"^loss = 'torch.nn:CrossEntropyLoss': is a class; must be a",
        ),
        ({"model": "Linear", "loss": "each"}, r"^loss = .*: returned float32 \(\d+,\); must return the batch's mean"),
        ({"model": "Linear", "loss": "nothing"}, r"^loss = .*: returned None; must return the batch's mean loss"),
        ({"model": "Nothing"}, r"^model = '\w+:model': returned None$"),
        (
            {"model": "Named", "loss": "logits"},
            r"^model = .*: its outputs have a str; must be a tensor, or a tuple, list",
        ),
        ({"model": "Ends"}, r"^model = .*: SystemExit: 0; .*\.py, line \d+, in forward; its inputs were"),
        (
            {"model": "Linear", "loss": "constant"},
            r"^loss = .*: has no gradient: it does not depend on the model's par",
        ),
        ({"model": "Linear", "loss": "negative"}, r"^loss = .*: returned the weight -1; must not be below 0$"),
        (
            {"model": "Linear", "loss": "infinite"},
            r"^loss = .*: the initial model's loss is no number \(NaN\), or is inf",
        ),
        ({"model": "Linear", "metric": "rows"}, r"^metric = .*: returned float32 \(\d+,\); must return one number$"),
        ({"model": "Linear", "dtype": "meta"}, r"^model = .*: weight is on the device 'meta': it has no values$"),
        (
            {"model": "Linear", "dataset": "absent"},
            r"^dataset = .*: FileNotFoundError: .*absent.csv.*, line \d+, in <lam",
        ),
        (
            {"model": "Linear", "dataset": "whole"},
            r"^dataset = .*: gave a str as a chunk; each chunk must be a dict of",
        ),
        ({"model": "Linear", "dataset": "pair"}, r"^dataset = .*: gave a tuple as a chunk; each chunk must be a dict"),
        (
            {"model": "Linear", "dataset": "scalar"},
            r"^dataset = .* a column 'labels' of int, not a numpy array or a ten",
        ),
        ({"model": "Linear", "dataset": "dataset"}, r"^dataset = .*: KeyError: 'next page'; .*, line \d+, in train$"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(
    write_job: WriteJob,
    make_trainer: MakeTrainer,
    miners: list[bytes],
    tmp_path: Path,
    changed: dict[str, str],
    said: str,
) -> None:
    name, dtype, loss = changed["model"], changed.get("dtype", "float32"), changed.get("loss")
    module = "torch.nn" if loss == "CrossEntropyLoss" else "{module}"
    path = write_job(
        MISTAKES,
        model='"{module}:model"',
        model_options=f'{{ name = "{name}", dtype = "{dtype}" }}',
        loss=f'"{module}:{loss}"' if loss else None,
        dataset=f'"{{module}}:{changed["dataset"]}"' if "dataset" in changed else '"traincert.trainer.datasets:digits"',
        metric=f'"{{module}}:{changed["metric"]}"' if "metric" in changed else None,
    )
    with pytest.raises(JobError) as raised, make_trainer(TrainingJob.load(path), tmp_path) as trainer:
        run(trainer, miners, 1)
    assert re.search(said, str(raised.value)), raised.value
    assert "\n" not in str(raised.value)
