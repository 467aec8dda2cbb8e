"""Preprocessing: how data is split, scaled, hashed, stored, verified and repaired."""

import hashlib
import hmac
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from traincert.trainer.errors import IntegrityError, JobError
from traincert.trainer.examples import Dataset, Examples, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.store import read_blob

WriteJob = Callable[..., Path]

# Eight columns of every kind. {POISON} changes the rows that are held out, of which {HELD_OUT} has the numbers.
TABLE = """
    import numpy as np
    from traincert.trainer.datasets import RawDataset

    COUNT = 200

    def rows(poison):
        generator = np.random.RandomState(1)
        numbers = generator.normal(3, 5, (COUNT, 4)) * [1, 10, 100, 0] + [0, 0, 0, 7]
        order = np.random.RandomState(0).permutation(COUNT)
        numbers[order[:50]] += poison
        return {
            "numbers": numbers.astype(np.float32),
            "place": np.arange(COUNT),
            "person": np.array([f"person-{number % 40:09}" for number in range(COUNT)]),
            "email": np.array([f"person{number}@example.org" for number in range(COUNT)]),
            "label": np.arange(COUNT) % 3,
        }

    def table(chunk=COUNT, poison=0.0, test=False):
        def train():
            whole = rows(poison)
            for start in range(0, COUNT, chunk):
                yield {name: column[start : start + chunk] for name, column in whole.items()}
        return RawDataset(train, train if test else None)

    def model():
        raise AssertionError
"""

TABLE_JOB: dict[str, str | None] = {
    "dataset": '"{module}:table"',
    "dataset_options": "{}",
    "inputs": '["numbers", "person", "place"]',
    "target": '"label"',
    "drop": '["email"]',
    "normalize": '{ numbers = "each" }',
    "hash": "{ person = 64 }",
    "hash_key": '"secret.key"',
    "validation_examples": "30",
    "test_examples": "20",
    "shards": "4",
}


def table_job(write_job: WriteJob, **changed: str | None) -> TrainingJob:
    return TrainingJob.load(write_job(TABLE, **(TABLE_JOB | changed)))


def everything(dataset: Dataset) -> list[Examples]:
    """The shards, the validation split and the test split."""
    return [
        *(read_examples(dataset.job, dataset.shard_folder, digest) for digest in dataset.shards),
        read_examples(dataset.job, dataset.held_out_folder, dataset.validation),
        read_examples(dataset.job, dataset.held_out_folder, dataset.test),
    ]


def trained(dataset: Dataset, column: int = 0) -> torch.Tensor:
    return torch.cat([part.inputs[column] for part in everything(dataset)[:-2]])


def test_every_example_is_in_exactly_one_split_or_shard(dataset: Dataset) -> None:
    parts = everything(dataset)
    assert [len(part) for part in parts] == [285, 284, 284, 284, 300, 360]
    pooled = torch.cat([part.inputs[0] for part in parts])
    assert pooled.shape == (1797, 64)
    assert len(torch.unique(pooled, dim=0)) == 1797  # no image is there twice in the original either


def test_the_columns_of_an_example_stay_together(write_job: WriteJob, tmp_path: Path) -> None:
    parts = everything(prepare_dataset(table_job(write_job), tmp_path / "data"))
    places = torch.cat([part.inputs[2] for part in parts])
    assert sorted(places.tolist()) == list(range(200))
    assert torch.equal(torch.cat([part.target for part in parts]), places % 3)
    hashes = torch.cat([part.inputs[1] for part in parts])
    assert all(len(set(hashes[places % 40 == person].tolist())) == 1 for person in range(40))


def by_shard(dataset: Dataset) -> list[list[int]]:
    """The numbers of the examples in each shard, which are also in the column `place`."""
    return [part.inputs[2].tolist() for part in everything(dataset)[:-2]]


