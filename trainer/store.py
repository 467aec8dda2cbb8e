"""Content-addressed files: a file's name is the SHA-256 of its bytes, in hex.

Each read checks the file against its name.
"""

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from traincert.trainer.errors import IntegrityError


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write `data` to the file `path`, durably (fsync) and atomically."""
    _write(path.parent, [data], lambda: path.name, mode, durable=True)


def write_blob(directory: Path, *parts: bytes | memoryview, durable: bool = True) -> bytes:
    """Store the parts, one after the other, as one file of `directory` under its hash; return the hash, 32 bytes.

    It is written as by `write_file`; but without `durable` a power failure may damage it.
    """
    with ThreadPoolExecutor(1) as pool:  # hash while the file is written: both take long for a big model
        digest = pool.submit(_hash, parts)
        _write(directory, parts, lambda: digest.result().hex(), 0o600, durable=durable)
    return digest.result()


def _hash(parts: Iterable[bytes | memoryview]) -> bytes:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.digest()


def _write(
    folder: Path, parts: Iterable[bytes | memoryview], name: Callable[[], str], mode: int, *, durable: bool
) -> None:
    """Write the parts to a file of `folder`, atomically. `name` is called at the end."""
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            for part in parts:
                file.write(part)
            file.flush()
            if durable:
                begin_writeback(handle)
            path = folder / name()
            if durable:
                os.fsync(handle)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if durable:
        sync(folder)


def begin_writeback(file: int, offset: int = 0, size: int = 0) -> None:
    """Have the kernel begin to write `size` bytes of a file to the disk; 0: all from `offset` on.

    A later fsync takes less time then. It is a hint, so errors do not matter. Only Linux has it (sync_file_range).
    """
    if _SYNC_FILE_RANGE:
        _SYNC_FILE_RANGE(file, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def map_blob(directory: Path, digest: bytes) -> memoryview:
    """Map a file into memory, see `map_file`, and check it as `read_blob` does."""
    path = directory / digest.hex()
    try:
        data = map_file(path)
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file") from None
    _compare(path, hashlib.sha256(data).hexdigest())
    return data


def map_file(path: Path) -> memoryview:
    """Map a file into memory. What is written to the memory does not change the file.

    Unlike Python's `mmap`, this keeps no file open: there may be as many as there are miners. Raises OSError.
    """
    import torch  # here: programs that need the other functions only do not wait for it

    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0)
    return mapped.numpy().data


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


def prune(directory: Path, kept: Iterable[bytes]) -> None:
    """Remove all files whose hash is not in `kept`, among them the temporary files of killed processes."""
    names = {digest.hex() for digest in kept}
    for path in directory.iterdir():
        if path.name not in names:
            path.unlink()


def _compare(path: Path, found: str) -> None:
    if found != path.name:
        raise IntegrityError(f"{path}: the file's SHA-256 is {found}, not its name")
