"""One real node: started, stopped, killed, and told from strangers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest
import requests

from traincert.regtest import node as node_module
from traincert.regtest.errors import NodeError, NodeUnreachableError, RpcError, WaitTimeoutError
from traincert.regtest.node import Node, Options, free_ports, wait_for
from traincert.regtest.processes import find_by_argument

# Starts a node in another process, prints the node's pid, and waits for its own end.
HOLD_NODE = """\
import sys
from pathlib import Path
from traincert.regtest.node import Node
node = Node(Path(sys.argv[1]), Path(sys.argv[2]), keep=sys.argv[3] == "keep")
node.start()
print(node.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def node(node_programs: Path, tmp_path: Path) -> Node:
    """A node that was not started."""
    return Node(node_programs / "bitcoind", tmp_path / "node0")


@pytest.fixture
def cli(node_programs: Path) -> Path:
    return node_programs / "bitcoin-cli"


def running(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_bitcoin_cli_needs_the_data_directory_alone(bitcoind: Node, cli: Path) -> None:
    answer = subprocess.check_output([cli, f"-datadir={bitcoind.datadir}", "getblockcount"])
    assert answer == b"0\n"


def test_options_reach_the_node(node_programs: Path, tmp_path: Path) -> None:
    options = {"uacomment": ["first", "second"], "dbcache": "8", "disablewallet": "1"}
    with Node(node_programs / "bitcoind", tmp_path / "node0", options) as node:
        assert "(first; second)" in node.rpc("getnetworkinfo")["subversion"]
        conf = (node.datadir / "bitcoin.conf").read_text().splitlines()
    assert [line for line in conf if line.startswith("dbcache")] == ["dbcache=8"]


@pytest.mark.parametrize("value", ["a#b", "a\nb"])
def test_value_that_the_conf_cannot_hold_is_refused(value: str, node_programs: Path, tmp_path: Path) -> None:
    node = Node(node_programs / "bitcoind", tmp_path / "node0", {"uacomment": value})
    with pytest.raises(NodeError, match=r"node0: option uacomment: bitcoin.conf cannot hold"):
        node.start()


def test_stop_and_start_keep_chain_and_ports(bitcoind: Node) -> None:
    bitcoind.rpc("generatetodescriptor", 3, "raw(51)")
    ports, pid = (bitcoind.rpc_port, bitcoind.p2p_port), bitcoind.pid
    assert pid is not None
    bitcoind.restart()
    assert bitcoind.rpc("getblockcount") == 3
    assert (bitcoind.rpc_port, bitcoind.p2p_port) == ports
    assert bitcoind.pid != pid
    assert not running(pid)


def test_killed_node_starts_again(bitcoind: Node) -> None:
    bitcoind.kill()
    assert bitcoind.pid is None
    assert bitcoind.cookie_file.exists()  # as a power failure leaves it
    bitcoind.start()
    assert bitcoind.rpc("getblockcount") == 0


def test_stop_twice_is_harmless_and_a_node_that_ended_is_told(bitcoind: Node, caplog: pytest.LogCaptureFixture) -> None:
    pid = bitcoind.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: bitcoind.pid is None, 10, "the node to end")
    bitcoind.stop()
    bitcoind.stop()
    assert caplog.messages == ["node0 had already ended (killed by SIGKILL)"]


def test_node_that_does_not_stop_is_killed(
    bitcoind: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pid = bitcoind.pid
    assert pid is not None
    monkeypatch.setattr(node_module, "STOP_TIMEOUT", 1)
    monkeypatch.setattr(node_module, "RPC_TIMEOUT", 1)
    monkeypatch.setattr(Node, "resume", lambda _: None)
    bitcoind.pause()
    bitcoind.stop()
    assert caplog.messages == ["node0 did not stop within 1 s: killed"]
    assert not running(pid)


def test_paused_node_answers_nobody_until_it_goes_on(bitcoind: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    bitcoind.pause()
    assert bitcoind.paused
    with monkeypatch.context() as patch:
        patch.setattr(node_module, "RPC_TIMEOUT", 0.3)
        with pytest.raises(NodeUnreachableError, match=r"node0 at .*: getblockcount: .*timed out"):
            bitcoind.rpc("getblockcount")
    bitcoind.resume()
    bitcoind.resume()
    assert not bitcoind.paused
    assert bitcoind.rpc("getblockcount") == 0
    bitcoind.pause()
    pid = bitcoind.pid
    bitcoind.stop()  # in good order
    assert pid is not None
    assert not running(pid)
    assert bitcoind.log_tail(1).endswith("Shutdown done")
    with pytest.raises(NodeError, match="node0 is not running"):
        bitcoind.pause()


def test_node_whose_disk_is_full_ends_and_keeps_what_it_had(bitcoind: Node) -> None:
    bitcoind.rpc("generatetodescriptor", 3, "raw(51)")
    bitcoind.restart()
    bitcoind.fill_disk()
    with pytest.raises(NodeError):
        bitcoind.rpc("generatetodescriptor", 1, "raw(51)")
    wait_for(lambda: bitcoind.pid is None, 30, "the node to end")
    with pytest.raises(NodeError, match="node0 cannot start: its disk is full"):
        bitcoind.start()
    bitcoind.free_disk()
    bitcoind.start()
    assert bitcoind.rpc("getblockcount") == 3


def test_disk_that_is_freed_in_time_does_no_harm(bitcoind: Node) -> None:
    bitcoind.fill_disk()
    bitcoind.free_disk()
    assert len(bitcoind.rpc("generatetodescriptor", 1, "raw(51)")) == 1


def test_kept_node_is_taken_over_by_its_data_directory(node: Node) -> None:
    command = [sys.executable, "-c", HOLD_NODE, str(node.bitcoind), str(node.datadir), "keep"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        holder.kill()
    assert node.attach()
    assert node.pid == pid
    assert node.rpc("getblockcount") == 0
    node.stop()
    assert not running(pid)
    assert not node.attach()


def test_stranger_with_the_nodes_process_id_is_not_taken_for_it(node: Node) -> None:
    """As after a crash or a reboot: the pid file is there, and its number has been given to somebody else."""
    datadir = f"-datadir={node.datadir}"
    with subprocess.Popen([sys.executable, "-c", "input()", datadir], stdin=subprocess.PIPE) as stranger:
        pid_file = node.chain_dir / "bitcoind.pid"
        pid_file.parent.mkdir(parents=True)
        pid_file.write_text(f"{stranger.pid}\n")
        (pid_file.parent / ".lock").touch()
        assert not node.attach()
        node.stop()
        node.kill()
        assert stranger.poll() is None
        stranger.communicate(b"\n")


def test_node_is_found_after_a_step_of_the_machines_clock(bitcoind: Node) -> None:
    """Its files then seem to be older than its process, or from the future."""
    other = Node(bitcoind.bitcoind, bitcoind.datadir)
    for age in (20, -20):
        for file in bitcoind.chain_dir.iterdir():
            os.utime(file, (time.time() - age,) * 2)
        assert other.attach()
        assert (other.pid, other.died) == (bitcoind.pid, False)


def test_node_is_found_by_another_name_of_its_folder(bitcoind: Node, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bitcoind.datadir)
    other = Node(bitcoind.bitcoind, tmp_path / "link")
    assert other.attach()
    assert other.pid == bitcoind.pid


@pytest.mark.parametrize(
    ("command", "said"),
    [('"$@"', "started the node as another process: a script must use exec"), ('"$@" -daemon', "did not start")],
)
def test_node_that_is_not_the_process_that_was_started_is_ended(
    command: str, said: str, node: Node, tmp_path: Path
) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f"#!/bin/sh\n{node.bitcoind} {command}\n")
    wrapper.chmod(0o755)
    with pytest.raises(NodeError, match=said):
        Node(wrapper, node.datadir).start()
    assert find_by_argument(f"-datadir={node.datadir}") == []


STOPS_AT_EXIT = """\
import atexit, sys
from pathlib import Path
from traincert.regtest.node import Node
node = Node(Path(sys.argv[1]), Path(sys.argv[2]))
node.start()
atexit.register(node.stop)
node.mine(3)
"""


def test_node_can_be_stopped_when_python_exits(node: Node) -> None:
    command = [sys.executable, "-c", STOPS_AT_EXIT, str(node.bitcoind), str(node.datadir)]
    subprocess.run(command, check=True)
    with node:
        assert node.rpc("getblockcount") == 3


def test_node_starts_in_a_process_that_was_forked(bitcoind: Node, tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            with Node(bitcoind.bitcoind, tmp_path / "child") as node:
                node.rpc("getblockcount")
            os._exit(0)
        finally:
            os._exit(1)
    wait_for(lambda: os.waitpid(child, os.WNOHANG)[0] == child, 60, "the child to end")
    assert "Shutdown done" in (tmp_path / "child/regtest/debug.log").read_text()


def test_errors_of_the_node_carry_code_and_method(bitcoind: Node) -> None:
    with pytest.raises(RpcError) as raised:
        bitcoind.rpc("getblockhash", 7)
    assert str(raised.value) == "node0: getblockhash: Block height out of range (RPC error -8)"
    assert (raised.value.node, raised.value.method, raised.value.code) == ("node0", "getblockhash", -8)


def test_arguments_have_names_and_amounts_are_exact(bitcoind: Node) -> None:
    bitcoind.rpc("createwallet", "a #/b")
    address = bitcoind.rpc("getnewaddress", wallet="a #/b")
    hashes = bitcoind.mine(101, address)
    assert bitcoind.rpc("getblockhash", height=101) == hashes[-1]
    assert bitcoind.rpc("getblock", hashes[0], verbosity=1)["height"] == 1
    amount = Decimal("0.00012345")
    txid = bitcoind.rpc("sendtoaddress", address=address, amount=amount, wallet="a #/b")
    outputs = bitcoind.rpc("getrawtransaction", txid, True)["vout"]
    assert amount in [output["value"] for output in outputs]
    with pytest.raises(TypeError, match="an argument of RPC cannot be of type PosixPath"):
        bitcoind.rpc("getblock", Path())


def test_blocks_are_made_in_calls_of_a_hundred(bitcoind: Node) -> None:
    assert len(set(bitcoind.mine(201))) == bitcoind.rpc("getblockcount") == 201


def test_call_and_wait_have_the_time_that_they_are_given(bitcoind: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NodeUnreachableError, match=r"waitfornewblock: .*\(read timeout=0.1\)"):
        bitcoind.rpc("waitfornewblock", rpc_timeout=0.1)
    monkeypatch.setenv("TRAINCERT_TIMEOUT_FACTOR", "2")
    with pytest.raises(NodeUnreachableError, match=r"waitfornewblock: .*\(read timeout=0.2\)"):
        bitcoind.rpc("waitfornewblock", rpc_timeout=0.1)
    with pytest.raises(WaitTimeoutError, match=r"^waited 0.1 s for rain$"):
        wait_for(lambda: False, 0.05, "rain")
    for wrong in ("x", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("TRAINCERT_TIMEOUT_FACTOR", wrong)
        with pytest.raises(
            NodeError, match=f"TRAINCERT_TIMEOUT_FACTOR={wrong} in the environment is no positive number"
        ):
            bitcoind.rpc("getblockcount")
    monkeypatch.undo()


def test_answer_that_is_not_json_is_shown(node_programs: Path, tmp_path: Path) -> None:
    options = {"rpcthreads": 1, "rpcworkqueue": 1}
    with Node(node_programs / "bitcoind", tmp_path / "node0", options) as node:

        def call(_: int) -> str:
            try:
                node.rpc("waitforblockheight", 1, 200)
            except NodeUnreachableError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(max_workers=8) as pool:
            said = "".join(pool.map(call, range(8)))
    assert "HTTP status 503, not a JSON-RPC answer: Work queue depth exceeded" in said


def test_two_hundred_calls_at_a_time_are_answered(bitcoind: Node) -> None:
    with ThreadPoolExecutor(max_workers=200) as pool:
        assert set(pool.map(lambda _: bitcoind.rpc("getblockcount"), range(400))) == {0}


def test_node_that_was_killed_is_told_by_the_next_call(bitcoind: Node) -> None:
    assert bitcoind.pid is not None
    os.kill(bitcoind.pid, signal.SIGKILL)
    with pytest.raises(NodeUnreachableError, match=r"getblockcount: node0 has ended \(killed by SIGKILL\)"):
        bitcoind.rpc("getblockcount")
    bitcoind.kill()


def test_wallets_come_back_after_a_restart(bitcoind: Node) -> None:
    for name in ("a # b", "c", "d"):
        bitcoind.rpc("createwallet", name)
    bitcoind.rpc("unloadwallet", "c")
    bitcoind.restart()
    assert sorted(bitcoind.rpc("listwallets")) == ["a # b", "d"]
    bitcoind.rpc("unloadwallet", "d")
    bitcoind.restart()
    assert bitcoind.rpc("listwallets") == ["a # b"]


def test_node_without_wallets_stops_in_good_order(node_programs: Path, tmp_path: Path) -> None:
    with Node(node_programs / "bitcoind", tmp_path / "node0", {"disablewallet": True}) as node:
        node.mine(2)
        node.restart()
        assert node.rpc("getblockcount") == 2


def test_ready_means_that_blocks_and_mempool_are_read(chain_snapshot: Node) -> None:
    for _ in range(50):
        chain_snapshot.rpc("sendtoaddress", chain_snapshot.rpc("getnewaddress"), 1)
    chain_snapshot.options = {**chain_snapshot.options, "reindex": True}
    chain_snapshot.restart()
    assert chain_snapshot.rpc("getblockcount") == 250
    assert len(chain_snapshot.rpc("getrawmempool")) == 50


def test_stopped_node_is_unreachable(bitcoind: Node) -> None:
    bitcoind.stop()
    with pytest.raises(NodeUnreachableError, match="node0 is not running"):
        bitcoind.rpc("getblockcount")


def test_bad_option_gives_the_nodes_own_words(node_programs: Path, tmp_path: Path) -> None:
    node = Node(node_programs / "bitcoind", tmp_path / "node0", {"assumevalid": "zz"})
    with pytest.raises(NodeError, match=r"node0 did not start \(exit code 1\): Error: Invalid assumevalid .*\(zz\)"):
        node.start()
    assert node.pid is None


def test_options_are_text_numbers_and_truth_values(node_programs: Path, tmp_path: Path) -> None:
    options: Options = {
        "txindex": True,
        "rest": False,
        "maxconnections": 7,
        "fallbackfee": 0.00001,
        "uacomment": ["a", 1],
    }
    with Node(node_programs / "bitcoind", tmp_path / "node0", options) as node:
        conf = (node.datadir / "bitcoin.conf").read_text().splitlines()
    wanted = {"txindex=1", "rest=0", "maxconnections=7", "fallbackfee=0.00001", "uacomment=a", "uacomment=1"}
    assert wanted <= set(conf)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"txindex": None}, "option txindex: None is neither text nor a number"),
        ({"server": 0}, "option server cannot be set: traincert needs it as it is"),
        ({"noserver": 1}, "option noserver cannot be set"),
        ({"pid": "elsewhere"}, "option pid cannot be set"),
        ({"rpccookiefile": "elsewhere"}, "option rpccookiefile cannot be set"),
        ({"daemon": 1}, "option daemon cannot be set"),
        ({"rpcbind": "::"}, "option rpcbind cannot be set"),
        ({"-txindex": 1}, "'-txindex' is no option's name"),
        ({"main.txindex": 1}, "'main.txindex' is no option's name"),
        ({"txidnex": 1}, "has no option txidnex"),
        ({"rpcuser": "me"}, "the options rpcuser and rpcpassword need each other"),
        ({"rpcport": "x"}, "option rpcport: x is no port"),
        ({"port": 65536}, "option port: 65536 is no port"),
    ],
)
def test_option_that_cannot_be_used_is_named(options: Options, said: str, node: Node) -> None:
    node.options = options
    with pytest.raises(NodeError, match=f"^node0: .*{said}"):
        node.start()
    assert not node.pid


def test_node_that_answers_us_nothing_is_told_with_its_reason(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "START_TIMEOUT", 2)
    node.options = {"rpcwhitelistdefault": True, "rpcwhitelist": "somebody:stop"}
    with pytest.raises(WaitTimeoutError, match=r"node0 to answer RPC; last seen: .*getmempoolinfo: HTTP status 403"):
        node.start()


def test_ports_and_login_can_be_chosen(node_programs: Path, tmp_path: Path) -> None:
    rpc_port, port = free_ports(2)
    options: Options = {"rpcport": rpc_port, "port": port, "rpcuser": "me", "rpcpassword": "secret"}
    with Node(node_programs / "bitcoind", tmp_path / "node0", options) as node:
        assert (node.rpc_port, node.p2p_port) == (rpc_port, port)
        node.restart()
        call = {"method": "getnetworkinfo", "params": []}
        answer = requests.post(f"http://127.0.0.1:{rpc_port}", json=call, auth=("me", "secret"), timeout=30)
        assert answer.json()["result"]["localservices"]
        assert node.rpc("getblockcount") == 0  # by the cookie
        assert "secret" not in (node.datadir / "bitcoin.conf").read_text()


def test_chosen_port_that_is_taken_is_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "START_ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        node.options = {"port": stranger.getsockname()[1]}
        with pytest.raises(NodeError, match=r"node0 did not start \(exit code 1\): .*Unable to bind to 127.0.0.1"):
            node.start()


@pytest.mark.parametrize("keep", [False, True])
def test_missing_program_is_named(keep: bool, tmp_path: Path) -> None:
    node = Node(tmp_path / "nowhere", tmp_path / "node0", keep=keep)
    with pytest.raises(NodeError, match=r"node0.*nowhere: No such file or directory"):
        node.start()


def test_program_that_never_answers_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mute = tmp_path / "mute"
    mute.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    mute.chmod(0o755)
    monkeypatch.setattr(node_module, "START_TIMEOUT", 0.5)
    with pytest.raises(WaitTimeoutError, match=r"waited 0\.5 s for node0 to answer RPC"):
        Node(mute, tmp_path / "node0").start()
    assert not running(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("taken", [0, 1], ids=["RPC", "peer-to-peer"])
def test_taken_port_is_left_to_its_owner(taken: int, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody takes a port between our look and the node's start."""
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        choices = [node_module.free_ports(2), node_module.free_ports(2)]
        choices[0][taken] = port
        monkeypatch.setattr(node_module, "free_ports", lambda _count: choices.pop(0))
        with node:
            assert port not in (node.rpc_port, node.p2p_port)
            assert node.rpc("getblockcount") == 0
    assert choices == []


def test_no_free_port_is_an_error(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        ports = [stranger.getsockname()[1], node_module.free_ports(1)[0]]
        monkeypatch.setattr(node_module, "free_ports", lambda _count: ports)
        with pytest.raises(NodeError, match=r"node0 did not start \(exit code 1\): .*Unable to start HTTP server"):
            node.start()
    assert node.pid is None


def test_strangers_answer_is_not_taken_for_the_nodes(bitcoind: Node) -> None:
    """A port may change hands while the node is down; the cookie that the stranger gets then is of no use to it."""
    cookie = bitcoind.cookie_file.read_text()
    bitcoind.kill()
    with socket.create_server(("127.0.0.1", bitcoind.rpc_port)) as stranger:
        thread = threading.Thread(target=answer_once, args=(stranger,))
        thread.start()
        with pytest.raises(NodeUnreachableError, match="HTTP status 401, not a JSON-RPC answer"):
            bitcoind.rpc("getblockcount")
        thread.join()
        bitcoind.start()
        assert bitcoind.rpc_port != stranger.getsockname()[1]
    assert bitcoind.cookie_file.read_text() != cookie
    assert bitcoind.rpc("getblockcount") == 0


def answer_once(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")


def test_two_nodes_do_not_share_a_data_directory(bitcoind: Node) -> None:
    conf = (bitcoind.datadir / "bitcoin.conf").read_text()
    with pytest.raises(NodeError, match=r"node0: a node is running in .* already"):
        Node(bitcoind.bitcoind, bitcoind.datadir).start()
    assert (bitcoind.datadir / "bitcoin.conf").read_text() == conf
    assert bitcoind.rpc("getblockcount") == 0


def test_node_outlives_the_thread_that_started_it(node: Node) -> None:
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(node.start).result()
    try:
        assert node.rpc("getblockcount") == 0
    finally:
        node.stop()


@pytest.mark.parametrize("keep", [False, True])
def test_node_outlives_us_only_if_kept(keep: bool, node_programs: Path, cli: Path, tmp_path: Path) -> None:
    datadir = tmp_path / "node0"
    arguments = [str(node_programs / "bitcoind"), str(datadir), "keep" if keep else "bound"]
    command = [sys.executable, "-c", HOLD_NODE, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        holder.kill()
    if keep:
        assert (datadir / "regtest/bitcoind.pid").read_text().strip() == str(pid)
        subprocess.check_output([cli, f"-datadir={datadir}", "stop"])
    wait_for(lambda: not running(pid), 30, "the node to end")


def test_ctrl_c_in_the_terminal_does_not_reach_the_node(bitcoind: Node) -> None:
    pid = bitcoind.pid
    assert pid is not None
    assert os.getpgid(pid) != os.getpgid(0)
    assert os.getsid(pid) != os.getsid(0)


def test_wait_for_says_what_was_awaited_and_seen() -> None:
    with pytest.raises(WaitTimeoutError, match=r"^waited 0\.1 s for better weather; last seen: rain$"):
        wait_for(lambda: False, 0.1, "better weather", lambda: "rain")
