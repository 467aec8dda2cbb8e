"""pytest fixtures with real nodes, for this project and for other projects.

`bitcoind`, `bitcoin_network` and `chain_snapshot` each exist in three scopes. The plain name is for one test. With
`_module`, the tests of one module share it. With `_session`, all tests share it (with pytest-xdist: all tests of one
worker).

If a test fails, its report has the last log lines of its nodes, and their data directories are kept for as long as
pytest keeps temporary folders. Override `bitcoind_options` for other options, and `node_programs` for other programs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

# The functions import the rest: pytest imports this file in every project, so importing must be fast.
if TYPE_CHECKING:
    from traincert.regtest.build import NodeKind
    from traincert.regtest.containers import Docker
    from traincert.regtest.links import Link
    from traincert.regtest.network import Network
    from traincert.regtest.node import Node, Options

KEPT = "bitcoin data directory"


class NetworkFactory(Protocol):
    """The type of the function that the fixture `bitcoin_network` gives."""

    def __call__(self, count: int, options: Options | None = None, topology: str | Sequence[Link] = "full") -> Network:
        """Start `count` connected nodes. They stop when the fixture ends.

        The nodes have `bitcoind_options` and `options`, which take precedence. For `topology` see `read_topology`.
        """


@dataclass
class _Nodes:
    """The nodes that one fixture has started, and their folder."""

    fixture: str
    folder: Path
    nodes: list[Node] = field(default_factory=list)
    failed: bool = False
    """Whether a test that used the nodes has failed: then the folder is kept."""


_STARTED = pytest.StashKey[list[_Nodes]]()  # stored with the test, module or pytest session of the fixture's scope


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line options of this plugin."""
    group = parser.getgroup("bitcoin nodes")
    group.addoption(
        "--bitcoind",
        metavar="PATH",
        type=Path,
        help="the bitcoind to test with; bitcoin-cli must be in the same folder (default: build the patched node)",
    )
    group.addoption(
        "--timeout-factor",
        metavar="FACTOR",
        type=_factor,
        help="multiply all timeouts of nodes by this, for slow machines",
    )
    group.addoption(
        "--regtest-backend",
        choices=["process", "docker"],
        default="process",
        help="run nodes as processes (default), or as containers of the image traincert/node",
    )
    group.addoption(
        "--regtest-keep",
        action="store_true",
        help="keep the data directories of all nodes and list them at the end (default: only those of failed tests)",
    )


def _factor(text: str) -> str:
    if not 0 < float(text) < float("inf"):  # argparse tells of a ValueError by itself
        raise ValueError(text)
    return text


def pytest_configure(config: pytest.Config) -> None:
    """Check the options before tests are collected. Raises UsageError if there is no such bitcoind."""
    bitcoind: Path | None = config.getoption("--bitcoind")
    if bitcoind and not bitcoind.is_file():
        raise pytest.UsageError(f"--bitcoind {bitcoind}: no such file")
    if factor := config.getoption("--timeout-factor"):
        os.environ["TRAINCERT_TIMEOUT_FACTOR"] = factor  # what the tests start has it, too


@pytest.fixture(scope="session")
def node_programs(pytestconfig: pytest.Config) -> Path:
    """Return the folder with bitcoind and bitcoin-cli. Without --bitcoind, build them unless the cache has them."""
    bitcoind: Path | None = pytestconfig.getoption("--bitcoind")
    return bitcoind.absolute().parent if bitcoind else build_programs(pytestconfig)


def build_programs(config: pytest.Config, kind: NodeKind | None = None) -> Path:
    """Build a node, by default the patched one, unless the cache has it, and return the folder of its programs.

    Pytest's output shows the progress: also with -q, and also that of pytest-xdist's workers.
    Raises SourceError or BuildError.
    """
    from traincert.regtest.build import PATCHED, WAITING, ProgressLines, build_log, build_node, node_folder

    kind = kind or PATCHED
    lines = ProgressLines(lambda line: _say(config, line))
    told = False

    def progress(step: str, done: int, total: int) -> None:
        nonlocal told
        if step != WAITING and not told:
            log = build_log(node_folder(kind))
            _say(
                config, f"traincert builds bitcoind, once. On two cores it takes up to a quarter of an hour. Log: {log}"
            )
            told = True
        lines.update(step, done, total)

    return build_node(kind, progress) / "bin"


