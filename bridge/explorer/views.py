"""What the explorer's pages and its API show, made of what the watch knows. All JSON has the names of the RPC."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.lottery import draw_ticket
from traincert.bridge.errors import BridgeError
from traincert.bridge.explorer.blocks import BlockFacts
from traincert.bridge.explorer.cycles import leaf_json, shown_record
from traincert.bridge.explorer.luck import fair_range
from traincert.bridge.explorer.nodes import WatchedNode
from traincert.bridge.explorer.watch import Watch
from traincert.regtest.errors import NodeError

T = TypeVar("T")

MOST_BLOCKS = 100
"""In one answer."""
MOST_TASKS = 200
"""Of a miner, the last ones."""
_HASH = re.compile(r"[0-9a-f]{64}")


class NotFoundError(BridgeError):
    """The explorer does not know what was asked for. The text is a sentence for the visitor."""

    status = 404  # of HTTP


class UnavailableError(NotFoundError):
    """It exists, but no node gives it now."""

    status = 503


def blocks(watch: Watch, before: int | None, count: int) -> list[dict[str, Any]]:
    """Return blocks of the shown chain below a height (None: the tip too), the newest first."""
    top = watch.main.height if before is None else min(before - 1, watch.main.height)
    found = (watch.at(height) for height in range(top, max(-1, top - min(count, MOST_BLOCKS)), -1))
    return [watch.block_json(block) for block in found if block]


def series(watch: Watch) -> dict[str, Any]:
    """Return columns with one entry for each block of the shown chain from the start height on. Losses are in nats."""
    columns: dict[str, list[Any]] = {name: [] for name in ("height", "time", "loss", "metric", "winner", "round")}
    miners: dict[bytes, int] = {}
    for block, certificate in _certified(watch):
        cycle = watch.cycle(block)
        columns["height"].append(block.height)
        columns["time"].append(block.time)
        columns["loss"].append(watch.loss(block))
        columns["metric"].append(cycle.metric if cycle else None)
        columns["winner"].append(miners.setdefault(certificate.winner_key, len(miners)))
        columns["round"].append(certificate.round)
    return {**columns, "miners": winners(watch)}


def _kept(work: Callable[[Watch, int | None], T]) -> Callable[[Watch, int | None], T]:
    """Keep what is computed of all blocks of the shown chain while its tip is the same: chains are long."""

    @wraps(work)
    def kept(watch: Watch, before: int | None) -> T:
        tip = watch.blocks.get(watch.main.tip or "")
        awaits_record = watch.cycles is not None and watch.cycle(tip) is None
        if tip is None or before is not None or watch.main.loading or awaits_record:
            return work(watch, before)
        if watch.kept_for != tip.hash:
            watch.kept.clear()
            watch.kept_for = tip.hash
        if work not in watch.kept:
            watch.kept[work] = work(watch, before)
        result: T = watch.kept[work]
        return result

    return kept


def winners(watch: Watch) -> list[dict[str, Any]]:
    """Return the miners that won blocks of the shown chain, in the order of their first ones."""
    names = watch.names()
    return [{"key": key.hex(), "name": names.get(key)} for key in _winner_keys(watch, None)]


@_kept
def _winner_keys(watch: Watch, before: int | None) -> list[bytes]:
    return list(dict.fromkeys(certificate.winner_key for _, certificate in _certified(watch, before)))


def _certified(watch: Watch, before: int | None = None) -> Iterator[tuple[BlockFacts, Certificate]]:
    """Return the blocks of the shown chain that have a certificate, from the start height on, below a height."""
    start = watch.start_height
    for block in watch.chain(start) if start is not None else ():
        if before is not None and block.height >= before:
            return
        if block.certificate:
            yield block, block.certificate


def find_block(watch: Watch, which: str) -> BlockFacts:
    """Return a block by its hash, or by its height in the shown chain. Raises NotFoundError."""
    found = watch.blocks.get(which) if _HASH.fullmatch(which) else None
    if re.fullmatch(r"\d{1,9}", which):
        found = watch.at(int(which))
        if found is None:
            raise NotFoundError(f"There is no block of height {which} here: the tip has height {watch.main.height}.")
    if found is None:
        raise NotFoundError(f"No node here has a block {which[:100]}.")
    return found


async def raw_block(watch: Watch, block: BlockFacts) -> bytes:
    """Return a block's bytes, from the first node that gives them. Raises NotFoundError."""
    return bytes.fromhex(await _ask(watch, "getblock", block.hash, 0))


