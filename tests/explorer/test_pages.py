"""The explorer's pages in a real Chromium, over real nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from bitcoin.core import CBlock
from playwright.sync_api import Browser, Page, Route, ViewportSize, expect
from prometheus_client.parser import text_string_to_metric_families

from explorer.made_chain import block_id
from explorer.visits import problems_of, visit
from explorer_process import TRAINCERT, Explorer
from traincert.regtest import Node, wait_for
from traincert.regtest.node import read_conf
from training_chain import TrainingChain, submit, template

AXE = Path(__file__).with_name("axe")
MONITORING = Path(__file__).parents[2] / "examples/monitoring"
PHONE: ViewportSize = {"width": 390, "height": 844}
CYCLES = 5
BLOCKS_PER_SECOND = 20
SECONDS = int(os.environ.get("TRAINCERT_EXPLORER_SECONDS", "6"))
"""How long so many blocks a second come."""

OpenPage = Callable[..., Page]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, node_programs: Path) -> Iterator[Path]:
    """The folder of a demo whose nodes run on."""
    folder = tmp_path_factory.mktemp("demo")
    command: list[str | Path] = [TRAINCERT, "demo", "--data", folder, "--keep", "--cycles", str(CYCLES), "--nodes", "2"]
    try:
        answer = subprocess.run(command, check=False, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        yield folder
    finally:
        for datadir in folder.glob("node*"):
            subprocess.run([node_programs / "bitcoin-cli", f"-datadir={datadir}", "stop"], check=False)


@pytest.fixture(scope="module")
def explorer(demo: Path) -> Iterator[Explorer]:
    nodes = [option for node in sorted(demo.glob("node*")) for option in ("--node", node)]
    with Explorer(*nodes, "--coordinator", demo / "coordinator") as explorer:
        at_height(explorer, CYCLES)
        yield explorer


@pytest.fixture
def chain() -> TrainingChain:
    return TrainingChain()


@pytest.fixture
def node(node_programs: Path, tmp_path: Path, chain: TrainingChain) -> Iterator[Node]:
    with Node(node_programs / "bitcoind", tmp_path / "node", chain.params.node_options()) as node:
        yield node


@pytest.fixture
def lone(node: Node) -> Iterator[Explorer]:
    """An explorer of a node on an empty chain, without records."""
    with Explorer("--node", node.datadir) as explorer:
        at_height(explorer, 0)
        yield explorer


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens pages, each of a visitor who was never here. None may break a rule of the browser, or end in an error."""
    problems: list[list[str]] = []
    contexts = []

    def open_page(url: str, **settings: Any) -> Page:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        problems.append(problems_of(page))
        visit(page, url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    away = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "404")
    assert [each for found in problems for each in found if not any(text in each for text in away)] == []


def at_height(explorer: Explorer, height: int) -> None:
    wait_for(lambda: (explorer.get("info")["tip"] or {}).get("height") == height, 60, f"the explorer at {height}")


def paths(explorer: Explorer) -> list[str]:
    """One page of each kind."""
    tip = explorer.get("block/3")
    key = tip["certificate"]["winner_key"]
    address = tip["block"]["tx"][0]["vout"][0]["scriptPubKey"]["address"]
    numbered = ["/block/0", "/block/1", "/block/3", "/cycle/3", f"/miner/{key}", f"/address/{address}"]
    return ["/", "/blocks", *numbered, "/miners", "/nodes", "/search?q=nothing"]


