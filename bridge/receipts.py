"""A miner's receipt: what came of its task, and why the miner did or did not win the next block.

A receipt and a node's chain are enough to check it. Only what the coordinator measured cannot be checked with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from traincert.bridge.chain import read_block, read_params
from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.lottery import Leaf, TreeNode, draw_ticket, follow_path, leaf_node
from traincert.bridge.consensus.params import TrainingParams
from traincert.bridge.consensus.rules import contextual_check_training_certificate
from traincert.bridge.errors import BridgeError, CertificateError
from traincert.bridge.messages import CommitMessage, MessageError, Receipt, unseal, unseal_unchecked
from traincert.bridge.recorded import RecordedTask
from traincert.bridge.rpc import NodeClient
from traincert.trainer.errors import Reason
from traincert.trainer.weights import paid

Tell = Callable[[str, str], None]
"""It is told the name of each step that holds, and what was found."""

_SAME_PROGRAMS = "use the same version of traincert and the same job as the coordinator."
ADVICE: Mapping[Reason, str] = {
    Reason.WORKER_DIED: "The process that trains ended twice: look into the log, and give the machine more memory.",
    Reason.LATE: "The commit did not come before the deadline: use a faster machine, or run less else on it.",
    Reason.ABSENT: "The miner was away before it committed: keep it running and connected to the broker.",
    Reason.WITHHELD: "The update itself did not come: after a commit keep the miner running until it has its receipt.",
    Reason.BARRED: "A spot check found a wrong task before: wait until the bar ends, and do each task as it is given.",
    Reason.SPOT_CHECK_FAILED: "Its last task, done again, gave another update: do each task in full, on its own data.",
    Reason.IMPOSSIBLE_RESOURCES: "The commit states less CPU time than the task's operations need: state what was "
    "measured, as `traincert miner run` does.",
    Reason.WRONG_MEMORY: "The task began with another memory than the last accepted task left: never put an older copy "
    "of the miner's folder in its place.",
    Reason.TOO_LARGE: f"The update's file is larger than any right one: {_SAME_PROGRAMS}",
    Reason.MALFORMED: f"The update's file cannot be read: {_SAME_PROGRAMS}",
    Reason.WRONG_NAMES: f"The update has other tensors than the task's segment: {_SAME_PROGRAMS}",
    Reason.WRONG_DTYPE: f"The update has numbers of another type than the job says: {_SAME_PROGRAMS}",
    Reason.WRONG_SHAPE: f"The update has tensors of another shape than the task's segment: {_SAME_PROGRAMS}",
    Reason.NOT_CANONICAL: f"The update's file is written in another way than it must be: {_SAME_PROGRAMS}",
    Reason.NOT_FINITE: "The update has a value that is no finite number: test this machine's memory; if other miners "
    "are refused for it too, the job needs a lower learning rate.",
    Reason.NORM_TOO_LARGE: "The update moves the model too far: train with the job's own learning rate and steps.",
    Reason.COPY: "The update is nearly the same as another one: train each task anew, and send only your own work.",
    Reason.NOT_ITS_SHARD: "The updates do not help most on their own shards: train on the task's shard alone.",
    Reason.MEMORY_WITHHELD: "The task was drawn to be done again, and the memory for that did not come: keep the miner "
    "running until it has its receipt.",
    Reason.NO_IMPROVEMENT: "Now and then, and late in a job, this happens to every miner; if it happens always, train "
    "with the job's own settings and all of its steps.",
}
"""What a miner can do about each reason, in a sentence."""


class ReceiptError(BridgeError):
    """A receipt that is wrong, or cannot be checked. `step` is the name of the check that failed."""

    def __init__(self, step: str, detail: str) -> None:
        super().__init__(f"{step}: {detail}")
        self.step = step


def find_receipt(path: Path, cycle: int | None = None) -> Path:
    """Return a receipt's file: `path` itself, or where `path` is a miner's folder, the one of a cycle or the last one.

    Raises BridgeError if there is none.
    """
    if not path.is_dir():
        if cycle is not None:
            raise BridgeError(f"{path} is a file: --cycle needs a miner's folder")
        return path
    kept = sorted((path / "receipts").glob("[0-9]" * 8))
    if cycle is not None:
        kept = [each for each in kept if int(each.name) == cycle]
    if not kept:
        of = "" if cycle is None else f" of cycle {cycle}"
        raise BridgeError(f"{path} has no receipt{of}: it should be a miner's folder, with receipts/")
    return kept[-1]


def read_receipt(path: Path) -> tuple[bytes, Receipt]:
    """Return a file's statement, and the receipt that it is. Its signature is not checked.

    Raises BridgeError if it is none.
    """
    statement = path.read_bytes()
    try:
        return statement, unseal_unchecked(Receipt, statement)[1]
    except MessageError as error:
        raise BridgeError(f"{path} is no receipt: {error}") from None


def facts(receipt: Receipt) -> dict[str, str]:
    """Return what a receipt says, in plain words, by the name of each fact."""
    task, score = receipt.task, receipt.task.score
    found = {
        "cycle": str(receipt.cycle),
        "miner": task.miner.hex(),
        "task": f"segment {task.segment} of the model ({task.params:,} parameters), shard {task.shard.hex()}",
        "commit": "none" if task.place is None else f"number {task.place + 1}{', late' if task.late else ''}",
        "update": f"{task.update_hash.hex()}, {task.update_size:,} bytes" if task.update_hash else "none",
    }
    if task.commit and (used := unseal_unchecked(CommitMessage, task.commit)[1].resources):
        memory = "" if used.peak_memory is None else f", {used.peak_memory / 1e6:.0f} MB of memory"
        found["the task used"] = f"{used.cpu_seconds:.2f} CPU seconds{memory}"
        did = "not monitored" if used.flags is None else ", ".join(used.flags) or "nothing"
        found["and did besides"] = did
    if task.norm is not None:
        scaled = f", scaled by {task.scale:.4f} because it is larger than usual" if task.scale < 1 else ""
        found["size of its move"] = f"L2 norm {task.norm:.6g}{scaled}"
    if task.own_shard is not None:
        found["its own shard"] = f"the update helps more there than elsewhere by {task.own_shard:.2f} standard errors"
    if score:
        found["the loss falls by"] = f"{score.reduction:,} nano-nats, with a standard error of {score.error:,}"
        found["of this counts"] = f"{score.loss_reduction:,} nano-nats: {score.margin:,} may be noise"
    found["weight"] = f"{task.weight:,} of {receipt.contributions_weight:,}"
    found["outcome"] = outcome(task)
    if task.refusal:
        found["advice"] = ADVICE[task.refusal]
    if task.drawn:
        found["spot check"] = "the task is done again in the next cycle"
    place = "" if receipt.index is None else f", the miner's is number {receipt.index + 1}"
    found["table"] = f"{receipt.contributions_count} leaves{place}, root {receipt.contributions_root.hex()}"
    return found | {"record": receipt.record.hex()}


def verify(statement: bytes, node: NodeClient, tell: Tell) -> str:
    """Check a receipt against a node's chain. Return a sentence: why its miner did or did not win the next block.

    Raises ReceiptError for the first step that does not hold, RpcError if the node is on no training network, and
    NodeUnreachableError.
    """
    params = read_params(node)
    receipt = check_signature(statement, params)
    tell("signature", f"the coordinator of network {params.chain_id.hex()[:16]} signed it, for cycle {receipt.cycle}")
    tell("score", check_score(receipt))
    start = check_leaf(receipt)
    tell("leaf", _leaf_found(receipt, start))
    height = params.start_height + receipt.cycle - 1
    tip = node.call("getblockcount")
    if not params.start_height <= height <= tip:
        detail = f"{node.name} has no block {height} of cycle {receipt.cycle}: its last block is {tip}"
        raise ReceiptError("certificate", detail)
    block = _read(node, height, params, "certificate")
    check_certificate(receipt, block)
    tell("certificate", f"block {height} has the same table and the same record")
    if tip == height:
        return _advice(receipt.task) or f"Block {height + 1} is not there yet: nobody has won it."
    child = _read(node, height + 1, params, "draw")
    check_draw(block, child, params)
    return explain(receipt, start, block, child, tell)


def check_signature(statement: bytes, params: TrainingParams) -> Receipt:
    """Return the receipt that the coordinator of a network signed."""
    try:
        key, receipt = unseal(params.chain_id, Receipt, statement)
    except MessageError as error:
        raise ReceiptError("signature", str(error)) from None
    if key != params.keys_at(params.start_height).keys[0]:
        raise ReceiptError("signature", f"it is signed by {key.hex()}, which is not the coordinator's key")
    return receipt


def check_score(receipt: Receipt) -> str:
    """Check that what counts of an update, and its weight, follow from what was measured. Return how they do."""
    task, score = receipt.task, receipt.task.score
    if (score is not None) != (task.refusal in {None, Reason.NO_IMPROVEMENT, Reason.MEMORY_WITHHELD}):
        raise ReceiptError(
            "score", f"the update was {outcome(task)}, but it has {'no' if score is None else 'a'} score"
        )
    counts, text = (0, 0), "the update was not measured"
    if score:
        shares = {"noise_margin": receipt.noise_margin, "late_share": receipt.late_share}
        try:
            expected = paid(task.params, score.reduction, score.error, **shares, late=task.late)
        except OverflowError:
            raise ReceiptError("score", "its numbers are too large") from None
        if score != expected:
            raise ReceiptError("score", f"from the factors follows {expected}, but the receipt has {score}")
        if (score.weight > 0) == (task.refusal is Reason.NO_IMPROVEMENT):
            raise ReceiptError(
                "score", f"the update was {outcome(task)}, but what was measured has weight {score.weight}"
            )
        counts = (0, 0) if task.refusal else (score.loss_reduction, score.weight)
        late = f", times {receipt.late_share:g} squared because it was late" if task.late else ""
        text = (
            f"the loss falls by {score.reduction:,} nano-nats, less {score.margin:,} that may be noise{late}: "
            f"{score.loss_reduction:,} count; the weight is the root of {task.params:,} * {score.loss_reduction:,}: "
            f"{score.weight:,}"
        )
    if (task.loss_reduction, task.weight) != counts:
        found = f"loss_reduction {task.loss_reduction} and weight {task.weight}"
        raise ReceiptError("score", f"the task has {found}, but {counts[0]} and {counts[1]} follow")
    return text


def check_leaf(receipt: Receipt) -> int | None:
    """Check that the task's leaf is in the table. Return where its interval starts; None: the update was refused."""
    task = receipt.task
    if task.refusal:
        if receipt.index is not None or receipt.path:
            raise ReceiptError("leaf", f"the update was {outcome(task)}, but the receipt has a place in the table")
        return None
    if receipt.index is None or task.update_hash is None:
        raise ReceiptError("leaf", "the update was accepted, but the receipt has no place in the table")
    leaf = leaf_node(Leaf(task.miner, task.update_hash, task.params, task.loss_reduction, task.weight))
    path = [TreeNode(*node) for node in receipt.path]
    end = follow_path(leaf, receipt.index, receipt.contributions_count, path)
    if end is None or end[0] != (receipt.contributions_root, receipt.contributions_weight):
        raise ReceiptError("leaf", "its path does not end at the root and the weight of the table")
    return end[1]