@pytest.mark.parametrize(("column", "value_of"), [("person", lambda place: place % 40), ("email", lambda place: place)])
def test_shards_by_a_column_have_its_values_whole(
    write_job: WriteJob, tmp_path: Path, column: str, value_of: Callable[[int], int]
) -> None:
    random = prepare_dataset(table_job(write_job), tmp_path / "random")
    ours = prepare_dataset(table_job(write_job, shard_by=f'"{column}"'), tmp_path / "ours")
    assert (ours.validation, ours.test) == (random.validation, random.test)
    values = [{value_of(place) for place in shard} for shard in by_shard(ours)]
    assert sum(map(len, values)) == len(set.union(*values))
    assert sorted(chain.from_iterable(by_shard(ours))) == sorted(chain.from_iterable(by_shard(random)))
    sizes = [len(shard) for shard in by_shard(ours)]
    assert max(sizes) - min(sizes) <= (1 if column == "email" else 5)


def test_shards_by_shares_are_less_alike_the_smaller_alpha_is(write_job: WriteJob, tmp_path: Path) -> None:
    most = []
    for alpha in (0.1, 1.0, 1000.0):
        job = table_job(write_job, shard_by='"label"', shard_alpha=str(alpha))
        shards = by_shard(prepare_dataset(job, tmp_path / str(alpha)))
        again = by_shard(prepare_dataset(job, tmp_path / f"{alpha} again"))
        assert shards == again
        assert sum(map(len, shards)) == 150
        assert all(shards)
        labels = [[place % 3 for place in shard] for shard in shards]
        most.append(sum(max(Counter(shard).values()) for shard in labels) / 150)  # 1: each shard has one label
    assert most[0] > most[1] > most[2]
    assert most[0] > 0.75
    assert most[2] < 0.4


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"shard_by": '"label"'}, "shard_by = 'label': the column has 3 values; must have at least one for each of 4"),
        ({"shard_by": '"hospital"'}, "shard_by: 'hospital' is neither in inputs, nor the target, nor in drop"),
        ({"shard_alpha": "1.0"}, "shard_alpha needs shard_by"),
        ({"shard_by": '"numbers"'}, "shard_by = 'numbers': the column is of (4,); must be one value an example"),
        (
            {"shard_by": '"label"', "shard_alpha": "0.01", "shards": "20"},
            "shard_alpha = 0.01: in 100 draws a shard stayed empty; must be greater, or shards less",
        ),
    ],
)
def test_shards_that_cannot_be_cut_are_named(
    write_job: WriteJob, tmp_path: Path, changed: dict[str, str | None], words: str
) -> None:
    with pytest.raises(JobError, match=re.escape(words)):
        prepare_dataset(table_job(write_job, **changed), tmp_path / "data")


def test_statistics_are_those_of_the_training_split_alone(write_job: WriteJob, tmp_path: Path) -> None:
    """What is held out is shifted by a million: the shards stay the same, byte for byte."""
    clean = prepare_dataset(table_job(write_job), tmp_path / "clean")
    poisoned = prepare_dataset(table_job(write_job, dataset_options="{ poison = 1e6 }"), tmp_path / "poisoned")
    assert clean.shards == poisoned.shards
    assert clean.validation != poisoned.validation
    for each in (clean, poisoned):
        manifest = json.loads(read_blob(each.directory, each.root))
        assert manifest["statistics"] == json.loads(read_blob(clean.directory, clean.root))["statistics"]
    assert everything(poisoned)[-1].inputs[0][:, 0].mean() > 1e4


@pytest.mark.parametrize("mode", ["all", "each", "center"])
def test_normalized_columns_are_what_numpy_makes_of_them(write_job: WriteJob, tmp_path: Path, mode: str) -> None:
    plain = prepare_dataset(table_job(write_job, normalize=None), tmp_path / "plain")
    scaled = prepare_dataset(table_job(write_job, normalize=f'{{ numbers = "{mode}" }}'), tmp_path / "scaled")
    raw = trained(plain).double().numpy()
    if mode == "all":
        mean, deviation = raw.mean(), raw.std()
    else:
        mean, deviation = raw.mean(axis=0), raw.std(axis=0)
    if mode == "center":
        deviation = np.sqrt(((raw - mean) ** 2).mean())
    deviation = np.where(deviation > 0, deviation, 1)
    found = trained(scaled)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), (raw - mean) / deviation, atol=1e-5)
    held_out = everything(plain)[-1].inputs[0].double().numpy()
    np.testing.assert_allclose(everything(scaled)[-1].inputs[0].numpy(), (held_out - mean) / deviation, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 199])
