"""Run a job in a run folder: from its beginning, or from where it was interrupted, to its end."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from traincert.trainer.cycle import CycleResult, Trainer
from traincert.trainer.energy import Spending
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.errors import Reason, RunError
from traincert.trainer.job import TrainingJob
from traincert.trainer.monitoring import start_monitor
from traincert.trainer.records import Record, RunFolder
from traincert.trainer.report import TensorBoard, write_report
from traincert.trainer.scoring import Evaluation


class View(Protocol):
    """Shows a run's progress."""

    def step(self, text: str) -> None:
        """Show the name of the step that begins."""

    def update(self, done: int, total: int) -> None:
        """Show how many of the cycle's tasks are done."""

    def cycle(self, record: Record) -> None:
        """Show the record of a cycle that ended."""


@dataclass(frozen=True)
class Finished:
    """The result of a finished run."""

    head: bytes
    """Hash of the last record, 32 bytes."""
    test: Evaluation
    """The final model's loss and metric on the test examples."""
    path: Path
    """The path of the report (HTML)."""
    stopped: str
    """Why the run ended before its last cycle; empty if it did not."""
    tasks: int
    """How many tasks of the run ended."""
    monitored: int
    """How many of them were monitored."""
    flags: Mapping[str, int]
    """What these did beside training, and how many of them."""


def run_job(
    job: TrainingJob,
    folder: Path,
    miners: int,
    workers: int,
    view: View,
    *,
    cycles: int | None = None,
    source: Path | None = None,
    monitored: bool = False,
) -> Finished:
    """Run all cycles of the job, and write the report. With `cycles`, do that many in all, whatever the job says.

    If it is killed at any moment, another call continues the run and gives the same hashes; not with `job.privacy`,
    whose secrets are drawn anew. A finished run can go on with more `cycles`, at the last cycle's learning rate; the
    job's early_stop does not count then. A new run begins with the last model of the run folder `source`, if it is
    given. With `monitored` the tasks are watched, if this machine allows it.

    Raises TrainerError if the run cannot be finished, also if a cycle trained nothing: all updates were refused, none
    because it improves nothing. That cycle is not saved: another call does it again.
    """
    total = job.cycles if cycles is None else cycles
    ids = [hashlib.sha256(b"miner" + number.to_bytes(8, "little")).digest() for number in range(miners)]
    with RunFolder(folder, job, source=source, replace_untrained=True) as run:
        job = run.job
        if cycles is not None and run.cycles > cycles:
            raise RunError(f"{folder} already has {run.cycles} cycles: give as many or more, not {cycles}")
        view.step("preparing the data")
        dataset = run.dataset()
        view.step(f"starting {workers} worker processes")
        with (
            start_monitor(monitored, [run.store], lambda why: view.step(f"tasks are not monitored: {why}")) as monitor,
            LocalEngine(job, run.store, workers=workers, monitor=monitor) as engine,
            Trainer(dataset, engine) as trainer,
        ):
            if not run.records:
                run.begin(trainer.start(), dataset)
            with TensorBoard(folder / "tensorboard", job, run.records) as board:
                for record in run.records[1:]:
                    view.cycle(record)
                state = run.load()
                while run.cycles < total and not (cycles is None and _stopped(run)):
                    view.step(f"cycle {run.cycles + 1} of {total}")
                    with Spending() as spending:
                        result = trainer.run_cycle(state, ids, seed=run.seed(), on_commit=view.update)
                        _check_trained(result)
                        run.save(run.next_record(result))
                    state = result.after
                    run.save_costs(result, spending)
                    board.add(run.records[-1])
                    view.cycle(run.records[-1])
            view.step("testing")
            test = trainer.test(state.model)
        costs = run.costs()
        path = write_report(folder / "report", job, run.records, test, costs)
        tasks = [task for cycle in costs for task in cycle["tasks"].values()]
        seen = [task["flags"] for task in tasks if task and task["flags"] is not None]
        flags = Counter(flag for each in seen for flag in each)
        stopped = _stopped(run) if run.cycles < total else ""
        return Finished(run.head, test, path, stopped, len(tasks), len(seen), flags)


def _stopped(run: RunFolder) -> str:
    """Return why the run has ended early, by the job's early_stop, or an empty string."""
    if not run.job.early_stop or run.cycles - run.best_cycle < run.job.early_stop:
        return ""
    return (
        f"no lower validation loss in {run.cycles - run.best_cycle} cycles; the best model is of cycle {run.best_cycle}"
    )


def _check_trained(result: CycleResult) -> None:
    refusals = result.refusals
    if len(refusals) < len(result.tasks) or any(each.reason is Reason.NO_IMPROVEMENT for each in refusals):
        return
    (reason, detail), count = Counter((each.reason, each.detail) for each in refusals).most_common(1)[0]
    raise RunError(
        f"cycle {result.after.cycle}: all {len(refusals)} updates were refused, so nothing was trained; "
        f"{count} as {reason}: {detail}"
    )
