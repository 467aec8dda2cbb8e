"""Aggregation: the weighted mean is a step of the outer optimizer, and the old model is never changed."""

import hashlib
import itertools
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from traincert.trainer.aggregation import Accepted, aggregate
from traincert.trainer.job import TrainingJob
from traincert.trainer.scoring import Contribution
from traincert.trainer.segments import Layout, Segment, cut_segments
from traincert.trainer.state import State, state_hash, state_of
from traincert.trainer.updates import Update

JOB = replace(TrainingJob.named("digits"), segments=2, outer_momentum=0.0, outer_learning_rate=1.0)
MODEL = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
LAYOUT = Layout(MODEL)
SEGMENTS = cut_segments(MODEL, JOB)
WHOLE = Segment(0, LAYOUT.params)
NO_VELOCITY = torch.zeros(LAYOUT.params)


def state() -> State:
    return state_of(MODEL)


def flat(tensors: State) -> torch.Tensor:
    return LAYOUT.flatten(tensors, WHOLE)


def accepted(number: int, weight: int, segment: Segment) -> Accepted:
    generator = torch.Generator().manual_seed(number)
    buffers = {
        name: torch.rand(4, generator=generator) if state()[name].is_floating_point() else torch.tensor(number)
        for name in segment.buffers
    }
    miner = hashlib.sha256(bytes([number])).digest()
    update = Update(torch.randn(segment.params, generator=generator), buffers)
    return Accepted(Contribution(miner, bytes(32), segment.params, 1, weight), segment, update)


def test_parameters_move_by_the_weighted_mean_of_their_segments_updates() -> None:
    updates = [accepted(number, weight, SEGMENTS[number % 2]) for number, weight in enumerate([1, 5, 3, 2])]
    before = state_hash(state())
    after, velocity, _ = aggregate(JOB, LAYOUT, state(), NO_VELOCITY, updates)
    first = (updates[0].update.move + 3 * updates[2].update.move) / 4
    second = (5 * updates[1].update.move + 2 * updates[3].update.move) / 7
    torch.testing.assert_close(flat(after) - flat(state()), torch.cat([first, second]))
    torch.testing.assert_close(velocity, torch.cat([first, second]))
    assert state_hash(state()) == before
    assert not NO_VELOCITY.any()


@pytest.mark.parametrize("aggregation", ["mean", "trimmed_mean", "geometric_median"])
def test_the_order_of_the_miners_does_not_matter(
    aggregation: Literal["mean", "trimmed_mean", "geometric_median"],
) -> None:
    updates = [accepted(number, weight, SEGMENTS[number % 2]) for number, weight in enumerate([10**9, 5, 3, 2**70])]
    velocity = torch.rand(LAYOUT.params)
    job = replace(JOB, outer_momentum=0.7, outer_learning_rate=0.3, aggregation=aggregation, trim=0.4)
    results = [aggregate(job, LAYOUT, state(), velocity, order) for order in itertools.permutations(updates)]
    assert len({state_hash(after) for after, _, _ in results}) == 1
    assert len({state_hash({"velocity": velocity}) for _, velocity, _ in results}) == 1


