"""Block files as Bitcoin Core writes them, in any order and in any state. No node is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from bitcoin import RegTestParams
from bitcoin.core import CBlock, CoreRegTestParams, CTransaction, CTxIn, CTxOut
from bitcoin.core.script import CScript
from hypothesis import given
from hypothesis import strategies as st

from traincert.bridge.block_files import BlockFiles
from traincert.bridge.chain import GENESIS, parse_block
from traincert.bridge.errors import BridgeError

KEY = bytes.fromhex("0102030405060788")
GENESIS_BLOCK: CBlock = CoreRegTestParams.GENESIS_BLOCK


def follow(parent: CBlock, name: int = 0) -> CBlock:
    """A block after another. Blocks of different names are different."""
    coinbase = CTransaction([CTxIn(scriptSig=CScript([name, 0]))], [CTxOut(50, CScript(bytes(60)))])
    return CBlock(4, parent.GetHash(), nTime=parent.nTime + 1, nBits=parent.nBits, vtx=[coinbase])


def branch(parent: CBlock, length: int, name: int = 0) -> list[CBlock]:
    blocks = [parent]
    for _ in range(length):
        blocks.append(follow(blocks[-1], name))
    return blocks[1:]


def hash_of(block: CBlock) -> str:
    return bytes(block.GetHash())[::-1].hex()


def record(data: bytes) -> bytes:
    magic: bytes = RegTestParams.MESSAGE_START
    return magic + len(data).to_bytes(4, "little") + data


def records(blocks: Sequence[CBlock]) -> bytes:
    return b"".join(record(block.serialize()) for block in blocks)


def xored(data: bytes, key: bytes = KEY) -> bytes:
    return bytes(byte ^ key[i % len(key)] for i, byte in enumerate(data))


def write(folder: Path, *files: bytes, key: bytes = KEY) -> Path:
    """Write block files. The last is enlarged with zeros, as a node does it."""
    folder.mkdir(exist_ok=True)
    (folder / "xor.dat").write_bytes(key)
    for number, data in enumerate(files):
        zeros = bytes(1000) if data is files[-1] else b""
        (folder / f"blk{number:05}.dat").write_bytes(xored(data, key) + zeros)
    return folder


def below(files: BlockFiles, tip: str) -> list[str]:
    """The hashes of a chain, from the genesis block on."""
    headers, chain = files.headers(tip), [tip]
    while chain[-1] != GENESIS:
        chain.append(next(headers)[4:36][::-1].hex())
    return chain[::-1]


def shown(files: BlockFiles, tip: str) -> list[str]:
    """The same. The bytes of each block are looked at."""
    chain = below(files, tip)
    for block_hash, data in zip(chain[1:], files.blocks(chain[1:]), strict=True):
        assert hash_of(parse_block(data)) == block_hash
    return chain


MAIN = branch(GENESIS_BLOCK, 6)
HASHES = [GENESIS, *map(hash_of, MAIN)]


@pytest.mark.parametrize("key", [KEY, bytes(8)])
def test_blocks_in_any_order_and_files_are_found(tmp_path: Path, key: bytes) -> None:
    stale = branch(MAIN[1], 3, name=7)
    blocks = sorted([GENESIS_BLOCK, *MAIN, *stale], key=hash_of)
    files = BlockFiles(write(tmp_path, records(blocks[:4]), records(blocks[4:]), key=key))
    assert files.loose == []
    assert files.tips() == [HASHES[6]]
    assert shown(files, HASHES[6]) == HASHES


def test_files_without_an_xor_file_are_plain(tmp_path: Path) -> None:
    write(tmp_path, records([GENESIS_BLOCK, *MAIN]), key=bytes(8))
    (tmp_path / "xor.dat").unlink()
    assert shown(BlockFiles(tmp_path), HASHES[6]) == HASHES


def test_of_chains_of_the_same_length_the_one_that_came_first_is_first(tmp_path: Path) -> None:
    other = branch(MAIN[2], 3, name=7)
    for blocks, tips in (([*MAIN, *other], [MAIN, other]), ([*MAIN[:3], *other, *MAIN[3:]], [other, MAIN])):
        files = BlockFiles(write(tmp_path, records(blocks)))
        assert files.tips() == [hash_of(each[-1]) for each in tips]
        assert files.tips(5) == [hash_of(each[-2]) for each in tips]
        assert files.tips(3) == [HASHES[3]]  # of both
        assert files.tips(0) == [GENESIS]
        with pytest.raises(BridgeError, match="has no block 7: its longest chain ends at block 6"):
            files.tips(7)


def test_without_blocks_there_is_the_genesis_block(tmp_path: Path) -> None:
    for data in (b"", records([GENESIS_BLOCK])):
        assert BlockFiles(write(tmp_path, data)).tips() == [GENESIS]


@pytest.mark.parametrize(
    "after",
    [b"", b"\xfa", b"\xfa\xbf\xb5\xda", record(b""), record(bytes(80)), b"junk" * 300, b"\xfa\xbf\xb5\xda" * 100_000],
)
def test_what_follows_the_last_block_does_no_harm(tmp_path: Path, after: bytes) -> None:
    files = BlockFiles(write(tmp_path, records([GENESIS_BLOCK, *MAIN]) + after))
    assert files.tips() == [HASHES[6]]
    assert files.loose == []


def test_blocks_after_a_remain_of_an_older_record_are_found(tmp_path: Path) -> None:
    remain = record(b"\xfa\xbf" + MAIN[4].serialize())[50:] + b"\xfa\xbf\xb5\xda\xff\xff\xff\xff"
    files = BlockFiles(write(tmp_path, records(MAIN[:3]) + remain + records(MAIN[3:])))
    assert shown(files, files.tips()[0]) == HASHES


def test_pieces_of_any_size_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, records(MAIN))
    for size in (1, 7, 8, 100):
        monkeypatch.setattr("traincert.bridge.block_files._PIECE", size)
        assert shown(BlockFiles(tmp_path), HASHES[6]) == HASHES


@pytest.mark.parametrize("key", [KEY, bytes(8)])
def test_a_last_block_that_is_not_written_yet_is_left_out(tmp_path: Path, key: bytes) -> None:
    whole = records([GENESIS_BLOCK, *MAIN])
    write(tmp_path, whole, key=key)
    path = tmp_path / "blk00000.dat"
    for written in (8, 80, 100):  # of its bytes
        data = bytearray(path.read_bytes())
        end = len(whole)
        start = end - len(MAIN[-1].serialize())
        data[start + written : end] = bytes(end - start - written)
        path.write_bytes(data)
        files = BlockFiles(tmp_path)
        assert files.tips() == [HASHES[5]]
        assert files.loose == []
        write(tmp_path, whole, key=key)
    path.write_bytes(path.read_bytes()[: len(whole) - 20])  # the file ends within it
    assert BlockFiles(tmp_path).tips() == [HASHES[5]]


def test_a_last_block_that_is_damaged_stays(tmp_path: Path) -> None:
    whole = bytearray(records([GENESIS_BLOCK, *MAIN]))
    whole[-6] ^= 1
    files = BlockFiles(write(tmp_path, bytes(whole)))
    assert files.tips() == [HASHES[6]]


def test_blocks_that_follow_none_are_loose_unless_the_one_before_is_known(tmp_path: Path) -> None:
    files = BlockFiles(write(tmp_path, records([*MAIN[:2], *MAIN[3:]])))
    assert files.tips() == [HASHES[2]]
    assert files.loose == [HASHES[4]]
    assert files.describe(HASHES[4]).endswith(f"blk00000.dat, follows {HASHES[3]}")
    files = BlockFiles(tmp_path, {HASHES[3]: 3}.get)
    assert files.loose == []
    assert files.tips() == [HASHES[6]]
    assert files.tips(4) == [HASHES[4]]
    with pytest.raises(BridgeError, match=f"has no block {HASHES[3]}"):
        list(files.headers(HASHES[6]))


def test_a_folder_without_block_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=r"has no blk00000\.dat: it must be the folder regtest/blocks of a node"):
        BlockFiles(tmp_path)


def test_a_damaged_xor_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match=r"xor\.dat has 7 bytes, not 8: it is damaged"):
        BlockFiles(write(tmp_path, b"", key=bytes(7)))


@given(st.data())
def test_no_bytes_make_it_fail(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    stored = bytearray(records([GENESIS_BLOCK, *MAIN]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stored)))
        stored[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    files = BlockFiles(write(tmp_path_factory.mktemp("any"), bytes(stored) + data.draw(st.binary(max_size=200))))
    for body in files.blocks(below(files, files.tips()[0])[1:]):
        with contextlib.suppress(ValueError):
            parse_block(body)
