"""Data sets read from a directory or from scikit-learn, without torchvision; batches are made on the device."""

import gzip
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assign.errors import TaskError
from assign.tasks.cifar_pickle import read_pickle

_MOST_BYTES = 2**28
"""Largest size of a decompressed file or array that is read; the images of CIFAR take 154 MB."""

Array = np.ndarray[Any, np.dtype[np.uint8]]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A data set in bytes: images [n, channels, height, width] and labels [n], for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Batches:
    """Batches of (inputs, labels), in a new order every epoch. An incomplete last batch is dropped.

    The order is drawn from torch's global generator when an epoch starts, as in a ``DataLoader``: the same seed repeats
    the epoch.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, *, size: int, prepare: Augment) -> None:
        if size > len(labels):
            raise TaskError(f"batch_size is {size}, but there are {len(labels)} training examples; give at most that.")
        self._inputs, self._labels = inputs, labels
        self._size, self._prepare = size, prepare

    def __len__(self) -> int:
        return len(self._labels) // self._size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._labels.device
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
        order = torch.randperm(len(self._labels), generator=generator, device=device)
        for start in range(0, len(self) * self._size, self._size):
            chosen = order[start : start + self._size]
            yield self._prepare(self._inputs[chosen], generator), self._labels[chosen]


def random_crop(images: Tensor, generator: torch.Generator, *, pad: int, flip: bool, fill: float = 0) -> Tensor:
    """Return the images shifted at random by up to ``pad`` pixels, with filled borders; ``flip`` mirrors half."""
    n, _, height, width = images.shape
    device = images.device
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad), value=fill)
    down, right = torch.randint(2 * pad + 1, (2, n, 1), generator=generator, device=device)
    rows = down + torch.arange(height, device=device)
    columns = right + torch.arange(width, device=device)
    if flip:
        mirrored = torch.randint(2, (n, 1), generator=generator, device=device, dtype=torch.bool)
        columns = torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(n, device=device)[:, None, None]
    # Indices that are not adjacent put the indexed dimensions first: [n, height, width, channels].
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def read_digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's handwritten digits: images [1797, 1, 8, 8] between 0 and 1, labels [1797].

    Raises:
        TaskError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError(
            "task 'digits' reads scikit-learn's digits, and scikit-learn is not installed. "
            "Run: pip install 'precision-assign[demo]'"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(digits.target)


def read_cifar(directory: Path | None, classes: int) -> Images:
    """Return CIFAR-10 or CIFAR-100, from difference-coded archives or from the files of torchvision.

    Raises:
        TaskError: neither is there; says where it looked.
    """
    name = f"cifar{classes}"
    archives = (f"{name}-train.npz", f"{name}-test.npz")
    batches = _CIFAR_BATCHES[classes]
    root = _find(directory, name, [archives, batches.train + batches.test])
    if (root / archives[0]).exists():
        return _images(_decode_cifar(root / archives[0]), _decode_cifar(root / archives[1]), classes, root)
    train = [_read_pickle(root / file, batches.label) for file in batches.train]
    images = np.concatenate([pixels for pixels, _ in train]), np.concatenate([labels for _, labels in train])
    return _images(images, _read_pickle(root / batches.test[0], batches.label), classes, root)


def read_fashion_mnist(directory: Path | None) -> Images:
    """Return Fashion-MNIST, from one archive of plain arrays or from the files of torchvision, compressed or not.

    Raises:
        TaskError: neither is there; says where it looked.
    """
    archive = "fashion_mnist.npz"
    raw = [
        tuple(f"{folder}{file}{end}" for file in _IDX) for folder in ("FashionMNIST/raw/", "") for end in ("", ".gz")
    ]
    root = _find(directory, "fashion-mnist", [(archive,), *raw])
    if (root / archive).exists():
        z = _load_archive(root / archive, {"train_images": 3, "train_labels": 1, "test_images": 3, "test_labels": 1})
        train, test = (z["train_images"], z["train_labels"]), (z["test_images"], z["test_labels"])
    else:
        files = next(files for files in raw if all((root / file).exists() for file in files))
        images, labels, test_images, test_labels = (_read_idx(root / file) for file in files)
        train, test = (images, labels), (test_images, test_labels)
    return _images((train[0][:, None], train[1]), (test[0][:, None], test[1]), 10, root)


def read_text(directory: Path | None, file: str, task: str) -> str:
    """Return a text file of ``directory``.

    Raises:
        TaskError: the file does not exist, or is not text.
    """
    path = _find(directory, task, [(file,)]) / file
    try:
        return _content(path).decode("utf-8")
    except (ValueError, OSError) as error:
        raise TaskError(f"{path} cannot be read: {error}. It must be text in UTF-8; copy it again.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _CifarBatches:
    train: tuple[str, ...]
    test: tuple[str, ...]
    label: str


_CIFAR_BATCHES = {
    10: _CifarBatches(
        train=tuple(f"cifar-10-batches-py/data_batch_{n}" for n in range(1, 6)),
        test=("cifar-10-batches-py/test_batch",),
        label="labels",
    ),
    100: _CifarBatches(train=("cifar-100-python/train",), test=("cifar-100-python/test",), label="fine_labels"),
}
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def _find(directory: Path | None, task: str, layouts: list[tuple[str, ...]]) -> Path:
    """Return ``directory`` if it has every file of one of the layouts."""
    if directory is None:
        raise TaskError(f"task {task!r} needs its data: give the directory with --data. {_describe(layouts)}")
    if not directory.is_dir():
        raise TaskError(f"task {task!r}: there is no directory {directory}. {_describe(layouts)}")
    if any(all((directory / file).exists() for file in files) for files in layouts):
        return directory
    missing = [file for files in layouts for file in files if not (directory / file).exists()]
    raise TaskError(
        f"task {task!r}: the data is not in {directory}. {_describe(layouts)}\n  Not found there: {', '.join(missing)}"
    )


def _describe(layouts: list[tuple[str, ...]]) -> str:
    return "It must contain " + ", or ".join(" and ".join(files) for files in layouts) + "."


def _images(train: tuple[Array, Array], test: tuple[Array, Array], classes: int, root: Path) -> Images:
    """Check and convert the arrays of a data set; ``root`` is its directory, for errors.

    Raises:
        TaskError: an image has no label, or a label no image, or no such class exists.
    """
    for part, (images, labels) in (("training", train), ("test", test)):
        if images.dtype != np.uint8 or labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise TaskError(
                f"{root}: the {part} images are {images.dtype}, the labels {labels.dtype} in {labels.ndim} axes. "
                "Allowed: images of bytes, and a whole number as the label of each. Copy the data again."
            )
        if len(images) != len(labels) or not len(labels):
            raise TaskError(
                f"{root}: there are {len(images)} {part} images and {len(labels)} labels. There must be one label "
                "per image, and at least one image. Copy the data again."
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise TaskError(
                f"{root}: the {part} labels go from {labels.min()} to {labels.max()}. Allowed: 0 to {classes - 1}. "
                "Copy the data again."
            )
    tensors = [torch.from_numpy(np.array(array, order="C")) for array in (*train, *test)]
    return Images(
        train_images=tensors[0], train_labels=tensors[1].long(), test_images=tensors[2], test_labels=tensors[3].long()
    )


def _load_archive(path: Path, axes: dict[str, int]) -> dict[str, Array]:
    """Return the arrays of a NumPy archive by name; ``axes`` gives the number of axes of each."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _read_array(archive, f"{name}.npy", count) for name, count in axes.items()}
    except (*_UNREADABLE_ARCHIVE, KeyError, ValueError, OSError, EOFError) as error:
        raise TaskError(
            f"{path} cannot be read: {error}. It must be a NumPy archive with {', '.join(axes)}; copy it again."
        ) from error


