"""The node under upstream's test framework: upstream's own tests, without training options, and the patch's.

`make test-upstream` runs all of upstream's. Here are those of what the patch changes: headers, blocks and their
acceptance, block files, templates, RPC and REST.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from configparser import ConfigParser
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
OUR_TESTS = ["feature_training.py", "feature_training_bodies.py", "p2p_training.py", "rpc_training.py"]


Ran = subprocess.CompletedProcess[str]


def run(programs: Path, script: str, folder: Path) -> Ran:
    """Run a functional test of the node's tree with these programs, in a new folder."""
    tests = programs.parent / "test"
    options = [f"--configfile={tests / 'config.ini'}", f"--tmpdir={folder}", f"--cachedir={folder}.cache"]
    command = [sys.executable, str(tests / "functional" / script), *options]
    names = {"BITCOIND": str(programs / "bitcoind"), "BITCOINCLI": str(programs / "bitcoin-cli"), "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | names)


@pytest.fixture(scope="module")
def upstream_tests(node_programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Ran]]]:
    """All of UPSTREAM_TESTS, running two at a time."""
    folder = tmp_path_factory.mktemp("upstream")
    with ThreadPoolExecutor(max_workers=2) as pool:
        yield {name: pool.submit(run, node_programs, name, folder / name) for name in UPSTREAM_TESTS}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", UPSTREAM_TESTS)
def test_upstreams_functional_test_passes(upstream_tests: dict[str, Future[Ran]], name: str) -> None:
    ran = upstream_tests[name].result()
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-8000:]


@pytest.fixture(params=["node_programs", "base28_programs"], ids=["31", "28"])
def programs_of_base(request: pytest.FixtureRequest) -> Path:
    """The patched node of each base."""
    programs: Path = request.getfixturevalue(request.param)
    return programs


@pytest.mark.parametrize("name", OUR_TESTS)
def test_our_functional_test_passes(programs_of_base: Path, name: str, tmp_path: Path) -> None:
    ran = run(programs_of_base, name, tmp_path / "test")
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-8000:]


# A line of test/config.ini, and the program that it says is there.
CLAIMS = {
    "BUILD_BENCH": "bench_bitcoin",
    "BUILD_BITCOIN_TX": "bitcoin-tx",
    "ENABLE_BITCOIN_CHAINSTATE": "bitcoin-chainstate",
    "ENABLE_BITCOIN_UTIL": "bitcoin-util",
    "ENABLE_BITCOIND": "bitcoind",
    "ENABLE_CLI": "bitcoin-cli",
    "ENABLE_FUZZ_BINARY": "fuzz",
    "ENABLE_IPC": "bitcoin-node",
    "ENABLE_WALLET_TOOL": "bitcoin-wallet",
}


def test_config_ini_names_only_programs_that_are_there(programs_of_base: Path) -> None:
    config = ConfigParser()
    config.read(programs_of_base.parent / "test/config.ini")
    claimed = {name for name in CLAIMS if config["components"].getboolean(name, fallback=False)}
    assert claimed == {name for name, program in CLAIMS.items() if (programs_of_base / program).exists()}


def test_our_unit_tests_pass(programs_of_base: Path) -> None:
    ran = subprocess.run([programs_of_base / "test_training"], check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"Running [1-9]\d* test cases", ran.stdout)
