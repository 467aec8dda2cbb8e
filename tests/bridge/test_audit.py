"""A member repeats a closed cycle, and signs what it found. One of the miners did not do its first task.

Everything is real: broker, coordinator, cosigners, miners, node, training.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result
from coincurve import PrivateKey

from traincert.bridge.audit import Auditor, lines, run_audit, verify
from traincert.bridge.cli.main import cli
from traincert.bridge.deployment import Deployment
from traincert.bridge.errors import BridgeError
from traincert.bridge.keys import xonly_key
from traincert.bridge.member import MemberFolder
from traincert.bridge.messages import AuditedTask, Finding, MessageError, Verdict, seal, unseal
from traincert.bridge.remote_miners import RemoteMiners
from traincert.bridge.rpc import NodeClient
from traincert.regtest import Network, wait_for
from traincert.trainer.engines.broker import RefusedError
from traincert.trainer.engines.executor import Executor
from traincert.trainer.engines.orders import Order
from traincert.trainer.errors import Reason
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.records import Record, recorded_order
from traincert.trainer.segments import cut_segments
from traincert.trainer.spot_checks import Drawn, TaskChecker
from traincert.trainer.store import write_blob

CYCLES = 2
CHEAT = """
from dataclasses import replace
from traincert.bridge import miner
from traincert.bridge.cli.main import main
from traincert.trainer.engines.local import LocalEngine

class Cheat(LocalEngine):
    def collect(self, shards, orders, on_commit=None):
        if orders[0].task.cycle == 0:
            orders = [order._replace(task=replace(order.task, seed=bytes(32))) for order in orders]
        return super().collect(shards, orders, on_commit)

if __name__ == "__main__":
    miner.LocalEngine = Cheat
    main()
