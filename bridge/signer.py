"""What the coordinator signed, durably, before the signature exists: never two certificates for one slot and round."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.errors import JournalError


class Journal:
    """A file of the certificates that were signed."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._path = path
        with closing(self._connect()) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS signed (chain_id BLOB, prev_block BLOB, height INTEGER, round INTEGER, "
                "body BLOB NOT NULL, PRIMARY KEY (chain_id, prev_block, height, round)) STRICT"
            )

    def record(self, certificate: Certificate, chain_id: bytes) -> None:
        """Write down that a certificate is about to be signed. The same one again is fine.

        Raises JournalError if another one was for its slot and round.
        """
        slot = (chain_id, certificate.prev_block, certificate.height, certificate.round)
        with closing(self._connect()) as database, database:
            database.execute("BEGIN IMMEDIATE")  # one at a time: between look and insert nobody else gets in
            query = "SELECT body FROM signed WHERE (chain_id, prev_block, height, round) = (?, ?, ?, ?)"
            row = database.execute(query, slot).fetchone()
            if row is None:
                database.execute("INSERT INTO signed VALUES (?, ?, ?, ?, ?)", (*slot, certificate.body()))
            elif row[0] != certificate.body():
                raise JournalError(
                    f"{self._path} has another certificate for block {certificate.height}, round {certificate.round}, "
                    f"on {certificate.prev_block[::-1].hex()}: not signed"
                )

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        # FULL alone does not sync the folder after a commit: a power failure could bring the rollback journal back.
        database.execute("PRAGMA synchronous = EXTRA")
        return database
