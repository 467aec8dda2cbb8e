"""Jobs: what is read, and what is refused with which words."""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from traincert.trainer.errors import JobError
from traincert.trainer.job import TrainingJob
from traincert.trainer.usercode import call, resolve

TRAINCERT = str(Path(sys.executable).parent / "traincert")

WriteJob = Callable[..., Path]

MISTAKES: list[tuple[dict[str, str | None], str]] = [
    ({"colour": "1"}, "colour = 1: unknown key; the keys are seed, cycles, "),
    ({"shard": "1"}, "shard = 1: unknown key; did you mean 'shards'?"),
    ({"learning_rte": "1"}, "learning_rte = 1: unknown key; did you mean 'learning_rate'?"),
    ({"shards": None}, "shards is missing"),
    ({"cycles": None}, "cycles is missing"),
    ({"model": None}, "model is missing"),
    ({"shards": "0"}, "shards = 0: must be greater than or equal to 1"),
    ({"shards": "4097"}, "shards = 4097: must be less than or equal to 4096"),
    ({"shards": "4.0"}, "shards = 4.0: must be a valid integer"),
    ({"shards": "true"}, "shards = True: must be a valid integer"),
    ({"shards": "'4'"}, "shards = '4': must be a valid integer"),
    ({"shards": "[4]"}, "shards = [4]: must be a valid integer"),
    ({"seed": "-1"}, "seed = -1: must be greater than or equal to 0"),
    ({"learning_rate": "0.0"}, "learning_rate = 0.0: must be greater than 0"),
    ({"learning_rate": "nan"}, "learning_rate = nan: must be "),
    ({"learning_rate": "inf"}, "learning_rate = inf: must be "),
    ({"learning_rate": "'0.1'"}, "learning_rate = '0.1': must be a valid number"),
    ({"outer_momentum": "1.0"}, "outer_momentum = 1.0: must be less than 1"),
    ({"density": "0.0"}, "density = 0.0: must be greater than 0"),
    ({"density": "1.5"}, "density = 1.5: must be less than or equal to 1"),
    ({"max_update_norm": "0"}, "max_update_norm = 0: must be greater than 0"),
    ({"task_seconds": "-1.0"}, "task_seconds = -1.0: must be greater than 0"),
    ({"device": "'gpu'"}, "device = 'gpu': must be 'cpu' or 'cuda'"),
    ({"optimizer": "'sgd'"}, "optimizer = 'sgd': must be 'SGD', 'Adam' or 'AdamW'"),
    ({"schedule": "'step'"}, "schedule = 'step': must be 'constant', 'linear' or 'cosine'"),
    ({"balance": "'time'"}, "balance = 'time': must be 'parameters' or 'flops'"),
    ({"normalize": "{ inputs = 'none' }"}, "normalize.inputs = 'none': must be 'all', 'each' or 'center'"),
    ({"normalize": "['inputs']"}, "normalize = ['inputs']: must be a valid dictionary"),
    ({"model_options": "3"}, "model_options = 3: must be a valid dictionary"),
    ({"inputs": "[]"}, "inputs = []: "),
    ({"inputs": "'inputs'"}, "inputs = 'inputs': must be a valid tuple"),
    ({"inputs": "[1]"}, "inputs.0 = 1: must be a valid string"),
    ({"target": "1"}, "target = 1: must be a valid tuple"),
    ({"model": "'mlp'"}, "model = 'mlp': should be package.module:name"),
    ({"model": "'a b:mlp'"}, "model = 'a b:mlp': should be package.module:name"),
    ({"dataset": "'datasets:'"}, "dataset = 'datasets:': should be package.module:name"),
    ({"loss": "1"}, "loss = 1: must be a valid string"),
    ({"hash": "{ inputs = 1 }", "hash_key": "'key'"}, "hash.inputs = 1: must be greater than or equal to 2"),
    ({"hash": "{ inputs = 9 }", "normalize": None}, "hash and hash_key: set both or neither"),
    ({"hash_key": "'key'"}, "hash and hash_key: set both or neither"),
    ({"hash": "{ inputs = 9 }", "hash_key": "'key'"}, "hash: 'inputs' is also in normalize"),
    ({"hash": "{ name = 9 }", "hash_key": "'key'"}, "hash: 'name' is neither in inputs nor the target"),
    ({"normalize": "{ pixels = 'all' }"}, "normalize: 'pixels' is neither in inputs nor the target"),
    ({"drop": "['labels']"}, "drop: 'labels' is also in inputs or the target"),
    ({"warmup_cycles": "2"}, "warmup_cycles = 2: should be less than cycles = 2"),
    ({"seed": " "}, "cannot be read as TOML: Invalid value (at line "),
]


