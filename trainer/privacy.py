"""Differential privacy of a task: its noise, and the gradients of single examples.

dp-sgd is DP-SGD (arXiv 1607.00133): each step draws every example with the same probability (Poisson sampling), clips
each example's gradient to `job.max_grad_norm`, and adds Gaussian noise to their sum. noised-update trains as usual,
clips the update to this norm, and adds Gaussian noise to it.

All noise, and which examples are drawn, comes from a secret of the task, which its miner draws and keeps. Everybody
knows the task's seed: noise that is made from it could be taken off again.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_map

from traincert.trainer.accounting import epsilon, sample_rate
from traincert.trainer.errors import JobError
from traincert.trainer.examples import Examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.state import set_state, state_of
from traincert.trainer.updates import l2_norm
from traincert.trainer.usercode import Functions

SECRET_BYTES = 32
_AT_ONCE = 64  # examples whose gradients are in memory at the same time
_TOLERANCE = 1e-3  # of a mean of losses, which is summed in another order


class Noise:
    """Random numbers that a secret of 32 bytes decides: AES-256 in counter mode makes them.

    torch's own generator would not do: its seed has so few bits that an attacker could try all of them.
    """

    def __init__(self, secret: bytes) -> None:
        self._stream = Cipher(AES(secret), CTR(bytes(16))).encryptor()

    def normal(self, count: int) -> torch.Tensor:
        """Draw from the normal distribution, by Box and Muller: (count,) float32. It is computed in float64."""
        half = -(-count // 2)
        radius = torch.from_numpy(1 - self._uniform(half)).log().mul(-2).sqrt()
        angle = torch.from_numpy(self._uniform(half)) * (2 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].float()

    def chosen(self, count: int, rate: float) -> torch.Tensor:
        """Choose each of the numbers below `count` with the probability `rate`: int64, rising."""
        return torch.from_numpy(np.flatnonzero(self._uniform(count) < rate))

    def _uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Draw multiples of 2^-53, from 0 to below 1."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), "<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def drawn_rows(job: TrainingJob, count: int, noise: Noise) -> Iterator[torch.Tensor]:
    """Draw the batches of a dp-sgd task from a shard of `count` examples, as the examples' numbers.

    They differ in size, and may be empty; `job.batch_size` is their expected size.
    """
    for _ in range(job.local_steps):
        yield noise.chosen(count, sample_rate(job, count))


def set_noised_gradients(
    job: TrainingJob,
    functions: Functions,
    model: nn.Module,
    leaves: Sequence[nn.Parameter],
    joined: Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]],
    shard: Examples,
    rows: torch.Tensor,
    noise: Noise,
) -> None:
    """Set the gradients of `leaves`: the clipped gradients of the examples `rows`, summed up, with noise.

    `joined` returns the model's parameters, by name, of tensors in place of the leaves. The sum is divided by the
    expected number of examples, because the actual one would tell who was drawn.
    """
    most, expected = job.max_grad_norm or 0.0, min(job.batch_size, len(shard))
    sums = [torch.zeros(leaf.shape, device=leaf.device) for leaf in leaves]
    for some in torch.split(rows, _AT_ONCE) if len(rows) else ():
        gradients = example_gradients(functions, model, leaves, joined, shard.batch(some, job.device))
        norms = torch.stack([each.flatten(1).norm(dim=1) for each in gradients]).norm(dim=0)
        scales = most / norms.clamp_min(most)
        for total, each in zip(sums, gradients, strict=True):
            total += torch.tensordot(scales, each, dims=1)
    for leaf, total in zip(leaves, sums, strict=True):
        total += noise_of(job, noise, leaf.numel()).view(leaf.shape).to(leaf.device)
        leaf.grad = (total / expected).to(leaf.dtype)


def example_gradients(
    functions: Functions,
    model: nn.Module,
    leaves: Sequence[nn.Parameter],
    joined: Callable[[Sequence[torch.Tensor]], Mapping[str, torch.Tensor]],
    batch: Examples,
) -> list[torch.Tensor]:
    """Return the gradient of each example's loss by each of the leaves, (examples, ...) float32.

    What is not finite in a gradient counts as 0: it would show which example it is from.
    """

    def loss(tensors: Sequence[torch.Tensor], example: Examples) -> torch.Tensor:
        alone: Examples = tree_map(lambda tensor: tensor.unsqueeze(0), example)
        outputs = functions.outputs(lambda *inputs: functional_call(model, dict(joined(tensors)), inputs), alone.inputs)
        return functions.example_loss(outputs, alone.target)

    with sdpa_kernel(SDPBackend.MATH):  # vmap knows no other kind of attention
        gradients = vmap(grad(loss), (None, 0), randomness="different")([leaf.detach() for leaf in leaves], batch)
    return [each.float().nan_to_num_(0.0, 0.0, 0.0) for each in gradients]


def noised_move(job: TrainingJob, move: torch.Tensor, noise: Noise) -> torch.Tensor:
    """Return the move of a noised-update, (params,) float32: clipped, with noise.

    Two moves, whatever they were trained on, are at most twice `max_grad_norm` apart: this is what examples can change.
    """
    most = job.max_grad_norm or 0.0
    finite = move.nan_to_num(0.0, 0.0, 0.0)
    noised: torch.Tensor = finite * min(1.0, most / l2_norm(finite)) if finite.any() else finite
    return noised + 2 * noise_of(job, noise, len(move))


def noise_of(job: TrainingJob, noise: Noise, count: int) -> torch.Tensor:
    """Draw noise for a sum to which one example adds a vector of the norm `max_grad_norm` at most: (count,) float32."""
    deviation = (job.noise_multiplier or 0.0) * (job.max_grad_norm or 0.0)
    drawn: torch.Tensor = noise.normal(count) * deviation
    return drawn


def check_private(job: TrainingJob) -> None:
    """Raise JobError if a job with privacy cannot be private, by what is known without its data."""
    if not job.privacy:
        return
    epsilon(job, job.batch_size, 1)
    for name, module in build_model(job).named_modules():
        mixes = isinstance(module, _BatchNorm) and job.privacy == "dp-sgd"
        if mixes or (isinstance(module, _NormBase) and module.track_running_stats):
            what = "mixes the examples of a batch" if mixes else "keeps statistics of the examples"
            raise JobError(
                f"privacy = {job.privacy!r}: the model's {name or 'only module'} is {type(module).__name__}, which "
                f"{what}: use GroupNorm or LayerNorm"
            )


def check_private_training(job: TrainingJob, examples: Examples) -> None:
    """Raise JobError if training a job with privacy on a few examples shows that it cannot be private."""
    if not job.privacy:
        return
    model, functions = build_model(job).to(job.device), Functions(job)
    before = state_of(model)
    inputs, target = examples.batch(slice(None), job.device)
    functions.outputs(model.train(), inputs)
    after = state_of(model)
    if changed := [name for name in before if not torch.equal(before[name], after[name])]:
        raise JobError(
            f"privacy = {job.privacy!r}: training changes the model's buffer {changed[0]} without noise: use a model "
            "that keeps nothing of the examples"
        )
    if job.privacy != "dp-sgd":
        return
    set_state(model, before)
    with torch.inference_mode():
        outputs = partial(functions.outputs, model.eval())
        total, weight = functions.total_loss(outputs(inputs), target, len(examples))
        singles = [
            functions.total_loss(outputs(each.inputs), each.target, 1)
            for number in range(len(examples))
            if (each := examples.batch(slice(number, number + 1), job.device))
        ]
    totals, weights = map(math.fsum, zip(*singles, strict=True))
    if not math.isclose(total * weights, totals * weight, rel_tol=_TOLERANCE, abs_tol=1e-6):
        raise JobError(
            f"privacy = 'dp-sgd': the loss of {len(examples)} examples is not the mean of their losses: use such a "
            "loss, or 'noised-update'"
        )
    trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
    leaves = list(trainable.values())
    try:
        example_gradients(
            functions,
            model.train(),
            leaves,
            lambda tensors: dict(zip(trainable, tensors, strict=True)),
            examples.batch(slice(None), job.device),
        )
    except JobError as error:
        raise JobError(
            f"privacy = 'dp-sgd': this model has no gradients of single examples (torch.func.vmap): {error}; "
            "'noised-update' takes such a model"
        ) from error
