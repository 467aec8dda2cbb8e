"""Updates: what is encoded is read again, and every way in which a stranger's bytes are refused."""

import json
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from traincert.trainer.errors import Reason
from traincert.trainer.job import TrainingJob
from traincert.trainer.segments import Layout, Segment
from traincert.trainer.state import State, state_bytes, state_from_bytes, state_hash, state_of
from traincert.trainer.updates import CHUNK, Update, UpdateError, encode_update, max_norm, read_update

JOB = replace(TrainingJob.named("digits"), max_update_norm=5.0, density=1.0)
SEGMENT = Segment(2, 11, ("mean", "count"))
STATE: State = {"mean": torch.zeros(3), "count": torch.tensor(7)}
GOOD: State = {"move": torch.ones(9), "buffer.mean": torch.full((3,), 0.5), "buffer.count": torch.tensor(2)}

COMPRESSED = replace(JOB, density=0.5)
COMPRESSED_GOOD: State = state_from_bytes(
    encode_update(Update(torch.arange(9.0) / 5 - 1, {"mean": torch.ones(3), "count": torch.tensor(2)}), 0.5)[0]
)


def with_value(value: float, name: str = "move", good: State = GOOD) -> bytes:
    changed = good[name].clone()
    changed[1 if len(changed) > 1 else 0] = value
    return state_bytes({**good, name: changed})


def without(name: str, good: State = GOOD) -> bytes:
    return state_bytes({key: value for key, value in good.items() if key != name})


def with_header(change: Callable[[dict[str, object]], object], good: State = GOOD) -> bytes:
    data = state_bytes(good)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data[end:]


HOSTILE: list[tuple[Reason, bytes]] = [
    (Reason.WRONG_SHAPE, state_bytes({**GOOD, "buffer.mean": torch.ones(0)})),
    (Reason.TOO_LARGE, bytes(10_000)),
    (Reason.TOO_LARGE, state_bytes({**GOOD, "move": torch.ones(1000)})),
    (Reason.MALFORMED, b""),
    (Reason.MALFORMED, b"\xff" * 64),
    (Reason.MALFORMED, state_bytes(GOOD)[:-1]),
    (Reason.MALFORMED, state_bytes(GOOD) + b"\0"),
    (Reason.MALFORMED, with_header(lambda header: header.pop("move"))),
    (Reason.WRONG_NAMES, without("move")),
    (Reason.NOT_CANONICAL, state_bytes({**GOOD, "buffer.mean": torch.zeros(3)})),
    (Reason.WRONG_NAMES, state_bytes({**GOOD, "v": torch.ones(1)})),
    (Reason.WRONG_NAMES, state_bytes({"move": GOOD["move"], "\n" * 9: GOOD["buffer.mean"]})),
    (Reason.WRONG_NAMES, state_bytes({})),
    (Reason.WRONG_DTYPE, state_bytes({**GOOD, "move": GOOD["move"].double()})),
    (Reason.WRONG_DTYPE, state_bytes({**GOOD, "move": GOOD["move"].half()})),
    (Reason.WRONG_DTYPE, state_bytes({**GOOD, "buffer.count": torch.tensor(2.0)})),
    (Reason.WRONG_SHAPE, state_bytes({**GOOD, "move": torch.ones(3, 3)})),
    (Reason.WRONG_SHAPE, state_bytes({**GOOD, "move": torch.ones(8)})),
    (Reason.WRONG_SHAPE, state_bytes({**GOOD, "move": torch.ones(10)})),
    (Reason.WRONG_SHAPE, state_bytes({**GOOD, "buffer.mean": torch.ones(0, 3)})),
    (Reason.WRONG_SHAPE, state_bytes({**GOOD, "buffer.count": torch.tensor([2])})),
    (Reason.NOT_CANONICAL, with_header(lambda header: header.update(__metadata__={"a": "b"}))),
    (Reason.NOT_CANONICAL, with_header(lambda _: None)),  # the same header with other spaces
    (Reason.NOT_FINITE, with_value(math.nan)),
    (Reason.NOT_FINITE, with_value(math.inf)),
    (Reason.NOT_FINITE, with_value(-math.inf, "buffer.mean")),
    (Reason.NORM_TOO_LARGE, with_value(5.0)),
    (Reason.NORM_TOO_LARGE, with_value(3e38)),
]


def bomb(size: int) -> torch.Tensor:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = bytearray(packer.compress(bytes(size)) + packer.flush())
    return torch.frombuffer(data, dtype=torch.uint8)


def gaps(symbols: bytes) -> torch.Tensor:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return torch.frombuffer(bytearray(packer.compress(symbols) + packer.flush()), dtype=torch.uint8)