"""


class WithCheat(Deployment):
    """A network whose first miner trains its first task with another seed."""

    def start_program(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        if name == "miner0":
            (self.directory / "cheat.py").write_text(CHEAT)
            self.commands[name][:3] = [sys.executable, str(self.directory / "cheat.py")]
        super().start_program(name, environment)


class Lines:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, event: str, text: str, **facts: Any) -> None:
        del event, facts
        self.said.append(text)


class Closed:
    """A network after some cycles: its miners have ended, all others run."""

    def __init__(self, deployment: Deployment, job: TrainingJob, datadir: Path) -> None:
        self.deployment, self.job, self.datadir = deployment, job, datadir
        self.run = deployment.coordinator.folder / "run"
        self.cheat = xonly_key(deployment.secrets["miner0"])

    @property
    def records(self) -> list[Record]:
        return [json.loads(path.read_text()) for path in sorted((self.run / "cycles").iterdir())]

    def folder(self, name: str) -> Path:
        return self.deployment.directory / name

    def audit(self, name: str, height: int | None) -> tuple[Verdict, list[str]]:
        view = Lines()
        verdict = run_audit(self.folder(name), self.datadir, height, view)
        assert view.said[:-1] == list(lines(verdict))
        return verdict, view.said


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, node_programs: Path) -> Iterator[Closed]:
    directory = tmp_path_factory.mktemp("audit")
    job = replace(
        TrainingJob.named("digits"),
        model_options={"inputs": 64, "hidden": [8], "classes": 10},
        local_steps=9,
        density=0.5,  # so miners have memories
        spot_checks=0.4,  # one of two tasks
        shards=8,  # more than a miner is given
        outer_momentum=0.3,
    )
    (directory / "job.toml").write_text(job.to_toml())
    deployment = WithCheat(directory, str(directory / "job.toml"), miners=2, cycles=1000, round_seconds=60)
    nodes = Network(node_programs / "bitcoind", directory, 1, deployment.params.node_options())
    with nodes, deployment:
        (node,) = nodes.nodes
        deployment.start([node.datadir])
        wait_for(lambda: node.rpc("getblockcount") >= CYCLES, 60, f"block {CYCLES}")
        for name in deployment.names:
            deployment.kill(name)
        yield Closed(deployment, job, node.datadir)


@pytest.fixture
def node(network: Closed) -> Iterator[NodeClient]:
    with NodeClient.from_datadir(network.datadir) as client:
        yield client


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["audit", *map(str, arguments)])


def test_an_update_that_no_honest_training_gives_is_found(network: Closed) -> None:
    """In the first cycle no miner has a memory: a cosigner can repeat all of it."""
    folder = network.folder("cosigner1")
    done = run(folder, "--height", "1", "--datadir", network.datadir)
    assert done.exit_code == 1, done.output
    record, *tasks, model, signed = done.stdout.splitlines()
    assert record == "✓ the record: block 1 names it, and all of it follows"
    assert model == "✓ the next model and its velocity: the accepted updates give them"
    assert [line[:2] for line in tasks].count("✓ ") == 1
    (wrong,) = [line for line in tasks if line.startswith("✗ ")]
    (task,) = [task for task in network.records[1]["tasks"] if task["miner"] == network.cheat.hex()]
    assert wrong.startswith(f"✗ miner {network.cheat.hex()[:16]}, segment {task['segment']}, shard ")
    assert wrong.endswith(f"committed was {task['update_hash']}")
    file = (
        folder / "verdicts" / f"1-{hashlib.sha256((network.run / 'cycles/00000001.json').read_bytes()).hexdigest()[:8]}"
    )
    assert signed == f"signed: {file}"

    verified = run("--verify", file, "--datadir", network.datadir)
    assert verified.exit_code == 1, verified.output
    key = xonly_key(MemberFolder.of_any_role(folder).secret).hex()
    assert verified.stdout.splitlines() == [
        f"the key {key} signed what it found in block 1, the whole cycle:",
        *(record, *tasks, model),
    ]
    as_json = run("--verify", file, "--datadir", network.datadir, "--json")
    assert json.loads(as_json.stdout)["key"] == key
    assert not list(folder.glob(".audit-*"))


def test_of_a_later_cycle_the_tasks_are_repeated_whose_memory_is_known(network: Closed) -> None:
    verdict, _ = network.audit("cosigner2", 2)
    assert verdict.right
    assert not verdict.drawn
    tasks = network.records[2]["tasks"]
    assert [task.miner.hex() for task in verdict.tasks] == [task["miner"] for task in tasks]
    assert [task.repeated for task in verdict.tasks] == [task["drawn"] or not task["memory"] for task in tasks]
    assert {task.problem for task in verdict.tasks if not task.repeated} <= {
        "only its miner has its memory, because the task was not drawn"
    }
    assert {True, False} == {task.repeated for task in verdict.tasks}


def test_a_miner_repeats_only_what_it_was_given_the_shard_of(network: Closed) -> None:
    verdict, _ = network.audit("miner1", 1)
    mine = {path.name for path in (network.folder("miner1") / "data").iterdir()}
    tasks = network.records[1]["tasks"]
    assert [task.repeated for task in verdict.tasks] == [task["shard"] in mine for task in tasks]
    assert {task.problem for task in verdict.tasks if not task.repeated} <= {
        "the coordinator does not give this member its shard"
    }


def test_a_block_draws_one_task_that_can_be_repeated(network: Closed, node: NodeClient) -> None:
    verdict, said = network.audit("cosigner1", None)
    *skipped, drawn = verdict.tasks
    assert (verdict.drawn, verdict.model) == (True, None)
    assert drawn.repeated
    assert not any(task.repeated for task in skipped)
    assert network.audit("cosigner1", None)[0] == verdict  # who tries again draws the same
    statement = Path(said[-1].removeprefix("signed: ")).read_bytes()
    key, read = verify(statement, node)
    assert read == verdict
    assert key == xonly_key(MemberFolder.of_any_role(network.folder("cosigner1")).secret)


def test_a_verdict_that_was_altered_or_is_of_another_chain_is_refused(network: Closed, node: NodeClient) -> None:
    verdict, said = network.audit("miner1", 1)
    statement = Path(said[-1].removeprefix("signed: ")).read_bytes()
    chain_id, key = network.deployment.params.chain_id, PrivateKey(network.deployment.secrets["miner1"])
    assert unseal(chain_id, Verdict, statement) == verify(statement, node)
    for place in (0, 50, 97, len(statement) - 2):
        altered = statement[:place] + bytes([statement[place] ^ 1]) + statement[place + 1 :]
        with pytest.raises(MessageError, match="verdict: the signature does not verify"):
            verify(altered, node)
    with pytest.raises(MessageError, match="or of another network"):
        verify(seal(key, bytes(32), verdict), node)
    with pytest.raises(BridgeError, match=f"^the verdict is of the record {'0' * 64}, but block 1 names "):
        verify(seal(key, chain_id, replace(verdict, record=bytes(32))), node)
    with pytest.raises(BridgeError, match=r"^node0 has no block 99 with a certificate; it has 1 to \d$"):
        verify(seal(key, chain_id, replace(verdict, height=99)), node)
    with pytest.raises(MessageError, match=r"^verdict: 4 bytes are too few for a statement$"):
        verify(b"none", node)


def test_what_cannot_be_audited_is_told_in_one_line(network: Closed, tmp_path: Path) -> None:
    def problem(folder: Path, height: int | None, datadir: Path) -> str:
        with pytest.raises(BridgeError) as caught:
            run_audit(folder, datadir, height, Lines())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    folder = network.folder("miner1")
    assert problem(tmp_path, 1, network.datadir) == f"{tmp_path} is neither a miner's folder nor a cosigner's"
    assert (
        problem(folder, 1, tmp_path)
        == f"{tmp_path} is no node's data directory: No such file or directory: bitcoin.conf"
    )
    assert problem(folder, 99, network.datadir).startswith("node0 has no block 99 with a certificate; it has 1 to ")
    assert problem(folder, 0, network.datadir).startswith("node0 has no block 0 with a certificate; it has 1 to ")
    for arguments in ([], ["--draw"], [str(folder)], [str(folder), "--draw", "--height", "1"], ["--verify", "a", "b"]):
        answer = run(*arguments, "--datadir", tmp_path)
        assert answer.exit_code == 2
        assert "give FOLDER with --height N or --draw, or else --verify FILE" in answer.output


def test_a_record_that_does_not_follow_is_found(network: Closed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain names the record, but its commits draw other examples than it says: by our own rule, that is."""
    monkeypatch.setattr("traincert.bridge.checker.commits_root", lambda _updates: bytes(32))
    verdict, said = network.audit("miner1", 1)
    assert not verdict.right
    assert (verdict.tasks, verdict.model) == ([], None)
    assert said[0].startswith("✗ the record: wrong-score-seed: score_seed: expected ")


