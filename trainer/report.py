"""Show a run to people: TensorBoard's logs, and a report with plots."""

import json
import math
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from traincert.trainer.accounting import guarantee
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import Costs, Record, finite, number_of, spent
from traincert.trainer.scoring import Evaluation, nats
from traincert.trainer.store import write_file

MAX_NAMED = 10  # how many miners or segments a plot's legend names


class TensorBoard:
    """Writes a run's records as TensorBoard's scalars. Use it as a context manager."""

    def __init__(self, folder: Path, job: TrainingJob, records: Sequence[Record]) -> None:
        """Delete `folder`, and write all records. After an interruption no record is missing or there twice."""
        shutil.rmtree(folder, ignore_errors=True)
        self._more = job.metric_names[1:]
        self._writer = SummaryWriter(str(folder))
        for record in records:
            self.add(record)

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def add(self, record: Record) -> None:
        """Write one record."""
        scalars = {"validation/loss (nats)": loss_of(record), "validation/metric": record["metric"]}
        scalars |= {f"validation/{name}": each for name, each in zip(self._more, record["more_metrics"], strict=True)}
        if record["cycle"]:
            tasks = record["tasks"]
            scalars |= {
                "updates/accepted": sum(not task["refusal"] for task in tasks),
                "updates/refused": sum(bool(task["refusal"]) for task in tasks),
                "updates/bytes": sum(task["update_size"] for task in tasks),
                "updates/params trained": sum(task["params"] for task in tasks if not task["refusal"]),
            }
        for name, value in scalars.items():
            self._writer.add_scalar(name, number_of(value), record["cycle"])
        self._writer.flush()


def write_report(
    folder: Path,
    job: TrainingJob,
    records: Sequence[Record],
    test: Evaluation,
    costs: Sequence[Costs] = (),
) -> Path:
    """Write report.html, its plots (PNG) and report.json to `folder`; return the path of report.html.

    `costs` is as `RunFolder.costs` returns it.
    """
    folder.mkdir(exist_ok=True)
    summary = _summary(job, records, test) | {
        "seconds": sum(each["seconds"] for each in costs),
        "seconds_per_cycle": statistics.median(each["seconds"] for each in costs) if costs else None,
        "task_seconds": sum(each["training"] for each in costs),
    }
    plots = {
        "loss.png": _plot_loss(records, summary["metric"]),
        "miners.png": _plot_miners(records),
        "segments.png": _plot_segments(records),
    }
    for name, figure in plots.items():
        figure.savefig(folder / name, dpi=120)
    environment = Environment(loader=PackageLoader("traincert.trainer"), autoescape=True)
    environment.filters["duration"] = lambda seconds: str(timedelta(seconds=round(seconds)))
    environment.filters["number"] = lambda value: "no number" if value is None else f"{value:.4f}"
    template = environment.get_template("report.html")
    write_file(folder / "report.json", json.dumps(summary, indent=2, allow_nan=False).encode() + b"\n", 0o644)
    write_file(folder / "report.html", template.render(summary=summary, job=job.to_toml(), plots=plots).encode(), 0o644)
    return folder / "report.html"


def loss_of(record: Record) -> float:
    """Return the validation loss in a record, nats without the job's loss_offset; NaN if it was no number."""
    return nats(record["loss_after"], record["loss_offset"])


def _summary(job: TrainingJob, records: Sequence[Record], test: Evaluation) -> dict[str, Any]:
    tasks = [task for record in records for task in record["tasks"]]
    sent = [task for task in tasks if task["update_hash"]]
    size = sum(task["update_size"] for task in sent)
    return {
        "cycles": len(records) - 1,
        "metric": job.metric_names[0],
        "validation_loss_first": finite(loss_of(records[0])),
        "validation_loss": finite(loss_of(records[-1])),
        "validation_metric": records[-1]["metric"],
        "test_loss": finite(nats(test.loss, job.loss_offset)),
        "test_metric": finite(test.metric),
        "target_metric": job.target_metric,
        "more_metrics": {
            name: {"validation": found, "test": finite(tested)}
            for name, found, tested in zip(job.metric_names[1:], records[-1]["more_metrics"], test.more, strict=True)
        },
        "model": records[-1]["model_after"],
        "dataset_root": records[-1]["dataset_root"],
        "updates": len(sent),
        "update_bytes": size,
        "times_smaller_than_float32": sum(4 * task["params"] for task in sent) / size if size else None,
        "privacy": guarantee(job, spent(records[-1]).values()) if job.privacy else None,
        "refusals": dict(sorted(Counter(task["refusal"] for task in tasks if task["refusal"]).items())),
    }


def _plot_loss(records: Sequence[Record], name: str) -> Figure:
    figure, axis = new_figure(f"Validation loss and {name} of the model", "loss (nats)")
    cycles = [record["cycle"] for record in records]
    losses = [loss_of(record) for record in records]
    axis.plot(cycles, losses, color="C0", label="loss")
    if min((loss for loss in losses if math.isfinite(loss)), default=0) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    axis.grid(axis="y", which="both", alpha=0.2)
    metric = axis.twinx()
    metric.plot(
        cycles, [number_of(record["metric"]) for record in records], color="C1", linestyle="--", label=f"{name} (right)"
    )
    metric.set_ylabel(name)
    handles, labels = axis.get_legend_handles_labels()
    more_handles, more_labels = metric.get_legend_handles_labels()
    axis.legend(handles + more_handles, labels + more_labels, loc="center right")
    return figure


def _plot_miners(records: Sequence[Record]) -> Figure:
    figure, axis = new_figure("Contribution of each miner", "weight, summed up")
    totals: dict[str, int] = defaultdict(int)
    lines: dict[str, list[int]] = defaultdict(list)
    miners = sorted({task["miner"] for record in records for task in record["tasks"]})
    for record in records:
        for task in record["tasks"]:
            totals[task["miner"]] += task["weight"]
        for miner in miners:
            lines[miner].append(totals[miner])
    for number, miner in enumerate(miners):
        label = miner[:8] if number < MAX_NAMED else None
        axis.plot([record["cycle"] for record in records], lines[miner], color=f"C{number % 10}", label=label)
    if miners:
        figure.legend(title="miner", loc="outside right upper")
    return figure


def _plot_segments(records: Sequence[Record]) -> Figure:
    figure, axis = new_figure(
        "Mean loss reduction of an update, by segment (n updates, each at 1/n of its size)",
        "mean loss reduction (nats)",
    )
    for segment in sorted({task["segment"] for record in records for task in record["tasks"]}):
        points = []
        for record in records[1:]:
            found = [task["loss_reduction"] / 1e9 for task in record["tasks"] if task["segment"] == segment]
            if any(found):
                points.append((record["cycle"], sum(found) / len(found)))
        cycles, means = zip(*points, strict=True) if points else ((), ())
        label = f"segment {segment}" if segment < MAX_NAMED else None
        axis.plot(cycles, means, marker=".", color=f"C{segment % 10}", label=label)
    if axis.lines:
        axis.set_yscale("log")
        figure.legend(loc="outside right upper")
    return figure


def new_figure(title: str, label: str) -> tuple[Figure, Any]:
    """Return a figure over cycles, and its axis. `label` is that of the y-axis."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.add_subplot()
    axis.set_title(title)
    axis.set_xlabel("cycle")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel(label)
    return figure, axis
