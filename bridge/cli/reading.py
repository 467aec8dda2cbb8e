"""The commands that read a chain: `block`, `chain`, `export-blocks`, `verify`, `watch`, and what `miner show` does."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from traincert.bridge.cli.options import HEIGHTS, NODE, BlockName, Bytes32
from traincert.bridge.errors import BridgeError
from traincert.regtest.errors import NodeUnreachableError, RpcError

if TYPE_CHECKING:
    from traincert.bridge.chain import Certified
    from traincert.bridge.consensus.params import TrainingParams
    from traincert.bridge.rpc import NodeClient
    from traincert.bridge.verified import Verified
    from traincert.bridge.verifier import Chain, Verifier

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
RUN_EXAMPLE = "The coordinator's run folder, for example demo/coordinator/run"

_SHOWN_TRANSACTIONS = 20
_SHOWN_HEADER = (
    "hash height confirmations previousblockhash nextblockhash merkleroot time mediantime versionHex bits nonce nTx"
)
_RPC_INVALID_PARAMETER = -8  # gettrainingcertificate's answer below the start height
_RPC_METHOD_NOT_FOUND = -32601
_PAUSE = 1.0  # seconds between two looks at a node


@click.command()
@click.argument("which", type=BlockName(), required=False, metavar="[HEIGHT|HASH]")
@NODE
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON: getblockheader's fields, and gettrainingcertificate's answer."
)
def block(which: int | str | None, datadir: Path, as_json: bool) -> None:
    """Show a block of a node: its header, its certificate and its transactions. By default the tip.

    It has no certificate below the start height, or if the node is on no training network.

    Exit code 1 if the node has no such block, or has pruned it.
    """
    from traincert.bridge.rpc import NodeClient

    with NodeClient.from_datadir(datadir) as node:
        if which is None:
            which = node.call("getbestblockhash")
        block_hash = node.call("getblockhash", which) if isinstance(which, int) else which
        header = node.call("getblockheader", block_hash)
        certificate, why_none = _certificate(node, block_hash)
        if as_json:
            click.echo(json.dumps({**header, "certificate": certificate}, indent=2))
            return
        transactions = node.call("getblock", block_hash, 2)["tx"]
    _print_block(header, certificate, why_none, transactions)


def _certificate(node: NodeClient, block_hash: str) -> tuple[dict[str, Any] | None, str]:
    """Return gettrainingcertificate's answer, or None and why there is no certificate."""
    try:
        return node.call("gettrainingcertificate", block_hash), ""
    except RpcError as error:
        if error.code == _RPC_METHOD_NOT_FOUND:
            return None, f"{node.name} is not the patched bitcoind"
        if error.code == _RPC_INVALID_PARAMETER or error.message.startswith("This is not a training network"):
            return None, error.message
        raise