_UNREADABLE_ARCHIVE = (zipfile.BadZipFile, zlib.error, RuntimeError)
"""Errors of zipfile for damaged archives; RuntimeError for encrypted entries and unknown compression methods."""


def _read_array(archive: zipfile.ZipFile, name: str, axes: int) -> Array:
    """Return one array. The size in its header is compared with the size of the entry, which is bounded."""
    size = archive.getinfo(name).file_size
    if size > _MOST_BYTES:
        raise ValueError(f"{name} has {size:,} bytes, more than the {_MOST_BYTES:,} of the largest data set")
    with archive.open(name) as file:
        start = file.read(10)
        head = _HEAD.fullmatch(start[:8] + file.read(int.from_bytes(start[8:], "little")))
        if head is None:
            raise ValueError(f"{name} is not an array of whole numbers in row-major order, as numpy.savez writes it")
        shape = [int(length) for length in head["shape"].split(b",") if length.strip()]
        dtype = np.dtype(head["dtype"].decode())
        if len(shape) != axes:
            raise ValueError(f"{name} has {len(shape)} axes instead of {axes}")
        content = file.read()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{name} has {len(content):,} bytes, and its header says {math.prod(shape) * dtype.itemsize:,}"
        )
    return np.frombuffer(content, dtype=dtype).reshape(shape)


