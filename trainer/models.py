"""Build a job's model; the models, losses and metrics that come with the trainer."""

import threading
from itertools import pairwise

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from traincert.trainer.determinism import seeded
from traincert.trainer.errors import JobError
from traincert.trainer.job import TrainingJob
from traincert.trainer.usercode import call

TRAINED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of parameters that can be trained."""
STORED_DTYPES = (
    *TRAINED_DTYPES,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
"""The dtypes that parameters and buffers may have."""

_BUILDING = threading.Lock()  # numpy and `random` have one state for all threads


def build_model(job: TrainingJob) -> nn.Module:
    """Build the job's model on the CPU. All that it draws, from torch, numpy or `random`, depends on `job.seed` alone.

    Raises JobError if the function `job.model` does not exist, does not take the job's options, or does not return a
    module with a trainable parameter; or if the module has a tensor that cannot be trained or stored.
    """
    with _BUILDING, seeded(job.seed):
        model = call(job.model, job.model_options, "model")
    if not isinstance(model, nn.Module):
        raise JobError(f"model = {job.model!r}: returned {type(model).__name__}, not a torch.nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise JobError(f"model = {job.model!r}: has no parameter to train")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if reason := _unusable(tensor):
            raise JobError(f"model = {job.model!r}: {name} {reason}")
    return model


def _unusable(tensor: torch.Tensor) -> str:
    """Return why a parameter or buffer cannot be in a job's model, or an empty string."""
    if is_lazy(tensor):
        return "has no shape yet: it is of a lazy module; use the module that is not lazy"
    if tensor.is_meta:
        return "is on the device 'meta': it has no values"
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"is {tensor.layout if tensor.layout is not torch.strided else 'quantized'}: it must be a dense tensor"
    if tensor.dtype not in STORED_DTYPES:
        return f"is {tensor.dtype}: it must be one of {', '.join(str(dtype)[6:] for dtype in STORED_DTYPES)}"
    if tensor.requires_grad and tensor.dtype not in TRAINED_DTYPES:
        names = ", ".join(str(dtype)[6:] for dtype in TRAINED_DTYPES)
        return f"is {tensor.dtype} and requires gradients: only {names} can be trained"
    return ""


def mlp(inputs: int, hidden: list[int], classes: int) -> nn.Module:
    """Return a multilayer perceptron with ReLU: (N, inputs) -> (N, classes), logits."""
    layers: list[nn.Module] = []
    for before, after in pairwise([inputs, *hidden, classes]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: tuple[int, int], hidden: int, classes: int, size: int) -> nn.Module:
    """Return two convolutions of stride 2 and two linear layers: (N, 1, size, size) -> (N, classes), logits."""
    first, second = channels
    return nn.Sequential(
        nn.Conv2d(1, first, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * (size // 4) ** 2, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


class Block(nn.Module):
    """A pre-norm transformer block with causal attention and rotary positions (arXiv 2104.09864)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.normal_(self.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.up.weight, std=width**-0.5)
        # Zeros make each block the identity at first, as in nanochat.
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return attention and MLP of `x`: (N, T, width) -> (N, T, width).

        `rotation` is the cosines and the sines, each (T, width / heads / 2).
        """
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, width / heads)
        attended = nn.functional.scaled_dot_product_attention(
            _rotate(query, *rotation), _rotate(key, *rotation), value, is_causal=True
        )
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, width))
        transformed: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return transformed


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, one * sine + other * cosine], dim=-1)


class Transformer(nn.Module):
    """A byte-level language model: (N, T) bytes -> (N, T, 256), logits of each next byte. T is at most `context`."""

    cosine: torch.Tensor
    sine: torch.Tensor

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.normal_(self.token.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        pairs = width // heads // 2
        angles = torch.outer(torch.arange(context), 10000.0 ** (-torch.arange(pairs) / pairs))
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of each next byte: (N, T) integers -> (N, T, 256)."""
        x = self.token(tokens.long())
        rotation = (self.cosine[: tokens.shape[1]], self.sine[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x, rotation)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def cross_entropy(outputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy, in nats, of logits (..., classes) and class numbers (...): its sum and the count.

    A target of -100 is masked, as in torch.nn.functional.cross_entropy: it is in neither.
    """
    classes = target.flatten().long()
    total = nn.functional.cross_entropy(outputs.flatten(0, -2), classes, reduction="sum", ignore_index=-100)
    return total, (classes != -100).sum()


def accuracy(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the accuracy, 0 to 1: how often the greatest of the logits (..., classes) is that of the target (...).

    Targets of -100 do not count, as in `cross_entropy`.
    """
    return (outputs.argmax(dim=-1) == target)[target != -100].double().mean()
