"""The fixtures, in an inner pytest as another project's tests would use them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from traincert.regtest import wait_for

pytest_plugins = ["pytester"]


@pytest.fixture
def arguments(pytester: pytest.Pytester, node_programs: Path) -> list[str]:
    return [f"--bitcoind={node_programs / 'bitcoind'}", f"--basetemp={pytester.path}/t"]


def datadirs(pytester: pytest.Pytester) -> list[Path]:
    return sorted({path.parent for path in pytester.path.rglob("bitcoin.conf")})


def test_fixtures_give_nodes_and_leave_none(pytester: pytest.Pytester, arguments: list[str]) -> None:
    pytester.makepyfile("""
        def test_one_node(bitcoind):
            assert bitcoind.rpc("getblockcount") == 0

        def test_networks(bitcoin_network):
            first, second = bitcoin_network(2), bitcoin_network(1, {"uacomment": "second"})
            assert first.nodes[0].rpc("getconnectioncount") == 1
            assert "second" in second.nodes[0].rpc("getnetworkinfo")["subversion"]
    """)
    result = pytester.runpytest_subprocess(*arguments, "--regtest-keep")
    result.assert_outcomes(passed=2)
    kept = datadirs(pytester)
    assert [path.name for path in kept] == ["node0", "node1", "node0", "node0"]
    result.stdout.fnmatch_lines_random(["*kept bitcoin data directories*", *map(str, kept)])
    assert not list(pytester.path.rglob("bitcoind.pid"))  # bitcoind removes it when it stops in good order


def test_a_failing_test_shows_the_nodes_last_words_and_how_to_look_further(
    pytester: pytest.Pytester, arguments: list[str]
) -> None:
    pytester.makepyfile("""
        def test_fails(bitcoind, bitcoin_network_module):
            bitcoin_network_module(1)
            assert bitcoind.rpc("generatetoaddress", 3, "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202") == 1

        def test_passes(bitcoind_session):
            pass
    """)
    result = pytester.runpytest_subprocess(*arguments)
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*node0: end of debug.log*", "*Z *", "To look further: *"])
    assert not list(pytester.path.rglob("bitcoind.pid"))
    assert [path.parts[-2:] for path in datadirs(pytester)] == [("network0", "node0"), ("bitcoind0", "node0")]

    start, ask = (
        next(line.partition(words)[2] for line in result.outlines if words in line and "bitcoind0" in line)
        for words in ("To look further: ", "for example: ")
    )
    subprocess.run(start.split(), check=True, stdout=subprocess.DEVNULL)
    try:
        assert '"blocks": 3' in subprocess.check_output(ask.split(), text=True)
    finally:
        subprocess.run([*ask.split()[:-1], "stop"], check=True)


def test_options_of_a_projects_own_are_every_nodes(pytester: pytest.Pytester, arguments: list[str]) -> None:
    pytester.makeconftest("""
        import pytest

        @pytest.fixture(scope="session")
        def bitcoind_options():
            return {"uacomment": "ours"}
    """)
    pytester.makepyfile("""
        def test_all(bitcoind, bitcoin_network_module, chain_snapshot_session):
            network = bitcoin_network_module(1, {"maxconnections": "7"})
            for node in (bitcoind, network.nodes[0], chain_snapshot_session):
                assert "ours" in node.rpc("getnetworkinfo")["subversion"]
    """)
    pytester.runpytest_subprocess(*arguments).assert_outcomes(passed=1)


SHARED = """
    import pytest

    seen = set()

    @pytest.mark.parametrize("number", range(3))
    def test_{name}(bitcoind, bitcoind_module, bitcoind_session, number):
        seen.add(bitcoind_module.pid)
        assert len(seen) == 1
        assert len({{node.pid for node in (bitcoind, bitcoind_module, bitcoind_session)}}) == 3
        bitcoind_session.rpc("setnetworkactive", False)
        print("session", bitcoind_session.pid)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "4"]], ids=["alone", "four workers"])
def test_nodes_are_shared_as_their_fixtures_are_named(
    pytester: pytest.Pytester, arguments: list[str], workers: list[str]
) -> None:
    pytester.makepyfile(test_a=SHARED.format(name="a"), test_b=SHARED.format(name="b"))
    result = pytester.runpytest_subprocess(*arguments, *workers, "--dist=loadfile", "-rP")
    result.assert_outcomes(passed=6)
    sessions = {line for line in result.outlines if line.startswith("session ")}
    assert len(sessions) == (2 if workers else 1)  # each worker's session is its own
    assert not datadirs(pytester)


