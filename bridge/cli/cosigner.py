"""The commands `traincert cosigner ...`: a cosigner on its own machine."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import click

from traincert.bridge.cli.events import Events
from traincert.trainer.imports import importing

FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))


@click.group()
def cosigner() -> None:
    """Check and sign a coordinator's certificates, on a machine of its own."""


@cosigner.command("init")
@FOLDER
def cosigner_init(folder: Path) -> None:
    """Make a cosigner's key in FOLDER, and print its public key.

    The network is made with this key: traincert coordinator init --cosigner KEY.
    """
    from traincert.bridge.cosigner import make_cosigner_key

    click.echo(make_cosigner_key(folder).hex())


@cosigner.command("join")
@FOLDER
@click.option("--job", required=True, help="The job that the network trains: a TOML file, or a job's name.")
@click.option(
    "--invitation", type=click.File("r"), default="-", help="The file with the invitation.  [default: standard input]"
)
def cosigner_join(folder: Path, job: str, invitation: IO[str]) -> None:
    """Join a network with the key in FOLDER, which `init` made.

    The coordinator makes the invitation with `traincert coordinator invite FOLDER NAME --cosigner`. It has a secret.
    """
    from traincert.bridge.cosigner import check_key, make_cosigner_key
    from traincert.bridge.invitations import COSIGNER, Invitation
    from traincert.bridge.member import join

    read = Invitation.read(invitation.read(), COSIGNER)
    check_key(make_cosigner_key(folder), read.params)
    key = join(folder, read, job)
    click.echo(f"{read.name} has joined with the key {key.hex()}")
    click.echo(f"A node needs the options in {folder / 'training.conf'}. Next: traincert cosigner run {folder}")


@cosigner.command("run")
@FOLDER
@click.option(
    "--datadir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="The data directory of the cosigner's own node, or of one that it trusts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each event.")
def cosigner_run(folder: Path, datadir: Path, as_json: bool) -> None:
    """Check each certificate that the coordinator proposes, and sign it if all of it is true.

    It runs until it is interrupted.
    """
    with importing():
        from traincert.bridge.cosigner import run_cosigner

    run_cosigner(folder, datadir, Events(as_json=as_json, folder=folder))
