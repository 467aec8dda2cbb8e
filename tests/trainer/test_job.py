"""Jobs: what is read, and what is refused with which words."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from traincert.trainer import job as job_module
from traincert.trainer.job import JobError, TrainingJob

DIGITS = (Path(job_module.__file__).parent / "jobs" / "digits.toml").read_text(encoding="utf-8")


def test_the_shipped_job_is_read_as_it_is_written() -> None:
    job = TrainingJob.named("digits")
    assert job.dataset == "digits"
    assert job.hidden == (256, 64)
    assert job.target_accuracy == 0.95


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed = 0", "seed = 0\ncolour = 1", "colour = 1: unknown key; the keys are seed, cycles, "),
        ("shards = 4", "", "shards is missing"),
        ("shards = 4", "shards = 0", "shards = 0: must be an integer from 1 to 4096"),
        ("shards = 4", "shards = 4.0", "shards = 4.0: must be an integer from 1 to 4096"),
        ("shards = 4", "shards = true", "shards = True: must be an integer from 1 to 4096"),
        ("seed = 0", "seed = -1", "seed = -1: must be an integer from 0 to 9223372036854775807"),
        ("momentum = 0.9", "momentum = 1.0", "momentum = 1.0: must be a float from 0.0 to 0.999"),
        ("momentum = 0.9", "momentum = nan", "momentum = nan: must be a float from 0.0 to 0.999"),
        ("momentum = 0.9", "momentum = '0.9'", "momentum = '0.9': must be a float from 0.0 to 0.999"),
        ('dataset = "digits"', 'dataset = "cifar"', "dataset = 'cifar': must be one of digits"),
        ('model = "mlp"', "model = 1", "model = 1: must be one of mlp"),
        ("hidden = [256, 64]", "hidden = []", "hidden = (): must be 1 to 16 layer widths"),
        ("hidden = [256, 64]", "hidden = 64", "hidden = 64: must be 1 to 16 layer widths"),
        ("hidden = [256, 64]", "hidden = [256, 0]", "a width must be an integer from 1 to 65536, not 0"),
        ("segments = 2", "segments = 7", "segments = 7: must be at most 6, the model's parameter tensors"),
        ("seed = 0", "seed =", "cannot be read as TOML: Invalid value (at line 3"),
    ],
)
def test_an_error_names_file_key_value_and_what_is_allowed(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in DIGITS
    path = tmp_path / "job.toml"
    path.write_text(DIGITS, encoding="utf-8")
    TrainingJob.load(path)
    path.write_text(DIGITS.replace(old, new), encoding="utf-8")
    with pytest.raises(JobError, match=f"^{re.escape(str(path))}: .*{re.escape(words)}"):
        TrainingJob.load(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"absent\.toml: cannot be read as TOML"):
        TrainingJob.load(tmp_path / "absent.toml")


@pytest.mark.parametrize("name", ["digit", "../jobs/digits", ""])
def test_an_unknown_name_lists_the_jobs_there_are(name: str) -> None:
    with pytest.raises(JobError, match=r"there are: digits$"):
        TrainingJob.named(name)


def test_replacing_a_field_checks_it_too() -> None:
    job = TrainingJob.named("digits")
    assert replace(job, seed=7).seed == 7
    with pytest.raises(JobError, match=r"^learning_rate = inf: "):
        replace(job, learning_rate=math.inf)


def test_reading_a_job_does_not_import_torch() -> None:
    program = (
        "import sys; from traincert.trainer.job import TrainingJob; TrainingJob.named('digits');"
        "sys.exit(bool({'torch', 'sklearn', 'numpy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
