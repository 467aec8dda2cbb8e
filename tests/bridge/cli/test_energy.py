"""`traincert energy`: what the blocks of a run cost, and what mining them would."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bitcoin.core import CoreMainParams

from traincert.bridge import energy
from traincert.bridge.energy import BlockCost, HashRate, mine_hashes, search, total
from traincert.bridge.errors import BridgeError

TRAINCERT = Path(sys.executable).with_name("traincert")
CYCLES = 2


def traincert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TRAINCERT, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of `digits`."""
    folder = tmp_path_factory.mktemp("energy") / "run"
    done = traincert("job", "run", "digits", "--cycles", str(CYCLES), "--miners", "2", "--out", folder)
    assert "misses target_metric" in done.stderr, done.stderr  # so few cycles are not enough
    return folder


def test_a_runs_blocks_have_their_cost_and_the_sum_is_right(run: Path) -> None:
    answer = traincert("energy", run, "--json")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert [each["cycle"] for each in found["cycles"]] == [1, 2]
    assert found["hashing"] is None
    records = [json.loads((run / f"cycles/{cycle:08}.json").read_text()) for cycle in range(CYCLES + 1)]
    for each, before, after in zip(found["cycles"], records, records[1:], strict=False):
        assert each["tasks"] == each["measured"] == 2
        assert each["loss_reduction"] == before["loss_after"] - after["loss_after"]
        assert each["training_seconds"] > 0
        assert each["coordinator_seconds"] > 0
        assert each["cpu_seconds"] == pytest.approx(each["training_seconds"] + each["coordinator_seconds"])
        assert each["cpu_seconds_per_nano_nat"] == pytest.approx(each["cpu_seconds"] / each["loss_reduction"])
    for name in ("tasks", "training_seconds", "coordinator_seconds", "cpu_seconds", "loss_reduction"):
        assert found["total"][name] == pytest.approx(sum(each[name] for each in found["cycles"]))


@pytest.mark.usefixtures("node_programs")
def test_the_table_fits_a_terminal_and_compares_with_hash_mining(run: Path) -> None:
    answer = traincert("energy", run, "--difficulty", "1000")
    assert answer.returncode == 0, answer.stderr
    table, text = answer.stdout.split("a block took ")
    assert max(map(len, table.splitlines())) <= 80
    assert re.match(r"\d+\.\d\d CPU seconds, the mean of 2: \d+\.\d\d of its tasks, \d+\.\d\d of the coordin", text)
    assert re.search(r"mined now by bitcoind: 8,388,608 hashes in \d+\.\d\d CPU seconds, \d+\.\d\d million a sec", text)
    assert "computed: a block at difficulty 1000 takes 4,294,967,296,000 hashes on average" in text


def test_a_coordinators_and_a_demos_folder_will_do(run: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    for what in ("costs", "cycles", "job.toml"):
        place = demo / "coordinator/run" / what
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run / what, place) if (run / what).is_dir() else shutil.copy(run / what, place)
    assert traincert("energy", demo).stdout == traincert("energy", run).stdout
    assert traincert("energy", demo / "coordinator").stdout == traincert("energy", run).stdout


