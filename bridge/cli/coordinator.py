"""The commands `traincert coordinator ...`: a coordinator and its miners, for nodes in containers."""

from __future__ import annotations

from pathlib import Path

import click

from traincert.bridge.cli.view import CyclesView


@click.group()
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
    from traincert.bridge.deployment import prepare_coordinator  # torch takes seconds to import

    prepare_coordinator(directory, miners, nodes)


@coordinator.command("run")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
def coordinator_run(directory: Path) -> None:
    """Train the job `digits` in a DIRECTORY that was prepared, a block for each cycle.

    A run that was interrupted goes on where it was.
    """
    from traincert.bridge.deployment import run_coordinator

    with CyclesView() as view:
        cycles = run_coordinator(directory, view)
    click.echo(f"all {cycles} cycles are done")
