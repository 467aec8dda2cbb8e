"""What the command line shows: a live view on a terminal, plain lines elsewhere. Progress goes to stderr."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from traincert.regtest.build import ProgressLines

if TYPE_CHECKING:
    from traincert.bridge.chain import Certified
    from traincert.regtest.lasting import NodeStatus
    from traincert.trainer.compare import Compared

PIPE_WIDTH = 180  # columns where the output is not a terminal: wide enough that no line is folded


def stdout_console() -> Console:
    """Return a console for results."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def _stderr_console() -> Console:
    console = Console(stderr=True, highlight=False)
    return console if console.is_terminal else Console(stderr=True, highlight=False, width=PIPE_WIDTH)


class BuildView:
    """Progress of the node's build: a bar, or without a terminal a line for each step and each tenth of it."""

    def __init__(self) -> None:
        self._console = _stderr_console()
        self._progress = _progress(self._console)
        self._task = self._progress.add_task("building the node", total=None)
        self._lines = ProgressLines(self._console.print)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def update(self, step: str, done: int, total: int) -> None:
        """Show a step, and how much of it is done. A `total` of 0 means: not known."""
        self._progress.update(self._task, description=f"node: {step}", completed=done, total=total or None)
        if not self._console.is_terminal:
            self._lines.update(step, done, total)


class _LiveTable:
    """A growing table and a bar, or without a terminal a line for each step and row. Use it as a context manager."""

    def __init__(self, columns: Sequence[str], *, stays: bool) -> None:
        """With `stays` the table is still there at the end.

        Where there is no room the last column, a hash, is cut, and the reasons with `updates` take several lines.
        """
        self._console = _stderr_console()
        self._progress = _progress(self._console)
        self._task = self._progress.add_task("", total=None)
        self._table = Table(box=None)
        for name in columns[:-1]:
            self._table.add_column(name, no_wrap=name != "updates", overflow="fold")
        room = max(16, self._console.width - 64)  # columns that the others leave
        self._table.add_column(columns[-1], overflow="ellipsis", max_width=room)
        self._stays = stays
        self._live = Live(Group(self._table, self._progress), console=self._console, transient=not stays)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._stays:
            self._live.update(self._table)  # without the bar
        if self._console.is_terminal:
            self._live.stop()

    def step(self, text: str) -> None:
        """Show the step that begins now."""
        self._progress.update(self._task, description=text, completed=0, total=None)
        if not self._console.is_terminal:
            self._console.print(text, markup=False, soft_wrap=True)

    def update(self, done: int, total: int) -> None:
        """Show how many of the cycle's tasks are done."""
        self._progress.update(self._task, completed=done, total=total)

    def _add(self, row: Sequence[str], line: str) -> None:
        self._table.add_row(*row)
        if not self._console.is_terminal:
            self._console.print(line, markup=False, soft_wrap=True)


class CyclesView(_LiveTable):
    """The demo's cycles."""

    def __init__(self) -> None:
        super().__init__(("height", "winner", "updates", "loss", "metric", "block"), stays=False)

    def absent(self, height: int, winner: str, reason: str) -> None:
        """Show that a winner's block did not come within its round."""
        text = f"block {height}: {winner} is absent, drawing again ({reason})"
        self._console.print(text, markup=False, soft_wrap=True)

    def closed(self, cycle: Mapping[str, Any]) -> None:
        """Show a cycle that the chain has a block for, see `coordinator_program.cycle_facts`."""
        updates = updates_text(cycle["tasks"], cycle["refusals"])
        loss = f"{cycle['loss_before'] / 1e9:.4f} → {cycle['loss_after'] / 1e9:.4f}"
        metric = "no number" if cycle["metric"] is None else f"{cycle['metric']:.4f}"
        winner = cycle["winner"] + in_round(cycle["round"])
        self._add(
            (str(cycle["height"]), winner, updates, f"{cycle['loss_after'] / 1e9:.4f}", metric, cycle["block"]),
            f"block {cycle['height']} by {winner}: updates {updates}, loss {loss}, metric {metric}, {cycle['block']}",
        )


class JobView(_LiveTable):
    """A job's cycles."""

    def __init__(self) -> None:
        super().__init__(("cycle", "updates", "bytes", "loss", "metric", "model"), stays=True)

    def cycle(self, record: Mapping[str, Any]) -> None:
        """Show a finished cycle, by its record."""
        from traincert.trainer.scoring import nats  # imports torch, which takes seconds

        tasks = record["tasks"]
        updates = updates_text(len(tasks), [task["refusal"] for task in tasks if task["refusal"]])
        size = f"{sum(task['update_size'] for task in tasks):,}"
        before, after = (nats(record[key], record["loss_offset"]) for key in ("loss_before", "loss_after"))
        loss = f"{before:.4f} → {after:.4f}"
        metric = "no number" if record["metric"] is None else f"{record['metric']:.4f}"
        self._add(
            (str(record["cycle"]), updates, size, f"{after:.4f}", metric, record["model_after"]),
            f"cycle {record['cycle']}: updates {updates}, {size} bytes, loss {loss}, metric {metric}, "
            f"model {record['model_after'][:16]}",
        )


