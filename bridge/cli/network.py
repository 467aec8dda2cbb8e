"""The commands `traincert network ...`: a network of nodes that runs until it is taken down."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import signal
import time as clock
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import click

from traincert.bridge.appointing import load_coordinator, make_keys
from traincert.bridge.cli.node import build_with_progress
from traincert.bridge.cli.view import shown_time, status_table, stdout_console
from traincert.bridge.errors import BridgeError
from traincert.bridge.rpc import NodeClient
from traincert.regtest.errors import RpcError
from traincert.regtest.faucet import Faucet
from traincert.regtest.lasting import OWNED, LastingNetwork, status_json
from traincert.regtest.node import Node, Options

DEFAULT_FOLDER = Path("network")
MAX_FUTURE_BLOCK_TIME = 2 * 60 * 60  # seconds, as Bitcoin Core's chain.h has it
_RPC_METHOD_NOT_FOUND = -32601
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}  # seconds


@click.group()
def network() -> None:
    """Run a network of nodes on this machine, until it is taken down.

    NODE is a node's name or number: node0 or 0.
    """


def in_folder(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the option --dir."""
    return click.option(
        "--dir",
        "folder",
        type=click.Path(path_type=Path, file_okay=False),
        default=DEFAULT_FOLDER,
        show_default=True,
        help="The network's folder.",
    )(command)