SNAPSHOT = """
    import pytest

    @pytest.mark.parametrize("number", range(4))
    def test_spends(chain_snapshot, number):
        assert chain_snapshot.rpc("getblockcount") == 250
        assert chain_snapshot.rpc("getbalances")["mine"]["trusted"] == 149 * 50 + 25
        txid = chain_snapshot.rpc("sendtoaddress", chain_snapshot.rpc("getnewaddress"), 7000)
        chain_snapshot.rpc("generatetoaddress", 1, chain_snapshot.rpc("getnewaddress"))
        assert chain_snapshot.rpc("gettransaction", txid)["confirmations"] == 1
        chain_snapshot.restart()
        assert chain_snapshot.rpc("listwallets") == ["default"]
"""


@pytest.mark.parametrize("workers", [[], ["-n", "4"]], ids=["alone", "four workers"])
def test_each_test_spends_the_snapshots_coins(
    pytester: pytest.Pytester, arguments: list[str], workers: list[str]
) -> None:
    pytester.makepyfile(SNAPSHOT)
    pytester.runpytest_subprocess(*arguments, *workers).assert_outcomes(passed=4)
    assert not datadirs(pytester)


def test_without_wallets_the_known_key_spends_the_snapshots_coins(
    pytester: pytest.Pytester, node_programs: Path
) -> None:
    """A bitcoind that was built without them refuses the same calls, by name, as one with -disablewallet."""
    programs = pytester.mkdir("programs")
    shutil.copy2(node_programs / "bitcoin-cli", programs)
    (programs / "bitcoind").write_text(f'#!/bin/sh\nexec {node_programs / "bitcoind"} "$@" -disablewallet\n')
    (programs / "bitcoind").chmod(0o755)
    pytester.makepyfile("""
        from traincert.regtest.snapshot import COINS_KEY

        def test_spends(chain_snapshot):
            rpc = chain_snapshot.rpc
            block = rpc("getblock", rpc("getblockhash", 150), 2)
            coin = {"txid": block["tx"][0]["txid"], "vout": 0}
            spend = rpc("createrawtransaction", [coin], {"bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202": 24.9999})
            signed = rpc("signrawtransactionwithkey", spend, [COINS_KEY])
            assert signed["complete"]
            assert rpc("sendrawtransaction", signed["hex"]) in rpc("getrawmempool")
    """)
    arguments = [f"--bitcoind={programs / 'bitcoind'}", f"--basetemp={pytester.path}/t"]
    pytester.runpytest_subprocess(*arguments).assert_outcomes(passed=1)


HANGS = """
    import time

    def test_hangs(bitcoind, bitcoin_network_module, chain_snapshot_session):
        nodes = [bitcoind, *bitcoin_network_module(2).nodes, chain_snapshot_session]
        with open("pids.part", "w") as file:
            file.write(" ".join(str(node.pid) for node in nodes))
        import os
        os.rename("pids.part", "pids")
        while True:
            time.sleep(1)
"""


@pytest.fixture
def hanging(pytester: pytest.Pytester, arguments: list[str], request: pytest.FixtureRequest) -> Iterator[object]:
    """An inner pytest, alone or with a worker, whose test has four nodes and does not end."""
    pytester.makepyfile(HANGS)
    command = [sys.executable, "-m", "pytest", *arguments, *request.param]
    with subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("hanging", [[], ["-n", "1"]], ids=["alone", "a worker"], indirect=True)
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_however_pytest_ends_no_node_outlives_it(
    pytester: pytest.Pytester, hanging: subprocess.Popen[bytes], end: signal.Signals
) -> None:
    wait_for((pytester.path / "pids").exists, 60, "the inner test's nodes")
    pids = (pytester.path / "pids").read_text().split()
    assert len(pids) == 4
    assert all(is_bitcoind(pid) for pid in pids)
    hanging.send_signal(end)
    hanging.wait(60)
    wait_for(lambda: not any(map(is_bitcoind, pids)), 60, "the nodes to end")


