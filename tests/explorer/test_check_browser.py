"""The checks in a visitor's browser: all is well on a true chain, and each lie of the server is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from bitcoin.core import CBlock
from playwright.sync_api import Browser, Page, expect

from explorer.made_chain import MadeChain, block_id, plain_block
from explorer.served import Served, serve, stated
from explorer.visits import problems_of, visit
from traincert.bridge.testing.invalid import WRONG, WRONG_WITH_PARENT, break_rule
from training_chain import TrainingChain

HEIGHT = 5
"""Of the block that the server lies about."""

MADE = MadeChain(length=8)
OTHER_CHAIN_ID = "ab" * 32


@pytest.fixture
def served() -> Iterator[Served]:
    with serve(MADE) as server:
        yield server


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a visitor who was never here. At the end it must not have broken a rule of the browser."""
    with browser.new_context() as context:
        page = context.new_page()
        problems = problems_of(page)
        yield page
        assert [each for each in problems if "status of 404" not in each] == []


def block_at(height: int) -> str:
    return block_id(MADE.blocks[height])


def rows(page: Page) -> dict[str, str]:
    """The state of each rule in the list, once the block is checked."""
    page.wait_for_selector("#checks tbody tr", state="attached")
    states = "all => Object.fromEntries(all.map(row => [row.dataset.rule, row.dataset.state]))"
    found: dict[str, str] = page.locator("#checks tbody tr").evaluate_all(states)
    return found


def open_block(page: Page, served: Served, block_hash: str, query: str = "") -> dict[str, str]:
    visit(page, f"{served.url}/block/{block_hash}{query}")
    return rows(page)


def broken(page: Page, served: Served, block_hash: str, query: str = "") -> list[str]:
    """The rules that the page says are broken. The mark must be red, too, and name the first."""
    found = [rule for rule, state in open_block(page, served, block_hash, query).items() if state == "bad"]
    mark = page.locator(".check")
    if found:
        expect(mark).to_have_attribute("data-state", "bad")
        expect(mark).to_have_text(f"✗ {found[0]}")
        expect(page.locator("#checks [role=status]")).to_contain_text(found[0])
    return found


def test_every_rule_of_a_true_block_holds(page: Page, served: Served) -> None:
    found = open_block(page, served, block_at(HEIGHT))
    assert set(found) == {"network", "hash", "merkleroot", *WRONG, "parent", *WRONG_WITH_PARENT, "shown"}
    assert set(found.values()) == {"good"}
    expect(page.locator(".check")).to_have_attribute("data-state", "good")
    expect(page.locator(".check")).to_have_text("✓ checked")
    expect(page.locator("#checks")).to_have_attribute("data-state", "good")
    expect(page.locator("#checks tr[data-rule=shown]")).to_contain_text(f"{len(served.shown[block_at(HEIGHT)])} fields")
    expect(page.locator("#checks tr[data-rule=bad-traincert-draw]")).to_contain_text("ticket")


def test_every_block_of_a_list_is_marked(page: Page, served: Served) -> None:
    visit(page, served.url)
    expect(page.locator(".check[data-state=good]")).to_have_count(8)
    expect(page.locator(".check[data-state=none]")).to_have_count(1)
    expect(page.locator(".check[data-state=none]")).to_contain_text("no certificate")


@pytest.mark.parametrize("reason", [*WRONG, *WRONG_WITH_PARENT])
def test_a_broken_rule_is_named(page: Page, served: Served, reason: str) -> None:
    wrong = break_rule(reason, MADE.forgers[HEIGHT], MADE.blocks[HEIGHT], MADE.certificates[HEIGHT])
    assert broken(page, served, served.add(wrong, HEIGHT))[0] == reason


@pytest.mark.parametrize("reason", ["bad-traincert-draw", "bad-traincert-winner-sig"])
def test_a_broken_rule_is_named_where_tables_are_large(page: Page, reason: str) -> None:
    made = MadeChain(length=3, leaves=64)
    with serve(made) as served:
        assert broken(page, served, block_id(made.blocks[3])) == []
        wrong = break_rule(reason, made.forgers[3], made.blocks[3], made.certificates[3])
        assert broken(page, served, served.add(wrong, 3)) == [reason]


