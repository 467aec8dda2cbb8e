"""Options that several commands have."""

from pathlib import Path

import click

NODE = click.option(
    "--datadir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("demo/node0"),
    show_default=True,
    help="The data directory of a running node that you trust.",
)
