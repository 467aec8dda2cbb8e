"""`make bench-energy`: what a block costs that is earned by training, and one that is mined by searching nonces.

    energy.py FOLDER [--job fashion] [--cycles 8]

It runs a short demo, and mines hashes for some seconds, on this machine. It writes FOLDER/energy.md, a table, and
FOLDER/energy.png. Joules are in them if this machine has a meter that this user may read.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from traincert.bridge.energy import BlockCost, HashRate, find_run, mine_hashes, read_costs, total
from traincert.trainer.energy import energy_meters
from traincert.trainer.resources import Meter

DIFFICULTIES = {
    "regtest, difficulty 4.7e-10": 0xFFFF * 2**208 / (0x7FFFFF * 2**232),  # nBits 207fffff
    "difficulty 1": 1.0,
    "difficulty 1,000": 1000.0,
    # Block 840,000 of 2024-04-20, by its nBits 17034219.
    "Bitcoin in April 2024, difficulty 8.6e13": 0xFFFF * 2**208 / (0x034219 * 2**160),
}


def processor() -> str:
    """The processor's name, as Linux has it."""
    names = [line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{len(names)} cores of {names[0].strip()}" if names else f"{os.cpu_count()} cores"


def run_demo(job: str, cycles: int, folder: Path) -> float:
    """Run a demo in a folder. Return the CPU seconds of all its programs."""
    command = [sys.executable, "-m", "traincert.bridge.cli.main", "demo", "--job", job, "--cycles", str(cycles)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--data", str(folder)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def meter_seconds(times: int = 300) -> float:
    """CPU seconds to measure one task, see trainer/resources.py."""
    meter = Meter(os.getpid())
    begin = time.process_time()
    for _ in range(times):
        meter.begin()
        meter.end(None)
    return (time.process_time() - begin) / times


def number(amount: float) -> str:
    return f"{amount:,.0f}" if 100 <= amount < 1e7 else f"{amount:.3g}"


def table(
    records: Sequence[Mapping[str, Any]], costs: Sequence[BlockCost], mined: HashRate, job: str, programs: float
) -> str:
    """The results, as text with a table."""
    all_, count = total(costs), len(costs)
    first, last = records[0], records[-1]
    left = f"loss {nats(first):.4f} → {nats(last):.4f} nats, accuracy {first['metric']:.3f} → {last['metric']:.3f}"
    metered = bool(all_.joules and mined.joules)
    rows = [("what", "hashes", "CPU seconds", "joules", "what it leaves behind")]
    rows += [("---", "---", "---", "---", "---")]
    rows += [
        (
            f"`{job}`, measured, mean of {count} blocks",
            "",
            number(all_.cpu_seconds / count),
            number((all_.all_joules or 0) / count),
            f"{left} after {count} blocks",
        )
    ]
    for name, difficulty in DIFFICULTIES.items():
        wanted = mined.expected(difficulty)
        joules = number(sum(wanted.joules.values()))
        rows += [
            (f"{name}, computed", number(wanted.hashes), number(wanted.cpu_seconds), joules, "nothing but a nonce")
        ]
    lines = [f"| {' | '.join(cell for at, cell in enumerate(row) if metered or at != 3)} |" for row in rows]
    meters = f"meters: {', '.join(all_.joules)}" if all_.joules else energy_meters().why_none
    spent, task = meter_seconds(), all_.training_seconds / all_.tasks
    lines += [
        "",
        f"Machine: {processor()}; {meters}.",
        f"Mined by {mined.by}: {mined.hashes:,} hashes in {mined.cpu_seconds:.2f} CPU seconds, "
        f"{mined.hashes / mined.cpu_seconds / 1e6:.2f} million a second.",
        f"Of a block's CPU seconds, {all_.training_seconds / count:.2f} are of its {all_.tasks / count:g} tasks and "
        f"{all_.coordinator_seconds / count:.2f} of the coordinator. All programs of the demo together took "
        f"{programs / count:.2f} for each block, their start and the checks at the end included.",
        f"To measure a task takes {1e3 * spent:.2f} ms of CPU time, {100 * spent / task:.2f} % of what the task takes.",
    ]
    return "\n".join(lines) + "\n"


def nats(record: Mapping[str, Any]) -> float:
    loss: float = record["loss_after"] / 1e9 - record["loss_offset"]
    return loss


def plot(
    records: Sequence[Mapping[str, Any]], costs: Sequence[BlockCost], mined: HashRate, job: str, path: Path
) -> None:
    """Plot a block's cost, and what is left of it."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    names = [f"training, {job}", *(f"hashes, {name}" for name in DIFFICULTIES)]
    seconds = [total(costs).cpu_seconds / len(costs)]
    seconds += [mined.expected(difficulty).cpu_seconds for difficulty in DIFFICULTIES.values()]
    left.barh(names[::-1], seconds[::-1], color=["C1"] * len(DIFFICULTIES) + ["C0"])
    left.set(
        xscale="log", xlabel="measured for training, computed for hashes", title="What a block costs, in CPU seconds"
    )
    spent = list(itertools.accumulate((each.cpu_seconds for each in costs), initial=0.0))
    right.plot(spent, [nats(record) for record in records], color="C0", label="validation loss (nats)")
    right.plot(spent, [record["metric"] for record in records], color="C2", label="accuracy")
    right.set(xlabel="CPU seconds of all blocks so far", title="What training leaves behind: a model")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--job", default="fashion", show_default=True)
@click.option("--cycles", type=click.IntRange(2), default=8, show_default=True)
def main(folder: Path, job: str, cycles: int) -> None:
    """Run the bench."""
    folder.mkdir(parents=True, exist_ok=True)
    programs = run_demo(job, cycles, folder / "demo")
    run = find_run(folder / "demo")
    costs = list(read_costs(run).values())
    records = [json.loads(path.read_bytes()) for path in sorted((run / "cycles").glob("*.json"))]
    mined = mine_hashes()
    text = table(records, costs, mined, job, programs)
    (folder / "energy.md").write_text(text)
    plot(records, costs, mined, job, folder / "energy.png")
    click.echo(text)


if __name__ == "__main__":
    main()