def test_the_size_of_the_chunks_matters_for_rounding_alone(write_job: WriteJob, tmp_path: Path, chunk: int) -> None:
    whole = prepare_dataset(table_job(write_job), tmp_path / "whole")
    pieces = prepare_dataset(table_job(write_job, dataset_options=f"{{ chunk = {chunk} }}"), tmp_path / "pieces")
    for one, other in zip(everything(whole), everything(pieces), strict=True):
        assert torch.equal(one.inputs[1], other.inputs[1])
        assert torch.equal(one.inputs[2], other.inputs[2])
        torch.testing.assert_close(one.inputs[0], other.inputs[0])


def test_hashes_are_hmacs_with_the_key(write_job: WriteJob, tmp_path: Path) -> None:
    job = table_job(write_job)
    shard = everything(prepare_dataset(job, tmp_path / "data"))[0]
    key = Path(job.hash_key).read_bytes()
    for bucket, place in zip(shard.inputs[1].tolist(), shard.inputs[2].tolist(), strict=True):
        digest = hmac.digest(key, b"person\0" + f"person-{place % 40:09}".encode(), "sha256")
        assert bucket == int.from_bytes(digest[:8], "little") % 64


def test_the_key_is_made_for_its_owner_alone_and_used_again(write_job: WriteJob, tmp_path: Path) -> None:
    job = table_job(write_job)
    path = Path(job.hash_key)
    first = prepare_dataset(job, tmp_path / "first")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == 32
    assert prepare_dataset(job, tmp_path / "second").root == first.root
    path.write_bytes(bytes(32))
    other = prepare_dataset(job, tmp_path / "first")
    assert other.root != first.root
    assert set(other.shards).isdisjoint(first.shards)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_may_read_is_refused(write_job: WriteJob, tmp_path: Path, mode: int) -> None:
    job = table_job(write_job)
    Path(job.hash_key).write_bytes(bytes(32))
    Path(job.hash_key).chmod(mode)
    with pytest.raises(JobError, match=rf"hash_key = '{job.hash_key}': others may read it"):
        prepare_dataset(job, tmp_path / "data")


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_of_another_length_is_refused(write_job: WriteJob, tmp_path: Path, length: int) -> None:
    job = table_job(write_job)
    Path(job.hash_key).write_bytes(bytes(length))
    Path(job.hash_key).chmod(0o600)
    with pytest.raises(JobError, match=f"has {length} bytes, must have 32"):
        prepare_dataset(job, tmp_path / "data")


def test_a_key_that_cannot_be_made_or_read_is_an_error_that_names_it(write_job: WriteJob, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"hash_key = '/proc/absent/key': No such file"):
        prepare_dataset(table_job(write_job, hash_key='"/proc/absent/key"'), tmp_path / "data")
    (tmp_path / "folder").mkdir(mode=0o700)
    with pytest.raises(JobError, match=r"hash_key = '.*folder': "):
        prepare_dataset(table_job(write_job, hash_key='"folder"'), tmp_path / "data")


def test_no_raw_identifier_is_in_any_stored_file(write_job: WriteJob, tmp_path: Path) -> None:
    """Of what is hashed (in UTF-8, and as numpy has it), what is dropped, and the key itself."""
    job = table_job(write_job)
    dataset = prepare_dataset(job, tmp_path / "data")
    files = [path for path in dataset.directory.rglob("*") if path.is_file()]
    assert len(files) == 4 + 2 + 2
    key = Path(job.hash_key).read_bytes()
    for path in files:
        data = path.read_bytes()
        assert key not in data
        for word in ("person-0000", "@example.org"):
            assert word.encode() not in data
            assert word.encode("utf-32-le") not in data
            assert word.encode("utf-16-le") not in data


