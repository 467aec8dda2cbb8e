"""The commands `traincert miner ...`: a miner on its own machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from traincert.bridge.cli.events import Events
from traincert.bridge.cli.options import NODE, Bytes32
from traincert.bridge.cli.reading import RUN_EXAMPLE, show_miner
from traincert.bridge.status import is_locked, read_status
from traincert.trainer.imports import importing

if TYPE_CHECKING:
    from traincert.bridge.member import MemberFolder

FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))


@click.group()
def miner() -> None:
    """Take part in a network as a miner, on a machine of its own."""


@miner.command("join")
@FOLDER
@click.option("--job", required=True, help="The job that the network trains: a TOML file, or a job's name.")
@click.option(
    "--invitation", type=click.File("r"), default="-", help="The file with the invitation.  [default: standard input]"
)
def miner_join(folder: Path, job: str, invitation: IO[str]) -> None:
    """Join a network, and make the miner's folder FOLDER, with a new key.

    The coordinator makes the invitation with `traincert coordinator invite NAME`. It has a secret. If FOLDER has a key
    already, the miner keeps it.
    """
    from traincert.bridge.invitations import MINER, Invitation  # of the extra `train`
    from traincert.bridge.member import join

    read = Invitation.read(invitation.read(), MINER)
    key = join(folder, read, job)
    click.echo(f"{read.name} has joined with the key {key.hex()}")
    click.echo(f"A node needs the options in {folder / 'training.conf'}. Next: traincert miner run {folder}")


@miner.command("run")
@FOLDER
@click.option(
    "--datadir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The data directory of the miner's own node. Without a node the miner trains, but appends no blocks.",
)
@click.option(
    "--compat-pow/--no-compat-pow",
    default=True,
    help="Make blocks that also meet regtest's trivial proof-of-work target (default).",
)
@click.option(
    "--monitor",
    "monitored",
    is_flag=True,
    help="Watch what each task does beside training, by the kernel. It needs root and bpftrace. All members can read "
    "what is found, with the names of files and programs: it is signed in the commits.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each event.")
def miner_run(folder: Path, datadir: Path | None, compat_pow: bool, monitored: bool, as_json: bool) -> None:
    """Train, and append the blocks that the miner in FOLDER wins, until it is interrupted.

    A miner that was interrupted or killed goes on where it was.
    """
    with importing():
        from traincert.bridge.miner import run_miner

    run_miner(folder, datadir, Events(as_json=as_json, folder=folder), compat_pow=compat_pow, monitored=monitored)


@miner.command("status")
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def miner_status(folder: Path, as_json: bool) -> None:
    """Say what the miner in FOLDER does now, and what it has earned.

    Exit code 3 if it does not run.
    """
    from traincert.bridge.invitations import MINER
    from traincert.bridge.member import MemberFolder
    from traincert.bridge.miner import Earned

    opened = MemberFolder(folder, MINER)
    show_status(opened, {"earned": vars(Earned.read(folder))}, as_json=as_json)


@miner.command("show")
@click.argument("key", type=Bytes32("x-only key"))
@NODE
@click.option(
    "--run",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help=f"{RUN_EXAMPLE}: say for how many blocks it was drawn, and how many are to be expected.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def miner_show(key: bytes, datadir: Path, run: Path | None, as_json: bool) -> None:
    """Show what the miner with the public key KEY has won on a node's chain. Every block is checked.

    Blocks have only the winners' weights. With the records of the cycles, in --run, it also says how often this miner
    was drawn, absent or not, against what its weights let expect.

    Exit code 1 if a block breaks a rule, or if a record is missing or not the one of its block.
    """
    show_miner(key, datadir, run, as_json)


def show_status(folder: MemberFolder, more: dict[str, Any], *, as_json: bool) -> None:
    """Print what a member's program does now. Exits with 3 if it does not run."""
    runs, status = is_locked(folder.folder / ".lock"), read_status(folder.folder)
    if as_json:
        click.echo(json.dumps({"name": folder.name, "runs": runs, **more, "last": status}))
    else:
        said = f"{status['text']} ({time.time() - status['time']:.0f} s ago)" if status else "nothing yet"
        click.echo(f"{folder.name} {'runs' if runs else 'does not run'}: {said}")
        for name, facts in more.items():
            click.echo(f"{name}: {', '.join(f'{key} {value:,}' for key, value in facts.items())}")
    if not runs:
        raise SystemExit(3)
