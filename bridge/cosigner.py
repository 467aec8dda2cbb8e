"""A cosigner: it has one coordinator key, and signs a certificate only if it found true itself what it says.

Besides what every member's folder has (member.py), its folder has journal.sqlite: what it has signed. Its key is one of
the network's coordinator keys. `checker.py` says what it checks.
"""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from traincert.bridge.chain import check_network
from traincert.bridge.checker import PATIENCE, Checker, CosignError, parse_certificate
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.codec import Reader
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.errors import BridgeError, JournalError
from traincert.bridge.invitations import COSIGNER
from traincert.bridge.keys import create_secret, load_secret, xonly_key
from traincert.bridge.member import Member, MemberFolder, View
from traincert.bridge.messages import Cosignature, Proposal
from traincert.bridge.rpc import NodeClient
from traincert.bridge.signer import Signer
from traincert.regtest.errors import RegtestError
from traincert.trainer.accounting import check_accountant
from traincert.trainer.engines.broker import RefusedError
from traincert.trainer.job import TrainingJob
from traincert.trainer.store import prune, read_blob, write_blob

MAX_PATIENCE = 100.0
"""Seconds that it waits at most, for its clock to allow a round too: the coordinator does not wait much longer."""


class CosignerSigner(Signer):
    """A signer with one key, which signs the certificates of one cycle only for a slot."""

    def __init__(self, journal: Path, chain_id: bytes, secret: bytes) -> None:
        super().__init__(journal, chain_id, {0: secret})

    def cosign(self, certificate: Certificate) -> bytes:
        """Return the signature (64 bytes) of a certificate, which is in the journal before.

        Raises CosignError, and signs nothing, if the journal has another record's certificate for this slot, in any
        round (second-body), or cannot be used (no-journal).
        """
        try:
            with closing(self._connect()) as database:
                query = "SELECT round, body FROM signed WHERE (chain_id, prev_block, height) = (?, ?, ?)"
                slot = (self._chain_id, certificate.prev_block, certificate.height)
                rows: list[tuple[int, bytes]] = database.execute(query, slot).fetchall()
            for round_, body in rows:
                signed = Certificate.read(Reader(body + b"\0"))  # no signatures
                if signed.record != certificate.record or (round_ == certificate.round and body != certificate.body()):
                    raise CosignError(
                        "second-body",
                        f"we have signed another certificate for block {certificate.height}, in round {round_}: record "
                        f"{signed.record.hex()}, now {certificate.record.hex()}",
                    )
            (signature,) = self.sign(certificate).coordinator_signatures
        except (JournalError, sqlite3.Error) as error:
            raise CosignError("no-journal", str(error)) from None
        return signature.signature


def cosign(checker: Checker, signer: CosignerSigner, proposal: Proposal) -> Cosignature:
    """Return the answer to a proposal: a signature if it is true, else why not.

    Raises StoppedError if the connection that the checker uses has ended, and TrainerError if the job cannot be used.
    """
    digest = hashlib.sha256(proposal.certificate).digest()
    try:
        return Cosignature(digest, signer.cosign(checker.check(proposal)), "", "")
    except CosignError as error:
        name, detail = error.name, error.detail
    except RegtestError as error:
        name, detail = "no-node", str(error)
    return Cosignature(digest, b"", name[:40], " ".join(detail.split())[:1000])  # one line


def make_cosigner_key(folder: Path) -> bytes:
    """Make a cosigner's key in its folder, unless it is there. Return the public key (32 bytes, x-only).

    The key comes first: the network's parameters have it. Raises KeyFileError if it cannot be written or read.
    """
    path = folder / "cosigner.key"
    return xonly_key(load_secret(path) if path.exists() else create_secret(path))


