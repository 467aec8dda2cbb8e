"""The node under upstream's test framework: upstream's own tests, without training options, and the patch's.

`make test-upstream` runs all of upstream's. Here are those of what the patch changes: headers, blocks and their
acceptance, block files, templates, RPC and REST.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

UPSTREAM_TESTS = [
    "feature_block.py",
    "feature_config_args.py",
    "feature_reindex.py",
    "feature_signet.py",
    "interface_rest.py",
    "mining_basic.py",
    "p2p_compactblocks.py",
    "p2p_segwit.py",
    "p2p_unrequested_blocks.py",
    "rpc_blockchain.py",
    "rpc_generate.py",
    "rpc_help.py",
]
OUR_TESTS = ["feature_training.py", "p2p_training.py", "rpc_training.py"]


def run_with(programs: Path, script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script of upstream's framework with these programs."""
    names = {"BITCOIND": str(programs / "bitcoind"), "BITCOINCLI": str(programs / "bitcoin-cli"), "LC_ALL": "C.UTF-8"}
    command = [sys.executable, str(programs.parent / "test/functional" / script), *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | names)


@dataclass
class Outcome:
    """What test_runner.py said."""

    statuses: dict[str, str]
    output: str


@pytest.fixture(scope="module")
def outcome(node_programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All of UPSTREAM_TESTS, two at a time."""
    folder = tmp_path_factory.mktemp("upstream")
    table = folder / "results.csv"
    options = ["--jobs=2", f"--tmpdirprefix={folder}", f"--resultsfile={table}", "--combinedlogslen=100"]
    ran = run_with(node_programs, "test_runner.py", *options, *UPSTREAM_TESTS)
    assert table.exists(), ran.stdout + ran.stderr
    with table.open() as file:
        return Outcome({row["test"]: row["status"] for row in csv.DictReader(file)}, ran.stdout + ran.stderr)


@pytest.mark.parametrize("name", UPSTREAM_TESTS)
def test_upstreams_functional_test_passes(outcome: Outcome, name: str) -> None:
    mine = {test: status for test, status in outcome.statuses.items() if test.split()[0] == name}
    assert mine
    assert set(mine.values()) == {"Passed"}, outcome.output[-20000:]


@pytest.fixture(params=["node_programs", "base28_programs"], ids=["31", "28"])
def programs_of_base(request: pytest.FixtureRequest) -> Path:
    """The patched node of each base."""
    programs: Path = request.getfixturevalue(request.param)
    return programs


@pytest.mark.parametrize("name", OUR_TESTS)
def test_our_functional_test_passes(programs_of_base: Path, name: str, tmp_path: Path) -> None:
    config = programs_of_base.parent / "test/config.ini"
    ran = run_with(programs_of_base, name, f"--configfile={config}", f"--tmpdir={tmp_path / 'test'}")
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-8000:]


def test_our_unit_tests_pass(programs_of_base: Path) -> None:
    ran = subprocess.run([programs_of_base / "test_training"], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"Running [1-9]\d* test cases", ran.stdout)
