"""Segments: contiguous, complete, and as balanced as tensors allow."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.segments import cut_segments


def model_of(sizes: list[int]) -> nn.Module:
    """Make a model whose parameters, in order, have these sizes."""
    return nn.ParameterList([nn.Parameter(nn.init.zeros_(nn.Parameter().new_empty(size))) for size in sizes])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.data())
def test_no_other_cut_has_a_smaller_greatest_segment(sizes: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    model = model_of(sizes)
    segments = cut_segments(model, count)
    assert [name for segment in segments for name in segment] == [name for name, _ in model.named_parameters()]
    assert all(segments)
    assert len(segments) == count
    cuts = ([0, *inner, len(sizes)] for inner in combinations(range(1, len(sizes)), count - 1))
    best = min(max(sum(sizes[start:end]) for start, end in pairwise(cut)) for cut in cuts)
    assert max(sum(sizes[int(name)] for name in segment) for segment in segments) == best


def test_the_shipped_job_is_cut_almost_evenly() -> None:
    job = TrainingJob.named("digits")
    model = build_model(job)
    parameters = dict(model.named_parameters())
    sizes = [sum(parameters[name].numel() for name in segment) for segment in cut_segments(model, job.segments)]
    assert sizes == [16640, 17098]


def test_more_segments_than_tensors_is_an_error(job: TrainingJob) -> None:
    model = build_model(replace(job, hidden=(8,)))
    assert len(cut_segments(model, 4)) == 4
    with pytest.raises(ValueError, match="cannot cut 4 tensors into 5 segments"):
        cut_segments(model, 5)