def with_gaps(tensor: torch.Tensor) -> bytes:
    return state_bytes({**COMPRESSED_GOOD, "gaps": tensor})


def joined(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors)


HOSTILE_COMPRESSED: list[tuple[Reason, bytes]] = [
    (Reason.TOO_LARGE, with_gaps(torch.ones(5000, dtype=torch.uint8))),
    (Reason.WRONG_NAMES, state_bytes(GOOD)),
    (Reason.WRONG_DTYPE, state_bytes({**COMPRESSED_GOOD, "scales": torch.ones(1, dtype=torch.float64)})),
    (Reason.WRONG_DTYPE, state_bytes({**COMPRESSED_GOOD, "gaps": torch.ones(3)})),
    (Reason.WRONG_SHAPE, state_bytes({**COMPRESSED_GOOD, "scales": torch.ones(2)})),
    (Reason.WRONG_SHAPE, state_bytes({**COMPRESSED_GOOD, "signs": torch.ones(2, dtype=torch.uint8)})),
    (Reason.WRONG_SHAPE, with_gaps(torch.ones(300, dtype=torch.uint8))),
    (Reason.WRONG_SHAPE, with_gaps(torch.ones(1, 3, dtype=torch.uint8))),
    (Reason.MALFORMED, with_gaps(torch.zeros(0, dtype=torch.uint8))),
    (Reason.MALFORMED, with_gaps(torch.full((9,), 255, dtype=torch.uint8))),
    (Reason.MALFORMED, with_gaps(COMPRESSED_GOOD["gaps"][:-1])),
    (Reason.MALFORMED, with_gaps(joined(COMPRESSED_GOOD["gaps"], torch.zeros(1, dtype=torch.uint8)))),
    (Reason.MALFORMED, with_gaps(gaps(b""))),  # no place at all
    (Reason.MALFORMED, with_gaps(gaps(bytes(3)))),  # one too few
    (Reason.MALFORMED, with_gaps(gaps(bytes(5)))),  # one too many
    (Reason.MALFORMED, with_gaps(gaps(b"\0\0\0\6"))),  # place 9 of 9
    (Reason.MALFORMED, with_gaps(gaps(b"\0\0\0\xff"))),  # no end
    (Reason.MALFORMED, with_gaps(gaps(b"\xff\xff\xff\xff\0\0\0\0"))),
    (Reason.MALFORMED, with_gaps(bomb(10_000))),
    (Reason.NOT_FINITE, with_value(math.nan, "scales", COMPRESSED_GOOD)),
    (Reason.NOT_CANONICAL, with_value(-1.0, "scales", COMPRESSED_GOOD)),
    (Reason.NOT_CANONICAL, state_bytes({**COMPRESSED_GOOD, "signs": torch.tensor([0b11111000], dtype=torch.uint8)})),
    (Reason.NORM_TOO_LARGE, with_value(100.0, "scales", COMPRESSED_GOOD)),
]


def read(data: bytes, job: TrainingJob) -> Update:
    """Read an update from bytes, and from memory that may be written to: both are the same, or refused alike."""
    writable = memoryview(bytearray(data))
    try:
        update = read_update(data, job, SEGMENT, STATE)
    except UpdateError as error:
        with pytest.raises(UpdateError, match=f"^{re.escape(str(error))}$"):
            read_update(writable, job, SEGMENT, STATE)
        raise
    same = read_update(writable, job, SEGMENT, STATE)
    assert state_bytes({"": same.move, **same.buffers}) == state_bytes({"": update.move, **update.buffers})
    return update


@pytest.mark.parametrize(("reason", "data"), HOSTILE, ids=[reason for reason, _ in HOSTILE])
def test_a_hostile_update_is_refused_with_its_reason(reason: Reason, data: bytes) -> None:
    assert read_update(state_bytes(GOOD), JOB, SEGMENT, STATE).buffers.keys() == {"mean", "count"}
    assert read_update(without("buffer.mean"), JOB, SEGMENT, STATE).buffers.keys() == {"count"}  # it did not change
    with pytest.raises(UpdateError) as caught:
        read(data, JOB)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("reason", "data"), HOSTILE_COMPRESSED, ids=[reason for reason, _ in HOSTILE_COMPRESSED])
def test_a_hostile_compressed_update_is_refused_with_its_reason(reason: Reason, data: bytes) -> None:
    assert read_update(state_bytes(COMPRESSED_GOOD), COMPRESSED, SEGMENT, STATE).move.count_nonzero() == 4
    with pytest.raises(UpdateError) as caught:
        read(data, COMPRESSED)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 500