def append(chain: TrainingChain, node: Node) -> str:
    slot = template(node)
    certificate = chain.next_certificate(slot)
    block: CBlock = chain.block(slot, certificate)
    assert submit(node, block) is None
    chain.advance(certificate)
    return block_id(block)


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The script of axe-core, installed outside the repository."""
    npm = shutil.which("npm")
    assert npm is not None, "npm not found: install it (on Debian: apt-get install npm)"
    folder = tmp_path_factory.mktemp("axe")
    for name in ("package.json", "package-lock.json"):
        shutil.copy(AXE / name, folder)
    install = [npm, "ci", "--prefer-offline", "--ignore-scripts", "--no-audit", "--no-fund"]
    installed = subprocess.run(install, cwd=folder, check=False, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return (folder / "node_modules/axe-core/axe.min.js").read_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_people_with_disabilities_can_use_each_page(
    explorer: Explorer, open_page: OpenPage, axe: str, theme: Literal["light", "dark"]
) -> None:
    for path in paths(explorer):
        page = open_page(explorer.url + path, color_scheme=theme, bypass_csp=True)  # axe is a script of ours
        if path == "/":
            page.wait_for_selector("#chart[data-blocks]")
        page.evaluate(axe)
        found = page.evaluate("axe.run().then(({ violations }) => violations)")
        serious = [
            (each["id"], [node["target"] for node in each["nodes"]])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
        assert serious == [], (path, theme)


def test_dark_and_light_are_different(explorer: Explorer, open_page: OpenPage) -> None:
    def brightness(theme: str, element: str, style: str) -> int:
        page = open_page(explorer.url, color_scheme=theme)
        colour = page.evaluate(f"getComputedStyle(document.querySelector('{element}')).{style}")
        return sum(int(each) for each in re.findall(r"\d+", colour)[:3])

    for element in ("body", ".card"):
        assert (
            brightness("dark", element, "backgroundColor") < 200 < 600 < brightness("light", element, "backgroundColor")
        )
    assert brightness("dark", "body", "color") > 500 > 200 > brightness("light", "body", "color")


def test_no_page_is_wider_than_a_phone(explorer: Explorer, open_page: OpenPage) -> None:
    for path in paths(explorer):
        page = open_page(explorer.url + path, viewport=PHONE)
        if path == "/":
            page.wait_for_selector("#chart[data-blocks]")
        assert page.evaluate("document.scrollingElement.scrollWidth") == PHONE["width"], path


def test_a_phone_also_shows_miners_with_long_names_that_were_not_lucky(explorer: Explorer, open_page: OpenPage) -> None:
    page = open_page(explorer.url, viewport=PHONE)
    found = page.evaluate("""() => {
        for (const row of document.querySelectorAll(".shares tr[data-key]")) {
          row.children[0].firstElementChild.textContent = "a_name_of_as_many_as_32_letters_";
          row.children[3].innerHTML = '1,000 to 2,000 <strong class="bad">outside</strong>';
        }
        for (const each of document.querySelectorAll("#status dd")) each.textContent = "a_long_word_".repeat(9);
        return [document.querySelectorAll(".shares .bad").length > 0, document.scrollingElement.scrollWidth];
    }""")
    assert found == [True, PHONE["width"]]


def test_each_page_can_be_read_without_javascript(explorer: Explorer, open_page: OpenPage) -> None:
    for path in paths(explorer):
        page = open_page(explorer.url + path, java_script_enabled=False)
        assert "You can read these pages without JavaScript." in page.inner_text("body")
        assert page.inner_text("h1")
    names = page_names(open_page(explorer.url, java_script_enabled=False))
    assert names == [each["name"] for each in explorer.get("blocks")["blocks"] if each["name"]]


def page_names(page: Page) -> list[str]:
    """The names of the winners in the list of blocks."""
    return page.locator("#block-rows a.who").all_inner_texts()


def test_the_browser_checks_each_block_that_it_shows(explorer: Explorer, open_page: OpenPage) -> None:
    page = open_page(explorer.url)
    expect(page.locator(".check[data-state=good]")).to_have_count(CYCLES, timeout=60_000)
    expect(page.locator(".check[data-state=none]")).to_have_count(1)
    page = open_page(f"{explorer.url}/block/3")
    expect(page.locator("#checks tbody tr[data-state=good]").first).to_be_attached(timeout=60_000)
    assert page.locator("#checks tbody tr:not([data-state=good])").all_inner_texts() == []


@pytest.mark.parametrize(
    "lost",
    [
        *("static/explorer.css", "static/explorer.js", "static/check/view.js", "static/check/worker.js"),
        *("static/check/rules.js", "static/chart.js", "api/series", "api/params", "api/rawblock/*", "miners", "nodes"),
    ],
)
def test_a_page_is_whole_although_a_request_was_lost(explorer: Explorer, browser: Browser, lost: str) -> None:
    def lose(route: Route) -> None:
        addresses.append(route.request.url)
        route.abort("failed")

    addresses: list[str] = []
    with browser.new_context() as context:
        page = context.new_page()
        page.route(f"{explorer.url}/{lost}", lose, times=1)
        with page.expect_request(lambda request: request.url in addresses, timeout=60_000):
            page.goto(explorer.url)
        expect(page.locator("#chart")).to_have_attribute("data-blocks", str(CYCLES))
        expect(page.locator(".check[data-state=good]")).to_have_count(CYCLES)
        expect(page.locator("body")).to_have_css("margin", "0px")
        expect(page.locator("#unloaded")).to_be_hidden()
        assert len(addresses) == 1


def test_a_page_says_that_a_part_of_it_does_not_load(explorer: Explorer, browser: Browser) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.route("**/check/view.js", lambda route: route.abort("failed"))
        page.goto(explorer.url)
        expect(page.locator("#unloaded")).to_have_text(
            "A part of this page did not load. Your browser may not check blocks. Please load the page again."
        )
        expect(page.locator(".check[data-state]")).to_have_count(0)


def test_a_cycle_shows_each_task_and_why_an_update_was_refused(explorer: Explorer, open_page: OpenPage) -> None:
    for height in range(1, CYCLES + 1):
        record = explorer.get(f"cycle/{height}")
        assert record["matches"]
        text = open_page(f"{explorer.url}/cycle/{height}").inner_text("main")
        for task in record["record"]["tasks"]:
            assert record["names"][task["miner"]] in text
            assert f"{task['update_size']:,}" in text
            assert task["refusal"] is None or task["refusal"] in text
            assert not task["weight"] or f"{task['weight']:,}" in text
            used = task["commit"]["resources"]
            assert f"{used['user_seconds'] + used['system_seconds']:.2f}" in text
            assert f"{used['page_faults']:,}" in text


def test_a_record_that_was_changed_is_not_taken_for_the_blocks(explorer: Explorer, demo: Path) -> None:
    path = demo / "coordinator/run/cycles/00000002.json"
    right = path.read_bytes()
    changed = {**json.loads(right), "metric": 0.5}
    path.write_bytes(json.dumps(changed, sort_keys=True, indent=1).encode() + b"\n")
    try:
        assert explorer.get("cycle/2")["matches"] is False
        answer = explorer.client.get("/cycle/2").text
        assert "This record is the one that block 2 names" not in answer
        path.write_bytes(b"{}")
        assert explorer.refusal("cycle/2").startswith("The record of block 2 cannot be read: ")
        path.unlink()
        assert explorer.refusal("cycle/2").startswith("The record of block 2 is not here: ")
    finally:
        path.write_bytes(right)


def test_it_says_what_the_coordinator_said_last(explorer: Explorer) -> None:
    coordinator = explorer.get("info")["coordinator"]
    assert (coordinator["runs"], coordinator["closed"]) == (False, CYCLES)
    assert {"miner0", "miner1", "miner2", "miner3"} <= set(coordinator["present"])


def test_a_miners_luck_is_that_of_its_draws(explorer: Explorer) -> None:
    miners = explorer.get("miners")
    assert sum(each["blocks"] for each in miners) == CYCLES
    assert sum(each["drawn"] for each in miners) == miners[0]["draws"] == CYCLES - 1
    assert sum(each["expected"] for each in miners) == pytest.approx(CYCLES - 1)
    assert sum(each["weight"] for each in miners) == pytest.approx(1)
    tables = [explorer.get(f"block/{height}")["table"] for height in range(2, CYCLES + 1)]
    for miner in miners:
        chances = [
            sum(leaf["weight"] for leaf in table if leaf["miner_key"] == miner["key"])
            / sum(leaf["weight"] for leaf in table)
            for table in tables
        ]
        assert sum(chances) == pytest.approx(miner["expected"])
        assert len(explorer.get(f"miner/{miner['key']}")["won"]) == miner["blocks"]


def test_the_chain_is_played_back_from_its_start(explorer: Explorer, open_page: OpenPage) -> None:
    page = open_page(explorer.url)
    page.wait_for_selector("#chart[data-blocks]")
    slider = page.locator("#at")
    slider.focus()
    for _ in range(CYCLES):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#readout")).to_contain_text("Block 1,")
    expect(page.locator("#blocks-title")).to_have_text("Blocks up to 1")
    page.click("#play")
    expect(page.locator("#blocks-title")).to_have_text("Latest blocks")
    expect(page.locator("#readout")).to_contain_text(f"Block {CYCLES},")


def test_a_block_appears_without_reload(chain: TrainingChain, node: Node, lone: Explorer, open_page: OpenPage) -> None:
    page = open_page(lone.url)
    expect(page.locator("#status")).to_contain_text("This chain is empty")
    for height in range(1, 4):
        block_hash = append(chain, node)
        check = page.locator(f'.check[data-hash="{block_hash}"]')
        expect(check).to_have_attribute("data-state", "good", timeout=60_000)
        expect(page.locator("#chart")).to_have_attribute("data-blocks", str(height))
    expect(page.locator("#status")).not_to_contain_text("This chain is empty")


def test_none_is_lost_of_twenty_blocks_a_second(
    chain: TrainingChain, node: Node, lone: Explorer, open_page: OpenPage
) -> None:
    count = BLOCKS_PER_SECOND * SECONDS
    page = open_page(lone.url)
    page.evaluate(
        "() => { window.heights = []; window.source = new EventSource('/api/changes'); "
        "source.addEventListener('block', ({ data }) => window.heights.push(JSON.parse(data).height)); "
        "return new Promise((resolve) => { source.onopen = resolve; }).then(() => null); }"
    )
    begin, block_hash = time.monotonic(), ""
    for number in range(count):
        time.sleep(max(0.0, begin + number / BLOCKS_PER_SECOND - time.monotonic()))
        block_hash = append(chain, node)
    expect(page.locator("#chart")).to_have_attribute("data-blocks", str(count), timeout=60_000)
    last = page.locator(f'.check[data-hash="{block_hash}"]')
    expect(last).to_have_attribute("data-state", "good", timeout=60_000)
    assert page.evaluate("heights") == list(range(1, count + 1))
    assert page.locator(".check[data-hash]").count() <= 25
    old = open_page(f"{lone.url}/blocks?before=30")
    assert old.locator(".check[data-hash]").count() <= 25


def test_a_page_says_that_its_node_is_away_and_comes_back_by_itself(
    chain: TrainingChain, node: Node, lone: Explorer, open_page: OpenPage
) -> None:
    append(chain, node)
    at_height(lone, 1)
    page = open_page(lone.url)
    node.stop()
    expect(page.locator("#status")).to_contain_text("does not answer", timeout=60_000)
    node.start()
    expect(page.locator("#status")).not_to_contain_text("does not answer", timeout=60_000)
    append(chain, node)
    expect(page.locator("#chart")).to_have_attribute("data-blocks", "2", timeout=60_000)


def test_a_page_says_that_the_explorer_is_away_and_comes_back_by_itself(
    chain: TrainingChain, node: Node, open_page: OpenPage
) -> None:
    with Explorer("--node", node.datadir) as first:
        page = open_page(first.url)
        expect(page.locator("#status")).to_contain_text("This chain is empty")
    expect(page.locator("#connection")).to_contain_text("Connection lost", timeout=60_000)
    append(chain, node)
    with Explorer("--node", node.datadir, "--port", first.url.rpartition(":")[2]):
        expect(page.locator("#chart")).to_have_attribute("data-blocks", "1", timeout=60_000)
        expect(page.locator("#connection")).to_be_empty()


def test_a_fork_is_drawn(chain: TrainingChain, node: Node, lone: Explorer, open_page: OpenPage) -> None:
    hashes = [append(chain, node) for _ in range(2)]
    at_height(lone, 2)
    node.rpc("invalidateblock", hashes[1])
    at_height(lone, 1)
    page = open_page(f"{lone.url}/nodes")
    expect(page.locator(f'svg a[href="/block/{hashes[1]}"]')).to_have_count(1)
    expect(page.locator("main")).to_contain_text("left 1 block")
    visit(page, f"{lone.url}/block/{hashes[1]}")
    expect(page.locator("main")).to_contain_text("is not in the chain")


def test_a_winner_that_signs_two_blocks_is_an_alarm(
    chain: TrainingChain, node: Node, lone: Explorer, open_page: OpenPage
) -> None:
    slot = template(node)
    certificate = chain.next_certificate(slot)
    blocks = [chain.block(slot | {"curtime": slot["curtime"] + later}, certificate) for later in range(2)]
    assert [submit(node, block) for block in blocks] == [None, "inconclusive"]

    def told() -> list[str]:
        return [each["text"] for each in lone.get("alarms") if each["kind"] == "equivocation"]

    wait_for(lambda: len(told()) == 1, 60, "the alarm about the winner")
    assert all(block_id(block) in told()[0] for block in blocks)
    expect(open_page(lone.url).locator("#alarm-list")).to_contain_text("equivocation")


def test_a_slot_that_was_drawn_again_is_marked(
    chain: TrainingChain, node: Node, lone: Explorer, open_page: OpenPage
) -> None:
    append(chain, node)
    slot = template(node)
    slot["curtime"] += 3 * chain.round_seconds
    certificate = chain.next_certificate(slot, round_=2)
    assert submit(node, chain.block(slot, certificate)) is None
    at_height(lone, 2)
    page = open_page(lone.url)
    expect(page.locator("#readout")).to_contain_text("drawn again 2 times")
    expect(page.locator("#totals")).to_contain_text("2")


def test_a_loss_that_is_no_number_is_not_shown_as_one(chain: TrainingChain, node: Node, lone: Explorer) -> None:
    slot = template(node)
    certificate = chain.sign(replace(chain.next_certificate(slot), loss_after=2**64 - 1))
    assert submit(node, chain.block(slot, certificate)) is None
    at_height(lone, 1)
    assert lone.get("series")["loss"] == [None]
    assert "traincert_loss" not in lone.client.get("/metrics").text
    assert lone.client.get("/").status_code == lone.client.get("/block/1").status_code == 200


def test_what_comes_from_outside_is_text_and_not_html(explorer: Explorer, open_page: OpenPage) -> None:
    for evil in ("<img src=x onerror=alert(1)>", '"><script>alert(1)</script>', "{{ 7 * 7 }}"):
        page = open_page(explorer.url)
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        page.fill("#q", evil)
        page.press("#q", "Enter")
        page.wait_for_url("**/search?*")
        assert evil in page.inner_text("main")
        assert page.locator("main img, main script").count() == 0


def test_the_dashboard_asks_only_for_numbers_that_are_there(explorer: Explorer) -> None:
    text = explorer.client.get("/metrics").text
    names = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:bitcoin|traincert)_\w+", target["expr"])
    }
    assert asked <= names
    assert len(asked) > 10


def test_the_demos_nodes_are_what_the_explorer_shows_by_default(demo: Path) -> None:
    place = demo.parent / "place"
    place.mkdir()
    (place / "demo").symlink_to(demo)
    port = read_conf(demo / "node0")["rpcport"]
    assert port
    process = subprocess.Popen([TRAINCERT, "explorer", "--port", "0"], cwd=place, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline().startswith("explorer: http://127.0.0.1:")
    finally:
        process.terminate()
        process.communicate()
    answer = subprocess.run([TRAINCERT, "explorer"], check=False, cwd=demo, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (
        1,
        "traincert: there is no demo here: name a node with --node\n",
    )
