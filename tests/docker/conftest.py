"""The engine, the images, and containers that are gone after their test."""

from __future__ import annotations

import gc
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import docker
import pytest
from docker import DockerClient
from docker.errors import DockerException, NotFound
from docker.models.containers import Container

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def engine() -> Iterator[DockerClient]:
    client, reason = connect()
    if client is None:
        if os.environ.get("TRAINCERT_REQUIRE_DOCKER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with closing(client):
        yield client


def connect() -> tuple[DockerClient | None, str]:
    """A client of the engine, or why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the SDK does not close a socket that it cannot connect
        try:
            return docker.from_env(), ""
        except DockerException as error:
            reason = f"no Docker engine answers: {error}"
        gc.collect()
    return None, reason


@pytest.fixture(scope="session")
def images(engine: DockerClient, node_programs: Path) -> DockerClient:  # noqa: ARG001 - built before
    """The engine, with both images as they are now; their programs are those that the other tests use."""
    command = ["make", "images", "PROGRAMS=cached"]
    build = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert build.returncode == 0, build.stdout[-3000:]
    return engine


@pytest.fixture
def run_container(images: DockerClient) -> Iterator[Callable[..., Container]]:
    """A function that starts a container, with what `docker run` would be told; it takes its volumes with it."""
    started: list[Container] = []

    def run(image: str, *arguments: str, **options: object) -> Container:
        started.append(images.containers.run(image, list(arguments), detach=True, **options))  # type: ignore[call-overload]
        return started[-1]

    yield run
    for container in reversed(started):  # a later one may use an earlier one's volumes
        container.reload()
        container.remove(force=True, v=True)
    for mount in [mount for container in started for mount in container.attrs["Mounts"]]:
        with pytest.raises(NotFound):
            images.volumes.get(mount["Name"])
