"""The encodings of which certificates, tables and signatures are made (SPEC.md, "Notation").

Integers are unsigned and little-endian. A value that does not fit its field is an EncodingError that names the field:
nothing is cut or padded.
"""

import hashlib

from coincurve import PublicKeyXOnly

from traincert.bridge.errors import EncodingError

U64_MAX = 2**64 - 1


def tagged_hash(tag: str, message: bytes) -> bytes:
    """Return BIP340's tagged hash of a message, 32 bytes."""
    prefix = hashlib.sha256(tag.encode()).digest()
    return hashlib.sha256(prefix + prefix + message).digest()


def encode_uint(field: str, value: int, length: int) -> bytes:
    """Return an unsigned integer as `length` bytes, little-endian. Raises EncodingError if it does not fit."""
    if not isinstance(value, int) or not 0 <= value < 1 << 8 * length:
        raise EncodingError(field, value, f"a number from 0 to 2^{8 * length} - 1")
    return value.to_bytes(length, "little")


def encode_b32(field: str, value: bytes) -> bytes:
    """Return a hash or key as it is. Raises EncodingError unless it has 32 bytes."""
    return encode_bytes(field, value, 32)


def encode_bytes(field: str, value: bytes, length: int) -> bytes:
    """Return some bytes as they are. Raises EncodingError unless there are `length` of them."""
    if not isinstance(value, bytes) or len(value) != length:
        raise EncodingError(field, value.hex() if isinstance(value, bytes) else value, f"{length} bytes")
    return value


def compact_size(value: int) -> bytes:
    """Return Bitcoin's CompactSize, in the shortest form, the only one that the node reads.

    Raises EncodingError unless 0 <= value < 2^32: the node reads no larger size.
    """
    if value < 0xFD:
        return encode_uint("CompactSize", value, 1)
    if value <= 0xFFFF:
        return b"\xfd" + value.to_bytes(2, "little")
    return b"\xfe" + encode_uint("CompactSize", value, 4)


def verify_schnorr(xonly_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a 64-byte BIP340 signature of a 32-byte message is by this x-only key (32 bytes).

    False also for bytes that are no key.
    """
    try:
        return PublicKeyXOnly(xonly_key).verify(signature, message)
    except ValueError:
        return False


class Reader:
    """Reads little-endian fields from the front of some bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def take(self, length: int) -> bytes:
        """Read `length` bytes. Raises ValueError if fewer are left."""
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
        if value >= 1 << 32 or compact_size(value) != self.data[start : self.position]:
            raise ValueError(f"non-canonical or oversized CompactSize at {start}")
        return value

    def left(self) -> int:
        """The number of bytes not read yet."""
        return len(self.data) - self.position
