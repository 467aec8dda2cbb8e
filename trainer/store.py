"""Content-addressed files: a file's name is the SHA-256 of its bytes, in hex.

Each read checks the file against its name.
"""

import hashlib
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

from traincert.trainer.errors import IntegrityError


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write `data` to the file `path`, durably (fsync) and atomically."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(directory: Path) -> None:
    """Make renames in a directory durable (fsync)."""
    folder = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_blob(directory: Path, data: bytes) -> bytes:
    """Store `data` in `directory` under its hash, as `write_file` does; return the hash, 32 bytes."""
    digest = hashlib.sha256(data).digest()
    write_file(directory / digest.hex(), data)
    return digest


def read_blob(directory: Path, digest: bytes) -> bytes:
    """Read the file whose SHA-256 is `digest` (32 bytes) from `directory`.

    Raises IntegrityError if the file is missing, or its bytes have another hash.
    """
    path = directory / digest.hex()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file") from None
    _compare(path, hashlib.sha256(data).hexdigest())
    return data


def verify_blob(directory: Path, digest: bytes) -> Path:
    """Check a file as `read_blob` does, but without reading all of it into memory; return its path."""
    path = directory / digest.hex()
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file") from None
    _compare(path, found)
    return path


def prune(directory: Path, kept: Collection[bytes]) -> None:
    """Remove all files whose hash is not in `kept`, among them the temporary files of killed processes."""
    names = {digest.hex() for digest in kept}
    for path in directory.iterdir():
        if path.name not in names:
            path.unlink()


def _compare(path: Path, found: str) -> None:
    if found != path.name:
        raise IntegrityError(f"{path}: the file's SHA-256 is {found}, not its name")
