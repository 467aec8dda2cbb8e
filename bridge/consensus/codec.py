"""The few encodings that certificates, tables and signatures are made of (SPEC.md, notation)."""

import hashlib

from coincurve import PublicKeyXOnly


def tagged_hash(tag: str, message: bytes) -> bytes:
    """BIP340's tagged hash, 32 bytes."""
    prefix = hashlib.sha256(tag.encode()).digest()
    return hashlib.sha256(prefix + prefix + message).digest()


def compact_size(value: int) -> bytes:
    """Bitcoin's CompactSize, in the one form that the node reads."""
    if value < 0xFD:
        return value.to_bytes(1, "little")
    if value <= 0xFFFF:
        return b"\xfd" + value.to_bytes(2, "little")
    return b"\xfe" + value.to_bytes(4, "little")


def verify_schnorr(xonly_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a 64-byte signature of a 32-byte message is the key's (BIP340); False too if the key is no key."""
    try:
        return PublicKeyXOnly(xonly_key).verify(signature, message)
    except ValueError:
        return False


class Reader:
    """Reads little-endian fields off the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, length: int) -> bytes:
        """Read `length` bytes. Raises ValueError if there are fewer."""
        end = self.position + length
        if end > len(self.data):
            raise ValueError(f"{length} bytes expected at {self.position}, {len(self.data) - self.position} there")
        field = self.data[self.position : end]
        self.position = end
        return field

    def uint(self, length: int) -> int:
        """Read an unsigned integer of `length` bytes."""
        return int.from_bytes(self.take(length), "little")

    def compact_size(self) -> int:
        """Read a CompactSize. Raises ValueError unless it is in its shortest form, as the node does."""
        start = self.position
        first = self.uint(1)
        value = first if first < 0xFD else self.uint({0xFD: 2, 0xFE: 4, 0xFF: 8}[first])
        if first == 0xFF or compact_size(value) != self.data[start : self.position]:
            raise ValueError(f"non-canonical or oversized CompactSize at {start}")
        return value

    def left(self) -> int:
        """The number of bytes not read yet."""
        return len(self.data) - self.position
