"""The explorer's own pages, over a real node, as a visitor's browser checks them."""

from __future__ import annotations

from playwright.sync_api import Browser, expect

from explorer.visits import problems_of, visit
from explorer_process import Explorer
from traincert.regtest import Node, wait_for
from traincert.regtest.plugin import NetworkFactory
from training_chain import TrainingChain, submit, template

ADDRESS = "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202"


def append(chain: TrainingChain, node: Node) -> str:
    """Append a valid block to a node's tip, and return its hash."""
    slot = template(node)
    certificate = chain.next_certificate(slot)
    assert submit(node, chain.block(slot, certificate)) is None
    chain.advance(certificate)
    tip: str = node.rpc("getbestblockhash")
    return tip


def test_all_that_the_pages_show_of_a_true_chain_is_good(browser: Browser, bitcoin_network: NetworkFactory) -> None:
    chain = TrainingChain(start_height=3)
    node = bitcoin_network(1, chain.params.node_options()).nodes[0]
    node.rpc("generatetoaddress", 2, ADDRESS)
    hashes = [append(chain, node) for _ in range(3)]
    with Explorer("--node", node.datadir) as explorer, browser.new_context() as context:
        wait_for(lambda: (explorer.get("info")["tip"] or {}).get("height") == 5, 60, "all blocks read")
        page = context.new_page()
        problems = problems_of(page)
        visit(page, f"{explorer.url}/blocks")
        expect(page.locator(".check[data-state=good]")).to_have_count(3)
        expect(page.locator(".check[data-state=none]")).to_have_count(3)
        visit(page, f"{explorer.url}/block/{hashes[2]}")
        expect(page.locator("#checks")).to_have_attribute("data-state", "good")
        expect(page.locator("#checks tbody tr[data-state=good]")).to_have_count(20)
        visit(page, f"{explorer.url}/block/1")
        expect(page.locator("#checks")).to_have_attribute("data-state", "none")
        visit(page, explorer.url)
        hashes.append(append(chain, node))
        expect(page.locator(f'.check[data-hash="{hashes[3]}"]').first).to_have_attribute("data-state", "good")
        page.get_by_role("button", name="Check the whole chain").click()
        said = page.locator("#chain-check div [role=status]")
        expect(said).to_have_text("✓ Every block from 6 to 3 is good. 4 good; 0 checked now, 4 before.")
        assert problems == []