def test_what_was_not_measured_is_said(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "costs/00000002.json"
    cost = json.loads(path.read_text())
    cost["tasks"] = dict.fromkeys(cost["tasks"])
    path.write_text(json.dumps(cost | {"joules": {"RAPL package-0": 12.5}}))
    (folder / "costs/00000001.json").unlink()  # the process was killed before it wrote this
    text = traincert("energy", folder).stdout
    assert "2 of 2 tasks were not measured: their seconds are missing" in text
    assert "and 12.5 joules by RAPL package-0, which counts all that the machine did" in text
    assert max(map(len, text.split("a block took ")[0].splitlines())) <= 80


def test_a_run_without_costs_is_one_line(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "costs")
    (tmp_path / "empty").mkdir()
    for place, why in (
        (folder, "run does not say what a cycle cost: no cycle has ended yet, or an older traincert ran it"),
        (tmp_path / "empty", "is no run folder, and has none: give that of `traincert job run`"),
    ):
        answer = traincert("energy", place)
        assert answer.returncode == 1
        assert re.fullmatch(f"traincert: .*{re.escape(why)}.*\n", answer.stderr)


@pytest.mark.parametrize(
    "text", ["", "no JSON", "[]", "{}", '{"tasks": {}}', '{"tasks": []}', '{"tasks": {"a": {"b": 1}}}']
)
def test_a_damaged_file_is_one_line(run: Path, tmp_path: Path, text: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "costs/00000002.json").write_text(text)
    with pytest.raises(BridgeError, match=r"costs/00000002.json or its record cannot be read"):
        energy.read_costs(folder)


@pytest.mark.parametrize("text", ["-1", "0", "hard", "nan", "inf", "1e80"])
def test_what_is_no_difficulty_is_one_line(tmp_path: Path, text: str) -> None:
    answer = traincert("energy", tmp_path, "--difficulty", text)
    assert answer.returncode == 2
    assert f"'{text}' is no difficulty: give a number above 0, as getblockchaininfo has it" in answer.stderr
    assert "Traceback" not in answer.stderr


def cost(loss_reduction: int, **joules: float) -> BlockCost:
    return BlockCost(4, 4, 3.0, 1.0, joules, loss_reduction)


def test_a_cycle_that_took_nothing_off_has_no_price_for_it() -> None:
    assert cost(-5).per_nano_nat(4.0) is None
    assert cost(0).per_nano_nat(4.0) is None
    assert cost(8).per_nano_nat(4.0) == 0.5
    assert cost(8).all_joules is None


def test_a_meter_that_was_not_there_all_the_time_is_not_in_the_sum() -> None:
    assert total([cost(1, a=1.0, b=2.0), cost(2, a=4.0)]) == BlockCost(8, 8, 6.0, 2.0, {"a": 5.0}, 3)


def test_python_finds_the_nonce_of_bitcoins_first_block_and_no_other() -> None:
    genesis = CoreMainParams.GENESIS_BLOCK
    header = genesis.serialize()[:80]
    assert search(header, range(genesis.nNonce - 1000, genesis.nNonce + 1000)) == [genesis.nNonce]


def test_expected_hashes_follow_from_the_difficulty() -> None:
    rate = HashRate("x", 2**20, 0.5, {"a": 3.0})
    assert rate.expected(1) == HashRate("x", 2**32, 0.5 * 4096, {"a": 3.0 * 4096})
    regtest = 0xFFFF * 2**208 / (0x7FFFFF * 2**232)  # as getblockchaininfo has it, from nBits 207fffff
    assert rate.expected(regtest).hashes == 2


def test_bitcoind_mines_if_it_is_built(node_programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "node_folder", lambda: node_programs.parent)
    monkeypatch.setattr(energy, "NODE_HASHES", 1 << 20)
    found = mine_hashes()
    assert (found.by, found.hashes) == ("bitcoind", 1 << 20)
    assert found.cpu_seconds > 0.001


def test_python_mines_if_bitcoind_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "node_folder", lambda: tmp_path)
    monkeypatch.setattr(energy, "PYTHON_HASHES", 1000)
    found = mine_hashes()
    assert (found.by, found.hashes) == ("Python's hashlib", 1000)
    assert found.cpu_seconds > 0


def test_a_bitcoind_that_does_not_run_is_one_line(
    node_programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/bitcoind").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/bitcoind").chmod(0o755)
    (tmp_path / "bin/bitcoin-cli").symlink_to(node_programs / "bitcoin-cli")
    monkeypatch.setattr(energy, "node_folder", lambda: tmp_path)
    monkeypatch.setattr(energy, "START_SECONDS", 1)
    with pytest.raises(BridgeError, match=r"bitcoind does not mine: .*Could not connect to the server"):
        mine_hashes()