def test_the_shuffling_follows_its_seed(write_job: WriteJob, tmp_path: Path) -> None:
    places = {}
    for seed in (0, 1):
        dataset = prepare_dataset(table_job(write_job, shuffle_seed=str(seed)), tmp_path / str(seed))
        places[seed] = [part.inputs[2].tolist() for part in everything(dataset)]
        order = np.random.RandomState(seed).permutation(200)
        assert places[seed][-2] == order[:30].tolist()
        assert places[seed][-1] == order[30:50].tolist()
        assert [place for part in places[seed][:-2] for place in part] == order[50:].tolist()
    assert places[0] != places[1]


def test_a_test_split_of_the_datasets_own_is_kept_apart(write_job: WriteJob, tmp_path: Path) -> None:
    job = table_job(write_job, dataset_options="{ test = true }", test_examples="0")
    parts = everything(prepare_dataset(job, tmp_path / "data"))
    assert [len(part) for part in parts] == [43, 43, 42, 42, 30, 200]
    assert parts[-1].inputs[2].tolist() == list(range(200))


def test_the_root_is_frozen(dataset: Dataset) -> None:
    """It is in certificates: anybody who prepares the same job must find the same."""
    assert dataset.root.hex() == "6ffc74af377c97e85fa3241665f36e2cd5ea3982b8feafc5f564461def11c422"


def test_the_root_is_a_function_of_the_job(job: TrainingJob, dataset: Dataset, tmp_path: Path) -> None:
    assert prepare_dataset(job, dataset.directory).root == dataset.root
    others = [replace(job, seed=99), replace(job, learning_rate=0.1), replace(job, segments=1)]
    assert {prepare_dataset(other, tmp_path / "same").root for other in others} == {dataset.root}
    changed = [
        replace(job, shards=5),
        replace(job, shuffle_seed=1),
        replace(job, validation_examples=301),
        replace(job, normalize={"inputs": "each"}),
        replace(job, normalize={}),
    ]
    roots = {prepare_dataset(other, tmp_path / "other").root for other in changed}
    assert len(roots | {dataset.root}) == len(changed) + 1


def test_the_root_commits_to_the_files(dataset: Dataset) -> None:
    manifest = json.loads(read_blob(dataset.directory, dataset.root))
    assert [bytes.fromhex(each) for each in manifest["shards"]] == list(dataset.shards)
    assert (manifest["validation"], manifest["test"]) == (dataset.validation.hex(), dataset.test.hex())
    shards = [read_examples(dataset.job, dataset.shard_folder, digest) for digest in dataset.shards]
    assert manifest["sizes"] == list(map(len, shards)) == [285, 284, 284, 284]


def test_shards_are_what_safetensors_writes(write_job: WriteJob, tmp_path: Path) -> None:
    """Byte for byte, with columns of several types."""
    dataset = prepare_dataset(table_job(write_job), tmp_path / "data")
    for path in [*dataset.shard_folder.iterdir(), *dataset.held_out_folder.iterdir()]:
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
        assert set(tensors) == {"numbers", "person", "place", "label"}
        assert safetensors.torch.save(tensors) == data
        assert hashlib.sha256(data).hexdigest() == path.name


def test_shards_are_mapped_into_memory(dataset: Dataset) -> None:
    examples = read_examples(dataset.job, dataset.shard_folder, dataset.shards[2])
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if dataset.shards[2].hex() in line]
    assert mapped
    starts = [[int(bound, 16) for bound in line.split()[0].split("-")] for line in mapped]
    assert any(start <= examples.inputs[0].data_ptr() < end for start, end in starts)
    batch = examples.batch(torch.arange(3))
    assert not any(start <= batch.inputs[0].data_ptr() < end for start, end in starts)
    assert torch.equal(batch.inputs[0], examples.inputs[0][:3])


