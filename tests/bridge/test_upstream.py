"""What upstream's own tests say of the patched node, without training options; and the node's unit tests of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

UPSTREAM_TESTS = ["feature_block.py", "mining_basic.py", "feature_signet.py", "p2p_segwit.py"]


@pytest.mark.parametrize("name", UPSTREAM_TESTS)
def test_upstreams_functional_test_passes(node_programs: Path, tmp_path: Path, name: str) -> None:
    tree = node_programs.parent / "test"
    command = [sys.executable, str(tree / "functional" / name), f"--configfile={tree / 'config.ini'}"]
    answer = subprocess.run(
        [*command, f"--tmpdir={tmp_path / 'test'}"],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )
    assert answer.returncode == 0, answer.stdout[-4000:] + answer.stderr[-4000:]


def test_the_nodes_own_unit_tests_pass(node_programs: Path) -> None:
    answer = subprocess.run([node_programs / "test_training"], check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "Running 8 test cases" in answer.stdout
