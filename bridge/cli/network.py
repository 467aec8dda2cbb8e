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
from rich.console import Console
from rich.progress import Progress

from traincert.bridge.appointing import load_coordinator, make_keys
from traincert.bridge.cli.node import build_with_progress
from traincert.bridge.cli.view import status_table, stdout_console
from traincert.bridge.errors import BridgeError
from traincert.bridge.rpc import NodeClient
from traincert.regtest.faucet import Faucet
from traincert.regtest.lasting import OWNED, LastingNetwork, status_json
from traincert.regtest.node import TIMEOUT_FACTOR, Node, Options

DEFAULT_FOLDER = Path("network")
BLOCKS_AT_A_TIME = 100  # after which `mine` shows its progress
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}  # seconds


@click.group()
@click.option(
    "--timeout-factor",
    type=click.FloatRange(min=0, min_open=True, max=1000),
    help=f"Multiply all timeouts by this, for slow machines.  [default: ${TIMEOUT_FACTOR} or 1]",
)
def network(timeout_factor: float | None) -> None:
    """Run a network of nodes on this machine, until it is taken down.

    NODE is a node's name or number: node0 or 0.
    """
    if timeout_factor:
        os.environ[TIMEOUT_FACTOR] = str(timeout_factor)


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
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="[NODE:]KEY=VALUE",
    help="A bitcoin.conf option for all nodes, or for one: node1:txindex=1. May be given again.",
)
@click.option(
    "--rpc-port-base",
    type=click.IntRange(1024, 65_000),
    help="The RPC port of node0; node1 has the next one, and so on.  [default: any free ports]",
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
    options: Sequence[str],
    rpc_port_base: int | None,
    fees: bool,
    training: bool,
    start_height: int,
) -> None:
    """Make a network and start it. Its nodes keep their options."""
    common, single = _options(options, count, rpc_port_base)

    if training and (ours := [key for key in common if key.startswith("training")]):
        raise click.BadParameter(f"{ours[0]}: --training sets it", param_hint="--option")

    def prepare(owned: Path) -> Options:
        return {**common, **(make_keys(owned, start_height).node_options() if training else {})}

    if backend == "docker":
        if bitcoind:
            raise click.UsageError("--bitcoind is for processes: containers run their image's")
        from traincert.regtest.containers import IMAGE  # takes a while

        LastingNetwork.create(Path("bitcoind"), folder, count, topology, IMAGE, prepare, single)
    else:
        program = bitcoind or build_with_progress() / "bin" / "bitcoind"
        LastingNetwork.create(program, folder, count, topology, None, prepare, single)
    with LastingNetwork.opened(folder) as made:
        try:
            made.start()
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
@in_folder
def down(folder: Path) -> None:
    """End the network and remove it, with all its data."""
    LastingNetwork.remove(folder)


@network.command("status")
@in_folder
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(folder: Path, as_json: bool) -> None:
    """Show the nodes, their tips and peers, and the faults in force.

    Exit code 1 if there is no network. A node that does not run is shown, and is no failure.
    """
    loaded = LastingNetwork.load(folder)
    if as_json:
        click.echo(json.dumps({"time": loaded.time, "nodes": status_json(loaded.status())}, indent=2))
    else:
        stdout_console().print(status_table(loaded.status(), loaded.time))


@network.command("start")
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
@changes_network
def start(network: LastingNetwork, nodes: Sequence[str]) -> None:
    """Start nodes and connect them. Without a NODE it starts all. It makes no block, and paused nodes stay paused."""
    chosen = _chosen(network, nodes)
    network.start_nodes(chosen)
    for node in chosen:
        if node.paused:
            click.echo(f"{node.name} is paused: traincert network resume {node.name}", err=True)


@network.command("stop")
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
@changes_network
def stop(network: LastingNetwork, nodes: Sequence[str]) -> None:
    """Stop nodes in good order. Without a NODE it stops all. The wallets that are loaded are loaded by `start`, too."""
    if nodes:
        network.stop_nodes(_chosen(network, nodes))
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
@click.option(
    "--fork-observer", is_flag=True, help="Print a configuration for 0xB10C's fork-observer, config.toml, instead."
)
def env(folder: Path, fork_observer: bool) -> None:
    """Print shell functions to talk to the nodes, for eval: node0 getblockcount."""
    loaded = LastingNetwork.load(folder)
    if fork_observer:
        click.echo(_fork_observer(loaded), nl=False)
        return
    for node in loaded.nodes:
        click.echo(f'{node.name}() {{ {shlex.join(node.cli)} "$@"; }}')