def test_only_named_files_are_left(dataset: Dataset) -> None:
    assert {path.name for path in dataset.shard_folder.iterdir()} == {shard.hex() for shard in dataset.shards}
    held_out = {dataset.validation.hex(), dataset.test.hex()}
    assert {path.name for path in dataset.held_out_folder.iterdir()} == held_out
    files = {path.name for path in dataset.directory.iterdir() if path.is_file()}
    assert files == {dataset.root.hex(), "prepared.json"}


def test_a_flipped_byte_is_refused_when_it_is_read(job: TrainingJob, tmp_path: Path) -> None:
    dataset = prepare_dataset(job, tmp_path)
    path = dataset.shard_folder / dataset.shards[1].hex()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=f"^{path}: the file's SHA-256 is [0-9a-f]{{64}}, not its name"):
        read_examples(job, dataset.shard_folder, dataset.shards[1])


@pytest.mark.parametrize("name", ["shards", "held-out", "prepared.json"])
def test_what_is_missing_is_made_again(job: TrainingJob, tmp_path: Path, name: str) -> None:
    dataset = prepare_dataset(job, tmp_path)
    path = tmp_path / name
    if path.is_dir():
        path = next(path.iterdir())
    path.unlink()
    assert prepare_dataset(job, tmp_path).root == dataset.root
    assert path.exists()
    everything(dataset)


def test_data_of_another_format_is_refused_by_a_line_that_says_what_to_do(job: TrainingJob, tmp_path: Path) -> None:
    prepare_dataset(job, tmp_path)
    path = tmp_path / "prepared.json"
    path.write_text(path.read_text().replace('"version": 2', '"version": 3'))
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    with pytest.raises(JobError, match=rf"^{path} has format 3, this traincert reads format 2: go on with "):
        prepare_dataset(job, tmp_path)
    assert {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()} == before


KILLED = """
    import os, signal
    import numpy as np
    from pathlib import Path
    from traincert.trainer.datasets import RawDataset

    MARKER = Path(__file__).with_suffix(".marker")

    def table():
        def train():
            left = int(MARKER.read_text())
            for start in range(0, 100, 10):
                MARKER.write_text(str(left := left - 1))
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield {"inputs": np.full((10, 5), start, np.float32), "labels": np.arange(start, start + 10)}
        return RawDataset(train)
"""

