"""A job's cycles on running nodes, each closed by a block, from the first one or from where they were interrupted.

In the coordinator's folder:

    keys/           secrets
    run/            the job, its data, and what each cycle came to: `traincert job replay` reads it
    journal.sqlite  what was signed
    node0/, ...     the nodes' data directories
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bitcoin.core import Hash160
from bitcoin.core.script import OP_0, CScript
from coincurve import PrivateKey

from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.lottery import ContributionTable, Leaf
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.coordinator import ClosedSlot, Coordinator
from traincert.bridge.errors import BridgeError
from traincert.bridge.keys import NetworkKeys, create_network_keys, load_network_keys, xonly_key
from traincert.bridge.producer import Producer
from traincert.bridge.rpc import NodeClient
from traincert.bridge.signer import Journal
from traincert.regtest.node import write_conf
from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import Record, RunFolder
from traincert.trainer.state import initial_state, state_hash

JOB = "digits"
WORKERS = 2
COORDINATOR_KEYS = 3
THRESHOLD = 2
RPC_PORT = "18443"


class View(Protocol):
    """Shows how the cycles are getting on."""

    def step(self, text: str) -> None:
        """Say what is being done now."""

    def update(self, done: int, total: int) -> None:
        """Show how many of the cycle's tasks are done."""

    def absent(self, certificate: Certificate, winner: str, reason: str) -> None:
        """Show that a winner's block did not come in its round's time."""

    def closed(self, slot: ClosedSlot, winner: str) -> None:
        """Show a cycle whose block is in the chain."""


@dataclass(frozen=True)
class NetworkRun:
    """What `open_run` gives: the run, and who takes part in it. `clients` are of the nodes, in their order."""

    run: RunFolder
    trainer: Trainer
    clients: Sequence[NodeClient]
    producers: Mapping[bytes, Producer]
    coordinator: Coordinator
    names: Mapping[bytes, str]
    view: View

    def train(self, cycles: int) -> None:
        """Go on until there have been so many cycles, saving each when its block is in the chain.

        Raises BridgeError or TrainerError if that cannot be done.
        """

        def on_absent(certificate: Certificate, reason: str) -> None:
            self.view.absent(certificate, self.names[certificate.winner_key], reason)

        while self.run.cycles < cycles:
            self.view.step(f"cycle {self.run.cycles + 1} of {cycles}")
            slot = self.coordinator.close_slot(self.producers, self.view.update, on_absent)
            self.run.save(slot.result)
            self.view.closed(slot, self.names[slot.certificate.winner_key])


@contextmanager
def open_run(
    directory: Path,
    job: TrainingJob,
    keys: NetworkKeys,
    params: TrainingParams,
    datadirs: Sequence[Path],
    view: View,
    *,
    compat_pow: bool = True,
) -> Iterator[NetworkRun]:
    """Open the run in a coordinator's folder, on the nodes with these data directories.

    The first node is also the coordinator's; miners are spread over all.

    Raises BridgeError or TrainerError if that cannot be done, or if another process has it open.
    """
    with ExitStack() as stack:
        run = stack.enter_context(RunFolder(directory / "run", job))
        view.step("preparing the data")
        dataset = run.dataset()
        clients = [stack.enter_context(NodeClient.from_datadir(datadir)) for datadir in datadirs]
        view.step(f"starting {WORKERS} worker processes")
        engine = stack.enter_context(LocalEngine(job, run.store, workers=WORKERS))
        trainer = stack.enter_context(Trainer(dataset, engine))
        if not run.records:
            run.begin(trainer.start(), dataset)
        producers = {
            xonly_key(secret): Producer(
                secret, datadirs[i % len(datadirs)], payout_script(secret), compat_pow=compat_pow
            )
            for i, secret in enumerate(keys.miners)
        }
        coordinator = Coordinator(
            params,
            {i: PrivateKey(keys.coordinators[i]) for i in range(THRESHOLD)},
            Beacon(keys.beacon),
            Journal(directory / "journal.sqlite"),
            clients[0],
            trainer,
            run.load(),
            _table(run.records[-1]),
        )
        names = {key: f"miner{i}" for i, key in enumerate(producers)}
        yield NetworkRun(run, trainer, clients, producers, coordinator, names, view)


def prepare_containers(directory: Path, miners: int, nodes: int) -> None:
    """Make the keys of a network, and a data directory with a bitcoin.conf for each of its nodes.

    Each node has its container, whose host name is the data directory's: node0, node1, ... What is there already stays.

    Raises KeyFileError or OSError if something cannot be written.
    """
    folder = directory / "keys"
    if not folder.exists():
        unfinished = directory / "keys.unfinished"  # one that was interrupted begins again
        shutil.rmtree(unfinished, ignore_errors=True)
        create_network_keys(unfinished, COORDINATOR_KEYS, miners)
        unfinished.rename(folder)
    params = network_params(load_network_keys(folder), TrainingJob.named(JOB))
    names = [f"node{i}" for i in range(nodes)]
    for name in names:
        options = {
            **params.node_options(),
            "addnode": [other for other in names if other != name],
            "printtoconsole": "1",
            "rpcallowip": "0.0.0.0/0",  # whoever the containers' network lets in, with the cookie's password
            "rpcbind": "0.0.0.0",  # noqa: S104 - a container's own network
            "rpcconnect": name,
            "rpcport": RPC_PORT,
        }
        (directory / name).mkdir(exist_ok=True)
        write_conf(directory / name, options)


def run_containers(directory: Path, view: View) -> int:
    """Train JOB to its last cycle, with the keys and the nodes of a folder that `prepare_containers` made.

    Returns how many cycles there have been.

    Raises BridgeError or TrainerError if that cannot be done.
    """
    if not (directory / "keys").exists():
        raise BridgeError(f"{directory} is not prepared: run traincert coordinator prepare {directory}")
    job, keys = TrainingJob.named(JOB), load_network_keys(directory / "keys")
    datadirs = sorted(directory.glob("node*"))
    with open_run(directory, job, keys, network_params(keys, job), datadirs, view) as run:
        run.train(job.cycles)
    return job.cycles


def network_params(keys: NetworkKeys, job: TrainingJob, round_seconds: int = 60) -> TrainingParams:
    """Return the parameters of the network that trains a job with these keys."""
    coordinators = TrainingKeys(THRESHOLD, tuple(map(xonly_key, keys.coordinators)))
    model = state_hash(initial_state(job))
    return TrainingParams({1: coordinators}, Beacon(keys.beacon).anchor, model, round_seconds)


def payout_script(secret: bytes) -> CScript:
    """Return the scriptPubKey (P2WPKH, BIP141) that a miner is paid to: its own key's."""
    return CScript([OP_0, Hash160(PrivateKey(secret).public_key.format())])


def _table(record: Record) -> ContributionTable:
    """Return the contribution table of a cycle that was saved; it is empty before the first."""
    return ContributionTable(
        Leaf(
            bytes.fromhex(task["miner"]),
            bytes.fromhex(task["update_hash"]),
            task["params"],
            task["loss_reduction"],
            task["weight"],
        )
        for task in record["tasks"]
        if task["refusal"] is None
    )