async def _ask(watch: Watch, method: str, *params: Any) -> Any:
    """Ask the nodes, the shown one first, until one answers. Raises NotFoundError with the last one's problem."""
    problem = "No node is up."
    for node in sorted(watch.nodes, key=lambda node: node is not watch.main):
        if node.up:
            try:
                return await node.call(method, *params)
            except NodeError as error:
                problem = f"{error}."
    raise NotFoundError(problem)


async def block(watch: Watch, found: BlockFacts) -> dict[str, Any]:
    """Return all of a block: getblock's answer, its certificate, and the table from which its winner was drawn."""
    shown: dict[str, Any] = {**watch.block_json(found), "in_chain": watch.main.hashes.get(found.height) == found.hash}
    if found.size is None:
        return {**shown, "pruned": True}
    shown["block"] = await _ask(watch, "getblock", found.hash, 2)
    if shown["certificate"]:
        shown["certificate"] = await _ask(watch, "gettrainingcertificate", found.hash)
    certificate, parent = found.certificate, watch.blocks.get(found.previous)
    if certificate and certificate.draw and parent and parent.certificate:
        weight = parent.certificate.contributions_weight
        shown["total"] = weight
        if weight:
            shown["ticket"] = draw_ticket(certificate.beacon_reveal, certificate.prev_block, certificate.round, weight)
        cycle = watch.cycle(parent)
        shown["table"] = [leaf_json(leaf) for leaf in cycle.leaves] if cycle else None
    return shown


def cycle(watch: Watch, height: int) -> dict[str, Any]:
    """Return the record of the cycle that a block closes. Raises NotFoundError."""
    found, start = find_block(watch, str(height)), watch.start_height
    if found.certificate is None or start is None or height < start:
        raise NotFoundError(f"Block {height} closes no cycle: it has no certificate.")
    if watch.cycles is None:
        raise NotFoundError("This explorer has no records: start it with --records or --coordinator.")
    data = watch.cycles.read(height - start + 1)
    if data is None:
        raise NotFoundError(f"The record of block {height} is not here: {watch.cycles.path(height - start + 1)}.")
    matches = hashlib.sha256(data).digest() == found.certificate.record
    try:
        record = shown_record(data)
    except BridgeError as error:
        raise NotFoundError(f"The record of block {height} cannot be read: {error}.") from None
    names = watch.names()
    return {
        "height": height,
        "hash": found.hash,
        "matches": matches,
        "seconds": found.time - record["opening"]["opened"],
        "record": record,
        "names": {task["miner"]: names.get(bytes.fromhex(task["miner"])) for task in record["tasks"]},
    }


@dataclass
class _Standing:
    """A miner's part in the lottery: blocks won, those of them drawn from a known table, its chance in each draw."""

    blocks: int = 0
    drawn: int = 0
    chances: list[float] = field(default_factory=list)


@_kept
def _standings(watch: Watch, before: int | None) -> tuple[dict[bytes, _Standing], int]:
    """Return each miner's part, and how many draws there were from tables that are known."""
    standings: dict[bytes, _Standing] = {}
    draws = 0
    for block, certificate in _certified(watch, before):
        winner = standings.setdefault(certificate.winner_key, _Standing())
        winner.blocks += 1
        table = watch.cycle(watch.blocks.get(block.previous)) if certificate.draw else None
        if table is None:
            continue
        draws += 1
        winner.drawn += 1
        whole = sum(leaf.weight for leaf in table.leaves)
        for leaf in table.leaves:
            miner = standings.setdefault(leaf.miner, _Standing())
            miner.chances.append(leaf.weight / whole)
    return standings, draws


def miners(watch: Watch, before: int | None = None) -> list[dict[str, Any]]:
    """Return each miner's share of weight and of the blocks below a height, those with most blocks first."""
    standings, draws = _standings(watch, before)
    names = watch.names()
    found = []
    for key, each in standings.items():
        shown: dict[str, Any] = {"key": key.hex(), "name": names.get(key), "blocks": each.blocks, "drawn": each.drawn}
        shown |= dict.fromkeys(("expected", "low", "high", "weight", "share"))
        if draws:
            low, high = fair_range(each.chances)
            expected = math.fsum(each.chances)
            shown |= {"expected": expected, "low": low, "high": high}
            shown |= {"weight": expected / draws, "share": each.drawn / draws}
        shown["draws"] = draws
        found.append(shown)
    return sorted(found, key=lambda each: (-each["blocks"], each["key"]))


