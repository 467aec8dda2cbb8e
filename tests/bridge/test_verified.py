"""What was verified is kept: for one network, through kills and damage. No node is needed."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from bitcoin.core import CBlockHeader, lx

from traincert.bridge.chain import GENESIS, Certified
from traincert.bridge.verified import Verified, VerifiedBlocks
from training_chain import TrainingChain

CHAIN_ID = bytes(31) + b"\1"


def made(count: int) -> list[Verified]:
    """Blocks that follow one another. The first has no certificate."""
    chain, blocks = TrainingChain(), list[Verified]()
    for height in range(1, count + 1):
        previous = blocks[-1].hash if blocks else GENESIS
        header = CBlockHeader(4, lx(previous), nTime=1000 + height).serialize()
        certificate = chain.next_certificate({"height": height, "previousblockhash": previous})
        block = Verified(height, header, None)
        if height > 1:
            block = Verified(height, header, Certified(block.hash, certificate, bytes([height]) * 64))
        chain.advance(certificate)
        blocks.append(block)
    return blocks


BLOCKS = made(5)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the verified blocks, in a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/traincert/verified-1.sqlite"


@pytest.fixture
def said() -> list[str]:
    """The warnings."""
    return []


def keep(said: list[str], chain_id: bytes = CHAIN_ID) -> None:
    with VerifiedBlocks(chain_id, said.append) as verified:
        for block in BLOCKS:
            verified.add(block)


def kept(said: list[str], chain_id: bytes = CHAIN_ID) -> list[Verified]:
    with VerifiedBlocks(chain_id, said.append) as verified:
        found = [verified.get(block.hash) for block in BLOCKS]
    return [block for block in found if block]


def test_blocks_are_there_again_as_they_were(said: list[str]) -> None:
    assert kept(said) == []
    keep(said)
    assert kept(said) == BLOCKS
    assert [(block.height, block.time, block.previous) for block in BLOCKS[:2]] == [
        (1, 1001, GENESIS),
        (2, 1002, BLOCKS[0].hash),
    ]
    assert said == []


def test_another_network_has_none_of_them(said: list[str]) -> None:
    keep(said)
    assert kept(said, bytes(32)) == []
    keep(said, bytes(32))
    assert kept(said, bytes(32)) == kept(said) == BLOCKS


def test_an_entry_that_was_moved_to_another_network_does_not_count(said: list[str], file: Path) -> None:
    keep(said)
    with sqlite3.connect(file) as database:
        database.execute("UPDATE blocks SET chain_id = ?", (bytes(32),))
    database.close()
    assert kept(said, bytes(32)) == []
    assert "damaged" in said[0]


def test_without_keep_nothing_is_read_or_written(said: list[str], file: Path) -> None:
    keep(said)
    before = file.read_bytes()
    with VerifiedBlocks(CHAIN_ID, said.append, keep=False) as verified:
        assert verified.get(BLOCKS[0].hash) is None
        verified.add(BLOCKS[0])
        assert verified.get(BLOCKS[0].hash) == BLOCKS[0]
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["garbage", "halved", "flipped entry", "empty"])
def test_a_damaged_file_is_made_anew(said: list[str], file: Path, damage: str) -> None:
    keep(said)
    data = file.read_bytes()
    if damage == "flipped entry":
        at = data.index(BLOCKS[2].header) + 90
        data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    file.write_bytes({"garbage": b"x" * 9000, "halved": data[: len(data) // 2], "empty": b""}.get(damage, data))
    found = kept(said)
    assert all(block in BLOCKS for block in found)
    assert len(found) < len(BLOCKS)
    assert len(said) == (damage != "empty")  # an empty file is a new one
    assert all(line.startswith(f"{file} is damaged (") for line in said)
    keep(said)
    assert kept(said) == BLOCKS
    assert len(said) == (damage != "empty")


def test_a_file_that_cannot_be_used_is_said_and_left_alone(said: list[str], file: Path) -> None:
    file.mkdir(parents=True)
    with VerifiedBlocks(CHAIN_ID, said.append) as verified:
        for block in BLOCKS:
            verified.add(block)
        assert verified.get(BLOCKS[3].hash) == BLOCKS[3]
    assert said == [f"{file} cannot be used (unable to open database file): what is verified now is not kept"]
    assert file.is_dir()


def test_a_cache_folder_that_cannot_be_made_is_said(said: list[str], file: Path) -> None:
    file.parent.parent.write_text("a file")
    keep(said)
    assert len(said) == 1
    assert "Not a directory" in said[0] or "File exists" in said[0]


WRITER = """
import sys
from traincert.bridge.verified import Verified, VerifiedBlocks
from bitcoin.core import CBlockHeader
with VerifiedBlocks(bytes(32), lambda text: sys.exit(text)) as verified:
    print("begun", flush=True)
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        verified.add(Verified(number, CBlockHeader(4, nNonce=number).serialize(), None))
"""


def start_writer(first: int, end: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(first), str(end)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_programs_write_at_once(said: list[str]) -> None:
    writers = [start_writer(0, 9000), start_writer(5000, 14_000)]
    for writer in writers:
        _, error = writer.communicate()
        assert (writer.returncode, error) == (0, "")
    with VerifiedBlocks(bytes(32), said.append) as verified:
        for number in range(0, 14_000, 7):
            found = verified.get(Verified(number, CBlockHeader(4, nNonce=number).serialize(), None).hash)
            assert found is not None
            assert found.height == number
    assert said == []


def test_a_program_that_is_killed_leaves_a_file_that_can_be_read(said: list[str]) -> None:
    with start_writer(0, 10**7) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "begun\n"
        blocks = [Verified(number, CBlockHeader(4, nNonce=number).serialize(), None) for number in range(3000)]
        with VerifiedBlocks(bytes(32), said.append) as verified:
            while verified.get(blocks[-1].hash) is None:
                assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    with VerifiedBlocks(bytes(32), said.append) as verified:
        assert [verified.get(block.hash) for block in blocks] == blocks
    assert said == []
