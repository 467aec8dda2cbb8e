"""The commands `traincert coordinator ...`: the coordinator of a network whose members are on machines of their own."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from traincert.bridge.cli.events import CoordinatorEvents
from traincert.trainer.imports import importing

FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))


class XonlyKey(click.ParamType[bytes]):
    """An x-only public key (BIP340) in hex."""

    name = "key"

    def convert(self, value: str | bytes, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        """Return the key's 32 bytes."""
        if isinstance(value, bytes):
            return value
        try:
            key = bytes.fromhex(value)
        except ValueError:
            key = b""
        return key if len(key) == 32 else self.fail(f"{value!r} is no key of 64 hex digits", param, ctx)


@click.group()
def coordinator() -> None:
    """Coordinate a network whose miners are on machines of their own."""


@coordinator.command("init")
@FOLDER
@click.option("--job", required=True, help="What the network trains: a TOML file, or a job's name.")
@click.option(
    "--host",
    "hosts",
    multiple=True,
    default=("127.0.0.1",),
    show_default=True,
    help="A name or IP address under which miners reach the broker. Repeatable.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=4222,
    show_default=True,
    help="The broker's port, which must be open.",
)
@click.option(
    "--round",
    "round_seconds",
    type=click.IntRange(1, 86400),
    default=60,
    show_default=True,
    help="Seconds after which another winner is drawn, if the block does not come.",
)
@click.option("--cosigner", "cosigners", multiple=True, type=XonlyKey(), help="A cosigner's public key. Repeatable.")
@click.option(
    "--threshold",
    type=click.IntRange(1, 16),
    help="How many of the keys must sign a certificate: the coordinator's and the cosigners'.  [default: all]",
)
def coordinator_init(
    folder: Path,
    job: str,
    hosts: tuple[str, ...],
    port: int,
    round_seconds: int,
    cosigners: tuple[bytes, ...],
    threshold: int | None,
) -> None:
    """Make the folder FOLDER of a new network: keys, beacon, broker, prepared data."""
    from traincert.bridge.coordinator_folder import CoordinatorFolder, Settings
    from traincert.trainer.job import TrainingJob

    training_job = TrainingJob.named(job)
    where = TrainingJob.located(job)
    threshold = threshold or 1 + len(cosigners)
    CoordinatorFolder.create(folder, Settings(where, hosts, port, round_seconds, cosigners, threshold), training_job)
    click.echo(f"Every node of the network needs the options in {folder / 'training.conf'}.")
    click.echo(f"Next: traincert broker run {folder}")
    click.echo(f"      traincert coordinator invite {folder} NAME")
    click.echo(f"      traincert coordinator run {folder} --datadir NODE")


@coordinator.command("run")
@FOLDER
@click.option(
    "--datadir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="The data directory of the coordinator's node.",
)
@click.option("--cycles", type=click.IntRange(1, 65536), help="Do this many cycles in all.  [default: as the job says]")
@click.option(
    "--miners",
    type=click.IntRange(1, 4096),
    default=1,
    show_default=True,
    help="The first cycle waits for so many.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each event.")
def coordinator_run(folder: Path, datadir: Path, cycles: int | None, miners: int, as_json: bool) -> None:
    """Run the job's cycles. Each is closed by a block.

    The broker must run. A coordinator that was interrupted or killed goes on where it was, and trains nothing again.
    """
    with importing():
        from traincert.bridge.coordinator_folder import CoordinatorFolder
        from traincert.bridge.coordinator_program import open_coordinator

    opened = CoordinatorFolder(folder)
    if as_json:
        events = CoordinatorEvents(as_json=True)
        with open_coordinator(opened, datadir, miners, events) as program:
            program.close_slots(cycles or program.run.job.cycles)
        return
    from traincert.bridge.cli.view import CyclesView

    with CyclesView() as view, open_coordinator(opened, datadir, miners, view) as program:
        program.close_slots(cycles or program.run.job.cycles)
    click.echo(f"all {program.run.cycles} cycles are done")


@coordinator.command("invite")
@FOLDER
@click.argument("name")
@click.option("--cosigner", "is_cosigner", is_flag=True, help="Invite a cosigner, not a miner.")
def coordinator_invite(folder: Path, name: str, is_cosigner: bool) -> None:
    """Print an invitation for a miner called NAME. It is good for one miner.

    An earlier invitation of this NAME ends, if nobody has used it.
    """
    from traincert.bridge.coordinator_folder import CoordinatorFolder
    from traincert.bridge.invitations import COSIGNER, MINER

    click.echo(CoordinatorFolder(folder).invite(name, COSIGNER if is_cosigner else MINER).text())


@coordinator.command("miners")
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print JSON. A member who has not joined has no key.")
def coordinator_miners(folder: Path, as_json: bool) -> None:
    """List the miners and cosigners: names, roles and keys.

    Exit code 1 if FOLDER is no coordinator's folder.
    """
    from traincert.bridge.coordinator_folder import CoordinatorFolder

    roles = CoordinatorFolder(folder).members.roles()
    if as_json:
        shown = [{"name": name, "role": role, "key": key.hex() if key else None} for name, (role, key) in roles.items()]
        click.echo(json.dumps(shown, indent=2))
        return
    for name, (role, key) in roles.items():
        click.echo(f"{name}  {role}  {key.hex() if key else 'invited'}")


@coordinator.command("remove")
@FOLDER
@click.argument("name")
def coordinator_remove(folder: Path, name: str) -> None:
    """End the part of the miner or cosigner called NAME, at once."""
    from traincert.bridge.coordinator_folder import CoordinatorFolder

    CoordinatorFolder(folder).remove(name)
    click.echo(f"{name} is removed")


@coordinator.command("status")
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def coordinator_status(folder: Path, as_json: bool) -> None:
    """Say who is present, who has committed, and what the coordinator in FOLDER waits for.

    Exit code 3 if it does not run.
    """
    from traincert.bridge.coordinator_folder import CoordinatorFolder
    from traincert.bridge.status import is_locked, read_status

    CoordinatorFolder(folder)
    runs, status = is_locked(folder / "run" / ".lock"), read_status(folder)
    if as_json:
        click.echo(json.dumps({"runs": runs, **status}))
    elif not runs or not status:
        click.echo("the coordinator does not run" if not runs else "the coordinator starts")
    else:
        click.echo(f"{status['closed']} cycles are closed; waiting for {status['awaiting']}")
        click.echo(f"present: {', '.join(status['present']) or 'nobody'}")
        for name, until in status["barred"].items():
            click.echo(f"barred: {name}, before cycle {until}: a task of it, done again, gave something else")
        if status["miners"]:
            late = sorted(set(status["miners"]) - set(status["committed"]))
            left = status["deadline"] - time.time()
            click.echo(f"committed: {', '.join(status['committed']) or 'nobody'}")
            click.echo(f"awaited: {', '.join(late) or 'nobody'}, for {max(0, left):.0f} s more")
    if not runs:
        raise SystemExit(3)
