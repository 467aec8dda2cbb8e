"""Who takes part in a network: the coordinator's list of members."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from traincert.bridge.errors import BridgeError


class MemberList:
    """The members' names, roles and keys, in a SQLite file that the coordinator's commands share."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._lock = Lock()
        self._database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._database.execute("PRAGMA synchronous = EXTRA")
        self._database.execute("CREATE TABLE IF NOT EXISTS members (name TEXT PRIMARY KEY, role TEXT, key BLOB UNIQUE)")
        self._version: int | None = None
        self._roles: dict[str, tuple[str, bytes | None]] = {}
        self._keys: dict[str, bytes] = {}

    def roles(self) -> dict[str, tuple[str, bytes | None]]:
        """Return each member's role, and its key if it has joined, by its name."""
        with self._lock:
            (version,) = self._database.execute("PRAGMA data_version").fetchone()  # changes with others' writes
            if version != self._version:
                rows = self._database.execute("SELECT name, role, key FROM members ORDER BY name").fetchall()
                self._roles, self._version = {name: (role, key) for name, role, key in rows}, version
                self._keys = {name: key for name, _, key in rows if key}
            return self._roles

    def keys(self) -> dict[str, bytes]:
        """Return the keys of all who have joined, by name. It is the same dict until somebody joins or leaves."""
        self.roles()
        return self._keys

    def with_role(self, role: str) -> dict[str, bytes]:
        """Return the keys of those of a role who have joined, by name."""
        return {name: key for name, (each, key) in self.roles().items() if key and each == role}

    def invite(self, name: str, role: str) -> None:
        """Put an invited member into the list. Raises BridgeError if a member of this name has joined already."""
        with self._changing() as database:
            row = database.execute("SELECT key FROM members WHERE name = ?", (name,)).fetchone()
            if row and row[0]:
                raise BridgeError(f"{name} has joined already: remove it first (traincert coordinator remove)")
            database.execute("INSERT OR REPLACE INTO members VALUES (?, ?, NULL)", (name, role))

    def join(self, name: str, key: bytes) -> None:
        """Bind a member's name to its key. Raises BridgeError if either is bound otherwise."""
        with self._changing() as database:
            row = database.execute("SELECT key FROM members WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise BridgeError(f"{name} is not invited")
            if row[0] == key:
                return
            if row[0]:
                raise BridgeError(f"this invitation was used already: {name} has joined with the key {row[0].hex()}")
            other = database.execute("SELECT name FROM members WHERE key = ?", (key,)).fetchone()
            if other:
                raise BridgeError(f"the key {key.hex()} is that of {other[0]}: each member needs a key of its own")
            database.execute("UPDATE members SET key = ? WHERE name = ?", (key, name))

    def remove(self, name: str) -> None:
        """Take a member out of the list. Raises BridgeError if there is none of this name."""
        known = ", ".join(self.roles()) or "none"
        with self._changing() as database:
            if not database.execute("DELETE FROM members WHERE name = ?", (name,)).rowcount:
                raise BridgeError(f"there is no member {name}; there are: {known}")

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._database:
            self._database.execute("BEGIN IMMEDIATE")
            self._version = None
            yield self._database
