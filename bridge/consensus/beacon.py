"""The coordinator's beacon: a SHA-256 hash chain, revealed backwards.

Its anchor is fixed when the network starts; each certificate reveals the preimage of the one before. So the value that
draws a winner was fixed before the table that it draws from, and nobody but the coordinator knew it.
"""

import hashlib

from traincert.bridge.errors import BridgeError

BEACON_LENGTH = 1 << 16
"""Slots that a beacon lasts for."""


class Beacon:
    """The hash chain that grows from a 32-byte secret."""

    def __init__(self, secret: bytes) -> None:
        self._values = [secret]
        for _ in range(BEACON_LENGTH):
            self._values.append(hashlib.sha256(self._values[-1]).digest())

    @property
    def anchor(self) -> bytes:
        """The last value, known to everybody from the start."""
        return self._values[-1]

    def reveal(self, slot: int) -> bytes:
        """Return the preimage that the certificate of slot 0, 1, 2, ... reveals.

        A slot's redraws and its rivals on other forks all reveal the same.

        Raises BridgeError when the beacon is used up.
        """
        if slot >= BEACON_LENGTH:
            raise BridgeError(f"the beacon lasts for {BEACON_LENGTH} blocks: it has no value for block {slot + 1}")
        return self._values[-2 - slot]
