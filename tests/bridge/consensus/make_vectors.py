"""Makes the test vectors that the bridge and the node are both held to.

`python tests/bridge/consensus/make_vectors.py` writes them again after a change of the rules. The C++ side is
bitcoind-patch/src/test/training_tests.cpp.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitcoin.core import CMutableTransaction, COutPoint, CTxIn, CTxOut, b2lx
from bitcoin.core.script import CScript
from coincurve import PrivateKey

sys.path.insert(0, str(Path(__file__).parents[2]))

from traincert.bridge.consensus.block import winner_sighash
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.lottery import ContributionTable, Leaf, contribution_weight, draw_ticket
from traincert.bridge.consensus.params import GENESIS_HASH, TrainingKeys, TrainingParams
from traincert.bridge.consensus.rules import read_training_payload
from traincert.bridge.testing.invalid import WRONG, WRONG_WITH_PARENT, digest, with_certificate
from training_chain import COORDINATORS, TrainingChain, made_table

VECTORS = Path(__file__).parents[3] / "bitcoind-patch/src/test/data/training.json"
U64_MAX = 2**64 - 1


def make() -> dict[str, Any]:
    return {
        "comment": "Made by tests/bridge/consensus/make_vectors.py. Hashes are in byte order, block hashes reversed.",
        "networks": [_network(params) for params in _networks()],
        "wrong_options": list(_wrong_options()),
        **_certificates_and_blocks(),
        "with_parent": list(_with_parent()),
        "tables": [_table(count) for count in (1, 2, 3, 7, 8, 1000)],
        "draws": list(_draws()),
        "weights": list(_weights()),
    }


def _networks() -> Iterator[TrainingParams]:
    yield TrainingChain().params
    xonly = tuple(key.public_key_xonly.format() for key in COORDINATORS)
    rotated = {1: TrainingKeys(1, xonly[:1]), 150: TrainingKeys(3, xonly), 70_000: TrainingKeys(1, xonly[1:])}
    yield TrainingParams(rotated, digest("anchor"), digest("model"), round_seconds=86_400)


def _options(params: TrainingParams) -> list[str]:
    options = []
    for name, values in params.node_options().items():
        options += [f"{name}={value}" for value in ([values] if isinstance(values, str) else values)]
    return options


def _network(params: TrainingParams) -> dict[str, Any]:
    return {"options": _options(params), "chain_id": params.chain_id.hex()}


def _wrong_options() -> Iterator[dict[str, Any]]:
    key, other = (key.public_key_xonly.format().hex() for key in COORDINATORS[:2])
    rest = [f"trainingbeacon={'aa' * 32}", f"trainingmodel={'bb' * 32}"]
    needs = "a training network needs -trainingkeys, -trainingbeacon and -trainingmodel."

    def wrong_keys(value: str, problem: str) -> dict[str, Any]:
        return {"options": [f"trainingkeys={value}", *rest], "error": f"-trainingkeys={value}: {problem}"}

    yield wrong_keys("", "expected <height>:<m>:<key>[,<key>...].")
    yield wrong_keys(f"1:{key}", "expected <height>:<m>:<key>[,<key>...].")
    for height in ("0", "-1", "x", "2147483648", ""):
        problem = f"the height must be a whole number from 1 to 2147483647, not '{height}'."
        yield wrong_keys(f"{height}:1:{key}", problem)
    for threshold in ("0", "2", "", "257"):
        problem = f"m must be a whole number from 1 to the number of keys (1), not '{threshold}'."
        yield wrong_keys(f"1:{threshold}:{key}", problem)
    for no_key in ("", key[:-2], key + "00", "ff" * 32, "zz" * 32, " " + key[1:]):
        yield wrong_keys(f"1:1:{no_key}", f"'{no_key}' is not an x-only public key of 64 hex digits.")
    yield wrong_keys(f"1:1:{key},{key}", f"key '{key}' is there twice.")
    many = [hashlib.sha256(bytes([i])).digest() for i in range(1, 60)]
    many_keys = ",".join(_xonly(secret) for secret in many[:17])
    yield wrong_keys(f"1:1:{many_keys}", "17 keys are more than 16.")

    keys = f"trainingkeys=1:1:{key}"
    yield {
        "options": [keys, f"trainingkeys=1:1:{other}", *rest],
        "error": f"-trainingkeys=1:1:{other}: height 1 is there twice.",
    }
    yield {"options": rest, "error": f"-trainingkeys is missing: {needs}"}
    yield {"options": [keys, rest[0]], "error": f"-trainingmodel is missing: {needs}"}
    yield {"options": [keys, rest[1]], "error": f"-trainingbeacon is missing: {needs}"}
    yield {
        "options": [keys, *rest, f"trainingmodel={'cc' * 32}"],
        "error": f"-trainingmodel may be given once only, not as both '{'bb' * 32}' and '{'cc' * 32}'.",
    }
    yield {
        "options": [keys, "trainingbeacon=aa", rest[1]],
        "error": "-trainingbeacon must be 64 hex digits, not 'aa'.",
    }
    for seconds in ("0", "86401", "1.5", ""):
        yield {
            "options": [keys, *rest, f"traininground={seconds}"],
            "error": f"-traininground must be a whole number of seconds from 1 to 86400, not '{seconds}'.",
        }


def _xonly(secret: bytes) -> str:
    return PrivateKey(secret).public_key_xonly.format().hex()


def _template(height: int, prev_block: bytes) -> dict[str, Any]:
    spends = [
        CMutableTransaction([CTxIn(COutPoint(digest("coin"), i))], [CTxOut(1000, CScript(b"\x51"))])
        for i in range(height - 1)
    ]
    return {
        "version": 0x20000000,
        "previousblockhash": b2lx(prev_block),
        "transactions": [{"data": spend.serialize().hex()} for spend in spends],
        "coinbasevalue": 5_000_000_000,
        "default_witness_commitment": "6a24aa21a9ed" + digest("commitment").hex(),
        "target": "7f" + "ff" * 31,
        "bits": "207fffff",
        "curtime": 1_700_000_000 + height,
        "height": height,
    }


def _certificates_and_blocks() -> dict[str, Any]:
    chain = TrainingChain()
    certificates, blocks = [], []
    prev_block = GENESIS_HASH
    for height in (1, 2, 3):
        template = _template(height, prev_block)
        certificate = chain.next_certificate(template)
        block = chain.block(template, certificate)
        prev_block = block.GetHash()
        certificates.append(
            {
                "chain_id": chain.params.chain_id.hex(),
                "height": height,
                "prev_block": b2lx(certificate.prev_block),
                "loss_after": certificate.loss_after,
                "siblings": len(certificate.draw.siblings) if certificate.draw else 0,
                "certificate": certificate.serialize().hex(),
                "sighash": certificate.sighash(chain.params.chain_id).hex(),
            }
        )
        common = {"options": _options(chain.params), "height": height}
        output = len(block.vtx[0].vout) - 1
        blocks.append(
            {
                "comment": f"valid, with {len(block.vtx)} transactions",
                **common,
                "block": block.serialize().hex(),
                "winner_sighash": winner_sighash(block, output, chain.params.chain_id).hex(),
                "reason": None,
            }
        )
        if height == 3:
            for reason, ways in WRONG.items():
                for comment, change in ways.items():
                    wrong = change(chain.forger(height), block, certificate)
                    blocks.append({"comment": comment, **common, "block": wrong.serialize().hex(), "reason": reason})
        chain.advance(certificate)
    return {"certificates": certificates, "blocks": [*blocks, *_rotation()]}


def _rotation() -> Iterator[dict[str, Any]]:
    """Blocks before and after the coordinator's keys change."""
    chain = TrainingChain(rotations={2: (1,), 3: (2, 1)})
    prev_block = GENESIS_HASH
    for height in (1, 2, 3):
        template = _template(height, prev_block)
        certificate = chain.next_certificate(template)
        block = chain.block(template, certificate)
        common = {"options": _options(chain.params), "height": height}
        yield {"comment": f"valid, key set {height}", **common, "block": block.serialize().hex(), "reason": None}
        for other in {1, 2, 3} - {height}:
            wrong = with_certificate(chain.forger(other), block, chain.sign(certificate, keys_at=other))
            reason = "bad-traincert-coordinator-sig"
            comment = f"key set {other} at height {height}"
            yield {"comment": comment, **common, "block": wrong.serialize().hex(), "reason": reason}
        chain.advance(certificate)
        prev_block = block.GetHash()