_HEAD = re.compile(
    rb"\x93NUMPY\x01\x00\{'descr': '(?P<dtype>\|u1|<i4|<i8)', 'fortran_order': False, "
    rb"'shape': \((?P<shape>(?:[0-9]{1,9}, ?){0,4}(?:[0-9]{1,9})?)\), \} *\n"
)
"""Header of an array file, without the two bytes after the version that give its length.

NumPy's own reader evaluates this header as a Python literal. Source: numpy.lib.format, version 1.0.
"""


def _content(path: Path) -> bytes:
    """Return the content of a file, decompressed if its name ends in ``.gz``.

    Raises:
        ValueError: it is larger than any data set.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content: bytes = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than the {_MOST_BYTES:,} bytes of the largest data set")
    return content


def _decode_cifar(path: Path) -> tuple[Array, Array]:
    """Return images [n, 3, 32, 32] and labels of an archive that stores differences, modulo 256.

    The three planes are R−G, G and B−G; from each pixel its left neighbour was subtracted, and then the row above.
    """
    archive = _load_archive(path, {"delta": 4, "labels": 1})
    planes = archive["delta"]
    if planes.shape[0] != 3 or planes.shape[2:] != (32, 32) or planes.dtype != np.uint8:
        raise TaskError(
            f"{path} cannot be read: its delta has the shape {planes.shape} of {planes.dtype}. It must be 3 × images "
            "× 32 × 32 bytes; copy it again."
        )
    for axis in (2, 3):
        planes = np.cumsum(planes, axis=axis, dtype=np.uint8)
    red, green, blue = planes
    return np.stack([red + green, green, blue + green], axis=1), archive["labels"]


def _read_pickle(path: Path, label: str) -> tuple[Array, Array]:
    try:
        content = read_pickle(_content(path))
        labels = content[label]
        if isinstance(labels, list) and not all(type(value) is int for value in labels):
            raise ValueError(f"its {label} are not whole numbers")
        if not isinstance(content["data"], np.ndarray) or not isinstance(labels, (list, np.ndarray)):
            raise ValueError(f"its data is not an array, or its {label} are not a list")
        return content["data"].reshape(-1, 3, 32, 32), np.asarray(labels, dtype=np.int64)
    except (EOFError, LookupError, ValueError, OverflowError, OSError) as error:
        raise TaskError(
            f"{path} cannot be read: {error}. It must be a batch file of CIFAR's Python version; copy it again."
        ) from error


def _read_idx(path: Path) -> Array:
    """Return an array in the IDX format: two zero bytes, type, number of axes, big-endian sizes, then the bytes.

    Source: "The IDX file format" in LeCun, Cortes and Burges, The MNIST database.
    """
    try:
        content = _content(path)
        if content[:3] != b"\0\0\x08" or len(content) < 4:
            raise ValueError("it does not start as an IDX file of bytes")
        axes = 3 if "idx3" in path.name else 1
        if content[3] != axes or len(content) < 4 + 4 * axes:
            raise ValueError(f"it has {content[3]} axes and {len(content)} bytes; {axes} axes are required")
        shape = [int(size) for size in np.frombuffer(content, dtype=">u4", count=axes, offset=4)]
        if math.prod(shape) != len(content) - 4 - 4 * axes:
            raise ValueError(f"its sizes {shape} do not fit its {len(content):,} bytes")
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise TaskError(
            f"{path} cannot be read: {error}. It must be an IDX file of Fashion-MNIST; copy it again."
        ) from error
