"""The models that come with the trainer."""

from itertools import pairwise

import torch
from torch import nn

from traincert.trainer.job import TrainingJob

FEATURES, CLASSES = 64, 10  # digits: 8 x 8 pixels


class MLP(nn.Sequential):
    """Linear layers with ReLU between them."""

    def __init__(self, widths: list[int]) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers[:-1])  # (N, widths[0]) -> (N, widths[-1]), logits


def build_model(job: TrainingJob) -> nn.Module:
    """Build the job's model, float32, its parameters set from `job.seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        return MLP([FEATURES, *job.hidden, CLASSES])
