"""Scores: losses in fixed point, and weights."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation import evaluate
from traincert.trainer.cycle import Trainer
from traincert.trainer.errors import JobError, Reason
from traincert.trainer.examples import Dataset, Examples, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.scoring import MAX_NANO_NATS, Losses, Scorer, nano_nats, score
from traincert.trainer.state import initial_state, state_hash, state_of
from traincert.trainer.weights import paid

WriteJob = Callable[..., Path]
MakeTrainer = Callable[..., AbstractContextManager[Trainer]]


@pytest.fixture(scope="module")
def validation(dataset: Dataset) -> Examples:
    return read_examples(dataset.job, dataset.held_out_folder, dataset.validation)


def test_losses_are_summed_not_averaged_over_batches(job: TrainingJob, dataset: Dataset) -> None:
    examples = read_examples(job, dataset.shard_folder, dataset.shards[0])
    model, state = build_model(job), initial_state(job)
    one, thousand = (evaluate(model, job, state, examples, batch_size=size) for size in (1, 1000))
    assert abs(one.loss - thousand.loss) <= 1000  # nano-nats: the losses of a batch are added in float32
    uneven = evaluate(model, job, state, examples, batch_size=len(examples) - 1)  # a last batch of one
    assert abs(uneven.loss - one.loss) <= 1000
    assert one.metric == pytest.approx(thousand.metric)
    assert uneven.metric == pytest.approx(thousand.metric)


def test_evaluation_is_cross_entropy_and_changes_nothing(job: TrainingJob, validation: Examples) -> None:
    model, state = build_model(job), initial_state(job)
    before = state_hash(state)
    found = evaluate(model, job, state, validation)
    with torch.no_grad():
        logits = model(*validation.inputs)
    assert found.loss == pytest.approx(float(torch.nn.CrossEntropyLoss()(logits, validation.target)) * 1e9, rel=1e-6)
    assert found.metric == pytest.approx(float((logits.argmax(1) == validation.target).double().mean()))
    assert state_hash(state) == state_hash(state_of(model)) == before


@pytest.mark.parametrize("kind", ["BatchNorm1d(64)", "Dropout(0.5)"])
def test_a_model_is_measured_in_evaluation_mode(write_job: WriteJob, validation: Examples, kind: str) -> None:
    """So that neither the batch size nor chance matters, and no buffer changes."""
    module = f"""
        from torch import nn

        def model():
            return nn.Sequential(nn.{kind}, nn.Linear(64, 10))
    """
    job = TrainingJob.load(write_job(module, model='"{module}:model"', model_options=None))
    model, state = build_model(job).train(), initial_state(job)
    first, second = (evaluate(model, job, state, validation, batch_size=size) for size in (7, 300))
    assert abs(first.loss - second.loss) <= 1000
    assert state_hash(state_of(model)) == state_hash(state)


def test_threads_do_not_matter(job: TrainingJob, validation: Examples) -> None:
    states = [initial_state(replace(job, seed=seed)) for seed in range(5)]
    expected = [evaluate(build_model(job), job, state, validation) for state in states]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            with Scorer(job) as scorer:
                assert [scorer.evaluate(state, validation) for state in states] == expected
                losses = scorer.losses(states, validation)
                assert [nano_nats(each.mean) for each in losses] == [each.loss for each in expected]
                assert scorer.losses(states[::-1], validation) == losses[::-1]
            assert evaluate(build_model(job), job, states[0], validation) == expected[0]
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_only_the_losses_of_what_was_evaluated_last_are_known(job: TrainingJob, validation: Examples) -> None:
    first, second = (initial_state(replace(job, seed=seed)) for seed in range(2))
    with Scorer(job) as scorer:
        assert scorer.known_losses(first, validation) == []
        for state in (first, second):
            scorer.evaluate(state, validation)
            assert scorer.known_losses(state, validation) == scorer.losses([state], validation)
        assert scorer.known_losses(first, validation) == []
        assert scorer.known_losses(second, validation.batch(slice(None))) == []


def test_an_error_in_the_users_metric_is_not_hidden(write_job: WriteJob, validation: Examples) -> None:
    job = TrainingJob.load(write_job("def metric(outputs, target): return 1 / 0", metric='"{module}:metric"'))
    with Scorer(job) as scorer, pytest.raises(JobError, match=r"^metric = .*: ZeroDivisionError"):
        scorer.evaluate(initial_state(job), validation)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (0.0, 0),
        (-4e-10, 0),
        (4e-10, 0),
        (6e-10, 1),
        (2.302585093, 2302585093),
        (1e9, 10**18),
        (1e11, MAX_NANO_NATS),
        (math.inf, MAX_NANO_NATS),
        (math.nan, MAX_NANO_NATS),
        (1e300, MAX_NANO_NATS),
    ],
)
def test_losses_are_rounded_to_nano_nats(loss: float, expected: int) -> None:
    assert nano_nats(loss) == expected


def test_a_loss_below_zero_is_an_error_that_says_what_to_do(write_job: WriteJob, validation: Examples) -> None:
    module = """
        import torch

        def loss(outputs, target):
            return torch.nn.functional.cross_entropy(outputs, target) - 5
    """
    job = TrainingJob.load(write_job(module, loss='"{module}:loss"'))
    with Scorer(job) as scorer, pytest.raises(JobError, match=r"loss_offset = 0: the loss is -2\.\d+ nats"):
        scorer.evaluate(initial_state(job), validation)
    shifted = replace(job, loss_offset=5.0)
    with Scorer(shifted) as other, Scorer(replace(job, loss="traincert.trainer.models:cross_entropy")) as plain:
        state = initial_state(job)
        assert other.evaluate(state, validation).loss == pytest.approx(plain.evaluate(state, validation).loss, rel=1e-6)


WEIGHTED = """
    import torch
    from torch import nn
    from torch.nn.functional import binary_cross_entropy, cross_entropy

    def model():
        return nn.Sequential(nn.Linear(64, 10))

    def probabilities():
        return nn.Sequential(nn.Linear(64, 10), nn.Sigmoid())

    def mask(target):
        return torch.where(target % 3 == 0, -100, target)  # some classes, so some batches have more of them

    def masked(outputs, target):
        return cross_entropy(outputs, mask(target), reduction="sum"), (mask(target) != -100).sum()

    def all_masked(outputs, target):
        return cross_entropy(outputs, target * 0 - 100, reduction="sum"), 0

    def masked_in_training(outputs, target):  # whose batches are of 32
        return all_masked(outputs, target) if len(target) == 32 else masked(outputs, target)

    def weighted(outputs, target):
        return cross_entropy(outputs, target, weight=torch.ones(10))

    def binary(outputs, target):
        return binary_cross_entropy(outputs[:, 0], (target == 0).float())

    def f1(outputs, target):
        found, true = outputs.argmax(1) == 3, target == 3
        return 2 * (found & true).sum() / (found.sum() + true.sum())
