"""How the coordinator gets the signatures of its cosigners: programs on other machines, each with a key of its own."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from coincurve import PrivateKey

from traincert.bridge.consensus.certificate import Certificate, CoordinatorSignature
from traincert.bridge.consensus.codec import verify_schnorr
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.errors import BridgeError
from traincert.bridge.invitations import COSIGNER
from traincert.bridge.members import MemberList
from traincert.bridge.messages import Cosignature, MessageError, Proposal, seal, unseal
from traincert.bridge.signer import Signer
from traincert.trainer.engines.nats import NatsEngine
from traincert.trainer.errors import EngineError

COSIGN_SECONDS = 120.0
"""A certificate that has too few signatures by then is given up."""
ASK_SECONDS = 10.0
"""Cosigners are asked again after this time."""
PASSING = {"too-early", "wrong-parent", "no-node", "missing-file", "no-journal"}
"""Refusals that may pass: a cosigner's node or clock is behind, or its disk is full."""


@dataclass
class _Asked:
    """A certificate that is being signed. Another thread adds what cosigners say, so each has an object of its own."""

    certificate: Certificate
    """Without signatures."""
    digest: bytes
    """SHA-256 of it."""
    signatures: dict[int, bytes]
    """By the number of the key."""
    refusals: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By the cosigner's name: the name of the check that failed, and a sentence."""


class Cosigned:
    """Signs with the coordinator's own key, then asks the cosigners for the rest.

    `waiting` is called with a sentence while signatures are missing.
    """

    def __init__(
        self,
        signer: Signer,
        key: PrivateKey,
        params: TrainingParams,
        members: MemberList,
        engine: NatsEngine,
        waiting: Callable[[str], None],
    ) -> None:
        self._signer = signer
        self._key = key
        self._params = params
        self._members = members
        self._engine = engine
        self._waiting = waiting
        self._slot: bytes = b""
        self._earlier: list[bytes] = []  # the slot's certificates so far
        self._asked: _Asked | None = None
        engine.handlers["cosign"] = self._cosign

    def sign(self, certificate: Certificate) -> Certificate:
        """Return the certificate with as many signatures as it needs. Our own is journaled first.

        Raises JournalError if our own journal refuses, and BridgeError if too few cosigners sign; then another call
        goes on.
        """
        own = self._signer.sign(certificate)
        keys = self._params.keys_at(certificate.height)
        if keys.threshold > 1:
            own = self._cosigned(own, keys)
        if certificate.prev_block != self._slot:
            self._slot, self._earlier = certificate.prev_block, []
        self._earlier.append(own.serialize())
        return own

    def _cosigned(self, own: Certificate, keys: TrainingKeys) -> Certificate:
        bare = replace(own, coordinator_signatures=())
        earlier = self._earlier if own.prev_block == self._slot else []
        signatures = {each.key_index: each.signature for each in own.coordinator_signatures}
        self._asked = asked = _Asked(bare, hashlib.sha256(bare.serialize()).digest(), signatures)
        proposal = seal(self._key, self._params.chain_id, Proposal(bare.serialize(), earlier))
        threshold = keys.threshold
        deadline = time.monotonic() + COSIGN_SECONDS
        again, told = 0.0, set[str]()
        while len(signatures) < threshold:
            refusals = sorted(asked.refusals.copy().items())
            final = [name for name, (kind, _) in refusals if kind not in PASSING]
            refused = "".join(f"; {name}: {kind}: {why}" for name, (kind, why) in refusals)
            now = time.monotonic()
            if now >= deadline or len(keys.keys) - len(final) < threshold:
                where = f"block {own.height}, round {own.round}"
                raise BridgeError(
                    f"{where}: {len(signatures)} of {threshold} signatures{refused}: nothing is lost, start the "
                    "coordinator again when the cosigners sign"
                )
            if now >= again:  # ask again: a cosigner may be away, or its node may be behind
                again = now + ASK_SECONDS
                told.clear()
            for name, key in self._members.with_role(COSIGNER).items():  # one may join meanwhile
                if name not in told and name not in final:
                    self._engine.post(key, "proposal", proposal)
                    told.add(name)
            self._engine.wait(0.5)
            if now > deadline - COSIGN_SECONDS + ASK_SECONDS:
                missing = threshold - len(signatures)
                self._waiting(f"block {own.height}: waiting for {missing} more signatures of cosigners{refused}")
        self._engine.clear("proposal")
        chosen = sorted(signatures.copy().items())[:threshold]
        return replace(bare, coordinator_signatures=tuple(CoordinatorSignature(*each) for each in chosen))

    async def _cosign(self, member: str, data: bytes) -> bytes:
        """Take a cosigner's signature, or its refusal."""
        try:
            key, answer = unseal(self._params.chain_id, Cosignature, data)
        except MessageError as error:
            raise EngineError(str(error)) from None
        asked = self._asked
        if asked is None or answer.certificate != asked.digest:
            return b""  # of an earlier proposal
        keys = self._params.keys_at(asked.certificate.height).keys
        if key != self._members.keys().get(member) or key not in keys:
            raise EngineError(f"{key.hex()} is not the key of the cosigner {member}")
        if answer.refusal:
            asked.refusals[member] = answer.refusal, answer.detail
        elif verify_schnorr(key, asked.certificate.sighash(self._params.chain_id), answer.signature):
            asked.signatures[keys.index(key)] = answer.signature
        else:
            raise EngineError("the signature does not verify")
        self._engine.notify()
        return b""
