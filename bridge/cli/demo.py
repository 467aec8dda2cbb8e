"""`traincert demo`: nodes, a coordinator and miners on this machine run some cycles; then every claim is checked."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import bitcoin
from bitcoin.core import CheckBlock, ValidationError

from traincert.bridge.chain import CertifiedBlock, certificate_json, read_chain, read_params
from traincert.bridge.cli.picture import draw_picture
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.deployment import (
    COORDINATOR_KEYS,
    JOB,
    Deployment,
    View,
    make_producers,
    network_params,
    open_deployment,
)
from traincert.bridge.errors import BridgeError, CertificateError
from traincert.bridge.keys import create_network_keys
from traincert.bridge.rpc import NodeClient
from traincert.regtest.network import Network
from traincert.regtest.node import datadir_in_use
from traincert.trainer.examples import Dataset, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.state import state_hash

MARKER = ".traincert-demo"
PICTURE = "loss.png"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of `traincert demo`."""

    directory: Path
    cycles: int
    miners: int
    nodes: int
    seed: int
    keep: bool
    round_seconds: int
    compat_pow: bool


@dataclass(frozen=True)
class Claim:
    """A sentence that the demo prints, and whether its check found it true."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Outcome:
    """The chain as it was read back from the first node, the winners' names by their key, and the claims."""

    chain: Sequence[CertifiedBlock]
    names: Mapping[bytes, str]
    claims: Sequence[Claim]


def run_demo(bitcoind: Path, plan: Plan, view: View) -> Outcome:
    """Run `plan.cycles` cycles on a new network, then check what the demo claims.

    All processes that it starts are stopped when this returns or raises. With `plan.keep` the nodes go on running, but
    only if it returns.

    Raises BridgeError, RegtestError or TrainerError if it cannot be run to its end.
    """
    directory = plan.directory
    _prepare_directory(directory)
    job = replace(TrainingJob.named(JOB), seed=plan.seed)
    keys = create_network_keys(directory / "keys", COORDINATOR_KEYS, plan.miners)
    params = network_params(keys, job, plan.round_seconds)

    view.step(f"starting {plan.nodes} nodes")
    network = Network(bitcoind, directory, plan.nodes, params.node_options(), keep=plan.keep)
    network.start()
    try:
        datadirs = [node.datadir for node in network.nodes]
        producers = make_producers(keys, datadirs)
        for producer in producers:
            producer.compat_pow = plan.compat_pow
        with open_deployment(directory, job, keys, params, producers, datadirs, view) as deployment:
            deployment.train(plan.cycles)
            view.step("checking")
            network.wait_until_same_tip()
            chain, claims = _check(deployment, params, plan)
            names, accuracies = deployment.names, [record["metric"] for record in deployment.run.records]
            draw_picture(directory / PICTURE, chain, accuracies, names)
    except BaseException:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave nodes behind
        network.stop()
        raise
    if not plan.keep:
        network.stop()
    return Outcome(chain, names, claims)


def _prepare_directory(directory: Path) -> None:
    """Make the directory, or remove from it what an earlier demo left."""
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


def _check(deployment: Deployment, params: TrainingParams, plan: Plan) -> tuple[Sequence[CertifiedBlock], list[Claim]]:
    """Read the chain back, and check each claim."""
    producers = deployment.producers
    clients, trainer, state = deployment.clients, deployment.trainer, deployment.coordinator.state
    chain = read_chain(clients[0], params)
    tips = {client.call("getbestblockhash") for client in clients}
    tip = chain[-1].certificate
    before, after = chain[0].certificate.loss_before / 1e9, tip.loss_after / 1e9
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
        Claim("the model is the one that the tip commits to", state_hash(state.model) == tip.model_after),
        Claim(
            "every block commits to the record of its cycle",
            [each.certificate.record for each in chain] == deployment.run.hashes[1:],
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
    bitcoin.SelectParams("regtest")  # the library keeps the network, and so the allowed target, in a global variable
    try:
        for each in chain:
            CheckBlock(each.block, fCheckPoW=check_pow)
    except ValidationError:
        return False
    return True


def _is_unseen(dataset: Dataset) -> bool:
    """Whether no test image is in a miner's shard."""

    def images(folder: Path, digest: bytes) -> set[bytes]:
        (inputs,) = read_examples(dataset.job, folder, digest).inputs
        return {image.numpy().tobytes() for image in inputs}

    trained = set[bytes]().union(*(images(dataset.shard_folder, shard) for shard in dataset.shards))
    return trained.isdisjoint(images(dataset.held_out_folder, dataset.test))
