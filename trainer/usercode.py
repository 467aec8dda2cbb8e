"""Users' code: import the functions that a job names, call them, and say in one line what went wrong in them."""

import importlib
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from traincert.trainer.errors import JobError, TrainerError
from traincert.trainer.job import TrainingJob, did_you_mean

_LONGEST = 300  # characters of an exception's text that a message has
_OTHERS = tuple(
    f"{folder}/"
    for folder in (Path(__file__).parents[1], *(Path(package.__file__ or "").parent for package in (torch, np)))
)
_STANDARD, _INSTALLED = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")


def resolve(reference: str, key: str) -> Callable[..., Any]:
    """Import the function `reference` (`package.module:name`), the value of a job's `key`.

    Raises JobError if the module or the function does not exist, or if importing the module raises an exception.
    """
    module_name, _, name = reference.partition(":")
    try:
        with blaming(key, reference):
            module = importlib.import_module(module_name)
    except JobError as error:
        missing = error.__cause__
        if not isinstance(missing, ModuleNotFoundError) or not missing.name:
            raise
        if not f"{module_name}.".startswith(f"{missing.name}."):
            raise  # the module imports another, which does not exist
        raise JobError(
            f"{key} = {reference!r}: no module {missing.name!r}; install it, or put it beside the job's file"
        ) from None
    found = getattr(module, name, None)
    if not callable(found):
        functions = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        like = did_you_mean(name, functions)
        raise JobError(f"{key} = {reference!r}: the module {module.__file__} has no function {name!r}{like}")
    return found  # type: ignore[no-any-return]


def call(reference: str, options: dict[str, Any], key: str) -> Any:
    """Import the function `reference`, the value of a job's `key`, and call it with `options`.

    Raises JobError if the function does not take these options, or raises an exception.
    """
    function = resolve(reference, key)
    with blaming(key, reference):
        try:
            return function(**options)
        except TypeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                raise  # the mistake is inside the function, not in its options
            raise JobError(f"{key}_options = {options}: {error}; it takes {takes(function)}") from None


def takes(function: Callable[..., Any]) -> str:
    """Return a function's parameters as text, for an error message."""
    return ", ".join(str(parameter) for parameter in inspect.signature(function).parameters.values()) or "none"


@contextmanager
def blaming(key: str, reference: str, context: Callable[[], str] = str) -> Iterator[None]:
    """Turn an exception of the code inside into a JobError that names the job's `key` and its value `reference`.

    The message has the exception, and where the users' own code raised it; `context` is called for more. Our own errors
    pass through.
    """
    try:
        yield
    except (MemoryError, TrainerError):
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        told = [f"{type(error).__name__}: {text}" if text else type(error).__name__, _place(error), context()]
        raise JobError(f"{key} = {reference!r}: {'; '.join(part for part in told if part)}") from error


