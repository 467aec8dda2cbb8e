"""Compares the node's verdicts with the bridge's, on blocks that are wrong in many ways.

`python tests/differential/run.py --count 100000` prints how often each verdict occurred, and each block on which the
two disagree: then it exits 1. `make test` compares a few thousand. The node's side is its test program training_check.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from bitcoin.core import CBlock, CMutableTransaction, COutPoint, CTransaction, CTxIn, CTxOut, b2lx
from bitcoin.core.script import OP_RETURN, CScript

sys.path.insert(0, str(Path(__file__).parents[1]))

from traincert.bridge.consensus.block import PAYLOAD_MAGIC, payload_script, winner_sighash
from traincert.bridge.consensus.certificate import SIGNATURE_SIZE, Certificate, Draw, draw_of
from traincert.bridge.consensus.codec import U64_MAX, compact_size
from traincert.bridge.consensus.lottery import ContributionTable, Leaf, TreeNode
from traincert.bridge.consensus.params import GENESIS_HASH, TrainingParams
from traincert.bridge.consensus.rules import check_training_certificate, contextual_check_training_certificate
from traincert.bridge.errors import CertificateError
from traincert.bridge.testing.invalid import AUX, WRONG, WRONG_WITH_PARENT, digest, payload_of, with_scripts
from traincert.regtest import node_folder
from training_chain import MINERS, TrainingChain, made_table

BATCH = 5000
PARENT_TIME = 1_700_000_000
INTEGERS = {
    "height": 4,
    "round": 2,
    "loss_before": 8,
    "loss_after": 8,
    "params_trained": 8,
    "contributions_weight": 8,
    "contributions_count": 4,
}
HASHES = (
    "prev_block",
    "beacon_reveal",
    "model_before",
    "model_after",
    "dataset_root",
    "record",
    "contributions_root",
)


@dataclass(frozen=True)
class Case:
    """A block, and what its rules need to know: height, the parent's certificate (None at the start) and nTime."""

    how: str
    chain: TrainingChain
    height: int
    block: CBlock
    certificate: Certificate
    parent: Certificate | None
    parent_time: int = PARENT_TIME

    def line(self) -> str:
        """The case as training_check reads it."""
        parent = self.parent.serialize().hex() if self.parent else "-"
        return f"{self.height} {self.block.serialize().hex()} {parent} {self.parent_time}"


def bridge_verdict(case: Case, params: TrainingParams) -> str:
    """Why the bridge refuses the block, or `ok`; in the node's order."""
    try:
        certificate = check_training_certificate(case.block, case.height, params).certificate
        contextual_check_training_certificate(certificate, case.parent, case.block.nTime, case.parent_time, params)
    except CertificateError as error:
        return error.reason
    return "ok"


