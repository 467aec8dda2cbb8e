"""`traincert demo`: a network, a coordinator and miners on this machine; cycles; and a check of every claim made."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import bitcoin
from bitcoin.core import CheckBlock, Hash160, ValidationError
from bitcoin.core.script import OP_0, CScript
from coincurve import PrivateKey

from traincert.bridge.beacon import Beacon
from traincert.bridge.certificate import Certificate
from traincert.bridge.chain import CertifiedBlock, certificate_json, read_chain, read_params
from traincert.bridge.coordinator import ClosedSlot, Coordinator
from traincert.bridge.errors import BridgeError, CertificateError
from traincert.bridge.journal import Journal
from traincert.bridge.keys import create_secret, xonly_key
from traincert.bridge.node import NodeClient
from traincert.bridge.params import TrainingKeys, TrainingParams
from traincert.bridge.picture import draw_picture
from traincert.bridge.producer import Producer
from traincert.regtest.network import Network
from traincert.regtest.node import datadir_in_use
from traincert.trainer.cycle import RunState, Trainer
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import Dataset, prepare_dataset, read_examples
from traincert.trainer.state import initial_state, state_hash

WORKERS = 2
COORDINATOR_KEYS = 3
THRESHOLD = 2
MARKER = ".traincert-demo"
PICTURE = "loss.png"


@dataclass(frozen=True)
class Plan:
    """What the user asked for."""

    directory: Path
    cycles: int
    miners: int
    nodes: int
    seed: int
    keep: bool
    round_seconds: int
    compat_pow: bool


class View(Protocol):
    """Shows how the demo is getting on."""

    def step(self, text: str) -> None:
        """Say what is being done now."""

    def update(self, done: int, total: int) -> None:
        """Show how many of the cycle's tasks are done."""

    def absent(self, certificate: Certificate, winner: str, reason: str) -> None:
        """Show that a winner's block did not come in its round's time."""

    def closed(self, slot: ClosedSlot, winner: str) -> None:
        """Show a cycle whose block is in the chain."""


@dataclass(frozen=True)
class Claim:
    """A sentence that the demo prints, and whether it was found true."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Outcome:
    """The chain as it was read back from the first node, the winners' names by key, and the claims."""

    chain: Sequence[CertifiedBlock]
    names: dict[bytes, str]
    claims: Sequence[Claim]


def run_demo(bitcoind: Path, plan: Plan, view: View) -> Outcome:
    """Run the demo: `plan.cycles` cycles on a network of its own, then check what came of them.

    Every process it started is stopped when this returns or raises; with `plan.keep` only the nodes are left, and only
    if it returns.

    Raises BridgeError, RegtestError or TrainerError if it cannot be run to its end.
    """
    directory = plan.directory
    _prepare_directory(directory)
    view.step("preparing the data")
    job = replace(TrainingJob.named("digits"), seed=plan.seed)
    dataset = prepare_dataset(job, directory / "dataset")

    keys = directory / "keys"
    coordinator_secrets = [create_secret(keys / f"coordinator{i}.key") for i in range(COORDINATOR_KEYS)]
    beacon = Beacon(create_secret(keys / "beacon.key"))
    miner_secrets = [create_secret(keys / f"miner{i}.key") for i in range(plan.miners)]
    names = {xonly_key(secret): f"miner{i}" for i, secret in enumerate(miner_secrets)}
    coordinator_keys = TrainingKeys(THRESHOLD, tuple(map(xonly_key, coordinator_secrets)))
    params = TrainingParams({1: coordinator_keys}, beacon.anchor, state_hash(initial_state(job)), plan.round_seconds)

    view.step(f"starting {plan.nodes} nodes")
    network = Network(bitcoind, directory, plan.nodes, params.node_options(), keep=plan.keep)
    network.start()
    try:
        with ExitStack() as stack:
            clients = [stack.enter_context(NodeClient.from_datadir(node.datadir)) for node in network.nodes]
            view.step(f"starting {WORKERS} worker processes")
            engine = stack.enter_context(LocalEngine(job, directory / "store", workers=WORKERS))
            trainer = stack.enter_context(Trainer(dataset, engine))
            state = trainer.start()
            producers = {
                xonly_key(secret): Producer(
                    secret,
                    network.nodes[i % plan.nodes].datadir,
                    payout_script(secret),
                    compat_pow=plan.compat_pow,
                )
                for i, secret in enumerate(miner_secrets)
            }
            signers = {i: PrivateKey(coordinator_secrets[i]) for i in range(THRESHOLD)}
            journal = Journal(directory / "journal.sqlite")
            coordinator = Coordinator(params, signers, beacon, journal, clients[0], trainer, state)

            def on_absent(certificate: Certificate, reason: str) -> None:
                view.absent(certificate, names[certificate.winner_key], reason)

            slots = []
            for cycle in range(1, plan.cycles + 1):
                view.step(f"cycle {cycle} of {plan.cycles}")
                slots.append(coordinator.close_slot(producers, view.update, on_absent))
                view.closed(slots[-1], names[slots[-1].certificate.winner_key])

            view.step("checking")
            network.wait_until_same_tip()
            chain, claims = _check(clients, params, producers, trainer, coordinator.state, plan)
            accuracies = [state.evaluation.metric, *(slot.result.metric for slot in slots)]
            draw_picture(directory / PICTURE, chain, accuracies, names)
    except BaseException:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave nodes behind
        network.stop()
        raise
    if not plan.keep:
        network.stop()
    return Outcome(chain, names, claims)