def changes_network(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the network in --dir, locked, so that the command may change it."""

    @in_folder
    @functools.wraps(command)
    def with_network(folder: Path, **others: Any) -> None:
        with LastingNetwork.opened(folder) as opened:
            command(opened, **others)

    return with_network


def one_node(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the network and the number of one of its nodes."""

    @click.argument("node")
    @changes_network
    @functools.wraps(command)
    def with_node(network: LastingNetwork, node: str, **others: Any) -> None:
        command(network, _number(network, node), **others)

    return with_node


@network.command("up")
@in_folder
@click.option("--nodes", "count", type=click.IntRange(1, 50), default=3, show_default=True, help="Number of nodes.")
@click.option(
    "--bitcoind",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The bitcoind to run, with bitcoin-cli beside it.  [default: what `traincert node build` built]",
)
@click.option(
    "--backend",
    type=click.Choice(["process", "docker"]),
    default="process",
    show_default=True,
    help="Run nodes as processes, or as containers of the image traincert/node (make images).",
)
@click.option(
    "--topology",
    default="full",
    show_default=True,
    help="Which nodes are linked: line, ring, full, or a file with two node numbers on each line.",
)
@click.option("--fees", is_flag=True, help="Make blocks with fees first, so that estimatesmartfee answers.")
@click.option("--training", is_flag=True, help="Make a training network. Its coordinator appoints the winners.")
@click.option(
    "--start-height",
    type=click.IntRange(1, 100_000),
    default=1,
    show_default=True,
    help="The first height at which a block of a training network needs a certificate.",
)
def up(
    folder: Path,
    count: int,
    bitcoind: Path | None,
    backend: str,
    topology: str,
    fees: bool,
    training: bool,
    start_height: int,
) -> None:
    """Make a network and start it."""

    def prepare(owned: Path) -> Options:
        return make_keys(owned, start_height).node_options() if training else {}

    if backend == "docker":
        if bitcoind:
            raise click.UsageError("--bitcoind is for processes: containers run their image's")
        from traincert.regtest.containers import IMAGE  # takes a while

        LastingNetwork.create(Path("bitcoind"), folder, count, topology, IMAGE, prepare)
    else:
        program = bitcoind or build_with_progress() / "bin" / "bitcoind"
        LastingNetwork.create(program, folder, count, topology, None, prepare)
    with LastingNetwork.opened(folder) as made:
        try:
            made.start()
            _leave_initial_download(made)
            if fees:
                _faucet(made).make_fee_history()
        except BaseException:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave nodes behind
            made.down()
            raise
    stdout_console().print(status_table(made.status(), made.time))
    option = "" if folder == DEFAULT_FOLDER else f" --dir {shlex.quote(str(folder))}"
    click.echo(f"\nTalk to it:   traincert network cli{option} node0 getblockchaininfo")
    click.echo(f"Take it down: traincert network down{option}")


@network.command("down")
@changes_network
def down(network: LastingNetwork) -> None:
    """End the network and remove it, with all its data."""
    network.down()


@network.command("status")
@in_folder
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(folder: Path, as_json: bool) -> None:
    """Show the nodes, their tips and peers, and the faults in force."""
    loaded = LastingNetwork.load(folder)
    if as_json:
        click.echo(json.dumps({"time": loaded.time, "nodes": status_json(loaded.status())}, indent=2))
    else:
        stdout_console().print(status_table(loaded.status(), loaded.time))


@network.command("start")
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
@changes_network
def start(network: LastingNetwork, nodes: Sequence[str]) -> None:
    """Start nodes and connect them. Without a NODE it starts all."""
    for node in _chosen(network, nodes):
        node.start()
    network.connect()
    _leave_initial_download(network)


@network.command("stop")
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
@changes_network
def stop(network: LastingNetwork, nodes: Sequence[str]) -> None:
    """Stop nodes in good order. Without a NODE it stops all."""
    if nodes:
        for node in _chosen(network, nodes):
            node.stop()
    else:
        network.stop()


@network.command("logs")
@in_folder
@click.option("-f", "--follow", is_flag=True, help="Print new lines as they come.")
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
def logs(folder: Path, follow: bool, nodes: Sequence[str]) -> None:
    """Show the end of the nodes' debug.log."""
    files = [str(node.chain_dir / "debug.log") for node in _chosen(LastingNetwork.load(folder), nodes)]
    command = ["tail", "-n", "20", *(["-F"] if follow else []), "--", *files]
    os.execvp(command[0], command)  # noqa: S606 - the system's tail, without a shell


@network.command("cli", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@in_folder
@click.argument("node")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARG...")
def cli(folder: Path, node: str, arguments: Sequence[str]) -> None:
    """Run bitcoin-cli on a node."""
    loaded = LastingNetwork.load(folder)
    command = loaded.nodes[_number(loaded, node)].cli
    try:
        os.execvp(command[0], [*command, *arguments])  # noqa: S606 - no shell
    except OSError as error:
        raise BridgeError(f"cannot run {command[0]}: {error.strerror}") from error


@network.command("env")
@in_folder
def env(folder: Path) -> None:
    """Print shell functions to talk to the nodes, for eval: node0 getblockcount."""
    for node in LastingNetwork.load(folder).nodes:
        click.echo(f'{node.name}() {{ {shlex.join(node.cli)} "$@"; }}')


@network.command("snapshot")
@click.argument("name")
@changes_network
def snapshot(network: LastingNetwork, name: str) -> None:
    """Copy the whole network under a name. The nodes are stopped meanwhile, and started again."""
    network.snapshot(name)


@network.command("restore")
@click.argument("name")
@changes_network
def restore(network: LastingNetwork, name: str) -> None:
    """Bring the whole network back to a snapshot, and start all nodes."""
    network.restore(name)


@network.command("time")
@click.argument("when")
@changes_network
def time(network: LastingNetwork, when: str) -> None:
    """Stop all nodes' clocks at a time.

    WHEN is a step forward (+90s, +30m, +1h, +2d, +1w), a time in UTC (2030-01-01, 2030-01-01T12:00), or `real`: then
    the clocks run again as the machine's.
    """
    moment = _moment(when, network.time)
    running = [node for node in network.nodes if node.pid is not None and not node.paused]
    tip = max(map(_tip_time, running), default=0)
    if moment is None and tip > clock.time() + MAX_FUTURE_BLOCK_TIME:
        raise BridgeError(f"the tip is of {shown_time(tip)}: nodes would not start with it at the real time")
    network.set_time(moment)


@network.command("mine")
@click.argument("count", type=click.IntRange(1, 10_000))
@changes_network
def mine(network: LastingNetwork, count: int) -> None:
    """Make blocks on the first node. They pay a wallet of that node, the faucet.

    On a training network, blocks from the start height on get certificates: a coordinator appoints the winners, and the
    certificates say that nothing was trained.
    """
    _faucet(network).mine(count)
    click.echo(network.nodes[0].rpc("getbestblockhash"))


@network.command("fund")
@click.argument("address")
@click.argument("amount")
@changes_network
def fund(network: LastingNetwork, address: str, amount: str) -> None:
    """Pay AMOUNT, in BTC, from the faucet to ADDRESS, and confirm it with a block. Prints the txid."""
    try:
        btc = Decimal(amount)
    except InvalidOperation:
        btc = Decimal("nan")
    if not btc.is_finite() or not Decimal("0.00001") <= btc <= 21_000_000:
        raise click.BadParameter(f"{amount} is no amount of BTC", param_hint="AMOUNT")
    click.echo(_faucet(network).fund(address, btc))


@network.command("kill")
@one_node
def kill(network: LastingNetwork, node: int) -> None:
    """End a node at once, like a power failure. `start` starts it again."""
    network.nodes[node].kill()


@network.command("pause")
@one_node
def pause(network: LastingNetwork, node: int) -> None:
    """Stop a node's process (SIGSTOP). It keeps its connections and answers nobody until `resume`."""
    network.nodes[node].pause()


@network.command("resume")
@one_node
def resume(network: LastingNetwork, node: int) -> None:
    """Let a paused node run again."""
    network.nodes[node].resume()
    network.set_time(network.time)  # the clock may have been set meanwhile
    network.connect()


@network.command("partition")
@click.argument("groups")
@changes_network
def partition(network: LastingNetwork, groups: str) -> None:
    """Cut the links between groups of nodes, as in "node0,node1|node2". `heal` undoes it.

    Nodes that you do not name form one more group.
    """
    network.partition([[_number(network, node) for node in group.split(",")] for group in groups.split("|")])


@network.command("heal")
@changes_network
def heal(network: LastingNetwork) -> None:
    """End a partition. Returns when all nodes are connected again."""
    network.heal()


@network.command("delay")
@click.argument("node")
@click.argument("other")
@click.argument("duration")
@changes_network
def delay(network: LastingNetwork, node: str, other: str, duration: str) -> None:
    """Delay all messages between two nodes, both ways, by 200ms or 1.5s, for example. 0 undoes it."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)|0", duration)
    if not match:
        raise click.BadParameter(f"{duration} is no duration such as 200ms, 1.5s or 0", param_hint="DURATION")
    seconds = float(match[1] or 0) / (1000 if match[2] == "ms" else 1)
    a, b = sorted((_number(network, node), _number(network, other)))
    network.delay((a, b), seconds)


@network.command("disk-full")
@one_node
def disk_full(network: LastingNetwork, node: int) -> None:
    """Let every write of a node fail, as on a full disk. `disk-free` undoes it."""
    network.nodes[node].fill_disk()


@network.command("disk-free")
@one_node
def disk_free(network: LastingNetwork, node: int) -> None:
    """Undo `disk-full`."""
    network.nodes[node].free_disk()


@network.command("corrupt")
@one_node
def corrupt(network: LastingNetwork, node: int) -> None:
    """Flip a byte of the last block in a node's block files. `repair` undoes it."""
    network.corrupt(node)


@network.command("repair")
@one_node
def repair(network: LastingNetwork, node: int) -> None:
    """Undo `corrupt`."""
    network.repair(node)


def _tip_time(node: Node) -> int:
    seconds: int = node.rpc("getblockheader", node.rpc("getbestblockhash"))["time"]
    return seconds


def _number(network: LastingNetwork, node: str) -> int:
    for number, each in enumerate(network.nodes):
        if node in (str(number), each.name):
            return number
    raise BridgeError(f"there is no node {node}: there are node0 to node{len(network.nodes) - 1}")


def _chosen(network: LastingNetwork, nodes: Sequence[str]) -> list[Node]:
    return [network.nodes[_number(network, node)] for node in nodes] if nodes else network.nodes


def _faucet(network: LastingNetwork) -> Faucet:
    return Faucet(network, lambda count, address: _mine(network, count, address))


def _mine(network: LastingNetwork, count: int, address: str) -> None:
    node, owned = network.nodes[0], network.directory / OWNED
    if not owned.exists():
        node.rpc("generatetoaddress", count, address)
        return
    payout_script = bytes.fromhex(node.rpc("validateaddress", address)["scriptPubKey"])
    with NodeClient.from_datadir(node.datadir) as client:
        try:
            coordinator = load_coordinator(owned, client, payout_script)
        except RpcError as error:
            if error.code != _RPC_METHOD_NOT_FOUND:
                raise
            raise BridgeError(f"{node.bitcoind} is not the patched bitcoind: it has no training networks") from None
        below = max(0, min(count, coordinator.params.start_height - 1 - node.rpc("getblockcount")))
        if below:
            node.rpc("generatetoaddress", below, address)
        for _ in range(count - below):
            coordinator.append(client)


def _leave_initial_download(network: LastingNetwork) -> None:
    """Make a block if a node is in initial block download: until then it relays no transactions."""
    running = [node for node in network.nodes if node.pid is not None and not node.paused]
    if any(node.rpc("getblockchaininfo")["initialblockdownload"] for node in running):
        _faucet(network).mine(1)
        network.wait_until_same_tip()


def _moment(when: str, now: int | None) -> int | None:
    """Return what WHEN means: a Unix time in seconds, or None for the real time."""
    if when == "real":
        return None
    later = re.fullmatch(r"\+(\d+)([smhdw])", when)
    if later:
        return (int(clock.time()) if now is None else now) + int(later[1]) * _UNITS[later[2]]
    try:
        moment = datetime.fromisoformat(when)
    except ValueError:
        raise click.BadParameter(f"{when} is none of +1h, 2030-01-01 and real", param_hint="WHEN") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