PREPARE = """
import sys
from pathlib import Path
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import prepare_dataset
prepare_dataset(TrainingJob.load(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_preparation_that_was_killed_is_repaired_by_the_next(write_job: WriteJob, tmp_path: Path) -> None:
    """Killed while it counts, adds up, and writes."""
    path = write_job(KILLED, dataset='"{module}:table"', validation_examples="20", test_examples="20")
    job = TrainingJob.load(path)
    marker = path.with_name(job.dataset.partition(":")[0] + ".marker")
    left = set()
    for chunk in (15, 37):  # there are 10 for each of four passes
        marker.write_text(str(chunk))
        killed = subprocess.run([sys.executable, "-c", PREPARE, path, tmp_path / "data"], check=False)
        assert killed.returncode == -signal.SIGKILL
        left |= {file.name for file in (tmp_path / "data").rglob(".writing-*")}
    assert left
    marker.write_text("1000")
    found = prepare_dataset(job, tmp_path / "data")
    everything(found)
    files = {file.name for file in (tmp_path / "data").rglob("*") if file.is_file()}
    assert len(files) == 2 + 2 + 2
    marker.write_text("1000")
    assert prepare_dataset(job, tmp_path / "undisturbed").root == found.root


def test_a_prepared_dataset_is_not_prepared_again(write_job: WriteJob, tmp_path: Path) -> None:
    path = write_job(KILLED, dataset='"{module}:table"', validation_examples="20", test_examples="20")
    job = TrainingJob.load(path)
    marker = path.with_name(job.dataset.partition(":")[0] + ".marker")
    marker.write_text("1000")
    first = prepare_dataset(job, tmp_path / "data")
    marker.unlink()
    assert prepare_dataset(job, tmp_path / "data") == first


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"validation_examples": "190"}, "validation_examples = 190, test_examples = 20: must leave one example for"),
        ({"test_examples": "0"}, "test_examples = 0: .* brings no test split: must not be 0"),
        ({"dataset_options": "{ test = true }"}, "test_examples = 20: .* brings a test split of 200: must be 0"),
        ({"dataset_options": "{ size = 1 }"}, r"dataset_options = {'size': 1}: table\(\) got an unexpected"),
        ({"drop": "[]"}, "its train split has a column 'email', which is neither in inputs, nor the target"),
        ({"drop": '["email", "phone"]'}, "its train split has no column 'phone'; it has numbers, place, "),
        ({"target": '"answer"', "drop": '["email", "label"]'}, "its train split has no column 'answer'"),
        ({"hash": None, "hash_key": None}, "has a column 'person' of <U16: encode it, hash it or drop it"),
        ({"dataset": '"{module}:rows"', "dataset_options": "{ poison = 0.0 }"}, "returned dict, not a datasets.Raw"),
        ({"dataset": '"{module}:tabel"'}, "has no function 'tabel'; did you mean 'table'"),
    ],
)
def test_what_a_dataset_does_not_fit_is_refused(
    write_job: WriteJob, tmp_path: Path, changed: dict[str, str | None], words: str
) -> None:
    with pytest.raises(JobError, match=words):
        prepare_dataset(table_job(write_job, **changed), tmp_path / "data")
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []


CHUNKS = """
    import numpy as np
    from traincert.trainer.datasets import RawDataset

    def same():
        return {"inputs": np.zeros((40, 2), np.float32), "labels": np.zeros(40, np.int64)}

    def dataset(kind):
        second = same()
        match kind:
            case "short": second["labels"] = second["labels"][1:]
            case "type": second["inputs"] = second["inputs"].astype(np.float64)
            case "shape": second["inputs"] = second["inputs"].reshape(40, 2, 1)
            case "complex": second["inputs"] = second["inputs"].astype(np.complex64)
            case "empty": return RawDataset(lambda: [])
            case "bool": return RawDataset(lambda: [{"inputs": np.zeros((40, 2), np.bool_), "labels": np.zeros(40)}])
            case "missing": del second["labels"]
        return RawDataset(lambda: [same(), second])
"""


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("short", "columns of different lengths in a chunk"),
        ("type", "'inputs' of different types or shapes in its chunks"),
        ("shape", "'inputs' of different types or shapes in its chunks"),
        ("complex", "'inputs' of different types or shapes in its chunks"),
        ("empty", "its train split is empty"),
        ("bool", "normalize: 'inputs' is of bool, not numbers"),
        ("missing", "its train split has no column 'labels'; it has inputs"),
    ],
)
def test_chunks_that_do_not_fit_together_are_refused(
    write_job: WriteJob, tmp_path: Path, kind: str, words: str
) -> None:
    options = f'{{ kind = "{kind}" }}'
    path = write_job(
        CHUNKS, dataset='"{module}:dataset"', dataset_options=options, validation_examples="9", test_examples="9"
    )
    with pytest.raises(JobError, match=words):
        prepare_dataset(TrainingJob.load(path), tmp_path / "data")


LARGE = """
    import numpy as np
    from traincert.trainer.datasets import RawDataset

    CHUNKS, ROWS, WIDTH = 40, 10_000, 5_000

    def large():
        def train():
            for chunk in range(CHUNKS):
                inputs = np.empty((ROWS, WIDTH), np.uint8)
                inputs[:] = (np.arange(ROWS) * 7 + chunk)[:, None]
                inputs[:, 0] = chunk
                yield {"inputs": inputs, "labels": np.arange(chunk * ROWS, (chunk + 1) * ROWS)}
        return RawDataset(train)
"""

LARGE_MAIN = """
import re
import resource
import sys
from pathlib import Path
import sklearn.datasets
from traincert.trainer.job import TrainingJob
from traincert.trainer.preprocessing import prepare_dataset

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