def test_the_bytes_of_another_block_are_not_taken(page: Page, served: Served) -> None:
    served.blocks[block_at(HEIGHT)] = served.blocks[block_at(HEIGHT - 1)]
    assert broken(page, served, block_at(HEIGHT)) == ["hash"]


def test_a_parent_with_the_bytes_of_another_block_is_not_taken(page: Page, served: Served) -> None:
    served.blocks[block_at(HEIGHT - 1)] = served.blocks[block_at(HEIGHT - 2)]
    assert broken(page, served, block_at(HEIGHT)) == ["parent"]


def other_transaction(block: CBlock) -> bytes:
    """The block's bytes with another amount in its first output: its header does not commit to it."""
    raw: bytes = block.serialize()
    amount = block.vtx[0].vout[0].nValue.to_bytes(8, "little")
    assert raw.count(amount) == 1
    return raw.replace(amount, (1).to_bytes(8, "little"))


CHANGED_BYTES = {
    "another amount": other_transaction,
    "one byte more": lambda block: block.serialize() + b"\x00",
    "one byte less": lambda block: block.serialize()[:-1],
    "only the header": lambda block: block.serialize()[:80],
    "no transactions": lambda block: block.serialize()[:80] + b"\x00",
}


@pytest.mark.parametrize("change", CHANGED_BYTES.values(), ids=CHANGED_BYTES)
def test_bytes_that_the_header_does_not_commit_to_are_not_taken(page: Page, served: Served, change: Any) -> None:
    served.blocks[block_at(HEIGHT)] = change(MADE.blocks[HEIGHT])
    assert broken(page, served, block_at(HEIGHT)) == ["merkleroot"]
    assert broken(page, served, block_at(HEIGHT + 1)) == ["parent"]


def test_transactions_that_are_there_twice_are_not_taken(page: Page, served: Served) -> None:
    """The root over three transactions is that over four of which the last two are the same (CVE-2012-2459)."""
    coinbase, *rest = MADE.blocks[HEIGHT].vtx
    odd = plain_block(HEIGHT, MADE.blocks[HEIGHT - 1])
    three = CBlock(4, odd.hashPrevBlock, nTime=odd.nTime, nBits=odd.nBits, vtx=[coinbase, *MADE.blocks[6].vtx[1:3]])
    four = three.get_header().serialize() + b"\x04" + b"".join(each.serialize() for each in (*three.vtx, three.vtx[-1]))
    assert not rest
    shown = served.add(three, HEIGHT)
    assert "merkleroot" not in broken(page, served, shown)
    served.blocks[shown] = four
    assert broken(page, served, shown) == ["merkleroot"]


@pytest.mark.parametrize("name", ["loss_after", "winner_key", "draw.weight", "time", "size", "nTx", "award", "record"])
def test_a_field_that_is_shown_wrongly_is_named(page: Page, served: Served, name: str) -> None:
    text = served.shown[block_at(HEIGHT)][name]
    served.shown[block_at(HEIGHT)][name] = (
        "appointed" if name == "award" else text[:-1] + ("2" if text[-1] == "1" else "1")
    )
    assert broken(page, served, block_at(HEIGHT)) == ["shown"]
    expect(page.locator("#checks tr[data-rule=shown]")).to_contain_text(f"{name} is shown as")


def test_a_field_that_changes_later_is_compared_again(page: Page, served: Served) -> None:
    assert "bad" not in open_block(page, served, block_at(HEIGHT)).values()
    page.evaluate("document.querySelector('[data-field=loss_after]').textContent = '1'")
    expect(page.locator("#checks tr[data-rule=shown]")).to_have_attribute("data-state", "bad")
    expect(page.locator(".check")).to_have_attribute("data-state", "bad")


