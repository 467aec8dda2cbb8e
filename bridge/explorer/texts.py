"""What the explorer's pages say of fields and of refusals, one sentence each."""

from __future__ import annotations

from collections.abc import Mapping

from traincert.bridge.receipts import ADVICE

REASONS: Mapping[str, str] = {str(reason): advice for reason, advice in ADVICE.items()}
"""What a miner can do about each refusal."""

FIELDS: Mapping[str, str] = {
    "version": "The version of the certificate's format.",
    "height": "The height of this block.",
    "prev_block": "The block that this one follows.",
    "round": "How many times the winner of this slot was drawn again, because the earlier ones were absent.",
    "beacon_reveal": "The next value of the beacon: its SHA-256 is the value in the block before.",
    "model_before": "SHA-256 of the model that the cycle began with. It must be the model_after of the block before.",
    "model_after": "SHA-256 of the model that the cycle produced.",
    "dataset_root": "SHA-256 of the list of the data shards.",
    "record": "SHA-256 of the cycle's record, the file with all that happened. Zeros: nothing was trained.",
    "loss_before": "The validation loss of the model before, in nano-nats.",
    "loss_after": "The validation loss of the model after, in nano-nats.",
    "params_trained": "How many parameters the contributions trained, all together.",
    "contributions_root": "The root of the tree of contributions. The next block's winner is drawn from it.",
    "contributions_weight": "The weight of all contributions together.",
    "contributions_count": "How many contributions there are.",
    "winner_key": "The key that may sign this block: the winner's.",
    "award": "drawn: the lottery picked the winner. appointed: there was no table to draw from.",
    "draw.update_hash": "The winner's leaf in the parent's table: SHA-256 of its update.",
    "draw.params": "How many parameters the winner's task trained.",
    "draw.loss_reduction": "How much the winner's update took off the loss, in nano-nats.",
    "draw.weight": "The winner's weight: the square root of (params * loss_reduction), rounded down.",
    "draw.index": "The position of the winner's leaf in the parent's table.",
    "coordinator_signatures": "The BIP340 signatures of the coordinator's keys, by the keys' positions in the list.",
    "winner_signature": "The winner's BIP340 signature of this very block.",
}
"""The fields of a certificate, in the order of their bytes."""

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
