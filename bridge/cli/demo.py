"""`traincert demo`: nodes, a coordinator and miners on this machine run some cycles; then every claim is checked."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import PIPE
from typing import Any

import bitcoin
import click
from bitcoin.core import CheckBlock, ValidationError

from traincert.bridge.chain import CertifiedBlock, certificate_json, read_chain, read_params
from traincert.bridge.cli.explorer import options_of_demo
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.coordinator_program import View
from traincert.bridge.deployment import TRAINCERT, Deployment
from traincert.bridge.errors import BridgeError, CertificateError
from traincert.bridge.keys import payout_script, xonly_key
from traincert.bridge.rpc import NodeClient
from traincert.regtest.network import Network
from traincert.regtest.node import Node, datadir_in_use
from traincert.regtest.processes import bound_to_us, spawn
from traincert.trainer.examples import Dataset, read_examples
from traincert.trainer.job import TrainingJob, differences
from traincert.trainer.records import RunFolder, number_of
from traincert.trainer.scoring import Scorer, nats
from traincert.trainer.state import state_hash
from traincert.trainer.store import write_file

MARKER = ".traincert-demo"
"""A file in each demo's folder. It is locked while the demo runs."""
PLAN = "demo.json"
"""The file of a demo's folder that says how it was made."""
VERSION = 1
"""Of demo.json."""
OPTIONS = {
    "job": "--job",
    "miners": "--miners",
    "nodes": "--nodes",
    "seed": "--seed",
    "round_seconds": "--round",
    "compat_pow": "--compat-pow",
}
"""What a demo that goes on keeps, and cannot be given otherwise: fields of `Plan`."""
PICTURE = "loss.png"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of `traincert demo`."""

    directory: Path
    job: str
    """A job's name or file."""
    cycles: int
    """How many further cycles; 0: as many as the job says."""
    planned: int | None = None
    """Go on with the demo in the folder, which was to run so many cycles in all. None: make a new one."""
    miners: int
    nodes: int
    seed: int | None
    keep: bool
    round_seconds: int
    compat_pow: bool
    explorer: bool


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
    """Run `plan.cycles` cycles on a new network, or further ones on the network of `plan`, then check what we claim.

    All processes that it starts are stopped when this returns or raises. With `plan.keep` the nodes go on running, but
    only if it returns.

    Raises BridgeError, RegtestError or TrainerError if it cannot be run to its end.
    """
    with _locked(plan):
        return _run(bitcoind, plan, view)


def _run(bitcoind: Path, plan: Plan, view: View) -> Outcome:
    directory = plan.directory
    if plan.planned is None:
        _clear(directory)
    job_name, job = _job(plan)
    cycles = plan.planned or plan.cycles or job.cycles
    _save(plan, cycles)
    view.step("preparing the data")
    deployment = Deployment(directory, job_name, miners=plan.miners, cycles=cycles, round_seconds=plan.round_seconds)
    params = deployment.params
    view.step(f"starting {plan.nodes} nodes")
    network = Network(bitcoind, directory, plan.nodes, params.node_options(), keep=plan.keep)
    for node in network.nodes:
        node.attach()  # it may run since an earlier demo; otherwise it keeps its ports
    try:
        _recover(network.nodes)
        network.start()
        if plan.planned is not None:
            done = network.nodes[0].rpc("getblockcount")
            deployment.cycles = cycles = _cycles_in_all(plan, job, done)
            _save(plan, cycles)
            view.step(f"going on after block {done}")
        datadirs = [node.datadir for node in network.nodes]
        view.step("starting the broker, the coordinator, the cosigners and the miners")
        with deployment, _explorer(directory) if plan.explorer else nullcontext():
            deployment.start(datadirs, [] if plan.compat_pow else ["--no-compat-pow"])
            from traincert.bridge.cli.picture import draw_picture  # slow: the others start meanwhile

            for event in deployment.events():
                show(event, view)
            view.step("checking")
            deployment.terminate()  # they end while we check
            network.wait_until_same_tip()
            names = {xonly_key(secret): name for name, secret in deployment.secrets.items()}
            with ExitStack() as stack:
                clients = [stack.enter_context(NodeClient.from_datadir(datadir)) for datadir in datadirs]
                run = stack.enter_context(RunFolder(deployment.coordinator.folder / "run", job))
                chain, claims = _check(deployment, run, clients, replace(plan, cycles=cycles))
                values = [number_of(record["metric"]) for record in run.records]
                draw_picture(directory / PICTURE, chain, job.metric_names[0], values, names)
    except BaseException:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave nodes behind
        network.stop()
        raise
    if not plan.keep:
        network.stop()
    return Outcome(chain, names, claims)


