"""A model's state, parameters and buffers, as canonical bytes and their hash."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn

from traincert.trainer.errors import JobError
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.store import verify_blob, write_blob

# PyTorch reads this when it first allocates a tensor: big tensors then are in huge pages, also where Linux gives those
# only to who asks. Getting memory page by page takes half of the time that a big model's cycle takes beside training.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

State = Mapping[str, torch.Tensor]
"""Tensors by name, on the CPU. A state is never changed in place."""

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in safetensors, in the order in which that library writes tensors."""


def initial_state(job: TrainingJob) -> State:
    """Return the state that the first cycle starts from: the file `job.initial_model`, or random from `job.seed`.

    Raises JobError if the file cannot be read, or its tensors do not fit the job's model.
    """
    fresh = state_of(build_model(job))
    return _read_model(job.initial_model, fresh) if job.initial_model else fresh


def _read_model(path: str, expected: State) -> State:
    try:
        state = state_from_bytes(Path(path).read_bytes())
    except OSError as error:
        raise JobError(f"initial_model = {path!r}: {error.strerror}") from None
    except safetensors.SafetensorError as error:
        raise JobError(f"initial_model = {path!r}: is not a safetensors file: {error}") from None
    if state.keys() != expected.keys():
        raise JobError(f"initial_model = {path!r}: has the tensors {sorted(state)}, the model has {sorted(expected)}")
    for name, tensor in expected.items():
        found = state[name]
        if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            raise JobError(
                f"initial_model = {path!r}: {name} is {found.dtype} {tuple(found.shape)}, the model's is "
                f"{tensor.dtype} {tuple(tensor.shape)}"
            )
    return state


def state_of(model: nn.Module) -> State:
    """Return a copy of a model's parameters and persistent buffers. A tied parameter is in it once."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    tensors = dict[str, torch.Tensor](model.named_parameters()) | buffers
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def set_state(model: nn.Module, state: State) -> None:
    """Copy `state`, as `state_of` returns it, into a model of the same job."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in state.items():
            tensors[name].copy_(tensor)


def state_bytes(tensors: State) -> bytes:
    """Encode tensors as canonical safetensors: equal names, dtypes, shapes and values give equal bytes.

    They are the bytes that the safetensors library writes. Tensors are sorted by their dtype, large ones first, then by
    name. There is no metadata. NaNs keep their bits, and -0.0 differs from 0.0.
    """
    return b"".join(state_parts(tensors))


def state_parts(tensors: State) -> list[memoryview]:
    """Return `state_bytes` in parts: the header, then the bytes of each tensor. They are not copied: models are big."""
    parts = [memoryview(_header(tensors))]
    for tensor in _ordered(tensors).values():
        parts.append(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return parts


def state_views(data: memoryview, like: State) -> State | None:
    """Return the tensors whose `state_bytes` are `data`, without copying them. `data` must be writable.

    Returns None if they do not have the names, dtypes and shapes of `like`, whose tensors may be on the device "meta".
    """
    end = len(header := _header(like))
    if data[:end] != header or len(data) != end + sum(tensor.nbytes for tensor in like.values()):
        return None
    found = {}
    for name, tensor in _ordered(like).items():
        begin, end = end, end + tensor.nbytes
        found[name] = torch.from_numpy(np.frombuffer(data[begin:end], np.uint8)).view(tensor.dtype).view(tensor.shape)
    return dict(sorted(found.items()))


def _ordered(tensors: State) -> State:
    """Sort tensors as the safetensors library does."""
    order = list(_DTYPES)
    return dict(sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])))


def _header(tensors: State) -> bytes:
    """Return how the tensors' `state_bytes` begin. It says where each tensor is."""
    header, end = {}, 0
    for name, tensor in _ordered(tensors).items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def state_hash(tensors: State) -> bytes:
    """Return the SHA-256 of the tensors' `state_bytes`, 32 raw bytes."""
    hashed = hashlib.sha256()
    for part in state_parts(tensors):
        hashed.update(part)
    return hashed.digest()


def state_from_bytes(data: bytes) -> State:
    """Decode the result of `state_bytes`, from a trusted source. For untrusted bytes use `updates.read_update`."""
    return _aligned(safetensors.torch.load(data))


def _aligned(tensors: State) -> State:
    # Clone: tensors inside a file start at any address, and the bits of vectorized sums may depend on alignment.
    return {name: tensor.clone() for name, tensor in sorted(tensors.items())}


def save_state(directory: Path, state: State) -> bytes:
    """Store the state in `directory` under its SHA-256; return the hash, 32 bytes."""
    return write_blob(directory, *state_parts(state))


def load_state(directory: Path, digest: bytes) -> State:
    """Read the state with this SHA-256 (32 bytes) from `directory`. Raises as `store.verify_blob` does."""
    return _aligned(safetensors.torch.load_file(verify_blob(directory, digest)))
