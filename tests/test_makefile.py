"""What `make images` does with a Docker that has no BuildKit, and what git leaves out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_BUILDX = """ERROR: BuildKit is enabled but the buildx component is missing or broken.
       Install the buildx component to build images with BuildKit:
       https://docs.docker.com/go/buildx/"""


def make_images(folder: Path, docker: str, *options: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run `make images` with a program as docker. Return what came of it, and docker's command lines."""
    program, calls = folder / "docker", folder / "calls"
    program.write_text(f'#!/bin/sh\necho "$DOCKER_BUILDKIT $*" >> {calls}\n{docker}\n')
    program.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key not in ("DOCKER", "MAKEFLAGS", "PROGRAMS")}
    env["PATH"] = f"{folder}{os.pathsep}{env['PATH']}"
    command = ["/usr/bin/make", "-C", str(ROOT), "images", *options]
    answer = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return answer, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("options", [(), ("PROGRAMS=cached",)])
def test_a_docker_without_buildkit_is_told_in_a_line_before_anything_else(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    answer, calls = make_images(tmp_path, f"echo '{NO_BUILDX}' >&2; exit 1", *options)
    said, *rest = answer.stderr.splitlines()
    assert said == (
        "make images needs a Docker that builds with BuildKit (package docker-buildx): "
        "ERROR: BuildKit is enabled but the buildx component is missing or broken."
    )
    assert len(rest) == 1  # make's own
    assert answer.returncode == 2
    assert calls == ["1 build --output - -"]
    assert "node" not in answer.stdout


def test_a_missing_docker_is_told(tmp_path: Path) -> None:
    answer, _ = make_images(tmp_path, "", "DOCKER=no-such-docker")
    assert "no-such-docker: not found" in answer.stderr.splitlines()[0]


def test_with_buildkit_both_images_are_built(tmp_path: Path) -> None:
    answer, calls = make_images(tmp_path, "cat < /dev/null")
    assert answer.returncode == 0, answer.stderr
    assert [call.split(" --tag ")[-1] for call in calls] == [
        "1 build --output - -",
        "traincert/node .",
        "traincert/traincert .",
    ]


def test_git_leaves_out_what_the_readmes_commands_make(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    subprocess.run(["/usr/bin/git", "init", "--quiet"], cwd=tmp_path, check=True)
    made = [".venv/x", "build/man/x", "demo/x", "network/x", "runs/wine/x", "wine.pt", "wine.json", "wine.toml", "a/x"]
    command = ["/usr/bin/git", "check-ignore", *made]
    ignored = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ignored.stdout.splitlines() == made[:-1]
