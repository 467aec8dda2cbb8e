"""On a training network no field of an upstream RPC changes or disappears: the same chain, asked of two nodes.

One is patched, the other is not; both were handed the same blocks and transactions and are told the same time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from bitcoin.core import CBlock, b2lx

from compat.made_chain import MATURITY, spend
from traincert.regtest import Node, RpcError, wait_for
from training_chain import TrainingChain, submit, template

OPTIONS = {"rest": "1", "txindex": "1", "coinstatsindex": "1", "blockfilterindex": "1", "rpcthreads": "4"}

# What the patch adds to upstream's answers.
ADDITIONS = {
    "getblockchaininfo": {".training_chain_id"},
    "getblocktemplate": {".training", ".rules[!training]"},
    "getdeploymentinfo": {".deployments.training"},
}
# Commands whose help says more than upstream's.
LONGER_HELP = {"getblockchaininfo", "getblocktemplate"}
OUR_COMMANDS = {"gettrainingcertificate", "gettrainingequivocations", "gettraininginfo"}

# Answers that are about the process, its folder or its moment: only their fields and types are compared.
ABOUT_THE_PROCESS = {"getmemoryinfo", "getnettotals", "getnetworkinfo", "getrpcinfo", "savemempool", "uptime"}
# Fields of which the same holds: a random nonce, a folder, how full a file or cache is.
ABOUT_THE_MOMENT = {".size_on_disk", ".longpollid", ".startuptime", ".usage"}
# Not asked without parameters: they do not return, or end the node; help and the template have tests of their own.
NOT_ASKED = {"stop", "waitfornewblock", "getblocktemplate", "help"}


@dataclass
class Comparison:
    """What a patched node's answer has that the stock's has not (`added`), and what it lacks or tells otherwise."""

    values: bool = True
    added: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def compare(self, path: str, stock: Any, patched: Any) -> None:
        """Compare two answers; a list that has strings only is taken as a set of names."""
        if type(stock) is not type(patched):
            self.wrong.append(f"{path}: {stock!r} has become {patched!r}")
        elif isinstance(stock, dict):
            self.added |= {f"{path}.{key}" for key in patched.keys() - stock.keys()}
            self.wrong += [f"{path}.{key}: missing" for key in stock.keys() - patched.keys()]
            for key in stock.keys() & patched.keys():
                self.compare(f"{path}.{key}", stock[key], patched[key])
        elif isinstance(stock, list) and all(isinstance(each, str) for each in [*stock, *patched]):
            self.added |= {f"{path}[{name}]" for name in patched if name not in stock}
            self.wrong += [f"{path}[{name}]: missing" for name in stock if name not in patched]
        elif isinstance(stock, list) and len(stock) == len(patched):
            for i, pair in enumerate(zip(stock, patched, strict=True)):
                self.compare(f"{path}[{i}]", *pair)
        elif stock != patched and self.values and path not in ABOUT_THE_MOMENT:
            self.wrong.append(f"{path}: {stock!r} has become {patched!r}")


@pytest.fixture(scope="module")
def same_chain(
    certificate_chain: tuple[TrainingChain, list[CBlock]],
    node_programs: Path,
    stock_programs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Node, Node]]:
    """A stock and a patched node with the 200 blocks, indexes, and a transaction that waits."""
    chain, blocks = certificate_chain
    folder = tmp_path_factory.mktemp("same")
    stock = Node(stock_programs / "bitcoind", folder / "stock", OPTIONS)
    patched = Node(node_programs / "bitcoind", folder / "patched", {**OPTIONS, **chain.params.node_options()})
    waiting = spend(blocks[-MATURITY].vtx[0]).serialize().hex()
    with stock, patched:
        for node in (stock, patched):
            node.rpc("setmocktime", blocks[-1].nTime + 1)
            for block in blocks:
                assert submit(node, block) is None
            node.rpc("sendrawtransaction", waiting)
            wait_for(partial(_indexed, node), 60, "the indexes")
        yield stock, patched


def _indexed(node: Node) -> bool:
    return all(index["synced"] for index in node.rpc("getindexinfo").values())


def ask(node: Node, method: str, *params: object) -> Any:
    """The node's answer, or its error as one."""
    try:
        return node.rpc(method, *params)
    except RpcError as error:
        return {"error": error.code, "message": error.message}


def commands(node: Node) -> list[str]:
    lines = node.rpc("help").splitlines()
    return sorted(line.split()[0] for line in lines if line and not line.startswith("=="))


def test_every_upstream_command_without_parameters(same_chain: tuple[Node, Node]) -> None:
    """Where a command needs some, both nodes answer with the error that says so, and with its help."""
    stock, patched = same_chain
    asked = [command for command in commands(stock) if command not in NOT_ASKED]
    assert len(asked) > 100
    for command in asked:
        comparison = Comparison(values=command not in ABOUT_THE_PROCESS)
        comparison.compare("", ask(stock, command), ask(patched, command))
        assert (comparison.wrong, comparison.added) == ([], ADDITIONS.get(command, set())), command


