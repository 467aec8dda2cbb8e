"""`TrainingJob`: everything that defines a run, read from TOML and checked.

This module does not import torch: the command line reads jobs, and importing torch takes seconds.
"""

import dataclasses
import difflib
import hashlib
import importlib.util
import json
import math
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from traincert.trainer.errors import JobError

_SHIPPED = Path(__file__).parent / "jobs"


def _is_reference(value: str) -> str:
    module, _, name = value.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError("should be package.module:name")
    return value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Reference = Annotated[str, AfterValidator(_is_reference)]
"""A function as `package.module:name`. `usercode.resolve` imports it."""
Names = Annotated[tuple[str, ...], Field(strict=False)]  # not strict, because TOML gives a list
Count = Annotated[int, Field(ge=1, le=1_000_000)]


@dataclass(
    frozen=True,
    kw_only=True,
    config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True),
)
class TrainingJob:
    """One training run. Equal jobs give equal hashes on machines of one numeric class.

    Every field is a TOML key of the same name. A job does not set the number of miners, because miners come and go. It
    does not set the number of workers either, because they do not change the result.

    The constructor raises pydantic's ValidationError for a wrong value; `load` raises JobError instead.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The seed of the initial model and of the tasks: which miner trains which segment on which shard."""
    cycles: Count
    """How many cycles the run has."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where models are trained and scored. With cuda, start one worker for each GPU."""

    dataset: Reference
    """A function that returns a datasets.RawDataset."""
    dataset_options: dict[str, Any] = Field(default_factory=dict)
    """The keyword arguments of the `dataset` function."""
    inputs: Annotated[Names, Field(min_length=1)] = ("inputs",)
    """Columns that the model takes as its arguments, in this order."""
    target: Annotated[Names, BeforeValidator(_listed), Field(min_length=1)] = ("labels",)
    """The column that the loss and the metrics compare the model's outputs with; or a list of columns, which they get
    as a tuple."""
    drop: Names = ()
    """Columns that are not used. Every column of the dataset must be in `inputs`, in `drop`, or be the target."""
    normalize: dict[str, Literal["all", "each", "center"]] = Field(default_factory=dict)
    """Columns to normalize: subtract the mean, then divide by the standard deviation, both of the training examples.
    all: one mean and one deviation for the column. each: a mean and a deviation for each feature.
    center: a mean for each feature, one deviation for the column."""
    hash: dict[str, Annotated[int, Field(ge=2, lt=2**31)]] = Field(default_factory=dict)
    """Columns whose values are replaced by a bucket's number, and the number of buckets.
    The bucket is the value's HMAC-SHA256 modulo the number of buckets."""
    encode: Names = ()
    """Columns whose values are replaced by a code each: 0, 1, 2, ... in the order of the values, without collisions."""
    missing: dict[str, float | int | str] = Field(default_factory=dict)
    """What replaces missing values (NaN, None) of a column. A column of numbers takes a number, or "mean": the mean of
    the training examples, for each feature. A column of text takes a text.
    Without it a column with missing values is refused."""
    hash_key: str = ""
    """The file with the secret key of `hash`, 32 bytes. Its path is relative to the job's file.
    If there is no such file, it is made, with a random key."""
    shuffle_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of the shuffle that comes before the data is split and cut into shards."""
    validation_examples: Count
    """How many examples are held out from the miners. Updates and models are scored on them."""
    test_examples: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """How many examples are kept for the final test. Neither training nor scoring uses them.
    Must be 0 if the dataset has its own test split."""
    shards: Annotated[int, Field(ge=1, le=4096)]
    """How many shards the training examples are cut into. Shards are random, and have equal size, ± 1 example."""
    shard_by: str = ""
    """A column that decides an example's shard instead, for example the hospital it is from. It may be in `drop`.
    All examples of one value are in one shard, and shards are as equal in size as that allows."""
    shard_alpha: Annotated[float, Field(ge=0.01, le=1e6)] | None = None
    """With `shard_by`: spread the examples of each value over all shards, by shares from a Dirichlet distribution with
    this parameter. 0.1: most of a value is in one or two shards. 100: all shards are nearly alike."""

    model: Reference
    """A function that returns a torch.nn.Module."""
    model_options: dict[str, Any] = Field(default_factory=dict)
    """The keyword arguments of the `model` function."""
    initial_model: str = ""
    """A safetensors file with the initial parameters and buffers, by name, such as a model in a run's store.
    Its path is relative to the job's file. Empty: `seed` decides the initial model."""
    loss: Reference = "traincert.trainer.models:cross_entropy"
    """A function of the model's outputs and the target. It returns the batch's mean loss, in nats; or its sum and its
    weight, for example the number of tokens that are not masked: the loss of many batches is then their exact mean."""
    loss_offset: Annotated[float, Field(ge=0)] = 0.0
    """What is added to the validation loss before it is recorded: no recorded loss can be below 0. For losses that can
    be negative, such as a density's, choose an offset that no model comes near. It changes no score, but `guard`."""
    metric: Reference = "traincert.trainer.models:accuracy"
    """A function of the model's outputs and the target, of all examples at once. Its result is only shown; higher is
    better."""
    more_metrics: Annotated[tuple[Reference, ...], Field(strict=False)] = ()
    """More functions like `metric`. Their results are in the records, in TensorBoard and in the report."""
    target_metric: float | None = None
    """The `metric` that the final model should reach on the test examples.
    If it does not, `traincert job run` fails."""

    segments: Annotated[int, Field(ge=1, le=4096)] = 1
    """How many segments the model's trainable parameters are cut into. 1: each miner trains the whole model."""
    balance: Literal["parameters", "flops"] = "parameters"
    """What is balanced between segments. parameters: their number, ± 1.
    flops: the floating-point operations of a training step, as PyTorch counts them; tensors then stay whole."""
    optimizer: Literal["SGD", "Adam", "AdamW"] = "SGD"
    """The miners' optimizer, a class of torch.optim."""
    keep_optimizer_state: bool = False
    """true: a miner's optimizer continues with the state of its last task, as in DiLoCo. false: each task starts with
    a new optimizer."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """The optimizer's keyword arguments, without lr."""
    learning_rate: Annotated[float, Field(gt=0, le=100)]
    """The optimizer's highest learning rate. `warmup_cycles` and `schedule` lower it."""
    parameter_groups: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Other options of the optimizer for some parameters, by a pattern of their names, such as
    { "*.bias" = { weight_decay = 0.0 }, "head.*" = { lr = 0.01 } }. lr is in place of `learning_rate`.
    In a pattern * stands for any text. Each pattern must match a parameter, and no parameter two patterns."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """The greatest L2 norm of a step's gradient, that of all parameters of the segment.
    A greater gradient is scaled down to it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up. constant: it stays. linear, cosine: it falls to nearly 0."""
    warmup_cycles: Annotated[int, Field(ge=0)] = 0
    """In how many cycles, at the beginning, the learning rate rises linearly."""
    batch_size: Count
    """How many examples one step of the optimizer uses."""
    local_steps: Count
    """How many steps of the optimizer one task has."""

    outer_learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0
    """The learning rate of the outer optimizer, which moves the model by the updates' mean."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The outer optimizer's Nesterov momentum, from cycle to cycle."""
    guard: Annotated[float, Field(gt=0)] = 0.2
    """How far the validation loss, with `loss_offset`, may rise above the lowest so far, as a share. 0.2: 20 %.
    If a cycle would raise it more, the model's move is halved, up to four times; then the model stays as it is."""
    privacy: Literal["", "dp-sgd", "noised-update"] = ""
    """Differential privacy for the shards' examples, see docs/privacy.md. Empty: none.
    dp-sgd: each example's gradient is clipped, and each step has noise. An epsilon is for one example.
    noised-update: the whole update is clipped, and has noise. It takes any loss, and needs much more noise."""
    noise_multiplier: Annotated[float, Field(ge=0.1, le=1000)] | None = None
    """With `privacy`: the standard deviation of the noise, as a multiple of what one example can change."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """With `privacy`: the greatest L2 norm of an example's gradient (dp-sgd) or of an update (noised-update).
    A greater one is scaled down to it."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """With `privacy`: the delta for which each epsilon holds. It should be far below 1 / examples of a shard."""
    density: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of an update's values that a miner sends. 1: all values, as float32.
    Below 1: the values of greatest magnitude, each as its sign; the miner keeps the residual (error feedback)."""
    residual_decay: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The share of its residual, the values not sent, that a miner takes into its next task."""
    max_update_norm: Annotated[float, Field(gt=0)] | None = None
    """The greatest L2 norm of an update's parameters. An update with a greater norm is refused.
    Not set: the square root of the number of the segment's parameters, at least 10."""
    task_seconds: Annotated[float, Field(gt=0)] = 600.0
    """How many seconds a task may take. A slower task is refused as late."""
    late_seconds: Annotated[float, Field(gt=0)] | None = None
    """A task that takes longer than this, but not longer than `task_seconds`, counts at `late_share`."""
    late_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The share of its weight that such a task gets."""
    replicas: Count = 16
    """How many miners may train the same segment on the same shard in a cycle.
    A cycle of a chain has at most `segments` times `shards` times this many tasks."""

    score_examples: Annotated[int, Field(ge=0)] = 0
    """How many validation examples updates are scored on. Each cycle draws others. 0: all validation examples."""
    noise_margin: Annotated[float, Field(ge=0, le=10)] = 0.5
    """How much of the loss that an update takes off does not count on a chain, in standard errors of its measurement.
    An update that takes off no more is refused: chance alone could have done that."""
    copy_cosine: Annotated[float, Field(gt=0, le=1)] = 0.98
    """On a chain an update is refused as a copy if its cosine with another one is at least this."""
    shard_examples: Annotated[int, Field(ge=0)] = 64
    """Of how many examples of its own shard, and of how many of others, it is measured on a chain whether a miner has
    trained on its own. 0: it is not measured."""
    shard_margin: Annotated[float, Field(gt=0)] = 4.0
    """A miner is refused if the evidence that it trains on its own shard is less than half of the miners' median, and
    by so many standard deviations less."""
    spot_checks: Annotated[float, Field(ge=0, le=1)] = 0.02
    """The share of a chain's tasks that are done again and compared, drawn at random. Before that, each new miner's
    work is checked once. 0: no task is."""
    spot_tolerance: Annotated[float, Field(ge=0, le=1)] = 0.05
    """How far an update may be from the one that a spot check finds, as a share of its L2 norm, if the miner's
    machine is of another numeric class. In the same class both must be equal."""
    penalty_cycles: Count = 100
    """For how many cycles a miner is barred whose task a spot check finds not done."""

    aggregation: Literal["mean", "trimmed_mean", "geometric_median"] = "mean"
    """How a segment's updates become one. mean: by weights. trimmed_mean: the same, but of each parameter the
    `trim` greatest and smallest values are left out. geometric_median: the point that has the least distance to all."""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """The share of a segment's updates that `trimmed_mean` leaves out at each end, rounded down."""

    early_stop: Annotated[int, Field(ge=0)] = 0
    """`traincert job run` ends after this many cycles in which the validation loss was never the lowest so far.
    0: it does all cycles."""
    history: Count = 100
    """For how many cycles the store keeps the models and memories that a replay needs."""

    def __post_init__(self) -> None:
        """Raise ValueError if two fields contradict each other; pydantic turns it into a ValidationError."""
        if bool(self.hash) != bool(self.hash_key):
            raise ValueError("hash and hash_key: set both or neither")
        named = self.columns
        for key in ("normalize", "hash", "encode", "missing"):
            if strangers := set(getattr(self, key)) - set(named):
                raise ValueError(f"{key}: {min(strangers)!r} is neither in inputs nor the target")
        if both := set(self.drop) & set(named):
            raise ValueError(f"drop: {min(both)!r} is also in inputs or the target")
        if both := set(self.hash) & set(self.normalize):
            raise ValueError(f"hash: {min(both)!r} is also in normalize")
        if both := set(self.encode) & {*self.hash, *self.normalize}:
            raise ValueError(f"encode: {min(both)!r} is also in hash or normalize")
        for name, value in self.missing.items():
            if isinstance(value, str) and value != "mean" and name not in (*self.hash, *self.encode):
                raise ValueError(f"missing: {name!r} is in neither hash nor encode: should be a number or 'mean'")
        if self.shard_by and self.shard_by not in (*named, *self.drop):
            raise ValueError(f"shard_by: {self.shard_by!r} is neither in inputs, nor the target, nor in drop")
        if self.shard_alpha is not None and not self.shard_by:
            raise ValueError("shard_alpha needs shard_by")
        for key, names in (("target", list(self.target)), ("metric, more_metrics", self.metric_names)):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key}: {twice[0]!r} is there twice")
        if self.late_seconds is not None and self.late_seconds > self.task_seconds:
            raise ValueError(f"late_seconds = {self.late_seconds:g}: should be at most task_seconds")
        if self.privacy and (self.noise_multiplier is None or self.max_grad_norm is None):
            raise ValueError(f"privacy = {self.privacy!r} needs noise_multiplier and max_grad_norm")
        if not self.privacy and (self.noise_multiplier is not None or self.max_grad_norm is not None):
            raise ValueError("noise_multiplier and max_grad_norm need privacy")
        if self.privacy and self.shard_examples:
            raise ValueError(
                f"shard_examples = {self.shard_examples}: should be 0 with privacy; it measures updates on examples of "
                "the shards, and what it finds has no noise"
            )
        if self.privacy == "noised-update" and self.keep_optimizer_state:
            raise ValueError("keep_optimizer_state: should be false with privacy = 'noised-update'; it has no noise")
        if self.warmup_cycles >= self.cycles:
            raise ValueError(f"warmup_cycles = {self.warmup_cycles}: should be less than cycles = {self.cycles}")

    @classmethod
    def load(cls, path: Path) -> "TrainingJob":
        """Read a job from a TOML file.

        The job can name modules that lie beside the file: this puts the file's folder on sys.path.

        Raises JobError. The message names the file, the key, its value and what is allowed.
        """
        try:
            values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise JobError(f"{path}: cannot be read as TOML: {error}") from error
        folder = str(path.parent.absolute())
        for key in ("hash_key", "initial_model"):
            if values.get(key) and isinstance(values[key], str):
                values[key] = str(Path(folder, values[key]))
        try:
            job = cls(**values)
        except ValidationError as error:
            raise JobError(f"{path}: {_explain(error, values)}") from None
        except TypeError as error:
            raise JobError(f"{path}: {error}") from None
        if folder != str(_SHIPPED) and folder not in sys.path:
            sys.path.append(folder)  # last: a file beside the job must not hide an installed module
        return job

    @classmethod
    def located(cls, name: str) -> str:
        """Return a job's name that `named` takes in any folder: that of a job of the trainer's, or an absolute path."""
        return name if (_SHIPPED / f"{name}.toml").is_file() else str(Path(name).absolute())

    @classmethod
    def named(cls, name: str) -> "TrainingJob":
        """Read a job that comes with the trainer, such as `digits`, or the TOML file with this path.

        Raises JobError if neither exists. The message lists the trainer's own jobs.
        """
        shipped = sorted(path.stem for path in _SHIPPED.glob("*.toml"))
        if name in shipped:
            return cls.load(_SHIPPED / f"{name}.toml")
        if not Path(name).is_file():
            raise JobError(f"no job {name!r}: it is neither a file, nor one of {', '.join(shipped)}")
        return cls.load(Path(name))

    @property
    def columns(self) -> list[str]:
        """The columns of `inputs` and `target`, each once."""
        return list(dict.fromkeys([*self.inputs, *self.target]))

    @property
    def most_tasks(self) -> int:
        """The most tasks that a cycle of a chain can have."""
        return self.segments * self.shards * self.replicas

    @property
    def metric_names(self) -> list[str]:
        """The names of the functions `metric` and `more_metrics`."""
        return [reference.partition(":")[2] for reference in (self.metric, *self.more_metrics)]

    def learning_rate_at(self, cycle: int) -> float:
        """Return the learning rate of a cycle, counted from 0. After the last cycle it stays the same."""
        place = min(cycle, self.cycles - 1)
        if place < self.warmup_cycles:
            return self.learning_rate * (place + 1) / (self.warmup_cycles + 1)
        done = (place - self.warmup_cycles) / (self.cycles - self.warmup_cycles)
        if self.schedule == "linear":
            return self.learning_rate * (1 - done)
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate

    def to_toml(self) -> str:
        """Return this job as TOML, all keys with their descriptions. A key that is not set is a comment."""
        document = tomlkit.document()
        properties = TypeAdapter(TrainingJob).json_schema()["properties"]
        for field in dataclasses.fields(self):
            for line in properties[field.name]["description"].splitlines():
                document.add(tomlkit.comment(line.strip()))
            value = getattr(self, field.name)
            if value is None:
                document.add(tomlkit.comment(f"{field.name} is not set"))
            else:
                item = tomlkit.item(value)
                if isinstance(item, tomlkit.items.Table):
                    table = tomlkit.inline_table()
                    table.update(value)
                    item = table
                document.add(field.name, item)
            document.add(tomlkit.nl())
        return tomlkit.dumps(document).rstrip("\n") + "\n"

    def identity(self) -> dict[str, str]:
        """Return what decides a run's results, as text by name: all fields, and SHA-256 of the files that they name.

        These are the sources of users' modules, and `initial_model`. Where files lie does not matter: a run can move.
        """
        fields = {
            key: json.dumps(value, sort_keys=True, default=str) for key, value in dataclasses.asdict(self).items()
        }
        fields["hash_key"] = json.dumps(bool(self.hash_key))  # its hash is in the data's manifest
        fields["initial_model"] = _file_hash(Path(self.initial_model)) if self.initial_model else ""
        sources = {f"module {name}": _file_hash(path) for name, (path, _) in self.modules().items()}
        return fields | sources

    def shared_identity(self) -> dict[str, str]:
        """Return `identity` without what only the run's owner has: the initial model, and whether there is a hash_key.

        A network's certificates name the initial model and the data that the key prepared.
        """
        return {key: text for key, text in self.identity().items() if key not in ("initial_model", "hash_key")}

    def digest(self) -> bytes:
        """Return the SHA-256 of `shared_identity`, 32 bytes."""
        return hashlib.sha256(json.dumps(self.shared_identity(), sort_keys=True).encode()).digest()

    def modules(self) -> dict[str, tuple[Path, Path]]:
        """Return the users' modules that the job names: their files, and the folders in which Python finds them.

        A module that does not exist is left out, and so are those of traincert and PyTorch.
        """
        found: dict[str, tuple[Path, Path]] = {}
        for reference in (self.dataset, self.model, self.loss, self.metric, *self.more_metrics):
            name = reference.partition(":")[0]
            if name.partition(".")[0] in ("traincert", "torch"):
                continue
            try:
                spec = importlib.util.find_spec(name)
            except ImportError:
                continue
            if spec and spec.origin and Path(spec.origin).is_file():
                path = Path(spec.origin)
                depth = name.count(".") + bool(spec.submodule_search_locations)
                found[name] = path, path.parents[depth]
        return found


def differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Return in what a job's identity differs from another's, as text."""
    return [
        f"{key} has changed" if key.startswith("module ") or key == "initial_model" else f"{key} was {old}, is {new}"
        for key in sorted({*ours, *theirs})
        if (old := theirs.get(key)) != (new := ours.get(key))
    ]


def _file_hash(path: Path) -> str:
    """Return a file's SHA-256 in hex, or an empty string if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _explain(error: ValidationError, values: dict[str, Any]) -> str:
    """Return the first mistake as one line: the key, its value and what is allowed."""
    first, *more = error.errors()
    others = f" (and {len(more)} more)" if more else ""
    key = ".".join(str(part) for part in first["loc"] if part != "function-after")
    message = str(first["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    names = [field.name for field in dataclasses.fields(TrainingJob)]
    match first["type"]:
        case "missing":
            return f"{key} is missing{others}"
        case "unexpected_keyword_argument" | "unexpected_property":
            hint = did_you_mean(key, names) or f"; the keys are {', '.join(names)}"
            return f"{key} = {values.get(key)!r}: unknown key{hint}{others}"
    if not key:
        return f"{message}{others}"
    return f"{key} = {first['input']!r}: {message}{others}"


def did_you_mean(name: str, known: list[str]) -> str:
    """Return a hint at the known name that is most like a wrong one, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
