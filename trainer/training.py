"""One task → one update, with the same bits on machines of one numeric class."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import nn

from traincert.trainer.determinism import deterministic, seeded
from traincert.trainer.errors import JobError
from traincert.trainer.examples import Examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.models import build_model
from traincert.trainer.privacy import Noise, drawn_rows, noised_move, set_noised_gradients
from traincert.trainer.segments import Layout, Segment
from traincert.trainer.state import State, set_state, state_of
from traincert.trainer.tasks import Task
from traincert.trainer.updates import Update, change, encode_update
from traincert.trainer.usercode import Functions, blaming, takes

_RESIDUAL = "residual"
_OPTIMIZER = "optimizer."


class Trained(NamedTuple):
    """The result of a task."""

    update: bytes  # as `updates.encode_update` returns it
    memory: State  # the optimizer's state of each tensor; the residual, (all trainable parameters,) float32


def check_device(job: TrainingJob) -> None:
    """Raise JobError if this machine does not have the job's device."""
    if job.device == "cuda" and not torch.cuda.is_available():
        raise JobError("device = 'cuda': PyTorch finds no such device here; must be 'cpu'")


def build_optimizer(job: TrainingJob, trained: Sequence[tuple[str, nn.Parameter]], cycle: int) -> torch.optim.Optimizer:
    """Return the job's optimizer of the parameters `trained` and their names, with the learning rates of `cycle`.

    Cycles are counted from 0. Raises JobError if the optimizer does not take the job's options, or if a parameter is in
    two groups.
    """
    kind = getattr(torch.optim, job.optimizer)
    rate = job.learning_rate_at(cycle)
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained:
        groups.setdefault(_group(job, name), []).append(parameter)
    try:  # with an empty parameter if all others are in groups, because an optimizer must have one
        optimizer: torch.optim.Optimizer = kind(groups.pop("", [nn.Parameter()]), lr=rate, **job.optimizer_options)
    except (TypeError, ValueError) as error:
        raise JobError(f"optimizer_options = {job.optimizer_options}: {error}; it takes {takes(kind)}") from None
    for group, parameters in groups.items():
        options = job.parameter_groups[group]
        if "lr" in options:
            options = options | {"lr": options["lr"] * rate / job.learning_rate}
        optimizer.add_param_group({"params": parameters, **options})
    return optimizer


def check_optimizer(job: TrainingJob, model: nn.Module) -> None:
    """Raise JobError if the optimizer of the job's model cannot be built, or a group has no parameter."""
    trainable = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    known = build_optimizer(replace(job, parameter_groups={}), trainable, 0).defaults
    for pattern, options in job.parameter_groups.items():
        where = f"parameter_groups.{pattern!r}"
        if strange := options.keys() - known.keys():
            raise JobError(f"{where}: {job.optimizer} has no option {min(strange)!r} for it; it has {', '.join(known)}")
        rate = options.get("lr", 0.0)
        if not isinstance(rate, float | int) or not 0 <= rate <= 100:
            raise JobError(f"{where}: lr = {rate!r}: must be a number from 0 to 100")
    with blaming("parameter_groups", str(job.parameter_groups)):
        build_optimizer(job, trainable, 0)
    if unused := job.parameter_groups.keys() - {_group(job, name) for name, _ in trainable}:
        names = ", ".join(name for name, _ in trainable)[:300]
        raise JobError(f"parameter_groups.{min(unused)!r}: no trainable parameter has such a name; there are {names}")


def _group(job: TrainingJob, name: str) -> str:
    """Return the pattern of the group that a parameter is in, or an empty string."""
    matching = [pattern for pattern in job.parameter_groups if fnmatchcase(name, pattern)]
    if len(matching) > 1:
        raise JobError(f"parameter_groups: {matching[0]!r} and {matching[1]!r} both match {name}: must be one of them")
    return matching[0] if matching else ""


