"""A module as a user would write it, with models of all kinds, and running a few cycles of one."""

from traincert.trainer.cycle import CycleResult, Trainer

MODULE = """
    import random

    import numpy as np
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy, relu
    from torch.nn.utils import parametrizations
    from torch.utils.checkpoint import checkpoint

    def plain():
        return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def batch_norm():
        return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))

    def convolutions():
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(36, 10),
        )

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 16, bias=False)
            self.middle = nn.Linear(16, 16)
            self.last = nn.Linear(64, 16, bias=False)
            self.last.weight = self.first.weight
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(relu(self.middle(self.first(x))) @ self.last.weight + x)

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 16)
            self.middle = nn.Linear(16, 16).requires_grad_(False)
            self.last = nn.Linear(16, 10)
            self.last.bias.requires_grad_(False)

        def forward(self, x):
            return self.last(relu(self.middle(relu(self.first(x)))))

    class Brief(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = plain().bfloat16()

        def forward(self, x):
            return self.layers(x.bfloat16()).float()

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 16).double()
            self.last = nn.Linear(16, 10)

        def forward(self, x):
            return self.last(relu(self.first(x.double())).float())

    def dropout():
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))

    class Counting(nn.Module):
        # buffers: of integers, of floats, of bools, none kept, and one that is a scalar
        def __init__(self):
            super().__init__()
            self.layers = plain()
            self.register_buffer("seen", torch.zeros(10, dtype=torch.int64))
            self.register_buffer("steps", torch.tensor(0, dtype=torch.int32))
            self.register_buffer("mean", torch.zeros(64))
            self.register_buffer("mask", torch.ones(64, dtype=torch.bool))
            self.register_buffer("cache", torch.zeros(3), persistent=False)

        def forward(self, x):
            outputs = self.layers(x * self.mask)
            if self.training:
                with torch.no_grad():
                    self.seen += torch.bincount(outputs.argmax(1), minlength=10)
                    self.steps += 1
                    self.mean += 0.1 * (x.mean(0) - self.mean)
                    self.cache += 1
            return outputs

    class Scalar(nn.Module):
        # parameters of no dimension, of one element, not contiguous, and one that nothing uses
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.layer = nn.Linear(64, 10)
            self.layer.weight = nn.Parameter(torch.randn(64, 10).mul(0.1).t())
            self.unused = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return self.layer(x) * self.scale

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(8, 16)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.layer(self.embed(x.view(-1, 8, 8))).mean(1))

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.GRU(8, 16, batch_first=True)
            self.head = nn.Linear(16, 10)

        def forward(self, x):
            return self.head(self.cells(x.view(-1, 8, 8))[0][:, -1])

    class Unused(nn.Module):
        # a head that the loss does not depend on, larger than the rest
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)
            self.other = nn.Linear(64, 64)

        def forward(self, x):
            self.other(x)
            return self.layer(x)

    class Checkpointed(nn.Module):
        # activation checkpointing: the backward pass calls the layers again
        def __init__(self, use_reentrant=False):
            super().__init__()
            self.first = nn.Linear(64, 32)
            self.middle = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
            self.last = nn.Linear(32, 10)
            self.use_reentrant = use_reentrant

        def forward(self, x):
            x = torch.tanh(self.first(x))
            return self.last(checkpoint(self.middle, x, use_reentrant=self.use_reentrant))

    class Sparse(nn.Module):
        # gradients that are sparse tensors
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(65, 16, sparse=True)
            self.layer = nn.Linear(64 * 16, 10)

        def forward(self, x):
            words = (x * 4).long().clamp(-32, 32) + 32
            return self.layer(self.embedding(words).flatten(1))

    class Flags(nn.Module):
        # buffers of bools, float64 and complex numbers that training changes, and constants of numpy and random
        def __init__(self):
            super().__init__()
            self.layers = plain()
            self.register_buffer("seen", torch.zeros(10, dtype=torch.bool))
            self.register_buffer("mean", torch.full((64,), 1 / 3, dtype=torch.float64))
            self.register_buffer("phase", torch.full((4,), 1 + 2j, dtype=torch.complex64))
            self.register_buffer("constant", torch.full((4,), 1 / 3 + 2j / 3, dtype=torch.complex64))
            self.signs = torch.from_numpy(np.random.choice([-1.0, 1.0], 64)).float()
            self.order = random.sample(range(64), 64)

        def forward(self, x):
            x = x[:, self.order] * self.signs
            if self.training:
                with torch.no_grad():
                    self.seen[x.argmax(1) % 10] = True
                    self.mean += 0.1 * (x.double().mean(0) - self.mean)
                    self.phase *= 1j
            return self.layers(x)

    def weight_norm():
        return nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 16)), nn.ReLU(), nn.Linear(16, 10))

    def spectral_norm():
        return nn.Sequential(parametrizations.spectral_norm(nn.Linear(64, 16)), nn.ReLU(), nn.Linear(16, 10))

    def orthogonal():
        return nn.Sequential(parametrizations.orthogonal(nn.Linear(64, 16)), nn.ReLU(), nn.Linear(16, 10))
"""

MODELS = [
    "plain",
    "batch_norm",
    "convolutions",
    "Tied",
    "Frozen",
    "Brief",
    "Mixed",
    "dropout",
    "Counting",
    "Scalar",
    "Attention",
    "Recurrent",
    "Checkpointed",
    "Flags",
    "Sparse",
    "weight_norm",
    "spectral_norm",
    "orthogonal",
]


def run(trainer: Trainer, miners: list[bytes], cycles: int) -> list[CycleResult]:
    results: list[CycleResult] = []
    state = trainer.start()
    for number in range(cycles):
        results.append(trainer.run_cycle(state, miners, seed=bytes([number])))
        state = results[-1].after
    return results