def updates_text(tasks: int, refusals: Sequence[str]) -> str:
    """Return how many of a cycle's updates count, and why the others do not: `2 of 4 (1 copy, 1 late)`."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(refusals).items()))
    return f"{tasks - len(refusals)} of {tasks}{f' ({reasons})' if reasons else ''}"


def compared_table(runs: Iterable[Compared]) -> Table:
    """Return a table with a row for each run. Losses are in nats."""
    table = Table(box=None)
    table.add_column("run", overflow="fold")
    columns = ["cycles", "validation loss", "lowest (cycle)", "metric", "validation metric", "test loss", "test metric"]
    for name in [*columns, "bytes", "time"]:
        table.add_column(name, justify="right")
    for run in runs:
        numbers = (run.loss, run.best_loss, run.metric, run.test_loss, run.test_metric)
        loss, best, *others = ("-" if number != number else f"{number:.4f}" for number in numbers)
        time = str(timedelta(seconds=round(run.seconds)))
        results = [loss, f"{best} ({run.best_cycle})", run.metric_name, *others]
        row = [str(run.cycles), *results, f"{run.update_bytes:,}", time]
        table.add_row(run.name, *row)
    return table


def differences_table(names: Sequence[str], different: Mapping[str, Sequence[str]]) -> Table:
    """Return a table with a row for each key of the jobs that differs, and a column for each run."""
    table = Table(box=None)
    for name in ("key", *names):
        table.add_column(name, overflow="fold")
    for key, values in different.items():
        table.add_row(key, *(value or "-" for value in values))
    return table


def in_round(round_: int) -> str:
    """Return the note that earlier winners of this slot were absent, or nothing."""
    return f" (round {round_})" if round_ else ""


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def chain_table(chain: Iterable[Certified], names: Mapping[bytes, str], total: int = 0) -> Table:
    """Return a table with a row for each block. `total` is the weight of the table from which the first was drawn.

    A winner is shown by its name, or by the start of its key, with the round if the slot was drawn again. The loss is
    that of the model after, in nats, on validation examples. The chance is the winner's in the table from which it was
    drawn. A hash is cut where the terminal is narrow: 80 columns have room for the rest.
    """
    table = Table(box=None)
    for name in ("height", "winner", "params", "loss", "chance"):
        table.add_column(name, justify="left" if name == "winner" else "right", no_wrap=True)
    table.add_column("block", overflow="ellipsis")
    for block in chain:
        certificate = block.certificate
        winner = certificate.winner_key
        table.add_row(
            str(certificate.height),
            names.get(winner, winner.hex()[:16]) + in_round(certificate.round),
            f"{certificate.params_trained:,}",
            f"{certificate.loss_after / 1e9:.4f}",
            f"{certificate.draw.weight / total:.1%}" if certificate.draw else certificate.award,
            block.hash,
        )
        total = certificate.contributions_weight  # the next winner is drawn from this table
    return table


def shown_time(time: int) -> str:
    """Return a Unix time in seconds as readable text."""
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S} UTC"


def status_table(status: Iterable[NodeStatus], time: int | None) -> Table:
    """Return a table with a row for each node."""
    title = None if time is None else f"all clocks stand at {shown_time(time)}"
    table = Table(box=None, title=title, title_justify="left")
    for name in ("node", "state", "pid", "RPC port", "height", "tip", "peers", "faults"):
        table.add_column(name, justify="right" if name in ("pid", "RPC port", "height") else "left")
    for node in status:
        numbers = ("" if number is None else str(number) for number in (node.pid, node.rpc_port, node.height))
        peers, faults = " ".join(node.peers or []), "; ".join(node.faults)
        table.add_row(node.name, node.state, *numbers, (node.tip or "")[:16], peers, faults)
    return table


def equivocation_text(equivocation: Mapping[str, Any]) -> str:
    """Return an entry of gettrainingequivocations as a line."""
    return (
        f"equivocation: miner {equivocation['winner_key'][:16]} signed more than one block of height "
        f"{equivocation['height']}, round {equivocation['round']}: {' and '.join(equivocation['blocks'])}"
    )


def print_equivocations(console: Console, equivocations: Iterable[Mapping[str, Any]]) -> None:
    """Print a line for each of gettrainingequivocations' entries."""
    for each in equivocations:
        console.print(equivocation_text(each), soft_wrap=True)


def print_claims(console: Console, claims: Sequence[tuple[str, bool]]) -> None:
    """Print each claim with what its check found."""
    for text, holds in claims:
        console.print(f"{'[green]✓[/]' if holds else '[red]✗ NOT TRUE:[/]'} {text}")