def _print_block(
    header: Mapping[str, Any], certificate: dict[str, Any] | None, why_none: str, transactions: list[dict[str, Any]]
) -> None:
    from rich.table import Table

    from traincert.bridge.cli.view import shown_time, stdout_console
    from traincert.bridge.fields import FIELDS

    console = stdout_console()
    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name in _SHOWN_HEADER.split():
        if name in header:
            value = header[name]
            table.add_row(name, shown_time(value) if name.endswith("time") else str(value))
    console.print(table)
    if certificate is None:
        console.print(f"\nno certificate: {why_none}", soft_wrap=True)
    else:
        draw = certificate.get("draw", {})
        shown = {**certificate, **{f"draw.{name}": value for name, value in draw.items()}}
        if draw:
            shown["draw.siblings"] = f"{len(draw['siblings'])} hashes"
        signers = [str(each["key_index"]) for each in certificate["coordinator_signatures"]]
        shown["coordinator_signatures"] = f"by {', '.join(signers)}"
        table = Table(box=None, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold", max_width=64)
        table.add_column(style="dim")
        for name, meaning in FIELDS.items():
            if name in shown:
                table.add_row(name, str(shown[name]), meaning)
        console.print("\ncertificate")
        console.print(table)
    table = Table(box=None)
    table.add_column("transaction", overflow="fold")
    for name in ("inputs", "outputs", "BTC out", "vbytes"):
        table.add_column(name, justify="right")
    for tx in transactions[:_SHOWN_TRANSACTIONS]:
        value = math.fsum(output["value"] for output in tx["vout"])
        table.add_row(tx["txid"], str(len(tx["vin"])), str(len(tx["vout"])), f"{value:.8f}", str(tx["vsize"]))
    console.print()
    console.print(table)
    if len(transactions) > _SHOWN_TRANSACTIONS:
        console.print(f"and {len(transactions) - _SHOWN_TRANSACTIONS} more: bitcoin-cli getblock {header['hash']}")


def _warn(text: str) -> None:
    click.echo(f"traincert: {text}", err=True)


@contextmanager
def _verifying(datadir: Path, **options: float) -> Iterator[tuple[NodeClient, TrainingParams, Verifier]]:
    """Give a node, the network's parameters as the node states them, and a verifier of the node's chain."""
    from traincert.bridge.rpc import NodeClient
    from traincert.bridge.verified import VerifiedBlocks
    from traincert.bridge.verifier import NodeBlocks, Verifier, node_params

    with NodeClient.from_datadir(datadir, **options) as node:
        params = node_params(node, datadir)
        with VerifiedBlocks(params.chain_id, _warn) as verified:
            yield node, params, Verifier(NodeBlocks(node), params, verified)


def _not_below(chain: Chain, first: int) -> None:
    if not chain.blocks:
        raise BridgeError(f"there is no block {first}: the last one is block {chain.tip.height}")


@click.command()
@HEIGHTS
@NODE
@click.option(
    "--run",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help=f"{RUN_EXAMPLE}: compare its records with the blocks, too, and show the winners' names.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: certificates as gettrainingcertificate has them.")
def chain(heights: tuple[int, int | None], datadir: Path, run: Path | None, as_json: bool) -> None:
    """Read a training chain from a running node, check every rule on it, and show its blocks.

    FROM and TO are heights: 3..7, 3.., ..7 or 7. By default it is the whole chain. A block that was verified before is
    not read again. Of the blocks below FROM that were not, only the headers are checked.

    The last lines name each winner that signed two blocks under one certificate, as far as this node saw it.

    Exit code 1 if a block breaks a rule, or if the node has no such block or has pruned it.
    """
    from traincert.bridge.chain import certificate_json, check_records
    from traincert.bridge.cli.view import chain_table, print_equivocations, stdout_console

    first, last = heights
    with _verifying(datadir) as (node, params, verifier):
        found = verifier.longest(first, last)
        _not_below(found, first)
        equivocations = node.call("gettrainingequivocations")
    if run:
        check_records(found.certified, params, run)
    if as_json:
        click.echo(json.dumps([certificate_json(block) for block in found.certified], indent=2))
        return
    parent = found.parent and found.parent.certified
    console = stdout_console()
    names = _names(run) if run else {}
    console.print(chain_table(found.certified, names, parent.certificate.contributions_weight if parent else 0))
    console.print(f"✓ every rule holds; blocks with a certificate: {len(found.certified)}", soft_wrap=True)
    if run:
        console.print(f"✓ {run} has the record of each block", soft_wrap=True)
    print_equivocations(console, equivocations)


def _names(run: Path) -> dict[bytes, str]:
    """Return the members' names by their keys, if the run folder is in a coordinator's folder."""
    from traincert.bridge.members import MemberList

    path = run.resolve().parent / "members.sqlite"
    return {key: name for name, key in MemberList(path).keys().items()} if path.exists() else {}


@click.command("export-blocks")
@HEIGHTS
@NODE
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The file to write. It must not be there yet.",
)
def export_blocks(heights: tuple[int, int | None], datadir: Path, out: Path) -> None:
    """Write the blocks of a running node to a file: canned blocks for pyln-testing.

    That is the library for tests with Core Lightning. The file is JSON: a list of the blocks in hex, by height, without
    the genesis block. Any node of a regtest network will do. No rule is checked: `traincert chain` does that.

    FROM and TO are heights: 3..7, 3.., ..7 or 7. By default it is the whole chain.

    Exit code 1 if there is such a file, or if the node has no such block or has pruned it.
    """
    from traincert.bridge.chain import header_hash
    from traincert.bridge.rpc import NodeClient
    from traincert.bridge.verifier import NodeBlocks
    from traincert.trainer.store import write_file

    if out.exists():
        raise BridgeError(f"{out} exists already")
    if not out.parent.is_dir():
        raise BridgeError(f"there is no folder {out.parent}")
    first, last = max(1, heights[0]), heights[1]
    with NodeClient.from_datadir(datadir) as node:
        source = NodeBlocks(node)
        (tip,) = source.tips(last)
        height = node.call("getblockheader", tip)["height"]
        if height == 0:
            raise BridgeError("there is nothing to export: block 0, the genesis block, is on every node")
        if height < first:
            raise BridgeError(f"there is no block {first}: the last one is block {height}")
        # By their headers: the chain of heights could change meanwhile.
        hashes = [header_hash(header) for header in islice(source.headers(tip), height - first + 1)]
        blocks = [block.hex() for block in source.blocks(hashes[::-1])]
    write_file(out, json.dumps(blocks).encode(), 0o644)
    click.echo(f"{out} has blocks {first} to {height}")


