"""A coordinator's folder: what makes a network.

Its folder has

    coordinator.json  the network's parameters, and where the job is
    keys/             the secrets: the coordinator's key, and the beacon
    broker/           the broker's configuration, see broker.py
    members.sqlite    who takes part
    run/              the run folder: the job, its data, and each cycle's record
    cycle.sqlite      the open cycle
    journal.sqlite    the certificates that were signed
    training.conf     the options that every node of the network needs

This module imports torch only to make a folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from traincert.bridge.broker import Members, check_name, create_broker
from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.errors import BridgeError
from traincert.bridge.invitations import Invitation
from traincert.bridge.keys import create_secret, xonly_key
from traincert.bridge.members import MemberList
from traincert.trainer.job import TrainingJob
from traincert.trainer.store import write_file

VERSION = 1
"""Of coordinator.json."""


@dataclass(frozen=True)
class Settings:
    """What `CoordinatorFolder.create` needs to know. `cosigners` are x-only keys, 32 bytes each."""

    job: str
    hosts: Sequence[str]
    port: int
    round_seconds: int = 60
    cosigners: Sequence[bytes] = ()
    threshold: int = 1
    start_height: int = 1


class CoordinatorFolder:
    """A coordinator's folder, see above."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that `create` made. Raises BridgeError if it is none."""
        self.folder = folder
        path = folder / "coordinator.json"
        try:
            facts = json.loads(path.read_text())
            if facts["version"] != VERSION:
                raise BridgeError(f"{path} has format {facts['version']}, this traincert reads format {VERSION}")
            self.job: str = facts["job"]
            self.params = TrainingParams.from_node_options(facts["options"])
        except FileNotFoundError:
            raise BridgeError(
                f"{folder} is no coordinator's folder: run traincert coordinator init {folder} --job JOB"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BridgeError(f"{path} cannot be read: {error!r}") from None
        self.members = MemberList(folder / "members.sqlite")

    @classmethod
    def create(cls, folder: Path, settings: Settings, job: TrainingJob) -> CoordinatorFolder:
        """Make the folder of a new network: keys, broker, prepared data.

        Raises BridgeError if it is there already, KeyFileError or OSError if something cannot be written, and
        TrainerError if the job cannot be used.
        """
        if folder.exists() and any(folder.iterdir()):
            raise BridgeError(f"{folder} is not empty: choose another folder")
        if not 1 <= settings.threshold <= 1 + len(settings.cosigners):
            raise BridgeError(f"{settings.threshold} signatures of {1 + len(settings.cosigners)} keys are impossible")
        from traincert.trainer.records import RunFolder  # torch takes seconds to import
        from traincert.trainer.state import initial_state, state_hash

        unfinished = folder.with_name(f"{folder.name}.unfinished")  # renamed when complete
        shutil.rmtree(unfinished, ignore_errors=True)
        secret = create_secret(unfinished / "keys" / "coordinator.key")
        beacon = Beacon(create_secret(unfinished / "keys" / "beacon.key"))
        keys = TrainingKeys(settings.threshold, (xonly_key(secret), *settings.cosigners))
        model = state_hash(initial_state(job))
        params = TrainingParams({settings.start_height: keys}, beacon.anchor, model, settings.round_seconds)
        create_broker(unfinished, settings.hosts, settings.port)
        with RunFolder(unfinished / "run", job) as run:
            run.dataset()
        facts = {"version": VERSION, "job": settings.job, "options": params.node_options()}
        write_file(unfinished / "coordinator.json", json.dumps(facts, indent=1).encode() + b"\n")
        write_file(unfinished / "training.conf", params.conf().encode(), 0o644)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
        return cls(folder)

    def invite(self, name: str, role: str) -> Invitation:
        """Let a member in, and return its invitation. An earlier invitation of this name ends.

        Raises BridgeError if a member of this name has joined already.
        """
        check_name(name)
        self.members.invite(name, role)
        credential = Members(self.folder).admit(name)
        digest = TrainingJob.named(self.job).digest().hex()
        return Invitation(name, role, *credential, options=self.params.node_options(), job=digest)

    def remove(self, name: str) -> None:
        """End a member's part, at once. Raises BridgeError if there is no such member."""
        broker = Members(self.folder)
        if name in broker.names():  # first the broker: if it does not take the change, another call repeats it
            broker.remove(name)
        self.members.remove(name)