def _with_parent() -> Iterator[dict[str, Any]]:
    """Certificates that are right, or wrong in one thing, only together with their parent's."""
    chain = TrainingChain()
    seconds = chain.round_seconds
    parent: Certificate | None = None
    parent_time, prev_block = 1_700_000_000, GENESIS_HASH

    def case(comment: str, certificate: Certificate, wait: int = 0, reason: str | None = None) -> dict[str, Any]:
        return {
            "comment": comment,
            "options": _options(chain.params),
            "parent_body_hex": parent.body().hex() if parent else None,
            "certificate_hex": certificate.serialize().hex(),
            "time": parent_time + wait,
            "parent_time": parent_time,
            "reason": reason,
        }

    for height in (1, 2, 3, 4):
        template = _template(height, prev_block)
        table = ContributionTable([]) if height == 3 else None
        certificate = chain.next_certificate(template, table)
        where = {1: "at the start height", 4: "after an empty table"}.get(height, f"drawn, at height {height}")
        yield case(f"valid, {where}", certificate)
        for round_ in (1, 2, 1000):
            redrawn = chain.next_certificate(template, table, round_=round_)
            yield case(f"round {round_} in time, {where}", redrawn, round_ * seconds)
            yield case(f"round {round_} too early, {where}", redrawn, round_ * seconds - 1, "bad-traincert-round")
        block = chain.block(template, certificate)
        if certificate.draw is None:
            winner, draw = replace(chain, table=made_table(height)).draw(certificate.beacon_reveal, prev_block, 0)
            drawn = chain.sign(replace(certificate, winner_key=winner, draw=draw))
            yield case(f"drawn, {where}", drawn, reason="bad-traincert-award")
        for reason, ways in WRONG_WITH_PARENT.items():
            for comment, change in ways.items():
                if certificate.draw or reason in ("bad-traincert-beacon", "bad-traincert-model", "bad-traincert-round"):
                    wrong = read_training_payload(change(chain.forger(height), block, certificate).vtx[0]).certificate
                    yield case(f"{comment}, {where}", wrong, reason=reason)
        chain.advance(certificate, table)
        parent, prev_block = certificate, block.GetHash()


