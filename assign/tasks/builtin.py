"""The built-in tasks, by name. To add one, add a function here and a row to ``BUILTIN``."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from assign.errors import TaskError
from assign.tasks.data import Batches, Images, random_crop, read_cifar, read_digits, read_fashion_mnist, read_text
from assign.tasks.models import GPT, ResNet
from assign.tasks.task import Metrics, Task, TaskOptions

SPLIT_SEED = 0
"""Seed of the split into training and test data, the same in every run."""


def digits(options: TaskOptions) -> Task:
    """Return the task of scikit-learn's 1797 handwritten digits, enlarged to 16×16, with a ResNet of three blocks.

    150 steps train it to 99 %, and almost all of a step's memory is activations.
    """
    if options.data is not None:
        raise TaskError("task 'digits' comes with scikit-learn and reads no directory: leave --data out.")
    images, labels = read_digits()
    images = F.interpolate((images - 0.305) / 0.376, size=(16, 16), mode="bilinear")  # mean and deviation of all pixels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    images, labels = images[order].to(options.device), labels[order].to(options.device)
    held_out = 517  # leaves ten batches of 128
    epochs = options.epochs or 15
    return Task(
        name="digits",
        model=partial(ResNet, channels_in=1, widths=_scaled((16, 32, 64), options), blocks=1, classes=10),
        loss=classification_loss,
        train=Batches(
            images[held_out:],
            labels[held_out:],
            size=options.batch_size or 128,
            prepare=partial(random_crop, pad=1, flip=False, fill=-0.305 / 0.376),
        ),
        evaluate=partial(accuracy, images=images[:held_out], labels=labels[:held_out], size=held_out),
        optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9, weight_decay=4e-3, nesterov=True),
        scheduler=partial(CosineAnnealingLR, T_max=epochs),
        epochs=epochs,
    )


def cifar(options: TaskOptions, *, classes: int) -> Task:
    """Return the task of CIFAR with ResNet-18, trained as in arXiv 2301.13464, in fewer epochs."""
    mean, deviation = CIFAR_MOMENTS[classes]
    return photographs(
        options,
        name=f"cifar{classes}",
        data=read_cifar(options.data, classes),
        mean=mean,
        deviation=deviation,
        model=partial(ResNet, channels_in=3, widths=_scaled((64, 128, 256, 512), options), blocks=2, classes=classes),
        pad=4,
        epochs=30,
    )


def fashion_mnist(options: TaskOptions) -> Task:
    """Return the task of Fashion-MNIST with a ResNet of six blocks."""
    return photographs(
        options,
        name="fashion-mnist",
        data=read_fashion_mnist(options.data),
        mean=(0.2860,),  # of the training images
        deviation=(0.3530,),
        model=partial(ResNet, channels_in=1, widths=_scaled((16, 32, 64), options), blocks=2, classes=10),
        pad=0,
        epochs=10,
    )


def shakespeare(options: TaskOptions) -> Task:
    """Return the task of characters in Shakespeare's plays with a GPT of four layers; the last tenth is test data."""
    text = read_text(options.data, "tinyshakespeare.txt", "shakespeare")
    symbols = sorted(set(text))
    number = {symbol: index for index, symbol in enumerate(symbols)}
    codes = torch.tensor([number[symbol] for symbol in text], device=options.device)
    windows = codes[: (len(codes) - 1) // _CONTEXT * _CONTEXT + 1].unfold(0, _CONTEXT + 1, _CONTEXT)
    held_out = max(1, len(windows) // 10)
    epochs = options.epochs or 10
    heads = 4
    width = max(1, round(128 * (options.width or 1) / (8 * heads))) * 8 * heads
    inputs, following = windows[:, :-1], windows[:, 1:]
    return Task(
        name="shakespeare",
        model=partial(GPT, symbols=len(symbols), context=_CONTEXT, width=width, layers=4, heads=heads),
        loss=next_symbol_loss,
        train=Batches(inputs[:-held_out], following[:-held_out], size=options.batch_size or 32, prepare=lambda x, _: x),
        evaluate=partial(judge_text, inputs=inputs[-held_out:], following=following[-held_out:]),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
        scheduler=partial(CosineAnnealingLR, T_max=epochs),
        epochs=epochs,
    )


BUILTIN: Mapping[str, Callable[[TaskOptions], Task]] = MappingProxyType(
    {
        "digits": digits,
        "cifar10": partial(cifar, classes=10),
        "cifar100": partial(cifar, classes=100),
        "fashion-mnist": fashion_mnist,
        "shakespeare": shakespeare,
    }
)

CIFAR_MOMENTS = {  # mean and deviation of red, green and blue, as in the code of arXiv 2301.13464
    10: ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    100: ((0.5074, 0.4867, 0.4411), (0.2011, 0.1987, 0.2025)),
}
_CONTEXT = 128


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of a batch of (inputs, labels)."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def next_symbol_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the next symbol at every position."""
    inputs, following = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), following.flatten())


