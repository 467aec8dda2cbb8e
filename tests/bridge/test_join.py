"""Joining a network, and what people do wrong: each gets one line that says what, where and what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from traincert.bridge.deployment import Deployment
from traincert.bridge.errors import BridgeError
from traincert.bridge.invitations import MINER, Invitation
from traincert.bridge.member import Member, MemberFolder
from traincert.regtest import Network, wait_for
from traincert.trainer.engines.broker import Connection, poll_answer
from traincert.trainer.job import TrainingJob

TRAINCERT = str(Path(sys.executable).parent / "traincert")


def run(*arguments: str | Path, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [TRAINCERT, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, input=given, timeout=40)


def problem(answer: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line that a command ends with."""
    assert answer.returncode == code, answer.stdout + answer.stderr
    (line,) = [line for line in answer.stderr.splitlines() if line.startswith("traincert: ")]
    assert "Traceback" not in answer.stderr
    return line.removeprefix("traincert: ")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, node_programs: Path) -> Iterator[Deployment]:
    """A broker and a coordinator that waits for its miner, which never comes."""
    directory = tmp_path_factory.mktemp("join")
    with Deployment(directory, "digits", miners=1, cycles=1, round_seconds=60) as deployment:
        nodes = Network(node_programs / "bitcoind", directory, 1, deployment.params.node_options())
        with nodes:
            deployment.start([nodes.nodes[0].datadir])
            deployment.kill("miner0")
            yield deployment


def invite(network: Deployment, name: str) -> str:
    answer = run("coordinator", "invite", network.coordinator.folder, name)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_a_miner_joins_and_is_listed_and_may_join_again(network: Deployment, tmp_path: Path) -> None:
    invitation = invite(network, "ann")
    for _ in range(2):
        answer = run("miner", "join", tmp_path / "ann", "--job", "digits", given=invitation)
        assert answer.returncode == 0, answer.stderr
    key = MemberFolder(tmp_path / "ann", MINER)
    listed = run("coordinator", "miners", network.coordinator.folder).stdout
    (line,) = [line for line in listed.splitlines() if line.startswith("ann ")]
    assert line.split()[2] in answer.stdout
    shown = json.loads(run("coordinator", "miners", network.coordinator.folder, "--json").stdout)
    assert line.split() in [[each["name"], each["role"], each["key"]] for each in shown]
    assert (tmp_path / "ann" / "miner.key").stat().st_mode & 0o777 == 0o600
    assert "trainingkeys=" in (tmp_path / "ann" / "training.conf").read_text()
    assert key.name == "ann"


def test_status_says_what_a_program_does_and_exits_with_3_if_it_does_not_run(
    network: Deployment, tmp_path: Path
) -> None:
    folder = network.coordinator.folder
    wait_for(lambda: run("coordinator", "status", folder).returncode == 0, 60, "the coordinator to run")

    def status() -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(run("coordinator", "status", folder, "--json").stdout)
        return facts

    wait_for(lambda: status().get("present") == ["cosigner1", "cosigner2"], 60, "the cosigners to be present", status)
    assert status()["runs"]
    assert status()["closed"] == 0
    assert run("coordinator", "status", folder).stdout.startswith("0 cycles are closed; waiting for miners for cycle 1")

    miner = tmp_path / "idle"
    assert run("miner", "join", miner, "--job", "digits", given=invite(network, "idle")).returncode == 0
    answer = run("miner", "status", miner)
    assert (answer.returncode, answer.stderr) == (3, "")
    assert answer.stdout.startswith("idle does not run: nothing yet\nearned: cycles 0, accepted 0, ")
    facts = json.loads(run("miner", "status", miner, "--json").stdout)
    assert (facts["name"], facts["runs"], facts["last"]) == ("idle", False, {})
    assert "is no miner's folder" in problem(run("miner", "status", tmp_path))
    assert "is no coordinator's folder" in problem(run("coordinator", "status", tmp_path))


