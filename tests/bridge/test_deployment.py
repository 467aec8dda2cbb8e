"""`traincert coordinator`, on nodes that somebody else started."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from safetensors.torch import load_file

from traincert.bridge.chain import CertifiedBlock, read_chain
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.deployment import JOB, network_params
from traincert.bridge.keys import load_network_keys
from traincert.bridge.rpc import NodeClient
from traincert.regtest import Network
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.state import state_hash, state_of

TRAINCERT = str(Path(sys.executable).parent / "traincert")


def coordinator(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [TRAINCERT, "coordinator", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def run_until(moment: str, directory: Path) -> None:
    """Run the coordinator, and kill it when it says so."""
    command = [TRAINCERT, "coordinator", "run", str(directory)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next((line for line in process.stderr if line.startswith(moment)), None)
        process.kill()
    assert said is not None


@pytest.fixture
def network(tmp_path: Path, node_programs: Path) -> Iterator[tuple[Path, Network, TrainingParams]]:
    """A prepared folder, with its nodes running on this machine."""
    directory = tmp_path / "coordinator"
    prepared = coordinator("prepare", directory, "--nodes", "2", "--miners", "3")
    assert prepared.returncode == 0, prepared.stderr
    params = network_params(load_network_keys(directory / "keys"), TrainingJob.named(JOB))
    with Network(node_programs / "bitcoind", directory, 2, params.node_options()) as nodes:
        yield directory, nodes, params


def test_a_coordinator_that_was_killed_goes_on(network: tuple[Path, Network, TrainingParams]) -> None:
    directory, nodes, params = network
    for moment in ("starting 2 worker", "cycle 2 ", "block 3 "):
        run_until(moment, directory)
    shutil.rmtree(directory / "run")  # more than a kill can do: the last block may have come before its cycle was saved
    finished = coordinator("run", directory)
    assert finished.returncode == 0, finished.stderr
    assert "absent" not in finished.stderr
    assert coordinator("run", directory).stdout == finished.stdout == "all 12 cycles are done\n"
    nodes.wait_until_same_tip()
    with NodeClient.from_datadir(directory / "node1") as client:
        chain = read_chain(client, params)
    assert len(chain) == 12
    assert {block.certificate.round for block in chain} == {0}
    records = [directory / f"run/cycles/{block.certificate.height:08}.json" for block in chain]
    assert [block.certificate.record for block in chain] == [sha256(path.read_bytes()).digest() for path in records]
    check_export(directory, chain)


def check_export(directory: Path, chain: list[CertifiedBlock]) -> None:
    """Any block's model is exported, and is the one that its certificate names."""

    def export(height: int, run: Path = directory / "run") -> subprocess.CompletedProcess[str]:
        command = [TRAINCERT, "job", "export", str(run), "--height", str(height), "--datadir", str(directory / "node1")]
        command += ["--out", str(directory / "model.safetensors")]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    for height in (1, 7, 12):
        assert export(height).returncode == 0
        model = build_model(TrainingJob.named(JOB))
        model.load_state_dict(load_file(directory / "model.safetensors"))
        assert state_hash(state_of(model)) == chain[height - 1].certificate.model_after
    answer = export(13)
    assert answer.returncode == 1
    assert "block 13 has no certificate; certificates are in blocks: 1 to 12" in answer.stderr
    shutil.copytree(directory / "run", directory / "other")
    for path in sorted((directory / "other/cycles").iterdir())[5:]:
        path.unlink()
    answer = export(7, directory / "other")
    assert answer.returncode == 1
    assert f"other has no record {chain[6].certificate.record.hex()}, which block 7 certifies" in answer.stderr


def test_a_last_record_that_the_chain_does_not_commit_to_is_told(
    network: tuple[Path, Network, TrainingParams],
) -> None:
    directory, _, _ = network
    run_until("cycle 2 ", directory)
    record = max((directory / "run/cycles").glob("*.json"))
    record.write_text(record.read_text().replace('"metric": ', '"metric": 1'))
    answer = coordinator("run", directory)
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].endswith(f" does not certify the record of cycle {int(record.stem)}")


def test_prepare_leaves_what_is_there(tmp_path: Path) -> None:
    assert coordinator("prepare", tmp_path).returncode == 0
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    assert coordinator("prepare", tmp_path).returncode == 0
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    keys = sorted((tmp_path / "keys").iterdir())
    assert len(keys) == 3 + 1 + 4
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert len(list(tmp_path.glob("node*/bitcoin.conf"))) == 3


def test_a_folder_that_is_not_prepared_is_told(tmp_path: Path) -> None:
    answer = coordinator("run", tmp_path)
    assert answer.returncode == 1
    assert answer.stderr == (f"traincert: {tmp_path} is not prepared: run traincert coordinator prepare {tmp_path}\n")


def test_a_coordinator_that_would_contradict_itself_says_so_and_ends(
    network: tuple[Path, Network, TrainingParams],
) -> None:
    directory, _, _ = network
    run_until("block 2 ", directory)
    shutil.rmtree(directory / "run")
    (directory / "keys" / "miner2.key").unlink()
    answer = coordinator("run", directory)
    assert answer.returncode == 1
    assert "has another certificate for block 1, round 0" in answer.stderr.splitlines()[-1]
