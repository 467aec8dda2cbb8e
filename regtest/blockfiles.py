"""Reads a node's block files, blocks/blk00000.dat and so on: also when the node does not run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

TIME = 68
"""The offset of nTime in a block, in bytes."""


def last_file(chain_dir: Path) -> Path | None:
    """Return the block file that is being written; None if there is none."""
    return max((chain_dir / "blocks").glob("blk*.dat"), default=None)


def last_block(path: Path) -> int:
    """Return the offset, in bytes, of the last block in a block file. The file must have a block."""
    return list(_blocks(path.read_bytes(), _key(path)))[-1]


def newest_time(chain_dir: Path) -> int:
    """Return the greatest nTime of the blocks in the last block file, in Unix seconds; 0 if there is none."""
    path = last_file(chain_dir)
    if path is None:
        return 0
    data, key = path.read_bytes(), _key(path)
    return max((_number(data, key, start + TIME) for start in _blocks(data, key)), default=0)


def _blocks(data: bytes, key: bytes) -> Iterator[int]:
    """Yield the offset of each block. The message start and the block's size come before it (node/blockstorage.cpp)."""
    magic, start = _number(data, key, 0), 0
    while start + 8 + TIME + 4 <= len(data) and _number(data, key, start) == magic:
        yield start + 8
        start += 8 + _number(data, key, start + 4)


def _number(data: bytes, key: bytes, start: int) -> int:
    word = bytes(byte ^ key[i % len(key)] for i, byte in enumerate(data[start : start + 4], start))
    return int.from_bytes(word, "little")


def _key(path: Path) -> bytes:
    key_file = path.with_name("xor.dat")  # since Bitcoin Core 28, block files are XORed with this key
    return key_file.read_bytes() if key_file.exists() else bytes(8)