@_kept
def totals(watch: Watch, before: int | None) -> dict[str, Any]:
    """Return how often winners were drawn again, and how many updates were refused for each reason, below a height."""
    redraws = 0
    redrawn: list[int] = []
    refusals: dict[str, int] = {}
    for block, certificate in _certified(watch, before):
        redraws += certificate.round
        if certificate.round:
            redrawn.append(block.height)
        known = watch.cycle(block)
        for reason, count in known.refusals.items() if known else ():
            refusals[reason] = refusals.get(reason, 0) + count
    return {"redraws": redraws, "redrawn": redrawn, "refusals": refusals}


def miner(watch: Watch, key: str) -> dict[str, Any]:
    """Return all of a miner: its blocks and its tasks, the newest first. Raises NotFoundError."""
    found = next((each for each in miners(watch) if each["key"] == key), None)
    wanted = bytes.fromhex(key) if _HASH.fullmatch(key) else b""
    chain = list(_certified(watch))[::-1]
    tasks: list[dict[str, Any]] = []
    for each, _ in chain:
        known = watch.cycle(each)
        for task in known.tasks if known else ():
            if task.miner == wanted and len(tasks) < MOST_TASKS:
                tasks.append(
                    {
                        "height": each.height,
                        "segment": task.segment,
                        "shard": task.shard.hex(),
                        "params": task.params,
                        "loss_reduction": task.loss_reduction,
                        "weight": task.weight,
                        "place": task.place,
                        "late": task.late,
                        "drawn": task.drawn,
                        "refusal": task.refusal and str(task.refusal),
                        "detail": task.detail,
                    }
                )
    if found is None and not tasks:
        raise NotFoundError(f"No miner here has the key {key[:100]}: it won no block, and no record names it.")
    if found is None:
        empty = ("drawn", "expected", "low", "high", "weight", "share", "draws")
        found = {"key": key, "name": watch.names().get(wanted), "blocks": 0, **dict.fromkeys(empty)}
    won = [watch.block_json(each) for each, certificate in chain if certificate.winner_key == wanted]
    return {**found, "won": won[:MOST_BLOCKS], "tasks": tasks}


def alarms(watch: Watch) -> list[dict[str, Any]]:
    """Return all alarms, the newest first."""
    return [vars(alarm).copy() for alarm in reversed(watch.alarms)]


def forks(watch: Watch) -> dict[str, Any]:
    """Return the blocks that are not in the shown chain, the highest first, and each node's tip."""
    return {
        "blocks": [watch.block_json(block) for block in watch.branches()[:MOST_BLOCKS]],
        "tips": [{"node": node.name, "hash": node.tip, "height": node.height} for node in watch.nodes if node.tip],
    }


async def address(watch: Watch, text: str) -> dict[str, Any]:
    """Return the blocks of the shown chain that pay to an address, the newest first. Raises NotFoundError."""
    answer = await _ask(watch, "validateaddress", text)
    if not answer["isvalid"]:
        raise NotFoundError(f"{text[:100]} is no address: {answer['error'].rstrip('.')}.")
    script = bytes.fromhex(answer["scriptPubKey"])
    paid = [watch.block_json(each) for each in watch.chain() if script in each.scripts]
    return {"address": text, "scriptPubKey": answer["scriptPubKey"], "blocks": paid[: -MOST_BLOCKS - 1 : -1]}


async def search(watch: Watch, text: str) -> str:
    """Return the path of the page of a height, a block's hash, a miner's key, a txid or an address. NotFoundError."""
    text = text.strip()
    lower = text.lower()
    if re.fullmatch(r"\d{1,9}", text) or lower in watch.blocks:
        return f"/block/{find_block(watch, lower).hash}"
    if not text:
        raise NotFoundError("Type a height, a block's hash, a miner's key, a txid or an address.")
    if _HASH.fullmatch(lower):
        for each in watch.chain():
            if lower in each.txids:
                return f"/block/{each.hash}#tx-{lower}"
        try:
            return f"/miner/{miner(watch, lower)['key']}"
        except NotFoundError:
            raise NotFoundError(f"{lower} is no block, no transaction in a block, and no miner's key here.") from None
    for key, name in watch.names().items():
        if name == text:
            return f"/miner/{key.hex()}"
    await address(watch, text)
    return f"/address/{text}"


def params(node: WatchedNode) -> dict[str, Any]:
    """Return what makes a node's training network. Raises NotFoundError, and UnavailableError."""
    if node.network is None:
        raise NotFoundError(f"{node.name} is not on a training network.")
    if node.params is None:
        raise UnavailableError(f"{node.name} has pruned the first training block, which has the model to start from.")
    return {
        "chain_id": node.params.chain_id.hex(),
        "options": node.params.node_options(),
        "start_height": node.params.start_height,
    }