def _fork_observer(network: LastingNetwork) -> str:
    """Return fork-observer's configuration. It starts only if the cookie files are there: while the nodes run."""
    lines = [
        'address = "127.0.0.1:2323"',
        'database_path = "fork-observer-db"',
        'www_path = "./www"  # the folder www of fork-observer\'s source',
        "query_interval = 1  # seconds",
        'footer_html = ""',
        "",
        "[[networks]]",
        "id = 1",
        f"name = {_toml(network.directory.name)}",
        f"description = {_toml(f'the regtest network in {network.directory}')}",
        "min_fork_height = 0",
        "max_interesting_heights = 100",
    ]
    for number, node in enumerate(network.nodes):
        lines += [
            "",
            "[[networks.nodes]]",
            f"id = {number}",
            f"name = {_toml(node.name)}",
            'description = ""',
            'rpc_host = "127.0.0.1"',
            f"rpc_port = {node.rpc_port}",
            f"rpc_cookie_file = {_toml(str(node.cookie_file))}",
            "use_rest = false",
        ]
    return "\n".join(lines) + "\n"


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a TOML string, too


@network.command("snapshot")
@click.argument("name")
@changes_network
def snapshot(network: LastingNetwork, name: str) -> None:
    """Copy the whole network under a name. The nodes are stopped meanwhile, and are as before afterwards."""
    network.snapshot(name)


@network.command("restore")
@click.argument("name")
@changes_network
def restore(network: LastingNetwork, name: str) -> None:
    """Bring the whole network back to a snapshot, and start all nodes that can start."""
    network.restore(name)


@network.command("time")
@click.argument("when")
@changes_network
def time(network: LastingNetwork, when: str) -> None:
    """Stop all nodes' clocks at a time.

    WHEN is a step forward (+90s, +30m, +1h, +2d, +1w), a time in UTC (2030-01-01, 2030-01-01T12:00), or `real`: then
    the clocks run again as the machine's. No node can have a block that is more than an hour ahead of its clock.
    """
    network.set_time(_moment(when, network.time))


@network.command("mine")
@click.argument("count", type=click.IntRange(1, 100_000))
@click.option("--node", default="node0", show_default=True, help="The node that makes the blocks.")
@click.option("--address", help="Whom the blocks pay.  [default: a wallet of node0, the faucet]")
@changes_network
def mine(network: LastingNetwork, count: int, node: str, address: str | None) -> None:
    """Make blocks, and print the last one's hash.

    On a training network, blocks from the start height on get certificates: a coordinator appoints the winners, and the
    certificates say that nothing was trained.
    """
    miner = network.nodes[_number(network, node)]
    address = address or _faucet(network).address()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("blocks", total=count)
        for done in range(0, count, BLOCKS_AT_A_TIME):
            _mine(network, miner, min(BLOCKS_AT_A_TIME, count - done), address)
            progress.update(task, completed=done + BLOCKS_AT_A_TIME)
    click.echo(miner.rpc("getbestblockhash"))


@network.command("reorg")
@click.argument("depth", type=click.IntRange(1, 1000))
@click.option("--node", default="node0", show_default=True, help="The node whose chain changes first.")
@changes_network
def reorg(network: LastingNetwork, depth: int, node: str) -> None:
    """Replace the last DEPTH blocks by one more empty blocks, and print the last one's hash.

    The transactions of the replaced blocks go back to the mempool. Not on a training network.
    """
    click.echo(network.reorg(depth, _number(network, node)))