@contextmanager
def _explorer(directory: Path) -> Iterator[None]:
    """Run an explorer of the demo while the code inside runs, and say where it is."""
    command = bound_to_us([*TRAINCERT, "explorer", *options_of_demo(directory)], "TERM")
    program = subprocess.Popen(command, stdout=PIPE, text=True)
    try:
        if not (line := program.stdout.readline() if program.stdout else ""):
            raise BridgeError("the explorer did not start")  # it said why
        click.echo(line.partition(" (")[0], err=True)
        yield
    finally:
        program.terminate()
        program.communicate()


def _job(plan: Plan) -> tuple[str, TrainingJob]:
    """Return the job that the demo trains, and its name or file. A seed makes it another job, in the demo's folder."""
    name, job = plan.job, TrainingJob.named(plan.job)
    if plan.seed is not None:
        job = replace(job, seed=plan.seed)
        name = str(plan.directory / "job.toml")
        write_file(Path(name), job.to_toml().encode(), 0o644)
        job = TrainingJob.load(Path(name))
    run = plan.directory / "coordinator" / "run"
    if plan.planned is not None and run.exists():
        with RunFolder(run) as opened:
            ours = job.shared_identity()
            theirs = {key: text for key, text in opened.identity.items() if key in ours or key.startswith("module ")}
        if different := differences(ours, theirs):
            raise BridgeError(f"the demo in {plan.directory} trains another job ({', '.join(different)}): {_ANEW}")
    return name, job


_ANEW = "begin anew without --continue, or choose another --data"


