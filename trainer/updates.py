"""A miner's update, the change of one segment: encode it, and read it from untrusted bytes.

With density 1 an update has all values, as float32. Below 1 it is compressed: it has the k values of greatest
magnitude (top-k), as in DeMo (arXiv 2411.19870) and SparseLoCo (arXiv 2508.15706). Each is sent as its sign, with one
magnitude for each chunk of values, as in EF-SGD (arXiv 1901.09847). The miner keeps the residual, which it did not
send, for its next task (error feedback). Unlike in these papers, the next task starts from the model plus the residual.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import safetensors
import torch

from traincert.trainer.determinism import deterministic
from traincert.trainer.errors import Reason, TrainerError
from traincert.trainer.job import TrainingJob
from traincert.trainer.segments import Layout, Segment
from traincert.trainer.state import State, state_bytes, state_parts, state_views

CHUNK = 4096  # values that share one magnitude
_SKIP = 255  # a byte of a gap: skip 255 values, and the gap goes on in the next byte
_BUFFER = "buffer."


class UpdateError(TrainerError):
    """An update is refused. `reason` names the kind; `detail` says what was expected and what was found."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Update:
    """The change of a segment: what a task added to its parameters and buffers."""

    move: torch.Tensor  # (params,) float32
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)  # those that changed; as `change` returns it

    @cached_property
    def norm(self) -> float:
        """The L2 norm of the move."""
        return l2_norm(self.move)

    def scaled(self, share: float) -> "Update":
        """Return the change times `share`, 0 to 1. Integers are rounded."""
        if share == 1:
            return self
        buffers = {
            name: delta * share if delta.is_floating_point() else (delta.double() * share).round().to(delta.dtype)
            for name, delta in self.buffers.items()
        }
        return Update(self.move * share, buffers)

    def applied(self, layout: Layout, segment: Segment, state: State) -> State:
        """Return a new state: `state` plus this change of `segment`."""
        changed = dict(layout.add(state, segment, self.move))
        for name, delta in self.buffers.items():
            before = state[name]
            values = _numbers(before) + delta
            if before.is_complex():
                changed[name] = torch.view_as_complex(values).to(before.dtype)
            else:
                changed[name] = values.to(before.dtype)
        return changed


