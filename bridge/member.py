"""What miners and cosigners have in common: a folder, a key, and a connection to their coordinator.

A member's folder has

    ROLE.json       its name, the broker's address, the network's parameters, and where its job is
    ROLE.key        its secret key, which never leaves this machine
    broker.seed     the credential that opens the broker's door, and proves nothing else
    training.conf   the options that its node needs
    status.json     what it does now
    store/          models and other files by their hash

ROLE is `miner` or `cosigner`.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import time
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from coincurve import PrivateKey

from traincert.bridge.broker import Credential, connect, connect_patiently
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.errors import BridgeError
from traincert.bridge.invitations import COSIGNER, MINER, Invitation
from traincert.bridge.keys import create_secret, load_secret
from traincert.bridge.messages import Join, M, Message, MessageError, seal, unseal
from traincert.trainer.engines.broker import Connection, RefusedError, read_poll_answer
from traincert.trainer.job import TrainingJob, differences
from traincert.trainer.store import write_file

VERSION = 1
"""Of ROLE.json."""
POLL_SLACK = 4.0
"""Seconds by which the answer to a poll may be late."""


class View(Protocol):
    """Shows what a member does."""

    def say(self, event: str, text: str, **facts: Any) -> None:
        """Show an event: a short name for programs, a sentence for people, and facts for programs."""


class MemberFolder:
    """A member's folder, see above."""

    def __init__(self, folder: Path, role: str) -> None:
        """Open a folder that `create` made. Raises BridgeError if it is none, KeyFileError for a key of wrong form."""
        self.folder = folder
        self.store = folder / "store"
        path = folder / f"{role}.json"
        try:
            facts = json.loads(path.read_text())
            if facts["version"] != VERSION:
                raise BridgeError(f"{path} has format {facts['version']}, this traincert reads format {VERSION}")
            self.name: str = facts["name"]
            self.job: str = facts["job"]
            self.params = TrainingParams.from_node_options(facts["options"])
            self.coordinator = self.params.keys_at(self.params.start_height).keys[0]
            seed = (folder / "broker.seed").read_text().strip()
            self.credential = Credential(facts["url"], facts["ca"], seed)
        except FileNotFoundError:
            raise BridgeError(f"{folder} is no {role}'s folder: run traincert {role} join {folder}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BridgeError(f"{path} cannot be read: {error!r}") from None
        self.secret = load_secret(folder / f"{role}.key")

    @classmethod
    def of_any_role(cls, folder: Path) -> MemberFolder:
        """Open a miner's or a cosigner's folder. Raises as the constructor does."""
        for role in (MINER, COSIGNER):
            if (folder / f"{role}.json").exists():
                return cls(folder, role)
        raise BridgeError(f"{folder} is neither a miner's folder nor a cosigner's")

    @classmethod
    def create(cls, folder: Path, invitation: Invitation, job: str) -> MemberFolder:
        """Make a member's folder, with a new key unless it has one. `job` is a job's name or file.

        Raises KeyFileError or OSError if something cannot be written.
        """
        role = invitation.role
        (folder / "store").mkdir(parents=True, exist_ok=True)
        if not (folder / f"{role}.key").exists():
            create_secret(folder / f"{role}.key")
        write_file(folder / "broker.seed", invitation.seed.encode() + b"\n")
        write_file(folder / "training.conf", invitation.params.conf().encode(), 0o644)
        facts = {
            "version": VERSION,
            "name": invitation.name,
            "url": invitation.url,
            "ca": invitation.ca,
            "options": invitation.options,
            "job": TrainingJob.located(job),
        }
        write_file(folder / f"{role}.json", json.dumps(facts, indent=1).encode() + b"\n")
        return cls(folder, role)

    def lock(self) -> IO[str]:
        """Lock the folder until the returned file is closed. Raises BridgeError if another process has it open."""
        file = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise BridgeError(f"{self.folder} is in use by another process") from None
        return file

    def connection(self, view: View, *, patient: bool = False) -> Connection:
        """Return a connection to the broker, which is not open yet. `view` is told of each silence.

        If it is `patient`, opening it waits for a broker that does not run yet.
        """

        def on_lost(lost: bool) -> None:
            view.say("broker", "the broker is away: waiting for it" if lost else "the broker is there again", lost=lost)

        def on_silent(silent: bool) -> None:
            text = "the coordinator does not answer: waiting for it" if silent else "the coordinator answers again"
            view.say("coordinator", text, silent=silent)

        def on_wait(text: str) -> None:
            view.say("broker", text, lost=True)

        if patient:
            return Connection(partial(connect_patiently, self.credential, on_wait), on_lost, on_silent)
        return Connection(partial(connect, self.credential), on_lost, on_silent)


class Member:
    """A member's side of the conversation with its coordinator."""

    def __init__(self, folder: MemberFolder, job: TrainingJob, connection: Connection) -> None:
        self.connection = connection
        self._folder = folder
        self._job = job
        self._key = PrivateKey(folder.secret)
        self.key: bytes = self._key.public_key_xonly.format()
        self._since: dict[str, Any] = {"boot": "", "version": 0, "session": secrets.token_hex(8)}
        self._hold = 0.0  # the time for which the coordinator holds polls, seconds

    def register(self) -> None:
        """Register our key with the coordinator. It may be registered already.

        Raises BridgeError if the coordinator does not take it, is another one, or trains another job.
        """
        self.check_job()  # first: a member that cannot take part must not use up its invitation
        try:
            answer = self.ask("join", Join(self._folder.name))
        except RefusedError as error:
            raise BridgeError(str(error)) from None
        if answer != self._folder.coordinator:
            raise BridgeError("the coordinator has another key than the invitation says: ask for a new invitation")

    def check_job(self) -> None:
        """Raise BridgeError that says in what the coordinator's job differs from ours, if it does."""
        theirs = json.loads(self.connection.ask("job"))
        if different := differences(self._job.shared_identity(), theirs):
            raise BridgeError(
                f"the coordinator trains another job than {self._folder.job}: {', '.join(different)}: use the same "
                "files as the coordinator"
            )

    def poll(self) -> dict[str, bytes]:
        """Ask what there is for us, and wait a while if there is nothing. Return statements by kind.

        Raises BridgeError if the coordinator refuses us, or if a clock is wrong, and EngineError if its answer is
        malformed.
        """
        began = time.time()
        try:
            asked = json.dumps(self._since).encode()
            answer, notices = read_poll_answer(self.connection.ask("poll", asked, seconds=self._hold + POLL_SLACK))
        except RefusedError as error:
            raise BridgeError(str(error)) from None
        self._hold = answer["hold"]
        self._since |= {"boot": answer["boot"], "version": answer["version"]}
        now, limit = time.time(), self._folder.params.round_seconds
        if not began - limit <= answer["time"] <= now + limit:
            raise BridgeError(
                f"this machine's clock differs from the coordinator's by {now - answer['time']:+.0f} seconds, which is "
                f"more than a round ({limit} s): set the clock"
            )
        return notices

    def read(self, kind: type[M], statement: bytes) -> M:
        """Read a statement of the coordinator. Raises MessageError if it is another's, or altered."""
        key, message = unseal(self._folder.params.chain_id, kind, statement)
        if key != self._folder.coordinator:
            raise MessageError(f"a message is signed by {key.hex()}, which is not the coordinator's key")
        return message

    def seal(self, message: Message) -> bytes:
        """Return our statement of a message."""
        return seal(self._key, self._folder.params.chain_id, message)

    def ask(self, kind: str, message: Message) -> bytes:
        """Send a statement until it is answered, and return the answer. Raises RefusedError if it is refused."""
        return self.connection.ask(kind, self.seal(message))


def join(folder: Path, invitation: Invitation, job: str) -> bytes:
    """Make a member's folder, register its key with the coordinator, and return the key (32 bytes).

    `job` is the job's name or file. Raises BridgeError or TrainerError if that cannot be done; another call goes on.
    """
    training_job = TrainingJob.named(job)
    made = MemberFolder.create(folder, invitation, job)
    with Connection(partial(connect, made.credential)) as connection:
        member = Member(made, training_job, connection)
        member.register()
        return member.key
