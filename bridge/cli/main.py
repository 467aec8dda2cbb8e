"""The command `traincert`. Torch is imported only by commands that train."""

from __future__ import annotations

import functools
import json
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from traincert.bridge.cli.network import network
from traincert.bridge.cli.view import show_build
from traincert.bridge.errors import BridgeError, NodeUnreachableError
from traincert.regtest import errors as regtest_errors
from traincert.regtest.build import NodeKind, node_folder
from traincert.trainer.errors import TrainerError

# What the extra `train` brings.
EXTRA = {"jinja2", "matplotlib", "numpy", "pydantic", "safetensors", "sklearn", "tensorboard", "tomlkit", "torch"}

EXIT_CODES = """
Exit codes: 0 done, 1 failed or a claim was not true, 2 wrong usage, 3 node unreachable, 130 interrupted.
"""


@click.group(epilog=EXIT_CODES)
@click.version_option(package_name="traincert")
def cli() -> None:
    """A Bitcoin regtest chain whose blocks are earned by training a model."""


cli.add_command(network)


def main() -> None:
    """Run the command line: errors that we know are one line and an exit code, others keep their traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends us, we end what we started
    try:
        sys.exit(cli.main(standalone_mode=False))
    except (NodeUnreachableError, regtest_errors.NodeUnreachableError) as error:
        _fail(str(error), 3)
    except (BridgeError, TrainerError, regtest_errors.RegtestError) as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        _fail(f"this command needs {error.name}, which is not installed: pip install 'traincert[train]'", 1)
    except OSError as error:  # a full disk, a folder that may not be written
        _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error), 1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    click.echo(f"traincert: {message}", err=True)
    sys.exit(code)


@cli.group()
def node() -> None:
    """The patched bitcoind, or the same without the patch."""


def which_node(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say which node is meant, as one NodeKind."""

    @click.option("--base", metavar="RELEASE", help="The Bitcoin Core to build: 31 (the default) or 28.")
    @click.option("--stock", is_flag=True, help="Without the patch.")
    @click.option(
        "--source",
        type=click.Path(path_type=Path, exists=True),
        help="A folder or tarball with the source tree, instead of the pinned one.",
    )
    @functools.wraps(command)
    def with_options(base: str | None, stock: bool, source: Path | None, **others: Any) -> None:
        command(NodeKind(base, stock, source), **others)

    return with_options


@node.command("build")
@which_node
def node_build(kind: NodeKind) -> None:
    """Fetch, patch and build bitcoind and bitcoin-cli, unless the cache has them."""
    click.echo(show_build(kind) / "bin")


@node.command("path")
@which_node
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def node_path(kind: NodeKind, as_json: bool) -> None:
    """Print the folder of the built programs."""
    programs = node_folder(kind) / "bin"
    if not programs.is_dir():
        raise BridgeError(
            f"the node is not built yet, {programs} is missing: run traincert node build, with the same options"
        )
    click.echo(json.dumps({"path": str(programs)}) if as_json else programs)


@cli.command()
@click.option(
    "--datadir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("demo/node0"),
    show_default=True,
    help="The data directory of a running node.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: certificates as gettrainingcertificate has them.")
def chain(datadir: Path, as_json: bool) -> None:
    """Read a training chain from a running node, check every rule on it, and show its blocks.

    A line for each winner that the node saw sign two blocks under one certificate comes last.
    """
    from traincert.bridge.chain import certificate_json, read_chain, read_params
    from traincert.bridge.cli.view import chain_table, print_equivocations, stdout_console
    from traincert.bridge.rpc import NodeClient

    with NodeClient.from_datadir(datadir) as client:
        blocks = read_chain(client, read_params(client))
        equivocations = client.call("gettraininginfo")["equivocations"]
    if as_json:
        click.echo(json.dumps([certificate_json(block) for block in blocks], indent=2))
    else:
        console = stdout_console()
        console.print(chain_table(blocks))
        print_equivocations(console, equivocations)


@cli.group()
def job() -> None:
    """Training jobs, without any chain."""


@job.command("show")
@click.argument("job", metavar="JOB")
def job_show(job: str) -> None:
    """Print a job with all its keys, what they mean, and the defaults.

    JOB is a TOML file, or the name of a job that comes with traincert: digits, fashion or text.
    """
    from traincert.trainer.job import TrainingJob

    click.echo(TrainingJob.named(job).to_toml(), nl=False)


@job.command("run")
@click.argument("job", metavar="JOB")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="The run's folder: what it needs to go on, TensorBoard's logs and the report.  [default: runs/JOB]",
)
@click.option("--miners", type=click.IntRange(1, 1000), default=4, show_default=True, help="Miners.")
@click.option("--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Worker processes.")
def job_run(job: str, out: Path | None, miners: int, workers: int) -> None:
    """Train a job, without any chain. A run that was interrupted goes on where it was.

    JOB is a TOML file, or the name of a job that comes with traincert: digits, fashion or text.
    """
    from traincert.bridge.cli.view import JobView, stdout_console
    from traincert.trainer.errors import JobError
    from traincert.trainer.job import TrainingJob

    training_job = TrainingJob.named(job)
    out = out or Path("runs", Path(job).stem)
    with JobView() as view:
        view.step("importing PyTorch")
        from traincert.trainer.run import run_job  # takes seconds

        try:
            report = run_job(training_job, out, miners, workers, view)
        except JobError as error:
            raise JobError(f"{job}: {error}") from error
    console = stdout_console()
    metric = training_job.metric.partition(":")[2]
    target = "" if training_job.target_metric is None else f" (target: {training_job.target_metric})"
    console.print(
        f"test {metric} {report.test.metric:.4f}{target}, test loss {report.test.loss / 1e9:.4f} nats", soft_wrap=True
    )
    console.print(f"last record {report.head.hex()}", soft_wrap=True)
    console.print(f"report: {report.path}\nTensorBoard: tensorboard --logdir {shlex.quote(str(out))}", soft_wrap=True)