@network.command("fund")
@click.argument("address")
@click.argument("amount")
@changes_network
def fund(network: LastingNetwork, address: str, amount: str) -> None:
    """Pay AMOUNT, in BTC, from the faucet to ADDRESS, and confirm it with a block. Prints the txid.

    If the faucet has too few coins, it first makes blocks that pay it, and says how many.
    """
    try:
        btc = Decimal(amount)
    except InvalidOperation:
        btc = Decimal("nan")
    if not btc.is_finite() or not Decimal("0.00001") <= btc <= 21_000_000:
        raise click.BadParameter(f"{amount} is no amount of BTC", param_hint="AMOUNT")
    before = network.nodes[0].rpc("getblockcount")
    txid = _faucet(network).fund(address, btc)
    if filling := network.nodes[0].rpc("getblockcount") - before - 1:
        click.echo(f"{filling} blocks were made first, which pay the faucet", err=True)
    click.echo(txid)


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
    """Undo `disk-full`. A node that has stopped meanwhile is started again."""
    network.nodes[node].free_disk()
    _start_again(network, node)


@network.command("corrupt")
@one_node
def corrupt(network: LastingNetwork, node: int) -> None:
    """Flip a byte of the last block in a node's block files. `repair` undoes it."""
    network.corrupt(node)


@network.command("repair")
@one_node
def repair(network: LastingNetwork, node: int) -> None:
    """Undo `corrupt`. A node that has stopped meanwhile is started again."""
    network.repair(node)
    _start_again(network, node)


def _start_again(network: LastingNetwork, number: int) -> None:
    """Start a node that does not run, unless another fault keeps it from starting. Say what was done."""
    node = network.nodes[number]
    if node.pid is not None:
        return
    if node.disk_full or number in network.flips:
        other = f"disk-free {node.name}" if node.disk_full else f"repair {node.name}"
        click.echo(f"{node.name} does not run, and cannot start yet: traincert network {other}", err=True)
        return
    network.start_nodes([node])
    click.echo(f"{node.name} did not run: it was started again", err=True)


def _number(network: LastingNetwork, node: str) -> int:
    for number, each in enumerate(network.nodes):
        if node in (str(number), each.name):
            return number
    raise BridgeError(f"there is no node {node}: there are node0 to node{len(network.nodes) - 1}")


def _chosen(network: LastingNetwork, nodes: Sequence[str]) -> list[Node]:
    return [network.nodes[_number(network, node)] for node in nodes] if nodes else network.nodes


def _options(given: Sequence[str], count: int, rpc_port_base: int | None) -> tuple[Options, dict[str, Options]]:
    """Return the options of all nodes, and the further options of single nodes by their names."""
    found: dict[str, dict[str, list[str]]] = {"": {}}
    if rpc_port_base:
        found |= {f"node{number}": {"rpcport": [str(rpc_port_base + number)]} for number in range(count)}
    for text in given:
        name, equals, value = text.partition("=")
        node, colon, key = name.rpartition(":")
        if not equals or not key or bool(colon) != bool(node):
            raise click.BadParameter(f"{text} is not KEY=VALUE or NODE:KEY=VALUE", param_hint="--option")
        if key == "mocktime":
            raise click.BadParameter("mocktime: traincert network time sets it", param_hint="--option")
        if key == "rpcport" and rpc_port_base:
            raise click.BadParameter("rpcport: --rpc-port-base sets it", param_hint="--option")
        node = f"node{node}" if node.isdecimal() else node
        found.setdefault(node, {}).setdefault(key, []).append(value)
    options: dict[str, Options] = {
        node: {key: values[0] if len(values) == 1 else values for key, values in each.items()}
        for node, each in found.items()
    }
    return options.pop(""), options


def _faucet(network: LastingNetwork) -> Faucet:
    return Faucet(network, lambda count, address: _mine(network, network.nodes[0], count, address))


def _mine(network: LastingNetwork, node: Node, count: int, address: str) -> None:
    owned = network.directory / OWNED
    if not owned.exists():
        node.mine(count, address)
        return
    payout_script = bytes.fromhex(node.rpc("validateaddress", address)["scriptPubKey"])
    with NodeClient.from_datadir(node.datadir) as client:
        coordinator = load_coordinator(owned, client, payout_script)
        below = max(0, min(count, coordinator.params.start_height - 1 - node.rpc("getblockcount")))
        if below:
            node.mine(below, address)
        for _ in range(count - below):
            coordinator.append(client)


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
