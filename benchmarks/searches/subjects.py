"""What the searches are tried on: two small models on real data, and what is taken of them once."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assign.plan.keys import base_key
from assign.plan.recipes import EXPONENTIATED, LOSS_OPS
from assign.plan.table import Role, TensorTable
from assign.tasks.builtin import photographs, shakespeare
from assign.tasks.data import Images, read_fashion_mnist
from assign.tasks.models import ResNet
from assign.tasks.task import Metrics, Task, TaskOptions
from assign.tracing.nonfinite import non_finite
from assign.tracing.tracer import trace

HELD_OUT, _SIZE = 8, 32  # batches, and examples in each
_EXAMPLES = 20_000


def resnet18(data: Path, small: bool) -> Task:
    """ResNet-18 in its CIFAR form, a sixteenth as wide (a few channels if ``small``), on Fashion-MNIST."""
    found = read_fashion_mnist(data)
    side = slice(10, 18) if small else slice(None)
    images = Images(
        train_images=found.train_images[:_EXAMPLES, :, side, side].contiguous(),
        train_labels=found.train_labels[:_EXAMPLES],
        test_images=found.test_images[:, :, side, side].contiguous(),
        test_labels=found.test_labels,
    )
    widths = (2,) if small else (4, 8, 16, 32)
    made = photographs(
        TaskOptions(batch_size=8 if small else 32),
        name="ResNet-18 a sixteenth as wide on Fashion-MNIST",
        data=images,
        mean=(0.2860,),
        deviation=(0.3530,),
        model=partial(ResNet, channels_in=1, widths=widths, blocks=1 if small else 2, classes=10),
        pad=0,
        epochs=1,
    )
    return dataclasses.replace(
        made, scheduler=None, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
    )


def gpt(data: Path, small: bool) -> Task:
    """The built-in task ``shakespeare``: a character GPT of four layers, 32 wide, at a learning rate for few steps."""
    made = shakespeare(TaskOptions(data=data, width=0.25, batch_size=2 if small else 4))
    return dataclasses.replace(
        made,
        scheduler=None,
        name="character GPT of four layers, 32 wide",
        optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.1),
    )


MODELS: Mapping[str, Callable[[Path, bool], Task]] = {"resnet18": resnet18, "gpt": gpt}
WARM_UP = 20  # steps


class Paced:
    """An optimizer whose learning rate rises over the first steps and falls in a line to zero at the last of ``steps``.

    What chance does to a short training's last loss is several times smaller so.
    """

    def __init__(self, make: Callable[..., Optimizer], steps: int) -> None:
        self._make, self._steps = make, steps

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        optimizer = self._make(parameters)
        highest = [group["lr"] for group in optimizer.param_groups]
        count = itertools.count()

        def pace(*_: Any) -> None:
            step = next(count)
            share = min(1.0, (step + 1) / WARM_UP) * max(0.0, 1 - step / self._steps)
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * share

        optimizer.register_step_pre_hook(pace)
        return optimizer


class First:
    """The first ``count`` batches of what can be read again and again."""

    def __init__(self, batches: Iterable[Any], count: int) -> None:
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._batches, self._count)


@dataclass(frozen=True)
class Subject:
    """One model, trained for ``steps`` steps; a seed is initial weights and an order of the data."""

    task: Task
    steps: int

    @classmethod
    def make(cls, name: str, data: Path, steps: int, small: bool) -> "Subject":
        task = MODELS[name](data, small)
        return cls(dataclasses.replace(task, optimizer=Paced(task.optimizer, steps)), steps)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.task.make_model().train()

    def batches(self, seed: int, count: int | None = None) -> list[Any]:
        """As many as are trained on, or ``count``."""
        torch.manual_seed(seed)
        return list(First(self.task.train, count or self.steps))

    @cached_property
    def table(self) -> TensorTable:
        return trace(self.model(0), self.batches(0, 1)[0], self.task.loss, self.task.optimizer)

    @cached_property
    def free(self) -> frozenset[str]:
        """Tensors that drawn plans may round, with the copies that wait: not the loss's, and none with infinities."""
        infinite = non_finite(self.model(0), self.batches(0, 1)[0], self.task.loss)
        spared = {row.key for row in self.table.tensors if row.op in EXPONENTIATED | LOSS_OPS} | infinite
        rows = [*self.table.paper_tensors, *(row for row in self.table.tensors if row.role is Role.SAVED)]
        return frozenset(row.key for row in rows if base_key(row.key) not in spared)

    @cached_property
    def tuned(self) -> Task:
        """The task for a search by training: as many steps in one epoch, judged as :meth:`judge` does."""
        train = First(self.task.train, self.steps)
        return dataclasses.replace(self.task, train=train, evaluate=self.judge, epochs=1)

    @cached_property
    def held_out(self) -> list[tuple[Tensor, Tensor]]:
        """Batches that no training sees: of what the task is judged on."""
        where = self.task.evaluate.keywords if isinstance(self.task.evaluate, partial) else {}
        inputs, labels = where.get("images", where.get("inputs")), where.get("labels", where.get("following"))
        assert isinstance(inputs, Tensor)
        assert isinstance(labels, Tensor)
        prepare = where.get("prepare", lambda chosen: chosen)
        parts = zip(inputs.split(_SIZE), labels.split(_SIZE), strict=True)
        return [(prepare(some), right) for some, right in itertools.islice(parts, HELD_OUT)]

    def judge(self, model: nn.Module) -> Metrics:
        """Mean loss and share of right answers on what was held out; the model in eval mode."""
        losses, right, count = [], 0, 0
        for inputs, labels in self.held_out:
            logits = model(inputs)
            losses.append(float(nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())))
            right += int((logits.argmax(-1) == labels).sum())
            count += labels.numel()
        return {"held_out_loss": sum(losses) / len(losses), "accuracy": right / count}
