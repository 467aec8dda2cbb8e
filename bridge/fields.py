"""What the fields of a certificate mean, in one sentence each."""

from collections.abc import Mapping

FIELDS: Mapping[str, str] = {
    "version": "The version of the certificate's format.",
    "height": "The height of this block.",
    "prev_block": "The block that this one follows.",
    "round": "How often the slot's winner was drawn again, because the one before was absent.",
    "beacon_reveal": "The next value of the beacon: its SHA-256 is the value in the block before.",
    "model_before": "SHA-256 of the model with which the cycle began: the model_after of the block before.",
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
    "draw.update_hash": "The winner's leaf in the table of the block before: SHA-256 of its update.",
    "draw.params": "How many parameters the winner's task trained.",
    "draw.loss_reduction": "How much the winner's update took off the loss, in nano-nats.",
    "draw.weight": "The winner's weight: the square root of (params * loss_reduction), rounded down.",
    "draw.index": "The position of the winner's leaf in that table, from 0.",
    "draw.siblings": "The hashes that lead from the leaf to the table's root.",
    "coordinator_signatures": "Who signed the certificate: positions in the list of the coordinator's keys.",
    "winner_signature": "The winner's signature of this very block (BIP340).",
}
"""By the names of gettrainingcertificate, in the order of the fields' bytes."""
