"""The explorer over real nodes: what it says of them, and what it tells when they change."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from explorer_process import TRAINCERT, Event, Explorer
from traincert.bridge.testing.network import TrainingNetwork
from traincert.bridge.testing.plugin import TrainingNetworkFactory
from traincert.regtest import Node, wait_for
from traincert.regtest.plugin import NetworkFactory

ADDRESS = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202"


@pytest.fixture
def two(training_network: TrainingNetworkFactory) -> TrainingNetwork:
    return training_network(2)


def over(*nodes: Node) -> Explorer:
    explorer = Explorer(*(argument for node in nodes for argument in ("--node", node.datadir)))
    wait_for(lambda: all(each["blocks"] is not None for each in explorer.get("info")["nodes"]), 60, "all nodes asked")
    wait_for(lambda: explorer.get("info")["loading"] is None, 60, "all blocks read")
    return explorer


@pytest.fixture
def explorer(two: TrainingNetwork) -> Iterator[Explorer]:
    with over(*two.nodes) as explorer:
        yield explorer


def node_of(explorer: Explorer, number: int) -> dict[str, Any]:
    found: dict[str, Any] = explorer.get("info")["nodes"][number]
    return found


def at_height(explorer: Explorer, height: int) -> None:
    wait_for(lambda: explorer.get("info")["tip"]["height"] == height, 60, f"the explorer at height {height}")


def alarms(explorer: Explorer, kind: str) -> list[dict[str, Any]]:
    return [each for each in explorer.get("alarms") if each["kind"] == kind]


def until(events: Iterator[Event], kind: str, count: int) -> list[Event]:
    """The next events of a kind."""
    found: list[Event] = []
    while len(found) < count:
        event = next(events)
        if event.kind == kind:
            found.append(event)
    return found


def test_it_says_what_the_node_says(two: TrainingNetwork, explorer: Explorer) -> None:
    node = two.nodes[0]
    hashes = [two.append(table=two.table(3, 1)) for _ in range(30)]
    two.network.wait_until_same_tip()
    at_height(explorer, 30)
    wait_for(lambda: node_of(explorer, 1)["bestblockhash"] == hashes[-1], 60, "node1's chain")
    info = explorer.get("info")
    assert [each["bestblockhash"] for each in info["nodes"]] == [hashes[-1]] * 2
    assert [each["behind"] for each in info["nodes"]] == [0, 0]
    assert info["network"]["chain_id"] == two.params.chain_id.hex() == explorer.get("params")["chain_id"]
    assert explorer.get("params")["options"] == two.params.node_options()
    blocks = explorer.get("blocks?count=7")["blocks"] + explorer.get("blocks?before=24")["blocks"]
    assert [block["hash"] for block in blocks] == [*hashes[::-1], node.rpc("getblockhash", 0)]
    for block in blocks[:-1]:
        shown = node.rpc("gettrainingcertificate", block["hash"])
        for name, value in block["certificate"].items():
            assert value == {key: shown["draw"][key] for key in value} if name == "draw" else value == shown[name]
        raw = explorer.client.get(f"/api/rawblock/{block['hash']}").content
        assert raw.hex() == node.rpc("getblock", block["hash"], 0)
        assert len(raw) == block["size"]
    whole = explorer.get(f"block/{hashes[4]}")
    assert whole == explorer.get("block/5")
    assert whole["certificate"] == node.rpc("gettrainingcertificate", 5)
    assert whole["block"]["tx"] == node.rpc("getblock", hashes[4], 2)["tx"]
    assert (whole["total"], whole["table"]) == (4, None)
    assert 0 <= whole["ticket"] < 4


def test_it_tells_each_block_as_it_comes_and_again_who_lost_the_connection(
    two: TrainingNetwork, explorer: Explorer
) -> None:
    two.append()
    at_height(explorer, 1)
    events = explorer.events()
    next(events)  # what changes first: it is connected
    hashes = [two.append() for _ in range(40)]
    told = until(events, "block", 40)
    assert [each.data["hash"] for each in told] == hashes
    assert [each.data["height"] for each in told] == list(range(2, 42))
    again = until(explorer.events(since=told[9].number), "block", 30)
    assert again == told[10:]


def test_who_was_away_too_long_is_told_to_begin_anew(two: TrainingNetwork, explorer: Explorer) -> None:
    two.append()
    at_height(explorer, 1)
    assert next(explorer.events(since=10**9)).kind == "reset"  # of an explorer that ran before


def test_a_fork_and_the_reorganisation_that_ends_it(two: TrainingNetwork, explorer: Explorer) -> None:
    two.append()
    two.network.wait_until_same_tip()
    at_height(explorer, 1)
    two.network.partition([{0}])
    left = [two.append(node=two.nodes[0]) for _ in range(2)]
    right = [two.append(node=two.nodes[1], miner=3) for _ in range(3)]
    wait_for(lambda: len(alarms(explorer, "fork")) == 1, 60, "the alarm about the fork")

    def off_chain() -> list[str]:
        return [block["hash"] for block in explorer.get("forks")["blocks"]]

    wait_for(lambda: off_chain() == right[::-1], 60, "node1's branch")
    forks = explorer.get("forks")
    assert [tip["hash"] for tip in forks["tips"]] == [left[-1], right[-1]]
    events = explorer.events()
    next(events)
    two.network.heal()
    two.network.wait_until_same_tip()
    until(events, "reset", 1)
    (reorganisation,) = alarms(explorer, "reorganisation")
    assert reorganisation["text"] == "node0 left 2 blocks of its chain, down to height 1, for 3 others"
    wait_for(lambda: alarms(explorer, "fork")[0]["ended"] is not None, 60, "the end of the fork")
    assert [block["hash"] for block in explorer.get("blocks?count=3")["blocks"]] == right[::-1]
    assert [block["hash"] for block in explorer.get("forks")["blocks"]] == left[::-1]
    with over(*two.nodes) as later:  # the node still knows the branch
        assert [block["hash"] for block in later.get("forks")["blocks"]] == left[::-1]


def test_a_shorter_chain_is_shown_at_once(two: TrainingNetwork, explorer: Explorer) -> None:
    hashes = [two.append() for _ in range(3)]
    at_height(explorer, 3)
    two.nodes[0].rpc("invalidateblock", hashes[1])
    at_height(explorer, 1)
    assert explorer.refusal("block/2") == "There is no block of height 2 here: the tip has height 1."
    assert explorer.get(f"block/{hashes[2]}")["in_chain"] is False


def test_a_node_that_is_down_and_one_that_restarts(two: TrainingNetwork, explorer: Explorer) -> None:
    two.append()
    at_height(explorer, 1)
    two.network.wait_until_same_tip()
    two.nodes[0].stop()
    wait_for(lambda: not node_of(explorer, 0)["up"], 60, "node0 down")
    assert node_of(explorer, 0)["problem"].startswith("node0")
    assert explorer.get("info")["tip"]["height"] == 1  # node1's chain
    wait_for(lambda: len(alarms(explorer, "down")) == 1, 60, "the alarm about node0")
    two.nodes[1].kill()
    wait_for(lambda: not node_of(explorer, 1)["up"], 60, "node1 down")
    assert explorer.client.get("/").status_code == 200
    assert explorer.refusal("rawblock/1") == "No node is up."
    two.nodes[0].start()
    wait_for(lambda: node_of(explorer, 0)["up"], 60, "node0 up")

    def going_on() -> dict[str, bool]:
        return {each["text"].split()[0]: each["ended"] is None for each in alarms(explorer, "down")}

    wait_for(lambda: going_on() == {"node0": False, "node1": True}, 60, "the end of node0's alarm")


def test_a_node_that_lags(two: TrainingNetwork, explorer: Explorer) -> None:
    two.network.partition([{0}])
    for _ in range(5):
        two.append(node=two.nodes[1])
    wait_for(lambda: len(alarms(explorer, "lagging")) == 1, 60, "the alarm about node0")
    assert node_of(explorer, 0)["behind"] == 5
    two.network.heal()
    two.network.wait_until_same_tip()
    wait_for(lambda: alarms(explorer, "lagging")[0]["ended"] is not None, 60, "the end of the alarm")


def test_an_explorer_may_start_before_its_node(two: TrainingNetwork) -> None:
    two.append()
    two.nodes[0].stop()
    with Explorer("--node", two.nodes[0].datadir) as explorer:
        wait_for(lambda: "node0 is not running" in node_of(explorer, 0)["problem"], 60, "the node asked")
        assert explorer.get("info")["tip"] is None
        assert explorer.client.get("/").status_code == 200
        two.nodes[0].start()
        wait_for(lambda: (explorer.get("info")["tip"] or {}).get("height") == 1, 60, "the node's chain")


def test_below_the_start_height_nothing_is_checked(training_network: TrainingNetworkFactory) -> None:
    network = training_network(start_height=5)
    network.nodes[0].rpc("generatetoaddress", 4, ADDRESS)
    with over(*network.nodes) as explorer:
        assert explorer.get("block/4")["certificate"] is None
        assert explorer.get("series")["height"] == []
        network.append()
        at_height(explorer, 5)
        assert explorer.get("block/5")["certificate"]["height"] == 5
        assert explorer.get("series")["height"] == [5]


def test_an_empty_chain(explorer: Explorer) -> None:
    assert explorer.get("info")["tip"]["height"] == 0
    assert explorer.get("miners") == []
    assert explorer.get("alarms") == []


def test_a_stock_node(bitcoin_network: NetworkFactory, stock_programs: Path, tmp_path: Path) -> None:
    del bitcoin_network
    with Node(stock_programs / "bitcoind", tmp_path / "stock") as node, over(node) as explorer:
        node.rpc("generatetoaddress", 3, ADDRESS)
        at_height(explorer, 3)
        assert node_of(explorer, 0)["training"] is False
        assert explorer.get("block/3")["certificate"] is None
        assert explorer.refusal("params") == "stock is not on a training network."
        assert explorer.client.get("/").status_code == 200


def test_a_pruned_node(bitcoin_network: NetworkFactory) -> None:
    pruning = {"prune": "1", "fastprune": "1"}
    with TrainingNetwork(lambda count, options: bitcoin_network(count, {**options, **pruning})) as network:
        for _ in range(500):
            network.append()
    node = network.nodes[0]
    node.rpc("pruneblockchain", 200)
    with over(node) as explorer:
        assert node_of(explorer, 0)["pruned"]
        first = node_of(explorer, 0)["pruneheight"]
        assert explorer.get("block/1")["pruned"]
        assert explorer.refusal("rawblock/1").startswith("node0: getblock: Block not available (pruned data)")
        assert explorer.get("params")["chain_id"] == network.params.chain_id.hex()  # by its bitcoin.conf
        assert explorer.get(f"block/{first}")["certificate"]["height"] == first
        assert explorer.client.get("/block/1").status_code == 200
    with Explorer("--node", f"{node.rpc_url},{node.cookie_file}") as explorer:
        wait_for(lambda: node_of(explorer, 0)["training"], 60, "the node asked")
        answer = explorer.client.get("/api/params")
        assert (answer.status_code, "has pruned the first training block" in answer.text) == (503, True)


def test_search_finds_what_has_a_page(two: TrainingNetwork, explorer: Explorer) -> None:
    block_hash = two.append(miner=2)
    at_height(explorer, 1)
    key = two.miners[2].miner_key.hex()
    block = two.nodes[0].rpc("getblock", block_hash, 2)
    address = block["tx"][0]["vout"][0]["scriptPubKey"]["address"]
    for asked, path in [
        ("1", f"/block/{block_hash}"),
        (block_hash, f"/block/{block_hash}"),
        (f" {block_hash.upper()} ", f"/block/{block_hash}"),
        (key, f"/miner/{key}"),
        (block["tx"][0]["txid"], f"/block/{block_hash}#tx-{block['tx'][0]['txid']}"),
        (address, f"/address/{address}"),
    ]:
        assert explorer.client.get("/api/search", params={"q": asked}).json() == {"path": path}
        answer = explorer.client.get("/search", params={"q": asked})
        assert (answer.status_code, answer.headers["location"]) == (303, path)
        assert explorer.client.get(path).status_code == 200
    assert [each["hash"] for each in explorer.get(f"address/{address}")["blocks"]] == [block_hash]
    for wrong in ("", "99", "ff" * 32, "nonsense", "<script>", "x" * 5000, "%00", "٣"):
        answer = explorer.client.get("/search", params={"q": wrong})
        assert answer.status_code == 404
        assert "<script>alert" not in answer.text


WRONG = {
    "block/x": "No node here has a block x.",
    "blocks?before=x": "before must be a number, 0 or more.",
    "blocks?count=-1": "count must be a number, 0 or more.",
    "cycle/1": "There is no block of height 1 here: the tip has height 0.",
    "cycle/0": "Block 0 closes no cycle: it has no certificate.",
    "miner/zz": "No miner here has the key zz: it won no block, and no record names it.",
    "nothing": "There is no such page.",
    "address/x": "x is no address: ",
}


def test_what_is_not_there_is_said_in_a_sentence(explorer: Explorer) -> None:
    for path, text in WRONG.items():
        assert explorer.refusal(path).startswith(text)
    assert explorer.client.get("/nothing").status_code == 404
    assert explorer.client.post("/api/info").status_code == 405
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd"):
        assert explorer.client.get(path).status_code == 404


def test_only_this_machine_reads_it_under_its_own_name(explorer: Explorer) -> None:
    port = explorer.url.rpartition(":")[2]
    assert explorer.client.get("/api/info", headers={"Host": f"localhost:{port}"}).status_code == 200
    assert explorer.client.get("/api/info", headers={"Host": "attacker.example"}).status_code == 400
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", int(port)))


def test_metrics_are_prometheus_text(two: TrainingNetwork, explorer: Explorer) -> None:
    two.append(table=two.table(3, 1))
    at_height(explorer, 1)
    two.nodes[1].stop()
    wait_for(lambda: len(alarms(explorer, "down")) == 1, 60, "node1 down")
    text = explorer.client.get("/metrics").text
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["up",] == 1
    assert found["bitcoin_blocks", "node0"] == 1
    assert (found["traincert_node_up", "node0"], found["traincert_node_up", "node1"]) == (1, 0)
    assert found["bitcoin_exporter_errors_total", "node1"] >= 1
    assert found["traincert_alarms", "down"] == 1
    assert (found["traincert_weight",], found["traincert_contributions",]) == (4, 2)


def test_feeds_are_rss(two: TrainingNetwork, explorer: Explorer) -> None:
    hashes = [two.append() for _ in range(3)]
    at_height(explorer, 3)
    two.nodes[1].stop()
    wait_for(lambda: len(alarms(explorer, "down")) == 1, 60, "node1 down")
    feed = ElementTree.fromstring(explorer.client.get("/feed/blocks.xml").text)  # noqa: S314 - our own
    links = [item.findtext("link") for item in feed.iter("item")]
    assert links[:3] == [f"{explorer.url}/block/{each}" for each in hashes[::-1]]
    feed = ElementTree.fromstring(explorer.client.get("/feed/alarms.xml").text)  # noqa: S314 - our own
    (item,) = feed.iter("item")
    assert "node1 does not answer" in (item.findtext("title") or "") + (item.findtext("description") or "")
    assert explorer.client.get("/feed/nothing.xml").status_code == 404


def refused(*arguments: str | Path) -> str:
    command = [TRAINCERT, "explorer", *map(str, arguments)]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.returncode == 1, answer
    (line,) = answer.stderr.splitlines()
    return line


def test_wrong_options_are_one_line(two: TrainingNetwork, tmp_path: Path) -> None:
    node = two.nodes[0].datadir
    assert refused("--node", tmp_path) == (
        f"traincert: {tmp_path} is no node's data directory: No such file or directory: bitcoin.conf"
    )
    assert "name a file with the node's RPC login too" in refused("--node", "http://127.0.0.1:1")
    assert "name a file with the node's RPC login too" in refused("--node", f"http://127.0.0.1:1,{tmp_path}/none")
    assert "is no coordinator's folder" in refused("--node", node, "--coordinator", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert refused("--node", node, "--port", port) == (
            f"traincert: port {port} of 127.0.0.1: Address already in use: choose another one with --port"
        )


def test_a_node_may_be_given_by_its_url_and_a_file_with_its_login(two: TrainingNetwork) -> None:
    node = two.nodes[0]
    url = f"http://127.0.0.1:{node.rpc_port}"
    with Explorer("--node", f"{url},{node.datadir}/regtest/.cookie") as explorer:
        wait_for(lambda: explorer.get("info")["nodes"][0]["up"], 60, "the node asked")
        assert node_of(explorer, 0)["name"] == f"127.0.0.1:{node.rpc_port}"


def test_it_ends_while_pages_are_open(two: TrainingNetwork) -> None:
    with Explorer("--node", two.nodes[0].datadir) as explorer:
        events = explorer.events()
        next(events)
        explorer.process.terminate()
        with pytest.raises(httpx.RemoteProtocolError):
            list(events)
    assert explorer.process.returncode == 130