def _say(config: pytest.Config, line: str) -> None:
    """Show a line at once, although pytest captures what tests print."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        reporter = config.pluginmanager.getplugin("terminalreporter")
        if reporter and not hasattr(config, "workerinput"):
            reporter.write_line(line)
            reporter.flush()
        else:  # a worker of pytest-xdist: its terminal is nowhere, but its stderr is that of the pytest that started it
            print(line, file=sys.stderr, flush=True)


@pytest.fixture(scope="session")
def _bitcoind_program(node_programs: Path, pytestconfig: pytest.Config) -> Path:
    """Return the bitcoind to run. The program in --bitcoind may have another name."""
    chosen: Path | None = pytestconfig.getoption("--bitcoind")
    in_folder = chosen and chosen.absolute().parent == node_programs
    return node_programs / (chosen.name if chosen and in_folder else "bitcoind")


@pytest.fixture(scope="session")
def bitcoind_options() -> Options:
    """Return bitcoin.conf options for every node, by default none. Override this fixture to set some."""
    return {}


def _bitcoind(
    _bitcoind_program: Path,
    bitcoind_options: Options,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Node]:
    """Give a running node with its own empty chain."""
    with (
        _folder(tmp_path_factory, request) as started,
        _node(_bitcoind_program, started, bitcoind_options, request) as node,
    ):
        yield node


def _bitcoin_network(
    _bitcoind_program: Path,
    bitcoind_options: Options,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[NetworkFactory]:
    """Give a function that starts a network of connected nodes: `bitcoin_network(count, options, topology)`."""
    from traincert.regtest.network import Network

    with _folder(tmp_path_factory, request) as started, ExitStack() as stack:
        numbers = count()

        def start(count: int, options: Options | None = None, topology: str | Sequence[Link] = "full") -> Network:
            folder = started.folder / f"network{next(numbers)}"
            network = Network(
                _bitcoind_program,
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
def _snapshot(_bitcoind_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give the data directory to copy. It is made once (with pytest-xdist: once in each worker that needs it)."""
    from traincert.regtest.snapshot import make_snapshot

    folder = tmp_path_factory.mktemp("snapshot")
    make_snapshot(_bitcoind_program, folder / "node0")
    yield folder / "node0"
    shutil.rmtree(folder)


def _chain_snapshot(
    _bitcoind_program: Path,
    bitcoind_options: Options,
    _snapshot: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Node]:
    """Give a running node with 250 blocks. The coins of the first 150 blocks can be spent.

    All coins belong to the key `snapshot.COINS_KEY`. If this bitcoind has wallets, the node's wallet `default` has this
    key. The chain is made once, and each node starts from a copy.
    """
    from traincert.regtest.snapshot import OPTIONS, copy_snapshot

    with _folder(tmp_path_factory, request) as started:
        copy_snapshot(_snapshot, started.folder / "node0")
        with _node(_bitcoind_program, started, {**OPTIONS, **bitcoind_options}, request) as node:
            yield node


@contextmanager
def _node(program: Path, started: _Nodes, options: Options, request: pytest.FixtureRequest) -> Iterator[Node]:
    from traincert.regtest.network import Network

    docker = _docker(started.folder, request)
    network = Network(program, started.folder, 1, options, docker=docker)
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
    """Give a fixture a folder for its nodes. Remove it afterwards, unless a test failed or --regtest-keep is set."""
    name = str(request.fixturename)
    started = _Nodes(name, tmp_path_factory.mktemp(name))
    request.node.stash.setdefault(_STARTED, []).append(started)
    yield started
    if not (started.failed or request.config.getoption("--regtest-keep")):
        shutil.rmtree(started.folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a failed test's report the last log lines of its nodes, and commands to start and ask the nodes again."""
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
    """List the kept data directories, also those of pytest-xdist's workers."""
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
