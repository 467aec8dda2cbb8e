"""`traincert network`, as its users run it: one command after the other, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from traincert.regtest import wait_for
from traincert.regtest.node import free_ports

TRAINCERT = Path(sys.executable).with_name("traincert")
Run = Callable[..., subprocess.CompletedProcess[str]]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command in a folder of the test's own."""
    command = [str(TRAINCERT), "network", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def nodes_in(folder: Path) -> list[psutil.Process]:
    """The processes with a folder on their command line."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if str(folder) in " ".join(process.info["cmdline"] or []) and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A function that runs commands; the networks in the folder are taken down in the end."""

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(TRAINCERT), "network", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    yield run
    for state in list(tmp_path.glob("*/network.json")):
        run("down", "--dir", str(state.parent))
    assert nodes_in(tmp_path) == []


@pytest.fixture
def up(run: Run, node_programs: Path) -> Run:
    """The same, with a network of two nodes."""
    run("up", "--nodes", "2", "--bitcoind", str(node_programs / "bitcoind"))
    return run


def status(run: Run, *arguments: str) -> dict[str, dict[str, Any]]:
    answer = json.loads(run("status", "--json", *arguments).stdout)
    return {node["name"]: node for node in answer["nodes"]}


def test_network_stays_until_it_is_taken_down(up: Run, tmp_path: Path) -> None:
    assert up("cli", "node1", "getblockcount").stdout == "0\n"
    assert up("cli", "0", "-named", "getblockhash", "height=0").stdout.startswith("0f9188f1")
    assert up("cli", "0", "getblockhash", "77", code=8).stderr.startswith("error code: -8")
    assert [json.loads(up("cli", name, "getblockchaininfo").stdout)["initialblockdownload"] for name in "01"] == [
        False
    ] * 2
    shown = up("status").stdout
    assert "node0" in shown
    assert "running" in shown
    up("stop", "node1")
    assert [node["state"] for node in status(up).values()] == ["running", "stopped"]
    up("stop")
    assert nodes_in(tmp_path) == []
    up("start")
    assert [node["state"] for node in status(up).values()] == ["running", "running"]
    up("down")
    assert list(tmp_path.iterdir()) == []


def test_two_networks_run_side_by_side(up: Run, node_programs: Path) -> None:
    up("up", "--dir", "other", "--nodes", "3", "--topology", "line", "--bitcoind", str(node_programs / "bitcoind"))
    up("mine", "--dir", "other", "5")
    assert [node["height"] for node in status(up).values()] == [0, 0]
    wait_for(lambda: {node["height"] for node in status(up, "--dir", "other").values()} == {5}, 30, "the blocks")
    assert status(up, "--dir", "other")["node1"]["peers"] == ["node0", "node2"]
    up("down", "--dir", "other")
    assert [node["state"] for node in status(up).values()] == ["running", "running"]


def test_nodes_keep_their_options_and_ports(run: Run, node_programs: Path) -> None:
    base = free_ports(1)[0]
    options = ["txindex=1", "uacomment=a", "uacomment=b", "1:uacomment=own", "node1:rest=1"]
    arguments = [word for option in options for word in ("--option", option)]
    bitcoind = str(node_programs / "bitcoind")
    run("up", "--nodes", "2", "--bitcoind", bitcoind, "--rpc-port-base", str(base), *arguments)
    for _ in range(2):
        assert [node["rpc_port"] for node in status(run).values()] == [base, base + 1]
        assert "txindex" in run("cli", "0", "getindexinfo").stdout
        assert "(node0; a; b)" in run("cli", "0", "getnetworkinfo").stdout
        assert "(node1; own)" in run("cli", "1", "getnetworkinfo").stdout
        run("stop")
        run("start")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--option", "txindex"], 2, "txindex is not KEY=VALUE or NODE:KEY=VALUE"),
        (["--option", ":txindex=1"], 2, ":txindex=1 is not KEY=VALUE"),
        (["--option", "txidnex=1"], 1, "has no option txidnex"),
        (["--option", "server=0"], 1, "option server cannot be set"),
        (["--option", "node7:txindex=1"], 1, "there is no node node7: there are node0 to node1"),
        (["--option", "rpcport=18443"], 1, "option rpcport: two nodes cannot have the same port"),
        (["--option", "0:rpcport=1", "--rpc-port-base", "18443"], 2, "rpcport: --rpc-port-base sets it"),
        (["--option", "mocktime=1"], 2, "mocktime: traincert network time sets it"),
        (["--training", "--option", "traininground=1"], 2, "traininground: --training sets it"),
    ],
)
def test_option_that_would_be_ignored_is_refused(
    arguments: list[str], code: int, said: str, run: Run, node_programs: Path, tmp_path: Path
) -> None:
    answer = run("up", "--nodes", "2", "--bitcoind", str(node_programs / "bitcoind"), *arguments, code=code)
    assert said in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_network_whose_nodes_are_not_all_linked(run: Run, node_programs: Path, tmp_path: Path) -> None:
    (tmp_path / "links").write_text("0 1\n")
    run("up", "--fees", "--topology", "links", "--bitcoind", str(node_programs / "bitcoind"))
    assert json.loads(run("cli", "1", "estimatesmartfee", "6").stdout)["feerate"] > 0
    run("mine", "--node", "2", "--address", "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202", "3")
    assert status(run)["node2"]["height"] == 3
    assert status(run)["node2"]["peers"] == []


