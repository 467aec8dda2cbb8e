"""Training: what a task changes, and that it is plain training with the same bits each time."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from traincert.trainer.errors import JobError
from traincert.trainer.examples import Dataset, Examples, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.segments import Layout, Segment, cut_segments
from traincert.trainer.state import State, initial_state, state_from_bytes, state_hash
from traincert.trainer.tasks import Task
from traincert.trainer.training import Trained, check_optimizer, train_task
from traincert.trainer.updates import read_update

WriteJob = Callable[..., Path]

TASK = Task(miner=bytes(32), segment=0, shard=0, seed=bytes(range(32)), cycle=0)


@pytest.fixture(scope="module")
def shard(dataset: Dataset) -> Examples:
    return read_examples(dataset.job, dataset.shard_folder, dataset.shards[0])


def train(
    job: TrainingJob, shard: Examples, segment: int = 0, task: Task = TASK, memory: State | None = None
) -> Trained:
    part = cut_segments(build_model(job), job)[segment]
    return train_task(job, initial_state(job), part, shard, task, memory or {})


def trained_model(job: TrainingJob, shard: Examples, segment: int = 0) -> State:
    """The initial state with what a task changed."""
    model = build_model(job)
    part = cut_segments(model, job)[segment]
    state = initial_state(job)
    update = read_update(train(job, shard, segment).update, replace(job, max_update_norm=1e9), part, state)
    return update.applied(Layout(model), part, state)


Optimizer = Literal["SGD", "Adam", "AdamW"]
OPTIMIZERS: list[tuple[Optimizer, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("Adam", {}),
    ("Adam", {"betas": [0.8, 0.9], "eps": 1e-6}),
    ("AdamW", {"weight_decay": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
@pytest.mark.parametrize("segments", [1, 3])
def test_a_task_is_plain_training_step_by_step(
    job: TrainingJob, shard: Examples, name: Optimizer, options: dict[str, Any], segments: int
) -> None:
    """One segment is the whole model. With three, plain training has what is outside the second put back each step."""
    plain = replace(
        job, segments=segments, optimizer=name, optimizer_options=options, learning_rate=0.01, batch_size=100
    )
    number = segments // 2
    model = build_model(plain)
    layout = Layout(model)
    part = cut_segments(model, plain)[number]
    whole = Segment(0, layout.params)
    initial = layout.flatten(initial_state(plain), whole)
    kind: Any = getattr(torch.optim, name)
    optimizer = kind(model.parameters(), lr=0.01, **options)
    generator = torch.Generator().manual_seed(int.from_bytes(TASK.seed[:8], "little"))
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, 5):
        if len(order) < 100:
            order = torch.randperm(len(shard), generator=generator)
        batch, order = order[:100], order[100:]
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(model(shard.inputs[0][batch]), shard.target[batch]).backward()
        optimizer.step()
        expected = initial.clone()
        with torch.no_grad():
            flat = nn.utils.parameters_to_vector(model.parameters())
            expected[part.start : part.end] = flat[part.start : part.end]
            nn.utils.vector_to_parameters(expected.clone(), model.parameters())
        found = layout.flatten(trained_model(replace(plain, local_steps=step), shard, number), whole)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(found, initial)


def test_the_learning_rate_is_that_of_the_tasks_cycle(job: TrainingJob, shard: Examples) -> None:
    falling = replace(job, schedule="linear", cycles=4)
    second = train(falling, shard, task=replace(TASK, cycle=1)).update
    assert second == train(replace(job, learning_rate=job.learning_rate * 3 / 4), shard).update
    assert second != train(falling, shard).update


@pytest.mark.parametrize("segments", [2, 3, 7])
def test_only_the_segment_changes(job: TrainingJob, shard: Examples, segments: int) -> None:
    """Also where a segment begins or ends inside a tensor."""
    cut = replace(job, segments=segments)
    model = build_model(cut)
    layout = Layout(model)
    initial = initial_state(cut)
    whole = Segment(0, layout.params)
    before = state_hash(initial)
    for number, part in enumerate(cut_segments(model, cut)):
        moved = layout.flatten(trained_model(cut, shard, number), whole) != layout.flatten(initial, whole)
        assert not moved[: part.start].any()
        assert not moved[part.end :].any()
        assert moved[part.start : part.end].any()
    assert state_hash(initial) == before


DEEP = """
    import torch

    SEEN = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            SEEN.append(ctx.layer)
            return gradient, None

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))

        def forward(self, x):
            for number, layer in enumerate(self.layers):
                x = Watched.apply(layer(x), number)
            return x
