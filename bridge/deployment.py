"""All roles of one training network on this machine, each a process of its own with its own folder.

    broker, coordinator   coordinator/
    cosigners             cosigner1/, cosigner2/
    miners                miner0/, miner1/, ...
    nodes                 node0/, node1/, ...: somebody else starts them

The first node is the coordinator's and the cosigners'; the miners share all nodes. What a program says is in its
folder's file `log`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from traincert.bridge.broker import server_command
from traincert.bridge.coordinator_folder import CoordinatorFolder, Settings
from traincert.bridge.cosigner import make_cosigner_key
from traincert.bridge.errors import BridgeError
from traincert.bridge.invitations import COSIGNER, MINER
from traincert.bridge.member import MemberFolder
from traincert.regtest import processes
from traincert.regtest.node import free_ports
from traincert.regtest.processes import spawn
from traincert.trainer.job import TrainingJob

COSIGNERS = 2
THRESHOLD = 2
STOP_SECONDS = 20.0
TRAINCERT = [sys.executable, "-m", "traincert.bridge.cli.main"]


class Deployment:
    """The programs of a network. Use it as a context manager: at the end all of them are stopped.

    `job` is a job's name or file. `cycles` is how many cycles the coordinator runs in all; it may be changed before
    `start()`.
    """

    def __init__(self, directory: Path, job: str, *, miners: int, cycles: int, round_seconds: int) -> None:
        """Make the folders. Those that an earlier deployment of this job has made stay as they are.

        Raises BridgeError, TrainerError or OSError if that cannot be done.
        """
        self.directory = directory
        self.cycles = cycles
        self.names = [f"miner{number}" for number in range(miners)]
        self.commands: dict[str, list[str]] = {}
        """The command of each program, by its name."""
        self._programs: dict[str, psutil.Popen] = {}
        cosigners = [f"cosigner{number}" for number in range(1, COSIGNERS + 1)]
        keys = [make_cosigner_key(directory / name) for name in cosigners]
        folder = directory / "coordinator"
        if (folder / "coordinator.json").exists():
            self.coordinator = CoordinatorFolder(folder)
        else:
            where = TrainingJob.located(job)
            settings = Settings(where, ["127.0.0.1"], free_ports(1)[0], round_seconds, keys, THRESHOLD)
            self.coordinator = CoordinatorFolder.create(folder, settings, TrainingJob.named(job))
        self.params = self.coordinator.params
        for name in cosigners:
            self._member(name, COSIGNER)
        self.secrets: dict[str, bytes] = {}
        """The miners' secret keys by name."""
        for name in self.names:
            self.secrets[name] = self._member(name, MINER).secret

    def _member(self, name: str, role: str) -> MemberFolder:
        folder = self.directory / name
        if (folder / f"{role}.json").exists():
            return MemberFolder(folder, role)
        return MemberFolder.create(folder, self.coordinator.invite(name, role), self.coordinator.job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self, datadirs: Sequence[Path], options: Sequence[str] = ()) -> None:
        """Start all programs, on the nodes that run on these data directories. `options` are for the miners."""

        def program(role: str, name: str, node: Path, *more: str) -> list[str]:
            return [*TRAINCERT, role, "run", str(self.directory / name), "--datadir", str(node), "--json", *more]

        wanted = ["--cycles", str(self.cycles), "--miners", str(len(self.names))]
        self.commands = {
            "broker": server_command(self.coordinator.folder),
            "coordinator": program("coordinator", "coordinator", datadirs[0], *wanted),
        }
        for number in range(1, COSIGNERS + 1):
            name = f"cosigner{number}"
            self.commands[name] = program("cosigner", name, datadirs[0])
        for number, name in enumerate(self.names):
            self.commands[name] = program("miner", name, datadirs[number % len(datadirs)], *options)
        for name in self.commands:
            self.start_program(name)

    def start_program(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a program, which ends when we end. `environment` has further variables for it."""
        folder = self.directory / name
        folder.mkdir(exist_ok=True)
        variables = [f"{key}={value}" for key, value in (environment or {}).items()]
        with (folder / "log").open("ab") as log:
            stdout = subprocess.PIPE if name == "coordinator" else log.fileno()
            command = ["env", *variables, *self.commands[name]] if variables else self.commands[name]
            self._programs[name] = spawn(command, keep=False, stdout=stdout, stderr=log)

    def kill(self, name: str) -> None:
        """Kill a program (SIGKILL)."""
        self._programs[name].kill()
        self._programs[name].wait()

    def program(self, name: str) -> psutil.Popen:
        """Return the process of a program that was started."""
        return self._programs[name]

    def events(self) -> Iterator[dict[str, Any]]:
        """Return what the coordinator says, until it has run all cycles.

        Raises BridgeError with its last words if it fails.
        """
        process = self._programs["coordinator"]
        with process.stdout as lines:
            for line in lines:
                yield json.loads(line)
        if process.wait():
            log = (self.directory / "coordinator" / "log").read_text().splitlines()
            said = log[-1].removeprefix("traincert: ") if log else f"it ended with code {process.returncode}"
            raise BridgeError(f"the coordinator: {said}")

    def terminate(self) -> None:
        """Tell all programs to end, and do not wait for it."""
        for program in reversed(self._programs.values()):  # miners first, the broker last
            with suppress(psutil.NoSuchProcess):
                program.terminate()

    def stop(self) -> None:
        """Stop all programs. One that does not end is killed."""
        self.terminate()
        programs, self._programs = self._programs, {}
        _, alive = psutil.wait_procs(list(programs.values()), STOP_SECONDS)
        for process in alive:
            processes.kill(process)
        for program in programs.values():
            if program.stdout:
                program.stdout.close()