@click.command()
@HEIGHTS
@click.option(
    "--datadir",
    type=click.Path(path_type=Path, file_okay=False),
    help="The data directory of a running node, which need not be trusted.  [default: demo/node0]",
)
@click.option(
    "--blocks",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder with block files, instead: a node's regtest/blocks. The node may be stopped.",
)
@click.option(
    "--conf",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The file with the network's options: a training.conf, or a node's bitcoin.conf.",
)
@click.option(
    "--chain-id", type=Bytes32("chain_id"), help="The network's chain_id: the parameters that are found must give it."
)
@click.option(
    "--anew", is_flag=True, help="Read all blocks, those that were verified before, too. Finds damage in the files."
)
@JSON
def verify(
    heights: tuple[int, int | None],
    datadir: Path | None,
    folder: Path | None,
    conf: Path | None,
    chain_id: bytes | None,
    anew: bool,
    as_json: bool,
) -> None:
    """Check a chain, from a node that need not be trusted or from block files.

    FROM and TO are heights: 3..7, 3.., ..7 or 7. By default the whole longest chain is checked, down to the genesis
    block: headers, Merkle roots, and every rule of training certificates. What transactions do is not checked. A block
    that was verified before is not read again. Of the blocks below FROM that were not, only the headers are checked.

    Without --conf and --chain-id it believes the node, or the bitcoin.conf of the block files, which network it is.

    Exit code 1 if a block breaks a rule, is missing or cannot be read: one line names the block and the rule.
    """
    from traincert.bridge.block_files import BlockFiles
    from traincert.bridge.rpc import NodeClient
    from traincert.bridge.verified import VerifiedBlocks
    from traincert.bridge.verifier import NodeBlocks, Source, Verifier, conf_params, node_params

    if datadir and folder:
        raise click.UsageError("give --datadir or --blocks, not both")
    first, last = heights
    with ExitStack() as stack:
        if folder:
            conf_of_node = folder.absolute().parent.parent / "bitcoin.conf"
            if not conf and not conf_of_node.exists():
                raise click.UsageError(f"there is no {conf_of_node}: give --conf")
            said_by = str(conf or conf_of_node)
            params = conf_params(conf or conf_of_node)
        else:
            datadir = datadir or Path("demo/node0")
            node = stack.enter_context(NodeClient.from_datadir(datadir))
            said_by = str(conf or node.name)
            params = conf_params(conf) if conf else node_params(node, datadir)
        if chain_id not in (None, params.chain_id):
            raise BridgeError(f"{said_by} is of network {params.chain_id.hex()}, not of the one of --chain-id")
        verified = stack.enter_context(VerifiedBlocks(params.chain_id, _warn, keep=not anew))
        try:
            source: Source = BlockFiles(folder, verified.height) if folder else NodeBlocks(node)
            verifier = Verifier(source, params, verified)
            found = verifier.longest(first, last)
            if isinstance(source, BlockFiles) and source.loose and last is None:
                raise BridgeError(
                    f"{source.describe(source.loose[0])}, which is in no file: a file is missing or damaged, or the "
                    "node has pruned blocks or still downloads them"
                )
            _not_below(found, first)
        except (BridgeError, RpcError) as error:
            if as_json:
                facts = {name: getattr(error, name, None) for name in ("height", "hash", "reason", "detail")}
                click.echo(json.dumps({"valid": False, **facts, "error": str(error)}))
            raise
    believed = not (conf or chain_id)
    if as_json:
        facts = {"chain_id": params.chain_id.hex(), "believed": believed, "first": first, "last": found.tip.height}
        facts |= {"tip": found.tip.hash, "read": verifier.read, "whole": found.whole}
        click.echo(json.dumps({"valid": True, **facts}))
        return
    blocks = f"block {first}" if first == found.tip.height else f"blocks {first} to {found.tip.height}"
    click.echo(f"✓ every rule holds in {blocks}; the last is {found.tip.hash}")
    if not found.whole:
        click.echo(f"below block {first} only the headers were checked")
    click.echo(f"{verifier.read} read now, {len(found.blocks) - verifier.read} known before")
    unsure = f", because {said_by} says so: name it with --conf or --chain-id" if believed else ""
    click.echo(f"network {params.chain_id.hex()}{unsure}")


