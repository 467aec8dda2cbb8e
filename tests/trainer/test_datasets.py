"""Data as it comes, before anything is done to it."""

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from traincert.trainer.datasets import digits, fashion_mnist, text
from traincert.trainer.errors import JobError


def test_digits_are_1797_images() -> None:
    (chunk,) = digits().train()
    assert chunk["inputs"].shape == (1797, 64)
    assert chunk["inputs"].dtype == np.float32
    assert (chunk["inputs"].min(), chunk["inputs"].max()) == (0, 16)
    assert chunk["labels"].dtype == np.int64
    assert set(chunk["labels"].tolist()) == set(range(10))
    assert len(np.unique(chunk["inputs"], axis=0)) == 1797  # no image is there twice
    assert all(map(np.array_equal, chunk.values(), load_digits(return_X_y=True)))


def write_idx(path: Path, array: npt.NDArray[np.uint8], header: bytes | None = None) -> None:
    shape = struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress((header or bytes([0, 0, 8, array.ndim])) + shape + array.tobytes()))


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    for name, count in (("train", 5), ("t10k", 3)):
        images = np.arange(count * 28 * 28).reshape(count, 28, 28).astype(np.uint8)
        write_idx(tmp_path / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", np.arange(count).astype(np.uint8))
    return tmp_path


def test_fashion_mnist_is_read_from_its_files(idx_folder: Path) -> None:
    raw = fashion_mnist(str(idx_folder))
    (train,) = raw.train()
    assert raw.test is not None
    (test,) = raw.test()
    assert train["inputs"].shape == (5, 1, 28, 28)
    assert test["inputs"].shape == (3, 1, 28, 28)
    assert train["inputs"].reshape(-1).tolist() == [number % 256 for number in range(5 * 28 * 28)]
    assert test["labels"].tolist() == [0, 1, 2]


def test_a_missing_file_of_fashion_mnist_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=f"^{tmp_path}/train-images.*: no such file; .*dataset-fashion-mnist has it"):
        list(fashion_mnist(str(tmp_path)).train())


@pytest.mark.parametrize("header", [bytes([0, 0, 9, 1]), bytes([1, 0, 8, 1]), bytes([0, 0, 8, 0])])
def test_a_file_of_another_kind_is_refused(idx_folder: Path, header: bytes) -> None:
    path = idx_folder / "train-labels-idx1-ubyte.gz"
    write_idx(path, np.zeros(5, np.uint8), header)
    with pytest.raises(JobError, match=f"^{path}: not an IDX file of unsigned bytes"):
        list(fashion_mnist(str(idx_folder)).train())


DAMAGED = [b"no gzip", gzip.compress(b"\0\0"), gzip.compress(b"\0\0\x08\x03\0"), b""]


@pytest.mark.parametrize("data", DAMAGED, ids=range(4))
def test_a_damaged_file_is_refused(idx_folder: Path, data: bytes) -> None:
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(data)
    with pytest.raises(JobError, match=f"^{path}: not an IDX file of unsigned bytes"):
        list(fashion_mnist(str(idx_folder)).train())


def test_text_is_windows_whose_labels_are_the_next_bytes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    contents = {"b.txt": bytes(range(50, 90)), "a.txt": b"", "sub/c.txt": bytes(range(90, 93)), "d.rst": b"x" * 100}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    chunks = list(text(str(tmp_path), context=8).train())
    inputs, labels = (np.concatenate([chunk[name] for chunk in chunks]) for name in ("inputs", "labels"))
    assert inputs.shape == labels.shape == (5, 8)
    assert inputs.dtype == labels.dtype == np.uint8
    assert inputs.reshape(-1).tolist() == list(range(50, 90))
    assert labels.reshape(-1).tolist() == list(range(51, 91))


def test_without_text_files_the_folder_and_the_package_are_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=rf"no file '\*\*/\*\.txt' in {tmp_path}; .*python3\.11-doc"):
        list(text(str(tmp_path)).train())