def test_a_member_reads_what_closed_cycles_reveal_and_nothing_of_the_open_one(network: Closed, tmp_path: Path) -> None:
    records = network.records
    last = records.pop()  # its cycle is open, as it were
    manifest = json.loads((network.run / "data" / records[0]["dataset_root"]).read_text())
    shards = list(map(bytes.fromhex, manifest["shards"]))
    data = SimpleNamespace(root=b"", directory=tmp_path, shards=shards, shard_folder=tmp_path / "shards")
    trainer = SimpleNamespace(dataset=data, job=network.job)
    coordinator = network.deployment.coordinator
    remote = RemoteMiners(
        coordinator.members, PrivateKey(bytes(31) + b"1"), coordinator.params, wanted=1, waiting=lambda *_: None
    )
    run = SimpleNamespace(records=records, store=network.run / "store", record_path=lambda cycle: tmp_path / f"{cycle}")
    remote.attach(cast(Any, SimpleNamespace(handlers={})), cast(Any, trainer), cast(Any, run))

    def may(member: str, digest: str) -> bool:
        path = remote.shared(member, bytes.fromhex(digest))
        assert path is None or path.name == digest
        return path is not None

    def revealed(tasks: Sequence[Record], what: str) -> set[str]:
        return {task[what] for task in tasks if task[what]}

    closed = [task for record in records for task in record["tasks"]]
    known = revealed([task for task in closed if task["drawn"]], "memory")
    known |= revealed([task for task in closed if task["drawn"]], "memory_after")
    hidden = (revealed(closed, "memory") | revealed(closed, "memory_after")) - known
    assert hidden
    opened = revealed(last["tasks"], "update_hash") | {last["model_after"], last["velocity"]}
    opened -= {record[what] for record in records for what in ("model_after", "velocity")}  # a model may stay
    assert opened
    for member in ("miner1", "cosigner1"):
        for record in records:
            assert may(member, record["model_after"])
            assert may(member, record["velocity"])
        assert all(may(member, digest) for digest in revealed(closed, "update_hash") | known)
        assert not any(may(member, digest) for digest in hidden | opened)
        assert not any(may(member, manifest[what]) for what in ("validation", "test"))
        assert {may(member, shard.hex()) for shard in shards} == {member == "cosigner1"}
    records.append(last)
    assert all(may("miner1", digest) for digest in opened)


