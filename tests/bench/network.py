"""Miners over the broker against engine `local`, in the same run. No chain is needed: blocks cost nothing here.

    tests/bench/network.py FOLDER --part many --miners 50 2000

runs one part alone.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from coincurve import PrivateKey
from nats.aio.client import Client

from bench.rows import Row, row, timed
from traincert.bridge.broker import Credential, connect, coordinator_credential, server_command
from traincert.bridge.coordinator import Slot
from traincert.bridge.coordinator_folder import CoordinatorFolder, Settings
from traincert.bridge.errors import BridgeError
from traincert.bridge.invitations import MINER
from traincert.bridge.keys import load_secret
from traincert.bridge.member import MemberFolder
from traincert.bridge.messages import assignment_seed
from traincert.bridge.remote_miners import RemoteMiners
from traincert.regtest.node import free_ports
from traincert.trainer.cycle import CycleResult, Trainer
from traincert.trainer.engines.broker import Connection
from traincert.trainer.engines.local import LocalEngine
from traincert.trainer.engines.nats import NatsEngine
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import RunFolder

MINERS = 4
FASHION_CYCLES = 20  # in the first ones the miners fetch the shards
CYCLES = 8
SMALL = {"inputs": 64, "hidden": [332], "classes": 10}  # 25,000 parameters, 100 KB
LARGE = {"inputs": 64, "hidden": [4964, 4964], "classes": 10}  # 25 million parameters, 100 MB
TRAINCERT = [sys.executable, "-m", "traincert.bridge.cli.main"]


def measure(folder: Path) -> Iterator[list[Row]]:
    """Run all parts, one after the other."""
    yield _fashion(folder / "fashion")
    yield _large(folder / "large")
    yield _many(folder / "many")


class Remote:
    """A coordinator's side without a node: trainer, engine and broker. Miners are invited with `invite`."""

    def __init__(self, folder: Path, job: TrainingJob, stack: ExitStack, members: int = 0) -> None:
        """`members` miners are invited before the broker starts, which is faster than while it runs."""
        path = folder / "job.toml"
        folder.mkdir(parents=True)
        path.write_text(job.to_toml())
        self.folder = CoordinatorFolder.create(folder / "coordinator", Settings(str(path), ["127.0.0.1"], _port()), job)
        names = [f"miner{number}" for number in range(members)]
        self.credentials = [(name, self._invite(name)) for name in names]
        with (folder / "log").open("wb") as log:
            self.broker = psutil.Popen(server_command(self.folder.folder), stderr=log)
        stack.callback(_end, self.broker)
        key = PrivateKey(load_secret(self.folder.folder / "keys" / "coordinator.key"))
        run = stack.enter_context(RunFolder(self.folder.folder / "run", job))
        dataset = run.dataset()
        self.miners = RemoteMiners(
            self.folder.members, key, self.folder.params, wanted=1, waiting=lambda _present, _wanted: None
        )
        credential = coordinator_credential(self.folder.folder)
        self.connection = stack.enter_context(Connection(_patient(credential)))
        self.engine = NatsEngine(
            job,
            run.store,
            self.folder.folder / "cycle.sqlite",
            self.connection,
            members=self.folder.members.keys,
            read_commit=self.miners.read_commit,
            make_receipt=self.miners.make_receipt,
            make_closing=self.miners.make_closing,
            make_request=self.miners.make_request,
            shared=self.miners.shared,
        )
        self.trainer = stack.enter_context(Trainer(dataset, self.engine))
        run.begin(self.trainer.start(), dataset)
        self.miners.attach(self.engine, self.trainer, run)
        self.connection.serve(self.engine.handlers, self.folder.members.roles)
        self.job_file, self.run = path, run
        self.state = run.load()

    def _invite(self, name: str) -> Credential:
        invitation = self.folder.invite(name, MINER)
        return Credential(invitation.url, invitation.ca, invitation.seed)

    def cycle(self, number: int, miners: int) -> CycleResult:
        """Run a cycle, as a coordinator does, with as many miners."""
        self.miners._wanted = miners
        prev_block = hashlib.sha256(number.to_bytes(4, "little")).digest()
        self.miners._wait(miners)
        present, opening = self.miners.open(Slot(number + 1, prev_block, 0), number)
        seed = assignment_seed(self.trainer.job.seed, prev_block)
        result = self.trainer.run_cycle(self.state, present, seed=seed)
        self.run.save(self.run.next_record(result, opening))
        self.state = result.after
        return result


def _patient(credential: Any) -> Any:
    async def connected(**options: Any) -> Client:
        for _ in range(100):
            try:
                return await connect(credential, **options)
            except BridgeError:  # it starts
                await asyncio.sleep(0.1)
        return await connect(credential, **options)

    return connected


def _port() -> int:
    return free_ports(1)[0]


def _end(process: psutil.Popen) -> None:
    process.terminate()
    process.wait()


def _start_miners(remote: Remote, folder: Path, count: int, stack: ExitStack) -> None:
    for number in range(count):
        invitation = remote.folder.invite(f"miner{number}", MINER)
        MemberFolder.create(folder / f"miner{number}", invitation, str(remote.job_file))
        command = [*TRAINCERT, "miner", "run", str(folder / f"miner{number}"), "--json"]
        with (folder / f"miner{number}" / "log").open("wb") as log:
            process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        stack.callback(_end, process)


