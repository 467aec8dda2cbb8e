"""The command `traincert explorer`: a page over one or several nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

DEFAULT_PORT = 8480


def options_of_demo(directory: Path) -> list[str]:
    """Return the options of an explorer of a demo's folder."""
    nodes = [option for node in sorted(directory.glob("node*")) for option in ("--node", str(node))]
    return [*nodes, "--coordinator", str(directory / "coordinator")]


@click.command()
@click.option(
    "--node",
    "places",
    multiple=True,
    metavar="DATADIR|URL,COOKIEFILE",
    help="A node: its data directory, or its RPC address and a file with its login, in the form of Bitcoin Core's "
    ".cookie. Repeat it for several nodes; the first one's chain is shown.  [default: all of the demo in demo/]",
)
@click.option(
    "--records",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A run folder, for example demo/coordinator/run: show each cycle's record.",
)
@click.option(
    "--coordinator",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The coordinator's folder: show who is present, the members' names, and the records in its run folder.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    help="The port on this machine. 0: any that is free.",
)
def explorer(places: Sequence[str], records: Path | None, coordinator: Path | None, port: int) -> None:
    """Show one or several nodes as a web page on this machine, until Ctrl-C.

    The page only reads. The visitor's browser checks the blocks itself. A node may be down at first, or restart.
    """
    from traincert.bridge.errors import BridgeError
    from traincert.bridge.explorer.serve import serve

    if not places:
        demo = Path("demo")
        places = [str(node) for node in sorted(demo.glob("node*"))]
        coordinator = coordinator or demo / "coordinator"
        if not places:
            raise BridgeError("there is no demo here: name a node with --node")
    serve(places, records, coordinator, port, lambda url: click.echo(f"explorer: {url} (Ctrl-C ends it)"))
