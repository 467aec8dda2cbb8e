"""The commands `traincert receipt ...`: what came of a miner's task, and why it did or did not win the next block."""

from __future__ import annotations

import json
from pathlib import Path

import click

from traincert.bridge.cli.options import NODE

FILE = click.argument("file", type=click.Path(path_type=Path, exists=True))
CYCLE = click.option(
    "--cycle", type=click.IntRange(min=1), help="Which receipt of a miner's folder.  [default: the last]"
)


@click.group()
def receipt() -> None:
    """Look at a miner's receipts, and check them against the chain.

    The coordinator gives each miner a signed receipt for each cycle. It is in the miner's folder, in receipts/.
    """


@receipt.command("show")
@FILE
@CYCLE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def receipt_show(file: Path, cycle: int | None, as_json: bool) -> None:
    """Show a receipt. FILE is the receipt, or a miner's folder.

    This does not check that the receipt is true: `verify` does. Exit code 1 if there is none, or if it cannot be read.
    """
    from rich.table import Table
    from rich.text import Text

    from traincert.bridge.cli.view import stdout_console
    from traincert.bridge.messages import message_json
    from traincert.bridge.receipts import facts, find_receipt, read_receipt

    _, read = read_receipt(find_receipt(file, cycle))
    if as_json:
        click.echo(json.dumps(message_json(read), indent=2))
        return
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts(read).items():
        table.add_row(name, Text(value))  # as it is: the coordinator's words are no markup
    stdout_console().print(table)


@receipt.command("verify")
@FILE
@CYCLE
@NODE
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def receipt_verify(file: Path, cycle: int | None, datadir: Path, as_json: bool) -> None:
    """Check a receipt against a node's chain, and say why its miner did or did not win the next block.

    FILE is the receipt, or a miner's folder. The last line says what to change if the update was refused. Exit code 1
    if something is not true: the message names the step.
    """
    from traincert.bridge.receipts import ReceiptError, find_receipt, read_receipt, verify
    from traincert.bridge.rpc import NodeClient

    steps: dict[str, str] = {}

    def tell(step: str, found: str) -> None:
        steps[step] = found
        if not as_json:
            click.echo(f"✓ {step}: {found}")

    statement, _ = read_receipt(find_receipt(file, cycle))
    with NodeClient.from_datadir(datadir) as node:
        try:
            result = verify(statement, node, tell)
        except ReceiptError as error:
            if as_json:
                click.echo(json.dumps({"valid": False, "steps": steps, "step": error.step, "error": str(error)}))
            raise
    click.echo(json.dumps({"valid": True, "steps": steps, "result": result}) if as_json else result)