@click.command()
@NODE
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each event.")
def watch(datadir: Path, as_json: bool) -> None:
    """Say each new block of a running node in a line, until Ctrl-C. Each block is checked.

    Reorganisations, and winners that sign two blocks under one certificate, get a line, too. While the node is away,
    this command waits for it.

    Exit code 1 if a block breaks a rule, 3 if the node does not answer at first, 130 after Ctrl-C.
    """
    from traincert.bridge.cli.events import Events
    from traincert.bridge.cli.view import equivocation_text

    def say(event: str, text: str, **facts: Any) -> None:
        if as_json:
            Events(as_json=True).say(event, text, **facts)
        else:
            click.echo(text)

    with _verifying(datadir, retry_time=0) as (node, params, verifier):
        tip, seen = verifier.longest().tip, node.call("gettrainingequivocations")
        text = f"{node.name} is at block {tip.height}, {tip.hash}"
        say("start", text, chain_id=params.chain_id.hex(), height=tip.height, hash=tip.hash)
        away = False
        while True:
            try:
                if away:
                    _same_network(node, params)
                    say("back", f"{node.name} is back")
                    away = False
                tip = _say_blocks(verifier, tip, node.call("getbestblockhash"), say)
                signed_twice = node.call("gettrainingequivocations")
                for each in signed_twice:
                    if each not in seen:
                        say("equivocation", equivocation_text(each), **each)
                seen = signed_twice
                node.call("waitfornewblock", round(1000 * _PAUSE))
            except NodeUnreachableError:
                if not away:
                    say("away", f"{node.name} is away")
                    away = True
                time.sleep(_PAUSE)


def _same_network(node: NodeClient, params: TrainingParams) -> None:
    """Raise BridgeError if a node that was away came back on another network. RpcError: on none."""
    chain_id = node.call("gettraininginfo")["chain_id"]
    if chain_id != params.chain_id.hex():
        raise BridgeError(f"{node.name} is on network {chain_id} now, not on {params.chain_id.hex()}")


