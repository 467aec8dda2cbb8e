"""A receipt is checked against the chain, and each lie in it is refused by the name of a step."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any

import pytest
from coincurve import PrivateKey
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from traincert.bridge.consensus.certificate import Certificate, Draw, draw_of, draw_winner, new_certificate
from traincert.bridge.consensus.lottery import ContributionTable, Leaf, draw_ticket
from traincert.bridge.errors import BridgeError
from traincert.bridge.messages import CommitMessage, CommitReceipt, Receipt, seal
from traincert.bridge.receipts import (
    ADVICE,
    ReceiptError,
    check_certificate,
    check_draw,
    check_leaf,
    check_score,
    check_signature,
    explain,
    find_receipt,
    read_receipt,
    verify,
)
from traincert.bridge.recorded import RecordedTask
from traincert.bridge.rpc import NodeClient
from traincert.bridge.testing.invalid import digest
from traincert.bridge.testing.network import TrainingNetwork
from traincert.bridge.testing.plugin import TrainingNetworkFactory
from traincert.regtest import Node
from traincert.regtest.errors import RpcError
from traincert.trainer.errors import Reason
from traincert.trainer.resources import Resources
from traincert.trainer.weights import Score
from training_chain import COORDINATORS, TrainingChain

TRAINCERT = str(Path(sys.executable).with_name("traincert"))
PARAMS = TrainingChain().params
MARGIN, LATE = 0.5, 0.5
NO_TABLE = ContributionTable([])


def leaf_of(number: int, params: int, counts: int) -> Leaf:
    return Leaf(digest(f"miner {number}"), digest(f"update {number}"), params, counts, isqrt(params * counts))


tables = st.lists(st.tuples(st.integers(1, 10**9), st.integers(1, 10**12)), min_size=1, max_size=9).map(
    lambda pairs: ContributionTable(leaf_of(number, *pair) for number, pair in enumerate(pairs))
)


def task_of(leaf: Leaf, error: int = 2000) -> RecordedTask:
    """A task that was measured so that just this leaf follows."""
    margin = -(-error // 2)
    return RecordedTask(
        miner=leaf.miner_key,
        segment=0,
        shard=digest("shard"),
        seed=digest("seed"),
        memory=None,
        memory_after=None,
        update_hash=leaf.update_hash,
        update_size=1000,
        commit=b"",
        numeric_class="a machine",
        place=0,
        late=False,
        params=leaf.params,
        norm=1.0,
        scale=1.0,
        own_shard=None,
        score=Score(leaf.loss_reduction + margin, error, margin, leaf.loss_reduction, leaf.weight),
        loss_reduction=leaf.loss_reduction,
        weight=leaf.weight,
        drawn=False,
        refusal=None,
        detail=None,
    )


def receipt_of(table: ContributionTable, index: int, error: int = 2000, record: bytes = digest("record 1")) -> Receipt:
    return Receipt(
        cycle=1,
        record=record,
        task=task_of(table.leaves[index], error),
        noise_margin=MARGIN,
        late_share=LATE,
        contributions_root=table.root,
        contributions_weight=table.weight,
        contributions_count=table.count,
        index=index,
        path=[(node.hash, node.sum) for node in table.path(index)],
    )


def refused_of(table: ContributionTable, reason: Reason) -> Receipt:
    """The receipt of a miner whose update is refused, and not in the table."""
    scores = {Reason.NO_IMPROVEMENT: Score(5, 20, 10, 0, 0), Reason.MEMORY_WITHHELD: Score(14, 20, 10, 4, 2)}
    score = scores.get(reason)
    task = replace(
        task_of(leaf_of(-1, 1, 1)), score=score, loss_reduction=0, weight=0, refusal=reason, detail="it [b]is\x1b so"
    )
    return replace(receipt_of(table, 0) if table.count else EMPTY, task=task, index=None, path=[])


EMPTY = replace(
    receipt_of(ContributionTable([leaf_of(0, 1, 1)]), 0),
    contributions_root=bytes(32),
    contributions_weight=0,
    contributions_count=0,
)


REVEALS = [hashlib.sha256(digest("reveal")).digest(), digest("reveal")]


def certificate(
    height: int, winner: tuple[bytes, Draw | None], table: ContributionTable, **changes: Any
) -> Certificate:
    """A certificate of height 1 or 2, without signatures: the node has checked them, see test_rules.py."""
    made = new_certificate(
        height=height,
        prev_block=digest(f"block {height - 1}"),
        round_=0,
        beacon_reveal=REVEALS[height - 1],
        model_before=digest(f"model {height - 1}"),
        model_after=digest(f"model {height}"),
        dataset_root=digest("dataset"),
        record=digest(f"record {height}"),
        losses=(2, 1),
        table=table,
        winner=winner,
    )
    return replace(made, **changes)


def certificates(table: ContributionTable, round_: int = 0, seed: str = "") -> tuple[Certificate, Certificate]:
    """The certificates of a block with a table, and of the next block."""
    prev_block = digest(f"block 1{seed}")
    drawn: tuple[bytes, Draw | None] = digest("appointed"), None
    if table.count:
        drawn = draw_winner(table, REVEALS[1], prev_block, round_)
    block = certificate(1, (digest("appointed"), None), table)
    return block, certificate(2, drawn, NO_TABLE, round=round_, prev_block=prev_block)


def step_of(check: Callable[[], object]) -> str:
    """The step that refuses a receipt."""
    with pytest.raises(ReceiptError) as caught:
        check()
    assert str(caught.value).startswith(f"{caught.value.step}: ")
    return caught.value.step


def checked(receipt: Receipt, block: Certificate, child: Certificate) -> tuple[str, dict[str, str]]:
    """Do what `verify` does after the signature, without a node. Return the sentence, and what the last steps found."""
    check_score(receipt)
    start = check_leaf(receipt)
    check_certificate(receipt, block)
    check_draw(block, child, PARAMS)
    found: dict[str, str] = {}
    return explain(receipt, start, block, child, found.__setitem__), found


@given(tables, st.integers(0, 10**9), st.integers(0, 3), st.text("abc", max_size=3))
def test_every_leaf_of_every_table_is_verified_and_one_has_won(
    table: ContributionTable, error: int, round_: int, seed: str
) -> None:
    block, child = certificates(table, round_, seed)
    winners, start = [], 0
    for index, leaf in enumerate(table.leaves):
        receipt = receipt_of(table, index, error)
        assert check_signature(seal(COORDINATORS[0], PARAMS.chain_id, receipt), PARAMS) == receipt
        assert check_leaf(receipt) == start
        start += leaf.weight
        said, found = checked(receipt, block, child)
        assert list(found) == ["draw", "winner"]
        assert child.winner_key.hex() in found["winner"]
        assert ("earlier rounds are not on the chain" in found["draw"]) == (round_ > 0)
        if said.startswith("This miner won block 2"):
            winners.append(leaf.miner_key)
        else:
            assert said.startswith("This miner did not win block 2")
    assert winners == [child.winner_key]


def of(receipt: Receipt) -> Score:
    assert receipt.task.score
    return receipt.task.score


def scored(receipt: Receipt, **changes: Any) -> Receipt:
    return with_task(receipt, score=replace(of(receipt), **changes))


def with_task(receipt: Receipt, **changes: Any) -> Receipt:
    return replace(receipt, task=replace(receipt.task, **changes))


def more(receipt: Receipt, more: int) -> Receipt:
    """More of the reduction than there was, and all that follows from it."""
    task = receipt.task
    counts = task.loss_reduction + more
    weight = isqrt(task.params * counts)
    score = Score(of(receipt).reduction + more, of(receipt).error, of(receipt).margin, counts, weight)
    return with_task(receipt, score=score, loss_reduction=counts, weight=weight)


def other_bytes(data: bytes, number: int) -> bytes:
    """The same bytes but for one bit."""
    place, bit = number // 8 % len(data), 1 << number % 8
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def other_path(receipt: Receipt, number: int) -> Receipt:
    path = list(receipt.path)
    place = number % len(path)
    node, total = path[place]
    path[place] = (other_bytes(node, number), total) if number % 2 else (node, total + number + 1)
    return replace(receipt, path=path)


LIES: Mapping[str, tuple[set[str], Callable[[Receipt, int], Receipt]]] = {
    "reduction": (
        {"score"},
        lambda r, n: scored(r, reduction=of(r).reduction + n + 1),
    ),
    "error": ({"score"}, lambda r, n: scored(r, error=of(r).error + 2 * n + 2)),
    "margin": ({"score"}, lambda r, n: scored(r, margin=n + 10**15)),
    "score's loss_reduction": ({"score"}, lambda r, n: scored(r, loss_reduction=r.task.loss_reduction + n + 1)),
    "score's weight": ({"score"}, lambda r, n: scored(r, weight=r.task.weight + n + 1)),
    "loss_reduction": ({"score"}, lambda r, n: with_task(r, loss_reduction=r.task.loss_reduction + n + 1)),
    "weight": ({"score"}, lambda r, n: with_task(r, weight=r.task.weight + n + 1)),
    "no score": ({"score"}, lambda r, _: with_task(r, score=None)),
    "late": ({"score"}, lambda r, _: with_task(r, late=True)),
    "noise_margin": ({"score"}, lambda r, n: replace(r, noise_margin=r.noise_margin + n + 1)),
    "huge numbers": ({"score"}, lambda r, n: scored(r, error=10 ** (400 + n % 9))),
    "params": ({"score", "leaf"}, lambda r, n: with_task(r, params=r.task.params + n + 1)),
    "more of everything": ({"leaf"}, lambda r, n: more(r, n + 1)),
    "miner": ({"leaf"}, lambda r, n: with_task(r, miner=other_bytes(r.task.miner, n))),
    "update": ({"leaf"}, lambda r, n: with_task(r, update_hash=other_bytes(r.task.update_hash or b"", n))),
    "no update": ({"leaf"}, lambda r, _: with_task(r, update_hash=None)),
    "index": ({"leaf"}, lambda r, n: replace(r, index=(r.index or 0) + 1 + n % (r.contributions_count - 1))),
    "no index": ({"leaf"}, lambda r, _: replace(r, index=None)),
    "path": ({"leaf"}, other_path),
    "shorter path": ({"leaf"}, lambda r, _: replace(r, path=r.path[1:])),
    "longer path": ({"leaf"}, lambda r, n: replace(r, path=[*r.path, (digest("more"), n)])),
    "root": ({"leaf"}, lambda r, n: replace(r, contributions_root=other_bytes(r.contributions_root, n))),
    "total weight": ({"leaf"}, lambda r, n: replace(r, contributions_weight=r.contributions_weight + n + 1)),
    "count": ({"leaf", "certificate"}, lambda r, n: replace(r, contributions_count=r.contributions_count + n + 1)),
    "record": ({"certificate"}, lambda r, n: replace(r, record=other_bytes(r.record, n))),
}


@pytest.mark.parametrize("lie", LIES)
@settings(max_examples=20)
@given(tables.filter(lambda table: table.count > 1), st.integers(0, 8), st.integers(0, 10**6))
def test_every_lie_is_refused_by_name(lie: str, table: ContributionTable, index: int, number: int) -> None:
    steps, change = LIES[lie]
    honest = receipt_of(table, index % table.count)
    block, child = certificates(table)
    checked(honest, block, child)
    assert step_of(lambda: checked(change(honest, number), block, child)) in steps


@given(tables, tables)
def test_a_leaf_of_another_table_is_refused(table: ContributionTable, other: ContributionTable) -> None:
    assume(table.root != other.root)
    assert step_of(lambda: checked(receipt_of(other, 0), *certificates(table))) == "certificate"


@given(tables.filter(lambda table: table.count > 1), st.integers(1, 8), st.integers(0, 1000))
def test_another_draw_is_refused(table: ContributionTable, shift: int, number: int) -> None:
    block, child = certificates(table)
    assert child.draw
    other = (child.draw.index + 1 + shift % (table.count - 1)) % table.count
    winner, draw = draw_of(table, other)
    honest = receipt_of(table, 0)
    beacon = replace(child, beacon_reveal=other_bytes(child.beacon_reveal, number))
    wrong = [replace(child, winner_key=winner, draw=draw), replace(child, winner_key=winner), beacon]
    for each in [*wrong, replace(child, draw=None)]:
        assert step_of(lambda each=each: checked(honest, block, each)) == "draw"  # type: ignore[misc]


@given(tables.filter(lambda table: table.count > 1), st.binary(min_size=32, max_size=32), st.integers(0, 2**16 - 1))
def test_a_ticket_of_another_block_or_round_has_its_own_winner(
    table: ContributionTable, prev_block: bytes, round_: int
) -> None:
    block, child = certificates(table)
    other = replace(child, prev_block=prev_block, round=round_)
    drawn = table.find(draw_ticket(child.beacon_reveal, prev_block, round_, table.weight))
    if table.leaves[drawn].miner_key == child.winner_key:
        check_draw(block, other, PARAMS)
    else:
        assert step_of(lambda: check_draw(block, other, PARAMS)) == "draw"


def test_a_late_task_counts_less() -> None:
    """25 - ceil(0.5 * 9) = 20 nano-nats; times 0.5 squared, rounded down: 5. The weight is isqrt(5 * 5)."""
    table = ContributionTable([leaf_of(0, 5, 5)])
    late = with_task(receipt_of(table, 0), late=True, score=Score(25, 9, 5, 5, 5))
    said = check_score(late)
    assert said == (
        "the loss falls by 25 nano-nats, less 5 that may be noise, times 0.5 squared because it was late: 5 count; "
        "the weight is the root of 5 * 5: 5"
    )
    assert step_of(lambda: check_score(replace(late, late_share=1.0))) == "score"


@pytest.mark.parametrize("reason", Reason)
def test_a_refusal_says_what_to_change(reason: Reason) -> None:
    table = ContributionTable([leaf_of(0, 5, 5), leaf_of(1, 7, 7)])
    said, _ = checked(refused_of(table, reason), *certificates(table))
    assert said == f"The update was refused as {reason} (it [b]is? so), so it has no ticket. {ADVICE[reason]}"
    assert said.isprintable()


def test_every_reason_has_advice_of_one_sentence() -> None:
    assert set(ADVICE) == set(Reason)
    for advice in ADVICE.values():
        assert advice[0].isupper()
        assert advice.index(".") == len(advice) - 1, advice


def test_a_refusal_with_a_place_or_a_weight_is_refused() -> None:
    table = ContributionTable([leaf_of(0, 5, 5), leaf_of(1, 7, 7)])
    place, (block, child) = receipt_of(table, 0), certificates(table)
    late, noise = refused_of(table, Reason.LATE), refused_of(table, Reason.NO_IMPROVEMENT)
    wrong = {
        "leaf": [replace(late, index=0, path=place.path), replace(late, path=place.path)],
        "score": [
            with_task(late, score=place.task.score),
            with_task(late, weight=1),
            with_task(noise, score=None),
            with_task(noise, score=place.task.score),
            with_task(place, refusal=Reason.NO_IMPROVEMENT),
        ],
        "winner": [with_task(late, miner=child.winner_key)],
    }
    for step, receipts in wrong.items():
        for receipt in receipts:
            assert step_of(lambda receipt=receipt: checked(receipt, block, child)) == step  # type: ignore[misc]


def test_without_a_table_the_winner_is_appointed() -> None:
    said, found = checked(refused_of(NO_TABLE, Reason.ABSENT), *certificates(NO_TABLE))
    assert found == {"draw": "the table is empty, so the coordinator appointed the winner of block 2"}
    assert said.endswith(ADVICE[Reason.ABSENT])


def test_a_winner_of_an_earlier_round_is_told() -> None:
    table = ContributionTable([leaf_of(0, 5, 5), leaf_of(1, 5, 5)])
    for seed in map(str, range(100)):
        first, (block, child) = certificates(table, 0, seed)[1], certificates(table, 2, seed)
        if first.winner_key != child.winner_key:
            break
    (absent,) = (index for index, leaf in enumerate(table.leaves) if leaf.miner_key == first.winner_key)
    said, found = checked(receipt_of(table, absent), block, child)
    assert found["draw"].endswith("of 10; certificates of earlier rounds are not on the chain")
    assert said.startswith("This miner did not win block 2, because the ticket is none of its own: ")
    assert " It was drawn in round 0" in said


@given(st.integers(0, 10**6))
def test_a_forged_receipt_is_refused(number: int) -> None:
    receipt = receipt_of(ContributionTable([leaf_of(0, 5, 5)]), 0)
    statement = seal(COORDINATORS[0], PARAMS.chain_id, receipt)
    assert step_of(lambda: check_signature(other_bytes(statement, number), PARAMS)) == "signature"
    assert step_of(lambda: check_signature(statement[:96], PARAMS)) == "signature"
    assert step_of(lambda: check_signature(statement[:9], PARAMS)) == "signature"


def test_another_signer_network_or_kind_is_refused() -> None:
    receipt = receipt_of(ContributionTable([leaf_of(0, 5, 5)]), 0)
    for statement in (
        seal(COORDINATORS[1], PARAMS.chain_id, receipt),  # a cosigner
        seal(COORDINATORS[0], digest("another network"), receipt),
        seal(COORDINATORS[0], PARAMS.chain_id, CommitReceipt(digest("commit"), 0, late=False)),
    ):
        assert step_of(lambda statement=statement: check_signature(statement, PARAMS)) == "signature"  # type: ignore[misc]


def test_a_miners_folder_has_its_receipts(tmp_path: Path) -> None:
    kept = tmp_path / "receipts"
    with pytest.raises(BridgeError, match="has no receipt: it should be a miner's folder"):
        find_receipt(tmp_path)
    kept.mkdir()
    for name in ("00000002", "00000010", "00000010.tmp"):
        (kept / name).touch()
    assert find_receipt(tmp_path) == kept / "00000010"
    assert find_receipt(tmp_path, 2) == kept / "00000002"
    assert find_receipt(kept / "00000002") == kept / "00000002"
    with pytest.raises(BridgeError, match="has no receipt of cycle 3"):
        find_receipt(tmp_path, 3)
    with pytest.raises(BridgeError, match="is a file: --cycle needs a miner's folder"):
        find_receipt(kept / "00000002", 2)


@pytest.mark.parametrize("data", [b"", b"text\n", bytes(1000), b"x" * 96 + b'{"commit": 1}', b"x" * 96 + b"[" * 10**5])
def test_a_file_that_is_no_receipt_is_told_in_a_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(BridgeError, match=f"^{path} is no receipt: ") as caught:
        read_receipt(path)
    assert str(caught.value).isprintable()


# With a node.


@pytest.fixture(scope="module")
def training(training_network_module: TrainingNetworkFactory) -> TrainingNetwork:
    """A network with two blocks: the second one's winner is drawn from the first one's table."""
    network = training_network_module()
    network.append(table=network.table(3, 5, 0, 9))
    network.append()
    return network


@pytest.fixture
def node(training: TrainingNetwork) -> Iterator[NodeClient]:
    with NodeClient.from_datadir(training.nodes[0].datadir) as client:
        yield client


def sealed(training: TrainingNetwork, receipt: Receipt) -> bytes:
    return seal(COORDINATORS[0], training.params.chain_id, receipt)


def ours(training: TrainingNetwork, index: int = 0) -> Receipt:
    return receipt_of(training.table(3, 5, 0, 9), index, record=bytes(32))  # blocks of this network have no records


def silent(step: str, found: str) -> None:
    del step, found


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TRAINCERT, "receipt", *map(str, arguments)], check=False, capture_output=True, text=True)


def test_the_command_checks_each_step_on_a_node(training: TrainingNetwork, tmp_path: Path) -> None:
    datadir = training.nodes[0].datadir
    file = tmp_path / "receipt"
    winner = training.nodes[0].rpc("gettrainingcertificate", 2)["winner_key"]
    for index, leaf in enumerate(training.table(3, 5, 0, 9).leaves):
        file.write_bytes(sealed(training, ours(training, index)))
        answer = run("verify", file, "--datadir", datadir)
        assert answer.returncode == 0, answer.stderr
        *steps, said = answer.stdout.splitlines()
        names = ["signature", "score", "leaf", "certificate", "draw", "winner"]
        assert [step.partition(":")[0] for step in steps] == [f"✓ {name}" for name in names]
        won = "won" if leaf.miner_key.hex() == winner else "did not win"
        assert said.startswith(f"This miner {won} block 2, because the ticket is ")
    file.write_bytes(sealed(training, more(ours(training), 1)))
    answer = run("verify", file, "--datadir", datadir)
    assert answer.returncode == 1
    assert answer.stdout.count("✓") == 2
    assert answer.stderr == "traincert: leaf: its path does not end at the root and the weight of the table\n"


def test_the_command_shows_a_receipt(training: TrainingNetwork, tmp_path: Path) -> None:
    (tmp_path / "receipts").mkdir()
    file = tmp_path / "receipts/00000001"
    receipt = refused_of(training.table(3, 5, 0, 9), Reason.COPY)
    file.write_bytes(sealed(training, receipt))
    shown = run("show", tmp_path).stdout
    assert "refused as copy (it [b]is? so)" in shown
    assert ADVICE[Reason.COPY] in shown
    assert "CPU seconds" not in shown  # it has no commit
    used = Resources(1.5, 0.25, 1, 1, 10**8, None, None, None, None, flags=("forked", "sent-bytes 3"))
    message = CommitMessage(bytes(32), bytes(32), 1, None, None, 2.0, "a class", resources=used)
    commit = seal(PrivateKey(bytes([7] * 32)), training.params.chain_id, message)
    file.write_bytes(sealed(training, replace(receipt, task=replace(receipt.task, commit=commit))))
    shown = run("show", tmp_path).stdout
    assert re.search(
        r"the task used +1.75 CPU seconds, 100 MB of memory\s+and did besides\s+forked, sent-bytes 3\s", shown
    )
    facts = json.loads(run("show", file, "--json").stdout)
    assert facts["task"]["refusal"] == "copy"
    assert facts["contributions_root"] == receipt.contributions_root.hex()
    file.write_bytes(b"text\n" * 100)
    for arguments in (("show", file), ("verify", file, "--datadir", training.nodes[0].datadir)):
        answer = run(*arguments)
        assert answer.returncode == 1
        assert answer.stderr.startswith(f"traincert: {file} is no receipt: ")
        assert len(answer.stderr.splitlines()) == 1


def test_a_chain_that_is_too_short_is_told(training: TrainingNetwork, node: NodeClient) -> None:
    for cycle in (0, 3, 2**64 - 1):
        with pytest.raises(ReceiptError, match=f"^certificate: node0 has no block {cycle} of cycle {cycle}: its last"):
            verify(sealed(training, replace(ours(training), cycle=cycle)), node, silent)


def test_without_a_next_block_nobody_has_won(training: TrainingNetwork, node: NodeClient) -> None:
    receipt = replace(refused_of(NO_TABLE, Reason.ABSENT), cycle=2, record=bytes(32))
    assert verify(sealed(training, receipt), node, silent).endswith(ADVICE[Reason.ABSENT])


def test_before_the_draw_the_winner_is_unknown(training_network: TrainingNetworkFactory) -> None:
    training = training_network(start_height=2)
    training.nodes[0].rpc("generatetoaddress", 1, "bcrt1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqdku202")
    training.append(table=training.table(3, 5, 0, 9))
    with NodeClient.from_datadir(training.nodes[0].datadir) as node:
        said = verify(sealed(training, ours(training)), node, silent)
        assert said == "Block 3 is not there yet: nobody has won it."
        training.append()
        assert " block 3, because " in verify(sealed(training, ours(training)), node, silent)


def test_a_receipt_of_another_network_is_told(training: TrainingNetwork, node: NodeClient) -> None:
    with pytest.raises(ReceiptError, match=r"^signature: receipt: the signature does not verify: it is "):
        verify(seal(COORDINATORS[0], digest("another network"), ours(training)), node, silent)


def test_a_node_without_training_is_told(bitcoind: Node) -> None:
    with NodeClient.from_datadir(bitcoind.datadir) as node, pytest.raises(RpcError, match="gettraininginfo"):
        verify(b"", node, silent)


def test_a_missing_node_is_told(training: TrainingNetwork, tmp_path: Path) -> None:
    file = tmp_path / "receipt"
    file.write_bytes(sealed(training, ours(training)))
    answer = run("verify", file, "--datadir", tmp_path)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr == (
        f"traincert: {tmp_path} is no node's data directory: No such file or directory: bitcoin.conf\n"
    )
