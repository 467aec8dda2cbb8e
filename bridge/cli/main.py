"""The command `traincert`. A command imports what it needs when it is called: torch takes seconds."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import sys
from importlib import import_module
from pathlib import Path
from types import FrameType

import click
from click.core import ParameterSource

from traincert.bridge.errors import BridgeError
from traincert.regtest.errors import NodeUnreachableError, RegtestError
from traincert.trainer.errors import TrainerError
from traincert.trainer.imports import importing

READING = ["block", "chain", "export-blocks", "verify", "watch"]
"""Commands in the file `reading`."""
GROUPS = ["audit", "broker", "completion", "coordinator", "cosigner", "energy", "explorer", "job", "miner", "network"]
GROUPS += ["node", "receipt", *READING]
"""Groups of commands, and commands such as `audit`: each is in the file of its name, except READING."""
# What the extra `explorer` brings, and what the extra `train` brings besides.
EXPLORER = {"prometheus_client", "sse_starlette", "starlette", "uvicorn"}
EXTRA = {
    "cryptography",
    "jinja2",
    "matplotlib",
    "nats",
    "nkeys",
    "numpy",
    "pydantic",
    "safetensors",
    "scikit-learn",
    "sklearn",
    "tensorboard",
    "tomlkit",
    "torch",
}

EXIT_CODES = """
Exit codes: 0 done, 1 failed or a claim was not true, 2 wrong usage, 3 node unreachable, 130 interrupted.
"""


class Cli(click.Group):
    """The commands below, and the groups. A network's programs need one group each, and start at the same time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted([*super().list_commands(ctx), *GROUPS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, or None if there is none of this name."""
        if cmd_name not in GROUPS:
            return super().get_command(ctx, cmd_name)
        file = "reading" if cmd_name in READING else cmd_name
        command: click.Command = getattr(import_module(f"traincert.bridge.cli.{file}"), cmd_name.replace("-", "_"))
        return command


@click.group(cls=Cli, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="traincert")
def cli() -> None:
    """A Bitcoin regtest chain whose blocks are earned by training a model."""


def main() -> None:
    """Run the command line. An error that we know is one line and an exit code; any other keeps its traceback."""
    signal.signal(signal.SIGTERM, _as_ctrl_c)  # it must end what we started
    try:
        sys.exit(cli.main(standalone_mode=False))
    except NodeUnreachableError as error:
        _fail(str(error), 3)
    except (BridgeError, TrainerError, RegtestError) as error:
        _fail(str(error), 1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA | EXPLORER:
            raise
        extra = "explorer" if missing in EXPLORER else "train"
        install = f"pip install '.[{extra}]' in a clone of traincert"
        _fail(f"this command needs {error.name}, which is not installed: {install}", 1)
    except BrokenPipeError:  # the reader has enough, as in `traincert watch | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at its end
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that may not be written
        _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error), 1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    finally:
        gc.freeze()  # at its end Python seeks garbage among all objects: with torch that takes half a second


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C does now: while asyncio runs, that is to cancel its task."""
    ctrl_c = signal.getsignal(signal.SIGINT)
    (ctrl_c if callable(ctrl_c) else signal.default_int_handler)(number, frame)


def _fail(message: str, code: int) -> None:
    click.echo(f"traincert: {message}", err=True)
    sys.exit(code)


@cli.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="The folder for keys, nodes and the picture. Without --continue it replaces an earlier demo's.",
)
@click.option(
    "--continue",
    "go_on",
    is_flag=True,
    help="Go on with the demo in the folder, which was interrupted or has ended: with its keys, chain and model.",
)
@click.option("--job", default="digits", show_default=True, help="What is trained: a TOML file, or a job's name.")
@click.option(
    "--cycles",
    type=click.IntRange(1, 10_000),
    help="Number of cycles; each ends with a block. With --continue: so many more; after the job's own, with the "
    "learning rate of its last cycle.  [default: as the job says; with --continue: those that are left, or as many "
    "more as the job says]",
)
@click.option("--miners", type=click.IntRange(1, 1000), default=4, show_default=True, help="Number of miners.")
@click.option("--nodes", type=click.IntRange(1, 20), default=3, show_default=True, help="Number of nodes.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Seed of the model.  [default: as the job says]")
@click.option(
    "--round",
    "round_seconds",
    type=click.IntRange(1, 86400),
    default=60,
    show_default=True,
    help="Seconds after which another winner is drawn, if the block does not come.",
)
@click.option("--keep", is_flag=True, help="Leave the nodes running at the end.")
@click.option(
    "--explorer",
    is_flag=True,
    help="Show the demo as a web page while it runs, and with --keep after it, until Ctrl-C.",
)
@click.option(
    "--compat-pow/--no-compat-pow",
    default=True,
    help="Make blocks that also meet regtest's trivial proof-of-work target (default). Then unpatched nodes and other "
    "tools that check proof of work accept them.",
)
@click.pass_context
def demo(
    context: click.Context,
    data: Path,
    go_on: bool,
    job: str,
    cycles: int | None,
    miners: int,
    nodes: int,
    seed: int | None,
    round_seconds: int,
    keep: bool,
    explorer: bool,
    compat_pow: bool,
) -> None:
    """Run a training network on this machine, and check every claim that is printed at the end."""
    # Before the build of a quarter of an hour, which would be in vain if torch is missing.
    with importing():
        from traincert.bridge.cli.demo import PICTURE, Plan, plan_to_go_on, run_demo
    from traincert.bridge.cli.explorer import DEFAULT_PORT, options_of_demo
    from traincert.bridge.cli.explorer import explorer as show_explorer
    from traincert.bridge.cli.node import build_with_progress
    from traincert.bridge.cli.view import CyclesView, chain_table, print_claims, stdout_console

    plan = Plan(
        directory=data,
        job=job,
        cycles=cycles or 0,
        miners=miners,
        nodes=nodes,
        seed=seed,
        keep=keep,
        round_seconds=round_seconds,
        compat_pow=compat_pow,
        explorer=explorer,
    )
    if go_on:
        given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
        plan = plan_to_go_on(plan, given)
    programs = build_with_progress() / "bin"
    with CyclesView() as view:
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
        show = shlex.join(["traincert", "explorer", *options_of_demo(data)])
        click.echo(f"See them in a browser, at http://127.0.0.1:{DEFAULT_PORT}:\n  {show}")
        command = f'{shlex.quote(str(programs / "bitcoin-cli"))} "-datadir=$node" stop'
        click.echo(f"Stop them:\n  for node in {shlex.quote(str(data.absolute()))}/node*; do {command}; done")
    if not all(claim.holds for claim in outcome.claims):
        raise BridgeError("not every claim is true")
    if keep and explorer:
        show_explorer.main(options_of_demo(data), standalone_mode=False)


if __name__ == "__main__":
    main()
