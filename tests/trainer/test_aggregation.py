"""Aggregation: the weighted mean, never a worse model, and never a changed old one."""

import hashlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from traincert.trainer.aggregation import aggregate
from traincert.trainer.datasets import Dataset, Examples, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.scoring import Contribution, add, evaluate
from traincert.trainer.state import State, initial_state, state_from_bytes, state_hash
from traincert.trainer.tasks import Task
from traincert.trainer.training import train_task

Accepted = list[tuple[Contribution, State]]


def contribution(number: int, weight: int) -> Contribution:
    return Contribution(hashlib.sha256(bytes([number])).digest(), bytes(32), 1, 1, weight)


@pytest.fixture(scope="module")
def validation(dataset: Dataset) -> Examples:
    return read_examples(dataset.directory, dataset.validation)


@pytest.fixture(scope="module")
def updates(job: TrainingJob, dataset: Dataset) -> list[State]:
    """Four updates from the initial state: two for each segment."""
    return [
        state_from_bytes(
            train_task(
                job,
                initial_state(job),
                read_examples(dataset.directory, dataset.shards[number]),
                Task(bytes(32), number % 2, number, bytes(32)),
            )
        )
        for number in range(4)
    ]


def test_parameters_move_by_the_weighted_mean_of_their_segments_updates(
    job: TrainingJob, validation: Examples, updates: list[State]
) -> None:
    model, state = build_model(job), initial_state(job)
    loss = evaluate(model, state, validation).loss
    weights = [1, 5, 3, 2]
    accepted: Accepted = [(contribution(number, weights[number]), updates[number]) for number in range(4)]
    result, loss_after = aggregate(model, state, validation, loss, accepted)
    for name in state:
        first = 0 if name in updates[0] else 1
        mean = (weights[first] * updates[first][name] + weights[first + 2] * updates[first + 2][name]) / (
            weights[first] + weights[first + 2]
        )
        torch.testing.assert_close(result[name], state[name] + mean)
    assert loss_after == evaluate(model, result, validation).loss < loss
    reordered = aggregate(model, state, validation, loss, accepted[::-1])
    assert state_hash(reordered[0]) == state_hash(result)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(-30, 30), st.floats(-30, 30), st.integers(1, 2**70))
def test_the_loss_never_rises_and_the_old_model_is_never_touched(
    job: TrainingJob, validation: Examples, updates: list[State], scale: float, other: float, weight: int
) -> None:
    model, state = build_model(job), initial_state(job)
    before = state_hash(state)
    loss = evaluate(model, state, validation).loss
    accepted: Accepted = [
        (contribution(0, weight), {name: scale * tensor for name, tensor in updates[0].items()}),
        (contribution(1, 7), {name: other * tensor for name, tensor in updates[1].items()}),
    ]
    result, loss_after = aggregate(model, state, validation, loss, accepted)
    assert loss_after <= loss
    assert loss_after == evaluate(model, result, validation).loss
    assert state_hash(state) == before


def test_too_long_a_step_is_halved_until_it_helps(job: TrainingJob, validation: Examples, updates: list[State]) -> None:
    model, state = build_model(job), initial_state(job)
    loss = evaluate(model, state, validation).loss
    long = {name: 64 * tensor for name, tensor in updates[0].items()}
    assert evaluate(model, add(state, long), validation).loss > loss
    result, loss_after = aggregate(model, state, validation, loss, [(contribution(0, 1), long)])
    assert loss_after < loss
    name = next(iter(long))
    share = (result[name] - state[name]).norm() / long[name].norm()
    assert float(share.log2()) == pytest.approx(round(float(share.log2())), abs=1e-4)
    assert share < 1


def test_the_model_stays_if_nothing_helps(job: TrainingJob, validation: Examples, updates: list[State]) -> None:
    model, state = build_model(job), initial_state(job)
    loss = evaluate(model, state, validation).loss
    harmful = {name: -tensor for name, tensor in updates[0].items()}
    assert aggregate(model, state, validation, loss, [(contribution(0, 1), harmful)]) == (state, loss)


def test_without_updates_the_model_stays(job: TrainingJob, validation: Examples) -> None:
    model, state = build_model(job), initial_state(job)
    loss = evaluate(model, state, validation).loss
    result, loss_after = aggregate(model, state, validation, loss, [])
    assert (state_hash(result), loss_after) == (state_hash(state), loss)
