"""The commands `traincert job ...`: training without a chain."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from traincert.bridge.cli.view import JobView, compared_table, differences_table, stdout_console
from traincert.bridge.errors import BridgeError

if TYPE_CHECKING:
    from traincert.trainer.records import RunFolder


@click.group()
def job() -> None:
    """Train a job without a chain."""


@job.command("show")
@click.argument("job", metavar="JOB")
def job_show(job: str) -> None:
    """Print a job with all keys, their meanings and their defaults.

    JOB is a TOML file, or the name of a job that comes with traincert: digits, fashion or text.
    """
    from traincert.trainer.job import TrainingJob

    click.echo(TrainingJob.named(job).to_toml(), nl=False)


@job.command("run")
@click.argument("job", metavar="JOB")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="The run folder, with the report and TensorBoard's logs.  [default: runs/JOB]",
)
@click.option("--miners", type=click.IntRange(1, 1000), default=4, show_default=True, help="Number of miners.")
@click.option(
    "--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Number of worker processes."
)
@click.option(
    "--cycles",
    type=click.IntRange(1, 1_000_000),
    help="Do this many cycles in all. A finished run goes on, with the learning rate of its last cycle, and without "
    "early_stop.  [default: as the job says]",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path, file_okay=False),
    help="Begin with the last model of this run folder, instead of the job's initial model. The model is copied: to go "
    "on, the new run does not need this folder.",
)
@click.option(
    "--monitor",
    "monitored",
    is_flag=True,
    help="Watch what each task does beside training, by the kernel. It needs root and bpftrace.",
)
def job_run(
    job: str,
    out: Path | None,
    miners: int,
    workers: int,
    cycles: int | None,
    source: Path | None,
    monitored: bool,
) -> None:
    """Train a job, without a chain. A run that was interrupted goes on where it ended.

    JOB is a TOML file, or the name of a job that comes with traincert: digits, fashion or text.
    """
    from traincert.trainer.errors import JobError
    from traincert.trainer.job import TrainingJob

    training_job = TrainingJob.named(job)
    if source and training_job.initial_model:
        raise click.UsageError(f"--from: {job} has an initial_model: give one of them.")
    out = out or Path("runs", Path(job).stem)
    with JobView() as view:
        view.step("importing PyTorch")
        from traincert.trainer.run import run_job  # takes seconds
        from traincert.trainer.scoring import nats

        try:
            report = run_job(
                training_job, out, miners, workers, view, cycles=cycles, source=source, monitored=monitored
            )
        except JobError as error:
            raise JobError(f"{job}: {error}") from error
    console = stdout_console()
    if report.stopped:
        console.print(f"the run ended early: {report.stopped}", soft_wrap=True)
    metric = training_job.metric_names[0]
    target = "" if training_job.target_metric is None else f" (target: {training_job.target_metric})"
    console.print(
        f"test {metric} {report.test.metric:.4f}{target}, "
        f"test loss {nats(report.test.loss, training_job.loss_offset):.4f} nats",
        soft_wrap=True,
    )
    if monitored:
        console.print(f"{report.monitored} of the run's {report.tasks} tasks were monitored", soft_wrap=True)
    for flag, count in sorted(report.flags.items()):
        console.print(f"{count} task{'s'[: count != 1]} also did this: {flag}", soft_wrap=True, markup=False)
    console.print(f"last record {report.head.hex()}", soft_wrap=True)
    console.print(f"report: {report.path}\nTensorBoard: tensorboard --logdir {shlex.quote(str(out))}", soft_wrap=True)
    if training_job.target_metric is not None and not report.test.metric >= training_job.target_metric:
        raise BridgeError(f"test {metric} {report.test.metric:.4f} misses target_metric = {training_job.target_metric}")


@job.command("compare")
@click.argument("folders", metavar="RUN...", nargs=-1, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("compare.png"),
    show_default=True,
    help="The picture of all losses (PNG).",
)
def job_compare(folders: tuple[Path, ...], out: Path) -> None:
    """Compare runs: their results, what differs between their jobs, and their losses in one picture."""
    if len(folders) < 2:
        raise click.UsageError("give two run folders or more.")
    from traincert.trainer.compare import differences, plot_runs, read_run

    if out.suffix != ".png":
        raise click.UsageError(f"--out {out}: the name must end with .png.")
    runs = [read_run(folder) for folder in folders]
    plot_runs(runs, out)
    console = stdout_console()
    console.print(compared_table(runs))
    if different := differences(runs):
        console.print()
        console.print(differences_table([run.name for run in runs], different))
        if {"loss", "metric"} & different.keys():
            console.print("\nthe runs have different losses or metrics: their numbers mean different things")
    else:
        console.print("\nthe jobs are equal")
    console.print(f"\n{out}", soft_wrap=True)


@job.command("export")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The file to write, .pt or .safetensors.",
)
@click.option("--cycle", type=click.IntRange(0), help="The model after this cycle.  [default: the last]")
@click.option("--best", is_flag=True, help="The model with the lowest validation loss.")
@click.option(
    "--height",
    type=click.IntRange(1),
    help="The model that the certificate of this block names. Every rule is checked on the chain first.",
)
@click.option(
    "--datadir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="With --height: the data directory of a running node.",
)
def job_export(
    folder: Path, out: Path, cycle: int | None, best: bool, height: int | None, datadir: Path | None
) -> None:
    """Write a run's model to a file that PyTorch loads without traincert.

    A JSON file beside it says how the job prepares its data: means, deviations, codes.

    The run of a chain is in the folder `run` of its deployment, for example demo/coordinator/run.
    """
    if (cycle is not None) + best + (height is not None) > 1:
        raise click.UsageError("--cycle, --best and --height: give one of them.")
    if (height is None) != (datadir is None):
        raise click.UsageError("--height and --datadir: give both or neither.")
    from traincert.trainer.export import export_model
    from traincert.trainer.records import RunFolder

    with RunFolder(folder) as run:
        if height is not None and datadir is not None:
            chosen = _certified_cycle(run, datadir, height)
        else:
            chosen = run.best_cycle if best else run.cycles if cycle is None else cycle
        export_model(run, chosen, out)
    load = "torch.load" if out.suffix == ".pt" else "safetensors.torch.load_file"
    console = stdout_console()
    console.print(f"{out}: the model after cycle {chosen}", soft_wrap=True)
    console.print(f"model.load_state_dict({load}({str(out)!r}))", soft_wrap=True, markup=False)


def _certified_cycle(run: RunFolder, datadir: Path, height: int) -> int:
    """Return the cycle that the block at a height certifies. Raises BridgeError if it certifies none of this run."""
    from traincert.bridge.chain import read_chain, read_params
    from traincert.bridge.rpc import NodeClient

    with NodeClient.from_datadir(datadir) as client:
        chain = {block.certificate.height: block.certificate for block in read_chain(client, read_params(client))}
    if height not in chain:
        heights = f"{min(chain)} to {max(chain)}" if chain else "none"
        raise BridgeError(f"{datadir}: block {height} has no certificate; certificates are in blocks: {heights}")
    certificate = chain[height]
    if certificate.record not in run.hashes:
        raise BridgeError(f"{run.folder} has no record {certificate.record.hex()}, which block {height} certifies")
    cycle = run.hashes.index(certificate.record)
    if run.records[cycle]["model_after"] != certificate.model_after.hex():
        raise BridgeError(f"block {height} certifies another model than its record names")
    return cycle


@job.command("replay")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--cycle",
    type=click.IntRange(1),
    help="Replay only this cycle.  [default: all cycles whose models are still stored]",
)
def job_replay(folder: Path, cycle: int | None) -> None:
    """Do a run's tasks again, from its records and its store, and compare the hashes of the updates."""
    from traincert.trainer.records import RunFolder
    from traincert.trainer.replay import replay_tasks

    console = stdout_console()
    different = total = without = 0
    with RunFolder(folder) as run:
        for each in replay_tasks(run, cycle):
            if not each.found:
                without += 1
                continue
            total += 1
            different += not each.same
            verdict = "[green]same[/]" if each.same else f"[red]DIFFERENT[/], now {each.found}"
            console.print(
                f"cycle {each.cycle}, miner {each.miner[:8]}: update {each.recorded}: {verdict}", soft_wrap=True
            )
    if different:
        raise BridgeError(f"{different} of {total} updates are different")
    if without:
        console.print(f"{without} tasks are not replayed: only their miners have the memories that they began with")
    console.print(f"all {total} updates are the same")
