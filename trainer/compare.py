"""Compare runs: what differs between their jobs, and what came of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traincert.trainer.records import RunFolder, number_of
from traincert.trainer.report import MAX_NAMED, loss_of, new_figure


@dataclass(frozen=True)
class Compared:
    """A run's results. Losses are in nats; NaN stands for a number that is not known."""

    name: str
    cycles: int
    loss: float
    """Validation loss of the last model."""
    best_loss: float
    best_cycle: int
    metric_name: str
    metric: float
    """Validation metric of the last model."""
    test_loss: float
    """NaN if the run is not finished."""
    test_metric: float
    update_bytes: int
    seconds: float
    """How long all cycles took."""
    losses: tuple[float, ...]
    """Validation loss before the first cycle and after each."""
    identity: dict[str, str]
    """As `RunFolder.identity` returns it."""


def read_run(folder: Path) -> Compared:
    """Read a run's results. Raises RunError if the folder is not a run folder, is in use, or has not begun."""
    with RunFolder(folder) as run:
        run.last_model()
        losses = tuple(map(loss_of, run.records))
        path = folder / "report" / "report.json"
        report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if report.get("cycles") != run.cycles:  # the run went on
            report = {}
        return Compared(
            name=str(folder),
            cycles=run.cycles,
            loss=losses[-1],
            best_loss=losses[run.best_cycle],
            best_cycle=run.best_cycle,
            metric_name=run.job.metric_names[0],
            metric=number_of(run.records[-1]["metric"]),
            test_loss=number_of(report.get("test_loss")),
            test_metric=number_of(report.get("test_metric")),
            update_bytes=sum(task["update_size"] for record in run.records for task in record["tasks"]),
            seconds=sum(each["seconds"] for each in run.costs()),
            losses=losses,
            identity=run.identity,
        )


def differences(runs: Sequence[Compared]) -> dict[str, list[str]]:
    """Return what differs between the runs' jobs: the values of each key, in the order of the runs."""
    keys = sorted({key for run in runs for key in run.identity})
    values = {key: [run.identity.get(key, "") for run in runs] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def plot_runs(runs: Sequence[Compared], path: Path) -> None:
    """Draw the validation losses of all runs in one picture (PNG)."""
    figure, axis = new_figure("Validation loss", "loss (nats)")
    for number, run in enumerate(runs):
        label = run.name if number < MAX_NAMED else None
        axis.plot(range(len(run.losses)), run.losses, color=f"C{number % 10}", label=label)
    figure.legend(loc="outside lower left")
    figure.savefig(path, dpi=120)