@pytest.mark.parametrize(("changed", "words"), MISTAKES, ids=[words.split(":")[0] for _, words in MISTAKES])
def test_an_error_names_file_key_value_and_what_is_allowed(
    write_job: WriteJob, changed: dict[str, str | None], words: str
) -> None:
    TrainingJob.load(write_job())
    path = write_job(**changed)
    with pytest.raises(JobError, match=f"^{re.escape(str(path))}: {re.escape(words)}") as caught:
        TrainingJob.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_an_error_says_how_many_more_there_are(write_job: WriteJob) -> None:
    with pytest.raises(JobError, match=r"shards = 0: .*\(and 1 more\)$"):
        TrainingJob.load(write_job(shards="0", batch_size="0"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": "1\nseed = 2"}, "cannot be read as TOML"),
        ({"seed": '"\\q"'}, "cannot be read as TOML"),
    ],
)
def test_what_is_no_toml_is_an_error_that_names_the_file(
    write_job: WriteJob, changed: dict[str, str | None], words: str
) -> None:
    path = write_job(**changed)
    with pytest.raises(JobError, match=f"^{re.escape(str(path))}: {words}"):
        TrainingJob.load(path)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"\0"])
def test_a_file_of_other_bytes_is_an_error_that_names_it(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(data)
    with pytest.raises(JobError, match=f"^{re.escape(str(path))}: cannot be read as TOML"):
        TrainingJob.load(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"absent\.toml: cannot be read as TOML: .*No such file"):
        TrainingJob.load(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", ["digit", "../jobs/digits", ""])
def test_an_unknown_name_lists_the_jobs_there_are(name: str) -> None:
    with pytest.raises(JobError, match=f"no job {name!r}: it is neither a file, nor one of .*digits"):
        TrainingJob.named(name)


SHIPPED = ["digits", "fashion", "text"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_jobs_can_be_read(name: str) -> None:
    assert TrainingJob.named(name).cycles > 1


@pytest.mark.parametrize("name", SHIPPED)
def test_a_jobs_toml_has_all_keys_and_loads_to_an_equal_job(name: str, tmp_path: Path) -> None:
    job = TrainingJob.named(name)
    path = tmp_path / "shown.toml"
    shown = job.to_toml()
    path.write_text(shown, encoding="utf-8")
    for field in dataclasses.fields(job):
        assert re.search(rf"^(# )?{field.name} (=|is not set)", shown, re.MULTILINE)
    loaded = TrainingJob.load(path)
    assert loaded == job
    assert loaded.digest() == job.digest()
    assert loaded.to_toml() == shown


@settings(max_examples=25)
@given(
    options=st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8)
        | st.booleans()
        | st.lists(st.integers(0, 9), max_size=3)
        | st.dictionaries(st.text("abc ", min_size=1, max_size=3), st.integers(0, 9), max_size=2),
        max_size=4,
    ),
    rate=st.floats(1e-300, 100),
)
def test_whatever_options_a_job_has_its_toml_loads_to_an_equal_job(
    tmp_path_factory: pytest.TempPathFactory, job: TrainingJob, options: dict[str, object], rate: float
) -> None:
    wanted = replace(job, model_options=options, learning_rate=rate)
    path = tmp_path_factory.getbasetemp() / "shown.toml"
    path.write_text(wanted.to_toml(), encoding="utf-8")
    assert TrainingJob.load(path) == wanted


def test_job_show_prints_all_keys_and_loads_to_an_equal_job(write_job: WriteJob, tmp_path: Path) -> None:
    path = write_job(hash="{ labels = 7 }", hash_key="'secret'", schedule="'cosine'", target_metric="0.5")
    shown = subprocess.run([TRAINCERT, "job", "show", path], check=True, capture_output=True, text=True).stdout
    (tmp_path / "elsewhere").mkdir()
    again = tmp_path / "elsewhere" / "shown.toml"
    again.write_text(shown, encoding="utf-8")
    assert TrainingJob.load(again) == TrainingJob.load(path)
    assert "\nhistory = " in shown


def test_a_wrong_job_is_one_line_and_exit_code_1(write_job: WriteJob) -> None:
    path = write_job(shards="0")
    for command in ("show", "run"):
        answer = subprocess.run(
            [TRAINCERT, "job", command, path], check=False, capture_output=True, text=True, cwd=path.parent
        )
        assert (answer.returncode, answer.stdout) == (1, "")
        assert answer.stderr == f"traincert: {path}: shards = 0: must be greater than or equal to 1\n"


def test_a_hash_key_is_beside_the_jobs_file(write_job: WriteJob) -> None:
    path = write_job(hash="{ labels = 7 }", hash_key="'secret'")
    assert TrainingJob.load(path).hash_key == str(path.parent / "secret")
    assert TrainingJob.load(write_job(hash="{ labels = 7 }", hash_key="'/run/secret'")).hash_key == "/run/secret"


def test_replacing_a_field_checks_it_too(job: TrainingJob) -> None:
    assert replace(job, seed=7).seed == 7
    with pytest.raises(ValidationError, match="learning_rate"):
        replace(job, learning_rate=-1)


def test_every_fields_change_changes_the_digest(job: TrainingJob) -> None:
    digests = {job.digest(), replace(job, seed=7).digest(), replace(job, cycles=7).digest()}
    digests |= {replace(job, shards=7).digest(), replace(job, history=7).digest()}
    digests |= {replace(job, model_options={}).digest(), replace(job, schedule="linear").digest()}
    assert len(digests) == 7
    assert replace(job).digest() == job.digest()


USERS_MODULE = """
    import torch

    NUMBER = 5

    def model(width):
        return torch.nn.Linear(64, width)

    def broken(width):
        return len(width)
"""


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("absent_module:model", "model = 'absent_module:model': no module 'absent_module'; install it, or "),
        ("{module}.inner:model", "no module '{module}.inner'"),
        ("{module}:modle", "has no function 'modle'; did you mean 'model'?"),
        ("{module}:NUMBER", "has no function 'NUMBER'"),
    ],
)
def test_what_cannot_be_imported_is_named(write_job: WriteJob, reference: str, words: str) -> None:
    job = TrainingJob.load(write_job(USERS_MODULE, model=f'"{reference}"'))
    module = job.model.partition(":")[0].partition(".")[0]
    with pytest.raises(JobError, match=re.escape(words.replace("{module}", module))):
        resolve(job.model, "model")