@deterministic()
def train_task(
    job: TrainingJob,
    state: State,
    segment: Segment,
    shard: Examples,
    task: Task,
    memory: State,
    on_step: Callable[[], None] = lambda: None,
    secret: bytes = b"",
) -> Trained:
    """Train the task's segment on `shard`, starting from `state`. All other parameters are frozen.

    `memory` is the `Trained.memory` of the miner's last task. It is empty in the first task, and if the job keeps
    neither the optimizer's state nor a residual. `on_step` is called before each step; it may raise to end the task.
    `secret` is what the noise of a job with privacy is made from, 32 bytes.

    Raises JobError if what a task of a job with privacy gives cannot be private.
    """
    noise = Noise(secret) if job.privacy else None
    with seeded(_seed(task), [torch.cuda.current_device()] if job.device == "cuda" else []):  # for dropout and the like
        model = build_model(job)
        layout = Layout(model)
        waiting = _waiting(job, segment, memory)
        # Start from the shared model plus this miner's residual, which it has not sent yet. Started from the shared
        # model alone, the miner would learn the residual again and send it twice.
        begin = layout.add(state, segment, waiting)
        set_state(model, begin)
        model.to(job.device).train()
        trained, cut = _freeze_all_but(model, layout, segment)
        names = [piece.name for piece in layout.pieces(segment)]
        optimizer = build_optimizer(job, list(zip(names, trained, strict=True)), task.cycle)
        begins = accumulate((leaf.numel() for leaf in trained[:-1]), initial=segment.start)
        leaves = dict(zip(begins, trained, strict=True))
        if job.keep_optimizer_state:
            _restore(optimizer, leaves, memory)
        functions = Functions(job)
        by_example = noise if job.privacy == "dp-sgd" else None
        for batch in drawn_rows(job, len(shard), by_example) if by_example else rows(job, len(shard), task):
            on_step()
            optimizer.zero_grad()
            if by_example:
                whole = partial(_whole, model, names, trained, cut)
                set_noised_gradients(job, functions, model, trained, whole, shard, batch, by_example)
            else:
                inputs, target = shard.batch(batch, job.device)
                with _joined(model, cut):
                    # There is nothing to learn if all of the batch is masked, or it uses no parameter of the segment.
                    functions.backward(functions.mean_loss(functions.outputs(model, inputs), target))
            with blaming("optimizer", job.optimizer):
                if job.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trained, job.clip_norm)
                optimizer.step()
        after = dict(state_of(model))
    kept = dict(memory)
    if job.keep_optimizer_state:
        kept |= _saved(optimizer, leaves)
    for piece, leaf in zip(layout.pieces(segment), trained, strict=True):
        if leaf.numel() != after[piece.name].numel():
            after[piece.name].view(-1)[piece.begin : piece.end] = leaf.detach().cpu()
    move = layout.flatten(after, segment) - layout.flatten(begin, segment)
    if noise and not by_example:
        move = noised_move(job, move, noise)
    move = move + waiting
    changes = {name: change(state[name], after[name]) for name in segment.buffers}
    buffers = {name: delta for name, delta in changes.items() if delta.any()}
    if buffers and noise:
        raise JobError(f"privacy = {job.privacy!r}: training changed the model's buffer {min(buffers)} without noise")
    if job.density < 1:
        data, sent = encode_update(Update(move, buffers), job.density)
        residual = memory[_RESIDUAL].clone() if _RESIDUAL in memory else torch.zeros(layout.params)
        residual[segment.start : segment.end] = move - sent
        return Trained(data, kept | {_RESIDUAL: residual})
    return Trained(encode_update(Update(move, buffers), 1)[0], kept)


def _waiting(job: TrainingJob, segment: Segment, memory: State) -> torch.Tensor:
    """Return the segment's residual, which the miner has not sent yet, (params,) float32."""
    if _RESIDUAL not in memory:
        return torch.zeros(segment.params)
    return memory[_RESIDUAL][segment.start : segment.end] * job.residual_decay


