"""Search and apply plans for ``transformers.Trainer``.

Its loss depends on what the trainer hands the model (labels, how many items a batch has), so a plan is searched through
the trainer itself.
"""

import contextlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from assign import planner
from assign.executor.apply import autocast
from assign.numerics.promotion import THRESHOLD, Promotion
from assign.plan.plan import Assignment


class Writer(Protocol):
    """What scalars are written to: ``torch.utils.tensorboard.SummaryWriter`` is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """One point of a curve."""


def search(trainer: Trainer, **asked: Any) -> Assignment:
    """A plan for one step of the trainer: its model, its first batch, its loss.

    Args:
        trainer: with a training dataset; it need not have trained.
        asked: as :func:`assign.search` takes it: ``budget="60%"``, …
    Raises:
        AssignError: as :func:`assign.search`.
    """
    if trainer.optimizer_cls_and_kwargs is None:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args)
    else:
        kind, options = trainer.optimizer_cls_and_kwargs
    batch = next(iter(trainer.get_train_dataloader()))
    items = _items(trainer, batch)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = trainer.compute_loss(model, batch, num_items_in_batch=items)
        assert isinstance(found, Tensor)  # a tuple only where the outputs are asked for
        return found

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = kind(parameters, **options)
        return made

    assert trainer.model is not None
    return planner.search(trainer.model, batch, loss, optimizer=optimizer, **asked)


def _items(trainer: Trainer, batch: Any) -> Any:
    _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    return items


class PlanCallback(TrainerCallback):
    """Trains under a plan: ``Trainer(…, callbacks=[PlanCallback(plan)])``.

    From the beginning of training to its end the trainer's model computes under the plan, in evaluation too; then it is
    the plain model again. Tensors that overflow too often are promoted.

    Attributes:
        promotion: what was promoted, and the plan as it became.

    Args:
        plan: for the trainer's step: what :func:`search` found. One that stores masters, gradients or buffers narrowly
            is refused: give the trainer ``assign.apply(model, plan)`` and ``assign.optimizer``'s instead.
        writer: gets ``assign/promoted``, ``assign/overflow_max``, ``assign/overflow_mean`` whenever the trainer logs.
        backend: as in :func:`assign.apply`.
        promote_every: steps between two measurements of overflow, as ``every`` in :class:`assign.Promotion`.
        promote_threshold: as ``threshold`` there.
    """

    def __init__(
        self,
        plan: Assignment,
        *,
        writer: Writer | None = None,
        backend: str = "inductor",
        promote_every: int | None = None,
        promote_threshold: float = THRESHOLD,
    ) -> None:
        self.promotion = Promotion(plan, every=promote_every, threshold=promote_threshold)
        self._plan, self._backend, self._writer = plan, backend, writer
        self._planned = contextlib.ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """From here on the model computes under the plan."""
        self._planned.enter_context(
            autocast(given["model"], self._plan, backend=self._backend, promotion=self.promotion)
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Promote what overflowed, after each optimizer step."""
        self.promotion.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the scalars."""
        if self._writer is not None:
            for name, value in self.promotion.scalars().items():
                self._writer.add_scalar(name, value, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The model is its plain self again."""
        self._planned.close()
