"""The bridge's way to a node, and a producer's errors."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
from bitcoin.core import b2lx, lx

from traincert.bridge import producer as producer_module
from traincert.bridge import rpc as rpc_module
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.errors import BridgeError
from traincert.bridge.producer import NodeProducer
from traincert.bridge.rpc import NodeClient
from traincert.regtest import Node, NodeUnreachableError, RpcError, wait_for
from traincert.regtest.plugin import NetworkFactory
from training_chain import MINERS, PAYOUT_SCRIPT, TrainingChain, submit, template


@pytest.fixture
def chain() -> TrainingChain:
    return TrainingChain()


@pytest.fixture
def node(node_programs: Path, tmp_path: Path, chain: TrainingChain) -> Iterator[Node]:
    with Node(node_programs / "bitcoind", tmp_path / "node0", chain.params.node_options()) as node:
        yield node


@pytest.fixture
def client(node: Node) -> Iterator[NodeClient]:
    with NodeClient.from_datadir(node.datadir) as client:
        yield client


def test_a_nodes_error_keeps_its_code_and_names_the_node(client: NodeClient) -> None:
    with pytest.raises(RpcError, match=r"node0: getblockhash: Block height out of range \(RPC error -8\)") as caught:
        client.call("getblockhash", 1)
    assert caught.value.code == -8


def test_calls_of_one_request_have_results_and_errors_of_their_own(node: Node, client: NodeClient) -> None:
    genesis = node.rpc("getblockhash", 0)
    first, second, third = client.call_each("getblockhash", [(0,), (7,), (0,)])
    assert (first, third) == (genesis, genesis)
    assert isinstance(second, RpcError)
    assert str(second) == "node0: getblockhash: Block height out of range (RPC error -8)"
    assert client.call_each("getblockhash", []) == []
    node.restart()  # with a new cookie
    assert (
        client.call_each("getblockheader", [(genesis, False)] * 300)
        == [client.call("getblockheader", genesis, False)] * 300
    )


def test_a_client_finds_the_node_again_after_a_restart(node: Node, client: NodeClient) -> None:
    assert client.call("getblockcount") == 0
    node.restart()  # with a new cookie
    assert client.call("getblockcount") == 0


def test_a_node_that_is_stopped_is_unreachable(node: Node, client: NodeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_module, "RETRY_TIME", 0.2)
    assert client.call("getblockcount") == 0
    node.stop()
    with pytest.raises(NodeUnreachableError, match="node0"):
        client.call("getblockcount")


def test_waiting_goes_on_over_a_restart(node: Node, client: NodeClient, chain: TrainingChain) -> None:
    with ThreadPoolExecutor(1) as pool:
        came = pool.submit(client.wait_for_height, 1, 60)
        wait_for(lambda: any(c["method"] == "waitforblockheight" for c in active(node)), 30, "the wait to begin")
        node.restart()
        append(chain, node)
        assert came.result()


class Busy(BaseHTTPRequestHandler):
    """A node that does not take requests while there are `refusals`."""

    refusals: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        refused = self.refusals.pop(0) if self.refusals else None
        answer = b'{"jsonrpc": "2.0", "id": 1, "result": 7}' if refused is None else refused
        self.send_response(200 if refused is None else 503)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002 - the base class names it so


SHUTDOWN, HTML = b"Request rejected during server shutdown", b"<HTML><HEAD>\n<TITLE>503 Service Unavailable</TITLE>"


@pytest.mark.parametrize(
    ("text", "said"), [(SHUTDOWN, SHUTDOWN.decode()), (HTML, "Service Unavailable"), (b"", "Serv")]
)
def test_a_request_that_a_node_does_not_take_is_repeated(tmp_path: Path, text: bytes, said: str) -> None:
    """A node that shuts down, or has too many calls, answers with text. It has not done what it was asked for."""
    (tmp_path / "cookie").write_text("user:password")
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with NodeClient(url, tmp_path / "cookie", name="node0", retry_time=0.5) as client:
            Busy.refusals = [text] * 2
            assert client.call("getblockcount") == 7
            Busy.refusals = [text] * 100
            with pytest.raises(NodeUnreachableError, match=f"^node0 at {url}: {said}"):
                client.call("getblockcount")
            with pytest.raises(NodeUnreachableError, match=f"^node0 at {url}: {said}"):
                client.call_each("getblockhash", [[0]])
        server.shutdown()


def active(node: Node) -> list[dict[str, Any]]:
    commands: list[dict[str, Any]] = node.rpc("getrpcinfo")["active_commands"]
    return commands


def test_waiting_ends_when_its_time_is_over(client: NodeClient) -> None:
    assert not client.wait_for_height(1, 0.1)
    assert not client.wait_for_tip("00" * 32, 0.1)


def winner_of(certificate: Certificate, node: Node) -> NodeProducer:
    return NodeProducer(MINERS[certificate.winner_key].secret, PAYOUT_SCRIPT, node.datadir)


def test_a_producer_appends_its_block(node: Node, client: NodeClient, chain: TrainingChain) -> None:
    certificate = chain.next_certificate(template(node))
    block_hash = winner_of(certificate, node).produce(certificate, chain.params)
    assert client.call("getbestblockhash") == block_hash


def test_a_producer_tells_why_its_node_refused_the_block(node: Node, client: NodeClient, chain: TrainingChain) -> None:
    # not what the coordinator signed
    certificate = replace(chain.next_certificate(template(node)), loss_after=0)
    with pytest.raises(BridgeError, match=r"node0 refused block 1 .*: bad-traincert-coordinator-sig"):
        winner_of(certificate, node).produce(certificate, chain.params)
    assert client.call("getblockcount") == 0


def test_a_producer_does_not_use_anothers_certificate(node: Node, chain: TrainingChain) -> None:
    certificate = chain.next_certificate(template(node))
    other = next(secret for key, secret in MINERS.items() if key != certificate.winner_key)
    with pytest.raises(BridgeError, match="for another miner"):
        NodeProducer(other.secret, PAYOUT_SCRIPT, node.datadir).produce(certificate, chain.params)


def test_a_producer_makes_no_block_for_another_network(node: Node, chain: TrainingChain) -> None:
    certificate = chain.next_certificate(template(node))
    other = replace(chain, round_seconds=61).params
    with pytest.raises(BridgeError, match=rf"is on network {chain.params.chain_id.hex()}, .* {other.chain_id.hex()}"):
        winner_of(certificate, node).produce(certificate, other)


def test_a_producer_tells_that_its_node_is_on_no_training_network(bitcoind: Node, chain: TrainingChain) -> None:
    certificate = chain.next_certificate(template(bitcoind))
    with pytest.raises(BridgeError, match="node0 wants no certificate for block 1: it is on another network"):
        winner_of(certificate, bitcoind).produce(certificate, chain.params)


def test_a_certificate_for_an_old_slot_makes_no_block(
    node: Node, client: NodeClient, chain: TrainingChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = chain.next_certificate(template(node))
    winner = winner_of(old, node)
    winner.produce(old, chain.params)
    with pytest.raises(BridgeError, match="the node's next block is 2"):
        winner.produce(replace(old, prev_block=lx(client.call("getbestblockhash"))), chain.params)
    monkeypatch.setattr(producer_module, "CATCH_UP_TIME", 0.1)
    with pytest.raises(BridgeError, match=f"node0 is not at block {b2lx(old.prev_block)}"):
        winner.produce(old, chain.params)


def test_a_round_that_is_too_early_is_waited_for(node: Node, client: NodeClient) -> None:
    chain = TrainingChain(round_seconds=60)
    slot = template(node)
    append(chain, node)
    slot = template(node)
    certificate = chain.next_certificate(slot, round_=1)
    parent_time = client.call("getblockheader", slot["previousblockhash"])["time"]
    client.call("setmocktime", parent_time + 59)
    with ThreadPoolExecutor(1) as pool:
        block_hash = pool.submit(winner_of(certificate, node).produce, certificate, chain.params)
        assert client.call("getblockcount") == 1
        client.call("setmocktime", parent_time + 60)
        assert client.call("getblockheader", block_hash.result())["time"] == parent_time + 60


def test_a_round_that_stays_too_early_is_told(
    node: Node, chain: TrainingChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(chain, node)
    certificate = chain.next_certificate(template(node), round_=1000)
    monkeypatch.setattr(producer_module, "CATCH_UP_TIME", 0.1)
    with pytest.raises(BridgeError, match=r"node0's time is .*, but round 1000 is allowed from .* on"):
        winner_of(certificate, node).produce(certificate, chain.params)


def append(chain: TrainingChain, node: Node) -> None:
    slot = template(node)
    certificate = chain.next_certificate(slot)
    assert submit(node, chain.block(slot, certificate)) is None
    chain.advance(certificate)


def test_a_producer_builds_on_the_coordinators_block_where_a_rival_came_first(
    bitcoin_network: NetworkFactory, chain: TrainingChain
) -> None:
    """Two blocks of one slot, of different rounds, have equal work: a node stays on the one that it heard of first."""
    ours, theirs = bitcoin_network(2, chain.params.node_options()).nodes
    slot = template(ours)
    ours.rpc("setnetworkactive", False)
    theirs.rpc("setnetworkactive", False)
    certificates = [chain.next_certificate(slot, round_=round_) for round_ in (0, 1)]
    for node, certificate in zip((ours, theirs), certificates, strict=True):
        # genesis is old enough for any round
        assert submit(node, chain.block(slot, certificate)) is None
    tips = [node.rpc("getbestblockhash") for node in (ours, theirs)]
    assert tips[0] != tips[1]
    for node in (ours, theirs):
        node.rpc("setnetworkactive", True)
    ours.rpc("addnode", theirs.p2p_address, "onetry")
    wait_for(lambda: len(theirs.rpc("getchaintips")) == 2, 30, "the rival to be heard of")
    assert theirs.rpc("getbestblockhash") == tips[1]

    chain.advance(certificates[0])
    certificate = chain.next_certificate(template(ours))
    block_hash = winner_of(certificate, theirs).produce(certificate, chain.params)
    wait_for(lambda: ours.rpc("getbestblockhash") == block_hash, 30, "the block to come back")
    assert theirs.rpc("getblockhash", 1) == tips[0]