def test_a_certificate_where_none_can_be_is_shown_wrongly(page: Page, served: Served) -> None:
    served.shown[block_at(0)]["loss_after"] = "1"
    assert broken(page, served, block_at(0)) == ["shown"]


def test_text_from_the_server_is_never_html(page: Page, served: Served) -> None:
    assert served.params is not None
    served.params["chain_id"] = "<img src=x onerror=alert(1)>"
    assert broken(page, served, block_at(HEIGHT)) == ["network"]
    expect(page.locator("#checks tr[data-rule=network]")).to_contain_text("<img src=x")
    assert page.locator("#checks img").count() == 0


CHANGED_PARAMS = {
    "another chain_id": lambda said: said | {"chain_id": OTHER_CHAIN_ID},
    "another wait": lambda said: said | {"options": said["options"] | {"traininground": "61"}},
    "another key": lambda said: (
        said | {"options": said["options"] | {"trainingkeys": [said["options"]["trainingkeys"][0].rpartition(",")[0]]}}
    ),
    "no beacon": lambda said: said | {"options": said["options"] | {"trainingbeacon": ""}},
    "no options": lambda said: {"chain_id": said["chain_id"]},
}


@pytest.mark.parametrize("change", CHANGED_PARAMS.values(), ids=CHANGED_PARAMS)
def test_options_that_are_not_of_the_chain_id_are_named(page: Page, served: Served, change: Any) -> None:
    served.params = change(served.params)
    assert broken(page, served, block_at(HEIGHT))[0] == "network"


def test_another_network_with_its_own_chain_id_did_not_sign_the_block(page: Page, served: Served) -> None:
    served.params = stated(replace(MADE.chain.params, round_seconds=61))
    assert broken(page, served, block_at(HEIGHT)) == ["bad-traincert-coordinator-sig", "bad-traincert-winner-sig"]


def test_a_start_height_above_the_block_does_not_hide_its_certificate(page: Page, served: Served) -> None:
    """The options are those of a network that starts later: then the visitor must know the chain_id."""
    served.params = stated(TrainingChain(start_height=100).params)
    found = open_block(page, served, block_at(HEIGHT), f"?chain_id={MADE.chain.params.chain_id.hex()}")
    assert found["network"] == "bad"
    expect(page.locator(".check")).to_have_attribute("data-state", "bad")


@pytest.mark.parametrize("lie", [HEIGHT + 1, 0])
def test_another_height_than_the_blocks_is_named(page: Page, served: Served, lie: int) -> None:
    served.heights[block_at(HEIGHT)] = lie
    expected = "bad-traincert-height" if lie else "coinbase-height"
    assert broken(page, served, block_at(HEIGHT))[0] == expected


def test_another_network_than_the_one_that_the_visitor_trusts_is_named(page: Page, served: Served) -> None:
    assert broken(page, served, block_at(HEIGHT), f"?chain_id={OTHER_CHAIN_ID}") == ["network"]
    expect(page.locator("#checks tr[data-rule=network]")).to_contain_text(f"you trust {OTHER_CHAIN_ID}")
    assert broken(page, served, block_at(HEIGHT)) == ["network"], "the browser has kept it"
    link = f"?chain_id={MADE.chain.params.chain_id.hex()}"
    assert broken(page, served, block_at(HEIGHT), link) == ["network"], "a link does not replace it"
    served.params = None
    assert broken(page, served, block_at(HEIGHT))[0] == "network", "that there is no network is a lie, too"


