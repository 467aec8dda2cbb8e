"""The rules in JavaScript give the same verdict, and the same reason, as those in Python."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from bitcoin.core import CBlock, b2lx

from differential.run import bridge_verdict, mutated, node_options, valid_cases
from explorer.javascript import JavaScript
from explorer.made_chain import GENESIS, MadeChain, block_id, options_of, plain_block
from traincert.bridge.chain import certificate_fields
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.codec import Reader
from traincert.bridge.testing.invalid import WRONG, WRONG_WITH_PARENT, break_rule
from training_chain import TrainingChain

VECTORS = json.loads((Path(__file__).parents[2] / "bitcoind-patch/src/test/data/training.json").read_text())
REASONS = [*WRONG, *WRONG_WITH_PARENT]


@pytest.mark.parametrize("vector", VECTORS["networks"], ids=lambda vector: vector["chain_id"][:8])
def test_options_define_the_network_with_the_chain_id(javascript: JavaScript, vector: dict[str, Any]) -> None:
    assert javascript.ask("chainId", options=vector["options"]) == {"chain_id": vector["chain_id"]}


@pytest.mark.parametrize("vector", VECTORS["wrong_options"], ids=lambda vector: vector["error"])
def test_wrong_options_are_refused_in_the_nodes_words(javascript: JavaScript, vector: dict[str, Any]) -> None:
    assert javascript.ask("chainId", options=vector["options"]) == {"error": vector["error"]}


def test_a_round_lasts_a_minute_where_no_option_says_how_long(javascript: JavaScript) -> None:
    options = options_of(TrainingChain(round_seconds=60).params)
    chain_id = javascript.ask("chainId", options=options)
    assert chain_id == javascript.ask("chainId", options=[each for each in options if "round" not in each])
    assert chain_id == {"chain_id": TrainingChain().params.chain_id.hex()}


@pytest.mark.parametrize("vector", VECTORS["certificates"], ids=lambda vector: f"height {vector['height']}")
def test_certificates_are_read_as_the_bridge_reads_them(javascript: JavaScript, vector: dict[str, Any]) -> None:
    read = javascript.ask("certificate", bytes=vector["certificate"], chain_id=vector["chain_id"])
    assert read.pop("sighash") == vector["sighash"]
    certificate = Certificate.read(Reader(bytes.fromhex(vector["certificate"])))
    assert as_numbers(read) == json.loads(json.dumps(certificate_fields(certificate)))


def as_numbers(value: Any) -> Any:
    """JSON in which integers of 64 bits came as strings."""
    if isinstance(value, dict):
        return {name: as_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [as_numbers(each) for each in value]
    return int(value) if isinstance(value, str) and value.isdigit() and len(value) <= 20 else value


@pytest.mark.parametrize("vector", VECTORS["blocks"], ids=lambda vector: vector["comment"])
def test_blocks_are_refused_for_the_reason_named(javascript: JavaScript, vector: dict[str, Any]) -> None:
    block = {"bytes": vector["block"], "options": vector["options"]}
    assert javascript.ask("block", height=vector["height"], **block) == vector["reason"]
    if "winner_sighash" in vector:
        assert javascript.ask("winnerSighash", **block) == vector["winner_sighash"]


@pytest.mark.parametrize("vector", VECTORS["with_parent"], ids=lambda vector: vector["comment"])
def test_certificates_are_refused_with_their_parent_for_the_reason_named(
    javascript: JavaScript, vector: dict[str, Any]
) -> None:
    assert javascript.ask("withParent", **vector) == vector["reason"]


@pytest.mark.parametrize("table", VECTORS["tables"], ids=lambda table: f"{table['count']} leaves")
def test_paths_end_at_their_tables_root(javascript: JavaScript, table: dict[str, Any]) -> None:
    for path in table["paths"]:
        end = javascript.ask("path", number=path["index"] ** 2 + 1, count=table["count"], **path)
        assert end == {"root": table["root"], "weight": str(table["weight"]), "start": str(path["start"])}


def test_tickets_are_drawn_as_the_vectors_say(javascript: JavaScript) -> None:
    for vector in VECTORS["draws"]:
        assert javascript.ask("ticket", **vector) == str(vector["ticket"])


def test_weights_are_those_of_the_vectors_and_no_others(javascript: JavaScript) -> None:
    for vector in VECTORS["weights"]:
        for difference in (-1, 0, 1):
            weight = {**vector, "weight": vector["weight"] + difference}
            if weight["weight"] >= 0:
                assert javascript.ask("isWeight", **weight) is (difference == 0)


def test_verdicts_on_blocks_that_are_wrong_in_many_ways_are_the_bridges(javascript: JavaScript) -> None:
    random = Random(3)  # noqa: S311
    verdicts: Counter[str] = Counter()
    for chain in (TrainingChain(), TrainingChain(rotations={2: (1,), 3: (2, 1, 0)}, round_seconds=86_400)):
        valid = list(valid_cases(chain))
        options = list(node_options(chain.params))
        for _ in range(400):
            case = mutated(random, random.choice(valid))
            parent = case.parent.serialize().hex() if case.parent else None
            found = javascript.ask(
                "verdict",
                bytes=case.block.serialize().hex(),
                height=case.height,
                parent=parent,
                parent_time=case.parent_time,
                options=options,
            )
            expected = bridge_verdict(case, chain.params)
            assert (found or "ok") == expected, f"{case.how}: {case.line()}"
            verdicts[expected] += 1
    assert set(verdicts) == {"ok", *REASONS}


# The report on a block, which goes on after the first rule that is broken.


def report(javascript: JavaScript, made: MadeChain, block: CBlock, height: int) -> dict[str, Any]:
    blocks = [each.serialize().hex() for each in (*made.blocks, block)]
    options = options_of(made.chain.params)
    answer: dict[str, Any] = javascript.ask(
        "report", blocks=blocks, hash=block_id(block), height=height, options=options
    )
    return answer


def goods(report: dict[str, Any]) -> dict[str, bool | None]:
    return {row["rule"]: row["good"] for row in report["rows"]}


@pytest.fixture(scope="module")
def made() -> MadeChain:
    return MadeChain(length=6)


def test_every_rule_of_valid_blocks_holds(javascript: JavaScript, made: MadeChain) -> None:
    for height, block in enumerate(made.blocks[1:], start=1):
        found = report(javascript, made, block, height)
        assert goods(found) == dict.fromkeys(["hash", "merkleroot", *WRONG, "parent", *WRONG_WITH_PARENT], True)
        assert (found["fields"]["nTx"], found["fields"]["size"]) == (len(block.vtx), len(block.serialize()))


@pytest.mark.parametrize("reason", REASONS)
def test_the_first_broken_rule_of_a_report_is_the_nodes_reason(
    javascript: JavaScript, made: MadeChain, reason: str
) -> None:
    for height in (1, 6):
        if height == 1 and reason in ("bad-traincert-weight", "bad-traincert-draw"):
            continue  # nothing is drawn at the start height
        wrong = break_rule(reason, made.forgers[height], made.blocks[height], made.certificates[height])
        assert report(javascript, made, wrong, height)["first"] == reason


def test_a_report_goes_on_after_a_broken_rule(javascript: JavaScript, made: MadeChain) -> None:
    certificate = made.certificates[6]
    wrong = break_rule("bad-traincert-height", made.forgers[6], made.blocks[6], certificate)
    found = goods(report(javascript, made, wrong, 6))
    assert [rule for rule, good in found.items() if good is False] == ["bad-traincert-height"]
    assert None not in found.values()
    unread = break_rule("bad-traincert-version", made.forgers[6], made.blocks[6], certificate)
    found = goods(report(javascript, made, unread, 6))
    assert found["bad-traincert-multiple"] is True
    assert {found["bad-traincert-parse"], found["bad-traincert-beacon"]} == {None}


def test_blocks_below_the_start_height_have_no_certificate_but_name_their_height(javascript: JavaScript) -> None:
    made = MadeChain(length=302, chain=TrainingChain(start_height=301))
    for height in (0, 1, 16, 17, 127, 128, 255, 256, 300):
        found = report(javascript, made, made.blocks[height], height)
        assert not found["certified"]
        assert goods(found) == {"hash": True, "merkleroot": True, "coinbase-height": True}
        other = goods(report(javascript, made, made.blocks[height], height - 1 if height else 1))
        assert other["coinbase-height"] is False
    assert goods(report(javascript, made, made.blocks[301], 301))["bad-traincert-model"] is True
    for lie in (0, 300):  # a block that needs a certificate is not passed off as one that needs none
        assert goods(report(javascript, made, made.blocks[302], lie))["coinbase-height"] is False


def test_blocks_are_read_as_bitcoinlib_reads_them(javascript: JavaScript, made: MadeChain) -> None:
    for block in (*made.blocks, GENESIS, plain_block(5, GENESIS)):
        found = javascript.ask("merkle", bytes=block.serialize().hex())
        assert found["ids"] == [b2lx(each.GetTxid()) for each in block.vtx]
        assert (found["root"], found["mutated"]) == (block.hashMerkleRoot.hex(), False)


def test_a_merkle_root_of_repeated_transactions_is_noticed(javascript: JavaScript) -> None:
    """CVE-2012-2459: a list of transactions and the same with its end repeated have the same root."""
    one, two, three = (bytes([i]).hex() * 32 for i in range(3))
    plain = javascript.ask("merkleOf", hashes=[one, two, three])
    repeated = javascript.ask("merkleOf", hashes=[one, two, three, three])
    assert plain["root"] == repeated["root"]
    assert (plain["mutated"], repeated["mutated"]) == (False, True)


SHOWN = {
    "a whole hash": ("ab" * 32, "ab" * 32, "model_after"),
    "a hash's start": ("abababab…", "ab" * 32, "model_after"),
    "both ends": ("abab…abab", "ab" * 32, "model_after"),
    "a number": ("1234567", 1234567, "size"),
    "thousands": ("1,234,567 bytes", 1234567, "size"),
    "nano-nats": ("73800000", 73_800_000, "loss_after"),
    "rounded up": ("0.0738 nats", 73_750_000, "loss_after"),
    "rounded down": ("0.07", 73_750_000, "loss_before"),
    "all digits": ("0.073750001", 73_750_001, "loss_after"),
    "a date": ("2023-11-14 22:13:20 UTC", 1_700_000_000, "time"),
    "minutes": ("2023-11-14 22:13", 1_700_000_000, "time"),
    "a word": (" drawn ", "drawn", "award"),
}
NOT_SHOWN = {
    "another hash": ("ac" * 32, "ab" * 32, "model_after"),
    "another start": ("abababac…", "ab" * 32, "model_after"),
    "too short a start": ("ababab…", "ab" * 32, "model_after"),
    "nothing": ("", "ab" * 32, "model_after"),
    "a start without a mark": ("abababab", "ab" * 32, "model_after"),
    "another number": ("1,234,568", 1234567, "size"),
    "digits split wrongly": ("12,34567", 1234567, "size"),
    "a number cut short": ("123", 1234567, "size"),
    "the wrong way": ("0.0737", 73_760_000, "loss_after"),
    "the next last digit": ("0.0739", 73_800_000, "loss_after"),
    "a fraction of no loss": ("0.0738", 73_800_000, "params_trained"),
    "another minute": ("2023-11-14 22:14", 1_700_000_000, "time"),
    "another word": ("drawn", "appointed", "award"),
}


@pytest.mark.parametrize("case", SHOWN.values(), ids=SHOWN)
def test_what_is_shown_may_be_short_or_rounded(javascript: JavaScript, case: tuple[str, int | str, str]) -> None:
    text, value, name = case
    assert javascript.ask("shows", text=text, value=value, name=name) is True


@pytest.mark.parametrize("case", NOT_SHOWN.values(), ids=NOT_SHOWN)
def test_what_is_shown_must_be_true(javascript: JavaScript, case: tuple[str, int | str, str]) -> None:
    text, value, name = case
    assert javascript.ask("shows", text=text, value=value, name=name) is False
