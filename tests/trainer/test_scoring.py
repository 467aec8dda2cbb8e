"""Scores: losses in fixed point, weights, and every way in which an update is refused."""

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from traincert.trainer.datasets import Dataset, Examples, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.scoring import (
    MAX_NANO_NATS,
    Reason,
    UpdateError,
    add,
    evaluate,
    nano_nats,
    read_update,
    score_update,
)
from traincert.trainer.state import State, initial_state, state_bytes, state_from_bytes, state_hash
from traincert.trainer.tasks import Task
from traincert.trainer.training import train_task

EXPECTED: State = {"w": torch.zeros(3, 2), "b": torch.zeros(3)}
GOOD: State = {"w": torch.ones(3, 2), "b": torch.ones(3)}
MAX_NORM = 5.0


@pytest.fixture
def validation(dataset: Dataset) -> Examples:
    return read_examples(dataset.directory, dataset.validation)


def with_value(value: float) -> State:
    changed = GOOD["b"].clone()
    changed[1] = value
    return {**GOOD, "b": changed}


def with_header(change: Callable[[dict[str, object]], object]) -> bytes:
    """Encode GOOD with a changed header."""
    data = state_bytes(GOOD)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data[end:]


HOSTILE: list[tuple[Reason, bytes]] = [
    (Reason.TOO_LARGE, bytes(2 * len(state_bytes(EXPECTED)) + 1)),
    (Reason.TOO_LARGE, state_bytes({**GOOD, "w": torch.ones(1000)})),
    (Reason.MALFORMED, b""),
    (Reason.MALFORMED, b"\xff" * 64),
    (Reason.MALFORMED, state_bytes(GOOD)[:-1]),
    (Reason.MALFORMED, state_bytes(GOOD) + b"\0"),
    (Reason.MALFORMED, with_header(lambda header: header.pop("b"))),
    (Reason.WRONG_NAMES, state_bytes({"w": GOOD["w"]})),
    (Reason.WRONG_NAMES, state_bytes({**GOOD, "v": torch.ones(1)})),
    (Reason.WRONG_NAMES, state_bytes({"w": GOOD["w"], "\n" * 9: GOOD["b"]})),
    (Reason.WRONG_DTYPE, state_bytes({**GOOD, "b": GOOD["b"].double()})),
    (Reason.WRONG_DTYPE, state_bytes({**GOOD, "b": torch.ones(3, dtype=torch.int32)})),
    (Reason.WRONG_SHAPE, state_bytes({**GOOD, "w": torch.ones(2, 3)})),
    (Reason.WRONG_SHAPE, state_bytes({**GOOD, "w": torch.ones(6)})),
    (Reason.WRONG_SHAPE, state_bytes({**GOOD, "w": torch.ones(0, 2)})),
    (Reason.NOT_CANONICAL, with_header(lambda header: header.update(__metadata__={"a": "b"}))),
    (Reason.NOT_CANONICAL, with_header(lambda _: None)),  # the same header with other spaces
    (Reason.NOT_FINITE, state_bytes(with_value(math.nan))),
    (Reason.NOT_FINITE, state_bytes(with_value(math.inf))),
    (Reason.NOT_FINITE, state_bytes(with_value(-math.inf))),
    (Reason.NORM_TOO_LARGE, state_bytes(with_value(5.0))),
    (Reason.NORM_TOO_LARGE, state_bytes(with_value(3e38))),
]


@pytest.mark.parametrize(("reason", "data"), HOSTILE)
def test_a_hostile_update_is_refused_with_its_reason(reason: Reason, data: bytes) -> None:
    assert read_update(state_bytes(GOOD), EXPECTED, MAX_NORM).keys() == GOOD.keys()
    with pytest.raises(UpdateError) as caught:
        read_update(data, EXPECTED, MAX_NORM)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 500


def test_every_reason_about_an_updates_form_has_a_case() -> None:
    others = {Reason.WORKER_DIED, Reason.NO_IMPROVEMENT}
    assert {reason for reason, _ in HOSTILE} == set(Reason) - others


def test_the_norm_is_over_all_tensors_and_may_reach_its_bound() -> None:
    assert read_update(state_bytes(GOOD), EXPECTED, 3.0)  # √9 ones
    with pytest.raises(UpdateError, match=r"L2 norm 3, at most 2\.9"):
        read_update(state_bytes(GOOD), EXPECTED, 2.9)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_and_nothing_else_happens(data: bytes) -> None:
    with pytest.raises(UpdateError):
        read_update(data, EXPECTED, MAX_NORM)


@given(st.integers(8, len(state_bytes(GOOD)) - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused_or_is_another_canonical_update(position: int, change: int) -> None:
    data = bytearray(state_bytes(GOOD))
    data[position] ^= change
    try:
        update = read_update(bytes(data), EXPECTED, 1e30)
    except UpdateError:
        return
    assert state_bytes(update) == data


def test_losses_are_summed_not_averaged_over_batches(job: TrainingJob, dataset: Dataset) -> None:
    examples = read_examples(dataset.directory, dataset.shards[0])
    model, state = build_model(job), initial_state(job)
    one, thousand = (evaluate(model, state, examples, batch_size=size) for size in (1, 1000))
    assert abs(one.loss - thousand.loss) <= 100  # nano-nats
    uneven = evaluate(model, state, examples, batch_size=len(examples.labels) - 1)  # a last batch of one
    assert abs(uneven.loss - one.loss) <= 100
    assert one.accuracy == thousand.accuracy == uneven.accuracy


def test_evaluation_is_cross_entropy_and_changes_nothing(job: TrainingJob, validation: Examples) -> None:
    model, state = build_model(job), initial_state(job)
    before = state_hash(state)
    found = evaluate(model, state, validation)
    with torch.no_grad():
        logits = model(validation.inputs)
    assert found.loss == pytest.approx(float(torch.nn.CrossEntropyLoss()(logits, validation.labels)) * 1e9, rel=1e-6)
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == validation.labels).float().mean()))
    assert state_hash(state) == state_hash(model.state_dict()) == before


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (0.0, 0),
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


def test_the_weight_is_the_root_of_params_times_reduction(
    job: TrainingJob, dataset: Dataset, validation: Examples
) -> None:
    model, state = build_model(job), initial_state(job)
    task = Task(miner=b"m" * 32, segment=1, shard=0, seed=bytes(32))
    data = train_task(job, state, read_examples(dataset.directory, dataset.shards[0]), task)
    update = state_from_bytes(data)
    before, after = (evaluate(model, tensors, validation).loss for tensors in (state, add(state, update)))
    score = score_update(model, state, validation, before, task.miner, update)
    assert score.miner == task.miner
    assert score.update_hash == state_hash(update)
    assert score.params == sum(tensor.numel() for tensor in update.values())
    assert score.loss_reduction == before - after
    assert score.weight**2 <= score.params * score.loss_reduction < (score.weight + 1) ** 2


def test_an_update_that_does_not_help_is_refused(job: TrainingJob, validation: Examples) -> None:
    model, state = build_model(job), initial_state(job)
    loss = evaluate(model, state, validation).loss
    nothing = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    overflow = {name: torch.full_like(tensor, 1e38) for name, tensor in state.items()}
    for update in (nothing, overflow):
        with pytest.raises(UpdateError) as caught:
            score_update(model, state, validation, loss, bytes(32), update)
        assert caught.value.reason == Reason.NO_IMPROVEMENT