def change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return a buffer's change.

    It is float32, float64 for a buffer of float64, or int64 for one of integers or bools. For a complex buffer (...) it
    is (..., 2): real and imaginary parts.
    """
    return _numbers(after) - _numbers(before)


def _numbers(buffer: torch.Tensor) -> torch.Tensor:
    if buffer.is_complex():
        return torch.view_as_real(buffer.resolve_conj())
    if buffer.is_floating_point():
        return buffer.to(torch.promote_types(buffer.dtype, torch.float32))
    return buffer.long()


def encode_update(update: Update, density: float) -> tuple[bytes, torch.Tensor]:
    """Return an update's bytes, and the move that `read_update` gets from them, (params,) float32.

    The bytes are canonical safetensors. They have the share `density` of the move's values (0 to 1).
    """
    buffers = {_BUFFER + name: delta for name, delta in update.buffers.items()}
    if density == 1:
        return state_bytes({"move": update.move, **buffers}), update.move
    values = update.move.numpy()
    # NaN ranks highest. It is therefore sent, and the reader refuses the update.
    magnitudes = np.nan_to_num(np.abs(values), nan=np.inf, posinf=np.inf)
    kept = _greatest(magnitudes, _kept(len(values), density))
    chunks = kept // CHUNK
    count = -(-len(values) // CHUNK)
    # bincount adds one by one, in order: every machine gets the same bits.
    sums = np.bincount(chunks, magnitudes[kept].astype(np.float64), count)
    scales = (sums / np.maximum(np.bincount(chunks, minlength=count), 1)).astype(np.float32)
    positive = values[kept] > 0
    tensors = {
        "gaps": torch.frombuffer(bytearray(_pack_gaps(kept)), dtype=torch.uint8),
        "signs": torch.from_numpy(np.packbits(positive)),
        "scales": torch.from_numpy(scales),
    }
    return state_bytes(tensors | buffers), torch.from_numpy(_unpack(len(values), kept, positive, scales))


@deterministic()
def read_update(data: bytes | memoryview, job: TrainingJob, segment: Segment, state: State) -> Update:
    """Check and decode `data`, the untrusted bytes of an update of `segment`. Cheap checks come first.

    The update may refer to `data`, which must not change then.

    Raises UpdateError if the tensors have other names, dtypes or shapes than the job asks for, are not in canonical
    safetensors, or are not finite, or if the move's L2 norm is above `max_norm`.
    """
    expected = _expected(job, segment, state)
    # Allow twice the expected size: an update with wrong names or wider dtypes then gets that as its reason.
    limit = 1024 + 2 * sum(math.prod(shape) * _DTYPES[dtype].itemsize for dtype, shape in expected.values())
    if len(data) > limit:
        raise UpdateError(Reason.TOO_LARGE, f"{len(data)} bytes, at most {limit} are read")
    tensors = _views(data, expected) or _decoded(data, expected)
    for name, tensor in tensors.items():
        if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):  # NaN is the bound of all
            raise UpdateError(Reason.NOT_FINITE, f"{name} has a value that is NaN or infinite")
    move = tensors["move"] if job.density == 1 else _read_compressed(tensors, segment.params, job.density)
    buffers = {name.removeprefix(_BUFFER): each for name, each in tensors.items() if name.startswith(_BUFFER)}
    for name, delta in buffers.items():
        if not delta.any():
            raise UpdateError(Reason.NOT_CANONICAL, f"{_BUFFER}{name}: a buffer that did not change")
    update = Update(move, buffers)
    if update.norm > (most := max_norm(job, segment)):
        raise UpdateError(Reason.NORM_TOO_LARGE, f"L2 norm {update.norm:g}, at most {most:g} (max_update_norm)")
    return update


def _views(data: bytes | memoryview, expected: Mapping[str, tuple[str, list[int]]]) -> State | None:
    """Return the tensors that are in `data`, without copying them: updates are big. None if they are not as expected.

    It is None, too, if there are gaps, whose number is not known, or if nobody may write to `data`, as torch might.
    """
    if (data := memoryview(data)).readonly:
        return None
    header = bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    like = {
        name: torch.empty(shape, dtype=_DTYPES[dtype], device="meta")
        for name, (dtype, shape) in expected.items()
        if not name.startswith(_BUFFER) or f'"{name}":'.encode() in header  # a buffer that did not change is not there
    }
    return state_views(data, like)


def _decoded(data: bytes | memoryview, expected: Mapping[str, tuple[str, list[int]]]) -> State:
    """Return a copy of the tensors that are in `data`. Raises UpdateError if they are not as expected."""
    try:
        read = dict(safetensors.deserialize(bytes(data)))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise UpdateError(Reason.MALFORMED, str(error)[:200]) from None
    found = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in read.items()}
    required = {name for name in expected if not name.startswith(_BUFFER)}
    if not required <= found.keys() <= expected.keys():
        raise UpdateError(Reason.WRONG_NAMES, f"expected {sorted(expected)}, found {repr(sorted(found))[:200]}")
    for name, (dtype, shape) in expected.items():
        if name not in found:  # a buffer that did not change
            continue
        if found[name][0] != dtype:
            raise UpdateError(Reason.WRONG_DTYPE, f"{name}: expected {dtype}, found {found[name][0]}")
        right = (
            len(found[name][1]) == 1 and found[name][1][0] <= shape[0] if name == "gaps" else found[name][1] == shape
        )
        if not right:
            raise UpdateError(Reason.WRONG_SHAPE, f"{name}: expected {shape}, found {str(found[name][1])[:200]}")
    tensors = {
        name: torch.from_numpy(np.frombuffer(tensor["data"], np.uint8))
        .view(_DTYPES[tensor["dtype"]])
        .view(tensor["shape"])
        for name, tensor in sorted(read.items())
    }
    # The header says where each tensor is. So the whole encoding is canonical if the header is.
    header = state_parts(tensors)[0]
    if data[: len(header)] != header:
        raise UpdateError(Reason.NOT_CANONICAL, "the same tensors have another encoding")
    return tensors


def l2_norm(move: torch.Tensor) -> float:
    """Return a move's L2 norm, computed in float64. Processors may differ in its last bits."""
    return math.hypot(*(float(part.double().norm()) for part in torch.split(move, _BLOCK)))


