"""A user's own job on a chain: the job of docs/jobs.md, as its reader would write it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from test_readme import ROOT, block

TRAINCERT = str(Path(sys.executable).parent / "traincert")


@pytest.mark.usefixtures("node_programs")
def test_a_users_own_job_reaches_its_target_on_a_chain(tmp_path: Path) -> None:
    page = ROOT / "docs/jobs.md"
    (tmp_path / "cancer.py").write_text(block(page, "Say, `cancer.py`:"))
    job = block(page, "and `cancer.toml`:")
    assert "target_metric = 0.93" in job
    (tmp_path / "cancer.toml").write_text(job)
    command = [TRAINCERT, "demo", "--job", "cancer.toml", "--nodes", "1", "--data", "chain"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert re.search(r"✓ accuracy on \d+ test examples that no miner has: 0\.\d+ \(bar: 0\.93\)", answer.stdout)
    chain = [TRAINCERT, "job", "export", "chain/coordinator/run", "--best", "--out", "best.pt"]
    subprocess.run(chain, cwd=tmp_path, check=True, capture_output=True)