def test_an_invitation_is_good_for_one_miner(network: Deployment, tmp_path: Path) -> None:
    invitation = invite(network, "bob")
    assert run("miner", "join", tmp_path / "bob", "--job", "digits", given=invitation).returncode == 0
    answer = run("miner", "join", tmp_path / "another", "--job", "digits", given=invitation)
    assert problem(answer).startswith("this invitation was used already: bob has joined with the key ")
    assert "bob has joined already" in problem(run("coordinator", "invite", network.coordinator.folder, "bob"))


def test_a_leaked_invitation_is_replaced_before_it_is_used(network: Deployment, tmp_path: Path) -> None:
    leaked, good = invite(network, "eve"), invite(network, "eve")
    answer = run("miner", "join", tmp_path / "thief", "--job", "digits", given=leaked)
    assert "refuses the credential" in problem(answer)
    assert run("miner", "join", tmp_path / "eve", "--job", "digits", given=good).returncode == 0


def test_two_miners_cannot_have_one_key(network: Deployment, tmp_path: Path) -> None:
    assert run("miner", "join", tmp_path / "one", "--job", "digits", given=invite(network, "one")).returncode == 0
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one" / "miner.key", tmp_path / "two" / "miner.key")
    answer = run("miner", "join", tmp_path / "two", "--job", "digits", given=invite(network, "two"))
    assert "is that of one: each member needs a key of its own" in problem(answer)


@pytest.mark.parametrize("changed", ["", "no invitation", "traincert-invitation-1:AAAA"])
def test_what_is_no_invitation_is_told(changed: str, tmp_path: Path) -> None:
    answer = run("miner", "join", tmp_path / "miner", "--job", "digits", given=changed)
    assert problem(answer).startswith("this is no invitation of this version of traincert, or a part of it is missing")
    assert not (tmp_path / "miner").exists()


def test_half_an_invitation_and_one_for_another_role_are_told(network: Deployment, tmp_path: Path) -> None:
    whole = invite(network, "half")
    assert "a part of it is missing" in problem(run("miner", "join", tmp_path, "--job", "digits", given=whole[:-20]))
    answer = run("cosigner", "join", tmp_path, "--job", "digits", given=whole)
    assert problem(answer) == "this invitation is for a miner, not for a cosigner"