def _freeze_all_but(
    model: nn.Module, layout: Layout, segment: Segment
) -> tuple[list[nn.Parameter], dict[str, list[torch.Tensor]]]:
    """Return the leaf tensors to train, one for each of the segment's pieces, and the tensors that are cut.

    Only these leaves require gradients: the backward pass ends at the first of them. A tensor that is cut is given, by
    name, as the flat parts that `_joined` puts together.
    """
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    leaves: list[nn.Parameter] = []
    cut: dict[str, list[torch.Tensor]] = {}
    for name, begin, end in layout.pieces(segment):
        parameter = parameters[name]
        if end - begin == parameter.numel():
            parameter.requires_grad_(True)
            leaves.append(parameter)
        else:  # the piece is a part of the tensor: make it a leaf, between two frozen parts
            flat = parameter.detach().reshape(-1)
            leaf = nn.Parameter(flat[begin:end].clone())
            leaves.append(leaf)
            cut[name] = [flat[:begin], leaf, flat[end:]]
    return leaves, cut


def _to_dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


@contextmanager
def _joined(model: nn.Module, cut: Mapping[str, Sequence[torch.Tensor]]) -> Iterator[None]:
    """Put tensors that are cut together, in place of the model's parameters.

    It has to last for the backward pass, too, because activation checkpointing calls modules there. So this is not
    torch.func.functional_call.
    """
    parameters = dict(model.named_parameters())
    joined: dict[nn.Parameter, torch.Tensor] = {}
    for name, parts in cut.items():
        tensor = torch.cat(list(parts)).view_as(parameters[name])
        tensor.register_hook(_to_dense)  # type: ignore[no-untyped-call]
        joined[parameters[name]] = tensor
    # A tied parameter has several places.
    places = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter in joined
    ]
    try:
        for module, key, parameter in places:
            module._parameters[key] = cast(nn.Parameter, joined[parameter])
        yield
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter


def _whole(
    model: nn.Module,
    names: Sequence[str],
    leaves: Sequence[nn.Parameter],
    cut: Mapping[str, Sequence[torch.Tensor]],
    tensors: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Return the parameters of a segment's pieces by name, with `tensors` in place of the leaves."""
    found = {}
    for name, leaf, tensor in zip(names, leaves, tensors, strict=True):
        parts = [tensor if part is leaf else part for part in cut.get(name, [leaf])]
        found[name] = torch.cat(parts).view_as(model.get_parameter(name)) if name in cut else tensor
    return found


def _restore(optimizer: torch.optim.Optimizer, leaves: Mapping[int, nn.Parameter], memory: State) -> None:
    """Load the leaves' optimizer state from the miner's memory. A leaf that is not in the memory gets no state.

    `leaves` are keyed by where they begin in the flat vector.
    """
    for name, value in memory.items():
        if name.startswith(_OPTIMIZER):
            begin, key = name.removeprefix(_OPTIMIZER).split(".")
            if (leaf := leaves.get(int(begin))) is not None:
                # PyTorch's optimizers expect the step count on the CPU.
                optimizer.state[leaf][key] = value.to("cpu" if key == "step" else leaf.device, copy=True)


def _saved(optimizer: torch.optim.Optimizer, leaves: Mapping[int, nn.Parameter]) -> State:
    """Return the leaves' optimizer state, by name, as `_restore` reads it."""
    return {
        f"{_OPTIMIZER}{begin}.{key}": value.detach().cpu()
        for begin, leaf in leaves.items()
        for key, value in optimizer.state[leaf].items()
    }


def rows(job: TrainingJob, count: int, task: Task) -> Iterator[torch.Tensor]:
    """Draw the task's batches from a shard of `count` examples, as the examples' numbers, all of one size.

    When too few examples are left, the shard is shuffled again.
    """
    generator = torch.Generator().manual_seed(_seed(task))
    size = min(job.batch_size, count)
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(job.local_steps):
        if len(left) < size:
            left = torch.randperm(count, generator=generator)
        batch, left = left[:size], left[size:]
        yield batch


def _seed(task: Task) -> int:
    return int.from_bytes(task.seed[:8], "little", signed=True)