def test_a_visitor_says_which_network_to_trust(page: Page, served: Served) -> None:
    visit(page, served.url)
    expect(page.locator(".check[data-state=good]")).to_have_count(8)
    field, status = page.get_by_label("chain_id that you trust"), page.locator("#chain-check form [role=status]")
    for wrong in ("", "abc", "zz" * 32):
        field.fill(wrong)
        page.get_by_role("button", name="Trust this network").click()
        expect(status).to_have_text("A chain_id has 64 hex digits.")
    field.fill(OTHER_CHAIN_ID)
    page.get_by_role("button", name="Trust this network").click()
    expect(page.locator(".check[data-state=bad]")).to_have_count(9)
    page.reload()
    expect(page.locator(".check[data-state=bad]")).to_have_count(9)
    expect(field).to_have_value(OTHER_CHAIN_ID)
    visit(page, f"{served.url}/?chain_id={MADE.chain.params.chain_id.hex()}")
    expect(status).to_have_text(f"This link names another chain_id. You trust {OTHER_CHAIN_ID}.")
    page.get_by_role("button", name="Trust this network").click()
    expect(page.locator(".check[data-state=good]")).to_have_count(8)
    page.get_by_role("button", name="Trust none").click()
    expect(status).to_have_text("You trust no network by its chain_id.")
    expect(page.locator(".check[data-state=good]")).to_have_count(8)


def test_a_block_that_cannot_be_had_is_not_known(page: Page, served: Served) -> None:
    del served.blocks[block_at(HEIGHT)]
    found = open_block(page, served, block_at(HEIGHT))
    assert found["hash"] == "unknown"
    assert "bad" not in found.values()
    expect(page.locator(".check")).to_have_attribute("data-state", "unknown")
    expect(page.locator("#checks [role=status]")).to_contain_text(f"The node does not have block {block_at(HEIGHT)}.")
    assert open_block(page, served, block_at(HEIGHT + 1))["bad-traincert-draw"] == "unknown"
    expect(page.locator(".check")).to_have_attribute("data-state", "unknown")


def test_without_a_training_network_no_block_has_a_certificate(page: Page, served: Served) -> None:
    served.params = None
    visit(page, served.url)
    expect(page.locator(".check[data-state=none]")).to_have_count(9)


def test_blocks_that_come_into_the_page_later_are_marked(page: Page, served: Served) -> None:
    visit(page, f"{served.url}/chain")
    served.add(break_rule("bad-traincert-model", MADE.forgers[8], MADE.blocks[8], MADE.certificates[8]), 8)
    for block_hash, height in served.heights.items():
        page.evaluate(
            """([hash, height]) => {
              const row = document.createElement('p');
              row.innerHTML = '<span class="check"></span>';
              Object.assign(row.firstChild.dataset, {hash, height});
              document.body.append(row);
            }""",
            [block_hash, height],
        )
    expect(page.locator(".check[data-state=good]")).to_have_count(8)
    expect(page.locator(".check[data-state=bad]")).to_have_text(["✗ bad-traincert-model"])


def test_a_block_that_is_known_a_moment_later_is_checked_then(page: Page, served: Served) -> None:
    raw = served.blocks.pop(block_at(HEIGHT))
    visit(page, served.url)
    expect(page.locator(".check[data-state=unknown]")).to_have_count(2)  # and the one after it
    served.blocks[block_at(HEIGHT)] = raw
    page.evaluate("document.querySelector('ul').append(document.querySelector('li'))")
    expect(page.locator(".check[data-state=good]")).to_have_count(8)


def check_chain(page: Page) -> str:
    """What the check of the whole chain says at its end."""
    page.get_by_role("button", name="Check the whole chain").click()
    page.get_by_role("button", name="Check the whole chain").wait_for(timeout=120_000)
    return page.locator("#chain-check div [role=status]").inner_text()


def test_the_whole_chain_is_checked_once(page: Page) -> None:
    with serve(MadeChain(length=200, leaves=64)) as served:
        visit(page, f"{served.url}/chain")
        assert check_chain(page) == "✓ Every block from 200 to 1 is good. 200 good; 200 checked now, 0 before."
        assert sorted(served.asked) == sorted(served.blocks), "each was asked for once"
        visit(page, f"{served.url}/chain")
        assert check_chain(page) == "✓ Every block from 200 to 1 is good. 200 good; 0 checked now, 200 before."
        visit(page, served.url)
        expect(page.locator(".check[data-state=good]")).to_have_count(200)
        expect(page.locator(".check[data-state=none]")).to_have_count(1)
        assert len(served.asked) == len(served.blocks) + 1, (
            "only the block without a certificate, which nobody had checked"
        )