def test_another_job_is_told_by_what_differs(network: Deployment, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text(replace(TrainingJob.named("digits"), local_steps=7, cycles=3).to_toml())
    answer = run("miner", "join", tmp_path / "m", "--job", tmp_path / "other.toml", given=invite(network, "other"))
    assert "the coordinator trains another job than" in problem(answer)
    assert "cycles was 12, is 3, local_steps was " in problem(answer)
    answer = run("miner", "join", tmp_path / "m", "--job", "digits/no", given=invite(network, "other"))
    assert "no job 'digits/no'" in problem(answer)


def test_a_node_of_another_network_is_told(network: Deployment, tmp_path: Path, node_programs: Path) -> None:
    assert run("miner", "join", tmp_path / "lost", "--job", "digits", given=invite(network, "lost")).returncode == 0
    other = replace(network.params, round_seconds=61)
    (tmp_path / "nodes").mkdir()
    with Network(node_programs / "bitcoind", tmp_path / "nodes", 1, other.node_options()) as nodes:
        answer = run("miner", "run", tmp_path / "lost", "--datadir", nodes.nodes[0].datadir)
    assert f"node0 is on network {other.chain_id.hex()}, not on {network.params.chain_id.hex()}" in problem(answer)


def test_a_removed_miner_ends_with_a_line(network: Deployment, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    assert run("miner", "join", folder, "--job", "digits", given=invite(network, "gone")).returncode == 0
    command = [TRAINCERT, "miner", "run", str(folder), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as miner:
        assert miner.stdout is not None
        assert miner.stderr is not None
        assert any(json.loads(line)["event"] == "joined" for line in miner.stdout)
        again = run("miner", "run", folder)
        assert run("coordinator", "remove", network.coordinator.folder, "gone").returncode == 0
        said = miner.stderr.read()
    assert problem(again) == f"{folder} is in use by another process"
    assert miner.returncode == 1, said
    assert said == "traincert: the broker does not let us in any more: the coordinator has removed us\n"
    unknown = problem(run("coordinator", "remove", network.coordinator.folder, "gone"))
    assert unknown.startswith("there is no member gone; there are: ")


def test_a_copy_of_a_miner_takes_over_from_it(network: Deployment, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    assert run("miner", "join", folder, "--job", "digits", given=invite(network, "twin")).returncode == 0
    shutil.copytree(folder, tmp_path / "second")
    first = subprocess.Popen([TRAINCERT, "miner", "run", str(folder), "--json"], stdout=-1, stderr=-1, text=True)
    second = None
    try:
        assert first.stdout is not None
        assert any(json.loads(line)["event"] == "joined" for line in first.stdout)
        second = subprocess.Popen(
            [TRAINCERT, "miner", "run", str(tmp_path / "second")], stdout=-1, stderr=-1, text=True
        )
        _, said = first.communicate(timeout=60)
        assert said.splitlines()[-1].startswith("traincert: another program takes part as twin now")
    finally:
        for process in (first, second):
            if process:
                process.send_signal(signal.SIGTERM)
                process.communicate()


class Wire:
    """A connection to a coordinator whose clock is wrong."""

    def __init__(self, ahead: float) -> None:
        self.ahead = ahead

    def ask(self, kind: str, data: bytes = b"", *, seconds: float = 0) -> bytes:
        assert kind == "poll"
        assert data
        assert seconds
        import time

        return poll_answer({"boot": "", "version": 1, "time": time.time() + self.ahead, "hold": 1.0}, {})


@pytest.mark.parametrize("ahead", [-100.0, 100.0])
def test_a_clock_that_is_off_by_more_than_a_round_is_told(network: Deployment, tmp_path: Path, ahead: float) -> None:
    read = Invitation.read(invite(network, "late"), MINER)
    folder = MemberFolder.create(tmp_path / "late", read, "digits")
    member = Member(folder, TrainingJob.named("digits"), cast(Connection, Wire(ahead)))
    with pytest.raises(BridgeError, match=re.escape(f"clock differs from the coordinator's by {-ahead:+.0f} seconds")):
        member.poll()


def test_folders_that_are_none_are_told(tmp_path: Path) -> None:
    assert (
        problem(run("miner", "run", tmp_path))
        == f"{tmp_path} is no miner's folder: run traincert miner join {tmp_path}"
    )
    answer = run("coordinator", "run", tmp_path, "--datadir", tmp_path)
    assert problem(answer).startswith(
        f"{tmp_path} is no coordinator's folder: run traincert coordinator init {tmp_path}"
    )
    (tmp_path / "miner.json").write_text("{")
    assert f"{tmp_path}/miner.json cannot be read" in problem(run("miner", "run", tmp_path))


def test_a_coordinators_folder_is_made_whole_or_not_at_all(network: Deployment, tmp_path: Path) -> None:
    answer = run("coordinator", "init", network.coordinator.folder, "--job", "digits")
    assert problem(answer) == f"{network.coordinator.folder} is not empty: choose another folder"
    answer = run("coordinator", "init", tmp_path / "c", "--job", "digits", "--host", "bad host")
    assert problem(answer) == "'bad host' is neither a host name nor an IP address"
    answer = run("coordinator", "init", tmp_path / "c", "--job", "digits", "--threshold", "3")
    assert problem(answer) == "3 signatures of 1 keys are impossible"
    assert not (tmp_path / "c").exists()
    assert run("coordinator", "init", tmp_path / "c", "--job", "digits").returncode == 0
    facts: dict[str, Any] = json.loads((tmp_path / "c" / "coordinator.json").read_text())
    assert facts["job"] == "digits"
    assert os.listdir(tmp_path) == ["c"]  # noqa: PTH208
