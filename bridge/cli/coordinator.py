"""The commands `traincert coordinator ...`: a coordinator and its miners, for nodes in containers."""

from __future__ import annotations

from pathlib import Path

import click

from traincert.bridge.cli.view import CyclesView


@click.group()
def coordinator() -> None:
    """Run a coordinator and its miners, for nodes in containers."""


@coordinator.command("prepare")
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--miners", type=click.IntRange(1, 1000), default=4, show_default=True, help="Number of miners.")
@click.option("--nodes", type=click.IntRange(1, 20), default=3, show_default=True, help="Number of nodes.")
def coordinator_prepare(directory: Path, miners: int, nodes: int) -> None:
    """Make keys, and a bitcoin.conf for each node, in DIRECTORY. Existing keys are kept.

    The nodes' data directories are DIRECTORY/node0, node1, ... Their containers must have the host names node0, node1,
    ...
    """
    from traincert.bridge.deployment import prepare_coordinator  # torch takes seconds to import

    prepare_coordinator(directory, miners, nodes)


@coordinator.command("run")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
def coordinator_run(directory: Path) -> None:
    """Train the job `digits` in DIRECTORY, which `prepare` made. Each cycle is closed by a block.

    A run that was interrupted goes on where it ended.
    """
    from traincert.bridge.deployment import run_coordinator

    with CyclesView() as view:
        cycles = run_coordinator(directory, view)
    click.echo(f"all {cycles} cycles are done")
