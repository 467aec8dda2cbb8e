"""The command `traincert audit`: a member repeats a closed cycle, and signs what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from traincert.bridge.cli.events import Events
from traincert.bridge.cli.options import NODE
from traincert.trainer.imports import importing

if TYPE_CHECKING:
    from traincert.bridge.messages import Verdict


class Findings(Events):
    """What an audit finds: for people a plain line on stdout."""

    def say(self, event: str, text: str, **facts: Any) -> None:
        """Say what was found."""
        if self._as_json:
            super().say(event, text, **facts)
        else:
            click.echo(text)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option(
    "--height", type=click.IntRange(min=0), help="Repeat the whole cycle that the block of this height closed."
)
@click.option("--draw", is_flag=True, help="Repeat one task of the last closed cycle, which its block draws.")
@click.option(
    "--verify",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Check somebody else's verdict, which is in this file. This needs no FOLDER.",
)
@NODE
@click.option("--json", "as_json", is_flag=True, help="Print lines of JSON.")
def audit(folder: Path | None, height: int | None, draw: bool, file: Path | None, datadir: Path, as_json: bool) -> None:
    """Repeat a closed cycle, and write what was found, signed, into FOLDER/verdicts.

    FOLDER is a miner's or a cosigner's folder. Its program may run meanwhile. A task can be repeated if this member has
    its shard, and if its miner began without a memory, or had to reveal it because the task was drawn.

    Exit code 1 if something that was repeated is wrong, or if nothing can be repeated.
    """
    if (file is None) == (folder is None) or [height is not None, draw, file is not None].count(True) != 1:
        raise click.UsageError("give FOLDER with --height N or --draw, or else --verify FILE")
    with importing():
        from traincert.bridge.audit import run_audit

    if folder:
        verdict = run_audit(folder, datadir, height, Findings(as_json=as_json))
    elif file:
        verdict = _verify(file, datadir, as_json=as_json)
    if not verdict.right:
        raise SystemExit(1)


def _verify(file: Path, datadir: Path, *, as_json: bool) -> Verdict:
    """Check a verdict, and print it."""
    from traincert.bridge.audit import lines, verify
    from traincert.bridge.messages import message_json
    from traincert.bridge.rpc import NodeClient

    with NodeClient.from_datadir(datadir) as node:
        key, verdict = verify(file.read_bytes(), node)
    if as_json:
        click.echo(json.dumps({"key": key.hex(), **message_json(verdict)}))
    else:
        what = "one task, which the block drew" if verdict.drawn else "the whole cycle"
        click.echo(f"the key {key.hex()} signed what it found in block {verdict.height}, {what}:")
        for line in lines(verdict):
            click.echo(line)
    return verdict