def plan_to_go_on(plan: Plan, given: Collection[str]) -> Plan:
    """Return the plan with which the demo in `plan.directory` goes on. `given` are the fields that the user has chosen.

    Raises BridgeError if there is no demo that can go on, or if it was made otherwise.
    """
    path = plan.directory / PLAN
    try:
        made = json.loads(path.read_text())
        if made["version"] != VERSION:
            raise BridgeError(f"{path} has format {made['version']}, this traincert reads format {VERSION}: {_ANEW}")
        found = replace(plan, planned=made["cycles"], **{field: made[field] for field in OPTIONS})
    except (FileNotFoundError, NotADirectoryError):
        raise BridgeError(f"there is no demo in {plan.directory} that can go on: {_ANEW}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BridgeError(f"{path} cannot be read ({error!r}): {_ANEW}") from None
    for field, option in OPTIONS.items():
        new, old = getattr(plan, field), getattr(found, field)
        if field in given and old != (TrainingJob.located(new) if field == "job" else new):
            raise BridgeError(
                f"{option} {new}: the demo in {plan.directory} was made with {'none' if old is None else old}: {_ANEW}"
            )
    return found


def _cycles_in_all(plan: Plan, job: TrainingJob, done: int) -> int:
    """Return how many cycles a demo that goes on has in the end, after `done` ones."""
    if plan.cycles or not plan.planned or done >= plan.planned:
        return done + (plan.cycles or job.cycles)
    return plan.planned


def _save(plan: Plan, cycles: int) -> None:
    """Write how the demo was made, for who goes on with it."""
    facts = {field: getattr(plan, field) for field in OPTIONS} | {"job": TrainingJob.located(plan.job)}
    text = json.dumps({"version": VERSION, "cycles": cycles, **facts}, indent=1)
    write_file(plan.directory / PLAN, text.encode() + b"\n", 0o644)


@contextmanager
def _locked(plan: Plan) -> Iterator[None]:
    """Keep other demos out of the folder while the code inside runs. Make the folder for a new demo."""
    directory = plan.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not (directory / MARKER).exists():
            raise BridgeError(f"{directory} is not empty, and not a former demo's: choose another with --data")
        marker = (directory / MARKER).open("w")
    except OSError as error:
        raise _unusable(directory, error) from error
    with marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BridgeError(f"another demo runs in {directory}: wait for its end, or choose another --data") from None
        yield


def _clear(directory: Path) -> None:
    """Remove what an earlier demo left."""
    try:
        for datadir in sorted(directory.glob("node*")):
            if datadir_in_use(datadir):
                stop = f"bitcoin-cli -datadir={datadir.absolute()} stop"
                raise BridgeError(f"a node is running in {datadir}: stop it first ({stop}), or choose another --data")
        (directory / PLAN).unlink(missing_ok=True)  # first: without all the rest it could not go on
        for entry in directory.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != MARKER:
                entry.unlink()
    except OSError as error:
        raise _unusable(directory, error) from error


def _unusable(directory: Path, error: OSError) -> BridgeError:
    return BridgeError(f"cannot use {directory}: {error.strerror}: {error.filename}")


def _recover(nodes: Sequence[Node]) -> None:
    """Let nodes that were killed read their block files again: a node notes only now and then which blocks it has."""
    recovering = [
        spawn([str(node.bitcoind), f"-datadir={node.datadir}", "-reindex", "-stopafterblockimport"], keep=False)
        for node in nodes
        if node.died
    ]
    for process in recovering:
        process.wait()


def _check(
    deployment: Deployment, run: RunFolder, clients: Sequence[NodeClient], plan: Plan
) -> tuple[Sequence[CertifiedBlock], list[Claim]]:
    """Read the chain back, and check each claim."""
    params, job = deployment.params, run.job
    scripts = {xonly_key(secret): payout_script(secret) for secret in deployment.secrets.values()}
    chain = read_chain(clients[0], params)
    tips = {client.call("getbestblockhash") for client in clients}
    tip = chain[-1].certificate
    before, after = (nats(loss, job.loss_offset) for loss in (chain[0].certificate.loss_before, tip.loss_after))
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
            all(each.block.vtx[0].vout[0].scriptPubKey == scripts[each.certificate.winner_key] for each in chain),
        ),
        Claim("the model is the one that the tip commits to", state_hash(run.load().model) == tip.model_after),
        Claim(
            "every block commits to the record of its cycle",
            [each.certificate.record for each in chain] == run.hashes[1:],
        ),
        Claim(
            "no key of a miner is in the coordinator's folder",
            not _holds_secrets(deployment.coordinator.folder, deployment.secrets.values()),
        ),
        Claim(f"validation loss fell from {before:.4f} to {after:.4f} nats", after < before),
    ]
    return chain, claims + _tested(run, plan)


def _tested(run: RunFolder, plan: Plan) -> list[Claim]:
    """Return the claim about the model on the test examples, if the job has any."""
    job, dataset = run.job, run.dataset()
    examples = read_examples(job, dataset.held_out_folder, dataset.test)
    with Scorer(job) as scorer:
        found = scorer.evaluate(run.load().model, examples).metric
    target = job.target_metric if plan.cycles >= job.cycles else None
    text = f"{job.metric_names[0]} on {len(examples)} test examples that no miner has: {found:.4f}"
    reached = target is None or found >= target
    return [Claim(text if target is None else f"{text} (bar: {target})", _is_unseen(dataset) and reached)]


def _holds_secrets(folder: Path, secrets: Iterable[bytes]) -> bool:
    """Whether one of the secrets, as bytes or in hex, is in a file of a folder."""
    wanted = [form for secret in secrets for form in (secret, secret.hex().encode())]
    return any(form in path.read_bytes() for path in folder.rglob("*") if path.is_file() for form in wanted)


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
    """Whether no test example is in a miner's shard."""

    def rows(folder: Path, digest: bytes) -> set[bytes]:
        columns = read_examples(dataset.job, folder, digest).inputs
        return {b"".join(column[row].numpy().tobytes() for column in columns) for row in range(len(columns[0]))}

    trained = set[bytes]().union(*(rows(dataset.shard_folder, shard) for shard in dataset.shards))
    return trained.isdisjoint(rows(dataset.held_out_folder, dataset.test))


def show(event: Mapping[str, Any], view: View) -> None:
    """Show what a coordinator with --json said."""
    match event["event"]:
        case "step":
            view.step(event["text"])
        case "commits":
            view.update(event["done"], event["total"])
        case "absent":
            view.absent(event["height"], event["winner"], event["reason"])
        case "closed":
            view.closed(event)