@pytest.mark.parametrize("block", [1, 5, 16])
def test_the_size_of_the_blocks_does_not_matter(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    updates = [accepted(number, weight, SEGMENTS[number % 2]) for number, weight in enumerate([10**9, 5, 3, 2**70])]
    velocity = torch.rand(LAYOUT.params)
    job = replace(JOB, outer_momentum=0.7, outer_learning_rate=0.3)
    at_once, moving, _ = aggregate(job, LAYOUT, state(), velocity, updates, share=0.5)
    monkeypatch.setattr("traincert.trainer.aggregation._BLOCK", block)
    after, moving_after, _ = aggregate(job, LAYOUT, state(), velocity, updates, share=0.5)
    assert state_hash(after) == state_hash(at_once)
    assert moving_after.equal(moving)


def move(aggregation: Literal["mean", "trimmed_mean", "geometric_median"], values: list[list[float]]) -> torch.Tensor:
    """Return the step that updates of the whole model make, whose first parameters are these, with equal weights."""
    updates = []
    for number, row in enumerate(values):
        contribution = Contribution(bytes([number]) * 32, b"", LAYOUT.params, 1, 1)
        updates.append(Accepted(contribution, WHOLE, Update(torch.tensor(row + [0.0] * (LAYOUT.params - len(row))))))
    _, _, step = aggregate(replace(JOB, segments=1, aggregation=aggregation), LAYOUT, state(), NO_VELOCITY, updates)
    return step[: len(values[0])]


def test_the_step_is_what_the_model_moves() -> None:
    before = state()
    updates = [accepted(number, number + 1, SEGMENTS[number % 2]) for number in range(3)]
    after, _, step = aggregate(JOB, LAYOUT, before, NO_VELOCITY, updates)
    assert torch.allclose(flat(after) - flat(before), step, atol=1e-6)


def test_the_trimmed_mean_leaves_out_the_extremes_of_each_parameter() -> None:
    values = [[1.0, 5.0], [2.0, 4.0], [3.0, -1e6], [4.0, 2.0], [1e6, 1.0]]
    assert move("trimmed_mean", values).tolist() == pytest.approx([3.0, 7 / 3])
    assert move("mean", values)[0] > 1e5


def test_the_geometric_median_is_where_the_distances_are_least() -> None:
    """Three points of a triangle have their median at its Fermat point; two far ones hardly move that of five."""
    root = 3**0.5
    assert move("geometric_median", [[0.0, 0.0], [2.0, 0.0], [1.0, root]]).tolist() == pytest.approx(
        [1.0, root / 3], abs=1e-3
    )
    honest = [[1.0, 1.0], [1.1, 1.0], [1.0, 1.1]]
    moved = move("geometric_median", [*honest, [-100.0, -100.0], [-100.0, -100.0]])
    assert (moved - 1).norm() < 0.2
    assert move("geometric_median", [[1.0, 2.0]] * 3).tolist() == pytest.approx([1.0, 2.0])


@settings(max_examples=25)
@given(st.floats(0, 0.99), st.floats(0.01, 2), st.integers(0, 99))
def test_the_outer_step_is_that_of_torchs_nesterov_momentum(momentum: float, rate: float, seed: int) -> None:
    """Several cycles with torch.optim.SGD, whose gradient is minus the mean."""
    job = replace(JOB, outer_momentum=momentum, outer_learning_rate=rate, segments=1)
    parameter = nn.Parameter(flat(state()).double())
    optimizer = torch.optim.SGD([parameter], lr=rate, momentum=momentum, nesterov=momentum > 0)
    found, velocity = state(), NO_VELOCITY
    segment = LAYOUT.segment(0, LAYOUT.params)
    for cycle in range(4):
        updates = [accepted(4 * cycle + seed % 100, 3, segment), accepted(4 * cycle + 1 + seed % 100, 1, segment)]
        parameter.grad = -(3 * updates[0].update.move.double() + updates[1].update.move.double()) / 4
        optimizer.step()
        found, velocity, _ = aggregate(job, LAYOUT, found, velocity, updates)
        torch.testing.assert_close(flat(found), parameter.detach().float(), atol=1e-4, rtol=1e-4)


def test_a_segment_without_updates_stays_and_so_does_its_velocity() -> None:
    job = replace(JOB, outer_momentum=0.9)
    before = torch.rand(LAYOUT.params)
    after, velocity, _ = aggregate(job, LAYOUT, state(), before, [accepted(1, 1, SEGMENTS[1])])
    cut = SEGMENTS[0].end
    assert torch.equal(flat(after)[:cut], flat(state())[:cut])
    assert torch.equal(velocity[:cut], before[:cut])
    assert (flat(after)[cut:] != flat(state())[cut:]).all()
    for name in SEGMENTS[0].buffers:
        assert torch.equal(after[name], state()[name])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_updates_the_model_stays(momentum: float) -> None:
    before = torch.rand(LAYOUT.params)
    after, velocity, _ = aggregate(replace(JOB, outer_momentum=momentum), LAYOUT, state(), before, [])
    assert state_hash(after) == state_hash(state())
    assert torch.equal(velocity, before)


def test_buffers_move_by_the_weighted_mean_and_integers_are_rounded() -> None:
    job = replace(JOB, outer_learning_rate=0.5, outer_momentum=0.9)  # which are the parameters' alone
    segment = LAYOUT.segment(0, LAYOUT.params)
    updates = [accepted(number, weight, segment) for number, weight in ((4, 1), (9, 2))]
    after, _, _ = aggregate(job, LAYOUT, state(), NO_VELOCITY, updates)
    name = "1.running_mean"
    mean = (updates[0].update.buffers[name] + 2 * updates[1].update.buffers[name]) / 3
    torch.testing.assert_close(after[name] - state()[name], mean)
    assert after["1.num_batches_tracked"].dtype == torch.int64
    assert int(after["1.num_batches_tracked"]) == round((4 + 2 * 9) / 3)


def test_one_update_of_all_parameters_at_full_rate_is_that_miners_model() -> None:
    segment = LAYOUT.segment(0, LAYOUT.params)
    update = accepted(3, 12345, segment)
    after, _, _ = aggregate(JOB, LAYOUT, state(), NO_VELOCITY, [update])
    assert state_hash(after) == state_hash(update.update.applied(LAYOUT, segment, state()))


def test_tensors_of_low_precision_keep_their_type() -> None:
    """Each sum is rounded once: small moves are lost in bfloat16 no more than they must be."""
    model = nn.Linear(3, 2).bfloat16()
    layout = Layout(model)
    segment = layout.segment(0, layout.params)
    before = state_of(model)
    update = Accepted(Contribution(bytes(32), bytes(32), 8, 1, 7), segment, Update(torch.full((8,), 0.25)))
    after, velocity, _ = aggregate(JOB, layout, before, torch.zeros(8), [update])
    assert velocity.dtype == torch.float32
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, (before[name].float() + 0.25).bfloat16())
