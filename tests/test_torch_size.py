"""Who gets PyTorch for GPUs is told so before pip downloads it, and nobody else is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
(VERSION,) = re.findall(r"^torch==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
PLAIN = f"torch (9.9)\nAvailable versions: 9.9, {VERSION}, 2.0.1\n"


def said(tmp_path: Path, answer: str) -> str:
    """What docker/torch-size says if `pip index versions` answers so, and ends with 1 if it has no answer."""
    pip = tmp_path / "pip"
    pip.write_text(f"#!/bin/sh\nprintf '%s' '{answer}'\necho no more >&2\n[ '{answer}' ]\n")
    pip.chmod(0o755)
    command = [str(ROOT / "docker/torch-size"), str(pip), "--extra-index-url", "https://example.org"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr


def test_the_build_for_gpus_is_told_with_its_size_and_a_way_out(tmp_path: Path) -> None:
    text = said(tmp_path, PLAIN)
    assert "2.7 GB" in text
    assert "https://pytorch.org/get-started/locally/" in text
    assert "make TORCH_INDEX=ADDRESS" in text
    assert said(tmp_path, f"{PLAIN}  INSTALLED: 2.0.1\n  LATEST:    9.9\n") == text


@pytest.mark.parametrize(
    "answer",
    [
        f"{PLAIN}  INSTALLED: {VERSION}\n  LATEST:    9.9\n",
        f"{PLAIN}  INSTALLED: {VERSION}+cpu\n",
        f"torch (9.9)\nAvailable versions: 9.9, {VERSION}+cpu, {VERSION}, 2.0.1\n",
        "torch (9.9)\nAvailable versions: 9.9, 2.0.1\n",
        "",
    ],
    ids=["is there", "the CPU build is there", "pip takes the CPU build", "no such version", "offline"],
)
def test_nothing_is_said_otherwise(tmp_path: Path, answer: str) -> None:
    assert said(tmp_path, answer) == ""


@pytest.mark.parametrize("target", ["setup", "lock"])
def test_make_asks_before_pip_installs(target: str) -> None:
    command = ["make", "--dry-run", f"--what-if={ROOT / 'requirements.lock'}", "--what-if=requirements.lock", target]
    recipe = subprocess.run(
        [*command, "TORCH_INDEX=INDEX"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    pip = "build/lock/bin/pip" if target == "lock" else ".venv/bin/pip"
    asks = recipe.index(f"docker/torch-size {pip} --extra-index-url INDEX\n")
    assert asks < recipe.index(f"{pip} install ")


def test_docker_asks_before_pip_installs() -> None:
    (python,) = re.findall(
        r"^FROM \S+ AS python$(.*?)^FROM", (ROOT / "Dockerfile").read_text(), re.MULTILINE | re.DOTALL
    )
    asks = python.index("sh torch-size /opt/traincert/bin/pip ")
    assert asks < python.index("/opt/traincert/bin/pip install", python.index("--no-deps --require-hashes"))