def is_bitcoind(pid: str) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/comm").read_text().startswith("b-")
            or "bitcoin" in Path(f"/proc/{pid}/cmdline").read_text()
        )
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_bitcoind_may_have_another_name(pytester: pytest.Pytester, node_programs: Path) -> None:
    programs = pytester.mkdir("programs")
    shutil.copy2(node_programs / "bitcoin-cli", programs)
    (programs / "bitcoind-31").symlink_to(node_programs / "bitcoind")
    (programs / "bitcoind").write_text("#!/bin/sh\nexit 1\n")
    (programs / "bitcoind").chmod(0o755)
    pytester.makepyfile("""
        def test_all(bitcoind, bitcoin_network, chain_snapshot):
            for node in (bitcoind, bitcoin_network(1).nodes[0], chain_snapshot):
                assert node.bitcoind.name == "bitcoind-31"
    """)
    command = [f"--bitcoind={programs / 'bitcoind-31'}", f"--basetemp={pytester.path}/t"]
    pytester.runpytest_subprocess(*command).assert_outcomes(passed=1)


# A build that copies the real node's programs. Before it, ninja does eight things that it counts.
COPIES = """
cmake_minimum_required(VERSION 3.22)
project(fake CXX)
set(CLIENT_VERSION_MAJOR 31)
set(CLIENT_VERSION_MINOR 99)
foreach(name bitcoind bitcoin-cli)
  add_custom_target(${{name}} COMMAND mkdir -p bin && cp {programs}/${{name}} bin/)
endforeach()
foreach(number RANGE 1 8)
  add_custom_target(step${{number}} COMMAND true)
  add_dependencies(bitcoind step${{number}})
endforeach()
file(WRITE ${{CMAKE_BINARY_DIR}}/test/config.ini "")
"""
# The project has another source for the node. Also pytest-xdist's workers read this.
USES_FAKE = """
from pathlib import Path
from traincert.regtest.build import PATCHED
object.__setattr__(PATCHED, "source", Path("{tree}"))
object.__setattr__(PATCHED, "patch", Path("{patch}"))
"""
OUTSIDE_PROJECT = Path(__file__).parents[2] / "examples/outside-project"


@pytest.fixture
def builds(
    pytester: pytest.Pytester, node_programs: Path, tree: Path, patch: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The outside project in pytester's folder, and the empty cache into which its pytest builds a node."""
    (tree / "CMakeLists.txt").write_text(COPIES.format(programs=node_programs))
    shutil.copytree(OUTSIDE_PROJECT, pytester.path, dirs_exist_ok=True)
    pytester.makeconftest(USES_FAKE.format(tree=tree, patch=patch))
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))  # instead of pip install
    cache = pytester.mkdir("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "traincert"


@pytest.mark.parametrize("options", [[], ["--quiet", "--quiet", "-n", "2"]], ids=["alone", "quiet, two workers"])
def test_a_build_is_told_at_once_and_shows_how_far_it_is(
    pytester: pytest.Pytester, builds: Path, options: list[str]
) -> None:
    result = pytester.runpytest_subprocess(f"--basetemp={pytester.path}/t", *options)
    assert result.ret == 0
    lines = result.errlines if options else result.outlines  # workers have only stderr
    (log,) = (builds / "logs").iterdir()
    begin = f"traincert builds bitcoind, once. On two cores it takes up to a quarter of an hour. Log: {log}"
    (at,) = (number for number, line in enumerate(lines) if line.endswith(begin))
    steps = [line for line in lines[at:] if not line.endswith("node: waiting for another build")]
    assert steps[1:4] == ["node: unpacking", "node: configuring", "node: compiling 10 %"]
    assert "node: compiling 100 %" in steps
    assert len(steps) == len(set(steps))
    again = pytester.runpytest_subprocess(f"--basetemp={pytester.path}/t", *options)
    assert again.ret == 0
    assert "traincert builds" not in again.stdout.str() + again.stderr.str()


def test_bitcoind_that_is_not_there_is_told_at_once(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("--bitcoind=nowhere/bitcoind")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --bitcoind nowhere/bitcoind: no such file"])


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "a worker"])
def test_timeouts_are_multiplied(pytester: pytest.Pytester, workers: list[str]) -> None:
    pytester.makepyfile("""
        import pytest
        from traincert.regtest import WaitTimeoutError, wait_for

        def test_waits_longer():
            with pytest.raises(WaitTimeoutError, match="^waited 0.2 s for rain$"):
                wait_for(lambda: False, 0.1, "rain")
    """)
    pytester.runpytest_subprocess("--timeout-factor=2", *workers).assert_outcomes(passed=1)
    result = pytester.runpytest_subprocess("--timeout-factor=0")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--timeout-factor: invalid _factor value: '0'*"])
