"""The fixtures, in an inner pytest as another project's tests would use them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


def test_fixtures_give_nodes_and_leave_none(pytester: pytest.Pytester, node_programs: Path) -> None:
    pytester.makepyfile("""
        def test_one_node(bitcoind):
            assert bitcoind.rpc("getblockcount") == 0

        def test_networks(bitcoin_network):
            first, second = bitcoin_network(2), bitcoin_network(1, {"uacomment": "second"})
            assert first.nodes[0].rpc("getconnectioncount") == 1
            assert "second" in second.nodes[0].rpc("getnetworkinfo")["subversion"]
    """)
    result = pytester.runpytest_subprocess(f"--bitcoind={node_programs / 'bitcoind'}", f"--basetemp={pytester.path}/t")
    result.assert_outcomes(passed=2)
    assert sorted(path.parent.name for path in pytester.path.rglob("bitcoin.conf")) == ["node0"] * 3 + ["node1"]
    assert not list(pytester.path.rglob("bitcoind.pid"))  # bitcoind removes it when it stops in good order


def test_failing_test_shows_the_nodes_last_words(pytester: pytest.Pytester, node_programs: Path) -> None:
    pytester.makepyfile("""
        def test_fails(bitcoind):
            assert bitcoind.rpc("getblockcount") == 1
    """)
    result = pytester.runpytest_subprocess(f"--bitcoind={node_programs / 'bitcoind'}", f"--basetemp={pytester.path}/t")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*node0: end of debug.log*", "*Z *"])
    assert not list(pytester.path.rglob("bitcoind.pid"))