def test_nodes_start_without_the_first_one(up: Run) -> None:
    up("mine", "101")
    up("time", "+2d")
    up("stop")
    up("start", "node1")
    assert [node["state"] for node in status(up).values()] == ["stopped", "running"]


def test_many_blocks_and_a_reorganisation(up: Run) -> None:
    up("mine", "250")
    old = up("cli", "0", "getbestblockhash").stdout
    new = up("reorg", "3").stdout
    assert new != old
    wait_for(lambda: {node["tip"] for node in status(up).values()} == {new.strip()}, 30, "the new chain on both nodes")
    assert status(up)["node1"]["height"] == 251
    assert "Block height out of range" in up("reorg", "999", code=1).stderr


def test_timeouts_are_multiplied(up: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    up("--timeout-factor", "2", "mine", "1")
    assert "0 is not in the range" in up("--timeout-factor", "0", "mine", "1", code=2).stderr
    monkeypatch.setenv("TRAINCERT_TIMEOUT_FACTOR", "x")
    assert "TRAINCERT_TIMEOUT_FACTOR=x in the environment is no positive number" in up("mine", "1", code=1).stderr


def test_network_whose_state_file_is_empty_can_be_taken_down(up: Run, tmp_path: Path) -> None:
    (tmp_path / "network/network.json").write_text("")
    for verb in (["status"], ["stop"], ["mine", "1"]):
        assert "network.json is damaged: traincert network down ends" in up(*verb, code=1).stderr
    up("down")
    assert list(tmp_path.iterdir()) == []


def test_every_fault_is_shown_and_undone_by_its_opposite(up: Run) -> None:
    up("partition", "node0|node1")
    assert status(up)["node0"]["faults"] == ["cut off from node1"]
    up("heal")
    up("delay", "1", "0", "20ms")
    assert status(up)["node0"]["faults"] == ["node1 20 ms late"]
    up("delay", "node0", "node1", "0")
    up("pause", "node1")
    assert status(up)["node1"]["state"] == "paused"
    up("resume", "node1")
    up("kill", "node1")
    assert status(up)["node1"]["state"] == "died"
    up("start", "node1")
    up("disk-full", "0")
    up("corrupt", "0")
    assert [fault.split(":")[0] for fault in status(up)["node0"]["faults"]] == ["disk full", "corrupt"]
    up("repair", "0")
    up("disk-free", "0")
    assert [(node["state"], node["faults"], node["peers"]) for node in status(up).values()] == [
        ("running", [], ["node1"]),
        ("running", [], ["node0"]),
    ]


def test_node_that_its_fault_has_stopped_is_started_by_the_opposite_which_says_so(up: Run) -> None:
    up("mine", "2")
    assert up("disk-free", "0").stderr == ""  # it ran
    up("disk-full", "0")
    up("mine", "1", code=3)
    assert status(up)["node0"]["state"] in ("died", "stopped")
    assert "node0 cannot start: its disk is full" in up("start", code=1).stderr
    assert up("disk-free", "0").stderr == "node0 did not run: it was started again\n"
    up("corrupt", "1")
    up("stop", "1")
    up("start", "1", code=1)
    up("disk-full", "1")
    assert up("repair", "1").stderr == ("node1 does not run, and cannot start yet: traincert network disk-free node1\n")
    up("corrupt", "1")
    assert up("disk-free", "1").stderr == "node1 does not run, and cannot start yet: traincert network repair node1\n"
    assert up("repair", "1").stderr == "node1 did not run: it was started again\n"
    assert [(node["height"], node["peers"]) for node in status(up).values()] == [(2, ["node1"]), (2, ["node0"])]


def test_start_makes_no_block_and_tells_of_paused_nodes(up: Run) -> None:
    up("mine", "2")
    wait_for(lambda: {node["height"] for node in status(up).values()} == {2}, 30, "the blocks")
    up("stop")
    assert up("start").stderr == ""
    up("pause", "1")
    assert up("start").stderr == "node1 is paused: traincert network resume node1\n"
    up("resume", "1")
    assert [(node["state"], node["height"]) for node in status(up).values()] == [("running", 2)] * 2


def test_nodes_started_with_bitcoind_alone_find_each_other(up: Run, node_programs: Path, tmp_path: Path) -> None:
    ports = {name: node["rpc_port"] for name, node in status(up).items()}
    up("stop")
    for name in ("node1", "node0"):
        command = [str(node_programs / "bitcoind"), f"-datadir={tmp_path / 'network' / name}", "-daemonwait"]
        subprocess.run(command, check=True, capture_output=True)
    wait_for(lambda: status(up)["node1"]["peers"] == ["node0"], 30, "the nodes to find each other")
    assert {name: node["rpc_port"] for name, node in status(up).items()} == ports
    up("partition", "0|1")
    assert [node["peers"] for node in status(up).values()] == [[], []]


def test_time_is_set_and_let_go(up: Run) -> None:
    up("time", "2030-01-01")
    up("time", "+1h")
    up("mine", "1")
    tip = json.loads(up("cli", "0", "getblockheader", up("cli", "0", "getbestblockhash").stdout.strip()).stdout)
    assert tip["time"] == 1_893_456_000 + 3600
    assert "all clocks stand at 2030-01-01 01:00:00 UTC" in up("status").stdout
    up("stop")
    for when in ("real", "2029-12-31"):
        assert "node0 has a block of 2030-01-01 01:00:00 UTC" in up("time", when, code=1).stderr
    up("start")
    assert "2030-13-01 is none of +1h, 2030-01-01 and real" in up("time", "2030-13-01", code=2).stderr
    up("time", "2031-01-01T12:00")


def test_faucet_funds_an_address(up: Run) -> None:
    up("cli", "1", "createwallet", "mine")
    address = up("cli", "1", "getnewaddress").stdout.strip()
    answer = up("fund", address, "2.5")
    assert answer.stderr == "101 blocks were made first, which pay the faucet\n"
    txid = answer.stdout.strip()
    paid = json.loads(up("cli", "1", "gettransaction", txid).stdout)
    assert (paid["amount"], paid["confirmations"]) == (2.5, 1)
    assert up("cli", "0", "getblockcount").stdout == "102\n"
    assert up("fund", address, "1").stderr == ""  # the faucet has coins
    assert "x is not a regtest address" in up("fund", "x", "1", code=1).stderr
    for amount in ("x", "0", "-1", "nan", "1e9"):
        assert f"{amount} is no amount of BTC" in up("fund", "--", address, amount, code=2).stderr


def test_snapshot_and_restore(up: Run) -> None:
    up("mine", "2")
    up("snapshot", "three")
    up("mine", "4")
    up("restore", "three")
    assert [node["height"] for node in status(up).values()] == [2, 2]
    assert "there is no snapshot four; there are: three" in up("restore", "four", code=1).stderr


def test_training_network_is_mined_by_certificates_that_say_nothing_was_trained(run: Run, tmp_path: Path) -> None:
    run("up", "--nodes", "2", "--training", "--start-height", "3")
    run("mine", "5")
    run("mine", "--node", "1", "1")
    shown = subprocess.check_output([TRAINCERT, "chain", "--json", "--datadir", tmp_path / "network/node1"])
    chain = json.loads(shown)  # every rule was checked
    assert [block["height"] for block in chain] == [3, 4, 5, 6]
    assert {block["award"] for block in chain} == {"appointed"}
    assert {block["contributions_count"] for block in chain} == {block["params_trained"] for block in chain} == {0}
    for key in tmp_path.glob("network/owned/keys/*"):
        assert key.stat().st_mode & 0o777 == 0o600
    run("snapshot", "five")
    run("mine", "2")
    run("restore", "five")
    run("mine", "3")  # the coordinator's journal is as it was, too
    run("cli", "0", "createwallet", "mine")
    run("fund", run("cli", "0", "getnewaddress").stdout.strip(), "1")
    assert {node["state"] for node in status(run).values()} == {"running"}


def test_env_gives_functions_of_the_nodes_names(up: Run) -> None:
    script = up("env").stdout + "node1 getblockcount"
    assert subprocess.check_output(["/bin/sh", "-c", script]) == b"0\n"


def test_env_gives_a_configuration_for_fork_observer(up: Run, tmp_path: Path) -> None:
    conf = tomllib.loads(up("env", "--fork-observer").stdout)
    # These its config.rs asks for.
    assert {"address", "database_path", "www_path", "query_interval", "footer_html", "networks"} == set(conf)
    (network,) = conf["networks"]
    known = {"id", "name", "description", "min_fork_height", "max_interesting_heights", "nodes"}
    assert set(network) == known
    assert network["name"] == "network"
    assert [(node["id"], node["name"]) for node in network["nodes"]] == [(0, "node0"), (1, "node1")]
    for node in network["nodes"]:
        login = Path(node["rpc_cookie_file"]).read_text().partition(":")
        url = f"http://{node['rpc_host']}:{node['rpc_port']}"
        call = {"id": 0, "method": "getnetworkinfo", "params": []}
        answer = requests.post(url, json=call, auth=(login[0], login[2]), timeout=30).json()
        assert node["name"] in answer["result"]["subversion"]
    folder = tmp_path / 'a "name" with \\'
    up(
        "up",
        "--dir",
        str(folder),
        "--nodes",
        "1",
        "--bitcoind",
        json.loads((tmp_path / "network/network.json").read_text())["made_of"]["bitcoind"],
    )
    conf = tomllib.loads(up("env", "--fork-observer", "--dir", str(folder)).stdout)
    assert conf["networks"][0]["name"] == folder.name


def test_logs_show_the_end_and_follow(up: Run, tmp_path: Path) -> None:
    assert "node0/regtest/debug.log" in up("logs").stdout
    assert "node1" not in up("logs", "node0").stdout
    with start(tmp_path, "logs", "-f", "node1") as following:
        lines = following.stdout
        assert lines is not None
        up("mine", "1")
        wait_for(lambda: "height=1 " in lines.readline(), 30, "the line of the new block")
        following.terminate()
        following.communicate()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["kill", "node7"], 1, "there is no node node7: there are node0 to node1"),
        (["delay", "0", "1", "fast"], 2, "fast is no duration such as 200ms, 1.5s or 0"),
        (["partition", "0|0"], 1, "node0 is in two groups"),
        (["pause", "node0", "--dir", "nowhere"], 1, "there is no network in "),
        (["up"], 1, "there is a network in "),
        (["snapshot", "../x"], 1, "is no name for a snapshot"),
        (["repair", "0"], 1, "node0 is not corrupt"),
        (["delay", "0", "1", "16s"], 1, "a link cannot be 16 s slow, but up to 10 s"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], code: int, said: str, up: Run) -> None:
    error = up(*arguments, code=code).stderr
    assert said in error


