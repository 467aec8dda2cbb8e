"""The blocks in a node's block files: blk00000.dat and so on, in its folder regtest/blocks. The node may run.

A file has records: a magic, the block's size, the block. Blocks are there in the order in which they arrived, those of
stale branches, too. After the last one come zeros, or remains of older records. Since Bitcoin Core 28 each byte is
XORed with a byte of xor.dat, in turn. Source: Bitcoin Core's node/blockstorage.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bitcoin import RegTestParams

from traincert.bridge.chain import GENESIS, HEADER_SIZE, header_hash, parse_block, previous_hash
from traincert.bridge.errors import BridgeError

_MAGIC: bytes = RegTestParams.MESSAGE_START
_MAX_BLOCK_SIZE = 4_000_000  # bytes: Bitcoin Core's MAX_BLOCK_SERIALIZED_SIZE
_PIECE = 1 << 20  # bytes that are XORed at once
_UNWRITTEN = bytes(64)  # a block may end with zeros, but hardly with so many


class BlockFiles:
    """The blocks in a folder of block files. Hashes are as RPC shows them.

    `height_of` gives the height of a block that was verified before, or None. With it a chain may begin above blocks
    that are not in the files any more.

    `loose` are the blocks that follow none of the others, nor one that was verified before.

    Raises BridgeError if the folder has no block files, and OSError if they cannot be read.
    """

    def __init__(self, folder: Path, height_of: Callable[[str], int | None] = lambda _: None) -> None:
        self.name = str(folder)
        files = sorted(folder.glob("blk[0-9]*.dat"))
        if not files:
            raise BridgeError(f"{folder} has no blk00000.dat: it must be the folder regtest/blocks of a node")
        self._key = _read_key(folder / "xor.dat")
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[Path, int, int]] = {}  # file, and the block's offset and size there
        for path in files:
            self._read_file(path, is_last=path == files[-1])
        self._heights, self.loose = self._connect(height_of)

    def headers(self, block_hash: str) -> Iterator[bytes]:
        """Give the headers of a block and of those below it, 80 bytes each. Raises BridgeError if one is missing."""
        while True:
            if block_hash not in self._headers:
                raise BridgeError(f"{self.name} has no block {block_hash}")
            yield self._headers[block_hash]
            block_hash = previous_hash(self._headers[block_hash])

    def blocks(self, hashes: Iterable[str]) -> Iterator[bytes]:
        """Give the bytes of blocks."""
        for block_hash in hashes:
            path, offset, size = self._places[block_hash]
            with path.open("rb") as file:
                file.seek(offset)
                yield self._plain(file.read(size), offset)

    def tips(self, last: int | None = None) -> list[str]:
        """Return the last blocks of the longest chains, in the order of their arrival.

        The first whose chain is valid is a node's tip. With `last` the chains end at this height.

        Raises BridgeError if even the longest chain ends below `last`.
        """
        longest = max(self._heights.values())
        if last is not None and last > longest:
            raise BridgeError(f"{self.name} has no block {last}: its longest chain ends at block {longest}")
        tips = [each for each in self._headers if self._heights.get(each) == longest] or [GENESIS]
        for _ in range(longest - (longest if last is None else last)):
            tips = list(dict.fromkeys(previous_hash(self._headers[each]) for each in tips))
        return tips

    def describe(self, block_hash: str) -> str:
        """Return in which file one of the blocks is, and after which block it belongs, in words."""
        path, offset, _ = self._places[block_hash]
        return f"block {block_hash}, at {offset} in {path}, follows {previous_hash(self._headers[block_hash])}"

    def _connect(self, height_of: Callable[[str], int | None]) -> tuple[dict[str, int], list[str]]:
        heights, loose, children = {GENESIS: 0}, [], dict[str, list[str]]()
        for block_hash, header in self._headers.items():
            previous = previous_hash(header)
            children.setdefault(previous, []).append(block_hash)
            if previous not in self._headers and previous not in heights and block_hash != GENESIS:
                known = height_of(previous)
                if known is None:
                    loose.append(block_hash)
                else:
                    heights[previous] = known
        waiting = list(heights)
        while waiting:
            above = waiting.pop()
            for child in children.get(above, ()):
                heights[child] = heights[above] + 1
                waiting.append(child)
        return heights, loose

    def _read_file(self, path: Path, *, is_last: bool) -> None:
        stored = path.read_bytes()
        pieces = range(0, len(stored), _PIECE)
        data = b"".join(self._plain(stored[at : at + _PIECE], at) for at in pieces)
        at, block_hash, place = data.find(_MAGIC), "", (path, 0, 0)
        while at >= 0:
            start = at + len(_MAGIC) + 4
            size = int.from_bytes(data[start - 4 : start], "little")
            if not HEADER_SIZE < size <= min(_MAX_BLOCK_SIZE, len(data) - start):  # a remain of an older record
                at = data.find(_MAGIC, at + 1)
                continue
            header = data[start : start + HEADER_SIZE]
            block_hash, place = header_hash(header), (path, start, size)
            self._headers.setdefault(block_hash, header)
            self._places.setdefault(block_hash, place)
            at = data.find(_MAGIC, start + size)
        # A node enlarges a file with zeros first. Where they are still there, it has not written all of the block yet.
        _, start, size = place
        unwritten = stored.endswith(_UNWRITTEN, start, start + size) and not _is_whole(data[start : start + size])
        if is_last and unwritten and self._places.get(block_hash) == place:
            del self._headers[block_hash], self._places[block_hash]

    def _plain(self, data: bytes, offset: int) -> bytes:
        """Return what some bytes of a file are without the XOR. `offset` is their place in the file."""
        key = self._key[offset % 8 :] + self._key * (len(data) // 8 + 1)
        plain = int.from_bytes(data, "little") ^ int.from_bytes(key[: len(data)], "little")
        return plain.to_bytes(len(data), "little")


def _is_whole(data: bytes) -> bool:
    try:
        block = parse_block(data)
    except ValueError:
        return False
    return bool(block.calc_merkle_root() == block.hashMerkleRoot)


def _read_key(path: Path) -> bytes:
    """Return the 8 bytes of xor.dat: zeros if the node made its files without it."""
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        return bytes(8)
    if len(key) != 8:
        raise BridgeError(f"{path} has {len(key)} bytes, not 8: it is damaged")
    return key
