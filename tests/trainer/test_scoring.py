"""Scores: losses in fixed point, and weights."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation import evaluate
from traincert.trainer.cycle import Trainer
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.preprocessing import Dataset, Examples, read_examples
from traincert.trainer.scoring import MAX_NANO_NATS, Scorer, nano_nats, score
from traincert.trainer.state import initial_state, state_hash, state_of
from traincert.trainer.updates import Reason, UpdateError

WriteJob = Callable[..., Path]


@pytest.fixture(scope="module")
def validation(dataset: Dataset) -> Examples:
    return read_examples(dataset.job, dataset.held_out_folder, dataset.validation)


def test_losses_are_summed_not_averaged_over_batches(job: TrainingJob, dataset: Dataset) -> None:
    examples = read_examples(job, dataset.shard_folder, dataset.shards[0])
    model, state = build_model(job), initial_state(job)
    one, thousand = (evaluate(model, job, state, examples, batch_size=size) for size in (1, 1000))
    assert abs(one.loss - thousand.loss) <= 100  # nano-nats
    uneven = evaluate(model, job, state, examples, batch_size=len(examples) - 1)  # a last batch of one
    assert abs(uneven.loss - one.loss) <= 100
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
    assert abs(first.loss - second.loss) <= 100
    assert state_hash(state_of(model)) == state_hash(state)


def test_threads_do_not_matter(job: TrainingJob, validation: Examples) -> None:
    states = [initial_state(replace(job, seed=seed)) for seed in range(5)]
    expected = [evaluate(build_model(job), job, state, validation) for state in states]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            with Scorer(job) as scorer:
                assert scorer.evaluate(states, validation) == expected
                assert scorer.evaluate(states[::-1], validation) == expected[::-1]
            assert evaluate(build_model(job), job, states[0], validation) == expected[0]
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)


def test_an_error_in_the_users_metric_is_not_hidden(write_job: WriteJob, validation: Examples) -> None:
    job = TrainingJob.load(write_job("def metric(outputs, target): return 1 / 0", metric='"{module}:metric"'))
    with Scorer(job) as scorer, pytest.raises(ZeroDivisionError):
        scorer.evaluate([initial_state(job)], validation)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (0.0, 0),
        (-1.0, 0),
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


def test_a_model_of_no_numbers_has_the_greatest_loss(job: TrainingJob, validation: Examples) -> None:
    state = {name: torch.full_like(tensor, math.nan) for name, tensor in initial_state(job).items()}
    assert evaluate(build_model(job), job, state, validation).loss == MAX_NANO_NATS


@pytest.mark.parametrize(("params", "reduction"), [(1, 1), (3, 5), (17098, 123456789), (2**32, 2**63)])
def test_the_weight_is_the_root_of_params_times_reduction(params: int, reduction: int) -> None:
    contribution = score(b"m" * 32, b"update", params, 10 + reduction, 10)
    assert (contribution.miner, contribution.params, contribution.loss_reduction) == (b"m" * 32, params, reduction)
    assert contribution.weight**2 <= params * reduction < (contribution.weight + 1) ** 2


@pytest.mark.parametrize("after", [10, 11, MAX_NANO_NATS])
def test_an_update_that_does_not_help_is_refused(after: int) -> None:
    with pytest.raises(UpdateError, match=f"loss 10 before and {after} after") as caught:
        score(bytes(32), b"", 100, 10, after)
    assert caught.value.reason == Reason.NO_IMPROVEMENT


def test_the_examples_to_score_on_are_drawn_by_the_seed(trainer: Trainer, job: TrainingJob) -> None:
    """The draw has no repetition, and other seeds draw others; with 0 it is all of them."""
    drawing = Trainer.__new__(Trainer)
    vars(drawing).update(vars(trainer) | {"job": replace(job, score_examples=50)})
    first, again, other = (drawing._score_examples(seed) for seed in (b"a", b"a", b"b"))
    assert len(first) == len(other) == 50
    assert torch.equal(first.inputs[0], again.inputs[0])
    assert not torch.equal(first.inputs[0], other.inputs[0])
    assert len(torch.unique(first.inputs[0], dim=0)) == 50
    everything = {image.numpy().tobytes() for image in trainer.validation.inputs[0]}
    assert {image.numpy().tobytes() for image in first.inputs[0]} <= everything
    assert trainer._score_examples(b"a") is trainer.validation