def accuracy(
    model: nn.Module,
    *,
    images: Tensor,
    labels: Tensor,
    size: int,
    prepare: Callable[[Tensor], Tensor] = lambda images: images,
) -> Metrics:
    """Return the share of images that the model classifies correctly, computed in batches of ``size``."""
    right = 0
    for start in range(0, len(labels), size):
        logits = model(prepare(images[start : start + size]))
        right += int((logits.argmax(1) == labels[start : start + size]).sum())
    return {"accuracy": right / len(labels)}


def judge_text(model: nn.Module, *, inputs: Tensor, following: Tensor) -> Metrics:
    """Return the mean cross-entropy in nats, and the share of correct predictions, over all symbols."""
    loss, right = 0.0, 0
    for start in range(0, len(inputs), 64):
        logits = model(inputs[start : start + 64]).flatten(0, 1).float()
        wanted = following[start : start + 64].flatten()
        loss += F.cross_entropy(logits, wanted, reduction="sum").item()
        right += int((logits.argmax(1) == wanted).sum())
    return {"val_loss": loss / following.numel(), "accuracy": right / following.numel()}


def photographs(
    options: TaskOptions,
    *,
    name: str,
    data: Images,
    mean: Iterable[float],
    deviation: Iterable[float],
    model: Callable[[], nn.Module],
    pad: int,
    epochs: int,
) -> Task:
    """Return a task on images stored as bytes on the device.

    Training images are shifted by up to ``pad`` pixels and flipped at random.
    """
    device = options.device
    epochs = options.epochs or epochs
    normalise = _Normalise(mean, deviation, device)

    def prepare(images: Tensor, generator: torch.Generator) -> Tensor:
        return normalise(random_crop(images, generator, pad=pad, flip=True) if pad else images)

    images, labels = data.test_images.to(device), data.test_labels.to(device)
    return Task(
        name=name,
        model=model,
        loss=classification_loss,
        train=Batches(
            data.train_images.to(device), data.train_labels.to(device), size=options.batch_size or 128, prepare=prepare
        ),
        evaluate=partial(accuracy, images=images, labels=labels, size=500, prepare=normalise),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        scheduler=partial(CosineAnnealingLR, T_max=epochs),
        epochs=epochs,
    )


class _Normalise:
    """Convert bytes to numbers of mean 0 and standard deviation 1, per channel."""

    def __init__(self, mean: Iterable[float], deviation: Iterable[float], device: str) -> None:
        self._mean = torch.tensor([*mean], device=device).mul(255).view(1, -1, 1, 1)
        self._scale = torch.tensor([*deviation], device=device).mul(255).reciprocal().view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return (images.float() - self._mean) * self._scale


def _scaled(widths: tuple[int, ...], options: TaskOptions) -> tuple[int, ...]:
    return tuple(max(1, round(width * (options.width or 1))) for width in widths)