def check_certificate(receipt: Receipt, certificate: Certificate) -> None:
    """Check that the certificate of the cycle's block has the table and the record that the receipt names."""
    for name in ("record", "contributions_root", "contributions_weight", "contributions_count"):
        found, expected = getattr(receipt, name), getattr(certificate, name)
        if found != expected:
            what = f"the receipt has {_shown(found)}, block {certificate.height} has {_shown(expected)}"
            raise ReceiptError("certificate", f"{name}: {what}")


def check_draw(block: Certificate, child: Certificate, params: TrainingParams) -> None:
    """Check that the winner of `child` was drawn from the table of `block`, its parent."""
    far_future = 2**32 - 1  # the node itself has checked that the round had come
    try:
        contextual_check_training_certificate(child, block, far_future, 0, params)
    except CertificateError as error:
        raise ReceiptError("draw", f"block {child.height}: {error}") from None


def explain(receipt: Receipt, start: int | None, block: Certificate, child: Certificate, tell: Tell) -> str:
    """Return a sentence: why the miner did or did not win the block of `child`, which `check_draw` has checked.

    `start` is what `check_leaf` returned. `block` is the certificate of the cycle's block, the parent.
    """
    task, height, total = receipt.task, child.height, block.contributions_weight
    if child.draw is None:
        tell("draw", f"the table is empty, so the coordinator appointed the winner of block {height}")
        return _advice(task)
    tickets = [draw_ticket(child.beacon_reveal, child.prev_block, each, total) for each in range(child.round + 1)]
    ours = [each for each, ticket in enumerate(tickets) if start is not None and 0 <= ticket - start < task.weight]
    earlier = "; certificates of earlier rounds are not on the chain" if child.round else ""
    tell("draw", f"block {height}, round {child.round}: the ticket is {tickets[-1]:,} of {total:,}{earlier}")
    won = child.winner_key == task.miner
    if won != (child.round in ours):
        detail = f"the ticket is {'not ' if won else ''}this miner's, but {child.winner_key.hex()} won block {height}"
        raise ReceiptError("winner", detail)
    tell("winner", f"the ticket is in the interval of miner {child.winner_key.hex()}")
    if start is None:
        return _advice(task)
    share = f"{_interval(start, task.weight)}, {task.weight / total:.1%} of all"
    if won:
        return f"This miner won block {height}, because the ticket is one of its own: {share}."
    text = f"This miner did not win block {height}, because the ticket is none of its own: {share}."
    if ours:
        missed = ", ".join(map(str, ours))
        text += f" It was drawn in round {missed}, but that block did not come: keep the miner and its node running."
    return text


def _read(node: NodeClient, height: int, params: TrainingParams, step: str) -> Certificate:
    try:
        return read_block(node, height, params).certificate
    except CertificateError as error:
        raise ReceiptError(step, f"block {height}: {error}") from None


def _leaf_found(receipt: Receipt, start: int | None) -> str:
    if start is None:
        return "there is none, because the update was refused"
    return (
        f"leaf {(receipt.index or 0) + 1} of {receipt.contributions_count} leads to the table's root: its tickets are "
        f"{_interval(start, receipt.task.weight)} of {receipt.contributions_weight:,}"
    )


def _interval(start: int, weight: int) -> str:
    return f"{start:,} to {start + weight - 1:,}"


def outcome(task: RecordedTask) -> str:
    """Return what came of an update: that it was accepted, or why it was refused."""
    if not task.refusal:
        return "accepted"
    detail = "".join(each if each.isprintable() else "?" for each in task.detail or "")
    return f"refused as {task.refusal} ({detail})"


def _advice(task: RecordedTask) -> str:
    """Return what a miner can do about a refusal; nothing if there is none."""
    return f"The update was {outcome(task)}, so it has no ticket. {ADVICE[task.refusal]}" if task.refusal else ""


def _shown(value: bytes | int) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