def test_a_miner_gets_nothing_from_the_coordinator_that_is_not_for_it(network: Closed, tmp_path: Path) -> None:
    """Over the broker: what the coordinator has, but this miner must not read."""
    shards = {path.name for path in (network.run / "data" / "shards").iterdir()}
    held_out = {path.name for path in (network.run / "data" / "held-out").iterdir()}
    update = network.records[1]["tasks"][0]["update_hash"]
    got = set()
    with MemberFolder.of_any_role(network.folder("miner1")).connection(Lines()) as connection:
        connection.fetch(bytes.fromhex(update), tmp_path)
        for name in shards | held_out:
            with suppress(RefusedError):
                connection.fetch(bytes.fromhex(name), tmp_path)
                got.add(name)
    assert not got & held_out
    assert len(got) <= 1  # the shard of its task in the open cycle


def test_a_file_that_a_miner_made_up_fails_the_task_and_ends_no_program(network: Closed, tmp_path: Path) -> None:
    """A miner can commit to any bytes as its memory or its update, and send them."""
    record, shards = network.records[1], network.run / "data" / "shards"
    task = record["tasks"][0]
    write_blob(tmp_path, (network.run / "store" / record["model_before"]).read_bytes())
    order, made_up = recorded_order(record, task, -1), write_blob(tmp_path, b"any bytes")
    segments = cut_segments(build_model(network.job), network.job)
    checker = TaskChecker(network.job, shards, tmp_path, segments)

    def failure(order: Order, update: bytes, memory_after: bytes | None, numeric_class: str = "another") -> str:
        return checker.check(Drawn(order, update, memory_after, numeric_class)).failure

    answer = Executor(network.job, tmp_path).execute(shards, order)
    update = write_blob(tmp_path, answer.update)
    assert failure(order, update, answer.memory_after, answer.numeric_class) == ""
    assert failure(order, update, answer.memory_after) == ""
    assert failure(order, made_up, answer.memory_after).startswith("the update is inf away from ours")
    assert failure(order, update, made_up).startswith("the update is inf away from ours")
    with_memory = order._replace(memory_hash=made_up)
    assert failure(with_memory, update, answer.memory_after).startswith(
        "the task cannot be done with what its miner sent: "
    )


def test_an_audit_that_can_repeat_nothing_gives_no_verdict(network: Closed, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_away(_auditor: Auditor, _drawn: Drawn, *, revealed: bool) -> str:
        del revealed
        return "it is away"

    monkeypatch.setattr(Auditor, "_lacks", all_away)
    view = Lines()
    with pytest.raises(BridgeError, match=r"^nothing of block \d can be repeated by this member$"):
        run_audit(network.folder("miner1"), network.datadir, None, view)
    assert len(view.said) > 1
    assert all(line.endswith(": not repeated: it is away") for line in view.said[1:])


def test_a_verdict_is_shown_in_a_line_for_each_finding() -> None:
    near = AuditedTask(True, "", bytes(32), 1, 2, None, 0.00123)
    refused = AuditedTask(True, "it is wrong\n✓ no, it is right\x1b[2J", bytes(32), 1, 3, Reason.COPY, None)
    verdict = Verdict(1, bytes(32), "another class", False, Finding(True, ""), [near, refused], Finding(False, "why"))
    assert list(lines(verdict)) == [
        "✓ the record: block 1 names it, and all of it follows",
        f"✓ miner {'0' * 16}, segment 1, shard 2: the update is 0.00123 away from the auditor's, which is near enough",
        f"✗ miner {'0' * 16}, segment 1, shard 3, refused as copy: it is wrong ✓ no, it is right [2J",
        "- the next model and its velocity: not repeated: why",
    ]