class Local:
    """Engine `local`, with as many workers as there are miners."""

    def __init__(self, folder: Path, job: TrainingJob, miners: int, stack: ExitStack) -> None:
        self.ids = [hashlib.sha256(bytes([number])).digest() for number in range(miners)]
        self.run = stack.enter_context(RunFolder(folder, job))
        dataset = self.run.dataset()
        engine = stack.enter_context(LocalEngine(job, self.run.store, workers=miners))
        self.trainer = stack.enter_context(Trainer(dataset, engine))
        self.run.begin(self.trainer.start(), dataset)
        self.state = self.run.load()

    def cycle(self, number: int) -> CycleResult:
        """Run a cycle."""
        result = self.trainer.run_cycle(self.state, self.ids, seed=bytes([number]))
        self.run.save(self.run.next_record(result))
        self.state = result.after
        return result


def _loopback() -> int:
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


def _fashion(folder: Path) -> list[Row]:
    """Both engines in turns, so that what else the machine does slows both."""
    job = replace(TrainingJob.named("fashion"), cycles=FASHION_CYCLES, warmup_cycles=0)
    with ExitStack() as stack:
        local = Local(folder / "local", job, MINERS, stack)
        remote = Remote(folder / "nats", job, stack)
        before = _loopback()
        _start_miners(remote, folder / "nats", MINERS, stack)
        times, ratios, moved = [], [], 0
        for number in range(FASHION_CYCLES):
            alone, _ = timed(partial(local.cycle, number))
            seconds, result = timed(partial(remote.cycle, number, MINERS))
            times.append(seconds)
            ratios.append(seconds / alone)
            moved += sum(task.commit.update_size for task in result.tasks if task.commit)
            moved += MINERS * (remote.run.store / result.model_before.hex()).stat().st_size
        sent = (_loopback() - before) / 2  # each byte goes to the broker, and from it
        shards = {task.order.shard_hash for task in result.tasks}
        folder_of = remote.trainer.dataset.shard_folder
        moved += MINERS * sum((folder_of / shard.hex()).stat().st_size for shard in shards)
    return [
        row("fashion, 4 miners over the broker: seconds of a cycle, median", statistics.median(times[1:]), "s"),
        row("the same, against engine local in turns, median", statistics.median(ratios[1:]), "ratio", 1.1),
        row("the same: bytes on the wire, against models, shards and updates", sent / moved, "ratio", 1.1),
    ]


def _large(folder: Path) -> list[Row]:
    job = replace(
        TrainingJob.named("digits"),
        model_options=LARGE,
        segments=1,
        local_steps=1,
        batch_size=8,
        cycles=CYCLES,
        shards=1,
        max_update_norm=1e6,
        validation_examples=32,
        score_examples=0,
        learning_rate=1e-4,
    )
    data = os.urandom(25_000_000 * 4)
    hashes: list[float] = []
    beside: dict[str, list[float]] = {"local": [], "nats": []}
    with ExitStack() as stack:
        local = Local(folder / "local", job, 1, stack)
        remote = Remote(folder / "nats", job, stack)
        _start_miners(remote, folder / "nats", 1, stack)
        cycles: dict[str, Callable[[int], CycleResult]] = {
            "local": local.cycle,
            "nats": partial(remote.cycle, miners=1),
        }
        for number in range(CYCLES):
            hashes.append(timed(lambda: hashlib.sha256(data).digest())[0])
            for engine, cycle in cycles.items():
                seconds, result = timed(partial(cycle, number))
                beside[engine].append(seconds - result.training_seconds)
    once, alone, over = (statistics.median(each[1:]) for each in (hashes, beside["local"], beside["nats"]))
    return [
        row("100 MB: one SHA-256", once, "s"),
        row("25 million parameters, engine local: seconds beside training", alone, "s"),
        row("the same, against one SHA-256", alone / once, "ratio", 12),
        row("over the broker: seconds beside training", over, "s"),
        row("the same, against one SHA-256", over / once, "ratio", 25),
    ]


def _many(folder: Path, sizes: Sequence[int] = (50, 500)) -> list[Row]:
    """Miners that train nothing, with updates of 100 KB: what is left is the coordinator's and the broker's work."""
    rows, each = [], []
    for count in sizes:
        job = replace(TrainingJob.named("digits"), model_options=SMALL, segments=1, score_examples=32, shards=4)
        job = replace(job, replicas=math.ceil(count / job.shards))  # each of them has a task
        with ExitStack() as stack:
            remote = Remote(folder / str(count), job, stack, members=count)
            facts = {
                "options": remote.folder.params.node_options(),
                "size": remote.trainer.layout.params,
                "miners": [{"name": name, "credential": list(credential)} for name, credential in remote.credentials],
            }
            described = folder / str(count) / "miners.json"
            described.write_text(json.dumps(facts))
            program = Path(__file__).with_name("simulated.py")
            stack.callback(_end, psutil.Popen([sys.executable, str(program), str(described)], stdout=sys.stderr))
            times = [timed(partial(remote.cycle, number, count))[0] for number in range(5)]
            memory = psutil.Process().memory_info().rss / 1e9
        each.append(statistics.median(times[1:]) / count)
        rows += [
            row(f"{count} simulated miners: seconds of a cycle, median", statistics.median(times[1:]), "s"),
            row("the same: memory of the coordinator", memory, "GB", 1.5),
        ]
    rows.append(row(f"for each of {sizes[-1]} miners, against {sizes[0]}", each[-1] / each[0], "ratio", 1.3))
    return rows


def main() -> None:
    """Run one part alone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=["fashion", "large", "many"], default="many")
    parser.add_argument("--miners", type=int, nargs="+", default=[50, 500])
    arguments = parser.parse_args()
    parts: dict[str, Callable[[Path], list[Row]]] = {
        "fashion": _fashion,
        "large": _large,
        "many": partial(_many, sizes=arguments.miners),
    }
    for each in parts[arguments.part](arguments.folder.absolute()):
        print(each["name"], each["value"], each["unit"], each["bar"] or "", "" if each["holds"] else "NO")


if __name__ == "__main__":
    main()