def test_the_check_of_the_chain_goes_on_after_a_broken_block(page: Page) -> None:
    """A broken block has a valid one on it: the coordinator signed both."""
    made = MadeChain(length=3)
    wrong = break_rule("bad-traincert-model", made.forgers[3], made.blocks[3], made.certificates[3])
    made.blocks[3] = wrong
    after = MadeChain(length=4, chain=made.chain, blocks=made.blocks)
    with serve(after) as served:
        visit(page, f"{served.url}/chain")
        assert check_chain(page) == "✗ Not every block is good. 3 good, 1 broken; 4 checked now, 0 before."
        expect(page.locator("#chain-check li")).to_have_count(1)
        expect(page.locator("#chain-check li")).to_contain_text("Block 3: ")
        expect(page.locator("#chain-check li a")).to_have_attribute("href", f"/block/{block_id(wrong)}")
        expect(page.locator("#chain-check li")).to_contain_text("bad-traincert-model")


def test_the_check_of_the_chain_ends_where_the_chain_is_not_known(page: Page, served: Served) -> None:
    served.blocks[block_at(HEIGHT)] = other_transaction(MADE.blocks[HEIGHT])
    visit(page, f"{served.url}/chain")
    ends = f"It ends at block {HEIGHT}: what is below it is not known."
    assert check_chain(page) == f"2 good, 2 broken; 4 checked now, 0 before. {ends}"
    expect(page.locator("#chain-check li")).to_contain_text(["Block 6: ", "Block 5: "])
    served.blocks[block_at(HEIGHT)] = MADE.blocks[HEIGHT].serialize()
    assert check_chain(page).startswith("✓ Every block from 8 to 1 is good."), "what was broken is checked again"
    del served.blocks[block_at(2)]
    visit(page, f"{served.url}/chain")
    assert check_chain(page).startswith("✓"), "what was checked once needs no server"


def test_the_check_of_the_chain_says_where_there_is_nothing_to_check(page: Page, served: Served) -> None:
    def said(query: str = "") -> str:
        visit(page, f"{served.url}/chain{query}")
        return check_chain(page)

    served.params = stated(TrainingChain(start_height=100).params)
    assert said() == "No block has a certificate yet."
    served.params = None
    assert said() == "There is no training network."
    assert OTHER_CHAIN_ID in said(f"?chain_id={OTHER_CHAIN_ID}")
    served.tip = ""
    assert said() == "The server does not say which block is the tip."


def test_the_check_of_the_chain_can_be_stopped(page: Page, served: Served) -> None:
    visit(page, f"{served.url}/chain")
    page.get_by_role("button", name="Check the whole chain").evaluate("each => { each.click(); each.click(); }")
    said = page.locator("#chain-check div [role=status]")
    expect(said).to_have_text("1 good; 1 checked now, 0 before. You stopped it at block 8.")
    assert check_chain(page) == "✓ Every block from 8 to 1 is good. 8 good; 7 checked now, 1 before."


def test_where_the_checks_cannot_run_nothing_is_good(browser: Browser, served: Served) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        page.route("**/worker.js", lambda route: route.abort())
        visit(page, served.url)
        expect(page.locator(".check[data-state=unknown]")).to_have_count(9)
        assert check_chain(page).startswith("0 good, 1 not known; 0 checked now, 0 before. It ends at block 8")
        expect(page.locator("#chain-check li")).to_contain_text("this browser cannot check blocks")


def test_without_a_place_to_keep_reports_nothing_is_kept(page: Page, served: Served) -> None:
    visit(page, f"{served.url}/chain")
    kept = """async () => {
      Object.defineProperty(self, 'indexedDB', { value: undefined });
      const store = await import('/static/check/store.js');
      await store.keepReport('key', {});
      return (await store.keptReport('key')) === undefined;
    }"""
    assert page.evaluate(kept)
