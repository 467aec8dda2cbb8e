"""The beacon's values are each the preimage of the one before."""

from hashlib import sha256

import pytest

from traincert.bridge.consensus.beacon import BEACON_LENGTH, Beacon
from traincert.bridge.errors import BridgeError


def test_each_reveal_is_the_preimage_of_the_one_before() -> None:
    beacon = Beacon(bytes(32))
    before = beacon.anchor
    for slot in range(100):
        assert sha256(beacon.reveal(slot)).digest() == before
        assert sha256(before).digest() != beacon.reveal(slot)
        before = beacon.reveal(slot)


def test_the_last_reveal_is_the_secret_and_then_it_is_used_up() -> None:
    beacon = Beacon(bytes([7] * 32))
    assert beacon.reveal(BEACON_LENGTH - 1) == bytes([7] * 32)
    with pytest.raises(BridgeError, match="no value for block 65537"):
        beacon.reveal(BEACON_LENGTH)
