"""A network whose roles are processes of their own: they are killed at every moment, and it goes on.

Everything is real: broker, coordinator, cosigners, miners, nodes, training.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from coincurve import PrivateKey

from traincert.bridge.chain import read_chain, read_params
from traincert.bridge.consensus.beacon import Beacon
from traincert.bridge.deployment import Deployment
from traincert.bridge.keys import load_secret
from traincert.bridge.messages import assignment_seed, commits_root, score_seed
from traincert.bridge.rpc import NodeClient
from traincert.regtest import Network, wait_for
from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.executor import Executor
from traincert.trainer.engines.orders import Commit, OnCommit, Order
from traincert.trainer.errors import Reason
from traincert.trainer.examples import stored_dataset
from traincert.trainer.job import TrainingJob
from traincert.trainer.records import Record, RunFolder, standings
from traincert.trainer.spot_checks import Drawn, SpotCheck, SpotChecker

KILLS = int(os.environ.get("TRAINCERT_KILLS", "12"))
"""How many processes are killed at random; `make soak` kills more."""
STEPS = ["opened", "committed", "closed", "revealed", "judged", "recorded", "journaled", "signed", "awarded", "block"]
"""The coordinator's, in order."""
MINER_STEPS = ["trained", "task-saved", "committed"]
TIMEOUT = 180  # seconds for the chain to grow


class Trial:
    """A network of three miners with memories, on two nodes. Its coordinator never has enough cycles.

    Each task is done again in the next cycle: for that the miners send their memories.
    """

    def __init__(self, directory: Path, node_programs: Path) -> None:
        options = {"inputs": 64, "hidden": [8], "classes": 10}
        small = replace(
            TrainingJob.named("digits"),
            model_options=options,
            local_steps=9,
            density=0.5,
            segments=2,
            history=1000,
            keep_optimizer_state=True,
            spot_checks=1.0,
        )
        self.job_file = directory / "job.toml"
        self.job_file.write_text(small.to_toml())
        self.directory = directory
        self.deployment = Deployment(directory, str(self.job_file), miners=3, cycles=1000, round_seconds=20)
        self.params = self.deployment.params
        self.network = Network(node_programs / "bitcoind", directory, 2, self.params.node_options())

    def start(self) -> None:
        self.network.start()
        self.deployment.start([node.datadir for node in self.network.nodes])
        self._drain()

    def stop(self) -> None:
        self.deployment.stop()
        self.network.stop()

    def restart(self, name: str, failpoint: str = "") -> None:
        self.deployment.start_program(name, {"TRAINCERT_FAILPOINT": failpoint} if failpoint else None)
        if name == "coordinator":
            self._drain()

    def height(self) -> int:
        return int(self.network.nodes[0].rpc("getblockcount"))

    def wait_for_height(self, height: int) -> None:
        wait_for(lambda: self.height() >= height, TIMEOUT, f"block {height}", self.said)

    def wait_for_death(self, name: str) -> None:
        """Wait until a program has killed itself."""
        program = self.deployment.program(name)
        assert program.wait(TIMEOUT) == -signal.SIGKILL, self.said()

    def said(self) -> str:
        return "".join(f"{log}:\n{log.read_text()[-1500:]}\n" for log in sorted(self.directory.glob("*[a-z0-9]/log")))

    def _drain(self) -> None:
        """Read what the coordinator says: nobody else does."""
        stdout = self.deployment.program("coordinator").stdout
        log = self.directory / "coordinator" / "events"

        def copy() -> None:
            with log.open("ab") as file, stdout:
                for line in stdout:
                    file.write(line)
                    file.flush()

        Thread(target=copy, daemon=True).start()

    def check(self) -> None:
        """Check the chain, that every model follows from who was present, and that nothing was trained twice."""
        self.network.wait_until_same_tip()
        self.deployment.stop()
        with RunFolder(self.deployment.coordinator.folder / "run", TrainingJob.load(self.job_file)) as run:
            records = run.records
            for node in self.network.nodes:
                with NodeClient.from_datadir(node.datadir) as client:
                    assert read_params(client) == self.params
                    chain = read_chain(client, self.params)
                assert [block.certificate.record for block in chain] == run.hashes[1 : len(chain) + 1]
                assert len(chain) in (len(records) - 1, len(records) - 2)  # the last one may be without a block
            self._check_models(run)
        self._check_nothing_was_trained_again()

    def _check_models(self, run: RunFolder) -> None:
        """Run the same cycles in this process: the same miners, parents and losses of messages give the same models."""
        beacon = Beacon(load_secret(self.deployment.coordinator.folder / "keys" / "beacon.key"))
        store = self.directory / "again"
        store.mkdir(exist_ok=True)
        engine = Again(run.job, store)
        dataset = stored_dataset(run.job, run.folder / "data")
        with Trainer(dataset, engine) as trainer:
            trainer._checker = Waiting(dataset, store, trainer.segments)
            state = trainer.start()
            for number, record in enumerate(run.records[1:]):
                engine.record = record
                engine.not_sent = not_sent(run.records[number + 2]) if number + 2 < len(run.records) else set()
                parent = self.network.nodes[0].rpc("getblockhash", number)

                def seed(commits: Any, number: int = number) -> bytes:
                    root = commits_root({miner: commit.update_hash for miner, commit in commits.items()})
                    return score_seed(beacon.reveal(number), root)

                result = trainer.run_cycle(
                    state,
                    [bytes.fromhex(task["miner"]) for task in record["tasks"]],
                    seed=assignment_seed(run.job.seed, bytes.fromhex(parent)[::-1]),
                    score_seed=seed,
                )
                assert result.model_after.hex() == record["model_after"], number
                assert result.score_seed.hex() == record["score_seed"]
                again = [task.commit.update_hash.hex() if task.commit else None for task in result.tasks]
                assert again == [task["update_hash"] for task in record["tasks"]]
                assert result.after.standings == standings(record)
                checks = [(check["miner"], check["failure"]) for check in record["spot_checks"]]
                assert [(check.miner.hex(), check.failure) for check in result.spot_checks] == checks
                assert {miner for miner, failure in checks if failure} == not_sent(record)
                state = result.after

    def _check_nothing_was_trained_again(self) -> None:
        for name in self.deployment.names:
            committed = set()
            for line in (self.directory / name / "log").read_text().splitlines():
                if not line.startswith("{"):
                    continue
                event = json.loads(line)
                if event["event"] == "committed":
                    committed.add(event["cycle"])
                assert event["event"] != "trained" or event["cycle"] not in committed, event