def max_norm(job: TrainingJob, segment: Segment) -> float:
    """Return the greatest L2 norm that the move of an update of `segment` may have."""
    return job.max_update_norm or max(10.0, math.sqrt(segment.params))


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "I64": torch.int64, "U8": torch.uint8}
_BLOCK = 2**16  # values at a time: they stay in the processor's cache


def _expected(job: TrainingJob, segment: Segment, state: State) -> dict[str, tuple[str, list[int]]]:
    """Return the dtype and shape of each tensor of an update. The shape of "gaps" is the greatest allowed."""
    tensors: dict[str, tuple[str, list[int]]]
    if job.density == 1:
        tensors = {"move": ("F32", [segment.params])}
    else:
        kept = _kept(segment.params, job.density)
        tensors = {
            "gaps": ("U8", [_most_bytes(segment.params, kept)]),
            "signs": ("U8", [-(-kept // 8)]),
            "scales": ("F32", [-(-segment.params // CHUNK)]),
        }
    for name in segment.buffers:
        numbers = _numbers(state[name])
        dtype = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64"}[numbers.dtype]
        tensors[_BUFFER + name] = (dtype, list(numbers.shape))
    return tensors


def _read_compressed(tensors: State, params: int, density: float) -> torch.Tensor:
    kept_count = _kept(params, density)
    kept = _unpack_gaps(tensors["gaps"].numpy().tobytes(), params, kept_count)
    signs = np.unpackbits(tensors["signs"].numpy())
    if signs[kept_count:].any():
        raise UpdateError(Reason.NOT_CANONICAL, "signs: bits after the last value")
    scales = tensors["scales"].numpy()
    if (scales < 0).any():
        raise UpdateError(Reason.NOT_CANONICAL, "scales: a magnitude below 0")
    return torch.from_numpy(_unpack(params, kept, signs[:kept_count].astype(np.bool_), scales))


def _kept(params: int, density: float) -> int:
    """Return how many of a segment's values an update has."""
    return max(1, math.floor(density * params))


def _greatest(magnitudes: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Return the places of the `count` greatest values, rising. Of equal values the first come first."""
    least = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]
    above = np.flatnonzero(magnitudes > least)
    equal = np.flatnonzero(magnitudes == least)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _unpack(
    params: int, kept: npt.NDArray[np.int64], positive: npt.NDArray[np.bool_], scales: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    values = np.zeros(params, np.float32)
    values[kept] = np.where(positive, scales[kept // CHUNK], -scales[kept // CHUNK])
    return values


def _pack_gaps(kept: npt.NDArray[np.int64]) -> bytes:
    """Encode rising places as gaps, the number of values between two, with Huffman coding (raw DEFLATE).

    A gap is its quotient by 255 in bytes of 255, then a byte with the remainder. Huffman's code is near their entropy.
    """
    gaps = np.diff(kept, prepend=-1) - 1
    ends = np.cumsum(gaps // _SKIP + 1) - 1
    symbols = np.full(ends[-1] + 1, _SKIP, np.uint8)
    symbols[ends] = gaps % _SKIP
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(symbols.tobytes()) + packer.flush()


def _unpack_gaps(data: bytes, params: int, count: int) -> npt.NDArray[np.int64]:
    """Decode the result of `_pack_gaps`. Raises UpdateError if it is not `count` rising places below `params`."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        symbols = np.frombuffer(unpacker.decompress(data, count + params // _SKIP + 1), np.uint8)
    except zlib.error as error:
        raise UpdateError(Reason.MALFORMED, f"gaps: {error}") from None
    ends = np.flatnonzero(symbols != _SKIP)
    whole = unpacker.eof and not unpacker.unused_data and len(ends) == count and ends[-1] == len(symbols) - 1
    places = np.cumsum(symbols, dtype=np.int64)[ends] + np.arange(len(ends))
    if not whole or places[-1] >= params:
        raise UpdateError(Reason.MALFORMED, f"gaps: not {count} places among {params}")
    return places


def _most_bytes(params: int, kept: int) -> int:
    """Return a bound of the length of `_pack_gaps`: DEFLATE adds little to any data (RFC 1951, section 3.2.4)."""
    return 64 + 2 * (kept + params // _SKIP + 1)
