"""States: canonical bytes and their hash."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from traincert.trainer.datasets import IntegrityError
from traincert.trainer.job import TrainingJob
from traincert.trainer.state import (
    initial_state,
    load_state,
    save_state,
    state_bytes,
    state_from_bytes,
    state_hash,
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


def test_a_stored_state_is_verified(job: TrainingJob, tmp_path: Path) -> None:
    state = initial_state(job)
    digest = save_state(tmp_path, state)
    assert digest == state_hash(state)
    assert state_hash(load_state(tmp_path, digest)) == digest
    with (tmp_path / digest.hex()).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(IntegrityError, match=digest.hex()):
        load_state(tmp_path, digest)
