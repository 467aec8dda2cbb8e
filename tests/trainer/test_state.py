"""States: canonical bytes and their hash."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from traincert.trainer.errors import IntegrityError, JobError
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import STORED_DTYPES
from traincert.trainer.state import (
    initial_state,
    load_state,
    save_state,
    set_state,
    state_bytes,
    state_from_bytes,
    state_hash,
    state_of,
)


def test_the_encoding_is_frozen() -> None:
    """Hashes on chain depend on these bytes: should a new safetensors change them, this fails."""
    tensors = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor([[3]]), "c": torch.tensor(0.5)}
    header = (
        b'{"a":{"dtype":"I64","shape":[1,1],"data_offsets":[0,8]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},'
        b'"c":{"dtype":"F32","shape":[],"data_offsets":[16,20]}}'
    )
    header += b" " * (-len(header) % 8)
    data = bytes.fromhex("03000000000000000000803f000000c00000003f")
    expected = len(header).to_bytes(8, "little") + header + data
    assert state_bytes(tensors) == expected
    assert state_hash(tensors) == hashlib.sha256(expected).digest()


def test_the_encoding_is_that_of_the_safetensors_library() -> None:
    """For all dtypes that a model may have, for any names and shapes, and for nothing at all."""
    tensors = {f'{dtype} é\n"': torch.ones(2, 3).to(dtype) for dtype in STORED_DTYPES}
    tensors |= {f"{dtype} other": torch.zeros(()).to(dtype) for dtype in reversed(STORED_DTYPES)}
    tensors["empty"] = torch.zeros(0, 3)
    assert state_bytes(tensors) == safetensors.torch.save(tensors)
    assert state_bytes({}) == safetensors.torch.save({})


def test_neither_order_nor_memory_layout_matters() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    transposed = matrix.t().contiguous().t()  # equal values, other strides
    assert not transposed.is_contiguous()
    assert state_hash({"x": matrix, "y": torch.ones(1)}) == state_hash({"y": torch.ones(1), "x": transposed})


def test_decoding_gives_the_same_tensors_back(job: TrainingJob) -> None:
    state = initial_state(job)
    decoded = state_from_bytes(state_bytes(state))
    assert decoded.keys() == state.keys()
    assert all(torch.equal(decoded[name], state[name]) for name in state)


def test_the_initial_state_follows_from_the_seed_alone(job: TrainingJob) -> None:
    torch.manual_seed(1)
    first = state_hash(initial_state(job))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)  # the global generator was left as it was
    assert state_hash(initial_state(job)) == first
    assert state_hash(initial_state(replace(job, seed=job.seed + 1))) != first


def test_a_job_may_start_from_a_model_that_was_trained(job: TrainingJob, tmp_path: Path) -> None:
    trained = initial_state(replace(job, seed=7))
    path = tmp_path / save_state(tmp_path, trained).hex()  # as a run's store has it
    assert state_hash(initial_state(replace(job, initial_model=str(path)))) == state_hash(trained)


def test_a_file_that_is_not_of_the_model_is_refused(job: TrainingJob, tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    starting = replace(job, initial_model=str(path))
    state = dict(initial_state(job))
    name = min(state)
    with pytest.raises(JobError, match=rf"initial_model = '{path}': No such file or directory"):
        initial_state(starting)
    path.write_bytes(b"nonsense")
    with pytest.raises(JobError, match="is not a safetensors file"):
        initial_state(starting)
    path.write_bytes(state_bytes({**state, name: state[name].double()}))
    with pytest.raises(JobError, match=rf"{name} is torch.float64 .*, the model's is torch.float32"):
        initial_state(starting)
    path.write_bytes(state_bytes({**state, name: state[name][:-1].clone()}))
    with pytest.raises(JobError, match=rf"{name} is torch.float32 \("):
        initial_state(starting)
    path.write_bytes(state_bytes({**state, "more": state[name].clone()}))
    with pytest.raises(JobError, match=r"has .*'more'.*, the model has "):
        initial_state(starting)


def test_a_stored_state_is_verified(job: TrainingJob, tmp_path: Path) -> None:
    state = initial_state(job)
    digest = save_state(tmp_path, state)
    assert digest == state_hash(state)
    assert state_hash(load_state(tmp_path, digest)) == digest
    with (tmp_path / digest.hex()).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(IntegrityError, match=digest.hex()):
        load_state(tmp_path, digest)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.brief = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("cache", torch.zeros(1), persistent=False)


def test_a_state_has_parameters_once_and_the_buffers_that_are_kept() -> None:
    model = Model()
    state = state_of(model)
    assert set(state) == {
        "first.weight",
        "norm.weight",
        "norm.bias",
        "brief",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert state["brief"].dtype == torch.bfloat16
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    with torch.no_grad():
        model.brief.add_(1)
    assert state["brief"].tolist() == [1, 1]  # a copy


def test_a_state_that_is_set_and_read_again_is_the_same_and_leaves_ties() -> None:
    model, other = Model(), Model()
    nn.init.ones_(model.first.weight)
    model.norm(torch.rand(5, 3))
    state = state_from_bytes(state_bytes(state_of(model)))
    set_state(other, state)
    assert state_hash(state_of(other)) == state_hash(state)
    assert other.second.weight is other.first.weight
    assert other.second.weight.sum() == 9


def test_a_nan_keeps_its_bits_and_zeros_their_sign() -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000], dtype=torch.int32)
    values = {"x": bits.view(torch.float32)}
    assert torch.equal(state_from_bytes(state_bytes(values))["x"].view(torch.int32), bits)
    assert state_hash({"x": torch.tensor(0.0)}) != state_hash({"x": torch.tensor(-0.0)})
