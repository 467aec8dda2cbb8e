"""Content-addressed files: named by their hash, never half-written, checked when read."""

import hashlib
from pathlib import Path

import pytest

from traincert.trainer.errors import IntegrityError
from traincert.trainer.store import map_blob, prune, read_blob, verify_blob, write_blob, write_file


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    digest = write_blob(tmp_path, b"data")
    assert digest == hashlib.sha256(b"data").digest()
    assert write_blob(tmp_path, b"data") == digest
    assert [path.name for path in tmp_path.iterdir()] == [digest.hex()]
    assert read_blob(tmp_path, digest) == b"data"
    assert verify_blob(tmp_path, digest).read_bytes() == b"data"
    assert bytes(map_blob(tmp_path, digest)) == b"data"
    assert bytes(map_blob(tmp_path, write_blob(tmp_path))) == b""


def test_who_writes_to_a_mapped_file_does_not_change_it(tmp_path: Path) -> None:
    digest = write_blob(tmp_path, b"data")
    map_blob(tmp_path, digest)[0] = 0
    assert read_blob(tmp_path, digest) == b"data"


def test_a_mapped_file_may_be_removed(tmp_path: Path) -> None:
    digest = write_blob(tmp_path, b"data")
    data = map_blob(tmp_path, digest)
    prune(tmp_path, [])
    assert bytes(data) == b"data"


@pytest.mark.parametrize("change", [b"dat", b"data\0", b"Data", b""])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, change: bytes) -> None:
    path = tmp_path / write_blob(tmp_path, b"data").hex()
    path.write_bytes(change)
    for read in (read_blob, map_blob, verify_blob):
        with pytest.raises(IntegrityError, match=f"^{path}: the file's SHA-256 is [0-9a-f]{{64}}, not its name$"):
            read(tmp_path, bytes.fromhex(path.name))
    write_blob(tmp_path, b"data")
    assert read_blob(tmp_path, bytes.fromhex(path.name)) == b"data"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_blob, map_blob, verify_blob):
        with pytest.raises(IntegrityError, match=f"{'00' * 32}: no such file"):
            read(tmp_path, bytes(32))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / hashlib.sha256(b"test").hexdigest()).mkdir()  # in the way
    with pytest.raises(IsADirectoryError):
        write_blob(tmp_path, b"test")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """An open file stays what it was, so that one which is replaced is never seen half-written."""
    path = tmp_path / "file"
    write_file(path, b"old")
    with path.open("rb") as file:
        write_file(path, b"new data")
        assert file.read() == b"old"
    assert path.read_bytes() == b"new data"
    assert len(list(tmp_path.iterdir())) == 1


def test_pruning_leaves_what_is_kept_and_nothing_else(tmp_path: Path) -> None:
    kept, _other = write_blob(tmp_path, b"kept"), write_blob(tmp_path, b"other")
    (tmp_path / ".writing-abc").write_bytes(b"half")  # of a process that was killed
    prune(tmp_path, [kept, bytes(32)])
    assert [path.name for path in tmp_path.iterdir()] == [kept.hex()]
