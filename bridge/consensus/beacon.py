"""The coordinator's beacon: a SHA-256 hash chain, revealed backwards.

Its last value, the anchor, is public when the network starts. Each certificate reveals the preimage of the value
before. So every value was fixed before the table from which it draws a winner, and only the coordinator knew it.
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
        """Return the value that the certificate of slot 0, 1, 2, ... reveals, 32 bytes.

        All rounds of a slot, and all blocks that compete for it, reveal the same value.

        Raises BridgeError when the beacon is used up.
        """
        if slot >= BEACON_LENGTH:
            raise BridgeError(f"the beacon lasts for {BEACON_LENGTH} blocks: it has no value for block {slot + 1}")
        return self._values[-2 - slot]