ALLOWED = 200_000_000
job = TrainingJob.load(Path(sys.argv[1]))
data, rss = status("VmData"), status("RssAnon")
resource.setrlimit(resource.RLIMIT_DATA, (data + ALLOWED, data + ALLOWED))
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
before = status("VmHWM")
prepare_dataset(job, Path(sys.argv[2]))
print(status("VmHWM") - before)
"""


def test_two_gigabytes_are_prepared_with_two_hundred_megabytes(write_job: WriteJob, tmp_path: Path) -> None:
    """Both what the process allocates, which the system limits, and what it ever has in memory."""
    path = write_job(
        LARGE,
        dataset='"{module}:large"',
        normalize=None,
        validation_examples="1000",
        test_examples="1000",
        shards="8",
    )
    done = subprocess.run(
        [sys.executable, "-c", LARGE_MAIN, path, tmp_path / "data"], check=False, capture_output=True, text=True
    )
    try:
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 200_000_000
        job = TrainingJob.load(path)
        size = sum(file.stat().st_size for file in (tmp_path / "data" / "shards").iterdir())
        assert size > 0.99 * 2e9
        manifest = json.loads((tmp_path / "data" / "prepared.json").read_text())
        shard = json.loads((tmp_path / "data" / manifest["root"]).read_text())["shards"][3]
        examples = read_examples(job, tmp_path / "data" / "shards", bytes.fromhex(shard))
        for row in (0, 1, 1000, len(examples) - 1):
            chunk, number = divmod(int(examples.target[row]), 10_000)
            assert examples.inputs[0][row, :3].tolist() == [chunk, *[(number * 7 + chunk) % 256] * 2]
            assert len(set(examples.inputs[0][row].tolist())) <= 2
    finally:
        for file in (tmp_path / "data").rglob("*"):
            if file.is_file():
                os.truncate(file, 0)


FLOATS = """
    import numpy as np
    from traincert.trainer.datasets import RawDataset

    def floats():
        def train():
            for chunk in range(2):
                inputs = np.full((10_000, 1_250), chunk, np.float32)
                yield {"inputs": inputs, "labels": np.arange(10_000)}
        return RawDataset(train)
"""


def test_a_chunk_is_normalized_with_four_times_its_memory(write_job: WriteJob, tmp_path: Path) -> None:
    """Chunks of 50 MB, as the two gigabytes' ones, in float32."""
    path = write_job(
        FLOATS, dataset='"{module}:floats"', normalize='{ inputs = "each" }', validation_examples="9", test_examples="9"
    )
    done = subprocess.run(
        [sys.executable, "-c", LARGE_MAIN, path, tmp_path / "data"], check=False, capture_output=True, text=True
    )
    for file in (tmp_path / "data").rglob("*"):
        if file.is_file():
            os.truncate(file, 0)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000_000


MESSY = """
    import numpy as np
    import torch
    from traincert.trainer import RawDataset

    COUNT = 120

    def chunk():
        age = np.arange(COUNT, dtype=np.float32)
        age[7:10] = np.nan
        sex = np.array([None if i == 5 else "fm"[i % 2] for i in range(COUNT)], dtype=object)
        return {
            "age": age[:, None],
            "sex": sex,
            "tensor": torch.arange(COUNT, dtype=torch.float32)[:, None],
            "short": np.arange(COUNT, dtype=np.uint16),
            "listed": list(range(COUNT)),
            "endless": np.where(np.arange(COUNT) == 9, np.inf, 1).astype(np.float32)[:, None],
            "labels": np.arange(COUNT) % 2,
        }

    def of(*names):
        def train():
            whole = chunk()
            for start in range(0, COUNT, 50):
                yield {name: whole[name][start : start + 50] for name in [*names, "labels"]}
        return train

    def data(names):
        return RawDataset(of(*names))

    def exhausted():
        once = of("tensor")()
        return RawDataset(lambda: once)

    def growing():
        passes = []
        def train():
            passes.append(None)
            yield from of("tensor")()
            if len(passes) > 1:
                yield from of("tensor")()
        return RawDataset(train)
"""