def _say_blocks(verifier: Verifier, old: Verified, tip: str, say: Callable[..., None]) -> Verified:
    """Say what lies between a node's tip before and its tip now. Return the tip now."""
    from traincert.bridge.cli.view import in_round

    new = verifier.block(tip)
    fork, before = new, old
    added: list[Verified] = []
    while fork.hash != before.hash:
        if fork.height >= before.height:
            added.append(fork)
            fork = verifier.block(fork.previous)
        else:
            before = verifier.block(before.previous)
    if before.hash != old.hash:
        text = f"reorganisation: from {old.height} {old.hash} to {new.height} {new.hash}; they fork after {fork.height}"
        ends = {"old_height": old.height, "old_hash": old.hash, "height": new.height, "hash": new.hash}
        say("reorganisation", text, **ends, fork_height=fork.height, fork_hash=fork.hash)
    for block in reversed(added):
        text, facts = f"block {block.height}", {"height": block.height, "hash": block.hash, "block_time": block.time}
        if block.certified is None:
            say("block", f"{text} without a certificate: {block.hash}", **facts)
            continue
        certificate = block.certified.certificate
        facts |= {name: getattr(certificate, name) for name in ("round", "award", "loss_before", "loss_after")}
        text += f" by {certificate.winner_key.hex()[:16]}{in_round(certificate.round)}: "
        text += f"loss {certificate.loss_before / 1e9:.4f} → {certificate.loss_after / 1e9:.4f}, {block.hash}"
        say("block", text, winner_key=certificate.winner_key.hex(), **facts)
    return new


def show_miner(key: bytes, datadir: Path, run: Path | None, as_json: bool) -> None:
    """Print what a miner has won on a node's chain; with a run folder, for what it was drawn, too."""
    from rich.table import Table

    from traincert.bridge.cli.view import stdout_console
    from traincert.bridge.explorer.luck import fair_range

    with _verifying(datadir) as (_, params, verifier):
        blocks = verifier.longest().certified
    won: list[dict[str, Any]] = []
    for parent, block in pairwise([None, *blocks]):
        if block and block.certificate.winner_key == key:
            draw, total = block.certificate.draw, parent.certificate.contributions_weight if parent else 0
            facts = {"height": block.certificate.height, "hash": block.hash, "round": block.certificate.round}
            won.append({**facts, "weight": draw.weight if draw else None, "total": total if draw else None})
    facts = {"key": key.hex(), "won": len(won), "of": len(blocks)}
    if run:
        draws = list(_draws(key, blocks, params, run))
        chances = [chance for chance, _ in draws]
        low, high = fair_range(chances)
        facts |= {"draws": len(draws), "drawn": sum(drawn for _, drawn in draws), "expected": math.fsum(chances)}
        facts |= {"low": low, "high": high}
    if as_json:
        click.echo(json.dumps({**facts, "blocks": won}, indent=2))
        return
    console = stdout_console()
    share = f" ({len(won) / len(blocks):.1%})" if blocks else ""
    console.print(f"miner {key.hex()} has won {len(won)} of {len(blocks)} blocks{share}", soft_wrap=True)
    if run:
        console.print(
            f"it was drawn {facts['drawn']} times in {facts['draws']} draws; its weights give {facts['expected']:.1f}, "
            f"and {low} to {high} in 95 of 100 fair lotteries",
            soft_wrap=True,
        )
    else:
        console.print("blocks have only the winners' weights: with --run it says how often to expect this miner")
    table = Table(box=None)
    for name in ("height", "round", "weight / total", "chance"):
        table.add_column(name, justify="right")
    table.add_column("block", overflow="ellipsis")
    for each in won:
        weight, total = each["weight"], each["total"]
        drawn = (f"{weight:,} / {total:,}", f"{weight / total:.1%}") if weight else ("appointed", "")
        table.add_row(str(each["height"]), str(each["round"]), *drawn, each["hash"])
    console.print(table)


def _draws(key: bytes, blocks: Sequence[Certified], params: TrainingParams, run: Path) -> Iterator[tuple[float, bool]]:
    """Give for each draw of the chain a miner's chance in it, and whether it was drawn: in earlier rounds, too.

    The tables are in the records in the folder `run`.
    """
    from traincert.bridge.chain import record_bytes, record_table
    from traincert.bridge.consensus.lottery import draw_ticket

    for parent, block in pairwise(blocks):
        certificate = block.certificate
        if certificate.draw:
            table = record_table(parent.certificate, record_bytes(parent.certificate, params, run))
            chance = sum(leaf.weight for leaf in table.leaves if leaf.miner_key == key) / table.weight
            for round_ in range(certificate.round + 1):
                ticket = draw_ticket(certificate.beacon_reveal, certificate.prev_block, round_, table.weight)
                yield chance, table.leaves[table.find(ticket)].miner_key == key
