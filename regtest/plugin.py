"""pytest fixtures with real nodes, for this project's tests and for other projects'.

Each of `bitcoind`, `bitcoin_network` and `chain_snapshot` is there three times: by its own name for one test,
`..._module` shared by a module's tests, and `..._session` by all tests (under pytest-xdist, by all of one worker).

A failing test's report carries the last log lines of the nodes that it used, and their data directories are kept, as
long as pytest keeps its temporary folders. Override `bitcoind_options` or `node_programs` to use other options or
programs.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

# The rest is imported where it is needed: this file is imported at every start of pytest, in any project.
if TYPE_CHECKING:
    from traincert.regtest.containers import Docker
    from traincert.regtest.links import Link
    from traincert.regtest.network import Network
    from traincert.regtest.node import Node, Options

KEPT = "bitcoin data directory"


class NetworkFactory(Protocol):
    """What the fixture `bitcoin_network` gives."""

    def __call__(self, count: int, options: Options | None = None, topology: str | Sequence[Link] = "full") -> Network:
        """Start `count` nodes, with `bitcoind_options` and these, and connect them as `read_topology` says.

        They are stopped with the fixture.
        """


@dataclass
class _Nodes:
    """What one fixture has started, in a folder of its own."""

    fixture: str
    folder: Path
    nodes: list[Node] = field(default_factory=list)
    failed: bool = False
    """Whether a test that used them has."""


_STARTED = pytest.StashKey[list[_Nodes]]()  # of the test, module or session that they are for


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add our options."""
    group = parser.getgroup("bitcoin nodes")
    group.addoption(
        "--bitcoind",
        metavar="PATH",
        type=Path,
        help="the bitcoind to test with, bitcoin-cli beside it (default: the one built from the patch)",
    )
    group.addoption(
        "--regtest-backend",
        choices=["process", "docker"],
        default="process",
        help="what nodes are: processes (default), or containers of the image traincert/node",
    )
    group.addoption(
        "--regtest-keep",
        action="store_true",
        help="keep the data directories of all nodes, not of failed tests only, and list them at the end",
    )


@pytest.fixture(scope="session")
def node_programs(pytestconfig: pytest.Config) -> Path:
    """Return the folder with bitcoind and bitcoin-cli, built first if they are not in the cache."""
    from traincert.regtest.build import build_node

    bitcoind: Path | None = pytestconfig.getoption("--bitcoind")
    return bitcoind.absolute().parent if bitcoind else build_node() / "bin"


@pytest.fixture(scope="session")
def bitcoind_options() -> Options:
    """Return bitcoin.conf options for every node, none but ours by default: override it to give some."""
    return {}


def _bitcoind(
    node_programs: Path,
    bitcoind_options: Options,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Node]:
    """Give a running node, on a chain of its own."""
    with (
        _folder(tmp_path_factory, request) as started,
        _node(node_programs, started, bitcoind_options, request) as node,
    ):
        yield node


def _bitcoin_network(
    node_programs: Path,
    bitcoind_options: Options,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[NetworkFactory]:
    """Give a function that starts networks of connected nodes: `bitcoin_network(count, options)`."""
    from traincert.regtest.network import Network

    with _folder(tmp_path_factory, request) as started, ExitStack() as stack:
        numbers = count()

        def start(count: int, options: Options | None = None, topology: str | Sequence[Link] = "full") -> Network:
            folder = started.folder / f"network{next(numbers)}"
            network = Network(
                node_programs / "bitcoind",
                folder,
                count,
                {**bitcoind_options, **(options or {})},
                topology=topology,
                docker=_docker(folder, request),
            )
            started.nodes += network.nodes
            return stack.enter_context(network)

        yield start


@pytest.fixture(scope="session")
def _snapshot(node_programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the data directory that is copied: made once, and under pytest-xdist once by each worker that needs it."""
    from traincert.regtest.snapshot import make_snapshot

    folder = tmp_path_factory.mktemp("snapshot")
    make_snapshot(node_programs / "bitcoind", folder / "node0")
    yield folder / "node0"
    shutil.rmtree(folder)


def _chain_snapshot(
    node_programs: Path,
    bitcoind_options: Options,
    _snapshot: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Node]:
    """Give a running node with 250 blocks, the coins of 150 of which can be spent.

    Its wallet `default` has them, if this bitcoind has wallets; they are the known key's, `snapshot.COINS_KEY`. The
    chain is made once, and each node starts from a copy.
    """
    from traincert.regtest.snapshot import OPTIONS, copy_snapshot

    with _folder(tmp_path_factory, request) as started:
        copy_snapshot(_snapshot, started.folder / "node0")
        with _node(node_programs, started, {**OPTIONS, **bitcoind_options}, request) as node:
            yield node


@contextmanager
def _node(node_programs: Path, started: _Nodes, options: Options, request: pytest.FixtureRequest) -> Iterator[Node]:
    from traincert.regtest.network import Network

    docker = _docker(started.folder, request)
    network = Network(node_programs / "bitcoind", started.folder, 1, options, docker=docker)
    started.nodes += network.nodes
    with network:
        yield network.nodes[0]


def _docker(folder: Path, request: pytest.FixtureRequest) -> Docker | None:
    if request.config.getoption("--regtest-backend") == "process":
        return None
    from traincert.regtest.containers import Docker

    return Docker(folder)


def _in_scopes(fixture: Callable[..., Any]) -> tuple[Any, ...]:
    return tuple(pytest.fixture(fixture, scope=scope) for scope in ("function", "module", "session"))


bitcoind, bitcoind_module, bitcoind_session = _in_scopes(_bitcoind)
bitcoin_network, bitcoin_network_module, bitcoin_network_session = _in_scopes(_bitcoin_network)
chain_snapshot, chain_snapshot_module, chain_snapshot_session = _in_scopes(_chain_snapshot)


@contextmanager
def _folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[_Nodes]:
    """Give a fixture a folder for its nodes, which is removed unless somebody may want to look into it."""
    name = str(request.fixturename)
    started = _Nodes(name, tmp_path_factory.mktemp(name))
    request.node.stash.setdefault(_STARTED, []).append(started)
    yield started
    if not (started.failed or request.config.getoption("--regtest-keep")):
        shutil.rmtree(started.folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a failed test's report what its nodes said last, and how to look further."""
    report = yield
    used = [
        started
        for collector in item.listchain()
        for started in collector.stash.get(_STARTED, [])
        if collector is item or started.fixture in getattr(item, "fixturenames", ())
    ]
    nodes = [node for started in used for node in started.nodes]
    if report.failed:
        report.sections += [(f"{node.name}: end of debug.log", _last_words(node)) for node in nodes]
        for started in used:
            started.failed = True
    if report.when == "teardown" and item.config.getoption("--regtest-keep"):
        report.user_properties += [(KEPT, str(node.datadir)) for node in nodes]
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the data directories that are kept, those of xdist's workers too."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [each for report in reports for each in getattr(report, "user_properties", ())]
    kept = dict.fromkeys(value for name, value in properties if name == KEPT)
    if kept:
        terminalreporter.section("kept bitcoin data directories")
        for datadir in kept:
            terminalreporter.line(datadir)


def _last_words(node: Node) -> str:
    datadir = f"-datadir={node.datadir}"
    start = shlex.join([str(node.bitcoind), datadir, "-daemonwait"])
    ask = shlex.join([str(node.bitcoind.with_name("bitcoin-cli")), datadir, "getblockchaininfo"])
    return f"{node.log_tail()}\n\nTo look further: {start}\n  and then, for example: {ask}"
