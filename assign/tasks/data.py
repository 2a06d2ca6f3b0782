"""Data sets read from a directory or from scikit-learn, without torchvision; batches made on the device."""

import gzip
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assign.errors import TaskError

Array = np.ndarray[Any, np.dtype[np.uint8]]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A data set in bytes: images [n, channels, height, width] and labels [n], for training and for judging."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Batches:
    """Batches of (inputs, labels), in another order every epoch; what is left over at the end waits for the next.

    The order is drawn from torch's global generator when an epoch starts, as a ``DataLoader`` does: who seeds that
    repeats the epoch.
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
    """Each image moved by up to ``pad`` pixels both ways, the border filled; mirrored every other time if ``flip``."""
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
    # Indices apart from each other put the indexed dimensions first: [n, height, width, channels].
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def read_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits: images [1797, 1, 8, 8] between 0 and 1, labels [1797].

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
    """CIFAR-10 or CIFAR-100, as difference-coded archives or as torchvision keeps it.

    Raises:
        TaskError: neither is there; says where it looked.
    """
    name = f"cifar{classes}"
    archives = (f"{name}-train.npz", f"{name}-test.npz")
    batches = _CIFAR_BATCHES[classes]
    root = _find(directory, name, [archives, batches.train + batches.test])
    if (root / archives[0]).exists():
        return _images(_decode_cifar(root / archives[0]), _decode_cifar(root / archives[1]))
    train = [_read_pickle(root / file, batches.label) for file in batches.train]
    images = np.concatenate([pixels for pixels, _ in train]), np.concatenate([labels for _, labels in train])
    return _images(images, _read_pickle(root / batches.test[0], batches.label))


def read_fashion_mnist(directory: Path | None) -> Images:
    """Fashion-MNIST, as one archive of plain arrays or as torchvision keeps it, compressed or not.

    Raises:
        TaskError: neither is there; says where it looked.
    """
    archive = "fashion_mnist.npz"
    raw = [
        tuple(f"{folder}{file}{end}" for file in _IDX) for folder in ("FashionMNIST/raw/", "") for end in ("", ".gz")
    ]
    root = _find(directory, "fashion-mnist", [(archive,), *raw])
    if (root / archive).exists():
        z = _load_archive(root / archive, ("train_images", "train_labels", "test_images", "test_labels"))
        train, test = (z["train_images"], z["train_labels"]), (z["test_images"], z["test_labels"])
    else:
        files = next(files for files in raw if all((root / file).exists() for file in files))
        images, labels, test_images, test_labels = (_read_idx(root / file) for file in files)
        train, test = (images, labels), (test_images, test_labels)
    return _images((train[0][:, None], train[1]), (test[0][:, None], test[1]))


def read_text(directory: Path | None, file: str, task: str) -> str:
    """A text file of ``directory``.

    Raises:
        TaskError: it is not there.
    """
    path = _find(directory, task, [(file,)]) / file
    return path.read_text(encoding="utf-8")


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
    """``directory``, if it holds every file of one of the layouts."""
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
    return "It is to hold " + ", or ".join(" and ".join(files) for files in layouts) + "."


def _images(train: tuple[Array, Array], test: tuple[Array, Array]) -> Images:
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in (*train, *test)]
    return Images(
        train_images=tensors[0], train_labels=tensors[1].long(), test_images=tensors[2], test_labels=tensors[3].long()
    )


def _load_archive(path: Path, names: tuple[str, ...]) -> dict[str, Array]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise TaskError(
            f"{path} cannot be read: {error}. It is to be a NumPy archive with {', '.join(names)}; copy it again."
        ) from error


def _decode_cifar(path: Path) -> tuple[Array, Array]:
    """Images [n, 3, 32, 32] and labels of an archive that keeps differences, modulo 256.

    The three planes are R−G, G and B−G; each pixel is then less the one to its left, and that less the row above.
    """
    archive = _load_archive(path, ("delta", "labels"))
    planes = archive["delta"]
    for axis in (2, 3):
        planes = np.cumsum(planes, axis=axis, dtype=np.uint8)
    red, green, blue = planes
    return np.stack([red + green, green, blue + green], axis=1), archive["labels"]


class _ArraysOnly(pickle.Unpickler):
    """Reads the pickles of CIFAR, which hold NumPy arrays and plain values, and refuses to build anything else."""

    def find_class(self, module: str, name: str) -> Any:
        found = _SAFE.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")
        return found


_SAFE: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # by its public way in
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}


def _read_pickle(path: Path, label: str) -> tuple[Array, Array]:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images = np.asarray(content["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        return images, np.asarray(content[label], dtype=np.uint8)
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, OSError) as error:
        raise TaskError(
            f"{path} cannot be read: {error}. It is to be a batch file of CIFAR's Python version; copy it again."
        ) from error


def _read_idx(path: Path) -> Array:
    """An array in the IDX format: two zero bytes, type, number of axes, big-endian sizes, then the bytes.

    Source: "The IDX file format" in LeCun, Cortes and Burges, The MNIST database.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = content[3]
        shape = np.frombuffer(content, dtype=">u4", count=axes, offset=4)
        if content[:3] != b"\0\0\x08":
            raise ValueError("it does not start as an IDX file of bytes")
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (ValueError, IndexError, EOFError, OSError) as error:
        raise TaskError(
            f"{path} cannot be read: {error}. It is to be an IDX file of Fashion-MNIST; copy it again."
        ) from error