class Again:
    """An engine that does the tasks of a record again: of those miners only that committed, with their memories."""

    def __init__(self, job: TrainingJob, store: Path) -> None:
        self.job, self.store = job, store
        self.record: Record = {}
        self.not_sent: set[str] = set()
        """Miners whose memories did not come when the record was made."""
        self._executor = Executor(job, store)
        self._updates: list[bytes | Reason] = []

    def collect(
        self, shards: Path, orders: Sequence[Order], on_commit: OnCommit | None = None
    ) -> list[Commit | Reason]:
        del on_commit
        commits: list[Commit | Reason] = []
        self._updates = []
        for order, task in zip(orders, self.record["tasks"], strict=True):
            reason = Reason(task["refusal"]) if task["refusal"] else None
            if reason in (Reason.LATE, Reason.ABSENT):
                commits.append(reason)
                self._updates.append(reason)
                continue
            memory = bytes.fromhex(task["memory"]) if task["memory"] else None
            answer = self._executor.execute(shards, order._replace(memory_hash=memory))
            commit = Commit.to(answer, hashlib.sha256(answer.update).digest())
            commits.append(commit._replace(place=task["place"], late=task["late"]))
            self._updates.append(Reason.WITHHELD if reason is Reason.WITHHELD else answer.update)
        return commits

    def reveal(self, orders: Sequence[Order], commits: Sequence[Commit | Reason]) -> list[bytes | Reason]:
        del orders, commits
        return self._updates

    def bring(self, wanted: Mapping[bytes, Sequence[bytes]]) -> None:
        """All memories are in the store. Take those out that were not there."""
        for miner, memories in wanted.items():
            if miner.hex() in self.not_sent:
                for digest in memories:
                    (self.store / digest.hex()).unlink(missing_ok=True)


class Waiting(SpotChecker):
    """Does tasks again before the next ones begin: both are done in this process."""

    def begin(self, drawn: Sequence[Drawn]) -> Future[list[SpotCheck]]:
        future = super().begin(drawn)
        wait([future])
        return future


def not_sent(record: Record) -> set[str]:
    """The miners that failed a spot check because a memory did not come: they were killed."""
    return {check["miner"] for check in record["spot_checks"] if check["failure"].endswith(" did not come")}


@pytest.fixture
def trial(tmp_path: Path, node_programs: Path) -> Iterator[Trial]:
    made = Trial(tmp_path, node_programs)
    try:
        yield made
    finally:
        made.stop()


def test_the_coordinator_goes_on_from_each_of_its_steps(trial: Trial) -> None:
    """It is killed at each step once; and a miner at each of its own."""
    trial.start()
    trial.wait_for_height(1)
    trial.deployment.kill("coordinator")
    trial.deployment.kill("miner1")
    miner_steps = iter([*MINER_STEPS, ""])
    trial.restart("miner1", next(miner_steps))
    for step in STEPS:
        trial.restart("coordinator", step)
        trial.wait_for_death("coordinator")
        if trial.deployment.program("miner1").poll() == -signal.SIGKILL:
            trial.restart("miner1", next(miner_steps))
    trial.restart("coordinator")
    for step in miner_steps:
        trial.wait_for_death("miner1")
        trial.restart("miner1", step)
    trial.wait_for_height(trial.height() + 2)
    trial.check()


