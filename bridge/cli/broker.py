"""The commands `traincert broker ...`: the broker between the coordinator, its miners and its cosigners."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.group()
def broker() -> None:
    """Run the broker between the coordinator, its miners and its cosigners."""


@broker.command("run")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--nats-server",
    metavar="PATH",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The nats-server to run, instead of the installed one.",
)
def broker_run(directory: Path, nats_server: Path | None) -> None:
    """Run the broker of the coordinator in DIRECTORY, until Ctrl-C. It logs to stderr."""
    from traincert.bridge.broker import server_command  # cryptography and nats-py belong to the extra `train`

    command = server_command(directory, nats_server)
    os.execv(command[0], command)  # noqa: S606 - it needs no shell