"""


def test_the_backward_pass_stops_at_the_segment(write_job: WriteJob, shard: Examples) -> None:
    """Each of the model's four layers is a segment, and says when its output's gradient is computed."""
    job = TrainingJob.load(write_job(DEEP, model='"{module}:Model"', model_options=None, segments="4", local_steps="1"))
    build_model(job)
    module = sys.modules[job.model.partition(":")[0]]
    for number in range(4):
        module.SEEN.clear()
        train(job, shard, number)
        assert list(range(3, number - 1, -1)) == module.SEEN


def test_gradients_are_computed_for_the_segment_alone(job: TrainingJob, shard: Examples) -> None:
    """A step is as many operations as PyTorch needs for the forward pass, and for what must be differentiated."""
    width = 64
    deep = replace(
        job,
        local_steps=1,
        batch_size=10,
        model_options={"inputs": 64, "hidden": [width, width, width], "classes": width},
        segments=4,
        balance="flops",
    )
    model = build_model(deep)
    layout = Layout(model)
    product = 2 * 10 * width * width  # operations of one layer's matrix product for 10 examples
    for number in range(4):
        segment = Segment(layout.bounds[2 * number], layout.bounds[2 * number + 2])
        with FlopCounterMode(display=False) as counter:
            train_task(deep, initial_state(deep), segment, shard, TASK, {})
        forward, to_weight, to_inputs = 4, 1, 3 - number
        assert counter.get_total_flops() == product * (forward + to_weight + to_inputs)


def test_the_task_seed_decides_the_bits(job: TrainingJob, shard: Examples) -> None:
    update = train(job, shard).update
    torch.manual_seed(5)
    assert train(job, shard).update == update
    assert train(job, shard, task=replace(TASK, seed=bytes(32))).update != update
    assert train(job, shard, task=replace(TASK, seed=b"\xff" * 32)).update != update


def test_training_leaves_the_global_generator_as_it_was(job: TrainingJob, shard: Examples) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    train(job, shard)
    assert torch.equal(torch.rand(1), expected)


def test_a_batch_larger_than_the_shard_is_the_whole_shard(job: TrainingJob, shard: Examples) -> None:
    large = replace(job, batch_size=100_000)
    found = trained_model(large, shard)
    same = trained_model(replace(large, batch_size=len(shard)), shard)
    assert state_hash(found) == state_hash(same)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"betas": 1}, "betas"), ({"momentum": -1.0}, "Invalid momentum value: -1.0"), ({"lr": 1.0}, "lr")],
)
def test_options_that_the_optimizer_does_not_take_are_named(
    job: TrainingJob, options: dict[str, Any], words: str
) -> None:
    wrong = replace(job, optimizer_options=options)
    with pytest.raises(JobError, match=rf"^optimizer_options = .*{words}"):
        check_optimizer(wrong, build_model(job))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (
            {"3.*": {"lr": 0.1}},
            r"parameter_groups.'3.\*': no trainable parameter has such a name; there are 0.weight, ",
        ),
        ({"0.*": {}, "*.bias": {}}, r"parameter_groups: '0.\*' and '\*.bias' both match 0.bias: must be one of them"),
        (
            {"*.bias": {"weight_decai": 0}},
            r"parameter_groups.'\*.bias': SGD has no option 'weight_decai' for it; it has",
        ),
        ({"*.bias": {"lr": -1.0}}, r"parameter_groups.'\*.bias': lr = -1.0: must be a number from 0 to 100"),
        ({"*.bias": {"lr": "1"}}, r"parameter_groups.'\*.bias': lr = '1': must be a number from 0 to 100"),
    ],
)
def test_groups_that_cannot_be_right_are_named(job: TrainingJob, groups: dict[str, dict[str, Any]], words: str) -> None:
    with pytest.raises(JobError, match=f"^{words}"):
        check_optimizer(replace(job, parameter_groups=groups), build_model(job))


@pytest.mark.parametrize("segments", [1, 3])
def test_groups_have_their_own_options(job: TrainingJob, shard: Examples, segments: int) -> None:
    """A learning rate of a tenth gives a first step of a tenth, also while the schedule lowers it."""
    one = replace(job, segments=segments, local_steps=1, optimizer_options={}, warmup_cycles=1)
    grouped = replace(one, parameter_groups={"0.*": {"lr": one.learning_rate / 10}, "2.bias": {"lr": 0.0}})
    initial = initial_state(job)
    for number in range(segments):
        plain, changed = (trained_model(each, shard, number) for each in (one, grouped))
        assert any(not torch.equal(plain[name], initial[name]) for name in initial)
        for name, share in {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 1.0, "2.bias": 0.0}.items():
            expected = (plain[name] - initial[name]) * share
            torch.testing.assert_close(changed[name] - initial[name], expected, rtol=1e-3, atol=1e-7)


def test_a_gradient_is_clipped_to_the_norm(job: TrainingJob, shard: Examples) -> None:
    """Plain SGD's first step is the gradient times the learning rate."""
    one = replace(job, segments=1, local_steps=1, optimizer_options={}, clip_norm=0.01)
    move = state_from_bytes(train(one, shard).update)["move"]
    assert float(move.norm()) == pytest.approx(0.01 * job.learning_rate, rel=1e-3)
    loose = replace(one, clip_norm=1e6)
    free = replace(one, clip_norm=None)
    assert train(loose, shard).update == train(free, shard).update