def node_verdicts(program: Path, params: TrainingParams, cases: Sequence[Case]) -> list[str]:
    """The same of the node."""
    lines = [" ".join(node_options(params)), *(case.line() for case in cases)]
    answer = subprocess.run([program], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        sys.exit(answer.stderr.strip())
    return answer.stdout.splitlines()


def node_options(params: TrainingParams) -> Iterator[str]:
    """The options as training_check reads them."""
    for name, values in params.node_options().items():
        for value in [values] if isinstance(values, str) else values:
            yield f"{name}={value}"


def compare(program: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each verdict occurred, and a line on each block on which node and bridge disagree."""
    random = Random(seed)  # noqa: S311
    verdicts: Counter[str] = Counter()
    disagreements = []
    chains = [TrainingChain(), TrainingChain(rotations={2: (1,), 3: (2, 1, 0)}, round_seconds=86_400)]
    for number, chain in enumerate(chains):
        params = chain.params
        valid = list(valid_cases(chain))
        left = count // len(chains) + (count % len(chains) if number == 0 else 0)
        cases = (mutated(random, random.choice(valid)) for _ in range(left))
        while batch := list(islice(cases, BATCH)):
            for case, answer in zip(batch, node_verdicts(program, params, batch), strict=True):
                expected = bridge_verdict(case, params)
                verdicts[answer] += 1
                if answer != expected:
                    disagreements.append(f"{case.how}: node {answer}, bridge {expected}: {case.line()}")
    return verdicts, disagreements


# Valid blocks.


def tables() -> Iterator[ContributionTable]:
    """Tables of a parent to draw from: of many shapes, and of sums at the edge of 64 bits."""
    miners = list(MINERS)
    for weights in ([], [7], [1, 1], [5, 1, 9], [2] * 8, range(1, 10), [2**63, 2**63 - 1], [1, 2**64 - 3, 1]):
        yield ContributionTable(
            Leaf(miners[i % len(miners)], digest(f"leaf {i}"), weight, weight, weight)
            for i, weight in enumerate(weights)
        )


def valid_cases(chain: TrainingChain) -> Iterator[Case]:
    """A block at the start height, and one on a parent with each of the tables; some in later rounds."""
    certificate = chain.next_certificate(template(chain.start_height, GENESIS_HASH, 0))
    yield made(chain, certificate, None, 0)
    for number, table in enumerate(tables()):
        parent = replace(
            certificate,
            contributions_root=table.root,
            contributions_weight=table.weight,
            contributions_count=table.count,
        )
        after = replace(chain)
        after.advance(parent, table)
        for round_ in (0, 1, 3):
            slot = template(chain.start_height + 1 + number % 3, digest(f"block {number}"), round_)
            reveal = chain.beacon.reveal(1)
            winner, draw = after.draw(reveal, digest(f"block {number}"), round_)
            child = after.next_certificate(slot, ContributionTable([]) if number % 2 else None)
            child = replace(child, beacon_reveal=reveal, round=round_, winner_key=winner, draw=draw)
            yield made(after, after.sign(child), parent, round_)


def template(height: int, prev_block: bytes, transactions: int) -> dict[str, Any]:
    """What getblocktemplate could answer."""
    spends = [
        CMutableTransaction([CTxIn(COutPoint(digest("coin"), i))], [CTxOut(1000, CScript(b"\x51"))])
        for i in range(transactions)
    ]
    return {
        "version": 0x20000000,
        "previousblockhash": b2lx(prev_block),
        "transactions": [{"data": spend.serialize().hex()} for spend in spends],
        "coinbasevalue": 5_000_000_000,
        "target": "7f" + "ff" * 31,
        "bits": "207fffff",
        "curtime": PARENT_TIME,
        "height": height,
    }


def made(chain: TrainingChain, certificate: Certificate, parent: Certificate | None, transactions: int) -> Case:
    """The case of a valid certificate."""
    slot = template(certificate.height, certificate.prev_block, transactions)
    slot["curtime"] += certificate.round * chain.round_seconds
    block = chain.block(slot, certificate, compat_pow=False)
    return Case("valid", chain, certificate.height, block, certificate, parent)


# Ways to change them. Each returns the changed case, which may be valid still.

Mutation = Callable[[Random, Case], Case]


def mutated(random: Random, case: Case) -> Case:
    """The case after a change, or two of which the first was signed."""
    mutations = [random.choice(SIGNED + UNSIGNED)]
    if random.random() < 0.2:
        mutations.insert(0, random.choice(SIGNED))
    for mutation in mutations:
        case = mutation(random, case)
    return replace(case, how=", ".join(mutation.__name__ for mutation in mutations))


def resigned(case: Case, certificate: Certificate, **changes: Any) -> Case:
    """The case with another certificate, signed by coordinator and winner as if it were right."""
    signed = case.chain.sign(certificate, keys_at=case.height)
    return replace(winner_signed(case, signed), certificate=signed, **changes)


def winner_signed(case: Case, certificate: Certificate) -> Case:
    """The case with another certificate, whose coordinator signatures are left as they are."""
    return with_payload(case, PAYLOAD_MAGIC + certificate.serialize(), certificate.winner_key)


def with_payload(case: Case, payload: bytes, winner_key: bytes) -> Case:
    """The case with another payload, signed by the winner."""
    blank = with_scripts(case.block, payload_script(payload + bytes(SIGNATURE_SIZE)))
    message = winner_sighash(blank, len(blank.vtx[0].vout) - 1, case.chain.params.chain_id)
    winner = MINERS.get(winner_key, next(iter(MINERS.values())))
    signature = winner.sign_schnorr(message, AUX)
    return replace(case, block=with_scripts(case.block, payload_script(payload + signature)))


def with_header(block: CBlock, **changes: Any) -> CBlock:
    """The block with other fields of its header, or other transactions."""
    fields = {name: getattr(block, name) for name in ("nVersion", "hashPrevBlock", "nTime", "nBits", "nNonce", "vtx")}
    return CBlock(**fields | changes)


def integer(random: Random, value: int, size: int) -> int:
    """Another integer of that many bytes, often near the old one or at an edge."""
    top: int = 256**size - 1
    near = [value - 1, value + 1, value ^ 1 << random.randrange(8 * size)]
    edges = [0, 1, 2, 127, 128, 252, 253, top // 2, top // 2 + 1, top - 1, top, top + 1 - value]
    return random.choice([*near, *edges, random.randrange(top + 1)]) % (top + 1)


def bytes32(random: Random, value: bytes) -> bytes:
    """Another 32 bytes."""
    flipped = bytearray(value)
    flipped[random.randrange(32)] ^= 1 << random.randrange(8)
    return random.choice([bytes(flipped), bytes(32), b"\xff" * 32, value[::-1], random.randbytes(32)])


def edit(random: Random, certificate: Certificate) -> Certificate:
    """Another value for one field."""
    name = random.choice([*INTEGERS, *HASHES])
    old = getattr(certificate, name)
    changes: dict[str, Any] = {name: integer(random, old, INTEGERS[name]) if name in INTEGERS else bytes32(random, old)}
    return replace(certificate, **changes)


def unchanged(_: Random, case: Case) -> Case:
    return case


def field(random: Random, case: Case) -> Case:
    return resigned(case, edit(random, case.certificate))


def winner_key(random: Random, case: Case) -> Case:
    key = random.choice([*MINERS, bytes32(random, case.certificate.winner_key)])
    return resigned(case, replace(case.certificate, winner_key=key))


def parent_field(random: Random, case: Case) -> Case:
    return replace(case, parent=edit(random, case.parent)) if case.parent else case


def parent_table(random: Random, case: Case) -> Case:
    """Another count, weight or root to draw from."""
    if not case.parent:
        return case
    name = random.choice(["contributions_weight", "contributions_count", "contributions_root"])
    old = getattr(case.parent, name)
    changes: dict[str, Any] = {
        name: bytes32(random, old) if name == "contributions_root" else integer(random, old, INTEGERS[name])
    }
    return replace(case, parent=replace(case.parent, **changes))


def draw_field(random: Random, case: Case) -> Case:
    draw = case.certificate.draw
    if draw is None:
        return award(random, case)
    name = random.choice(["update_hash", "params", "loss_reduction", "weight", "index"])
    old = getattr(draw, name)
    changes: dict[str, Any] = {
        name: bytes32(random, old) if name == "update_hash" else integer(random, old, 4 if name == "index" else 8)
    }
    return resigned(case, replace(case.certificate, draw=replace(draw, **changes)))


def draw_metrics(random: Random, case: Case) -> Case:
    """Other metrics, on both sides of where the weight changes."""
    draw = case.certificate.draw
    if draw is None:
        return award(random, case)
    product = random.choice([draw.weight**2, (draw.weight + 1) ** 2]) + random.choice([-1, 0, 1])
    factor = random.choice([1, draw.weight, max(product, 0) >> 64])
    factor = min(max(factor, 1), U64_MAX)
    params = min(max(product // factor, 0), U64_MAX)
    return resigned(case, replace(case.certificate, draw=replace(draw, params=params, loss_reduction=factor)))


def siblings(random: Random, case: Case) -> Case:
    draw = case.certificate.draw
    if draw is None:
        return award(random, case)
    path = list(draw.siblings)
    if not path or random.random() < 0.2:
        path.insert(random.randint(0, len(path)), TreeNode(random.randbytes(32), integer(random, 0, 8)))
    else:
        i = random.randrange(len(path))
        node = path[i]
        path[i : i + 1] = random.choice(
            [
                [],
                [node, node],
                [TreeNode(bytes32(random, node.hash), node.sum)],
                [TreeNode(node.hash, integer(random, node.sum, 8))],
                [TreeNode(node.hash, U64_MAX - draw.weight + random.choice([0, 1]))],
                [TreeNode(node.hash, node.sum)] * random.randrange(300),
            ]
        )
        if random.random() < 0.2:
            random.shuffle(path)
    return resigned(case, replace(case.certificate, draw=replace(draw, siblings=tuple(path))))


def award(random: Random, case: Case) -> Case:
    """Drawn where it was appointed, or the reverse."""
    draw = case.certificate.draw
    if draw is not None and random.random() < 0.5:
        return resigned(case, replace(case.certificate, draw=None))
    zeros = Draw(bytes(32), 0, 0, 0, 0, ())
    made_draw = draw_of(made_table(1), random.randrange(4))[1]
    return resigned(case, replace(case.certificate, draw=random.choice([zeros, made_draw, None])))


def other_leaf(random: Random, case: Case) -> Case:
    """Another leaf of the table that is drawn from."""
    table = case.chain.table
    if not table.count:
        return award(random, case)
    winner, draw = draw_of(table, random.randrange(table.count))
    return resigned(case, replace(case.certificate, winner_key=winner, draw=draw))


def redrawn(random: Random, case: Case) -> Case:
    """Drawn in another round, at a time near the first at which that may be."""
    round_ = random.choice([0, 1, 2, 255, 256, 16_383, 65_534, 65_535])
    wait = round_ * case.chain.round_seconds + random.choice([-case.chain.round_seconds, -1, 0, 1])
    time = min(max(PARENT_TIME + wait, 0), 2**32 - 1)
    winner, draw = case.chain.draw(case.certificate.beacon_reveal, case.certificate.prev_block, round_)
    certificate = replace(case.certificate, round=round_, winner_key=winner, draw=draw)
    return resigned(replace(case, block=with_header(case.block, nTime=time)), certificate)


def times(random: Random, case: Case) -> Case:
    time = integer(random, random.choice([case.block.nTime, PARENT_TIME]), 4)
    parent_time = random.choice([case.parent_time, integer(random, case.parent_time, 4)])
    moved = replace(case, block=with_header(case.block, nTime=time), parent_time=parent_time)
    return resigned(moved, case.certificate)


def signers(random: Random, case: Case) -> Case:
    """Signatures in any number and order, by the keys in force and with any index."""
    count = len(case.chain.params.keys_at(case.height).keys)
    chosen = [random.randrange(count) for _ in range(random.choice([0, 1, 2, 3, random.randrange(20)]))]
    if random.random() < 0.7:
        chosen = sorted(set(chosen))
    signed = case.chain.sign(case.certificate, chosen, keys_at=case.height)
    signatures = [
        replace(each, key_index=integer(random, each.key_index, 1)) if random.random() < 0.1 else each
        for each in signed.coordinator_signatures
    ]
    return winner_signed(case, replace(signed, coordinator_signatures=tuple(signatures)))


def signature_bytes(random: Random, case: Case) -> Case:
    """A coordinator signature that is no signature, or that of another height's keys."""
    if random.random() < 0.3:
        height = random.choice(list(case.chain.params.keys))
        return winner_signed(case, case.chain.sign(case.certificate, keys_at=height))
    signatures = list(case.certificate.coordinator_signatures)
    i = random.randrange(len(signatures))
    halves = signatures[i].signature[:32], signatures[i].signature[32:]
    changed = random.choice([bytes32(random, halves[0]) + halves[1], halves[0] + bytes32(random, halves[1])])
    signatures[i] = replace(signatures[i], signature=changed)
    return winner_signed(case, replace(case.certificate, coordinator_signatures=tuple(signatures)))


def unsigned_edit(random: Random, case: Case) -> Case:
    """A field that the coordinator did not sign."""
    return winner_signed(case, edit(random, case.certificate))


def cut_or_grown(random: Random, case: Case) -> Case:
    """Bytes less or more, anywhere; the winner signs or not."""
    payload = bytearray(payload_of(case.block))
    at = random.choice([random.randrange(len(payload)), len(payload)])
    size = random.choice([1, 2, 32, 64, random.randrange(1, 400)])
    if random.random() < 0.5:
        del payload[max(at - size, 0) : at]
    else:
        payload[at:at] = random.randbytes(size)
    return raw(random, case, bytes(payload))


def byte_flips(random: Random, case: Case) -> Case:
    payload = bytearray(payload_of(case.block))
    for _ in range(random.choice([1, 1, 1, 2, 8])):
        payload[random.randrange(len(payload))] = random.randrange(256)
    return raw(random, case, bytes(payload))


def raw(random: Random, case: Case, payload: bytes) -> Case:
    """The payload's bytes as they are, or signed by the winner."""
    if len(payload) > SIGNATURE_SIZE and random.random() < 0.5:
        return with_payload(case, payload[:-SIGNATURE_SIZE], case.certificate.winner_key)
    return replace(case, block=with_scripts(case.block, payload_script(payload)))


def compact_sizes(random: Random, case: Case) -> Case:
    """A count in another form, or another count."""
    certificate = case.certificate
    body, payload = certificate.body(), PAYLOAD_MAGIC + certificate.serialize()
    count, at = len(certificate.coordinator_signatures), len(PAYLOAD_MAGIC) + len(body)
    if certificate.draw and random.random() < 0.5:
        count = len(certificate.draw.siblings)
        at -= 40 * count + len(compact_size(count))
    value = random.choice([count, count, integer(random, count, random.choice([1, 2, 4, 8]))])
    prefix = random.choice([0xFD, 0xFE, 0xFF])
    size = {0xFD: 2, 0xFE: 4, 0xFF: 8}[prefix]
    form = bytes([prefix]) + (value % 256**size).to_bytes(size, "little")
    payload = payload[:at] + form + payload[at + len(compact_size(count)) :]
    return with_payload(case, payload, certificate.winner_key)


def push(opcode: int, payload: bytes) -> bytes:
    """OP_RETURN and a push of a form."""
    size = {0x4C: 1, 0x4D: 2, 0x4E: 4}.get(opcode, 0)
    length: int = len(payload) % 256**size
    return bytes([OP_RETURN, opcode]) + length.to_bytes(size, "little") + payload


def scripts(random: Random, case: Case) -> Case:
    """Other scripts in the place of the payload's, some of which carry one too."""
    payload = payload_of(case.block)
    script: bytes = payload_script(payload)
    short = random.choice([b"", b"T", b"TCR", b"TCRT", b"TCRT\x01", b"TCRX" + payload[4:40]])
    forms = [
        script,
        push(random.choice([0x4C, 0x4D, 0x4E]), payload),
        push(random.choice([0x4C, 0x4D, 0x4E]), short),
        push(len(short), short),
        script + random.choice([b"\x00", b"\x51", b"\x6a", script]),
        script[: random.randrange(len(script))],
        script[1:],
        bytes([random.randrange(256)]) + script[1:],
        bytes([OP_RETURN]) + script,
        bytes([OP_RETURN])
        + random.choice([b"\x00", b"\x4f", b"\x51", b"\x60", b"\x4c", b"\x4d\x01", b"\x4e\xff\xff\xff\xff"]),
        bytes([OP_RETURN, 0x4E]) + len(payload).to_bytes(4, "little"),
        payload,
        b"",
    ]
    chosen = random.choices(forms, k=random.choice([0, 1, 1, 1, 2, 3]))
    if random.random() < 0.5:
        chosen.insert(random.randint(0, len(chosen)), script)
    return replace(case, block=with_scripts(case.block, *chosen))


def long_payload(random: Random, case: Case) -> Case:
    """A payload that needs another form of push."""
    payload = payload_of(case.block) + bytes(random.choice([1, 255, 60_000, 2**16]))
    return replace(case, block=with_scripts(case.block, push(random.choice([0x4D, 0x4E]), payload)))


def header(random: Random, case: Case) -> Case:
    """The header after the winner has signed it."""
    name = random.choice(["nVersion", "nTime", "nBits", "nNonce", "hashPrevBlock"])
    old = getattr(case.block, name)
    if name == "hashPrevBlock":
        value: int | bytes = bytes32(random, old)
    else:
        value = integer(random, old, 4) % 2**31
    return replace(case, block=with_header(case.block, **{name: value}))


def height(random: Random, case: Case) -> Case:
    """A block in another place than it was made for."""
    heights = [case.height - 1, case.height + 1, case.height + 256, 2**31 - 1]
    return replace(case, height=max(random.choice(heights), case.chain.start_height))


def transactions(random: Random, case: Case) -> Case:
    """Transactions more, less or in another order, after the winner has signed."""
    first, *rest = case.block.vtx
    extra = CTransaction([CTxIn(COutPoint(random.randbytes(32), 0))], [CTxOut(1, CScript())])
    vtx = random.choice([[first, *rest, extra], [first, *rest[1:]], [first, *rest[::-1]], [first, *rest, *rest[-1:]]])
    return replace(case, block=with_header(case.block, vtx=vtx))


def as_in_vectors(random: Random, case: Case) -> Case:
    """One of the cases that the node's functional tests submit."""
    reason, ways = random.choice([*WRONG.items(), *WRONG_WITH_PARENT.items()])
    if reason in WRONG_WITH_PARENT and len(case.certificate.draw.siblings if case.certificate.draw else ()) < 2:
        return case
    if (case.chain.rotations and reason in WRONG) or case.certificate.winner_key not in MINERS:
        return case
    if case.chain.table.weight > 2**32:  # one leaf may win every round
        return case
    change = random.choice(list(ways.values()))
    return replace(case, block=change(case.chain.forger(case.certificate.height), case.block, case.certificate))


SIGNED: list[Mutation] = [
    unchanged,
    field,
    winner_key,
    parent_field,
    parent_table,
    draw_field,
    draw_metrics,
    siblings,
    award,
    other_leaf,
    redrawn,
    times,
]
"""Signed as if they were right."""

UNSIGNED: list[Mutation] = [
    signers,
    signature_bytes,
    unsigned_edit,
    cut_or_grown,
    byte_flips,
    compact_sizes,
    scripts,
    long_payload,
    header,
    height,
    transactions,
    as_in_vectors,
]
"""By the coordinator, the winner or both not signed."""


def main() -> int:
    """Compare, and print what came of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000, help="blocks to compare (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the blocks (default: %(default)s)")
    parser.add_argument("--program", type=Path, help="the node's training_check (default: as built by make node)")
    arguments = parser.parse_args()
    program = arguments.program or node_folder() / "bin/training_check"
    if not program.is_file():
        parser.error(f"{program} is not there: run make node, or name the node's training_check with --program")
    verdicts, disagreements = compare(program, arguments.count, arguments.seed)
    for verdict, number in verdicts.most_common():
        print(f"{number:8} {verdict}")
    for disagreement in disagreements:
        print(disagreement)
    print(f"{verdicts.total()} blocks, seed {arguments.seed}: {len(disagreements)} disagreements")
    return 1 if disagreements else 0


if __name__ == "__main__":
    sys.exit(main())