def check_key(key: bytes, params: TrainingParams) -> None:
    """Raise BridgeError unless a public key (32 bytes) is one of a network's coordinator keys, and not the first."""
    if any(key == each.keys[0] for each in params.keys.values()):
        raise BridgeError(f"the key {key.hex()} is the coordinator's own: a cosigner needs another one")
    if not any(key in each.keys for each in params.keys.values()):
        raise BridgeError(
            f"the key {key.hex()} is none of the network's coordinator keys: the network must be made with it "
            "(traincert coordinator init --cosigner)"
        )


class Cosigner:
    """The program of a cosigner. `node` is its own node."""

    def __init__(self, folder: MemberFolder, job: TrainingJob, member: Member, node: NodeClient, view: View) -> None:
        self._folder = folder
        self._member = member
        self._view = view
        params = folder.params
        self._signer = CosignerSigner(folder.folder / "journal.sqlite", params.chain_id, folder.secret)
        patience = min(PATIENCE + params.round_seconds, MAX_PATIENCE)
        self._checker = Checker(job, params, node, self._fetch, partial(write_blob, folder.store), patience)

    def run(self) -> None:
        """Check and sign what the coordinator proposes, until the program is interrupted.

        Raises BridgeError or TrainerError if this cosigner cannot take part.
        """
        self._member.register()
        key = self._member.key.hex()
        self._view.say("joined", f"{self._folder.name} cosigns with the key {key}", key=key)
        while True:
            for kind, statement in self._member.poll().items():
                if kind == "proposal":
                    self.answer(statement)

    def answer(self, statement: bytes) -> None:
        """Check a sealed proposal, and send the signature or the refusal. Raises MessageError if it is another's."""
        proposal = self._member.read(Proposal, statement)
        answer = self._checked(proposal)
        self._say(proposal, answer)
        try:
            self._member.ask("cosign", answer)
        except RefusedError as error:
            raise BridgeError(f"the coordinator refuses the answer: {error}") from None

    def _checked(self, proposal: Proposal) -> Cosignature:
        """Return the answer. The store keeps what it had, or what the next check needs if this one found no fault."""
        kept = {bytes.fromhex(path.name) for path in self._folder.store.iterdir() if len(path.name) == 64}
        answer = cosign(self._checker, self._signer, proposal)
        if answer.signature:
            kept = self._checker.needed
        prune(self._folder.store, kept)
        return answer

    def _say(self, proposal: Proposal, answer: Cosignature) -> None:
        facts: dict[str, Any] = {"certificate": answer.certificate.hex()}
        where = "a proposal"
        try:
            certificate = parse_certificate(proposal.certificate, "wrong-form")
            facts |= {"height": certificate.height, "round": certificate.round, "record": certificate.record.hex()}
            where = f"block {certificate.height}, round {certificate.round}"
        except CosignError:
            pass  # the answer says so
        if answer.refusal:
            facts |= {"refusal": answer.refusal, "detail": answer.detail}
            self._view.say("not-cosigned", f"{where}: not signed: {answer.refusal}: {answer.detail}", **facts)
        else:
            self._view.say("cosigned", f"{where}: found true, signed", **facts)

    def _fetch(self, digest: bytes) -> bytes:
        self._member.connection.fetch(digest, self._folder.store)
        return read_blob(self._folder.store, digest)


def run_cosigner(folder: Path, datadir: Path, view: View) -> None:
    """Run a cosigner until it is interrupted. `datadir` is the data directory of its own node.

    Raises BridgeError, RegtestError or TrainerError if it cannot take part.
    """
    opened = MemberFolder(folder, COSIGNER)
    check_key(xonly_key(opened.secret), opened.params)
    job = TrainingJob.named(opened.job)
    check_accountant(job)
    with ExitStack() as stack:
        stack.enter_context(opened.lock())
        node = stack.enter_context(NodeClient.from_datadir(datadir))
        check_network(node, opened.params)
        member = Member(opened, job, stack.enter_context(opened.connection(view, patient=True)))
        Cosigner(opened, job, member, node, view).run()
