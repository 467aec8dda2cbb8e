"""Makes the man pages, from the text of `--help`: python -m traincert.bridge.cli.man FOLDER, or `make man`."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import click

from traincert.bridge.cli.main import cli


def write_pages(folder: Path) -> None:
    """Write a page for each command into a folder."""
    from click_man.core import write_man_pages  # type: ignore[import-untyped]  # only developers have it

    _prepare(cli, click.Context(cli))
    folder.mkdir(parents=True, exist_ok=True)
    write_man_pages("traincert", cli, version=version("traincert"), target_dir=str(folder))


def _prepare(command: click.Command, ctx: click.Context) -> None:
    """Give click-man what it does not look for: whole first sentences, epilogs, commands that are loaded when used."""
    text = command.help or ""
    command.short_help = " ".join(text.partition("\n\n")[0].split())
    command.help = f"{text}\n\n{(command.epilog or '').strip()}".strip()
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            found = command.get_command(ctx, name)
            if found:
                command.commands[name] = found
                _prepare(found, ctx)


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
