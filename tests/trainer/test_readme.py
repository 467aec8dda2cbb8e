"""The README's job of one's own, as its reader would type it in."""

import subprocess
import sys
import textwrap
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


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