MESSY_JOB: dict[str, str | None] = {
    "dataset": '"{module}:data"',
    "normalize": None,
    "validation_examples": "20",
    "test_examples": "20",
    "shards": "2",
}


def messy_job(write_job: WriteJob, name: str, **changed: str | None) -> TrainingJob:
    of_one = {"dataset_options": f'{{ names = ["{name}"] }}', "inputs": f'["{name}"]'}
    return TrainingJob.load(write_job(MESSY, **(MESSY_JOB | of_one | changed)))


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("age", {}, "column 'age' in which 3 rows have a missing value .*, the first is row 7; mend the data or set"),
        ("age", {"normalize": '{ age = "each" }'}, "column 'age' in which 3 rows have a missing"),
        (
            "endless",
            {"normalize": '{ endless = "each" }', "missing": "{ endless = 0.0 }"},
            "column 'endless' in which 1 rows have an infinite value, the first is row 9; mend the data$",
        ),
        ("sex", {"hash": "{ sex = 8 }", "hash_key": '"key"'}, "column 'sex' in which 1 rows .* row 5; .* to a text"),
        ("sex", {"encode": '["sex"]'}, "column 'sex' in which 1 rows"),
        ("short", {}, "has a column 'short' of uint16: convert it to one of float64, float32"),
        ("listed", {}, "has a column 'listed' of list, not a numpy array or a tensor"),
        ("age", {"missing": '{ age = "unknown" }'}, "missing: 'age' is in neither hash nor encode: should be a number"),
        (
            "tensor",
            {"dataset": '"{module}:exhausted"', "dataset_options": None},
            "gave 120 examples when it was called first, and 0 when it was called again",
        ),
        (
            "tensor",
            {"dataset": '"{module}:growing"', "dataset_options": None},
            "gave 120 examples when it was called first, and more than 120 when it was called again",
        ),
    ],
)
def test_data_that_cannot_be_right_is_named(
    write_job: WriteJob, tmp_path: Path, name: str, changed: dict[str, str | None], words: str
) -> None:
    with pytest.raises(JobError, match=words):
        prepare_dataset(messy_job(write_job, name, **changed), tmp_path / "data")


def test_infinite_values_that_may_be_meant_are_told(
    write_job: WriteJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_dataset(messy_job(write_job, "endless"), tmp_path / "data")
    assert "column 'endless' in which 1 rows have an infinite value, the first is row 9" in caplog.text


def test_missing_values_are_replaced_as_the_job_says(write_job: WriteJob, tmp_path: Path) -> None:
    mean = prepare_dataset(messy_job(write_job, "age", missing='{ age = "mean" }'), tmp_path / "mean")
    every = torch.cat([part.inputs[0] for part in everything(mean)])
    whole = torch.cat([part.inputs[0] for part in everything(mean)[:-2]])
    known = [value for value in whole[:, 0].tolist() if value == int(value)]
    assert sorted(set(every[:, 0].tolist()) & set(map(float, range(7, 10)))) == []
    assert len(every) == 120
    (fill,) = {value for value in every[:, 0].tolist() if value != int(value)} or {sum(known) / len(known)}
    assert fill == pytest.approx(sum(known) / len(known), rel=1e-6)

    number = prepare_dataset(messy_job(write_job, "age", missing="{ age = -1.0 }"), tmp_path / "number")
    assert sum((part.inputs[0] == -1).sum() for part in everything(number)) == 3


def test_codes_do_not_collide(write_job: WriteJob, tmp_path: Path) -> None:
    job = messy_job(write_job, "sex", encode='["sex"]', missing='{ sex = "unknown" }')
    codes = torch.cat([part.inputs[0] for part in everything(prepare_dataset(job, tmp_path / "data"))])
    assert torch.bincount(codes).tolist() == [60, 59, 1]  # f, m, unknown


def test_values_that_share_a_bucket_are_counted(
    write_job: WriteJob, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_dataset(table_job(write_job, hash="{ person = 2 }"), tmp_path / "data")
    assert "40 of the 40 values of 'person' share one of the 2 buckets with another value" in caplog.text
