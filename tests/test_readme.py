"""What the README has its reader type in."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

README = Path(__file__).parents[1] / "README.md"


def block(after: str) -> str:
    """The indented block that follows a line that ends so."""
    lines = README.read_text().partition(f"{after}\n\n")[2].splitlines(keepends=True)
    end = next(number for number, line in enumerate(lines) if line.strip() and not line.startswith("    "))
    return textwrap.dedent("".join(lines[:end]))


def test_the_readmes_own_job_reaches_its_target(tmp_path: Path) -> None:
    (tmp_path / "cancer.py").write_text(block("Say, `cancer.py`:"))
    (tmp_path / "cancer.toml").write_text(block("and `cancer.toml`:"))
    command = [str(Path(sys.executable).parent / "traincert"), "job", "run", "cancer.toml"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    accuracy = float(answer.stdout.split("test accuracy ")[1].split(" ")[0])
    assert accuracy >= 0.93
    stored = b"".join(path.read_bytes() for path in (tmp_path / "runs/cancer/data").rglob("*") if path.is_file())
    assert b"patient 1" not in stored
    assert b"ward 1" not in stored


def test_the_readmes_tests_pass(pytester: pytest.Pytester, node_programs: Path) -> None:
    pytester.makepyfile(block("no PyTorch:"))
    result = pytester.runpytest_subprocess(f"--bitcoind={node_programs / 'bitcoind'}", f"--basetemp={pytester.path}/t")
    result.assert_outcomes(passed=3)