def test_a_module_that_needs_another_that_is_missing_is_told_apart(write_job: WriteJob) -> None:
    job = TrainingJob.load(write_job("import absent_module", model='"{module}:model"'))
    with pytest.raises(JobError, match=r"ModuleNotFoundError: No module named 'absent_module'; /.*\.py, line 1, in"):
        resolve(job.model, "model")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero; {path}, line 1, in <module>"),
        ("def f(:", "SyntaxError: .*; {path}, line 1"),
    ],
)
def test_a_mistake_in_the_users_module_is_one_line_with_its_place(
    write_job: WriteJob, module: str, message: str
) -> None:
    path = write_job(module, model='"{module}:model"')
    job = TrainingJob.load(path)
    file = str(path.parent / job.model.partition(":")[0]) + ".py"
    with pytest.raises(JobError, match=f"^model = {job.model!r}: {message.format(path=file)}$"):
        resolve(job.model, "model")


def test_a_mistake_in_the_users_function_is_told_from_wrong_options(write_job: WriteJob) -> None:
    job = TrainingJob.load(write_job(USERS_MODULE, model='"{module}:broken"'))
    with pytest.raises(JobError, match=r": TypeError: object of type 'int' has no len\(\); .*, line \d+, in broken$"):
        call(job.model, {"width": 1}, "model")


@pytest.mark.parametrize("options", [{"depth": 1}, {}, {"width": 1, "depth": 2}])
def test_options_that_the_function_does_not_take_are_named(write_job: WriteJob, options: dict[str, object]) -> None:
    job = TrainingJob.load(write_job(USERS_MODULE, model='"{module}:model"'))
    with pytest.raises(JobError, match=re.escape(f"model_options = {options}: model() ")):
        call(job.model, options, "model")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_learning_rate_falls_from_its_full_value_to_nearly_0(job: TrainingJob, count: int) -> None:
    for falling in (replace(job, cycles=count, schedule="linear"), replace(job, cycles=count, schedule="cosine")):
        rates = [falling.learning_rate_at(cycle) for cycle in range(count)]
        assert rates[0] == job.learning_rate
        assert sorted(set(rates), reverse=True) == rates
        assert 0 < rates[-1] <= 2 * job.learning_rate / count


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant", 3, [1 / 4, 2 / 4, 3 / 4, 1]),
        ("linear", 0, [1, 3 / 4, 2 / 4, 1 / 4]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 1 / 2]),
        ("cosine", 0, [1, (1 + 0.5**0.5) / 2, 1 / 2, (1 - 0.5**0.5) / 2]),
        ("cosine", 2, [1 / 3, 2 / 3, 1, 1 / 2]),
    ],
)
def test_the_learning_rate_follows_the_schedule(
    job: TrainingJob, schedule: Literal["constant", "linear", "cosine"], warmup: int, expected: list[float]
) -> None:
    scheduled = replace(job, cycles=4, schedule=schedule, warmup_cycles=warmup, learning_rate=2.0)
    found = [scheduled.learning_rate_at(cycle) / 2.0 for cycle in range(6)]
    assert found == pytest.approx([*expected, expected[-1], expected[-1]])


def test_reading_a_job_does_not_import_torch() -> None:
    program = (
        "import sys; from traincert.trainer.job import TrainingJob; TrainingJob.named('digits').to_toml();"
        "sys.exit(bool({'torch', 'sklearn', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
