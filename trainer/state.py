"""A model's state, parameters and buffers, as canonical bytes and their hash."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from traincert.trainer.datasets import read_blob, write_blob
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model

State = Mapping[str, torch.Tensor]
"""Tensors by name; read, never changed in place."""


def initial_state(job: TrainingJob) -> State:
    """Return the state that the job's first cycle starts from: a function of `job.seed`."""
    return {name: tensor.detach().clone() for name, tensor in build_model(job).state_dict().items()}


def state_bytes(tensors: State) -> bytes:
    """Encode tensors as canonical safetensors: the same names, dtypes, shapes and values always give the same bytes.

    Tensors are ordered by falling size of their dtype, then by name, and there is no metadata. NaNs keep their
    bits, and -0.0 differs from 0.0.
    """
    return safetensors.torch.save({name: tensors[name].detach().contiguous() for name in sorted(tensors)})


def state_hash(tensors: State) -> bytes:
    """Return the SHA-256 of `state_bytes`, 32 raw bytes."""
    return hashlib.sha256(state_bytes(tensors)).digest()


def state_from_bytes(data: bytes) -> State:
    """Decode `state_bytes` of a trusted source (see `scoring.read_update` for one that is not)."""
    # Cloned, because tensors inside a file start at any address, and vectorized sums may depend on alignment.
    return {name: tensor.clone() for name, tensor in sorted(safetensors.torch.load(data).items())}


def save_state(directory: Path, state: State) -> bytes:
    """Store the state in `directory` under its hash; return the hash."""
    return write_blob(directory, state_bytes(state))


def load_state(directory: Path, digest: bytes) -> State:
    """Read the state with this hash from `directory`; raises as `datasets.read_blob` does."""
    return state_from_bytes(read_blob(directory, digest))
