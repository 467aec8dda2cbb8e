"""Raw data: what a dataset function returns, and the dataset functions that come with the trainer."""

import gzip
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traincert.trainer.errors import JobError

Array = npt.NDArray[Any]
Chunk = Mapping[str, Array]
"""Consecutive examples: an array (N, ...) for each column, by name. N is the same for all columns."""

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # Debian's package dataset-fashion-mnist
_DIGITS = "sklearn/datasets/data/digits.csv.gz"  # a line for each image: 64 pixels and the class
PYTHON_DOCS = "/usr/share/doc/python3.11/html/_sources"  # Debian's package python3.11-doc


@dataclass(frozen=True)
class RawDataset:
    """A dataset before preprocessing. It does not have to fit into memory.

    Preprocessing calls each function several times, and holds one chunk at a time. A function must give the same chunks
    each time.
    """

    train: Callable[[], Iterable[Chunk]]
    test: Callable[[], Iterable[Chunk]] | None = None
    """The dataset's own test split, if it has one."""


def digits() -> RawDataset:
    """Return scikit-learn's digits: inputs (1797, 64) float32, 0 to 16; labels (1797,) int64, 0 to 9."""

    def train() -> Iterator[Chunk]:
        # What scikit-learn's load_digits reads, without its import, which takes a second.
        table = np.loadtxt(str(distribution("scikit-learn").locate_file(_DIGITS)), delimiter=",")
        yield {"inputs": table[:, :-1].astype(np.float32), "labels": table[:, -1].astype(np.int64)}

    return RawDataset(train)


def fashion_mnist(folder: str = FASHION_MNIST) -> RawDataset:
    """Return Fashion-MNIST: inputs (N, 1, 28, 28) uint8; labels (N,) int64, 0 to 9.

    N is 60,000, and 10,000 in the test split. Source: Zalando Research, arXiv:1708.07747, MIT licence; Debian's package
    dataset-fashion-mnist. Reading its chunks raises JobError if a file is missing, or is not an IDX file.
    """

    def split(name: str) -> Iterator[Chunk]:
        images = _read_idx(Path(folder, f"{name}-images-idx3-ubyte.gz"))
        labels = _read_idx(Path(folder, f"{name}-labels-idx1-ubyte.gz"))
        yield {"inputs": images[:, None], "labels": labels.astype(np.int64)}

    return RawDataset(lambda: split("train"), lambda: split("t10k"))


def text(folder: str = PYTHON_DOCS, pattern: str = "**/*.txt", context: int = 128) -> RawDataset:
    """Return the bytes of text files, in the order of their paths, as windows: inputs and labels (N, context) uint8.

    A label is the byte that follows its input. Inputs do not overlap. The default is Python's own documentation
    (PSF licence, version 2), from Debian's package python3.11-doc.

    Reading its chunks raises JobError if no file in `folder` matches `pattern`.
    """

    def train() -> Iterator[Chunk]:
        paths = sorted(Path(folder).glob(pattern))
        if not paths:
            raise JobError(f"no file {pattern!r} in {folder}; Debian's package python3.11-doc has the default files")
        rest = b""
        for path in paths:
            data = rest + path.read_bytes()
            windows = max(0, len(data) - 1) // context
            rest = data[windows * context :]
            if windows:
                raw = np.frombuffer(data, np.uint8, windows * context + 1)
                yield {"inputs": raw[:-1].reshape(windows, context), "labels": raw[1:].reshape(windows, context)}

    return RawDataset(train)


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a gzipped IDX file (big-endian header, unsigned bytes); format: http://yann.lecun.com/exdb/mnist."""
    try:
        data = gzip.decompress(path.read_bytes())
        zeros, kind, dimensions = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{dimensions}I", data, 4)
    except FileNotFoundError:
        raise JobError(f"{path}: no such file; Debian's package dataset-fashion-mnist has it") from None
    except (EOFError, OSError, zlib.error, struct.error) as error:
        raise JobError(f"{path}: not an IDX file of unsigned bytes: {error}") from None
    if (zeros, kind) != (0, 8) or len(data) != 4 + 4 * dimensions + np.prod(shape):
        raise JobError(f"{path}: not an IDX file of unsigned bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
