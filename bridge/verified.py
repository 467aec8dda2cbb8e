"""The blocks that were verified before, so that none is read twice: a SQLite file in the user's cache folder.

A block is there with what the next one needs, and only if all blocks below it were verified, too. It counts for the one
network for which it was verified. Several programs may use the file at once, and may be killed. A damaged file is made
anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from traincert.bridge.chain import HEADER_SIZE, Certified, header_hash, previous_hash
from traincert.bridge.consensus.certificate import SIGNATURE_SIZE, Certificate
from traincert.bridge.consensus.codec import Reader
from traincert.regtest.build import cache_folder

VERSION = 1
"""In the file's name. Increase it when a rule or the format changes: then all blocks are verified again."""

T = TypeVar("T")

_TOGETHER = 1000  # blocks that are written at once
_PATIENCE = 30.0  # seconds to wait while another program writes


@dataclass(frozen=True)
class Verified:
    """A block that was verified with all blocks below it. Below the start height it has no certificate.

    `header` has 80 bytes.
    """

    height: int
    header: bytes
    certified: Certified | None

    @property
    def hash(self) -> str:
        """The block's hash, as RPC shows it."""
        return header_hash(self.header)

    @property
    def previous(self) -> str:
        """The hash of the block before, as RPC shows it."""
        return previous_hash(self.header)

    @property
    def time(self) -> int:
        """The header's nTime: Unix time in seconds."""
        return int.from_bytes(self.header[68:72], "little")


class VerifiedBlocks:
    """The verified blocks of one network. Use it as a context manager: the end writes what was added.

    Without `keep`, nothing is read from the file or written to it. `warn` gets a line if the file cannot be used.
    """

    def __init__(self, chain_id: bytes, warn: Callable[[str], None], *, keep: bool = True) -> None:
        self._chain_id = chain_id
        self._warn = warn
        self._file = cache_folder() / f"verified-{VERSION}.sqlite" if keep else None
        self._database: sqlite3.Connection | None = None
        self._made_anew = False
        self._added: dict[str, Verified] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._write()
        self._close()

    def get(self, block_hash: str) -> Verified | None:
        """Return a block if it was verified."""
        return self._added.get(block_hash) or self._use(lambda database: self._read(database, block_hash))

    def height(self, block_hash: str) -> int | None:
        """Return a block's height if it was verified."""
        found = self.get(block_hash)
        return found.height if found else None

    def add(self, block: Verified) -> None:
        """Add a block, after all blocks below it."""
        self._added[block.hash] = block
        if len(self._added) == _TOGETHER:
            self._write()

    def _read(self, database: sqlite3.Connection, block_hash: str) -> Verified | None:
        row = database.execute(
            "SELECT entry, checksum FROM blocks WHERE chain_id = ? AND hash = ?", (self._chain_id, block_hash)
        ).fetchone()
        if row is None:
            return None
        entry, checksum = row
        if hashlib.sha256(self._chain_id + entry).digest() != checksum or header_hash(entry[4:84]) != block_hash:
            raise sqlite3.DatabaseError(f"the entry of block {block_hash} is damaged")
        reader = Reader(entry)
        height, header, certified = reader.uint(4), reader.take(HEADER_SIZE), None
        if reader.left():
            certificate = Certificate.read(reader)
            certified = Certified(block_hash, certificate, reader.take(SIGNATURE_SIZE))
        return Verified(height, header, certified)

    def _write(self) -> None:
        if not self._added:
            return
        rows = []
        for block_hash, block in self._added.items():
            entry = block.height.to_bytes(4, "little") + block.header
            if block.certified:
                entry += block.certified.certificate.serialize() + block.certified.winner_signature
            rows.append((self._chain_id, block_hash, entry, hashlib.sha256(self._chain_id + entry).digest()))

        def insert(database: sqlite3.Connection) -> None:
            with database:
                database.executemany("INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?)", rows)

        self._use(insert)
        self._added.clear()

    def _use(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Do something with the file. If it is damaged, make it anew; if it cannot be used, go on without it."""
        while True:
            try:
                return action(self._database or self._open())
            except (sqlite3.DatabaseError, OSError) as error:
                if self._file is None:
                    raise
                self._close()
                damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
                if damaged and not self._made_anew:
                    self._warn(f"{self._file} is damaged ({error}): it is made anew, and blocks are verified again")
                    self._made_anew = True
                    with contextlib.suppress(OSError):
                        self._file.with_name(f"{self._file.name}-journal").unlink(missing_ok=True)
                        self._file.unlink()
                else:
                    self._warn(f"{self._file} cannot be used ({error}): what is verified now is not kept")
                    self._file = None

    def _open(self) -> sqlite3.Connection:
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(self._file or ":memory:", timeout=_PATIENCE)
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS blocks (chain_id BLOB, hash TEXT, entry BLOB NOT NULL, checksum BLOB NOT NULL, "
            "PRIMARY KEY (chain_id, hash)) STRICT, WITHOUT ROWID"
        )
        return self._database

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