def payout_script(secret: bytes) -> CScript:
    """Return the scriptPubKey (P2WPKH, BIP141) that a miner is paid to: its own key's."""
    return CScript([OP_0, Hash160(PrivateKey(secret).public_key.format())])


def _prepare_directory(directory: Path) -> None:
    """Make the directory, or empty it of what a former demo left."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not (directory / MARKER).exists():
            raise BridgeError(f"{directory} is not empty, and not a former demo's: choose another with --data")
        for datadir in sorted(directory.glob("node*")):
            if datadir_in_use(datadir):
                stop = f"bitcoin-cli -datadir={datadir.absolute()} stop"
                raise BridgeError(f"a node is running in {datadir}: stop it first ({stop}), or choose another --data")
        for entry in directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != MARKER:
                entry.unlink()
        (directory / MARKER).touch()
    except OSError as error:
        raise BridgeError(f"cannot use {directory}: {error.strerror}: {error.filename}") from error


def _check(
    clients: Sequence[NodeClient],
    params: TrainingParams,
    producers: dict[bytes, Producer],
    trainer: Trainer,
    state: RunState,
    plan: Plan,
) -> tuple[Sequence[CertifiedBlock], list[Claim]]:
    """Read the chain back and find out whether what the demo is about to say is true."""
    chain = read_chain(clients[0], params)
    tips = {client.call("getbestblockhash") for client in clients}
    before, after = chain[0].certificate.loss_before / 1e9, chain[-1].certificate.loss_after / 1e9
    accuracy = trainer.test(state.model).metric
    job, target = trainer.job, trainer.job.target_metric
    checked = target is not None and plan.cycles >= job.cycles
    bar = f" (bar: {target})" if checked else ""
    pow_checked = "included" if plan.compat_pow else "aside"
    claims = [
        Claim(f"all {len(clients)} nodes have the same tip, block {len(chain)}", tips == {chain[-1].hash}),
        Claim("the chain has a block for every cycle", len(chain) == plan.cycles),
        Claim(
            "on every node every certificate is signed, every draw fair, beacon and lineage unbroken",
            all(_is_valid(client, params) for client in clients),
        ),
        Claim(
            "the nodes' gettrainingcertificate says the same as the blocks",
            all(_same_certificates(client, chain) for client in clients),
        ),
        Claim(
            f"python-bitcoinlib's CheckBlock takes every block, proof of work {pow_checked}",
            _check_blocks(chain, check_pow=plan.compat_pow),
        ),
        Claim(
            "every block pays its winner, to its own address",
            all(
                each.block.vtx[0].vout[0].scriptPubKey == producers[each.certificate.winner_key].payout_script
                for each in chain
            ),
        ),
        Claim(
            "the model is the one that the tip commits to", state_hash(state.model) == chain[-1].certificate.model_after
        ),
        Claim(f"held-out loss fell from {before:.4f} to {after:.4f} nats", after < before),
        Claim(
            f"accuracy on {job.test_examples} test images that no miner has: {accuracy:.4f}{bar}",
            _is_unseen(trainer.dataset) and (not checked or target is None or accuracy >= target),
        ),
    ]
    return chain, claims


def _is_valid(client: NodeClient, params: TrainingParams) -> bool:
    try:
        return read_params(client) == params and bool(read_chain(client, params))
    except CertificateError:
        return False


def _same_certificates(client: NodeClient, chain: Sequence[CertifiedBlock]) -> bool:
    return all(client.call("gettrainingcertificate", each.hash) == certificate_json(each) for each in chain)


def _check_blocks(chain: Sequence[CertifiedBlock], *, check_pow: bool) -> bool:
    bitcoin.SelectParams("regtest")  # the library's own, process-wide setting: the target that it allows
    try:
        for each in chain:
            CheckBlock(each.block, fCheckPoW=check_pow)
    except ValidationError:
        return False
    return True


def _is_unseen(dataset: Dataset) -> bool:
    """Whether no test image is in any miner's shard."""

    def images(folder: Path, digest: bytes) -> set[bytes]:
        (inputs,) = read_examples(dataset.job, folder, digest).inputs
        return {image.numpy().tobytes() for image in inputs}

    trained = set[bytes]().union(*(images(dataset.shard_folder, shard) for shard in dataset.shards))
    return trained.isdisjoint(images(dataset.held_out_folder, dataset.test))
