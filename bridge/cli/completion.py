"""The command `traincert completion`: a shell script that completes commands and options."""

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

KINDS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command()
@click.argument("shell", type=click.Choice(list(KINDS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script that lets a shell complete commands and options.

    For bash, write it to ~/.local/share/bash-completion/completions/traincert; for zsh, to a file _traincert in a
    folder of $fpath; for fish, to ~/.config/fish/completions/traincert.fish.
    """
    click.echo(KINDS[shell](ctx.find_root().command, {}, "traincert", "_TRAINCERT_COMPLETE").source())
