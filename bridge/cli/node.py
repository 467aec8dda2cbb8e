"""The commands `traincert node ...`: building the node."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from traincert.bridge.cli.view import BuildView
from traincert.bridge.errors import BridgeError
from traincert.regtest.build import PATCHED, NodeKind, build_node, node_folder


def build_with_progress(kind: NodeKind = PATCHED) -> Path:
    """Build a node, unless the cache has it, show the progress on stderr, and return the node's folder."""
    with BuildView() as view:
        return build_node(kind, view.update)


@click.group()
def node() -> None:
    """Build the patched bitcoind, or bitcoind without the patch."""


def which_node(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that choose a node, as one NodeKind."""

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
    click.echo(build_with_progress(kind) / "bin")


@node.command("path")
@which_node
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def node_path(kind: NodeKind, as_json: bool) -> None:
    """Print the folder with the built programs."""
    programs = node_folder(kind) / "bin"
    if not programs.is_dir():
        raise BridgeError(
            f"the node is not built yet, {programs} is missing: run traincert node build, with the same options"
        )
    click.echo(json.dumps({"path": str(programs)}) if as_json else programs)


@node.command("key")
@which_node
def node_key(kind: NodeKind) -> None:
    """Print the key of the node's build: another build has another key. For caches, for example of CI."""
    click.echo(node_folder(kind).name)