@job.command("replay")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--cycle", type=click.IntRange(1), help="Only this cycle.  [default: all that the store still has]")
def job_replay(folder: Path, cycle: int | None) -> None:
    """Do a run's tasks again, from its records and its store, and compare the updates' hashes."""
    from traincert.bridge.cli.view import stdout_console
    from traincert.trainer.records import RunFolder
    from traincert.trainer.replay import replay

    console = stdout_console()
    different = total = 0
    with RunFolder(folder) as run:
        for each in replay(run, cycle):
            total += 1
            different += not each.same
            verdict = "[green]same[/]" if each.same else f"[red]DIFFERENT[/], now {each.found}"
            console.print(
                f"cycle {each.cycle}, miner {each.miner[:8]}: update {each.recorded}: {verdict}", soft_wrap=True
            )
    if different:
        raise BridgeError(f"{different} of {total} updates are different")
    console.print(f"all {total} updates are the same")


@cli.group()
def coordinator() -> None:
    """A coordinator and its miners, for nodes in containers."""


@coordinator.command("prepare")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--miners", type=click.IntRange(1, 1000), default=4, show_default=True, help="Miners.")
@click.option("--nodes", type=click.IntRange(1, 20), default=3, show_default=True, help="Nodes.")
def coordinator_prepare(directory: Path, miners: int, nodes: int) -> None:
    """Make the keys, and a bitcoin.conf for each node, in DIRECTORY; those that are there already stay.

    The nodes' data directories are DIRECTORY/node0, node1, ..., and so are their containers' host names.
    """
    from traincert.bridge.deployment import prepare_containers  # torch takes seconds to import

    prepare_containers(directory, miners, nodes)


@coordinator.command("run")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
def coordinator_run(directory: Path) -> None:
    """Train the job `digits` in a DIRECTORY that was prepared, a block for each cycle.

    A run that was interrupted goes on where it was.
    """
    from traincert.bridge.cli.view import CyclesView
    from traincert.bridge.deployment import run_containers

    with CyclesView() as view:
        cycles = run_containers(directory, view)
    click.echo(f"all {cycles} cycles are done")


@cli.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Where keys, data directories and the picture go; a former demo's are replaced.",
)
@click.option("--cycles", type=click.IntRange(1, 10_000), default=12, show_default=True, help="Cycles, a block each.")
@click.option("--miners", type=click.IntRange(1, 1000), default=4, show_default=True, help="Miners.")
@click.option("--nodes", type=click.IntRange(1, 20), default=3, show_default=True, help="Nodes.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the model.")
@click.option(
    "--round",
    "round_seconds",
    type=click.IntRange(1, 86400),
    default=60,
    show_default=True,
    help="Seconds after which another winner is drawn for one that is absent.",
)
@click.option("--keep", is_flag=True, help="Leave the nodes running at the end.")
@click.option(
    "--compat-pow/--no-compat-pow",
    default=True,
    help="Let producers also meet regtest's trivial target (default), so that tools which check proof of work, "
    "unpatched nodes among them, take the blocks; --no-compat-pow turns it off.",
)
def demo(
    data: Path, cycles: int, miners: int, nodes: int, seed: int, round_seconds: int, keep: bool, compat_pow: bool
) -> None:
    """Run a training network on this machine, and check what it is said to do."""
    # Not before they are needed: torch, matplotlib and scikit-learn take seconds to import. But before the build, which
    # takes a quarter of an hour, and would be for nothing if one of them is not there.
    from traincert.bridge.cli.demo import PICTURE, Plan, run_demo
    from traincert.bridge.cli.view import CyclesView, chain_table, print_claims, stdout_console

    programs = show_build() / "bin"
    with CyclesView() as view:
        plan = Plan(data, cycles, miners, nodes, seed, keep, round_seconds, compat_pow)
        outcome = run_demo(programs / "bitcoind", plan, view)
    console = stdout_console()
    console.print(chain_table(outcome.chain, outcome.names))
    console.print()
    print_claims(console, [(claim.text, claim.holds) for claim in outcome.claims])
    console.print(f"picture: {data / PICTURE}")
    if keep:
        bitcoin_cli = shlex.join([str(programs / "bitcoin-cli"), f"-datadir={data.absolute() / 'node0'}"])
        click.echo(f"\nThe nodes are running. Talk to them:\n  {bitcoin_cli} gettraininginfo")
        click.echo(f"  traincert chain --datadir {shlex.quote(str(data / 'node0'))}")
        command = f'{shlex.quote(str(programs / "bitcoin-cli"))} "-datadir=$node" stop'
        click.echo(f"Stop them:\n  for node in {shlex.quote(str(data.absolute()))}/node*; do {command}; done")
    if not all(claim.holds for claim in outcome.claims):
        raise BridgeError("not every claim is true")


if __name__ == "__main__":
    main()