def chain_questions(node: Node, blocks: list[CBlock]) -> list[tuple[Any, ...]]:
    """What can be asked of a chain with parameters."""
    tip = b2lx(blocks[-1].GetHash())
    coinbase, spent = b2lx(blocks[-1].vtx[0].GetTxid()), b2lx(blocks[-1].vtx[1].GetTxid())
    raw = node.rpc("getblock", tip, 0)
    return [
        *[("getblock", tip, verbosity) for verbosity in range(4)],
        ("getblockheader", tip),
        ("getblockheader", tip, False),
        ("getblockhash", 1),
        ("getblockfilter", tip),
        ("getblockstats", tip),
        ("getblockstats", 1),
        ("getchaintxstats", 50),
        ("getdeploymentinfo", tip),
        ("getnetworkhashps", 10),
        ("getrawtransaction", coinbase, 0),
        ("getrawtransaction", coinbase, 1),
        ("getrawtransaction", coinbase, 2),
        ("getrawtransaction", spent, 2),
        ("decoderawtransaction", blocks[-1].vtx[0].serialize().hex()),
        ("decodescript", bytes(blocks[-1].vtx[0].vout[-1].scriptPubKey).hex()),
        ("gettxout", coinbase, 0),
        ("gettxout", coinbase, 2),
        ("gettxoutproof", [coinbase], tip),
        ("gettxoutsetinfo", "hash_serialized_3"),
        ("gettxoutsetinfo", "muhash", 100),
        ("getmempoolentry", node.rpc("getrawmempool")[0]),
        ("scantxoutset", "start", ["raw(51)"]),
        ("submitblock", raw),
        ("submitblock", "00"),
        ("submitheader", raw[:160]),
        ("verifychain", 4, 0),
        ("waitforblockheight", 1),
        ("getblock", "00" * 32),
        ("getblockhash", 201),
    ]


def test_every_question_about_the_chain(
    same_chain: tuple[Node, Node], certificate_chain: tuple[TrainingChain, list[CBlock]]
) -> None:
    stock, patched = same_chain
    for method, *params in chain_questions(stock, certificate_chain[1]):
        comparison = Comparison()
        comparison.compare("", ask(stock, method, *params), ask(patched, method, *params))
        assert (comparison.wrong, comparison.added) == ([], ADDITIONS.get(method, set())), (method, *params)


def test_a_template_has_all_that_it_had(same_chain: tuple[Node, Node]) -> None:
    answers = [template(node) for node in same_chain]
    comparison = Comparison()
    comparison.compare("", *answers)
    assert (comparison.wrong, comparison.added) == ([], ADDITIONS["getblocktemplate"])


def test_help_only_grows(same_chain: tuple[Node, Node]) -> None:
    stock, patched = same_chain
    assert set(commands(patched)) - set(commands(stock)) == OUR_COMMANDS
    for command in commands(stock):
        before, after = (node.rpc("help", command) for node in same_chain)
        if command in LONGER_HELP:
            left = iter(_lines(after))
            missing = [line for line in _lines(before) if line not in left]  # in their order
            assert missing == [], command
        else:
            assert after == before, command


def _lines(text: str) -> list[str]:
    """Without the alignment of comments."""
    return [re.sub(r" +", " ", line) for line in text.splitlines()]


def rest(node: Node, path: str) -> tuple[int, bytes]:
    with requests.Session() as session:
        session.trust_env = False
        answer = session.get(f"{node.rpc_url}/rest/{path}", timeout=60)
    return answer.status_code, answer.content


def test_rest_answers_the_same(
    same_chain: tuple[Node, Node], certificate_chain: tuple[TrainingChain, list[CBlock]]
) -> None:
    tip = b2lx(certificate_chain[1][-1].GetHash())
    txid = b2lx(certificate_chain[1][-1].vtx[0].GetTxid())
    paths = [
        *[f"block/{tip}.{form}" for form in ("json", "bin", "hex")],
        f"block/notxdetails/{tip}.json",
        *[f"headers/{tip}.{form}" for form in ("json", "bin", "hex")],
        *[f"tx/{txid}.{form}" for form in ("json", "bin", "hex")],
        "blockhashbyheight/7.json",
        f"blockfilter/basic/{tip}.json",
        f"blockfilterheaders/basic/{tip}.json",
        f"spenttxouts/{tip}.json",
        f"getutxos/checkmempool/{txid}-0.json",
        "mempool/contents.json",
    ]
    for path in paths:
        stock, patched = (rest(node, path) for node in same_chain)
        assert stock[0] == 200, path
        assert patched == stock, path
    for path, command in {"chaininfo": "getblockchaininfo", f"deploymentinfo/{tip}": "getdeploymentinfo"}.items():
        comparison = Comparison()
        comparison.compare("", *(json.loads(rest(node, f"{path}.json")[1]) for node in same_chain))
        assert (comparison.wrong, comparison.added) == ([], ADDITIONS[command])
