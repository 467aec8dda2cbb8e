"""The parameters that define a training network: the node's -training... options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitcoin.core import CoreRegTestParams

from traincert.bridge.consensus.codec import compact_size, encode_b32, encode_uint, tagged_hash

GENESIS_HASH: bytes = CoreRegTestParams.GENESIS_BLOCK.GetHash()
"""Of regtest, in header byte order."""


@dataclass(frozen=True)
class TrainingKeys:
    """The coordinator's x-only public keys (32 bytes each), of which `threshold` must sign each certificate."""

    threshold: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True)
class TrainingParams:
    """The parameters of a training network.

    `keys` has the coordinator's keys by the height from which they are in force. `beacon` is the anchor of the beacon,
    and `model` the hash of the model that training starts from, 32 bytes each.
    """

    keys: Mapping[int, TrainingKeys]
    beacon: bytes
    model: bytes
    round_seconds: int = 60

    @property
    def start_height(self) -> int:
        """The first height at which a block needs a certificate."""
        return min(self.keys)

    def keys_at(self, height: int) -> TrainingKeys:
        """Return the keys in force at a height, which must be the start height or above it."""
        return self.keys[max(start for start in self.keys if start <= height)]

    @property
    def chain_id(self) -> bytes:
        """32 bytes that identify the network; every signature covers them.

        Raises EncodingError, with the field's name, for parameters that the node's options cannot have.
        """
        message = GENESIS_HASH + compact_size(len(self.keys))
        for height, keys in sorted(self.keys.items()):
            message += encode_uint("keys: height", height, 4) + encode_uint("keys: threshold", keys.threshold, 1)
            message += compact_size(len(keys.keys)) + b"".join(encode_b32("keys: key", key) for key in keys.keys)
        message += encode_b32("beacon", self.beacon) + encode_uint("round_seconds", self.round_seconds, 4)
        message += encode_b32("model", self.model)
        return tagged_hash("traincert/chain", message)

    @classmethod
    def from_node_options(cls, options: Mapping[str, Any]) -> TrainingParams:
        """Return the parameters that `node_options` gave. Raises ValueError if they are malformed."""
        keys = {}
        for entry in options["trainingkeys"]:
            height, threshold, each = entry.split(":")
            keys[int(height)] = TrainingKeys(int(threshold), tuple(map(bytes.fromhex, each.split(","))))
        beacon, model = (bytes.fromhex(options[name]) for name in ("trainingbeacon", "trainingmodel"))
        return cls(keys, beacon, model, int(options["traininground"]))

    def conf(self) -> str:
        """Return the parameters as the section [regtest] of bitcoin.conf."""
        lines = ["[regtest]"]
        for name, value in self.node_options().items():
            lines += [f"{name}={each}" for each in ([value] if isinstance(value, str) else value)]
        return "\n".join(lines) + "\n"

    def node_options(self) -> dict[str, str | list[str]]:
        """Return the parameters as options of bitcoin.conf."""
        return {
            "trainingkeys": [
                f"{height}:{keys.threshold}:{','.join(key.hex() for key in keys.keys)}"
                for height, keys in sorted(self.keys.items())
            ],
            "trainingbeacon": self.beacon.hex(),
            "traininground": str(self.round_seconds),
            "trainingmodel": self.model.hex(),
        }