def test_every_reason_about_an_updates_form_has_a_case() -> None:
    others = {
        Reason.WORKER_DIED,
        Reason.LATE,
        Reason.ABSENT,
        Reason.WITHHELD,
        Reason.BARRED,
        Reason.SPOT_CHECK_FAILED,
        Reason.IMPOSSIBLE_RESOURCES,
        Reason.WRONG_MEMORY,
        Reason.COPY,
        Reason.NOT_ITS_SHARD,
        Reason.NO_IMPROVEMENT,
        Reason.MEMORY_WITHHELD,
    }
    assert {reason for reason, _ in HOSTILE} == set(Reason) - others


def test_a_bomb_is_not_unpacked() -> None:
    """Of gaps that would unpack to more than there can be, no more than that is held in memory."""
    segment = Segment(0, 10_000_000)
    job = replace(JOB, density=0.01)
    good = state_from_bytes(encode_update(Update(torch.ones(segment.params)), job.density)[0])
    packed = bomb(100_000_000)
    assert len(packed) < 150_000
    with pytest.raises(UpdateError) as caught:
        read_update(state_bytes({**good, "gaps": packed}), job, segment, {})
    assert caught.value.reason == Reason.MALFORMED


def test_an_update_in_memory_is_not_copied() -> None:
    for good in (GOOD, state_from_bytes(without("buffer.mean"))):
        data = bytearray(state_bytes(good))
        update = read_update(memoryview(data), JOB, SEGMENT, STATE)
        data[:] = bytes(len(data))
        assert not update.move.any()
        assert not any(delta.any() for delta in update.buffers.values())


def test_the_norm_is_the_moves_and_may_reach_its_bound() -> None:
    data = state_bytes({**GOOD, "buffer.mean": torch.full((3,), 1e9)})
    assert read_update(data, replace(JOB, max_update_norm=3.0), SEGMENT, STATE)  # √9 ones
    with pytest.raises(UpdateError, match=r"L2 norm 3, at most 2\.9"):
        read_update(data, replace(JOB, max_update_norm=2.9), SEGMENT, STATE)


JOBS = st.sampled_from([(JOB, state_bytes(GOOD)), (COMPRESSED, state_bytes(COMPRESSED_GOOD))])


@given(JOBS, st.binary(max_size=300))
def test_any_bytes_are_refused_and_nothing_else_happens(case: tuple[TrainingJob, bytes], data: bytes) -> None:
    with pytest.raises(UpdateError):
        read(data, case[0])


@given(JOBS, st.binary(max_size=300), st.data())
def test_any_bytes_after_the_header_are_refused_or_are_canonical(
    case: tuple[TrainingJob, bytes], body: bytes, data: st.DataObject
) -> None:
    job, good = case
    end = 8 + int.from_bytes(good[:8], "little")
    start = data.draw(st.integers(end, len(good)))
    changed = (good[:start] + body)[: len(good)].ljust(len(good), b"\0")
    read_or_refuse(changed, job)


@given(JOBS, st.integers(0), st.integers(1, 255))
def test_any_changed_byte_is_refused_or_is_another_canonical_update(
    case: tuple[TrainingJob, bytes], position: int, change: int
) -> None:
    changed = bytearray(case[1])
    changed[position % len(changed)] ^= change
    read_or_refuse(bytes(changed), replace(case[0], max_update_norm=1e30))


@given(JOBS, st.integers(1))
def test_a_truncated_update_is_refused(case: tuple[TrainingJob, bytes], left_out: int) -> None:
    with pytest.raises(UpdateError):
        read(case[1][: -(left_out % len(case[1])) or -1], case[0])


@given(st.binary(max_size=9))
def test_any_gaps_are_refused_or_are_places(symbols: bytes) -> None:
    read_or_refuse(with_gaps(gaps(symbols)), COMPRESSED)


def read_or_refuse(data: bytes, job: TrainingJob) -> None:
    try:
        update = read(data, job)
    except UpdateError:
        return
    assert update.move.shape == (SEGMENT.params,)
    assert update.move.isfinite().all()
    assert state_bytes(state_from_bytes(data)) == data


