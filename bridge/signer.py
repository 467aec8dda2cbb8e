"""Signing certificates: the only place that does, and it writes each into a journal first.

So a coordinator never signs two certificates for one slot and round, whatever happens to its process.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from coincurve import PrivateKey

from traincert.bridge.consensus.certificate import Certificate, CoordinatorSignature
from traincert.bridge.errors import JournalError
from traincert.trainer.failpoints import reached

FORMAT = 1
"""Of the journal: SQLite's user_version."""


class Signer:
    """The coordinator's secret keys, and the journal of what they signed.

    `secrets` are 32 bytes each, by the position of their public keys among those in force: as many as must sign. The
    journal is a SQLite file of mode 0600, which is made if it is not there.

    Raises JournalError if the file has another format.
    """

    def __init__(self, journal: Path, chain_id: bytes, secrets: Mapping[int, bytes]) -> None:
        self._journal = journal
        self._chain_id = chain_id
        self._keys = {index: PrivateKey(secret) for index, secret in sorted(secrets.items())}
        os.close(os.open(journal, os.O_RDWR | os.O_CREAT, 0o600))
        try:
            with closing(self._connect()) as database, database:
                database.execute("BEGIN IMMEDIATE")
                (found,) = database.execute("PRAGMA user_version").fetchone()
                empty = not database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
                if found == 0 and empty:
                    database.execute(
                        "CREATE TABLE signed (chain_id BLOB, prev_block BLOB, height INTEGER, round INTEGER, "
                        "body BLOB NOT NULL, PRIMARY KEY (chain_id, prev_block, height, round)) STRICT"
                    )
                    database.execute(f"PRAGMA user_version = {FORMAT}")
                elif found != FORMAT:
                    raise JournalError(
                        f"{journal} has format {found}, this traincert reads format {FORMAT}: go on with the traincert "
                        "that made it; without its journal a coordinator may sign a block twice"
                    )
        except sqlite3.DatabaseError as error:
            raise JournalError(f"{journal} cannot be used as a journal: {error}") from None

    def sign(self, certificate: Certificate) -> Certificate:
        """Return the certificate with the signatures of all keys. The same certificate may be signed again.

        It is in the journal, durably, before the first signature exists.

        Raises JournalError, and signs nothing, if the journal has another certificate for the slot and round, or if it
        cannot be written.
        """
        try:
            self._record(certificate)
        except sqlite3.Error as error:
            raise JournalError(f"{self._journal} cannot be written: {error}: not signed") from None
        reached("journaled")
        message = certificate.sighash(self._chain_id)
        signatures = (CoordinatorSignature(index, key.sign_schnorr(message)) for index, key in self._keys.items())
        return replace(certificate, coordinator_signatures=tuple(signatures))

    def next_round(self, prev_block: bytes) -> int:
        """Return the first round of the slot after a block (32 bytes, header order) that nothing was signed for."""
        with closing(self._connect()) as database:
            (last,) = database.execute(
                "SELECT max(round) FROM signed WHERE (chain_id, prev_block) = (?, ?)", (self._chain_id, prev_block)
            ).fetchone()
        return 0 if last is None else last + 1

    def _record(self, certificate: Certificate) -> None:
        slot = (self._chain_id, certificate.prev_block, certificate.height, certificate.round)
        with closing(self._connect()) as database, database:
            database.execute("BEGIN IMMEDIATE")  # nobody else reads or writes between our look and our insert
            query = "SELECT body FROM signed WHERE (chain_id, prev_block, height, round) = (?, ?, ?, ?)"
            row = database.execute(query, slot).fetchone()
            if row is None:
                database.execute("INSERT INTO signed VALUES (?, ?, ?, ?, ?)", (*slot, certificate.body()))
            elif row[0] != certificate.body():
                raise JournalError(
                    f"{self._journal} has another certificate for block {certificate.height}, round "
                    f"{certificate.round}, on {certificate.prev_block[::-1].hex()}: not signed"
                )

    def _connect(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._journal, timeout=30, isolation_level=None)
        # FULL alone does not sync the folder after a commit: a power failure could bring the rollback journal back.
        database.execute("PRAGMA synchronous = EXTRA")
        return database