def test_programs_may_start_before_the_broker(trial: Trial) -> None:
    trial.start()
    trial.wait_for_height(1)
    names = ["coordinator", "cosigner1", "miner0"]
    for name in ["broker", *names]:
        trial.deployment.kill(name)
    for name in names:
        trial.restart(name)
    logs = [trial.directory / name / "log" for name in names[1:]]
    waits = "Waiting for it."
    wait_for(lambda: all(waits in log.read_text() for log in logs), TIMEOUT, "programs that wait", trial.said)
    trial.restart("broker")
    trial.wait_for_height(trial.height() + 3)
    trial.check()


def test_the_chain_grows_while_processes_are_killed_at_random(trial: Trial) -> None:
    trial.start()
    draw = random.Random(KILLS)  # noqa: S311 - it has to be the same again, not secret
    names = ["coordinator", "broker", "cosigner1", *trial.deployment.names, "node0", "node1"]
    for _ in range(KILLS):
        time.sleep(draw.random() * 3)
        name = draw.choice(names)
        if name.startswith("node"):
            node = trial.network.nodes[int(name[4:])]
            node.kill()
            node.start()
            trial.network.connect()
        else:
            trial.deployment.kill(name)
            trial.restart(name)
    height = trial.height()
    trial.wait_for_height(height + 3)
    trial.check()


CHEAT = """
import hashlib
from traincert.bridge.cli.main import main
from traincert.trainer.engines.local import LocalEngine

honest = LocalEngine.collect

def collect(self, shards, orders, on_commit=None):
    from traincert.trainer.models import build_model
    from traincert.trainer.segments import cut_segments
    from traincert.trainer.state import load_state
    from traincert.trainer.store import read_blob, write_blob
    from traincert.trainer.updates import encode_update, read_update

    (commit,), (order,) = honest(self, shards, orders, on_commit), orders
    segment = cut_segments(build_model(self.job), self.job)[order.task.segment]
    state = load_state(self.store, order.model_hash)
    update = read_update(read_blob(self.store, commit.update_hash), self.job, segment, state)
    data, _ = encode_update(update.scaled(2.0), self.job.density)
    return [commit._replace(update_hash=write_blob(self.store, data), update_size=len(data))]

if __name__ == "__main__":
    LocalEngine.collect = collect
    main()
"""


def test_who_sends_another_update_than_its_tasks_is_found_and_barred_and_the_chain_goes_on(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It doubles its updates. The others' tasks are done again with their memories, and are right."""
    script = trial.directory / "cheat.py"
    script.write_text(CHEAT)
    start = trial.deployment.start_program

    def start_program(name: str, environment: Mapping[str, str] | None = None) -> None:
        if name == "miner0":
            command = trial.deployment.commands[name]
            trial.deployment.commands[name] = [sys.executable, str(script), *command[command.index("miner") :]]
        start(name, environment)

    monkeypatch.setattr(trial.deployment, "start_program", start_program)
    trial.start()
    trial.wait_for_height(4)
    trial.deployment.stop()
    keys = {name: PrivateKey(secret).public_key_xonly.format() for name, secret in trial.deployment.secrets.items()}
    honest = sorted(key.hex() for name, key in keys.items() if name != "miner0")
    cheat = keys["miner0"].hex()
    with RunFolder(trial.deployment.coordinator.folder / "run", TrainingJob.load(trial.job_file)) as run:
        first, second, *others = run.records[1:]
        outcomes = [{task["miner"]: task["refusal"] for task in each["tasks"]} for each in (first, second)]
        assert outcomes == [dict.fromkeys(keys_of(first)), {**dict.fromkeys(honest), cheat: Reason.SPOT_CHECK_FAILED}]
        assert {check["miner"]: bool(check["failure"]) for check in second["spot_checks"]} == {
            miner: miner == cheat for miner in keys_of(first)
        }
        assert standings(second)[keys["miner0"]].barred_until == 2 + run.job.penalty_cycles
        assert cheat not in second["memories"]
        for record in others:
            assert keys_of(record) == honest  # who is barred has no task
            assert [check["miner"] for check in record["spot_checks"]] == honest
            assert [check["failure"] for check in record["spot_checks"]] == ["", ""]
            assert all(standings(record)[bytes.fromhex(miner)].proven for miner in honest)
        began = [task["memory"] for record in others for task in record["tasks"] if task["drawn"]]
        assert began
        assert all((run.store / memory).exists() for memory in began)  # their miners sent them
        assert others[0]["model_after"] != second["model_after"]


def keys_of(record: Record) -> list[str]:
    """The miners that had a task."""
    return [task["miner"] for task in record["tasks"]]
