"""Invitations: all that a miner or a cosigner needs to take part in a network, as one line of text."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.errors import BridgeError

MINER, COSIGNER = "miner", "cosigner"
_PREFIX = "traincert-invitation-1:"


@dataclass(frozen=True)
class Invitation:
    """All that a member needs to take part. It has a secret: the credential that opens the broker's door."""

    name: str
    role: str
    url: str
    ca: str
    seed: str
    options: Mapping[str, Any]  # the network's parameters, as a node's options
    job: str  # the digest of the job, hex

    def text(self) -> str:
        """Return the invitation as one line of text."""
        return _PREFIX + base64.urlsafe_b64encode(zlib.compress(json.dumps(asdict(self)).encode(), 9)).decode()

    @classmethod
    def read(cls, text: str, role: str) -> Invitation:
        """Read what `text` returned. Raises BridgeError if it is not complete, or for another role."""
        text = "".join(text.split())
        try:
            if not text.startswith(_PREFIX):
                raise ValueError
            invitation = cls(**json.loads(zlib.decompress(base64.urlsafe_b64decode(text[len(_PREFIX) :]))))
            if not all(isinstance(value, str) for name, value in asdict(invitation).items() if name != "options"):
                raise TypeError
            _ = invitation.params  # raises if it has none
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, zlib.error):
            raise BridgeError(
                "this is no invitation of this version of traincert, or a part of it is missing: copy all of the line "
                "that traincert coordinator invite printed"
            ) from None
        if invitation.role != role:
            raise BridgeError(f"this invitation is for a {invitation.role}, not for a {role}")
        return invitation

    @property
    def params(self) -> TrainingParams:
        """The network's parameters."""
        return TrainingParams.from_node_options(self.options)
