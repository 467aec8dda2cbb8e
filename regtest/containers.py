"""Runs nodes in containers of a Docker engine on this machine, with the same interface as node processes.

The data directories are folders of this machine. So logs, cookies and snapshots work as with node processes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import docker
import psutil
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.models.networks import Network as DockerNetwork

from traincert.regtest import reaper
from traincert.regtest.errors import NodeError
from traincert.regtest.node import Node, Options, PortTakenError

IMAGE = "traincert/node"
LABEL = "traincert.network"
"""The Docker label of all our containers and networks. Its value is the folder of the nodes."""

_DATADIR = "/data"  # the data directory's path in the container


class Docker:
    """A Docker engine, and the image for the nodes of a network in `directory`.

    When this Python process ends, even by SIGKILL, all containers and networks are removed, unless `keep` is set.
    Raises NodeError if no engine answers, or if the engine does not have the image.
    """

    def __init__(self, directory: Path, image: str = IMAGE, *, keep: bool = False) -> None:
        self.image = image
        self.directory = str(directory.resolve())
        self.name = f"traincert-{hashlib.sha256(self.directory.encode()).hexdigest()[:12]}"
        self._keep = keep
        self._one_at_a_time = Lock()
        self._reaper: subprocess.Popen[bytes] | None = None
        try:
            self.client = docker.from_env()
            self.client.ping()
        except DockerException as error:
            raise NodeError(f"no Docker engine answers ({error}): start one, or use processes") from None
        try:
            self.client.images.get(image)
        except ImageNotFound:
            raise NodeError(f"Docker has no image {image}: make images builds it") from None

    def node(self, datadir: Path, options: Options) -> Node:
        """Return a new node, whose start() starts a container."""
        return _ContainerNode(self, datadir, options, keep=self._keep)

    def network(self, name: str) -> DockerNetwork:
        """Return the Docker network of this name. Make it if it does not exist."""
        with self._one_at_a_time:  # the engine would make two networks of one name
            there = self.client.networks.list(names=[f"^{name}$"])
            return there[0] if there else self._make_network(name)

    def _make_network(self, name: str) -> DockerNetwork:
        if self._reaper is None and not self._keep:
            command = [sys.executable, str(Path(reaper.__file__)), f"{LABEL}={self.directory}"]
            self._reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self.client.networks.create(name, driver="bridge", labels={LABEL: self.directory})

    def divide(self, nodes: Sequence[Node], groups: Sequence[set[int]]) -> None:
        """Move each group of nodes into its own Docker network. Without groups, all nodes share one network.

        Docker networks that no node uses are removed.
        """
        wanted = set()
        for number, node in enumerate(nodes):
            group = next((i for i, group in enumerate(groups) if number in group), None)
            wanted.add(self.name if group is None else f"{self.name}-{group}")
            if isinstance(node, _ContainerNode):
                node.join(self.name if group is None else f"{self.name}-{group}")
        for network in self._networks():
            if network.name not in wanted:
                network.remove()

    def close(self) -> None:
        """Remove all our networks and containers, also containers of a process that was killed as it started them."""
        for container in self.client.containers.list(all=True, filters={"label": f"{LABEL}={self.directory}"}):
            container.remove(v=True, force=True)
        for network in self._networks():
            network.remove()
        if self._reaper is not None:
            self._reaper.communicate()
            self._reaper = None
        self.client.close()

    def _networks(self) -> list[DockerNetwork]:
        found: list[DockerNetwork] = self.client.networks.list(filters={"label": f"{LABEL}={self.directory}"})
        return found


class _ContainerNode(Node):
    """A bitcoind in a container. Each start makes a new container."""

    def __init__(self, engine: Docker, datadir: Path, options: Options, *, keep: bool) -> None:
        super().__init__(Path("bitcoind"), datadir, options, keep=keep)
        self._engine = engine
        self._container: Container | None = None
        self.network = engine.name

    @property
    def p2p_address(self) -> str:
        return f"{self.name}:{self.p2p_port}"  # the name is the container's alias in its network

    @property
    def relay_host(self) -> str:
        gateway: str = self._endpoint()["Gateway"]
        return gateway

    @property
    def relay_target(self) -> str:
        return f"{self._endpoint()['IPAddress']}:{self.p2p_port}"

    @property
    def cli(self) -> list[str]:
        return ["docker", "exec", "--interactive", self._container_name, "bitcoin-cli", f"-datadir={_DATADIR}"]

    @property
    def pid(self) -> int | None:
        state = self._state()
        return int(state["Pid"]) if state.get("Running") else None

    @property
    def paused(self) -> bool:
        return bool(self._state().get("Paused"))

    def attach(self) -> bool:
        try:
            self._container = self._engine.client.containers.get(self._container_name)
            self.network = next(iter(self._container.attrs["NetworkSettings"]["Networks"]), self._engine.name)
        except NotFound:
            self._container = None
        self._read_ports()
        return self.pid is not None

    def kill(self) -> None:
        if self._container is not None:
            self._container.remove(v=True, force=True)
            self._container = None

    def pause(self) -> None:
        self._running_container().pause()

    def resume(self) -> None:
        if self.paused:
            self._running_container().unpause()

    def join(self, name: str) -> None:
        """Move the node to another Docker network. Its alias there is the same."""
        self.network = name
        if self.pid is None or self._container is None:
            return
        there = self._container.attrs["NetworkSettings"]["Networks"]
        if name not in there:
            self._engine.network(name).connect(self._container, aliases=[self.name])
        for other in set(there) - {name}:
            self._engine.network(other).disconnect(self._container)

    def _limit_files(self, soft: int) -> None:
        limit = "unlimited" if soft == psutil.RLIM_INFINITY else soft
        code, output = self._running_container().exec_run(["prlimit", "--pid", "1", f"--fsize={limit}:unlimited"])
        if code:
            raise NodeError(f"{self.name}: cannot limit its files: {output!r}")

    def _listening(self) -> dict[str, str]:
        # Listen on all addresses of the container. Outside it, Docker publishes the RPC port only on 127.0.0.1.
        return {"rpcbind": "0.0.0.0", "rpcallowip": "0.0.0.0/0"}  # noqa: S104

    def _launch(self) -> None:
        client = self._engine.client
        network = self.network
        self._engine.network(network)  # makes the network if it does not exist
        try:
            self._container = client.containers.create(
                self._engine.image,
                [f"-datadir={_DATADIR}"],
                name=self._container_name,
                labels={LABEL: self._engine.directory},
                user=f"{os.getuid()}:{os.getgid()}",  # the owner of the data directory
                volumes={str(self.datadir): {"bind": _DATADIR, "mode": "rw"}},
                ports={f"{self.rpc_port}/tcp": ("127.0.0.1", self.rpc_port)},
                network=network,
                networking_config={network: client.api.create_endpoint_config(aliases=[self.name])},
            )
            self._container.start()
        except APIError as error:
            self.kill()
            taken = "port is already allocated" in str(error) or "address already in use" in str(error)
            raise (PortTakenError if taken else NodeError)(f"{self.name}: {error.explanation}") from None

    def _terminate(self) -> None:
        if self.pid is not None:
            self._running_container().kill("SIGTERM")

    def _was_started(self) -> bool:
        return self._container is not None

    def _pid_of_its_own(self) -> int:
        return 1

    def _last_words(self) -> str:
        return str(self._container.logs(tail=20), errors="replace").strip() if self._container else ""

    def _ending(self) -> str:
        return f"exit code {self._state().get('ExitCode')}"

    @property
    def _container_name(self) -> str:
        return f"{self._engine.name}-{self.name}"

    def _running_container(self) -> Container:
        if self._container is None or self.pid is None:
            raise NodeError(f"{self.name} is not running")
        return self._container

    def _state(self) -> dict[str, Any]:
        if self._container is None:
            return {}
        try:
            self._container.reload()
        except NotFound:  # for example removed with `docker rm`
            return {}
        state: dict[str, Any] = self._container.attrs["State"]
        return state

    def _endpoint(self) -> dict[str, Any]:
        endpoint: dict[str, Any] = self._running_container().attrs["NetworkSettings"]["Networks"][self.network]
        return endpoint