def test_training_network_needs_the_patched_node(run: Run, stock_programs: Path, tmp_path: Path) -> None:
    bitcoind = stock_programs / "bitcoind"
    error = run("up", "--nodes", "1", "--training", "--bitcoind", str(bitcoind), code=1).stderr
    assert error.splitlines()[-1] == (
        f"traincert: node0: {bitcoind} has no option trainingbeacon, trainingkeys, trainingmodel, traininground"
    )
    assert list(tmp_path.iterdir()) == []


def test_failed_start_leaves_nothing(run: Run, tmp_path: Path) -> None:
    wrong = tmp_path / "bin/bitcoind"
    wrong.parent.mkdir()
    wrong.write_text("#!/bin/sh\necho no good >&2\nexit 3\n")
    wrong.chmod(0o755)
    error = run("up", "--bitcoind", str(wrong), code=1).stderr
    assert "node0 did not start (exit code 3): no good" in error
    assert not (tmp_path / "network").exists()
    assert nodes_in(tmp_path / "network") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.usefixtures("run")
def test_interrupted_start_leaves_nothing(number: int, node_programs: Path, tmp_path: Path) -> None:
    with start(tmp_path, "up", "--nodes", "4", "--bitcoind", str(node_programs / "bitcoind")) as starting:
        wait_for(lambda: list(tmp_path.glob("network/node*/regtest/.lock")), 30, "a node to be under way")
        os.kill(starting.pid, number)
        _, error = starting.communicate()
    assert starting.returncode == 130
    assert error.splitlines()[-1] == "traincert: interrupted"
    assert not (tmp_path / "network").exists()
    assert nodes_in(tmp_path / "network") == []


def test_commands_wait_for_a_network_that_is_coming_up(run: Run, node_programs: Path, tmp_path: Path) -> None:
    slow = tmp_path / "bin/bitcoind"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec {node_programs / "bitcoind"} "$@"\n')
    slow.chmod(0o755)
    with start(tmp_path, "up", "--nodes", "2", "--bitcoind", str(slow)) as starting:
        wait_for((tmp_path / "network" / "node0").exists, 60, "the first node to start")
        run("stop")
        starting.communicate()
    assert starting.returncode == 0
    assert [node["state"] for node in status(run).values()] == ["stopped", "stopped"]


def test_start_that_was_killed_can_be_taken_down(run: Run, node_programs: Path, tmp_path: Path) -> None:
    with start(tmp_path, "up", "--nodes", "4", "--bitcoind", str(node_programs / "bitcoind")) as starting:
        wait_for(lambda: list(tmp_path.glob("network/node*/regtest/.lock")), 30, "a node to be under way")
        starting.kill()
        starting.communicate()
    run("down")
    assert list(tmp_path.iterdir()) == []