"""


def test_a_loss_that_tells_its_weight_is_the_mean_whatever_the_batches(
    write_job: WriteJob, validation: Examples
) -> None:
    job = TrainingJob.load(write_job(WEIGHTED, model='"{module}:model"', model_options=None, loss='"{module}:masked"'))
    state = initial_state(job)
    logits = validation.inputs[0] @ state["0.weight"].T + state["0.bias"]
    kept = validation.target % 3 != 0
    expected = float(torch.nn.functional.cross_entropy(logits[kept], validation.target[kept]))
    with Scorer(job) as scorer:
        assert scorer.evaluate(state, validation).loss / 1e9 == pytest.approx(expected, rel=1e-6)
    for size in (1, 7, 300):
        assert evaluate(build_model(job), job, state, validation, batch_size=size).loss / 1e9 == pytest.approx(
            expected, rel=1e-6
        )


@pytest.mark.parametrize(("model", "loss"), [("model", "weighted"), ("probabilities", "binary")])
def test_a_loss_gets_the_outputs_as_the_model_made_them(
    write_job: WriteJob, validation: Examples, model: str, loss: str
) -> None:
    path = write_job(WEIGHTED, model=f'"{{module}}:{model}"', model_options=None, loss=f'"{{module}}:{loss}"')
    job = TrainingJob.load(path)
    with Scorer(job) as scorer:
        assert 0 < scorer.losses([initial_state(job)], validation)[0].mean < 10


def test_a_metric_sees_all_examples_at_once(write_job: WriteJob, validation: Examples) -> None:
    job = TrainingJob.load(write_job(WEIGHTED, model='"{module}:model"', model_options=None, metric='"{module}:f1"'))
    state = initial_state(job)
    logits = validation.inputs[0] @ state["0.weight"].T + state["0.bias"]
    found, true = logits.argmax(1) == 3, validation.target == 3
    expected = float(2 * (found & true).sum() / (found.sum() + true.sum()))
    with Scorer(job) as scorer:
        assert scorer.evaluate(state, validation).metric == pytest.approx(expected)


def test_a_batch_that_is_all_masked_teaches_nothing(
    write_job: WriteJob, make_trainer: MakeTrainer, miners: list[bytes], tmp_path: Path
) -> None:
    options: dict[str, str | None] = {"model": '"{module}:model"', "model_options": None}
    path = write_job(WEIGHTED, **options, loss='"{module}:masked_in_training"')
    with make_trainer(TrainingJob.load(path), tmp_path / "one") as trainer:
        state = trainer.start()
        result = trainer.run_cycle(state, miners, seed=b"")
    assert {refusal.reason for refusal in result.refusals} == {Reason.NO_IMPROVEMENT}
    assert result.model_after == result.model_before
    path = write_job(WEIGHTED, **options, loss='"{module}:all_masked"')
    with (
        make_trainer(TrainingJob.load(path), tmp_path / "two") as trainer,
        pytest.raises(JobError, match=r"^loss = .*: the initial model's loss is no number \(NaN\)"),
    ):
        trainer.start()  # the mean of nothing


def test_a_model_of_no_numbers_has_the_greatest_loss(job: TrainingJob, validation: Examples) -> None:
    state = {name: torch.full_like(tensor, math.nan) for name, tensor in initial_state(job).items()}
    assert evaluate(build_model(job), job, state, validation).loss == MAX_NANO_NATS


@pytest.mark.parametrize(("params", "reduction"), [(1, 1), (3, 5), (17098, 123456789), (2**32, 2**63)])
def test_the_weight_is_the_root_of_params_times_reduction(params: int, reduction: int) -> None:
    found = paid(params, reduction, 0, noise_margin=1.0, late_share=0.5, late=False)
    assert found.loss_reduction == reduction
    assert found.weight**2 <= params * reduction < (found.weight + 1) ** 2


@pytest.mark.parametrize("after", [1.0, 1.5, 1e300, math.inf, math.nan])
def test_an_update_that_does_not_help_has_no_weight(job: TrainingJob, after: float) -> None:
    found = score(job, 100, Losses((1.0, 1.0), (1.0, 1.0)), Losses((after, after), (1.0, 1.0)), 0.5)
    assert (found.loss_reduction, found.weight) == (0, 0)
    assert found.reduction <= 0


def test_the_examples_to_score_on_are_drawn_by_the_seed(trainer: Trainer, job: TrainingJob) -> None:
    """The draw has no repetition, and other seeds draw others; with 0 it is all of them."""
    judge = trainer._judge
    some = replace(judge, dataset=replace(judge.dataset, job=replace(job, score_examples=50)))
    first, again, other = (some._score_examples(seed) for seed in (b"a", b"a", b"b"))
    assert len(first) == len(other) == 50
    assert torch.equal(first.inputs[0], again.inputs[0])
    assert not torch.equal(first.inputs[0], other.inputs[0])
    assert len(torch.unique(first.inputs[0], dim=0)) == 50
    everything = {image.numpy().tobytes() for image in trainer.validation.inputs[0]}
    assert {image.numpy().tobytes() for image in first.inputs[0]} <= everything
    assert judge._score_examples(b"a") is trainer.validation