def _place(error: BaseException) -> str:
    """Return where the users' code raised an exception; an empty string if no frame is theirs."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        standard = frame.filename.startswith(_STANDARD) and not frame.filename.startswith(_INSTALLED)
        if not standard and not frame.filename.startswith((*_OTHERS, "<")):
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return ""


def shown(value: Any) -> str:
    """Return a value, a tensor or a structure of tensors, as text: dtypes and shapes."""

    class Shown(NamedTuple):
        text: str

        def __repr__(self) -> str:
            return self.text

    def show(leaf: Any) -> Shown:
        if isinstance(leaf, torch.Tensor):
            return Shown(f"{str(leaf.dtype)[6:]} {tuple(leaf.shape)}")
        return Shown(repr(leaf) if isinstance(leaf, float | int | str | None) else type(leaf).__name__)

    return str(tree_map(show, value))[:_LONGEST]


class Functions:
    """Calls a job's model, loss and metrics. What goes wrong in them is a JobError."""

    def __init__(self, job: TrainingJob) -> None:
        """Import the functions. Raises JobError if one does not exist."""
        self._job = job
        self._loss = resolve(job.loss, "loss")
        if isinstance(self._loss, type):
            raise JobError(
                f"loss = {job.loss!r}: is a class; must be a function of the model's outputs and the target, such as "
                "'torch.nn.functional:cross_entropy'"
            )
        self._metrics = [("metric", job.metric, resolve(job.metric, "metric"))]
        self._metrics += [("more_metrics", each, resolve(each, "more_metrics")) for each in job.more_metrics]

    def outputs(self, model: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Any:
        """Return the model's outputs."""
        with blaming("model", self._job.model, lambda: f"its inputs were {shown(tuple(inputs))}"):
            outputs = model(*inputs)
        if outputs is None:
            raise JobError(f"model = {self._job.model!r}: returned None")
        return outputs

    def mean_loss(self, outputs: Any, target: Any) -> torch.Tensor:
        """Return the mean loss of a batch, a scalar. It is 0 if all of the batch has no weight."""
        found = self._found(outputs, target)
        if not isinstance(found, tuple):
            return found
        total, weight = found
        return total / weight if weight else torch.zeros(())

    def example_loss(self, outputs: Any, target: Any) -> torch.Tensor:
        """Return what `mean_loss` does, without looking at the values: torch.func.vmap can call it."""
        found = self._found(outputs, target)
        if not isinstance(found, tuple):
            return found
        total, weight = found[0], torch.as_tensor(found[1])
        return torch.where(weight != 0, total / torch.where(weight != 0, weight, 1), 0.0)

    def total_loss(self, outputs: Any, target: Any, count: int) -> tuple[float, float]:
        """Return the sum of a batch's losses, and its weight. A mean has the weight of the batch's `count` examples."""
        found = self._found(outputs, target)
        total, weight = found if isinstance(found, tuple) else (float(found) * count, count)
        if weight < 0:
            raise JobError(f"loss = {self._job.loss!r}: returned the weight {float(weight):g}; must not be below 0")
        return float(total), float(weight)

    def check_gradient(self, model: nn.Module, batch: Sequence[torch.Tensor], target: Any) -> None:
        """Raise JobError if the loss of a batch depends on no parameter, so that nothing could be trained."""
        found = self._found(self.outputs(model, batch), target)
        mean, weight = found if isinstance(found, tuple) else (found, 1)
        if weight and not mean.requires_grad:
            raise JobError(f"loss = {self._job.loss!r}: has no gradient: it does not depend on the model's parameters")

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of a loss, if it depends on any parameter."""
        if loss.requires_grad:
            with blaming("model", self._job.model, lambda: "in the backward pass"):
                loss.backward()  # type: ignore[no-untyped-call]

    def metrics(self, outputs: Any, target: Any) -> list[float]:
        """Return the job's metric and its more_metrics, of all examples' outputs and targets."""
        found = []
        for key, reference, function in self._metrics:
            with blaming(key, reference, partial(_got, outputs, target)):
                value = function(outputs, target)
            try:
                found.append(float(value))
            except (TypeError, ValueError, RuntimeError):
                raise JobError(f"{key} = {reference!r}: returned {shown(value)}; must return one number") from None
        return found

    def _found(self, outputs: Any, target: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | float]:
        """Return what the loss function returns: a mean, or a sum and its weight."""
        with blaming("loss", self._job.loss, partial(_got, outputs, target)):
            found: torch.Tensor | tuple[torch.Tensor, torch.Tensor | float] = self._loss(outputs, target)
        mean = found[0] if isinstance(found, tuple) and len(found) == 2 else found
        if not isinstance(mean, torch.Tensor) or mean.numel() != 1:
            raise JobError(
                f"loss = {self._job.loss!r}: returned {shown(found)}; must return the batch's mean loss, a scalar "
                "tensor, or its sum and its weight"
            )
        return found


def _got(outputs: Any, target: Any) -> str:
    return f"it got the outputs {shown(outputs)} and the target {shown(target)}"
