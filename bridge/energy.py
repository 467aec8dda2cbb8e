"""What the blocks of a run cost, and what one block costs that is mined by searching nonces, on this machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bitcoin.core import CoreMainParams

from traincert.bridge.errors import BridgeError
from traincert.bridge.recorded import CycleRecord, read_record
from traincert.regtest.build import node_folder
from traincert.regtest.node import free_ports
from traincert.regtest.processes import kill, spawn
from traincert.trainer.energy import Spending
from traincert.trainer.resources import Meter, Resources

NODE_HASHES = 1 << 23
"""How many hashes bitcoind is asked for. That takes seconds."""
PYTHON_HASHES = 1 << 20
START_SECONDS = 60
"""How long bitcoind may take to start."""


@dataclass(frozen=True)
class BlockCost:
    """What one cycle cost, and so its block. On several cycles: all of them together."""

    tasks: int
    """How many were committed to."""
    measured: int
    """Of how many the CPU seconds are known."""
    training_seconds: float
    """CPU seconds of these tasks, as their miners say."""
    coordinator_seconds: float
    """CPU seconds of the coordinator's process: scoring, spot checks, aggregation."""
    joules: Mapping[str, float]
    """What the coordinator's machine used meanwhile, by meter. Empty: it has no meter."""
    loss_reduction: int
    """What the cycle took off the validation loss, nano-nats. Negative if the loss rose."""

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of tasks and coordinator."""
        return self.training_seconds + self.coordinator_seconds

    @property
    def all_joules(self) -> float | None:
        """Joules of all meters; None if there is none."""
        return sum(self.joules.values()) if self.joules else None

    def per_nano_nat(self, amount: float | None) -> float | None:
        """Divide an amount by the nano-nats that it took off the loss; None if it took off none."""
        return None if amount is None or self.loss_reduction <= 0 else amount / self.loss_reduction

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return {
            **asdict(self),
            "cpu_seconds": self.cpu_seconds,
            "cpu_seconds_per_nano_nat": self.per_nano_nat(self.cpu_seconds),
            "joules_per_nano_nat": self.per_nano_nat(self.all_joules),
        }


def total(costs: Sequence[BlockCost]) -> BlockCost:
    """Return what several cycles cost together. A meter counts only if it counted in all of them."""
    meters = set.intersection(*(set(each.joules) for each in costs))
    return BlockCost(
        tasks=sum(each.tasks for each in costs),
        measured=sum(each.measured for each in costs),
        training_seconds=sum(each.training_seconds for each in costs),
        coordinator_seconds=sum(each.coordinator_seconds for each in costs),
        joules={meter: sum(each.joules[meter] for each in costs) for meter in sorted(meters)},
        loss_reduction=sum(each.loss_reduction for each in costs),
    )


def find_run(folder: Path) -> Path:
    """Return the run folder in a folder: itself, a coordinator's, or a demo's. Raises BridgeError if there is none."""
    for run in (folder, folder / "run", folder / "coordinator" / "run"):
        if (run / "job.toml").is_file() and (run / "cycles").is_dir():
            return run
    raise BridgeError(f"{folder} is no run folder, and has none: give that of `traincert job run`, or a demo's folder")


def read_costs(run: Path) -> dict[int, BlockCost]:
    """Return what the cycles of a run folder cost, by cycle. The run may go on meanwhile.

    A cycle whose process was killed just after it may be missing. Raises BridgeError if no cycle has ended, or if a
    file cannot be read.
    """
    costs = {}
    for path in sorted((run / "costs").glob("*.json")):
        try:
            cost = json.loads(path.read_bytes())
            _, record = read_record((run / "cycles" / path.name).read_bytes(), CycleRecord)
            used = [Resources(**each) for each in cost["tasks"].values() if each]
            costs[record.cycle] = BlockCost(
                tasks=len(cost["tasks"]),
                measured=len(used),
                training_seconds=sum(each.cpu_seconds for each in used),
                coordinator_seconds=cost["cpu_seconds"],
                joules=cost["joules"],
                loss_reduction=record.loss_before - record.loss_after,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, BridgeError) as error:
            raise BridgeError(f"{path} or its record cannot be read: {error!r}") from None
    if not costs:
        raise BridgeError(f"{run} does not say what a cycle cost: no cycle has ended yet, or an older traincert ran it")
    return costs


@dataclass(frozen=True)
class HashRate:
    """Hash mining that was done: double SHA-256 of a block's header, for one nonce after the other."""

    by: str
    """The program that did it."""
    hashes: int
    cpu_seconds: float
    joules: Mapping[str, float] = field(default_factory=dict)
    """What the machine used meanwhile, by meter."""

    def expected(self, difficulty: float) -> HashRate:
        """Return what one block takes at a difficulty, on average: computed, not mined.

        The difficulty is as getblockchaininfo has it: 2^32 hashes are expected at difficulty 1.
        """
        times = difficulty * 2**32 / self.hashes
        joules = {meter: joules * times for meter, joules in self.joules.items()}
        return HashRate(self.by, round(difficulty * 2**32), self.cpu_seconds * times, joules)


