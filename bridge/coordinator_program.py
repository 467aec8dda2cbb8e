"""The coordinator as a program: what it needs from all sides, put together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

from coincurve import PrivateKey

from traincert.bridge.broker import connect_patiently, coordinator_credential
from traincert.bridge.chain import check_network
from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.coordinator import ClosedSlot, Coordinator
from traincert.bridge.coordinator_folder import CoordinatorFolder
from traincert.bridge.cosigning import Cosigned
from traincert.bridge.keys import load_secret
from traincert.bridge.members import MemberList
from traincert.bridge.remote_miners import RemoteMiners
from traincert.bridge.rpc import NodeClient
from traincert.bridge.signer import Signer
from traincert.bridge.status import write_status
from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.broker import Connection
from traincert.trainer.engines.nats import NatsEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import RunFolder, standings

STATUS_SECONDS = 1.0
"""How often a running coordinator writes its status."""


class View(Protocol):
    """Shows what a coordinator does."""

    def step(self, text: str) -> None:
        """Show the step that begins now."""

    def update(self, done: int, total: int) -> None:
        """Show how many of the cycle's tasks are done."""

    def absent(self, height: int, winner: str, reason: str) -> None:
        """Show that a winner's block did not come within its round."""

    def closed(self, cycle: Mapping[str, Any]) -> None:
        """Show a cycle that the chain has a block for, see `cycle_facts`."""


@dataclass(frozen=True)
class Program:
    """A coordinator that is ready to run cycles."""

    folder: Path
    coordinator: Coordinator
    engine: NatsEngine
    run: RunFolder
    members: MemberList
    view: View

    def close_slots(self, cycles: int) -> None:
        """Run cycles until the run has so many. Each is recorded before its block is certified."""

        def on_absent(certificate: Certificate, reason: str) -> None:
            self.view.absent(certificate.height, self._name(certificate.winner_key), reason)

        with self._noting():
            while (done := self.coordinator.closed) < cycles:
                self.view.step(f"cycle {done + 1} of {cycles}")
                slot = self.coordinator.close_slot(self.view.update, on_absent)
                self.view.closed(cycle_facts(slot, self._name(slot.certificate.winner_key)))

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep status.json true while the code inside runs."""
        over = Event()

        def note() -> None:
            while not over.wait(STATUS_SECONDS):
                self._note()

        thread = Thread(target=note, name="status", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._note()

    def _note(self) -> None:
        coordinator = {
            "closed": self.coordinator.closed,
            "awaiting": self.coordinator.awaiting,
            "barred": self._barred(),
        }
        write_status(self.folder, coordinator | self.engine.status())

    def _barred(self) -> dict[str, int]:
        """Return until which cycle, counted from 1, members are barred that failed a spot check, by name."""
        known = standings(self.run.records[-1])
        return {
            self._name(miner): each.barred_until + 1
            for miner, each in known.items()
            if each.barred_until > self.run.cycles
        }

    def _name(self, key: bytes) -> str:
        return next((name for name, each in self.members.keys().items() if each == key), key.hex()[:16])


@contextmanager
def open_coordinator(folder: CoordinatorFolder, datadir: Path, miners: int, view: View) -> Iterator[Program]:
    """Connect a coordinator to its node and its broker. The first cycle waits for so many miners.

    Raises BridgeError, RegtestError or TrainerError if that cannot be done, or if another process has it open.
    """
    params, secret = folder.params, load_secret(folder.folder / "keys" / "coordinator.key")
    key = PrivateKey(secret)
    job = TrainingJob.named(folder.job)

    def waiting(present: int, wanted: int) -> None:
        view.step(f"waiting for miners: {present} of {wanted} are present")

    def on_lost(lost: bool) -> None:
        view.step("the broker is away: waiting for it" if lost else "the broker is there again")

    with ExitStack() as stack:
        run = stack.enter_context(RunFolder(folder.folder / "run", job))
        node = stack.enter_context(NodeClient.from_datadir(datadir))
        check_network(node, params)
        view.step("preparing the data")
        dataset = run.dataset()
        privacy = bool(job.privacy)
        remote = RemoteMiners(folder.members, key, params, wanted=miners, waiting=waiting, privacy=privacy)
        connecting = partial(connect_patiently, coordinator_credential(folder.folder), view.step)
        connection = stack.enter_context(Connection(connecting, on_lost))
        engine = NatsEngine(
            job,
            run.store,
            folder.folder / "cycle.sqlite",
            connection,
            members=folder.members.keys,
            read_commit=remote.read_commit,
            make_receipt=remote.make_receipt,
            make_closing=remote.make_closing,
            make_request=remote.make_request,
            shared=remote.shared,
        )
        trainer = stack.enter_context(Trainer(dataset, engine))
        if not run.records:
            run.begin(trainer.start(), dataset)
        remote.attach(engine, trainer, run)
        signer = Signer(folder.folder / "journal.sqlite", params.chain_id, {0: secret})
        cosigned = Cosigned(signer, key, params, folder.members, engine, view.step)
        connection.serve(engine.handlers, folder.members.roles)
        beacon = Beacon(load_secret(folder.folder / "keys" / "beacon.key"))
        coordinator = Coordinator(params, cosigned.sign, beacon, node, trainer, run, remote)
        yield Program(folder.folder, coordinator, engine, run, folder.members, view)


def cycle_facts(slot: ClosedSlot, winner: str) -> dict[str, Any]:
    """Return what is shown of a closed cycle: losses in nano-nats, refusals by reason."""
    certificate, record = slot.certificate, slot.record
    return {
        "height": certificate.height,
        "round": certificate.round,
        "winner": winner,
        "tasks": len(record["tasks"]),
        "refusals": [task["refusal"] for task in record["tasks"] if task["refusal"]],
        "spot_checks": len(record["spot_checks"]),
        "loss_before": certificate.loss_before,
        "loss_after": certificate.loss_after,
        "metric": record["metric"],
        "block": slot.block_hash,
    }
