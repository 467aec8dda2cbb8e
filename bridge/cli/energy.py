"""The command `traincert energy`: what the blocks of a run cost, against hash mining."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from traincert.bridge.energy import BlockCost, HashRate


class Difficulty(click.ParamType[float]):
    """A difficulty of Bitcoin."""

    name = "difficulty"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the difficulty."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if 0 < number < 2**224:  # at which one hash of all would do
            return number
        return self.fail(f"{value!r} is no difficulty: give a number above 0, as getblockchaininfo has it", param, ctx)


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--difficulty",
    type=Difficulty(),
    help="Compare with a block that is mined at this difficulty (1: 2^32 hashes), on this machine. It mines for some "
    "seconds, and computes the rest.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def energy(folder: Path, difficulty: float | None, as_json: bool) -> None:
    """Show what each block of a run cost, in all and for each nano-nat that it took off the validation loss.

    RUN is the run folder of `traincert job run`, a coordinator's folder or a demo's. The cost is CPU seconds, and
    joules if the machine has a meter that this user may read: RAPL, which needs root, or NVML. Such a meter counts all
    that the coordinator's machine did meanwhile; miners on other machines are not in it.

    Exit code 1 if the run has no costs.
    """
    from traincert.bridge.cli.view import stdout_console
    from traincert.bridge.energy import find_run, mine_hashes, read_costs, total

    costs = read_costs(find_run(folder))
    mined = mine_hashes() if difficulty else None
    if as_json:
        facts = {"cycles": [{"cycle": cycle, **each.to_json()} for cycle, each in costs.items()]}
        hashing = mined and difficulty and _hashing_json(mined, difficulty)
        click.echo(json.dumps({**facts, "total": total(list(costs.values())).to_json(), "hashing": hashing}, indent=2))
        return
    console = stdout_console()
    console.print(_table(costs))
    for line in _summary(costs):
        console.print(line, soft_wrap=True)
    if mined and difficulty:
        for line in _hashing(mined, difficulty, total(list(costs.values())), len(costs)):
            console.print(line, soft_wrap=True)


def _table(costs: Mapping[int, BlockCost]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("\ncycle", "\ntasks", "CPU s\nof tasks", "CPU s,\nthe rest", "off the loss\nnano-nats"):
        table.add_column(name, justify="right")
    table.add_column("CPU ns per\nnano-nat", justify="right")
    metered = any(each.joules for each in costs.values())
    if metered:
        table.add_column("\njoules", justify="right")
        table.add_column("nJ per\nnano-nat", justify="right")
    for cycle, each in costs.items():
        row = [str(cycle), str(each.tasks), f"{each.training_seconds:.2f}", f"{each.coordinator_seconds:.2f}"]
        row += [f"{each.loss_reduction:,}", _nano(each.per_nano_nat(each.cpu_seconds))]
        if metered:
            joules = each.all_joules
            row += ["-" if joules is None else f"{joules:.1f}", _nano(each.per_nano_nat(joules))]
        table.add_row(*row)
    return table


def _nano(amount: float | None) -> str:
    return "-" if amount is None else f"{amount * 1e9:.2f}"


def _number(amount: float) -> str:
    return f"{amount:,.0f}" if 100 <= amount < 1e15 else f"{amount:.3g}"


def _summary(costs: Mapping[int, BlockCost]) -> list[str]:
    from traincert.bridge.energy import total
    from traincert.trainer.energy import energy_meters

    found, count = total(list(costs.values())), len(costs)
    lines = [
        f"a block took {found.cpu_seconds / count:.2f} CPU seconds, the mean of {count}: "
        f"{found.training_seconds / count:.2f} of its tasks, {found.coordinator_seconds / count:.2f} of the coordinator"
    ]
    if found.measured < found.tasks:
        lines.append(
            f"{found.tasks - found.measured} of {found.tasks} tasks were not measured: their seconds are missing"
        )
    for meter, joules in found.joules.items():
        lines.append(f"and {joules / count:.1f} joules by {meter}, which counts all that the machine did")
    if not found.joules:
        lines.append(f"joules were not counted; this machine has {energy_meters().why_none or 'a meter now'}")
    lines.append(
        f"together they took {found.loss_reduction / 1e9:.4f} nats off the validation loss: "
        f"{_nano(found.per_nano_nat(found.cpu_seconds))} CPU nanoseconds per nano-nat"
    )
    return lines


def _hashing(mined: HashRate, difficulty: float, found: BlockCost, count: int) -> list[str]:
    wanted = mined.expected(difficulty)
    lines = [
        f"mined now by {mined.by}: {mined.hashes:,} hashes in {mined.cpu_seconds:.2f} CPU seconds, "
        f"{mined.hashes / mined.cpu_seconds / 1e6:.2f} million a second",
        f"computed: a block at difficulty {difficulty:.16g} takes {_number(wanted.hashes)} hashes on average, so "
        f"{_number(wanted.cpu_seconds)} CPU seconds",
        f"that is {_number(wanted.cpu_seconds * count / found.cpu_seconds)} times what a block of this run took",
    ]
    if mined.joules:
        lines.append(f"computed: {_number(sum(wanted.joules.values()))} joules, by {', '.join(mined.joules)}")
    return lines


def _hashing_json(mined: HashRate, difficulty: float) -> dict[str, object]:
    from dataclasses import asdict

    wanted = mined.expected(difficulty)
    return {"measured": asdict(mined), "difficulty": difficulty, "computed": asdict(wanted)}