def test_what_does_not_travel_is_kept(job: TrainingJob, shard: Examples) -> None:
    """The update and the residual are together the move; a task begins at the model plus the residual before."""
    whole = state_from_bytes(train(job, shard, 1).update)["move"]
    compressed = replace(job, density=0.1)
    segment = cut_segments(build_model(job), job)[1]
    rest = slice(0, segment.start)
    first = train(compressed, shard, 1)
    sent = read_update(first.update, compressed, segment, initial_state(job)).move
    torch.testing.assert_close(sent + first.memory["residual"][segment.start : segment.end], whole)
    assert not first.memory["residual"][rest].any()

    before = torch.rand(first.memory["residual"].shape)
    kept = before.clone()
    here = slice(segment.start, segment.end)
    waiting = 0.5 * before[here]
    ahead = Layout(build_model(job)).add(initial_state(job), segment, waiting)
    whole = state_from_bytes(train_task(job, ahead, segment, shard, TASK, {}).update)["move"]
    second = train(replace(compressed, residual_decay=0.5), shard, 1, memory={"residual": before})
    sent = read_update(second.update, replace(compressed, max_update_norm=1e9), segment, initial_state(job)).move
    torch.testing.assert_close(sent + second.memory["residual"][here], whole + waiting)
    assert torch.equal(second.memory["residual"][rest], before[rest])
    assert torch.equal(before, kept)


def test_what_is_not_sent_is_sent_later(job: TrainingJob, shard: Examples) -> None:
    """With nothing new to say (a learning rate of nearly 0), all of the first task's move arrives in the end."""
    compressed = replace(job, density=0.25, segments=1, local_steps=5)
    segment = cut_segments(build_model(compressed), compressed)[0]
    state = initial_state(compressed)
    first = train(compressed, shard)
    whole = state_from_bytes(train(replace(compressed, density=1.0), shard).update)["move"]
    arrived = read_update(first.update, compressed, segment, state).move
    residual = first.memory["residual"]
    distances = [float((whole - arrived).norm())]
    for _ in range(12):
        silent = train(replace(compressed, learning_rate=1e-30), shard, memory={"residual": residual})
        arrived = arrived + read_update(silent.update, compressed, segment, state).move
        residual = silent.memory["residual"]
        torch.testing.assert_close(arrived + residual, whole)
        distances.append(float((whole - arrived).norm()))
    assert distances[-1] < distances[0] / 4


@pytest.mark.parametrize(("name", "options"), [*OPTIMIZERS, ("Adam", {"amsgrad": True})])
@pytest.mark.parametrize("segments", [1, 3])
def test_an_optimizers_state_is_kept_if_the_job_says_so(
    job: TrainingJob, shard: Examples, name: Optimizer, options: dict[str, Any], segments: int
) -> None:
    """A task of five steps and then one of five more are the same as ten steps; but without, they are not."""
    once = replace(
        job,
        segments=segments,
        optimizer=name,
        optimizer_options=options,
        learning_rate=0.01,
        batch_size=9999,
        local_steps=5,
        keep_optimizer_state=True,
    )
    number = segments // 2
    segment = cut_segments(build_model(once), once)[number]
    layout = Layout(build_model(once))
    first = train(once, shard, number)
    between = layout.add(initial_state(once), segment, state_from_bytes(first.update)["move"])

    def second(again: TrainingJob, memory: State) -> torch.Tensor:
        update = train_task(again, between, segment, shard, TASK, memory).update
        return layout.flatten(layout.add(between, segment, state_from_bytes(update)["move"]), segment)

    expected = layout.flatten(trained_model(replace(once, local_steps=10), shard, number), segment)
    torch.testing.assert_close(second(once, first.memory), expected, atol=1e-5, rtol=1e-4)
    if name != "SGD" or options:
        assert (second(replace(once, keep_optimizer_state=False), {}) - expected).abs().max() > 1e-4
    assert train(replace(once, keep_optimizer_state=False), shard, number).memory == {}


def test_another_segments_optimizer_state_stays_as_it_was(job: TrainingJob, shard: Examples) -> None:
    both = replace(job, keep_optimizer_state=True, density=0.5)
    first = train(both, shard, 0)
    second = train(both, shard, 1, memory=first.memory)
    end = cut_segments(build_model(both), both)[0].end
    assert torch.equal(second.memory["residual"][:end], first.memory["residual"][:end])
    kept = first.memory.keys() - {"residual"}
    assert kept
    for name in kept:
        assert torch.equal(second.memory[name], first.memory[name])
    assert second.memory[f"optimizer.{end}.momentum_buffer"].any()
