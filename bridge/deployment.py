"""All roles of one training network on this machine. Each cycle of the job is closed by a block on running nodes.

It begins with the first cycle, or goes on after an interruption. Its folder has

    keys/           the secrets of the coordinator and of all miners
    run/            the run folder: the job, its data, and each cycle's record; `traincert job replay` reads it
    journal.sqlite  the certificates that were signed
    node0/, ...     the nodes' data directories
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.params import TrainingKeys, TrainingParams
from traincert.bridge.coordinator import ClosedSlot, Coordinator
from traincert.bridge.errors import BridgeError
from traincert.bridge.keys import NetworkKeys, create_network_keys, load_network_keys, payout_script, xonly_key
from traincert.bridge.producer import NodeProducer
from traincert.bridge.rpc import NodeClient
from traincert.bridge.signer import Signer
from traincert.regtest.node import write_conf
from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import RunFolder
from traincert.trainer.state import initial_state, state_hash

JOB = "digits"
WORKERS = 2
COORDINATOR_KEYS = 3
THRESHOLD = 2
RPC_PORT = "18443"


class View(Protocol):
    """Shows the progress of the cycles."""

    def step(self, text: str) -> None:
        """Show the step that begins now."""

    def update(self, done: int, total: int) -> None:
        """Show how many of the cycle's tasks are done."""

    def absent(self, certificate: Certificate, winner: str, reason: str) -> None:
        """Show that a winner's block did not come within its round."""

    def closed(self, slot: ClosedSlot, winner: str) -> None:
        """Show a cycle that the chain has a block for."""


@dataclass(frozen=True)
class Deployment:
    """What `open_deployment` gives: the run, and who takes part in it.

    `clients` has a client for each node, in order. `names` has the miners' names by their key.
    """

    run: RunFolder
    trainer: Trainer
    clients: Sequence[NodeClient]
    producers: Mapping[bytes, NodeProducer]
    coordinator: Coordinator
    names: Mapping[bytes, str]
    view: View

    def train(self, cycles: int) -> None:
        """Train until the run has `cycles` cycles. Each is saved as soon as the chain has its block.

        Raises BridgeError, RegtestError or TrainerError if that cannot be done.
        """

        def on_absent(certificate: Certificate, reason: str) -> None:
            self.view.absent(certificate, self.names[certificate.winner_key], reason)

        while self.run.cycles < cycles:
            self.view.step(f"cycle {self.run.cycles + 1} of {cycles}")
            slot = self.coordinator.close_slot(self.producers, self.view.update, on_absent)
            self.view.closed(slot, self.names[slot.certificate.winner_key])


@contextmanager
def open_deployment(
    directory: Path,
    job: TrainingJob,
    keys: NetworkKeys,
    params: TrainingParams,
    producers: Sequence[NodeProducer],
    datadirs: Sequence[Path],
    view: View,
) -> Iterator[Deployment]:
    """Open the deployment in a folder, on the nodes that run on these data directories.

    The first node is the coordinator's. `producers` are the miners, see `make_producers`.

    Raises BridgeError, RegtestError or TrainerError if that cannot be done, or if another process has it open.
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
        signer = Signer(directory / "journal.sqlite", params.chain_id, dict(enumerate(keys.coordinators[:THRESHOLD])))
        coordinator = Coordinator(params, signer, Beacon(keys.beacon), clients[0], trainer, run)
        by_key = {producer.miner_key: producer for producer in producers}
        names = {key: f"miner{i}" for i, key in enumerate(by_key)}
        yield Deployment(run, trainer, clients, by_key, coordinator, names, view)


def make_producers(keys: NetworkKeys, datadirs: Sequence[Path]) -> list[NodeProducer]:
    """Return a producer for each miner's key, spread over the nodes; each is paid to its own key (P2WPKH)."""
    return [
        NodeProducer(secret, payout_script(secret), datadirs[i % len(datadirs)]) for i, secret in enumerate(keys.miners)
    ]


def prepare_coordinator(directory: Path, miners: int, nodes: int) -> None:
    """Make the keys of a network, and a data directory with a bitcoin.conf for each node.

    The nodes are for containers with the host names node0, node1, ..., one container each. Keys that exist already are
    kept.

    Raises KeyFileError or OSError if something cannot be written.
    """
    folder = directory / "keys"
    if not folder.exists():
        unfinished = directory / "keys.unfinished"  # renamed when complete: an interrupted one is made anew
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
            "rpcallowip": "0.0.0.0/0",  # the containers' network decides who reaches it; the cookie is the password
            "rpcbind": "0.0.0.0",  # noqa: S104 - a container's own network
            "rpcconnect": name,
            "rpcport": RPC_PORT,
        }
        (directory / name).mkdir(exist_ok=True)
        write_conf(directory / name, options)


def run_coordinator(directory: Path, view: View) -> int:
    """Train JOB to its last cycle on the nodes of a folder that `prepare_coordinator` made.

    Returns the number of cycles.

    Raises BridgeError, RegtestError or TrainerError if that cannot be done.
    """
    if not (directory / "keys").exists():
        raise BridgeError(f"{directory} is not prepared: run traincert coordinator prepare {directory}")
    job, keys = TrainingJob.named(JOB), load_network_keys(directory / "keys")
    datadirs = sorted(directory.glob("node*"))
    params, producers = network_params(keys, job), make_producers(keys, datadirs)
    with open_deployment(directory, job, keys, params, producers, datadirs, view) as deployment:
        deployment.train(job.cycles)
    return job.cycles


def network_params(keys: NetworkKeys, job: TrainingJob, round_seconds: int = 60) -> TrainingParams:
    """Return the parameters of the network that trains a job with these keys."""
    coordinators = TrainingKeys(THRESHOLD, tuple(map(xonly_key, keys.coordinators)))
    model = state_hash(initial_state(job))
    return TrainingParams({1: coordinators}, Beacon(keys.beacon).anchor, model, round_seconds)