def _table(count: int) -> dict[str, Any]:
    def leaf(i: int) -> Leaf:
        key, number = i.to_bytes(32, "big"), i * i + 1
        return Leaf(key, hashlib.sha256(key).digest(), number, number, number)

    table = ContributionTable(leaf(i) for i in range(count))
    paths = []
    for index in sorted({0, 1, count // 2, count - 2, count - 1} & set(range(count))):
        siblings = [{"hash": node.hash.hex(), "sum": node.sum} for node in table.path(index)]
        start = sum(each.weight for each in table.leaves[:index])
        paths.append({"index": index, "start": start, "siblings": siblings})
    return {"count": count, "root": table.root.hex(), "weight": table.weight, "paths": paths}


def _draws() -> Iterator[dict[str, Any]]:
    for round_ in (0, 1, 65_535):
        for weight in (1, 2, 1000, 2**32 + 15, U64_MAX):
            reveal, prev_block = digest(f"reveal {round_}"), digest(f"block {weight}")
            yield {
                "beacon_reveal": reveal.hex(),
                "prev_block": b2lx(prev_block),
                "round": round_,
                "contributions_weight": weight,
                "ticket": draw_ticket(reveal, prev_block, round_, weight),
            }


def _weights() -> Iterator[dict[str, Any]]:
    square = 3_000_000_019
    pairs = [(0, 0), (0, U64_MAX), (1, 1), (2, 1), (3, 1), (4, 1), (7, 500_000_000), (U64_MAX, U64_MAX), (U64_MAX, 1)]
    pairs += [(square, square), (square**2 - 1, 1), (square**2 + 1, 1), (U64_MAX, U64_MAX - 1)]
    for params, loss_reduction in pairs:
        weight = contribution_weight(params, loss_reduction)
        yield {"params": params, "loss_reduction": loss_reduction, "weight": weight}


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(make(), indent=1) + "\n")