SIZES = st.sampled_from([1, 2, 7, 8, 9, 255, 256, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
DENSITIES = st.sampled_from([1e-9, 0.001, 1 / 64, 0.1, 0.5, 0.999, 1.0])


@given(SIZES, DENSITIES, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 0.99]))
def test_what_is_encoded_is_read_again(size: int, density: float, seed: int, zeros: float) -> None:
    generator = np.random.RandomState(seed)
    values = generator.standard_t(2, size).astype(np.float32) * (generator.rand(size) >= zeros)
    move = torch.from_numpy(values.astype(np.float32))
    update = Update(move.clone(), {"mean": torch.ones(3), "count": torch.tensor(-3)})
    job = replace(JOB, density=density, max_update_norm=1e30)
    data, sent = encode_update(update, density)
    again = read_update(data, job, Segment(0, size, SEGMENT.buffers), STATE)
    assert torch.equal(again.move, sent)
    assert torch.equal(update.move, move)
    assert again.buffers["mean"].tolist() == [1, 1, 1]
    assert int(again.buffers["count"]) == -3
    if density == 1:
        assert torch.equal(sent, move)
        return
    kept = max(1, math.floor(density * size))
    assert int(sent.count_nonzero()) <= kept
    travels = sent != 0
    assert torch.equal(sent[travels].sign(), torch.where(move[travels] > 0, 1.0, -1.0))
    if travels.any() and not travels.all():  # the greatest travel
        assert move[travels].abs().min() >= move[~travels].abs().max()
    for start in range(0, size, CHUNK):
        part, original = sent[start : start + CHUNK], move[start : start + CHUNK]
        if part.any():
            magnitude = original[part != 0].double().abs().mean()
            torch.testing.assert_close(part[part != 0].abs().double(), magnitude.expand(int(part.count_nonzero())))


@given(st.integers(1, 500), st.data())
def test_any_places_are_encoded_and_read_again(size: int, data: st.DataObject) -> None:
    places = data.draw(st.sets(st.integers(0, size * 10 - 1), min_size=size, max_size=size))
    move = torch.zeros(size * 10)
    move[sorted(places)] = 1.0
    encoded, sent = encode_update(Update(move), 0.1)
    assert torch.equal(sent, move)
    again = read_update(encoded, replace(JOB, density=0.1, max_update_norm=1e30), Segment(0, size * 10), {})
    assert torch.equal(again.move, move)


@settings(max_examples=20)
@given(st.sampled_from([1 / 32, 0.1, 0.5]), st.integers(0, 9))
def test_a_compressed_update_is_much_smaller(density: float, seed: int) -> None:
    move = torch.randn(50_000, generator=torch.Generator().manual_seed(seed))
    data, _ = encode_update(Update(move), density)
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert len(data) < 1024 + 1.1 * (entropy + density) * len(move) / 8


def test_a_number_that_is_none_is_seen_by_whoever_reads_the_update() -> None:
    for value in (math.nan, math.inf, -math.inf):
        move = torch.zeros(100)
        move[5] = value
        for density in (1.0, 0.02):
            data, _ = encode_update(Update(move), density)
            with pytest.raises(UpdateError) as caught:
                read_update(data, replace(JOB, density=density), Segment(0, 100), {})
            assert caught.value.reason == Reason.NOT_FINITE


def test_encoding_is_a_function_of_the_values() -> None:
    """Values that are equal are taken from the first on; hashes in a chain depend on it."""
    move = torch.ones(10)
    data, sent = encode_update(Update(move), 0.3)
    assert sent.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert encode_update(Update(move.clone()), 0.3)[0] == data


def test_an_applied_update_changes_the_segment_and_its_buffers_and_a_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    layout, state = Layout(model), state_of(model)
    before = state_hash(state)
    segment = layout.segment(5, 17)
    buffers = {"1.running_mean": torch.ones(3), "1.num_batches_tracked": torch.tensor(4)}
    assert set(segment.buffers) == {*buffers, "1.running_var"}
    after = Update(torch.full((12,), 0.5), buffers).applied(layout, segment, state)
    assert state_hash(state) == before
    whole = Segment(0, layout.params)
    moved = layout.flatten(after, whole) - layout.flatten(state, whole)
    expected = torch.zeros(layout.params)
    expected[5:17] = 0.5
    torch.testing.assert_close(moved, expected)
    assert after["1.running_mean"].tolist() == [1, 1, 1]
    assert after["1.num_batches_tracked"].dtype == torch.int64
    assert int(after["1.num_batches_tracked"]) == 4


def test_a_share_of_an_update_is_that_of_each_value() -> None:
    buffers = {"mean": torch.tensor([1.0, 3.0]), "count": torch.tensor(5)}
    quarter = Update(torch.tensor([1.0, -2.0]), buffers).scaled(0.25)
    assert quarter.move.tolist() == [0.25, -0.5]
    assert quarter.buffers["mean"].tolist() == [0.25, 0.75]
    assert quarter.buffers["count"].dtype == torch.int64
    assert int(quarter.buffers["count"]) == 1


def test_the_greatest_norm_grows_with_the_parameters_unless_it_is_set() -> None:
    free = replace(JOB, max_update_norm=None)
    assert max_norm(free, Segment(0, 50)) == 10
    assert max_norm(free, Segment(10, 4_000_010)) == 2000
    assert max_norm(JOB, Segment(0, 4_000_000)) == 5
