"""Segments: ranges of the flat vector that are contiguous, complete and balanced, each with its buffers."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from traincert.trainer.errors import JobError
from traincert.trainer.examples import Dataset, Examples, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.segments import Layout, Segment, cut_segments
from traincert.trainer.state import state_hash, state_of


def model_of(sizes: list[int]) -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.arange(float(size))) for size in sizes])


@pytest.fixture(scope="module")
def validation(dataset: Dataset) -> Examples:
    return read_examples(dataset.job, dataset.held_out_folder, dataset.validation)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.data())
def test_segments_are_equal_ranges_that_cover_everything_once(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, sum(sizes)))
    model = model_of(sizes)
    job = replace(TrainingJob.named("digits"), segments=count, balance="parameters")
    segments = cut_segments(model, job)
    assert len(segments) == count
    assert segments[0].start == 0
    assert segments[-1].end == sum(sizes)
    assert all(one.end == other.start for one, other in pairwise(segments))
    assert {segment.params for segment in segments} <= {sum(sizes) // count, -(-sum(sizes) // count)}


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.data())
def test_what_is_taken_from_tensors_can_be_added_to_them(sizes: list[int], data: st.DataObject) -> None:
    model = model_of(sizes)
    layout, state = Layout(model), state_of(model)
    start = data.draw(st.integers(0, sum(sizes) - 1))
    segment = Segment(start, data.draw(st.integers(start + 1, sum(sizes))))
    whole = Segment(0, sum(sizes))
    before = state_hash(state)
    flat = layout.flatten(state, whole)
    assert torch.equal(flat, torch.cat([torch.arange(float(size)) for size in sizes]))
    assert torch.equal(layout.flatten(state, segment), flat[segment.start : segment.end])
    move = torch.arange(1.0, segment.params + 1)
    flat[segment.start : segment.end] += move
    assert torch.equal(layout.flatten(layout.add(state, segment, move), whole), flat)
    assert state_hash(state) == before
    assert sum(piece.end - piece.begin for piece in layout.pieces(segment)) == segment.params
    assert all(piece.end > piece.begin for piece in layout.pieces(segment))


class Odd(nn.Module):
    """Frozen and tied parameters, and buffers before, between and after the trainable ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.zeros(2))
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.one = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.two = nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
        self.last = nn.Linear(3, 2)


def test_frozen_parameters_are_in_no_segment_and_tied_ones_in_one() -> None:
    model = Odd()
    assert Layout(model).names == ["one.weight", "norm.weight", "norm.bias", "last.weight", "last.bias"]
    assert Layout(model).params == 9 + 3 + 3 + 6 + 2


@pytest.mark.parametrize("count", [1, 2, 5, 23])
def test_each_buffer_is_in_exactly_one_segment_with_the_parameters_before_it(job: TrainingJob, count: int) -> None:
    segments = cut_segments(Odd(), replace(job, segments=count))
    buffers = [name for segment in segments for name in segment.buffers]
    assert sorted(buffers) == ["first", "mask", "norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    holder = next(segment for segment in segments if "norm.running_mean" in segment.buffers)
    assert holder.start < 15 <= holder.end
    assert "first" in segments[0].buffers


def test_more_segments_than_parameters_is_an_error(job: TrainingJob) -> None:
    assert len(cut_segments(model_of([2, 2]), replace(job, segments=4))) == 4
    with pytest.raises(JobError, match=r"^segments = 5: must be at most 4, the trainable parameters"):
        cut_segments(model_of([2, 2]), replace(job, segments=5))


def test_more_segments_than_tensors_is_an_error_where_tensors_are_kept_whole(
    job: TrainingJob, validation: Examples
) -> None:
    flops = replace(job, balance="flops", segments=5)
    with pytest.raises(JobError, match=r"^segments = 5: must be at most 4, the trainable tensors"):
        cut_segments(build_model(flops), flops, validation)


def step_flops(model: nn.Module, names: set[str], examples: Examples) -> int:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    batch = examples.batch(slice(0, 1))
    with FlopCounterMode(display=False) as counter:
        loss = nn.functional.cross_entropy(model(*batch.inputs), batch.target)
        loss.backward()  # type: ignore[no-untyped-call]
    return int(counter.get_total_flops())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_other_cut_between_tensors_has_a_cheaper_dearest_segment(
    job: TrainingJob, validation: Examples, count: int
) -> None:
    flops = replace(
        job, balance="flops", segments=count, model_options={"inputs": 64, "hidden": [48, 20, 8], "classes": 10}
    )
    model = build_model(flops)
    layout = Layout(model)
    segments = cut_segments(build_model(flops), flops, validation)
    assert len(segments) == count
    bounds = [segment.start for segment in segments] + [segments[-1].end]
    assert set(bounds) <= set(layout.bounds)
    costs = [
        max(
            step_flops(model, set(layout.names[start:end]), validation)
            for start, end in pairwise([0, *inner, len(layout.names)])
        )
        for inner in combinations(range(1, len(layout.names)), count - 1)
    ]
    indices = [layout.bounds.index(bound) for bound in bounds]
    found = max(step_flops(model, set(layout.names[start:end]), validation) for start, end in pairwise(indices))
    assert found == min(costs)


def test_cutting_by_operations_leaves_the_model_as_it_was(job: TrainingJob, validation: Examples) -> None:
    model = build_model(replace(job, balance="flops"))
    before = state_hash(state_of(model))
    list(model.parameters())[1].requires_grad_(False)
    cut_segments(model, replace(job, balance="flops"), validation)
    assert state_hash(state_of(model)) == before
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, True, True]