def mine_hashes() -> HashRate:
    """Mine for some seconds, with the fastest program that is here: bitcoind if it is built, or else Python.

    Raises BridgeError if bitcoind does not run.
    """
    programs = node_folder() / "bin"
    return _mine_with_node(programs) if programs.is_dir() else _mine_with_python()


def _mine_with_node(programs: Path) -> HashRate:
    """Let bitcoind mine on a testnet4 of its own, without any peer. Unlike regtest, it begins at difficulty 1."""
    with TemporaryDirectory(prefix="traincert-") as folder:
        options = [f"-datadir={folder}", "-testnet4", f"-rpcport={free_ports(1)[0]}"]
        alone = ["-connect=0", "-listen=0", "-disablewallet", "-printtoconsole=0"]
        node = spawn([str(programs / "bitcoind"), *options, *alone], keep=False)
        cli = [
            str(programs / "bitcoin-cli"),
            *options,
            "-rpcwait",
            f"-rpcwaittimeout={START_SECONDS}",
            "-rpcclienttimeout=0",
        ]
        try:
            subprocess.run([*cli, "getblockcount"], check=True, capture_output=True, text=True)
            meter = Meter(node.pid)
            while True:
                meter.begin()
                with Spending() as spending:
                    mine = [*cli, "generatetodescriptor", "1", "raw(51)", str(NODE_HASHES)]
                    found = subprocess.run(mine, check=True, capture_output=True, text=True).stdout
                used = meter.end(None)
                if used is None:
                    raise BridgeError("this system does not tell the CPU time of bitcoind")
                if not json.loads(found):  # at a block it would have stopped: once in 500 times
                    return HashRate("bitcoind", NODE_HASHES, used.cpu_seconds, spending.joules)
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip().splitlines() or ["it said nothing"]
            raise BridgeError(f"{programs / 'bitcoind'} does not mine: {said[0]}") from None
        finally:
            kill(node)


def _mine_with_python() -> HashRate:
    with Spending() as spending:
        search(CoreMainParams.GENESIS_BLOCK.serialize()[:80], range(PYTHON_HASHES))
    return HashRate("Python's hashlib", PYTHON_HASHES, spending.cpu_seconds, spending.joules)


def search(header: bytes, nonces: range) -> list[int]:
    """Return the nonces with which a block's header of 80 bytes meets difficulty 1."""
    begun, rest = sha256(header[:64]), header[64:76]  # the nonce is in the second block of SHA-256
    found = []
    for nonce in nonces:
        hashed = begun.copy()
        hashed.update(rest + nonce.to_bytes(4, "little"))
        if sha256(hashed.digest()).digest().endswith(b"\0\0\0\0"):
            found.append(nonce)
    return found
