"""What the explorer's pages say of refusals and scores, one sentence each."""

from __future__ import annotations

from collections.abc import Mapping

from traincert.bridge.receipts import ADVICE

REASONS: Mapping[str, str] = {str(reason): advice for reason, advice in ADVICE.items()}
"""What a miner can do about each refusal."""

FACTORS: Mapping[str, str] = {
    "params": "How many parameters the task's segment has.",
    "norm": "The size of the update: the L2 norm of its move.",
    "scale": "What the update was multiplied by, so that it is not larger than usual.",
    "own_shard": "By how many standard errors it helps more on its own shard than elsewhere.",
    "reduction": "What it takes off the loss on the validation examples, in nano-nats.",
    "error": "The standard error of the reduction, in nano-nats.",
    "margin": "The part of the reduction that may be noise and does not count, in nano-nats.",
    "loss_reduction": "What counts of the reduction, in nano-nats: less if it was late, 0 if it was refused.",
    "weight": "The chance in the lottery: the square root of (params * loss_reduction), rounded down.",
}
"""The factors of a score, as a cycle's record has them."""
